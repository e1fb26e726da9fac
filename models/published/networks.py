"""Networks of bare state dicts, and the published files that hold one among other parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError, need
from torch_utils.checkpoint import check_state_dict

from ..building import describe_network, row_config
from ..networks.autoencoders import INSTALL_TAMING
from ..networks.clip_text import INSTALL_TRANSFORMERS
from ..noise import DiscreteNoise
from ..precond import Precond
from ..registry import DatasetSpec, fetch_autoencoder, fetch_weights
from .diffusers import read_first_stage, read_stable_diffusion
from .state_dicts import AVERAGE, IGNORED, UNET
from .torch_checkpoint import read_checkpoint


def read_published(row: DatasetSpec, own: Path | None = None) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a row's published file under its names, and the file; or those of the user's `own` model."""
    need_packages(row)
    if own is not None:
        return read_stable_diffusion(own, row_config(row)), own
    path = fetch_weights(row)
    return read_checkpoint(path), path


def read_autoencoder(stage: Mapping[str, Any]) -> tuple[dict[str, Tensor], Path]:
    """The tensors of Stability's autoencoder under published names, and its file; `stage` as in `models/configs`."""
    path = fetch_autoencoder()
    return read_first_stage(path, stage), path


def need_packages(row: DatasetSpec) -> None:
    """Find that a package is missing before gigabytes are fetched for it; a UserError says how to install it."""
    if row.text:
        need("transformers", INSTALL_TRANSFORMERS)
    if row.codec == "vq-f4":
        need("taming.modules.vqvae.quantize", INSTALL_TAMING)


def published_network(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Precond:
    """The network of a bare state dict."""
    net = describe_network(spec, str(path))
    check_state_dict(net.model.state_dict(), tensors, path)
    net.model.load_state_dict(_float32(tensors), assign=True)
    return net


def latent_network(spec: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> Precond:
    """The network of a latent-diffusion checkpoint: its moving average, where the file has one."""
    net = describe_network(spec, str(path))
    expected = net.model.state_dict()
    averages = {name: AVERAGE + name.replace(".", "") for name in expected}
    published = {UNET + name: tensor for name, tensor in expected.items()}
    has_average = any(name.startswith(AVERAGE) for name in tensors)
    if has_average:
        published |= {averages[name]: tensor for name, tensor in expected.items()}
    check_state_dict(published, {name: t for name, t in tensors.items() if name not in IGNORED}, path)
    _check_noise(net.noise_schedule, tensors.get("alphas_cumprod"), path)
    chosen = {name: tensors[averages[name] if has_average else UNET + name] for name in expected}
    net.model.load_state_dict(_float32(chosen), assign=True)
    return net


def _check_noise(own: DiscreteNoise | None, recorded: Tensor | None, path: Path) -> None:
    """Refuse a file whose model was trained at other noise levels."""
    if recorded is None:
        return
    levels = None if own is None else own.alphas_cumprod
    if levels is None or recorded.shape != levels.shape or not torch.allclose(recorded.double(), levels, rtol=1e-2):
        raise UserError(f"{path} records another noise schedule than its model has; expected the published file")


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which do not change with the file."""
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
