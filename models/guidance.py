"""Guidance: a denoiser made from two denoisers.

    D(x; σ) = D_u(x; σ) + rate (D_c(x; σ) − D_u(x; σ))

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) has one network: D_c sees the condition, D_u an empty
one (zero labels, the empty caption). Autoguidance (Karras et al. 2024, arXiv 2406.02507) takes D_u from a smaller
network. D is linear in the predicted noise, so the same holds for noise predictors.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: Noisy x and noise level to clean x, `[B, C, H, W]`.
Denoiser = Callable[[Tensor, Tensor | float], Tensor]


def guided(denoise: Denoiser, unguided: Denoiser, rate: float) -> Denoiser:
    """D_u + rate (D_c − D_u) of `denoise` D_c and `unguided` D_u; `denoise` itself, at half the cost, for rate 1."""
    if rate == 1:
        return denoise

    def denoiser(x: Tensor, sigma: Tensor | float) -> Tensor:
        without = unguided(x, sigma)
        return without + rate * (denoise(x, sigma) - without)

    return denoiser
