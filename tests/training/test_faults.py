"""Signals, kills at any moment, faults of the machine: a finished run, or one clear line; never a lost one.

What this suite shows, with the number of cases tried, is in docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import click
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import (
    ROOT,
    SAMPLE,
    STATE,
    STATS,
    flags,
    invoke,
    only_run,
    png_names,
    run_dirs,
    run_ranks,
    same,
    start_ranks,
    student,
    teacher,
    train_flags,
    wait_ranks,
    weights,
    write_images,
    write_teacher,
)  # fmt: skip

from dnnlib import UserError, one_line_errors
from dnnlib.errors import share_failures
from dnnlib.signals import EXIT_CODES, Stopped, deferred_stop
from torch_utils.arrays import read_arrays, read_headers
from torch_utils.checkpoint import read_network, read_state, save_state
from torch_utils.metrics.image_set import ImageDataset
from training import distill, options, runs
from training.evaluation.sources import open_source
from training.health import StopRequests
from training.state import states

ITERATE = "training.distill:Distiller.iterate"
#: Generous, for a machine that is busy with other things: it only bounds how long a hang would take.
TIMEOUT = 300


def images_of(run_dir):
    return [json.loads(line)["images"] for line in (run_dir / STATS).read_text().splitlines()]


def whole_run(tmp_path, processes=1, **changes):
    """The weights of a run that nothing interrupts."""
    args = train_flags(teacher(), outdir=tmp_path / "whole", **changes)
    (invoke("train", *args) if processes == 1 else run_ranks("train", args, tmp_path, processes, timeout=TIMEOUT)).ok()
    return weights(only_run(tmp_path / "whole"))


# --- Faults that a process brings upon itself ------------------------------------------------------------------------


def at_call(name, count, action):
    """Do `action` before the `count`-th call of `package.module:Class.method` in this process."""
    module, _, path = name.partition(":")
    owner = importlib.import_module(module)
    *parts, last = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            action()
        return original(*args, **kwargs)

    setattr(owner, last, counted)


def raise_signal(number):
    return lambda: os.kill(os.getpid(), number)


def stop_at_five():
    at_call(ITERATE, 5, raise_signal(signal.SIGTERM))


def interrupt_at_five():
    at_call(ITERATE, 5, raise_signal(signal.SIGINT))


def interrupt_twice():
    at_call(ITERATE, 5, raise_signal(signal.SIGINT))
    at_call("training.state:TrainingState.save", 1, raise_signal(signal.SIGINT))


def die_at_four():
    at_call(ITERATE, 4, raise_signal(signal.SIGKILL))


def stall_at_four():
    at_call(ITERATE, 4, lambda: time.sleep(3))


def exhaust_memory():
    at_call(ITERATE, 4, lambda: torch.empty(2**55, dtype=torch.uint8))


def defect_at_four():
    at_call(ITERATE, 4, lambda: {}["a defect of the program"])


def lose_folder():
    at_call(ITERATE, 4, lambda: [shutil.rmtree(path) for path in Path("exps").glob("0*")])


def lose_teacher():
    at_call(ITERATE, 4, lambda: os.unlink("own.safetensors"))


def nobody():
    os.setgid(65534)
    os.setuid(65534)


def fill_images_disk():
    """Room for what rank 1 prints, but for no image."""
    at_call("torch_utils.images:to_pil", 1, lambda: None)
    import torch_utils.image_writer as writer

    writer.to_pil = lambda image: (_ for _ in ()).throw(OSError(28, "No space left on device"))


def _faulty_main(fault, at, rank, *args):
    if rank == at:
        globals()[fault]()
    tiny._rank_main(*args)


def run_faulty(fault, args, cwd, processes=1, rank=0, script="train", timeout=TIMEOUT):
    """As `run_ranks`, with a fault (a function above) in one of the ranks."""
    base, started = {"OMP_NUM_THREADS": "1"}, []
    if processes > 1:
        base |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    for own in range(processes):
        env = {**base, "RANK": str(own), "LOCAL_RANK": str(own)} if processes > 1 else base
        log = Path(cwd) / f".rank{own}-{time.monotonic_ns()}.log"
        target = (fault, rank, own, script, list(map(str, args)), env, str(cwd), str(log), None, None)
        process = tiny._context().Process(target=_faulty_main, args=target)
        process.start()
        started.append((process, log))
    return wait_ranks(started, timeout)


# --- Stopping --------------------------------------------------------------------------------------------------------

NO_DUMPS = {"dump": 1000, "M": 0}


@pytest.mark.parametrize("fault, name, code", [("stop_at_five", "SIGTERM", 75), ("interrupt_at_five", "SIGINT", 130)])
def test_a_signal_saves_the_state_and_ends_the_run(fault, name, code, tmp_path):
    """In the middle of a tick, with no dump before: nothing that was computed is lost."""
    args = train_flags(teacher(), outdir=tmp_path / "parts", **NO_DUMPS)
    result = run_faulty(fault, args, tmp_path)
    assert result.code == code == EXIT_CODES[signal.Signals[name]] and "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if "Stopped" in line]
    assert len(lines) == 1 and re.search(rf"Stopped by {name} at kimg 0\.04, the state is saved; repeat", lines[0])
    run_dir = only_run(tmp_path / "parts")
    assert read_state(run_dir / STATE)["images"] == 40 and not list(run_dir.glob("*.safetensors"))
    assert "Continuing" in invoke("train", *args).ok().output
    assert same(weights(run_dir), whole_run(tmp_path, **NO_DUMPS)) and images_of(run_dir) == [16, 32, 48, 64]


def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path, **NO_DUMPS)
    result = run_faulty("stop_at_five", args, tmp_path, processes=2, rank=1)
    assert result.code == 75 and "Traceback" not in result.output
    assert result.output.count("Stopped by SIGTERM at kimg 0.04, the state is saved") == 1
    assert read_state(only_run(tmp_path) / STATE)["images"] == 40


def test_a_second_interrupt_does_not_wait_for_the_state(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path, **NO_DUMPS)
    result = run_faulty("interrupt_twice", args, tmp_path)
    assert result.code == 130 and "Traceback" not in result.output and result.output.count("Stopped by SIGINT") == 1
    assert not list(only_run(tmp_path).glob("*.pt"))


def test_a_signal_from_outside_takes_less_than_ten_seconds(tmp_path):
    started = start_ranks("train", train_flags(teacher(), outdir=tmp_path, **{**NO_DUMPS, "total_kimg": 50}), tmp_path)
    (process, _), stats = started[0], None
    deadline = time.monotonic() + TIMEOUT
    while not stats and time.monotonic() < deadline:
        time.sleep(0.02)
        stats = list(tmp_path.glob(f"*/{STATS}"))
    signalled = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    result = wait_ranks(started, TIMEOUT)
    assert result.code == 75 and time.monotonic() - signalled < 10, result.output
    state = read_state(only_run(tmp_path) / STATE)
    assert state["images"] >= max(images_of(only_run(tmp_path))) > 0 and state["seconds"] > 0


def test_signals_wait_only_where_they_are_asked_to():
    """And the handlers of the program around are put back."""
    before, came = {number: signal.getsignal(number) for number in EXIT_CODES}, []

    @click.command()
    def command():
        with deferred_stop() as asked:
            assert asked() is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            came.append(asked())
        os.kill(os.getpid(), signal.SIGTERM)
        came.append("not reached")

    with mock.patch.object(sys, "argv", ["x"]), pytest.raises(SystemExit) as ended:
        one_line_errors(command)()
    assert came == [signal.SIGTERM] and ended.value.code == 75
    assert {number: signal.getsignal(number) for number in EXIT_CODES} == before
    assert not issubclass(Stopped, Exception)


def test_a_signal_does_not_keep_a_rank_from_saying_what_happened(capsys, monkeypatch):
    """torchrun sends SIGTERM as soon as another rank has failed, which is when this one asks for the reason."""

    class Board:
        def read(self, wait):
            os.kill(os.getpid(), signal.SIGTERM)
            return "the other one failed (rank 1)"

    @click.command()
    def command():
        share_failures(Board())
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        one_line_errors(command)()
    assert ended.value.code == 1 and capsys.readouterr().err == "Error: the other one failed (rank 1)\n"


# --- Kills at random moments -----------------------------------------------------------------------------------------

#: Fifty iterations, each followed by a state: much of the time is spent writing.
WRITING = {"total_kimg": 0.4, "tick": 0.008, "snap": 10, "M": 0, "dropout": 0.2}


def changed_since(path, before):
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns != before
    return False


def kill_at_random(rng, args, cwd, run_dir, processes, number):
    """Start the run, wait for it to get further, and send a signal at some moment; its exit code, 0 if it was faster."""
    state = run_dir() / STATE if run_dir() else None
    before = state.stat().st_mtime_ns if state and state.exists() else None
    started = start_ranks("train", args, cwd, processes)
    deadline = time.monotonic() + TIMEOUT
    while any(p.is_alive() for p, _ in started) and time.monotonic() < deadline:
        if run_dir() and changed_since(run_dir() / STATE, before):
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    for process, _ in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    result = wait_ranks(started, TIMEOUT)
    assert "(timed out)" not in result.output, result.output
    return result


def run_and_kill(seed, kills, processes, tmp_path):
    """Kill a run again and again, let it end, and compare it with one that nothing interrupted; the exit codes."""
    rng = random.Random(seed)
    args = train_flags(teacher(), outdir=tmp_path / "parts", **WRITING)

    def run_dir():
        return next(iter(run_dirs(tmp_path / "parts")), None)

    codes = []
    while len(codes) < kills:
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        result = kill_at_random(rng, args, tmp_path, run_dir, processes, number)
        if result.code == 0:
            break
        assert result.code == EXIT_CODES.get(number, -number), result.output
        codes.append(result.code)
        assert any(read_state(path) for path in states(run_dir())[:1])
        for path in run_dir().glob("network-snapshot-*.safetensors"):
            read_network(path)
    run_ranks("train", args, tmp_path, processes, timeout=TIMEOUT) if codes and result.code else None
    only = only_run(tmp_path / "parts")
    assert same(weights(only), whole_run(tmp_path, processes, **WRITING))
    assert images_of(only) == list(range(8, 401, 8)) and not list(only.glob(".*.tmp.*"))
    assert {p.name for p in only.glob("network-snapshot-*")} == {"network-snapshot-000000.safetensors"}
    return codes


def test_run_killed_at_random_moments(tmp_path):
    assert len(run_and_kill(0, 4, 1, tmp_path)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_run_killed_at_many_random_moments(seed, tmp_path):
    assert len(run_and_kill(seed, 8, 1, tmp_path)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 9))
def test_two_processes_killed_at_random_moments(seed, tmp_path):
    assert len(run_and_kill(seed, 5, 2, tmp_path)) >= 2


MOMENTS = [("os:fsync", 2), ("os:fsync", 5), ("os:link", 1), ("os:link", 2), ("os:replace", 3), ("os:replace", 5),
           ("os:replace", 6), ("pathlib:Path.unlink", 5), ("torch:save", 3), ("training.loop:save_student", 1),
           ("training.report:save_picture", 1)]  # fmt: skip


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (i % 4 > 0), id=f"{m[0]}-{m[1]}")
                                    for i, m in enumerate(MOMENTS)])  # fmt: skip
def test_run_killed_while_it_writes(moment, tmp_path):
    """While it writes, shifts and prunes states, and while it writes its student."""
    changes = {"M": 0, "tick": 0.008, "snap": 3}
    args = train_flags(teacher(), outdir=tmp_path / "parts", **changes)
    result = run_ranks("train", args, tmp_path, kill=moment, timeout=TIMEOUT)
    assert result.code == -signal.SIGKILL, result.output
    run_dir = only_run(tmp_path / "parts")
    assert all(read_state(path)["images"] % 8 == 0 for path in states(run_dir))
    result = run_ranks("train", args, tmp_path, timeout=TIMEOUT).ok()
    assert same(weights(run_dir), whole_run(tmp_path, **changes)) and len(states(run_dir)) == 2
    assert list(run_dir.glob("teacher-and-student-*.png")) and not list(run_dir.glob(".*.tmp.*"))


def test_run_killed_between_its_last_state_and_its_student_is_completed(tmp_path):
    args = train_flags(teacher(), outdir=tmp_path / "parts", M=0)
    assert run_ranks("train", args, tmp_path, kill=("training.loop:save_student", 1)).code == -signal.SIGKILL
    run_dir = only_run(tmp_path / "parts")
    assert read_state(run_dir / STATE)["images"] == 64 and not list(run_dir.glob("*.safetensors"))
    invoke("train", *args).ok()
    assert same(weights(run_dir), whole_run(tmp_path, M=0))


# --- Retention and damage --------------------------------------------------------------------------------------------


def test_keep_says_how_many_states_stay(tmp_path):
    for keep, images in {1: [64], 3: [64, 56, 48]}.items():
        invoke("train", *train_flags(teacher(), outdir=tmp_path / str(keep), M=0, tick=0.008, keep=keep)).ok()
        found = states(only_run(tmp_path / str(keep)))
        assert [read_state(path)["images"] for path in found] == images
        assert [path.name for path in found] == [STATE, "training-state.1.pt", "training-state.2.pt"][:keep]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run that was killed after its states at 40 and 48 of 64 images, and its flags."""
    folder = tmp_path_factory.mktemp("stopped")
    args = train_flags(teacher(), M=0, tick=0.008)
    assert run_ranks("train", [*args, "--outdir=parts"], folder, kill=(ITERATE, 7)).code == -signal.SIGKILL
    return folder, args, whole_run(folder, M=0, tick=0.008)


