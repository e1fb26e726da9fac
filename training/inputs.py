"""Inputs and weights without meaning, to time, count and try out networks with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.diffusers_precond import DiffusersPrecond
from models.precond import Precond

#: Tokens of the text encoder of Stable Diffusion 1.
TOKENS = 77


def random_inputs(net: Precond, batch: int, device: torch.device) -> dict[str, Any]:
    """Arguments for `net` of the shapes that it sees in a run."""
    shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
    inputs: dict[str, Any] = {"x": torch.randn(shape, device=device), "sigma": torch.ones([], device=device)}
    if net.label_dim:
        inputs["class_labels"] = torch.eye(net.label_dim, device=device)[torch.arange(batch) % net.label_dim]
    if isinstance(net, DiffusersPrecond) and net.context_dim:
        inputs["condition"] = net.example_condition(batch, device)
    elif net.context_dim:
        inputs["condition"] = torch.randn([batch, TOKENS, net.context_dim], device=device)
    return inputs


def fill_randomly(module: nn.Module) -> None:
    """Weights that keep features of about unit variance, for a module without any."""
    rng = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict(keep_vars=True).items():
        value = torch.randn(tensor.shape, generator=rng) / max(tensor[0].numel() if tensor.ndim > 1 else 400, 1) ** 0.5
        if tensor.ndim == 1 and name.endswith(("weight", "running_var")):
            value = 1 + value
        tensor.data.copy_(value)
