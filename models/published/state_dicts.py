"""Names of tensors in published state dicts: what is called how, by whom.

The networks here keep the names of the code that they were published with. Checkpoints of latent diffusion put prefixes
before them, one for each part; diffusers has other names for the same tensors of the U-Net and of the first stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

#: Prefixes of the parts of a latent-diffusion checkpoint.
UNET, FIRST_STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
#: How tensors of the moving average are named in the files of latent diffusion: without any dot of their own.
AVERAGE = "model_ema.diffusion_model"
#: What they hold besides: counters of the moving average, and the noise schedule, which follows from the settings.
IGNORED = {
    "model_ema.decay", "model_ema.num_updates", "betas", "alphas_cumprod", "alphas_cumprod_prev",
    "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
}  # fmt: skip

# From published names of layers to those of diffusers.
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
OUTSIDE = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
STAGE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
#: Attention of the first stage.
STAGE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
#: What diffusers called these before release 0.18; published folders still do.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def new_name(name: str) -> str:
    """What diffusers calls a tensor of attention now."""
    return re.sub(rf"\b({'|'.join(OLD_ATTENTION)})\b", lambda found: OLD_ATTENTION[found[1]], name)


def unet_name(name: str, num_res_blocks: int) -> str:
    """Name in diffusers of a tensor of `GuidedUNet` with transformer blocks."""
    layer, _, kind = name.rpartition(".")
    if layer in OUTSIDE:
        return f"{OUTSIDE[layer]}.{kind}"
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", layer):
        return f"mid_block.{MIDDLE[found[1]]}.{RESIDUAL.get(found[2], found[2])}.{kind}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.\d+\.(.+)", layer)
    if found is None:
        raise ValueError(f"{name} is no tensor of such a network")
    half, index, rest = found.groups()
    # The encoder counts its first convolution too, and its last level has nothing to resample.
    level, i = divmod(int(index) - (half == "input"), num_res_blocks + 1)
    block = f"{'down' if half == 'input' else 'up'}_blocks.{level}"
    if rest in ("op", "conv"):
        return f"{block}.{'down' if rest == 'op' else 'up'}samplers.0.conv.{kind}"
    if rest in RESIDUAL:
        return f"{block}.resnets.{i}.{RESIDUAL[rest]}.{kind}"
    return f"{block}.attentions.{i}.{rest}.{kind}"


def stage_name(name: str, levels: int) -> str:
    """Name in diffusers of a tensor of `KLAutoencoder` with attention in the middle alone."""
    layer, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"(\w+)\.mid\.(block_1|attn_1|block_2)\.(\w+)", layer):
        names = STAGE_ATTENTION if found[2] == "attn_1" else {"nin_shortcut": "conv_shortcut"}
        return f"{found[1]}.mid_block.{STAGE_MIDDLE[found[2]]}.{names.get(found[3], found[3])}.{kind}"
    if found := re.fullmatch(r"(\w+)\.(down|up)\.(\d+)\.(.+)", layer):
        half, way, level, rest = found.groups()
        # Here both halves count from the highest resolution, there each in its order.
        level = int(level) if way == "down" else levels - 1 - int(level)
        rest = re.sub(r"^block\.", "resnets.", rest).replace("nin_shortcut", "conv_shortcut")
        rest = re.sub(r"^(down|up)sample\.", r"\1samplers.0.", rest)
        return f"{half}.{way}_blocks.{level}.{rest}.{kind}"
    return f"{layer.replace('norm_out', 'conv_norm_out')}.{kind}"


def is_stage_matrix(name: str) -> bool:
    """Whether a weight of the first stage is a matrix there and a 1×1 convolution here."""
    return ".mid.attn_1." in name and name.endswith("weight") and not name.endswith("norm.weight")
