"""`fid.py compare`: one table and one plot of a student, its teacher and training-free solvers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import ROOT, flags, invoke, known_as_tiny, run_ranks, student, teacher, write_images

from prdc import compute_prdc
from torch_utils.metrics.image_set import ImageDataset
from training.evaluation import comparison

NFES = {"teacher, Heun": [35], "Euler": [2, 3, 5], "DPM-Solver++": [2, 3, 5], "student": [2]}


class Colours(torch.nn.Module):
    """Three features: mean colours."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3)) / 64


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("comparison")
    torch.jit.script(Colours()).save(str(root / "colours.pt"))
    write_images(root / "real", 20, seed=2)
    return root


def arguments(files: Path, **changes) -> list[str]:
    common = dict(model_path=student(), seeds="0-8", ref=files / "real", detector=files / "colours.pt", outdir="out",
                  nearest_k=2, precision="fp32", device="cpu")  # fmt: skip
    return ["compare", *flags(common, changes), "--detector-runs-code"]


def records() -> list[dict]:
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]


def test_every_row_equals_what_the_other_commands_say(files):
    invoke("fid", *arguments(files)).ok()
    found = records()
    nfes = {label: [r["nfe"] for r in found if r["label"] == label] for label in NFES}
    assert nfes == NFES and len(found) == 8

    common = dict(detector=files / "colours.pt", device="cpu")
    sampled = dict(seeds="0-8", ref=files / "real", precision="fp32")
    invoke("fid", "gen", *flags(common, sampled, model_path=student()), "--detector-runs-code").ok()
    solver = dict(solver="dpmpp", num_steps=4, model_path=teacher())
    invoke("fid", "gen", *flags(common, sampled, **solver), "--detector-runs-code").ok()
    by_gen = [json.loads(line)["value"] for line in Path("metrics.jsonl").read_text().splitlines()]
    by_label = {(r["label"], r["nfe"]): r for r in found}
    assert [by_label["student", 2]["value"], by_label["DPM-Solver++", 3]["value"]] == by_gen

    invoke("sample", *flags(model_path=student(), seeds="0-8", outdir="png", precision="fp32", device="cpu")).ok()
    real, fake = (torch.from_numpy(ImageDataset(place).load_all()) for place in (files / "real", Path("png")))
    expected = compute_prdc(Colours()(real).numpy(), Colours()(fake).numpy(), nearest_k=2)
    assert by_label["student", 2]["prdc"] == pytest.approx(expected)


def test_the_table_has_a_line_for_every_row_and_the_plot_is_a_picture(files):
    output = invoke("fid", *arguments(files)).ok().output
    lines = Path("out/metrics.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 10 and lines[2].startswith("| teacher, Heun | 35 |")
    assert "the student closes" in lines[-1] and lines[2] in output
    pytest.importorskip("matplotlib")
    with Image.open("out/metrics.png") as picture:
        assert picture.size[0] > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_second_run_computes_only_what_is_missing(files, monkeypatch):
    invoke("fid", *arguments(files)).ok()
    path = Path("out/metrics.jsonl")
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:3] + whole[4:]))
    labels = []
    real = comparison.extract
    monkeypatch.setattr(comparison, "extract", lambda *a, **k: labels.append(a[-1]) or real(*a, **k))
    invoke("fid", *arguments(files)).ok()
    assert labels == ["Euler, NFE 5"]
    values = {(r["label"], r["nfe"]): r["value"] for r in map(json.loads, whole)}
    assert {(r["label"], r["nfe"]): r["value"] for r in records()} == values
    invoke("fid", *arguments(files, seeds="0-9")).ok()
    assert len(labels) == 9


def test_a_variable_student_is_shown_at_every_nfe(files):
    with known_as_tiny():
        invoke("fid", *arguments(files, model_path=student("variable"))).ok()
    assert [r["nfe"] for r in records() if r["label"] == "student"] == [2, 3, 4, 5]


def test_two_processes_give_the_same_numbers(files, tmp_path):
    invoke("fid", *arguments(files, outdir="one")).ok()
    run_ranks("fid", [*arguments(files), "--batch=2"], tmp_path, processes=2).ok()
    one = [json.loads(line) for line in Path("one/metrics.jsonl").read_text().splitlines()]
    assert [r["value"] for r in records()] == pytest.approx([r["value"] for r in one], rel=1e-9)
    assert [r["prdc"] for r in records()] == [pytest.approx(r["prdc"]) for r in one]


def test_the_gap_is_measured_from_the_best_solver_at_the_same_nfe():
    def result(label, nfe, value):
        return {"label": label, "nfe": nfe, "value": value, "metric": "FID"}

    rows = [result("teacher, Heun", 35, 10.0), result("Euler", 2, 90.0), result("DPM-Solver++", 2, 110.0),
            result("DPM-Solver++", 3, 20.0), result("student", 2, 30.0), result("student", 3, 15.0)]  # fmt: skip
    assert "closes 75 % of the gap in FID between Euler and" in comparison.closed_gap(rows)
    assert comparison.closed_gap([*rows[:1], result("student", 4, 12.0)]) is None


def test_without_matplotlib_the_table_is_still_written(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    real = comparison.importlib.util.find_spec
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else real(n))
    output = invoke("fid", *arguments(files)).ok().output
    assert "pip install matplotlib" in output and Path("out/metrics.md").exists()
    assert not Path("out/metrics.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": "0-1"}, "too few for --nearest_k=2"),
        ({"model_path": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"ref": "nowhere.npz"}, "nowhere.npz"),
    ],
)
def test_bad_input_is_one_line(files, changes, words):
    invoke("fid", *arguments(files, **changes)).refused(words)


def test_a_teacher_is_refused(files):
    invoke("fid", *arguments(files, model_path=teacher())).refused("expected the student")


@pytest.mark.slow
def test_a_short_run_of_the_preset_beats_training_free_solvers(tmp_path):
    preset = subprocess.run(["bash", ROOT / "launch.sh", "arguments", "emoji32"], capture_output=True, text=True)
    invoke("train", *preset.stdout.split(), "--total_kimg=1", "--outdir=run", "--nosubdir", "--device=cpu").ok()
    detector = ["--detector=efficientnet-lite0", "--device=cpu"]
    invoke("fid", "compare", "--model_path=run", "--ref=emoji32", "--seeds=0-399", *detector).ok()
    found = {(r["label"], r["nfe"]): r["value"] for r in map(json.loads, open("run/metrics.jsonl", encoding="utf-8"))}
    student, teacher = found["student", 2], found[comparison.BEST, 35]
    solvers = [found[label, nfe] for label in ("Euler", "DPM-Solver++") for nfe in (2, 3)]
    assert teacher < student < min(solvers)
