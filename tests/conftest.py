"""Tests run from the repository root, on few threads: the networks are tiny and CI has two cores."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
for path in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(path))

torch.set_num_threads(1)
