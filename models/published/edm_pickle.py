"""EDM networks from pickles that other people publish, read without executing anything.

EDM's files carry Python source that unpickling would run. `pickle_machine` interprets them instead; a global is looked
up in two tables, and any that is not there is refused by name.

Three layouts are read:

- NVlabs/edm: `{'ema': net, ...}`, the network an `EDMPrecond` around a `SongUNet` or a `DhariwalUNet`. Every EDM class
  is pickled as a call of `_reconstruct_persistent_obj` with one dict of source text (never looked at), class name and
  instance `__dict__`; the constructor arguments are recorded.
- NVlabs/edm2: the same, the network a `Precond` around a `UNet` in float16, here `EDM2Precond`; `encoder` says whether
  its states are pixels, or latents and how these were scaled.
- students of the reference SFD code: `{'model': net, ...}` with plain instances of the classes in
  `models.networks_edm`, and the settings of the training in `training_kwargs`, on the network or beside it. Where no
  constructor arguments are recorded, attributes and the tensors' names and shapes tell them.
"""

from __future__ import annotations

import os
import pickle  # names of opcodes only
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dnnlib import UserError

from ..latent import LatentScale
from .pickle_globals import FUNCTIONS, NUMPY_ARRAY, STORAGE_DTYPES, refuse_global
from .pickle_machine import Machine, map_file
from .pickle_records import ArrayRecord, Budget, ClassRecord, NotPlain, ObjectRecord, Refused, TensorRecord, shown

MAX_DEPTH = 16
MAX_NAME = 300
SHARED_ARGUMENTS = ["img_resolution", "img_channels", "label_dim", "use_fp16"]
#: Arguments of the networks in their order, for files that record some by position.
PRECOND_ARGUMENTS = {
    "EDMPrecond": [*SHARED_ARGUMENTS, "sigma_min", "sigma_max", "sigma_data", "model_type"],
    "EDM2Precond": [*SHARED_ARGUMENTS, "sigma_data", "logvar_channels"],
}
UNREADABLE_PRECONDS = ("VPPrecond", "VEPrecond", "iDDPMPrecond")
#: Published classes of networks: what each is called here, where its U-Net is, and of which classes that may be.
LAYOUTS = {
    "EDMPrecond": ("EDMPrecond", "model", ("SongUNet", "DhariwalUNet")),
    "Precond": ("EDM2Precond", "unet", ("UNet",)),
}
#: The one autoencoder whose latents published networks of EDM2 take.
STABILITY_VAE = "stabilityai/sd-vae-ft-mse"


@dataclass(frozen=True)
class EDMPickle:
    """A network as its file describes it.

    Attributes:
        class_name: class of the network here, `EDMPrecond` or `EDM2Precond`.
        init_kwargs: its constructor arguments by name: numbers, strings, bools, None, lists and dicts of these. They
            are the file's claim: names and sizes are for the builder to check, before it allocates.
        state_dict: float32 tensors on the CPU under their published names, in the order of `Module.state_dict`.
        training_kwargs: settings of a student of the reference, as far as they are plain values; else None.
        key: where in the file the network was, `ema` or `model`.
        latents: how states were scaled, of a network on the latents of Stability's autoencoder; None for pixels.
    """

    class_name: str
    init_kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]
    training_kwargs: dict[str, Any] | None
    key: str
    latents: LatentScale | None = None

    @property
    def is_student(self) -> bool:
        """Whether it was distilled: settings of such a training come with it."""
        return self.training_kwargs is not None


def read_edm_pickle(path: str | os.PathLike) -> EDMPickle:
    """Read the network in a pickle of NVlabs/edm, edm2 or the reference SFD code; nothing in it is executed.

    Raises:
        UserError: no such file, a file of another kind, one that is damaged, or one that wants to run code.
    """
    try:
        data = map_file(path, "the pickle of an EDM network")
        if data[:1] != pickle.PROTO:
            raise Refused("is not a pickle (protocol 2 or later); expected the pickle of an EDM network")
        budget = Budget()
        content = Machine(data, 0, budget, _find_global).load()
        return _describe(content, budget, max_bytes=len(data))
    except Refused as error:
        raise UserError(f"{path} {error}") from None


