"""Writing files so that a name never holds a partial content."""

import hashlib
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it


@contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, remove it on failure.

    With `sync` the file reaches the disk before it is renamed, so that a power loss leaves the old content or the new
    one; without, that holds for a killed process only, which is enough for one image of many. The temporary name ends
    as `path` does (writers choose a format by the suffix) and is drawn at random: two writers never share one, not even
    on two machines, where process ids can be equal. A symbolic link stays, what it points to is replaced.

    Raises:
        UserError: `path` is there and no regular file (a folder, a device, a pipe).
    """
    path = _written(Path(path))
    temporary = path.with_name(f".{secrets.token_hex(6)}.tmp.{path.name}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # some writers make private files
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk, which writers do not place
    finally:
        temporary.unlink(missing_ok=True)


def _written(path: Path) -> Path:
    """Where a file of this name really lies; what a rename would destroy is refused."""
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is there and is no regular file; expected a file, or a name that is free")
    return path


#: Names that `replacing` makes.
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp\..")


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed processes from a folder that no other process writes to.

    Only names that `replacing` makes: the folder may be the user's own.
    """
    for path in Path(folder).iterdir():
        if _TEMPORARY.match(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def check_regular(path: str | Path) -> None:
    """Refuse a pipe, which would be waited for, a device or a folder; what is not there is no concern of this.

    Raises:
        UserError: `path` is there and no regular file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no regular file; expected a file")


def make_folder(path: str | Path, about: str | None = None) -> None:
    """Make a folder and its parents; a place that cannot be written is one clear line, about the option `about`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(0, "no permission to write")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another folder", about) from None


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(content: str | bytes, infinite: bool = False) -> Any:
    """What a JSON text of anybody holds.

    Args:
        infinite: take NaN and infinity for numbers, as Python writes them.

    Raises:
        ValueError: it is none, or none that all readers take alike: a name twice in an object, NaN, infinity, numbers
            beyond float64; or it is nested too deeply.
    """
    numbers: dict[str, Any] = {} if infinite else dict(parse_float=_finite, parse_constant=_no_number)
    try:
        return json.loads(content, object_pairs_hook=_unique, **numbers)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has {name[:40]!r} twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond float64")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