def damage_file(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        state = read_state(path)
        changed = {"other": {"a": 1}, "optimizer": {**state, "optimizer": {"state": {}, "param_groups": []}}}
        save_state(path, changed[damage])


@pytest.mark.parametrize("damage", ["bit", "half", "empty", "other", "optimizer"])
def test_a_damaged_state_falls_back_to_the_one_before(damage, stopped, tmp_path):
    folder, args, whole = stopped
    run_dir = tmp_path / only_run(folder / "parts").name
    shutil.copytree(only_run(folder / "parts"), run_dir)
    damage_file(run_dir / STATE, damage)
    result = invoke("train", *args, f"--outdir={tmp_path}").ok()
    said = (
        rf"Warning: .*{STATE} is not a readable training state.*damaged-{STATE}, going back to .*training-state\.1\.pt"
    )
    assert len(re.findall(said, result.output)) == 1 and "kimg 0.04" in result.output
    assert same(weights(run_dir), whole) and (run_dir / f"damaged-{STATE}").exists()
    assert [read_state(path)["images"] for path in states(run_dir)] == [64, 56]


def test_without_any_good_state_nothing_is_touched(stopped, tmp_path):
    folder, args, _ = stopped
    run_dir = tmp_path / only_run(folder / "parts").name
    shutil.copytree(only_run(folder / "parts"), run_dir)
    for path in states(run_dir):
        damage_file(path, "half")
    names = sorted(path.name for path in run_dir.iterdir())
    invoke("train", *args, f"--outdir={tmp_path}").refused(r"training-state\.pt is not a readable training state")
    assert sorted(path.name for path in run_dir.iterdir()) == names


def test_damage_is_noticed_by_one_rank_and_followed_by_all(stopped, tmp_path):
    folder, args, _ = stopped
    run_dir = tmp_path / only_run(folder / "parts").name
    shutil.copytree(only_run(folder / "parts"), run_dir)
    damage_file(run_dir / STATE, "bit")
    result = run_ranks("train", [*args, f"--outdir={tmp_path}"], tmp_path, 2, timeout=TIMEOUT).ok()
    assert result.output.count("Warning: ") == 1 and "kimg 0.04" in result.output


def test_other_settings_are_taken_over_when_asked_for(stopped, tmp_path):
    folder, args, _ = stopped
    run_dir = tmp_path / only_run(folder / "parts").name
    shutil.copytree(only_run(folder / "parts"), run_dir)
    other = [*args, "--lr=0.01", "--total_kimg=0.08", f"--resume={run_dir}"]
    invoke("train", *other).refused(r"lr 0\.001 there, 0\.01 here.*--resume-override")
    invoke("train", *args, "--resume-override").refused(r"--resume-override needs --resume=PATH or --nosubdir")
    result = invoke("train", *other, "--resume-override").ok()
    assert re.search(
        r"Warning: other settings than before: total_kimg 0\.064 there, 0\.08 here; lr 0\.001", result.output
    )
    assert images_of(run_dir)[-1] == 80 and runs.read_options(run_dir)["lr"] == 0.01
    assert "other settings" not in invoke("train", *other).ok().output


def test_a_restart_by_torchrun_goes_on_with_the_run_that_it_started(stopped, tmp_path, monkeypatch):
    folder, args, whole = stopped
    run_dir = tmp_path / only_run(folder / "parts").name
    shutil.copytree(only_run(folder / "parts"), run_dir)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    invoke("train", *args, f"--outdir={tmp_path}", "--resume=never").ok()
    assert only_run(tmp_path) == run_dir and same(weights(run_dir), whole)


RESTARTED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}, {tests!r} + "/training", {tests!r} + "/models"]
import torch
torch.set_num_threads(1)
from test_faults import ITERATE, at_call, raise_signal
import train
from dnnlib import one_line_errors
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_call(ITERATE, 5, raise_signal(signal.SIGKILL))
one_line_errors(train.main)()
"""


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_torchrun_recovers_from_the_death_of_a_rank_by_itself(resume, tmp_path):
    (tmp_path / "dying.py").write_text(RESTARTED.format(root=str(ROOT), tests=str(ROOT / "tests")))
    args = train_flags(teacher(), outdir=tmp_path / "parts", M=0, tick=0.008, resume=resume)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    done = subprocess.run([*torchrun, str(tmp_path / "dying.py"), *args], cwd=tmp_path, timeout=TIMEOUT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0 and "Continuing" in done.stdout, done.stdout
    assert same(weights(only_run(tmp_path / "parts")), whole_run(tmp_path, 2, M=0, tick=0.008))


@contextlib.contextmanager
def long_run_under_torchrun(tmp_path: Path):
    """A long training run of two ranks that has reported already, as (arguments, torchrun's process)."""
    args = train_flags(teacher(), outdir=tmp_path / "parts", **{**NO_DUMPS, "total_kimg": 50})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen([*torchrun, str(ROOT / "train.py"), *args], cwd=tmp_path, stdout=out, stderr=out,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        deadline = time.monotonic() + TIMEOUT
        while not list(tmp_path.glob(f"parts/*/{STATS}")) and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            yield args, process
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_torchrun_forwards_sigterm(tmp_path):
    with long_run_under_torchrun(tmp_path) as (_, process):
        process.send_signal(signal.SIGTERM)
        code = process.wait(TIMEOUT)
    output = (tmp_path / "out").read_text()
    assert code == 1 and output.count("Stopped by SIGTERM at kimg") == 1, (code, output)
    assert read_state(only_run(tmp_path / "parts") / STATE)["images"] > 0


def test_a_rank_whose_launcher_is_gone_stops(monkeypatch):
    """torchrun that was killed ends nobody: its ranks have another parent then."""
    for environment, stops in (({"TORCHELASTIC_RUN_ID": "x"}, True), ({}, False)):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        requests = StopRequests(torch.device("cpu"))
        assert not requests.poll(False) and requests.poll(True)
        with mock.patch("os.getppid", return_value=os.getppid() + 1):
            assert requests.poll(False) is requests.is_orphan is stops
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(tmp_path):
    """They save their state; until they have ended, the same command does not start a second run."""
    with long_run_under_torchrun(tmp_path) as (args, process):
        run_dir = only_run(tmp_path / "parts")
        invoke("train", *args).refused("is being trained by another process")
        process.kill()
        process.wait()
    deadline = time.monotonic() + TIMEOUT
    held = None
    while held is None and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(UserError):
            held = runs.lock(run_dir, "held")
    held.close()
    assert "Stopped by the end of torchrun at kimg" in (run_dir / "log.txt").read_text()
    assert len(run_dirs(tmp_path / "parts")) == 1 and read_state(run_dir / STATE)["images"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_student_ends_cleanly(number, tmp_path):
    """Whenever it comes, and the command that is repeated then finds the run finished."""
    args = train_flags(teacher(), outdir=tmp_path, M=0)
    for delay in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        with open(tmp_path / "out", "w") as out:
            process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], stdout=out, stderr=out,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
            while process.poll() is None and not list(tmp_path.glob("*/network-snapshot-*")):
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(number)
            code = process.wait(TIMEOUT)
        text = (tmp_path / "out").read_text()
        assert code in (0, EXIT_CODES[number]) and "Traceback" not in text and "terminate" not in text, (code, text)
        assert "already finished" in invoke("train", *args).ok().output


# --- Faults of the machine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, pattern",
    [
        ("exhaust_memory", r"out of memory .*--batch-gpu.*\(rank 1\)"),
        ("die_at_four", r"another process of this run ended or does not answer"),
        pytest.param("defect_at_four", r"KeyError.*a defect of the program.*\(rank 1\)", marks=pytest.mark.slow),
    ],
)
def test_what_ends_one_rank_is_said_by_rank_0(fault, pattern, tmp_path):
    started = time.monotonic()
    args = train_flags(teacher(), outdir=tmp_path, M=0, tick=0.008)
    result = run_faulty(fault, args, tmp_path, processes=2, rank=1)
    assert "(timed out)" not in result.output and time.monotonic() - started < TIMEOUT
    lines = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert result.code not in (0, None) and len(lines) == 1 and re.search(pattern, lines[0]), result.output
    assert result.output.count("Traceback") == (fault == "defect_at_four")  # that one is for its authors
    assert not list(only_run(tmp_path).glob("*.safetensors")) and read_state(only_run(tmp_path) / STATE)["images"] == 24


def test_too_little_memory_is_one_line(tmp_path):
    result = run_faulty("exhaust_memory", train_flags(teacher(), outdir=tmp_path, M=0), tmp_path)
    result.refused(r"out of memory \(.*can't allocate memory.*--batch-gpu")


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(tmp_path):
    run_faulty(
        "stall_at_four", train_flags(teacher(), outdir=tmp_path / "slow", M=0), tmp_path, processes=2, rank=1
    ).ok()
    assert same(weights(only_run(tmp_path / "slow")), whole_run(tmp_path, 2, M=0))


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "x"}, "the environment has RANK, but .*'x'; start by torchrun"), ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE='' in"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9+' in"), ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' in"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, but .*MASTER_ADDR expected, but not set; start by torchrun"),
])  # fmt: skip
def test_half_of_an_environment_of_torchrun_is_one_line(environment, words, tmp_path, monkeypatch):
    """As schedulers leave it that start one process."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = train_flags(teacher(), outdir=tmp_path, total_kimg=0.008)
    invoke("train", *args).refused(words)


def test_a_run_whose_folder_was_removed_is_one_line(tmp_path):
    run_faulty("lose_folder", train_flags(teacher(), M=0), tmp_path).refused(r"stats\.jsonl|training-state")


@pytest.mark.slow
def test_a_run_whose_teacher_was_removed_goes_on(tmp_path):
    write_teacher(tmp_path / "own.safetensors")
    run_faulty("lose_teacher", train_flags("own.safetensors", M=0), tmp_path).ok()


def test_disk_that_is_full_later_keeps_what_was_saved(tmp_path):
    """A student of 760 kB fits below the limit, a state of 2.3 MB does not; then there is room again."""
    args = train_flags(teacher(), outdir=tmp_path / "parts", M=0, snap=1)
    result = run_ranks("train", args, tmp_path, disk=1_500_000, timeout=TIMEOUT)
    result.refused(r"training-state\.pt cannot be written")
    run_dir = only_run(tmp_path / "parts")
    assert not list(run_dir.glob(".*.tmp.*")) and not states(run_dir)
    invoke("train", *args).ok()
    assert same(weights(run_dir), whole_run(tmp_path, M=0))


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at `folder`; only root can make one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_file_system(tmp_path):
    """6 MB: two states and a third one being written do not fit."""
    args = train_flags(teacher(), outdir=tmp_path / "disk", M=0, tick=0.008)
    with small_disk(tmp_path / "disk", 6_000_000):
        run_ranks("train", args, tmp_path, timeout=TIMEOUT).refused(
            r"training-state\.pt cannot be written|No space left"
        )
        run_dir = only_run(tmp_path / "disk")
        assert [read_state(path)["images"] for path in states(run_dir)] == [16, 8]
        assert not list(run_dir.glob(".*.tmp.*")) and not list(run_dir.glob("*.safetensors"))
        run_ranks("train", [*args, "--keep=1"], tmp_path, timeout=TIMEOUT).refused(r"cannot be written|No space left")
        subprocess.run(["mount", "-o", "remount,size=20000000", str(tmp_path / "disk")], check=True)
        run_ranks("train", args, tmp_path, timeout=TIMEOUT).ok()
        assert same(weights(run_dir), whole_run(tmp_path, M=0, tick=0.008))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without permissions")
@pytest.mark.parametrize("script", ["train", "sample"])
def test_folder_without_permission_is_one_line(script, tmp_path, monkeypatch):
    own = Path("own.safetensors") if script == "train" else Path("run")
    write_teacher(tmp_path / own) if script == "train" else shutil.copytree(student(), tmp_path / own)
    (tmp_path / "locked").mkdir(mode=0o555)
    for path in (tmp_path, *tmp_path.glob("run")):
        path.chmod(0o777)
    for path in tmp_path.parents[:2]:  # pytest's own
        path.chmod(0o711)
    monkeypatch.chdir(tmp_path)
    sampling = flags(SAMPLE, model_path=own, seeds=0, outdir="locked/x")
    args = train_flags(own, outdir="locked/x") if script == "train" else sampling
    run_faulty("nobody", args, Path("."), script=script).refused(r"--outdir: locked.*[Pp]ermission")
    assert not list((tmp_path / "locked").iterdir())


# --- Numbers that are not finite -------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned(place, iterations):
    """NaN in the gradient of a weight, in a state of the teacher, or in the loss, in some iterations."""
    seen, original = [], distill.Distiller.iterate
    names = {"teacher": "trajectory", "gradient": "_update", "loss": "_update"}
    owner = distill.Teacher if place == "teacher" else distill.Distiller
    inner = getattr(owner, names[place])

    def iterate(self, *args):
        seen.append(len(seen))
        return original(self, *args)

    def spoil(self, *args):
        if seen[-1] not in iterations:
            return inner(self, *args)
        if place == "teacher":
            states = inner(self, *args)
            states[-1, 0, 0, 0, 0] = float("nan")
            return states
        if place == "gradient":
            self.trained[0].grad.view(-1)[0] = float("inf")
            return inner(self, *args)
        return inner(self, args[0] * float("nan"))

    with mock.patch.object(distill.Distiller, "iterate", iterate), mock.patch.object(owner, names[place], spoil):
        yield


@pytest.mark.parametrize("place, skipped", [("gradient", 2), ("teacher", 1), ("loss", 2)])
def test_a_number_that_is_not_finite_costs_its_steps_alone(place, skipped, tmp_path):
    with poisoned(place, {2}):
        invoke("train", *train_flags(teacher(), outdir=tmp_path, M=0)).ok()
    last = json.loads((only_run(tmp_path) / STATS).read_text().splitlines()[-1])
    assert last["skipped"] == skipped and all(value.isfinite().all() for value in weights(only_run(tmp_path)).values())


def test_an_overflow_just_before_a_kill_is_not_forgotten(tmp_path):
    """On CUDA the count of skipped steps is looked at one iteration later; a state can fall in between."""
    args = train_flags(teacher(), outdir=tmp_path, precision="fp16", **NO_DUMPS)
    assert run_faulty("stop_at_five", args, tmp_path).code == 75
    path = only_run(tmp_path) / STATE
    save_state(path, {**read_state(path), "skipped": 1, "seen_skips": 0, "bad_losses": 1, "seen_bad_losses": 0})
    result = invoke("train", *args).ok()
    assert "not finite at kimg 0.048: continuing in float32" in result.output
    assert read_state(path)["half_off"] is True


@pytest.mark.parametrize("iterations, switched", [({1, 2, 4, 5, 6}, False), ({1, 2, 3, 4, 5}, True)])
def test_half_precision_outlives_single_overflows_of_gradients(iterations, switched, tmp_path):
    with poisoned("gradient", iterations):
        result = invoke("train", *train_flags(teacher(), outdir=tmp_path, M=0, precision="fp16")).ok()
    assert ("Gradients of 5 iterations in a row were not finite" in result.output) == switched
    last = json.loads((only_run(tmp_path) / STATS).read_text().splitlines()[-1])
    assert last["skipped"] == 2 * len(iterations) and read_state(only_run(tmp_path) / STATE)["half_off"] is switched


def test_states_of_older_versions_are_read(stopped, tmp_path):
    folder, args, whole = stopped
    run_dir = tmp_path / only_run(folder / "parts").name
    shutil.copytree(only_run(folder / "parts"), run_dir)
    state = read_state(run_dir / STATE)
    newer = ("seen_skips", "bad_losses", "seen_bad_losses")
    save_state(run_dir / STATE, {name: value for name, value in state.items() if name not in newer})
    invoke("train", *args, f"--outdir={tmp_path}").ok()
    assert same(weights(run_dir), whole)


def test_too_little_memory_for_a_state_is_no_damage_of_it(stopped, tmp_path):
    folder, args, _ = stopped
    run_dir = tmp_path / only_run(folder / "parts").name
    shutil.copytree(only_run(folder / "parts"), run_dir)
    names = sorted(path.name for path in run_dir.iterdir())
    with mock.patch("torch.load", side_effect=lambda *_, **__: torch.empty(2**55, dtype=torch.uint8)):
        invoke("train", *args, f"--outdir={tmp_path}").refused(r"out of memory")
    assert sorted(path.name for path in run_dir.iterdir()) == names


def test_weights_that_are_not_finite_end_the_run(tmp_path):
    """A weight that is spoilt between two ticks: no student, and the state before stays."""

    def spoil(self, *args, original=distill.Distiller.iterate):
        states = original(self, *args)
        if self.optimizer.state[self.trained[0]]["step"] > 6:
            with torch.no_grad():
                self.trained[0].view(-1)[0] = float("inf")
        return states

    args = train_flags(teacher(), outdir=tmp_path, M=0, tick=0.008, num_steps=3)
    with mock.patch.object(distill.Distiller, "iterate", spoil):
        invoke("train", *args).refused(
            r"1 of \d+ weights of the student are not finite at kimg 0\.\d+; lower --lr=0\.001"
        )
    run_dir = only_run(tmp_path)
    assert not list(run_dir.glob("*.safetensors")) and read_state(run_dir / STATE)["images"] > 0
    invoke("train", *args).ok()
    invoke("train", *train_flags(teacher(), outdir=tmp_path, lr="1e308")).refused(r"--lr.*1e\+308 is not in the range")


@pytest.mark.parametrize("place", ["teacher", pytest.param("loss", marks=pytest.mark.slow)])
def test_numbers_that_are_never_finite_end_the_run(place, tmp_path):
    with poisoned(place, range(10**6)):
        result = invoke("train", *train_flags(teacher(), outdir=tmp_path, M=0, batch=1, num_steps=3, tick=1))
    result.refused(r"the loss is not finite, or its gradients: \d+ steps skipped")
    assert not list(only_run(tmp_path).glob("*.safetensors"))


# --- Sampling --------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*.png") if not path.name.startswith(".")}


def stop_sampling():
    at_call("torch_utils.image_writer:ImageWriter.write", 2, raise_signal(signal.SIGTERM))


def test_stopped_sampling_goes_on_with_what_is_missing(tmp_path):
    args = flags(SAMPLE, model_path=student(), seeds="0-20", outdir=tmp_path / "x", batch=7)
    result = run_faulty("stop_sampling", args, tmp_path, script="sample")
    assert result.code == 75 and result.output.count("Stopped by SIGTERM; repeat the command to go on") == 1
    there = contents(tmp_path / "x")
    assert len(there) < 21 and not [name for name in png_names(tmp_path / "x") if name.startswith(".")]
    result = invoke("sample", *args).ok()
    assert f"Wrote {21 - len(there)} images" in result.output and len(contents(tmp_path / "x")) == 21
    assert there.items() <= contents(tmp_path / "x").items()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sampling_killed_at_random_moments(seed, tmp_path):
    rng, kills = random.Random(seed), 0
    args = flags(SAMPLE, model_path=student(), seeds="0-299", outdir=tmp_path / "x", batch=8)
    while kills < 4:
        before = len(contents(tmp_path / "x"))
        started = start_ranks("sample", args, tmp_path, 1 + seed % 2)
        deadline = time.monotonic() + TIMEOUT
        while (
            len(png_names(tmp_path / "x")) <= before
            and any(p.is_alive() for p, _ in started)
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        for process, _ in started:
            process.kill()
        if wait_ranks(started, TIMEOUT).code == 0:
            break
        kills += 1
        for name in contents(tmp_path / "x"):
            with Image.open(tmp_path / "x" / name) as image:
                image.load()
    assert kills > 0
    run_ranks("sample", args, tmp_path, 1 + seed % 2, timeout=TIMEOUT)
    invoke("sample", *flags(SAMPLE, model_path=student(), seeds="0-299", outdir=tmp_path / "whole")).ok()
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


def test_two_samplings_into_one_folder(tmp_path):
    args = flags(SAMPLE, model_path=student(), outdir=tmp_path / "x", batch=4)
    both = [start_ranks("sample", [*args, f"--seeds={seeds}"], tmp_path) for seeds in ("0-15", "8-23")]
    for started in both:
        wait_ranks(started, TIMEOUT).ok()
    invoke("sample", *flags(SAMPLE, model_path=student(), seeds="0-23", outdir=tmp_path / "whole")).ok()
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert not [name for name in png_names(tmp_path / "x") if name.startswith(".")]


def test_an_archive_has_one_writer_at_a_time(tmp_path):
    from torch_utils.image_writer import ImageWriter

    writer = ImageWriter(tmp_path / "x.zip", False, {"a": 1})
    args = flags(SAMPLE, model_path=student(), seeds="0-3", outdir=tmp_path / "x.zip")
    invoke("sample", *args).refused(r"x\.zip is being written by another process")
    writer.write([5], torch.zeros([1, 8, 8, 3], dtype=torch.uint8).numpy())
    writer.close([5])
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.testzip() is None and "00000/img00000005.png" in archive.namelist()
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_full_disk_on_one_rank_is_said_by_rank_0(tmp_path):
    args = flags(SAMPLE, model_path=student(), seeds="0-7", outdir=tmp_path / "x")
    result = run_faulty("fill_images_disk", args, tmp_path, processes=2, rank=1, script="sample")
    result.refused(r"\.png cannot be written \(No space left on device\).*\(rank 1\)")


# --- Evaluation ------------------------------------------------------------------------------------------------------


class Means(torch.nn.Module):
    """Three features: mean colours."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    torch.jit.script(Means()).save(str(root / "means.pt"))
    write_images(root / "real", 24, seed=2)
    return root


