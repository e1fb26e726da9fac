"""What a run says of itself: status lines, `stats.jsonl`, a picture, and a logger for both; rank 0 alone writes."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dnnlib import Logger, format_count, format_duration
from dnnlib.progress import progress
from models.prompts import Prompts
from models.sampling import draw_latents, student_sampler
from torch_utils import distributed
from torch_utils.images import draw_grid, save_picture, to_uint8

from .config import span
from .distill import Distiller
from .loggers import RunLogger
from .runs import LOG, STATS, picture_name
from .state import TrainingState

PICTURE_SEEDS = range(10)


class Report:
    """The report of a run in its directory; on other ranks than the first nothing happens.

    Args:
        prompts: captions of the picture, for a text-conditioned model.
    """

    def __init__(self, run_dir: Path, state: TrainingState, prompts: Prompts | None = None) -> None:
        self.run_dir, self.state, self.distiller = run_dir, state, state.distiller
        self.is_first = distributed.rank() == 0
        self._log = Logger(run_dir / LOG) if self.is_first else None
        self._logger: RunLogger | None = None
        self._pictures = Pictures(state.distiller, prompts)
        self._reported = 0

    def log(self, line: str) -> None:
        """A line for people, on the terminal and in the run's log."""
        if self._log is not None:
            self._log(line)

    def describe(self) -> None:
        """The first line of a run: what is trained, and where."""
        distiller, config = self.distiller, self.distiller.config
        size = format_count(sum(p.numel() for p in distiller.trained))
        nfes = [config.student_plan(n).nfe for n in config.step_choices]
        self.log(
            f"{self.run_dir}: {config.dataset_name}, {size} trained parameters, NFE {span(nfes)}, {config.precision} "
            f"on {distributed.world_size()}× {distiller.device.type}, micro-batch {distiller.micro_batch_size} of "
            f"{config.batch}"
        )
        if (remark := distiller.student.net.remark) is not None:
            self.log(f"Note: {remark}")

    @contextmanager
    def logged(self, name: str | None, settings: Mapping[str, Any]) -> Iterator[None]:
        """Within, rank 0 writes to the logger of this name too; None: to plain files alone."""
        if name is not None:
            distributed.on_first_rank(partial(self._start_logger, name, settings))
        failed = True
        try:
            yield
            failed = False
        finally:
            if self._logger is not None:
                self._logger.close(failed)

    def _start_logger(self, name: str, settings: Mapping[str, Any]) -> None:
        self._logger = RunLogger(name, self.run_dir, settings, self.state.images, self.log)

    def bar(self) -> Any:
        """A progress bar in images, from where the run is, for a terminal; elsewhere the status lines serve."""
        self._reported = self.state.images
        return progress(self.distiller.config.total_images, "img", self.state.images, show=self.is_first, lines=False)

    def tick(self, tick: int, losses: dict[tuple[int, int], float], duration: float, maintenance: float) -> None:
        """A status line, and a line of `stats.jsonl`.

        Args:
            losses: what `Losses.flush` gives.
            duration: seconds that the iterations since the last call took.
            maintenance: seconds that saving took between that call and these iterations.
        """
        images, config = self.state.images, self.distiller.config
        rate, self._reported = duration / max(images - self._reported, 1), images
        if not self.is_first:
            return
        final = [loss for (num_steps, step), loss in losses.items() if step == num_steps - 2]
        named = {f"loss/{num_steps}/{step}": loss for (num_steps, step), loss in losses.items()}
        stats: dict[str, Any] = {
            "images": images, "kimg": images / 1000, "seconds": round(self.state.seconds, 3),
            "loss": float(np.mean(final)), **named, "sec_per_tick": duration, "sec_per_kimg": rate * 1000,
            "maintenance": maintenance, "lr": config.learning_rate(images - config.batch),
            "skipped": int(self.distiller.skipped), **memory(self.distiller.device), "timestamp": time.time(),
        }  # fmt: skip
        self.log(status_line(tick, stats, rate * (config.total_images - images)))
        finite = {k: v if math.isfinite(v) else None for k, v in stats.items()}  # JSON has no NaN
        with open(self.run_dir / STATS, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        if self._logger is not None:
            self._logger.scalars(finite, images)

    def picture(self) -> None:
        """Endpoints of teacher and student for the same seeds, as a file of the run."""
        if not self.is_first:
            return
        drawn = self._pictures.draw()
        save_picture(drawn, self.run_dir / picture_name(self.state.images))
        if self._logger is not None:
            self._logger.picture(drawn, self.state.images)


def status_line(tick: int, stats: Mapping[str, Any], left: float) -> str:
    """At most 100 columns; `left`: seconds to the end, of training alone."""
    fields = {
        "tick": f"{tick:<4d}", "kimg": f"{stats['kimg']:<6.6g}", "time": f"{format_duration(stats['seconds']):<10s}",
        "eta": f"{format_duration(left):<10s}", "sec/kimg": f"{stats['sec_per_kimg']:<6.4g}",
        "loss": f"{stats['loss']:<6.4g}", "mem": f"{stats.get('gpumem', stats['cpumem']):<4.3g}",
    }  # fmt: skip
    if stats["skipped"]:  # in place of the memory, of which `stats.jsonl` has more
        fields["skipped"] = f"{stats['skipped']}"
        del fields["mem"]
    return " ".join(f"{name} {value}" for name, value in fields.items()).rstrip()


def memory(device: torch.device) -> dict[str, float]:
    """Most memory in GiB: of the process since its start and, on CUDA, of the device since the last call."""
    found = {"cpumem": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if sys.platform == "darwin":
        found["cpumem"] /= 1024  # bytes there, KiB elsewhere
    if device.type == "cuda":
        found["gpumem"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return found


class Pictures:
    """Rows of images for the same seeds: the teacher's endpoints, then the student's at every NFE of the run."""

    def __init__(self, distiller: Distiller, prompts: Prompts | None) -> None:
        self.distiller, self.prompts = distiller, prompts
        self._teacher_row: np.ndarray | None = None

    def draw(self) -> Image.Image:
        student, config = self.distiller.student, self.distiller.config
        student.eval()
        x, cond = draw_latents(student, PICTURE_SEEDS, prompts=self.prompts)
        if self._teacher_row is None:
            final = self.distiller.teacher.trajectory(x, cond, max(config.step_choices))[-1]
            self._teacher_row = to_uint8(student.decode(final))
        rows, names = [self._teacher_row], ["teacher"]
        for num_steps in config.step_choices:
            sampler = student_sampler(student, num_steps, guidance_rate=1)  # as it is trained
            rows.append(to_uint8(student.decode(sampler.run(x, cond))))
            names.append(f"student, NFE {sampler.nfe}")
        return draw_grid(rows, names, scale=max(1, 64 // self._teacher_row.shape[1]))
