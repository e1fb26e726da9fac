"""Making a teacher of one's own images: it learns, resumes bitwise, and refuses what it cannot use."""

from __future__ import annotations

import json
import os
import re
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flags, invoke, run_ranks, run_script, same, weights, write_images

from dnnlib import UserError
from models import load_teacher
from torch_utils.checkpoint import read_settings, read_state
from torch_utils.metrics.image_set import ImageDataset
from training import pretrainer
from training.pretrainer import WIDEST, PretrainConfig, batch_indices, ema_beta, learning_rate, profile_exponent
from training.runs import lock

PRETRAIN = {
    "channels": 16, "mult": "1,2", "blocks": 1, "attn": "4", "kimg": 0.128, "batch": 8, "lr": 2e-3, "snap": 0.064, "ema": "0.1", "device": "cpu",
    "precision": "fp32",
}  # fmt: skip


def pretrain(data, outdir, *more, **changes):
    return invoke("training.pretrain", *flags(PRETRAIN, {"data": data, "outdir": outdir}, changes), *more)


def labelled(folder, count, classes=2, **kwargs):
    write_images(folder, count, **kwargs)
    labels = [[f"{i:04d}.png", i % classes] for i in range(count)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def losses(outdir):
    return [float(value) for value in re.findall(r"loss (\S+)", (outdir / "log.txt").read_text())]


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_lowers_its_loss_and_its_teacher_can_be_loaded(tmp_path):
    data = write_images(tmp_path / "data", 16)
    pretrain(data, tmp_path / "run", kimg=1.6, snap=0.4, lr=2e-2, batch=16).ok()  # the rate warms up over 10 kimg
    found = losses(tmp_path / "run")
    assert len(found) == 4 and found[-1] < 0.7 * found[0]
    path = tmp_path / "run" / "teacher.safetensors"
    model = load_teacher(None, model_path=path)
    assert (model.img_resolution, model.img_channels, model.label_dim) == (8, 3, 0)
    settings = read_settings(path)
    assert settings["format"] == "teacher" and settings["training"]["images_seen"] == 1600
    images = torch.from_numpy(ImageDataset(data).load_all()).float() / 127.5 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    error = (model.denoise(images + 0.5 * noise, 0.5) - images).square().mean()
    assert error < 0.5 * (0.5 * noise).square().mean()  # the averaged weights denoise
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size == (64, 64)
    assert json.loads((tmp_path / "run" / "training_options.json").read_text())["kimg"] == 1.6


def test_a_teacher_of_edm2s_architecture(tmp_path):
    """It learns to denoise and how uncertain it is, and its weights stay normalised."""
    data = labelled(tmp_path / "data", 16)
    pretrain(data, tmp_path / "run", arch="edm2", kimg=1.6, snap=0.4, lr=4e-2, batch=16, cond=True).ok()
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.3
    settings = read_settings(tmp_path / "run" / "teacher.safetensors")
    assert settings["network"]["class"] == "EDM2Precond" and settings["network"]["class_frequencies"] == [0.5, 0.5]
    net = load_teacher(None, model_path=tmp_path / "run" / "teacher.safetensors").net
    state = read_state(tmp_path / "run" / "state.pt")["net"]
    hidden = [t for name, t in state.items() if name.endswith("conv_res0.weight")]
    assert hidden and all((t.square().mean((1, 2, 3)).sqrt() - 1).abs().max() < 1e-3 for t in hidden)
    noisy, clean = net.log_variance(torch.tensor([20.0, 0.05]))
    assert noisy != clean
    # --lr has its own default.
    dry = [json.loads(pretrain(data, "x", "--dry-run", arch=a, lr=None).ok().output)["lr"] for a in ("edm2", "ddpmpp")]
    assert dry == [1e-2, 2e-3]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"dropout": 0.2, "xflip": True, "cond": True, "label_dropout": 0.3, "optimizer": "muon", "ema": "0.1,0.2"},
        {"arch": "edm2", "cond": True, "lr": 1e-2},
    ],
    ids=["plain", "all", "edm2"],
)
def test_killed_run_ends_as_an_uninterrupted_one(changes, tmp_path):
    data = labelled(tmp_path / "data", 70)
    pretrain(data, tmp_path / "whole", **changes).ok()
    args = flags(PRETRAIN, {"data": data, "outdir": tmp_path / "parts"}, changes)
    killed = run_ranks("training.pretrain", args, tmp_path, kill=("training.pretrain:Trainer.step", 11))
    assert killed.code == -signal.SIGKILL, killed.output
    assert "Continuing at 0.1 kimg" in pretrain(data, tmp_path / "parts", **changes).ok().output
    assert same(
        weights(tmp_path / "whole" / "teacher.safetensors"), weights(tmp_path / "parts" / "teacher.safetensors")
    )


