"""From a set of images (`sources`) to what a metric compares: moments and features (`FeatureSet`).

Features come from a detector, or from a file that holds them already; what a file says of its detector must fit. A
cache, an `.npz`, keeps features with what they were made of and a checksum over their rows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from models.detectors import Detector
from models.sampling import Sampler
from torch_utils import distributed
from torch_utils.arrays import write_arrays
from torch_utils.metrics.features import FeatureSet, decoded_batches, extract
from torch_utils.metrics.image_set import ImageDataset

from .sources import CHECKSUM, Source, StoredFeatures, StoredStatistics, rows_checksum


@dataclass(frozen=True)
class Extractor:
    """How features are made.

    Attributes:
        batch: images at a time, per process.
        workers: processes that decode images, per process.
    """

    detector: Detector
    batch: int
    workers: int

    def describe(
        self,
        source: ImageDataset | StoredFeatures,
        blocks: Sequence[np.ndarray],
        keep: bool,
        moments: bool = True,
        cache: str | None = None,
    ) -> list[FeatureSet]:
        """A feature set for each block of indices.

        Args:
            keep, moments: what the sets hold, the features themselves or their moments.
            cache: where the features of images are kept, and taken from.
        """
        if isinstance(source, StoredFeatures):
            self._check_detector(source)
            return [FeatureSet.from_features(source.rows[block], moments) for block in blocks]
        if cache is None:
            return [self._extract(source[block], keep, moments) for block in blocks]
        union = np.unique(np.concatenate(blocks))
        made_of = {"images": distributed.on_first_rank(source.fingerprint), "indices": _digest(union)}
        rows = self.cached(cache, made_of, lambda: self._extract(source[union], keep=True, moments=False))
        if len(rows) != len(union):
            raise UserError(f"{cache} holds {len(rows)} features of {len(union)} images; remove it", "features")
        return [FeatureSet.from_features(rows[np.searchsorted(union, block)], moments) for block in blocks]

    def reference(self, source: Source, keep: bool, moments: bool = True) -> FeatureSet:
        """The feature set of all that a reference holds."""
        if not keep and not moments:
            return FeatureSet(None if isinstance(source, StoredStatistics) else len(source))
        if not isinstance(source, StoredStatistics):
            return self.describe(source, [np.arange(len(source))], keep, moments)[0]
        self._check_detector(source)
        return FeatureSet(source.count, (source.mu, source.sigma))

    def cached(self, cache: str, made_of: dict[str, Any], compute: Callable[[], FeatureSet]) -> np.ndarray:
        """Features from the cache if it holds those of `made_of`, else from `compute`, which are then written there."""
        path = Path(cache)
        meta = {**made_of, **self.detector.identity()}
        stored = StoredFeatures.read(path) if distributed.on_first_rank(path.exists) else None
        if stored is None:
            features = compute().features
            whole = {**meta, CHECKSUM: rows_checksum(features)}
            distributed.on_first_rank(lambda: write_arrays(path, whole, features=features))
            return features
        changed = [name for name in meta if stored.meta.get(name) != meta[name]]
        if changed:
            raise UserError(f"--features={cache} holds features of other {', '.join(changed)}; choose another file")
        return stored.rows

    def sampled(
        self,
        sampler: Sampler,
        seeds: Sequence[int],
        class_index: int | None = None,
        keep: bool = False,
        moments: bool = True,
        desc: str = "images",
    ) -> FeatureSet:
        """The feature set of the images that a sampler makes of `seeds`, every rank its share."""
        part = distributed.shard(len(seeds))
        batches = sampler.batches(seeds[part.start : part.stop], class_index, self.batch)
        images = (torch.from_numpy(batch).permute(0, 3, 1, 2) for batch in batches)
        return extract(images, self.detector, len(seeds), keep, moments, desc)

    def _extract(self, images: ImageDataset, keep: bool, moments: bool) -> FeatureSet:
        batches = decoded_batches(images, self.batch, self.workers)
        return extract(batches, self.detector, len(images), keep, moments, images.path.name or "images")

    def _check_detector(self, source: StoredFeatures | StoredStatistics) -> None:
        """Files of this program say which detector made them; those of others must at least have its dimension."""
        identity = self.detector.identity()
        changed = [f"{k} {source.meta[k]}" for k, v in identity.items() if source.meta.get(k, v) != v]
        if changed:
            raise UserError(f"{source.path} was made with {', '.join(changed)}; choose that, or make it again")
        if isinstance(source, StoredFeatures):
            held, dim = f"features {list(source.rows.shape)}", source.rows.shape[1]
        else:
            held, dim = f"mu {list(source.mu.shape)} and sigma {list(source.sigma.shape)}", len(source.mu)
        if dim != self.detector.dim:
            raise UserError(
                f"{source.path} holds {held}, the detector has {self.detector.dim} features; choose the --detector "
                "they were made with, or make them again"
            )


@dataclass(frozen=True)
class Reference:
    """What images are compared with: what the command line calls it, what that holds, and its feature set."""

    name: str
    source: Source
    features: FeatureSet

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Which it is, for records; every rank asks."""
        digest = distributed.on_first_rank(self.source.fingerprint)
        return {"reference": self.name, "reference_N": self.features.count, "reference_sha256": digest}


def _digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
