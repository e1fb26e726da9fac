"""What networks are conditioned on besides the noise level, for a batch; that of captions is computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Captions encoded at a time on a GPU, and bytes of conditions that are kept.
BATCH, KEPT = 16, 2 << 30


@dataclass(frozen=True)
class Conditions:
    """Captions as several encoders give them; a part that a network does not take is None.

    It can be split, cut and expanded as a tensor of conditions is.

    Attributes:
        tokens: what attention sees, `[B, tokens, width]`.
        pooled: a summary of each caption, `[B, width]`.
        time_ids: size of the original, offset of its crop and size of the image, `[B, 6]`, in pixels.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Every part changed."""
        pooled, time_ids = (None if part is None else change(part) for part in (self.pooled, self.time_ids))
        return Conditions(change(self.tokens), pooled, time_ids)

    def to(self, device: torch.device) -> Conditions:
        return self.map(lambda part: part.to(device))

    def split(self, size: int) -> list[Conditions]:
        """Parts of `size` samples, the last one may be smaller."""
        return [self.map(lambda part: part[i : i + size]) for i in range(0, len(self), size)]  # noqa: B023  # called now

    def expand(self, batch: int, *rest: int) -> Conditions:
        """For `batch` samples, from those for as many or for one; as that of tensors, whose other sizes stay."""
        return self.map(lambda part: part.expand(batch, *part.shape[1:]))

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """What `Conditions(*parts)` makes it of."""
        return self.tokens, self.pooled, self.time_ids

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    @staticmethod
    def cat(several: Sequence[Conditions]) -> Conditions:
        """One batch of several."""
        tokens, *others = zip(*(conditions.parts for conditions in several))
        return Conditions(torch.cat(tokens), *(None if parts[0] is None else torch.cat(parts) for parts in others))


class Captions:
    """Conditions of captions by text encoders, each computed once, as long as it is among those used last (`KEPT`).

    Args:
        compute: gives conditions of some captions, for a device.
    """

    def __init__(self, compute: Callable[[list[str], torch.device], Conditions]) -> None:
        self._compute = compute
        self._kept: OrderedDict[str, Conditions] = OrderedDict()
        self._bytes = 0

    def encode(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        """Conditions of captions, on `device`; on the CPU each is computed alone, so that it depends on no other."""
        distinct = list(dict.fromkeys(prompts))
        known = {prompt: self._kept[prompt] for prompt in distinct if prompt in self._kept}
        unknown = [prompt for prompt in distinct if prompt not in known]
        size = 1 if device.type == "cpu" else BATCH
        for start in range(0, len(unknown), size):
            part = unknown[start : start + size]
            rows = self._compute(part, device).to(torch.device("cpu")).split(1)
            # Clones, since a row of a batch keeps all of it in memory.
            known.update((prompt, row.map(torch.clone)) for prompt, row in zip(part, rows))
        for prompt in distinct:
            self._keep(prompt, known[prompt])
        return Conditions.cat([known[prompt] for prompt in prompts]).to(device)

    def _keep(self, prompt: str, row: Conditions) -> None:
        if prompt not in self._kept:
            self._bytes += row.nbytes
        self._kept[prompt] = row
        self._kept.move_to_end(prompt)
        while self._bytes > KEPT:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
