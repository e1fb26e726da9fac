"""A student opened for export, with the record of what it is, and the folder that an export becomes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dnnlib import UserError, make_folder, write_text

from ..loading import load_student
from ..model import Student
from ..paths import find_student
from ..precond import Precond
from ..registry import ROWS
from ..sampling import Sampler, student_sampler
from .fold import fold_step_condition

#: Settings that say where a file was, in the sections `training` (of teachers too) and `sampling`.
PLACES = ("model_path", "guide", "teacher_path", "guide_path", "data", "transfer")


@dataclass(frozen=True)
class OpenedStudent:
    """A student for one number of timestamps.

    Attributes:
        model: as it was loaded.
        net: its network, without step condition.
        sampler: the steps it takes.
        path: its file.
    """

    model: Student
    net: Precond
    sampler: Sampler
    path: Path

    @property
    def steps(self) -> Tensor:
        """Noise levels of the steps that evaluate the network, and the end, float64."""
        return self.sampler.sigmas[int(self.sampler.plan.afs) :]

    @property
    def initial_scale(self) -> float:
        """Standard normal noise times this is the state at `steps[0]`; the analytical first step is part of it."""
        first, second = self.sampler.sigmas[:2].tolist()
        return first + (second - first) * first / (1 + first**2) ** 0.5 if self.sampler.plan.afs else first

    @property
    def licence(self) -> str:
        """Of the weights it was distilled from."""
        row = ROWS.get(self.model.dataset_name)
        return "that of its teacher" if row is None else row.licence

    def record(self) -> dict[str, Any]:
        """What a file says beside the weights; JSON-serialisable."""
        return {
            "exported_from": self.path.name,
            "teacher": self.model.dataset_name,
            "licence_of_weights": self.licence,
            "num_steps": len(self.sampler.sigmas),
            "afs": self.sampler.plan.afs,
            "sigmas": self.steps.tolist(),
            "initial_scale": self.initial_scale,
        }


def open_student(model_path: str, num_steps: int | None = None) -> OpenedStudent:
    """The student of a file, run directory or run number, for `num_steps` timestamps.

    Raises:
        UserError: not a student, or one that does not serve that many.
    """
    path = find_student(model_path)
    model = load_student(path)
    sampler = student_sampler(model, num_steps)
    net = fold_step_condition(model.net, len(sampler.sigmas)) if sampler.step_condition is not None else model.net
    return OpenedStudent(model, net, sampler, path)


def without_folders(settings: dict[str, Any], *sections: str) -> dict[str, Any]:
    """Settings of a network's file for other machines: in these sections, files by their names alone."""
    found = {name: settings[name] for name in sections if isinstance(settings.get(name), dict)}
    return settings | {name: section | _file_names(section) for name, section in found.items()}


def _file_names(section: dict[str, Any]) -> dict[str, str]:
    return {name: Path(section[name]).name for name in PLACES if isinstance(section.get(name), str)}


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """Yield the name of a folder that becomes `dest` once it is complete, and is removed if it fails.

    Raises:
        UserError: `dest` exists, or cannot be written.
    """
    if dest.exists():
        raise UserError(f"{dest} exists; choose a new folder", "dest")
    make_folder(dest.parent, "dest")
    temporary = dest.with_name(f".{os.getpid()}.tmp.{dest.name}")
    try:
        yield temporary
        temporary.rename(dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, making the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
