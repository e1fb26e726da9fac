"""What a distillation run takes: network evaluations, arithmetic, memory and time; and the micro-batch that fits.

A trajectory costs T evaluations of the teacher and, for a student of E evaluations, E of it with gradients, each about
as much arithmetic as three without: T + 3 E evaluation-equivalents of F operations per sample (a multiplication and an
addition are two). Time is taken from a short calibration with random weights on the device itself. Memory is counted
from the tensors that a forward pass on the meta device would keep for the backward pass.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dnnlib import UserError, format_count, format_duration
from models.detectors.lpips import LPIPS
from models.diffusers_precond import DiffusersPrecond
from models.loading import build_on_meta, read_guide
from models.model import SamplingSettings, Student
from models.precond import Precond
from models.registry import get_row
from torch_utils.device import PLAIN, PRECISIONS, use_path

from .config import DistillConfig, micro_batch, source_settings
from .distill import Teacher, load_source

#: A backward pass has two products for each one of the forward pass.
TRAINED = 3
#: Tokens of the text encoder of Stable Diffusion 1.
TOKENS = 77


def random_inputs(net: Precond, batch: int, device: torch.device) -> dict[str, Any]:
    """Arguments for `net` of the shapes that it sees in a run."""
    shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
    inputs: dict[str, Any] = {"x": torch.randn(shape, device=device), "sigma": torch.ones([], device=device)}
    if net.label_dim:
        inputs["class_labels"] = torch.eye(net.label_dim, device=device)[torch.arange(batch) % net.label_dim]
    if isinstance(net, DiffusersPrecond) and net.context_dim:
        inputs["condition"] = net.example_condition(batch, device)
    elif net.context_dim:
        inputs["condition"] = torch.randn([batch, TOKENS, net.context_dim], device=device)
    return inputs


def fill_randomly(module: nn.Module, seed: int = 0) -> None:
    """Weights that keep features of about unit variance, for a module without any."""
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict(keep_vars=True).items():
        value = torch.randn(tensor.shape, generator=rng) / max(tensor[0].numel() if tensor.ndim > 1 else 400, 1) ** 0.5
        if tensor.ndim == 1 and name.endswith(("weight", "running_var")):
            value = 1 + value
        tensor.data.copy_(value)


def flops_per_evaluation(net: Precond) -> int:
    """Operations of one evaluation for one sample, of the network as published; `net` may be on the meta device."""
    net = copy.deepcopy(net).to("meta")
    with use_path(PLAIN), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(**random_inputs(net, 1, torch.device("meta")))
    return counter.get_total_flops()


def activation_bytes(net: Precond, dtype: torch.dtype, batch: int) -> int:
    """What a training step of `batch` samples keeps for its backward pass."""
    net = copy.deepcopy(net).to("meta").train().requires_grad_(True)
    net.compute_dtype = dtype
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no two storages have the same address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net(**random_inputs(net, 1, torch.device("meta")))
    return batch * sum(size for key, size in kept.items() if key not in weights)


@dataclass(frozen=True)
class Cost:
    """What a run takes on one process.

    Attributes:
        teacher, student: evaluations per trajectory, of SFD-v their means; guidance doubles the teacher's.
        flops: operations of one evaluation of one sample.
        memory: bytes, of weights, gradients, optimizer and the activations of a micro-batch.
        teacher_work: operations of an evaluation of the teacher, on average, as a part of `flops`; not 1 where a second
            network guides it.
    """

    teacher: float
    student: float
    flops: int
    memory: int
    teacher_work: float = 1.0

    @property
    def flops_per_trajectory(self) -> float:
        return (self.teacher * self.teacher_work + TRAINED * self.student) * self.flops


def run_cost(
    config: DistillConfig,
    net: Precond,
    micro_batch_size: int,
    source: SamplingSettings | None = None,
    guide: Precond | None = None,
) -> Cost:
    """What a run of `config` takes; `net` is the teacher's, without memory, and so is `guide`.

    `source` are the settings of the student that a second stage distils.
    """
    choices = config.step_choices
    teacher = [config.teacher_plan(n, source).nfe for n in choices]
    student = [replace(config.student_plan(n), guidance_rate=1).nfe for n in choices]
    dtype, size = PRECISIONS[config.precision], sum(p.numel() for p in net.parameters())
    # In float32: the teacher, the student, its gradients, two moments of Adam; besides, both as they are computed with.
    weights = size * (5 * 4 + 2 * dtype.itemsize * (dtype != torch.float32))
    states = (max(choices) + 4) * micro_batch_size * net.img_channels * net.img_resolution**2 * 4
    memory = weights + states + activation_bytes(net, dtype, micro_batch_size)
    flops, teacher_work = flops_per_evaluation(net), 1.0
    if guide is not None:
        teacher_work = (1 + flops_per_evaluation(guide) / flops) / 2
        memory += sum(p.numel() for p in guide.parameters()) * (4 + dtype.itemsize * (dtype != torch.float32))
    return Cost(sum(teacher) / len(teacher), sum(student) / len(student), flops, memory, teacher_work)


@dataclass(frozen=True)
class Calibration:
    """Seconds that one sample takes on the device, for an evaluation and for a training step of the student."""

    evaluation: float
    training: float
    is_measured: bool = True

    def seconds(self, cost: Cost, images: int) -> float:
        """Of `images` trajectories on one process."""
        return images * (cost.teacher * cost.teacher_work * self.evaluation + cost.student * self.training)


def calibrate(net: Precond, device: torch.device, dtype: torch.dtype, micro: int, seconds: float = 5.0) -> Calibration:
    """Time a network of this shape with random weights for about so many seconds.

    One that takes longer for a single sample is taken to run at half the speed of a matrix product.
    """
    evaluation = 2 * flops_per_evaluation(net) / matrix_peak(device, dtype)
    if 2 * (1 + TRAINED) * evaluation > seconds:
        return Calibration(evaluation, TRAINED * evaluation, is_measured=False)
    frozen = copy.deepcopy(net).to_empty(device=device)
    fill_randomly(frozen)
    frozen.compute_dtype = dtype
    trained = copy.deepcopy(frozen).train().requires_grad_(True)
    frozen.eval().requires_grad_(False)

    def evaluate(batch: int) -> None:
        with torch.no_grad():
            frozen(**random_inputs(frozen, batch, device))

    def train(batch: int) -> None:
        trained.zero_grad(set_to_none=True)
        trained(**random_inputs(trained, batch, device)).abs().sum().backward()

    evaluation, training = (_per_sample(action, device, micro, seconds / 2) for action in (evaluate, train))
    return Calibration(evaluation, training)


def _per_sample(action: Callable[[int], None], device: torch.device, largest: int, seconds: float) -> float:
    """Seconds for a sample, at the largest batch that the time allows; the first call of each size is not counted."""
    deadline, batch = time.perf_counter() + seconds, 1
    action(batch)
    took = timed(partial(action, batch), device)
    while batch < largest and 6 * took < deadline - time.perf_counter():
        batch = min(2 * batch, largest)
        action(batch)
        took = timed(partial(action, batch), device)
    while time.perf_counter() + took < deadline:
        took = min(took, timed(partial(action, batch), device))
    return took / batch


def matrix_peak(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of a product of square matrices."""
    # Several at a time: the processor time of other threads comes in steps of milliseconds.
    size, count = (2048, 4) if device.type == "cpu" else (8192, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 * count / min(timed(lambda: [a @ b for _ in range(count)], device) for _ in range(repeats + 1))


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `action` takes; of the processor, over the threads, on the CPU, as if nothing else were running."""
    if device.type == "cpu":
        start = time.process_time()
        action()
        return (time.process_time() - start) / torch.get_num_threads()
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def estimate(
    config: DistillConfig, device: torch.device, processes: int = 1, batch_gpu: int | None = None, seconds: float = 5.0
) -> str:
    """What `train.py --dry-run` says of a run's cost on this device, after a calibration of about so many seconds."""
    net, guide = _networks(config)
    micro = micro_batch(config.batch, batch_gpu, processes)
    cost = run_cost(config, net, micro, source_settings(config), guide)
    calibration = calibrate(net, device, PRECISIONS[config.precision], micro, seconds)
    length = calibration.seconds(cost, config.total_images) / processes
    rate = cost.flops_per_trajectory * config.total_images / processes / length
    size = sum(p.numel() for p in net.parameters())
    how = "" if calibration.is_measured else ", taken to be half that of a matrix product"
    return (
        f"Network: {format_count(size)} parameters, {format_count(cost.flops)}FLOP for an evaluation\n"
        f"Trajectory: {cost.teacher:g} evaluations of the teacher, {cost.student:g} of the student with gradients, "
        f"{format_count(cost.flops_per_trajectory)}FLOP\n"
        f"Memory: about {cost.memory / 2**30:.1f} GiB on each process for micro-batches of {micro}\n"
        f"Time: about {format_duration(length)} on {processes}× {device.type} in {config.precision} "
        f"({format_count(rate)}FLOP/s each{how}), without pictures and start, if nothing else runs"
    )


def _networks(config: DistillConfig) -> tuple[Precond, Precond | None]:
    """The network of a run, and what guides it; of a registered teacher without weights, which need not be there."""
    if config.is_second_stage or config.model_path is not None:
        source = load_source(config)
        source.check_guidance(config.training_rate)
        return source.net, source.guide
    net = build_on_meta(get_row(config.dataset_name))
    return net, None if config.guide is None else read_guide(Path(config.guide), net)


def largest_micro_batch(teacher: Teacher, student: Student, lpips: LPIPS | None, share: int) -> int:
    """The largest micro-batch of a process' `share` that fits in the memory of its GPU; off the GPU, all of it.

    It is tried out: one evaluation of the teacher, and one step of the student with room for what Adam will keep.
    """
    device = next(student.parameters()).device
    if device.type != "cuda":
        return share

    def trial(size: int) -> None:
        adam = [torch.empty_like(p) for p in student.parameters() if p.requires_grad for _ in range(2)]
        inputs = random_inputs(student.net, size, device)
        kept = [torch.empty_like(inputs["x"]) for _ in range(2 * max(teacher.config.step_choices))]
        with torch.no_grad():
            target = teacher.model.net(**inputs)
        student.train()
        new = student.net(**inputs, step_condition=student.sampling.step_condition)
        loss = (new - target).abs().sum()
        if lpips is not None:
            loss = loss + lpips(new, target).sum()
        loss.backward()
        student.zero_grad(set_to_none=True)
        del adam, kept

    return fitting_size(trial, share)


def fitting_size(trial: Callable[[int], None], share: int) -> int:
    """The first of `share` and its divisors, each at most half of the one before, for which `trial` finds memory.

    All processes get the smallest that any of them found.

    Raises:
        UserError: one sample is too much.
    """
    size = share
    while not _fits(trial, size):
        torch.cuda.empty_cache()
        if size == 1:
            raise UserError(
                "one sample does not fit in the memory of the GPU; use a larger one, or --gradient_checkpointing=True"
            )
        size = max(d for d in range(1, size // 2 + 1) if share % d == 0)
    torch.cuda.empty_cache()
    if dist.is_initialized():
        sizes: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(sizes, size)
        size = min(sizes)
    return size


def _fits(trial: Callable[[int], None], size: int) -> bool:
    try:
        trial(size)
    except torch.OutOfMemoryError:
        return False
    return True
