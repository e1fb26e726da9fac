"""sample.py: one image for each seed whatever the batch and the number of processes, folders, archives, NFE, refusals."""

from __future__ import annotations

import json
import re
import signal
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import (
    SAMPLE,
    class_teacher,
    flags,
    invoke,
    known_as_tiny,
    newest_student,
    only_run,
    pixels,
    png_names,
    run_ranks,
    run_script,
    student,
    teacher,
    train_flags,
    write_teacher,
)  # fmt: skip

from dnnlib import UserError
from models import opening, sampling
from models.precond import EDMPrecond
from torch_utils.checkpoint import read_settings
from torch_utils.metrics.image_set import ImageDataset
from training.options import parse_seeds


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sample(model, *more, **changes):
    return invoke("sample", *flags(SAMPLE, {"model_path": model}, changes), *more)


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in png_names(folder)}


# --- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "5-1", "1,,2", "1.5", "0-4294967296", "4294967296", "1 2", "0x10", "1--3",
                                  "0-99999999", "1;2", "1,", "²"])  # fmt: skip
def test_seeds_that_do_not_parse_are_refused(text):
    sample(student(), seeds=text, outdir="x").refused(r"--seeds=.* does not parse.*expected a list such as")
    assert not Path("x").exists()


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 30)), min_size=1, max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_seeds_parse_to_what_was_written(parts, spaces):
    expected, text = [], []
    for first, length in parts:
        last = min(first + length, 2**32 - 1)
        text.append(f"{first}-{last}" if length else f"{first}")
        expected += range(first, last + 1)
    found = parse_seeds(None, None, (" , " if spaces else ",").join(text))
    assert found == list(dict.fromkeys(expected))


