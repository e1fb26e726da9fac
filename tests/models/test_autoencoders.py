"""First stages: recorded images, published names, memory, precision, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_files import GOLDEN, Golden
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dnnlib import UserError
from models.latent import DECODE_PRECISIONS, decoding_in, pick_decode_precision
from models.networks import autoencoders
from models.networks.autoencoders import INSTALL_TAMING, Autoencoder, KLAutoencoder, VQAutoencoder, load_autoencoder
from torch_utils.device import tensor_floats
from torch_utils.images import quantized
from training.inputs import fill_randomly

PUBLISHED = GOLDEN
#: recommended by the reference: atol 1e-4
CLOSE = dict(atol=1e-4, rtol=0)
VQ, KL = ("ldm_networks_first_stage", "ldm"), ("ldm_networks_sd_first_stage", "sd")
KINDS = {"ldm": "VQAutoencoder", "sd": "KLAutoencoder"}
PREFIX = "first_stage_model."
FULL = dict(ch=128, num_res_blocks=2, attn_resolutions=[], resolution=256, in_channels=3, out_ch=3)
FULL_VQ = dict(embed_dim=3, n_embed=8192, ch_mult=[1, 2, 4], z_channels=3, **FULL)
FULL_KL = dict(embed_dim=4, ch_mult=[1, 2, 4, 4], z_channels=4, **FULL)
TINY = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], resolution=16, in_channels=3, out_ch=3)
TINY_VQ = dict(embed_dim=3, z_channels=3, **TINY)
TINY_KL = dict(embed_dim=4, z_channels=4, **TINY)


def needs_taming() -> None:
    pytest.importorskip("taming.modules.vqvae.quantize", reason=INSTALL_TAMING)


def recorded(file: str, name: str) -> tuple[Golden, dict[str, Any], dict[str, Tensor]]:
    """A golden file, the autoencoder it describes, and its weights."""
    golden = Golden(file)
    params = golden.meta["net"][name]["params"]["first_stage_config"]["params"]
    arguments = {key: value for key, value in params.items() if key not in ("ddconfig", "lossconfig")}
    weights = {key.removeprefix(PREFIX): value for key, value in golden.weights(name).items()}
    return golden, {"class": KINDS[name], **arguments, **params["ddconfig"]}, weights


def load(file: str, name: str) -> tuple[Autoencoder, Golden]:
    if name == "ldm":
        needs_taming()
    golden, spec, weights = recorded(file, name)
    return load_autoencoder(spec, weights, "file"), golden


def tiny(seed: int = 0, **changes: Any) -> KLAutoencoder:
    torch.manual_seed(seed)
    return KLAutoencoder(**{**TINY_KL, **changes}).eval()


@pytest.mark.parametrize("file, name", [VQ, KL])
def test_images_equal_the_recorded_ones(file, name):
    net, golden = load(file, name)
    z = golden[f"{name}/fs/z"]
    torch.testing.assert_close(net.decode(z), golden[f"{name}/fs/decode"], **CLOSE)
    scale = golden.meta["net"][name]["params"]["scale_factor"]
    torch.testing.assert_close(net.decode(z / scale), golden[f"{name}/decode_first_stage"], **CLOSE)


def test_codes_equal_the_recorded_ones():
    net, golden = load(*VQ)
    z = golden["ldm/fs/z"]
    assert torch.equal(net.indices(z), golden["ldm/fs/indices"])
    torch.testing.assert_close(net.quantised(z), golden["ldm/fs/quantized"], **CLOSE)
    with torch.no_grad():
        images = net.decoder(net.post_quant_conv(z))
    torch.testing.assert_close(images, golden["ldm/fs/decode_noquant"], **CLOSE)


@pytest.mark.parametrize("file, arguments", [("ldm-ffhq", FULL_VQ), ("stable-diffusion-v1", FULL_KL)])
def test_full_size_has_the_published_names_and_shapes(file, arguments):
    if "n_embed" in arguments:
        needs_taming()
    kind = VQAutoencoder if "n_embed" in arguments else KLAutoencoder
    tensors = json.loads((PUBLISHED / f"{file}.json").read_text())["tensors"]
    with torch.device("meta"):
        built = {PREFIX + name: list(tensor.shape) for name, tensor in kind(**arguments).state_dict().items()}
    assert built == {name: shape for name, shape in tensors.items() if name.startswith(PREFIX)}


@pytest.mark.parametrize("file, name", [VQ, KL])
def test_half_precision_stays_inside(file, name):
    net, golden = load(file, name)
    z, seen = golden[f"{name}/fs/z"], []
    net.decoder.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    single = net.decode(z)
    net.compute_dtype = torch.float16
    half = net.decode(z)
    assert set(seen) == {torch.float32, torch.float16}
    assert half.dtype == torch.float32 and not half.requires_grad
    assert (half - single).abs().max() < 0.02


def tf32(t: Tensor) -> Tensor:
    """As a tensor core reads it: rounded to 10 bits of mantissa."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def decode_in(precision: str, net: Autoencoder, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What a GPU would make of latents, up to the order of sums."""
    net.compute_dtype = DECODE_PRECISIONS[precision]
    with monkeypatch.context() as patch:
        if precision == "tf32":
            conv, attend = F.conv2d, F.scaled_dot_product_attention
            patch.setattr(F, "conv2d", lambda x, w, b=None, **options: conv(tf32(x), tf32(w), b, **options))
            patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attend(tf32(q), tf32(k), tf32(v)))
        return net.decode(z)


