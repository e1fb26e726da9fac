"""Signals that come while a command is still importing, or has already ended: one line and an exit code.

Importing torch takes a second, in which Ctrl-C would show a traceback of imports. Nothing is begun then, so nothing is
lost by leaving at once. Handlers are set where a command of this program is the process, never in programs that import
it; `dnnlib.signals` replaces them while a command runs.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

#: Exit codes of commands that a signal ended. 75 is EX_TEMPFAIL of sysexits.h, "not done, try again": no scheduler
#: takes it for success or for a defect, and a process that was killed before it could save never ends with it.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def is_command() -> bool:
    """Whether this process runs a script of this program, or is importing one for `python -m`."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None:
        return sys.argv[:1] == ["-m"]
    return Path(__file__).resolve().parent.parent in Path(file).resolve().parents


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        os.write(2, f"Stopped by {name}; repeat the command to go on\n".encode())
    os._exit(EXIT_CODES[signal.Signals(number)])


if is_command():
    for _number in EXIT_CODES:
        # One that is ignored stays so: a shell's background jobs are not meant by Ctrl-C.
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, _leave)
