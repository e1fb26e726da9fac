"""The distillation loop, and what a run needs to be there before it begins."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.signals import Stopped, deferred_stop
from models.diffusers_space import FolderSpace
from models.loading import make_student, save_student
from models.model import DiffusionModel, SamplingSettings, Student
from models.prompts import Prompts, captions_by_seed, read_prompts
from torch_utils import distributed
from torch_utils.device import PRECISIONS, use_deterministic_algorithms
from torch_utils.graphs import Graphs
from torch_utils.random import derive_seed

from . import runs
from .conditions import DROPOUT, INIT, Batches
from .config import DistillConfig, micro_batch, settle
from .distill import Distiller, Teacher, load_source, perceptual_loss
from .evaluation.curve import Evaluation
from .health import Health, StopRequests
from .memory import largest_micro_batch
from .optimizers import set_learning_rate
from .report import Report
from .runs import Intervals, Place
from .state import TrainingState


def distil(
    state: TrainingState,
    batches: Batches,
    report: Report,
    run_dir: Path,
    intervals: Intervals,
    evaluation: Evaluation | None = None,
) -> None:
    """Iterate to the end of the run; save at the intervals and at the end, and evaluate what was saved.

    Raises:
        Stopped: SIGTERM or SIGINT asked for it, on any rank; the state is saved.
        UserError: the loss, or a weight, is not finite.
    """
    distiller, config, health = state.distiller, state.distiller.config, state.health
    total, tick_images = config.total_images, max(int(intervals.tick * 1000), 1)
    stops = StopRequests(distiller.device)
    tick_start, maintenance = time.time(), 0.0
    with report.bar() as bar, deferred_stop() as asked:
        while state.images < total:
            # Every draw is a function of (seed, iteration), so that a resumed run equals an uninterrupted one.
            iteration = state.images // config.batch
            noise, cond, num_steps = batches.draw(iteration)
            torch.manual_seed(derive_seed(config.seed, DROPOUT, iteration, distributed.rank()))
            set_learning_rate(distiller.optimizer, config.learning_rate(state.images))
            distiller.iterate(noise, cond, num_steps)
            before, state.images = state.images, state.images + config.batch
            bar.update(config.batch)

            if line := health.check(state.images):
                report.log(line)

            ticks_before, ticks = before // tick_images, state.images // tick_images
            # A large batch can jump over ticks, so multiples are crossed rather than met.
            crossed = partial(_has_multiple, ticks_before, ticks)
            done = state.images >= total
            stopped = stops.poll(asked() is not None) and not done
            ticked = done or crossed(1)
            if not ticked and not stopped:
                continue
            health.check_weights(state.images)  # waits for the device
            losses = distiller.losses.flush() if ticked else {}
            tick_end = time.time()
            duration = tick_end - tick_start
            state.seconds += duration + maintenance
            if ticked:
                report.tick(ticks, losses, duration, maintenance)
            # The student comes before the state, after which it would be missing for good; who stops has no time for
            # its picture.
            snapped = not done and crossed(intervals.snap)
            if snapped:
                save_snapshot(state, report, run_dir, intervals, picture=not stopped)
            if done or stopped or crossed(intervals.dump):
                state.save(run_dir, intervals.keep)
            if stopped:
                distributed.barrier()  # the first process that ends makes torchrun end the others
                number = asked() or signal.SIGTERM
                by = "the end of torchrun" if stops.is_orphan else signal.Signals(number).name
                where = f"at kimg {state.images / 1000:g}, the state is saved; repeat the command to go on"
                report.log(f"Stopped by {by} {where}")
                raise Stopped(number, message="")
            if evaluation is not None and snapped and crossed(intervals.snap * evaluation.every):
                report.log(evaluation(run_dir, state.images))
            maintenance, tick_start = time.time() - tick_end, time.time()
        # Last of all, for a run that has its last student counts as finished.
        save_snapshot(state, report, run_dir, intervals)
        if evaluation is not None:
            report.log(evaluation(run_dir, state.images))


def _has_multiple(before: int, after: int, number: int) -> bool:
    """Whether a multiple of `number` is above `before` and not above `after`."""
    return after // number > before // number


def save_snapshot(
    state: TrainingState, report: Report, run_dir: Path, intervals: Intervals, picture: bool = True
) -> None:
    """The student as one file, on rank 0, and a picture of teacher and student; older students may go."""
    if picture:
        report.picture()
    if distributed.rank() == 0:
        student = state.distiller.student.eval()
        training = {**state.distiller.config.to_json(), "images": state.images, "seconds": round(state.seconds, 1)}
        save_student(run_dir / runs.snapshot_name(state.images), student, training)
        runs.prune_snapshots(run_dir, intervals.keep_snapshots)


def load_models(
    config: DistillConfig, device: torch.device, teacher_path: str | None = None, graphs: Graphs | None = None
) -> tuple[Teacher, Student]:
    """Teacher, which uses `graphs`, and student of a run; for `teacher_path` see `load_source`."""
    source = load_source(config, device, teacher_path)
    sampling = _with_guidance(config.sampling(source.sigma_min, source.sigma_max), source)
    if isinstance(source, Student):  # the first teacher, where it has no registered name, stays known
        sampling = replace(sampling, **_first_teacher(sampling, source.sampling))
    source.check_guidance(config.training_rate)
    source.negative_prompt = config.negative_prompt
    source.compute_dtype = PRECISIONS[config.precision]
    torch.manual_seed(derive_seed(config.seed, INIT))
    student = make_student(source, sampling)
    student.compute_dtype = source.compute_dtype
    if config.dropout is not None:
        student.net.set_dropout(config.dropout)
    teacher = Teacher(source, config, sampling, graphs)
    try:
        for num_steps in config.step_choices:
            teacher.sigmas(num_steps)
    except ValueError as error:
        raise UserError(f"{source.dataset_name} cannot be distilled on this schedule: {error}") from None
    if source.latent is not None:
        source.latent.decoder()  # pictures need it, and a run should not end without them
    return teacher, student


def _first_teacher(sampling: SamplingSettings, first: SamplingSettings) -> dict[str, Any]:
    """What a student of the second stage records of its teacher's."""
    kept: dict[str, Any] = {name: getattr(first, name) for name in ("teacher_path", "teacher_sha256", "guide_path")}
    if sampling.training_guidance_rate == 1:
        kept |= dict(training_guidance_rate=first.training_guidance_rate, negative_prompt=first.negative_prompt)
    return kept


