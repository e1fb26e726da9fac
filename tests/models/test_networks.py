"""EDM networks: published parameters, recorded outputs, precision, step condition."""

import json

import pytest
import torch
from golden_files import GOLDEN, Golden

from models import EDMPrecond

NETS = [
    ("edm_networks", "song"),
    ("edm_networks", "ncsnpp"),
    ("edm_networks_adm", "adm"),
    ("edm_networks_adm2h", "adm2h"),
]
#: recommended by the reference: atol 5e-5 + rtol 1e-4
CLOSE = dict(atol=5e-5, rtol=1e-4)


def build(file: str, name: str, **kwargs) -> tuple[EDMPrecond, Golden]:
    golden = Golden(file)
    net = EDMPrecond(**golden.meta["nets"][name], use_step_condition=True, **kwargs).eval().requires_grad_(False)
    net.load_state_dict(golden.weights(name))
    return net, golden


@pytest.mark.parametrize("file, name", NETS)
def test_outputs_equal_the_reference(file, name):
    net, golden = build(file, name)
    x, sigma = golden[f"{name}/x"], golden[f"{name}/sigma"]
    labels = golden[f"{name}/labels"] if f"{name}/labels" in golden else None
    calls = {
        "none": dict(sigma=sigma),
        "step4": dict(sigma=sigma, step_condition=4),
        "step7": dict(sigma=sigma, step_condition=torch.tensor(7.0)),
        "scalar": dict(sigma=sigma[1]),
        "nolabel": dict(sigma=sigma, class_labels=None),
    }
    if f"{name}/aug" in golden:
        calls["aug"] = dict(sigma=sigma, augment_labels=golden[f"{name}/aug"])
    # Skip-tuning (arXiv 2402.15170) was recorded too; nothing here offers it.
    recorded = {key.split("/")[-1] for key in golden.keys(f"{name}/out/")} - {"sktune"}
    assert recorded <= set(calls)
    for key in recorded:
        out = net(x, **{"class_labels": labels, **calls[key]})
        torch.testing.assert_close(out, golden[f"{name}/out/{key}"], **CLOSE, msg=lambda m: f"{name}/{key}: {m}")


@pytest.mark.parametrize("file, name", NETS)
def test_raw_output_equals_the_reference(file, name):
    net, golden = build(file, name)
    sigma, labels = golden[f"{name}/sigma"], golden[f"{name}/labels"] if f"{name}/labels" in golden else None
    scaled = golden[f"{name}/x"] / (sigma.square() + 0.25).sqrt()[:, None, None, None]
    torch.testing.assert_close(net.model(scaled, sigma.log() / 4, labels), golden[f"{name}/F/none"], **CLOSE)


@pytest.mark.parametrize("file, name", NETS)
def test_step_condition_layers_exist_only_when_asked_for(file, name):
    golden = Golden(file)
    plain = EDMPrecond(**golden.meta["nets"][name])
    assert not any("step" in key for key in plain.state_dict())
    x, sigma = golden[f"{name}/x"], golden[f"{name}/sigma"]
    with pytest.raises(ValueError, match="use_step_condition=True"):
        plain(x, sigma, step_condition=4)


@pytest.mark.parametrize("file, name", NETS)
def test_new_step_condition_layers_change_nothing(file, name):
    net = EDMPrecond(**Golden(file).meta["nets"][name], use_step_condition=True).eval()
    x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
    assert torch.equal(net(x, 1.0), net(x, 1.0, step_condition=5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_core_between_float32_ends(dtype):
    net, golden = build("edm_networks", "song")
    x, sigma = golden["song/x"], golden["song/sigma"]
    exact = net(x, sigma)
    net.compute_dtype = dtype
    seen = []
    net.model.dec["16x16_aux_conv"].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    half = net(x, sigma)
    assert half.dtype == torch.float32 and seen == [dtype]
    # Preconditioning stays float32, so at small sigma, where c_skip is near 1, the error is tiny in absolute terms.
    assert ((half - exact).abs().amax((1, 2, 3)) < 0.03 * exact.abs().amax((1, 2, 3))).all()
    assert not torch.equal(half, exact)


@pytest.mark.parametrize("name, kwargs", [
    ("edm-cifar10-32x32-uncond-vp", dict(img_resolution=32, model_type="SongUNet", channel_mult=[2, 2, 2], augment_dim=9)),
    ("edm-ffhq-64x64-uncond-vp", dict(img_resolution=64, model_type="SongUNet", channel_mult=[1, 2, 2, 2], augment_dim=9)),
    ("edm-imagenet-64x64-cond-adm", dict(img_resolution=64, label_dim=1000, model_type="DhariwalUNet")),
])  # fmt: skip
def test_published_names_and_shapes(name, kwargs):
    published = json.loads((GOLDEN / f"{name}.json").read_text())["tensors"]
    with torch.device("meta"):
        net = EDMPrecond(img_channels=3, **kwargs)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == published


def test_key_bias_gets_no_gradient():
    """Softmax ignores it; what autograd leaves there is rounding noise, which Adam would blow up to full steps."""
    net, golden = build("edm_networks", "song")
    net.requires_grad_(True)
    net(golden["song/x"], golden["song/sigma"]).square().sum().backward()
    grad = net.model.enc["8x8_block0"].qkv.bias.grad.reshape(-1, 3)
    assert (grad[:, 1] == 0).all() and (grad[:, 0] != 0).all() and (grad[:, 2] != 0).all()


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="expected one of SongUNet, DhariwalUNet"):
        EDMPrecond(16, 3, model_type="UNet")
    with pytest.raises(ValueError, match="encoder_type is 'none', expected one of standard, skip, residual"):
        EDMPrecond(16, 3, model_type="SongUNet", encoder_type="none")


@pytest.mark.parametrize("encoder, decoder", [("skip", "standard"), ("standard", "skip"), ("skip", "skip")])
def test_skip_encoder_and_decoder_run_and_train(encoder, decoder):
    kwargs = dict(
        model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], resample_filter=[1, 3, 3, 1]
    )
    net = EDMPrecond(16, 3, model_type="SongUNet", encoder_type=encoder, decoder_type=decoder, **kwargs)
    net(torch.randn(2, 3, 16, 16), torch.tensor([0.1, 10.0])).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
