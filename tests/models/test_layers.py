"""Memory orders, precisions and kept weights change nothing but rounding; what attention and the group norm are given."""

import contextlib
import copy
from typing import Any
from unittest import mock

import pytest
import test_edm2
import torch
import torch.nn.functional as F
from golden_files import Golden
from test_guided_unet import LATENT, consistency_network, latent_network
from test_networks import NETS, build

import models.networks.group_norm
import models.networks.layers
from models.networks.attention import attend
from models.networks.autoencoders import KLAutoencoder
from models.networks.group_norm import GroupNormFunction
from models.networks.layers import Conv2d, GroupNorm, freeze
from models.precond import Precond
from torch_utils.device import channels_last_on, plain_operations

#: Of the largest value: float32 rounds differently in another order; half precision has 8 (11) bits.
SAME, HALF = 1e-5, {torch.bfloat16: 2e-2, torch.float16: 4e-3}
NAMES = [*(name for _, name in NETS), *LATENT, "cm"]
#: Each as a context: the CPU's, and the one of GPUs.
ORDERS = {"channels_last": lambda: channels_last_on("cpu"), "contiguous": channels_last_on}


def load(name: str) -> tuple[Precond, dict[str, Any]]:
    """A recorded network and what to call it with."""
    if name == "edm2":
        golden = Golden("edm2_networks")
        x, sigma, labels = test_edm2.inputs(golden, "pixels")
        return test_edm2.build(golden, "pixels").requires_grad_(False), dict(x=x, sigma=sigma, class_labels=labels)
    if name == "cm":
        net, golden = consistency_network()
        return net, dict(x=golden["x"], sigma=golden["sigma"])
    net, golden = latent_network(name) if name in LATENT else build({n: file for file, n in NETS}[name], name)
    inputs: dict[str, Any] = dict(x=golden[f"{name}/x"], sigma=golden[f"{name}/sigma"], step_condition=5.0)
    for key, argument in (("labels", "class_labels"), ("context", "condition")):
        if f"{name}/{key}" in golden:
            inputs[argument] = golden[f"{name}/{key}"]
    return net, inputs


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=ORDERS)
def order(request):
    with ORDERS[request.param]():
        yield request.param


@pytest.mark.parametrize("name", [*NAMES, "edm2"])
def test_outputs_are_those_of_plain_operations(name, order):
    net, inputs = load(name)
    with plain_operations():
        plain = net(**inputs)
    assert relative(net(**inputs), plain) < SAME
    for dtype, bound in HALF.items():
        net.compute_dtype = dtype
        assert 0 < relative(net(**inputs), plain) < bound


@pytest.mark.parametrize("name", [*NAMES, "edm2"])
def test_gradients_are_those_of_plain_operations(name, order):
    net, inputs = load(name)
    net.requires_grad_(True)

    def gradients(dtype: torch.dtype, plain: bool = False) -> dict[str, torch.Tensor]:
        net.zero_grad()
        net.compute_dtype = dtype
        with plain_operations() if plain else contextlib.nullcontext():
            net(**inputs).square().mean().backward()
        return {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}

    plain, found = gradients(torch.float32, plain=True), gradients(torch.float32)
    assert plain.keys() == found.keys()
    largest = max(g.abs().max() for g in plain.values())
    for key, gradient in plain.items():
        assert (found[key] - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-6 * largest, key
    whole = torch.cat([g.flatten() for g in plain.values()])
    for dtype, bound in HALF.items():
        if dtype == torch.float16 and order == "channels_last":
            continue  # float16 is of GPUs, which compute in contiguous layout
        half = gradients(dtype)
        assert half.keys() == plain.keys() and all(g.dtype == torch.float32 for g in half.values())
        assert (torch.cat([g.flatten() for g in half.values()]) - whole).norm() < 3 * bound * whole.norm()


@pytest.mark.parametrize("name", NAMES)
def test_layers_see_the_memory_order(name, order):
    net, inputs = load(name)
    wanted = torch.channels_last if order == "channels_last" else torch.contiguous_format
    seen = []

    def look(layer: Conv2d, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        seen.append(args[0].is_contiguous(memory_format=wanted))

    for layer in net.modules():
        if isinstance(layer, Conv2d):
            layer.register_forward_hook(look)
    with mock.patch.object(GroupNormFunction, "apply", wraps=GroupNormFunction.apply) as norm:
        net(**inputs)
    assert len(seen) > 10 and all(seen)
    assert norm.called == (order == "channels_last")


@pytest.mark.parametrize("name", [*NAMES, "edm2", "decoder"])
def test_attention_is_given_the_channels_of_a_head_side_by_side(name, order):
    """Else every fused kernel of CUDA refuses, and attention takes the slow way that keeps all its products."""
    strides = []

    def spy(*qkv: torch.Tensor) -> torch.Tensor:
        strides.extend(t.stride(-1) for t in qkv)
        return attention(*qkv)

    attention = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        if name == "decoder":
            decoder = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[8], resolution=16)
            net = KLAutoencoder(4, **decoder, in_channels=3, out_ch=3, z_channels=4).eval()
            net.decode(torch.randn(1, 4, 8, 8))
        else:
            net, inputs = load(name)
            for dtype in (torch.float32, torch.bfloat16):
                net.compute_dtype = dtype
                net(**inputs)
    assert len(strides) > 3 and set(strides) == {1}


@pytest.mark.parametrize("name", [*NAMES, "edm2"])
def test_weights_that_are_cast_together_are_the_same_bits(name):
    """With dropout off: the layers of a network in training, in the layout of GPUs."""
    net, inputs = load(name)
    net.train().requires_grad_(True).set_dropout(0.0)
    net.compute_dtype = torch.bfloat16
    found = []
    with channels_last_on(), mock.patch.object(models.networks.layers, "LAYERS_AT_A_TIME", 3):
        for _ in range(2):  # the first time a network is found out about
            net.zero_grad()
            out = net(**inputs)
            out.square().mean().backward()
            found.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
        casts = {id(m) for m in net.modules() if getattr(m, "_is_cast", False)}
        assert len(casts) > 10 or name == "edm2"
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found))
    assert all(g.dtype == torch.float32 for g in found[1]) and all(
        m._together is None for m in net.modules() if id(m) in casts
    )


