"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2024, arXiv 2312.02696, configuration G).

Every operation keeps features of unit variance at unit variance, so there are no normalisation layers and no biases,
and the size of a weight means nothing. With rms the root mean square, a layer computes with

    ŵ = w / (ε + rms(w)) / √fan_in        rms over the inputs of each output channel, ε = 1e-4

in training and evaluation alike. What the optimizer moves is w: unless it is brought back to rms 1 after each step
(`MPConv.normalize`), it grows, and the same learning rate turns it less and less (forced weight normalisation).
Besides, for a balance t:

    sum            ((1 − t) a + t b) / √((1 − t)² + t²)        SiLU          silu(x) / 0.596
    concatenation  of N_a and N_b channels: as in a sum, a times √((N_a + N_b) / N_a), b likewise
    pixel norm     x / (ε + rms of the channels)               embedding     √2 cos(f x + φ)

Constructor arguments, parameter names and shapes are those that published pickles record. The step condition of SFD-v
is this project's, there only with `use_step_condition=True`: emb += gain · ŵ embedding(num_steps), the gain 0 at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import arrange, attend, to_images, to_tokens
from .edm_unets import LevelledUNet
from .group_norm import is_channels_last
from .layers import Weighted, Weights

EPS = 1e-4
#: Gain of a layer that follows SiLU: one over the root mean square of silu(x) for standard normal x.
SILU_GAIN = 1 / 0.596


