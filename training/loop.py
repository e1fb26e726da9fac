"""The distillation loop: iterations, status lines, snapshots, pictures and resuming."""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dnnlib import Logger, UserError, format_count, format_duration
from dnnlib.signals import Stopped, deferred_stop
from models.loading import make_student, save_student
from models.model import DiffusionModel, SamplingSettings, Student
from models.prompts import Prompts, captions_by_seed
from models.sampling import draw_latents, student_sampler
from torch_utils import distributed
from torch_utils.checkpoint import read_state, usable_state
from torch_utils.device import PRECISIONS, use_deterministic_algorithms
from torch_utils.images import draw_grid, save_picture, to_uint8
from torch_utils.random import derive_seed

from . import runs
from .conditions import DROPOUT, INIT, draw_captions, draw_labels, draw_noise, draw_num_steps
from .config import DistillConfig, follow_teacher, micro_batch, span
from .cost import largest_micro_batch
from .distill import Distiller, Teacher, load_source, perceptual_loss
from .loggers import RunLogger
from .optimizers import set_learning_rate
from .runs import Intervals

PICTURE_SEEDS = range(10)
#: Iterations in a row with a non-finite loss after which a run is hopeless.
MAX_BAD_IN_A_ROW = 20


def load_models(config: DistillConfig, device: torch.device) -> tuple[DistillConfig, Teacher, Student]:
    """Teacher and student of a run, and the config with what the teacher decides filled in."""
    source = load_source(config, device)
    if isinstance(source, Student):
        config = follow_teacher(config, source.sampling)
    sampling = _with_guidance(config.sampling(source.sigma_min, source.sigma_max), source)
    if isinstance(source, Student):  # the first teacher, where it has no registered name, stays known
        sampling = replace(sampling, teacher_path=source.sampling.teacher_path)
    source.compute_dtype = PRECISIONS[config.precision]
    torch.manual_seed(derive_seed(config.seed, INIT))
    student = make_student(source, sampling)
    student.compute_dtype = source.compute_dtype
    if config.dropout is not None:
        student.net.set_dropout(config.dropout)
    teacher = Teacher(source, config, sampling)
    try:
        for num_steps in config.step_choices:
            teacher.sigmas(num_steps)
    except ValueError as error:
        raise UserError(f"{source.dataset_name} cannot be distilled on this schedule: {error}") from None
    if source.latent is not None:
        source.latent.decoder()  # pictures need it, and a run should not end without them
    return config, teacher, student


def _with_guidance(sampling: SamplingSettings, source: DiffusionModel) -> SamplingSettings:
    """A text-conditioned student is sampled with guidance, at its teacher's rate unless another one is given.

    Teacher and student are trained without, as the paper's are.
    """
    if not source.has_text or sampling.guidance_type is not None:
        return sampling
    return replace(sampling, guidance_type="cfg", guidance_rate=source.guidance_rate)


