"""Layers shared by the EDM U-Nets, under the parameter names of the published checkpoints.

A layer computes in the dtype of its input and casts its own float32 weights to it, so one float32 module serves a
half-precision core (Karras et al. 2022, arXiv 2206.00364, appendix C). The embedding branch stays float32: it is tiny
and carries the noise level.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Init = Callable[[Sequence[int], int, int], Tensor]


def xavier_uniform(gain: float = 1.0) -> Init:
    """U(-a, a) with variance `gain² · 2 / (fan_in + fan_out)`."""
    return lambda shape, fan_in, fan_out: gain * math.sqrt(6 / (fan_in + fan_out)) * (torch.rand(*shape) * 2 - 1)


def kaiming_uniform(gain: float = 1.0) -> Init:
    """U(-a, a) with variance `gain² / fan_in`."""
    return lambda shape, fan_in, fan_out: gain * math.sqrt(3 / fan_in) * (torch.rand(*shape) * 2 - 1)


def kaiming_normal(gain: float = 1.0) -> Init:
    """N(0, gain² / fan_in)."""
    return lambda shape, fan_in, fan_out: gain * math.sqrt(1 / fan_in) * torch.randn(*shape)


def zeros(shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
    """All zeros, whatever the fans."""
    return torch.zeros(*shape)


DEFAULT_INIT = kaiming_normal()


class Linear(nn.Module):
    """`x @ weight.T + bias` for `[B, in_features]`, with the initialisations that EDM uses."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init: Init = DEFAULT_INIT,
        init_bias: Init = zeros,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(init([out_features, in_features], in_features, out_features))
        self.bias = nn.Parameter(init_bias([out_features], in_features, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution with optional ×2 resampling; `kernel=0` resamples only.

    `fused` lets the convolution and the resampling filter share one padding, as NCSN++'s residual encoder does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
        init: Init = DEFAULT_INIT,
        init_bias: Init = zeros,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up, self.down, self.fused = up, down, fused
        fans = (in_channels * kernel**2, out_channels * kernel**2)
        self.weight = nn.Parameter(init([out_channels, in_channels, kernel, kernel], *fans)) if kernel else None
        self.bias = nn.Parameter(init_bias([out_channels], *fans)) if kernel else None
        self.register_buffer("resample_filter", _outer_filter(resample_filter) if up or down else None)
        # Two equal taps are an average pool or a nearest-neighbour repeat, far cheaper than a grouped convolution.
        self._is_box = len(resample_filter) == 2 and resample_filter[0] == resample_filter[1]

    def _upsample(self, x: Tensor, padding: int) -> Tensor:
        if self._is_box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        kernel = (4 * self.resample_filter.to(x.dtype)).expand(x.shape[1], 1, -1, -1)
        return F.conv_transpose2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)

    def _downsample(self, x: Tensor, padding: int) -> Tensor:
        if self._is_box:
            return F.avg_pool2d(x, 2)
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)

    def _convolve(self, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        pad = 0 if self.weight is None else self.weight.shape[-1] // 2
        filter_pad = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        if self.fused and self.weight is not None and (self.up or self.down):
            if self.up:
                return self._convolve(self._upsample(x, max(filter_pad - pad, 0)), max(pad - filter_pad, 0))
            bias_free = F.conv2d(x, self.weight.to(x.dtype), padding=pad + filter_pad)
            return self._downsample(bias_free, 0) + self.bias.to(x.dtype).reshape(1, -1, 1, 1)
        if self.up:
            x = self._upsample(x, filter_pad)
        if self.down:
            x = self._downsample(x, filter_pad)
        return x if self.weight is None else self._convolve(x, pad)


def _outer_filter(resample_filter: Sequence[float]) -> Tensor:
    """Normalised separable filter `[1, 1, k, k]`, the published buffer shape."""
    taps = torch.tensor(resample_filter, dtype=torch.float32)
    return (torch.outer(taps, taps) / taps.sum().square())[None, None]


class GroupNorm(nn.Module):
    """Group normalisation with at least `min_channels` channels in each of at most 32 groups."""

    def __init__(self, channels: int, eps: float = 1e-5, min_channels: int = 4) -> None:
        super().__init__()
        self.groups = min(32, channels // min_channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionalEmbedding(nn.Module):
    """`[B]` → `[B, channels]`: cosines, then sines, of geometrically spaced frequencies (DDPM, ADM)."""

    def __init__(self, channels: int, max_positions: float = 10000, endpoint: bool = False) -> None:
        super().__init__()
        self.channels, self.max_positions, self.endpoint = channels, max_positions, endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / (half - int(self.endpoint))
        angles = torch.outer(x.float(), (1 / self.max_positions) ** steps)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """`[B]` → `[B, channels]`: cosines, then sines, of random frequencies kept in a buffer (NCSN++)."""

    def __init__(self, channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(x.float(), 2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with noise-level modulation, optional ×2 resampling, step condition and self-attention.

    Input `[B, in_channels, H, W]`, embedding `[B, emb_channels]` and, with `use_step_condition`, a second embedding of
    the same shape whose modulation is applied after the first (SFD-v, one model for several NFEs).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        use_step_condition: bool = False,
        init: Init = DEFAULT_INIT,
        init_bias: Init = zeros,
        init_last: Init = zeros,
        init_attention: Init | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = 0 if not attention else num_heads or out_channels // channels_per_head
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        own = dict(init=init, init_bias=init_bias)
        resampling = dict(up=up, down=down, resample_filter=resample_filter)
        modulations = out_channels * (2 if adaptive_scale else 1)

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resampling, **own)
        self.affine = Linear(emb_channels, modulations, **own)
        # Zero weights: a step-conditioned student starts exactly as its teacher.
        self.affine_step = Linear(emb_channels, modulations, init=zeros) if use_step_condition else None
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, init=init_last)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resampling, **own)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            attention_bias = dict(init_bias=init_bias if init_attention is None else zeros)
            self.qkv = Conv2d(out_channels, 3 * out_channels, kernel=1, init=init_attention or init, **attention_bias)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, init=init_last)

    def forward(self, x: Tensor, emb: Tensor, step_emb: Tensor | None = None) -> Tensor:
        residual = x if self.skip is None else self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        x = self._modulate(x, emb, step_emb)
        x = self.conv1(F.dropout(x, self.dropout, training=self.training))
        x = (x + residual) * self.skip_scale
        return (x + self._attend(self.norm2(x))) * self.skip_scale if self.num_heads else x

    def _modulate(self, x: Tensor, emb: Tensor, step_emb: Tensor | None) -> Tensor:
        modulations = [self.affine(emb)] + ([] if step_emb is None else [self.affine_step(step_emb)])
        modulations = [m[:, :, None, None].to(x.dtype) for m in modulations]
        if not self.adaptive_scale:
            return F.silu(self.norm1(x + sum(modulations)))
        x = self.norm1(x)
        for modulation in modulations:
            scale, shift = modulation.chunk(2, dim=1)
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x)

    def _attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # Published layout of the 3·C channels: head, then channel, then q/k/v. Softmax ignores what a key bias adds, so
        # its gradient is rounding noise, which Adam would turn into steps of full size: it gets none.
        bias = self.qkv.bias.reshape(-1, 3)
        bias = torch.stack([bias[:, 0], bias[:, 1].detach(), bias[:, 2]], dim=1).flatten()
        qkv = F.conv2d(x, self.qkv.weight.to(x.dtype), bias.to(x.dtype))
        q, k, v = qkv.reshape(b, self.num_heads, c // self.num_heads, 3, h * w).unbind(3)
        out = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
        return self.proj(out.transpose(2, 3).reshape(b, c, h, w))
