"""What a pickle of a network can consist of: records without behaviour, and how much work reading one may take.

`pickle_machine` makes them; `Refused` says why a file is not read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: The largest published network takes 90 thousand.
MAX_STEPS = 1_000_000


class Refused(Exception):
    """Why a file is not read: the rest of a sentence that begins with its path."""


class NotPlain(Refused):
    """A value is not a number, string, bool, None, or a list or dict of these."""


def shown(text: str) -> str:
    """Text from a file, fit for one line of a terminal."""
    return ascii(text[:100])[1:-1]


@dataclass(eq=False)
class Budget:
    """Steps that are left for one file. Reading and converting draw on it, so that no nesting makes work explode."""

    steps: int = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise Refused(f"takes more than {MAX_STEPS} steps to read, far more than any network")


@dataclass(eq=False)
class ClassRecord:
    """The name of a class of modules."""

    module: str
    name: str


@dataclass(eq=False)
class ObjectRecord:
    """An instance, as its class's name and its `__dict__`."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Function:
    """A constructor: `build(budget, *args)`, with arguments of exactly these types.

    The last `optional` of them may be absent, and `ignored` more are accepted and dropped.
    """

    name: str
    types: tuple[type, ...]
    build: Callable[..., Any]
    ignored: int = 0
    optional: int = 0

    def __call__(self, budget: Budget, args: tuple) -> Any:
        extra = len(args) - len(self.types)
        fits = -self.optional <= extra <= self.ignored
        if not fits or any(type(arg) is not kind for arg, kind in zip(args, self.types)):
            raise Refused(f"is damaged: {self.name} with unexpected arguments")
        return self.build(budget, *args[: len(self.types)])


@dataclass(eq=False)
class NumpyType:
    """`numpy.dtype`: the layout of one number."""

    layout: struct.Struct


@dataclass(eq=False)
class ArrayRecord:
    """A small `numpy.ndarray`: its numbers, in row-major order."""

    values: list[int | float | bool] = field(default_factory=list)


def numpy_values(budget: Budget, state: tuple) -> list[int | float | bool]:
    kinds = (int, tuple, NumpyType, bool, memoryview)
    if tuple(map(type, state)) != kinds:
        raise Refused("is damaged: a NumPy array of something that is not numbers")
    _, shape, dtype, is_fortran, data = state
    fits = len(shape) <= 8 and all(type(n) is int and 0 <= n <= len(data) for n in shape) and not is_fortran
    if not fits or math.prod(shape) * dtype.layout.size != len(data):
        raise Refused("is damaged: a NumPy array of another size than its values")
    budget.spend(math.prod(shape))
    return [number for (number,) in dtype.layout.iter_unpack(data)]


@dataclass(eq=False)
class StorageRecord:
    """Bytes of the file that hold `numel` values, and their CRC-32 where the file has it."""

    data: memoryview
    dtype: torch.dtype
    numel: int
    crc: int = 0


@dataclass(eq=False)
class TensorRecord:
    """A view of a storage, checked to lie inside it. Only the tensors that are wanted become real."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, as a view and as a copy."""
        return max(math.prod(self.size), extent(self.size, self.stride)) * self.storage.dtype.itemsize

    def materialise(self) -> Tensor:
        """A contiguous float32 copy."""
        count = extent(self.size, self.stride)
        itemsize = self.storage.dtype.itemsize
        values = torch.empty(count, dtype=self.storage.dtype)
        start = self.offset * itemsize
        # A copy of bytes: torch cannot wrap the file's read-only memory.
        values.view(torch.uint8).numpy().data[:] = self.storage.data[start : start + count * itemsize]
        return values.as_strided(self.size, self.stride).contiguous().float()


def extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of values from the first to the last of a view."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride)) if math.prod(size) else 0
