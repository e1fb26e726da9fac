"""train.py from the outside: what it refuses, what its flags do, what a run leaves behind."""

from __future__ import annotations

import json
import re
import signal
from unittest import mock

import pytest
import torch
from PIL import Image
from tiny import (
    OPTIONS,
    STATE,
    STATS,
    distance,
    invoke,
    known_as_tiny,
    newest_student,
    only_run,
    run_dirs,
    run_ranks,
    run_script,
    same,
    second_stage,
    student,
    teacher,
    tiny_network,
    train_flags,
    weights,
)  # fmt: skip

from models import load_student, load_teacher
from torch_utils.checkpoint import read_network, read_settings, read_state
from training import distill, loop
from training.config import DistillConfig, micro_batch, source_settings
from training.cost import run_cost
from training.report import status_line
from training.state import TrainingState


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stats_of(run_dir):
    return [json.loads(line) for line in (run_dir / STATS).read_text().splitlines()]


def status_lines(run_dir):
    return [line for line in (run_dir / "log.txt").read_text().splitlines() if line.startswith("tick ")]


# --- Refused ---------------------------------------------------------------------------------------------------------

EMOJI = "--dataset_name=emoji32"


@pytest.mark.parametrize(
    "args, pattern",
    [
        (["--dataset_name=nosuch"], r"unknown dataset_name 'nosuch'.*expected one of emoji32, emoji32-cond, cifar10"),
        ([], r"--dataset_name is missing"),
        ([EMOJI, "--is_second_stage=True"], r"--is_second_stage=True needs --model_path"),
        ([EMOJI, "--num_steps=2"], r"--num_steps=2 leaves no step.*--afs=True.*at least 3"),
        ([EMOJI, "--num_steps=0"], r"--num_steps.*0 is not in the range 2<=x<=1000"),
        ([EMOJI, "--num_steps=1", "--afs=False"], r"--num_steps.*1 is not in the range 2<=x<=1000"),
        ([EMOJI, "--num_steps=1000", "--M=1000"], r"--num_steps=1000 --M=1000 make a trajectory of 1000000 timestamps"),
        ([EMOJI, "--num_steps=5000"], r"num_steps"),
        ([EMOJI, "--M=-1"], r"--M.*-1 is not in the range 0<=x<=1000"),
        ([EMOJI, "--max_order=4"], r"max_order of dpmpp must be a whole number from 1 to 3, got 4"),
        ([EMOJI, "--max_order=0"], r"--max_order.*0 is not in the range 1<=x<=4"),
        ([EMOJI, "--sampler_tea=ipndm", "--max_order=5"], r"--max_order.*5 is not in the range 1<=x<=4"),
        ([EMOJI, "--batch=8", "--batch-gpu=3"], r"--batch-gpu=3 does not divide the 8 samples"),
        ([EMOJI, "--use_step_condition=True", "--num_steps=3"], r"--num_steps=3 .*4to7|--num_steps=3 .*4.7"),
        ([EMOJI, "--use_step_condition=True", "--num_steps=8"], r"--num_steps=8"),
        (
            [EMOJI, "--is_second_stage=True", "--model_path=x", "--denoise_to_zero=True"],
            r"--denoise_to_zero=True is for the first",
        ),
        ([EMOJI, "--lr_schedule=cosine"], r"cosine.*linear"),
        ([EMOJI, "--guidance_type=cfg"], r"--guidance_type=cfg needs a text-conditioned teacher"),
        ([EMOJI, "--guidance_rate=2"], r"--guidance_rate=2: emoji32 has neither classes"),
        ([EMOJI, "--thresholding=True", "--sampler_tea=heun"], r"thresholding needs solver dpmpp"),
        ([EMOJI, "--device=toaster"], r"--device: 'toaster' is no device; expected cpu"),
        ([EMOJI, "--device=cuda:99"], r"--device: cuda:99 needs GPU 99, this machine shows"),
        ([EMOJI, "--sampler_tea=magic"], r"magic.*heun"),
        ([EMOJI, "--schedule_type=cosine"], r"cosine.*polynomial"),
        ([EMOJI, "--schedule_rho=0"], r"schedule_rho"),
        ([EMOJI, "--afs=maybe"], r"afs.*maybe"),
        ([EMOJI, "--batch=0"], r"batch"),
        ([EMOJI, "--total_kimg=0"], r"total_kimg"),
        ([EMOJI, "--lr=-1"], r"lr"),
        ([EMOJI, "--total_kimg=nan"], r"total_kimg"),
        ([EMOJI, "--total_kimg=inf"], r"total_kimg"),
        ([EMOJI, "--lr=nan"], r"lr"),
        ([EMOJI, "--optimizer=sgd"], r"sgd.*adam"),
        ([EMOJI, "--loss_knee=0"], r"loss_knee"),
        ([EMOJI, "--loss_knee=nan"], r"loss_knee"),
        ([EMOJI, "--seed=-1"], r"seed"),
        ([EMOJI, "--nothing"], r"[Nn]o such option"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(args, pattern, tmp_path):
    invoke("train", "--device=cpu", *args, "--dry-run").refused(pattern)
    assert not list(tmp_path.iterdir())


def test_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    invoke("train", EMOJI, "--batch=8", "-n").refused(r"--batch=8 is not divisible by 3 processes; .*multiple of 3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    invoke("train", EMOJI, "--batch=8", "--batch-gpu=3", "-n").refused(r"--batch-gpu=3 does not divide the 4 samples")
    invoke("train", EMOJI, "--batch=8", "--batch-gpu=2", "-n").ok()


def test_schedule_that_the_teacher_does_not_have_is_refused(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "x", schedule_type="discrete")
    invoke("train", *args).refused(r"discrete.*noise schedule")
    assert not (tmp_path / "x").exists()


def test_missing_and_foreign_teacher_files_are_refused(tmp_path):
    invoke("train", *train_flags(tmp_path / "no.safetensors")).refused(r"no\.safetensors does not exist")
    (tmp_path / "junk.safetensors").write_bytes(b"no network at all" * 100)
    invoke("train", *train_flags(tmp_path / "junk.safetensors")).refused(
        r"junk\.safetensors is not a readable network file"
    )
    assert not (tmp_path / "exps").exists()


def test_student_is_not_taken_for_a_teacher(tmp_path):
    """Forgetting --is_second_stage=True must not distil the student's network along the teacher's schedule."""
    result = invoke("train", *train_flags(newest_student(student()), outdir=tmp_path / "x"))
    result.refused(r"student.*(second_stage|teacher)")


def test_outdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "file")).refused(r"file")
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "file" / "below")).refused(r"file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_file_with_the_name_of_a_run_does_not_hang_the_launch(tmp_path):
    (tmp_path / "00000-tiny-4-2-dpmpp-1-poly7-afs").write_text("in the way")

    def too_long(*_):
        raise TimeoutError("open_run does not end")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        result = invoke("train", *train_flags(teacher(), outdir=tmp_path, total_kimg=0.008))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert "open_run does not end" not in result.output
    assert result.code == 0 or "Traceback" not in result.output


def test_message_comes_once_from_two_processes(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    run_ranks("train", args, tmp_path, 2).refused(r"file")  # found by rank 0 alone, within the group
    run_ranks("train", train_flags(teacher(), M=-1), tmp_path, 2).refused(r"--M.*-1 is not in")  # found by every rank


def test_message_comes_once_under_torchrun(tmp_path):
    result = run_script("train.py", EMOJI, "--batch=7", "--device=cpu", cwd=tmp_path, processes=2)
    assert result.code != 0 and result.output.count("--batch=7 is not divisible by 2 processes") == 1
    assert 'train.py", line' not in result.output  # torchrun adds a traceback of its own, but none of this program
    assert not (tmp_path / "exps").exists()


def test_message_of_a_real_process(tmp_path):
    run_script("train.py", "--dataset_name=nosuch", cwd=tmp_path).refused(r"unknown dataset_name 'nosuch'")


def test_full_disk_is_one_line(tmp_path):
    """A student of 189 k parameters does not fit into 100 kB, nor does the training state."""
    result = run_ranks("train", train_flags(teacher(), total_kimg=0.008), tmp_path, disk=100_000)
    result.refused(r"network-snapshot|training-state|exps")
    run_dir = only_run(tmp_path / "exps")
    assert not list(run_dir.glob(".*tmp*")) and not list(run_dir.glob("*.safetensors"))


# --- What a run is and leaves behind ---------------------------------------------------------------------------------


def test_dry_run_prints_the_settings_and_writes_nothing(tmp_path):
    result = invoke("train", EMOJI, "--num_steps=5", "--M=2", "--desc=x", "-n").ok()
    settings = json.loads(result.output[: result.output.rindex("}") + 1])
    assert settings["num_steps"] == 5 and settings["M"] == 2 and settings["batch"] == 128 and settings["lr"] == 5e-5
    assert settings["total_kimg"] == 200 and settings["afs"] is True and settings["sampler_tea"] == "dpmpp"
    assert settings["schedule_type"] == "polynomial" and settings["schedule_rho"] == 7 and settings["max_order"] is None
    assert "NFE 3" in result.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source, evaluations", [("seven", 5), ("variable", 5)])
def test_dry_run_of_the_second_stage(source, evaluations):
    """The teacher is a student of 7 timestamps with its own AFS, whatever solver the flags name."""
    output = second_stage(student(source), "--max_order=3", "-n").ok().output
    assert f"Student: NFE 1; teacher: {evaluations} evaluations per trajectory" in output
    config = DistillConfig("tiny", num_steps=3, M=2, is_second_stage=True, model_path=str(student(source)))
    assert run_cost(config, tiny_network(), source_settings(config)).teacher == evaluations
    second_stage(student(source), "-n", M=9).refused("--num_steps=3 --M=9 sample the model at 21 timestamps")
    second_stage("12", "-n").refused("run 12 does not exist")


def test_teacher_evaluations_are_counted_as_they_are_made():
    """Of every solver, by the plan and by calls of the network."""
    for changes, count in (({}, 6), ({"sampler_tea": "heun", "denoise_to_zero": True}, 13), ({"afs": False}, 6)):
        config = DistillConfig("tiny", M=1, model_path=str(teacher()), **changes)
        trajectories, calls = distill.Teacher(load_teacher(None, teacher()), config, config.sampling(0.006, 80)), []
        trajectories.model.net.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        trajectories.trajectory(torch.randn(1, 3, 8, 8) * 80, None, 4)
        assert len(calls) == trajectories.plan(4).nfe == count


@pytest.mark.parametrize(
    "changes, desc, name",
    [
        ({}, None, "cifar10-4-2-dpmpp-3-poly7-afs"),
        ({"afs": False}, "try", "cifar10-4-3-dpmpp-3-poly7-try"),
        ({"use_step_condition": True}, None, "cifar10-4to7-2to5-dpmpp-3-poly7-afs"),
        ({"sampler_tea": "heun", "M": 0, "schedule_type": "logsnr"}, "a b", "cifar10-4-2-heun-0-logsnr-afs-a b"),
        ({"schedule_type": "time_uniform", "schedule_rho": 2.5}, None, "cifar10-4-2-dpmpp-3-uni2.5-afs"),
        ({"is_second_stage": True, "num_steps": 3, "M": 2}, None, "cifar10-3-1-euler-2-poly7-afs"),
    ],
)
def test_run_directory_name(changes, desc, name):
    assert DistillConfig("cifar10", **changes).run_name(desc) == name


def test_run_directory_holds_what_the_design_names(tmp_path):
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "exps", desc="mine", dropout=0.1, seed=3)).ok()
    run_dir = only_run(tmp_path / "exps")
    assert run_dir.name == "00000-tiny-4-2-dpmpp-1-poly7-afs-mine"
    names = {p.name for p in run_dir.iterdir() if not p.name.startswith(".")}
    expected = {
        STATE,
        "training-state.1.pt",
        STATS,
        OPTIONS,
        "log.txt",
        "network-snapshot-000000.safetensors",
        "teacher-and-student-000000.png",
    }
    assert names == expected
    options = json.loads((run_dir / OPTIONS).read_text())["config"]
    assert (
        options["dropout"] == 0.1 and options["seed"] == 3 and options["batch"] == 8 and options["precision"] == "fp32"
    )
    with Image.open(run_dir / "teacher-and-student-000000.png") as picture:
        picture.load()
        assert (
            picture.width >= 80
            and len(
                set(
                    picture.convert("L").get_flattened_data()
                    if hasattr(picture, "get_flattened_data")
                    else picture.getdata()
                )
            )
            > 10
        )
    settings = read_settings(newest_student(run_dir))
    assert settings["format"] == "student" and settings["training"]["images"] == 64
    assert settings["sampling"]["num_steps"] == 4 and settings["sampling"]["afs"] is True
    assert settings["sampling"]["sigma_min"] == 0.006 and settings["sampling"]["sigma_max"] == 80
    assert settings["sampling"]["dataset_name"] == "tiny" and settings["sampling"]["use_step_condition"] is False