@pytest.mark.slow
def test_number_of_snapshots_does_not_change_the_weights(tmp_path):
    data = write_images(tmp_path / "data", 10)
    for name, snap in (("a", 0.032), ("b", 1)):
        pretrain(data, tmp_path / name, snap=snap).ok()
    assert same(weights(tmp_path / "a" / "teacher.safetensors"), weights(tmp_path / "b" / "teacher.safetensors"))


def test_longer_run_continues_and_other_settings_are_refused(tmp_path):
    data = write_images(tmp_path / "data", 10)
    pretrain(data, tmp_path / "run", kimg=0.032).ok()
    pretrain(data, tmp_path / "run", kimg=0.032, lr=1e-3, seed=2).refused(
        r"run of other settings \(.*lr.*seed.*another --outdir"
    )
    pretrain(data, tmp_path / "run", kimg=0.032, channels=8).refused(r"run of other settings \(network")
    pretrain(data, tmp_path / "run", kimg=0.064).ok()
    assert read_settings(tmp_path / "run" / "teacher.safetensors")["training"]["images_seen"] == 64
    before = (tmp_path / "run" / "teacher.safetensors").read_bytes()
    pretrain(data, tmp_path / "run", kimg=0.064).ok()
    assert (tmp_path / "run" / "teacher.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"garbage", "other"])
def test_damaged_state_is_one_line(content, tmp_path):
    data = write_images(tmp_path / "data", 10)
    pretrain(data, tmp_path / "run", kimg=0.032).ok()
    path = tmp_path / "run" / "state.pt"
    torch.save({"a": 1}, path) if content == "other" else path.write_bytes(content)
    pretrain(data, tmp_path / "run", kimg=0.064).refused(r"state\.pt|other settings")


@pytest.mark.parametrize("count", [70, 10], ids=["many", "fewer-than-the-picture-shows"])
def test_labels(count, tmp_path):
    data = labelled(tmp_path / "data", count, classes=3)
    pretrain(data, tmp_path / "run", kimg=0.032, cond=True).ok()
    model = load_teacher(None, model_path=tmp_path / "run" / "teacher.safetensors")
    assert model.label_dim == 3
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(3)[:2]
    assert not torch.equal(model.denoise(x, 1.0, labels), model.denoise(x, 1.0, labels.flip(0)))
    pretrain(data, tmp_path / "without", kimg=0.008).ok()
    assert load_teacher(None, model_path=tmp_path / "without" / "teacher.safetensors").label_dim == 0


def test_grey_images(tmp_path):
    pretrain(write_images(tmp_path / "data", 10, mode="L"), tmp_path / "run", kimg=0.016).ok()
    assert load_teacher(None, model_path=tmp_path / "run" / "teacher.safetensors").img_channels == 1


def test_options_change_what_they_should(tmp_path):
    data = write_images(tmp_path / "data", 10)
    ways = {"base": {}, "again": {}, "seed": {"seed": 1}, "xflip": {"xflip": True}, "dropout": {"dropout": 0.3}, "ema": {"ema": "0.2"},
            "lr": {"lr": 1e-3}, "bf16": {"precision": "bf16"}, "muon": {"optimizer": "muon"}}  # fmt: skip
    found = {}
    for name, changes in ways.items():
        pretrain(data, tmp_path / name, **{"kimg": 0.016, "mult": "1", **changes}).ok()
        found[name] = weights(tmp_path / name / "teacher.safetensors")
    assert same(found["base"], found.pop("again"))
    names = list(found)
    assert not any(same(found[a], found[b]) for i, a in enumerate(names) for b in names[i + 1 :])


def test_learning_rate():
    config = PretrainConfig("x", {}, kimg=100, batch=10, lr=1e-3, warmup_kimg=10, decay=0.4)
    expected = {0: 0, 5000: 0.5e-3, 10_000: 1e-3, 60_000: 1e-3, 80_000: 0.5e-3, 90_000: 0.25e-3, 100_000: 0}
    assert {n: learning_rate(config, n) for n in expected} == pytest.approx(expected)
    assert learning_rate(replace(config, decay=0), 99_999) == 1e-3


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25, WIDEST])
def test_averages_are_power_functions_of_the_stated_width(width):
    """Weights of the iterations in the average that the recursion ends with: their mean and spread, and t^γ itself."""
    steps, gamma = 4000, profile_exponent(width)
    betas = np.array([ema_beta(width, t) for t in range(1, steps + 1)])
    weights = (1 - betas) * np.append(np.cumprod(betas[:0:-1])[::-1], 1)
    times = np.arange(1, steps + 1) / steps
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    mean = (weights * times).sum()
    assert ((weights * (times - mean) ** 2).sum()) ** 0.5 == pytest.approx(width, rel=2e-2)
    assert weights[steps // 2] / weights[-1] == pytest.approx(0.5**gamma, rel=2e-2)
    assert ema_beta(width, 1) == 0  # the weights of the start count nothing


def test_several_averages_are_kept(tmp_path):
    data = write_images(tmp_path / "data", 10)
    pretrain(data, tmp_path / "run", ema="0.1,0.25").ok()
    pretrain(data, tmp_path / "other", ema="0.25").ok()
    names = ["teacher.safetensors", "teacher-0.25.safetensors"]
    assert [read_settings(tmp_path / "run" / name)["training"]["ema"] for name in names] == [0.1, 0.25]
    first, second = (weights(tmp_path / "run" / name) for name in names)
    assert not same(first, second) and same(second, weights(tmp_path / "other" / "teacher.safetensors"))
    for bad in ("", "0", "0.3", "nan", "a", "0.1,0.1", "-1", "0.1,"):
        pretrain(data, tmp_path / "bad", ema=bad).refused(r"--ema=.* relative widths")
    assert not (tmp_path / "bad").exists()


# --- Classes ---------------------------------------------------------------------------------------------------------


def seen_labels(data, tmp_path, monkeypatch, **changes):
    """The labels that a run's network was given, of all iterations."""
    seen, plain = [], pretrainer.edm_loss

    def loss(net, images, labels, rng):
        seen.append(labels)
        return plain(net, images, labels, rng)

    monkeypatch.setattr(pretrainer, "edm_loss", loss)
    pretrain(data, tmp_path / "run", cond=True, mult="1", **changes).ok()
    return torch.cat(seen)


def test_labels_are_dropped_as_often_as_asked(tmp_path, monkeypatch):
    data = labelled(tmp_path / "data", 10)
    seen = seen_labels(data, tmp_path, monkeypatch, kimg=0.4, label_dropout=0.25)
    dropped = seen.sum(1) == 0
    assert ((seen == 0) | (seen == 1)).all() and (seen.sum(1) <= 1).all()
    assert 0.25 * 400 - 4 * 9 < dropped.sum() < 0.25 * 400 + 4 * 9
    settings = read_settings(tmp_path / "run" / "teacher.safetensors")
    assert settings["training"]["label_dropout"] == 0.25 and settings["network"].get("label_dropout", 0) == 0
    monkeypatch.undo()
    (tmp_path / "kept").mkdir()
    assert (seen_labels(data, tmp_path / "kept", monkeypatch, kimg=0.08).sum(1) == 1).all()
    pretrain(data, tmp_path / "bad", label_dropout=0.1).refused(r"--label_dropout .* add --cond=True")


def test_class_frequencies_are_recorded(tmp_path):
    data = write_images(tmp_path / "data", 10)
    labels = [[f"{i:04d}.png", 2 * (i >= 6) + (i == 9)] for i in range(10)]
    (data / "dataset.json").write_text(json.dumps({"labels": labels, "class_names": list("abcd")}))
    pretrain(data, tmp_path / "run", kimg=0.016, cond=True).ok()
    found = read_settings(tmp_path / "run" / "teacher.safetensors")["network"]["class_frequencies"]
    assert found == pytest.approx([0.6, 0, 0.3, 0.1])
    pretrain(data, tmp_path / "without", kimg=0.016).ok()
    assert "class_frequencies" not in read_settings(tmp_path / "without" / "teacher.safetensors")["network"]


# --- Where a run starts, and what a kill leaves ----------------------------------------------------------------------


def test_transfer_starts_from_what_fits(tmp_path):
    data = labelled(tmp_path / "data", 10)
    pretrain(data, tmp_path / "first", kimg=0.064, lr=1e-2).ok()
    source = tmp_path / "first" / "teacher.safetensors"
    # A rate that moves nothing shows what the run began with.
    result = pretrain(data, tmp_path / "second", transfer=source, cond=True, kimg=0.008, lr=1e-30).ok()
    old, new = weights(source), weights(tmp_path / "second" / "teacher.safetensors")
    own = new.keys() - old.keys()
    assert own == {"model.map_label.weight", "model.map_label.bias"}
    assert f"Starting from {len(old)} tensors" in result.output and "2 are new" in result.output
    assert same(old, {name: tensor for name, tensor in new.items() if name not in own})
    wider = pretrain(data, tmp_path / "wider", transfer=source, mult="1,3", kimg=0.008).ok().output
    assert 0 < int(re.search(r"from (\d+) tensors", wider)[1]) < len(old)
    pretrain(data, tmp_path / "bad", transfer=tmp_path / "none").refused(r"none does not exist")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("lost", ["missing", "stale", "damaged"])
def test_a_finished_run_has_its_teacher_again(lost, tmp_path):
    """A kill between the files of a snapshot, or a full disk, must not leave another teacher for ever."""
    data = write_images(tmp_path / "data", 10)
    pretrain(data, tmp_path / "run", kimg=0.032).ok()
    path = tmp_path / "run" / "teacher.safetensors"
    stale, picture = path.read_bytes(), tmp_path / "run" / "samples.png"
    pretrain(data, tmp_path / "run", kimg=0.064, decay=0).ok()
    expected = weights(path)
    if lost == "missing":
        path.unlink()
    else:
        path.write_bytes(stale if lost == "stale" else stale[:100])
    picture.unlink()
    pretrain(data, tmp_path / "run", kimg=0.064, decay=0).ok()
    assert same(weights(path), expected) and picture.exists()


def test_networks_are_written_before_the_state(tmp_path):
    data = write_images(tmp_path / "data", 10)
    pretrain(data, tmp_path / "run", kimg=0.064).ok()
    args = flags(PRETRAIN, {"data": data, "outdir": tmp_path / "killed"}, kimg=0.064)
    killed = run_ranks("training.pretrain", args, tmp_path, kill=("training.pretrainer:save_state", 1))
    assert killed.code == -signal.SIGKILL, killed.output
    assert (tmp_path / "killed" / "teacher.safetensors").exists() and not (tmp_path / "killed" / "state.pt").exists()
    pretrain(data, tmp_path / "killed", kimg=0.064).ok()
    assert same(weights(tmp_path / "run" / "teacher.safetensors"), weights(tmp_path / "killed" / "teacher.safetensors"))


def test_two_runs_in_one_directory_are_refused(tmp_path):
    data = write_images(tmp_path / "data", 10)
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run", "held"):
        pretrain(data, tmp_path / "run", kimg=0.016).refused(r"another process trains in .*run; .*another --outdir")
    pretrain(data, tmp_path / "run", kimg=0.016).ok()


def test_weights_that_are_not_finite_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("training.pretrainer.learning_rate", lambda *_: 1e30)
    data = write_images(tmp_path / "data", 10)
    pretrain(data, tmp_path / "run", kimg=0.064).refused(r"loss or weights are not finite .* --lr below")
    assert not (tmp_path / "run" / "teacher.safetensors").exists() and not (tmp_path / "run" / "state.pt").exists()


def test_every_image_is_seen_once_in_an_epoch():
    config = PretrainConfig("x", {}, batch=4)
    seen = torch.cat([batch_indices(config, 10, i) for i in range(10)]).view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in seen)
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 4


