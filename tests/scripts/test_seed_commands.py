"""The training and sampling commands of the user's description, word for word: they parse, and with small teachers run."""

from __future__ import annotations

import json
import shlex

import pytest
from tiny import invoke, newest_student, only_run, png_names, run_ranks, run_script, student, teacher

TRAIN_SFD = """
torchrun --standalone --nproc_per_node=4 --master_port=12345 train.py \\
--dataset_name="cifar10" --total_kimg=200 --batch=128 --lr=5e-5 \\
--num_steps=4 --M=3 --afs=True --sampler_tea="dpmpp" --max_order=3 --predict_x0=True --lower_order_final=True \\
--schedule_type="polynomial" --schedule_rho=7 --use_step_condition=False --is_second_stage=False
"""
TRAIN_SFD_V = """
torchrun --standalone --nproc_per_node=4 --master_port=12345 train.py \\
--dataset_name="cifar10" --total_kimg=800 --batch=128 --lr=5e-5 \\
--num_steps=4 --M=3 --afs=True --sampler_tea="dpmpp" --max_order=3 --predict_x0=True --lower_order_final=True \\
--schedule_type="polynomial" --schedule_rho=7 --use_step_condition=True --is_second_stage=False

"""
SAMPLE_SFD = """
torchrun --standalone --nproc_per_node=4 --master_port=12345 sample.py \\
--dataset_name='cifar10' --model_path=0 --seeds='0-49999' --batch=256
"""
SAMPLE_SFD_V = """
torchrun --standalone --nproc_per_node=4 --master_port=12345 sample.py \\
--dataset_name='cifar10' --model_path=0 --seeds='0-49999' --batch=256 --num_steps=4
"""
TRAINING, SAMPLING = [TRAIN_SFD, TRAIN_SFD_V], [SAMPLE_SFD, SAMPLE_SFD_V]


def parsed(command: str) -> tuple[str, list[str]]:
    """Script and its arguments, as a shell splits them."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "torchrun"
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].removesuffix(".py"), words[at + 1 :]


def replaced(args: list[str], **values) -> list[str]:
    """`args` with the values of some flags replaced, None removes the flag."""
    kept = [a for a in args if a.removeprefix("--").split("=")[0] not in values]
    return kept + [f"--{name}={value}" for name, value in values.items() if value is not None]


@pytest.mark.parametrize("command", TRAINING + SAMPLING)
def test_command_passes_as_printed_with_dry_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for size in ("1", "4"):
        monkeypatch.setenv("WORLD_SIZE", size)
        script, args = parsed(command)
        output = invoke(script, *args, "--dry-run").ok().output
        plan = json.loads(output[: output.rindex("}") + 1])
        assert plan["dataset_name"] == "cifar10" and plan["batch"] == (128 if script == "train" else 256)
        if script == "train":
            variable = command is TRAIN_SFD_V
            assert plan["use_step_condition"] is variable and plan["is_second_stage"] is False
            assert plan["total_kimg"] == (800 if variable else 200) and plan["lr"] == 5e-5 and plan["M"] == 3
            assert plan["sampler_tea"] == "dpmpp" and plan["max_order"] == 3 and plan["afs"] is True
        else:
            assert plan["images"] == 50000
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_passes_under_torchrun_as_printed(tmp_path):
    script, args = parsed(TRAIN_SFD)
    result = run_script(f"{script}.py", *args, "--dry-run", cwd=tmp_path, processes=2).ok()
    assert result.output.count('"dataset_name": "cifar10"') == 1 and not (tmp_path / "exps").exists()


CPU = {"device": "cpu", "precision": "fp32"}


@pytest.mark.parametrize("variable", [False, True], ids=["sfd", "sfd-v"])
def test_commands_run_with_a_tiny_teacher(variable, tmp_path, monkeypatch):
    """In this process; the next test has two of them."""
    monkeypatch.chdir(tmp_path)
    _, args = parsed(TRAINING[variable])
    invoke("train", *replaced(args, dataset_name=None, model_path=teacher(), total_kimg=0.016, batch=8, **CPU)).ok()
    name = "00000-tiny-4to7-2to5-dpmpp-3-poly7-afs" if variable else "00000-tiny-4-2-dpmpp-3-poly7-afs"
    assert only_run(tmp_path / "exps").name == name
    _, args = parsed(SAMPLING[variable])
    sampled = invoke("sample", *replaced(args, dataset_name="tiny", seeds="0-5", batch=4, **CPU)).ok()
    assert "NFE 2, 6 images" in sampled.output
    assert len(list((tmp_path / "samples" / "tiny").rglob("*.png"))) == 6


def test_commands_run_under_torchrun_with_a_tiny_teacher(tmp_path):
    _, args = parsed(TRAIN_SFD_V)
    args = replaced(args, dataset_name=None, model_path=teacher(), total_kimg=0.016, batch=8, **CPU)
    run_script("train.py", *args, cwd=tmp_path, processes=2).ok()
    _, args = parsed(SAMPLE_SFD_V)
    args = replaced(args, dataset_name="tiny", seeds="0-5", batch=2, outdir="x", **CPU)
    run_ranks("sample", args, tmp_path, 2).ok()
    assert png_names(tmp_path / "x") == [f"{i:06d}.png" for i in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("variable", [False, True], ids=["sfd", "sfd-v"])
def test_commands_run_under_torchrun_with_the_embedded_teacher(variable, tmp_path):
    _, args = parsed(TRAINING[variable])
    args = replaced(args, dataset_name="emoji32", total_kimg=0.004, batch=4, device="cpu")
    run_script("train.py", *args, cwd=tmp_path, processes=2).ok()
    assert newest_student(only_run(tmp_path / "exps")).exists()
    _, args = parsed(SAMPLING[variable])
    args = replaced(args, dataset_name="emoji32", seeds="0-7", batch=4, device="cpu")
    run_script("sample.py", *args, cwd=tmp_path, processes=2).ok()
    assert len(list((tmp_path / "samples" / "emoji32").rglob("0000*.png"))) == 8


def test_teacher_and_student_are_compared_from_one_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke(
        "sample",
        "--model_path",
        teacher(),
        "--solver=euler",
        "--num_steps=3",
        "--seeds=0-3",
        "--grid=True",
        "--outdir=a",
    ).ok()
    invoke("sample", "--model_path", student(), "--seeds=0-3", "--grid=True", "--outdir=b").ok()
    assert (tmp_path / "a" / "grid.png").exists() and (tmp_path / "b" / "grid.png").exists()
