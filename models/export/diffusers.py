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

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dnnlib import UserError, make_folder, write_text

from ..building import row_config
from ..loading import own_latent_space
from ..networks.clip_text import TOKENIZER_FILES, VIT_L_14, find_tokenizer
from ..precond import CFGPrecond
from ..published.diffusers import POSITIONS, SUFFIXES, WEIGHTS, read_json
from ..published.networks import read_published
from ..published.state_dicts import FIRST_STAGE, TEXT, below, is_stage_matrix, stage_name, unet_name
from ..registry import get_row
from .card import write_card
from .student import OpenedStudent

#: The release of diffusers that the layout is tested with.
VERSION = "0.42.1"
TOKENIZER_SETTINGS = "tokenizer_config.json"


def to_diffusers(student: OpenedStudent, dest: Path) -> None:
    """Write a student of Stable Diffusion as a folder of diffusers; it is `to_folder` for those of such a folder."""
    net, name = student.net, student.model.dataset_name
    if not isinstance(net, CFGPrecond) or not student.model.has_text:
        raise UserError(
            f"{student.path} is a student of {name}; a pipeline of diffusers is made of students of ms_coco, "
            "use `program`"
        )
    row = get_row(name)
    config = row_config(row)
    tensors, source = read_published(row, own_latent_space(student.model.sampling, str(student.path)))
    pipeline = Pipeline(
        net,
        # A file says itself what its network is; the rest is as in the teacher.
        {**config, "network": net.init_kwargs},
        tensors,
        find_tokenizer(source),
        student.sampler.sigmas,
        student.sampler.plan.afs,
        student.sampler.plan.guidance_rate,
        student.record(),
    )
    write_pipeline(pipeline, dest, write_card(student, _how(pipeline, dest.name), "diffusers"))


@dataclass(frozen=True)
class Pipeline:
    """What a folder is made of.

    Attributes:
        net: the student's network, without step condition.
        config: what `models/configs` says of its teacher.
        tensors: first stage and text encoder under their published names.
        tokenizer: directory with the tokenizer's files.
        sigmas: the student's noise levels, float64 `[num_steps]`.
        afs: whether its first step is analytical.
        guidance_rate: what it is sampled with.
        settings: what else to record, JSON-serialisable.
    """

    net: CFGPrecond
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Path
    sigmas: Tensor
    afs: bool
    guidance_rate: float
    settings: Mapping[str, Any]

    @property
    def steps(self) -> Tensor:
        """Noise levels of the steps that evaluate the network, and the end."""
        return self.sigmas[int(self.afs) :]

    @property
    def scale(self) -> float:
        """g: states in the pipeline are g times ours."""
        if not self.afs:
            return 1.0
        first, second = self.sigmas[:2].tolist()
        return second / (first + (second - first) * first / math.sqrt(1 + first**2))


def write_pipeline(pipeline: Pipeline, dest: Path, card: str) -> None:
    """Write the folder with its card, all or nothing; `dest` must not exist.

    Raises:
        UserError: it exists, or cannot be written.
    """
    if dest.exists():
        raise UserError(f"{dest} exists; choose a new folder", "dest")
    make_folder(dest.parent, "dest")
    temporary = dest.with_name(f".{os.getpid()}.tmp.{dest.name}")
    try:
        _write_networks(pipeline, temporary)
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler_config(pipeline))
        _write_tokenizer(pipeline, temporary / "tokenizer")
        write_json(temporary / "model_index.json", _index())
        write_json(temporary / "sfd.json", _record(pipeline))
        write_text(temporary / "README.md", card)
        temporary.rename(dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_networks(pipeline: Pipeline, folder: Path) -> None:
    network, stage = pipeline.config["network"], pipeline.config["first_stage"]
    unet = {unet_name(name, network["num_res_blocks"]): t for name, t in pipeline.net.model.state_dict().items()}
    g = pipeline.scale
    unet |= {name: unet[name] * g for name in ("conv_out.weight", "conv_out.bias")}
    unet["conv_in.weight"] = unet["conv_in.weight"] / g
    part = below(pipeline.tensors, FIRST_STAGE)
    vae = {
        stage_name(name, len(stage["ch_mult"])): t[:, :, 0, 0] if is_stage_matrix(name) else t
        for name, t in part.items()
    }
    text = below(pipeline.tensors, f"{TEXT}transformer.")
    text.pop(POSITIONS, None)
    configs = {
        "unet": unet_config(network),
        "vae": stage_config(stage, network, g),
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                         **(pipeline.config.get("text") or VIT_L_14)},
    }  # fmt: skip
    for name, tensors in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", configs[name])
        tensors = {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in tensors.items()}
        save_file(tensors, str(folder / name / (WEIGHTS[name] + SUFFIXES[0])), metadata={"format": "pt"})


def _write_tokenizer(pipeline: Pipeline, folder: Path) -> None:
    """The tokenizer's files. Diffusers has the number of tokens from the settings, which need not be there for us."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (pipeline.tokenizer / name).is_file():
            shutil.copyfile(pipeline.tokenizer / name, folder / name)
    settings = read_json(folder / TOKENIZER_SETTINGS) if (folder / TOKENIZER_SETTINGS).is_file() else {}
    length = (pipeline.config.get("text") or VIT_L_14)["max_position_embeddings"]
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


def scheduler_config(pipeline: Pipeline) -> dict[str, Any]:
    """`EulerDiscreteScheduler` with the student's noise levels where a configuration can say them.

    Two, or any number on the schedules `polynomial` with rho 7 and `logsnr`, it can: then `num_inference_steps` is
    enough. Others have to be passed as `sigmas`, see the folder's README.
    """
    sigmas, noise = pipeline.steps, pipeline.net.noise_schedule
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


def _index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _record(pipeline: Pipeline) -> dict[str, Any]:
    return {
        "sigmas": pipeline.steps.tolist(),
        "guidance_scale": pipeline.guidance_rate,
        "state_scale": pipeline.scale,
        **pipeline.settings,
    }


def _how(pipeline: Pipeline, name: str) -> str:
    """How the folder is sampled, for its card."""
    rate, count = pipeline.guidance_rate, len(pipeline.steps) - 1
    sigmas = ", ".join(f"{sigma:.9g}" for sigma in pipeline.steps.tolist())
    plain = spacing_of(pipeline.steps) is not None
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
decoder's scaling factor, carry a factor of {pipeline.scale:.6f}. There is no safety checker.
"""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
