"""Networks of guided-diffusion and consistency-models with classes: numbers, names, and files in the published layout."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import CONFIGS, known_as_published, published, unet_state, write_published
from tiny import SAMPLE, flags, invoke, only_run, png_names, same, train_flags

from dnnlib import UserError
from models import load_student, load_teacher
from models.building import build_on_meta
from models.noise import DiscreteNoise
from models.precond import ADMPrecond, ConsistencyPrecond
from models.registry import ROWS

NAMES = ("lsun_cat", "imagenet64_cm", "imagenet256_adm", "imagenet256_adm_uncond")
TINY = dict(
    img_resolution=8, img_channels=3, model_channels=32, num_res_blocks=1, channel_mult=[1, 2],
    attention_resolutions=[2], num_head_channels=16, resblock_updown=True, use_scale_shift_norm=True,
)  # fmt: skip


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    return net.eval().requires_grad_(False)


# --- Numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_dim", [0, 5])
def test_the_network_is_that_of_guided_diffusion(label_dim):
    unet = published("guided_diffusion.unet")
    net = randomised(ADMPrecond(label_dim=label_dim, **TINY))
    theirs = unet.UNetModel(
        8, 3, 32, 6, 1, (2,), channel_mult=(1, 2), num_head_channels=16, resblock_updown=True,
        use_scale_shift_norm=True, num_classes=label_dim or None,
    ).eval()  # fmt: skip
    theirs.load_state_dict(net.model.state_dict())
    x, times, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([1, 4, 1])
    one_hot = torch.eye(label_dim)[labels] if label_dim else None
    with torch.no_grad():
        expected = theirs(x, times, labels if label_dim else None)
    torch.testing.assert_close(net.model(x, times.float(), one_hot), expected, atol=1e-5, rtol=1e-5)
    # x_t = √ᾱ x is what a noise predictor sees, and its first channels are the noise.
    levels = net.noise_schedule.alphas_cumprod[times].float()[:, None, None, None]
    sigma = ((1 - levels) / levels).sqrt()
    with torch.no_grad():
        noise = theirs(levels.sqrt() * x, times, labels if label_dim else None)[:, :3]
    found = (x - net(x, sigma.flatten(), one_hot)) / sigma
    torch.testing.assert_close(found, noise, atol=1e-3, rtol=1e-3)


def test_linear_noise_levels_are_even_in_beta():
    noise = DiscreteNoise(1e-4, 0.02, 1000, "linear")
    level, sigmas = 1.0, []
    for i in range(1000):
        level *= 1 - (1e-4 + i / 999 * (0.02 - 1e-4))
        sigmas.append(math.sqrt((1 - level) / level))
    found = noise.sigma(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert torch.allclose(found, torch.tensor(sigmas, dtype=torch.float64), rtol=1e-9)
    assert noise.sigma_max == pytest.approx(157.4, abs=0.1) and sigmas[0] == pytest.approx(0.01, rel=1e-3)
    times = noise.step(torch.tensor(sigmas, dtype=torch.float64))
    assert torch.allclose(times, torch.arange(1000.0), atol=1e-2)


@pytest.mark.parametrize("cls", [ADMPrecond, ConsistencyPrecond])
def test_labels_are_embedded_and_zeros_are_no_class(cls):
    net = randomised(cls(label_dim=4, **TINY))
    plain = cls(**TINY)
    plain.load_state_dict({name: t for name, t in net.state_dict().items() if "label_emb" not in name})
    plain.eval()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 20.0])
    without = plain(x, sigma).detach()
    assert without.shape == x.shape and torch.equal(net(x, sigma), without)
    assert torch.equal(net(x, sigma, torch.zeros(2, 4)), without)
    labels = torch.eye(4)[[2, 3]]
    both = net(x, sigma, labels)
    assert not torch.allclose(both, without, atol=1e-3)
    torch.testing.assert_close(both[:1], net(x[:1], sigma[:1], labels[:1]), atol=1e-5, rtol=1e-5)
    # What is added to the embedding of the noise level is the row of the class, and no more.
    with torch.no_grad():
        net.model.label_emb.weight[3] = net.model.label_emb.weight[2]
    torch.testing.assert_close(net(x, sigma, labels), net(x, sigma, torch.eye(4)[[2, 2]]))


# --- Published files ---------------------------------------------------------------------------------------------------


def test_full_size_networks_have_the_published_names_and_sizes():
    """552,814,086 parameters of the unconditional file are what those who use it report."""
    nets = {name: build_on_meta(ROWS[name]) for name in (*NAMES, "lsun_bedroom")}
    shapes = {name: {k: tuple(v.shape) for k, v in net.model.state_dict().items()} for name, net in nets.items()}
    assert sum(math.prod(shape) for shape in shapes["imagenet256_adm_uncond"].values()) == 552_814_086
    assert shapes["imagenet256_adm"].pop("label_emb.weight") == (1000, 1024)
    assert shapes["imagenet256_adm"] == shapes["imagenet256_adm_uncond"]
    assert shapes["imagenet256_adm"]["out.2.weight"] == (6, 256, 3, 3)
    assert shapes["lsun_cat"] == shapes["lsun_bedroom"]
    assert shapes["imagenet64_cm"]["label_emb.weight"] == (1000, 768)
    assert shapes["imagenet64_cm"]["out.2.weight"] == (3, 192, 3, 3)


@pytest.mark.parametrize("name", NAMES)
def test_from_the_published_file_to_images(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_published(name, tmp_path)
    label_dim = ROWS[name].label_dim
    with known_as_published(name, tmp_path):
        teacher = load_teacher(name)
        assert same(teacher.net.model.state_dict(), unet_state(name)) and not teacher.is_latent
        assert (teacher.label_dim, teacher.shape) == (label_dim, (3, 8, 8))
        is_noise = name.startswith("imagenet256")
        assert (teacher.sigma_min, round(teacher.sigma_max)) == ((0.01, 157) if is_noise else (0.006, 80))
        invoke("train", *train_flags(None, dataset_name=name, total_kimg=0.008, batch=4, outdir="runs")).ok()
        arguments = dict(seeds="0-2", **({"class": 7} if label_dim else {}))
        for model, more in ((only_run("runs"), {}), ("teacher", dict(dataset_name=name, solver="dpmpp", num_steps=3))):
            folder = f"images{len(more)}"
            invoke("sample", *flags(SAMPLE, model_path=model, outdir=folder, **arguments, **more)).ok()
            images = [np.asarray(Image.open(Path(folder) / png)) for png in png_names(folder)]
            assert len(images) == 3 and all(image.shape == (8, 8, 3) and image.std() > 3 for image in images)
        student = load_student(only_run("runs"))
        assert type(student.net).__name__ == CONFIGS[name]["network"]["class"] and student.label_dim == label_dim


@pytest.mark.parametrize("name, words", [
    ("imagenet64_cm", r"out.2.weight is \[3, 32, 3, 3\], not \[6, 32, 3, 3\]"),
    ("imagenet256_adm_uncond", "missing label_emb.weight"),
])  # fmt: skip
def test_a_file_of_another_kind_is_refused(name, words, tmp_path):
    state = {
        k: t.flatten(2) if k.endswith(("qkv.weight", "proj_out.weight")) else t for k, t in unet_state(name).items()
    }
    write_published("imagenet256_adm", tmp_path, state)
    with known_as_published("imagenet256_adm", tmp_path), pytest.raises(UserError, match=words):
        load_teacher("imagenet256_adm")