@given(st.text(alphabet="0123456789-, ax", max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_parses_or_is_one_line(text):
    try:
        found = parse_seeds(None, None, text)
    except UserError as error:
        assert "\n" not in error.message
    else:
        assert found and len(set(found)) == len(found) and set(text) <= set("0123456789-, ")


@pytest.mark.parametrize(
    "kind, changes, pattern",
    [
        ("plain", {"dataset_name": "cifar10"}, r"--dataset_name: the student is of tiny, not of cifar10"),
        ("plain", {"num_steps": 5}, r"--num_steps: the student was distilled for 4 timestamps, not 5"),
        ("second", {"num_steps": 4}, r"--num_steps: the student was distilled for 3 timestamps, not 4"),
        ("second-variable", {"num_steps": 5}, r"--num_steps: the student was distilled for 3 timestamps, not 5"),
        ("variable", {"num_steps": 2}, r"--num_steps: 2 .*4 to 7"),
        ("variable", {"num_steps": 3}, r"--num_steps: 3 .*4 to 7"),
        ("variable", {"num_steps": 8}, r"--num_steps: 8 .*4 to 7"),
        ("plain", {"solver": "heun"}, r"--solver: belongs to a teacher"),
        ("plain", {"max_order": 2}, r"--max_order: belongs to a teacher"),
        ("plain", {"schedule_type": "logsnr"}, r"--schedule_type: belongs to a teacher"),
        ("plain", {"schedule_rho": 7}, r"--schedule_rho: belongs to a teacher"),
        ("plain", {"afs": True}, r"--afs: belongs to a teacher"),
        ("plain", {"denoise_to_zero": False}, r"--denoise_to_zero: belongs to a teacher"),
        ("plain", {"predict_x0": True}, r"--predict_x0: belongs to a teacher"),
        ("plain", {"class": 0}, r"--class: tiny has no classes"),
        ("classes", {"class": 3}, r"--class: classes has classes 0 to 2, so class 3"),
        ("plain", {"prompt": "a cat"}, r"--prompt: tiny has no text"),
        ("plain", {"class": -1}, r"class"),
        ("plain", {"batch": 0}, r"batch"),
        ("plain", {"device": "cuda:99"}, r"--device: cuda:99 needs GPU 99"),
        ("plain", {"precision": "fp8"}, r"fp8"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_the_student_are_refused(kind, changes, pattern):
    sample(student(kind), seeds="0-1", outdir="x", **changes).refused(pattern)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"solver": "dpmpp", "max_order": 4}, r"max_order of dpmpp .* from 1 to 3, got 4"),
        ({"solver": "ipndm", "max_order": 0}, r"--max_order.*: 0 is not in the range 1<=x<=4"),
        ({"num_steps": 1}, r"--num_steps.*: 1 is not in the range 2<=x"),
        ({"schedule_type": "discrete"}, r"discrete needs the model's noise schedule"),
        ({"schedule_rho": 0}, r"rho"),
        ({"thresholding": True}, r"thresholding needs solver dpmpp"),
        ({"class": 0}, r"--class: tiny has no classes"),
        ({"prompt": "x"}, r"--prompt: tiny has no text"),
    ],
)
def test_flags_that_do_not_fit_the_teacher_are_refused(changes, pattern):
    sample(teacher(), seeds="0-1", outdir="x", **changes).refused(pattern)
    assert not Path("x").exists()


def test_models_that_are_not_there_are_refused(tmp_path):
    sample("7").refused(r"run 7 does not exist under \./exps; expected a folder 00007-")
    sample("none.safetensors").refused(r"none\.safetensors does not exist")
    sample("none/").refused(r"none/? does not exist")
    (tmp_path / "exps" / "00003-empty").mkdir(parents=True)
    sample("3").refused(r"00003-empty holds no network-snapshot")
    sample("teacher").refused(r"--dataset_name")
    sample("teacher", dataset_name="nosuch").refused(r"unknown dataset_name 'nosuch'")
    assert {p.name for p in tmp_path.iterdir()} == {"exps"}
    invoke("sample").refused(r"model_path")


def test_unknown_dataset_beside_a_teacher_of_ones_own_is_refused():
    sample(teacher(), dataset_name="nosuch", seeds="0", outdir="x").refused(r"nosuch")


def test_outdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for outdir in ("file", "file/below", "file/x.zip"):
        sample(student(), seeds="0-1", outdir=outdir).refused(r"file")
    sample(student(), seeds="0-1", outdir="file", grid=True).refused(r"file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_message_comes_once_from_two_processes(tmp_path):
    (tmp_path / "file").write_text("in the way")
    args = flags(SAMPLE, model_path=student(), seeds="0-3", outdir=tmp_path / "file")
    run_ranks("sample", args, tmp_path, 2).refused(r"file")


@pytest.mark.slow
def test_message_comes_once_under_torchrun(tmp_path):
    result = run_script("sample.py", "--model_path=7", "--device=cpu", cwd=tmp_path, processes=2)
    assert result.code != 0 and result.output.count("run 7 does not exist") == 1
    assert 'sample.py", line' not in result.output


def test_full_disk_is_one_line(tmp_path):
    (tmp_path / "x").mkdir()
    args = flags(SAMPLE, model_path=student(), seeds="0-3", outdir="x")
    # Not even the options; the options, but no image.
    for disk in (200, 260):
        run_ranks("sample", args, tmp_path, disk=disk).refused(r"[Ff]ile too large|x")
        assert not png_names(tmp_path / "x")


# --- Images ----------------------------------------------------------------------------------------------------------

SEEDS = [0, 1, 2, 3, 17, 40, 41, 5000, 4294967295, 77, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18]


@pytest.mark.parametrize(
    "kind, precision", [("plain", "fp32"), ("plain", "bf16"), ("classes", "fp32"), ("variable", "fp32")]
)
def test_an_image_depends_on_its_seed_alone(kind, precision, tmp_path):
    """The same bytes for every batch size, order and selection of seeds."""
    ways = {
        "whole": (SEEDS, 64), "one": (SEEDS, 1), "three": (SEEDS, 3), "reversed": (SEEDS[::-1], 7), "few": (SEEDS[4:6], 64),
        "rotated": (SEEDS[5:] + SEEDS[:5], 16),
    }  # fmt: skip
    for name, (seeds, batch) in ways.items():
        sample(student(kind), seeds=",".join(map(str, seeds)), batch=batch, outdir=name, precision=precision).ok()
        assert len(png_names(name)) == len(seeds)
    whole = contents("whole")
    assert len(set(whole.values())) == len(SEEDS) and "5000.png" not in whole and "005000.png" in whole
    for name in ways:
        assert contents(name) == {k: v for k, v in whole.items() if k in contents(name)}, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_depend_on_their_seed_alone_to_the_last_bit(dtype, tmp_path):
    """Eight bits per colour hide most of what the size of a batch does; the states before rounding hide nothing."""
    path = write_teacher(tmp_path / "wide.safetensors", model_channels=64)
    options = sampling.SamplerOptions(solver="euler", num_steps=4)
    sampler = opening.open_sampler(str(path), None, options, torch.device("cpu"), dtype).sampler
    found = {}
    for batch in (1, 3, 16, 19):
        states = []
        with mock.patch.object(sampling, "quantized", lambda x, states=states: states.append(x) or x):
            sampler.images(range(19), batch=batch)
            for start in range(0, 19, batch):
                sampler.images(range(start, min(start + batch, 19)))
        whole, parts = torch.cat(states).chunk(2)
        assert torch.equal(whole, parts)
        found[batch] = whole
    assert all(torch.equal(found[1], other) for other in found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_write_the_same_bytes(precision, tmp_path):
    args = dict(model_path=student(), seeds="0-20", precision=precision)
    invoke("sample", *flags(SAMPLE, args, outdir=tmp_path / "one")).ok()
    result = run_ranks("sample", flags(SAMPLE, args, outdir=tmp_path / "two", batch=4), tmp_path, 2).ok()
    assert result.output.count("NFE 2, 21 images") == result.output.count("Wrote 21 images") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "one")) == 21


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_number_of_threads_does_not_change_the_bytes(precision, tmp_path):
    """torchrun gives each process one thread, a plain start all cores."""
    args = dict(model_path=student(), seeds="0-20", precision=precision)
    for threads in (1, 2, 3):
        outdir = tmp_path / f"{threads}"
        run_ranks("sample", flags(SAMPLE, args, outdir=outdir), tmp_path, threads=threads).ok()
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_class_changes_images_and_default_classes_are_drawn_by_seed(tmp_path):
    for name, index in (("drawn", None), ("0", 0), ("1", 1), ("2", 2)):
        sample(student("classes"), seeds="0-19", outdir=name, **{"class": index}).ok()
    drawn, classes = contents("drawn"), [contents(str(i)) for i in range(3)]
    counts = [sum(drawn[k] == c[k] for k in drawn) for c in classes]
    assert sum(counts) == 20 and min(counts) >= 1
    assert all(classes[0][k] != classes[1][k] != classes[2][k] for k in drawn)


def test_grey_images(tmp_path):
    path = write_teacher(tmp_path / "grey.safetensors", img_channels=1)
    sample(path, seeds="0-1", outdir="x", num_steps=3).ok()
    assert pixels("x", 0).shape == (8, 8)
    sample(path, seeds="0-3", outdir="g", num_steps=3, grid=True).ok()
    with Image.open("g/grid.png") as grid:
        assert grid.size[1] == 128 and grid.size[0] > 128


# --- NFE -------------------------------------------------------------------------------------------------------------


def counted_calls(*args, **kwargs):
    """Network evaluations on a batch, and the result: one batch of the fixed size is one evaluation per image."""
    calls, original = [], EDMPrecond.forward

    def forward(net, *inputs, **named):
        calls.append(1)
        return original(net, *inputs, **named)

    with mock.patch.object(EDMPrecond, "forward", forward):
        result = sample(*args, seeds="0-3", **kwargs).ok()
    printed = int(re.search(r"NFE (\d+),", result.output)[1])
    return len(calls), printed


@pytest.mark.parametrize(
    "kind, num_steps, nfe",
    [("plain", None, 2), ("plain", 4, 2), ("noafs", None, 3), ("seven", None, 5), ("second", None, 1), ("second-variable", None, 1)]
    + [("variable", n, n - 2) for n in (4, 5, 6, 7)] + [("variable", None, 2)],
)  # fmt: skip
def test_nfe_of_a_student_is_what_is_printed_and_computed(kind, num_steps, nfe):
    assert counted_calls(student(kind), num_steps=num_steps, outdir="x") == (nfe, nfe)


@pytest.mark.parametrize(
    "changes, nfe",
    [
        ({}, 35), ({"solver": "heun", "num_steps": 5}, 9), ({"num_steps": 5, "denoise_to_zero": False}, 8), ({"solver": "dpm", "num_steps": 5}, 8), ({"solver": "euler", "num_steps": 3}, 2),
        ({"solver": "ipndm", "num_steps": 6}, 5), ({"solver": "dpmpp", "num_steps": 6}, 5), ({"solver": "dpmpp", "num_steps": 6, "afs": True}, 4),
        ({"solver": "heun", "num_steps": 5, "afs": True}, 8), ({"solver": "euler", "num_steps": 4, "denoise_to_zero": True}, 4),
    ],
)  # fmt: skip
def test_nfe_of_a_teacher_is_what_is_printed_and_computed(changes, nfe):
    assert counted_calls(teacher(), outdir="x", **changes) == (nfe, nfe)


def test_sfd_v_is_told_the_number_of_steps():
    for kind, num_steps, told in (
        ("variable", 6, 6),
        ("variable", None, 4),
        ("second-variable", None, 3),
        ("second", None, None),
        ("plain", None, None),
    ):
        seen, original = [], EDMPrecond.forward

        def forward(net, *inputs, original=original, seen=seen, **named):
            seen.append(named.get("step_condition"))
            return original(net, *inputs, **named)

        with mock.patch.object(EDMPrecond, "forward", forward):
            sample(student(kind), seeds="0", outdir=f"{kind}{num_steps}", num_steps=num_steps).ok()
        assert set(seen) == {told}, kind


def test_teacher_options_change_the_images():
    base = {"solver": "dpmpp", "num_steps": 5}
    ways = {
        "base": {}, "order": {"max_order": 1}, "noise": {"predict_x0": False}, "final": {"lower_order_final": False}, "rho": {"schedule_rho": 3},
        "logsnr": {"schedule_type": "logsnr"}, "uniform": {"schedule_type": "time_uniform"}, "afs": {"afs": True}, "steps": {"num_steps": 6},
        "zero": {"denoise_to_zero": True}, "heun": {"solver": "heun"}, "ipndm": {"solver": "ipndm"}, "dpm": {"solver": "dpm"},
        "thresholding": {"thresholding": True},
    }  # fmt: skip
    for name, changes in ways.items():
        sample(teacher(), seeds="0-1", outdir=name, **{**base, **changes}).ok()
    found = [tuple(contents(name).values()) for name in ways]
    assert len(set(found)) == len(ways)


# --- Which model -----------------------------------------------------------------------------------------------------


def test_every_form_of_model_path_gives_the_same_images(tmp_path):
    (tmp_path / "exps").mkdir()
    (tmp_path / "exps" / "00012-tiny-run").symlink_to(student())
    forms = ["12", "00012", "exps/00012-tiny-run", newest_student(student())]
    for i, form in enumerate(forms):
        sample(form, seeds="0-2", outdir=f"x{i}").ok()
        assert contents(f"x{i}") == contents("x0") and contents(f"x{i}")


def test_newest_snapshot_of_a_run_is_taken(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name, kind in (("000002", "plain"), ("000010", "seven")):
        (run_dir / f"network-snapshot-{name}.safetensors").symlink_to(newest_student(student(kind)))
    assert "NFE 5" in sample(run_dir, seeds="0", outdir="x").ok().output


def test_teacher_of_the_registry_and_of_ones_own_are_sampled_alike(tmp_path):
    with known_as_tiny():
        sample("teacher", dataset_name="tiny", seeds="0-2", outdir="named", num_steps=4).ok()
    sample(teacher(), seeds="0-2", outdir="file", num_steps=4).ok()
    assert contents("named") == contents("file") and len(contents("file")) == 3


def test_default_outdir_names_dataset_model_and_nfe(tmp_path):
    sample(newest_student(student()), seeds="0").ok()
    (found,) = (tmp_path / "samples").rglob("000000.png")
    folder = found.parent.relative_to(tmp_path / "samples")
    assert (
        folder.parts[0] == "tiny" and "network-snapshot-000000" in folder.parts[1] and folder.parts[1].endswith("-nfe2")
    )
    sample(student("seven"), seeds="0").ok()  # has a snapshot of the same name
    sample(student("variable"), seeds="0", num_steps=5).ok()
    sample(student("variable"), seeds="0", num_steps=6).ok()
    assert len(list((tmp_path / "samples").rglob("000000.png"))) == 4


def test_dry_run_writes_nothing(tmp_path):
    plan = json.loads(sample(student(), "--dry-run", seeds="0-9").ok().output)
    assert plan["images"] == 10 and plan["device"] == "cpu"
    assert not list(tmp_path.iterdir())


# --- What is there already -------------------------------------------------------------------------------------------


def test_second_run_writes_only_what_is_missing():
    first = sample(student(), seeds="0-9", outdir="x").ok()
    assert "Wrote 10 images to x, 0 were there already" in first.output
    whole = contents("x")
    times = {p: p.stat().st_mtime_ns for p in Path("x").glob("*.png")}
    (Path("x") / "000004.png").unlink()
    second = sample(student(), seeds="0-11", outdir="x").ok()
    assert "Wrote 3 images to x, 9 were there already" in second.output
    assert {k: v for k, v in contents("x").items() if k in whole} == whole and len(contents("x")) == 12
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p.name != "000004.png")
    with mock.patch.object(EDMPrecond, "forward", side_effect=AssertionError("nothing is missing")):
        assert "Wrote 0 images" in sample(student(), seeds="0-11", outdir="x").ok().output


@pytest.mark.parametrize(
    "change", [{"model_path": "seven"}, {"precision": "bf16"}, {"model_path": "teacher"}, {"model_path": "second"}]
)
def test_folder_with_images_of_another_model_is_refused(change):
    sample(student(), seeds="0-2", outdir="x").ok()
    before = contents("x")
    name = change.pop("model_path", "plain")
    model = teacher() if name == "teacher" else student(name)
    sample(model, seeds="0-3", outdir="x", **change).refused(
        r"x holds images made with another .*; choose another place"
    )
    assert contents("x") == before


def test_folder_with_other_settings_is_refused():
    sample(teacher(), seeds="0", outdir="x", num_steps=3).ok()
    sample(teacher(), seeds="1", outdir="x", num_steps=4).refused(r"another num_steps")
    sample(student("variable"), seeds="0", outdir="y", num_steps=4).ok()
    sample(student("variable"), seeds="1", outdir="y", num_steps=5).refused(r"another num_steps")
    sample(student("classes"), seeds="0", outdir="z", **{"class": 1}).ok()
    sample(student("classes"), seeds="1", outdir="z", **{"class": 2}).refused(r"another class")


def test_folder_with_foreign_images_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "x" / "000000.png")
    sample(student(), seeds="0-1", outdir="x").refused(r"holds images that were not sampled here")
    assert png_names("x") == ["000000.png"]


