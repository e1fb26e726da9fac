"""Noise levels of models with discrete timesteps."""

from __future__ import annotations

import torch
from torch import Tensor


class DiscreteNoise:
    """Noise schedule of a model that was trained at N noise levels: σ(t) and its inverse, t in (0, 1].

    The variances of the noise added per step are even in their roots, and step i ends at t = i/N with
    ᾱ = Π (1 − β). In between, log α = log √ᾱ is linear in t, and it goes on like that outside (DPM-Solver,
    arXiv 2206.00927, appendix D). σ = √(1 − ᾱ) / √ᾱ.

    Args:
        linear_start, linear_end: β of the first and the last step.
        timesteps: N.
    """

    def __init__(self, linear_start: float, linear_end: float, timesteps: int) -> None:
        roots = torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64, device="cpu")
        betas = roots.square()
        self.steps = timesteps
        self.alphas_cumprod = (1 - betas).cumprod(0)
        #: Ascending, as a search needs it: from the last time to the first.
        self._log_alphas = self.alphas_cumprod.log().flip(0) / 2
        self._copies: dict[torch.device, Tensor] = {}

    @property
    def sigma_max(self) -> float:
        """The largest noise level that the model knows, at t = 1."""
        return float(self.sigma(torch.ones(1, dtype=torch.float64)))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at time `t`; float64, on the CPU."""
        place = self.steps * (1 - t.to("cpu", torch.float64))
        low = place.floor().clamp(0, self.steps - 2).long()
        log_alpha = torch.lerp(self._log_alphas[low], self._log_alphas[low + 1], place - low)
        return torch.expm1(-2 * log_alpha).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Time at noise level `sigma`; float64, on the CPU."""
        return 1 - self._place(sigma.to("cpu", torch.float64), self._log_alphas) / self.steps

    def step(self, sigma: Tensor) -> Tensor:
        """What the network is told, from 0 to N − 1 in steps of training; float32 beside `sigma`."""
        if sigma.device not in self._copies:
            self._copies[sigma.device] = self._log_alphas.to(sigma.device, torch.float32)
        return self.steps - 1 - self._place(sigma.float(), self._copies[sigma.device])

    def _place(self, sigma: Tensor, log_alphas: Tensor) -> Tensor:
        """Position among the steps, counted from the last one; a fraction."""
        log_alpha = -torch.log1p(sigma.square()) / 2
        low = (torch.searchsorted(log_alphas, log_alpha) - 1).clamp(0, self.steps - 2)
        first, second = log_alphas[low], log_alphas[low + 1]
        return low + (log_alpha - first) / (second - first)