def _with_guidance(sampling: SamplingSettings, source: DiffusionModel) -> SamplingSettings:
    """The published way of a text-conditioned student: trained without guidance, sampled at its teacher's rate."""
    if not source.has_text or sampling.guidance_type is not None:
        return sampling
    return replace(sampling, guidance_type="cfg", guidance_rate=source.guidance_rate)


def train(
    config: DistillConfig,
    place: Place,
    device: torch.device,
    *,
    intervals: Intervals,
    batch_gpu: int | str | None = None,
    gradient_checkpointing: bool = False,
    deterministic: bool = False,
    cuda_graph: str = "auto",
    log: str | None = None,
    teacher_path: str | None = None,
    validation_prompts: str | None = None,
    evaluation: Callable[[], Evaluation] | None = None,
) -> Path:
    """Run or continue a distillation; every rank calls it. Returns the run directory.

    `batch_gpu` (`auto` tries out what fits) and `gradient_checkpointing` save memory and change nothing else.
    `deterministic` makes two runs on one kind of GPU equal, as they are on the CPU in any case; see
    docs/reliability.md. `cuda_graph` is a mode of `Graphs`, whose `auto` is off if `deterministic`: it goes by time.
    For `log` see `training.loggers`, for `teacher_path` `load_source`. `validation_prompts` is a
    file of captions for the pictures of a text-conditioned student, one for each column.
    `evaluation` makes what evaluates snapshots along the way, once the processes have met.
    """
    if deterministic:
        use_deterministic_algorithms()
    distributed.init(device)
    config = distributed.on_first_rank(lambda: settle(config))
    share = micro_batch(config.batch, batch_gpu, distributed.world_size())
    if path := distributed.on_first_rank(lambda: runs.finished_run(place, config)):
        return _finish(path, None if evaluation is None else evaluation(), config.total_images)
    graphs = Graphs("off" if deterministic and cuda_graph == "auto" else cuda_graph)
    teacher, student = load_models(config, device, teacher_path, graphs)
    if gradient_checkpointing:
        student.net.checkpoint_gradients()
    prompts = captions_by_seed() if student.has_text else None
    shown = prompts if validation_prompts is None else _captions_of(student, validation_prompts)
    if prompts is not None and isinstance(student.latent, FolderSpace):
        student.latent.prepare([*prompts.texts, *(shown.texts if shown else [])], device)
    perceptual = perceptual_loss(config, teacher.model)
    launch: dict[str, Any] = {"processes": distributed.world_size(), "batch_gpu": batch_gpu, "device": str(device)}
    launch |= {"gradient_checkpointing": gradient_checkpointing, "deterministic": deterministic}
    launch |= {"cuda_graph": cuda_graph, "torch": torch.__version__, **vars(intervals), "log": log}
    opened = distributed.on_first_rank(lambda: runs.open_run(place, config, launch))
    if opened.is_finished:  # by a process that was faster
        return _finish(opened.path)
    size = largest_micro_batch(teacher, student, perceptual, share) if batch_gpu == "auto" else share
    distiller = Distiller(teacher, student, config, size, perceptual)
    state = TrainingState(distiller, Health(distiller))
    report = Report(opened.path, state, shown)
    graphs.say = report.log
    if state.restore(opened.path, report.log, place.override):
        report.log(f"Continuing {opened.path} at kimg {state.images / 1000:g}")
    if opened.changed:
        report.log(f"Warning: other settings than before: {'; '.join(opened.changed)}")
    distributed.on_first_rank(lambda: runs.cut_stats(opened.path, state.images))
    evaluate = None if evaluation is None else evaluation()
    report.describe()
    with report.logged(log, {**config.to_json(), **launch}):
        distil(state, Batches(config, student, prompts, device), report, opened.path, intervals, evaluate)
    report.log(f"Student: {opened.path / runs.snapshot_name(state.images)}")
    report.log(f"Picture: {opened.path / runs.picture_name(state.images)}")
    opened.close()
    distributed.shutdown()
    return opened.path


def _captions_of(student: Student, path: str) -> Prompts:
    """The captions of a file, one for each column of the pictures."""
    if not student.has_text:
        raise UserError(f"{student.dataset_name} has no text; this is for a text-conditioned one", "validation_prompts")
    return Prompts(read_prompts(path))


def _finish(run_dir: Path, evaluation: Evaluation | None = None, images: int = 0) -> Path:
    """Say that there is nothing to train; the last evaluation follows where the run was killed before it."""
    line = None if evaluation is None else evaluation(run_dir, images)
    if distributed.rank() == 0:
        print(f"already finished: {run_dir}; --resume=never trains another one")
        if line is not None:
            print(line)
    distributed.shutdown()
    return run_dir
