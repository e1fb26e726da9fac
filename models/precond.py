"""EDM preconditioning: a raw network F becomes the denoiser D (Karras et al. 2022, table 1 and equation 7).

D(x; σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x; c_noise(σ))

c_skip = σ_d² / (σ² + σ_d²)      c_out = σ σ_d / √(σ² + σ_d²)      c_in = 1 / √(σ² + σ_d²)      c_noise = ln(σ) / 4
"""

from typing import Any

import torch
from torch import Tensor, nn

from .edm_unets import DhariwalUNet, SongUNet
from .unet_layers import UNetBlock

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class EDMPrecond(nn.Module):
    """Denoiser with float32 input, output and preconditioning around a core of `compute_dtype`.

    Args:
        img_resolution, img_channels: image size and channels.
        label_dim: number of classes, 0 for an unconditional model.
        use_fp16: recorded by EDM pickles: run the core in float16 where the input is on CUDA.
        sigma_min, sigma_max: range of noise levels that the network was trained on.
        sigma_data: expected standard deviation of the data.
        model_type: `SongUNet` or `DhariwalUNet`; the remaining arguments are passed to it.

    The attribute `compute_dtype` (None, or a torch dtype) overrides `use_fp16` on every device.
    """

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
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if model_type not in NETWORKS:
            raise ValueError(f"model_type is {model_type!r}, expected one of {', '.join(NETWORKS)}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.use_fp16 = use_fp16
        self.compute_dtype: torch.dtype | None = None
        #: What rebuilds this network, JSON-serialisable; noise limits are the registry's business.
        self.init_kwargs = dict(
            img_resolution=img_resolution,
            img_channels=img_channels,
            label_dim=label_dim,
            use_fp16=use_fp16,
            sigma_data=sigma_data,
            model_type=model_type,
            **model_kwargs,
        )
        self.model = NETWORKS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def set_dropout(self, probability: float) -> None:
        """Replace the dropout probability of every block."""
        for block in self.modules():
            if isinstance(block, UNetBlock):
                block.dropout = probability

    def core_dtype(self, device: torch.device, force_fp32: bool = False) -> torch.dtype:
        """The dtype in which F runs on `device`."""
        if force_fp32:
            return torch.float32
        if self.compute_dtype is not None:
            return self.compute_dtype
        return torch.float16 if self.use_fp16 and device.type == "cuda" else torch.float32

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        step_condition: Tensor | float | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Denoise `x` `[B, C, H, W]` at `sigma` (scalar, `[1]` or `[B]`) → `[B, C, H, W]`, float32.

        `class_labels` is `[B, label_dim]` one-hot; a conditional model without them gets zeros. `step_condition` is the
        number of timestamps (scalar, `[1]` or `[B]`) for a network built with `use_step_condition=True`.
        """
        x = x.float()
        sigma = _on_device(sigma, x).reshape(-1, 1, 1, 1)
        labels = self._labels(class_labels, x.device)
        if step_condition is not None:
            step_condition = _on_device(step_condition, x)
        total = (sigma.square() + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / total.square()
        c_out = sigma * self.sigma_data / total
        noise_labels = sigma.log().flatten() / 4
        raw = self.model(
            (x / total).to(self.core_dtype(x.device, force_fp32)),
            noise_labels,
            labels,
            step_condition=step_condition,
            **model_kwargs,
        )
        return c_skip * x + c_out * raw.float()

    def _labels(self, class_labels: Tensor | None, device: torch.device) -> Tensor | None:
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros([1, self.label_dim], device=device)
        return class_labels.float().reshape(-1, self.label_dim)


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a float32 tensor beside `like`; a plain number is filled in on the device, which needs no copy."""
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=like.device)
