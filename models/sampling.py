"""From seeds to images, for teachers and students alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dnnlib import UserError
from solvers import Callback, SamplingPlan, get_schedule, get_solver, solve
from torch_utils.graphs import Graphs
from torch_utils.images import quantized
from torch_utils.random import draw_classes, sample_generators, stacked_randn
from torch_utils.transfers import downloaded, upload

from .model import VARIABLE_STEPS, Cond, DiffusionModel, SamplingSettings, Student
from .prompts import Prompts

#: On the CPU the kernels, and so the last bits, can depend on the size of the batch: it is always this one.
CPU_BATCH = 16


@dataclass(frozen=True)
class Sampler:
    """A model, how it is sampled, and its noise levels.

    Attributes:
        sigmas: noise levels, float64 `[num_steps]`.
        step_condition: number of timestamps, for a step-conditioned network.
        prompts: captions, for a text-conditioned model; a list has one for each sample.
        graphs: what replays whole runs on a GPU.
    """

    model: DiffusionModel
    plan: SamplingPlan
    sigmas: Tensor
    step_condition: float | None = None
    prompts: Prompts | Sequence[str] | None = None
    graphs: Graphs = field(default_factory=Graphs)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.plan.nfe

    def run(self, x: Tensor, cond: Cond, callback: Callback | None = None) -> Tensor:
        """Final states `[B, C, H, W]` from `x` at σ_max; `cond` are labels or text conditions; see `solve`."""
        if callback is not None:  # which looks at every step
            return self._run(x, cond, callback)
        return self.model.replayed(self.graphs, self._run, None, x, cond)

    @torch.no_grad()
    def _run(self, x: Tensor, cond: Cond, callback: Callback | None = None) -> Tensor:
        plan = self.plan
        denoise = self.model.denoiser(cond, plan.guidance_rate, self.step_condition)
        x = solve(plan.solver, denoise, x, self.sigmas, plan.afs, plan.num_steps - 1, callback)[-1]
        return denoise(x, x.new_full((), float(self.sigmas[-1]))) if plan.denoise_to_zero else x

    def states(
        self,
        seeds: Sequence[int],
        class_index: int | Sequence[int] | None = None,
        batch: int = 64,
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Final states `[B, C, H, W]` of `seeds` in their order, float32 on the device, some at a time.

        Args:
            class_index: one class for all, or one for each; None draws it by seed.
            batch: how many at a time on a GPU. On the CPU there are always `CPU_BATCH`, the last ones filled up, so
                that the bits of a sample depend on its seed alone.
            noise: `[len(seeds), C, H, W]`, standard normal, in place of that of the seeds.
        """
        size = network_batch(self.model, batch)
        for start in range(0, len(seeds), size):
            rows = list(range(start, min(start + size, len(seeds))))
            filled = rows + rows[-1:] * (network_batch(self.model, len(rows)) - len(rows))
            classes = _rows(class_index, filled)
            own = None if noise is None else noise[filled]
            x, cond = draw_latents(self.model, _rows(seeds, filled), classes, _rows(self.prompts, filled), own)
            yield self.run(x, cond)[: len(rows)]

    def batches(
        self, seeds: Sequence[int], class_index: int | Sequence[int] | None = None, batch: int = 64
    ) -> Iterator[np.ndarray]:
        """uint8 images `[B, H, W, C]` of `seeds` in their order, some at a time, as `states` says.

        A GPU begins the next ones before these are waited for.
        """
        states = self.states(seeds, class_index, batch)
        yield from downloaded(quantized(self.model.decode(part)) for part in states)

    def images(self, seeds: Sequence[int], class_index: int | None = None, batch: int = 64) -> np.ndarray:
        """uint8 images of all `seeds`, `[N, H, W, C]`."""
        return np.concatenate(list(self.batches(seeds, class_index, batch)))


def _rows(values: Any, rows: list[int]) -> Any:
    """These values of a sequence; what is one for all stays as it is."""
    return [values[i] for i in rows] if isinstance(values, Sequence) else values


def network_batch(model: DiffusionModel, count: int) -> int:
    """How many of `count` samples a network sees at a time, the last batch filled up."""
    return count if next(model.parameters()).device.type == "cuda" else CPU_BATCH