def test_damaged_options_file_is_one_line(tmp_path):
    sample(student(), seeds="0", outdir="x").ok()
    for content in ("{ half", "[1]", '"x"', "null"):
        (tmp_path / "x" / "sampling_options.json").write_text(content)
        sample(student(), seeds="0-1", outdir="x").refused(r"x")


@pytest.mark.parametrize("at", [10, 30])
def test_killed_run_leaves_only_whole_images(at, tmp_path):
    """SIGKILL in the middle of a file: after the pixels were written, before the name appears."""
    args = flags(SAMPLE, model_path=student(), seeds="0-40", outdir=tmp_path / "x", batch=16)
    result = run_ranks("sample", args, tmp_path, kill=("torch_utils.image_writer:to_pil", at))
    assert result.code == -signal.SIGKILL
    for name in png_names(tmp_path / "x"):
        if not Path(name).name.startswith("."):
            with Image.open(tmp_path / "x" / name) as image:
                image.load()
    assert len([n for n in png_names(tmp_path / "x") if not n.startswith(".")]) < 41
    invoke("sample", *args).ok()
    invoke("sample", *flags(SAMPLE, model_path=student(), seeds="0-40", outdir=tmp_path / "whole")).ok()
    whole = contents(tmp_path / "whole")
    assert {k: v for k, v in contents(tmp_path / "x").items() if not k.startswith(".")} == whole and len(whole) == 41


