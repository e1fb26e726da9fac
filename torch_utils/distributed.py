"""The process group, under torchrun or without it.

Tensors on the CPU go over gloo, tensors on a GPU over NCCL. Objects, barriers and what ends a process go over gloo
everywhere: they reach the other processes also where a GPU hangs in a collective operation.

Gradients are averaged after the backward pass, in buckets, rather than by torch's DistributedDataParallel. All that it
would add is the overlap with the backward pass of the last micro-batch; in about 50 two-process runs on the CPU it hung
at exit twice. docs/speed.md estimates what the overlap would be worth.
"""

from __future__ import annotations

import atexit
import importlib
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dnnlib import UserError, first_line
from dnnlib.errors import environment_number, share_failures

T = TypeVar("T")
#: In which dtype gradients are sent.
COMPRESSIONS = {"none": None, "bf16": torch.bfloat16}
#: Gradients that are reduced at a time: large enough for the bandwidth, small enough to start early.
BUCKET_BYTES = 32 << 20
#: How long a process waits for one that is slower. Rank 0 alone writes files and compares features meanwhile.
TIMEOUT = timedelta(minutes=30)


def init(device: torch.device) -> None:
    """Join the group that torchrun describes; without torchrun there is one process and no group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are those of the current device
    if "RANK" not in os.environ or dist.is_initialized():
        return
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except ValueError as error:  # variables that are missing, or no numbers
        raise UserError(f"the environment has RANK, but {first_line(error)}; start by torchrun, or unset it") from None
    # torchrun's store outlives a restart, so what the processes before have left there would be taken for addresses.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    on_gpu = device.type == "cuda"
    group = dist.PrefixStore("group", store)
    # Its functions have the group of the moment as a default argument. Optimizers import it: if they were the first to,
    # it would keep this group to the interpreter's end; see `shutdown`.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=group,
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    share_failures(Board(dist.PrefixStore("failures", store), rank, world))
    atexit.register(_abandon)


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
    """Leave the group and end its threads, once all processes have done their work.

    That has to be over before the interpreter ends: a thread of gloo that then lets go of a tensor aborts the process
    (`terminate called without an active exception`).
    """
    if dist.is_initialized():
        share_failures(None)
        dist.destroy_process_group()


def _abandon() -> None:
    """Leave the group of a command that ends in an error.

    Operations of NCCL that other processes will never join are given up, for destroying the group would wait for them.
    """
    if not dist.is_initialized():
        return
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)  # since torch 2.6
    if "nccl" not in dist.get_backend_config():
        shutdown()
    elif abort is not None:
        abort()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(count: int, of: int | None = None) -> range:
    """This rank's part (or that `of` another) of `range(count)`: contiguous, in order, sizes differ by at most one."""
    part, parts = rank() if of is None else of, world_size()
    return range(count * part // parts, count * (part + 1) // parts)


def expected_world_size() -> int:
    """Number of processes, also before `init`."""
    return environment_number("WORLD_SIZE", 1)


def barrier() -> None:
    """Wait for all processes; over gloo, which a busy GPU does not hold up."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(()))


def on_first_rank(action: Callable[[], T]) -> T:
    """The result of `action`, run on rank 0 alone, on every rank; so is a UserError or OSError that it raises."""
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


def average_gradients(params: Iterable[nn.Parameter], compression: torch.dtype | None = None) -> None:
    """Replace every gradient by its mean over ranks.

    Buckets of about `BUCKET_BYTES` are reduced while the next one is filled; two are in memory at a time.

    Args:
        compression: the dtype that is sent, bfloat16 for half of the bytes; None sends gradients as they are.
    """
    if not dist.is_initialized():
        return
    grads = [param.grad for param in params if param.grad is not None]
    on_its_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
    for bucket in gradient_buckets(grads, BUCKET_BYTES):
        flat = torch.cat([grad.flatten() for grad in bucket])
        if compression is not None:
            flat = flat.to(compression)
        on_its_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(on_its_way) > 1:
            _receive(*on_its_way.popleft())
    while on_its_way:
        _receive(*on_its_way.popleft())


def gradient_buckets(grads: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """The gradients in order, in groups of one dtype that end once they hold `bucket_bytes`."""
    for _, same in itertools.groupby(grads, key=lambda grad: grad.dtype):
        bucket, size = [], 0
        for grad in same:
            bucket.append(grad)
            size += grad.nbytes
            if size >= bucket_bytes:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def _receive(bucket: list[Tensor], flat: Tensor, work: Any) -> None:
    work.wait()  # on a GPU the stream waits, not this process
    means = flat.to(bucket[0].dtype).div_(world_size()).split([grad.numel() for grad in bucket])
    torch._foreach_copy_(bucket, [mean.view_as(grad) for grad, mean in zip(bucket, means)])


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum `value` over ranks, in place and without waiting for the device."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
