"""What the commands have in common: how they end when given something unusable, and options of all."""

import os
import sys
from collections.abc import Callable

import click


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


def one_line_errors(command: click.Command) -> Callable[[], None]:
    """Wrap a click command: bad input is one line on rank 0, exit code ≠ 0 and no traceback.

    Full disks, unreadable paths and the like (`OSError`) are the user's to mend too. Anything else is a defect of this
    program and keeps its traceback.
    """

    def run() -> None:
        is_first = int(os.environ.get("RANK", "0")) == 0
        try:
            command.main(standalone_mode=False)
        except click.exceptions.Abort:
            sys.exit(130)
        except click.ClickException as error:
            if is_first:
                click.echo(f"Error: {error.format_message()}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if is_first:
                where = f"{error.filename}: " if error.filename else ""
                click.echo(f"Error: {where}{error.strerror or error or type(error).__name__}", err=True)
            sys.exit(1)

    return run
