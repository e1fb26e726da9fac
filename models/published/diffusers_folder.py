"""Any pipeline folder of diffusers that holds a denoiser of a known class: what it is, and its weights.

    model_index.json                                  which pipeline (not needed)
    unet/ or transformer/   config.json, diffusion_pytorch_model.safetensors
    scheduler/              scheduler_config.json     what the network predicts, and its noise levels
    vae/, text_encoder*/, tokenizer*/                 of models in a latent space, and with text

Folders of a single network are flat: its files and scheduler_config.json lie beside each other. Everything is JSON and
safetensors; nothing is executed, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dnnlib import UserError, first_line, sha256_of
from torch_utils.checkpoint import check_state_dict, read_tensor

from ..building import buildable
from ..diffusers_precond import DiffusersPrecond
from ..networks.diffusers_modules import FAMILIES, Family, check_config, get_family, import_diffusers
from .diffusers import read_json
from .state_dicts import new_name

NETWORK_WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model", "model"
#: Whole weights, and those in half precision.
VARIANTS = ("", ".fp16", ".bf16")
#: Written by this program beside what it exports.
EXPORTED = "sfd.json"
#: Schedulers with a table of noise levels, and those of flow matching.
TABLES = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
TABLE_SETTINGS = (
    "prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
    "rescale_betas_zero_snr",
)  # fmt: skip
#: What a class was called before.
OLD_CLASSES = {"Transformer2DModel": "DiTTransformer2DModel"}


@dataclass(frozen=True)
class Folder:
    """What a folder holds, by its configurations alone.

    Attributes:
        path: the folder.
        module: class of its network, one of `FAMILIES`.
        config: the network's configuration.
        part: where the network's files are.
    """

    path: Path
    module: str
    config: Mapping[str, Any]
    part: Path

    @property
    def family(self) -> Family:
        return FAMILIES[self.module]

    @property
    def is_latent(self) -> bool:
        """Whether its network works on latents of an autoencoder."""
        return (self.path / "vae" / "config.json").is_file()

    @property
    def guidance_rate(self) -> float:
        """What its pipeline guides with unless told otherwise."""
        return 5.0 if self.config.get("addition_embed_type") == "text_time" else self.family.guidance_rate

    @property
    def pixels_per_latent(self) -> int:
        """Size of a pixel of latents in pixels of the image."""
        return 2 ** (len(read_json(self.path / "vae" / "config.json").get("block_out_channels", [0])) - 1)

    def index(self) -> dict[str, Any]:
        """What it says of its pipeline."""
        path = self.path / "model_index.json"
        return read_json(path) if path.is_file() else {}


def open_folder(path: str | Path) -> Folder:
    """What the folder holds; its weights are not read, and the package is not needed.

    Raises:
        UserError: no denoiser of a known class.
    """
    path = Path(path)
    if (path / EXPORTED).is_file():
        raise UserError(
            f"{path} was exported from a student, for its own steps alone; give the student's file, or its teacher's"
        )
    parts = [path / part for part in ("unet", "transformer") if (path / part / "config.json").is_file()] or [path]
    file = parts[0] / "config.json"
    config = read_json(file)
    module = config.get("_class_name")
    if str(module) in OLD_CLASSES and config.get("norm_type") == "ada_norm_zero":
        module = OLD_CLASSES[str(module)]
    check_config(get_family(module, str(file)), config, str(file))
    return Folder(path, str(module), {k: v for k, v in config.items() if not k.startswith("_")}, parts[0])


def read_noise(folder: Folder) -> dict[str, Any]:
    """What the folder's scheduler says of prediction and noise levels, as `DiffusersPrecond` takes it.

    Raises:
        UserError: no scheduler, one of an unknown class, or of another kind than the network.
    """
    places = (folder.path / "scheduler", folder.path, folder.part)
    files = [place / "scheduler_config.json" for place in places if (place / "scheduler_config.json").is_file()]
    if not files:
        raise UserError(
            f"{folder.path} holds no scheduler/scheduler_config.json, which tells the noise levels; "
            "expected the folder of a whole pipeline"
        )
    config = read_json(files[0])
    name = config.get("_class_name")
    if name not in TABLES + FLOWS:
        raise UserError(f"{files[0]} is of class {str(name)[:60]!r}; expected one of {', '.join(TABLES + FLOWS)}")
    if folder.family.flow != (name in FLOWS):
        raise UserError(
            f"{files[0]} is a {name}, which does not belong to a {folder.module}; get the folder of one model"
        )
    defaults = inspect.signature(getattr(import_diffusers(), name)).parameters

    def setting(key: str) -> Any:
        return config.get(key, defaults[key].default if key in defaults else None)

    if name in FLOWS:
        if setting("use_dynamic_shifting"):
            raise UserError(f"{files[0]} says use_dynamic_shifting, a shift that depends on the image size; set shift")
        return {"prediction_type": "flow", **{key: setting(key) for key in ("num_train_timesteps", "shift")}}
    if setting("use_flow_sigmas"):
        raise UserError(f"{files[0]} says use_flow_sigmas, which does not belong to a {folder.module}")
    return {key: setting(key) for key in TABLE_SETTINGS}


def read_denoiser(folder: Folder) -> DiffusersPrecond:
    """The folder's network with its weights, in eval mode without gradients.

    Raises:
        UserError: scheduler or weights that do not fit, or the package is missing.
    """
    noise = read_noise(folder)
    with buildable(folder.part), torch.device("meta"):
        net = DiffusersPrecond(folder.module, folder.config, noise, latent=folder.is_latent)
    load_weights(net.model.net, folder.part)
    return net.eval().requires_grad_(False)


def folder_digest(path: Path) -> str:
    """SHA-256 over the weights of all components."""
    parts = sorted({path, *(file.parent for file in path.glob("*/config.json"))})
    files = [file for part in parts for pattern in ("*.safetensors", "*.bin") for file in sorted(part.glob(pattern))]
    return hashlib.sha256("\n".join(map(sha256_of, files)).encode()).hexdigest()


def load_weights(module: torch.nn.Module, part: Path) -> None:
    """Fill a module of diffusers, made on the meta device, with the float32 weights of a component.

    Raises:
        UserError: no safetensors, or weights of another network.
    """
    expected = module.state_dict()
    tensors = {name if name in expected else new_name(name): t for name, t in read_weights(part).items()}
    check_state_dict(expected, tensors, part)
    module.load_state_dict(tensors, assign=True)


def read_weights(part: Path) -> dict[str, Tensor]:
    """All tensors of a component, as float32: of one file, of a half-precision variant, or of several shards."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(part):
        try:
            with safe_open(str(file), framework="pt", device="cpu") as opened:
                tensors |= {name: read_tensor(file, opened, name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)}); get the folder again") from None
    return tensors


def weight_files(part: Path, stem: str = NETWORK_WEIGHTS) -> list[Path]:
    """The files with a component's weights.

    Raises:
        UserError: none in safetensors.
    """
    for variant in VARIANTS:
        single = part / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = part / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _shards(part, index)
    others = sorted(p.name for p in part.glob("*.bin")) if part.is_dir() else []
    if others:
        raise UserError(
            f"{part} holds {others[0]}, a pickle, but no {stem}.safetensors; convert it where you trust it: load it "
            "with diffusers, then save_pretrained(…, safe_serialization=True)"
        )
    variants = sorted(p.name for p in part.glob(f"{stem}.*.safetensors"))
    instead = f", but {variants[0]}, another variant" if variants else ""
    raise UserError(f"{part} holds no {stem}.safetensors{instead}; expected a complete folder of diffusers")


def _shards(part: Path, index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names.values()
    ):
        raise UserError(f"{index} does not list files of weights; get the folder again")
    files = [part / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{part} lacks {missing[0]}, one of {len(files)} files of its weights; get the folder again")
    return files