# --- Frozen weights --------------------------------------------------------------------------------------------------


def test_frozen_weights_are_cast_once(order):
    net, inputs = load("song")
    net.compute_dtype = torch.bfloat16
    before, convert = net(**inputs), Conv2d._convert
    calls = []

    def counted(layer: Conv2d, x: torch.Tensor) -> Any:
        calls.append(layer)
        return convert(layer, x)

    with mock.patch.object(Conv2d, "_convert", counted):
        freeze(net)
        found = [net(**inputs) for _ in range(3)]
    assert len(calls) == len(set(calls)) > 10
    assert all(torch.equal(out, before) for out in found)


@pytest.mark.parametrize("change", ["loaded", "assigned", "in a part", "cast", "trained", "in place"])
def test_kept_weights_are_not_used_after_a_change(change):
    net, inputs = load("song")
    freeze(net)
    net.compute_dtype = torch.bfloat16
    other = copy.deepcopy(net)
    net(**inputs)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.25)
    state = other.state_dict()
    if change == "loaded":
        net.load_state_dict(state)
    elif change == "assigned":
        net.load_state_dict(state, assign=True)
    elif change == "in a part":
        net.model.load_state_dict(other.model.state_dict())
    elif change == "cast":
        net.load_state_dict(state)
        net.double().float()
    elif change == "trained":
        net.train().requires_grad_(True).load_state_dict(state)
        net.set_dropout(0)
        net(**inputs).sum().backward()
        assert all(p.grad is not None for p in net.model.dec.parameters())
    else:
        for param in net.parameters():
            param.mul_(1.25)
        freeze(net)
    assert torch.equal(net(**inputs), other(**inputs))


# --- Group normalisation ---------------------------------------------------------------------------------------------


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (3 * x + 1).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("cached", [1, 1 << 19, None])
def test_gradients_of_the_group_norm(monkeypatch, silu, per_sample, shifted, cached):
    """In parts, of one sample or of all; with None by torch's kernel, where samples share weights."""
    if cached is not None:
        monkeypatch.setattr(models.networks.group_norm, "CACHED", cached)
        monkeypatch.setattr(models.networks.group_norm, "_suits_torch", lambda x, weight: False)
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


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("pixels, by_torch", [(16, False), (32, True)])
def test_half_precision_group_norm_against_float64(pixels, by_torch, shifted, monkeypatch):
    """Values and gradients, of few pixels in parts and of many by torch's kernel."""
    x = channels_last(2, 12, pixels, pixels, dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(1)
    weight, bias = 1 + torch.randn(12, generator=rng) / 4, torch.randn(12, generator=rng)
    shift = torch.randn(2, 12, generator=rng) if shifted else None
    grad = channels_last(2, 12, pixels, pixels, dtype=torch.bfloat16)
    kernel, calls = torch.native_group_norm, []
    monkeypatch.setattr(torch, "native_group_norm", lambda *args: calls.append(1) or kernel(*args))

    def run(dtype: torch.dtype | None) -> list[torch.Tensor]:
        cast = [None if t is None else (t if dtype is None else t.to(dtype)) for t in (x, weight, bias, shift)]
        given = [None if t is None else t.clone(memory_format=torch.preserve_format).requires_grad_() for t in cast]
        if dtype is None:
            y = GroupNormFunction.apply(*given, 3, 1e-5, True)
        else:
            moved = given[0] if shift is None else given[0] + given[3][:, :, None, None]
            y = F.silu(F.group_norm(moved, 3, given[1], given[2], 1e-5))
        y.backward(grad.to(y.dtype))
        return [y.detach(), *(t.grad for t in given if t is not None)]

    found, expected = run(None), run(torch.float64)
    assert bool(calls) == by_torch
    for value, exact in zip(found, expected, strict=True):
        assert (value.double() - exact).norm() < 1e-2 * exact.norm()


def test_gradients_of_attention_to_few_tokens():
    """Values have the bits that they have without gradients."""
    q, k, v = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, v = k[:, :, :3], v[:, :, :3]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    torch.autograd.gradcheck(attend, (q, k, v))
    found = attend(q, k, v)
    assert "FewTokens" in type(found.grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), found)
    torch.testing.assert_close(found, torch.softmax(q @ k.mT / 2, dim=-1) @ v)
    many = torch.zeros(1, 1, 300, 4, requires_grad=True)
    assert "FewTokens" not in type(attend(many, many, many).grad_fn).__name__


def test_a_constant_image_has_no_variance():
    found = GroupNorm(32)(torch.full([2, 32, 4, 4], 1e3).contiguous(memory_format=torch.channels_last))
    assert found.isfinite().all()
