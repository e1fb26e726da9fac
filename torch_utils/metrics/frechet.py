"""Distances between two sets of features: Fréchet distance (FID, with Inception features) and kernel distance (KID).

Fréchet distance of two Gaussians (Heusel et al. 2017, eq. 6; Dowson and Landau 1982):

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½

With any factors Σᵢ = Lᵢ Lᵢᵀ, the eigenvalues of Σ₁ Σ₂ are the squared singular values of L₁ᵀ L₂, so the last trace is
the sum of these singular values. It is real, finite and not negative whatever the rank, and needs no square root of a
matrix that is not symmetric. The factors are Cholesky's; where a covariance is singular (fewer images than dimensions),
they come from its eigenvectors, without the eigenvalues that are rounding noise.

Kernel distance (Bińkowski et al. 2018): the unbiased estimate of the squared maximum mean discrepancy under
k(x, y) = (xᵀy / D + 1)³, averaged over random subsets.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def covariance_factor(sigma: Tensor) -> Tensor:
    """L with L Lᵀ = Σ: float64 `[D, R]` from a symmetric positive semi-definite `[D, D]`; R is its numerical rank."""
    noise = len(sigma) * EPS * float(sigma.diagonal().max().clamp(min=0))
    factor, failed = torch.linalg.cholesky_ex(sigma)
    # Where rounding alone keeps a pivot positive, its column of the factor is noise.
    if not failed and float(factor.diagonal().min()) ** 2 > noise:
        return factor
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(sigma) * EPS * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu: ArrayLike, sigma: ArrayLike, mu_ref: ArrayLike, sigma_ref: ArrayLike) -> float:
    """Squared Fréchet distance of two Gaussians, computed in float64; ≥ 0.

    Args:
        mu, mu_ref: means, `[D]`.
        sigma, sigma_ref: covariances, `[D, D]`.

    Raises:
        ValueError: shapes that do not fit together, or numbers that are not finite.
    """
    arrays = [torch.as_tensor(np.asarray(a), dtype=torch.float64) for a in (mu, sigma, mu_ref, sigma_ref)]
    m, s, m_ref, s_ref = arrays
    if m.ndim != 1 or len(m) == 0 or m_ref.shape != m.shape or any(c.shape != (len(m), len(m)) for c in (s, s_ref)):
        raise ValueError(f"shapes are {[list(a.shape) for a in arrays]}; expected [D], [D, D], [D], [D, D]")
    if not all(bool(a.isfinite().all()) for a in arrays):
        raise ValueError("mean or covariance holds a number that is not finite")
    first, second = (covariance_factor((c + c.T) / 2) for c in (s, s_ref))
    overlap = torch.linalg.svdvals(first.T @ second).sum() if first.shape[1] and second.shape[1] else 0.0
    distance = (m - m_ref).square().sum() + s.trace() + s_ref.trace() - 2 * overlap
    return max(float(distance), 0.0)