def test_statistics_of_every_tick(tmp_path):
    invoke("train", *train_flags(teacher(), outdir=tmp_path)).ok()
    stats = stats_of(only_run(tmp_path))
    assert [line["images"] for line in stats] == [16, 32, 48, 64]
    keys = {
        "images",
        "kimg",
        "seconds",
        "loss",
        "lr",
        "skipped",
        "sec_per_kimg",
        "sec_per_tick",
        "maintenance",
        "timestamp",
        "cpumem",
    }
    for line in stats:
        assert keys | {"loss/4/0", "loss/4/1", "loss/4/2"} <= line.keys()
        assert line["loss"] == line["loss/4/2"] > 0 and line["skipped"] == 0 and 0 < line["cpumem"] < 64
        assert line["kimg"] == line["images"] / 1000
    assert sorted(s["seconds"] for s in stats) == [s["seconds"] for s in stats]
    for line, status in zip(stats, status_lines(only_run(tmp_path)), strict=True):
        assert re.search(rf"loss {line['loss']:.4g}\b", status)
        for field in ("tick", "kimg", "time", "eta", "sec/kimg", "loss", "mem"):
            assert re.search(rf"(^| ){field} +\S", status)


@pytest.mark.parametrize("skipped", [0, 12])
def test_a_status_line_fits_100_columns(skipped):
    """Of a run of weeks, with numbers that have no end."""
    stats = {"kimg": 199999.936, "seconds": 1e6, "sec_per_kimg": 1234.5678, "loss": 12345.678, "cpumem": 79.123}
    line = status_line(9999, {**stats, "skipped": skipped}, 2e6)
    assert len(line) <= 100 and "eta 23d 03h 33m" in line and ("skipped 12" in line) is bool(skipped)


