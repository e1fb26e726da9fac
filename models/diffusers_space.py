"""What a folder of diffusers holds beside its network: the autoencoder of latents.

It is read when it is first needed, by the package, from safetensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError

from .latent import LatentSpace
from .networks.diffusers_modules import build_module, check_numbers, import_diffusers
from .published.diffusers import read_json
from .published.diffusers_folder import Folder, buildable, load_weights

#: Latents that are decoded at a time: images are much larger.
DECODED = 4


class FolderSpace:
    """From latents to images."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._decoder: Any = None

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in about [-1, 1], float32, from latents `[B, C, h, w]`; a few at a time."""
        autoencoder = self.decoder().to(latents.device)
        scale, shift = read_scale(autoencoder.config), autoencoder.config.shift_factor or 0.0
        parts = (latents.float() / scale + shift).split(DECODED)
        with torch.no_grad():
            return torch.cat([autoencoder.decode(part, return_dict=False)[0] for part in parts])

    def decoder(self) -> Any:
        """The autoencoder. Who decodes at the end of a long run asks for it at the start, to know that it is there."""
        if self._decoder is None:
            part = self.folder.path / "vae"
            config = read_json(part / "config.json")
            if config.get("_class_name") != "AutoencoderKL":
                raise UserError(
                    f"{part} is of class {str(config.get('_class_name'))[:60]!r}; expected an AutoencoderKL"
                )
            if config.get("latents_mean") or config.get("latents_std"):
                raise UserError(f"{part} scales latents by channel (latents_mean, latents_std), which is not covered")
            check_numbers(config, str(part))
            with buildable(part), torch.device("meta"):
                autoencoder = build_module(import_diffusers().AutoencoderKL, config)
            load_weights(autoencoder, part)
            self._decoder = autoencoder.eval().requires_grad_(False)
        return self._decoder

    def encode_text(self, prompts: Sequence[str], device: torch.device) -> Any:
        raise UserError(f"{self.folder.path} has no text encoder")


def read_scale(config: Mapping[str, Any]) -> float:
    """What latents of an autoencoder are multiplied by, from its configuration; the default is diffusers' own."""
    return float(config.get("scaling_factor", 0.18215))


#: What makes images of latents, and conditions of captions.
AnySpace = LatentSpace | FolderSpace


def read_space(folder: Folder) -> FolderSpace | None:
    """What decodes the folder's latents; None for a model of pixels."""
    if (folder.path / "vqvae" / "config.json").is_file():
        raise UserError(f"{folder.path} decodes latents by a VQ autoencoder; expected an AutoencoderKL in vae/")
    return FolderSpace(folder) if folder.is_latent else None
