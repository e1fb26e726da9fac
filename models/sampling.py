"""From seeds to images, for teachers and students alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dnnlib import UserError, sha256_of
from solvers import Callback, Solver, count_evaluations, get_schedule, get_solver, solve
from torch_utils.images import to_uint8
from torch_utils.random import sample_generators, stacked_randint, stacked_randn

from .loading import find_student, is_teacher_file, load_student, load_teacher
from .model import VARIABLE_STEPS, DiffusionModel, Student
from .prompts import Prompts, choose_prompts
from .published.diffusers import folder_digest, is_stable_diffusion
from .registry import get_row

#: On the CPU the kernels, and so the last bits, can depend on the size of the batch: it is always this one.
CPU_BATCH = 16


@dataclass(frozen=True)
class Sampler:
    """A model, a solver and its noise levels.

    Attributes:
        sigmas: noise levels, float64 `[num_steps]`.
        afs: whether the first evaluation is analytical.
        step_condition: what a step-conditioned network is told.
        guidance_rate: of classifier-free guidance, which doubles the evaluations of the network unless it is 1.
        denoise_to_zero: end with the denoiser at σ_min, as EDM's own sampler does.
        prompts: captions, for a text-conditioned model.
    """

    model: DiffusionModel
    solver: Solver
    sigmas: Tensor
    afs: bool = False
    step_condition: float | None = None
    guidance_rate: float = 1.0
    denoise_to_zero: bool = False
    prompts: Prompts | None = None

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        evaluations = count_evaluations(self.solver, len(self.sigmas), self.afs)
        return (evaluations + self.denoise_to_zero) * (1 if self.guidance_rate == 1 else 2)

    @torch.no_grad()
    def run(self, x: Tensor, given: Tensor | None, callback: Callback | None = None) -> Tensor:
        """Final states `[B, C, H, W]` from `x` at σ_max; `given` are labels or text conditions; see `solve`."""
        denoise = self.model.denoiser(given, self.guidance_rate, self.step_condition)
        x = solve(self.solver, denoise, x, self.sigmas, self.afs, len(self.sigmas) - 1, callback)[-1]
        return denoise(x, x.new_full((), float(self.sigmas[-1]))) if self.denoise_to_zero else x

    def images(self, seeds: Sequence[int], class_index: int | None = None) -> np.ndarray:
        """One uint8 image for each seed, `[N, H, W, C]`; on the CPU its bits depend on the seed alone."""
        size = network_batch(self.model, len(seeds))
        images = []
        for start in range(0, len(seeds), size):
            part = list(seeds[start : start + size])
            padded = part + part[-1:] * (size - len(part))
            states = self.run(*draw_latents(self.model, padded, class_index, self.prompts))
            images.append(to_uint8(self.model.decode(states[: len(part)])))
        return np.concatenate(images)


def network_batch(model: DiffusionModel, count: int) -> int:
    """How many of `count` samples a network sees at a time, the last batch filled up."""
    return count if next(model.parameters()).device.type == "cuda" else CPU_BATCH


def draw_latents(
    model: DiffusionModel, seeds: Sequence[int], class_index: int | None = None, prompts: Prompts | None = None
) -> tuple[Tensor, Tensor | None]:
    """Start states at σ_max `[N, C, H, W]`, and what they are conditioned on, on the device.

    That is one-hot labels `[N, label_dim]`, text conditions `[N, tokens, width]`, or None for neither. Each sample
    draws its noise, then its label unless `class_index` gives one, from a generator of its own seed.
    """
    device = next(model.parameters()).device
    generators = sample_generators(seeds)
    x = stacked_randn(generators, model.shape).to(device) * model.sigma_max
    if model.has_text:
        if prompts is None:
            raise ValueError(f"{model.dataset_name} is conditioned on text: it needs prompts")
        return x, model.encode_text(prompts.choose(seeds, generators))
    if model.label_dim == 0:
        return x, None
    index = stacked_randint(generators, model.label_dim)
    if class_index is not None:
        index = torch.full_like(index, class_index)
    return x, one_hot(index, model.label_dim).float().to(device)


def student_sampler(
    student: Student,
    num_steps: int | None = None,
    guidance_rate: float | None = None,
    prompts: Prompts | None = None,
) -> Sampler:
    """The Euler sampler that a student was distilled for; `num_steps` chooses the NFE of a step-conditioned one.

    `guidance_rate` replaces the student's own, for a text-conditioned one.

    Raises:
        UserError: the student serves another number of timestamps.
    """
    settings = student.sampling
    if num_steps is not None and num_steps != settings.num_steps:
        if not settings.is_variable:
            raise UserError(
                f"--num_steps={num_steps}, but the student was distilled for {settings.num_steps}; leave the flag out, "
                "or train one with --use_step_condition=True"
            )
        low, high = min(VARIABLE_STEPS), max(VARIABLE_STEPS)
        if not low <= num_steps <= high:
            raise UserError(f"--num_steps={num_steps} is not what SFD-v is made for; choose from {low} to {high}")
        settings = replace(settings, num_steps=num_steps)
    sigmas = settings.schedule(student.noise_schedule)
    rate = student.guidance_rate if guidance_rate is None else guidance_rate
    return Sampler(student, get_solver("euler"), sigmas, settings.afs, settings.step_condition, rate, prompts=prompts)


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
    guidance_rate: float | None = None
    prompt: str | None = None
    prompts: str | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


#: What a student can be asked for; the rest it was distilled for.
STUDENT_OPTIONS = ("num_steps", "guidance_rate", "prompt", "prompts")


@dataclass(frozen=True)
class TeacherOptions(SamplerOptions):
    """The same for a teacher, with its defaults."""

    num_steps: int = 18
    solver: str = "heun"
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False
    schedule_type: str = "polynomial"
    schedule_rho: float = 7.0
    afs: bool = False
    denoise_to_zero: bool = False


def teacher_sampler(teacher: DiffusionModel, options: SamplerOptions, prompts: Prompts | None = None) -> Sampler:
    """A teacher with any solver and schedule, between its own noise levels."""
    o = TeacherOptions(**options.given())
    try:
        solver = get_solver(o.solver, o.max_order, o.predict_x0, o.lower_order_final, o.thresholding)
        sigmas = get_schedule(
            o.schedule_type, o.num_steps, teacher.sigma_min, teacher.sigma_max, o.schedule_rho, teacher.noise_schedule
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    rate = teacher.guidance_rate if o.guidance_rate is None else o.guidance_rate
    return Sampler(teacher, solver, sigmas, o.afs, None, rate, o.denoise_to_zero, prompts)


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
        options: solver and schedule for a teacher; `STUDENT_OPTIONS` alone for a student.
        dtype: of the network's core.

    Raises:
        UserError: whatever does not fit together.
    """
    path = None if model_path == "teacher" else Path(model_path)
    if path is not None and not is_stable_diffusion(path):
        path = find_student(path)
    if path is None or is_teacher_file(path):
        if dataset_name is not None:
            get_row(dataset_name)
        model = load_teacher(dataset_name, path, device)
        prompts = choose_prompts(model, options)
        sampler = teacher_sampler(model, options, prompts)
        effective = TeacherOptions(**options.given())
        name = f"{'teacher' if path is None else path.stem}-{effective.solver}"
        identity = {key: value for key, value in asdict(effective).items() if key not in STUDENT_OPTIONS[1:]}
    else:
        model = load_student(path, device)
        _check_student(model, dataset_name, options)
        prompts = choose_prompts(model, options)
        sampler = student_sampler(model, options.num_steps, options.guidance_rate, prompts)
        # Snapshots have the same names in every run, so the name of the run comes with it.
        name = path.stem if path.parent == Path() else f"{path.parent.name}-{path.stem}"
        identity = {"num_steps": len(sampler.sigmas)}
    model.compute_dtype = dtype
    if model.latent is not None:
        model.latent.decoder()  # so that a file without one is found now
    if prompts is not None:
        texts = hashlib.sha256("\n".join(prompts.texts).encode()).hexdigest()
        identity |= {"guidance_rate": sampler.guidance_rate, "prompts": texts, "drawn": prompts.drawn}
    digest = None if path is None else folder_digest(path) if path.is_dir() else sha256_of(path)
    return OpenedSampler(sampler, name, {"model": name, "sha256": digest, **identity})


