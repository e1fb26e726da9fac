"""Files as other people publish them: pickles of EDM networks, as by NVlabs/edm, edm2 and the reference SFD code.

They are made from this project's own networks. Modules of foreign classes stand in for them while `pickle` writes or
reads a file; these classes exist only that long.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from models import EDM2Precond, EDMPrecond

#: Classes of EDM2 that have other names here.
PUBLISHED_NAMES = {"EDM2Precond": "Precond", "EDM2UNet": "UNet", "EDM2Block": "Block"}
#: Attributes of our modules that the published ones do not have, and that could not be pickled (functions).
OWN_ATTRIBUTES = ("compute_dtype", "init_kwargs", "_block", "_resampling", "_is_box")


class Persistent:
    """Pickles as an instance of a class of EDM: a call of the persistence hook with source text and state."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str) -> None:
        self.meta = dict(type="class", version=6, module_src=source, class_name=class_name, state=state)

    def __reduce__(self) -> tuple:
        return (sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None)


@contextmanager
def foreign_names() -> Iterator[dict[str, type]]:
    """Let `pickle` find the modules that published files refer to; yields the reference's classes by name."""

    def _reconstruct_persistent_obj(meta: dict) -> None:
        """EDM's runs the source text in `meta`."""

    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    networks = "EDMPrecond VPPrecond CFGPrecond SongUNet DhariwalUNet UNetBlock"
    layers = "Conv2d Linear GroupNorm PositionalEmbedding FourierEmbedding"
    names = [*networks.split(), *layers.split()]
    classes = {name: type(name, (nn.Module,), {"__module__": "models.networks_edm"}) for name in names}
    classes["QKV"] = classes["Conv2d"]  # ours alone; in published files it is a convolution
    easy_dict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    contents = {
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "models.networks_edm": {**{name: classes[name] for name in names}, "torch": torch},
        "dnnlib.util": {"EasyDict": easy_dict},
    }
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    for name, content in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield {**classes, "EasyDict": easy_dict}
    finally:
        for name in contents:
            del sys.modules[name]


def published_state(module: nn.Module, convert: Any) -> dict[str, Any]:
    """A module's `__dict__` with its children converted, as in the published classes."""
    state = {name: value for name, value in vars(module).items() if name not in OWN_ATTRIBUTES}
    state["_modules"] = {name: None if child is None else convert(child) for name, child in module._modules.items()}
    if "skip_scale" in state:
        state["skip_scale"] = np.sqrt(0.5) if state["skip_scale"] != 1 else 1.0
    return state


def module_dict(module: nn.ModuleDict, convert: Any) -> nn.ModuleDict:
    """A real `ModuleDict`, which pickles under torch's name."""
    copy = nn.ModuleDict()
    vars(copy).update(published_state(module, convert))
    return copy


def write_edm_pickle(
    path: Path,
    net: EDMPrecond | EDM2Precond,
    kwargs: dict[str, Any],
    args: tuple = (),
    source: str = "",
    class_name: str | None = None,
    protocol: int = 4,
    key: str = "ema",
    attributes: dict[str, Any] | None = None,
    **extra: Any,
) -> Path:
    """The layout of NVlabs/edm and edm2; `kwargs` and `args` are the recorded constructor arguments.

    `attributes` are set on the network, which is at `key`.
    """

    def convert(module: nn.Module) -> Any:
        if isinstance(module, nn.ModuleDict):
            return module_dict(module, convert)
        state = published_state(module, convert)
        state.update(_init_args=args if module is net else (), _init_kwargs=kwargs if module is net else {})
        state.update((attributes or {}) if module is net else {})
        own_name = type(module).__name__
        chosen = class_name if module is net and class_name is not None else PUBLISHED_NAMES.get(own_name, own_name)
        return Persistent(chosen, state, source)

    with foreign_names() as classes:
        content = {
            key: convert(net),
            "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}, source),
            "augment_pipe": Persistent("AugmentPipe", {"p": np.float32(0.12)}, source),
            "dataset_kwargs": classes["EasyDict"](class_name="training.dataset.ImageFolderDataset", path="cifar10.zip"),
            **extra,
        }
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_edm2_pickle(
    path: Path, net: EDM2Precond, kwargs: dict[str, Any], latents: tuple | None = None, **extra: Any
) -> Path:
    """The layout of NVlabs/edm2: float16 tensors and the encoder, with the scale and bias of `latents`, if any."""
    recorded: dict[str, Any] = dict(_init_args=(), _init_kwargs={})
    encoder = Persistent("StandardRGBEncoder", recorded, "")
    if latents is not None:
        scale, bias = (np.array(values, np.float32) for values in latents)
        state = dict(vae_name="stabilityai/sd-vae-ft-mse", scale=scale, bias=bias, batch_size=8, _vae=None)
        encoder = Persistent("StabilityVAEEncoder", {**recorded, **state}, "")
    half = copy.deepcopy(net).requires_grad_(False).to(torch.float16)
    return write_edm_pickle(path, half, kwargs, **{"encoder": encoder, **extra})


def write_reference_student(
    path: Path,
    net: EDMPrecond,
    training_kwargs: dict[str, Any],
    beside: bool = False,
    class_name: str = "EDMPrecond",
    protocol: int = 4,
    **attributes: Any,
) -> Path:
    """The layout of the reference's students: plain modules; the settings on the network, or `beside` it.

    `attributes` are set on the network too.
    """
    with foreign_names() as classes:

        def convert(module: nn.Module) -> Any:
            if isinstance(module, nn.ModuleDict):
                return module_dict(module, convert)
            instance = classes[class_name if module is net else type(module).__name__]()
            vars(instance).update(published_state(module, convert))
            return instance

        model = convert(net)
        vars(model).update(attributes)
        content = {"model": model}
        (content if beside else vars(model))["training_kwargs"] = classes["EasyDict"](training_kwargs)
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def randomised(net: EDMPrecond, seed: int = 0) -> EDMPrecond:
    """`net` with no parameter left at zero, so that outputs depend on all of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return net.eval().requires_grad_(False)