# --- Images of any size ----------------------------------------------------------------------------------------------


def photographs(folder: Path) -> Path:
    """Grey and coloured, of three sizes."""
    for index, (size, mode) in enumerate([((20, 12), "RGB"), ((9, 30), "L"), ((16, 16), "RGB")]):
        write_images(folder / str(index), 3, size=size, mode=mode, seed=index)
    return folder


def test_images_of_any_size_are_cropped_as_the_dataset_tool_does_it(tmp_path):
    """The same weights from the photographs as from the archive that is made of them."""
    data, archive = photographs(tmp_path / "data"), tmp_path / "made.zip"
    invoke("training.dataset_tool", *flags(source=data, dest=archive, resolution=8, transform="center-crop")).ok()
    pretrain(data, tmp_path / "a", "--center_crop", resolution=8, kimg=0.032).ok()
    pretrain(archive, tmp_path / "b", kimg=0.032).ok()
    assert same(weights(tmp_path / "a" / "teacher.safetensors"), weights(tmp_path / "b" / "teacher.safetensors"))
    pretrain(data, tmp_path / "a", "--center_crop", resolution=8, kimg=0.048).ok()
    pretrain(archive, tmp_path / "a", kimg=0.048).refused("resolution: 8 there, None here; center_crop: True there")


