"""Plots of runs: `python -m training.plot RUN…`. They need matplotlib, which nothing else does.

Without a flag, the losses in `stats.jsonl`: one panel for every (num_steps, step), runs overlaid. `--trajectory` shows
what they are the losses of: states of teacher and student from the same noise, projected on the plane in which the
teacher's trajectories are widest (their first two principal components, as in the paper's figures; trajectories of the
probability-flow ODE lie almost in a plane), beside the L1 distance between both at every student timestamp.
`--fd` shows distances that `fid.py` recorded, against NFE or kimg.
"""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from dnnlib import UserError, one_line_errors
from dnnlib.options import Command, Whole, device_option, offline_option, section
from models.loading import load_student
from models.paths import find_student
from models.prompts import prompts_for
from models.sampling import draw_latents, student_sampler
from solvers import Callback
from torch_utils.device import configure_backends, pick_device

from .distill import Teacher, load_source
from .evaluation.figures import draw_by_kimg, draw_comparison, need_matplotlib, panels, save_figure
from .evaluation.records import read_records
from .options import num_steps_option, parse_figure, teacher_option
from .runs import STATS, find_run, read_config, recorded_settings

LOSS = re.compile(r"loss/(\d+)/(\d+)")
#: Where the name of a sampler or a folder of images tells the snapshot, in kimg.
SNAPSHOT_IN = re.compile(r"network-snapshot-(\d+)")
METRICS = "metrics.jsonl"


def labels_of(places: Sequence[Path]) -> list[str]:
    """Names of runs, or their paths where names would be the same."""
    names = [place.name for place in places]
    return names if len(set(names)) == len(names) else [str(place) for place in places]


# ------------------------------------------------------------------------------------------------------------------
# Losses


def read_losses(run_dir: Path) -> dict[tuple[int, int], tuple[list[float], list[float]]]:
    """kimg and loss for every (num_steps, step) of a run's `stats.jsonl`.

    What was not finite is left out, and so is an analytical first step, which trains nothing.
    """
    is_analytical = bool((recorded_settings(run_dir) or {}).get("afs"))
    curves: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
    for record in read_records(run_dir / STATS):
        for name, value in record.items():
            match = LOSS.fullmatch(name)
            if match and value is not None and not (is_analytical and match[2] == "0"):
                kimg, losses = curves.setdefault((int(match[1]), int(match[2])), ([], []))
                kimg.append(record["kimg"])
                losses.append(value)
    if not curves:
        raise UserError(f"{run_dir / STATS} holds no losses yet; a run writes them once in a --tick")
    return dict(sorted(curves.items()))


def draw_losses(run_dirs: Sequence[Path], dest: Path) -> None:
    """A row of panels for every num_steps, a panel for every step; a line for every run."""
    curves = dict(zip(labels_of(run_dirs), map(read_losses, run_dirs)))
    keys = sorted({key for found in curves.values() for key in found})
    rows = sorted({num_steps for num_steps, _ in keys})
    steps = sorted({step for _, step in keys})
    figure = panels(len(steps), len(rows))
    grid = figure.subplots(len(rows), len(steps), squeeze=False, sharex=True)
    for row, num_steps in zip(grid, rows):
        for step, axes in zip(steps, row):
            axes.set_title(f"num_steps {num_steps}, step {step}", fontsize=10)
            axes.grid(alpha=0.3)
            for index, (label, found) in enumerate(curves.items()):
                if (num_steps, step) in found:
                    # Dots too, or a run of one status line would be invisible.
                    axes.plot(*found[num_steps, step], ".-", color=f"C{index % 10}", label=label)
            axes.set_visible(bool(axes.lines))
    for axes in grid[-1]:
        axes.set_xlabel("kimg")
    for row in grid:
        row[0].set_ylabel("loss")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", fontsize=7)
    save_figure(figure, dest)


# ------------------------------------------------------------------------------------------------------------------
# Trajectories


