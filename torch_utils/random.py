"""Random numbers that depend on what they are for, not on what was drawn before.

Every stream is named by integers, such as (seed, iteration, sample). A resumed run, another batch size or another
number of processes therefore draws the same numbers. Drawing happens on the CPU, so that all devices see the same ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(*stream: int) -> int:
    """Hash the integers that name a stream (each ≥ 0) to a 63-bit seed."""
    low, high = np.random.SeedSequence([int(s) for s in stream]).generate_state(2, dtype=np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


def generator(*stream: int) -> torch.Generator:
    """A CPU generator for the stream that these integers name."""
    return torch.Generator("cpu").manual_seed(derive_seed(*stream))


def sample_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each image seed, as EDM's sampling does."""
    return [torch.Generator("cpu").manual_seed(int(seed) % 2**32) for seed in seeds]


def stacked_randn(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal `[len(generators), *shape]` (float32, CPU), row i from generator i alone."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def draw_classes(
    generators: Sequence[torch.Generator], classes: int, frequencies: Sequence[float] | None = None, count: int = 1
) -> Tensor:
    """Classes from 0 to `classes` − 1, as frequent as `frequencies` say, or all alike.

    Returns:
        Indices `[len(generators) · count]` (int64, CPU): `count` from each generator, one generator after the other.
    """
    if frequencies is None:
        return torch.cat([torch.randint(classes, [count], generator=g) for g in generators])
    edges = torch.tensor(frequencies, dtype=torch.float64, device="cpu").cumsum(0)
    uniform = torch.cat([torch.rand(count, generator=g, dtype=torch.float64) for g in generators])
    return torch.searchsorted(edges / edges[-1], uniform, right=True)
