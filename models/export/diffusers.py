"""A student of Stable Diffusion as a folder of diffusers that its stock pipeline runs.

**Our steps in a stock scheduler.** Of an Euler student with noise levels σ_0 > … > σ_{N−1}, the analytical first step
only scales its noise n:

    x_1 = σ_0 n + (σ_1 − σ_0) σ_0 n / √(1 + σ_0²) = a n

`EulerDiscreteScheduler` takes the steps from there, x_{i+1} = x_i + (σ_{i+1} − σ_i) ε(x_i / √(1 + σ_i²); t(σ_i)), but
starts at σ_1 n. So the pipeline holds x' = g x with g = σ_1 / a: the weights of the first convolution are divided by g,
weights and bias of the last one multiplied (ε' = g ε, under guidance too, which is linear), and so is the decoder's
scale. Without AFS, g = 1. The scheduler's noise levels are the student's own; its `trained_betas` make a table that
starts at σ_min, where the last step ends. Times it finds in that table by interpolation in log σ, we by one in log α;
docs/interchange.md says how far they differ.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dnnlib import UserError, write_text

from ..building import row_config
from ..loading import own_latent_space
from ..networks.clip_text import TOKENIZER_FILES, VIT_L_14, find_tokenizer
from ..precond import CFGPrecond
from ..published.diffusers import POSITIONS, SUFFIXES, WEIGHTS, read_json
from ..published.networks import read_published
from ..published.state_dicts import FIRST_STAGE, TEXT, below, is_stage_matrix, stage_name, unet_name
from ..registry import get_row
from .card import write_card
from .student import OpenedStudent, new_folder, write_json

#: The release of diffusers that the layout is tested with.
VERSION = "0.42.1"
TOKENIZER_SETTINGS = "tokenizer_config.json"


def to_diffusers(student: OpenedStudent, dest: Path) -> None:
    """Write a student of Stable Diffusion as a folder of diffusers; it is `to_folder` for those of such a folder."""
    net, name = student.net, student.model.dataset_name
    if not isinstance(net, CFGPrecond) or not student.model.has_text:
        raise UserError(
            f"{student.path} is a student of {name}; a pipeline of diffusers is made of students of ms_coco "
            "and of folders of diffusers, use `program`"
        )
    row = get_row(name)
    # A file says itself what its network is; the rest is as in the teacher.
    config = {**row_config(row), "network": net.init_kwargs}
    tensors, source = read_published(row, own_latent_space(student.model.sampling, str(student.path)))
    with new_folder(dest) as temporary:
        _write_networks(net, config, tensors, state_scale(student), temporary)
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler_config(student))
        _write_tokenizer(find_tokenizer(source), config, temporary / "tokenizer")
        write_json(temporary / "model_index.json", INDEX)
        rate = student.sampler.plan.guidance_rate
        record = {"guidance_scale": rate, "state_scale": state_scale(student), **student.record()}
        write_json(temporary / "sfd.json", record)
        write_text(temporary / "README.md", write_card(student, _how(student, dest.name), "diffusers"))


def state_scale(student: OpenedStudent) -> float:
    """g: states in the pipeline are g times ours."""
    return float(student.steps[0]) / student.initial_scale


def _write_networks(
    net: CFGPrecond, config: Mapping[str, Any], published: Mapping[str, Tensor], g: float, folder: Path
) -> None:
    """U-Net, and first stage and text encoder of the `published` file, with their configurations."""
    network, stage = config["network"], config["first_stage"]
    unet = {unet_name(name, network["num_res_blocks"]): t for name, t in net.model.state_dict().items()}
    unet |= {name: unet[name] * g for name in ("conv_out.weight", "conv_out.bias")}
    unet["conv_in.weight"] = unet["conv_in.weight"] / g
    vae = {
        stage_name(name, len(stage["ch_mult"])): t[:, :, 0, 0] if is_stage_matrix(name) else t
        for name, t in below(published, FIRST_STAGE).items()
    }
    text = below(published, f"{TEXT}transformer.")
    text.pop(POSITIONS, None)
    configs = {
        "unet": unet_config(network),
        "vae": stage_config(stage, network, g),
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                         **(config.get("text") or VIT_L_14)},
    }  # fmt: skip
    for name, tensors in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", configs[name])
        tensors = {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in tensors.items()}
        save_file(tensors, str(folder / name / (WEIGHTS[name] + SUFFIXES[0])), metadata={"format": "pt"})


def _write_tokenizer(source: Path, config: Mapping[str, Any], folder: Path) -> None:
    """The tokenizer's files. Diffusers has the number of tokens from the settings, which need not be there for us."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    settings = read_json(folder / TOKENIZER_SETTINGS) if (folder / TOKENIZER_SETTINGS).is_file() else {}
    length = (config.get("text") or VIT_L_14)["max_position_embeddings"]
    write_json(
        folder / TOKENIZER_SETTINGS, {**settings, "tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    )


def unet_config(network: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the U-Net in terms of diffusers."""
    attends = [2**level in network["attention_resolutions"] for level in range(len(network["channel_mult"]))]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": network["img_resolution"],
        "in_channels": network["img_channels"],
        "out_channels": network["img_channels"],
        "block_out_channels": [network["model_channels"] * mult for mult in network["channel_mult"]],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": network["num_res_blocks"],
        "transformer_layers_per_block": network.get("transformer_depth", 1),
        # A misnomer that diffusers keeps: it is the number of heads.
        "attention_head_dim": network["num_heads"],
        "cross_attention_dim": network["context_dim"],
        "norm_num_groups": min(32, network["model_channels"]),
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
    }


def stage_config(stage: Mapping[str, Any], network: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Sizes of the first stage in terms of diffusers, for latents that are `scale` times ours."""
    levels = len(stage["ch_mult"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "in_channels": stage["in_channels"],
        "out_channels": stage["out_ch"],
        "latent_channels": stage["z_channels"],
        "block_out_channels": [stage["ch"] * mult for mult in stage["ch_mult"]],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": stage["num_res_blocks"],
        "norm_num_groups": min(32, stage["ch"]),
        "act_fn": "silu",
        "sample_size": network["img_resolution"] * 2 ** (levels - 1),
        "scaling_factor": stage["scale_factor"] * scale,
    }


def scheduler_config(student: OpenedStudent) -> dict[str, Any]:
    """`EulerDiscreteScheduler` with the student's noise levels where a configuration can say them.

    Two, or any number on the schedules `polynomial` with rho 7 and `logsnr`, it can: then `num_inference_steps` is
    enough. Others have to be passed as `sigmas`, see the folder's README.
    """
    sigmas, noise = student.steps, student.net.noise_schedule
    assert noise is not None
    # The student never goes below σ_min, and the table's first level is where a run ends.
    log_alphas = noise.alphas_cumprod.log().clamp(max=-math.log1p(float(sigmas[-1]) ** 2))
    betas = -torch.expm1(log_alphas.diff(prepend=log_alphas.new_zeros(1)))
    spacing = spacing_of(sigmas)
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": noise.steps,
        "trained_betas": betas.tolist(),
        "prediction_type": "epsilon",
        "interpolation_type": "linear",
        "timestep_spacing": "linspace",
        "final_sigmas_type": "sigma_min",
    }
    if spacing is not None:
        config |= {spacing: True, "sigma_max": float(sigmas[0]), "sigma_min": float(sigmas[-2])}
    return config


def spacing_of(sigmas: Tensor) -> str | None:
    """The option of the scheduler that makes `sigmas`, without the last, from the first and the last but one."""
    evaluated = sigmas[:-1]
    progress = torch.linspace(0, 1, len(evaluated), dtype=torch.float64)
    first, last = evaluated[0], evaluated[-1]
    candidates = {
        "use_karras_sigmas": torch.lerp(first ** (1 / 7), last ** (1 / 7), progress) ** 7,
        "use_exponential_sigmas": torch.lerp(first.log(), last.log(), progress).exp(),
    }
    return next((name for name, made in candidates.items() if torch.allclose(made, evaluated, rtol=1e-9)), None)


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": VERSION,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    **dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), [None, None]),
    "requires_safety_checker": False,
}


def _how(student: OpenedStudent, name: str) -> str:
    """How the folder is sampled, for its card."""
    rate, count = student.sampler.plan.guidance_rate, len(student.steps) - 1
    sigmas = ", ".join(f"{sigma:.9g}" for sigma in student.steps.tolist())
    plain = spacing_of(student.steps) is not None
    how = f"num_inference_steps={count}" if plain else f"sigmas=[{sigmas}]"
    other = (
        f"The same noise levels said outright: `sigmas=[{sigmas}]`."
        if plain
        else "`num_inference_steps` alone makes other noise levels, which the model was not trained for."
    )
    return f"""```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{name}")
image = pipe("a photo of a cat", {how}, guidance_scale={rate:g}).images[0]
```

{other} Keep the scheduler. The analytical first step is folded into the model: first and last convolution, and the
decoder's scaling factor, carry a factor of {state_scale(student):.6f}. There is no safety checker.
"""