# ------------------------------------------------------------------------------------------------------------------
# Globals

_CLASSES = {
    "dnnlib.util": {"EasyDict"},
    "models.networks_edm": {
        *("EDMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock", "Conv2d", "Linear", "GroupNorm"),
        *("PositionalEmbedding", "FourierEmbedding", *UNREADABLE_PRECONDS),
    },
}
_TORCH_MODULE = re.compile(r"torch\.nn\.modules\.[a-z]+")
_DTYPES = {str(dtype).split(".")[1] for dtype in STORAGE_DTYPES.values()}


def _find_global(module: str, name: str) -> Any:
    if (module, name) in FUNCTIONS:
        return FUNCTIONS[module, name]
    if name in _CLASSES.get(module, ()) or (_TORCH_MODULE.fullmatch(module) and name.isidentifier()):
        return ClassRecord(module, name)
    if (module, name) == NUMPY_ARRAY:
        return ClassRecord(module, name)
    if module == "torch" and name in _DTYPES:
        return f"torch.{name}"
    if (module, name) == ("models.networks_edm", "CFGPrecond"):
        raise Refused("holds a CFGPrecond, a student on latents; of the reference's students, EDMPrecond is read")
    raise refuse_global(module, name)


def _describe(content: Any, budget: Budget, max_bytes: int) -> EDMPickle:
    if type(content) is not dict:
        raise Refused("does not hold a dict with a network under 'ema' or 'model'")
    key = next((key for key in ("ema", "model") if key in content), None)
    if key is None:
        raise Refused(f"holds no network under 'ema' or 'model' but {shown(', '.join(content) or 'nothing')}")
    net = content[key]
    class_name, unet = _check_classes(net, key)
    state_dict = _state_dict(net, max_bytes)
    arguments = _recorded_arguments(net, PRECOND_ARGUMENTS[class_name], budget)
    if class_name == "EDM2Precond":
        if arguments is None:
            raise Refused("holds a Precond without its constructor arguments; expected a file of EDM2's training")
        return EDMPickle(class_name, arguments, state_dict, None, key, _latent_scale(content.get("encoder")))
    if arguments is None:
        arguments = _inferred_arguments(net, unet, state_dict, budget)
    # The reference's networks have these layers whether or not they were trained with them, and do not record it.
    if any(".affine_step." in name for name in state_dict):
        arguments["use_step_condition"] = True
    training = content.get("training_kwargs", net.state.get("training_kwargs"))
    training = _plain_entries(training, budget) if type(training) is dict else None
    return EDMPickle(class_name, arguments, state_dict, training, key)


def _check_classes(net: Any, key: str) -> tuple[str, ObjectRecord]:
    """Check that `net` is of a class that can be built → what that is called here, and the U-Net in it."""
    name = _class_of(net)
    if name in UNREADABLE_PRECONDS:
        raise Refused(f"holds a {name}, which this program does not have; expected EDMPrecond")
    if name not in LAYOUTS:
        raise Refused(f"holds a {shown(name)} under '{key}'; expected EDMPrecond, or EDM2's Precond")
    own_name, child, networks = LAYOUTS[name]
    unet = _child(net, "_modules", child)
    if _class_of(unet) not in networks:
        raise Refused(f"holds a {name} around a {shown(_class_of(unet))}; expected {' or '.join(networks)}")
    return own_name, unet


def _class_of(value: Any) -> str:
    """The class of a module in the file; of anything else the type that it was read as."""
    return value.class_name if type(value) is ObjectRecord else type(value).__name__


