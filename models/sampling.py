"""From seeds to images, for teachers and students alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dnnlib import sha256_of
from solvers import Solver, count_evaluations, get_schedule, get_solver, solve
from torch_utils.images import to_uint8
from torch_utils.random import sample_generators, stacked_randint, stacked_randn

from .loading import find_student, is_teacher_file, load_student, load_teacher
from .model import VARIABLE_STEPS, DiffusionModel
from .registry import get_row

#: On the CPU the kernels, and so the last bits, depend on the size of the batch: it is always this one.
CPU_BATCH = 16


@dataclass(frozen=True)
class Sampler:
    """A model, a solver and its noise levels.

    Attributes:
        sigmas: noise levels, float64 `[num_steps]`.
        afs: whether the first evaluation is analytical.
        step_condition: what a step-conditioned network is told.
        guidance: evaluations of the network per evaluation of the denoiser.
        denoise_to_zero: end with the denoiser at σ_min, as EDM's own sampler does.
    """

    model: DiffusionModel
    solver: Solver
    sigmas: Tensor
    afs: bool = False
    step_condition: float | None = None
    guidance: int = 1
    denoise_to_zero: bool = False

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        evaluations = count_evaluations(self.solver, len(self.sigmas), self.afs)
        return self.guidance * (evaluations + self.denoise_to_zero)

    @torch.no_grad()
    def run(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Final states `[B, C, H, W]` from `x` at σ_max."""
        denoise = partial(self.model.denoise, class_labels=labels, step_condition=self.step_condition)
        x = solve(self.solver, denoise, x, self.sigmas, self.afs, every=len(self.sigmas) - 1)[-1]
        return denoise(x, float(self.sigmas[-1])) if self.denoise_to_zero else x

    def images(self, seeds: Sequence[int], class_index: int | None = None) -> np.ndarray:
        """One uint8 image for each seed, `[N, H, W, C]`; on the CPU its bits depend on the seed alone."""
        device = next(self.model.parameters()).device
        size = len(seeds) if device.type == "cuda" else CPU_BATCH
        images = []
        for start in range(0, len(seeds), size):
            part = list(seeds[start : start + size])
            padded = part + part[-1:] * (size - len(part))
            states = self.run(*draw_latents(self.model, padded, class_index))
            images.append(to_uint8(self.model.decode(states[: len(part)])))
        return np.concatenate(images)


