"""Captions to conditions: the text model of CLIP ViT-L/14 (Radford et al. 2021, arXiv 2103.00020), by transformers.

Stable Diffusion is conditioned on the last hidden state, after the final layer norm, of all 77 tokens: begin, caption,
end, then the end token again as padding, which is not masked. The weights lie in its checkpoint; the tokenizer's files
are those of the directory `SFD_CLIP_TOKENIZER`, else of the folder that the weights lie in, if it is one of diffusers;
else they are fetched to `clip-vit-large-patch14/` in the cache directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError, first_line, need
from dnnlib.download import HUB, cache_dir, fetch
from torch_utils.checkpoint import PathLike, check_state_dict

from ..conditions import Captions, Conditions

#: Its authors give no checksums.
CLIP = "clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
#: Those without which there is no tokenizer; the other two repeat what transformers takes for granted.
NEEDED_FILES = TOKENIZER_FILES[:2]
#: transformers' names for the sizes of the text model of CLIP ViT-L/14.
VIT_L_14: dict[str, Any] = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    bos_token_id=49406,
    eos_token_id=49407,
)
INSTALL_TRANSFORMERS = "pip install transformers"
PREFIX = "transformer.text_model."
POSITIONS = f"{PREFIX}embeddings.position_ids"


class TextEncoder:
    """Captions → what the U-Net of Stable Diffusion is conditioned on.

    Args:
        tensors: everything below `cond_stage_model.` in a checkpoint, under the rest of its name
            (`transformer.text_model.…`); half precision is taken too.
        device: where to compute.
        config: sizes under transformers' names; None is CLIP ViT-L/14.
        source: the checkpoint, or the folder of diffusers that the tensors are from.

    Attributes:
        tokens, width: `encode` gives `[n, tokens, width]`.

    Raises:
        UserError: tensors of another network, no tokenizer, or no transformers.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device | str,
        config: Mapping[str, Any] | None = None,
        source: PathLike = "the checkpoint",
    ) -> None:
        self.device = torch.device(device)
        self._network = _build(tensors, config or VIT_L_14, source).to(self.device)
        sizes = self._network.config
        self.tokens, self.width = sizes.max_position_embeddings, sizes.hidden_size
        self._tokenizer = _read_tokenizer(find_tokenizer(source), sizes.vocab_size)
        self._captions = Captions(lambda part, device: Conditions(self._compute(part)))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditions `[len(prompts), tokens, width]`, float32 on the device. What is too long is cut at its end."""
        return self._captions.encode(prompts, self.device).tokens

    @torch.no_grad()
    def _compute(self, prompts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        return self._network(input_ids=tokens["input_ids"].to(self.device)).last_hidden_state.float()


def _build(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: PathLike) -> Any:
    """transformers' text model with these weights, every name and shape checked, in eval mode without gradients."""
    transformers: Any = need("transformers", INSTALL_TRANSFORMERS)
    with torch.device("meta"):
        network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    # Releases of transformers differ in whether the published `text_model.` is part of their names, and whether
    # positions (0, 1, 2, …) are; files may lack the positions, or hold them as floating point.
    state = {PREFIX + name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}
    own = dict(zip(state, network.state_dict()))
    expected = {name: tensor for name, tensor in state.items() if name != POSITIONS}
    found = {name: tensor for name, tensor in tensors.items() if name != POSITIONS}
    check_state_dict(expected, found, source)
    network.load_state_dict({own[name]: tensor.float() for name, tensor in found.items()}, strict=False, assign=True)
    embeddings = next(module for name, module in network.named_modules() if name.endswith("embeddings"))
    positions = torch.arange(network.config.max_position_embeddings)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    return network.eval().requires_grad_(False)


def find_tokenizer(source: PathLike | None = None) -> Path:
    """The directory with the tokenizer's files: `SFD_CLIP_TOKENIZER`, that of `source`, or fetched if need be.

    Args:
        source: what the model is read from, which may be a folder of diffusers.

    Raises:
        UserError: a file is not there, nor to be had.
    """
    own = os.environ.get("SFD_CLIP_TOKENIZER")
    if not own:
        if source is not None and all((Path(source) / "tokenizer" / name).is_file() for name in NEEDED_FILES):
            return Path(source) / "tokenizer"
        return fetch_clip(TOKENIZER_FILES)
    missing = [name for name in NEEDED_FILES if not (Path(own) / name).is_file()]
    if missing:
        raise UserError(
            f"SFD_CLIP_TOKENIZER={own} does not hold {' and '.join(missing)}; "
            f"expected a directory with the tokenizer of openai/{CLIP}"
        )
    return Path(own)


def fetch_clip(names: Sequence[str]) -> Path:
    """The folder of CLIP ViT-L/14 in the cache directory, these files of it fetched where they are not there."""
    folder = cache_dir() / CLIP
    for name in names:
        fetch([f"{HUB}openai/{CLIP}/resolve/main/{name}"], folder / name)
    return folder


def _read_tokenizer(folder: Path, vocab_size: int) -> Any:
    transformers: Any = need("transformers", INSTALL_TRANSFORMERS)
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{folder} does not hold a usable tokenizer ({first_line(error)}); expected that of openai/{CLIP}"
        ) from None
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has a token {highest}, the text model {vocab_size} tokens; "
            f"expected the tokenizer of openai/{CLIP}"
        )
    return tokenizer
