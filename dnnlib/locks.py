"""Files that one process at a time holds; a module of its own, for no Windows has these locks."""

import fcntl
from pathlib import Path
from typing import TextIO


def hold(path: str | Path, wait: bool = True) -> TextIO:
    """Lock the file at `path`, which is made if need be, until what this returns is closed.

    Raises:
        BlockingIOError: somebody else holds it, and this is not to `wait`.
    """
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    return file
