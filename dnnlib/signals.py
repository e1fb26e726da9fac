"""SIGTERM and SIGINT: what they end, and how they can wait for a good moment."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .early import EXIT_CODES


class Stopped(SystemExit):
    """SIGTERM or SIGINT ends the command here; no `Exception`, so that nothing on the way takes it for an error.

    Args:
        number: the signal.
        message: what rank 0 prints; empty if that was said already.
    """

    def __init__(self, number: int, message: str | None = None) -> None:
        super().__init__(EXIT_CODES[signal.Signals(number)])
        name = signal.Signals(number).name
        self.message = f"Stopped by {name}; repeat the command to go on" if message is None else message


class _Signals:
    """What came so far, and whether it may wait."""

    number: int | None = None
    deferred = False

    def __call__(self, number: int, frame: Any) -> None:
        repeated, self.number = self.number is not None, number
        if not self.deferred or (repeated and number == signal.SIGINT):
            raise Stopped(number)


signals = _Signals()


@contextmanager
def deferred_stop() -> Iterator[Callable[[], int | None]]:
    """Let SIGTERM and SIGINT wait for a good moment; the function that this yields gives the one that came, or None.

    A second SIGINT does not wait: who presses Ctrl-C twice means it.
    """
    signals.deferred = True
    try:
        yield lambda: signals.number
    finally:
        signals.deferred = False


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise `Stopped` in the main thread, so that temporary files are removed."""
    signals.number, signals.deferred = None, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One that is ignored stays so: a shell's background jobs are not meant by Ctrl-C.
    numbers = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signals) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
