"""What is missing of requirements: `launch.sh` asks with the Python that is to run the program.

    python dnnlib/packages.py FILE.txt|REQUIREMENT…

prints one requirement a line, none if all is there. The standard library alone; it is run by its path, for the package
around it needs some of what may be missing. pip is not asked: an environment may lack it, and it counts a torch without
metadata (built in place, or on PYTHONPATH) as none.
"""

import re
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

TORCH = "torch>=2.4"
PATTERN = re.compile(r"([\w.-]+?)(?:(==|>=)([\w.+*]+))?")


def requirements(words: list[str]) -> Iterator[str]:
    """The requirements of files, with those that they include by `-r`, and of words that are requirements already."""
    for word in words:
        if not word.endswith(".txt"):
            yield word
            continue
        for line in Path(word).read_text(encoding="utf-8").splitlines():
            text = line.split("#")[0].strip()
            if text.startswith("-r "):
                yield from requirements([str(Path(word).parent / text[3:].strip())])
            elif text:
                yield text


def installed(name: str) -> str | None:
    """The version of a package in this environment; of a torch without metadata what `torch/version.py` says."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        spec = util.find_spec("torch") if name == "torch" else None
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__\s*(?::.*)?=\s*['\"](.+?)['\"]", text)
    return found[1] if found else None


def release(version: str) -> list[int]:
    """The numbers that a version begins with, without zeros at the end: `2.5.0a0+cu121` is 2.5."""
    start = re.match(r"[\d.]*", version)
    numbers = [int(part) for part in start[0].split(".") if part] if start else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def is_met(requirement: str) -> bool:
    """Whether the environment has `name`, `name>=1.2`, `name==1.2` or `name==1.*`.

    Raises:
        ValueError: the requirement is written in another way.
    """
    match = PATTERN.fullmatch(requirement.replace(" ", ""))
    if match is None:
        raise ValueError(f"requirement {requirement!r} is none of name, name>=1.2, name==1.2, name==1.*")
    name, sign, wanted = match.groups()
    version = installed(name)
    if version is None or sign is None:
        return version is not None
    if sign == ">=":
        return release(version) >= release(wanted)
    if wanted.endswith(".*"):
        return version.startswith(wanted[:-1])
    return release(version) == release(wanted)


def main(words: list[str]) -> int:
    """Print what is missing; returns the exit code, 2 for a torch that is too old."""
    missing = [text for text in requirements(words) if not is_met(text)]
    for text in missing:
        version = installed("torch") if re.split("[=>]", text)[0] == "torch" else None
        if version is not None:
            print(
                f"Error: {sys.prefix} has torch {version}, and {text} is needed; an installed torch is never changed "
                "here: replace it yourself, or use another environment",
                file=sys.stderr,
            )
            return 2
    print(*missing, sep="\n", end="\n" if missing else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
