"""Presets: flags of train.py under a name, with what is known of the result; `presets.yaml` beside this file has them.

    python -m training.presets                   the list, as `bash launch.sh` prints it
    python -m training.presets arguments NAME    the flags that a preset stands for
    python -m training.presets --write           bring the table of README.md up to date

The standard library alone, for `bash launch.sh` asks before anything is installed.
"""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).with_name("presets.yaml")
README = Path(__file__).resolve().parent.parent / "README.md"
KINDS = ("", "-3nfe", "-4nfe", "-5nfe", "-v", "-1nfe")


@dataclass(frozen=True)
class Preset:
    """A name for flags of train.py.

    Attributes:
        name: as `train.py --preset` takes it.
        flags: values of flags, without `--`, as they would be typed.
        gives: what the student is.
        fid, hours: published FID and A100 hours, "-" for none; several numbers for SFD-v, for num_steps 4 to 7.
        fd, minutes: measured Fréchet distance (EfficientNet-Lite0) and minutes on the CPU, "-" for none.
        holds: samples at a time that 24 GB hold.
    """

    name: str
    flags: dict[str, str] = field(default_factory=dict)
    gives: str = "-"
    fid: str = "-"
    hours: str = "-"
    fd: str = "-"
    minutes: str = "-"
    holds: str = "-"


KNOWN = ("gives", "fid", "hours", "fd", "minutes", "holds")


def read_entries(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """The sections of a file: section → name → key → text, every value as it stands there.

    Reads lines `section:` and, indented, `name: {key: text, …}` of YAML; quotes around a text are taken off.

    Raises:
        ValueError: a line is something else, or a name stands twice.
    """
    sections: dict[str, dict[str, dict[str, str]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if match := re.fullmatch(r"(\w+):", line):
            entries = sections.setdefault(match[1], {})
        elif sections and (match := re.fullmatch(r"  ([\w-]+): \{(.*)\}", line)) and match[1] not in entries:
            pairs = (part.split(": ", 1) for part in match[2].split(", "))
            entries[match[1]] = {key: value.strip('"') for key, value in pairs}
        else:
            raise ValueError(f"{FILE.name}:{number}: expected a new `name: {{key: text, …}}`, got {line!r}")
    return sections


def read_presets() -> dict[str, Preset]:
    """All presets by name, in the order of the file."""
    sections = read_entries(FILE.read_text(encoding="utf-8"))

    def resolve(entry: dict[str, str]) -> dict[str, str]:
        values: dict[str, str] = {}
        for name in entry.get("use", "").split():
            values = {**values, **resolve(sections["shared"][name])}
        return {**values, **{key: value for key, value in entry.items() if key != "use"}}

    presets = {}
    for name, entry in sections["presets"].items():
        values = resolve(entry)
        known = {key: values.pop(key) for key in KNOWN if key in values}
        presets[name] = Preset(name, values, **known)
    return presets


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        LookupError: there is none; the message names the nearest.
    """
    presets = read_presets()
    if name not in presets:
        near = difflib.get_close_matches(name, presets, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise LookupError(f"there is no preset '{name}'; {hint}run 'bash launch.sh' for the list")
    return presets[name]


# ------------------------------------------------------------------------------------------------------------------
# What is printed


def arguments(preset: Preset) -> list[str]:
    """The arguments of train.py that a preset stands for."""
    return [f"--{flag}={value}" for flag, value in preset.flags.items()]


def listing() -> str:
    """All presets, one a line, for a terminal."""
    rows = [("preset", "gives", "FID", "A100 hours", "24 GB hold")]
    rows += [(p.name, p.gives, p.fid, p.hours, p.holds) for p in read_presets().values()]
    rows.append(("test", "runs the tests", "-", "-", "-"))
    return "\n".join("  {:27}  {:25}  {:19}  {:10}  {}".format(*row) for row in rows)


def families() -> dict[str, list[Preset]]:
    """The six presets of each teacher, by what their names begin with: NFE 2 to 5, SFD-v, second stage."""
    presets = read_presets()
    return {name: [presets[name + kind] for kind in KINDS] for name in presets if f"{name}-v" in presets}


def markdown() -> str:
    """The table of README.md: a row for each teacher whose students have a number, and the names of the others."""

    def join(values: list[str]) -> str:
        return "–" if set(values) == {"-"} else " / ".join(values).replace("-", "–")

    lines = ["| NAME | FID, NFE 2 / 3 / 4 / 5 | SFD-v | NFE 1 | A100 hours | measured |", "|---|---|---|---|---|---|"]
    others = []
    for name, six in families().items():
        groups = {"": six[:4], "SFD-v ": six[4:5], "NFE 1 ": six[5:]}
        measured = [
            f"{kind}{join('/'.join(p.fd for p in group).split('/'))} in {join([p.minutes for p in group])} min"
            for kind, group in groups.items()
            if any(p.fd != "-" for p in group)
        ]
        if not measured and all(preset.fid == "-" for preset in six):
            others.append(f"`{name}`")
            continue
        cells = [join([p.fid for p in six[:4]]), join(six[4].fid.split("/")), six[5].fid.replace("-", "–")]
        cells += [join([p.hours for p in six]), "FD " + "; ".join(measured) if measured else "–"]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Without a published number: {', '.join(others)}.", ""])


def with_table(readme: str) -> str:
    """The text of README.md with the table as the file of presets has it."""
    start, end = "<!-- python -m training.presets --write -->\n", "<!-- end of presets -->\n"
    before, rest = readme.split(start, 1)
    return before + start + markdown() + end + rest.split(end, 1)[1]


def main(args: list[str]) -> int:
    """Run the command of the module's docstring; returns the exit code."""
    if not args:
        print(listing())
    elif args == ["--write"]:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    elif args[0] == "arguments" and len(args) == 2:
        try:
            print(*arguments(find_preset(args[1])))
        except LookupError as error:
            print(f"Error: {error.args[0]}", file=sys.stderr)
            return 2
    else:
        print("Error: usage: python -m training.presets [arguments NAME | --write]", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
