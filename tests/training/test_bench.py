"""Fast ways of computing give the plain results; the benchmark and the cost model run and say what is so."""

import json
import re
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from published import known_as_published
from test_distill import make_distiller, relative
from test_guided_unet import LATENT, consistency_network, latent_network
from test_networks import NETS, build
from tiny import invoke, newest_student, only_run, same, teacher, train_flags, weights

import models.networks.group_norm
from dnnlib import UserError
from models import EDMPrecond
from models.loading import build_on_meta
from models.networks.group_norm import GroupNormFunction
from models.networks.layers import Conv2d, GroupNorm
from models.precond import Precond
from models.registry import get_row
from torch_utils import device as devices
from torch_utils.device import PLAIN, FastPath, use_path
from training import bench, cost
from training.config import DistillConfig

#: Of the largest value: float32 rounds differently in another order; half precision has 8 bits.
SAME, HALF = 1e-5, 2e-2
NAMES = [*(name for _, name in NETS), *LATENT, "cm"]
SWITCHES = [f.name for f in fields(FastPath) if f.name in ("channels_last", "sdpa", "folding", "keep_weights")]
TINY = dict(img_resolution=16, img_channels=3, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[8])  # fmt: skip


def load(name: str) -> tuple[Precond, dict[str, Any]]:
    """A recorded network and what to call it with."""
    if name == "cm":
        net, golden = consistency_network()
        return net, dict(x=golden["x"], sigma=golden["sigma"])
    net, golden = latent_network(name) if name in LATENT else build({n: file for file, n in NETS}[name], name)
    inputs: dict[str, Any] = dict(x=golden[f"{name}/x"], sigma=golden[f"{name}/sigma"], step_condition=5.0)
    for key, argument in (("labels", "class_labels"), ("context", "condition")):
        if f"{name}/{key}" in golden:
            inputs[argument] = golden[f"{name}/{key}"]
    return net, inputs


