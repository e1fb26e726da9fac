"""Copies between the host and a GPU beside the computation: neither of them waits before it has to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host on `device`; a GPU gets them from pinned memory, after what it was given before."""
    if device.type == "cuda":
        return values.contiguous().pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Download:
    """Values on their way to the host, from a GPU into pinned memory."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """The values on the host, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu()


def downloaded(parts: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Each of `parts` as an array of the host, in their order.

    Of a GPU's, each is waited for when the next one was made, so that it is copied, and its array used, while the GPU
    computes.
    """
    pending: deque[Download] = deque()
    for part in parts:
        pending.append(Download(part))
        while len(pending) > (part.device.type == "cuda"):
            yield pending.popleft().get().numpy()
    while pending:
        yield pending.popleft().get().numpy()
