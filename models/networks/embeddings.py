"""Embeddings of noise levels and numbers of steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Of DDPM, and of NCSN++.
MAX_POSITIONS, SCALE = 10000, 16


class PositionalEmbedding(nn.Module):
    """`[B]` → `[B, channels]`: cosines, then sines, of geometrically spaced frequencies (DDPM, ADM)."""

    def __init__(self, channels: int, endpoint: bool = False, sines_first: bool = False) -> None:
        super().__init__()
        self.channels, self.endpoint, self.sines_first = channels, endpoint, sines_first

    def forward(self, x: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / (half - int(self.endpoint))
        return _waves(torch.outer(x.float(), (1 / MAX_POSITIONS) ** steps), self.sines_first)


class FourierEmbedding(nn.Module):
    """`[B]` → `[B, channels]`: cosines, then sines, of random frequencies kept in a buffer (NCSN++)."""

    freqs: Tensor

    def __init__(self, channels: int, sines_first: bool = False) -> None:
        super().__init__()
        self.sines_first = sines_first
        self.register_buffer("freqs", torch.randn(channels // 2) * SCALE)

    def forward(self, x: Tensor) -> Tensor:
        return _waves(torch.outer(x.float(), 2 * math.pi * self.freqs), self.sines_first)


def _waves(angles: Tensor, sines_first: bool) -> Tensor:
    halves = [angles.cos(), angles.sin()]
    return torch.cat(halves[::-1] if sines_first else halves, dim=1)
