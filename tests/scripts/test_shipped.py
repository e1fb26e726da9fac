"""What ships of the embedded student: its file, the rows of its teacher, its pictures and tables; and how they are made."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import ROOT, invoke

from dnnlib import sha256_of
from models import load_student
from models.detectors import LITE
from models.opening import open_sampler
from models.registry import ASSETS, ROWS
from models.sampling import SamplerOptions
from torch_utils.checkpoint import read_settings
from torch_utils.device import PRECISIONS
from training.evaluation import comparison
from training.evaluation.records import read_records
from training.presets import find_preset

pytestmark = pytest.mark.usefixtures("in_temporary_folder")
STUDENT, TEACHER = ASSETS / "emoji32-student.safetensors", ROWS["emoji32-cond"].path
SHOWN = {"teacher, Heun": [35], "Euler": [2, 3, 5], "DPM-Solver++": [2, 3, 5]}
SPEC = importlib.util.spec_from_file_location("make_student", ROOT / "assets" / "make_student.py")
make_student = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_student)


def shipped(precision: str = "bf16") -> dict[tuple[str, int], dict]:
    rows = [r for r in read_records(comparison.SHIPPED) if r["sampler"]["precision"] == precision]
    return {(r["label"], r["nfe"]): r for r in rows}


@pytest.mark.parametrize("preset", make_student.STUDENTS)
def test_students_are_small_and_say_what_made_them(preset):
    """Half precision, distilled from the teacher that ships, by the preset."""
    student, _ = make_student.STUDENTS[preset]
    assert student.stat().st_size <= 4.4e6
    with safe_open(str(student), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    settings = read_settings(student)
    assert settings["sampling"]["teacher_sha256"] == sha256_of(TEACHER)
    training = {name.replace("-", "_"): str(value) for name, value in settings["training"].items()}
    for name, value in find_preset(preset).flags.items():
        found = training.get(name.replace("-", "_"))
        if name not in ("tick", "snap", "dump"):
            assert found == value or float(found) == float(value), name


@pytest.mark.parametrize("preset", make_student.STUDENTS)
def test_their_images_are_there_in_a_moment(preset):
    student, _ = make_student.STUDENTS[preset]
    images = load_student(student).sample(range(16))
    assert images.shape == (16, 32, 32, 3) and images.std() > 30
    assert len({image.tobytes() for image in images}) == 16
    invoke("sample", f"--model_path={student}", "--seeds=0-15", "--grid=True", "--outdir=x", "--device=cpu").ok()
    with Image.open("x/grid.png") as grid:
        assert grid.size[1] == 4 * 64


@pytest.mark.parametrize("precision", make_student.PRECISIONS)
def test_the_rows_are_those_that_the_quickstart_asks_for(precision):
    """As this version identifies them; what changes one of these numbers has to raise `PROTOCOL`."""
    rows = shipped(precision)
    assert set(rows) == {(label, nfe) for label, nfes in SHOWN.items() for nfe in nfes}
    opened = open_sampler(str(STUDENT), None, SamplerOptions(), torch.device("cpu"), PRECISIONS[precision])
    samplers = {(s.label, s.sampler.nfe): s for s in comparison.samplers(opened, precision)}
    sha256, _ = LITE["efficientnet-lite0"]
    for key, row in rows.items():
        assert row["sampler"] == {**samplers[key].identity, "nfe": key[1]} and row["sampler"]["sha256"] == sha256_of(
            TEACHER
        )
        assert (row["protocol"], row["seeds"], row["N"], row["nearest_k"]) == (comparison.PROTOCOL, "0-1999", 2000, 5)
        assert (row["reference"], row["reference_sha256"]) == ("emoji32", sha256_of(ASSETS / "emoji-32x32.zip"))
        assert (row["detector"], row["detector_sha256"]) == ("efficientnet-lite0", sha256)
        assert set(row["versions"]) == {"python", "torch", "numpy"} and row["date"]
    command = next(line for line in (ROOT / "launch.sh").read_text().splitlines() if "fid.py compare" in line)
    assert "--seeds=0-1999 --ref=emoji32 --detector=efficientnet-lite0" in command


def test_the_tables_are_of_these_rows():
    table = (ASSETS / "metrics.md").read_text(encoding="utf-8")
    assert any(
        all(f"| {label} | {nfe} | {row['value']:.4g} |" in table for (label, nfe), row in shipped(precision).items())
        for precision in make_student.PRECISIONS
    )
    for preset, (_, label) in make_student.STUDENTS.items():
        own = re.findall(rf"^\| {label} \| \d \| ([\d.]+) \|", table, re.M)
        assert [float(fd) for fd in find_preset(preset).fd.split("/")] == pytest.approx(list(map(float, own)), abs=0.1)
    compared = (ASSETS / "compare.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([^|]+) \| (\d+) \|", compared, re.M) == [
        ("teacher, Heun", "35"), ("Euler", "2"), ("DPM-Solver++", "2"), ("DPM-Solver++", "5"), ("student", "2"),
        ("student, second stage", "1"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_row_that_ships_is_what_is_computed():
    """One of the cheapest, anew, with the whole number of images; machines may round otherwise."""
    row = shipped()["Euler", 2]
    invoke("fid", "gen", "--model_path=teacher", "--dataset_name=emoji32-cond", "--solver=euler", "--num_steps=3", "--ref=emoji32",
           "--seeds=0-1999", "--detector=efficientnet-lite0", "--precision=bf16", "--device=cpu").ok()  # fmt: skip
    assert read_records("metrics.jsonl")[0]["value"] == pytest.approx(row["value"], rel=0.01)


# --- How it is made --------------------------------------------------------------------------------------------------


def test_rows_of_others_do_not_ship():
    rows = list(shipped().values())
    sha256 = rows[0]["sampler"]["sha256"]
    other = {**rows[0], "sampler": {**rows[0]["sampler"], "sha256": "0" * 64}}
    student = {**rows[0], "label": "student", "sampler": {"sha256": sha256, "num_steps": 4, "precision": "bf16"}}
    older = {**rows[1], "protocol": comparison.PROTOCOL - 1}
    newer = {**rows[2], "value": 1.0}
    found = make_student.rows_of(sha256, [other, student, *rows, older, newer])
    assert found == [*rows[:2], newer, *rows[3:]]


def test_the_result_goes_into_the_preset():
    text = "shared:\n  emoji32: {x: 1}\n\npresets:\n  emoji32: {use: emoji32 nfe2, total_kimg: 20%s}\n  emoji32-v: {}\n"
    for before in ("", ", fd: 1.0, minutes: 2", ", fd: 1.0/2.0, minutes: 2"):
        assert make_student.with_result(text % before, "emoji32", [719.14], 41.6) == text % ", fd: 719.1, minutes: 42"
    own = make_student.PRESETS.read_text(encoding="utf-8")
    for name in make_student.STUDENTS:
        pairs = zip(make_student.with_result(own, name, [1, 2], 3).split("\n"), own.split("\n"), strict=True)
        (line,) = [changed for changed, before in pairs if changed != before]
        assert line.startswith(f"  {name}: ") and line.endswith(", fd: 1.0/2.0, minutes: 3}")


@pytest.mark.slow
def test_the_command_replaces_all_that_ships(tmp_path):
    """In a copy of the program, on another teacher, with few images; a second run finds everything done."""
    copy = tmp_path / "program"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".git", "exps", "teachers", "tests", "docs", "*cache*", ".venv", "src"),
    )
    (copy / "README.md").write_text(ROOT.joinpath("README.md").read_text(encoding="utf-8"), encoding="utf-8")
    before = {path.name: sha256_of(path) for path in (copy / "assets").iterdir()}
    teacher = tmp_path / "teacher.safetensors"
    from torch_utils.checkpoint import read_network, save_network

    tensors, settings = read_network(TEACHER)
    save_network(teacher, {name: tensor * 1.01 for name, tensor in tensors.items()}, settings)
    command = [sys.executable, "assets/make_student.py", f"--teacher={teacher}", "--seeds=0-15", "--", "--total_kimg=0.016",
               "--tick=0.016", "--snap=1"]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        after = {path.name: sha256_of(path) for path in (copy / "assets").iterdir()}
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {"emoji32-cond-teacher.safetensors", *(path.name for path, _ in make_student.STUDENTS.values()),
                           "emoji32-rows.jsonl", "metrics.md", "metrics.png", "compare.md", "compare.png"}  # fmt: skip
    rows = [json.loads(line) for line in (copy / "assets" / "emoji32-rows.jsonl").read_text().splitlines()]
    assert len(rows) == 14 and {row["N"] for row in rows} == {16}
    assert {row["sampler"]["sha256"] for row in rows} == {
        sha256_of(copy / "assets" / "emoji32-cond-teacher.safetensors")
    }
    assert read_settings(copy / "assets" / "emoji32-student.safetensors")["training"]["total_kimg"] == 0.016
    presets = (copy / "training" / "presets.yaml").read_text()
    for name, count in (("emoji32", 1), ("emoji32-v", 4), ("emoji32-1nfe", 1)):
        assert len(re.search(rf"^  {name}: .* fd: ([^,]*), minutes", presets, re.M)[1].split("/")) == count
    assert Path(copy / "README.md").read_text(encoding="utf-8") != (ROOT / "README.md").read_text(encoding="utf-8")
