"""What a run takes: evaluations, operations and time."""

import re
from functools import partial

import pytest
import torch
from tiny import class_teacher, invoke, newest_student, only_run, same, teacher, train_flags, weights

from models import EDMPrecond
from models.building import build_on_meta
from models.loading import load_teacher
from models.networks.layers import Conv2d
from models.registry import get_row
from torch_utils.checkpoint import read_network, save_network
from training import cost
from training.config import DistillConfig
from training.cost import averaging_seconds, describe_averaging

TINY = dict(img_resolution=16, img_channels=3, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[8])  # fmt: skip


def tiny_on_meta() -> EDMPrecond:
    with torch.device("meta"):
        return EDMPrecond(**TINY)


def test_evaluations_and_operations():
    net = build_on_meta(get_row("emoji32"))
    found = cost.run_cost(DistillConfig("emoji32"), net)
    assert (found.teacher, found.student) == (12, 2)
    assert found.flops_per_trajectory == 18 * found.flops
    variable = cost.run_cost(DistillConfig("emoji32", use_step_condition=True, sampler_tea="heun"), net)
    assert (variable.teacher, variable.student) == (2 * (12 + 16 + 20 + 24) / 4, 3.5)
    layer = Conv2d(4, 8, 3)
    counted = EDMPrecond(**TINY)
    counted.model = _Wrapped(layer)
    assert cost.flops_per_evaluation(counted) == 2 * 9 * 3 * 8 * 16 * 16


class _Wrapped(torch.nn.Module):
    """One convolution in the place of a network."""

    def __init__(self, layer: Conv2d) -> None:
        super().__init__()
        self.layer = Conv2d(3, 8, 3)
        self.out = lambda x: x[:, :3]

    def forward(self, x, noise_labels, class_labels=None, step_condition=None):
        return self.out(self.layer(x))


def test_estimate_names_what_a_run_takes(monkeypatch):
    monkeypatch.setattr(cost, "build_on_meta", lambda row: tiny_on_meta())
    text = cost.estimate(DistillConfig("emoji32", batch=8, total_kimg=0.1), torch.device("cpu"), 2, seconds=0.1)
    assert "12 evaluations of the teacher, 2 of the student" in text and "on 2× cpu in fp32" in text
    assert "micro-batches of 4" in text


def test_time_is_taken_at_the_largest_batch_that_time_and_memory_allow():
    sizes = []

    def action(size: int) -> None:
        sizes.append(size)
        if size > 40:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    per_sample = partial(cost._per_sample, action, torch.device("cpu"), seconds=0.1)
    per_sample(largest=128, expected=1e-6)
    assert sizes[0] == 16 and max(sizes) == 64 and sizes[-1] == 32
    sizes.clear()
    per_sample(largest=128, expected=0.01)
    assert sizes[0] == 2
    sizes.clear()
    per_sample(largest=8, expected=1e-6)
    assert set(sizes) == {8}


def test_a_dry_run_says_what_a_run_would_take(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.estimate", partial(cost.estimate, seconds=0.2))
    output = invoke("train", *train_flags(teacher()), "--dry-run").ok().output
    assert "Trajectory: 6 evaluations of the teacher, 2 of the student" in output
    assert re.search(r"Time: about \d+s on 1× cpu in fp32", output)


def test_the_largest_micro_batch_of_a_cpu_is_the_whole_share(tmp_path):
    auto = invoke("train", *train_flags(teacher(), total_kimg=0.016, outdir=tmp_path / "auto"), "--batch-gpu=auto").ok()
    plain = invoke("train", *train_flags(teacher(), total_kimg=0.016, outdir=tmp_path / "plain")).ok()
    assert "micro-batch 8 of 8" in auto.output and "micro-batch 8 of 8" in plain.output
    students = [weights(newest_student(only_run(tmp_path / name))) for name in ("auto", "plain")]
    assert same(*students)


# --- Several processes, on paper -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, within, between", [(55.7e6, 1.7, 134), (295.9e6, 9.0, 710), (859.5e6, 26.2, 2063)]
)
def test_averaging_takes_what_the_page_on_speed_says(parameters, within, between):
    assert 1000 * averaging_seconds(4 * parameters, 8) == pytest.approx(within, rel=0.03)
    assert 1000 * averaging_seconds(4 * parameters, 16, machines=2) == pytest.approx(between, rel=0.003)
    assert averaging_seconds(4 * parameters, 1) == 0


def test_averaging_in_half_of_the_bytes_takes_half_of_the_time(monkeypatch):
    monkeypatch.setenv("NNODES", "2")
    lines = [describe_averaging(4 * 55.7e6, how, 16, 0.051) for how in ("none", "bf16")]
    assert "222.80 MB averaged in each step add about 134 ms to 51, on paper (25 Gb/s" in lines[0]
    assert "about 66.8 ms" in lines[1]


def test_what_training_took_is_read_from_the_student(tmp_path):
    """Equal to the cost of its settings, for each trajectory seen; a guided teacher takes two evaluations for one."""
    path = class_teacher()
    for name, more in (("plain", {}), ("guided", {"guidance_rate": 2}), ("away", {"guidance_rate": 2, "guide": path})):
        made = train_flags(path, total_kimg=0.016, outdir=tmp_path / name, **more)
        assert invoke("train", *made).ok()
    four = {"num_steps": 7, "M": 0}
    invoke("train", *train_flags(path, total_kimg=0.016, outdir=tmp_path / "long", **four)).ok()
    first = train_flags(newest_student(only_run(tmp_path / "long")), total_kimg=0.016, outdir=tmp_path / "second",
                        is_second_stage=True, num_steps=3, M=2, lpips="off")  # fmt: skip
    invoke("train", *first).ok()
    found = {path.name: cost.training_cost(newest_student(only_run(path))) for path in tmp_path.iterdir()}
    assert all(record["training_seconds"] > 0 for record in found.values())
    evaluations = {
        "plain": 6 + 3 * 2,
        "long": 6 + 3 * 5,
        "guided": 2 * 6 + 3 * 2,
        "away": 2 * 6 + 3 * 2,
        "second": 5 + 3 * 1,
    }
    flops = cost.flops_per_evaluation(load_teacher(None, path).net)
    for name, count in evaluations.items():
        assert found[name]["training_flops"] == 16 * count * flops


def test_a_student_that_does_not_say_what_training_took(tmp_path):
    run = tmp_path / "run"
    invoke("train", *train_flags(teacher(), total_kimg=0.008, outdir=run), "--nosubdir").ok()
    path = newest_student(run)
    tensors, settings = read_network(path)
    for changed in (None, {}, {**settings["training"], "images": "many"}, {**settings["training"], "num_steps": None},
                    {**settings["training"], "model_path": "gone", "guide": "gone", "guidance_rate": 2.0}):  # fmt: skip
        save_network(path, tensors, {**settings, "training": changed})
        assert cost.training_cost(path) == {}
    assert cost.training_cost(tmp_path / "network-snapshot-000001.pkl") == {}
