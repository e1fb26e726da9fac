"""`.npz` files of images, features and statistics: read without executing anything, written all or nothing.

An `.npz` is a zip archive of arrays, each with a header that says its type and shape. Headers are read first: what is
not asked for stays packed, whatever it is, and what would unpack to far more than the file holds is refused before it
does.
"""

from __future__ import annotations

import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError, check_regular, first_line, parse_json, replacing

#: What zipfile and its decompressors raise on a damaged or unsupported archive.
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError)
#: What numpy raises on a damaged array.
NO_ARRAYS = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, MemoryError, tokenize.TokenError,
             *UNREADABLE)  # fmt: skip
#: An array may unpack to so many bytes, or to so many times the size of the whole file.
FREE_BYTES, MOST_RATIO = 1 << 28, 64
#: Bytes of the JSON beside the arrays.
MOST_META = 1 << 24


@dataclass(frozen=True)
class Header:
    """What an array is, without its values; `refusal` says why they cannot be had, if so."""

    dtype: np.dtype
    shape: tuple[int, ...]
    refusal: str = ""

    @property
    def is_images(self) -> bool:
        """Whether these are images, uint8 `[N, H, W]` or `[N, H, W, 1 or 3]`; one image `[H, W, 3]` is none."""
        is_set = len(self.shape) == 4 and self.shape[3] in (1, 3) or len(self.shape) == 3 and self.shape[2] > 4
        return self.dtype == np.uint8 and is_set

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def described(headers: Mapping[str, Header]) -> str:
    """What a file holds, for its error lines."""
    return ", ".join(f"{name} {header}" for name, header in headers.items())[:300] or "nothing"


def read_headers(path: str | Path) -> dict[str, Header]:
    """Type and shape of every array in an `.npz` file.

    Raises:
        UserError: missing, damaged, no `.npz`, or two arrays of one name.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            found = {member.filename.removesuffix(".npy"): _read_header(archive, member, path) for member in members}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected an .npz file, a folder or a zip archive") from None
    except NO_ARRAYS as error:
        raise UserError(f"{path} is not a readable .npz file ({first_line(error)})") from None
    if len(found) < len(members):
        raise UserError(f"{path} holds two arrays of one name; make it again")
    return found


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: str | Path) -> Header:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} is in version {version} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if min(shape, default=0) < 0 or (math.prod(shape) * dtype.itemsize > member.file_size and not dtype.hasobject):
        raise ValueError(f"{member.filename} does not hold the {dtype} {list(shape)} that it announces")
    refusal = ""
    if dtype.hasobject:
        refusal = "holds objects, which are programs"
    elif member.file_size > max(FREE_BYTES, MOST_RATIO * Path(path).stat().st_size):
        refusal = f"unpacks to {member.file_size} bytes, far more than the file has"
    return Header(dtype, shape, refusal)


def read_arrays(path: str | Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of these names that an `.npz` file has (None: all), nothing unpickled.

    Raises:
        UserError: what `read_headers` refuses, or one of them holds objects, or unpacks to far too much.
    """
    headers = read_headers(path)
    chosen = [name for name in headers if names is None or name in names]
    for name in chosen:
        if headers[name].refusal:
            raise UserError(f"{path} is not a readable .npz file ({name} {headers[name].refusal})")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in chosen}
    except NO_ARRAYS as error:
        raise UserError(f"{path} is not a readable .npz file ({first_line(error)})") from None


def read_meta(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON that this program writes beside its arrays; empty for files of others."""
    try:
        text = arrays["meta"]
        meta = parse_json(str(text)) if text.nbytes <= MOST_META else None
        return meta if isinstance(meta, dict) else {}
    except (KeyError, ValueError):
        return {}


def write_arrays(path: str | Path, meta: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write an `.npz` with `meta` as JSON, all or nothing."""
    content: dict[str, Any] = {"meta": np.array(json.dumps(meta, sort_keys=True)), **arrays}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **content)
