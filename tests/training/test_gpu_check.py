"""`bash launch.sh gpu-check --tiny`: every section of it, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu_check.py"
SECTIONS = ["machine", "values", "iteration", "overflow", "attention", "sampling", "resume", "evaluation", "emoji32"]


@pytest.mark.slow
def test_all_of_it_passes_on_the_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", f"--out={tmp_path}", "--seconds=3000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    kinds = {kind: [r["name"] for r in results if r["kind"] == kind] for kind in ("PASS", "FAIL", "SKIP", "INFO")}
    assert kinds["FAIL"] == [] and len(kinds["PASS"]) >= 45 and len(kinds["SKIP"]) == 1
    assert [name for name in kinds["INFO"] if name.startswith("section")] == [f"section {name}" for name in SECTIONS]


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(SCRIPT), f"--out={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU is visible to torch; --tiny runs on the CPU" in done.stderr