def outputs(net: Precond, inputs: dict[str, Any], path: FastPath) -> torch.Tensor:
    with use_path(path):
        return net(**inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("switch", [*SWITCHES, "all"])
def test_every_fast_way_gives_the_plain_outputs(name, switch):
    net, inputs = load(name)
    path = FastPath() if switch == "all" else replace(PLAIN, **{switch: getattr(FastPath(), switch)})
    plain = outputs(net, inputs, PLAIN)
    assert relative(outputs(net, inputs, path), plain) < SAME
    net.compute_dtype = torch.bfloat16
    half = relative(outputs(net, inputs, path), plain)
    assert 0 < half < HALF


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", [PLAIN, FastPath()], ids=["plain", "fast"])
def test_layers_see_the_layout_and_attention_of_the_path(name, path):
    net, inputs = load(name)
    order = torch.channels_last if path.channels_last else torch.contiguous_format
    seen = []

    def look(layer: Conv2d, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        seen.append(args[0].is_contiguous(memory_format=order))

    for layer in net.modules():
        if isinstance(layer, Conv2d):
            layer.register_forward_hook(look)
    function = "scaled_dot_product_attention"
    with (
        mock.patch.object(F, function, wraps=getattr(F, function)) as fused,
        mock.patch.object(GroupNormFunction, "apply", wraps=GroupNormFunction.apply) as norm,
    ):
        outputs(net, inputs, path)
    assert len(seen) > 10 and all(seen)
    assert fused.called == path.sdpa and norm.called == path.folding


@pytest.mark.parametrize("name", NAMES)
def test_fast_gradients_are_the_plain_ones(name):
    net, inputs = load(name)
    net.requires_grad_(True)
    gradients = []
    for path in (PLAIN, FastPath()):
        net.zero_grad()
        outputs(net, inputs, path).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None})
    plain, fast = gradients
    assert plain.keys() == fast.keys()
    largest = max(g.abs().max() for g in plain.values())
    for key, gradient in plain.items():
        assert (fast[key] - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-6 * largest, key


def test_a_training_iteration_is_the_plain_one(capsys):
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for path in (PLAIN, FastPath()):
        with use_path(path):
            distiller = make_distiller("sfd", dropout=0.0)
            targets, states = distiller.iterate(noise, None, distiller.config.num_steps)
            results.append((targets, states, distiller.losses.flush()))
            assert distiller.optimizer.defaults["fused"] == path.fused_optimizer
            assert bool(capsys.readouterr().out) == (not path.no_waiting)
    for plain, fast in zip(results[0][:2], results[1][:2]):
        assert relative(fast, plain) < 1e-4
    assert results[1][2] == pytest.approx(results[0][2], rel=1e-4)


def test_the_fused_optimizer_takes_the_plain_steps():
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        with use_path(FastPath(fused_optimizer=fused)):
            distiller = make_distiller("sfd", dropout=0.0)
            distiller.iterate(noise, None, distiller.config.num_steps)
            found.append([p.detach() for p in distiller.trained])
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (3 * x + 1).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("cached", [1, 1 << 19])
def test_gradients_of_the_group_norm(monkeypatch, silu, per_sample, shifted, cached):
    monkeypatch.setattr(models.networks.group_norm, "CACHED", cached)  # 1: every sample is a part
    x = channels_last(3, 12, 2, 3, dtype=torch.float64).requires_grad_()
    rng = torch.Generator().manual_seed(1)
    shape = (3, 12) if per_sample else (12,)
    values = [torch.randn(s, generator=rng, dtype=torch.float64, requires_grad=True) for s in (shape, shape, (3, 12))]
    weight, bias, shift = values if shifted else [*values[:2], None]
    torch.autograd.gradcheck(lambda *a: GroupNormFunction.apply(*a, 3, 1e-5, silu), (x, weight, bias, shift))
    y = F.group_norm(x if shift is None else x + shift[:, :, None, None], 3, eps=1e-5)
    y = y * weight.reshape(-1, 12, 1, 1) + bias.reshape(-1, 12, 1, 1)
    found = GroupNormFunction.apply(x, weight, bias, shift, 3, 1e-5, silu)
    torch.testing.assert_close(found, F.silu(y) if silu else y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_group_norm_rounds_once(dtype):
    x, norm = channels_last(2, 32, 4, 4, dtype=dtype), GroupNorm(32)
    exact = F.silu(F.group_norm(x.double(), norm.groups, eps=norm.eps))
    found = norm(x, silu=True)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def test_a_constant_image_has_no_variance():
    found = GroupNorm(32)(torch.full([2, 32, 4, 4], 1e3).contiguous(memory_format=torch.channels_last))
    assert found.isfinite().all()


@pytest.mark.parametrize("change", ["in place", "assigned", "trained"])
def test_kept_weights_follow_their_layer(change):
    layer, x = Conv2d(4, 4, 3).requires_grad_(False), channels_last(1, 4, 4, 4, dtype=torch.bfloat16)
    before = layer(x)
    assert layer._kept is not None and torch.equal(layer(x), before)
    if change == "in place":
        layer.weight.mul_(2)
    elif change == "assigned":
        state = {"weight": layer.weight * 2, "bias": layer.bias * 1}
        layer.load_state_dict(state, assign=True)
    else:
        layer.requires_grad_(True)
        with torch.no_grad():
            layer.weight.mul_(2)
    torch.testing.assert_close(layer(x).float(), 2 * before.float(), rtol=0.02, atol=0.02)


def test_a_path_ends_with_its_context():
    with pytest.raises(RuntimeError), use_path(PLAIN):
        assert devices.fast_path() == PLAIN
        raise RuntimeError
    assert devices.fast_path() == FastPath()


@pytest.mark.parametrize("environment, started_with, threads", [
    ({}, None, None),  # no torchrun: nothing changes
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, b"HOME=/\0", 4),
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, b"HOME=/\0OMP_NUM_THREADS=1\0", None),
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, b"", None),
    ({"LOCAL_WORLD_SIZE": "16", "OMP_NUM_THREADS": "1"}, b"", 1),
])  # fmt: skip
def test_processes_share_the_cores(monkeypatch, environment, started_with, threads):
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: started_with)
    devices.share_cores()
    assert chosen == ([] if threads is None else [threads])


# --- Cost ------------------------------------------------------------------------------------------------------------


def test_evaluations_and_operations():
    net = build_on_meta(get_row("emoji32"))
    found = cost.run_cost(DistillConfig("emoji32"), net, 1)
    assert (found.teacher, found.student) == (12, 2)
    assert found.flops_per_trajectory == 18 * found.flops
    variable = cost.run_cost(DistillConfig("emoji32", use_step_condition=True, sampler_tea="heun"), net, 1)
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


