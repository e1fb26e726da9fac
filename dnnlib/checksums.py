"""Checksums of files in the cache directory: those that are published, and those of the first use.

`checksums.json` there records them, with the size and time that tell whether a file has changed since.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import parse_json, sha256_of, write_text
from .locks import hold
from .progress import say


def cache_dir() -> Path:
    """Where downloaded files go: `SFD_CACHE`, or `./src`."""
    return Path(os.environ.get("SFD_CACHE") or "src")


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`, whose directory is there.

    The lock's own file beside it stays: if it were removed, two processes could lock one name.
    """
    own = path.with_name(f".{path.name}.lock")
    try:
        held = hold(own, wait=False)
    except BlockingIOError:
        say(f"another process is {doing} {path}; waiting for it")
        held = hold(own)
    with held:
        yield


def is_there(dest: Path, sha256: str | None) -> bool:
    """Whether `dest` exists; if so, it is verified, by its size and time where they say that nothing has changed."""
    if not dest.exists():
        return False
    if not dest.is_file():
        raise UserError(f"{dest} is not a file; move it away to have the file fetched there")
    entry, stat = _read_record().get(_key(dest), {}), dest.stat()
    unchanged = (entry.get("size"), entry.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
    digest = entry["sha256"] if unchanged else sha256_of(dest)
    difference = mismatch(digest, dest, sha256)
    if difference:
        raise UserError(f"{dest} is not the expected file: {difference}; delete it to have it fetched again")
    if not unchanged:
        write_record(dest, digest)
    return True


def mismatch(digest: str, dest: Path, sha256: str | None) -> str | None:
    """Why a file with checksum `digest` cannot be `dest`; None if it can."""
    if sha256 is not None and not digest.startswith(sha256):
        return f"its sha256 is {digest[:16]}…, the published one {sha256[:16]}…"
    recorded = recorded_digest(dest, sha256)
    if recorded is not None and digest != recorded:
        return (
            f"its sha256 is {digest[:16]}…, that of its first use, recorded in {_record_path()}, {recorded[:16]}… "
            "(remove that entry if the file was renewed)"
        )
    return None


def recorded_digest(dest: Path, sha256: str | None) -> str | None:
    """The recorded checksum, where it counts: a complete published one is the last word, digits of one are not."""
    if sha256 is not None and len(sha256) == 64:
        return None
    return _read_record().get(_key(dest), {}).get("sha256")


def _record_path() -> Path:
    return cache_dir() / "checksums.json"


def _key(path: Path) -> str:
    """A file's name in the record, relative to the cache so that the cache can be moved."""
    path, root = path.absolute(), cache_dir().absolute()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _read_record() -> dict[str, Any]:
    path = _record_path()
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not all(isinstance(entry["sha256"], str) for entry in record.values()):
            raise TypeError
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged; expected the checksums of downloaded files: mend it, or delete it to record them anew"
        ) from None
    return record


def write_record(dest: Path, digest: str) -> None:
    """Note a file's checksum, with the size and time that tell whether the file has changed since."""
    path, stat = _record_path(), dest.stat()
    entry = {"sha256": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, "writing"):
            record = {**_read_record(), _key(dest): entry}
            write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        # A shared cache that somebody else has filled; without a record the file is read in full each time.
        say(f"cannot record the checksum of {dest}: {path}: {error.strerror}")
