"""Networks and training states on disk: nothing here executes what it reads, and no name ever holds half a file.

A network is one `.safetensors` file. Its header metadata holds, as JSON under the key `sfd`, the settings that are
needed to use it: `network` (class and constructor arguments) and whatever its writer adds. A training state is a
`torch.save` file of tensors and plain containers, read with `weights_only=True`.
"""

import errno
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnnlib import UserError, first_line, parse_json, replacing

PathLike = str | Path
METADATA_KEY = "sfd"
#: What torch.load and load_state_dict raise on damaged content.
DAMAGED = (
    RuntimeError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
    zipfile.BadZipFile, struct.error,
)  # fmt: skip


def save_network(path: PathLike, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write a state dict and its JSON-serialisable `settings` as one `.safetensors` file, all or nothing."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _writing(path), replacing(path) as temporary:
        save_file(state, str(temporary), metadata={METADATA_KEY: json.dumps(settings)})


@contextmanager
def _writing(path: PathLike) -> Iterator[None]:
    """Writers report a full disk in their own ways; make it one."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written ({first_line(error)}); an older file is kept") from None


def read_settings(path: PathLike) -> dict[str, Any]:
    """The settings of a network file; its tensors are not read."""
    with _open_network(path) as file:
        return _parse_settings(path, file.metadata())


def read_network(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a network file → (float32 state dict on the CPU, settings)."""
    with _open_network(path) as file:
        settings = _parse_settings(path, file.metadata())
        return {name: read_tensor(path, file, name) for name in file.keys()}, settings  # noqa: SIM118


def read_tensor(path: PathLike, file: Any, name: str) -> Tensor:
    """A float32 copy, since tensors inside a mapped file are not aligned, and kernels then round in another order."""
    try:
        tensor = file.get_tensor(name)
        copy = tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else None
    except (SafetensorError, RuntimeError) as error:  # types of number that torch does not know, or not how to convert
        raise UserError(f"{path} holds {name} in an unusable form ({first_line(error)}); expected float32") from None
    if copy is None:
        raise UserError(f"{path} holds {name} as {tensor.dtype}; expected floating point")
    if not is_finite(copy):
        raise UserError(f"{path} holds numbers in {name} that are not finite; make it again")
    return copy


def _open_network(path: PathLike) -> Any:
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; expected a .safetensors network file")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable network file ({first_line(error)}); "
            "it is truncated or was not written by train.py"
        ) from None


def _parse_settings(path: PathLike, metadata: Any) -> dict[str, Any]:
    try:
        settings = parse_json(metadata[METADATA_KEY])
        if not isinstance(settings["network"], dict):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"{path} holds tensors without this program's settings; expected a file of train.py or training.pretrain"
        ) from None
    return settings


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, in one pass at the pace of the memory, which `isfinite` is far from."""
    if not tensor.numel():
        return True
    low, high = (tensor if tensor.itemsize > 1 else tensor.float()).aminmax()  # float8 has no order of its own
    return math.isfinite(low) and math.isfinite(high)


def check_state_dict(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: PathLike) -> None:
    """Refuse a state dict with a missing, unexpected or wrongly shaped tensor, or with numbers that are not finite.

    The error lists the first few. All numbers are read, which is what a file that is mapped would do later.
    """
    missing = [f"missing {name}" for name in expected if name not in found]
    unexpected = [f"unexpected {name}" for name in found if name not in expected]
    shapes = [
        f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    differences = missing + unexpected + shapes
    if differences:
        raise UserError(
            f"{source} does not fit the network: {len(differences)} differences, first {'; '.join(differences[:4])}"
        )
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor):
            raise UserError(f"{source} holds numbers in {name} that are not finite; get it again")


def save_state(path: PathLike, state: dict[str, Any], before_replacing: Callable[[], None] | None = None) -> None:
    """Write a training state (tensors and plain containers), all or nothing.

    `before_replacing` is called once the new content is written, while `path` still has the old one.
    """
    with _writing(path), replacing(path) as temporary:
        torch.save(state, temporary)
        if before_replacing is not None:
            before_replacing()


@contextmanager
def usable_state(path: PathLike) -> Iterator[None]:
    """Turn whatever a damaged training state does to those who read or load it into one clear line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a training state") from None
    except DAMAGED as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise  # that is no fault of the file
        raise UserError(
            f"{path} is not a readable training state ({first_line(error)}); remove it to start this run again"
        ) from None


def read_state(path: PathLike, is_whole: bool = False) -> dict[str, Any]:
    """Read a training state to the CPU without executing anything; damaged bits are found by its checksums.

    Args:
        is_whole: another process of this machine or run has checked it just now. The file is mapped then, so that the
            processes of a machine share what they read of it.
    """
    with usable_state(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")  # opening a pipe would wait for ever
        if not is_whole:
            _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_whole)


def _check_sums(path: PathLike) -> None:
    """Compare the contents of a zip file with its checksums, which torch itself does not."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed, torch.save does not do that")
        try:
            damaged = archive.testzip()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("its directory points outside of it") from None
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