@dataclass(frozen=True)
class Trajectories:
    """What teacher and student make of the same noise.

    Attributes:
        teacher: states `[T, N, D]`, flat, at all of the teacher's timestamps.
        student: states `[num_steps, N, D]`.
        stride: every so many of the teacher's timestamps is the student's.
        sigmas: the student's noise levels.
    """

    teacher: Tensor
    student: Tensor
    stride: int
    sigmas: Tensor

    @property
    def deviation(self) -> Tensor:
        """Mean absolute difference at the student's timestamps, `[num_steps, N]`."""
        return (self.student - self.teacher[:: self.stride]).abs().mean(2)

    def plane(self, index: int) -> tuple[Tensor, Tensor]:
        """One trajectory of each, `[T, 2]` and `[num_steps, 2]`, on the teacher's first two principal components.

        Components have a sign that makes the start positive in the first and the widest point in the second.
        """
        states = self.teacher[:, index]
        centre = states.mean(0)
        basis = torch.linalg.svd(states - centre, full_matrices=False).Vh[:2]
        teacher, student = ((s[:, index] - centre) @ basis.T for s in (self.teacher, self.student))
        signs = torch.stack([teacher[0, 0].sign(), teacher[teacher[:, 1].abs().argmax(), 1].sign()])
        return teacher * signs, student * signs


@torch.no_grad()
def trace(
    run_dir: Path, num_steps: int | None, count: int, device: torch.device, teacher_path: str | None = None
) -> Trajectories:
    """Trajectories of a run's teacher and newest student for seeds 0 to `count` − 1, without guidance, as trained."""
    config, student = read_config(run_dir), load_student(find_student(run_dir), device, teacher_path)
    if teacher_path is not None and not config.is_second_stage:
        config = replace(config, model_path=student.sampling.teacher_path)
    sampler = student_sampler(student, num_steps, guidance_rate=1)
    prompts = prompts_for(student)
    teacher = Teacher(load_source(config, device), config, student.sampling)
    x, cond = draw_latents(student, range(count), prompts=prompts)
    dense = visited(lambda callback: teacher.trajectory(x, cond, len(sampler.sigmas), callback)[-1])
    sparse = visited(lambda callback: sampler.run(x, cond, callback))
    return Trajectories(dense, sparse, config.M + 1, sampler.sigmas)


def visited(run: Callable[[Callback], Tensor]) -> Tensor:
    """All states `[T, N, D]`, flat, of a run that calls back where every step starts and gives the last state."""
    states: list[Tensor] = []
    last = run(lambda *, x, **_: states.append(x))
    return torch.stack([*states, last]).flatten(2).cpu()


def draw_trajectories(trajectories: Trajectories, dest: Path) -> None:
    """A panel for every seed, and one of deviations."""
    count = trajectories.teacher.shape[1]
    figure = panels(count + 1)
    *planes, last = figure.subplots(1, count + 1)
    for seed, axes in enumerate(planes):
        teacher, student = trajectories.plane(seed)
        axes.plot(*teacher.T, ".-", color="tab:gray", label="teacher")
        axes.plot(*teacher[:: trajectories.stride].T, "o", color="tab:gray", fillstyle="none")
        axes.plot(*student.T, "s--", color="tab:red", markersize=4, label="student")
        axes.set_title(f"seed {seed}", fontsize=10)
        axes.set_xlabel("first principal component")
        axes.grid(alpha=0.3)
    planes[0].set_ylabel("second principal component")
    planes[0].legend(fontsize=8)
    # All start from the same noise, so the first timestamp shows nothing.
    deviation = trajectories.deviation[1:]
    places = range(1, len(deviation) + 1)
    for values in deviation.T:
        last.plot(places, values, color="tab:red", alpha=0.3, linewidth=1)
    last.plot(places, deviation.mean(1), "o-", color="tab:red")
    last.set_xticks(list(places), [f"{sigma:.3g}" for sigma in trajectories.sigmas[1:].tolist()])
    last.set_xlabel("noise level of the timestamp")
    last.set_title("mean |student − teacher|", fontsize=10)
    last.grid(alpha=0.3)
    save_figure(figure, dest)


