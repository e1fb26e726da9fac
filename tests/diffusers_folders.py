"""Tiny folders that the diffusers package itself writes, for tests of teachers from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

UNET = dict(
    sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=[16, 32], norm_num_groups=8,
    down_block_types=["DownBlock2D", "AttnDownBlock2D"], up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=8,
)  # fmt: skip


def package() -> Any:
    """The diffusers package, or this test is skipped."""
    return pytest.importorskip("diffusers", reason="pip install diffusers")


def randomised(module: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """Random weights everywhere, of features of about the size of their inputs."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        size = scale / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.05
        parameter.data.add_(torch.randn(parameter.shape, generator=rng), alpha=size)
    return module.eval()


def write_unet(folder: Path, scheduler: dict[str, Any] | None = None, flat: bool = False, **changes: Any) -> Path:
    """An unconditional pipeline of pixels, or the flat folder of a network and its scheduler."""
    diffusers = package()
    torch.manual_seed(0)
    unet = randomised(diffusers.UNet2DModel(**{**UNET, **changes}))
    levels = diffusers.DDPMScheduler(**(scheduler or {}))
    if flat:
        unet.save_pretrained(folder)
        levels.save_pretrained(folder)
    else:
        diffusers.DDPMPipeline(unet, levels).save_pretrained(folder)
    return folder


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference beside the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