def test_tf32_has_10_bits():
    values = torch.tensor([1 + 2**-10, 1 + 2**-12, -3.0, 0.0])
    assert tf32(values).tolist() == [1 + 2**-10, 1, -3.0, 0.0]


@pytest.mark.parametrize("cls, arguments", [
    (KLAutoencoder, {**TINY_KL, "ch": 32}),
    pytest.param(VQAutoencoder, FULL_VQ, marks=pytest.mark.slow),
    pytest.param(KLAutoencoder, FULL_KL, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("precision, steps, changed", [("tf32", 1, 0.1), ("fp16", 1, 0.15), ("bf16", 12, 0.75)])
def test_images_move_by_so_many_8_bit_steps(cls, arguments, precision, steps, changed, monkeypatch):
    """tf32, CUDA's default, and fp16 are lossless to the eye, bf16 is not: largest step, and part of the values.

    Weights are random; images are scaled to the standard deviation of pictures, 0.5.
    """
    if cls is VQAutoencoder:
        needs_taming()
    net = cls(**arguments).eval()
    fill_randomly(net)
    z = torch.randn(1, arguments["embed_dim"], 16, 16, generator=torch.Generator().manual_seed(0))
    expected = net.decode(z)
    found = decode_in(precision, net, z, monkeypatch)
    images, other = (quantized((x - expected.mean()) * (0.5 / expected.std())).int() for x in (expected, found))
    off = (images - other).abs()
    assert 0 < off.max() <= steps
    assert 0.001 < (off > 0).float().mean() < changed


def test_the_default_precision_is_of_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    found = [pick_decode_precision(name, device) for name in (None, "fp16") for device in (cpu, cuda)]
    assert found == ["fp32", "tf32", "fp16", "fp16"]
    with pytest.raises(UserError, match="tf32 is of CUDA, and this is on cpu"):
        pick_decode_precision("tf32", cpu)


@pytest.mark.parametrize("precision, allowed, dtype", [
    (None, False, torch.float32), ("fp32", False, torch.float32), ("bf16", False, torch.bfloat16),
    ("tf32", True, torch.float32),
])  # fmt: skip
def test_tf32_is_allowed_for_decoding_alone(precision, allowed, dtype):
    def flags() -> list[bool]:
        return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]

    before = flags()
    device = torch.device("cuda", 0) if precision == "tf32" else torch.device("cpu")
    with tensor_floats(False):
        with decoding_in(precision, device) as found:
            assert flags() == [allowed, allowed] and found == dtype
        assert flags() == [False, False]
    assert flags() == before


def test_an_image_does_not_depend_on_its_batch():
    net, sizes = tiny(), []
    net.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    z = torch.randn(5, 4, 8, 8)
    together = net.decode(z)
    assert sizes == [1] * 5 and together.shape == (5, 3, 16, 16)
    assert torch.equal(together, torch.cat([net.decode(one[None]) for one in z]))


def test_a_batch_is_decoded_in_parts_that_fit_in_memory(monkeypatch):
    net, sizes = tiny(), []
    z = torch.randn(5, 4, 8, 8)
    alone = net.decode(z)
    monkeypatch.setattr(net, "images_at_a_time", lambda latents, dtype: 2)
    net.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(net.decode(z), alone)
    assert sizes == [2, 2, 1]


def test_64_images_of_stable_diffusion_are_decoded_within_8_gb():
    with torch.device("meta"):
        net, z = KLAutoencoder(**FULL_KL), torch.zeros(64, 4, 64, 64)
    largest = 256 * 512 * 512 * 4  # bytes of what enters the last level in float32
    assert net.memory_per_image(z, torch.float32) == autoencoders.TENSORS_AT_PEAK * largest
    for dtype, together in ((torch.float32, 2), (torch.float16, 4)):
        assert net.images_at_a_time(z, dtype) == together
        assert together * net.memory_per_image(z, dtype) <= autoencoders.MEMORY < 8e9
    assert net.images_at_a_time(torch.zeros(1, 4, 512, 512, device="meta"), torch.float32) == 1


@pytest.mark.parametrize("ch_mult", [[1, 1], [1, 2, 4], [1, 1, 8]])
def test_the_memory_estimate_knows_the_largest_activation(ch_mult):
    net, largest = tiny(ch_mult=ch_mult), [0]
    for module in net.modules():
        module.register_forward_hook(lambda module, inputs, output: largest.append(output.numel()))
    z = torch.randn(1, 4, 4, 4)
    net.decode(z)
    assert net.memory_per_image(z, torch.float32) == autoencoders.TENSORS_AT_PEAK * max(largest) * 4


class LargestTensor(TorchDispatchMode):
    """Notes how many values the largest tensor made inside has."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.values = max(self.values, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def test_distances_are_never_all_in_memory():
    needs_taming()
    net, z = VQAutoencoder(n_embed=256, **TINY_VQ), torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        net.quantize.embedding.weight.normal_()
        with LargestTensor() as watch:
            indices = net.indices(z)
    assert watch.values == autoencoders.PIXELS * 256 < z.numel() // 3 * 256
    pixels = z.permute(0, 2, 3, 1).reshape(-1, 3)
    distances = torch.cdist(pixels.double(), net.quantize.embedding.weight.detach().double())
    chosen = distances.gather(1, indices[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(dim=1).values, atol=1e-5, rtol=0)


def test_only_the_decoder_stays_in_memory():
    weights = {name: tensor.half() for name, tensor in tiny().state_dict().items()}
    net = load_autoencoder({"class": "KLAutoencoder", **TINY_KL}, weights, "file")
    assert {name.split(".")[0] for name in net.state_dict()} == {"decoder", "post_quant_conv"}
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters()) and not net.training
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(net.decode(z), tiny().decode(z), atol=0.05, rtol=0)


@pytest.mark.parametrize("change, message", [
    ({"encoder.conv_in.weight": None}, r"file does not fit .* missing encoder\.conv_in\.weight"),
    ({"quant_conv.bias": None}, r"missing quant_conv\.bias"),
    ({"loss.logvar": torch.zeros(1)}, r"unexpected loss\.logvar"),
    ({"decoder.conv_out.bias": torch.zeros(4)}, r"decoder\.conv_out\.bias is \[4\], not \[3\]"),
])  # fmt: skip
def test_other_tensors_are_refused(change, message):
    weights = {**tiny().state_dict(), **change}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(UserError, match=message) as error:
        load_autoencoder({"class": "KLAutoencoder", **TINY_KL}, weights, "file")
    assert "\n" not in error.value.message


def test_attention_stands_at_the_resolutions_that_ask_for_it():
    plain, attending = tiny(), tiny(attn_resolutions=[16])
    new = set(attending.state_dict()) - set(plain.state_dict())
    assert {name.split(".attn.")[0] for name in new} == {"encoder.down.0", "decoder.up.0"}
    attending.load_state_dict(plain.state_dict(), strict=False)
    z = torch.randn(1, 4, 8, 8)
    assert not torch.allclose(attending.decode(z), plain.decode(z))
    for name, parameter in attending.named_parameters():
        if name in new and "proj_out" in name:
            parameter.data.zero_()
    torch.testing.assert_close(attending.decode(z), plain.decode(z))


def test_without_taming_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "taming.modules.vqvae.quantize", None)
    monkeypatch.setitem(sys.modules, "taming", None)
    with pytest.raises(UserError, match=f"run: {INSTALL_TAMING}") as error:
        VQAutoencoder(n_embed=16, **TINY_VQ)
    assert "\n" not in error.value.message
    tiny()  # the other kind does without
