"""How a command ends when its user gave it something it cannot use."""

import os
import sys
from collections.abc import Callable

import click


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
