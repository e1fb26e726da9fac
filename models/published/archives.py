"""Zip archives that checkpoints are published in: one file of them, and no other, is unpacked."""

from __future__ import annotations

import math
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dnnlib import UserError, first_line, replacing

from .pickle_records import Refused, shown

#: Weights hardly compress; an archive that promises more than this is a bomb. Small files are always fine.
MAX_RATIO, MAX_UNCHECKED = 20, 64 << 20
COPY_BYTES = 1 << 20
#: What `zipfile` raises on damaged archives.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, struct.error)


def extract_member(path: str | os.PathLike, suffix: str, dest: str | os.PathLike) -> Path:
    """Unpack the one file of an archive that has a given name, in whichever folder of it, and return its path.

    Args:
        path: a zip archive.
        suffix: last part of the name, `model.ckpt`, or more parts of it, `run/model.ckpt`.
        dest: what the file is called here; names in the archive decide nothing. It is written all or nothing.

    Raises:
        UserError: no archive, one that is damaged or hostile, or not exactly one such file in it.
    """
    dest = Path(dest)
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; expected a zip archive with {suffix}")
    try:
        with zipfile.ZipFile(path) as archive:
            info = _find_member(archive.infolist(), suffix)
            dest.parent.mkdir(parents=True, exist_ok=True)
            _check_size(info, os.path.getsize(path), dest)
            with archive.open(info) as source, replacing(dest) as temporary, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
                if target.tell() != info.file_size:
                    raise Refused(f"is damaged: {suffix} in it ends too early")
    except Refused as error:
        raise UserError(f"{path} {error}") from None
    except (*DAMAGED_ZIP, RuntimeError) as error:  # RuntimeError: encrypted
        raise UserError(f"{path} is damaged or no zip archive ({first_line(error)}); get it again") from None
    return dest


def _find_member(infos: Iterable[zipfile.ZipInfo], suffix: str) -> zipfile.ZipInfo:
    infos = list(infos)
    found = [info for info in infos if f"/{info.filename}".endswith(f"/{suffix}")]
    if len(found) != 1:
        names = ", ".join(shown(info.filename) for info in (found or infos)[:4])
        raise Refused(f"holds {len(found) or 'no'} files called {suffix} ({names or 'it is empty'}); expected one")
    name = PurePosixPath(found[0].filename)
    if name.is_absolute() or ".." in name.parts or "\\" in found[0].filename:
        raise Refused(f"is refused: {shown(found[0].filename)} in it points outside of the archive")
    kind = stat.S_IFMT(found[0].external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise Refused(f"is refused: {shown(found[0].filename)} in it is a link or a device, not a file")
    if found[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused(f"is refused: {shown(found[0].filename)} in it is compressed in an unusual way")
    return found[0]


def _check_size(info: zipfile.ZipInfo, archive_size: int, dest: Path) -> None:
    """Refuse a file that the disk does not hold, and one that grows out of proportion."""
    packed = min(info.compress_size, archive_size)
    if info.file_size > max(MAX_UNCHECKED, MAX_RATIO * packed):
        raise Refused(f"is refused: {shown(info.filename)} in it grows from {packed:,} to {info.file_size:,} bytes")
    free = shutil.disk_usage(dest.parent).free
    if info.file_size > free:
        raise UserError(
            f"{dest} needs {math.ceil(info.file_size / 1e6):,} MB, {free // 10**6:,} MB are free; make room"
        )