def test_image_appears_only_when_it_is_whole(tmp_path):
    from torch_utils.image_writer import ImageWriter

    writer = ImageWriter(tmp_path / "x", False, {})
    with mock.patch("PIL.Image.Image.save", side_effect=lambda path, *_: Path(path).write_bytes(b"half") and 1 / 0):
        writer.write([0], np.zeros([1, 8, 8, 3], np.uint8))
        with pytest.raises(ZeroDivisionError):
            writer.close([0])
    assert png_names(tmp_path / "x") == []


# --- Layouts ---------------------------------------------------------------------------------------------------------


def test_sub_folders_of_a_thousand_seeds():
    sample(student(), "--subdirs", seeds="0,999,1000,1001,54321", outdir="x").ok()
    assert png_names("x") == [
        "000000/000000.png",
        "000000/000999.png",
        "001000/001000.png",
        "001000/001001.png",
        "054000/054321.png",
    ]
    sample(student(), seeds="0,999,1000,1001,54321", outdir="flat").ok()
    assert [v for _, v in sorted(contents("x").items())] == [v for _, v in sorted(contents("flat").items())]
    again = sample(student(), "--subdirs", seeds="0,999,1000,1001,54321", outdir="x").ok()
    assert "Wrote 0 images" in again.output


def test_zip_is_a_data_set(tmp_path):
    sample(student(), seeds="0-4,1000", outdir="x.zip").ok()
    sample(student(), seeds="0-4,1000", outdir="flat").ok()
    with zipfile.ZipFile("x.zip") as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        names = set(archive.namelist())
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    assert names == {f"00000/img{i:08d}.png" for i in range(5)} | {"00001/img00001000.png", "dataset.json"}
    dataset = ImageDataset("x.zip")
    assert len(dataset) == 6 and dataset.labels is None
    for index, seed in enumerate([0, 1, 2, 3, 4, 1000]):
        assert np.array_equal(dataset.load(index).transpose(1, 2, 0), pixels("flat", seed))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "x.zip"]
    before = Path("x.zip").stat()
    assert (
        "Wrote 0 images to x.zip, 6 were there already"
        in sample(student(), seeds="1000,0-4", outdir="x.zip").ok().output
    )
    assert Path("x.zip").stat() == before and sorted(p.name for p in tmp_path.iterdir()) == ["flat", "x.zip"]
    sample(student(), seeds="0-4", outdir="x.zip").refused(
        r"x\.zip already exists, with 6 images, others than the 5 asked"
    )
    sample(student("noafs"), seeds="0-4,1000", outdir="x.zip").refused(r"x\.zip already exists, made otherwise")
    Path("x.zip").write_bytes(b"PK")
    sample(student(), seeds="0-4,1000", outdir="x.zip").refused(r"x\.zip is no readable archive")