def evaluation_flags(images, **changes):
    return [*flags({"detector": images / "means.pt", "device": "cpu", "batch": 4}, changes), "--detector-runs-code"]


@pytest.mark.parametrize(
    "moment", ["os:replace", pytest.param("torch_utils.arrays:write_arrays", marks=pytest.mark.slow)]
)
def test_killed_evaluation_leaves_nothing(moment, images, tmp_path):
    args = ["ref", *evaluation_flags(images, data=images / "real", dest=tmp_path / "x.npz")]
    moment = moment.replace("torch_utils.arrays:write_arrays", "numpy:savez")
    assert run_ranks("fid", args, tmp_path, kill=(moment, 1), timeout=TIMEOUT).code == -signal.SIGKILL
    assert not list(tmp_path.glob("x.npz"))
    invoke("fid", *args).ok()
    assert (tmp_path / "x.npz").exists()


def kill_worker():
    torch.multiprocessing.set_start_method("fork", force=True)  # as it is in a process of its own

    original = ImageDataset.load

    def load(self, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    ImageDataset.load = load


def test_a_killed_worker_process_is_one_line(images, tmp_path):
    args = ["ref", *evaluation_flags(images, data=images / "real", dest=tmp_path / "x.npz", workers=1)]
    run_faulty("kill_worker", args, tmp_path, script="fid").refused(
        r"a worker process was ended from outside.*--workers"
    )
    assert not (tmp_path / "x.npz").exists()


def test_records_of_an_evaluation_are_written_together_or_not_at_all(images, tmp_path):
    """A disk that fills up in the middle of the second line."""
    out = tmp_path / "metrics.jsonl"
    args = [
        "calc",
        f"--images={images / 'real'}",
        *evaluation_flags(images, ref=images / "real", metrics="fid,kid", out=out),
    ]
    invoke("fid", *args).ok()
    first = out.read_bytes()
    assert [json.loads(line)["metric"][:1] for line in first.splitlines()] == ["F", "K"]
    line = len(first.splitlines()[0])
    run_ranks("fid", args, tmp_path, disk=len(first) + line + 100, timeout=TIMEOUT).refused(
        r"metrics\.jsonl|File too large"
    )
    assert out.read_bytes() == first


# --- Hostile data ----------------------------------------------------------------------------------------------------

FUZZ = settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def one_line(action, *names):
    """What it gives, or None if it ends in a click error of one line."""
    try:
        return action()
    except UserError as error:
        message = error.message
        assert "\n" not in message and any(name in message for name in names), message
        return None


def png(size=(8, 8), **options):
    file = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(file, "PNG", **options)
    return file.getvalue()


def zipped(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@FUZZ
@given(st.data())
def test_damaged_data_sets_are_one_line_or_images(tmp_path, data):
    """Archives of PNG and JPEG files with bytes overwritten, removed and added."""
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    compression = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    members = {"a.png": png(), "b.jpg": jpeg.getvalue(), "dataset.json": '{"labels": [["a.png", 0], ["b.jpg", 1]]}'}
    content = bytearray(zipped(tmp_path / "x.zip", compression, **members).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["overwrite", "overwrite", "cut", "insert"]))
        if kind == "overwrite":
            content[at] = data.draw(st.integers(0, 255))
        else:
            content[at:] = b"" if kind == "cut" and at else bytes([0]) + content[at:]
    (tmp_path / "x.zip").write_bytes(content)
    images = one_line(lambda: ImageDataset(tmp_path / "x.zip").load_all(), "x.zip")
    assert images is None or images.dtype == np.uint8


@FUZZ
@given(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xe0",
            b"BM",
            b"RIFF\0\0\0\0WEBPVP8L",
            b"%!PS-Adobe-3.0 EPSF",
            b"P6 8 8 255 ",
        ]
    ),
)
def test_anything_in_place_of_an_image_is_one_line(tmp_path, content, magic):
    (tmp_path / "x").mkdir(exist_ok=True)
    (tmp_path / "x" / "a.png").write_bytes(magic + content)
    one_line(lambda: ImageDataset(tmp_path / "x").load(0), "a.png")


