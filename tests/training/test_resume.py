"""Runs that were stopped and go on: bitwise the weights of an uninterrupted run, and never two runs in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny import (
    OPTIONS,
    ROOT,
    STATE,
    STATS,
    invoke,
    newest_student,
    only_run,
    run_dirs,
    run_ranks,
    same,
    teacher,
    train_flags,
    weights,
    write_teacher,
)  # fmt: skip

from dnnlib import UserError, sha256_of
from models.loading import read_sampling
from torch_utils.checkpoint import read_state, save_state
from training import runs
from training.config import DistillConfig
from training.state import states

ITERATE = "training.distill:Distiller.iterate"


def images_of(run_dir):
    return [json.loads(line)["images"] for line in (run_dir / STATS).read_text().splitlines()]


def killed(args, cwd, at, **kwargs):
    """Run until SIGKILL comes instead of iteration `at` (from 1)."""
    result = run_ranks("train", args, cwd, kill=(ITERATE, at), **kwargs)
    assert result.code == -signal.SIGKILL, result.output


VARIANTS = {
    "sfd": {},
    "dropout": {"dropout": 0.3},
    "muon": {"optimizer": "muon", "loss_knee": 0.1, "M": 0},
    "sfd-v": {"use_step_condition": True, "M": 0, "dropout": 0.2},
    "accumulated": {"batch_gpu": 4, "sampler_tea": "heun", "M": 0},
}


@pytest.mark.parametrize(
    "variant", ["sfd", "sfd-v", "muon", *(pytest.param(v, marks=pytest.mark.slow) for v in ("dropout", "accumulated"))]
)
def test_killed_run_ends_as_an_uninterrupted_one(variant, tmp_path):
    changes = VARIANTS[variant]
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "whole", **changes)).ok()
    args = train_flags(teacher(), outdir=tmp_path / "parts", **changes)
    killed(args, tmp_path, at=6)  # after the dump at 32 images, with one iteration more that is lost
    result = invoke("train", *args).ok()
    whole, parts = only_run(tmp_path / "whole"), only_run(tmp_path / "parts")
    assert "Continuing" in result.output and "kimg 0.032" in result.output
    assert same(weights(whole), weights(parts))
    a, b = read_state(whole / STATE), read_state(parts / STATE)
    assert same(a["student"], b["student"]) and a["images"] == b["images"] == 64
    for key, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][key][k]) for k, v in moments.items())
    assert images_of(whole) == images_of(parts) == [16, 32, 48, 64]
    assert newest_student(whole).name == newest_student(parts).name


def test_statistics_of_lost_iterations_are_dropped(tmp_path):
    """Dumps every two ticks: the tick at 48 was reported before the kill, but not saved."""
    args = train_flags(teacher(), outdir=tmp_path, dump=2, M=0)
    killed(args, tmp_path, at=7)
    assert images_of(only_run(tmp_path)) == [16, 32, 48] and read_state(only_run(tmp_path) / STATE)["images"] == 32
    invoke("train", *args).ok()
    assert images_of(only_run(tmp_path)) == [16, 32, 48, 64]


def test_run_killed_before_its_first_dump_starts_again_cleanly(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "parts", dump=3, M=0)
    killed(args, tmp_path, at=5)
    assert images_of(only_run(tmp_path / "parts")) == [16, 32] and not (only_run(tmp_path / "parts") / STATE).exists()
    invoke("train", *args).ok()
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "whole", dump=3, M=0)).ok()
    assert images_of(only_run(tmp_path / "parts")) == [16, 32, 48, 64]
    assert same(weights(only_run(tmp_path / "parts")), weights(only_run(tmp_path / "whole")))


def test_run_killed_while_saving_keeps_the_earlier_state(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "parts", M=0)
    # The second dump has been written under its temporary name, but not renamed.
    result = run_ranks("train", args, tmp_path, kill=("os:fsync", 3))
    assert result.code == -signal.SIGKILL, result.output
    run_dir = only_run(tmp_path / "parts")
    assert list(run_dir.glob(".*.tmp.*")) and read_state(run_dir / STATE)["images"] == 16
    invoke("train", *args).ok()
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "whole", M=0)).ok()
    assert same(weights(run_dir), weights(only_run(tmp_path / "whole")))


@pytest.mark.slow
def test_real_process_killed_from_outside(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "parts", total_kimg=0.16, dropout=0.2)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *args], cwd=tmp_path, env=env, stdout=out, stderr=out
        )
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"parts/*/{STATE}")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "out").read_text()
    assert 0 < read_state(only_run(tmp_path / "parts") / STATE)["images"] < 160
    assert "Continuing" in invoke("train", *args).ok().output
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "whole", total_kimg=0.16, dropout=0.2)).ok()
    assert same(weights(only_run(tmp_path / "parts")), weights(only_run(tmp_path / "whole")))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dropout": 0.3}, {"use_step_condition": True, "M": 0}])
def test_two_processes_killed_and_continued(changes, tmp_path):
    run_ranks("train", train_flags(teacher(), outdir=tmp_path / "whole", **changes), tmp_path, 2).ok()
    args = train_flags(teacher(), outdir=tmp_path / "parts", **changes)
    killed(args, tmp_path, at=6, processes=2)
    run_ranks("train", args, tmp_path, 2).ok()
    assert same(weights(only_run(tmp_path / "whole")), weights(only_run(tmp_path / "parts")))


# --- Which run a command continues -----------------------------------------------------------------------------------

SHORT = {"total_kimg": 0.032, "M": 0}


def unfinished(outdir, **changes):
    """A run that was killed after its dump at 16 of 32 images; returns its flags and its folder."""
    args = train_flags(teacher(), outdir=outdir, **{**SHORT, **changes})
    before = set(run_dirs(outdir))
    killed(args, outdir.parent, at=4)
    (run_dir,) = set(run_dirs(outdir)) - before
    return args, run_dir


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """Flags without --outdir, and the folder of a run that was killed after its state at 16 of 32 images."""
    args, run_dir = unfinished(tmp_path_factory.mktemp("stopped") / "exps", keep=1)
    return [arg for arg in args if not arg.startswith("--outdir")], run_dir


def test_resume_never_makes_a_new_run(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    state = (run_dir / STATE).read_bytes()
    invoke("train", *args, "--resume=never").ok()
    assert [p.name[:5] for p in run_dirs(tmp_path / "exps")] == ["00000", "00001"]
    assert (run_dir / STATE).read_bytes() == state


def test_auto_continues_only_the_same_settings_and_only_unfinished_runs(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    invoke("train", *args, "--seed=1").ok()
    assert len(run_dirs(tmp_path / "exps")) == 2 and images_of(run_dir) == [16]
    invoke("train", *args).ok()
    assert len(run_dirs(tmp_path / "exps")) == 2 and images_of(run_dir) == [16, 32]
    finished = {p: p.stat().st_mtime_ns for p in run_dir.iterdir()}
    for more in ([], [f"--resume={run_dir}"]):
        again = invoke("train", *args, *more).ok()
        assert f"already finished: {run_dir}; --resume=never trains another one" in again.output
    assert len(run_dirs(tmp_path / "exps")) == 2
    assert {p: p.stat().st_mtime_ns for p in run_dir.iterdir()} == finished
    invoke("train", *args, "--resume=never").ok()
    assert len(run_dirs(tmp_path / "exps")) == 3 and same(weights(run_dirs(tmp_path / "exps")[-1]), weights(run_dir))


def test_what_does_not_change_the_weights_may_change_on_resuming(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    invoke("train", *args, "--batch-gpu=4", "--tick=0.008", "--snap=2", "--dump=3").ok()
    assert len(run_dirs(tmp_path / "exps")) == 1 and images_of(run_dir) == [16, 24, 32]


def test_a_run_of_a_version_with_fewer_settings_is_continued(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    saved = json.loads((run_dir / OPTIONS).read_text())
    del saved["config"]["lr_schedule"], saved["config"]["denoise_to_zero"]
    (run_dir / OPTIONS).write_text(json.dumps(saved))
    invoke("train", *args, "--lr_schedule=linear", f"--resume={run_dir}").refused(r"lr_schedule 'step' there, 'linear'")
    invoke("train", *args).ok()
    assert len(run_dirs(tmp_path / "exps")) == 1 and images_of(run_dir) == [16, 32]


def test_resume_path_takes_the_folder_or_its_state(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    result = invoke("train", *args, f"--outdir={tmp_path / 'other'}", f"--resume={run_dir}").ok()
    assert f"Continuing {run_dir}" in result.output and images_of(run_dir) == [16, 32]
    args, run_dir = unfinished(tmp_path / "exps", seed=1)
    invoke("train", *args, f"--resume={run_dir / STATE}").ok()
    assert images_of(run_dir) == [16, 32] and not (tmp_path / "other").exists()


def test_resume_path_refuses_other_settings_and_names_them(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    result = invoke("train", *args, "--seed=4", "--lr=0.5", f"--resume={run_dir}")
    result.refused(r"other settings \(.*lr 0\.001 there, 0\.5 here.*seed 0 there, 4 here")
    assert "batch" not in result.output.split("other settings")[1].split(")")[0]
    assert images_of(run_dir) == [16]


@pytest.mark.parametrize("form", ["nowhere", "empty", "empty/training-state.pt", "file"])
def test_resume_path_without_a_run_is_refused(form, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    given = f"--resume={tmp_path / form}"
    invoke("train", *train_flags(teacher()), given).refused(rf"{given}: .* holds no training_options")


def test_nosubdir_continues_in_place(tmp_path):
    args = [*train_flags(teacher(), outdir=tmp_path / "here", **SHORT), "--nosubdir"]
    killed(args, tmp_path, at=4)
    assert "Continuing" in invoke("train", *args).ok().output
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "whole", **SHORT)).ok()
    assert same(weights(tmp_path / "here"), weights(only_run(tmp_path / "whole")))


def test_nosubdir_refuses_a_run_of_other_settings_that_has_not_saved_yet(tmp_path):
    args = [*train_flags(teacher(), outdir=tmp_path / "here", **SHORT, dump=9), "--nosubdir"]
    killed(args, tmp_path, at=4)
    assert not (tmp_path / "here" / STATE).exists()
    invoke("train", *args, "--seed=9").refused("other settings")


@pytest.mark.parametrize(
    "damage",
    ["empty", "garbage", "half", "text", "other-content", "other-network", "list"],
)
def test_damaged_training_state_is_one_clear_line(damage, tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    path = run_dir / STATE
    content = path.read_bytes()
    if damage in ("empty", "garbage", "half", "text"):
        new = {
            "empty": b"",
            "garbage": bytes(range(256)) * 50,
            "half": content[: len(content) // 2],
            "text": b"not a state\n",
        }
        path.write_bytes(new[damage])
    else:
        other = read_state(path)
        if damage == "other-network":
            del other["student"]["model.map_layer0.weight"]
        save_state(path, {"other-content": {"a": 1}, "list": [1, 2], "other-network": other}[damage])
    invoke("train", *args).refused(r"training-state\.pt")
    assert images_of(run_dir) == [16]


@pytest.mark.parametrize(
    "first", [b"0", b"(", b"\x80", b"c", b"R", b"}", b"K", b"U\xff", b"\x8a\xff", b"PK\x03\x04", b"X\xff\xff\xff\xff"]
)
def test_reading_a_training_state_never_ends_in_a_traceback(first, tmp_path):

    (tmp_path / "s.pt").write_bytes(first + b"\x00" * 40 + b".")
    with pytest.raises(UserError, match=r"s\.pt is not a readable training state"):
        read_state(tmp_path / "s.pt")
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        read_state(tmp_path / "none.pt")


def test_training_state_that_would_execute_code_is_refused(tmp_path):

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"student": Bomb()}, tmp_path / "s.pt")
    with pytest.raises(UserError, match="not a readable training state"):
        read_state(tmp_path / "s.pt")
    assert not (tmp_path / "executed").exists()


# --- Several launches ------------------------------------------------------------------------------------------------


def test_concurrent_launches_do_not_share_a_run_directory(tmp_path):
    """Nor do they start the same run twice, unless they are asked to."""
    config = DistillConfig("tiny", **SHORT)
    opened, refused, barrier = [], [], threading.Barrier(8)

    def launch(outdir, resume):
        barrier.wait()
        try:
            opened.append(runs.open_run(runs.Place(outdir, resume=resume), config, {}))
        except UserError as error:
            refused.append(error.message)

    for resume, count in (("never", 8), ("auto", 1)):
        opened.clear()
        arguments = (tmp_path / resume, resume)
        threads = [threading.Thread(target=launch, args=arguments) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(run.path.name[:5] for run in opened) == [f"{i:05d}" for i in range(count)]
        assert len(refused) == 8 - count and all("is being trained by another process" in line for line in refused)


def test_run_that_is_being_trained_is_left_alone(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    held = runs.lock(run_dir, "held")
    try:
        for more in ([], [f"--resume={run_dir}"]):
            result = invoke("train", *args, *more)
            result.refused(rf"{run_dir}, a run of these settings, is being trained by another process")
        invoke("train", *args, "--resume=never").ok()
    finally:
        held.close()
    assert len(run_dirs(tmp_path / "exps")) == 2 and images_of(run_dir) == [16]
    invoke("train", *args).ok()
    assert images_of(run_dir) == [16, 32]


def test_an_unreadable_run_beside_it_does_not_stop_a_launch(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    (run_dir / OPTIONS).write_text("{ half")
    for path in states(run_dir):
        path.unlink()
    invoke("train", *args).ok()
    assert len(run_dirs(tmp_path / "exps")) == 2 and images_of(run_dir) == [16]


#: What may become of `training_options.json`; a million brackets exceed what Python's parser recurses into.
DAMAGE = {
    "missing": None,
    "half": '{"config": {"seed": ',
    "deep": "[" * 10**6,
    "list": '{"config": [1, 2]}',
    "empty": "",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_is_known_by_its_state_where_its_options_are_damaged(damage, tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    (run_dir / OPTIONS).unlink() if DAMAGE[damage] is None else (run_dir / OPTIONS).write_text(DAMAGE[damage])
    for more in (["--nosubdir", f"--outdir={run_dir}"], [f"--resume={run_dir}"]):
        invoke("train", *args, "--seed=3", *more).refused(r"other settings \(seed 0 there, 3 here\)")
    state = read_state(run_dir / STATE)
    save_state(run_dir / STATE, {name: value for name, value in state.items() if name != "config"})
    invoke("train", *args, f"--resume={run_dir}").refused(r"training_options\.json")  # nobody knows any more
    save_state(run_dir / STATE, state)
    invoke("train", *args).ok()
    assert len(run_dirs(tmp_path / "exps")) == 1 and images_of(run_dir) == [16, 32]
    assert json.loads((run_dir / OPTIONS).read_text())["config"]["seed"] == 0


def test_settings_of_a_state_count_where_the_options_say_otherwise(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    options = json.loads((run_dir / OPTIONS).read_text())
    (run_dir / OPTIONS).write_text(json.dumps({**options, "config": {**options["config"], "seed": 5}}))
    invoke("train", *args, "--seed=5").refused(r"training-state\.pt has other settings \(seed 0 there, 5 here\)")
    assert images_of(run_dir) == [16] and states(run_dir)


CRAFTED = {
    "images-huge": {"images": 10**18}, "images-negative": {"images": -8}, "images-text": {"images": "16"},
    "images-float": {"images": 16.0}, "images-bool": {"images": True}, "seconds-none": {"seconds": None},
    "seconds-nan": {"seconds": float("nan")}, "skipped-text": {"skipped": "x"}, "skipped-tensor": {"skipped": torch.ones(3)},
    "half-off": {"half_off": "no"}, "student-list": {"student": [1]}, "optimizer-none": {"optimizer": None},
    "config-list": {"config": [1]}, "seen-text": {"seen_skips": "1"},
}  # fmt: skip


@pytest.mark.parametrize("craft", [*CRAFTED, "weights", "moments", "moment-shape", "moment-names", "rates"])
def test_crafted_training_states_are_one_line(craft, stopped_run, tmp_path):
    args, source = stopped_run
    run_dir = tmp_path / source.name
    shutil.copytree(source, run_dir)
    state = read_state(run_dir / STATE)
    first = next(iter(state["optimizer"]["state"].values()))
    if craft == "weights":
        next(iter(state["student"].values())).view(-1)[0] = float("nan")
    elif craft == "moments":
        first["exp_avg"].view(-1)[0] = float("inf")
    elif craft == "moment-shape":
        first["exp_avg"] = torch.zeros(3)
    elif craft == "moment-names":
        del first["exp_avg_sq"]
    elif craft == "rates":
        state["optimizer"]["param_groups"][0] |= {"lr": "x", "betas": (5, "y"), "eps": None}
    save_state(run_dir / STATE, {**state, **CRAFTED.get(craft, {})})
    result = invoke("train", *args, f"--outdir={tmp_path}")
    if craft == "rates":  # settings are those of the command
        assert images_of(run_dir) == [16, 32] and result.ok()
    else:
        result.refused(r"training-state\.pt is not a readable training state")
        assert images_of(run_dir) == [16]


def test_a_pipe_in_place_of_a_state_does_not_hang(stopped_run, tmp_path):
    args, source = stopped_run
    run_dir = tmp_path / source.name
    shutil.copytree(source, run_dir)
    (run_dir / STATE).unlink()
    os.mkfifo(run_dir / STATE)
    invoke("train", *args, f"--outdir={tmp_path}").refused(r"training-state\.pt.*no regular file")


def test_a_broken_last_line_of_statistics_is_dropped(stopped_run, tmp_path):
    args, source = stopped_run
    run_dir = tmp_path / source.name
    shutil.copytree(source, run_dir)
    with open(run_dir / STATS, "ab") as file:
        file.write(b'{"images": 8, "kimg": \xff' + b"[" * 10**5)
    invoke("train", *args, f"--outdir={tmp_path}").ok()
    assert images_of(run_dir) == [16, 32]


def test_another_teacher_under_the_same_name_is_another_run(tmp_path):
    """What the teacher's file holds is part of what determines a run; where it lies is not."""
    path = write_teacher(tmp_path / "mine.safetensors", seed=0)
    args = [*train_flags(None, outdir=tmp_path / "exps", **SHORT)]
    killed([*args, f"--model_path={path}"], tmp_path, at=4)
    write_teacher(path, seed=1)
    invoke("train", *args, f"--model_path={path}").ok()
    assert len(run_dirs(tmp_path / "exps")) == 2
    (tmp_path / "moved").mkdir()
    moved = write_teacher(tmp_path / "moved" / "mine.safetensors", seed=0)
    assert "Continuing" in invoke("train", *args, f"--model_path={moved}").ok().output
    assert len(run_dirs(tmp_path / "exps")) == 2


