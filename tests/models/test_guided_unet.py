"""The U-Net of the guided-diffusion family and its preconditioners: recorded outputs, published names, noise schedule."""

import json
from functools import partial

import pytest
import torch
from golden_files import GOLDEN, Golden

from models.building import build_on_meta
from models.guidance import guided
from models.networks.guided_unet import GuidedUNet
from models.noise import DiscreteNoise
from models.precond import CFGPrecond, ConsistencyPrecond
from models.registry import ROWS
from solvers import get_schedule

CLOSE = dict(atol=1e-4, rtol=1e-4)
LATENT = {"ldm": "ldm_networks", "sd": "ldm_networks_sd"}
#: Schedules recorded for the two networks.
SCHEDULES = Golden("schedules")
UNET = "model.diffusion_model."
TINY = dict(
    in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2],
    num_head_channels=16,
)  # fmt: skip


def latent_network(name: str) -> tuple[CFGPrecond, Golden]:
    golden = Golden(LATENT[name])
    recorded = golden.meta["net"][name]["params"]
    unet = dict(recorded["unet_config"]["params"])
    is_transformer = unet.pop("use_spatial_transformer", False)
    for unused in ("image_size", "in_channels", "out_channels", "legacy"):
        unet.pop(unused, None)
    net = CFGPrecond(
        recorded["image_size"], recorded["channels"], recorded["linear_start"], recorded["linear_end"],
        recorded["timesteps"], attention_type="transformer" if is_transformer else "legacy", use_step_condition=True,
        **unet,
    )  # fmt: skip
    weights = golden.weights(name)
    net.model.load_state_dict({k[len(UNET) :]: v for k, v in weights.items() if k.startswith(UNET)})
    return net.eval().requires_grad_(False), golden


def consistency_network() -> tuple[ConsistencyPrecond, Golden]:
    golden = Golden("cm_unet")
    recorded = golden.meta["net"]
    names = ("model_channels", "num_res_blocks", "attention_resolutions", "channel_mult", "num_head_channels",
             "use_scale_shift_norm", "resblock_updown", "dropout")  # fmt: skip
    unet = {name: recorded[name] for name in names}
    net = ConsistencyPrecond(recorded["image_size"], recorded["in_channels"], attention_type="flash", **unet)
    net.model.load_state_dict(golden.weights("net"))
    return net.eval().requires_grad_(False), golden


def randomise(net: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """Fresh networks end in zeros, which would hide most defects."""
    torch.manual_seed(1)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn_like(param) * scale)
    return net


# --- Recorded outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATENT)
def test_raw_outputs_equal_the_reference(name):
    net, golden = latent_network(name)
    x, t = golden[f"{name}/unet/x"], golden[f"{name}/unet/t"]
    context = golden[f"{name}/context"] if name == "sd" else None
    for step in (None, 4.0, 7.0):
        condition = None if step is None else torch.tensor(step)
        out = net.model(x, t, context, condition)
        key = "none" if step is None else f"step{step:g}"
        torch.testing.assert_close(out, golden[f"{name}/unet/out/{key}"], **CLOSE)