def test_zip_of_two_processes_and_of_a_killed_run(tmp_path):
    sample(student(), seeds="0-20", outdir="one.zip").ok()
    args = flags(SAMPLE, model_path=student(), seeds="0-20", outdir=tmp_path / "two.zip", batch=4)
    killed = run_ranks("sample", args, tmp_path, kill=("torch_utils.image_writer:to_pil", 10))
    assert killed.code == -signal.SIGKILL and not (tmp_path / "two.zip").exists()
    result = run_ranks("sample", args, tmp_path, 2).ok()
    assert int(re.search(r"(\d+) were there already", result.output)[1]) > 0
    with zipfile.ZipFile("one.zip") as one, zipfile.ZipFile("two.zip") as two:
        assert one.namelist() == two.namelist() and len(one.namelist()) == 22
        assert all(one.read(name) == two.read(name) for name in one.namelist())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.zip", "two.zip"]


def test_zip_holds_the_seeds_that_were_asked_for_and_no_others(tmp_path):
    """Images left by a killed run of more seeds must not get into the archive."""
    args = dict(model_path=student(), outdir=tmp_path / "x.zip", batch=16)
    result = run_ranks(
        "sample", flags(SAMPLE, args, seeds="0-40"), tmp_path, kill=("torch_utils.image_writer:to_pil", 30)
    )
    assert result.code == -signal.SIGKILL
    sample(seeds="0-2", model=student(), outdir=tmp_path / "x.zip").ok()
    assert len(ImageDataset(tmp_path / "x.zip")) == 3


