"""What a command says of an error: its message, and the flag that it is about."""

import click
import pytest

from dnnlib import UserError, first_line, need, one_line_errors
from dnnlib.options import Command, Group


@click.command(cls=Command)
@click.option("--class", "class_index", type=int)
@click.option("-n", "--dry-run", is_flag=True)
@click.argument("place", required=False)
def command(**options):
    about = next(name for name, value in options.items() if value)
    raise UserError("it is out of range", about)


@click.group(cls=Group)
def group():
    pass


group.add_command(command, "calc")


@pytest.mark.parametrize(
    "main, arguments, said",
    [
        (command, ["--class=7"], "Error: --class: it is out of range"),
        (command, ["-n"], "Error: --dry-run: it is out of range"),
        (command, ["here"], "Error: it is out of range"),  # not a flag
        (group, ["calc", "--class=7"], "Error: --class: it is out of range"),
    ],
)
def test_a_command_names_the_flag_that_an_error_is_about(main, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    with pytest.raises(SystemExit) as ended:
        one_line_errors(main)()
    assert ended.value.code == 1
    assert capsys.readouterr().err == said + "\n"


def test_from_python_an_error_names_what_it_is_about():
    assert str(UserError("it is out of range", "class_index")) == "class_index: it is out of range"
    assert str(UserError("it is out of range")) == "it is out of range"


@pytest.mark.parametrize(
    "text, line",
    [("", "ValueError"), ("\n\n", "ValueError"), ("a\nb", "a"), ("\x1b[31mred\x07", "[31mred"), ("x" * 999, "x" * 200)],
)
def test_first_lines_are_short_and_printable(text, line):
    assert first_line(ValueError(text)) == line


def test_a_missing_package_is_named_with_what_installs_it():
    with pytest.raises(UserError, match=r"no_such_package .*; run: pip install it"):
        need("no_such_package", "pip install it")
