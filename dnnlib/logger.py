"""A copy of what the program prints, in a file of the run."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO


class Logger:
    """Print lines above a running progress bar and append them to `path`.

    Where nobody reads what is printed any more (a pipe to `head`, a terminal that is gone), the file alone gets it.
    """

    def __init__(self, path: str | Path, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream or sys.stdout  # None where a command was started without any
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def __call__(self, line: str) -> None:
        self._file.write(line + "\n")
        if self._stream is None:
            return
        from tqdm import tqdm  # kept out of the start of commands

        try:
            tqdm.write(line, file=self._stream)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: it is closed
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # what it holds back would be an error at the very end
            self._stream = None

    def close(self) -> None:
        self._file.close()