@pytest.mark.parametrize("name, rate", [("ldm", 1.0), ("sd", 1.0), ("sd", 7.5)])
def test_denoisers_equal_the_reference(name, rate):
    net, golden = latent_network(name)
    x, sigma = golden[f"{name}/x"], golden[f"{name}/sigma"]
    for key in ("none", "step4", "step7"):
        expected = golden[f"{name}/denoised/rate{rate}/{key}"]
        step = None if key == "none" else float(key[4:])
        for b in range(len(x)):
            pair = [b, (b + 1) % 4]
            told = partial(net, step_condition=step)
            text = [{}, {}]
            if name == "sd":
                text = [dict(condition=golden[f"sd/{key}"][pair]) for key in ("context", "uncond_context")]
            denoise = guided(partial(told, **text[0]), partial(told, **text[1]), rate)
            out = denoise(torch.stack([x[b], -0.5 * x[b]]), sigma[b])
            # Rounding of the network is multiplied by σ and the guidance rate; the record itself is 3e-4 from float64.
            atol = max(1e-4, 5e-6 * rate * float(sigma[b]))
            torch.testing.assert_close(out, expected[b], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", LATENT)
def test_samples_with_different_sigmas_do_not_mix(name):
    """The reference is right for one sigma only."""
    net, golden = latent_network(name)
    x, sigma = golden[f"{name}/x"], golden[f"{name}/sigma"]
    text = dict(condition=golden["sd/context"]) if name == "sd" else {}
    step = torch.tensor([4.0, 5.0, 6.0, 7.0])
    whole = net(x, sigma, step_condition=step, **text)
    for b in range(4):
        part = {k: v[b : b + 1] for k, v in text.items()}
        alone = net(x[b : b + 1], sigma[b], step_condition=float(step[b]), **part)
        torch.testing.assert_close(whole[b : b + 1], alone, atol=2e-5 * max(1, float(sigma[b])), rtol=1e-4)


def test_consistency_models_teacher_equals_the_reference():
    net, golden = consistency_network()
    out = net(golden["x"], golden["sigma"])
    torch.testing.assert_close(out, golden["denoised"], **CLOSE)
    torch.testing.assert_close(out, golden["denoised_half_attention"], atol=2e-3, rtol=0)
    for b, sigma in enumerate(golden["sigma"].tolist()):
        torch.testing.assert_close(net(golden["x"][b : b + 1], sigma), golden["denoised"][b : b + 1], **CLOSE)


@pytest.mark.parametrize(
    "build", [lambda: latent_network("ldm")[0], lambda: latent_network("sd")[0], lambda: consistency_network()[0]]
)
def test_half_precision_core_keeps_states_in_float32(build):
    net = build()
    x, sigma = torch.randn(2, net.img_channels, 16, 16) * 3, torch.tensor([0.01, 3.0])
    text = {} if net.context_dim is None else {"condition": torch.randn(2, 7, net.context_dim)}
    exact, seen = net(x, sigma, **text), []
    net.compute_dtype = torch.bfloat16
    net.model.out[2].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    half = net(x, sigma, **text)
    assert half.dtype == torch.float32 and seen == [torch.bfloat16]
    assert (half - exact).abs().max() < 0.1 * exact.abs().max() and not torch.equal(half, exact)
    # At a small sigma the network matters little, and nothing else may be rounded.
    assert (half - exact)[0].abs().max() < 1e-3


# --- Structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, file, prefix", [
    ("lsun_bedroom", "edm_bedroom256_ema", ""),
    ("lsun_bedroom_ldm", "ldm-lsun_bedrooms", UNET),
    ("ffhq_ldm", "ldm-ffhq", UNET),
    ("ms_coco", "stable-diffusion-v1", UNET),
])  # fmt: skip
def test_published_names_and_shapes(name, file, prefix):
    published = json.loads((GOLDEN / f"{file}.json").read_text())["tensors"]
    net = build_on_meta(ROWS[name])
    own = {prefix + key: list(value.shape) for key, value in net.model.state_dict().items()}
    assert own == {key: shape for key, shape in published.items() if key.startswith(prefix)}


@pytest.mark.parametrize("kind", ["legacy", "flash", "transformer", "scale-shift"])
def test_a_step_conditioned_network_starts_as_the_one_without(kind):
    changes = {
        "legacy": {}, "flash": dict(attention_type="flash", resblock_updown=True),
        "transformer": dict(attention_type="transformer", context_dim=8), "scale-shift": dict(use_scale_shift_norm=True),
    }[kind]  # fmt: skip
    plain = randomise(GuidedUNet(**TINY, **changes)).eval()
    stepped = GuidedUNet(**TINY, **changes, use_step_condition=True).eval()
    missing, unexpected = stepped.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected and all("nfe" in name for name in missing)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    context = torch.randn(2, 5, 8) if kind == "transformer" else None
    step = torch.tensor(5.0)
    assert torch.equal(stepped(x, t, context, step), plain(x, t, context))
    randomise(stepped)
    assert not torch.allclose(stepped(x, t, context, step), stepped(x, t, context, torch.tensor(6.0)))
    with pytest.raises(ValueError, match="no step-condition layers"):
        plain(x, t, context, step)


@pytest.mark.parametrize("changes", [{}, dict(attention_type="transformer", context_dim=8), dict(resblock_updown=True)])
def test_gradient_checkpointing_changes_nothing_but_memory(changes):
    net = randomise(GuidedUNet(**TINY, **changes, use_step_condition=True, dropout=0.3)).train()
    x, t, step = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor(5.0)
    context = torch.randn(2, 5, 8) if "context_dim" in changes else None
    results, held = {}, {}
    for checkpointing in (False, True):
        net.gradient_checkpointing = checkpointing
        net.zero_grad()
        kept = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x
        ):
            out = net(x, t, context, step)
        held[checkpointing] = sum(kept)
        out.square().sum().backward()
        results[checkpointing] = [out.detach()] + [p.grad.clone() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True]))
    assert held[True] < held[False] / 2


