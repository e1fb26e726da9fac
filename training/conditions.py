"""What an iteration starts from: noise and labels or captions, equal for every way of splitting the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from models.model import Cond, Student
from models.prompts import Prompts
from torch_utils import distributed
from torch_utils.random import draw_classes, generator
from torch_utils.transfers import upload

from .config import DistillConfig

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


@dataclass(frozen=True)
class Batches:
    """What the iterations of a run start from: of every batch, the share of this rank, on the device.

    A text-conditioned student needs `prompts`.
    """

    config: DistillConfig
    student: Student
    prompts: Prompts | None
    device: torch.device

    def draw(self, iteration: int) -> tuple[Tensor, Cond, int]:
        """Noise `[local batch, C, H, W]`; one-hot labels, text conditions, or None; and the number of timestamps."""
        config, part = self.config, distributed.shard(self.config.batch)
        share = slice(part.start, part.stop)
        noise = draw_noise(config.seed, iteration, config.batch, self.student.shape)[share]
        num_steps = draw_num_steps(config.seed, iteration, config.step_choices)
        return upload(noise, self.device), self.draw_cond(iteration, share), num_steps

    def draw_cond(self, iteration: int, share: slice) -> Cond:
        """One-hot labels or text conditions of a share of the batch; None for neither."""
        config = self.config
        if self.prompts is not None:
            captions = draw_captions(config.seed, iteration, config.batch, self.prompts.texts)
            return self.student.encode_text(captions[share])
        net = self.student.net
        labels = draw_labels(config.seed, iteration, config.batch, net.label_dim, net.class_frequencies)
        return None if labels is None else upload(labels[share], self.device)
