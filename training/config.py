"""Settings of a distillation run: built in one place, checked in one place, saved with the run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dnnlib import UserError
from models.loading import embedded_digest, guidance_of, read_sampling
from models.model import UNGUIDABLE, VARIABLE_STEPS, SamplingSettings
from models.paths import digest_of, find_model, find_student, own_name
from models.registry import ROWS, get_row, known_names
from solvers import SamplingPlan, get_solver

#: Timestamps of a teacher's trajectory.
MOST_STEPS = 10_000


@dataclass(frozen=True)
class DistillConfig:
    """What determines the weights of a run; the names are the command-line flags.

    Two runs with equal configs, on the same machine, end with the same weights, whatever the number of processes and
    the micro-batch (up to rounding).
    """

    dataset_name: str
    total_kimg: float = 200
    batch: int = 128
    lr: float = 5e-5
    lr_schedule: str = "step"
    optimizer: str = "adam"
    loss_knee: float | None = None
    grad_compression: str = "none"
    num_steps: int = 4
    M: int = 3
    afs: bool = True
    sampler_tea: str = "dpmpp"
    max_order: int | None = None
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False
    denoise_to_zero: bool = False
    schedule_type: str = "polynomial"
    schedule_rho: float = 7
    use_step_condition: bool = False
    is_second_stage: bool = False
    model_path: str | None = None
    lpips: str = "reference"
    guidance_type: str | None = None
    guidance_rate: float | None = None
    guide: str | None = None
    negative_prompt: str | None = None
    dropout: float | None = None
    precision: str = "fp32"
    seed: int = 0
    #: Of the teacher's file, once it is known, if it is the user's or ships with this program: what the run is made
    #: of, wherever that lies.
    teacher_sha256: str | None = None

    @property
    def total_images(self) -> int:
        """Trajectories to train, rounded up to whole iterations."""
        iterations = -(-int(round(self.total_kimg * 1000)) // self.batch)
        return max(iterations, 1) * self.batch

    @property
    def step_choices(self) -> tuple[int, ...]:
        """The numbers of timestamps that iterations are drawn from."""
        variable = self.use_step_condition and not self.is_second_stage
        return VARIABLE_STEPS if variable else (self.num_steps,)

    @property
    def has_text(self) -> bool:
        """Whether the teacher is conditioned on captions."""
        return guidance_of(self.dataset_name, self.model_path)[0]

    @property
    def sampling_rate(self) -> float:
        """Guidance rate of the student in sampling, 1 for none: the published way of a text-conditioned teacher."""
        if not self.has_text or self.guidance_type in ("uncond", "teacher"):
            return 1.0
        own = guidance_of(self.dataset_name, self.model_path)[1]
        return own if self.guidance_rate is None else self.guidance_rate

    @property
    def training_rate(self) -> float:
        """Guidance rate of the teacher in training, 1 for none; its student is sampled without."""
        if self.guidance_type in ("uncond", "cfg") or (self.has_text and self.guidance_type is None):
            return 1.0
        if self.guidance_rate is not None:
            return self.guidance_rate
        # A student of the first stage has its teacher's guidance in it.
        return 1.0 if self.is_second_stage or self.dataset_name not in ROWS else ROWS[self.dataset_name].guidance_rate

    @property
    def _recorded_guidance(self) -> str | None:
        """What the student's file says of the kind of its guidance."""
        if self.training_rate != 1:
            return "teacher"
        return (
            "cfg"
            if self.guidance_type is None and self.guidance_rate is not None and self.has_text
            else self.guidance_type
        )

    def student_plan(self, num_steps: int) -> SamplingPlan:
        """How the student of so many timestamps is sampled; in training it has no guidance."""
        return SamplingPlan(get_solver("euler"), num_steps, self.afs, self.sampling_rate)

    def teacher_steps(self, num_steps: int) -> int:
        """Timestamps of the teacher: M more between every two of the student's."""
        return (self.M + 1) * (num_steps - 1) + 1

    def teacher_plan(self, num_steps: int, source: SamplingSettings | None = None) -> SamplingPlan:
        """How a trajectory for a student of `num_steps` timestamps is made.

        First stage: by the configured solver, without AFS. Second stage: as `source` says, the settings of a student.
        """
        steps = self.teacher_steps(num_steps)
        if source is not None:
            return SamplingPlan(get_solver("euler"), steps, source.afs, self.training_rate)
        solver = get_solver(
            self.sampler_tea, self.max_order, self.predict_x0, self.lower_order_final, self.thresholding
        )
        return SamplingPlan(solver, steps, False, self.training_rate, self.denoise_to_zero)

    def learning_rate(self, images: int) -> float:
        """After so many trajectories; `step`: a tenth in the second half, `linear`: falling to zero all the way."""
        if self.lr_schedule == "linear":
            return self.lr * (1 - images / self.total_images)
        return self.lr * (0.1 if 2 * images >= self.total_kimg * 1000 else 1.0)

    def sampling(self, sigma_min: float, sigma_max: float) -> SamplingSettings:
        """What the student is sampled with."""
        return SamplingSettings(
            dataset_name=self.dataset_name,
            num_steps=self.num_steps,
            afs=self.afs,
            schedule_type=self.schedule_type,
            schedule_rho=self.schedule_rho,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            use_step_condition=self.use_step_condition,
            is_second_stage=self.is_second_stage,
            # Where nothing is said, the teacher's own guidance is taken over once it is there.
            guidance_type=self._recorded_guidance,
            guidance_rate=1.0 if self.guidance_type is None and self.guidance_rate is None else self.sampling_rate,
            training_guidance_rate=self.training_rate,
            negative_prompt=self.negative_prompt,
            teacher_path=None if self.is_second_stage or self.model_path is None else os.path.abspath(self.model_path),
            teacher_sha256=None if self.is_second_stage else self.teacher_sha256,
            guide_path=self.guide,
        )

    def run_name(self, desc: str | None = None) -> str:
        """`<dataset>-<num_steps>-<nfe>-<solver>-<M>-<schedule>[-afs][-w<rate>][-desc]`, as run folders are called."""
        short = {"polynomial": "poly", "logsnr": "logsnr", "time_uniform": "uni", "discrete": "discrete"}
        schedule = short[self.schedule_type] + ("" if self.schedule_type == "logsnr" else f"{self.schedule_rho:g}")
        steps, nfe = span(self.step_choices), span([self.student_plan(s).nfe for s in self.step_choices])
        solver = "euler" if self.is_second_stage else self.sampler_tea
        parts = [self.dataset_name, steps, nfe, solver, str(self.M), schedule]
        guided = [] if self.training_rate == 1 else [f"w{self.training_rate:g}"]
        return "-".join(parts + ["afs"] * self.afs + guided + ([desc] if desc else []))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def with_defaults(saved: Any, kind: type = DistillConfig) -> dict[str, Any]:
    """Settings that an earlier version may have written, with those that it did not know."""
    if not isinstance(saved, dict):
        raise TypeError("the settings are no JSON object")
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING} | saved


