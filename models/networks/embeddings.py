"""Embeddings of noise levels and numbers of steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(x.float(), 2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
