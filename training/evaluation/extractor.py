"""Evaluation: from what a command line names to sets of features, and from a result to a line of `metrics.jsonl`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError
from models.detectors import Detector
from torch_utils import distributed
from torch_utils.arrays import check_moments, read_arrays, read_meta, write_arrays
from torch_utils.metrics.features import FeatureSet, decoded_batches, extract
from torch_utils.metrics.image_set import ImageDataset

from .sources import content_kind, fingerprint

# ------------------------------------------------------------------------------------------------------------------
# Sets of features


@dataclass(frozen=True)
class Extractor:
    """How features are made.

    Attributes:
        batch: images at a time, per process.
        workers: processes that decode images, per process.
        cache: `.npz` for the features of the images; None keeps none.
    """

    detector: Detector
    batch: int
    workers: int
    cache: Path | None = None

    def blocks(self, path: Path, blocks: Sequence[np.ndarray], keep: bool, moments: bool = True) -> list[FeatureSet]:
        """A feature set for each block of indices of the images (or features) at `path`."""
        if content_kind(path) == "features":
            rows = self._read_features(path)
            return [FeatureSet.from_features(rows[block], moments) for block in blocks]
        dataset = ImageDataset(path)
        if self.cache is None:
            return [self._images(dataset, block, keep, moments) for block in blocks]
        union = np.unique(np.concatenate(blocks))
        source = {"images": distributed.on_first_rank(lambda: fingerprint(path)), "indices": _digest(union)}
        rows = self.cached(self.cache, source, lambda: self._images(dataset, union, keep=True, moments=False))
        return [FeatureSet.from_features(rows[np.searchsorted(union, block)], moments) for block in blocks]

    def cached(self, cache: Path, source: dict[str, Any], compute: Callable[[], FeatureSet]) -> np.ndarray:
        """Features from the cache if it holds those of `source`, else from `compute`, which are then written there."""
        meta = {**source, **self.detector.identity()}
        if distributed.on_first_rank(lambda: _holds(cache, meta)):
            return self._read_features(cache)
        features = compute().features
        distributed.on_first_rank(lambda: write_arrays(cache, meta, features=features))
        return features

    def _images(self, dataset: ImageDataset, indices: np.ndarray, keep: bool, moments: bool) -> FeatureSet:
        batches = decoded_batches(dataset, indices, self.batch, self.workers)
        return extract(batches, self.detector, len(indices), keep, moments, dataset.path.name or "images")

    def _read_features(self, path: Path) -> np.ndarray:
        arrays = read_arrays(path)
        self._check_detector(path, read_meta(arrays))
        features = arrays["features"]
        if features.ndim != 2 or features.shape[1] != self.detector.dim or features.dtype != np.float32:
            raise UserError(
                f"{path} holds {features.dtype} {list(features.shape)}; expected float32 [N, {self.detector.dim}]"
            )
        if not np.isfinite(features).all():
            raise UserError(f"{path} holds features that are not finite; make it again")
        return features

    def _check_detector(self, path: Path, meta: dict[str, Any]) -> None:
        """Files of this program say which detector made them."""
        changed = [f"{k} {meta[k]}" for k, v in self.detector.identity().items() if k in meta and meta[k] != v]
        if changed:
            raise UserError(f"{path} was made with {', '.join(changed)}; choose that, or make it again")

    def count(self, path: Path) -> int:
        """Number of images or features at `path`."""
        kind = content_kind(path)
        if kind == "statistics":
            raise UserError(f"{path} holds statistics of images; expected images or their features")
        return len(self._read_features(path)) if kind == "features" else len(ImageDataset(path))

    def without_cache(self) -> Extractor:
        """For the reference: the cache is for the images that are judged."""
        return replace(self, cache=None)

    def reference(self, path: Path, keep: bool, moments: bool = True) -> FeatureSet:
        """The feature set of a reference: statistics, features, or all images at `path`."""
        if content_kind(path) != "statistics":
            return self.without_cache().blocks(path, [np.arange(self.count(path))], keep, moments)[0]
        if keep:
            raise UserError(f"{path} holds mu and sigma only; this metric needs reference images or features")
        arrays = read_arrays(path)
        if not {"mu", "sigma"} <= set(arrays):
            raise UserError(f"{path} holds {', '.join(arrays)}; reference statistics need mu and sigma")
        meta = read_meta(arrays)
        self._check_detector(path, meta)
        check_moments(arrays["mu"], arrays["sigma"], self.detector.dim, path)
        return FeatureSet(meta.get("num"), (arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)))


def _holds(cache: Path, meta: dict[str, Any]) -> bool:
    """Whether the cache is there; one of other features is refused."""
    if not cache.exists():
        return False
    saved = read_meta(read_arrays(cache))
    changed = [name for name in meta if saved.get(name) != meta[name]]
    if changed:
        raise UserError(f"--features={cache} holds features of other {', '.join(changed)}; choose another file")
    return True


def _digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# Results
