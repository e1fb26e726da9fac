"""Preconditioning: a raw network F becomes the denoiser D.

    D(x; σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x; c_noise(σ))

A preconditioner is these four numbers, and one forward serves them all. EDM (Karras et al. 2022, arXiv 2206.00364,
table 1 and equation 7), σ_d the standard deviation of the data:

    c_skip = σ_d² / (σ² + σ_d²)      c_out = σ σ_d / √(σ² + σ_d²)      c_in = 1 / √(σ² + σ_d²)      c_noise = ln(σ) / 4

consistency-models: the same with c_noise = 250 ln(σ). Noise predictors (latent diffusion, Stable Diffusion), with t(σ)
the inverse of their own noise schedule and N the number of its steps:

    c_skip = 1      c_out = −σ      c_in = 1 / √(σ² + 1)      c_noise = N t(σ) − 1
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib import UserError
from torch_utils.device import is_plain, prefers_channels_last

from .networks.edm2_unet import EDM2Block, EDM2UNet, MPConv, MPFourier
from .networks.edm_unets import DhariwalUNet, SongUNet
from .networks.guided_unet import GuidedUNet
from .networks.layers import UNetBlock, cast_together
from .noise import DiscreteNoise

NETWORKS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
#: c_skip, c_out, c_in and c_noise, each of the shape of σ.
Scalings = tuple[Tensor, Tensor, Tensor, Tensor]


class Precond(nn.Module):
    """What the denoisers have in common: float32 input, output and preconditioning around a core of `compute_dtype`.

    Args:
        img_resolution, img_channels: size and channels of the states: images, or latents.
        label_dim: number of classes, 0 for an unconditional model.
        use_fp16: as files record it: run the core in float16 where the input is on CUDA.
        Subclasses take as well: sigma_data, the expected standard deviation of the data; class_frequencies, the part of
        the data that each class had in training, where that is known; and whatever the raw network takes.

    Attributes:
        context_dim: width of the text condition, None for a model without.
        noise_schedule: the model's own, for the schedule `discrete`; None for a model of continuous noise levels.
        compute_dtype: None, or a torch dtype that overrides `use_fp16` on every device.
        init_kwargs: what rebuilds this network, JSON-serialisable; noise limits are the registry's business.
        model: the raw network.
    """

    model: SongUNet | DhariwalUNet | GuidedUNet | EDM2UNet
    init_kwargs: dict[str, Any]

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16 = use_fp16
        self.class_frequencies: tuple[float, ...] | None = None
        self.context_dim: int | None = None
        self.noise_schedule: DiscreteNoise | None = None
        self.compute_dtype: torch.dtype | None = None

    def _record(self, arguments: dict[str, Any]) -> None:
        """Keep what rebuilds this network, from `locals()` of its constructor, and how frequent each class is."""
        left_out = ("self", "__class__", "sigma_min", "sigma_max", "class_frequencies", "model_kwargs")
        own = {name: value for name, value in arguments.items() if name not in left_out}
        self.init_kwargs = {**own, **arguments["model_kwargs"]}
        if arguments.get("class_frequencies") is None:
            return
        values = tuple(float(value) for value in arguments["class_frequencies"])
        if len(values) != self.label_dim or not all(0 <= v <= 1 for v in values) or abs(sum(values) - 1) > 1e-3:
            raise ValueError(f"class_frequencies must be {self.label_dim} numbers from 0 to 1 that add up to 1")
        self.class_frequencies = values
        self.init_kwargs["class_frequencies"] = list(values)

    @abstractmethod
    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip, c_out, c_in and c_noise at float32 noise levels `sigma` `[1]` or `[B]`."""

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        step_condition: Tensor | float | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Denoise `x` `[B, C, H, W]` at `sigma` (scalar, `[1]` or `[B]`) → `[B, C, H, W]`, float32.

        Args:
            class_labels: one-hot `[B, label_dim]` of a class-conditional model; None stands for zeros, "no class".
            condition: text conditions `[B, M, context_dim]` (or `[1, …]`) of a text-conditioned model.
            step_condition: number of timestamps (scalar, `[1]` or `[B]`), for a network with `use_step_condition=True`.
            model_kwargs: whatever else the raw network takes.

        Raises:
            ValueError: a condition that the model does not have, or none where it needs one.
        """
        x = x.float()
        sigma = _on_device(sigma, x).reshape(-1)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        core = (_spread(c_in) * x).to(self.core_dtype(x.device))
        with self._casting(core):
            raw = self.model(
                core,
                c_noise,
                self._condition(class_labels, condition, x),
                step_condition=None if step_condition is None else _on_device(step_condition, x),
                **model_kwargs,
            )
        # Of the channels that are not of the state, an ODE has no use.
        return _spread(c_skip) * x + _spread(c_out) * raw[:, : x.shape[1]].float()

    def _casting(self, core: Tensor) -> AbstractContextManager[None]:
        """How trained weights become half precision: together, where launches count and layers are computed once."""
        is_trained = self.training and torch.is_grad_enabled() and core.dtype != torch.float32
        again = getattr(self.model, "gradient_checkpointing", False)
        if not is_trained or again or is_plain() or prefers_channels_last(core.device):
            return nullcontext()
        return cast_together(self.model, core.dtype)

    def _condition(self, class_labels: Tensor | None, condition: Tensor | None, x: Tensor) -> Tensor | None:
        """What the raw network is conditioned on: labels, text or nothing."""
        if self.context_dim is not None:
            if condition is None or class_labels is not None:
                raise ValueError("this model is conditioned on text: it takes a condition and no labels")
            return condition.expand(x.shape[0], -1, -1)
        if condition is not None:
            raise ValueError("this model has no text: it takes no condition")
        if self.label_dim == 0:
            if class_labels is not None:
                raise ValueError("this model has no classes: class_labels must be None")
            return None
        if class_labels is None:
            return torch.zeros([1, self.label_dim], device=x.device)
        return class_labels.float().reshape(-1, self.label_dim)

    def set_dropout(self, probability: float) -> None:
        """Replace the dropout probability of every block."""
        for block in self.modules():
            if isinstance(block, (UNetBlock, EDM2Block)):
                block.dropout = probability
            elif isinstance(block, nn.Dropout):
                block.p = probability

    @property
    def is_guidable(self) -> bool:
        """Whether it knows what to do without its condition, which guidance leads away from."""
        return bool(self.label_dim) or self.context_dim is not None

    @property
    def remark(self) -> str | None:
        """What a user should know of the network's noise levels, in words."""
        return None

    def freeze_unused(self) -> None:
        """Take no gradient for what distillation never evaluates."""

    def normalize_weights(self) -> None:
        """After an optimizer step: bring back the size of weights, in a network where it means nothing."""

    def checkpoint_gradients(self) -> None:
        """Keep only the inputs of blocks while training and compute the rest again: less memory, more time."""
        if not isinstance(self.model, (GuidedUNet, EDM2UNet)):
            raise UserError(
                "is for latent, LSUN and EDM2 networks; a smaller micro-batch helps", "gradient_checkpointing"
            )
        self.model.gradient_checkpointing = True

    def core_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype in which F runs on `device`."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        return torch.float16 if self.use_fp16 and device.type == "cuda" else torch.float32