def draw_latents(
    model: DiffusionModel,
    seeds: Sequence[int],
    class_index: int | Sequence[int] | None = None,
    prompts: Prompts | Sequence[str] | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Cond]:
    """Start states at σ_max `[N, C, H, W]`, and what they are conditioned on, on the device.

    That is one-hot labels `[N, label_dim]`, text conditions `[N, tokens, width]`, or None for neither. Each sample
    draws its noise, then its label, from a generator of its own seed; `noise` and `class_index` replace what is drawn.
    Classes are as frequent as in the teacher's data, where its file says so.
    """
    device = next(model.parameters()).device
    generators = sample_generators(seeds)
    drawn = stacked_randn(generators, model.shape)
    x = upload(drawn if noise is None else noise, device) * model.sigma_max
    if model.has_text:
        if prompts is None:
            raise ValueError(f"{model.dataset_name} is conditioned on text: it needs prompts")
        captions = prompts.choose(seeds, generators) if isinstance(prompts, Prompts) else prompts
        return x, model.encode_text(captions)
    if model.label_dim == 0:
        return x, None
    index = draw_classes(generators, model.label_dim, model.net.class_frequencies)
    if class_index is not None:
        index = torch.as_tensor(class_index).expand_as(index)
    return x, upload(one_hot(index, model.label_dim).float(), device)


def student_sampler(
    student: Student,
    num_steps: int | None = None,
    guidance_rate: float | None = None,
    prompts: Prompts | Sequence[str] | None = None,
) -> Sampler:
    """The Euler sampler that a student was distilled for; `num_steps` chooses the NFE of a step-conditioned one.

    `guidance_rate` replaces the student's own, for a text-conditioned one.

    Raises:
        UserError: the student serves another number of timestamps.
    """
    settings = settings_for(student.sampling, num_steps)
    plan = with_guidance(settings.plan, guidance_rate)
    return Sampler(student, plan, settings.schedule(student.noise_schedule), settings.step_condition, prompts)


def settings_for(settings: SamplingSettings, num_steps: int | None) -> SamplingSettings:
    """A student's settings for `num_steps` timestamps, None for those that it records.

    Raises:
        UserError: it was not distilled for so many.
    """
    if num_steps is not None and num_steps != settings.num_steps:
        if not settings.is_variable:
            raise UserError(
                f"the student was distilled for {settings.num_steps} timestamps, not {num_steps}; one with a step "
                "condition (SFD-v) serves several",
                "num_steps",
            )
        low, high = min(VARIABLE_STEPS), max(VARIABLE_STEPS)
        if not low <= num_steps <= high:
            raise UserError(f"{num_steps} is not what SFD-v is made for; choose from {low} to {high}", "num_steps")
        settings = replace(settings, num_steps=num_steps)
    return settings


def with_guidance(plan: SamplingPlan, guidance_rate: float | None) -> SamplingPlan:
    return plan if guidance_rate is None else replace(plan, guidance_rate=guidance_rate)


@dataclass(frozen=True)
class SamplerOptions:
    """Sampler options from the command line. None: the student's recorded value or the teacher's default."""

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
    guide: str | None = None
    prompt: str | None = None
    prompts: str | None = None

    def chosen(self) -> dict[str, Any]:
        """Those that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class TeacherOptions(SamplerOptions):
    """The same for a teacher, with its defaults: EDM's own 35 evaluations, Heun from σ_max to σ_min and a step to 0."""

    num_steps: int = 18
    solver: str = "heun"
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False
    schedule_type: str = "polynomial"
    schedule_rho: float = 7.0
    afs: bool = False
    denoise_to_zero: bool = True  # of Heun; see `of`

    @classmethod
    def of(cls, options: SamplerOptions) -> TeacherOptions:
        """These options, and the defaults; solvers other than Heun end at σ_min unless they are told not to."""
        found = cls(**options.chosen())
        return replace(found, denoise_to_zero=found.solver == "heun") if options.denoise_to_zero is None else found


def teacher_sampler(
    teacher: DiffusionModel, options: SamplerOptions, prompts: Prompts | Sequence[str] | None = None
) -> Sampler:
    """A teacher with any solver and schedule, between its own noise levels."""
    o = TeacherOptions.of(options)
    plan = teacher_plan(options, teacher.guidance_rate)
    try:
        sigmas = get_schedule(
            o.schedule_type, o.num_steps, teacher.sigma_min, teacher.sigma_max, o.schedule_rho, teacher.noise_schedule
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return Sampler(teacher, plan, sigmas, prompts=prompts)


def teacher_plan(options: SamplerOptions, guidance_rate: float) -> SamplingPlan:
    """How a teacher of this `guidance_rate` is sampled; a UserError if there is no such solver."""
    o = TeacherOptions.of(options)
    try:
        solver = get_solver(o.solver, o.max_order, o.predict_x0, o.lower_order_final, o.thresholding)
        plan = SamplingPlan(solver, o.num_steps, o.afs, guidance_rate, o.denoise_to_zero)
    except ValueError as error:
        raise UserError(str(error)) from None
    return with_guidance(plan, o.guidance_rate)