def test_grid(tmp_path):
    """Images of 8 pixels are shown at 64, right of the labels of their rows."""
    sample(student(), seeds="0-5", outdir="x", grid=True).ok()
    sample(student(), seeds="0-5", outdir="flat").ok()
    with Image.open("x/grid.png") as grid:
        sheet = np.array(grid)
    assert sheet.shape[0] == 128 and sheet.shape[1] > 3 * 64
    labels, tiles = sheet[:, : -3 * 64], sheet[:, -3 * 64 :]
    for seed in range(6):
        row, column = divmod(seed, 3)
        tile = tiles[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        assert np.array_equal(tile[::8, ::8], pixels("flat", seed))
    assert (labels < 128).any() and png_names("x") == ["grid.png"]


def test_labels_of_pictures_are_in_the_font_that_draws_them(tmp_path, monkeypatch):
    """Pillow's own font shows a box for what it does not have, a dash among it."""
    texts = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, at, text, *more, **named: texts.append(text))
    sample(student(), seeds="0-5", outdir="x", grid=True).ok()
    sample(student(), seeds="0-1", outdir="x", compare=True).ok()
    assert texts[:2] == ["seeds 0 to 2", "seeds 3 to 5"] and texts[-2:] == ["seed 0", "seed 1"]
    assert all(text.isascii() for text in texts)


