"""Errors that a user can mend, and how a command says what ended it."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import click

from .progress import is_first_process
from .signals import Stopped, signals, stoppable

#: How gloo and NCCL say that the other side is gone, or too slow.
GONE = re.compile(
    r"abort|time-?d? ?-?out|heartbeat|broken pipe|connection (was )?(closed|reset|refused)|remote process (exited|has)"
    r"|socket (closed|error)|network error",
    re.IGNORECASE,
)
#: Seconds that rank 0 waits for the reason why another process ended.
REASON_WAIT = 3.0


class UserError(Exception):
    """What the user can mend, in one line: what was given, what was expected, what to do.

    Args:
        message: the line.
        about: name of the argument or setting that is at fault; a command that has an option of this name puts its flag
            before the message. From Python, the name itself stands there.
    """

    def __init__(self, message: str, about: str | None = None) -> None:
        super().__init__(message if about is None else f"{about}: {message}")
        self.message, self.about = message, about


def printable(text: str) -> str:
    """`text` without control characters: names of files and messages of libraries can hold any."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def first_line(error: BaseException | str, limit: int = 200) -> str:
    """The first line of an error's text without control characters, at most `limit` long; its type if it has none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else "")[:limit] or type(error).__name__


def need(module: str, install: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: name to import.
        install: command that installs it.

    Raises:
        UserError: it is missing or cannot be imported; the message names `install`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is needed and cannot be imported ({first_line(error)}); run: {install}") from None


def environment_number(name: str, default: int) -> int:
    """A whole number that torchrun, or whoever starts several processes, leaves in the environment.

    Raises:
        UserError: it is none.
    """
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{name}={text[:40]!r} in the environment is no number; start by torchrun, or unset it")
    return int(text)


class FailureBoard(Protocol):
    """Where processes that work together leave what ended one of them."""

    def post(self, message: str) -> None: ...

    def read(self, wait: float) -> str | None: ...


_board: FailureBoard | None = None


def share_failures(board: FailureBoard | None) -> None:
    """Let rank 0 report what ended another rank, through `board`; None for a process on its own."""
    global _board
    _board = board


def explain(error: Exception) -> str | None:
    """One line for what goes wrong on a machine rather than in this program; None for anything else.

    By the names that torch gives its errors, for this package does without torch.
    """
    kind, reason = type(error).__name__, first_line(error)
    if isinstance(error, OSError):
        return f"{error.filename}: " * bool(error.filename) + str(error.strerror or error or kind)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return f"out of memory ({reason}); process less at a time: --batch-gpu of train.py, --batch of the others"
    if "DataLoader worker" in str(error):
        return f"a worker process was ended from outside ({reason}); if memory is short, use fewer --workers"
    if "does not have a deterministic implementation" in str(error):
        return f"--deterministic is not possible here ({reason}); leave it out"
    return None


def _lost_contact(error: Exception) -> str | None:
    """One line for a collective operation that failed; None for other errors.

    Mostly another process has ended. What is wrong with the set-up would be no better the next time.
    """
    text = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if not (type(error).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text):
        return None
    cause = first_line(text.partition("Last error:")[2].strip() or text)  # NCCL's own reason stands at the end
    if GONE.search(cause) or ("Last error:" not in text and GONE.search(text)):
        return f"another process of this run ended or does not answer ({cause}); repeat the command to go on"
    return f"the processes of this run cannot work together ({cause}); NCCL_DEBUG=WARN tells more"


def one_line_errors(command: click.Command) -> Callable[[], None]:
    """Wrap a click command: bad input is one line on rank 0, exit code ≠ 0 and no traceback.

    Full disks, unreadable paths (`OSError`), too little memory and processes that were killed are the user's to mend
    too. Anything else is a defect of this program and keeps its traceback. What ended another rank is said by rank 0.
    """

    def run() -> None:
        with stoppable():
            try:
                command.main(standalone_mode=False)
            except BaseException as error:
                # torchrun sends SIGTERM when another rank has failed; that must not keep this one from saying so.
                signals.deferred = True
                _report(error, command)
                raise
            finally:
                share_failures(None)

    return run


def with_flag(error: UserError, command: click.Command) -> str:
    """The message of an error, behind the flag of `command`, or of one of its sub-commands, that it is about."""
    commands = [command, *getattr(command, "commands", {}).values()]
    options = {param.name: param for each in commands for param in each.params if isinstance(param, click.Option)}
    option = options.get(error.about or "")
    return error.message if option is None else f"{max(option.opts, key=len)}: {error.message}"


def _report(error: BaseException, command: click.Command) -> None:
    """Say on rank 0 what ended the command, or leave it to rank 0; returns if that is not the user's to mend."""
    is_first = is_first_process()
    message: str | None
    if isinstance(error, Stopped):
        message = _reason(is_first, 0)
        if message is None:
            if is_first and error.message:
                click.echo(error.message, err=True)
            sys.exit(error.code)
    elif isinstance(error, click.exceptions.Abort):
        sys.exit(130)
    elif isinstance(error, UserError):
        message = with_flag(error, command)
    elif isinstance(error, click.ClickException):
        message = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            message += f" See `{error.ctx.command_path} --help`."
    elif not isinstance(error, Exception):
        return
    else:
        message, lost = explain(error), _lost_contact(error)
        if message is None and lost is not None:
            if not is_first:
                sys.exit(1)  # the same happened to all
            message = _reason(is_first, REASON_WAIT) or lost
    if not is_first and _board is not None:
        _board.post(message or f"{type(error).__name__}: {error}"[:300])
    if message is None:
        return
    if is_first:
        click.echo(f"Error: {printable(message)}", err=True)
    sys.exit(error.exit_code if isinstance(error, click.ClickException) else 1)


def _reason(is_first: bool, wait: float) -> str | None:
    """What ended another rank, if it has said so within `wait` seconds."""
    return _board.read(wait) if is_first and _board is not None else None
