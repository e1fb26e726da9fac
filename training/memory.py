"""Memory of a run: counted on the meta device, where a training step has sizes but no values; or tried out on a GPU.

On the meta device every storage that an operation makes is known until it is freed, so the peak of a step is that of
the run, up to what the kernels work in and what the allocator wastes.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnnlib import UserError, first_line
from models.model import Student
from models.precond import Precond
from torch_utils.device import PRECISIONS
from torch_utils.distributed import BUCKET_BYTES

from .config import DistillConfig
from .distill import Perceptual, Teacher
from .inputs import random_inputs

META = torch.device("meta")
#: Bytes of gradients that are on their way between processes, at most.
BUCKETS = 2 * BUCKET_BYTES
#: What the message of a RuntimeError says where memory ran out: the driver, the libraries, the host's allocator.
OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    # cuDNN finds no algorithm, or fails inside, where the workspace does not fit.
    r"|unable to find an engine|find a valid cuDNN algorithm|CUDNN_STATUS_(INTERNAL_ERROR|NOT_SUPPORTED)"
    r"|CUDNN_STATUS_EXECUTION_FAILED|CUBLAS_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes on one process.

    Attributes:
        weights: student and teacher with its guide in float32, both of these as they are computed with besides; two
            moments of Adam.
        gradients: in float32, and the buckets in which several processes average them.
        states: of the trajectories of all samples of the process.
        step: peak of a training step of one micro-batch, beyond all that.
    """

    weights: int
    gradients: int
    states: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.step


def run_memory(
    config: DistillConfig,
    net: Precond,
    micro_batch_size: int,
    processes: int = 1,
    gradient_checkpointing: bool = False,
    guide: Precond | None = None,
) -> Memory:
    """Memory of a run of `config`; `net` is the teacher's, and may be on the meta device, as may its `guide`."""
    dtype, size = PRECISIONS[config.precision], sum(p.numel() for p in net.parameters())
    frozen = size + (0 if guide is None else sum(p.numel() for p in guide.parameters()))
    share = config.batch // processes
    gradients = 4 * size
    peak = step_memory(net, dtype, micro_batch_size, gradient_checkpointing, accumulates=micro_batch_size < share)
    state = 4 * net.img_channels * net.img_resolution**2
    return Memory(
        weights=4 * 3 * size + frozen * (4 + (dtype.itemsize if dtype != torch.float32 else 0)),
        gradients=gradients + (min(BUCKETS, gradients) if processes > 1 else 0),
        states=_states_kept(config) * share * state,
        step=max(peak - gradients, 0),
    )


def step_memory(
    net: Precond, dtype: torch.dtype, batch: int, gradient_checkpointing: bool = False, accumulates: bool = False
) -> int:
    """Peak bytes of a forward and backward pass with its gradients, beside the weights of `net`.

    `accumulates`: there are gradients of an earlier micro-batch already.
    """
    net = copy.deepcopy(net).to("meta").train().requires_grad_(True)
    net.compute_dtype = dtype
    if gradient_checkpointing:
        net.checkpoint_gradients()
    with StorageCounter() as counter:
        for _ in range(1 + accumulates):
            net(**random_inputs(net, batch, META)).abs().sum().backward()
    return counter.peak


class StorageCounter(TorchDispatchMode):
    """Bytes of all storages that operations make while it is on, and are still alive.

    Attributes:
        peak: the most there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


def largest_micro_batch(teacher: Teacher, student: Student, perceptual: Perceptual | None, share: int) -> int:
    """The largest micro-batch of a process' `share` that fits in the memory of its GPU; off the GPU, all of it."""
    on_gpu = next(student.parameters()).device.type == "cuda"
    return fitting_size(memory_trial(teacher, student, perceptual, share), share) if on_gpu else share


def memory_trial(
    teacher: Teacher, student: Student, perceptual: Perceptual | None, share: int
) -> Callable[[int], None]:
    """Takes the memory of an iteration with micro-batches of a given size, and leaves nothing.

    That is one evaluation of the teacher, and one step of the student, beside room for all that an iteration keeps: the
    states of the whole share, gradients while they are averaged, and what the optimizer will hold.
    """
    device = next(student.parameters()).device

    def trial(size: int) -> None:
        adam = [torch.empty_like(p) for p in student.parameters() if p.requires_grad for _ in range(2)]
        buckets = torch.empty(BUCKETS if dist.is_initialized() else 0, dtype=torch.uint8, device=device)
        inputs = random_inputs(student.net, size, device)
        states = inputs["x"].new_empty([_states_kept(teacher.config), share, *student.shape])
        with torch.no_grad():
            target = teacher.model.net(**inputs)
        student.train()
        try:
            new = student.net(**inputs, step_condition=student.sampling.step_condition)
            loss = (new - target).abs().sum()
            if perceptual is not None:
                cond = inputs.get("class_labels", inputs.get("condition"))
                loss = loss + perceptual(new, target, cond).sum()
            loss.backward()
        finally:
            student.zero_grad(set_to_none=True)
        del adam, buckets, states

    return trial


def _states_kept(config: DistillConfig) -> int:
    """States of a sample at the end of an iteration: the start, and what teacher and student passed."""
    return 2 * max(config.step_choices) + 2


def fitting_size(trial: Callable[[int], None], share: int) -> int:
    """The first of `candidates(share)` for which `trial` finds memory.

    All processes get the smallest that any of them found.

    Raises:
        UserError: one sample is too much.
    """
    for size in candidates(share):
        error = memory_error(trial, size)
        torch.cuda.empty_cache()
        if error is None:
            break
    else:
        raise UserError(
            f"one sample does not fit in the memory of the GPU ({error}); use a larger one, or "
            "--gradient_checkpointing=True"
        )
    if dist.is_initialized():
        sizes: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(sizes, size)
        size = min(sizes)
    return size


def candidates(share: int) -> list[int]:
    """`share` and its divisors down to 1, each at most half of the one before."""
    sizes = [share]
    while sizes[-1] > 1:
        sizes.append(max(d for d in range(1, sizes[-1] // 2 + 1) if share % d == 0))
    return sizes


def memory_error(trial: Callable[[int], object], size: int) -> str | None:
    """What `trial` says when it runs out of memory, in whichever kind of error; None if it does not."""
    try:
        trial(size)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        return first_line(error)
    return None