def test_a_sheet_of_several_students():
    also = f"--also={student('noafs')}"
    sample(student(), also, seeds="0-1", outdir="x", compare=True).ok()
    rows = Path("x/compare.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[-2:]] == ["| student", "| student, SFD"] and len(rows) == 8
    with Image.open("x/compare.png") as sheet:
        assert sheet.size[1] == 16 + 6 * 64
    sample(student(), also, seeds="0-1", outdir="y").refused("also.*--compare")


def test_pictures_are_not_among_the_samples(tmp_path):
    """Whatever comes first, and with --outdir too; an evaluation of the folder counts the samples alone."""
    for options in ({"grid": True}, {}, {"grid": True}, {"compare": True}):
        sample(student(), seeds="0-3", **options).ok()
    (folder,) = {path.parent for path in Path("samples").rglob("000000.png")}
    assert len(ImageDataset(folder)) == len(ImageDataset("samples")) == 4
    (pictures,) = {path.parent for path in Path("pictures").rglob("grid.png")}
    assert pictures.parts[1:] == folder.parts[1:] and (pictures / "compare.png").exists()
    for options in ({"grid": True}, {"compare": True}):
        sample(student(), seeds="0-3", outdir=folder, **options).refused("holds samples")
    sample(student(), seeds="0-3", outdir=pictures).refused("holds (grid|compare).png")


def test_grid_into_an_archive_is_refused(tmp_path):
    result = sample(student(), seeds="0-3", outdir="x.zip", grid=True)
    result.refused(r"grid|zip")
    assert not (tmp_path / "x.zip").exists()


def test_grid_of_two_processes(tmp_path):
    sample(student(), seeds="0-5", outdir="x", grid=True).ok()
    args = flags(SAMPLE, model_path=student(), seeds="0-5", outdir=tmp_path / "two", grid=True)
    run_ranks("sample", args, tmp_path, 2).ok()
    assert (tmp_path / "two" / "grid.png").read_bytes() == (tmp_path / "x" / "grid.png").read_bytes()


def test_frequencies_of_the_teacher_pass_to_its_student(tmp_path):
    """Training draws labels by them, and so does sampling where no class is asked for."""
    rare = write_teacher(tmp_path / "rare.safetensors", label_dim=3, class_frequencies=[0.0, 1.0, 0.0])
    invoke("train", *train_flags(rare, outdir=tmp_path / "run", total_kimg=0.016)).ok()
    found = only_run(tmp_path / "run")
    assert read_settings(newest_student(found))["network"]["class_frequencies"] == [0, 1, 0]
    for source in (found, rare):
        for name, more in (("drawn", {}), ("asked", {"class": 1}), ("other", {"class": 2})):
            sample(source, seeds="0-5", outdir=f"{source.name}-{name}", **more).ok()
        drawn, asked, other = (contents(f"{source.name}-{name}") for name in ("drawn", "asked", "other"))
        assert drawn == asked != other


def test_students_of_classes_know_their_classes():
    assert "NFE 2" in sample(student("classes"), seeds="0", outdir="x", **{"class": 2}).ok().output
    assert class_teacher().exists()
