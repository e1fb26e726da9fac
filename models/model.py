"""The object that trainers and samplers work with: a denoiser, the space it lives in, and how to sample from it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib import UserError, first_line
from solvers import SCHEDULES, Denoiser, NoiseSchedule, SamplingPlan, get_schedule, get_solver
from torch_utils.graphs import Graphs
from torch_utils.images import quantized
from torch_utils.transfers import downloaded

from .conditions import Conditions
from .diffusers_space import AnySpace
from .guidance import guided
from .precond import Precond

#: The end of a line about a model that guidance cannot change.
UNGUIDABLE = "has neither classes nor text nor a guide to be guided by; leave the rate out, or give a guide"
#: One-hot labels, text conditions, or None for neither.
Cond = Tensor | Conditions | None
#: Student timestamps that SFD-v draws from, NFE 2 to 5 with AFS.
VARIABLE_STEPS = (4, 5, 6, 7)


@dataclass(frozen=True)
class SamplingSettings:
    """What a student was distilled for; it takes Euler steps along this schedule.

    Attributes:
        dataset_name: the teacher's name.
        num_steps: timestamps, one more than steps. For a step-conditioned first-stage student, the default of several.
        afs: whether the first step is analytical.
        schedule_type, schedule_rho: as `solvers.get_schedule` takes them.
        sigma_min, sigma_max: ends of the schedule.
        use_step_condition: whether the network is told num_steps.
        is_second_stage: whether the teacher was itself a student.
        guidance_type: `cfg`, it is sampled with guidance; `teacher`, its teacher had guidance in training, and it needs
            none; `uncond` or None for none at all.
        guidance_rate: of its own guidance, with `cfg`.
        training_guidance_rate: of its teacher's, 1 for none.
        negative_prompt: what that guidance led away from, None for the empty caption.
        teacher_path: file of the teacher, where it is not a registered one.
        teacher_sha256: of its contents, or of an embedded teacher's; None for others, and in files of earlier versions.
        guide_path: file of the network that guided it, where it is not the teacher's registered one.
    """

    dataset_name: str
    num_steps: int
    afs: bool
    schedule_type: str
    schedule_rho: float
    sigma_min: float
    sigma_max: float
    use_step_condition: bool = False
    is_second_stage: bool = False
    guidance_type: str | None = None
    guidance_rate: float = 1.0
    training_guidance_rate: float = 1.0
    negative_prompt: str | None = None
    teacher_path: str | None = None
    teacher_sha256: str | None = None
    guide_path: str | None = None

    def __post_init__(self) -> None:
        flags = (self.afs, self.use_step_condition, self.is_second_stage)
        numbers = (self.schedule_rho, self.sigma_min, self.sigma_max, self.guidance_rate, self.training_guidance_rate)
        texts = ("negative_prompt", "teacher_path", "guide_path")
        if not all(type(flag) is bool for flag in flags) or not all(type(n) in (int, float) for n in numbers):
            raise ValueError("a flag is not true or false, or a number is not a number")
        checks = {
            "dataset_name": isinstance(self.dataset_name, str) and re.fullmatch(r"\w[\w.-]*", self.dataset_name),
            "num_steps": type(self.num_steps) is int and 2 + self.afs <= self.num_steps <= 1000,
            "schedule_type": self.schedule_type in SCHEDULES,
            "schedule_rho": 0 < self.schedule_rho <= 1000,
            "sigma_min, sigma_max": 0 < self.sigma_min < self.sigma_max < 1e6,
            "guidance_type": self.guidance_type in (None, "uncond", "cfg", "teacher"),
            "guidance_rate": math.isfinite(self.guidance_rate),
            "training_guidance_rate": math.isfinite(self.training_guidance_rate),
            **{name: getattr(self, name) is None or isinstance(getattr(self, name), str) for name in texts},
            "teacher_sha256": self.teacher_sha256 is None or re.fullmatch(r"[0-9a-f]{64}", str(self.teacher_sha256)),
        }
        wrong = [name for name, fine in checks.items() if not fine]
        if wrong:
            raise ValueError(f"settings out of range: {', '.join(wrong)}")

    @property
    def plan(self) -> SamplingPlan:
        """Euler steps, with the guidance that it is sampled with."""
        rate = self.guidance_rate if self.guidance_type == "cfg" else 1.0
        return SamplingPlan(get_solver("euler"), self.num_steps, self.afs, rate)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.plan.nfe

    @property
    def is_variable(self) -> bool:
        """Whether one network serves several numbers of timestamps (SFD-v)."""
        return self.use_step_condition and not self.is_second_stage

    @property
    def step_condition(self) -> float | None:
        """What the network is told: the number of timestamps, if it takes a step condition."""
        return float(self.num_steps) if self.use_step_condition else None

    def schedule(self, noise_schedule: NoiseSchedule | None = None) -> Tensor:
        """Noise levels, float64 `[num_steps]`."""
        return get_schedule(
            self.schedule_type, self.num_steps, self.sigma_min, self.sigma_max, self.schedule_rho, noise_schedule
        )

    @classmethod
    def from_json(cls, values: Any, source: str) -> SamplingSettings:
        """Build from what a student file records; anything malformed is one clear line."""
        try:
            fields = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            return cls(**fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{source} does not hold usable sampling settings ({first_line(error)})") from None


class DiffusionModel(nn.Module):
    """A denoiser with the noise range it is used on, and the way from its states to images.

    Attributes:
        net: the preconditioned network.
        dataset_name: name of the teacher's data set.
        latent: first stage and text encoder of a model in a latent space, None in pixel space.
        guidance_rate: the default in sampling.
        guide: the network that guidance leads away from, where that is another one than `net` without its condition.
        negative_prompt: the caption that guidance by text leads away from, None for the empty one.
        noise_schedule: the model's own, for the schedule `discrete`.
    """

    def __init__(
        self,
        net: Precond,
        dataset_name: str,
        sigma_min: float,
        sigma_max: float,
        latent: AnySpace | None = None,
        guidance_rate: float = 1.0,
        guide: Precond | None = None,
    ) -> None:
        super().__init__()
        self.net, self.guide = net, guide
        self.dataset_name = dataset_name
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.latent, self.guidance_rate = latent, guidance_rate
        self.negative_prompt: str | None = None
        self._encoded: dict[str, Tensor | Conditions] = {}  # that caption, once it was needed
        self.noise_schedule: NoiseSchedule | None = net.noise_schedule

    @property
    def img_channels(self) -> int:
        """Channels of a state; of an image in pixel space."""
        return self.net.img_channels

    @property
    def img_resolution(self) -> int:
        """Height and width of a state; of an image in pixel space."""
        return self.net.img_resolution

    @property
    def label_dim(self) -> int:
        return self.net.label_dim

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one state: channels, height, width."""
        return self.img_channels, self.img_resolution, self.img_resolution

    @property
    def is_latent(self) -> bool:
        """Whether states are latents, which `decode` turns into images."""
        return self.latent is not None

    @property
    def has_text(self) -> bool:
        """Whether the model is conditioned on captions."""
        return self.net.context_dim is not None

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.net.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.net.compute_dtype = dtype
        if self.guide is not None:
            self.guide.compute_dtype = dtype

    def check_class(self, index: int | None) -> None:
        """Refuse a class that the model does not have."""
        if index is not None and not 0 <= index < self.label_dim:
            has = f"classes 0 to {self.label_dim - 1}" if self.label_dim else "no classes"
            raise UserError(f"{self.dataset_name} has {has}, so class {index} cannot be asked for", "class_index")

    def check_prompt(self, prompt: str | None, about: str = "prompt") -> None:
        """Refuse a caption for a model that takes none."""
        if prompt is not None and not self.has_text:
            raise UserError(f"{self.dataset_name} has no text; a caption is for a model that has (ms_coco)", about)

    def check_guidance(self, rate: float) -> None:
        """Refuse guidance of a model that has nothing to be guided by."""
        if rate != 1 and self.guide is None and not self.net.is_guidable:
            if self.label_dim:
                raise UserError(f"{self.dataset_name} has no class for none, which guidance needs", "guidance_rate")
            raise UserError(f"{self.dataset_name} {UNGUIDABLE}", "guidance_rate")

    def encode_text(self, prompts: Sequence[str]) -> Tensor | Conditions:
        """Captions to conditions, `[len(prompts), tokens, width]` or a record, float32."""
        if self.latent is None:
            raise ValueError(f"{self.dataset_name} has no text encoder")
        return self.latent.encode_text(prompts, next(self.parameters()).device)

    def _encode_nothing(self) -> Tensor | Conditions:
        """What guidance by text compares with unless there is a negative caption."""
        assert self.latent is not None
        return self.latent.encode_nothing(next(self.parameters()).device)

    def conditioning(self, cond: Cond, guidance_rate: float = 1.0) -> dict[str, Any]:
        """What `denoise` takes by name for `cond`: one-hot labels, text conditions, or None for neither."""
        if not self.has_text:
            return {"class_labels": cond, "guidance_rate": guidance_rate}
        unconditional = None
        if guidance_rate != 1 and self.guide is None:
            caption = self.negative_prompt or ""
            if caption not in self._encoded:
                self._encoded = {caption: self.encode_text([caption]) if caption else self._encode_nothing()}
            unconditional = self._encoded[caption]
        return {"condition": cond, "unconditional_condition": unconditional, "guidance_rate": guidance_rate}

    def denoiser(self, cond: Cond, guidance_rate: float = 1.0, step_condition: float | None = None) -> Denoiser:
        """`denoise` as solvers call it: for `cond` as above, and the number of timestamps that the network is told."""
        return partial(self, step_condition=step_condition, **self.conditioning(cond, guidance_rate))

    def replayed(
        self, graphs: Graphs, function: Callable[[Tensor, Cond], Tensor], key: Hashable, x: Tensor, cond: Cond
    ) -> Tensor:
        """`function(x, cond)`, which is made of `denoise`, by `graphs`; `key` is all that it depends on besides."""
        key = key, self.compute_dtype, self.negative_prompt
        if isinstance(cond, Conditions):
            return graphs(lambda x, *parts: function(x, Conditions(*parts)), key, x, *cond.parts)
        return graphs(function, key, x, cond)

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        condition: Tensor | Conditions | None = None,
        unconditional_condition: Tensor | Conditions | None = None,
        guidance_rate: float | None = None,
        step_condition: Tensor | float | None = None,
    ) -> Tensor:
        """Clean `x`, `[B, C, H, W]` float32, from noisy `x` at `sigma` (scalar, `[1]` or `[B]`).

        Args:
            class_labels: one-hot `[B, label_dim]`, of a class-conditional model.
            condition: `[B, tokens, width]` or a record, of a text-conditioned one, which takes no labels.
            unconditional_condition: that of the empty caption, which guidance by text needs.
            guidance_rate: see `models.guidance`; None is 1, no guidance. It leads away from the `guide` under the same
                labels, if there is one, else from zeros in their place.
            step_condition: number of timestamps, for a step-conditioned student.

        Raises:
            ValueError: a condition that the model does not have, or none where it needs one.
        """
        rate = 1.0 if guidance_rate is None else guidance_rate
        net = partial(self.net, step_condition=step_condition)
        conditional = partial(net, class_labels=class_labels, condition=condition)
        unguided = partial(net, condition=unconditional_condition)
        if self.guide is not None:
            unguided = partial(self.guide, class_labels=class_labels if self.guide.label_dim else None)
        elif rate != 1 and not self.net.is_guidable:
            raise ValueError(f"{self.dataset_name} has no conditions: it takes no guidance rate")
        elif rate != 1 and self.has_text and unconditional_condition is None:
            raise ValueError("a guidance rate other than 1 needs an unconditional_condition")
        return guided(conditional, unguided, rate)(x, sigma)

    forward = denoise  # so that hooks and torch.compile see it

    def decode(self, latents: Tensor) -> Tensor:
        """States to images in [-1, 1], `[B, 3, H, W]`; in pixel space they are the same."""
        return latents if self.latent is None else self.latent.decode(latents)


