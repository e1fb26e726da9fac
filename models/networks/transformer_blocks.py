"""Transformer blocks of Stable Diffusion v1, under their published parameter names."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, to_images, to_tokens
from .initial import kaiming_uniform, zeros
from .layers import Conv2d, GroupNorm, Linear, Weighted

#: What torch's own layers start from: weights and biases U(-a, a) with a = 1/√fan_in.
INIT = kaiming_uniform(math.sqrt(1 / 3))
OWN: dict[str, Any] = dict(init=INIT, init_bias=INIT)


def norm_of(channels: int, eps: float = 1e-5) -> GroupNorm:
    return GroupNorm(channels, eps, min_channels=1)


class LayerNorm(Weighted):
    """Normalisation over the last dimension."""

    weight: nn.Parameter

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, *self._weights(x))


class CrossAttention(nn.Module):
    """Attention of `x` `[B, N, C]` to `context` `[B, M, D]`."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(channels, channels, bias=False, init=INIT)
        self.to_k = Linear(context_dim, channels, bias=False, init=INIT)
        self.to_v = Linear(context_dim, channels, bias=False, init=INIT)
        self.to_out = nn.Sequential(Linear(channels, channels, **OWN))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def heads(value: Tensor) -> Tensor:
            return value.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class GatedLinear(nn.Module):
    """GEGLU (arXiv 2002.05202): half of a linear map, gated by the GELU of the other half."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = Linear(in_features, 2 * out_features, **OWN)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The published layout has a place for dropout in between, which no published model uses.
        self.net = nn.Sequential(
            GatedLinear(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels, **OWN)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context and a feed-forward layer, each added to its input `[B, N, C]`."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, num_heads)
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of `[B, C, H, W]`, added to their input."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.norm = norm_of(channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, kernel=1, **OWN)
        blocks = (TransformerBlock(channels, context_dim, num_heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Conv2d(channels, channels, kernel=1, init=zeros)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = to_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(to_images(h, *x.shape[2:]))