def test_memory_grows_with_batch_and_precision():
    net = build_on_meta(get_row("emoji32"))
    sizes = [cost.activation_bytes(net, dtype, n) for dtype in (torch.float32, torch.bfloat16) for n in (1, 4)]
    assert sizes[1] == 4 * sizes[0] and sizes[3] == 4 * sizes[2] and 0.4 < sizes[2] / sizes[0] < 0.7
    small, large = (cost.run_cost(DistillConfig("emoji32"), net, n).memory for n in (1, 64))
    assert small > 5 * 4 * 1.9e6 and large - small > 63 * sizes[0]


def test_estimate_names_what_a_run_takes(monkeypatch):
    monkeypatch.setattr(cost, "build_on_meta", lambda row: tiny_on_meta())
    text = cost.estimate(DistillConfig("emoji32", batch=8, total_kimg=0.1), torch.device("cpu"), 2, None, seconds=0.1)
    assert "12 evaluations of the teacher, 2 of the student" in text and "on 2× cpu in fp32" in text
    assert "micro-batches of 4" in text


def test_micro_batch_is_halved_until_it_fits():
    tried = []

    def trial(size: int) -> None:
        tried.append(size)
        if size > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert cost.fitting_size(trial, 48) == 6 and tried == [48, 24, 12, 6]
    tried.clear()
    assert cost.fitting_size(trial, 35) == 7 and tried == [35, 7]

    def never(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="one sample does not fit"):
        cost.fitting_size(never, 8)


# --- Benchmark -------------------------------------------------------------------------------------------------------


def tiny_on_meta() -> EDMPrecond:
    with torch.device("meta"):
        return EDMPrecond(**TINY)


def run_bench(tmp_path, *args: str) -> dict:
    path = tmp_path / "bench.json"
    done = CliRunner().invoke(
        bench.main, ["--quick", "--batch=4", "--device=cpu", f"--json={path}", *args], catch_exceptions=False
    )
    assert done.exit_code == 0
    results = json.loads(path.read_text())
    for row in results["rows"]:
        assert row["stage"] in done.output and row["seconds"] > 0
    return results


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_benchmark_of_a_small_network(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(bench, "build_on_meta", lambda row: tiny_on_meta())
    if not whole:  # random weights for the detector take seconds
        monkeypatch.setattr(bench, "InceptionV3", torch.nn.Identity)
    results = run_bench(tmp_path, "--precision=fp32", *["--switches"] * whole)
    rows = {row["stage"]: row for row in results["rows"]}
    flops = results["flops_per_evaluation"] * 4
    assert rows["training iteration"]["flops"] == 18 * flops and rows["sampling, NFE 5"]["flops"] == 5 * flops
    for name in ("training iteration", "teacher trajectory", "student step", "sampling, NFE 2"):
        row = rows[name]
        assert row["ratio_to_plain"] == pytest.approx(row["plain"] / row["seconds"])
        assert row["share_of_peak"] == pytest.approx(row["flops"] / row["seconds"] / results["matrix_peaks"]["fp32"])
    assert results["switches"].keys() == ({f"without {f.name}" for f in fields(FastPath)} if whole else set())
    assert all(row["runs"] == 1 for row in rows.values())
    assert any("PRDC" in name for name in rows) and any("Fréchet" in name for name in rows)


def test_slow_stages_run_less_often(monkeypatch):
    assert list(bench.rounds(3)) == [0, 1, 2]
    monkeypatch.setattr(bench, "STAGE_SECONDS", 0.0)
    assert list(bench.rounds(3)) == [0]


@pytest.mark.slow
def test_benchmark_of_a_latent_model(tmp_path):
    with known_as_published("ms_coco", tmp_path):
        rows = {row["stage"]: row for row in run_bench(tmp_path, "--dataset_name=ms_coco")["rows"]}
    assert rows["decoding"]["per_second"] > 0 and rows["training iteration"]["ratio_to_plain"] > 0


def test_unknown_data_sets_are_one_line(tmp_path):
    done = CliRunner().invoke(bench.main, ["--dataset_name=imagenet65"])
    assert done.exit_code == 1 and "unknown dataset_name 'imagenet65'" in done.output


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
