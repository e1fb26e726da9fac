"""What people are told on the way, by rank 0: remarks, and progress as a bar on a terminal or a line now and then."""

import os
import re
import sys
import time
from types import TracebackType
from typing import Any

import click

from .formatting import format_duration

#: Seconds between two lines.
INTERVAL = 60.0


def is_first_process() -> bool:
    """Whether this is rank 0, or a process on its own; also before there is a process group."""
    return not re.fullmatch("0*[1-9][0-9]*", os.environ.get("RANK", "0"))


def say(line: str) -> None:
    """Print a remark on rank 0, apart from the results."""
    if is_first_process():
        click.echo(line, err=True)


class Lines:
    """What tqdm's bars do, in whole lines of at most 100 columns, for logs and pipes."""

    def __init__(self, total: int | None, unit: str, initial: int, desc: str | None) -> None:
        self.total, self.unit, self.desc = total, unit, f"{desc[:30]}: " if desc else ""
        self.n = self.initial = initial
        self.started = self._last = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            print(self.line(now - self.started), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds, and how long the rest takes at this pace."""
        if not self.total:
            return f"{self.desc}{self.n} {self.unit}, {format_duration(seconds)}"
        left = seconds * (self.total - self.n) / max(self.n - self.initial, 1)
        return (
            f"{self.desc}{self.n} of {self.total} {self.unit}, {format_duration(seconds)}, eta {format_duration(left)}"
        )

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        return None


def progress(
    total: int | None,
    unit: str = "img",
    initial: int = 0,
    desc: str | None = None,
    show: bool = True,
    lines: bool = True,
    **bar: Any,
) -> Any:
    """A context manager with `update(count)`, on standard error.

    Args:
        total: what `update` adds up to, None if that is not known.
        initial: what is done already.
        show: False on other ranks than the first.
        lines: say something without a terminal too.
        bar: further arguments of tqdm.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if show and lines and sys.stderr is not None and not is_terminal:
        return Lines(total, unit, initial, desc)
    from tqdm import tqdm  # kept out of the start of commands

    # Without a terminal a bar would be one endless line.
    hidden = not (show and is_terminal)
    return tqdm(total=total, initial=initial, unit=unit, desc=desc, disable=hidden, dynamic_ncols=True, **bar)
