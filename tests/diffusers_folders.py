"""Tiny folders that the diffusers package itself writes, for tests of teachers from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_clip_text import BEGIN, END, write_tokenizer
from torch import Tensor, nn

VOCABULARY = END + 1
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
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


# --- Latents, classes and text ---------------------------------------------------------------------------------------

COND_UNET = {
    **UNET, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SDXL_UNET = {
    **COND_UNET, "cross_attention_dim": 24, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}  # fmt: skip
DIT = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
           num_embeds_ada_norm=1000, norm_num_groups=8)  # fmt: skip
SD3 = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16,
    pos_embed_max_size=8,
)  # fmt: skip
VAE = dict(
    block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    latent_channels=4, norm_num_groups=4, sample_size=16, layers_per_block=1,
)  # fmt: skip
SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)


def _clip(projected: bool, width: int, seed: int) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=8, bos_token_id=BEGIN, eos_token_id=END,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomised(cls(config), seed)


def _clip_tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.CLIPTokenizer.from_pretrained(write_tokenizer(folder), local_files_only=True)


def _t5() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    letters = [(letter, -float(i)) for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz ,.")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return randomised(transformers.T5EncoderModel(config), 5), transformers.T5TokenizerFast(
        vocab=vocabulary, extra_ids=0
    )


def write_pipeline(folder: Path, kind: str, scheduler: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A tiny pipeline of latents: `sd` (with v-prediction: Stable Diffusion 2), `sdxl`, `dit` or `sd3`."""
    diffusers = package()
    torch.manual_seed(0)
    shift = {"shift_factor": 0.06, "scaling_factor": 1.5, "use_quant_conv": False} if kind == "sd3" else {}
    vae = randomised(diffusers.AutoencoderKL(**{**VAE, **shift}), 9)
    if kind == "dit":
        net = randomised(diffusers.DiTTransformer2DModel(**{**DIT, **changes}))
        levels = diffusers.DDIMScheduler(clip_sample=False, **(scheduler or {}))
        diffusers.DiTPipeline(net, vae, levels, id2label={"0": "cat", "1": "dog"}).save_pretrained(folder)
        return folder
    clip = _clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    if kind == "sd3":
        net = randomised(diffusers.SD3Transformer2DModel(**{**SD3, **changes}))
        levels = diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler or {})})
        t5, t5_tokenizer = _t5()
        diffusers.StableDiffusion3Pipeline(
            net, levels, vae, _clip(True, 8, 1), clip, _clip(True, 16, 2), clip, t5, t5_tokenizer
        ).save_pretrained(folder)
        return folder
    net = randomised(diffusers.UNet2DConditionModel(**{**(SDXL_UNET if kind == "sdxl" else COND_UNET), **changes}))
    levels = diffusers.DDIMScheduler(**{**SCALED, **(scheduler or {})})
    if kind == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(vae, _clip(False, 8, 1), _clip(True, 16, 2), clip, clip, net, levels)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            vae, _clip(False, 16, 1), clip, net, levels, None, None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)
    return folder
