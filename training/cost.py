"""What a distillation run takes: network evaluations, arithmetic and time, with the memory that `memory` counts.

A trajectory costs T evaluations of the teacher and, for a student of E evaluations, E of it with gradients, each about
as much arithmetic as three without: T + 3 E evaluation-equivalents of F operations per sample (a multiplication and an
addition are two). Time is taken from a short calibration with random weights on the device itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dnnlib import UserError, format_count, format_duration
from dnnlib.errors import environment_number
from models.building import build_on_meta, describe_network
from models.loading import read_guide
from models.model import SamplingSettings
from models.networks.layers import freeze
from models.precond import Precond
from models.registry import get_row
from torch_utils.checkpoint import read_settings
from torch_utils.device import PRECISIONS, plain_operations

from .config import DistillConfig, micro_batch, source_settings
from .distill import load_source
from .inputs import fill_randomly, random_inputs
from .memory import Memory, candidates, memory_error, run_memory

#: Bytes per second and process of a ring, assumed: eight A100 with NVLink, and Ethernet between machines.
WITHIN_MACHINE, BETWEEN_MACHINES = 230e9, 25e9 / 8
#: A backward pass has two products for each one of the forward pass.
TRAINED = 3


def flops_per_evaluation(net: Precond) -> int:
    """Operations of one evaluation for one sample, of the network as published; `net` may be on the meta device."""
    net = copy.deepcopy(net).to("meta")
    with plain_operations(), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(**random_inputs(net, 1, torch.device("meta")))
    return counter.get_total_flops()


@dataclass(frozen=True)
class Cost:
    """What a run takes on one process.

    Attributes:
        teacher, student: evaluations per trajectory, of SFD-v their means; guidance doubles the teacher's.
        flops: operations of one evaluation of one sample.
        teacher_work: operations of an evaluation of the teacher, on average, as a part of `flops`; not 1 where a second
            network guides it.
    """

    teacher: float
    student: float
    flops: int
    teacher_work: float = 1.0

    @property
    def flops_per_trajectory(self) -> float:
        return (self.teacher * self.teacher_work + TRAINED * self.student) * self.flops


def run_cost(
    config: DistillConfig, net: Precond, source: SamplingSettings | None = None, guide: Precond | None = None
) -> Cost:
    """What a run of `config` takes; `net` is the teacher's, without memory, and so is `guide`.

    `source` are the settings of the student that a second stage distils.
    """
    choices = config.step_choices
    teacher = [config.teacher_plan(n, source).nfe for n in choices]
    student = [replace(config.student_plan(n), guidance_rate=1).nfe for n in choices]
    flops = flops_per_evaluation(net)
    teacher_work = 1.0 if guide is None else (1 + flops_per_evaluation(guide) / flops) / 2
    return Cost(sum(teacher) / len(teacher), sum(student) / len(student), flops, teacher_work)


@dataclass(frozen=True)
class Calibration:
    """Seconds that one sample takes on the device, for an evaluation and for a training step of the student."""

    evaluation: float
    training: float
    is_measured: bool = True

    def seconds(self, cost: Cost, images: int) -> float:
        """Of `images` trajectories on one process."""
        return images * (cost.teacher * cost.teacher_work * self.evaluation + cost.student * self.training)


def calibrate(
    net: Precond, device: torch.device, dtype: torch.dtype, micro_batch_size: int, seconds: float = 5.0
) -> Calibration:
    """Time a network of this shape with random weights for about so many seconds, at most `micro_batch_size` at a time.

    One that takes longer for a single sample is taken to run at half the speed of a matrix product.
    """
    evaluation = 2 * flops_per_evaluation(net) / matrix_peak(device, dtype)
    if 2 * (1 + TRAINED) * evaluation > seconds:
        return Calibration(evaluation, TRAINED * evaluation, is_measured=False)
    frozen = copy.deepcopy(net).to_empty(device=device)
    fill_randomly(frozen)
    frozen.compute_dtype = dtype
    trained = copy.deepcopy(frozen).train().requires_grad_(True)
    freeze(frozen)

    def evaluate(batch: int) -> None:
        with torch.no_grad():
            frozen(**random_inputs(frozen, batch, device))

    def train(batch: int) -> None:
        trained.zero_grad(set_to_none=True)
        trained(**random_inputs(trained, batch, device)).abs().sum().backward()

    # cuDNN would time its algorithms anew for every batch size.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        return Calibration(
            _per_sample(evaluate, device, micro_batch_size, seconds / 2, evaluation),
            _per_sample(train, device, micro_batch_size, seconds / 2, TRAINED * evaluation),
        )


def _per_sample(
    action: Callable[[int], None], device: torch.device, largest: int, seconds: float, expected: float
) -> float:
    """Seconds for a sample, at the largest batch that time and memory allow, 16 to begin with.

    `expected` is about what one sample takes. The first call of each size is not counted.
    """
    deadline = time.perf_counter() + seconds
    batch = max(1, min(largest, 16, int(seconds / (4 * expected))))
    while memory_error(action, batch) is not None and batch > 1:
        batch //= 2
    took = timed(partial(action, batch), device)
    while batch < largest and 6 * took < deadline - time.perf_counter():
        larger = min(2 * batch, largest)
        if memory_error(action, larger) is not None:
            break
        batch, took = larger, timed(partial(action, larger), device)
    while time.perf_counter() + took < deadline:
        took = min(took, timed(partial(action, batch), device))
    return took / batch


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of square matrices."""
    # Several at a time: the processor time of other threads comes in steps of milliseconds.
    size, count = (2048, 4) if device.type == "cpu" else (8192, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 * count / min(timed(lambda: [a @ b for _ in range(count)], device) for _ in range(6))


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
    config: DistillConfig,
    device: torch.device,
    processes: int = 1,
    batch_gpu: int | str | None = None,
    gradient_checkpointing: bool = False,
    seconds: float = 5.0,
) -> str:
    """What `train.py --dry-run` says of a run's cost on this device, after a calibration of about so many seconds."""
    net, guide = _networks(config)
    micro_batch_size = micro_batch(config.batch, batch_gpu, processes)
    options: dict[str, Any] = dict(processes=processes, gradient_checkpointing=gradient_checkpointing, guide=guide)
    memory_of: Callable[[int], Memory] = partial(run_memory, config, net, **options)
    if batch_gpu == "auto" and device.type == "cuda":
        micro_batch_size = _auto_micro_batch(lambda size: memory_of(size).total, micro_batch_size, device)
    memory, cost = memory_of(micro_batch_size), run_cost(config, net, source_settings(config), guide)
    calibration = calibrate(net, device, PRECISIONS[config.precision], micro_batch_size, seconds)
    length = calibration.seconds(cost, config.total_images) / processes
    rate = cost.flops_per_trajectory * config.total_images / processes / length
    size = sum(p.numel() for p in net.parameters())
    how = "" if calibration.is_measured else ", taken to be half that of a matrix product"
    steps = config.total_images / config.batch * cost.student
    averaging = ""
    if processes > 1 and device.type == "cuda":
        averaging = describe_averaging(4 * size, config.grad_compression, processes, length / steps)
    return (
        f"Network: {format_count(size)} parameters, {format_count(cost.flops)}FLOP for an evaluation\n"
        f"Trajectory: {cost.teacher:g} evaluations of the teacher, {cost.student:g} of the student with gradients, "
        f"{format_count(cost.flops_per_trajectory)}FLOP\n"
        f"Memory: {_describe_memory(memory, micro_batch_size)}\n"
        f"Time: about {format_duration(length)} on {processes}× {device.type} in {config.precision} "
        f"({format_count(rate)}FLOP/s each{how}), without pictures and start, if nothing else runs{averaging}"
    )