def test_images_of_formats_that_start_programs_are_refused(tmp_path):
    """Pillow gives PostScript to an interpreter, whatever the name of the file."""
    (tmp_path / "x").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "x" / "a.eps")
    (tmp_path / "x" / "a.eps").rename(tmp_path / "x" / "a.png")
    with (
        mock.patch("subprocess.check_call", side_effect=AssertionError),
        mock.patch("subprocess.Popen", side_effect=AssertionError),
    ):
        with pytest.raises(UserError, match=r"a\.png in .* is not a readable image"):
            ImageDataset(tmp_path / "x").load(0)


def test_bombs_are_refused(tmp_path):
    """A picture of 4 billion pixels, and a file that unpacks to half a gigabyte."""
    huge = bytearray(png())
    huge[16:24] = (65535).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    for members in ({"a.png": bytes(huge)}, {"a.png": bytes(1 << 29)}):
        path = zipped(tmp_path / "x.zip", zipfile.ZIP_DEFLATED, **members)
        assert path.stat().st_size < 1 << 20
        with pytest.raises(UserError, match=r"a\.png in .*x\.zip is not a readable image"):
            ImageDataset(path).load_all()


def test_names_in_an_archive_reach_nothing_outside(tmp_path):
    """They are looked up in the archive alone."""
    (tmp_path / "secret.png").write_bytes(png((4, 4)))
    (tmp_path / "in").mkdir()
    names = ["../secret.png", str(tmp_path / "secret.png")]
    dataset = ImageDataset(zipped(tmp_path / "in" / "x.zip", **{name: png((8, 8)) for name in names}))
    assert len(dataset) == 2 and dataset.load_all().shape == (2, 3, 8, 8)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["secret.png", "x.zip"]