@pytest.mark.parametrize("layout", ["legacy", "flash"])
def test_key_bias_gets_no_gradient(layout):
    net = randomise(GuidedUNet(**{**TINY, "attention_type": layout})).train()
    net(torch.randn(1, 3, 8, 8), torch.tensor([5.0])).square().sum().backward()
    grad = net.middle_block[1].qkv.bias.grad
    grad = grad.reshape(4, 3, 16).unbind(1) if layout == "legacy" else grad.reshape(3, 4, 16).unbind(0)
    assert (grad[1] == 0).all() and (grad[0] != 0).any() and (grad[2] != 0).all()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.parametrize("changes, message", [
    (dict(attention_type="sparse"), "attention_type is 'sparse', expected one of legacy, flash, transformer"),
    (dict(num_heads=2), "one of num_heads and num_head_channels"),
    (dict(num_head_channels=None), "one of num_heads and num_head_channels"),
    (dict(context_dim=8), "context_dim belongs to attention_type transformer"),
    (dict(num_head_channels=24), "do not split into"),
    (dict(num_head_channels=None, num_heads=3), "do not split into"),
    (dict(model_channels=33), "does not split in groups"),
])  # fmt: skip
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GuidedUNet(**{**TINY, **changes})


def test_context_and_labels_where_they_do_not_belong():
    net = CFGPrecond(8, 4, 0.001, 0.01, model_channels=32, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2],
                     num_heads=2, attention_type="transformer", context_dim=8)  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    for arguments in ({}, {"class_labels": torch.ones(2, 3), "condition": text}):
        with pytest.raises(ValueError, match="takes a condition and no labels"):
            net(x, 1.0, **arguments)
    with pytest.raises(ValueError, match="needs a condition, another one takes none"):
        GuidedUNet(**TINY)(torch.randn(1, 3, 8, 8), torch.tensor([1.0]), text[:1])


def test_dropout_is_replaced_everywhere():
    net = ConsistencyPrecond(8, 3, **{k: v for k, v in TINY.items() if "channels" not in k}, model_channels=32,
                             num_head_channels=16, dropout=0.1)  # fmt: skip
    randomise(net).train()
    x = torch.randn(1, 3, 8, 8)
    assert not torch.equal(net(x, 1.0), net(x, 1.0))
    net.set_dropout(0.0)
    assert torch.equal(net(x, 1.0), net(x, 1.0)) and torch.equal(net(x, 1.0), net.eval()(x, 1.0))


# --- Noise schedule --------------------------------------------------------------------------------------------------


def noise_of(name: str) -> DiscreteNoise:
    recorded = SCHEDULES.meta["nets"][name]
    return DiscreteNoise(recorded["linear_start"], recorded["linear_end"], recorded["M"])


@pytest.mark.parametrize("name", LATENT)
def test_noise_schedule_equals_the_reference(name):
    noise = noise_of(name)
    sigmas, times = SCHEDULES["cfg/sigma_points"], SCHEDULES["cfg/t_points"]
    recorded = {key: SCHEDULES[f"cfg/{name}/{key}"].double() for key in ("sigma_out", "sigma_inv_out", "c_noise")}
    torch.testing.assert_close(noise.alphas_cumprod, SCHEDULES[f"cfg/{name}/alphas_cumprod"], rtol=1e-12, atol=0)
    torch.testing.assert_close(noise.sigma(times), recorded["sigma_out"], rtol=5e-4, atol=0)
    torch.testing.assert_close(noise.sigma_inv(sigmas), recorded["sigma_inv_out"], rtol=1e-3, atol=0)
    torch.testing.assert_close(noise.step(sigmas).double(), recorded["c_noise"], atol=1e-2, rtol=0)
    assert noise.sigma_max == pytest.approx(float(SCHEDULES[f"cfg/{name}/sigma_max"]), rel=1e-6)
    assert noise.step(sigmas).dtype == torch.float32 and noise.sigma(times).dtype == torch.float64


@pytest.mark.parametrize("name", LATENT)
def test_discrete_schedules_equal_the_reference(name):
    noise, checked = noise_of(name), 0
    for key in SCHEDULES.keys(f"discrete/{name}/"):
        _, _, low, rho, count = key.split("/")
        sigma_min = {"min006": 0.006, "min1": 0.1}[low]
        found = get_schedule("discrete", int(count[1:]), sigma_min, noise.sigma_max, float(rho[3:]), noise)
        torch.testing.assert_close(found, SCHEDULES[key].double(), rtol=5e-4, atol=0)
        checked += 1
    assert checked == 20


@pytest.mark.parametrize("name", LATENT)
def test_noise_schedule_and_its_inverse_agree(name):
    noise = noise_of(name)
    times = torch.linspace(2e-5, 1.1, 4001, dtype=torch.float64)  # beyond both ends too
    sigmas = noise.sigma(times)
    assert (sigmas.diff() > 0).all()
    torch.testing.assert_close(noise.sigma_inv(sigmas), times, rtol=1e-9, atol=1e-12)
    own = ((1 - noise.alphas_cumprod) / noise.alphas_cumprod).sqrt()
    steps = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(noise.sigma((steps + 1) / 1000), own, rtol=1e-9, atol=0)
    torch.testing.assert_close(noise.step(own).double(), steps, rtol=0, atol=1e-3)
