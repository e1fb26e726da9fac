"""A network of this program in half the space: its own file, with weights in half precision.

Everything that reads network files reads it too; a weight w comes back within 2⁻¹¹ |w|, or 2⁻²⁵ where it is below 2⁻¹⁴.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dnnlib import UserError
from torch_utils.checkpoint import read_network, save_network

from ..loading import find_model
from .student import without_folders


def to_half(model_path: str, dest: Path) -> Path:
    """Write a student, or a teacher of `training.pretrain`, with float16 weights and its settings; returns its file.

    What it was trained from is named without its folder; the place of a teacher, which comparisons need, stays.

    Raises:
        UserError: no such model, one of other people, or a weight beyond half precision (65504).
    """
    source = find_model(model_path)
    if dest.suffix != ".safetensors":
        raise UserError(f"{dest} is not a name ending in .safetensors; choose one that is", "dest")
    if source.suffix != ".safetensors" or source.is_dir():
        raise UserError(f"{source} is not a .safetensors file of train.py or training.pretrain", "model_path")
    if dest.exists() and dest.samefile(source):
        raise UserError(f"{dest} is the model itself, whose full precision would be lost; choose another name", "dest")
    tensors, settings = read_network(source)
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    for name, half in halves.items():
        if not half.isfinite().all():
            raise UserError(f"{source} holds {tensors[name].abs().max():g} in {name}; half precision ends at 65504")
    save_network(dest, halves, without_folders(settings, "training"))
    return source
