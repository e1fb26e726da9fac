"""Noise levels of models that have a time of their own: trained at discrete steps, or by flow matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

#: A flow ends at σ = ∞ and some tables come near: sampling starts at this level then, the customary one (EDM).
HIGHEST = 80.0


class TableNoise:
    """Noise schedule of a model that was trained at N noise levels: σ(t) and its inverse, t in (0, 1].

    Step i ends at t = i/N with ᾱ = Π (1 − β). In between, log α = log √ᾱ is linear in t, and it goes on like that
    outside (DPM-Solver, arXiv 2206.00927, appendix D). σ = √(1 − ᾱ) / √ᾱ.

    Args:
        alphas_cumprod: ᾱ of the steps, falling, float64 `[N]`.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.steps = len(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod
        #: Ascending: from the last time to the first.
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
        # A search, as a count: the levels below.
        low = ((log_alphas < log_alpha[:, None]).sum(1) - 1).clamp(0, self.steps - 2)
        first, second = log_alphas[low], log_alphas[low + 1]
        return low + (log_alpha - first) / (second - first)


class DiscreteNoise(TableNoise):
    """The table of latent diffusion and Stable Diffusion, whose β are even in their roots, or of guided-diffusion.

    Args:
        linear_start, linear_end: β of the first and the last step.
        timesteps: N.
        schedule: see `betas`.
    """

    def __init__(self, linear_start: float, linear_end: float, timesteps: int, schedule: str = "scaled_linear") -> None:
        super().__init__((1 - betas(schedule, linear_start, linear_end, timesteps)).cumprod(0))


class FlowNoise:
    """Time of a flow-matching model (arXiv 2210.02747), x_t = (1 − t) x_0 + t n, t in (0, 1): σ = t / (1 − t).

    Even times u are moved towards noise by the shift s of its schedule, t = s u / (1 + (s − 1) u) (arXiv 2403.03206,
    section 5.3.2), so σ(u) = s u / (1 − u).

    Args:
        shift: s.
        steps: what the network is told is this times t.
    """

    sigma_max = HIGHEST

    def __init__(self, shift: float, steps: int) -> None:
        self.shift, self.steps = shift, steps

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at the time `t` before the shift; float64, on the CPU."""
        t = t.to("cpu", torch.float64)
        return self.shift * t / (1 - t)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Time before the shift at noise level `sigma`; float64, on the CPU."""
        sigma = sigma.to("cpu", torch.float64)
        return sigma / (self.shift + sigma)

    def step(self, sigma: Tensor) -> Tensor:
        """What the network is told; float32 beside `sigma`."""
        sigma = sigma.float()
        return self.steps * sigma / (1 + sigma)


def betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """Variances of the noise added per step, float64 `[steps]`, by the name that diffusers gives the schedule.

    Even from `start` to `end` (`linear`), in their roots (`scaled_linear`) or along a sigmoid of [-6, 6] (`sigmoid`);
    or those of ᾱ(t) = cos²(π/2 (t + 0.008) / 1.008), at most 0.999 (`squaredcos_cap_v2`, arXiv 2102.09672).

    Raises:
        ValueError: another name.
    """
    even = partial(torch.linspace, steps=steps, dtype=torch.float64, device="cpu")
    if schedule == "linear":
        return even(start, end)
    if schedule == "scaled_linear":
        return even(start**0.5, end**0.5).square()
    if schedule == "sigmoid":
        return start + (end - start) * even(-6, 6).sigmoid()
    if schedule == "squaredcos_cap_v2":
        times = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        levels = ((times + 0.008) / 1.008 * math.pi / 2).cos().square()
        return (1 - levels[1:] / levels[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule {schedule!r} is not linear, scaled_linear, squaredcos_cap_v2 or sigmoid")


def alpha_table(variances: Tensor | Sequence[float], zero_snr: bool = False) -> Tensor:
    """ᾱ after each step, float64, up to the last one that leaves a signal.

    With `zero_snr` the table is stretched so that the last step leaves none (arXiv 2305.08891, algorithm 1): that step
    has σ = ∞ and is cut.
    """
    levels = (1 - torch.as_tensor(variances, dtype=torch.float64, device="cpu")).cumprod(0)
    if zero_snr:
        roots = levels.sqrt()
        levels = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    return levels[levels > 0]