def differences(saved: dict[str, Any], config: DistillConfig) -> tuple[str, ...]:
    """What `config` has otherwise than the `saved` settings of a run, in words.

    A teacher's file counts by its contents, where they are known, and else by its place.
    """
    mine, saved = config.to_json(), dict(saved)
    paths = [os.path.abspath(str(values["model_path"])) for values in (saved, mine)]
    if None not in (saved["teacher_sha256"], mine["teacher_sha256"]) or paths[0] == paths[1]:
        saved["model_path"] = mine["model_path"]
    if None in (saved["teacher_sha256"], mine["teacher_sha256"]):
        saved["teacher_sha256"] = mine["teacher_sha256"]
    changed = [name for name, value in mine.items() if saved.get(name) != value]
    return tuple(f"{name} {_short(saved.get(name))} there, {_short(mine[name])} here" for name in changed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


class OtherSettings(UserError):
    """A run has other settings than the command that would continue it."""


def refuse_changes(run: Path, changed: Sequence[str], override: bool) -> None:
    """An error that names the settings that a run has otherwise, unless `override` allows them."""
    if changed and not override:
        raise OtherSettings(
            f"--resume: {run} has other settings ({'; '.join(changed)}); repeat them, start a new run, or go on "
            "with these by --resume-override"
        )


def span(values: Sequence[int]) -> str:
    """`2`, or `2to5` for several values."""
    return f"{min(values)}" if len(set(values)) == 1 else f"{min(values)}to{max(values)}"


def teacher_name(dataset_name: str | None, model_path: str | None, is_second_stage: bool) -> str:
    """The name that a run goes by: the registered teacher's, the student's own, or the file's."""
    if is_second_stage:
        path = first_student(model_path)
        return read_sampling(find_student(path)).dataset_name if dataset_name is None else dataset_name
    if dataset_name is not None:
        return get_row(dataset_name).name
    if model_path is not None:
        return own_name(model_path)
    raise UserError(f"--dataset_name is missing; give one of {known_names()}")


def first_student(model_path: str | None) -> str:
    """Where the student of the first stage is, which a second one cannot do without."""
    if model_path is None:
        raise UserError("--is_second_stage=True needs --model_path: the SFD or SFD-v model to distil further")
    return model_path


def check(config: DistillConfig) -> None:
    """Refuse settings that cannot work, before anything is loaded; one clear line for each."""
    for name in ("total_kimg", "lr", "loss_knee", "schedule_rho", "guidance_rate"):
        if not math.isfinite(getattr(config, name) or 0):
            raise UserError(f"--{name}={getattr(config, name)} is not a finite number; give one")
    if config.teacher_steps(config.num_steps) > MOST_STEPS:
        raise UserError(
            f"--num_steps={config.num_steps} --M={config.M} make a trajectory of "
            f"{config.teacher_steps(config.num_steps)} timestamps; expected at most {MOST_STEPS}"
        )
    smallest = 3 if config.afs else 2
    if config.num_steps < smallest:
        raise UserError(
            f"--num_steps={config.num_steps} leaves no step to train; with --afs={config.afs} use at least {smallest}"
        )
    if config.M < 0:
        raise UserError(f"--M={config.M} is negative; it counts inserted timestamps, use 0 or more (usually 3)")
    check_guidance(config)
    if config.denoise_to_zero and config.is_second_stage:
        raise UserError(
            "--denoise_to_zero=True is for the first stage, whose teacher is a diffusion model; the second stage takes "
            "over what its teacher learnt, leave it out"
        )
    if config.lpips in ("standard", "teacher") and not config.is_second_stage:
        raise UserError(
            f"--lpips={config.lpips} is a loss of the second stage; add --is_second_stage=True, or leave it out"
        )
    if config.use_step_condition and not config.is_second_stage and config.num_steps not in VARIABLE_STEPS:
        raise UserError(
            f"--num_steps={config.num_steps} with --use_step_condition=True is not one of {span(VARIABLE_STEPS)}"
        )
    try:
        config.teacher_plan(config.num_steps)
        SamplingSettings(
            config.dataset_name, config.num_steps, config.afs, config.schedule_type, config.schedule_rho, 1, 2
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def check_guidance(config: DistillConfig) -> None:
    """Refuse guidance that does nothing, and one for a registered model that has nothing to be guided by."""
    name, row = config.dataset_name, ROWS.get(config.dataset_name)
    if config.guidance_type == "cfg" and not config.has_text:
        raise UserError(f"--guidance_type=cfg needs a text-conditioned teacher (ms_coco); {name} has no text")
    if config.guidance_type == "uncond" and config.guidance_rate not in (None, 1):
        raise UserError(f"--guidance_rate={config.guidance_rate:g} does nothing with --guidance_type=uncond")
    has_rate = config.guidance_rate is not None or config.training_rate != 1
    if config.guidance_type == "teacher" and not has_rate and not config.is_second_stage:
        raise UserError("--guidance_type=teacher needs --guidance_rate, for the teacher has no rate of its own")
    unguidable = row is not None and not (row.text or row.label_dim or config.guide or config.model_path)
    if config.training_rate != 1 and unguidable:
        raise UserError(f"--guidance_rate={config.training_rate:g}: {name} {UNGUIDABLE}")
    if config.guide is not None and (config.training_rate == 1 or config.is_second_stage):
        raise UserError("--guide does nothing here; give --guidance_rate with it, in the first stage")
    if config.negative_prompt is not None and (config.training_rate == 1 or not config.has_text):
        raise UserError(
            "--negative_prompt does nothing here; it is for a text-conditioned teacher with --guidance_rate"
        )


def source_settings(config: DistillConfig) -> SamplingSettings | None:
    """What the student of --model_path records, which a second stage distils; None in the first stage."""
    return read_sampling(find_student(first_student(config.model_path))) if config.is_second_stage else None


def settle(config: DistillConfig) -> DistillConfig:
    """The settings with what the teacher decides: the place and contents of its file, and in the second stage more."""
    source = source_settings(config)
    if source is not None:
        config = follow_teacher(config, source)
    if config.guide is not None:
        guide = config.guide if config.guide in ROWS else absolute(find_model(config.guide))
        config = replace(config, guide=guide)
    if config.model_path is None:
        return replace(config, teacher_sha256=embedded_digest(config.dataset_name))
    path = find_model(config.model_path) if source is None else find_student(config.model_path)
    if not path.exists():
        return config  # the loader says what is expected there
    return replace(config, model_path=absolute(path), teacher_sha256=digest_of(path))


def absolute(path: str | Path) -> str:
    """The path from the root, unless a folder on the way may not be entered, which a relative path need not."""
    return os.path.abspath(path) if os.path.exists(os.path.abspath(path)) else str(path)


def describe(config: DistillConfig, where: str) -> str:
    """What a run of settled settings would do, in a few lines for people; `where` it goes."""
    source = source_settings(config)
    choices = config.step_choices
    nfes = [config.student_plan(steps).nfe for steps in choices]
    evaluations = [config.teacher_plan(steps, source).nfe for steps in choices]
    return (
        f"Run directory: {where}\n"
        f"Student: NFE {span(nfes)}; teacher: {span(evaluations)} evaluations per trajectory\n"
        f"Length: {config.total_images // config.batch} iterations of {config.batch}"
    )


def micro_batch(batch: int, batch_gpu: int | str | None, processes: int) -> int:
    """Samples that one process handles at a time, so that `batch` splits evenly over processes and rounds.

    Of `auto`, which is found out later, and of None they are the whole share of the process.
    """
    if batch % processes:
        raise UserError(f"--batch={batch} is not divisible by {processes} processes; choose a multiple of {processes}")
    local = batch // processes
    size = min(batch_gpu, local) if isinstance(batch_gpu, int) else local
    if local % size:
        raise UserError(
            f"--batch-gpu={size} does not divide the {local} samples of each of {processes} processes "
            f"(--batch={batch}); choose a divisor of {local}"
        )
    return size


def follow_teacher(config: DistillConfig, teacher: SamplingSettings) -> DistillConfig:
    """Second stage: take over what the teacher's settings decide, and refuse what contradicts them."""
    if teacher.dataset_name != config.dataset_name:
        raise UserError(
            f"--model_path was distilled on {teacher.dataset_name}, not on --dataset_name={config.dataset_name}"
        )
    if teacher.is_second_stage:
        raise UserError("--model_path is itself a second-stage model; expected an SFD or SFD-v model")
    asked = (config.schedule_type, config.schedule_rho)
    kept = (teacher.schedule_type, teacher.schedule_rho)
    if asked != kept:
        raise UserError(
            f"--schedule_type={asked[0]} --schedule_rho={asked[1]:g} differ from the model's {kept[0]}, {kept[1]:g}; "
            "the second stage keeps its teacher's schedule"
        )
    if config.use_step_condition and not teacher.use_step_condition:
        raise UserError("--use_step_condition=True, but --model_path has no step condition; leave the flag out")
    needed = config.teacher_steps(config.num_steps)
    allowed = VARIABLE_STEPS if teacher.is_variable else (teacher.num_steps,)
    if needed not in allowed:
        raise UserError(
            f"--num_steps={config.num_steps} --M={config.M} sample the model at {needed} timestamps, it was made for "
            f"{span(allowed)}; (M+1)·(num_steps−1)+1 must match"
        )
    if teacher.guidance_type == "teacher" and config.guidance_type is None:
        config = replace(config, guidance_type="teacher")  # its guidance is in it, and so it will be in its student
    return replace(config, use_step_condition=teacher.use_step_condition)
