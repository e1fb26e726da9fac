"""`.npz` files of statistics and features: read without executing anything, written all or nothing."""

from __future__ import annotations

import json
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError, replacing

#: What zipfile and its decompressors raise on a damaged or unsupported archive.
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError)


#: What numpy raises on a damaged `.npz`.
NO_ARRAYS = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, MemoryError, tokenize.TokenError,
             *UNREADABLE)  # fmt: skip


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file, nothing unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected an .npz file") from None
    except NO_ARRAYS as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is not a readable .npz file ({reason[0][:120]})") from None


def read_meta(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON that this program writes beside its arrays; empty for files of others."""
    try:
        meta = json.loads(str(arrays["meta"]))
        return meta if isinstance(meta, dict) else {}
    except (KeyError, ValueError):
        return {}


def write_arrays(path: str | Path, meta: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write an `.npz` with `meta` as JSON, all or nothing."""
    content: dict[str, Any] = {"meta": np.array(json.dumps(meta, sort_keys=True)), **arrays}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **content)


def names_in(path: str | Path) -> list[str]:
    """Names of the arrays in an `.npz` file, read from its directory alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected an .npz file, a folder or a zip archive") from None
    except (*UNREADABLE, ValueError):
        raise UserError(f"{path} is not a readable .npz file; it is truncated or something else") from None


def check_moments(mu: np.ndarray, sigma: np.ndarray, dim: int, path: str | Path) -> None:
    """Refuse statistics of another detector, and numbers that are not finite."""
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise UserError(
            f"{path} holds mu {list(mu.shape)} and sigma {list(sigma.shape)}, the detector has {dim} features; "
            "choose the --detector they were made with, or make them again with fid.py ref"
        )
    if not (np.issubdtype(mu.dtype, np.floating) and np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds numbers that are not finite; make it again with fid.py ref")