# ------------------------------------------------------------------------------------------------------------------
# Fréchet distances


def read_distances(places: Sequence[Path], by: str) -> list[dict[str, Any]]:
    """Recorded results with a number of evaluations, or of a snapshot; the last of those that say the same."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, name in zip(places, labels_of(places)):
        for record in read_records(place / METRICS if place.is_dir() else place):
            if by == "nfe" and "prdc" in record:
                if record["label"] == "student" and len(places) > 1:
                    record["label"] = f"student {name}"
                found[_scale(record), record["label"], record["nfe"]] = record
            elif by == "kimg" and (match := SNAPSHOT_IN.search(str(record.get("images")))):
                series = record["images"][: match.start()].rstrip("-_/") or "student"
                found[_scale(record), series, match[1]] = {**record, "series": series, "kimg": int(match[1])}
    if not found:
        source = "fid.py compare" if by == "nfe" else "fid.py gen or calc, of images named after a snapshot"
        raise UserError(f"no results by {by} in {', '.join(map(str, places))}; {source} writes them")
    scales = {key[0] for key in found}
    if len(scales) > 1:
        shown = "; ".join(" of ".join(map(str, scale[:2])) for scale in sorted(scales, key=str))
        raise UserError(f"the results cannot be compared ({shown}, or other references); plot them apart")
    return sorted(found.values(), key=lambda record: record[by])


def _scale(record: dict[str, Any]) -> tuple[Any, ...]:
    """Results that share this can be compared."""
    return record["metric"], record.get("N"), record.get("reference_sha256")


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@section("What to draw instead of losses")
@click.option("--trajectory", help="States of teacher and student of one run", is_flag=True)
@click.option("--fd", help="Distances that fid.py recorded; RUN may be its metrics.jsonl too",
              type=click.Choice(["nfe", "kimg"]))  # fmt: skip
@section("Trajectories")
@click.option("--num", help="Trajectories to draw: seeds 0 to so many", type=Whole(1, 16), default=3)
@num_steps_option
@teacher_option
@device_option
@offline_option
@section("Where to")
@click.option("--dest", help="Figure to write; default: losses.png, trajectory.png or fd-….png of the first RUN",
              metavar="PNG|PDF|SVG", callback=parse_figure)  # fmt: skip
def main(runs: Sequence[str], trajectory: bool, fd: str | None, dest: Path | None, **opts: Any) -> None:
    """Plot the losses of runs (directories, or numbers under ./exps), trajectories, or distances.

    \b
    Examples:
      python -m training.plot 0 1
      python -m training.plot 0 --trajectory
      python -m training.plot 0 --fd=nfe --dest=fd.png
    """
    need_matplotlib()
    if trajectory and (fd or len(runs) > 1):
        raise UserError("--trajectory is of one run, and no --fd; leave the rest out")
    places = [Path(run) if fd and Path(run).is_file() else find_run(run) for run in runs]
    folder = places[0] if places[0].is_dir() else places[0].parent
    dest = dest or folder / (f"fd-{fd}.png" if fd else "trajectory.png" if trajectory else "losses.png")
    if trajectory:
        configure_backends()
        device = pick_device(opts["device"])
        found = trace(places[0], opts["num_steps"], opts["num"], device, opts["teacher_path"])
        draw_trajectories(found, dest)
        each = ", ".join(f"{value:.4g}" for value in found.deviation.mean(1).tolist())
        click.echo(f"Mean |student − teacher| at each timestamp: {each}")
    elif fd:
        records = read_distances(places, fd)
        draw_comparison(records, dest) if fd == "nfe" else draw_by_kimg(records, dest)
    else:
        draw_losses(places, dest)
    click.echo(f"Plot: {dest}")


if __name__ == "__main__":
    one_line_errors(main)()
