"""Other people's implementations, and tiny teachers in files of the layout in which other people published theirs."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from golden_files import Golden
from torch import Tensor

from models.networks.autoencoders import AUTOENCODERS
from models.noise import DiscreteNoise
from models.precond import PRECONDITIONERS
from models.registry import CAPTIONS_URL, ROWS

UNET = dict(model_channels=32, num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[2])
STAGE = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], resolution=16, in_channels=3, out_ch=3)
LDM_CONFIG = {
    "network": dict(**{"class": "CFGPrecond"}, img_resolution=8, img_channels=3, linear_start=0.0015, linear_end=0.0195,
                    attention_type="legacy", num_head_channels=16, **UNET),
    "first_stage": dict(**{"class": "VQAutoencoder"}, scale_factor=1.0, embed_dim=3, n_embed=64, z_channels=3, **STAGE),
}  # fmt: skip
#: As models/configs/*.yaml, with tiny networks.
CONFIGS: dict[str, dict[str, Any]] = {
    "lsun_bedroom": {
        "network": dict(**{"class": "ConsistencyPrecond"}, img_resolution=8, img_channels=3, attention_type="flash",
                        num_head_channels=16, resblock_updown=True, dropout=0.1, **UNET),
    },
    "lsun_cat": {
        "network": dict(**{"class": "ConsistencyPrecond"}, img_resolution=8, img_channels=3, attention_type="flash",
                        num_head_channels=16, resblock_updown=True, dropout=0.1, **UNET),
    },
    "imagenet64_cm": {
        "network": dict(**{"class": "ConsistencyPrecond"}, img_resolution=8, img_channels=3, label_dim=1000,
                        attention_type="flash", num_head_channels=16, resblock_updown=True, use_scale_shift_norm=True,
                        dropout=0.1, **UNET),
    },
    **{name: {"network": dict(**{"class": "ADMPrecond"}, img_resolution=8, img_channels=3, label_dim=label_dim,
                              attention_type="legacy", num_head_channels=16, resblock_updown=True,
                              use_scale_shift_norm=True, **UNET)}
       for name, label_dim in (("imagenet256_adm", 1000), ("imagenet256_adm_uncond", 0))},
    "lsun_bedroom_ldm": LDM_CONFIG,
    "ffhq_ldm": LDM_CONFIG,
    "ms_coco": {
        "network": dict(**{"class": "CFGPrecond"}, img_resolution=8, img_channels=4, linear_start=0.00085,
                        linear_end=0.012, attention_type="transformer", num_heads=4, context_dim=32, **UNET),
        "first_stage": dict(**{"class": "KLAutoencoder"}, scale_factor=0.18215, embed_dim=4, z_channels=4, **STAGE),
        "text": Golden("clip_text").meta["net"],
    },
}  # fmt: skip
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
CAPTIONS = [f"a cat, {letter}" for letter in "abcdefghij"] + ["dog; 'x'"]


def published(module: str) -> ModuleType:
    """The module; the test is skipped where it, or what it needs (torchvision), is absent or does not fit torch."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{module} cannot be imported ({str(error).splitlines()[0][:80]})")


# --- Files in the published layout -----------------------------------------------------------------------------------


def random_state(module: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights everywhere: fresh networks end in zeros."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: 1 + 0.1 * torch.randn(t.shape, generator=rng) if t.ndim == 1 and name.endswith("weight")
        else torch.randn(t.shape, generator=rng) * (0.6 / max(t[0].numel(), 1) ** 0.5 if t.ndim > 1 else 0.05)
        for name, t in module.state_dict().items()
    }  # fmt: skip


def build(spec: dict[str, Any], classes: dict[str, Any]) -> torch.nn.Module:
    return classes[spec["class"]](**{k: v for k, v in spec.items() if k not in ("class", "scale_factor")})


def unet_state(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the tiny network of a data set, under the names of its U-Net."""
    return random_state(build(CONFIGS[name]["network"], PRECONDITIONERS).model, seed)


def latent_checkpoint(name: str, with_average: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint of latent-diffusion: two sets of weights that differ, if there is an average."""
    config = CONFIGS[name]
    state = {f"model.diffusion_model.{k}": v for k, v in unet_state(name).items()}
    if with_average:
        state |= {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in unet_state(name, 1).items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    stage = random_state(build(config["first_stage"], AUTOENCODERS), 2)
    state |= {f"first_stage_model.{k}": v for k, v in stage.items()}
    noise = DiscreteNoise(config["network"]["linear_start"], config["network"]["linear_end"], 1000)
    state |= {key: torch.zeros(1000) for key in SCHEDULE} | {"alphas_cumprod": noise.alphas_cumprod.float()}
    if "text" in config:
        text = Golden("clip_text").weights("net")
        state |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
        positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        state[positions] = torch.arange(config["text"]["max_position_embeddings"])[None]
    return state


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.4.2", "state_dict": state, "callbacks": {}}


def write_published(name: str, cache: Path, state: dict[str, Tensor] | None = None) -> Path:
    """The tiny teacher of a data set as the file that is published for it, below the cache directory."""
    row = ROWS[name]
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / row.sources[0].rsplit("/", 1)[1]
    if row.loader == "state-dict":
        torch.save(unet_state(name) if state is None else state, path)
        return path
    state = latent_checkpoint(name, with_average=row.loader == "latent-diffusion") if state is None else state
    if row.member is None:
        torch.save(lightning(state), path)
        return path
    torch.save(lightning(state), folder / "unzipped")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "unzipped", row.member)
    (folder / "unzipped").unlink()
    return path


def write_captions(cache: Path) -> Path:
    path = cache / "ms_coco" / CAPTIONS_URL.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["", "image_id", "text"])
        rows.writerows([i, 100 + i, caption] for i, caption in enumerate(CAPTIONS))
    return path


@contextlib.contextmanager
def known_as_published(name: str, cache: Path) -> Iterator[None]:
    """Within this context, the registry expects the tiny teacher, below `cache`, and nothing is downloaded."""
    config = cache / f"{name}.yaml"
    config.write_text(json.dumps(CONFIGS[name]))  # YAML holds JSON
    size = {"resolution": 8} if ROWS[name].codec is None else {"resolution": 16, "latent_resolution": 8}
    row = replace(ROWS[name], config=str(config), sha256=None, **size)
    environment = {"SFD_CACHE": str(cache), "SFD_OFFLINE": "1", "SFD_CLIP_TOKENIZER": str(cache / "tokenizer")}
    with mock.patch.dict(ROWS, {name: row}), mock.patch.dict(os.environ, environment):
        yield
