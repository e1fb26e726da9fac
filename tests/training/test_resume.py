"""Runs that were stopped and go on: bitwise the weights of an uninterrupted run, and never two runs in one folder."""

from __future__ import annotations

import json
import os
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
    student,
    teacher,
    train_flags,
    weights,
    write_teacher,
)  # fmt: skip

from dnnlib import UserError
from torch_utils.checkpoint import read_state, save_state
from training import runs
from training.config import DistillConfig

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
    invoke("train", *args).ok()
    assert len(run_dirs(tmp_path / "exps")) == 3
    assert {p: p.stat().st_mtime_ns for p in run_dir.iterdir()} == finished


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
    config = DistillConfig("tiny", **SHORT)
    opened, barrier = [], threading.Barrier(8)

    def launch():
        barrier.wait()
        run = runs.open_run(tmp_path, config, {}, resume="never")
        opened.append(run)

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.path for run in opened}) == 8
    assert sorted(run.path.name[:5] for run in opened) == [f"{i:05d}" for i in range(8)]


def test_run_that_is_being_trained_is_left_alone(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    held = runs.lock(run_dir)
    try:
        invoke("train", *args, f"--resume={run_dir}").refused(r"is being trained by another process")
        invoke("train", *args).ok()
    finally:
        held.close()
    assert len(run_dirs(tmp_path / "exps")) == 2 and images_of(run_dir) == [16]
    invoke("train", *args).ok()
    assert images_of(run_dir) == [16, 32]


def test_an_unreadable_run_beside_it_does_not_stop_a_launch(tmp_path):
    args, run_dir = unfinished(tmp_path / "exps")
    (run_dir / OPTIONS).write_text("{ half")
    invoke("train", *args).ok()
    assert len(run_dirs(tmp_path / "exps")) == 2 and images_of(run_dir) == [16]


def test_another_teacher_under_the_same_name_is_another_run(tmp_path):
    """The weights of the teacher are part of what determines a run; only the path of its file is compared."""
    path = write_teacher(tmp_path / "mine.safetensors", seed=0)
    args = train_flags(path, outdir=tmp_path / "exps", **SHORT)
    killed(args, tmp_path, at=4)
    assert "Continuing" in invoke("train", *args).ok().output
    assert student().exists()
