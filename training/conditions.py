"""What an iteration starts from: noise and labels or captions, equal for every way of splitting the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from torch_utils.random import draw_classes, generator

# Names of the random streams of a run; each is followed by the iteration.
NOISE, LABELS, STEPS, DROPOUT, INIT = range(5)


def draw_noise(seed: int, iteration: int, batch: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal `[batch, *shape]` of the whole batch (float32, CPU)."""
    return torch.randn(batch, *shape, generator=generator(seed, NOISE, iteration))


def draw_labels(
    seed: int, iteration: int, batch: int, label_dim: int, frequencies: Sequence[float] | None = None
) -> Tensor | None:
    """One-hot labels `[batch, label_dim]` of the whole batch (float32, CPU); None without classes.

    Classes are as frequent as `frequencies` say, or all alike.
    """
    if label_dim == 0:
        return None
    return one_hot(draw_classes([generator(seed, LABELS, iteration)], label_dim, frequencies, batch), label_dim).float()


def draw_captions(seed: int, iteration: int, batch: int, captions: Sequence[str]) -> list[str]:
    """Captions of the whole batch, drawn evenly."""
    return [captions[i] for i in torch.randint(len(captions), [batch], generator=generator(seed, LABELS, iteration))]


def draw_num_steps(seed: int, iteration: int, choices: tuple[int, ...]) -> int:
    """The number of timestamps of an iteration, the same on all ranks."""
    return choices[int(torch.randint(len(choices), [1], generator=generator(seed, STEPS, iteration)))]
