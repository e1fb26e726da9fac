"""Networks of the diffusers package as denoisers: which of its classes, how each is built and called.

The list is closed: what a file names is looked up here and nowhere else, so that no file chooses what is executed.
The package is imported when a network of it is built.

A step-conditioned student adds, behind each layer that embeds the noise level, a vector that depends on its number of
timestamps. It starts at zero; told one number it is a constant, which an export adds to that layer's bias.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from dnnlib import UserError, need

from .embeddings import PositionalEmbedding

INSTALL = "pip install diffusers"
#: Highest number that a configuration may hold, and longest list: beyond, nothing could be built.
HIGHEST, LONGEST = 1 << 20, 64
#: Counts of layers: each takes time to build, even without memory.
LAYERS = ("layers_per_block", "num_layers", "transformer_layers_per_block")
MOST_LAYERS = 256
#: Numbers in an embedding of positions, a gigabyte.
MOST_POSITIONS = 1 << 28
#: Channels of the embedding of the number of timestamps, and of the layer behind.
STEP_CHANNELS, STEP_WIDTH = 64, 256


@dataclass(frozen=True)
class Family:
    """What is special about the networks of one class.

    Attributes:
        part: sub-folder of a pipeline's folder that holds it.
        times: pattern of the names of its layers that embed the noise level.
        first, last: its modules that take the state in, and that give the prediction out.
        flow: predicts the velocity of a flow; else it has a table of noise levels.
        text: name in its configuration of the width of the tokens that it is conditioned on, None without text.
        classes: name in its configuration of the number of classes.
        null_class: whether there is one class more, for no class.
        sigma_min: where sampling ends.
        guidance_rate: what pipelines guide it with unless told otherwise.
        allowed: values that its configuration may have; None is what is not said.
    """

    part: str
    times: str
    first: str
    last: str
    flow: bool = False
    text: str | None = None
    classes: str | None = None
    null_class: bool = False
    sigma_min: float = 0.01
    guidance_rate: float = 1.0
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


POSITIONAL = ("positional", None)
FAMILIES = {
    "UNet2DModel": Family(
        "unet", "time_embedding", "conv_in", "conv_out", classes="num_class_embeds",
        allowed={"time_embedding_type": POSITIONAL, "class_embed_type": (None,)},
    ),
    "UNet2DConditionModel": Family(
        "unet", "time_embedding", "conv_in", "conv_out", text="cross_attention_dim", sigma_min=0.1, guidance_rate=7.5,
        allowed={
            "time_embedding_type": POSITIONAL, "class_embed_type": (None,), "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None,), "encoder_hid_dim": (None,), "addition_embed_type": (None, "text_time"),
            "time_cond_proj_dim": (None,), "attention_type": ("default", None), "timestep_post_act": (None,),
        },
    ),
    "DiTTransformer2DModel": Family(
        "transformer", r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder", "pos_embed.proj", "proj_out_2",
        classes="num_embeds_ada_norm", null_class=True,
        allowed={"norm_type": ("ada_norm_zero", None)},
    ),
    "SD3Transformer2DModel": Family(
        "transformer", r"time_text_embed\.timestep_embedder", "pos_embed.proj", "proj_out", flow=True,
        text="joint_attention_dim", guidance_rate=7.0,
    ),
}  # fmt: skip


def get_family(name: Any, source: str) -> Family:
    """The row of a class, or one clear line with those there are."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{source} is of class {str(name)[:60]!r}; expected {', '.join(FAMILIES)}")
    return FAMILIES[name]


def import_diffusers() -> ModuleType:
    """The package, which these networks alone need."""
    return need("diffusers", INSTALL)


