"""Denoisers of the diffusers package: any of its networks that predict noise, v, data or the velocity of a flow.

With a table of noise levels ᾱ, σ² = (1 − ᾱ)/ᾱ, the network sees x / √(1 + σ²), and its output F means one of

    noise   D = x − σ F                              v   D = x / (1 + σ²) − F σ / √(1 + σ²)            data   D = F

with v = √ᾱ n − √(1 − ᾱ) x_0 (arXiv 2202.00512). In flow matching it sees x / (1 + σ) at t = σ / (1 + σ), and F means
n − x_0:

    velocity   D = x / (1 + σ) − F σ / (1 + σ)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError

from .conditions import Conditions
from .networks.diffusers_modules import DiffusersNetwork
from .noise import HIGHEST, FlowNoise, TableNoise, alpha_table, betas
from .precond import Precond, Scalings

#: What the output of a network with a table of noise levels may mean, as diffusers calls it.
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "flow"
#: Tokens of a caption in Stable Diffusion and SDXL, and in SD3.
CLIP_TOKENS, SD3_TOKENS = 77, 77 + 256


class DiffusersPrecond(Precond):
    """Denoiser around a network of diffusers.

    Args:
        module: name of its class, one of `FAMILIES`.
        config: its configuration, as in its config.json.
        noise: `prediction_type` and noise levels: `num_train_timesteps`, `beta_schedule`, `beta_start`, `beta_end`,
            `trained_betas`, `rescale_betas_zero_snr` as in scheduler_config.json; or the prediction_type `flow` with
            `num_train_timesteps` and `shift`.
        latent: whether states are latents, which the autoencoder of the network's folder decodes.
        use_step_condition: add the vectors of SFD-v.
        use_fp16: run the core in float16 where the input is on CUDA.

    Raises:
        UserError: a network or noise levels that are not covered, or the package is missing.
    """

    model: DiffusersNetwork  # type: ignore[assignment]  # the others are networks of this program
    noise_schedule: TableNoise | FlowNoise  # type: ignore[assignment]

    def __init__(
        self,
        module: str,
        config: Mapping[str, Any],
        noise: Mapping[str, Any],
        latent: bool = False,
        use_step_condition: bool = False,
        use_fp16: bool = False,
    ) -> None:
        super().__init__(config.get("sample_size", 0), config.get("in_channels", 0), use_fp16=use_fp16)
        self.init_kwargs = dict(
            module=module, config=dict(config), noise=dict(noise), latent=latent,
            use_step_condition=use_step_condition, use_fp16=use_fp16,
        )  # fmt: skip
        self.noise_schedule, self.prediction = make_noise(noise), noise["prediction_type"]
        self.model = DiffusersNetwork(module, config, use_step_condition)
        family = self.model.family
        if family.flow != (self.prediction == FLOW):
            raise UserError(
                f"{module} predicts {'a flow' if family.flow else 'no flow'}, but the scheduler is for "
                f"{self.prediction}; network and scheduler belong to different models"
            )
        self.is_latent, self.label_dim = latent, self.model.label_dim
        self.context_dim = config[family.text] if family.text else None

    def scalings(self, sigma: Tensor) -> Scalings:
        times, squared = self.noise_schedule.step(sigma), 1 + sigma.square()
        if self.prediction == FLOW:
            return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), times
        if self.prediction == "v_prediction":
            return 1 / squared, -sigma * squared.rsqrt(), squared.rsqrt(), times
        if self.prediction == "sample":
            return torch.zeros_like(sigma), torch.ones_like(sigma), squared.rsqrt(), times
        return torch.ones_like(sigma), -sigma, squared.rsqrt(), times

    def _condition(self, class_labels: Tensor | None, condition: Any, x: Tensor) -> Any:
        if self.label_dim and class_labels is None and not self.model.family.null_class:
            raise ValueError("this network has no class for none: it takes class_labels and no guidance")
        return super()._condition(class_labels, condition, x)

    def example_condition(self, batch: int, device: torch.device) -> Any:
        """What the network may be conditioned on: classes in turn, random text conditions, or None for neither."""
        config, width = self.init_kwargs["config"], self.context_dim
        if width is not None and self.model.family.flow:
            tokens = torch.randn(batch, SD3_TOKENS, width, device=device)
            return Conditions(tokens, torch.randn(batch, config["pooled_projection_dim"], device=device))
        if width is not None:
            tokens = torch.randn(batch, CLIP_TOKENS, width, device=device)
            if config.get("addition_embed_type") is None:
                return Conditions(tokens)
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            return Conditions(tokens, torch.randn(batch, pooled, device=device), torch.ones(batch, 6, device=device))
        if not self.label_dim:
            return None
        return torch.eye(self.label_dim, device=device)[torch.arange(batch, device=device) % self.label_dim]

    @property
    def is_guidable(self) -> bool:
        return self.context_dim is not None or self.model.family.null_class

    @property
    def remark(self) -> str | None:
        """What is left out of the model's own noise levels, in words."""
        own, start = self.noise_schedule.sigma_max, f"sampling starts at sigma {HIGHEST:g}"
        if isinstance(self.noise_schedule, FlowNoise):
            return f"the flow ends without signal, at sigma infinity; {start}"
        if self.noise_schedule.steps < self.init_kwargs["noise"]["num_train_timesteps"]:
            start = start if own > HIGHEST else f"sampling starts at sigma {own:g}"
            return f"the last noise level has no signal and is cut (rescale_betas_zero_snr); {start}"
        return f"the noise levels go on to sigma {own:.4g}; {start}" if own > HIGHEST else None

    def checkpoint_gradients(self) -> None:
        self.model.net.enable_gradient_checkpointing()


def make_noise(noise: Mapping[str, Any]) -> TableNoise | FlowNoise:
    """The noise levels that `DiffusersPrecond` is told of.

    Raises:
        UserError: settings that make none.
    """
    steps, kind, shift = (noise.get(key) for key in ("num_train_timesteps", "prediction_type", "shift"))
    if type(steps) is not int or not 2 <= steps <= 100_000:
        raise UserError(f"the network says num_train_timesteps {str(steps)[:40]}; expected 2 to 100000")
    if kind == FLOW:
        if not isinstance(shift, (int, float)) or not 1e-3 <= shift <= 1e3:
            raise UserError(f"the network says shift {str(shift)[:40]}; expected 0.001 to 1000")
        return FlowNoise(float(shift), steps)
    if kind not in PREDICTIONS:
        raise UserError(f"the network says prediction_type {str(kind)[:40]!r}; expected {', '.join(PREDICTIONS)}")
    zero_snr = noise.get("rescale_betas_zero_snr") or False
    if type(zero_snr) is not bool:
        raise UserError(f"the network says rescale_betas_zero_snr {str(zero_snr)[:40]!r}; expected true or false")
    try:
        levels = alpha_table(_variances(noise, steps), zero_snr)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"the network has no usable noise schedule ({error})") from None
    if len(levels) < 2 or not 0 < levels[0] < 1 or not (levels.diff() < 0).all():
        raise UserError("the network has no usable noise schedule; expected betas between 0 and 1")
    return TableNoise(levels)


def _variances(noise: Mapping[str, Any], steps: int) -> Tensor:
    trained = noise.get("trained_betas")
    if trained is None:
        start, end = (float(noise[name]) for name in ("beta_start", "beta_end"))
        return betas(str(noise.get("beta_schedule"))[:40], start, end, steps)
    variances = torch.tensor(trained, dtype=torch.float64, device="cpu")
    if variances.shape != (steps,):
        raise ValueError(f"trained_betas are {list(variances.shape)}, not {[steps]}")
    return variances