def test_labels_stay_when_images_are_resized(tmp_path):
    data = labelled(tmp_path / "data", 9, classes=3, size=(16, 16))
    plan = json.loads(pretrain(data, tmp_path / "run", "-n", resolution=8, cond=True).ok().output)
    assert (plan["network"]["label_dim"], plan["network"]["img_resolution"], plan["images"]) == (3, 8, 9)
    pretrain(data, tmp_path / "run", resolution=8, cond=True, kimg=0.016).ok()
    assert load_teacher(None, tmp_path / "run").label_dim == 3


def test_images_that_are_no_squares_need_a_crop(tmp_path):
    data = photographs(tmp_path / "data")
    pretrain(data, tmp_path / "run").refused("make them equal with python -m training.dataset_tool")
    pretrain(data, tmp_path / "run", resolution=8).refused("is 12×20; choose how it becomes a square")
    pretrain(data, tmp_path / "run", "--center_crop").refused("--resolution: needs the size")


# --- Refused ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(tmp_path):
    data = write_images(tmp_path / "data", 10)
    run = tmp_path / "run"
    pretrain(tmp_path / "none", run).refused(r"none does not exist")
    pretrain(write_images(tmp_path / "wide", 2, size=(16, 8)), run).refused(r"images of 8×16; expected square ones")
    pretrain(data, run, cond=True).refused(r"--cond=True needs labels")
    pretrain(data, run, mult="1,b").refused(r"--mult and --attn are lists of integers")
    pretrain(data, run, mult="").refused(r"mult")
    pretrain(data, run, mult="0,1").refused(r"mult")
    pretrain(data, run, channels=5).refused(r"channels")
    pretrain(data, run, batch=0).refused(r"batch")
    pretrain(data, run, device="toaster").refused(r"--device: 'toaster'")
    invoke("training.pretrain", "--outdir=x").refused(r"--data")
    assert not run.exists()
    (tmp_path / "file").touch()
    pretrain(data, tmp_path / "file").refused(r"file")
    pretrain(data, tmp_path / "file" / "below").refused(r"file")


