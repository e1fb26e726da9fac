"""What the commands have in common: how they end when stopped or given something unusable, and options of all."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click

#: Exit codes of commands that a signal ended. 75 is EX_TEMPFAIL of sysexits.h, "not done, try again": no scheduler
#: takes it for success or for a defect, and a process that was killed before it could save never ends with it.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
#: Seconds that rank 0 waits for the reason why another process ended.
REASON_WAIT = 3.0


def _go_offline(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ["SFD_OFFLINE"] = "1"


#: Decorator for a command: `--offline` does for its process, and those that it starts, what `SFD_OFFLINE=1` does.
offline_option = click.option(
    "--offline",
    help="Fetch nothing; a missing file is an error that says where to get it",
    is_flag=True,
    expose_value=False,
    callback=_go_offline,
)


# ------------------------------------------------------------------------------------------------------------------
# Help


#: Ends every help text. docs/reliability.md says which schedulers repeat a job because of 75.
EXIT_CODES_HELP = [
    ("0", "Done"),
    ("1", "An error, said in one line"),
    ("2", "The command line is wrong"),
    (str(EXIT_CODES[signal.SIGTERM]), "Ended by SIGTERM; repeat the command to go on"),
    (str(EXIT_CODES[signal.SIGINT]), "Ended by SIGINT (Ctrl-C); repeat the command to go on"),
]


def section(title: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator between click options: heading of those below it in `--help`, down to the next section."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for param in getattr(function, "__click_params__", ()):  # decorators run from the last one up
            if not hasattr(param, "section"):
                param.section = title
        return function

    return decorate


class _Documented(click.Command):
    """What the help of commands and of groups of them has in common."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 120}

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl(EXIT_CODES_HELP)


class Command(_Documented):
    """A command whose help has its options under the headings of `section`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            # Arguments have one too in new versions of click; what they are is said in the text above.
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "Help"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Group(_Documented, click.Group):
    """A group of such commands."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, no_args_is_help=False, **kwargs)  # no command is an error like others, in one line


# ------------------------------------------------------------------------------------------------------------------
# Signals


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


_signals = _Signals()


@contextmanager
def deferred_stop() -> Iterator[Callable[[], int | None]]:
    """Let SIGTERM and SIGINT wait for a good moment; the function that this yields gives the one that came, or None.

    A second SIGINT does not wait: who presses Ctrl-C twice means it.
    """
    _signals.deferred = True
    try:
        yield lambda: _signals.number
    finally:
        _signals.deferred = False


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise `Stopped` in the main thread, so that temporary files are removed."""
    _signals.number, _signals.deferred = None, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One that is ignored stays so: a shell's background jobs are not meant by Ctrl-C.
    numbers = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _signals) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------------
# Errors


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
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    reason = lines[0][:200] if lines else kind
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
    """One line for a collective operation that failed, which mostly means that another process ended."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not isinstance(error, RuntimeError):
        return None
    if not (type(error).__name__.startswith("Dist") or "gloo" in str(error) or "NCCL" in str(error)):
        return None
    return f"another process of this run ended or does not answer ({lines[0][:200]}); repeat the command to go on"


def one_line_errors(command: click.Command) -> Callable[[], None]:
    """Wrap a click command: bad input is one line on rank 0, exit code ≠ 0 and no traceback.

    Full disks, unreadable paths (`OSError`), too little memory and processes that were killed are the user's to mend
    too. Anything else is a defect of this program and keeps its traceback. What ended another rank is said by rank 0.
    """

    def run() -> None:
        with _stoppable():
            try:
                command.main(standalone_mode=False)
            except BaseException as error:
                # torchrun sends SIGTERM when another rank has failed; that must not keep this one from saying so.
                _signals.deferred = True
                _report(error)
                raise
            finally:
                share_failures(None)

    return run


def _report(error: BaseException) -> None:
    """Say on rank 0 what ended the command, or leave it to rank 0; returns if that is not the user's to mend."""
    is_first = int(os.environ.get("RANK", "0")) == 0
    message: str | None
    if isinstance(error, Stopped):
        message = _reason(is_first, 0)
        if message is None:
            if is_first and error.message:
                click.echo(error.message, err=True)
            sys.exit(error.code)
    elif isinstance(error, click.exceptions.Abort):
        sys.exit(130)
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
        click.echo(f"Error: {message}", err=True)
    sys.exit(error.exit_code if isinstance(error, click.ClickException) else 1)


def _reason(is_first: bool, wait: float) -> str | None:
    """What ended another rank, if it has said so within `wait` seconds."""
    return _board.read(wait) if is_first and _board is not None else None