def test_a_student_knows_where_its_teacher_is_and_what_it_holds(tmp_path, monkeypatch):
    """From another folder, after a move, and where something else lies in its place."""
    monkeypatch.chdir(tmp_path)
    path = write_teacher(tmp_path / "mine.safetensors", seed=0)
    invoke("train", *train_flags("mine.safetensors", **SHORT)).ok()
    run_dir = only_run(tmp_path / "exps")
    sampling = read_sampling(newest_student(run_dir))
    assert (sampling.teacher_path, sampling.teacher_sha256) == (str(path), sha256_of(path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sheet = ["sample", f"--model_path={run_dir}", "--compare=True", "--seeds=0-1", "--device=cpu", "--outdir=x"]
    invoke(*sheet).ok()
    moved = path.rename(tmp_path / "moved.safetensors")
    invoke(*sheet).refused(
        rf"--teacher: {path}, the teacher of \S*network-snapshot-000000, is not there; say where it is"
    )
    invoke(*sheet, f"--teacher={moved}").ok()
    write_teacher(path, seed=1)
    for more in ([], [f"--teacher={path}"]):
        invoke(*sheet, *more).refused(r"mine\.safetensors is not the teacher of .*network-snapshot-000000")
    invoke(*sheet, "--teacher=nowhere").refused("nowhere does not exist; expected the teacher of")
    path.unlink()
    plot = ["training.plot", str(run_dir), "--trajectory", "--num=1", "--device=cpu"]
    invoke(*plot, f"--teacher={moved}").ok()
