"""Initial weights: functions of their shape, fan-in and fan-out."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Init = Callable[[Sequence[int], int, int], Tensor]


def xavier_uniform(gain: float = 1.0) -> Init:
    """U(-a, a) with variance `gain² · 2 / (fan_in + fan_out)`."""
    return lambda shape, fan_in, fan_out: gain * math.sqrt(6 / (fan_in + fan_out)) * (torch.rand(*shape) * 2 - 1)


def kaiming_uniform(gain: float = 1.0) -> Init:
    """U(-a, a) with variance `gain² / fan_in`."""
    return lambda shape, fan_in, fan_out: gain * math.sqrt(3 / fan_in) * (torch.rand(*shape) * 2 - 1)


def kaiming_normal(gain: float = 1.0) -> Init:
    """N(0, gain² / fan_in)."""
    return lambda shape, fan_in, fan_out: gain * math.sqrt(1 / fan_in) * torch.randn(*shape)


def zeros(shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
    """All zeros, whatever the fans."""
    return torch.zeros(*shape)


DEFAULT_INIT = kaiming_normal()