class Scaled(Precond):
    """A denoiser with EDM's scalings for data of standard deviation `sigma_data`; c_noise is `noise_factor` ln(σ)."""

    sigma_data: float
    noise_factor = 0.25

    def scalings(self, sigma: Tensor) -> Scalings:
        total = (sigma.square() + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / total.square(), sigma * self.sigma_data / total
        return c_skip, c_out, 1 / total, self.noise_factor * sigma.log()


class NoisePredictor(Precond):
    """A denoiser of a noise predictor: D = x − σ ε(x / √(1 + σ²); t(σ)), at the noise levels of a `DiscreteNoise`."""

    noise_schedule: DiscreteNoise

    def scalings(self, sigma: Tensor) -> Scalings:
        return torch.ones_like(sigma), -sigma, 1 / (sigma.square() + 1).sqrt(), self.noise_schedule.step(sigma)


class EDMPrecond(Scaled):
    """Denoiser of an EDM network, which was trained on noise levels from `sigma_min` to `sigma_max`.

    Args:
        model_type: `SongUNet` or `DhariwalUNet`, which takes the remaining arguments.
    """

    model: SongUNet | DhariwalUNet

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        class_frequencies: Sequence[float] | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16)
        self._record(locals())
        if model_type not in NETWORKS:
            raise ValueError(f"model_type is {model_type!r}, expected one of {', '.join(NETWORKS)}")
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.model = NETWORKS[model_type](img_resolution, img_channels, img_channels, label_dim, **model_kwargs)

    def freeze_unused(self) -> None:
        if self.model.map_augment is not None:
            self.model.map_augment.requires_grad_(False)  # sampling has no augmentation labels