def test_without_a_terminal_there_is_no_bar_but_an_eta(tmp_path):
    output = run_ranks("train", train_flags(teacher(), outdir=tmp_path, M=0), tmp_path).ok().output
    assert "\r" not in output and "it/s" not in output and "img/s" not in output
    ticks = [line for line in output.splitlines() if line.startswith("tick ")]
    assert len(ticks) == 4 and all(re.search(r" eta \d+s ", line) for line in ticks)
    assert max(map(len, output.splitlines())) < 200


def test_dry_run_names_the_directory_that_the_run_uses(tmp_path):
    args = train_flags(teacher(), outdir="exps", total_kimg=0.008, M=0)
    name = "00000-tiny-4-2-dpmpp-0-poly7-afs"
    assert f"Run directory: exps/{name}, a new run" in invoke("train", *args, "-n").ok().output
    assert "Run directory: here, a new run" in invoke("train", *args, "--nosubdir", "--outdir=here", "-n").ok().output
    assert not list(tmp_path.iterdir())
    invoke("train", *args).ok()
    assert f"Run directory: exps/{name}, already finished" in invoke("train", *args, "-n").ok().output
    (tmp_path / "exps" / name / "network-snapshot-000000.safetensors").unlink()
    for more in ([], ["--nosubdir", f"--outdir=exps/{name}"], [f"--resume=exps/{name}"]):
        assert f"Run directory: exps/{name}, continued" in invoke("train", *args, *more, "-n").ok().output
    assert "Run directory: exps/00001-tiny" in invoke("train", *args, "--resume=never", "-n").ok().output