def averaging_seconds(size: float, processes: int, machines: int = 1) -> float:
    """Seconds that a ring takes, on paper, to average `size` bytes: 2 (n − 1) / n of them leave each process."""
    return 2 * (processes - 1) / processes * size / (BETWEEN_MACHINES if machines > 1 else WITHIN_MACHINE)


def describe_averaging(gradients: float, compression: str, processes: int, step: float) -> str:
    """A line on what averaging so many bytes of float32 gradients adds to an optimizer step of `step` seconds."""
    machines = environment_number("NNODES", 1)  # of launch.sh
    seconds = averaging_seconds(gradients / (1 if compression == "none" else 2), processes, machines)
    link = "25 Gb/s between machines" if machines > 1 else "NVLink"
    return (
        f"\nGradients: {format_count(gradients)}B averaged in each step add about {seconds * 1000:.3g} ms to "
        f"{step * 1000:.3g}, on paper ({link})"
    )


def _auto_micro_batch(total: Callable[[int], int], share: int, device: torch.device) -> int:
    """What `--batch-gpu=auto` is likely to find, the allocator and libraries having a tenth of the memory."""
    room = 0.9 * torch.cuda.get_device_properties(device).total_memory
    return next((size for size in candidates(share) if total(size) <= room), 1)


def _describe_memory(memory: Memory, micro_batch_size: int) -> str:
    weights, gradients, rest = (
        f"{value / 2**30:.2f}" for value in (memory.weights, memory.gradients, memory.step + memory.states)
    )
    return (
        f"about {memory.total / 2**30:.1f} GiB on each process: {weights} for weights and moments, {gradients} for "
        f"gradients, {rest} for micro-batches of {micro_batch_size}"
    )


def _networks(config: DistillConfig) -> tuple[Precond, Precond | None]:
    """The network of a run, and what guides it; of a registered teacher without weights, which need not be there."""
    if config.is_second_stage or config.model_path is not None:
        source = load_source(config)
        source.check_guidance(config.training_rate)
        return source.net, source.guide
    net = build_on_meta(get_row(config.dataset_name))
    return net, _registered_guide(config, net)


def _registered_guide(config: DistillConfig, net: Precond) -> Precond | None:
    """What guides `net`, the network of a registered teacher, where that is another network."""
    row = get_row(config.dataset_name)
    if config.guide is not None:
        return read_guide(config.guide, net, row.codec is not None)
    return None if row.guide is None or config.training_rate == 1 else build_on_meta(row.guide)


def training_cost(path: Path) -> dict[str, float]:
    """What the training of a student's file took: `training_seconds`, and `training_flops` (operations).

    Of a second stage, without the first. Empty where the file does not say, or where a network or student that it was
    trained with is gone.
    """
    if path.suffix == ".pkl":  # of the published code, which keeps neither
        return {}
    settings = read_settings(path)
    try:
        training = settings["training"]
        names = {field.name for field in fields(DistillConfig)}
        config = DistillConfig(**{name: value for name, value in training.items() if name in names})
        net = describe_network(settings["network"], str(path))
        guide = None
        if config.model_path is None:
            guide = _registered_guide(config, net)
        elif config.guide is not None:
            guide = read_guide(config.guide, net, settings.get("latents") is not None)
        per_trajectory = run_cost(config, net, source_settings(config), guide).flops_per_trajectory
        return {"training_seconds": float(training["seconds"]), "training_flops": per_trajectory * training["images"]}
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return {}
