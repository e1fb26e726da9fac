"""The process group, under torchrun or without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def init(device: torch.device) -> None:
    """Join the group that torchrun describes; without torchrun there is one process and no group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are those of the current device
    if "RANK" not in os.environ or dist.is_initialized():
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shutdown() -> None:
    if dist.is_initialized():
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
        except (click.ClickException, OSError) as error:
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