class EDM2Precond(Scaled):
    """Denoiser of an EDM2 network (Karras et al. 2024, arXiv 2312.02696), in pixel space or on latents.

    Args:
        logvar_channels: width of the embedding that the uncertainty is computed from.
        The remaining arguments are those of `EDM2UNet`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        class_frequencies: Sequence[float] | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16)
        self._record(locals())
        self.sigma_data = sigma_data
        self.unet = EDM2UNet(img_resolution, img_channels, label_dim, **model_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    @property
    def model(self) -> EDM2UNet:  # type: ignore[override]  # its published name is another
        return self.unet

    def freeze_unused(self) -> None:
        self.logvar_linear.requires_grad_(False)  # it weighs the loss of the teacher's training

    def normalize_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, MPConv) and layer.weight.requires_grad:
                layer.normalize()

    def log_variance(self, sigma: Tensor) -> Tensor:
        """u(σ) `[B, 1, 1, 1]`, the log variance of the denoiser's error, which its training estimates."""
        return _spread(self.logvar_linear(self.logvar_fourier(self.scalings(sigma.flatten())[3])).flatten())


class ConsistencyPrecond(Scaled):
    """Denoiser of the teachers of consistency-models (Song et al. 2023, arXiv 2303.01469) around a `GuidedUNet`."""

    noise_factor = 250.0

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = 0.5,
        use_fp16: bool = False,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16)
        self._record(locals())
        self.sigma_data = sigma_data
        self.model = GuidedUNet(img_channels, img_channels, label_dim=label_dim, **model_kwargs)


class CFGPrecond(NoisePredictor):
    """Denoiser of a noise predictor in a latent space, a `GuidedUNet`; with `context_dim` it takes a text condition."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        linear_start: float,
        linear_end: float,
        timesteps: int = 1000,
        use_fp16: bool = False,
        context_dim: int | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, use_fp16=use_fp16)
        self._record(locals())
        self.context_dim = context_dim
        self.noise_schedule = DiscreteNoise(linear_start, linear_end, timesteps)
        self.model = GuidedUNet(img_channels, img_channels, context_dim=context_dim, **model_kwargs)


class ADMPrecond(NoisePredictor):
    """Denoiser of a noise predictor of guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233), on pixels.

    Args:
        learn_sigma: the network says as many channels again, of the variance of ancestral steps; an ODE has no use
            for them.
        The remaining arguments are those of `GuidedUNet`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        linear_start: float = 1e-4,
        linear_end: float = 0.02,
        timesteps: int = 1000,
        learn_sigma: bool = True,
        use_fp16: bool = False,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16)
        self._record(locals())
        self.noise_schedule = DiscreteNoise(linear_start, linear_end, timesteps, "linear")
        out_channels = img_channels * (2 if learn_sigma else 1)
        self.model = GuidedUNet(img_channels, out_channels, label_dim=label_dim, **model_kwargs)


#: The denoisers that a file may describe.
PRECONDITIONERS = {cls.__name__: cls for cls in (EDMPrecond, EDM2Precond, ConsistencyPrecond, CFGPrecond, ADMPrecond)}


def _spread(value: Tensor) -> Tensor:
    """`[1]` or `[B]`, to be broadcast over images."""
    return value[:, None, None, None]


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a float32 tensor beside `like`; a plain number is filled in on the device, which needs no copy."""
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=like.device)
