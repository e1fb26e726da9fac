"""LPIPS: recorded values, the published formula, properties of a distance, and its files."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_files import GOLDEN, Golden
from published import published
from tiny import STATS, newest_student, only_run, same, second_stage, student, weights
from torch import Tensor, nn

import models.detectors.lpips
from dnnlib import UserError
from models.detectors.lpips import LPIPS, fetch_lpips, load_lpips

RECORDED = Golden("lpips")
PUBLISHED = json.loads((GOLDEN / "lpips-vgg.json").read_text())["tensors"]
RTOL = 1e-3


@functools.cache
def made_up_weights() -> dict[str, Tensor]:
    """By the recipe in the recorded file; the published weights are not needed for the arithmetic."""
    random, weights = np.random.RandomState(RECORDED.meta["seed"]), {}
    for name in sorted(name for name in PUBLISHED if name.startswith("vgg16.")):
        shape = PUBLISHED[name]
        scale = np.sqrt(2 / np.prod(shape[1:])) if name.endswith("weight") else 0.1
        weights[name] = torch.from_numpy((random.standard_normal(shape) * scale).astype(np.float32))
    for name in (f"lin{i}.model.1.weight" for i in range(5)):
        weights[name] = torch.from_numpy((0.5 * np.abs(random.standard_normal(PUBLISHED[name]))).astype(np.float32))
    return weights


def make_lpips(mode: str) -> LPIPS:
    net = LPIPS(mode)
    net.load_state_dict(made_up_weights())
    return net.to(memory_format=torch.channels_last)


@pytest.fixture
def small(monkeypatch):
    """Images of 16×16, 200 times faster, where size is of no interest."""
    monkeypatch.setattr(models.detectors.lpips, "SIZE", 16)


def images(count: int, channels: int = 3, size: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand([count, channels, size, size], generator=generator) * 2 - 1


def test_names_and_shapes_are_the_published_ones():
    assert {name: list(tensor.shape) for name, tensor in LPIPS("reference").state_dict().items()} == PUBLISHED
    with pytest.raises(ValueError, match="expected one of reference, standard"):
        LPIPS("alex")


def test_recorded_value_and_gradient():
    x = RECORDED["x"][:1].requires_grad_(True)
    distance = make_lpips("reference")(x, RECORDED["y"][:1])
    torch.testing.assert_close(distance.detach(), RECORDED["lpips_sfd"][:1], rtol=RTOL, atol=0)
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    expected = RECORDED["grad_x_of_mean"][:1] * 3
    assert (gradient - expected).abs().max() < RTOL * expected.abs().max()


def test_standard_is_the_recorded_one_of_images_in_0_to_1():
    distance = make_lpips("standard")(RECORDED["x"][:1], RECORDED["y"][:1])
    torch.testing.assert_close(distance, RECORDED["lpips_224_01/avgpool0"][:1], rtol=RTOL, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode, key", [("reference", "lpips_sfd"), ("standard", "lpips_224_01/avgpool0")])
def test_all_recorded_values(mode, key):
    torch.testing.assert_close(make_lpips(mode)(RECORDED["x"], RECORDED["y"]), RECORDED[key], rtol=RTOL, atol=0)


def formula(mode: str, x: Tensor, y: Tensor) -> Tensor:
    """The definition in double precision, layer by layer."""
    weights = {name: tensor.double() for name, tensor in made_up_weights().items()}
    # The authors' layer for images in [-1, 1]; the reference's statistics, which are for images in [0, 1].
    shift, scale = {
        "standard": ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]),
        "reference": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }[mode]
    pool = {"standard": F.max_pool2d, "reference": F.avg_pool2d}[mode]
    shift, scale = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (shift, scale))
    pair = [F.interpolate(v.double(), size=(16, 16), mode="bilinear", align_corners=False) for v in (x, y)]
    pair = [(v - shift) / scale for v in pair]
    total, level, tap = 0, 0, None
    for index in range(30):
        name = f"vgg16.features.{index}"
        if index in (4, 9, 16, 23):
            pair = [pool(v, 2, 2) for v in pair]
        elif f"{name}.weight" in weights:
            pair = [F.conv2d(v, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1) for v in pair]
        else:
            pair = [v.clamp(min=0) for v in pair]
        if index in (3, 8, 15, 22, 29):
            a, b = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in pair)
            tap = weights[f"lin{level}.model.1.weight"].flatten()
            total = total + torch.einsum("bchw,c->b", (a - b).square(), tap) / (a.shape[2] * a.shape[3])
            level += 1
    return total


@pytest.mark.parametrize("mode", ["reference", "standard"])
def test_published_formula(small, mode):
    for size in (8, 32, 40):
        x, y = images(2, size=size), images(2, size=size, seed=1)
        torch.testing.assert_close(make_lpips(mode)(x, y).double(), formula(mode, x, y), rtol=1e-5, atol=0)


def test_modes_differ(small):
    x, y = images(1), images(1, seed=1)
    reference, standard = (float(make_lpips(mode)(x, y)) for mode in ("reference", "standard"))
    assert abs(reference - standard) > 0.05 * standard


@pytest.mark.parametrize("mode", ["reference", "standard"])
def test_properties_of_a_distance(small, mode):
    net, x, y = make_lpips(mode), images(3), images(3, seed=1)
    assert torch.equal(net(x, x), torch.zeros(3))
    assert torch.equal(net(x, y), net(y, x)) and (net(x, y) > 0).all()
    near, far = net(x, x + 0.02 * y), net(x, x + 0.2 * y)
    assert (near < far).all() and (far < net(x, y)).all()
    torch.testing.assert_close(net(x[1:2], y[1:2]), net(x, y)[1:2], rtol=1e-5, atol=0)
    grey, other = images(2, channels=1), images(2, channels=1, seed=1)
    assert torch.equal(net(grey, other), net(grey.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(net(x.bfloat16(), y.bfloat16()), net(x, y), rtol=0.02, atol=0)


def test_frozen(small):
    net = make_lpips("reference")
    x = images(1).requires_grad_(True)
    net(x, images(1, seed=1)).sum().backward()
    assert x.grad.abs().sum() > 0 and all(not p.requires_grad and p.grad is None for p in net.parameters())
    assert not net.training


def test_dead_features_have_finite_gradients(small):
    """Where all channels of a pixel are zero, their norm has no derivative."""
    net = make_lpips("standard")
    for layer in net.vgg16["features"]:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.bias, -1e3)
    x = images(1).requires_grad_(True)
    net(x, images(1, seed=1)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x.grad))


# Files


def write_files(folder, split: bool = True, **changes):
    """Heads, and VGG as torchvision publishes it, with a classifier; or everything in one file."""
    weights = {**made_up_weights(), **changes}
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("lin")}
    features = {name: tensor for name, tensor in weights.items() if name not in heads}
    if not split:
        torch.save(weights, folder / "all.pth")
        return [folder / "all.pth"]
    vgg = {name.removeprefix("vgg16."): tensor for name, tensor in features.items()}
    vgg["classifier.0.weight"] = torch.zeros(2, 3)
    torch.save(heads, folder / "heads.pth", _use_new_zipfile_serialization=False)
    torch.save(vgg, folder / "vgg.pth")
    return [folder / "heads.pth", folder / "vgg.pth"]


@pytest.mark.parametrize("split", [True, False])
def test_files_in_the_published_layouts(tmp_path, monkeypatch, small, split):
    paths = write_files(tmp_path, split)
    monkeypatch.setattr(models.detectors.lpips, "fetch_lpips", lambda: paths)
    net, x, y = load_lpips("standard"), images(1), images(1, seed=1)
    torch.testing.assert_close(net(x, y), make_lpips("standard")(x, y))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_a_run_trains_with_it(tmp_path, monkeypatch, small):
    paths = write_files(tmp_path)
    monkeypatch.setattr(models.detectors.lpips, "fetch_lpips", lambda: paths)
    trained, losses = {}, {}
    for mode in ("reference", "standard", "off"):
        second_stage(student("seven"), outdir=tmp_path / mode, total_kimg=0.008, lpips=mode).ok()
        run = only_run(tmp_path / mode)
        trained[mode] = weights(newest_student(run))
        losses[mode] = json.loads((run / STATS).read_text().splitlines()[0])
    assert losses["reference"]["loss/3/0"] == losses["off"]["loss/3/0"]
    assert losses["off"]["loss/3/1"] < min(losses[mode]["loss/3/1"] for mode in ("reference", "standard"))
    assert not any(same(trained[a], trained[b]) for a, b in (("reference", "standard"), ("reference", "off")))


def test_files_of_other_networks(tmp_path, monkeypatch):
    paths = write_files(tmp_path, **{"lin2.model.1.weight": torch.zeros(1, 7, 1, 1)})
    monkeypatch.setattr(models.detectors.lpips, "fetch_lpips", lambda: paths)
    with pytest.raises(UserError, match=r"lin2.model.1.weight is \[1, 7, 1, 1\], not \[1, 256, 1, 1\]"):
        load_lpips("reference")
    monkeypatch.setattr(models.detectors.lpips, "fetch_lpips", lambda: paths[:1])
    with pytest.raises(UserError, match="heads.pth does not fit the network: 27 differences, first missing"):
        load_lpips("reference")


def test_where_files_are_expected(tmp_path, monkeypatch):
    monkeypatch.setenv("SFD_OFFLINE", "1")
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="lpips/weights-vgg16-lpips.pth is not there; get it from https://"):
        fetch_lpips()
    (tmp_path / "lpips").mkdir()
    for name in ("weights-vgg16-lpips.pth", "vgg16-397923af.pth"):
        torch.save({}, tmp_path / "lpips" / name)
    with pytest.raises(UserError, match="vgg16-397923af.pth is not the expected file: its sha256 is"):
        fetch_lpips()


def test_published_package(small):
    """The authors' package, with the same weights."""
    lpips = published("lpips")
    theirs = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    names = {name.split(".", 2)[2]: name for name in theirs.state_dict() if name.startswith("net.slice")}
    weights = {names.get(k.removeprefix("vgg16.features."), k): v for k, v in made_up_weights().items()}
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    x, y = images(2, size=16), images(2, size=16, seed=1)
    torch.testing.assert_close(make_lpips("standard")(x, y), theirs(x, y).flatten().detach(), rtol=1e-5, atol=0)
