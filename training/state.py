"""The training state of a run: all that the rest of it depends on, in files of which the newest few stay."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import distributed
from torch_utils.checkpoint import read_state, save_state, usable_state

from .config import OtherSettings, differences, refuse_changes, with_defaults
from .distill import Distiller
from .health import Health

STATE = "training-state.pt"
OLDER_STATE = r"training-state\.(\d{1,9})\.pt"
#: What health counts.
COUNTS = ("skipped", "seen_skips", "bad_losses", "seen_bad_losses")
#: What Adam and Muon keep for a weight.
MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum"})


class TrainingState:
    """How far a run is, with the weights and moments of its distiller and what its health has seen.

    Attributes:
        images: trajectories trained on.
        seconds: that this took, over all starts.
    """

    def __init__(self, distiller: Distiller, health: Health) -> None:
        self.distiller, self.health = distiller, health
        self.images, self.seconds = 0, 0.0

    def save(self, run_dir: Path, keep: int) -> None:
        """Write everything as one file, on rank 0; of the states of the run, the newest `keep` stay."""
        health = self.health.state_dict()  # waits for the device on all ranks alike
        if distributed.rank() == 0:
            state = {
                "student": self.distiller.student.net.state_dict(),
                "optimizer": self.distiller.optimizer.state_dict(),
                "config": self.distiller.config.to_json(),
                "images": self.images,
                "seconds": self.seconds,
                **health,
            }
            save_newest_state(run_dir, state, keep)

    def restore(self, run_dir: Path, log: Callable[[str], None], override: bool = False) -> bool:
        """Continue from the newest usable state of a run, on all ranks; whether there is any state.

        Damaged newer ones are set aside, and the log says so.

        Raises:
            UserError: there are states, but none is usable, or one of other settings and no `override`; nothing is
                touched then.
        """
        path = distributed.on_first_rank(lambda: self._restore_newest(run_dir, log, override))
        if path is not None and distributed.rank() > 0:
            self._restore(path, override, is_whole=True)
        return path is not None

    def _restore_newest(self, run_dir: Path, log: Callable[[str], None], override: bool) -> Path | None:
        damaged: list[tuple[Path, UserError]] = []
        for path in states(run_dir):
            try:
                self._restore(path, override)
            except OtherSettings:
                raise
            except UserError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                log(f"Warning: {reason.message.split(';')[0]}; it is now {set_aside(bad)}, going back to {path}")
            return path
        if damaged:
            raise damaged[0][1]
        return None

    def _restore(self, path: Path, override: bool, is_whole: bool = False) -> None:
        state = read_state(path, is_whole)
        config = self.distiller.config
        with usable_state(path):
            # States of earlier versions do not record them.
            changed = differences(with_defaults(state["config"]), config) if "config" in state else ()
            refuse_changes(path, changed, override)
            state = {**dict.fromkeys(COUNTS[1:], 0), "seen_skips": state["skipped"], **state}  # of older versions
            _check(state, self.distiller)
            self.distiller.student.net.load_state_dict(state["student"])
            _load_optimizer(self.distiller.optimizer, state["optimizer"])
            self.health.load_state_dict(state)
            self.images, self.seconds = state["images"], float(state["seconds"])


def _check(state: dict[str, Any], distiller: Distiller) -> None:
    """Refuse contents that no run has written, with a ValueError: a later iteration would fail on them."""
    highest: float = distiller.config.total_images
    for name in ("images", *COUNTS):
        value = state[name]
        if type(value) is not int or not 0 <= value <= highest:
            raise ValueError(f"{name} is {str(value)[:30]}, expected 0 to {highest:g}")
        highest = math.inf  # of steps, which a restart can repeat
    if type(state["half_off"]) is not bool:
        raise ValueError("half_off is neither true nor false")
    seconds = state["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e12:
        raise ValueError(f"seconds is {str(seconds)[:30]}")
    for name, value in state["student"].items():
        if not isinstance(value, torch.Tensor) or not value.isfinite().all():
            raise ValueError(f"{str(name)[:60]} of the student is not finite")


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Moments from `saved`, which must fit the parameters; settings stay those of this command."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, moments in saved["state"].items():
        if set(moments) not in MOMENTS:
            raise ValueError(f"the optimizer has {str(sorted(moments))[:60]} for a weight")
        for name, value in moments.items():
            shape = torch.Size() if name == "step" else params[index].shape
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.isfinite().all():
                raise ValueError(f"{name} of the optimizer does not fit its weight, or is not finite")
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)


def states(run_dir: Path) -> list[Path]:
    """The training states of a run, the newest first: `training-state.pt`, `training-state.1.pt`, and so on."""
    older = [(int(found[1]), path) for path in run_dir.iterdir() if (found := re.fullmatch(OLDER_STATE, path.name))]
    newest = [run_dir / STATE] if (run_dir / STATE).exists() else []
    return newest + [path for _, path in sorted(older)]


def save_newest_state(run_dir: Path, state: dict[str, Any], keep: int) -> None:
    """Add a training state to those of a run, of which the newest `keep` stay.

    Nothing is removed before the new one is complete; a process that is killed on the way leaves all of them.
    """
    newest = run_dir / STATE

    def make_room() -> None:
        older = [path for path in states(run_dir) if path != newest]
        for number, path in reversed(list(enumerate(older, start=2))):
            os.replace(path, run_dir / f"training-state.{number}.pt")
        if newest.exists():
            try:
                os.link(newest, run_dir / "training-state.1.pt")  # so that there is a newest one at any time
            except OSError:  # a file system without links
                os.replace(newest, run_dir / "training-state.1.pt")

    save_state(newest, state, make_room if keep > 1 else None)
    for path in states(run_dir)[keep:]:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Take a damaged training state out of the row, without destroying it."""
    aside = path.with_name(f"damaged-{path.name}")
    os.replace(path, aside)
    return aside
