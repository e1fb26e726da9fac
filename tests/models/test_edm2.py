"""EDM2 networks: recorded outputs, gradients, guidance and sampler; published names and shapes; step condition."""

import json

import pytest
import torch
from golden_files import GOLDEN, Golden

from models import EDM2Precond
from models.export.fold import fold_step_condition
from models.networks.edm2_unet import MPConv, concatenate, sum_factors
from models.networks.layers import freeze
from solvers import get_schedule, get_solver, solve

NETS = ["pixels", "guide", "latents"]
#: Recommended by the reference.
CLOSE = dict(atol=5e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("edm2_networks")


def build(golden: Golden, name: str, **changes) -> EDM2Precond:
    net = EDM2Precond(**{**golden.meta["nets"][name], **changes}).eval()
    missing, unexpected = net.load_state_dict(golden.weights(name), strict=False)
    assert not unexpected and all("step" in name for name in missing)
    return net


def inputs(golden: Golden, name: str):
    labels = golden[f"{name}/labels"] if f"{name}/labels" in golden else None
    return golden[f"{name}/x"], golden[f"{name}/sigma"], labels


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_outputs_equal_the_reference(golden, name):
    net, (x, sigma, labels) = build(golden, name), inputs(golden, name)
    outputs = {
        "none": net(x, sigma, labels),
        "scalar": net(x, sigma[1], labels),
        "nolabel": net(x, sigma),
        "half_weights": None,
    }
    net.load_state_dict({key: tensor.half().float() for key, tensor in net.state_dict().items()})
    outputs["half_weights"] = net(x, sigma, labels)
    recorded = {key.split("/")[-1] for key in golden.keys(f"{name}/out/")}
    assert recorded >= {"none", "scalar", "half_weights"}
    for key in recorded:
        torch.testing.assert_close(outputs[key], golden[f"{name}/out/{key}"], **CLOSE, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_raw_output_and_uncertainty_equal_the_reference(golden, name):
    net, (x, sigma, labels) = build(golden, name), inputs(golden, name)
    scaled = x / (sigma.square() + 0.25).sqrt()[:, None, None, None]
    torch.testing.assert_close(net.unet(scaled, sigma.log() / 4, labels), golden[f"{name}/F/none"], **CLOSE)
    torch.testing.assert_close(net.log_variance(sigma), golden[f"{name}/logvar"], **CLOSE)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weight_normalisation_and_gradients_equal_the_reference(golden, name, checkpointing):
    net, (x, sigma, labels) = build(golden, name, dropout=0.0).train(), inputs(golden, name)
    if checkpointing:
        net.checkpoint_gradients()
    net.normalize_weights()
    out = net(x, sigma, labels)
    out.abs().sum().backward()
    parameters = dict(net.named_parameters())
    torch.testing.assert_close(out, golden[f"{name}/train/out"], **CLOSE)
    for key in golden.keys(f"{name}/train/weight/"):
        torch.testing.assert_close(parameters[key.split("/")[-1]], golden[key], **CLOSE)
    gradients = {key.split("/")[-1]: golden[key] for key in golden.keys(f"{name}/train/grad/")}
    assert len(gradients) >= 4
    for key, expected in gradients.items():
        close = dict(rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        torch.testing.assert_close(parameters[key].grad, expected, **close, msg=lambda m: f"{key}: {m}")


def sample(denoise, noise):
    """The published sampler: Heun's method between σ 80 and 0.002, which ends with the denoiser itself."""
    sigmas = get_schedule("polynomial", 8, 0.002, 80.0)
    x = solve(get_solver("heun"), denoise, noise * 80, sigmas)[-1]
    return denoise(x, torch.tensor(0.002))


@torch.no_grad()
def test_sampler_equals_the_reference(golden):
    net, labels = build(golden, "pixels"), golden["pixels/sampler/labels"]
    images = sample(lambda x, sigma: net(x, sigma, labels), golden["pixels/sampler/noise"])
    torch.testing.assert_close(images, golden["pixels/sampler/out"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name, kwargs", [
    ("edm2-img64-s", dict(img_resolution=64, img_channels=3, model_channels=192)),
    ("edm2-img512-xs", dict(img_resolution=64, img_channels=4, model_channels=128)),
    ("edm2-img512-xxl", dict(img_resolution=64, img_channels=4, model_channels=448, dropout=0.1)),
])  # fmt: skip
def test_published_names_and_shapes(name, kwargs):
    published = json.loads((GOLDEN / f"{name}.json").read_text())["tensors"]
    with torch.device("meta"):
        net = EDM2Precond(label_dim=1000, **kwargs)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == published


def test_magnitudes_are_preserved():
    """Independent features of unit variance stay so through sums and concatenations, of any balance and size."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, channels, 64, 64, generator=rng) for channels in (12, 3))
    for balance in (0.1, 0.3, 0.5):
        kept, added = sum_factors(balance)
        assert (kept * a[:, :3] + added * b).std().item() == pytest.approx(1, abs=0.02)
        assert added / kept == pytest.approx(balance / (1 - balance))
        joined = concatenate(a, b, balance)
        assert joined.square().mean().item() == pytest.approx(1, abs=0.02)
        # Each input contributes to what a convolution of random weights makes of them as in a sum.
        energy_a, energy_b = joined[:, :12].square().sum(), joined[:, 12:].square().sum()
        assert (energy_b / energy_a).sqrt().item() == pytest.approx(balance / (1 - balance), rel=0.02)


def test_the_size_of_weights_means_nothing():
    rng = torch.Generator().manual_seed(0)
    layer, x = MPConv(8, 5, kernel=3), torch.randn(2, 8, 6, 6, generator=rng)
    before = layer(x)
    layer.weight.data.mul_(torch.tensor([0.5, 1, 2, 8, 100])[:, None, None, None])
    torch.testing.assert_close(layer(x), before, atol=1e-3, rtol=1e-3)  # ε is a part of 1e-4
    layer.normalize()
    torch.testing.assert_close(layer.weight.square().mean((1, 2, 3)), torch.ones(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(layer(x), before, atol=1e-3, rtol=1e-3)
    gradient = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    assert (gradient * layer.weight).sum((1, 2, 3)).abs().max() < 1e-3 * gradient.norm() * layer.weight.norm()


def test_kept_weights_of_a_frozen_network_follow_changes(golden):
    net, (x, sigma, labels) = freeze(build(golden, "pixels")), inputs(golden, "pixels")
    first = net(x, sigma, labels)
    assert torch.equal(net(x, sigma, labels), first)
    state = net.state_dict()
    net.load_state_dict({key: -value if key == "unet.emb_noise.weight" else value for key, value in state.items()})
    assert not torch.equal(net(x, sigma, labels), first)


@torch.no_grad()
def test_a_new_step_condition_changes_nothing_until_it_is_trained(golden):
    net, (x, sigma, labels) = build(golden, "pixels", use_step_condition=True), inputs(golden, "pixels")
    plain = net(x, sigma, labels)
    assert torch.equal(net(x, sigma, labels, step_condition=5), plain)
    with torch.enable_grad():
        net(x, sigma, labels, step_condition=5.0).square().sum().backward()
    assert net.unet.step_gain.grad.abs() > 0
    net.unet.step_gain.fill_(0.5)
    five, six = (net(x, sigma, labels, step_condition=steps) for steps in (5.0, torch.full([4], 6.0)))
    assert not torch.equal(five, plain) and not torch.equal(five, six)
    with pytest.raises(ValueError, match="use_step_condition=True"):
        build(golden, "pixels")(x, sigma, labels, step_condition=5)


@torch.no_grad()
def test_a_step_condition_folds_into_a_constant(golden):
    net, (x, sigma, labels) = build(golden, "pixels", use_step_condition=True), inputs(golden, "pixels")
    net.unet.step_gain.fill_(0.5)
    folded = fold_step_condition(net, 6)
    assert not any("step" in name for name in folded.state_dict())
    torch.testing.assert_close(folded(x, sigma, labels), net(x, sigma, labels, step_condition=6), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_core_between_float32_ends(golden, dtype):
    net, (x, sigma, labels) = build(golden, "pixels"), inputs(golden, "pixels")
    exact = net(x, sigma, labels)
    net.compute_dtype, seen = dtype, []
    net.unet.out_conv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    half = net(x, sigma, labels)
    assert half.dtype == torch.float32 and seen == [dtype] and not torch.equal(half, exact)
    assert ((half - exact).abs().amax((1, 2, 3)) < 0.03 * exact.abs().amax((1, 2, 3))).all()


def test_distillation_leaves_the_uncertainty_alone(golden):
    net = build(golden, "pixels").requires_grad_(True)
    before = net.logvar_linear.weight.clone()
    net.freeze_unused()
    net.normalize_weights()
    assert not net.logvar_linear.weight.requires_grad and torch.equal(net.logvar_linear.weight, before)


def test_other_resampling_filters_are_refused():
    with pytest.raises(ValueError, match=r"resample_filter is \[1, 3, 3, 1\]"):
        EDM2Precond(8, 3, resample_filter=[1, 3, 3, 1])