def test_images_that_levels_do_not_divide_are_refused(tmp_path):
    """10 → 5 → 2 pixels: the way up meets other sizes."""
    data = write_images(tmp_path / "data", 4, size=(10, 10))
    pretrain(data, tmp_path / "run", mult="1,1,1").refused(r"10|divi|level|mult")


@pytest.mark.parametrize("more", [["-n"], []], ids=["dry", "run"])
def test_a_dry_run_refuses_what_the_run_does(more, tmp_path):
    data = write_images(tmp_path / "data", 3)
    Image.new("RGB", (16, 16)).save(data / "9999.png")
    arguments = [*flags(PRETRAIN, data=data, outdir=tmp_path / "run"), *more]
    invoke("training.pretrain", *arguments).refused(r"9999\.png in .* is 16×16 .* 8×8")
    Image.new("L", (8, 8)).save(data / "9999.png")
    assert "1 of 4 images are grey" in invoke("training.pretrain", *arguments).ok().output


@pytest.mark.slow
def test_module_runs_as_documented(tmp_path):
    data = write_images(tmp_path / "data", 10)
    args = flags(PRETRAIN, data=data, outdir=tmp_path / "teachers" / "mine", kimg=0.016)
    assert "teacher.safetensors" in run_script("training.pretrain", *args, cwd=tmp_path).ok().output
    run_script("training.pretrain", "--data=none", "--outdir=x", cwd=tmp_path).refused("none does not exist")


# --- Data sets -------------------------------------------------------------------------------------------------------