def draw_latents(
    model: DiffusionModel, seeds: Sequence[int], class_index: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Start states at σ_max `[N, C, H, W]` and one-hot labels `[N, label_dim]` (None without classes), on the device.

    Each sample draws its noise, then its label unless `class_index` gives one, from a generator of its own seed.
    """
    device = next(model.parameters()).device
    generators = sample_generators(seeds)
    x = stacked_randn(generators, model.shape).to(device) * model.sigma_max
    if model.label_dim == 0:
        return x, None
    index = stacked_randint(generators, model.label_dim)
    if class_index is not None:
        index = torch.full_like(index, class_index)
    return x, one_hot(index, model.label_dim).float().to(device)


def student_sampler(student: DiffusionModel, num_steps: int | None = None) -> Sampler:
    """The Euler sampler that a student was distilled for; `num_steps` chooses the NFE of a step-conditioned one.

    Raises:
        click.ClickException: the student serves another number of timestamps.
    """
    settings = student.sampling
    if num_steps is not None and num_steps != settings.num_steps:
        if not settings.is_variable:
            raise click.ClickException(
                f"--num_steps={num_steps}, but the student was distilled for {settings.num_steps}; leave the flag out, "
                "or train one with --use_step_condition=True"
            )
        low, high = min(VARIABLE_STEPS), max(VARIABLE_STEPS)
        if not low <= num_steps <= high:
            raise click.ClickException(
                f"--num_steps={num_steps} is not what SFD-v is made for; choose from {low} to {high}"
            )
        settings = replace(settings, num_steps=num_steps)
    sigmas = settings.schedule(student.noise_schedule)
    guidance = 2 if settings.guidance_type == "cfg" and settings.guidance_rate != 1 else 1
    return Sampler(student, get_solver("euler"), sigmas, settings.afs, settings.step_condition, guidance)


@dataclass(frozen=True)
class SamplerOptions:
    """What a command line may ask of a sampler; None leaves it to the student, or to the defaults of a teacher."""

    num_steps: int | None = None
    solver: str | None = None
    max_order: int | None = None
    predict_x0: bool | None = None
    lower_order_final: bool | None = None
    thresholding: bool | None = None
    schedule_type: str | None = None
    schedule_rho: float | None = None
    afs: bool | None = None
    denoise_to_zero: bool | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


TEACHER_DEFAULTS = SamplerOptions(18, "heun", None, True, True, False, "polynomial", 7.0, False, False)


def teacher_sampler(teacher: DiffusionModel, options: SamplerOptions) -> Sampler:
    """A teacher with any solver and schedule, between its own noise levels."""
    o = replace(TEACHER_DEFAULTS, **options.given())
    try:
        solver = get_solver(o.solver, o.max_order, o.predict_x0, o.lower_order_final, o.thresholding)
        sigmas = get_schedule(
            o.schedule_type, o.num_steps, teacher.sigma_min, teacher.sigma_max, o.schedule_rho, teacher.noise_schedule
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    return Sampler(teacher, solver, sigmas, o.afs, denoise_to_zero=o.denoise_to_zero)


@dataclass(frozen=True)
class OpenedSampler:
    """A sampler, a short name for it, and what determines its images (JSON-serialisable)."""

    sampler: Sampler
    name: str
    identity: dict[str, Any]


def open_sampler(
    model_path: str, dataset_name: str | None, options: SamplerOptions, device: torch.device, dtype: torch.dtype
) -> OpenedSampler:
    """The sampler that a command line describes.

    Args:
        model_path: `teacher`, the file of a teacher of one's own, or a student (file, run directory, run number).
        dataset_name: needed for `teacher`; else checked against the file.
        options: solver and schedule for a teacher; num_steps alone for a student.
        dtype: of the network's core.

    Raises:
        click.ClickException: whatever does not fit together.
    """
    is_registered = model_path == "teacher"
    path = None if is_registered else find_student(model_path)
    if is_registered or is_teacher_file(path):
        if dataset_name is not None:
            get_row(dataset_name)
        model = load_teacher(dataset_name, path, device)
        sampler = teacher_sampler(model, options)
        effective = replace(TEACHER_DEFAULTS, **options.given())
        name = f"{'teacher' if is_registered else path.stem}-{effective.solver}"
        identity: dict[str, Any] = asdict(effective)
    else:
        model = load_student(path, device)
        _check_student(model, dataset_name, options)
        sampler = student_sampler(model, options.num_steps)
        # Snapshots have the same names in every run, so the name of the run comes with it.
        name = path.stem if path.parent == Path() else f"{path.parent.name}-{path.stem}"
        identity = {"num_steps": len(sampler.sigmas)}
    model.compute_dtype = dtype
    digest = None if path is None else sha256_of(path)
    return OpenedSampler(sampler, name, {"model": name, "sha256": digest, **identity})


def _check_student(student: DiffusionModel, dataset_name: str | None, options: SamplerOptions) -> None:
    if dataset_name is not None and dataset_name != student.dataset_name:
        raise click.ClickException(
            f"--dataset_name={dataset_name}, but the student is of {student.dataset_name}; leave the flag out"
        )
    foreign = [name for name in options.given() if name != "num_steps"]
    if foreign:
        raise click.ClickException(
            f"--{foreign[0]} belongs to a teacher; a student takes the steps it was distilled for, so leave it out"
        )


def comparison_rows(student: Sampler) -> list[tuple[str, Sampler]]:
    """The samplers to show beside a student: its teacher at 35 NFE first, then training-free solvers, then itself.

    Raises:
        click.ClickException: not a student, or its teacher is not to be had.
    """
    model = student.model
    if model.sampling is None:
        raise click.ClickException("--compare=True is for a student; for a teacher, choose a --solver")
    teacher = load_teacher(model.dataset_name, model.sampling.teacher_path, next(model.parameters()).device)
    teacher.compute_dtype = model.compute_dtype
    # Without AFS, so many timestamps give the evaluations of the student.
    same = student.nfe + 1
    rows = [
        ("teacher, Heun", SamplerOptions(denoise_to_zero=True)),
        ("teacher, Euler", SamplerOptions(num_steps=same, solver="euler")),
        ("teacher, DPM-Solver++", SamplerOptions(num_steps=same, solver="dpmpp")),
        ("teacher, DPM-Solver++", SamplerOptions(num_steps=6, solver="dpmpp")),
    ]
    return [(name, teacher_sampler(teacher, options)) for name, options in rows] + [("student", student)]