def _latent_scale(encoder: Any) -> LatentScale | None:
    """What EDM2 records of the way from states to pixels; a file without it is of a network in pixel space."""
    if encoder is None or _class_of(encoder) == "StandardRGBEncoder":
        return None
    if _class_of(encoder) != "StabilityVAEEncoder":
        raise Refused(f"holds a {shown(_class_of(encoder))} as its encoder; expected one for pixels or Stability's VAE")
    found = encoder.state.get("vae_name")
    if found != STABILITY_VAE:
        raise Refused(f"holds a network on the latents of {shown(str(found))}; expected {STABILITY_VAE}")
    scale, bias = (encoder.state.get(name) for name in ("scale", "bias"))
    try:
        return LatentScale(*([float(v) for v in each.values] for each in (scale, bias)))
    except (AttributeError, ValueError) as error:
        reason = str(error) if type(scale) is type(bias) is ArrayRecord else "its encoder has no scale and bias"
        raise Refused(f"is damaged: {reason}") from None


def _child(module: Any, *names: str) -> Any:
    """Follow entries of nested dicts and modules; None where there is none."""
    for name in names:
        entries = module.state if type(module) is ObjectRecord else module
        module = entries.get(name) if type(entries) is dict else None
    return module


def _state_dict(net: ObjectRecord, max_bytes: int) -> dict[str, Tensor]:
    tensors: dict[str, TensorRecord] = {}
    for name, tensor in _named_tensors(net, "", set()):
        if name in tensors:
            raise Refused(f"is damaged: two tensors are called {shown(name)}")
        if not tensor.storage.dtype.is_floating_point:
            raise Refused(f"holds {shown(name)} as {tensor.storage.dtype}; expected floating-point numbers")
        tensors[name] = tensor
    if sum(tensor.nbytes for tensor in tensors.values()) > max_bytes:
        raise Refused("is refused: its tensors take more memory than the file has")
    return {name: tensor.materialise() for name, tensor in tensors.items()}


def _named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, TensorRecord]]:
    """Parameters and persistent buffers in the order of `Module.state_dict`."""
    groups = [_child(module, group) for group in ("_parameters", "_buffers", "_modules")]
    if type(module) is not ObjectRecord or any(type(group) is not dict for group in groups):
        raise Refused(f"is damaged: {shown(prefix) or 'the network'} is not a torch module")
    # Sharing would be a cycle, or a few bytes that stand for millions of tensors.
    places = {id(module), *map(id, groups)}
    if len(places) != 4 or places & seen or prefix.count(".") > MAX_DEPTH:
        raise Refused("is refused: modules that contain each other")
    seen |= places
    parameters, buffers, children = groups
    hidden = module.state.get("_non_persistent_buffers_set")
    hidden = hidden if type(hidden) is set else ()
    for name, tensor in (*parameters.items(), *((k, v) for k, v in buffers.items() if k not in hidden)):
        if tensor is None:
            continue
        name = _joined(prefix, name)
        if type(tensor) is not TensorRecord:
            raise Refused(f"is damaged: {shown(name)} is not a tensor")
        yield name, tensor
    for name, child in children.items():
        if child is not None:
            yield from _named_tensors(child, _joined(prefix, name) + ".", seen)


def _joined(prefix: str, name: str) -> str:
    # Long names that many modules share would multiply the memory that a file takes.
    if len(prefix) + len(name) > MAX_NAME:
        raise Refused(f"is refused: a tensor's name has more than {MAX_NAME} characters")
    return prefix + name


def _plain(value: Any, budget: Budget, depth: int = 0) -> Any:
    """A copy of numbers, strings, bools, None, and lists and dicts of these; tuples become lists."""
    budget.spend(1)
    if value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < 2**63):
        return value
    if depth < MAX_DEPTH and type(value) in (list, tuple):
        return [_plain(item, budget, depth + 1) for item in value]
    if depth < MAX_DEPTH and type(value) is dict:
        return {key: _plain(item, budget, depth + 1) for key, item in value.items()}
    raise NotPlain("is refused: a constructor argument is not a number, string, bool, None or a list of these")


