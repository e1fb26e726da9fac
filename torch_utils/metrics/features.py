"""Features of many images: decoding beside the computation, sharding over ranks, streaming moments.

Rank r takes a contiguous block of the images, so that gathered features are in index order. Moments are sums in
float64, reduced over ranks. Nothing grows with the number of images unless the features are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dnnlib import UserError
from dnnlib.progress import progress

from .. import distributed
from ..device import own_cores
from .image_set import ImageDataset


class FeatureNetwork(Protocol):
    """uint8 images `[B, C, H, W]` → float32 features `[B, dim]` on `device`."""

    dim: int
    device: torch.device

    def features(self, images: Tensor) -> Tensor: ...


# ------------------------------------------------------------------------------------------------------------------
# Images


def choose(count: int, num: int | None = None, seed: int = 0) -> np.ndarray:
    """Indices of `num` of `count` images, ascending, as EDM chooses them; all of them if `num` is None."""
    indices = np.arange(count)
    if num is None or num == count:
        return indices
    if num > count:
        raise UserError(f"found {count} images, fewer than {num}; ask for fewer, or add images", "num")
    np.random.RandomState(seed % 2**31).shuffle(indices)
    return np.sort(indices[:num])


class _Decoded(Dataset):
    """Decoding in workers. An error becomes a value: what a worker raises would reach the user as a traceback."""

    def __init__(self, source: ImageDataset, indices: range) -> None:
        # A copy, for workers that are forks must not share an open archive and its position.
        self.source, self.indices = copy.copy(source), indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor | str:
        try:
            return torch.from_numpy(np.array(self.source.load(self.indices[position])))
        except UserError as error:
            return error.message


def _stack(items: list[Tensor | str]) -> Tensor | str:
    errors = [item for item in items if isinstance(item, str)]
    return errors[0] if errors else torch.stack([item for item in items if isinstance(item, Tensor)])


def decoded_batches(source: ImageDataset, batch: int, workers: int = 0) -> Iterator[Tensor]:
    """This rank's share of the images as uint8 `[≤ batch, C, H, W]`, decoded in `workers` processes.

    Raises:
        UserError: an image that cannot be read.
    """
    dataset = _Decoded(source, distributed.shard(len(source)))
    workers = min(workers, len(dataset) // batch, own_cores())
    loader = DataLoader(dataset, batch, num_workers=workers, collate_fn=_stack, prefetch_factor=2 if workers else None)
    for images in loader:
        if isinstance(images, str):
            raise UserError(images)
        yield images


# ------------------------------------------------------------------------------------------------------------------
# Features


class Moments:
    """Sums from which mean and covariance follow, float64 on the CPU or GPU."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, features: Tensor) -> None:
        """Add `[B, D]`."""
        features = features.to(self.total.device).double()
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)
        self.count += len(features)

    def reduce(self) -> None:
        """Add up the ranks' sums."""
        count = torch.tensor([self.count], dtype=torch.float64, device=self.total.device)
        for value in (self.total, self.outer, count):
            distributed.all_reduce_sum(value)
        self.count = int(count)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean `[D]` and covariance `[D, D]`, the latter divided by N − 1."""
        mu = self.total / self.count
        sigma = (self.outer - torch.outer(mu, mu) * self.count) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of images.

    Attributes:
        count: number of images; None where published statistics do not say.
        moments: mean and covariance, float64 `[D]` and `[D, D]`; None if they were not asked for.
        kept: features, float32 `[count, D]` in index order; None if they were not asked for.
    """

    count: int | None
    moments: tuple[np.ndarray, np.ndarray] | None = None
    kept: np.ndarray | None = None

    @classmethod
    def from_features(cls, features: np.ndarray, moments: bool = True) -> FeatureSet:
        if not moments:
            return cls(len(features), kept=features)
        sums = Moments(features.shape[1])
        for start in range(0, len(features), 1024):
            sums.add(torch.from_numpy(features[start : start + 1024]))
        return cls(len(features), sums.finish(), features)

    @property
    def mu(self) -> np.ndarray:
        return self._asked_moments()[0]

    @property
    def sigma(self) -> np.ndarray:
        return self._asked_moments()[1]

    @property
    def features(self) -> np.ndarray:
        if self.kept is None:
            raise ValueError("these features were not kept")
        return self.kept

    def _asked_moments(self) -> tuple[np.ndarray, np.ndarray]:
        if self.moments is None:
            raise ValueError("the moments of these features were not computed")
        return self.moments


def extract(
    batches: Iterable[Tensor],
    network: FeatureNetwork,
    count: int,
    keep: bool = False,
    moments: bool = True,
    desc: str = "features",
) -> FeatureSet:
    """Features of `count` images, of which `batches` are this rank's share. Every rank returns the same.

    Args:
        batches: uint8 images `[B, C, H, W]`; together the images of this rank's `distributed.shard(count)`.
        keep: gather the features themselves; without it, memory does not grow with `count`.
        moments: compute mean and covariance.

    Raises:
        UserError: on every rank, if one of them has an image that cannot be read or a feature that is not
            finite.
    """
    if count < 2:
        raise UserError(f"found {count} image; statistics need at least 2")
    sums = Moments(network.dim, _sum_device(network.device)) if moments else None
    kept = [torch.empty([0, network.dim])]

    def add(first: int, images: Tensor) -> None:
        features = network.features(images)
        _check_finite(features, first)
        if sums is not None:
            sums.add(features)
        if keep:
            kept.append(features.cpu())

    for_all_batches(add, batches, count, desc)
    if sums is not None:
        sums.reduce()
    features = gather_rows(torch.cat(kept), count).numpy() if keep else None
    return FeatureSet(count, None if sums is None else sums.finish(), features)


def _sum_device(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")  # mps has no float64


def _check_finite(features: Tensor, first: int) -> None:
    if not bool(features.isfinite().all()):
        bad = first + int((~features.isfinite().all(1)).nonzero()[0])
        raise UserError(f"features of image {bad} are not finite; the detector or the image is damaged")


def for_all_batches(
    action: Callable[[int, Tensor], None], batches: Iterable[Tensor], count: int, desc: str | None = None
) -> None:
    """Call `action` with each of this rank's batches and the index of its first image.

    If it fails on one rank with a user's error, every rank raises that error.
    """
    part, message = distributed.shard(count), None
    first = part.start
    try:
        with progress(len(part), desc=desc, show=distributed.rank() == 0) as bar:
            for images in batches:
                action(first, images)
                first += len(images)
                bar.update(len(images))
    except UserError as error:
        message = error.message
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    messages = [message]
    if dist.is_initialized():
        messages = [None] * distributed.world_size()
        dist.all_gather_object(messages, message)
    reason = next((m for m in messages if m is not None), None)
    if reason is not None:
        raise UserError(reason)


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """Rows of all ranks `[count, D]` on the CPU, each rank having passed the rows of its `distributed.shard(count)`."""
    if not dist.is_initialized():
        return rows
    sizes = [len(distributed.shard(count, rank)) for rank in range(distributed.world_size())]
    padded = torch.zeros([max(sizes), rows.shape[1]])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])
