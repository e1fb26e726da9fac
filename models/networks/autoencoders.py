"""First stages of latent diffusion: autoencoders whose decoder turns latents into images.

VQ-f4 (Rombach et al. 2022, arXiv 2112.10752) first replaces each latent pixel by the nearest of `n_embed` codes, found
by the quantiser of taming-transformers; KL-f8, Stable Diffusion's, decodes latents as they are. Parameters are named as
below `first_stage_model.` in the published checkpoints.

Distillation makes no latents from images, so nothing here encodes: the encoder exists to account for every name of a
published file, and takes no memory once `drop_encoder` was called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib import need
from torch_utils.checkpoint import PathLike, check_state_dict

from .attention import attend, to_tokens
from .layers import Conv2d, GroupNorm, freeze

#: Bytes that a decoder's activations may take at a time. 8 GB also hold the U-Net and the text encoder of Stable
#: Diffusion in float32 (4 GB), 64 images of 512×512 (0.2 GB), and what the kernels work in.
MEMORY = 2 << 30
#: Activations at the peak, in multiples of the largest one.
TENSORS_AT_PEAK = 4
#: Latent pixels whose distances to all codes are in memory at a time; 8192 codes make 32 MB of them.
PIXELS = 1024
INSTALL_TAMING = "pip install --no-deps taming-transformers-rom1504 einops"


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, eps=1e-6, min_channels=1)


class ResBlock(nn.Module):
    """Residual block `[B, in_channels, H, W]` → `[B, out_channels, H, W]`, partly in place: for inference only."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = _norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, kernel=3)
        self.norm2 = _norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, kernel=3)
        self.nin_shortcut = None if in_channels == out_channels else Conv2d(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = F.silu(self.norm2(y), inplace=True)
        y = self.conv2(F.dropout(y, self.dropout, training=self.training))
        return y.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """Self-attention of one head over the pixels of `[B, channels, H, W]`, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = Conv2d(channels, channels, kernel=1)
        self.k = Conv2d(channels, channels, kernel=1)
        self.v = Conv2d(channels, channels, kernel=1)
        self.proj_out = Conv2d(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (to_tokens(layer(y))[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, H·W, channels]
        return x + self.proj_out(attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """The convolution that goes with a change of resolution; called, it doubles it (nearest neighbours)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention where the resolution has it.

    `resample` names what leads to the next level, `downsample` or `upsample`; None at the last.
    """

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, attends: bool, resample: str | None, dropout: float
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResBlock(a, b, dropout) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(Attention(out_channels) for _ in range(blocks if attends else 0))
        self.downsample = Resample(out_channels) if resample == "downsample" else None
        self.upsample = Resample(out_channels) if resample == "upsample" else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x if self.upsample is None else self.upsample(x)


class Encoder(nn.Module):
    """The names and shapes of the half that makes latents; there is no forward pass."""

    def __init__(
        self, widths: Sequence[int], blocks: int, attends: Sequence[bool], dropout: float, channels: int, latents: int
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = Conv2d(channels, widths[0], kernel=3)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, blocks, attends[i], "downsample" if i < last else None, dropout)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], dropout)
        self.norm_out = _norm(widths[-1])
        self.conv_out = Conv2d(widths[-1], latents, kernel=3)


class Decoder(nn.Module):
    """`[B, latents, h, w]` → `[B, channels, h·f, w·f]` with f = 2^(levels − 1)."""

    def __init__(
        self, widths: Sequence[int], blocks: int, attends: Sequence[bool], dropout: float, latents: int, channels: int
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = Conv2d(latents, widths[-1], kernel=3)
        self.mid = Middle(widths[-1], dropout)
        # Numbered from the highest resolution, as in the encoder.
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], width, blocks + 1, attends[i], "upsample" if i else None, dropout)
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = Conv2d(widths[0], channels, kernel=3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Autoencoder(nn.Module):
    """What both kinds share. The arguments are those of the published configurations.

    Args:
        embed_dim: channels of a latent.
        ch, ch_mult: width of the highest resolution, and multiples of it for each level.
        num_res_blocks: residual blocks of a level in the encoder; the decoder has one more.
        attn_resolutions, resolution: resolutions with attention beside the lowest, for images of `resolution`.
        in_channels, out_ch: channels of images given and made.
        z_channels: channels between latents and the convolutional halves.
        dropout: in the residual blocks.
        double_z: whether the encoder gives mean and log variance.

    The attribute `compute_dtype` (None is float32) is that of the decoder's core; latents and images are float32.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        in_channels: int,
        out_ch: int,
        z_channels: int,
        dropout: float = 0.0,
        double_z: bool = False,
    ) -> None:
        super().__init__()
        self.compute_dtype: torch.dtype | None = None
        self._widths = [ch * multiple for multiple in ch_mult]
        attends = [resolution >> i in attn_resolutions for i in range(len(ch_mult))]
        halves = (self._widths, num_res_blocks, attends, dropout)
        moments = 2 if double_z else 1
        self.encoder: Encoder | None = Encoder(*halves, in_channels, moments * z_channels)
        self.decoder = Decoder(*halves, z_channels, out_ch)
        self.quant_conv: Conv2d | None = Conv2d(moments * z_channels, moments * embed_dim, kernel=1)
        self.post_quant_conv = Conv2d(embed_dim, z_channels, kernel=1)

    def drop_encoder(self) -> None:
        """Forget what decoding does not need."""
        self.encoder = self.quant_conv = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, embed_dim, h, w]` → images `[B, out_ch, h·f, w·f]` in about [-1, 1], float32, without gradients.

        A few images are decoded at a time, so that memory does not grow with the batch (`MEMORY`); on the CPU one, so
        that an image does not depend on the others.
        """
        dtype = self.compute_dtype or torch.float32
        images = []
        for part in latents.float().split(self.images_at_a_time(latents, dtype)):
            z = self.post_quant_conv(self.quantised(part).to(dtype))
            images.append(self.decoder(z).float())
        return torch.cat(images)

    def images_at_a_time(self, latents: Tensor, dtype: torch.dtype) -> int:
        """How many of these latents `decode` takes together."""
        if latents.device.type == "cpu":
            return 1
        return max(MEMORY // self.memory_per_image(latents, dtype), 1)

    def memory_per_image(self, latents: Tensor, dtype: torch.dtype) -> int:
        """Bytes that activations take at the decoder's peak, about: the first block of some level has the largest."""
        last = len(self._widths) - 1
        pixels = latents.shape[2] * latents.shape[3]
        values = [self._widths[min(i + 1, last)] * pixels * 4 ** (last - i) for i in range(last + 1)]
        return TENSORS_AT_PEAK * max(values) * dtype.itemsize

    def quantised(self, latents: Tensor) -> Tensor:
        """What is decoded in place of `latents`, float32."""
        return latents


class VQAutoencoder(Autoencoder):
    """VQ-f4 of latent-diffusion: each latent pixel becomes one of `n_embed` codes before it is decoded.

    Raises:
        UserError: taming-transformers is not installed.
    """

    def __init__(self, embed_dim: int, n_embed: int, **convolutional: Any) -> None:
        super().__init__(embed_dim, **convolutional)
        taming: Any = need("taming.modules.vqvae.quantize", INSTALL_TAMING)
        self.quantize = taming.VectorQuantizer2(n_embed, embed_dim, beta=0.25)  # beta weighs a loss of its training

    def indices(self, latents: Tensor) -> Tensor:
        """Nearest code of each latent pixel of `[B, embed_dim, h, w]`, int64 `[B · h · w]`."""
        # A pixel is an image of its own here: the quantiser makes all distances of one call at once.
        pixels = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1], 1, 1)
        return torch.cat([self.quantize(part)[2][2] for part in pixels.split(PIXELS)])

    def quantised(self, latents: Tensor) -> Tensor:
        b, c, h, w = latents.shape
        return self.quantize.get_codebook_entry(self.indices(latents), (b, h, w, c))


class KLAutoencoder(Autoencoder):
    """KL-f8 of Stable Diffusion. Its latents are states of the diffusion model divided by the scale factor, 0.18215."""

    def __init__(self, embed_dim: int, double_z: bool = True, **convolutional: Any) -> None:
        super().__init__(embed_dim, double_z=double_z, **convolutional)


AUTOENCODERS = {"VQAutoencoder": VQAutoencoder, "KLAutoencoder": KLAutoencoder}


def load_autoencoder(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], source: PathLike) -> Autoencoder:
    """The decoder of a published first stage, in eval mode without gradients.

    Args:
        spec: `class`, a name in `AUTOENCODERS`, and constructor arguments.
        tensors: everything below `first_stage_model.` in a checkpoint, under the rest of its name.
        source: what to call the file in an error.

    Raises:
        UserError: a name or a shape differs, or taming-transformers is not installed.
    """
    arguments = {name: value for name, value in spec.items() if name != "class"}
    with torch.device("meta"):
        net = AUTOENCODERS[spec["class"]](**arguments)
    check_state_dict(net.state_dict(), tensors, source)
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    net.drop_encoder()
    return freeze(net)
