"""Stable Diffusion v1 as a folder of the diffusers package, read without that package; `models.export` writes one.

The networks are the same under other names: `unet`, `vae` and `text_encoder` hold, as `.safetensors`, what a checkpoint
in the published layout holds below `model.diffusion_model.`, `first_stage_model.` and `cond_stage_model.`; attention of
the first stage has matrices in place of 1×1 convolutions. JSON files beside them hold the sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dnnlib import UserError, parse_json

from ..networks.autoencoders import KLAutoencoder
from ..precond import CFGPrecond
from .state_dicts import FIRST_STAGE, TEXT, UNET, is_stage_matrix, new_name, stage_name, unet_name
from .torch_checkpoint import read_checkpoint

#: Weights of a component, the first that there is.
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin")
TORCH_WEIGHTS = "pytorch_model.bin"
POSITIONS = "text_model.embeddings.position_ids"


def is_folder(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder of diffusers: of a pipeline, or of a network with its scheduler beside it."""
    path = Path(path)
    names = ("model_index.json", "unet/config.json", "transformer/config.json", "scheduler_config.json")
    return any((path / name).is_file() for name in names) or any(path.glob("diffusion_pytorch_model*"))


def is_stable_diffusion(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder of diffusers, or a checkpoint in the layout in which Stable Diffusion is published."""
    path = Path(path)
    if path.is_dir():
        return is_folder(path)
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
    blocks = network["num_res_blocks"]
    parts = read_checkpoint(_weights_file(path, "unet"))
    tensors = _renamed(parts, lambda name: unet_name(name, blocks), _names(CFGPrecond, network), UNET)
    tensors |= read_first_stage(_weights_file(path, "vae"), stage)
    for name, tensor in read_checkpoint(_weights_file(path, "text_encoder")).items():
        # Releases of transformers differ in whether `text_model.` is part of their names.
        name = f"text_model.{name.removeprefix('text_model.')}"
        if name != POSITIONS:
            tensors[f"{TEXT}transformer.{name}"] = tensor
    return tensors


def read_first_stage(path: Path, stage: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a KL autoencoder of diffusers under their published names, below `first_stage_model.`.

    Args:
        stage: what `models/configs` says of it. Names and shapes are for the network to check.
    """
    levels, parts = len(stage["ch_mult"]), {new_name(name): t for name, t in read_checkpoint(path).items()}
    parts = _renamed(parts, lambda name: stage_name(name, levels), _names(KLAutoencoder, stage), FIRST_STAGE)
    return {name: t[:, :, None, None] if is_stage_matrix(name) and t.ndim == 2 else t for name, t in parts.items()}


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


def _check_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what differs from the model in settings that no shape shows."""
    network, stage = config["network"], config["first_stage"]
    expected = {
        "unet/config.json": {"attention_head_dim": network["num_heads"]},
        "vae/config.json": {"scaling_factor": stage["scale_factor"]},
        "scheduler/scheduler_config.json": {
            "prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": network["linear_start"],
            "beta_end": network["linear_end"], "num_train_timesteps": network.get("timesteps", 1000),
            "trained_betas": None, "rescale_betas_zero_snr": False,
        },
    }  # fmt: skip
    for name, values in expected.items():
        found = read_json(folder / name)
        for key, value in values.items():
            # What a file does not say is diffusers' default, which is the value of Stable Diffusion v1.
            if found.get(key, value) != value:
                said = str(found[key])[:40]
                raise UserError(f"{folder / name} says {key} {said}, expected {value}: this is another kind of model")


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe, say, would be waited for
        raise UserError(f"{path} is missing; expected a complete folder of diffusers")
    try:
        # diffusers writes -Infinity for a default of some schedulers.
        content = parse_json(path.read_text(encoding="utf-8"), infinite=True)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; get the folder again")
    return content