def test_statistics_of_sfd_v_name_the_number_of_steps(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path, use_step_condition=True, M=0, tick=1, total_kimg=0.096)
    invoke("train", *args).ok()
    keys = {k for k in stats_of(only_run(tmp_path))[0] if k.startswith("loss/")}
    drawn = {int(k.split("/")[1]) for k in keys}
    assert len(drawn) > 1 and drawn <= {4, 5, 6, 7}
    assert keys == {f"loss/{n}/{i}" for n in drawn for i in range(n - 1)}


def test_student_file_equals_the_live_student(tmp_path):
    live = []
    original = loop.save_student

    def recorded(path, student, training):
        original(path, student, training)
        live.append(({k: v.clone() for k, v in student.net.state_dict().items()}, student))

    with mock.patch.object(loop, "save_student", recorded):
        invoke("train", *train_flags(teacher(), outdir=tmp_path, total_kimg=0.016)).ok()
    state, trained = live[-1]
    loaded = load_student(only_run(tmp_path))
    assert same(loaded.net.state_dict(), state)
    assert loaded.sampling == trained.sampling and loaded.net.init_kwargs == trained.net.init_kwargs
    assert not same(state, weights(teacher()))


def test_tick_snap_and_dump_count(tmp_path):
    saved = {"state": [], "snapshot": []}
    state, snapshot = TrainingState.save, loop.save_snapshot

    def save(self, *args):
        saved["state"].append(self.images)
        state(self, *args)

    def save_snapshot(state, *args, **kwargs):
        saved["snapshot"].append(state.images)
        snapshot(state, *args, **kwargs)

    with (
        mock.patch.object(TrainingState, "save", save),
        mock.patch.object(loop, "save_snapshot", save_snapshot),
    ):
        args = dict(total_kimg=0.056, tick=0.008, snap=3, dump=2, M=0)
        invoke("train", *train_flags(teacher(), outdir=tmp_path, **args)).ok()
    assert len(status_lines(only_run(tmp_path))) == 7
    assert saved == {"state": [16, 32, 48, 56], "snapshot": [24, 48, 56]}


