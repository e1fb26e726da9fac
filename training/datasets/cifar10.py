"""The original CIFAR-10 (`cifar-10-python.tar.gz` or `-binary`, packed or not).

Its batches are pickles of arrays. They are read by an unpickler that knows numpy's arrays as inert records and refuses
every other name, so nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError, first_line
from torch_utils.metrics.pixels import ImageHeader

CIFAR_SIDE = 32
CIFAR_BATCH = re.compile(r"(?:.*/)?(data_batch_[1-5]|test_batch)(\.bin)?")
#: Bytes of a batch of CIFAR-10, with room.
MOST_BATCH = 1 << 26


class Cifar10:
    """The original CIFAR-10: 32×32 colour images with one of ten classes, in the order of the batches."""

    def __init__(self, path: Path, split: str) -> None:
        wanted = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        found = {name: batch for name, batch in _cifar_batches(path) if name in wanted}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise UserError(f"{path} holds no {', '.join(missing)}; expected the original CIFAR-10, whole")
        batches = [found[name] for name in wanted]
        self.pixels = np.concatenate([pixels for pixels, _ in batches])
        self.labels: list[int] | None = [label for _, labels in batches for label in labels]
        self.headers: dict[str, ImageHeader] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int, upright: bool) -> np.ndarray:
        return self.pixels[index].reshape(3, CIFAR_SIDE, CIFAR_SIDE).transpose(1, 2, 0)

    def digest(self) -> str:
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


def _cifar_batches(path: Path) -> Iterator[tuple[str, tuple[np.ndarray, list[int]]]]:
    """Name, pixels uint8 `[N, 3072]` and labels of every batch in a folder or tar archive."""
    if path.is_dir():
        for name in sorted(os.listdir(path)):
            match = CIFAR_BATCH.fullmatch(name)
            if match:
                with open(path / name, "rb") as file:
                    yield match[1], _read_batch(file.read(MOST_BATCH), bool(match[2]), f"{name} in {path}")
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                match = CIFAR_BATCH.fullmatch(member.name)
                stream = archive.extractfile(member) if match and member.isfile() else None
                if match and stream is not None:
                    content = stream.read(MOST_BATCH)
                    yield match[1], _read_batch(content, bool(match[2]), f"{member.name} in {path}")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable tar archive ({first_line(error)}); get it again") from None


def _read_batch(content: bytes, is_binary: bool, place: str) -> tuple[np.ndarray, list[int]]:
    """A batch in the binary version (a label, then 3072 pixels, for each image) or the python version (a pickle)."""
    size = 3 * CIFAR_SIDE**2
    if is_binary:
        if not content or len(content) % (size + 1):
            raise UserError(f"{place} is no batch of CIFAR-10: it has {len(content)} bytes, not {size + 1} an image")
        rows = np.frombuffer(content, np.uint8).reshape(-1, size + 1)
        pixels, labels = rows[:, 1:], rows[:, 0].tolist()
    else:
        batch = read_inert(content, place)
        data = batch.get(b"data") if isinstance(batch, dict) else None
        labels = batch.get(b"labels") if isinstance(batch, dict) else None
        if not isinstance(data, ArrayRecord) or not isinstance(labels, list):
            raise UserError(f"{place} is no batch of CIFAR-10: data and labels are missing")
        pixels = data.values(place)
        if pixels.ndim != 2 or pixels.shape[1] != size:
            raise UserError(f"{place} holds data {list(pixels.shape)}; expected [N, {size}]")
    if len(labels) != len(pixels) or not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise UserError(f"{place} does not have a label from 0 to 9 for every image")
    return pixels, labels


class ArrayRecord:
    """What a pickle says of a numpy array; nothing of numpy is called until `values`."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self, place: str) -> np.ndarray:
        """uint8 values in their shape."""
        try:
            _, shape, dtype, is_fortran, content = self.state
            if not isinstance(dtype, TypeRecord) or dtype.code not in (b"u1", "u1"):
                raise ValueError("they are not uint8")
            return np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")
        except (TypeError, ValueError) as error:
            raise UserError(f"{place} holds an array that is not readable ({first_line(error)})") from None


class TypeRecord:
    """What a pickle says of the type of numbers."""

    def __init__(self, code: Any = None, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Knows three names of numpy, as records, and refuses all others."""

    NAMES = {"ndarray": ArrayRecord, "_reconstruct": ArrayRecord, "dtype": TypeRecord}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.NAMES:
            return self.NAMES[name]
        raise UserError(f"{module}.{name} is no part of CIFAR-10; this file wants to run code, do not open it")


def read_inert(content: bytes, place: str) -> Any:
    """A pickle of plain containers and arrays, nothing in it executed.

    Raises:
        UserError: any other content, or damage.
    """
    try:
        return _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{place} is refused: {error.message}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UserError(f"{place} is not a readable pickle ({first_line(error)}); get it again") from None
