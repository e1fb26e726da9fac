"""What networks are conditioned on besides the noise level, for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


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

    def expand(self, batch: int) -> Conditions:
        """For `batch` samples, from those for as many or for one."""
        return self.map(lambda part: part.expand(batch, *part.shape[1:]))

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """What `Conditions(*parts)` makes it of."""
        return self.tokens, self.pooled, self.time_ids

    @staticmethod
    def cat(several: Sequence[Conditions]) -> Conditions:
        """One batch of several."""
        return Conditions(*(_cat([getattr(c, f.name) for c in several]) for f in fields(Conditions)))  # type: ignore[arg-type]


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