def unit_rms(x: Tensor, dims: Iterable[int]) -> Tensor:
    """`x` with a root mean square of 1 over `dims`, which is computed in float32; in the dtype of `x`."""
    dims = list(dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (EPS + norm / math.sqrt(math.prod(x.shape[d] for d in dims))).to(x.dtype)


def sum_factors(balance: float) -> tuple[float, float]:
    """What the two terms of a sum are multiplied by; `balance` is the part of the second."""
    scale = math.hypot(1 - balance, balance)
    return (1 - balance) / scale, balance / scale


def concatenate(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """The channels of `a` and `b` `[B, ·, H, W]`, each contributing as in a sum, however many there are."""
    total = a.shape[1] + b.shape[1]
    parts = zip((a, b), sum_factors(balance))
    return torch.cat([part * (factor * math.sqrt(total / part.shape[1])) for part, factor in parts], dim=1)


class MPFourier(nn.Module):
    """`[B]` → `[B, channels]`: cosines of random frequencies and phases, which are kept in buffers; float32."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * (torch.outer(x.float(), self.freqs) + self.phases).cos()


class MPConv(Weighted):
    """A convolution or, without a `kernel`, a linear layer, times `gain`; with normalised weights and no bias."""

    weight: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int, kernel: int | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *([] if kernel is None else [kernel] * 2)))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Of `[B, in_channels]` or `[B, in_channels, H, W]`."""
        weight, _ = self._weights(x)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def _normalized(self) -> Tensor:
        return unit_rms(self.weight, range(1, self.weight.ndim))

    def _convert(self, x: Tensor) -> Weights:
        weight = (self._normalized() * (self.gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        if weight.ndim == 4 and is_channels_last(x):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, None

    @torch.no_grad()
    def normalize(self) -> None:
        """Bring the weights back to rms 1; results change by ε at most."""
        self.weight.copy_(self._normalized())


class MPQKV(MPConv):
    """1×1 convolution to queries, keys and values: three blocks of channels, each in the order (head, channel).

    The published weights have the three of each channel side by side.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 3 * channels, kernel=1)

    def _convert(self, x: Tensor) -> Weights:
        weight, _ = super()._convert(x)
        return weight.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1), None


class EDM2Block(nn.Module):
    """Residual block `[B, in_channels, H, W]` → `[B, out_channels, H', W']`, modulated by `emb` `[B, emb_channels]`.

    Args:
        is_encoder: such a block changes the channels before its residual branch, and normalises each pixel there.
        up, down: whether it doubles or halves the resolution first.
        attention: whether self-attention follows.
        channels_per_head, dropout, res_balance, attn_balance, clip_act: see `EDM2UNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        is_encoder: bool,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        if attention and out_channels % channels_per_head:
            raise ValueError(f"{out_channels} channels do not split into heads of {channels_per_head}")
        self.in_channels, self.is_encoder, self.up, self.down = in_channels, is_encoder, up, down
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout, self.res_balance, self.attn_balance = dropout, res_balance, attn_balance
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if is_encoder else in_channels, out_channels, kernel=3, gain=SILU_GAIN)
        self.emb_linear = MPConv(emb_channels, out_channels, gain=SILU_GAIN)
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=3, gain=sum_factors(res_balance)[1] * SILU_GAIN)
        self.conv_skip = None if in_channels == out_channels else MPConv(in_channels, out_channels, kernel=1)
        self.attn_qkv = MPQKV(out_channels) if self.num_heads else None
        self.attn_proj = None
        if self.num_heads:
            self.attn_proj = MPConv(out_channels, out_channels, kernel=1, gain=sum_factors(attn_balance)[1])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`emb` `[B or 1, emb_channels]` is the output of a SiLU, float32."""
        if self.down:
            x = F.avg_pool2d(x, 2)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.is_encoder:
            x = unit_rms(x if self.conv_skip is None else self.conv_skip(x), [1])
        scale = self.emb_linear(emb) * self.emb_gain + 1
        y = self.conv_res0(F.silu(x)) * scale[:, :, None, None].to(x.dtype)
        y = F.dropout(F.silu(y), self.dropout, training=self.training)
        if self.conv_skip is not None and not self.is_encoder:
            x = self.conv_skip(x)
        x = torch.add(self.conv_res1(y), x, alpha=sum_factors(self.res_balance)[0])
        if self.attn_qkv is not None and self.attn_proj is not None:
            y = self.attn_proj(self._attention(self.attn_qkv(x)))
            x = torch.add(y, x, alpha=sum_factors(self.attn_balance)[0])
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)

    def _attention(self, qkv: Tensor) -> Tensor:
        """Cosine attention among pixels, `[B, 3·C, H, W]` → `[B, C, H, W]`."""
        split = unit_rms(to_tokens(qkv).unflatten(2, (3, self.num_heads, -1)), [4])
        q, k, v = split.permute(2, 0, 3, 1, 4)
        return to_images(attend(q, k, v).transpose(1, 2).flatten(2), *qkv.shape[2:])


class EDM2UNet(LevelledUNet):
    """The raw network.

    Args, beside those that are as in `SongUNet`:
        img_channels: channels of the states.
        channel_mult_noise, channel_mult_emb: widths of the embeddings of the noise level and of everything together,
            as multiples of `model_channels`; None for the width of the first level, and of the widest.
        label_balance, concat_balance, res_balance, attn_balance: the parts that the labels have in the embedding, the
            skip connections in the decoder's inputs, and the residual branches.
        channels_per_head: of the attention.
        clip_act: a block's output is clipped to this magnitude; None does not.
        resample_filter: taps of the resampling filter; two equal ones, as all published networks have.

    `gradient_checkpointing = True` keeps only the inputs of blocks while training and computes the rest again.
    `step_shift` is what an exported network adds to the embedding in place of a step condition, None otherwise.
    """

    step_shift: Tensor | None

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        clip_act: float | None = 256,
        resample_filter: Sequence[float] = (1, 1),
        use_step_condition: bool = False,
    ) -> None:
        super().__init__()
        if list(resample_filter) != [1, 1]:
            raise ValueError(f"resample_filter is {resample_filter}; EDM2 networks with [1, 1] are read")
        self.use_step_condition, self.gradient_checkpointing = use_step_condition, False
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.register_buffer("step_shift", None, persistent=False)
        widths = [model_channels * m for m in channel_mult]
        noise = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, emb)
        self.emb_label = None
        if label_dim:
            self.emb_label = MPConv(label_dim, emb, gain=sum_factors(label_balance)[1] * math.sqrt(label_dim))
        if use_step_condition:
            self.step_gain = nn.Parameter(torch.zeros([]))
            self.step_fourier = MPFourier(noise)
            self.step_linear = MPConv(noise, emb)
        self._block = dict(
            emb_channels=emb,
            channels_per_head=channels_per_head,
            dropout=dropout,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip_act=clip_act,
        )
        # One channel more: ones, which do what biases would.
        stem = MPConv(img_channels + 1, widths[0], kernel=3)
        self._build_levels(stem, widths[0], widths, img_resolution, num_blocks, attn_resolutions)
        self.out_conv = MPConv(widths[0], img_channels, kernel=3)

    def _make_block(self, in_channels: int, out_channels: int, is_encoder: bool, **kind: Any) -> EDM2Block:
        return EDM2Block(in_channels, out_channels, is_encoder=is_encoder, **kind, **self._block)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        step_condition: Tensor | None = None,
    ) -> Tensor:
        """Raw output F `[B, C, H, W]`, float32, for `x` `[B, C, H, W]` and `noise_labels` `[1]` or `[B]`.

        `class_labels` `[B, label_dim]` is one-hot, or zeros; `step_condition` is the number of timestamps, of the
        shape of `noise_labels` or a scalar.
        """
        emb = F.silu(self._embed(noise_labels, class_labels, step_condition))
        x = arrange(x)
        x = arrange(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x) if isinstance(layer, MPConv) else self._run(layer, x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = concatenate(x, skips.pop(), self.concat_balance)
            x = self._run(block, x, emb)
        return self.out_conv(x).float() * self.out_gain

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, step_condition: Tensor | None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None and class_labels is not None:
            emb = sum_factors(self.label_balance)[0] * emb + self.emb_label(class_labels)
        if self.step_shift is not None:
            emb = emb + self.step_shift
        return emb if step_condition is None else emb + self.embed_steps(step_condition)

    def embed_steps(self, step_condition: Tensor, batch: int = 1) -> Tensor:
        """What `num_steps` (scalar, `[1]` or `[B]`) adds to the embedding, `[1 or B, emb_channels]`."""
        if not self.use_step_condition:
            raise ValueError("this network has no step-condition layers; build it with use_step_condition=True")
        return self.step_gain * self.step_linear(self.step_fourier(step_condition.reshape(-1)))

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)
