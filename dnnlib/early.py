"""What a command meets before it can begin, in one line: a missing or old torch, and signals while it is importing.

Importing torch takes a second, in which Ctrl-C would show a traceback of imports. Nothing is begun then, so nothing is
lost by leaving at once. Handlers are set where a command of this program is the process, never in programs that import
it; `dnnlib.signals` replaces them while a command runs. Until they are set, nothing is imported that Python has not
imported itself.
"""

import atexit
import io
import os
import signal
import sys
from types import FrameType

#: Exit codes of commands that a signal ended. 75 is EX_TEMPFAIL of sysexits.h, "not done, try again": no scheduler
#: takes it for success or for a defect, and a process that was killed before it could save never ends with it.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def is_command() -> bool:
    """Whether this process runs a script of this program, or is importing one for `python -m`."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None:
        return sys.argv[:1] == ["-m"]
    own = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return os.path.realpath(file).startswith(own + os.sep)


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        os.write(2, f"Stopped by {name}; repeat the command to go on\n".encode())
    os._exit(EXIT_CODES[signal.Signals(number)])


def _check_packages() -> None:
    from .packages import TORCH, installed, is_met

    if os.name == "nt":
        sys.exit("Error: this program runs on Linux and macOS; on Windows, use WSL")
    if not is_met(TORCH):
        version = installed("torch")
        found = f"torch {version} is too old" if version else "torch is missing"
        sys.exit(
            f"Error: {found} in {sys.prefix}; {TORCH} is needed: pip install -r requirements.txt, or use launch.sh"
        )


def _ignore_signals() -> None:
    """All is done when this is called; Python would give signals back their default, which is death by signal."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)


def _print_anything() -> None:
    """What the encoding of the output lacks (ASCII, in some containers) is replaced rather than an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if is_command():
    atexit.register(_ignore_signals)
    for _number in EXIT_CODES:
        # One that is ignored stays so: a shell's background jobs are not meant by Ctrl-C.
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, _leave)
    _print_anything()
    _check_packages()
