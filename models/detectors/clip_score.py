"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well images show what their captions say,

    score = 100 · E max(cos(f(image), g(caption)), 0)

with the image and text embeddings f and g of a CLIP model, which transformers computes. As torchmetrics scales it; a
hundredth of it is the cosine that others report. The paper's own number is 2.5 hundredths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib import UserError, first_line, need, sha256_of

from ..networks.clip_text import CLIP, INSTALL_TRANSFORMERS, TOKENIZER_FILES, fetch_clip

#: The model whose text side conditions Stable Diffusion.
DEFAULT = CLIP
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "config.json", "preprocessor_config.json", *TOKENIZER_FILES)


class ClipScorer:
    """Images and captions → cosines.

    Args:
        model: `DEFAULT`, which is fetched once, or a folder in the layout of transformers with `model.safetensors`.
        device: where to compute.

    Raises:
        UserError: no such model, another one, no safetensors, or no transformers.
    """

    def __init__(self, model: str, device: torch.device | str) -> None:
        need("transformers", INSTALL_TRANSFORMERS)
        folder = fetch_clip(FILES) if model == DEFAULT else Path(model)
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} holds no {WEIGHTS}; expected {DEFAULT}, or a folder of a CLIP model", "model")
        self.name, self.sha256, self.device = folder.resolve().name, sha256_of(folder / WEIGHTS), torch.device(device)
        self._model, self._tokenizer, self._processor = _load(folder)
        self._model.to(self.device)

    @torch.no_grad()
    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Of each image with its caption, float32 `[B]` on the CPU; a caption longer than the model takes is cut.

        Args:
            images: uint8 `[B, 1 or 3, H, W]`.
            captions: one for each.
        """
        pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        pixels = self._processor(list(pictures), return_tensors="pt")["pixel_values"]
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(captions), padding="max_length", truncation=True, max_length=length,
                                 return_tensors="pt")  # fmt: skip
        given = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        found = self._model(pixel_values=pixels.to(self.device), **given)
        return torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds, dim=1).cpu()


def clip_score(cosines: np.ndarray) -> tuple[float, float]:
    """The score of images with these cosines `[N]`, and its standard error."""
    scores = 100 * np.maximum(cosines.astype(np.float64), 0)
    return float(scores.mean()), float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else 0.0


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor, by transformers; nothing is fetched, and nothing of the folder executed."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Releases since 5 ask for torchvision unless they are told to work with Pillow, as earlier ones do.
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    try:
        model, report = transformers.CLIPModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        process = processor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # these packages raise anything, plain Exception too
        raise UserError(f"{folder} does not hold a usable CLIP model ({first_line(error)})", "model") from None
    missing = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}; expected the weights of a whole CLIP model", "model")
    return model.eval().requires_grad_(False), tokenizer, process
