"""A student opened for export, with the record of what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..loading import load_student
from ..model import Student
from ..paths import find_student
from ..precond import Precond
from ..registry import ROWS
from ..sampling import Sampler, student_sampler
from .fold import fold_step_condition


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
