"""Run directories: `./exps/00000-<settings>`, what is in them, and which one a command continues."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dnnlib import UserError, first_line, make_folder, parse_json, write_text
from dnnlib.errors import environment_number
from dnnlib.files import remove_leftovers
from dnnlib.locks import hold
from models.paths import RUNS_DIR
from models.paths import find_run as path_of_run
from models.paths import snapshots as students_in
from torch_utils.checkpoint import read_settings, read_state, usable_state

from .config import DistillConfig, check, differences, refuse_changes, with_defaults
from .state import states

OPTIONS, STATS, LOG, LOCK = "training_options.json", "stats.jsonl", "log.txt", ".lock"
NUMBERED = "[0-9]" * 5 + "-*"


@dataclass(frozen=True)
class Intervals:
    """How often things happen: status lines every `tick` kimg, students and states every `snap` and `dump` ticks.

    Of the states, the newest `keep` stay, of the students the newest `keep_snapshots`, None for all.
    """

    tick: float = 5
    snap: int = 10
    dump: int = 10
    keep: int = 2
    keep_snapshots: int | None = None


def snapshot_name(images: int) -> str:
    return f"network-snapshot-{images // 1000:06d}.safetensors"


def snapshots(run_dir: Path) -> dict[int, Path]:
    """The students of a run by kimg, ascending.

    Raises:
        UserError: there is none.
    """
    found = {kimg: path for kimg, path in students_in(run_dir).items() if path.suffix == ".safetensors"}
    if not found:
        raise UserError(f"{run_dir} holds no network-snapshot-….safetensors; a run writes one every --snap ticks")
    return found


def prune_snapshots(run_dir: Path, keep: int | None) -> None:
    """Remove all students of a run but the newest `keep`, of which there is one; None keeps all of them."""
    for path in list(snapshots(run_dir).values())[: 0 if keep is None else -keep]:
        path.unlink(missing_ok=True)


def picture_name(images: int) -> str:
    return f"teacher-and-student-{images // 1000:06d}.png"


def write_options(run_dir: Path, config: DistillConfig, launch: dict[str, Any]) -> None:
    write_text(run_dir / OPTIONS, json.dumps({"config": config.to_json(), "launch": launch}, indent=2) + "\n")


def read_options(run_dir: Path) -> dict[str, Any] | None:
    """The settings that a run was started with, None where there are none.

    A setting that did not exist then has its default, which is always what was done before.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / OPTIONS
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise TypeError("it is no regular file")
        return with_defaults(parse_json(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); put it back, or remove it") from None


def recorded_settings(run_dir: Path) -> dict[str, Any] | None:
    """The settings of a run as its options or, where these are missing or damaged, its states record them.

    Raises:
        UserError: it has begun, and neither tells.
    """
    damage: UserError | None = None
    try:
        if (saved := read_options(run_dir)) is not None:
            return saved
    except UserError as error:
        damage = error
    found = states(run_dir)
    for path in found:
        with contextlib.suppress(UserError), usable_state(path):
            return with_defaults(read_state(path)["config"])
    if damage is not None:
        raise damage
    if found or any(run_dir.glob("network-snapshot-*")):
        raise UserError(f"{run_dir} holds a run without {OPTIONS}; put that file back, or use another folder")
    return None


def read_config(run_dir: Path) -> DistillConfig:
    """The settings of a run that has begun; a UserError if they are not to be had, or unusable."""
    saved = recorded_settings(run_dir)
    if saved is None:
        raise UserError(f"{run_dir} holds no {OPTIONS}; expected the directory of a run")
    try:
        config = DistillConfig(**saved)
        check(config)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{run_dir} has unusable settings ({first_line(error)}); put {OPTIONS} back") from None
    return config


def lock(run_dir: Path, otherwise: str) -> TextIO:
    """Hold the run until the process ends, or the file is closed; `otherwise` is the error if another process does."""
    try:
        return hold(run_dir / LOCK, wait=False)
    except BlockingIOError:
        raise UserError(otherwise) from None


def is_finished(run_dir: Path, config: DistillConfig) -> bool:
    last = run_dir / snapshot_name(config.total_images)
    try:
        return last.is_file() and read_settings(last)["training"]["images"] == config.total_images
    except (UserError, KeyError, TypeError):
        return False  # damaged: continuing the run writes it again


@dataclass(frozen=True)
class OpenedRun:
    """A run directory that this process holds; sent to another rank, it is the same without the lock.

    Attributes:
        held: keeps other processes out while it is open.
        changed: settings that differ from those it was started with, in words.
        is_finished: whether there is nothing left to do.
    """

    path: Path
    held: TextIO | None
    changed: tuple[str, ...] = ()
    is_finished: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}

    def close(self) -> None:
        if self.held is not None:
            self.held.close()


@dataclass(frozen=True)
class Place:
    """Where a run goes, as the command line says.

    Attributes:
        outdir: where run directories are; itself the run directory without `subdir`.
        desc: added to the name of a new one.
        resume: `auto` continues the newest unfinished run of the same settings, `never` starts a new one, a path
            continues that run, or the run that holds that training state.
        override: let a run that was chosen by its path go on with other settings.
    """

    outdir: Path
    desc: str | None = None
    subdir: bool = True
    resume: str = "auto"
    override: bool = False

    @property
    def is_named(self) -> bool:
        """Whether `resume` is the path of a run."""
        return self.resume not in ("auto", "never")

    @property
    def chosen(self) -> Path | None:
        """The run directory, where it is given by its path."""
        if self.is_named:
            return Path(self.resume) if Path(self.resume).is_dir() else Path(self.resume).parent
        return None if self.subdir else self.outdir

    @property
    def starts_anew(self) -> bool:
        """torchrun repeats a command whose first attempt has made the run, which then goes on."""
        return self.resume == "never" and not environment_number("TORCHELASTIC_RESTART_COUNT", 0)