class Student(DiffusionModel):
    """A distilled model.

    Attributes:
        sampling: what it was distilled for, and so is sampled with.
    """

    def __init__(self, net: Precond, sampling: SamplingSettings, latent: AnySpace | None = None) -> None:
        s = sampling
        super().__init__(net, s.dataset_name, s.sigma_min, s.sigma_max, latent, s.plan.guidance_rate)
        self.sampling = sampling

    def sample(
        self,
        seeds: Sequence[int],
        class_labels: int | Sequence[int] | Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        num_steps: int | None = None,
        batch: int = 64,
        guidance_rate: float | None = None,
        noise: Tensor | None = None,
    ) -> np.ndarray:
        """The images that `sample.py` writes for `seeds`, uint8 `[N, H, W, C]`; on the CPU to the last bit.

        The network computes in `compute_dtype` or, where that is None, in the precision that commands choose.

        Args:
            seeds: an integer in [0, 2³²) for each image.
            class_labels: one class for all, one for each, or one-hot `[N, label_dim]`; None draws them by seed.
            prompts: one caption for all, or one for each; None draws those of MS-COCO by seed.
            num_steps: timestamps, of a student that serves several.
            batch: how many at a time on a GPU; the CPU has its own number.
            guidance_rate: of a text-conditioned student, in place of its own.
            noise: `[N, C, h, w]`, standard normal, in place of that of the seeds.

        Raises:
            UserError: something that this student cannot be asked for.
        """
        from .requests import student_states  # which is built on this module

        states = student_states(self, seeds, class_labels, prompts, num_steps, batch, guidance_rate, noise)
        return np.concatenate(list(downloaded(quantized(self.decode(part)) for part in states)))

    def sample_states(self, seeds: Sequence[int], **options: Any) -> Tensor:
        """What `sample` makes images of, by the same arguments: `[N, C, h, w]`, float32; `decode` takes them."""
        from .requests import student_states

        return torch.cat(list(student_states(self, seeds, **options)))
