"""Fréchet distance of two sets of features; with Inception features, the Fréchet inception distance (FID).

Each set is described by the mean and covariance of its features. The squared Fréchet distance of the two Gaussians with
these moments (Heusel et al. 2017, eq. 6; Dowson and Landau 1982) is

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½

With any factors Σᵢ = Lᵢ Lᵢᵀ, the eigenvalues of Σ₁ Σ₂ are the squared singular values of L₁ᵀ L₂, so the last trace is
the sum of these singular values. It is real, finite and not negative whatever the rank, and needs no square root of a
matrix that is not symmetric. The factors are Cholesky's; where a covariance is singular (fewer images than dimensions),
they come from its eigenvectors, without the eigenvalues that are rounding noise.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
#: Relative to the largest entry or eigenvalue: what rounding to float32 can do to a covariance, with room.
ROUNDING = 1e-5
#: Squares of larger numbers, summed, are beyond float64.
LARGEST = 1e150


def covariance_factor(sigma: Tensor) -> Tensor:
    """L with L Lᵀ = Σ: float64 `[D, R]` from a symmetric positive semi-definite `[D, D]`; R is its numerical rank.

    Raises:
        ValueError: it has a negative eigenvalue beyond rounding.
    """
    noise = len(sigma) * EPS * float(sigma.diagonal().max().clamp(min=0))
    factor, failed = torch.linalg.cholesky_ex(sigma)
    # Where rounding alone keeps a pivot positive, its column of the factor is noise.
    if not failed and float(factor.diagonal().min()) ** 2 > noise:
        return factor
    values, vectors = torch.linalg.eigh(sigma)
    if float(values[0]) < -ROUNDING * float(values.abs().max()):
        raise ValueError(f"is not positive semi-definite: it has the eigenvalue {float(values[0]):.3g}")
    kept = values > len(sigma) * EPS * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def check_moments(mu: ArrayLike, sigma: ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[D]`, covariance `[D, D]` and a factor of the covariance `[D, R]`, all float64.

    Raises:
        ValueError: what they hold is not real, not finite, not symmetric or not positive semi-definite up to rounding,
            or of other shapes.
    """
    found = []
    for name, values in {"mu": np.asarray(mu), "sigma": np.asarray(sigma)}.items():
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {values.dtype}, not real numbers")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds a number that is not finite")
        if values.size and max(abs(float(values.min())), abs(float(values.max()))) > LARGEST:
            raise ValueError(f"{name} holds numbers that are too large for a distance in float64")
        found.append(torch.as_tensor(values.astype(np.float64)))
    m, s = found
    if m.ndim != 1 or len(m) == 0 or s.shape != (len(m), len(m)):
        raise ValueError(f"shapes are {list(m.shape)} and {list(s.shape)}; expected mu [D] and sigma [D, D]")
    if float((s - s.T).abs().max()) > ROUNDING * float(s.abs().max()):
        raise ValueError("sigma is not symmetric")
    s = (s + s.T) / 2
    try:
        return m, s, covariance_factor(s)
    except ValueError as error:
        raise ValueError(f"sigma {error}") from None


def frechet_distance(mu: ArrayLike, sigma: ArrayLike, mu_ref: ArrayLike, sigma_ref: ArrayLike) -> float:
    """Squared Fréchet distance of two Gaussians, computed in float64; ≥ 0.

    Args:
        mu, mu_ref: means, `[D]`.
        sigma, sigma_ref: covariances, `[D, D]`.

    Raises:
        ValueError: what `check_moments` refuses, different dimensions, or a distance beyond float64.
    """
    (m, s, first), (m_ref, s_ref, second) = check_moments(mu, sigma), check_moments(mu_ref, sigma_ref)
    if m.shape != m_ref.shape:
        raise ValueError(f"shapes are {list(m.shape)} and {list(m_ref.shape)}: the dimensions differ")
    overlap = torch.linalg.svdvals(first.T @ second).sum() if first.shape[1] and second.shape[1] else 0.0
    distance = (m - m_ref).square().sum() + s.trace() + s_ref.trace() - 2 * overlap
    if not bool(distance.isfinite()):
        raise ValueError("the numbers are too large for a distance in float64")
    return max(float(distance), 0.0)