def locate_run(place: Place, config: DistillConfig) -> tuple[Path | None, bool]:
    """The run directory that a command continues, None for a new one; and whether nothing is left to do there."""
    if place.chosen is not None:
        return place.chosen, is_finished(place.chosen, config) and _has_settings(place.chosen, config)
    finished = None
    newest_first = sorted((p for p in place.outdir.glob(NUMBERED) if p.is_dir()), reverse=True)
    for run_dir in [] if place.starts_anew else newest_first:
        with contextlib.suppress(UserError):  # a run that cannot be told apart is not this one's business
            if _has_settings(run_dir, config):
                if not is_finished(run_dir, config):
                    return run_dir, False
                finished = finished or run_dir
    return finished, finished is not None


def _has_settings(run_dir: Path, config: DistillConfig) -> bool:
    saved = recorded_settings(run_dir)
    return saved is not None and not differences(saved, config)


def finished_run(place: Place, config: DistillConfig) -> Path | None:
    """The run that this command repeats, if it is over and has these settings; nothing is loaded to find out."""
    run_dir, finished = locate_run(place, config)
    return run_dir if finished and not place.starts_anew else None


def next_run(place: Place, config: DistillConfig) -> Path:
    """The directory that a new run would get."""
    taken = [int(path.name[:5]) for path in place.outdir.glob(NUMBERED)]
    return place.outdir / f"{max(taken, default=-1) + 1:05d}-{config.run_name(place.desc)}"


def open_run(place: Place, config: DistillConfig, launch: dict[str, Any]) -> OpenedRun:
    """The directory of this run, held by a lock, with its settings and `launch` in `training_options.json`.

    Raises:
        UserError: the run has other settings, or another process holds it.
    """
    if place.chosen is not None:
        changed = _check_chosen(place, place.chosen, config)
        if not changed and is_finished(place.chosen, config):
            return OpenedRun(place.chosen, None, is_finished=True)
        return _take(place.chosen, config, launch, changed)
    make_folder(place.outdir, "outdir")
    with hold(place.outdir / LOCK):  # launches at the same time take different numbers, or find each other's run
        run_dir, finished = locate_run(place, config)
        if finished and run_dir is not None:
            return OpenedRun(run_dir, None, is_finished=True)
        if run_dir is None:
            run_dir = next_run(place, config)
            run_dir.mkdir()
        return _take(run_dir, config, launch)


def plan_run(place: Place, config: DistillConfig) -> str:
    """Where a run of this command would go, for people."""
    run_dir, finished = locate_run(place, config)
    if run_dir is None:
        return f"{next_run(place, config)}, a new run"
    known = run_dir.is_dir() and recorded_settings(run_dir) is not None
    return f"{run_dir}, {'already finished' if finished else 'continued' if known else 'a new run'}"


def _check_chosen(place: Place, run_dir: Path, config: DistillConfig) -> tuple[str, ...]:
    """Refuse a chosen directory that cannot be gone on with; the settings that its run has otherwise, in words."""
    if not place.is_named:
        make_folder(run_dir, "outdir")
    saved = recorded_settings(run_dir) if run_dir.is_dir() else None
    if saved is None and place.is_named:
        raise UserError(
            f"--resume={place.resume}: {run_dir} holds no {OPTIONS}; expected a run directory or its training state"
        )
    if saved is not None and place.starts_anew:
        raise UserError(f"{run_dir} already holds a run; use --resume=auto, or another --outdir")
    changed = () if saved is None else differences(saved, config)
    refuse_changes(run_dir, changed, place.override)
    return changed


def _take(run_dir: Path, config: DistillConfig, launch: dict[str, Any], changed: tuple[str, ...] = ()) -> OpenedRun:
    """Hold a run that is to go on, or to begin."""
    held = lock(
        run_dir,
        f"{run_dir}, a run of these settings, is being trained by another process; wait for it, or start another one "
        "with --resume=never",
    )
    write_options(run_dir, config, launch)
    remove_leftovers(run_dir)
    return OpenedRun(run_dir, held, changed)


def cut_stats(run_dir: Path, images: int) -> None:
    """Drop statistics from after the state that a run continues from, and lines that a kill has broken."""
    path = run_dir / STATS
    if path.exists():
        lines = path.read_bytes().decode(errors="replace").splitlines()
        write_text(path, "".join(line + "\n" for line in lines if 0 <= _images_of(line) <= images))


def _images_of(line: str) -> float:
    """How far the run was at a line of statistics, −1 for what is none."""
    try:
        images = parse_json(line)["images"]
    except (ValueError, TypeError, KeyError):
        return -1
    return images if type(images) is int else -1


def find_run(run: str) -> Path:
    """The directory of a run: a path, or the number of a run under `./exps`."""
    found = path_of_run(run)
    if not found.is_dir():
        raise UserError(f"{run} is no run: expected a run directory, or a number under ./{RUNS_DIR}")
    return found
