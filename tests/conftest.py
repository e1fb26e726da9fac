"""Tests run from the repository root, on few threads: the networks are tiny and CI has two cores."""

import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
# A shell starts what it puts into the background deaf to Ctrl-C, which tests send to the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch):
    """A dry run times the machine for five seconds; tests/training/test_cost.py looks at that, the others do without."""
    monkeypatch.setattr("train.estimate", lambda *args: "Time: not measured")


@pytest.fixture
def in_temporary_folder(tmp_path, monkeypatch):
    """For modules whose tests write where they are: `pytestmark = pytest.mark.usefixtures("in_temporary_folder")`."""
    monkeypatch.chdir(tmp_path)
