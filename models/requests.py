"""What Python code may ask of a student, checked: the arguments of `Student.sample`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np
from torch import Tensor

from dnnlib import UserError
from torch_utils.device import PRECISIONS, pick_precision

from .model import Student
from .prompts import Prompts, captions_by_seed
from .sampling import student_sampler


def student_states(
    student: Student,
    seeds: Sequence[int],
    class_labels: int | Sequence[int] | Tensor | None = None,
    prompts: str | Sequence[str] | None = None,
    num_steps: int | None = None,
    batch: int = 64,
    guidance_rate: float | None = None,
    noise: Tensor | None = None,
) -> Iterator[Tensor]:
    """Final states of a student as `Sampler.states` gives them, for the arguments of `Student.sample`."""
    seeds = _checked_seeds(seeds)
    labels = None if class_labels is None else _checked_labels(student, class_labels, len(seeds))
    if noise is not None and noise.shape != (len(seeds), *student.shape):
        raise UserError(f"noise is {list(noise.shape)}; expected {[len(seeds), *student.shape]}")
    if batch < 1:
        raise UserError(f"batch is {batch}; expected 1 or more")
    captions = _checked_captions(student, prompts, len(seeds))
    sampler = student_sampler(student, num_steps, guidance_rate, captions)
    device, before = next(student.parameters()).device, student.compute_dtype
    student.compute_dtype = before or PRECISIONS[pick_precision(None, device)]
    try:
        yield from sampler.states(seeds, labels, batch, noise)
    finally:
        student.compute_dtype = before


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    found = list(seeds)
    wrong = [seed for seed in found if not isinstance(seed, Integral) or not 0 <= seed < 2**32]
    if wrong or not found:
        problem = f"hold {str(wrong[0])[:40]!r}" if wrong else "are empty"
        raise UserError(f"seeds {problem}; expected integers from 0 to 2³²−1")
    return [int(seed) for seed in found]


def _checked_labels(student: Student, labels: int | Sequence[int] | Tensor, count: int) -> int | list[int]:
    """One class, or one for each of `count` samples."""
    array = np.asarray(labels)
    if array.shape == (count, student.label_dim) and (np.sort(array, axis=1) == [*[0] * (array.shape[1] - 1), 1]).all():
        array = array.argmax(1)  # one-hot
    if array.dtype.kind not in "iu" or array.shape not in ((), (count,)):
        raise UserError(
            f"class_labels are {array.dtype} {list(array.shape)}; expected one class, one for each of {count} seeds, "
            f"or one-hot {[count, student.label_dim]}"
        )
    for index in {int(index) for index in array.flat}:
        student.check_class(index)
    return array.tolist()


def _checked_captions(student: Student, prompts: str | Sequence[str] | None, count: int) -> Prompts | list[str] | None:
    if not student.has_text:
        student.check_prompt(None if prompts is None else str(prompts))
        return None
    if prompts is None:
        return captions_by_seed()
    captions = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(captions) != count or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{len(captions)} prompts for {count} seeds; expected one caption, or one for each")
    return captions
