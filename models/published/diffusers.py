"""Stable Diffusion v1 as a folder of the diffusers package, read and written without that package.

The networks are the same under other names: `unet`, `vae` and `text_encoder` hold, as `.safetensors`, what a checkpoint
in the published layout holds below `model.diffusion_model.`, `first_stage_model.` and `cond_stage_model.`; attention of
the first stage has matrices in place of 1×1 convolutions. JSON files beside them hold the sizes.

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

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnnlib import UserError, make_folder, sha256_of, write_text

from ..latent import FIRST_STAGE, TEXT
from ..networks.autoencoders import KLAutoencoder
from ..networks.clip_text import TOKENIZER_FILES, VIT_L_14
from ..precond import CFGPrecond
from .torch_checkpoint import read_checkpoint

UNET = "model.diffusion_model."
#: The release of diffusers that the layout is tested with.
VERSION = "0.42.1"
#: Weights of a component, the first that there is.
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin")
TORCH_WEIGHTS = "pytorch_model.bin"
TOKENIZER_SETTINGS = "tokenizer_config.json"
POSITIONS = "text_model.embeddings.position_ids"

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
STAGE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
#: What diffusers called these before release 0.18; published folders still do.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ------------------------------------------------------------------------------------------------------------------
# Names


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


def _is_attention(name: str) -> bool:
    """Whether a weight of the first stage is a matrix there and a 1×1 convolution here."""
    return ".mid.attn_1." in name and name.endswith("weight") and not name.endswith("norm.weight")


# ------------------------------------------------------------------------------------------------------------------
# Reading


def is_stable_diffusion(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder of diffusers, or a checkpoint in the layout in which Stable Diffusion is published."""
    path = Path(path)
    if path.is_dir():
        return (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return path.suffix == ".ckpt"
    try:
        with safe_open(str(path), framework="pt") as file:
            return any(name.startswith(UNET) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False  # whoever opens it says what is wrong with it


def read_stable_diffusion(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder or a checkpoint under their published names, as they are stored.

    Args:
        config: what `models/configs` says of the model. Names and shapes are for its networks to check.

    Raises:
        UserError: a part is missing, cannot be read, or belongs to another kind of model.
    """
    if not path.is_dir():
        return read_checkpoint(path)
    _check_folder(path, config)
    network, stage = config["network"], config["first_stage"]
    blocks, levels = network["num_res_blocks"], len(stage["ch_mult"])
    parts = read_checkpoint(_weights_file(path, "unet"))
    tensors = _renamed(parts, lambda name: unet_name(name, blocks), _names(CFGPrecond, network), UNET)
    parts = read_checkpoint(_weights_file(path, "vae"))
    old = "|".join(OLD_ATTENTION)
    parts = {re.sub(rf"\b({old})\b", lambda m: OLD_ATTENTION[m[1]], name): tensor for name, tensor in parts.items()}
    parts = _renamed(parts, lambda name: stage_name(name, levels), _names(KLAutoencoder, stage), FIRST_STAGE)
    tensors |= {name: t[:, :, None, None] if _is_attention(name) and t.ndim == 2 else t for name, t in parts.items()}
    for name, tensor in read_checkpoint(_weights_file(path, "text_encoder")).items():
        # Releases of transformers differ in whether `text_model.` is part of their names.
        name = f"text_model.{name.removeprefix('text_model.')}"
        if name != POSITIONS:
            tensors[f"{TEXT}transformer.{name}"] = tensor
    return tensors


def _renamed(
    found: dict[str, Tensor], rename: Callable[[str], str], names: list[str], prefix: str
) -> dict[str, Tensor]:
    """Tensors of diffusers under the published names; what has none keeps its own, for the check to name it."""
    published = {rename(name): name for name in names}
    return {prefix + published.get(name, name): tensor for name, tensor in found.items()}


def _names(cls: type, spec: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of a network that `models/configs` describes."""
    arguments = {name: value for name, value in spec.items() if name not in ("class", "scale_factor")}
    with torch.device("meta"):
        net = cls(**arguments)
    return list((net.model if cls is CFGPrecond else net).state_dict())


def _weights_file(folder: Path, part: str) -> Path:
    """The file with the weights of a component."""
    names = [WEIGHTS[part] + suffix for suffix in SUFFIXES] + ([TORCH_WEIGHTS] if part == "text_encoder" else [])
    for name in names:
        if (folder / part / name).is_file():
            return folder / part / name
    raise UserError(f"{folder / part} holds no {names[0]}; expected a complete folder of diffusers")


def folder_digest(folder: Path) -> str:
    """SHA-256 over the weights of all components."""
    digests = [sha256_of(_weights_file(folder, part)) for part in WEIGHTS]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _check_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what differs from the model in settings that no shape shows."""
    network, stage = config["network"], config["first_stage"]
    expected = {
        "unet/config.json": {"attention_head_dim": network["num_heads"]},
        "vae/config.json": {"scaling_factor": stage["scale_factor"]},
        "scheduler/scheduler_config.json": {
            "prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": network["linear_start"],
            "beta_end": network["linear_end"], "num_train_timesteps": network.get("timesteps", 1000),
            "trained_betas": None,
        },
    }  # fmt: skip
    for name, values in expected.items():
        found = _read_json(folder / name)
        for key, value in values.items():
            # What a file does not say is diffusers' default, which is the value of Stable Diffusion v1.
            if found.get(key, value) != value:
                said = str(found[key])[:40]
                raise UserError(f"{folder / name} says {key} {said}, expected {value}: this is another kind of model")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} is missing; expected a complete folder of diffusers") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; get the folder again")
    return content


# ------------------------------------------------------------------------------------------------------------------
# Writing


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
        licence, origin: of the weights.
        settings: what else to record, JSON-serialisable.
    """

    net: CFGPrecond
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Path
    sigmas: Tensor
    afs: bool
    guidance_rate: float
    licence: str
    origin: str
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


def write_pipeline(pipeline: Pipeline, dest: Path) -> None:
    """Write the folder, all or nothing; `dest` must not exist.

    Raises:
        UserError: it exists, or cannot be written.
    """
    if dest.exists():
        raise UserError(f"--dest={dest} exists; choose a new folder")
    make_folder(dest.parent, "--dest")
    temporary = dest.with_name(f".{os.getpid()}.tmp.{dest.name}")
    try:
        _write_networks(pipeline, temporary)
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler_config(pipeline))
        _write_tokenizer(pipeline, temporary / "tokenizer")
        _write_json(temporary / "model_index.json", _index())
        _write_json(temporary / "sfd.json", _record(pipeline))
        write_text(temporary / "README.md", _readme(pipeline, dest.name))
        temporary.rename(dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_networks(pipeline: Pipeline, folder: Path) -> None:
    network, stage = pipeline.config["network"], pipeline.config["first_stage"]
    unet = {unet_name(name, network["num_res_blocks"]): t for name, t in pipeline.net.model.state_dict().items()}
    g = pipeline.scale
    unet |= {name: unet[name] * g for name in ("conv_out.weight", "conv_out.bias")}
    unet["conv_in.weight"] = unet["conv_in.weight"] / g
    part = _below(pipeline.tensors, FIRST_STAGE)
    vae = {
        stage_name(name, len(stage["ch_mult"])): t[:, :, 0, 0] if _is_attention(name) else t for name, t in part.items()
    }
    text = _below(pipeline.tensors, f"{TEXT}transformer.")
    text.pop(POSITIONS, None)
    configs = {
        "unet": unet_config(network),
        "vae": stage_config(stage, pipeline.config["network"], g),
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                         **(pipeline.config.get("text") or VIT_L_14)},
    }  # fmt: skip
    for name, tensors in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        (folder / name).mkdir(parents=True)
        _write_json(folder / name / "config.json", configs[name])
        tensors = {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in tensors.items()}
        save_file(tensors, str(folder / name / (WEIGHTS[name] + SUFFIXES[0])), metadata={"format": "pt"})


def _write_tokenizer(pipeline: Pipeline, folder: Path) -> None:
    """The tokenizer's files. Diffusers has the number of tokens from the settings, which need not be there for us."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (pipeline.tokenizer / name).is_file():
            shutil.copyfile(pipeline.tokenizer / name, folder / name)
    settings = _read_json(folder / TOKENIZER_SETTINGS) if (folder / TOKENIZER_SETTINGS).is_file() else {}
    length = (pipeline.config.get("text") or VIT_L_14)["max_position_embeddings"]
    _write_json(
        folder / TOKENIZER_SETTINGS, {**settings, "tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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


def _readme(pipeline: Pipeline, name: str) -> str:
    rate, count = pipeline.guidance_rate, len(pipeline.steps) - 1
    sigmas = ", ".join(f"{sigma:.9g}" for sigma in pipeline.steps.tolist())
    plain = spacing_of(pipeline.steps) is not None
    how = f"num_inference_steps={count}" if plain else f"sigmas=[{sigmas}]"
    other = (
        f"The same noise levels said outright: `sigmas=[{sigmas}]`."
        if plain
        else "`num_inference_steps` alone makes other noise levels, which the model was not trained for."
    )
    return f"""---
license: {pipeline.licence.lower().replace(" ", "-")}
library_name: diffusers
pipeline_tag: text-to-image
---
A student of {pipeline.origin}, distilled by Simple and Fast Distillation (arXiv 2409.19681) for {count} evaluations of
the network (twice that with guidance), exported for diffusers.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{name}")
image = pipe("a photo of a cat", {how}, guidance_scale={rate:g}).images[0]
```

{other} Keep the scheduler. The analytical first step is folded into the model: first and last convolution, and the
decoder's scaling factor, carry a factor of {pipeline.scale:.6f}. There is no safety checker.
"""


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
