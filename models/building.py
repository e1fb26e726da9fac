"""From a description to a network: its class and constructor arguments, as files and `models/configs` hold them.

A description comes from a file that anybody may have made, so it is checked before anything is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError, first_line, need
from torch_utils.checkpoint import check_state_dict, read_settings

from .diffusers_precond import DiffusersPrecond
from .networks.edm2_unet import EDM2UNet
from .networks.guided_unet import GuidedUNet
from .precond import NETWORKS, PRECONDITIONERS, EDM2Precond, EDMPrecond, Precond
from .registry import DatasetSpec

#: The denoisers that a file may describe.
DENOISERS: dict[str, type[Precond]] = {**PRECONDITIONERS, DiffusersPrecond.__name__: DiffusersPrecond}

CONFIGS = Path(__file__).parent / "configs"

#: Ranges of numbers in a network's description: outside, it would take for ever to build, or mean nothing. Where the
#: lower end is an integer, the number is one.
RANGES = {
    "sigma_data": (1e-6, 1e3), "dropout": (0.0, 1), "label_dropout": (0.0, 1), "linear_start": (1e-8, 0.999),
    "linear_end": (1e-8, 0.999), "timesteps": (2, 100_000), "num_res_blocks": (1, 16), "transformer_depth": (1, 16),
    "img_resolution": (1, 1 << 14), "img_channels": (1, 1 << 12), "label_dim": (0, 1_000_000), "num_blocks": (1, 64),
    "model_channels": (1, 1 << 14), "label_balance": (0.0, 1), "concat_balance": (0.0, 1), "res_balance": (0.0, 1),
    "attn_balance": (0.0, 1), "clip_act": (1e-3, 1e9),
}  # fmt: skip


def build_network(spec: dict[str, Any], tensors: dict[str, Tensor], source: str) -> Precond:
    """The network that `spec` (`class` and constructor arguments) describes, with `tensors` as its weights.

    It is built without memory first, so that a file whose settings ask for more than its tensors hold is refused
    before anything is allocated.
    """
    net = describe_network(spec, source)
    check_state_dict(net.state_dict(), tensors, source)
    net.load_state_dict(tensors, assign=True)
    return net.eval()


def describe_network(spec: Mapping[str, Any], source: str) -> Precond:
    """The network on the meta device; a description that is none is one clear line."""
    arguments = {name: value for name, value in spec.items() if name != "class"}
    name = spec.get("class")
    if not isinstance(name, str) or name not in DENOISERS:
        raise UserError(
            f"{source} holds a network of class {first_line(repr(name), 40)}; expected {', '.join(DENOISERS)}"
        )
    _check_arguments(DENOISERS[name], arguments, source)
    with buildable(source), torch.device("meta"):
        try:
            return DENOISERS[name](**arguments)
        except UserError as error:
            raise UserError(f"{source} describes a network that is not covered: {error.message}") from None


@contextmanager
def buildable(source: str | Path) -> Iterator[None]:
    """Within, a description that nothing can be built from is one clear line."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise UserError(f"{source} describes a network that cannot be built ({first_line(error)})") from None


def _check_arguments(cls: type[Precond], arguments: dict[str, Any], source: str) -> None:
    """Refuse unknown arguments, and counts that would take for ever to build."""
    known = set(inspect.signature(cls).parameters)
    raw = {EDMPrecond: tuple(NETWORKS.values()), EDM2Precond: (EDM2UNet,)}
    for network in raw.get(cls, (GuidedUNet,)):
        known |= set(inspect.signature(network).parameters)
    unknown = set(arguments) - known
    if unknown:
        names = first_line(", ".join(sorted(unknown)))
        raise UserError(f"{source} describes a network with unknown arguments: {names}")
    for name, (lowest, highest) in RANGES.items():
        value = arguments.get(name, lowest)
        types = (int,) if isinstance(lowest, int) else (int, float)
        if type(value) not in types or not lowest <= value <= highest:
            found = first_line(repr(value), 60)
            raise UserError(f"{source} describes a network with {name} {found}; expected {lowest:g} to {highest:g}")
    levels = arguments.get("channel_mult", [])
    if not isinstance(levels, (list, tuple)) or len(levels) > 16:
        found = first_line(repr(levels), 60)
        raise UserError(f"{source} describes a network with channel_mult {found}; expected a list of up to 16 numbers")


def network_spec(net: Precond) -> dict[str, Any]:
    """What `build_network` needs to know besides the weights."""
    return {"class": type(net).__name__, **net.init_kwargs}


def read_config(name: str) -> dict[str, Any]:
    """What `models/configs/NAME.yaml` (or a YAML file elsewhere) says of a published model.

    `network` is the network's class and constructor arguments; latent models have `first_stage` too.
    """
    yaml: Any = need("omegaconf", "pip install omegaconf").OmegaConf
    path = CONFIGS / name
    config: Any = yaml.to_container(yaml.load(path if path.suffix else path.with_suffix(".yaml")), resolve=True)
    return config


def row_config(row: DatasetSpec) -> dict[str, Any]:
    """What `models/configs` says of a row whose file does not describe itself."""
    if row.config is None:
        raise ValueError(f"{row.name} has no file in models/configs")
    config = read_config(row.config)
    return {**config, "network": config["network"] | row.network}


def build_on_meta(row: DatasetSpec) -> Precond:
    """The network of a row without memory: names, shapes and operations, no values."""
    spec = (read_settings(row.path) if row.config is None else row_config(row))["network"]
    return describe_network(spec, row.name)


def highest_sigma(row: DatasetSpec, net: Precond) -> float:
    """Where sampling starts: the row's σ_max or, where it has none, the largest noise level that its network knows."""
    if row.sigma_max is not None:
        return row.sigma_max
    if net.noise_schedule is None:
        raise ValueError(f"{row.name} has neither a sigma_max nor a noise schedule")
    return net.noise_schedule.sigma_max
