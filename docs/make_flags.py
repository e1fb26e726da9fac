"""Writes docs/flags.md from the options of the commands: `python docs/make_flags.py`; a test compares them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: How a command is called, and the module that has it.
COMMANDS = {
    "train.py": "train",
    "sample.py": "sample",
    "fid.py": "fid",
    "prdc.py": "prdc",
    "-m training.pretrain": "training.pretrain",
    "-m training.plot": "training.plot",
    "-m training.bench": "training.bench",
    "-m training.dataset_tool": "training.dataset_tool",
    "-m models.export": "models.export.__main__",
    "-m models.prefetch": "models.prefetch",
    "-m models.registry": "models.registry.__main__",
}
INTRODUCTION = """# Flags

Written by `python docs/make_flags.py` from the options themselves; `--help` of a command says the same, with examples
and exit codes. [own-teacher.md](own-teacher.md) and [using.md](using.md) show how commands work together.
"""


def leaves(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command, or those of a group, each with its name."""
    if isinstance(command, click.Group):
        for part, below in command.commands.items():
            yield from leaves(f"{name} {part}", below)
    else:
        yield name, command


def allowed(param: click.Parameter) -> str:
    """Values that an option takes: choices, a range, a metavar, or a type."""
    kind = param.type
    if isinstance(kind, click.Choice):
        return ", ".join(map(str, kind.choices))
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        low = "" if kind.min is None else f"{'above' if kind.min_open else 'from'} {kind.min:g}"
        high = "" if kind.max is None else f"{'below' if kind.max_open else 'to'} {kind.max:g}"
        return " ".join(filter(None, (param.metavar or kind.name.split()[0], low, high)))
    if param.metavar:
        return param.metavar
    return "True, False" if isinstance(kind, click.types.BoolParamType) else kind.name


def row(param: click.Option) -> str:
    """One line of a table: flag, what it takes, default, meaning."""
    info = param.to_info_dict()
    default = info["default"]
    names = ", ".join(f"`{name}`" for name in sorted(param.opts, key=len, reverse=True))
    values = "" if param.is_flag else allowed(param)
    shown = "" if default is None or param.is_flag else str(default)
    cells = (names, values, shown, param.help or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def document() -> str:
    """The page."""
    lines = [INTRODUCTION]
    for name, module in COMMANDS.items():
        for full, command in leaves(name, importlib.import_module(module).main):
            lines += [f"## python {full}", "", (command.help or "").strip().splitlines()[0], ""]
            lines += ["| flag | values | default | meaning |", "|---|---|---|---|"]
            heading = None
            for param in command.params:
                if isinstance(param, click.Option):
                    if (section := getattr(param, "section", None)) != heading:
                        lines.append(f"| **{section}** | | | |")
                        heading = section
                    lines.append(row(param))
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(document(), encoding="utf-8")
