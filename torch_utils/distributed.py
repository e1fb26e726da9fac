"""The process group, under torchrun or without it."""

from __future__ import annotations

import atexit
import importlib
import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dnnlib import UserError
from dnnlib.errors import share_failures

T = TypeVar("T")
#: How long a process waits for one that is slower. Rank 0 alone writes files and compares features meanwhile.
TIMEOUT = timedelta(minutes=30)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def init(device: torch.device) -> None:
    """Join the group that torchrun describes; without torchrun there is one process and no group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are those of the current device
    if "RANK" not in os.environ or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives a restart, so what the processes before have left there would be taken for addresses.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    group = dist.PrefixStore("group", store)
    # Its functions have the group of the moment as a default argument. Optimizers import it: if they were the first to,
    # it would keep this group to the interpreter's end; see `shutdown`.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=TIMEOUT)
    share_failures(Board(dist.PrefixStore("failures", store), rank, world))
    if backend == "gloo":
        atexit.register(shutdown)  # for a command that ends in an error


class Board:
    """What ended a rank, for rank 0 to read; it outlives the collective operations that fail then."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world

    def post(self, message: str) -> None:
        try:
            self._store.set(str(self._rank), message)
        except RuntimeError:  # rank 0, which may hold the store, has ended too
            return

    def read(self, wait: float) -> str | None:
        """What some other rank has posted within `wait` seconds."""
        deadline = time.monotonic() + wait
        try:
            while True:
                for rank in range(self._world):
                    if rank != self._rank and self._store.check([str(rank)]):
                        return f"{self._store.get(str(rank)).decode()} (rank {rank})"
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.05)
        except RuntimeError:  # the store has ended
            return None


def shutdown() -> None:
    """Leave the group and end its threads.

    That has to be over before the interpreter ends: a thread of gloo that then lets go of a tensor aborts the process
    (`terminate called without an active exception`).
    """
    if dist.is_initialized():
        share_failures(None)
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def expected_world_size() -> int:
    """Number of processes, also before `init`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is rank 0, also before `init`."""
    return int(os.environ.get("RANK", "0")) == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def on_first_rank(action: Callable[[], T]) -> T:
    """The result of `action`, run on rank 0 alone, on every rank; its click or OS error is raised on every rank too."""
    result: list[Any] = [None, None]
    if rank() == 0:
        try:
            result[0] = action()
        except (UserError, OSError) as error:
            result[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def average_gradients(params: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks, in one collective call for each dtype."""
    if not dist.is_initialized():
        return
    grads: dict[torch.dtype, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grads.setdefault(param.grad.dtype, []).append(param.grad)
    for same in grads.values():
        flat = torch.cat([grad.flatten() for grad in same])
        dist.all_reduce(flat)
        flat /= world_size()
        for grad, mean in zip(same, flat.split([grad.numel() for grad in same])):
            grad.copy_(mean.view_as(grad))


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum `value` over ranks, in place and without waiting for the device."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
