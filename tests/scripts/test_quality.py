"""The style and the types of the whole project, as pyproject.toml asks for them."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

PINNED = re.search(r"^torch==(\S+)", (ROOT / "tests" / "constraints.txt").read_text(), re.M)[1]


def run_tool(*command: str) -> None:
    process = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        pytest.fail(f"{' '.join(command)}\n{process.stdout}{process.stderr}", pytrace=False)


def test_ruff_finds_nothing():
    run_tool("ruff", "check", "--output-format=concise", ".")


def test_ruff_would_format_nothing():
    run_tool("ruff", "format", "--check", ".")


@pytest.mark.skipif(torch.__version__.split("+")[0] != PINNED, reason=f"types are checked against torch {PINNED}")
def test_mypy_finds_nothing():
    run_tool("mypy", "--no-error-summary")
