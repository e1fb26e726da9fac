"""Run directories: `./exps/00000-<settings>`, what is in them, and which one a command continues."""

from __future__ import annotations

import fcntl
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from dnnlib import make_folder, write_text
from torch_utils.checkpoint import read_settings, read_state

from .config import DistillConfig

OPTIONS, STATE, STATS, LOG, LOCK = "training_options.json", "training-state.pt", "stats.jsonl", "log.txt", ".lock"

NUMBERED = "[0-9]" * 5 + "-*"


@dataclass(frozen=True)
class Intervals:
    """How often things happen: status lines every `tick` kimg, students and states every `snap` and `dump` ticks."""

    tick: float = 5
    snap: int = 10
    dump: int = 10


def snapshot_name(images: int) -> str:
    return f"network-snapshot-{images // 1000:06d}.safetensors"


def picture_name(images: int) -> str:
    return f"teacher-and-student-{images // 1000:06d}.png"


def write_options(run_dir: Path, config: DistillConfig, launch: dict[str, Any]) -> None:
    write_text(run_dir / OPTIONS, json.dumps({"config": config.to_json(), "launch": launch}, indent=2) + "\n")


def read_options(run_dir: Path) -> dict[str, Any] | None:
    """The config that a run was started with, None where there is none to read."""
    try:
        return json.loads((run_dir / OPTIONS).read_text(encoding="utf-8"))["config"]
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
    return last.exists() and read_settings(last)["training"]["images"] >= config.total_images


def numbered(outdir: Path) -> list[Path]:
    """Run directories under `outdir`, newest number first."""
    return sorted((p for p in outdir.glob(NUMBERED) if p.is_dir()), reverse=True)


def open_run(outdir: Path, config: DistillConfig, desc: str | None, subdir: bool, resume: str) -> tuple[Path, TextIO]:
    """The directory of this run, held by a lock: an unfinished one of the same settings, or a new one.

    Args:
        outdir: where run directories go; itself the run directory with `subdir=False`.
        resume: `auto` continues the newest unfinished run of the same settings, `never` starts a new one, a path
            continues that run, or the run that holds that training state.
    """
    if resume not in ("auto", "never"):
        run_dir = Path(resume) if Path(resume).is_dir() else Path(resume).parent
        _check_resumable(run_dir, config)
        return run_dir, _require_lock(run_dir)
    make_folder(outdir, "--outdir")
    if not subdir:
        if read_options(outdir) is not None:
            if resume == "never":
                raise click.ClickException(f"{outdir} already holds a run; use --resume=auto, or another --outdir")
            _check_resumable(outdir, config)
        return outdir, _require_lock(outdir)
    if resume == "auto":
        for run_dir in numbered(outdir):
            if (
                read_options(run_dir) == config.to_json()
                and not is_finished(run_dir, config)
                and (held := lock(run_dir))
            ):
                return run_dir, held
    with open(outdir / LOCK, "w", encoding="utf-8") as numbering:
        fcntl.flock(numbering, fcntl.LOCK_EX)  # launches at the same time take different numbers
        taken = [int(p.name[:5]) for p in outdir.glob(NUMBERED)]
        run_dir = outdir / f"{max(taken, default=-1) + 1:05d}-{config.run_name(desc)}"
        run_dir.mkdir()
        return run_dir, _require_lock(run_dir)


def _require_lock(run_dir: Path) -> TextIO:
    held = lock(run_dir)
    if held is None:
        raise click.ClickException(
            f"{run_dir} is being trained by another process; wait for it, or use another --outdir"
        )
    return held


def _check_resumable(run_dir: Path, config: DistillConfig) -> None:
    saved = read_options(run_dir)
    if saved is None:
        raise click.ClickException(f"--resume: {run_dir} holds no {OPTIONS}; expected a run directory or its {STATE}")
    changed = [f"{k} {saved.get(k)!r} there, {v!r} here" for k, v in config.to_json().items() if saved.get(k) != v]
    if changed:
        raise click.ClickException(
            f"--resume: {run_dir} has other settings ({'; '.join(changed)}); repeat them, or start a new run"
        )


def load_state(run_dir: Path) -> dict[str, Any] | None:
    """The training state of a run, None if it has not saved one yet."""
    path = run_dir / STATE
    return read_state(path) if path.exists() else None


def cut_stats(run_dir: Path, images: int) -> None:
    """Drop statistics from after the state that a run continues from."""
    path = run_dir / STATS
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _images_of(line) <= images]
        write_text(path, "".join(line + "\n" for line in lines))


def _images_of(line: str) -> float:
    found = re.search(r'"images": (\d+)', line)
    return int(found[1]) if found else float("inf")
