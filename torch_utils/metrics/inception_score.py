"""Inception score (Salimans et al. 2016): exp of the mean Kullback-Leibler divergence of an image's classes from those
of all images,

    IS = exp E_x KL(p(y|x) ‖ p(y)),   p(y|x) = softmax(W f(x)),   p(y) = E_x p(y|x)

with the features f and class weights W of the Inception network (without its biases, as the original code and
torch-fidelity compute it), over ten parts of the images in random order: mean and standard deviation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def inception_score(features: np.ndarray, weights: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over `splits` parts, computed in float64.

    Args:
        features: `[N, D]`.
        weights: of the classes, `[classes, D]`.
        seed: of the order, from the stream that torch-fidelity draws from.

    Raises:
        ValueError: fewer images than parts, or another dimension.
    """
    if features.ndim != 2 or features.shape[1] != weights.shape[1] or len(features) < splits:
        raise ValueError(f"features are {features.shape}; expected [N ≥ {splits}, {weights.shape[1]}]")
    order = np.random.RandomState(seed).permutation(len(features))
    columns = weights.detach().cpu().double().T
    scores = []
    for i in range(splits):
        part = order[i * len(order) // splits : (i + 1) * len(order) // splits]
        log_p = (torch.from_numpy(features[part]).double() @ columns).log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).log())).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
