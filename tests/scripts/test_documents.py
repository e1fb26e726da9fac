"""Documents that quote the source keep up with it: error messages, examples of changes, links, flags."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_help import COMMANDS
from test_help import folder as folder  # a fixture
from tiny import ROOT, invoke, seven_steps

ROOMS = ("dnnlib", "torch_utils", "solvers", "models", "training")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_PAGES = ("own-teacher", "contributing", "changelog", "troubleshooting")


def read(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


# --- Troubleshooting -------------------------------------------------------------------------------------------------


def texts() -> set[str]:
    """Every string of the source, with … for what is put in."""
    found = set()
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    return found


MESSAGES = re.findall(r"^### `(.+)`$", read("troubleshooting"), re.M)


def test_every_message_of_the_troubleshooting_page_is_in_the_source():
    """Some are the rest of a sentence that begins with a path."""
    source = texts()
    assert len(MESSAGES) >= 20 and len(set(MESSAGES)) == len(MESSAGES)
    assert [message for message in MESSAGES if not {message, message.removeprefix("… ")} & source] == []


# --- Contributing ----------------------------------------------------------------------------------------------------

DIFFS = re.findall(r"^```diff\n(.+?)^```", read("contributing"), re.M | re.S)


@pytest.fixture
def changed(tmp_path) -> Path:
    """A copy of the program with every example of the page."""
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", *(ROOT / room for room in (*ROOMS, "tests"))):
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        else:
            shutil.copy(path, tmp_path)
    (tmp_path / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for diff in DIFFS:
        done = subprocess.run(
            ["git", "apply", "-"], input=diff, cwd=tmp_path, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    return tmp_path


def run_tests(folder: Path, chosen: str) -> str:
    files = [
        f"tests/{name}.py"
        for name in ("solvers/test_solvers", "scripts/test_energy", "models/test_registry", "models/test_edm_teachers")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the examples")
def test_examples_of_the_contributing_page_apply_and_pass_their_tests(changed):
    assert len(DIFFS) == 3
    chosen = "(order_of_convergence and kutta) or energy_distance or cifar10_with_classes or data_sets_of_the_program"
    assert "4 passed" in run_tests(changed, chosen)


@pytest.mark.slow
def test_examples_pass_what_every_solver_and_teacher_has_to(changed):
    run_tests(changed, "kutta or energy or cifar10_cond or data_sets_of_the_program")


# --- Commands, links and flags ---------------------------------------------------------------------------------------


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command of this program in the blocks of a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\.?bash\n(.+?)^```", text, re.M | re.S)
    return [
        shlex.split(line, comments=True)
        for block in blocks
        for line in re.findall(r"^(?:python|torchrun) .+", block, re.M)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_understood(page, folder, monkeypatch):
    """Up to where a dry run stops; those that have none are parsed. Runs of the folder are of another data set."""
    monkeypatch.setattr("models.opening._check_student", lambda *args: None)
    monkeypatch.setattr("training.config.source_settings", seven_steps)
    monkeypatch.setattr("train.settle", lambda config: config)
    before = sorted(folder.rglob("*"))
    for words in commands_of(page):
        joined = " ".join(words)
        name = next((name for name in COMMANDS if f" {name} " in f"{joined} "), None)
        if name is None:
            assert re.match(r"python (-m venv|tests/bench_metrics.py|-m pytest|assets/make_student.py)", joined), joined
            continue
        count = re.search(r"--nproc_per_node=(\d+)", joined)
        monkeypatch.setenv("WORLD_SIZE", count[1] if count else "1")
        script, *rest = [word for word in words[words.index(name.split()[0]) :] if word != "…"]
        if any(param.name == "dry_run" for param in COMMANDS[name].params):
            invoke(script.removesuffix(".py"), *rest, "--dry-run").ok()
        else:
            COMMANDS[name].make_context(name, rest[name.count(" ") :])
    assert sorted(folder.rglob("*")) == before


def test_the_python_of_the_readme_runs():
    code = re.search(r"^```python\n(.+?)^```", PAGES[0].read_text(encoding="utf-8"), re.M | re.S)[1]
    found: dict = {}
    exec(code, found)
    assert found["images"].shape == (64, 32, 32, 3) and found["images"].dtype == "uint8"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.+?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", OWN_PAGES)
def test_flags_that_a_page_names_exist(name):
    known = {option for command in COMMANDS.values() for param in command.params for option in param.opts}
    known |= {"--help", "--slow", "--standalone", "--nproc_per_node", "--no-deps", "--max-restarts"}  # of others
    known |= {"--num", "--numa-binding", "--precond", "--index-url", "--check", "--write"}
    named = {flag.rstrip("=") for flag in re.findall(r"(?<![\w-])(--[A-Za-z][\w-]+)", read(name))}
    assert named <= known, named - known
