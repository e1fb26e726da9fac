"""Run directories: `./exps/00000-<settings>`, what is in them, and which one a command continues."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from dnnlib import UserError, make_folder, write_text
from dnnlib.files import remove_leftovers
from models.loading import RUNS_DIR
from torch_utils.checkpoint import read_settings

from .config import DistillConfig

OPTIONS, STATS, LOG, LOCK = "training_options.json", "stats.jsonl", "log.txt", ".lock"
NUMBERED = "[0-9]" * 5 + "-*"


@dataclass(frozen=True)
class Intervals:
    """How often things happen: status lines every `tick` kimg, students and states every `snap` and `dump` ticks.

    Of the states, the newest `keep` stay.
    """

    tick: float = 5
    snap: int = 10
    dump: int = 10
    keep: int = 2


def snapshot_name(images: int) -> str:
    return f"network-snapshot-{images // 1000:06d}.safetensors"


def picture_name(images: int) -> str:
    return f"teacher-and-student-{images // 1000:06d}.png"


def write_options(run_dir: Path, config: DistillConfig, launch: dict[str, Any]) -> None:
    write_text(run_dir / OPTIONS, json.dumps({"config": config.to_json(), "launch": launch}, indent=2) + "\n")


def read_options(run_dir: Path) -> dict[str, Any] | None:
    """The config that a run was started with, None where there is none to read.

    A setting that did not exist then has its default, which is always what was done before.
    """
    try:
        saved = json.loads((run_dir / OPTIONS).read_text(encoding="utf-8"))["config"]
        return {f.name: f.default for f in fields(DistillConfig) if f.default is not MISSING} | saved
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lock(run_dir: Path) -> TextIO | None:
    """Hold the run until the process ends; None if another process holds it."""
    file = open(run_dir / LOCK, "w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_finished(run_dir: Path, config: DistillConfig) -> bool:
    last = run_dir / snapshot_name(config.total_images)
    try:
        return last.exists() and read_settings(last)["training"]["images"] >= config.total_images
    except (UserError, KeyError, TypeError):
        return False  # damaged: continuing the run writes it again


def numbered(outdir: Path) -> list[Path]:
    """Run directories under `outdir`, newest number first."""
    return sorted((p for p in outdir.glob(NUMBERED) if p.is_dir()), reverse=True)


@dataclass(frozen=True)
class OpenedRun:
    """A run directory that this process holds; sent to another rank, it is the same without the lock.

    Attributes:
        held: keeps other processes out while it is open.
        changed: settings that differ from those it was started with, in words.
    """

    path: Path
    held: TextIO | None
    changed: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}

    def close(self) -> None:
        if self.held is not None:
            self.held.close()


def open_run(
    outdir: Path,
    config: DistillConfig,
    launch: dict[str, Any],
    desc: str | None = None,
    subdir: bool = True,
    resume: str = "auto",
    override: bool = False,
) -> OpenedRun:
    """The directory of this run, held by a lock: an unfinished one of the same settings, or a new one.

    Args:
        launch: what is recorded beside the settings.
        outdir: where run directories go; itself the run directory with `subdir=False`.
        resume: `auto` continues the newest unfinished run of the same settings, `never` starts a new one, a path
            continues that run, or the run that holds that training state.
        override: let a run that was chosen by its path go on with other settings.
    """
    opened = _open_run(outdir, config, desc, subdir, resume, override)
    remove_leftovers(opened.path)
    write_options(opened.path, config, launch)
    return opened


def _open_run(
    outdir: Path, config: DistillConfig, desc: str | None, subdir: bool, resume: str, override: bool
) -> OpenedRun:
    if resume == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = "auto"  # torchrun repeats a command whose first attempt has made the run
    if resume not in ("auto", "never"):
        run_dir = Path(resume) if Path(resume).is_dir() else Path(resume).parent
        saved = read_options(run_dir)
        if saved is None:
            raise UserError(
                f"--resume={resume}: {run_dir} holds no {OPTIONS}; expected a run directory or its training state"
            )
        changed = _changes(run_dir, saved, config, override)
        return OpenedRun(run_dir, _require_lock(run_dir), changed)
    make_folder(outdir, "outdir")
    if not subdir:
        changed, saved = (), read_options(outdir)
        if saved is not None:
            if resume == "never":
                raise UserError(f"{outdir} already holds a run; use --resume=auto, or another --outdir")
            changed = _changes(outdir, saved, config, override)
        return OpenedRun(outdir, _require_lock(outdir), changed)
    if resume == "auto":
        for run_dir in numbered(outdir):
            if (
                read_options(run_dir) == config.to_json()
                and not is_finished(run_dir, config)
                and (held := lock(run_dir))
            ):
                return OpenedRun(run_dir, held)
    with open(outdir / LOCK, "w", encoding="utf-8") as numbering:
        fcntl.flock(numbering, fcntl.LOCK_EX)  # launches at the same time take different numbers
        taken = [int(p.name[:5]) for p in outdir.glob(NUMBERED)]
        run_dir = outdir / f"{max(taken, default=-1) + 1:05d}-{config.run_name(desc)}"
        run_dir.mkdir()
        return OpenedRun(run_dir, _require_lock(run_dir))


def _require_lock(run_dir: Path) -> TextIO:
    held = lock(run_dir)
    if held is None:
        raise UserError(f"{run_dir} is being trained by another process; wait for it, or use another --outdir")
    return held


def _changes(run_dir: Path, saved: dict[str, Any], config: DistillConfig, override: bool) -> tuple[str, ...]:
    """What differs from the `saved` settings of the run; an error unless `override` allows it."""
    changed = [f"{k} {saved.get(k)!r} there, {v!r} here" for k, v in config.to_json().items() if saved.get(k) != v]
    if changed and not override:
        raise UserError(
            f"--resume: {run_dir} has other settings ({'; '.join(changed)}); repeat them, start a new run, or go on "
            "with these by --resume-override"
        )
    return tuple(changed)


def cut_stats(run_dir: Path, images: int) -> None:
    """Drop statistics from after the state that a run continues from."""
    path = run_dir / STATS
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _images_of(line) <= images]
        write_text(path, "".join(line + "\n" for line in lines))


def _images_of(line: str) -> float:
    found = re.search(r'"images": (\d+)', line)
    return int(found[1]) if found else float("inf")


def find_run(run: str, runs_dir: Path = RUNS_DIR) -> Path:
    """The directory of a run: a path, or the number of a run under `./exps`."""
    found = sorted(runs_dir.glob(f"{int(run):05d}-*")) if run.isdigit() and not Path(run).exists() else [Path(run)]
    if not found or not found[0].is_dir():
        raise UserError(f"{run} is no run: expected a run directory, or a number under ./{runs_dir}")
    return found[0]