def zipped(folder, path, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def test_folder_and_archive_are_the_same_data_set(tmp_path):
    data = labelled(tmp_path / "data", 5)
    (data / "sub").mkdir()
    (data / "0001.png").rename(data / "sub" / "0001.PNG")
    (data / "notes.txt").write_text("no image")
    labels = [[n, i % 2] for i, n in enumerate(["0000.png", "0002.png", "0003.png", "0004.png", "sub/0001.PNG"])]
    (data / "dataset.json").write_text(json.dumps({"labels": labels}))
    folder, archive = ImageDataset(data), ImageDataset(zipped(data, tmp_path / "data.zip"))
    assert folder.names == archive.names == [n for n, _ in labels]
    assert np.array_equal(folder.load_all(), archive.load_all()) and folder.load_all().shape == (5, 3, 8, 8)
    assert folder.labels.tolist() == archive.labels.tolist() == [0, 1, 0, 1, 0] and folder.label_dim == 2
    assert len(folder) == 5 and folder.load_all().dtype == np.uint8
    with Image.open(data / "0003.png") as image:
        assert np.array_equal(folder.load(2), np.array(image).transpose(2, 0, 1))


def test_modes_of_images(tmp_path):
    for name, mode in (("a", "L"), ("b", "P"), ("c", "RGBA"), ("d", "1"), ("e", "RGB")):
        Image.new(mode, (8, 8)).save(tmp_path / f"{name}.png")
    dataset = ImageDataset(tmp_path)
    assert dataset.shape == (3, 8, 8) and dataset.load_all().shape == (5, 3, 8, 8)
    for name in "bce":
        (tmp_path / f"{name}.png").unlink()
    assert ImageDataset(tmp_path).shape == (1, 8, 8)


def test_data_set_crosses_into_another_process(tmp_path):
    import pickle

    archive = ImageDataset(zipped(write_images(tmp_path / "data", 3), tmp_path / "d.zip"))
    first = archive.load(0)
    assert np.array_equal(pickle.loads(pickle.dumps(archive)).load(0), first)


@pytest.mark.parametrize(
    "content",
    ["{ half", "[]", "3", "{}", '{"labels": 5}', '{"labels": [["0000.png", 0]]}', '{"labels": [["0000.png", -1], ["0001.png", 0]]}',
     '{"labels": [["0000.png", "x"], ["0001.png", 0]]}', '{"labels": [0, 1]}', '{"labels": [["0000.png", null], ["0001.png", 0]]}',
     '{"labels": [["0000.png", 1e99], ["0001.png", 0]]}', '{"labels": {"0000.png": 1, "0001.png": 2}}', '{"labels": [["0000.png", 0.5], ["0001.png", 1]]}'],
)  # fmt: skip
def test_labels_that_do_not_match_are_refused(content, tmp_path):
    data = write_images(tmp_path / "data", 2)
    (data / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json in .*; expected `labels`: null or one"):
        ImageDataset(data)


def test_labels_may_be_null(tmp_path):
    data = write_images(tmp_path / "data", 2)
    (data / "dataset.json").write_text('{"labels": null}')
    assert ImageDataset(data).labels is None and ImageDataset(data).label_dim == 0


def test_unusable_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        ImageDataset(tmp_path / "none")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        ImageDataset(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        ImageDataset(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no image"):
        ImageDataset(zipped(tmp_path / "empty", tmp_path / "empty.zip"))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_archives_are_refused(method, tmp_path):
    """Every byte may be wrong: in the list of contents, in the headers, in the images."""
    data = write_images(tmp_path / "data", 2)
    content = bytearray(zipped(data, tmp_path / "d.zip", method).read_bytes())
    path, outcomes = tmp_path / "bent.zip", set()
    for at in range(0, len(content), 3):
        bent = bytearray(content)
        bent[at] ^= 0xFF
        path.write_bytes(bent)
        try:
            ImageDataset(path).load_all()
            outcomes.add("read")
        except UserError as error:
            assert str(path) in error.message and "\n" not in error.message
            outcomes.add("refused")
    assert "refused" in outcomes


def test_damaged_images_are_refused(tmp_path):
    data = write_images(tmp_path / "data", 2)
    content = (data / "0001.png").read_bytes()
    for bad in (b"", b"text", content[:20], content[: len(content) // 2]):
        (data / "0001.png").write_bytes(bad)
        with pytest.raises(UserError, match=r"0001\.png in .* is not a readable image"):
            ImageDataset(data).load_all()
    os.remove(data / "0001.png")
    assert len(ImageDataset(data)) == 1