def _plain_entries(values: dict[str, Any], budget: Budget, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The entries that are plain; what a training leaves beside them (tensors, modules) is of no use here."""
    plain = {}
    for name in values if names is None else [name for name in names if name in values]:
        try:
            plain[name] = _plain(values[name], budget)
        except NotPlain:
            continue
    return plain


def _recorded_arguments(net: ObjectRecord, order: list[str], budget: Budget) -> dict[str, Any] | None:
    """Constructor arguments by name, those by position in this `order`; None where the file does not record them."""
    args, kwargs = net.state.get("_init_args", ()), net.state.get("_init_kwargs")
    if kwargs is None:
        return None
    if type(args) not in (list, tuple) or type(kwargs) is not dict or len(args) > len(order):
        raise Refused("is damaged: the constructor arguments are not recorded as EDM does")
    return _plain({**dict(zip(order, args)), **kwargs}, budget)


def _inferred_arguments(
    net: ObjectRecord, unet: ObjectRecord, state: dict[str, Tensor], budget: Budget
) -> dict[str, Any]:
    """Constructor arguments that attributes, tensor names and tensor shapes show.

    Sizes come from the tensors. What leaves no trace in them (sigma range, precision, dropout) comes from attributes,
    and keeps the constructor's default where there are none.
    """

    def extent(name: str, axis: int) -> int:
        shape = state[name].shape if name in state else ()
        if len(shape) <= axis or shape[axis] == 0:
            raise Refused(f"holds a {unet.class_name} without a usable {name}")
        return shape[axis]

    song = unet.class_name == "SongUNet"
    blocks = [re.fullmatch(r"model\.enc\.([0-9]{1,6})x\1_block[0-9]{1,6}\.conv1\.weight", name) for name in state]
    widths = {int(match[1]): extent(match[0], 0) for match in blocks if match}
    if not widths:
        raise Refused(f"holds a {unet.class_name} without encoder blocks")
    sizes = list(widths)
    stem = f"model.enc.{sizes[0]}x{sizes[0]}_conv.weight"
    noise, embedding = extent("model.map_layer0.weight", 1), extent("model.map_layer0.weight", 0)
    channels = extent(stem, 0) if song else noise

    arguments = {
        "img_resolution": sizes[0],
        "img_channels": extent(stem, 1),
        "label_dim": extent("model.map_label.weight", 1) if "model.map_label.weight" in state else 0,
        "model_type": unet.class_name,
        "augment_dim": extent("model.map_augment.weight", 1) if "model.map_augment.weight" in state else 0,
        "model_channels": channels,
        "channel_mult": [width // channels for width in widths.values()],
        "channel_mult_emb": embedding // channels,
        "num_blocks": sum(match is not None for match in blocks) // len(sizes),
        "attn_resolutions": [size for size in sizes if f"model.enc.{size}x{size}_block0.qkv.weight" in state],
    }
    if song:
        arguments.update(_song_arguments(state), channel_mult_noise=noise // channels)
    block = _child(unet, "_modules", "enc", "_modules", f"{sizes[0]}x{sizes[0]}_block0")
    attributes = (
        (net, ("use_fp16", "sigma_min", "sigma_max", "sigma_data")),
        (unet, ("label_dropout",)),
        (block, ("dropout",)),
    )
    for module, names in attributes:
        if type(module) is ObjectRecord:
            arguments.update(_plain_entries(module.state, budget, names))
    return arguments


def _song_arguments(state: dict[str, Tensor]) -> dict[str, Any]:
    """What tells DDPM++, NCSN++ and mixtures of them apart."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in state)

    filters = [tensor for name, tensor in state.items() if name.endswith("_down.conv0.resample_filter")]
    taps = [1.0, 1.0]
    if filters and filters[0].ndim == 4 and filters[0].numel() and filters[0].isfinite().all():
        # The buffer is the outer product of normalised taps, which people give in multiples of the outermost.
        rows = filters[0][0, 0].sum(dim=1)
        taps = (rows / rows[0] if rows[0] != 0 else rows).nan_to_num().tolist()
    return {
        "embedding_type": "fourier" if "model.map_noise.freqs" in state else "positional",
        "encoder_type": "residual" if has("_aux_residual") else "skip" if has("_aux_skip") else "standard",
        "decoder_type": "skip" if has(r"\.dec\..*_aux_up") else "standard",
        "resample_filter": [round(tap) if abs(tap - round(tap)) < 1e-3 else tap for tap in taps],
    }
