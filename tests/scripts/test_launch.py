"""launch.sh and docs/slurm.sbatch: what they list, run and requeue.

A shim stands in for python, so nothing is installed or trained, and others for Slurm.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from conftest import ROOT
from tiny import free_port, only_run, seven_steps, weights

import train
from training.presets import families, read_presets

KINDS = {"": "2", "-3nfe": "3", "-4nfe": "4", "-5nfe": "5", "-v": "2to5", "-1nfe": "1"}


def executable(path, script):
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


@pytest.fixture
def launch(tmp_path):
    """Run launch.sh with a python that writes down how it is called; returns the process and the calls."""
    calls = tmp_path / "calls"
    shim = f"""[ "$2" = training.presets ] && exec {shlex.quote(sys.executable)} "$@"
[ "$1" = dnnlib/packages.py ] && {{ [ -z "$LACKS" ] || grep -qs "install.*$LACKS" {shlex.quote(str(calls))} || echo "$LACKS"; exit; }}
case "$*" in *metadata*) exit 1;; "-c "*) echo 1; exit;; "-m pip --version") exit 0;; esac
echo $WORLD_SIZE "$@" >> {shlex.quote(str(calls))}
"""
    executable(tmp_path / "python", shim)
    ours = (
        "SFD_NO_INSTALL",
        "NPROC",
        "CONDA_PREFIX",
        "NNODES",
        "NODE_RANK",
        "RDZV_ENDPOINT",
        "RDZV_ID",
        "MAX_RESTARTS",
        "WORLD_SIZE",
    )
    env = {k: v for k, v in os.environ.items() if k not in ours}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "VIRTUAL_ENV": str(tmp_path), "LACKS": ""}

    def run(*args: str, **extra: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.unlink(missing_ok=True)
        command = ["bash", str(ROOT / "launch.sh"), *args]
        process = subprocess.run(command, env=env | extra, capture_output=True, text=True, timeout=60)
        return process, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_lists_every_preset_with_what_it_gives(launch):
    process, calls = launch()
    assert process.returncode == 0 and not calls
    lines = [line for line in process.stdout.splitlines() if line.startswith("  ")]
    starts = [lines[0].index(title) for title in ("preset", "gives", "FID", "A100 hours", "24 GB hold")]
    table = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])] for line in lines]
    listed = {name: cells for name, *cells in table[1:]}
    assert set(listed) == {"test", *read_presets()} and len(listed) == len(lines) - 1
    assert all(all(cells) for cells in table)
    assert listed["cifar10-3nfe"] == ["NFE 3", "3.58", "0.92", "64"]
    assert listed["cifar10-v"] == ["NFE 2-5 (SFD-v)", "4.28/3.50/3.18/2.95", "4.26", "64"]
    assert listed["cifar10-1nfe"][:3] == ["NFE 1 of --model_path=RUN", "5.83", "4.88"]


def test_an_unknown_preset_is_one_line(launch):
    for command in (["cifar10v"], ["arguments", "cifar10v"]):
        process, calls = launch(*command)
        assert process.returncode == 2 and not calls
        assert re.fullmatch(
            "Error: there is no preset 'cifar10v'; did you mean cifar10-v or .*\\? run .bash launch.sh. .*\n",
            process.stderr,
        )


@pytest.mark.parametrize("dataset_name", families())
def test_presets_pass_a_dry_run(launch, dataset_name, monkeypatch):
    monkeypatch.setattr("training.config.source_settings", seven_steps)
    monkeypatch.setattr("train.settle", lambda config: config)
    for kind, nfe in KINDS.items():
        source = ["--model_path=0"] if kind == "-1nfe" else []
        process, calls = launch(dataset_name + kind, "--seed=7", *source)
        assert process.returncode == 0, process.stderr
        script, *arguments = calls[-1].split()
        assert script == "train.py" and arguments[-1 - len(source)] == "--seed=7"
        result = CliRunner().invoke(train.main, [*arguments, "--dry-run"], catch_exceptions=False)
        assert result.exit_code == 0 and '"seed": 7' in result.output, result.output
        # Guidance doubles the evaluations.
        expected = "to".join(str(2 * int(n)) for n in nfe.split("to")) if dataset_name == "ms_coco" else nfe
        assert f"NFE {expected};" in result.output


def test_a_second_stage_says_what_it_needs(launch):
    _, calls = launch("cifar10-1nfe")
    result = CliRunner().invoke(train.main, [*calls[-1].split()[1:], "--dry-run"])
    assert result.exit_code == 1 and "needs --model_path" in str(result.exception)


def test_arguments_are_those_of_the_seed_command(launch):
    process, calls = launch("arguments", "cifar10")
    assert not calls and len(process.stdout.splitlines()) == 1
    for part in ["--total_kimg=200", "--batch=128", "--lr=5e-5", "--num_steps=4", "--M=3", "--afs=True", "--sampler_tea=dpmpp", "--max_order=3", "--predict_x0=True", "--lower_order_final=True", "--schedule_type=polynomial", "--schedule_rho=7"]:  # fmt: skip
        assert part in process.stdout.split()


def test_several_processes_go_through_torchrun_without_a_fixed_port(launch):
    _, calls = launch("cifar10", NPROC="2")
    assert calls[-1].startswith("-m torch.distributed.run --standalone --nproc_per_node=2 -- train.py --preset=cifar10")
    assert "port" not in calls[-1]


def test_several_machines_meet_at_the_endpoint(launch):
    nodes = {"NNODES": "2", "NPROC": "4", "RDZV_ENDPOINT": "node7:29400", "RDZV_ID": "job9"}
    process, calls = launch("cifar10", "--seed=7", **nodes)
    options = [
        "--nnodes=2",
        "--nproc_per_node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node7:29400",
        "--rdzv-id=job9",
        "--max-restarts=0",
    ]
    assert len(calls) == 1 and process.stdout.startswith("\n== python -m torch")  # nothing is installed
    assert calls[0].split()[:10] == ["-m", "torch.distributed.run", *options, "--", "train.py"] and calls[0].endswith(
        "--seed=7"
    )
    first = launch("cifar10", **nodes, NODE_RANK="0", MAX_RESTARTS="3")
    other = launch("cifar10", **nodes, NODE_RANK="1")
    assert "--max-restarts=3 --rdzv-conf=is_host=1 -- train.py" in first[1][0] and first[0].stdout
    assert "--rdzv-conf=is_host=0 -- train.py" in other[1][0] and not other[0].stdout


def test_one_machine_can_restart_its_processes_too(launch):
    assert launch("cifar10", MAX_RESTARTS="3")[1][-1].startswith(
        "-m torch.distributed.run --standalone --nproc_per_node=1 --max-restarts=3 -- train.py"
    )


@pytest.mark.parametrize(
    "args, env, reason",
    [
        (["cifar10"], {"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT=host:port of one of the machines, the same on all of them"),
        (["cifar10"], {"NNODES": "two"}, "NNODES is 'two'; expected the number of machines"),
        (["cifar10"], {"NPROC": "all"}, "NPROC is 'all'; expected the number of processes"),
        (["cifar10"], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS is '-1'; expected a number"),
        (["cifar10"], {"NNODES": "2", "RDZV_ENDPOINT": "a:1", "NODE_RANK": "x"}, "NODE_RANK is 'x'; expected 0 to 1"),
        (["quickstart"], {"NNODES": "2", "RDZV_ENDPOINT": "a:1"}, "quickstart is for one machine; leave NNODES=2 out"),
        (["cifar10"], {"NNODES": "2", "RDZV_ENDPOINT": "a:1", "LACKS": "click>=8.1"}, "python lacks click>=8.1, and nothing is installed with NNODES; install that beforehand"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(launch, args, env, reason):
    process, calls = launch(*args, **env)
    assert process.returncode == 2 and process.stderr == f"Error: {reason}\n"
    assert not any("train.py" in call for call in calls)


def test_a_dry_run_says_the_command_and_asks_one_process_for_the_estimate(launch):
    process, calls = launch("cifar10", "--dry-run", "--seed=7", NNODES="2", NPROC="4", RDZV_ENDPOINT="a:1")
    assert process.stdout.startswith("\n== python -m torch.distributed.run --nnodes=2 --nproc_per_node=4")
    assert process.stdout.rstrip().endswith("--seed=7")
    (call,) = calls
    assert call.startswith("8 train.py --preset=cifar10 ") and call.endswith(" --seed=7 --dry-run")
    process, calls = launch("ffhq_ldm", "-n", LACKS="einops")
    assert [line.split(" --preset")[0] for line in process.stdout.splitlines() if line] == [
        "== python -m pip install einops",
        "== python -m pip install --no-deps einops",
        "== python train.py",
        "== What it takes can be told once the packages above are installed",
    ]
    assert not calls


def test_a_dry_run_needs_no_packages(launch):
    process, calls = launch("cifar10", "--dry-run", LACKS="click>=8.1")
    assert process.returncode == 0 and not calls
    assert "What it takes can be told once the packages above are installed" in process.stdout


def test_quickstart_and_tests_have_a_dry_run(launch):
    process, calls = launch("quickstart", "--dry-run", "--seed=7")
    assert process.returncode == 0 and len(calls) == 1
    assert calls[0].startswith("1 train.py --preset=quickstart ") and calls[0].endswith("--seed=7 --dry-run")
    said = [line for line in process.stdout.splitlines() if line.startswith("== python ")]
    assert [line.split()[2] for line in said] == ["sample.py", "train.py", "sample.py", "sample.py", "fid.py"]
    assert "--dry-run" not in process.stdout and "Look at" not in process.stdout
    process, calls = launch("test", "--dry-run", "--slow", "-k", "x")
    assert not calls and process.stdout.rstrip().endswith("== python -m pytest -q -k x")


def test_gpu_check_has_a_dry_run(launch):
    process, calls = launch("gpu-check", "--dry-run", "--tiny")
    assert not calls and process.stdout.rstrip().endswith("== python tests/gpu_check.py --tiny")


def test_signals_and_exit_codes_are_those_of_the_run(launch, tmp_path):
    """A scheduler signals the process that it started."""
    executable(
        tmp_path / "python",
        'case "$1" in -c|-m|dnnlib/packages.py) exit 0;; esac\ntrap "exit 75" TERM\ntouch started\nwhile :; do sleep 0.05; done\n',
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path), "NPROC": "1"}
    shutil.copy(ROOT / "launch.sh", tmp_path)
    process = subprocess.Popen(["bash", str(tmp_path / "launch.sh"), "cifar10"], env=env, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "started")
    process.terminate()
    assert process.wait(20) == 75


def wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


def test_quickstart_installs_then_trains_samples_and_names_its_files(launch):
    process, calls = launch("quickstart", LACKS="matplotlib>=3.8")
    assert process.returncode == 0 and calls[0] == "-m pip install --quiet --disable-pip-version-check matplotlib>=3.8"
    scripts = [c.split()[0] for c in calls if not c.startswith("-")]
    assert scripts == ["sample.py", "train.py", "sample.py", "sample.py", "fid.py"]
    assert "--model_path=assets/emoji32-student.safetensors" in calls[1]
    for name in (
        "shipped/grid.png",
        "grid.png",
        "compare.png",
        "compare.md",
        "metrics.png",
        "metrics.md",
        "stats.jsonl",
    ):
        assert f"exps/quickstart/{name}" in process.stdout


def test_test_command_leaves_slow_tests_out_unless_asked(launch):
    assert launch("test")[1][-1] == "-m pytest -q -m not slow"
    assert (
        launch("test", "--slow", "tests/scripts/test_launch.py")[1][-1] == "-m pytest -q tests/scripts/test_launch.py"
    )


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(tmp_path):
    """Start docs/slurm.sbatch in a folder where `launch.sh` runs `job`, with stand-ins for Slurm's commands."""
    (tmp_path / "bin").mkdir()
    # Both nodes at once, as srun does; it passes TERM on, and ends with the largest code.
    executable(
        tmp_path / "bin" / "srun",
        """echo "$@" > srun.txt
while case $1 in --*) true;; *) false;; esac; do shift; done
SLURM_NODEID=0 "$@" & a=$!
SLURM_NODEID=1 "$@" & b=$!
trap 'kill -TERM $a $b' TERM
touch started
wait $a $b; wait $a; code=$?; wait $b; other=$?
[ $other -gt $code ] && code=$other
exit $code
""",
    )
    executable(
        tmp_path / "bin" / "scontrol",
        """case $1 in
show) [ $2 = job ] && echo "   PreemptEligibleTime=2026-11-23T00:00:00 PreemptTime=$PREEMPTED" || printf 'node7\\nnode8\\n';;
*) echo "$@" >> scontrol.txt;;
esac
""",
    )

    def start(job, *args, **extra):
        (tmp_path / "launch.sh").write_text(job)
        env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PREEMPTED": "None"}
        env |= {"SLURM_JOB_ID": "30123", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
        env |= {"SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "4", **extra}
        env.pop("OMP_NUM_THREADS", None)
        script = ["bash", str(ROOT / "docs" / "slurm.sbatch"), *args]
        return subprocess.Popen(
            script, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    start.requeued = lambda: (tmp_path / "scontrol.txt").exists() and (tmp_path / "scontrol.txt").read_text()
    return start


REPORT = 'echo "$NODE_RANK $NNODES $RDZV_ENDPOINT $RDZV_ID $OMP_NUM_THREADS $*" > node$NODE_RANK.txt\n'
#: As torchrun: it ends with 1 when TERM comes.
WORK = 'trap "touch saved$NODE_RANK; exit 1" TERM\ntouch ready$NODE_RANK\nwhile :; do sleep 0.05; done\n'


def test_slurm_starts_the_same_command_on_every_node(batch, tmp_path):
    process = batch(REPORT, "cifar10", "--desc=two words")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and not batch.requeued(), output
    for node in "01":
        assert (tmp_path / f"node{node}.txt").read_text() == f"{node} 2 node7:20123 30123 4 cifar10 --desc=two words\n"
    assert (tmp_path / "srun.txt").read_text().startswith("--kill-on-bad-exit=0 --wait=60 bash -c ")


def test_the_slurm_script_outside_of_slurm_is_one_line(batch):
    process = batch(REPORT, "cifar10", SLURM_JOB_ID="")
    assert process.communicate(timeout=60)[0].startswith("Error: this is no Slurm job; submit it with sbatch ")
    process = batch(REPORT)
    assert process.communicate(timeout=60)[0].startswith("Error: usage: sbatch ") and process.returncode == 2


@pytest.mark.parametrize(
    "number, extra, requeued",
    [
        (signal.SIGUSR1, {}, True),
        (signal.SIGUSR1, {"SLURM_RESTART_COUNT": "50"}, False),
        (signal.SIGTERM, {}, False),  # scancel
        (signal.SIGTERM, {"PREEMPTED": "2026-11-23T00:00:01"}, True),
    ],
)
def test_slurm_requeues_what_was_not_done_in_time(number, extra, requeued, batch, tmp_path):
    process = batch(WORK, "cifar10", **extra)
    wait_for(tmp_path / "ready0")
    wait_for(tmp_path / "ready1")
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert batch.requeued() == ("requeue 30123\n" if requeued else False)


def test_slurm_does_not_repeat_an_error_or_what_is_done(batch, tmp_path):
    process = batch("exit 1", "cifar10")
    assert process.wait(60) == 1 and not batch.requeued()
    process = batch('trap "exit 0" TERM\ntouch ready$NODE_RANK\nwhile :; do sleep 0.05; done\n', "cifar10")
    wait_for(tmp_path / "ready0")
    wait_for(tmp_path / "ready1")
    process.send_signal(signal.SIGUSR1)  # it was done just then
    assert process.wait(60) == 0 and not batch.requeued()


@pytest.mark.slow
def test_two_machines_make_one_run(tmp_path):
    """Two launchers on this machine, each of which takes itself for one of two."""
    env = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    env |= {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "RDZV_ID": "test"}
    flags = [f"--outdir={tmp_path}", "--device=cpu", "--precision=fp32", "--batch=2", "--total_kimg=0.004", "--M=0"]
    command = ["bash", str(ROOT / "launch.sh"), "emoji32", *flags]
    nodes = [
        subprocess.Popen(
            command, env=env | {"NODE_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "on 2× cpu, micro-batch 1 of 2" in "".join(outputs)
    assert sum(output.count("Student: ") for output in outputs) == 1  # one of them is rank 0
    assert weights(only_run(tmp_path))
