"""A copy of what the program prints, in a file of the run."""

import sys
from pathlib import Path
from typing import TextIO


class Logger:
    """Print lines above a running progress bar and append them to `path` (None: print only)."""

    def __init__(self, path: str | Path | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._file = open(path, "a", encoding="utf-8", buffering=1) if path is not None else None

    def __call__(self, line: str = "") -> None:
        from tqdm import tqdm  # kept out of the start of commands

        tqdm.write(line, file=self._stream)
        self._stream.flush()
        if self._file is not None:
            self._file.write(line + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
