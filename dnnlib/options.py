"""What the commands have in common: options of several of them, and the form of their help."""

import math
import os
import signal
from collections.abc import Callable
from typing import Any

import click

from .early import EXIT_CODES


class _Number:
    """What numbers of the command line have in common: a value that is none is quoted in part alone."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and len(value) > 40:
            self.fail(f"{value[:20]!r}… of {len(value)} characters is no number in the range", param, ctx)  # type: ignore[attr-defined]  # of click.ParamType
        return super().convert(value, param, ctx)  # type: ignore[misc]


class Whole(_Number, click.IntRange):
    """An integer in a range, which `--help` states."""


class Real(_Number, click.FloatRange):
    """A finite number in a range, which `--help` states."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):  # NaN is inside of every range
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


#: As generators take them.
SEED = Whole(0, 2**32 - 1)


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
#: Decorators for a command: what `torch_utils.device` picks from.
device_option = click.option(
    "--device", help="cpu, cuda, cuda:N or mps; default: a GPU of CUDA, else cpu", metavar="NAME"
)
precision_option = click.option(
    "--precision",
    help="Core of the networks; default: fp16 on CUDA, bf16 on a CPU that has it, else fp32",
    type=click.Choice(["fp32", "fp16", "bf16"]),
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


#: Metavars of options that may be empty.
TEXTS = ("LIST", "STR", "TEXT")


class Command(_Documented):
    """A command whose help has its options under the headings of `section`, and that takes no empty path or name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """An empty path would be the current directory; most often a variable of the shell is not set."""
        texts = {opt for param in self.params if param.metavar in TEXTS for opt in param.opts}
        for before, arg in zip(["", *args], args):
            name, equals, value = arg.partition("=")
            is_empty = arg == "" and before not in texts
            if is_empty or (arg.startswith("--") and equals and not value and name not in texts):
                raise click.UsageError(f"{name or before or 'an argument'} is empty; is a variable not set?", ctx)
        return super().parse_args(ctx, args)

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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """An option in place of a command is answered with the commands that have it."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            owners = [c for c, command in self.commands.items() if any(name in param.opts for param in command.params)]
            if not owners:
                raise
            right = f"{ctx.command_path} {'|'.join(owners)} {name}=…"
            raise click.UsageError(f"{name} is an option of a command: {right}", ctx) from None