def _check_student(student: Student, dataset_name: str | None, options: SamplerOptions) -> None:
    if dataset_name is not None and dataset_name != student.dataset_name:
        raise UserError(
            f"--dataset_name={dataset_name}, but the student is of {student.dataset_name}; leave the flag out"
        )
    foreign = [name for name in options.given() if name not in STUDENT_OPTIONS]
    if foreign:
        raise UserError(
            f"--{foreign[0]} belongs to a teacher; a student takes the steps it was distilled for, so leave it out"
        )


def comparison_rows(student: Sampler) -> list[tuple[str, Sampler]]:
    """The samplers to show beside a student: its teacher at 35 NFE first, then training-free solvers, then itself.

    Raises:
        UserError: not a student, or its teacher is not to be had.
    """
    model = student.model
    if not isinstance(model, Student):
        raise UserError("--compare=True is for a student; for a teacher, choose a --solver")
    teacher = load_teacher(model.dataset_name, model.sampling.teacher_path, next(model.parameters()).device)
    teacher.compute_dtype, teacher.latent = model.compute_dtype, model.latent
    # Without AFS, so many timestamps give the evaluations of the student.
    same = len(student.sigmas) - student.afs
    rate = student.guidance_rate
    rows = [
        ("teacher, Heun", SamplerOptions(denoise_to_zero=True, guidance_rate=rate)),
        ("teacher, Euler", SamplerOptions(num_steps=same, solver="euler", guidance_rate=rate)),
        ("teacher, DPM-Solver++", SamplerOptions(num_steps=same, solver="dpmpp", guidance_rate=rate)),
        ("teacher, DPM-Solver++", SamplerOptions(num_steps=6, solver="dpmpp", guidance_rate=rate)),
    ]
    samplers = [(name, teacher_sampler(teacher, options, student.prompts)) for name, options in rows]
    return samplers + [("student", student)]