def test_what_a_killed_process_left_is_no_image(tmp_path):
    write_images(tmp_path / "x", 2)
    (tmp_path / "x" / ".0123456789ab.tmp.000007.png").write_bytes(png()[:40])
    assert ImageDataset(tmp_path / "x").names == ["0000.png", "0001.png"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("reader", ["images", "arrays"])
def test_arrays_of_objects_are_refused(reader, tmp_path):
    read = {"images": lambda path: ImageDataset(path), "arrays": read_arrays}[reader]
    bomb = np.array([Bomb(str(tmp_path / "executed"))], dtype=object)
    np.savez(tmp_path / "x.npz", arr_0=bomb)
    with pytest.raises(
        UserError, match=r"x\.npz is not a readable \.?npz file|x\.npz holds arr_0 object \[1\]; expected"
    ):
        read(tmp_path / "x.npz")
    np.save(tmp_path / "y.npy", bomb, allow_pickle=True)
    (tmp_path / "y.npy").rename(tmp_path / "y.npz")
    with pytest.raises(UserError, match=r"y\.npz is not a readable \.?npz file"):
        read(tmp_path / "y.npz")
    assert not (tmp_path / "executed").exists()


@FUZZ
@given(st.data())
def test_damaged_npz_files_are_one_line_or_arrays(tmp_path, data):
    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    save(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=np.zeros([2, 4, 4, 3], np.uint8))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (tmp_path / "x.npz").write_bytes(content)
    for read in (read_arrays, read_headers, ImageDataset, open_source):
        one_line(lambda: read(tmp_path / "x.npz"), "x.npz")


@FUZZ
@given(
    st.text(max_size=60),
    st.lists(st.sampled_from([0, 1, 3, 2**20, 2**40, 2**62, -1]), max_size=5),
    st.sampled_from(["<f8", "|O", "|u1", "<U9", "V0", "[('a', '<f8')]"]),
)
def test_any_header_of_an_array_is_one_line(tmp_path, text, shape, dtype):
    """Shapes of exabytes, dtypes of objects, and headers that are no literals."""
    for header in (f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {tuple(shape)!r}, }}", text):
        raw = header.encode()[:60000]
        zipped(
            tmp_path / "x.npz", **{"mu.npy": b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + bytes(64)}
        )
        one_line(lambda: read_arrays(tmp_path / "x.npz"), "x.npz")
        one_line(lambda: ImageDataset(tmp_path / "x.npz"), "x.npz")


def test_seeds_that_would_fill_the_memory_are_refused(monkeypatch):
    """Each range is allowed, a hundred of them are not."""
    monkeypatch.setattr(options, "MAX_RANGE", 1000)
    text = ",".join(f"{i * 100}-{i * 100 + 99}" for i in range(100))
    with pytest.raises(UserError, match="--seeds=.* does not parse at '(900-999|1000-1099)'"):
        options.parse_seeds(None, None, text)
