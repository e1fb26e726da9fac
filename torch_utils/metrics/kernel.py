"""Kernel distance of two sets of features; with Inception features, the kernel inception distance (KID).

The unbiased estimate of the squared maximum mean discrepancy (Bińkowski et al. 2018, eq. 4)

    MMD² = mean_{i≠j} k(xᵢ, xⱼ) + mean_{i≠j} k(yᵢ, yⱼ) − 2 mean k(xᵢ, yⱼ),   k(x, y) = (xᵀy / D + 1)³

averaged over random subsets of equal size. Unlike the Fréchet distance it is not biased by the number of images, and
it can be negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over subsets, and the number of features in a subset."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Kernel distance of feature sets `[N, D]` and `[M, D]`, computed in float64.

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
    """The estimate from two subsets `[n, D]`."""
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())