class Run:
    """A distillation run in its directory; `train` takes it to its end. A text-conditioned model needs `prompts`."""

    def __init__(
        self, run_dir: Path, distiller: Distiller, intervals: Intervals, prompts: Prompts | None = None
    ) -> None:
        self.run_dir, self.distiller, self.intervals, self.prompts = run_dir, distiller, intervals, prompts
        self.config, self.teacher, self.student = distiller.config, distiller.teacher, distiller.student
        self.device = distiller.device
        self.is_first = distributed.rank() == 0
        self.log = Logger(run_dir / runs.LOG) if self.is_first else (lambda line="": None)
        self.logger: RunLogger | None = None
        self.images, self.seconds, self.half_off = 0, 0.0, False
        self._skips = LaggedCount(self.distiller.skipped)
        self._seen_skips, self._bad_in_a_row = 0, 0
        self._stops = torch.zeros((), device=self.device)
        self._stop_count = LaggedCount(self._stops)
        self._teacher_row: np.ndarray | None = None

    def resume(self) -> None:
        """Continue from the newest usable training state of the run directory, if there is one."""
        path = distributed.on_first_rank(self._restore_newest)
        if path is not None and not self.is_first:
            self._restore(path)
        if self.is_first:
            runs.cut_stats(self.run_dir, self.images)
        if path is not None:
            self.log(f"Continuing {self.run_dir} at kimg {self.images / 1000:g}")

    def _restore_newest(self) -> Path | None:
        """The state that the run goes on from, restored; damaged newer ones are set aside, and the log says so."""
        damaged: list[tuple[Path, UserError]] = []
        paths = runs.states(self.run_dir)
        for path in paths:
            try:
                self._restore(path)
            except UserError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                self.log(
                    f"Warning: {reason.message.split(';')[0]}; it is now {runs.set_aside(bad)}, going back to {path}"
                )
            return path
        if damaged:
            raise damaged[0][1]
        return None

    def _restore(self, path: Path) -> None:
        state = read_state(path)
        with usable_state(path):
            self._take_over(state)

    def _take_over(self, state: dict[str, Any]) -> None:
        self.student.net.load_state_dict(state["student"])
        self.distiller.optimizer.load_state_dict(state["optimizer"])
        self.distiller.skipped.fill_(state["skipped"])
        self._skips = LaggedCount(self.distiller.skipped, state["skipped"])
        # On CUDA the last step's skip may not have been seen yet.
        self._seen_skips = state.get("seen_skips", state["skipped"])
        self.images, self.seconds = state["images"], state["seconds"]
        if state["half_off"]:
            self._switch_half_off()

    @contextmanager
    def logged(self, name: str | None, settings: dict[str, Any]) -> Iterator[None]:
        """Within, rank 0 writes to the logger of this name too; None: to plain files alone."""

        def start(name: str) -> None:
            self.logger = RunLogger(name, self.run_dir, settings, self.images, self.log)

        if name is not None:
            distributed.on_first_rank(partial(start, name))
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.logger is not None:
                self.logger.close(failed)

    def train(self) -> None:
        """Iterate to the end; save at the intervals and at the end.

        Raises:
            Stopped: SIGTERM or SIGINT asked for it, on any rank; the state is saved.
        """
        total, tick_images = self.config.total_images, max(int(self.intervals.tick * 1000), 1)
        self._describe()
        tick_start, tick_from = time.time(), self.images
        maintenance = 0.0
        bar = tqdm(total=total, initial=self.images, unit="img", disable=not self.is_first, dynamic_ncols=True)
        with bar, deferred_stop() as asked:
            while self.images < total:
                tick_before = self.images // tick_images
                self._iterate()
                bar.update(self.config.batch)
                done = self.images >= total
                stopped = self._is_stopped(asked() is not None) and not done
                tick = self.images // tick_images
                ticked = done or tick > tick_before
                if not ticked and not stopped:
                    continue
                losses = self.distiller.losses.flush() if ticked else {}  # waits for the device
                duration = time.time() - tick_start
                self.seconds += duration + maintenance
                if ticked:
                    self._report(tick, duration, self.images - tick_from, maintenance, losses)
                started = time.time()
                # A large batch can jump over ticks, so multiples are crossed rather than met. The student comes before
                # the state, after which it would be missing for good; who stops has no time for its picture.
                if not done and tick // self.intervals.snap > tick_before // self.intervals.snap:
                    self.save_snapshot(picture=False) if stopped else self.save_snapshot()
                if done or stopped or tick // self.intervals.dump > tick_before // self.intervals.dump:
                    self.save_state()
                if stopped:
                    self._stop(asked() or signal.SIGTERM)
                maintenance, tick_start, tick_from = time.time() - started, time.time(), self.images
            # Last of all, for a run that has its last student counts as finished.
            self.save_snapshot()

    def _is_stopped(self, asked: bool) -> bool:
        """Whether this rank or another one was asked to stop; all of them learn it after the same iteration."""
        if distributed.world_size() == 1:
            return asked
        self._stops.fill_(asked)
        distributed.all_reduce_sum(self._stops)
        return self._stop_count.poll() > 0

    def _stop(self, number: int) -> NoReturn:
        name = signal.Signals(number).name
        self.log(f"Stopped by {name} at kimg {self.images / 1000:g}, the state is saved; repeat the command to go on")
        raise Stopped(number, message="")

    def _iterate(self) -> None:
        config, iteration = self.config, self.images // self.config.batch
        rank, world = distributed.rank(), distributed.world_size()
        share = slice(rank * config.batch // world, (rank + 1) * config.batch // world)
        num_steps = draw_num_steps(config.seed, iteration, config.step_choices)
        noise = self._to_device(draw_noise(config.seed, iteration, config.batch, self.student.shape)[share])
        given = self._draw_conditions(iteration, share)
        torch.manual_seed(derive_seed(config.seed, DROPOUT, iteration, rank))
        set_learning_rate(self.distiller.optimizer, config.learning_rate(self.images))
        self.distiller.iterate(noise, given, num_steps)
        self.images += config.batch
        self._watch_skips()

    def _draw_conditions(self, iteration: int, share: slice) -> Tensor | None:
        """One-hot labels or text conditions of this rank's share of a batch; None for neither."""
        config = self.config
        if self.prompts is not None:
            captions = draw_captions(config.seed, iteration, config.batch, self.prompts.texts)
            return self.student.encode_text(captions[share])
        net = self.student.net
        labels = draw_labels(config.seed, iteration, config.batch, net.label_dim, net.class_frequencies)
        return None if labels is None else self._to_device(labels[share])

    def _to_device(self, value: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return value.contiguous().pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device)

    def _watch_skips(self) -> None:
        """Go on in single precision once half precision has overflowed; give up if that does not help either."""
        before, skipped = self._seen_skips, self._skips.poll()
        self._seen_skips = skipped
        if skipped == before:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        if self.config.precision == "fp16" and not self.half_off:
            self._switch_half_off()
            self.log(f"A loss was not finite at kimg {self.images / 1000:g}: continuing in float32")
        elif self._bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise UserError(
                f"the loss is not finite: {skipped} steps skipped up to kimg {self.images / 1000:g}; "
                "lower --lr, or check the teacher with sample.py --model_path=teacher"
            )

    def _switch_half_off(self) -> None:
        self.half_off = True
        self.student.compute_dtype = self.teacher.model.compute_dtype = torch.float32

    def _describe(self) -> None:
        config = self.config
        size = format_count(sum(p.numel() for p in self.distiller.trained))
        nfes = [config.student_plan(n).nfe for n in config.step_choices]
        self.log(
            f"{self.run_dir}: {config.dataset_name}, {size} trained parameters, NFE {span(nfes)}, {config.precision} "
            f"on {distributed.world_size()}× {self.device.type}, micro-batch {self.distiller.micro} of {config.batch}"
        )

    def _report(self, tick: int, duration: float, images: int, maintenance: float, losses: dict[str, float]) -> None:
        if not self.is_first:
            return
        memory = {"cpumem": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if sys.platform == "darwin":
            memory["cpumem"] /= 1024  # bytes there, KiB elsewhere
        if self.device.type == "cuda":
            memory["gpumem"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        final = [v for k, v in losses.items() if int(k.split("/")[1]) == int(k.split("/")[2]) + 2]
        loss, skipped = float(np.mean(final)), int(self.distiller.skipped)
        fields = {
            "tick": f"{tick:<5d}", "kimg": f"{self.images / 1000:<8.1f}",
            "time": f"{format_duration(self.seconds):<12s}",
            "sec/tick": f"{duration:<7.1f}", "sec/kimg": f"{duration / images * 1000:<7.2f}",
            "maintenance": f"{maintenance:<6.1f}", **{k: f"{v:<6.2f}" for k, v in memory.items()},
            "loss": f"{loss:<8.2f}", "skipped": f"{skipped}",
        }  # fmt: skip
        self.log(" ".join(f"{name} {value}" for name, value in fields.items()))
        lr = self.config.learning_rate(self.images - self.config.batch)
        stats = {
            "images": self.images, "kimg": self.images / 1000, "seconds": round(self.seconds, 3),
            "loss": loss, **losses,
            "sec_per_kimg": duration / images * 1000, "lr": lr, "skipped": skipped, **memory, "timestamp": time.time(),
        }  # fmt: skip
        finite = {k: v if math.isfinite(v) else None for k, v in stats.items()}  # JSON has no NaN
        with open(self.run_dir / runs.STATS, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        if self.logger is not None:
            self.logger.scalars(finite, self.images)

    def save_snapshot(self, picture: bool = True) -> None:
        """The student as one file, and a picture of teacher and student endpoints for the same seeds."""
        if not self.is_first:
            return
        self.student.eval()
        training = {**self.config.to_json(), "images": self.images, "seconds": round(self.seconds, 1)}
        if picture:
            drawn = self._picture()
            save_picture(drawn, self.run_dir / runs.picture_name(self.images))
            if self.logger is not None:
                self.logger.picture(drawn, self.images)
        save_student(self.run_dir / runs.snapshot_name(self.images), self.student, training)

    def _picture(self) -> Image.Image:
        x, given = draw_latents(self.student, PICTURE_SEEDS, prompts=self.prompts)
        if self._teacher_row is None:
            final = self.teacher.trajectory(x, given, max(self.config.step_choices))[-1]
            self._teacher_row = to_uint8(self.student.decode(final))
        rows, names = [self._teacher_row], ["teacher"]
        for num_steps in self.config.step_choices:
            sampler = student_sampler(self.student, num_steps, guidance_rate=1)  # as it is trained
            rows.append(to_uint8(self.student.decode(sampler.run(x, given))))
            names.append(f"student, NFE {sampler.nfe}")
        return draw_grid(rows, names, scale=max(1, 64 // self._teacher_row.shape[1]))

    def save_state(self) -> None:
        """Everything that the rest of the run depends on, in one file."""
        self._skips.wait()
        if self.is_first:
            state = {
                "student": self.student.net.state_dict(),
                "optimizer": self.distiller.optimizer.state_dict(),
                "skipped": int(self.distiller.skipped),
                "seen_skips": self._seen_skips,
                "images": self.images,
                "seconds": self.seconds,
                "half_off": self.half_off,
            }
            runs.save_newest_state(self.run_dir, state, self.intervals.keep)


class LaggedCount:
    """Reads a counter on the device without holding it up: on CUDA, `poll` gives the value of the call before.

    The lag is exactly one call, so that what follows from it does not depend on timing.
    """

    def __init__(self, counter: Tensor, value: int = 0) -> None:
        self._counter, self._value = counter, value
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def poll(self) -> int:
        if self._counter.device.type != "cuda":
            self._value = int(self._counter)
            return self._value
        host = torch.empty((), pin_memory=True).copy_(self._counter, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.wait()
        self._pending = (host, event)
        return self._value

    def wait(self) -> None:
        """Take in what is on its way."""
        if self._pending is not None:
            host, event = self._pending
            event.synchronize()
            self._value, self._pending = int(host), None


def train(
    config: DistillConfig,
    outdir: Path,
    device: torch.device,
    *,
    desc: str | None = None,
    subdir: bool = True,
    resume: str = "auto",
    override: bool = False,
    intervals: Intervals,
    batch_gpu: int | str | None = None,
    gradient_checkpointing: bool = False,
    deterministic: bool = False,
    log: str | None = None,
) -> Path:
    """Run or continue a distillation; every rank calls it. Returns the run directory.

    `batch_gpu` (`auto` tries out what fits) and `gradient_checkpointing` save memory and change nothing else.
    `deterministic` makes two runs on one kind of GPU equal, as they are on the CPU in any case; see
    docs/reliability.md. For `resume` and `override` see `runs.open_run`, for `log` `training.loggers`.
    """
    if deterministic:
        use_deterministic_algorithms()
    distributed.init(device)
    automatic = batch_gpu == "auto"
    micro = micro_batch(config.batch, batch_gpu if isinstance(batch_gpu, int) else None, distributed.world_size())
    full_config, teacher, student = load_models(config, device)
    if gradient_checkpointing:
        student.net.checkpoint_gradients()
    prompts = captions_by_seed() if student.has_text else None
    lpips = perceptual_loss(full_config, student)
    launch = {"processes": distributed.world_size(), "batch_gpu": batch_gpu, "device": str(device)}
    launch |= {"gradient_checkpointing": gradient_checkpointing, "deterministic": deterministic}
    launch |= {"torch": torch.__version__, **vars(intervals), "log": log}
    opened: runs.OpenedRun | None = None

    def open_run() -> Path:
        nonlocal opened
        opened = runs.open_run(outdir, config, desc, subdir, resume, override)
        runs.write_options(opened.path, config, launch)
        return opened.path

    run_dir = distributed.on_first_rank(open_run)
    distiller = Distiller(teacher, student, full_config, micro, lpips)
    if automatic:
        distiller.micro = largest_micro_batch(distiller, micro)
    run = Run(run_dir, distiller, intervals, prompts)
    run.resume()
    if opened is not None and opened.changed:
        run.log(f"Warning: other settings than before: {'; '.join(opened.changed)}")
    with run.logged(log, {**config.to_json(), **launch}):
        run.train()
    run.log(f"Student: {run_dir / runs.snapshot_name(run.images)}")
    run.log(f"Picture: {run_dir / runs.picture_name(run.images)}")
    if opened is not None:
        opened.held.close()
    distributed.shutdown()
    return run_dir
