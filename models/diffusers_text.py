"""Captions to conditions by the text encoders of a pipeline's folder, as its pipeline does it.

| network | tokens | pooled |
|---|---|---|
| U-Net of Stable Diffusion 1 and 2 | last hidden state of one CLIP | – |
| U-Net of SDXL | last hidden state but one of two CLIPs, side by side | projection of the second |
| transformer of SD3 | those of two CLIPs side by side, filled up with zeros; then those of T5 | both projections |

The encoders are transformers' own classes, from a closed list, and their weights safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dnnlib import UserError, first_line, need

from . import conditions
from .conditions import Captions, Conditions
from .networks.clip_text import INSTALL_TRANSFORMERS
from .published.diffusers import read_json
from .published.diffusers_folder import TEXT_WEIGHTS, VARIANTS, Folder, weight_files

#: Text encoders, and the tokenizers of each.
CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
TOKENIZERS = {CLIP: "CLIPTokenizer", PROJECTED: "CLIPTokenizer", T5: "T5TokenizerFast"}
#: Tokens that T5 sees of a caption, in the pipeline of SD3.
T5_TOKENS = 256


class TextEncoders:
    """Captions → `Conditions`.

    Args:
        folder: of a text-conditioned model.

    Raises:
        UserError: an encoder or its tokenizer is missing or not of a known class, or no transformers.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.is_sd3 = folder.module == "SD3Transformer2DModel"
        self.is_sdxl = folder.config.get("addition_embed_type") == "text_time"
        numbers = ["", "_2", "_3"] if self.is_sd3 else ["", "_2"] if self.is_sdxl else [""]
        there = [n for n in numbers if (folder.path / f"text_encoder{n}" / "config.json").is_file()]
        needed = {"", "_2"} if self.is_sd3 else {"_2"} if self.is_sdxl else {""}
        for number in sorted(needed - set(there)):
            raise UserError(f"{folder.path} has no text_encoder{number}; expected the complete folder of a pipeline")
        self._parts = [_load(folder.path / f"text_encoder{n}", folder.path / f"tokenizer{n}") for n in there]
        self._captions = Captions(self._compute)

    def encode(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        """Conditions of captions, float32 on `device`. What is too long is cut at its end."""
        return self._captions.encode(prompts, device)

    def prepare(self, prompts: Sequence[str], device: torch.device) -> bool:
        """Encode a run's captions and let the encoders leave the device; False if they are too many to keep."""
        size = self.encode([""], device).nbytes
        distinct = list(dict.fromkeys(prompts))
        if size * (len(distinct) + 1) > conditions.KEPT:
            return False
        for start in range(0, len(distinct), conditions.BATCH):
            self.encode(distinct[start : start + conditions.BATCH], device)
        for encoder, _ in self._parts:
            encoder.to("cpu")
        return True

    @torch.no_grad()
    def _compute(self, prompts: list[str], device: torch.device) -> Conditions:
        if not self.is_sdxl and not self.is_sd3:
            return Conditions(self._encode(0, prompts, device)[0].float())
        clips = [i for i, (encoder, _) in enumerate(self._parts) if type(encoder).__name__ != T5]
        outputs = [self._encode(i, prompts, device, output_hidden_states=True) for i in clips]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
        if self.is_sdxl:
            pixels = self.folder.config["sample_size"] * self.folder.pixels_per_latent
            time_ids = tokens.new_tensor([[pixels, pixels, 0, 0, pixels, pixels]]).expand(len(prompts), -1)
            return Conditions(tokens, outputs[-1].text_embeds.float(), time_ids)
        width = self.folder.config["joint_attention_dim"]
        long = tokens.new_zeros(len(prompts), T5_TOKENS, width)
        if len(self._parts) > len(clips):
            long = self._encode(len(clips), prompts, device, T5_TOKENS)[0].float()
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1).float()
        return Conditions(torch.cat([pad(tokens, (0, width - tokens.shape[-1])), long], dim=1), pooled)

    def _encode(self, i: int, prompts: list[str], device: torch.device, length: int = 0, **options: Any) -> Any:
        """Output of the i-th encoder for tokens filled up to `length`, by default the most that it takes."""
        encoder, tokenizer = self._parts[i]
        length = length or min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = tokens["input_ids"]
        if ids.max() >= encoder.config.vocab_size:
            raise UserError(f"{self.folder.path} has a tokenizer of another text encoder; get the folder again")
        return encoder.to(device)(ids.to(device), **options)


def _load(part: Path, tokenizer_part: Path) -> tuple[Any, Any]:
    """A text encoder and its tokenizer, by transformers, which fetches nothing and executes nothing of the folder."""
    transformers: Any = need("transformers", INSTALL_TRANSFORMERS)
    names = read_json(part / "config.json").get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise UserError(f"{part} is of class {str(name)[:60]!r}; expected {', '.join(TOKENIZERS)}")
    name_of_weights = weight_files(part, TEXT_WEIGHTS)[0].name
    variant = next((v[1:] for v in VARIANTS if v and v in name_of_weights), None)
    if not tokenizer_part.is_dir():
        raise UserError(f"{tokenizer_part} is missing; expected the complete folder of a pipeline")
    transformers.utils.logging.disable_progress_bar()
    try:
        encoder, report = getattr(transformers, name).from_pretrained(
            str(part), local_files_only=True, use_safetensors=True, variant=variant, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
        tokenizer = getattr(transformers, TOKENIZERS[name]).from_pretrained(str(tokenizer_part), local_files_only=True)
    except Exception as error:  # these packages raise anything, plain Exception too
        raise UserError(
            f"{part} and {tokenizer_part.name} do not hold a usable text encoder ({first_line(error)})"
        ) from None
    missing = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise UserError(f"{part} lacks {missing[0]}; get the folder again")
    return encoder.eval().requires_grad_(False), tokenizer
