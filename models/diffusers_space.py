"""What a folder of diffusers holds beside its network: the autoencoder of latents, and text encoders.

They are read when they are first needed, by the package, from safetensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib import UserError

from .building import buildable
from .conditions import Conditions
from .diffusers_text import TextEncoders
from .latent import LatentScale, LatentSpace, decoding_in
from .networks.diffusers_modules import build_module, check_numbers, import_diffusers
from .published.diffusers import read_json
from .published.diffusers_folder import Folder, load_weights

#: Latents that are decoded at a time: images are much larger.
DECODED = 4
#: What diffusers multiplies latents by where a configuration does not say it.
DEFAULT_SCALE = 0.18215


class FolderSpace:
    """From latents to images, and from captions to conditions; `decode_precision` as `LatentSpace` has it.

    Attributes:
        scaling: how states are made of latents.

    Raises:
        UserError: the autoencoder's configuration does not say how.
    """

    decode_precision: str | None = None

    def __init__(self, folder: Folder) -> None:
        self.folder, self.scaling = folder, _read_scaling(folder.path / "vae" / "config.json")
        self._decoder: Any = None

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in about [-1, 1], float32, from latents `[B, C, h, w]`; a few at a time."""
        parts = self.scaling.latents(latents.float()).split(DECODED)
        with torch.no_grad(), decoding_in(self.decode_precision, latents.device) as dtype:
            if dtype == torch.float16 and self.decoder().config.force_upcast:
                raise UserError(
                    f"{self.folder.path / 'vae'} overflows in fp16 (force_upcast); leave it out", "decode_precision"
                )
            # Its own `to` warns of whatever changes its type.
            autoencoder = nn.Module.to(self.decoder(), latents.device, dtype)
            return torch.cat([autoencoder.decode(part.to(dtype), return_dict=False)[0].float() for part in parts])

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

    def encode_text(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        """Conditions of captions, float32 on `device`."""
        return self.text.encode(prompts, device)

    def encode_nothing(self, device: torch.device) -> Conditions:
        """What guidance compares with: the empty caption, or zeros where the pipeline says so."""
        empty = self.encode_text([""], device)
        if self.text.is_sdxl and self.folder.index().get("force_zeros_for_empty_prompt", True):
            return replace(empty.map(torch.zeros_like), time_ids=empty.time_ids)
        return empty

    def prepare(self, prompts: Sequence[str], device: torch.device) -> bool:
        """Encode a run's captions and let the text encoders leave the device; False if they are too many to keep."""
        return self.text.prepare(prompts, device)

    @cached_property
    def text(self) -> TextEncoders:
        """The text encoders, which are read at first use."""
        return TextEncoders(self.folder)


def _read_scaling(file: Path) -> LatentScale:
    config = read_json(file)
    scale, shift = config.get("scaling_factor", DEFAULT_SCALE), config.get("shift_factor") or 0.0
    try:
        return LatentScale([float(scale)], [-float(shift) * float(scale)])
    except (TypeError, ValueError):
        raise UserError(
            f"{file} says scaling_factor {str(scale)[:40]!r} and shift_factor {str(shift)[:40]!r}; expected finite "
            "numbers, the first not zero"
        ) from None


#: What makes images of latents, and conditions of captions.
AnySpace = LatentSpace | FolderSpace


def scaling_of(space: AnySpace | None) -> LatentScale | None:
    """How states are made of latents; None for pixels."""
    return None if space is None else space.scaling


def read_space(folder: Folder) -> FolderSpace | None:
    """What decodes the folder's latents; None for a model of pixels."""
    if (folder.path / "vqvae" / "config.json").is_file():
        raise UserError(f"{folder.path} decodes latents by a VQ autoencoder; expected an AutoencoderKL in vae/")
    if not folder.is_latent and (folder.family.text or folder.config["in_channels"] not in (1, 3)):
        raise UserError(
            f"{folder.path} has no vae/, which decodes its latents; expected the folder of a whole pipeline"
        )
    return FolderSpace(folder) if folder.is_latent else None
