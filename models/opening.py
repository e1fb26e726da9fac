"""From the names of files and the options of a command to a sampler, and to the rivals of a student."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from solvers import SamplingPlan
from torch_utils.graphs import Graphs

from .latent import pick_decode_precision
from .loading import find_guide, guidance_of, load_student, load_teacher, load_teacher_of, read_sampling, teacher_digest
from .model import SamplingSettings, Student
from .paths import digest_of, find_model, is_teacher_file
from .prompts import given_prompts, prompts_for
from .registry import get_row
from .sampling import (
    Sampler,
    SamplerOptions,
    TeacherOptions,
    settings_for,
    student_sampler,
    teacher_plan,
    teacher_sampler,
    with_guidance,
)

#: What a student can be asked for; the rest it was distilled for.
STUDENT_OPTIONS = ("num_steps", "guidance_rate", "prompt", "prompts")
#: What says more of a sampler than its flags do, and is part of its identity where it has any.
NOT_OF_ALL = ("guidance_rate", "guide", "prompt", "prompts")


def plan_sampler(model_path: str, dataset_name: str | None, options: SamplerOptions) -> SamplingPlan | None:
    """How `open_sampler` would sample, from settings alone: nothing is fetched, and no weights are read.

    None for a student that is not there yet.
    """
    try:
        path = _model_file(model_path)
    except UserError:
        return None
    if path is not None and not path.exists():
        return None
    if path is None or is_teacher_file(path):
        if dataset_name is not None:
            get_row(dataset_name)
        return teacher_plan(options, guidance_of(dataset_name, path)[1])
    settings = read_sampling(path)
    _check_student(settings, dataset_name, options)
    return with_guidance(settings_for(settings, options.num_steps).plan, options.guidance_rate)


def _model_file(model_path: str) -> Path | None:
    """The file or folder of a model; None for a registered teacher."""
    if model_path == "teacher":
        return None
    return find_model(model_path)


@dataclass(frozen=True)
class OpenedSampler:
    """A sampler, a short name for it, and what determines its images (JSON-serialisable)."""

    sampler: Sampler
    name: str
    identity: dict[str, Any]


def open_sampler(
    model_path: str,
    dataset_name: str | None,
    options: SamplerOptions,
    device: torch.device,
    dtype: torch.dtype,
    teacher_path: str | None = None,
    cuda_graph: str = "auto",
    decode_precision: str | None = None,
) -> OpenedSampler:
    """The sampler that a command line describes.

    Args:
        model_path: `teacher`, the file of a teacher of one's own, or a student (file, run directory, run number).
        dataset_name: needed for `teacher`; else checked against the file.
        options: solver and schedule for a teacher; `STUDENT_OPTIONS` alone for a student.
        dtype: of the network's core.
        teacher_path: where a student's teacher is, if not where it was.
        cuda_graph: mode of `Graphs`.
        decode_precision: of a latent model's first stage, see `pick_decode_precision`.

    Raises:
        UserError: whatever does not fit together.
    """
    captions = given_prompts(options.prompt, options.prompts)  # before anything is fetched
    about = "prompt" if options.prompts is None else "prompts"
    if options.guidance_rate is not None and not math.isfinite(options.guidance_rate):
        raise UserError(f"{options.guidance_rate} is not a finite number; give one", "guidance_rate")
    path = _model_file(model_path)
    if path is None or is_teacher_file(path):
        if dataset_name is not None:
            get_row(dataset_name)
        if teacher_path is not None:
            raise UserError("is for a student, and model_path is a teacher", "teacher_path")
        model = load_teacher(dataset_name, path, device, options.guide, with_guide=options.guidance_rate != 1)
        prompts = prompts_for(model, captions, about)
        sampler = teacher_sampler(model, options, prompts)
        effective = TeacherOptions.of(options)
        name = f"{'teacher' if path is None else path.stem}-{effective.solver}"
        identity = {key: value for key, value in asdict(effective).items() if key not in NOT_OF_ALL}
        if options.guide is not None:
            identity["guide"] = digest_of(find_guide(options.guide))
    else:
        model = load_student(path, device, teacher_path)
        _check_student(model.sampling, dataset_name, options)
        prompts = prompts_for(model, captions, about)
        sampler = student_sampler(model, options.num_steps, options.guidance_rate, prompts)
        # Snapshots have the same names in every run, so the name of the run comes with it.
        name = path.stem if path.parent == Path() else f"{path.parent.name}-{path.stem}"
        identity = {"num_steps": len(sampler.sigmas)}
    model.check_guidance(sampler.plan.guidance_rate)
    model.compute_dtype = dtype
    if model.latent is None and decode_precision is not None:
        raise UserError(f"is for latents, and {model.dataset_name} makes images; leave it out", "decode_precision")
    if model.latent is not None:
        model.latent.decoder()  # so that a file without one is found now
        model.latent.decode_precision = pick_decode_precision(decode_precision, device)
        if model.latent.decode_precision != "fp32":
            identity["decode_precision"] = model.latent.decode_precision
    if prompts is None and sampler.plan.guidance_rate != 1:
        identity["guidance_rate"] = sampler.plan.guidance_rate
    if prompts is not None:
        texts = hashlib.sha256("\n".join(prompts.texts).encode()).hexdigest()
        identity |= {"guidance_rate": sampler.plan.guidance_rate, "prompts": texts, "drawn": prompts.drawn}
    digest = None if path is None else digest_of(path)
    sampler = replace(sampler, graphs=Graphs(cuda_graph))
    return OpenedSampler(sampler, name, {"model": name, "sha256": digest, **identity})


def _check_student(settings: SamplingSettings, dataset_name: str | None, options: SamplerOptions) -> None:
    if dataset_name is not None and dataset_name != settings.dataset_name:
        raise UserError(f"the student is of {settings.dataset_name}, not of {dataset_name}", "dataset_name")
    foreign = [name for name in options.chosen() if name not in STUDENT_OPTIONS]
    if foreign:
        raise UserError("belongs to a teacher; a student takes the steps that it was distilled for", foreign[0])


@dataclass(frozen=True)
class ComparedSampler:
    """A sampler, what people call it, and what determines its images (JSON-serialisable)."""

    label: str
    sampler: Sampler
    identity: dict[str, Any]


def named_students(first: OpenedSampler, others: Iterable[OpenedSampler]) -> dict[str, OpenedSampler]:
    """Students of one teacher by what tables and pictures call them: `student`, and the others by what they are.

    Raises:
        UserError: one is no student, is that of another teacher, or has the name of one that is there already.
    """
    found = {"student": first}
    for other in others:
        settings = _settings_of(other, "also")
        if _teacher_of(settings) != _teacher_of(_settings_of(first, "model_path")):
            raise UserError(
                f"{other.name} is a student of another teacher than {first.name}; compare them apart", "also"
            )
        kind = "second stage" if settings.is_second_stage else "SFD-v" if settings.is_variable else "SFD"
        label = f"student, {kind}"
        label = f"{label} ({other.name})" if label in found else label
        if label in found:
            raise UserError(f"{other.name} is there twice; one of a name can be compared", "also")
        found[label] = other
    return found


def _settings_of(student: OpenedSampler, about: str) -> SamplingSettings:
    model = student.sampler.model
    if not isinstance(model, Student):
        raise UserError("is a teacher; expected a student to compare with its teacher", about)
    return model.sampling


def _teacher_of(settings: SamplingSettings) -> tuple[str, str | None]:
    return settings.dataset_name, settings.teacher_sha256 or teacher_digest(settings)


#: A student's teacher at its best, and the solvers that need no training.
BEST = "teacher, Heun"
TRAINING_FREE = {"euler": "Euler", "dpmpp": "DPM-Solver++"}


def rivals(student: OpenedSampler, training_free: Sequence[tuple[str, int]]) -> list[ComparedSampler]:
    """What a student is compared with: its teacher by Heun at 35 NFE, then by (solver, number of steps).

    Raises:
        UserError: not a student, or its teacher is not to be had.
    """
    model, plan, settings = student.sampler.model, student.sampler.plan, _settings_of(student, "model_path")
    assert isinstance(model, Student)
    teacher = load_teacher_of(model, student.name)
    teacher.negative_prompt = settings.negative_prompt
    teacher.compute_dtype, teacher.latent = model.compute_dtype, model.latent
    # What the student learnt from, or is sampled with.
    rate = settings.training_guidance_rate if settings.training_guidance_rate != 1 else plan.guidance_rate
    choices = [(BEST, SamplerOptions())]
    choices += [(TRAINING_FREE[name], SamplerOptions(steps + 1, name)) for name, steps in training_free]
    name, digest = settings.teacher_path or model.dataset_name, teacher_digest(settings)
    # What captions the images have is in the student's identity, for a text-conditioned one.
    shared = {k: student.identity[k] for k in ("prompts", "drawn") if k in student.identity}
    found = []
    for label, chosen in choices:
        options = replace(TeacherOptions.of(chosen), guidance_rate=rate)
        identity = {"model": f"teacher of {name}", "sha256": digest, **(asdict(options) | shared)}
        found.append(ComparedSampler(label, teacher_sampler(teacher, options, student.sampler.prompts), identity))
    return found
