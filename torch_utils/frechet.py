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

from dataclasses import dataclass

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


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over subsets, and the size of a subset."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Unbiased squared MMD of feature sets `[N, D]` and `[M, D]`, float64.

    Subsets are drawn without replacement from the stream that torch-fidelity draws from (same default seed). A set
    smaller than `subset_size` makes all subsets as small as itself; with two whole sets there is one subset only.

    Raises:
        ValueError: fewer than two features, or another dimension.
    """
    if features.ndim != 2 or features.shape[1:] != reference.shape[1:] or min(len(features), len(reference)) < 2:
        raise ValueError(f"feature sets are {features.shape} and {reference.shape}; expected [N ≥ 2, D] and [M ≥ 2, D]")
    size = min(subset_size, len(features), len(reference))
    if size == len(features) == len(reference):
        subsets = 1
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = features[rng.choice(len(features), size, replace=False)]
        y = reference[rng.choice(len(reference), size, replace=False)]
        values.append(_squared_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double()))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), size)


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """mean_{i≠j} k(xᵢ, xⱼ) + mean_{i≠j} k(yᵢ, yⱼ) − 2 mean k(xᵢ, yⱼ) for `[n, D]` each; eq. 4 of the paper."""
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())
