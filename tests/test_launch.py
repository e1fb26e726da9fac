"""launch.sh: what it lists, what it runs. A shim stands in for python, so nothing is installed or trained."""

import os
import shlex
import subprocess

import pytest
from click.testing import CliRunner
from conftest import ROOT

import train
from models.registry import ROWS

KINDS = {"": "2", "-3nfe": "3", "-4nfe": "4", "-5nfe": "5", "-v": "2to5", "-1nfe": "1"}
PRESETS = {name + kind: nfe for name in ROWS for kind, nfe in KINDS.items()}


@pytest.fixture
def launch(tmp_path):
    """Run launch.sh with a python that writes down how it is called; returns the process and the calls."""
    calls = tmp_path / "calls"
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\n[ "$1" = -c ] && echo 1 || true\n')
    shim.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "CONDA_PREFIX")}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "VIRTUAL_ENV": str(tmp_path)}

    def run(*args: str, **extra: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.unlink(missing_ok=True)
        command = ["bash", str(ROOT / "launch.sh"), *args]
        process = subprocess.run(command, env=env | extra, capture_output=True, text=True, timeout=60)
        return process, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_lists_every_preset_with_what_it_gives(launch):
    process, calls = launch()
    assert process.returncode == 0 and not calls
    listed = {line.split()[0]: line for line in process.stdout.splitlines() if line.startswith("  ")}
    assert set(listed) == {"quickstart", "test", *PRESETS}
    assert "published FID 4.53" in listed["cifar10"] and all(len(line.split()) > 2 for line in listed.values())
    assert "4.28/3.50/3.18/2.95" in listed["cifar10-v"] and "5.83" in listed["cifar10-1nfe"]


def test_an_unknown_preset_is_one_line(launch):
    process, calls = launch("cifar")
    assert process.returncode == 2 and not calls
    assert process.stderr == "Error: there is no preset 'cifar'; run 'bash launch.sh' for the list\n"


@pytest.mark.parametrize("dataset_name", ROWS)
def test_presets_pass_a_dry_run(launch, dataset_name):
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
    assert result.exit_code == 1 and "needs --model_path" in result.output


def test_the_seed_command_is_the_preset(launch):
    _, calls = launch("cifar10")
    for part in ["--total_kimg=200", "--batch=128", "--lr=5e-5", "--num_steps=4", "--M=3", "--afs=True", "--sampler_tea=dpmpp", "--max_order=3", "--predict_x0=True", "--lower_order_final=True", "--schedule_type=polynomial", "--schedule_rho=7"]:  # fmt: skip
        assert part in calls[-1].split()


def test_several_processes_go_through_torchrun_without_a_fixed_port(launch):
    _, calls = launch("cifar10", NPROC="2")
    assert calls[-1].startswith("-m torch.distributed.run --standalone --nproc_per_node=2 train.py --dataset_name=cifar10")
    assert "port" not in calls[-1]


def test_quickstart_installs_then_trains_samples_and_names_its_files(launch):
    process, calls = launch("quickstart")
    assert process.returncode == 0
    assert [c.split()[0] for c in calls if not c.startswith("-")] == ["train.py", "sample.py", "sample.py", "fid.py"]
    assert any(c.startswith("-m pip install") and c.endswith("requirements-eval.txt") for c in calls)
    for name in ("grid.png", "compare.png", "compare.md", "metrics.png", "metrics.md", "stats.jsonl"):
        assert f"exps/quickstart/{name}" in process.stdout


def test_test_command_leaves_slow_tests_out_unless_asked(launch):
    assert launch("test")[1][-1] == "-m pytest -q -m not slow"
    assert launch("test", "--slow", "tests/test_launch.py")[1][-1] == "-m pytest -q tests/test_launch.py"