def test_the_newest_students_are_kept(tmp_path):
    """Files of other names stay, pictures too."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "network-snapshots.safetensors").write_text("not of a run")
    changes = dict(total_kimg=4, batch=500, tick=1, snap=1, dump=9, M=0, num_steps=3, keep_snapshots=2)
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "here", **changes), "--nosubdir").ok()
    names = sorted(path.name for path in (tmp_path / "here").glob("*.safetensors"))
    assert names == [f"network-snapshot-00000{i}.safetensors" for i in (3, 4)] + ["network-snapshots.safetensors"]
    assert len(list((tmp_path / "here").glob("teacher-and-student-*.png"))) == 4


def test_captions_of_pictures_need_a_text_conditioned_student(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "x", validation_prompts="captions.txt")
    invoke("train", *args).refused(r"--validation_prompts: tiny has no text")
    assert not (tmp_path / "x").exists()


def test_dump_is_not_missed_when_ticks_are_shorter_than_the_batch(tmp_path):
    """Five images to a tick, eight to a batch: ticks 1, 3, 4, 6, 8, 9, 11, 12; a dump is due every five ticks."""
    saved = []
    with mock.patch.object(TrainingState, "save", lambda state, *args: saved.append(state.images)):
        invoke("train", *train_flags(teacher(), outdir=tmp_path, tick=0.005, dump=5, M=0)).ok()
    assert saved == [32, 56, 64]


@pytest.mark.parametrize(
    "schedule, expected",
    [("step", [2e-3] * 4 + [2e-4] * 4), ("linear", [2e-3 * (8 - i) / 8 for i in range(8)])],
)
def test_learning_rate_follows_its_schedule(schedule, expected, tmp_path):
    used = []
    original = distill.Distiller.iterate

    def recorded(distiller, *args):
        used.append(distiller.optimizer.param_groups[0]["lr"])
        assert len(distiller.optimizer.param_groups) == 1
        return original(distiller, *args)

    with mock.patch.object(distill.Distiller, "iterate", recorded):
        invoke("train", *train_flags(teacher(), outdir=tmp_path, lr=2e-3, lr_schedule=schedule, M=0)).ok()
    assert used == pytest.approx(expected)
    assert [line["lr"] for line in stats_of(only_run(tmp_path))] == pytest.approx(expected[1::2])


def test_reported_learning_rate_is_the_one_used(tmp_path):
    """Half of the run lies within an iteration: that one still runs at the full rate."""
    used = []
    original = distill.Distiller.iterate

    def recorded(distiller, *args):
        used.append(distiller.optimizer.param_groups[0]["lr"])
        return original(distiller, *args)

    with mock.patch.object(distill.Distiller, "iterate", recorded):
        invoke("train", *train_flags(teacher(), outdir=tmp_path, total_kimg=0.025, tick=0.008, M=0)).ok()
    assert [line["lr"] for line in stats_of(only_run(tmp_path))] == used


def test_options_change_what_they_should(tmp_path):
    """Equal options give equal weights; each of these changes them."""
    base = dict(total_kimg=0.008, M=0)
    runs = {
        "base": {}, "again": {}, "seed": {"seed": 1}, "dropout": {"dropout": 0.5}, "lr": {"lr": 2e-3}, "bf16": {"precision": "bf16"},
        "order": {"M": 1, "max_order": 1}, "order3": {"M": 1}, "noise": {"M": 1, "predict_x0": False},
        "final": {"M": 1, "lower_order_final": False}, "heun": {"M": 1, "sampler_tea": "heun"}, "rho": {"schedule_rho": 5},
        "logsnr": {"schedule_type": "logsnr"}, "noafs": {"afs": False}, "denoised": {"denoise_to_zero": True},
        "muon": {"optimizer": "muon"}, "knee": {"loss_knee": 0.1},
    }  # fmt: skip
    found = {}
    for name, changes in runs.items():
        invoke("train", *train_flags(teacher(), outdir=tmp_path / name, **{**base, **changes})).ok()
        found[name] = weights(only_run(tmp_path / name))
    assert same(found["base"], found.pop("again"))
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not same(found[a], found[b]), (a, b)
    assert distance(found["base"], found["bf16"]) < 0.01  # a rounding difference, not another method


def test_dropout_defaults_to_the_teachers_own(tmp_path):
    """0 for the tiny teacher: naming it changes nothing."""
    for name, dropout in (("own", None), ("zero", 0)):
        invoke("train", *train_flags(teacher(), outdir=tmp_path / name, total_kimg=0.008, M=0, dropout=dropout)).ok()
    assert same(weights(only_run(tmp_path / "own")), weights(only_run(tmp_path / "zero")))


def test_dropout_of_the_run_is_not_carried_into_sampling_or_the_picture(tmp_path):
    invoke("train", *train_flags(teacher(), outdir=tmp_path, total_kimg=0.008, M=0, dropout=0.5)).ok()
    model = load_student(only_run(tmp_path))
    x = torch.randn(2, *model.shape) * 80
    assert torch.equal(model.denoise(x, 80.0), model.denoise(x, 80.0))


def test_nosubdir_uses_the_folder_itself(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "here", total_kimg=0.016, M=0)
    invoke("train", *args, "--nosubdir").ok()
    assert newest_student(tmp_path / "here").exists() and not run_dirs(tmp_path / "here")
    invoke("train", *args, "--nosubdir", "--seed=5").refused(r"other settings \(seed 0 there, 5 here\)")
    invoke("train", *args, "--nosubdir", "--resume=never").refused(r"already holds a run")


@pytest.mark.parametrize(
    "batch, batch_gpu, processes, size", [(8, None, 1, 8), (8, None, 2, 4), (8, 2, 2, 2), (8, 64, 1, 8)]
)
def test_micro_batch(batch, batch_gpu, processes, size):
    assert micro_batch(batch, batch_gpu, processes) == size


def test_total_is_rounded_up_to_whole_iterations(tmp_path):
    assert DistillConfig("x", total_kimg=0.02, batch=8).total_images == 24
    assert DistillConfig("x", total_kimg=0.001, batch=8).total_images == 8
    assert DistillConfig("x", total_kimg=0.032, batch=8).total_images == 32
    assert DistillConfig("x").total_images == 1563 * 128


# --- Non-finite losses -----------------------------------------------------------------------------------------------


class Poisoned:
    """`Distiller.iterate` whose noise is NaN in some iterations; records the precision of each."""

    def __init__(self, poisoned, stop_before=None):
        self.poisoned, self.stop_before, self.seen = poisoned, stop_before, []
        self.original = distill.Distiller.iterate

    def patch(self):
        return mock.patch.object(distill.Distiller, "iterate", lambda *args: self(*args))

    def __call__(self, distiller, noise, labels, num_steps):
        index = int(round(self.at(distiller)))
        self.seen.append((index, distiller.student.compute_dtype, distiller.teacher.model.compute_dtype))
        if index == self.stop_before:
            raise RuntimeError("stopped here")
        if index in self.poisoned:
            noise = noise * float("nan")
        return self.original(distiller, noise, labels, num_steps)

    def at(self, distiller):
        return self.first + len(self.seen) if hasattr(self, "first") else len(self.seen)


def test_half_precision_overflow_goes_on_in_float32_and_stays_there_on_resuming(tmp_path):
    half, single = (torch.float16,) * 2, (torch.float32,) * 2
    args = dict(precision="fp16", M=0)
    whole = Poisoned({2})
    with whole.patch():
        invoke("train", *train_flags(teacher(), outdir=tmp_path / "whole", **args)).ok()
    run_dir = only_run(tmp_path / "whole")
    assert [dtypes for _, *dtypes in whole.seen] == [list(half)] * 3 + [list(single)] * 5
    log = (run_dir / "log.txt").read_text()
    assert log.count("continuing in float32") == 1 and "not finite at kimg 0.024" in log
    stats = stats_of(run_dir)
    assert [line["skipped"] for line in stats] == [0, 2, 2, 2]
    assert re.search(r"skipped 2\b", status_lines(run_dir)[-1])
    assert all(v.isfinite().all() for v in weights(run_dir).values())
    assert read_state(run_dir / STATE)["half_off"] is True

    stopped = Poisoned({2}, stop_before=6)
    with stopped.patch():
        assert "stopped here" in invoke("train", *train_flags(teacher(), outdir=tmp_path / "parts", **args)).output
    rest = Poisoned(set())
    with rest.patch():
        invoke("train", *train_flags(teacher(), outdir=tmp_path / "parts", **args)).ok()
    assert [dtypes for _, *dtypes in rest.seen] == [list(single)] * 2
    assert same(weights(only_run(tmp_path / "parts")), weights(run_dir))
    assert stats_of(only_run(tmp_path / "parts"))[-1]["skipped"] == 2


def test_statistics_stay_json_when_a_loss_was_not_finite(tmp_path):
    """`NaN` is no JSON: jq, pandas and browsers refuse it."""
    with Poisoned({1}).patch():
        invoke("train", *train_flags(teacher(), outdir=tmp_path, M=0)).ok()

    def refuse(name):
        raise AssertionError(f"{name} in stats.jsonl")

    for line in (only_run(tmp_path) / STATS).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_single_precision_does_not_switch(tmp_path):
    with (poisoned := Poisoned({1})).patch():
        invoke("train", *train_flags(teacher(), outdir=tmp_path, M=0)).ok()
    assert {dtype for _, *dtypes in poisoned.seen for dtype in dtypes} == {torch.float32}
    assert "float32" not in (only_run(tmp_path) / "log.txt").read_text()
    assert stats_of(only_run(tmp_path))[-1]["skipped"] == 2


def test_many_skipped_steps_end_the_run(tmp_path):
    with (poisoned := Poisoned(range(1, 10**6))).patch():
        result = invoke("train", *train_flags(teacher(), outdir=tmp_path, M=0, batch=1, total_kimg=0.5, num_steps=3))
    result.refused(r"loss is not finite, or its gradients: \d+ steps skipped up to kimg .*--lr")
    assert 20 <= len(poisoned.seen) <= 100
    assert not list(only_run(tmp_path).glob("*.safetensors"))


# --- Second stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, conditioned", [("seven", False), ("variable", True)])
def test_second_stage(source, conditioned, tmp_path):
    second_stage(student(source), outdir=tmp_path, total_kimg=0.016).ok()
    run_dir = only_run(tmp_path)
    assert run_dir.name == "00000-tiny-3-1-euler-2-poly7-afs"
    model = load_student(run_dir)
    assert model.sampling.nfe == 1 and model.sampling.num_steps == 3 and model.sampling.is_second_stage
    assert model.sampling.use_step_condition is conditioned
    assert model.sampling.step_condition == (3.0 if conditioned else None)
    assert any("step" in name for name in model.net.state_dict()) is conditioned
    assert not same(weights(run_dir), weights(student(source)))
    assert "loss/3/1" in stats_of(run_dir)[-1]


def test_second_stage_takes_a_run_number_a_folder_and_a_file(tmp_path, monkeypatch):
    (tmp_path / "exps").mkdir()
    (tmp_path / "exps" / "00007-anything").symlink_to(student("seven"))
    monkeypatch.chdir(tmp_path)
    for i, form in enumerate(("7", "exps/00007-anything", newest_student(student("seven")))):
        second_stage(form, outdir=tmp_path / f"out{i}", total_kimg=0.008).ok()
    assert same(weights(only_run(tmp_path / "out0")), weights(only_run(tmp_path / "out2")))


@pytest.mark.parametrize(
    "source, changes, pattern",
    [
        ("seven", {"num_steps": 4}, r"--num_steps=4 --M=2 sample the model at 10 timestamps.* for 7;"),
        ("seven", {"M": 1}, r"--num_steps=3 --M=1 sample the model at 5 timestamps"),
        ("variable", {"M": 4}, r"at 11 timestamps.* for 4\D+7;"),
        ("seven", {"schedule_type": "logsnr"}, r"--schedule_type=logsnr.*polynomial"),
        ("seven", {"schedule_rho": 5}, r"--schedule_rho=5.*7"),
        ("seven", {"use_step_condition": True}, r"--use_step_condition=True, but --model_path has no step condition"),
        ("seven", {"dataset_name": "emoji32"}, r"distilled on tiny, not on --dataset_name=emoji32"),
        ("second", {}, r"--model_path is itself a second-stage model"),
        ("second-variable", {}, r"--model_path is itself a second-stage model"),
    ],
)
def test_second_stage_refuses_what_contradicts_its_teacher(source, changes, pattern, tmp_path):
    second_stage(student(source), outdir=tmp_path / "x", **changes).refused(pattern)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("lpips", ["reference", "standard"])
def test_second_stage_without_the_weights_of_lpips(tmp_path, monkeypatch, lpips):
    monkeypatch.setenv("SFD_OFFLINE", "1")
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "src"))
    result = second_stage(student("seven"), outdir=tmp_path / "x", lpips=lpips)
    result.refused(r"weights-vgg16-lpips\.pth is not there; get it from https://.*; --lpips=off trains without it")
    assert not (tmp_path / "x").exists()


def test_second_stage_refuses_what_is_no_student(tmp_path):
    second_stage("12", outdir=tmp_path / "x").refused(r"run 12 does not exist under \./exps")
    second_stage(teacher(), outdir=tmp_path / "x").refused(r"tiny\.safetensors is a teacher, not a student")
    (tmp_path / "empty").mkdir()
    second_stage(tmp_path / "empty", outdir=tmp_path / "x").refused(r"holds no network-snapshot")
    content = newest_student(student("seven")).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    second_stage(tmp_path / "half.safetensors", outdir=tmp_path / "x").refused(r"half\.safetensors is not a readable")
    second_stage(tmp_path / "none.safetensors", outdir=tmp_path / "x").refused(r"none\.safetensors does not exist")
    assert not (tmp_path / "x").exists()


def test_second_stage_of_a_teacher_of_ones_own(tmp_path):
    """The name of such a model is not in the registry: it must not be asked for, or be taken."""
    stage = dict(outdir=tmp_path, total_kimg=0.008, is_second_stage=True, num_steps=3, M=2, lpips="off")
    results = [invoke("train", *train_flags(student("seven"), **stage, dataset_name=name)) for name in (None, "tiny")]
    assert any(result.code == 0 for result in results), [result.output for result in results]


def test_second_stage_learns_from_the_student_as_it_is_sampled(tmp_path):
    """The targets are what sample.py gives for the source student: Euler with its own AFS and step condition."""
    from models.sampling import draw_latents, student_sampler

    for source in ("seven", "variable"):
        seen = []
        original = distill.Teacher.trajectory

        def recorded(self, x, labels, num_steps, original=original, seen=seen):
            states = original(self, x, labels, num_steps)
            seen.append((x, states))
            return states

        with mock.patch.object(distill.Teacher, "trajectory", recorded):
            second_stage(student(source), outdir=tmp_path / source, total_kimg=0.008).ok()
        model = load_student(student(source))
        sampler = student_sampler(model, 7)
        for x, states in seen:
            assert len(states) == 3
            torch.testing.assert_close(states[-1], sampler.run(x, None), rtol=1e-5, atol=1e-5)
        assert draw_latents(model, [0])[0].shape == (1, 3, 8, 8)


def test_known_as_tiny_is_undone():
    with known_as_tiny():
        pass
    invoke("train", "--dataset_name=tiny", "-n").refused("unknown dataset_name 'tiny'")


def test_snapshot_is_read_back_bitwise(tmp_path):
    tensors, _ = read_network(newest_student(student()))
    assert same(load_student(student()).net.state_dict(), tensors)
