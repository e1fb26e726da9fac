"""`fid.py compare`: one table and one plot of a student, its teacher and training-free solvers."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from evaluating import evaluation, run, values, write_files
from PIL import Image
from tiny import (
    TRAIN,
    Patches,
    flags,
    invoke,
    known_as_tiny,
    newest_student,
    run_ranks,
    same,
    student,
    teacher,
    weights,
    write_teacher,
)  # fmt: skip

from dnnlib import UserError, sha256_of
from models.detectors import load_detector
from models.registry import ROWS, DatasetSpec
from prdc import compute_prdc
from torch_utils.checkpoint import read_network, save_network
from torch_utils.metrics.image_set import ImageDataset
from training.distill import Distiller
from training.evaluation import comparison
from training.evaluation import curve as curve_module
from training.evaluation import figures as figures_module
from training.evaluation.extractor import Extractor
from training.evaluation.figures import PRDC, as_csv, as_latex, as_markdown, draw_by_kimg, draw_comparison
from training.evaluation.records import read_records

NFES = {"teacher, Heun": [35], "Euler": [2, 3, 5], "DPM-Solver++": [2, 3, 5], "student": [2]}
pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("comparison"), 0, 20)


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """What is sampled from here on, emptied by whoever looks."""
    labels: list[str] = []
    real = Extractor.sampled
    monkeypatch.setattr(Extractor, "sampled", lambda *a, **k: labels.append(k["desc"]) or real(*a, **k))
    return labels


def arguments(files: Path, **changes) -> list[str]:
    common = dict(model_path=student(), seeds="0-8", ref=files / "real", outdir="out", nearest_k=2, precision="fp32")
    return ["compare", *evaluation(files, common, changes)]


def records() -> list[dict]:
    return read_records("out/metrics.jsonl")


def test_every_row_equals_what_the_other_commands_say(files):
    invoke("fid", *arguments(files)).ok()
    found = records()
    nfes = {label: [r["nfe"] for r in found if r["label"] == label] for label in NFES}
    assert nfes == NFES and len(found) == 8

    sampled = dict(seeds="0-8", ref=files / "real", precision="fp32")
    run("fid", "gen", files, **sampled, model_path=student()).ok()
    run("fid", "gen", files, **sampled, solver="dpmpp", num_steps=4, model_path=teacher()).ok()
    by_gen = values()
    by_label = {(r["label"], r["nfe"]): r for r in found}
    assert [by_label["student", 2]["value"], by_label["DPM-Solver++", 3]["value"]] == by_gen

    invoke("sample", *flags(model_path=student(), seeds="0-8", outdir="png", precision="fp32", device="cpu")).ok()
    real, fake = (torch.from_numpy(ImageDataset(place).load_all()) for place in (files / "real", Path("png")))
    expected = compute_prdc(Patches()(real).numpy(), Patches()(fake).numpy(), nearest_k=2)
    assert by_label["student", 2]["prdc"] == pytest.approx(expected)


def test_the_table_has_a_line_for_every_row_and_the_plot_is_a_picture(files):
    output = invoke("fid", *arguments(files)).ok().output
    lines = Path("out/metrics.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 10 and lines[2].startswith("| teacher, Heun | 35 |")
    assert "the student closes" in lines[-1] and lines[2] in output
    pytest.importorskip("matplotlib")
    with Image.open("out/metrics.png") as picture:
        assert picture.size[0] > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_second_run_computes_only_what_is_missing(files, computed):
    invoke("fid", *arguments(files)).ok()
    path = Path("out/metrics.jsonl")
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:3] + whole[4:]))
    computed.clear()
    invoke("fid", *arguments(files)).ok()
    assert computed == ["Euler, NFE 5"]
    values = {(r["label"], r["nfe"]): r["value"] for r in map(json.loads, whole)}
    assert {(r["label"], r["nfe"]): r["value"] for r in records()} == values
    invoke("fid", *arguments(files, seeds="0-9")).ok()
    assert len(computed) == 9


# --- Rows that ship --------------------------------------------------------------------------------------------------


def ship(monkeypatch, **changes) -> None:
    """All rows but the student's of `out` ship from now on, with these fields of their samplers changed."""
    rows = [r for r in records() if r["label"] != "student"]
    for row in rows:
        row["sampler"] |= {k: v for k, v in changes.items() if k in row["sampler"]}
        row |= {k: v for k, v in changes.items() if k not in row["sampler"]}
    Path("shipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(comparison, "SHIPPED", Path("shipped.jsonl"))


def test_rows_that_ship_are_used_where_everything_matches(files, monkeypatch, computed):
    invoke("fid", *arguments(files)).ok()
    table = Path("out/metrics.md").read_text()
    ship(monkeypatch)
    computed.clear()
    output = invoke("fid", *arguments(files, outdir="two")).ok().output
    assert computed == ["student, NFE 2"] and Path("two/metrics.md").read_text() == table
    assert "7 of 8 rows ship with this program" in output
    assert len(read_records("two/metrics.jsonl")) == 1
    computed.clear()
    output = invoke("fid", *arguments(files, outdir="two"), "--recompute").ok().output
    assert len(computed) == 8 and "ship with" not in output and len(read_records("two/metrics.jsonl")) == 9


@pytest.mark.parametrize(
    "changes",
    [{"sha256": "0" * 64}, {"precision": "bf16"}, {"protocol": comparison.PROTOCOL + 1}, {"detector_sha256": "0" * 64},
     {"reference_sha256": "0" * 64}, {"schedule_rho": 3.0}, {"max_order": 1}, {"denoise_to_zero": None}, {"seeds": "1-9"},
     {"nearest_k": 3}, {"resize": "other"}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_rows_of_another_teacher_or_other_settings_are_not(changes, files, monkeypatch, computed):
    invoke("fid", *arguments(files)).ok()
    ship(monkeypatch, **changes)
    computed.clear()
    invoke("fid", *arguments(files, outdir="two")).ok()
    assert len(computed) == 8


def test_a_teacher_that_was_replaced_is_noticed(files, monkeypatch, tmp_path):
    """A registered one: its students are refused, and those that do not say whose they are do not get its rows."""
    with known_as_tiny():
        invoke("train", *flags(TRAIN, dataset_name="tiny", total_kimg=0.008, outdir="run"), "--nosubdir").ok()
        invoke("fid", *arguments(files, model_path="run")).ok()
    ship(monkeypatch)
    path = newest_student(Path("run"))
    tensors, settings = read_network(path)
    assert settings["sampling"]["teacher_sha256"] == sha256_of(teacher())
    other = DatasetSpec("tiny", "embedded", (str(write_teacher(tmp_path / "other.safetensors", seed=5)),), 8)
    monkeypatch.setitem(ROWS, "tiny", other)
    invoke("fid", *arguments(files, model_path="run", outdir="two")).refused("is a student of another tiny than ships")
    invoke("train", *flags(TRAIN, dataset_name="tiny", outdir="run"), "--nosubdir").refused(
        "other settings .*teacher_sha256"
    )
    save_network("old.safetensors", tensors, {**settings, "sampling": {**settings["sampling"], "teacher_sha256": None}})
    invoke("fid", *arguments(files, model_path="old.safetensors", outdir="two")).ok()
    values = [
        {(r["label"], r["nfe"]): r["value"] for r in read_records(f"{place}/metrics.jsonl")} for place in ("out", "two")
    ]
    assert len(values[1]) == 8
    assert values[0].pop(("student", 2)) == values[1].pop(("student", 2))
    assert all(values[0][key] != values[1][key] for key in values[0])


def test_a_variable_student_is_shown_at_every_nfe(files):
    with known_as_tiny():
        invoke("fid", *arguments(files, model_path=student("variable"))).ok()
    assert [r["nfe"] for r in records() if r["label"] == "student"] == [2, 3, 4, 5]


def test_more_students_of_a_teacher_are_rows_of_their_own(files, computed):
    paths = [student(kind) for kind in ("second-variable", "seven", "plain")]
    more = [f"--also={path}" for path in paths]
    with known_as_tiny():
        invoke("fid", *arguments(files, model_path=student("variable")), *more).ok()
        name = f"{paths[2].name}-{newest_student(paths[2]).stem}"
        labels = ["student", "student, second stage", "student, SFD", f"student, SFD ({name})"]
        nfes = {label: [r["nfe"] for r in records() if r["label"] == label] for label in labels}
        assert list(nfes.values()) == [[2, 3, 4, 5], [1], [5], [2]]
        # A row of one comparison is one of another, whatever it was called there.
        computed.clear()
        invoke("fid", *arguments(files, model_path=paths[2])).ok()
    assert computed == [] and Path("out/metrics.md").read_text().splitlines()[-3].startswith("| student | 2 |")


def test_students_of_other_teachers_are_compared_apart(files):
    invoke("fid", *arguments(files), f"--also={student('classes')}").refused(
        "--also: .* is a student of another teacher"
    )
    invoke("fid", *arguments(files), f"--also={teacher()}").refused("--also: is a teacher; expected a student")
    invoke("fid", *arguments(files), "--also=nowhere").refused("nowhere")
    invoke("fid", *arguments(files), *[f"--also={student()}"] * 3).refused("--also: .* is there twice")


def test_two_processes_give_the_same_numbers(files, tmp_path):
    invoke("fid", *arguments(files, outdir="one")).ok()
    run_ranks("fid", [*arguments(files), "--batch=2"], tmp_path, processes=2).ok()
    one = read_records("one/metrics.jsonl")
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
    real = figures_module.importlib.util.find_spec
    monkeypatch.setattr(figures_module.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else real(n))
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
    invoke("fid", *arguments(files, model_path=teacher())).refused("expected a student")


@pytest.mark.slow
def test_a_short_run_of_the_preset_beats_training_free_solvers(tmp_path):
    invoke("train", "--preset=emoji32", "--total_kimg=1", "--outdir=run", "--nosubdir", "--device=cpu").ok()
    detector = ["--detector=efficientnet-lite0", "--device=cpu"]
    invoke("fid", "compare", "--model_path=run", "--ref=emoji32", "--seeds=0-399", *detector).ok()
    found = {(r["label"], r["nfe"]): r["value"] for r in map(json.loads, open("run/metrics.jsonl", encoding="utf-8"))}
    student, teacher = found["student", 2], found[comparison.BEST, 35]
    solvers = [found[label, nfe] for label in ("Euler", "DPM-Solver++") for nfe in (2, 3)]
    assert teacher < student < min(solvers)


# --- Figures and tables ----------------------------------------------------------------------------------------------


def made_up(label: str, nfe: int, value: float, **shares: float) -> dict:
    prdc = {**dict.fromkeys(PRDC, 0.5), **shares}
    facts = {"N": 2000, "seeds": "0-1999", "reference": "data/emoji.zip", "reference_N": 3926, "detector": "x_y"}
    return {"label": label, "nfe": nfe, "value": value, "metric": "FD(x_y)", "prdc": prdc, **facts}


RESULTS = [made_up("student", 2, 30.0), made_up("teacher, Heun", 35, 10.0, recall=0.9), made_up("Euler", 2, 90.0, recall=0.7),
           made_up("student", 3, 20.5), made_up("DPM-Solver++", 3, 40.0)]  # fmt: skip


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_figures_have_the_format_of_their_suffix(suffix, magic):
    pytest.importorskip("matplotlib")
    draw_comparison(RESULTS, Path(f"deep/x{suffix}"))
    draw_by_kimg([{**RESULTS[0], "series": "a", "kimg": k} for k in (1, 2)], Path(f"deep/y{suffix}"))
    assert all(Path(f"deep/{name}{suffix}").read_bytes().startswith(magic) for name in "xy")
    with pytest.raises(UserError, match="no figure"):
        draw_comparison(RESULTS, Path("x.txt"))


def test_figures_say_what_they_show():
    """Arrows, number of images, reference; names in one order whatever the order of the results."""
    pytest.importorskip("matplotlib")
    for results in (RESULTS, RESULTS[::-1]):
        draw_comparison(results, Path("x.svg"))
        text = Path("x.svg").read_text(encoding="utf-8")
        for words in ("FD(x_y) ↓", "recall ↑", "density ↑", "2,000 images, reference emoji.zip (3,926)"):
            assert words in text
        names = ["teacher, Heun, NFE 35", "DPM-Solver++", "Euler", "student"]
        places = [text.rindex(f">{name}<") for name in names]
        assert places == sorted(places)


def test_error_bars_where_there_were_trials(monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, *a, **k: drawn.append(a) or original(self, *a, **k))
    trials = {"series": "a", "value": 1.0, "mean": 2.0, "std": 0.5, "trials": [1.0, 3.0], "metric": "FID"}
    draw_by_kimg([{**trials, "kimg": 1}, {**trials, "kimg": 2}], Path("x.png"))
    draw_by_kimg([{"series": "a", "value": 1.0, "metric": "FID", "kimg": 1}], Path("x.png"))
    assert drawn == [([1, 2], [2.0, 2.0], [0.5, 0.5])]


def test_distances_stand_against_what_training_took_where_all_of_them_say(tmp_path):
    pytest.importorskip("matplotlib")
    plain = [{**RESULTS[0], "series": "a", "kimg": k} for k in (1, 2)]
    costs = [{**r, "training_seconds": 60.0 * r["kimg"], "training_flops": 1e15 * r["kimg"]} for r in plain]
    axes = [b"kimg", b"minutes of training", b"PFLOP of training"]
    for records, expected in ((costs, axes), (plain, axes[:1]), ([plain[0], costs[1]], axes[:1])):
        draw_by_kimg(records, Path("x.svg"))
        assert [name for name in axes if b">" + name + b"<" in Path("x.svg").read_bytes()] == expected


def test_tables_hold_the_same_numbers():
    lines = as_markdown(RESULTS).splitlines()
    rows = list(csv.DictReader(io.StringIO(as_csv(RESULTS))))
    tex = as_latex(RESULTS)
    assert len(lines) == 2 + len(RESULTS) and lines[5] == "| student | 3 | 20.5 | 0.500 | 0.500 | 0.500 | 0.500 |"
    assert [(r["sampler"], int(r["nfe"]), float(r["value"])) for r in rows] == [
        (r["label"], r["nfe"], r["value"]) for r in RESULTS
    ]
    assert rows[0]["reference_N"] == "3926" and rows[1]["recall"] == "0.9"
    assert r"FD(x\_y) $\downarrow$ & precision $\uparrow$" in tex and r"student & 3 & \textbf{20.5} & " in tex
    assert r"Euler & 2 & 90 & \textbf{0.500} & \textbf{0.700} &" in tex  # the teacher's recall is none of a rival
    assert tex.count(r"\\") == 1 + len(RESULTS) and tex.count("&") == 6 * (1 + len(RESULTS))


# --- Snapshots of a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def run_of_three(tmp_path) -> Path:
    """The same student three times, under the names of three snapshots."""
    folder = tmp_path / "exps" / "00000-tiny"
    folder.mkdir(parents=True)
    (source,) = student().glob("network-snapshot-*.safetensors")
    for kimg in (0, 16, 1000000):
        shutil.copy(source, folder / f"network-snapshot-{kimg:06d}.safetensors")
    return folder


def curve(files: Path, run="0", **changes):
    common = dict(seeds="0-8", ref=files / "real", precision="fp32")
    return invoke("fid", "curve", run, *evaluation(files, common, changes))


def test_a_curve_has_every_snapshot_and_computes_none_twice(files, run_of_three, monkeypatch):
    output = curve(files).ok().output
    found = read_records(run_of_three / "metrics.jsonl")
    assert [record["kimg"] for record in found] == [0, 16, 1000000] and len({record["value"] for record in found}) == 1
    assert "16 kimg: FD(patches.pt) " in output
    assert all(record["training_seconds"] > 0 and record["training_flops"] > 0 for record in found)
    run("fid", "gen", files, seeds="0-8", ref=files / "real", precision="fp32", model_path=student()).ok()
    assert values() == [found[0]["value"]]

    (run_of_three / "network-snapshot-000016.safetensors").rename(run_of_three / "network-snapshot-000020.safetensors")
    computed = []
    original = Extractor.sampled
    monkeypatch.setattr(Extractor, "sampled", lambda *a, **k: computed.append(k["desc"]) or original(*a, **k))
    curve(files).ok()
    assert computed == ["network-snapshot-000020"]
    curve(files, seeds="0-7").ok()
    assert len(computed) == 4 and len(read_records(run_of_three / "metrics.jsonl")) == 7
    if importlib.util.find_spec("matplotlib"):
        assert (run_of_three / "fd-kimg.png").exists()
        curve(files, figure="x.pdf").ok()
        assert Path("x.pdf").read_bytes().startswith(b"%PDF")
        invoke("training.plot", "0", "--fd=kimg").refused("cannot be compared")  # of 9 and of 8 images


def test_a_curve_of_nothing_is_one_line(files, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, changes, words in (
        ("empty", {}, "empty holds no network-snapshot"), ("7", {}, "run 7 does not exist"),
        ("empty", dict(figure="x.jpg"), "--figure: x.jpg is no figure"),
    ):  # fmt: skip
        curve(files, run=place, **changes).refused(words)


# --- Along a training run --------------------------------------------------------------------------------------------


def trained(files: Path, outdir: str, *more, **changes):
    (files / "named.pth").touch()
    own = {"model_path": teacher(), "outdir": outdir, "snap": 1, "eval_detector": files / "named.pth"}
    return invoke("train", *flags(TRAIN, own, changes), "--nosubdir", *more)


def test_snapshots_are_evaluated_along_the_way_and_training_does_not_notice(files, monkeypatch):
    """As `fid.py curve` does it afterwards, which then has nothing left to do; the weights are those of a run without."""
    detector = load_detector(str(files / "patches.pt"), "cpu", runs_code=True)
    monkeypatch.setattr(curve_module, "load_detector", lambda *args: detector)
    output = trained(files, "with", eval_every=1, eval_num=9, eval_ref=files / "real").ok().output
    trained(files, "without").ok()
    found = read_records("with/metrics.jsonl")
    assert len(found) >= 4 and all(record["N"] == 9 and record["kimg"] == 0 for record in found)
    assert f"FD(patches.pt) {found[-1]['value']:g} of 9 images at kimg 0" in output
    assert same(weights(Path("with")), weights(Path("without"))) and not Path("without/metrics.jsonl").exists()
    curve(files, run="with").ok()
    assert read_records("with/metrics.jsonl") == found


def test_a_run_that_was_interrupted_is_evaluated_where_another_is(files, monkeypatch):
    detector = load_detector(str(files / "patches.pt"), "cpu", runs_code=True)
    monkeypatch.setattr(curve_module, "load_detector", lambda *args: detector)
    often = dict(eval_every=2, eval_num=9, eval_ref=files / "real")
    trained(files, "whole", **often).ok()
    real, calls = Distiller.iterate, []
    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "iterate", lambda *args: calls.append(1) or real(*args) if len(calls) < 3 else [][0])
        assert trained(files, "parts", **often).code != 0
    trained(files, "parts", **often).ok()
    values = [[r["value"] for r in read_records(f"{name}/metrics.jsonl")] for name in ("whole", "parts")]
    assert values[0] == values[1] and len(values[0]) == 2  # after 32 images, and the last


def test_a_run_killed_before_its_last_evaluation_gets_it_by_the_same_command(files, monkeypatch):
    detector = load_detector(str(files / "patches.pt"), "cpu", runs_code=True)
    monkeypatch.setattr(curve_module, "load_detector", lambda *args: detector)
    wanted = dict(eval_every=1000, eval_num=9, eval_ref=files / "real")
    with monkeypatch.context() as patch:
        patch.setattr(curve_module.Evaluation, "__call__", lambda *args: [][0])
        assert trained(files, "out", **wanted).code != 0
    assert "already finished" in trained(files, "out").ok().output and not Path("out/metrics.jsonl").exists()
    for _ in range(2):  # what was found stays
        assert "FD(patches.pt)" in trained(files, "out", **wanted).ok().output
        assert len(read_records("out/metrics.jsonl")) == 1


def test_an_evaluation_that_cannot_be_is_refused_before_the_run(files):
    for changes, words in (
        (dict(eval_every=1), "--eval_ref: .*no reference"),
        (dict(eval_every=1, eval_ref="nowhere.npz"), "--eval_ref: nowhere.npz is no reference"),
        (dict(eval_every=1, eval_ref=files / "real", eval_detector="nothing"), "--eval_detector|nothing is unknown"),
    ):
        trained(files, "out", **changes).refused(words)
    assert not Path("out").exists()