def check_config(family: Family, config: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration that is not covered here, or that would take for ever to build."""
    for key, allowed in family.allowed.items():
        if config.get(key) not in allowed:
            expected = " or ".join(str(value) for value in allowed)
            raise UserError(f"{source} says {key} {str(config[key])[:40]!r}; expected {expected}")
    width = config.get(family.text) if family.text else 1
    if type(width) is not int or width < 1:
        raise UserError(f"{source} says {family.text} {str(width)[:40]}; expected a number, the width of its tokens")
    size, channels, out = (config.get(key) for key in ("sample_size", "in_channels", "out_channels"))
    if type(size) is not int or not 1 <= size <= 1024:
        raise UserError(f"{source} says sample_size {str(size)[:40]}; expected a number, the size of its square states")
    if type(channels) is not int or not 1 <= channels <= 1024 or out not in (channels, 2 * channels, None):
        raise UserError(
            f"{source} has {str(channels)[:20]} channels in and {str(out)[:20]} out; expected as many, or twice as "
            "many of which the second half is left out"
        )
    check_numbers(config, source)
    _check_positions(config, source)


def _check_positions(config: Mapping[str, Any], source: str) -> None:
    """Refuse embeddings of positions that are too large to be meant: they have memory before any weight is there."""
    patch, most, heads, width = (
        config.get(key) or 1
        for key in ("patch_size", "pos_embed_max_size", "num_attention_heads", "attention_head_dim")
    )
    if not all(type(value) in (int, list) for value in (patch, most, heads, width)):
        raise UserError(f"{source} says sizes that are no numbers")
    if not all(type(value) is int for value in (patch, most, heads, width)):
        return  # a U-Net, which has no such embeddings
    if max(config["sample_size"] // patch, most) ** 2 * heads * width > MOST_POSITIONS:
        raise UserError(f"{source} says patch_size {patch} and pos_embed_max_size {most}, which is out of range")


def check_numbers(config: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration with numbers or lists that are too large to be meant."""
    for key, value in config.items():
        most = MOST_LAYERS if key in LAYERS else HIGHEST
        if not all(abs(number) <= most for number in _numbers(value, key, source)):
            raise UserError(f"{source} says {str(key)[:40]} {str(value)[:40]}, which is out of range")


def _numbers(value: Any, key: str, source: str) -> Iterator[float]:
    """Every number in nested lists."""
    if isinstance(value, (list, tuple)):
        if len(value) > LONGEST:
            raise UserError(f"{source} says {str(key)[:40]} with {len(value)} entries; expected at most {LONGEST}")
        for entry in value:
            yield from _numbers(entry, key, source)
    elif isinstance(value, (int, float)):
        yield value


def build_module(cls: Callable[..., nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """A module of the package from its configuration; keys that it does not know are left out, as the package does.

    On the meta device its parameters have no memory, but buffers do: those that no file holds keep their values.
    """
    known = inspect.signature(cls).parameters
    arguments = {key: value for key, value in config.items() if key in known}
    if torch.empty(0).device.type != "meta":
        return cls(**arguments)
    with torch.device("cpu"), _parameters_on_meta():
        return cls(**arguments)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, parameters lose their memory as soon as a module has them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class StepCondition(nn.Module):
    """From the number of timestamps to a vector for each of several layers; all are zero at first."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.embedding = PositionalEmbedding(STEP_CHANNELS)
        self.hidden = nn.Linear(STEP_CHANNELS, STEP_WIDTH)
        self.vectors = nn.ModuleList(nn.Linear(STEP_WIDTH, width) for width in widths)
        for parameter in self.vectors.parameters():
            nn.init.zeros_(parameter)

    def forward(self, num_steps: Tensor) -> list[Tensor]:
        """Vectors `[n, width]` for numbers of timestamps, a scalar or `[n]`."""
        hidden = silu(self.hidden(self.embedding(num_steps.reshape(-1))))
        return [layer(hidden) for layer in self.vectors]


class DiffusersNetwork(nn.Module):
    """A network of diffusers, called as all raw networks here are.

    Args:
        name: of its class, one of `FAMILIES`.
        config: its configuration, as in its config.json.
        use_step_condition: add the vectors of SFD-v.

    Attributes:
        net: the package's module.

    Raises:
        UserError: one that is not covered, or the package is missing.
    """

    def __init__(self, name: str, config: Mapping[str, Any], use_step_condition: bool = False) -> None:
        super().__init__()
        self.family = get_family(name, "the network")
        check_config(self.family, config, "the network")
        self.label_dim = (self.family.classes and config.get(self.family.classes)) or 0
        self.channels: int = config["in_channels"]
        self.net: Any = build_module(getattr(import_diffusers(), name), config)
        part: Any
        for part in self.net.modules():
            if type(part).__name__ == "LabelEmbedding":
                part.dropout_prob = 0.0  # labels are not dropped in distillation
        self.use_step_condition = use_step_condition
        self.step_condition: StepCondition | None = None
        self._vectors: list[Tensor] | None = None
        if use_step_condition:
            layers = list(self.time_embeddings().values())
            self.step_condition = StepCondition([layer.linear_2.out_features for layer in layers])
            for i, layer in enumerate(layers):
                layer.register_forward_hook(partial(self._add_vector, i))

    def time_embeddings(self) -> dict[str, Any]:
        """The layers that embed the noise level, by name: MLPs of `linear_1` and `linear_2`."""
        return {name: m for name, m in self.net.named_modules() if re.fullmatch(self.family.times, name)}

    def _add_vector(self, i: int, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self._vectors is None else output + self._vectors[i].to(output.dtype)

    def step_vectors(self, num_steps: Tensor) -> list[Tensor]:
        """What is added behind `time_embeddings`, `[n, width]` each, for numbers of timestamps, a scalar or `[n]`."""
        if self.step_condition is None:
            raise ValueError("this network has no step-condition layers; build it with use_step_condition=True")
        return self.step_condition(num_steps)

    def forward(self, x: Tensor, times: Tensor, cond: Any, step_condition: Tensor | None = None) -> Tensor:
        """Raw output F `[B, C, H, W]` for `x` `[B, C, H, W]` at `times` `[1]` or `[B]`.

        The dtype of `x` is that of the computation; weights stay as they are.

        Args:
            cond: one-hot labels `[B or 1, label_dim]`, zeros for no class; `Conditions` of `B`; or None.
            step_condition: numbers of timestamps, a scalar or `[B]`.
        """
        self._vectors = None if step_condition is None else self.step_vectors(step_condition)
        if x.device.type == "meta":  # which has no autocast: what is counted there is that of float32
            x = x.float()
        half = nullcontext() if x.dtype == torch.float32 else torch.autocast(x.device.type, x.dtype)
        with half:
            output = self.net(
                x, timestep=times.expand(x.shape[0]), return_dict=False, **self._arguments(cond, x.shape[0])
            )[0]
        return output[:, : self.channels]

    def _arguments(self, cond: Any, batch: int) -> dict[str, Any]:
        """What the package's module takes besides, for `cond`."""
        if self.label_dim:
            return {"class_labels": self._classes(cond).expand(batch)}
        if cond is None:
            return {}
        if self.family.flow:
            return {"encoder_hidden_states": cond.tokens, "pooled_projections": cond.pooled}
        added = {} if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        return {"encoder_hidden_states": cond.tokens, "added_cond_kwargs": added}

    def _classes(self, labels: Tensor) -> Tensor:
        index = labels.argmax(1)
        return torch.where(labels.any(1), index, self.label_dim) if self.family.null_class else index
