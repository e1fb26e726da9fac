"""What a latent model needs beside its network: the first stage that makes images, and the text encoder.

Both lie in the teacher's published file, a student's file holds its network alone. They are read when they are first
needed, so a run that decodes nothing reads neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError, first_line
from torch_utils.device import PRECISIONS, moved_to, tensor_floats

from .networks.autoencoders import Autoencoder, load_autoencoder
from .networks.clip_text import TextEncoder
from .published.state_dicts import FIRST_STAGE, TEXT, below

#: What the first stage computes in: float32 by TF32 products, or a dtype.
DECODE_PRECISIONS = {"tf32": torch.float32, **PRECISIONS}


def pick_decode_precision(name: str | None, device: torch.device) -> str:
    """`name`, or the default of the device: tf32 on CUDA, fp32 elsewhere.

    Against float32, tf32 and fp16 move a value of an 8-bit image by at most 1, bf16 by about 5; fp16 can overflow.

    Raises:
        UserError: tf32 without CUDA.
    """
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"tf32 is of CUDA, and this is on {device.type}; leave it out", "decode_precision")
    return name or ("tf32" if device.type == "cuda" else "fp32")


@contextmanager
def decoding_in(name: str | None, device: torch.device) -> Iterator[torch.dtype]:
    """Within, what `pick_decode_precision` says is so; gives the dtype of features."""
    name = pick_decode_precision(name, device)
    with tensor_floats(name == "tf32"):
        yield DECODE_PRECISIONS[name]


@dataclass(frozen=True)
class LatentScale:
    """How EDM2 scales latents: states are, per channel, latents · scale + bias.

    Raises:
        ValueError: these are not as many finite numbers each, or a scale is zero.
    """

    scale: list[float]
    bias: list[float]

    def __post_init__(self) -> None:
        both = (self.scale, self.bias)
        if not all(isinstance(v, list) for v in both) or len(self.scale) != len(self.bias):
            raise ValueError("scale and bias of latents are not a number for each channel")
        if not all(type(v) is float and math.isfinite(v) for v in self.scale + self.bias) or 0 in self.scale:
            raise ValueError("scale and bias of latents are not usable numbers")

    @classmethod
    def from_json(cls, values: Any, source: str) -> LatentScale:
        """Build from what a student file records; anything malformed is one clear line."""
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{source} is damaged: {first_line(error)}") from None

    def latents(self, states: Tensor) -> Tensor:
        """What the autoencoder made, from states `[B, C, h, w]`."""
        scale, bias = (states.new_tensor(values)[:, None, None] for values in (self.scale, self.bias))
        return (states - bias) / scale

    def is_close(self, other: LatentScale) -> bool:
        """Whether the same latents make the same states; one number stands for all channels."""
        pairs = ((self.scale, other.scale), (self.bias, other.bias))
        return all(torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-3) for a, b in pairs)


class LatentSpace:
    """From latents to images, and from captions to conditions.

    Args:
        config: what `models/configs` says of the model: `first_stage` and, for a text-conditioned one, `text`.
        read: gives the tensors of the published file, and the file. It is called once, when first needed.
        scale: of the latents of EDM2, whose autoencoder was given images in [0, 1].

    Attributes:
        decode_precision: what images are made in, see `pick_decode_precision`.
    """

    decode_precision: str | None = None

    def __init__(
        self,
        config: Mapping[str, Any],
        read: Callable[[], tuple[Mapping[str, Tensor], Path]],
        scale: LatentScale | None = None,
    ) -> None:
        self._config, self._read, self.scale = config, read, scale
        self._file: tuple[Mapping[str, Tensor], Path] | None = None
        self._decoder: Autoencoder | None = None
        self._text: TextEncoder | None = None

    @property
    def scaling(self) -> LatentScale:
        """How states are made of latents."""
        return self.scale or LatentScale([float(self._config["first_stage"].get("scale_factor", 1.0))], [0.0])

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in about [-1, 1], float32, from latents `[B, C, h, w]`; a few at a time."""
        decoder = moved_to(latents.device, self.decoder())
        with decoding_in(self.decode_precision, latents.device) as decoder.compute_dtype:
            # States are scaled to about unit variance, which the first stage knows nothing of.
            images = decoder.decode(self.scaling.latents(latents.float()))
        return images if self.scale is None else 2 * images - 1

    def decoder(self) -> Autoencoder:
        """The first stage. Who decodes at the end of a long run asks for it at the start, to know that it is there."""
        if self._decoder is None:
            spec = {name: value for name, value in self._config["first_stage"].items() if name != "scale_factor"}
            tensors, path = self._part(FIRST_STAGE)
            self._decoder = load_autoencoder(spec, tensors, path)
        return self._decoder

    def encode_text(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Conditions `[len(prompts), tokens, width]`, float32 on `device`."""
        if self._text is None:
            tensors, path = self._part(TEXT)
            self._text = TextEncoder(tensors, device, self._config.get("text"), source=path)
        return self._text.encode(prompts).to(device)

    def encode_nothing(self, device: torch.device) -> Tensor:
        """What guidance compares with: the condition of the empty caption, `[1, tokens, width]`."""
        return self.encode_text([""], device)

    def _part(self, prefix: str) -> tuple[dict[str, Tensor], Path]:
        if self._file is None:
            self._file = self._read()
        tensors, path = self._file
        part = below(tensors, prefix)
        if not part:
            raise UserError(f"{path} holds no {prefix}* tensors; expected the complete published file")
        return part, path
