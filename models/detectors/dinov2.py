"""DINOv2's vision transformers (Oquab et al. 2023), whose class token FD-DINOv2 is computed from (Stein et al. 2023).

A pre-norm transformer over 14×14 patches and a class token, with a learned scale on each residual. Parameters are named
as in the files that its authors publish. They hold position embeddings for a square of pixels that is larger than ours
(37×37 patches for 518 pixels); these are resized by cubics, with the authors' scale (n + 0.1) / N from N to n patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

PATCH, SIZE = 14, 224
HEAD = 64
#: Mean and standard deviation of ImageNet's channels, in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, dim // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, dim))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim), FeedForward(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """uint8 images `[B, 3, H, W]` → class tokens `[B, dim]`.

    Args:
        dim: width, a multiple of 64; 1024 for ViT-L.
        depth: blocks; 24 for ViT-L.
        grid: patches along a side that the file has position embeddings for.
    """

    def __init__(self, dim: int = 1024, depth: int = 24, grid: int = 37) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # for training; the published files have it
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images → normalised float32 `[B, 3, 224, 224]`, resized by antialiased cubics."""
        x = images.float()
        if x.shape[2:] != (SIZE, SIZE):
            x = interpolate(x, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (x / 255 - mean) / std

    def positions(self, side: int) -> Tensor:
        """Position embeddings of the class token and of side × side patches, `[1, 1 + side², dim]`."""
        count = self.pos_embed.shape[1] - 1
        grid = math.isqrt(count)
        if side == grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].view(1, grid, grid, -1).permute(0, 3, 1, 2)
        resized = interpolate(patches, scale_factor=(side + 0.1) / grid, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(self.prepare(images))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(SIZE // PATCH)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]
