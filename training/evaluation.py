"""Evaluation: from what a command line names to sets of features, and from a result to a line of `metrics.jsonl`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from models.detectors import Detector
from models.registry import ASSETS
from models.sampling import Sampler
from torch_utils import distributed
from torch_utils.features import (
    FeatureSet,
    check_moments,
    choose,
    decoded_batches,
    extract,
    names_in,
    read_arrays,
    read_meta,
    shard,
    write_arrays,
)

from .dataset import ImageDataset

EDM_REFERENCES = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs"
#: Reference statistics by the name of the data set (as EDM publishes them), and the images shipped with this program.
REFERENCES: dict[str, str] = {
    "cifar10": f"{EDM_REFERENCES}/cifar10-32x32.npz",
    "ffhq": f"{EDM_REFERENCES}/ffhq-64x64.npz",
    "afhqv2": f"{EDM_REFERENCES}/afhqv2-64x64.npz",
    "imagenet64": f"{EDM_REFERENCES}/imagenet-64x64.npz",
    "emoji32": str(ASSETS / "emoji-32x32.zip"),
}


def locate(name: str) -> Path:
    """The file or folder that a name of `REFERENCES`, a URL or a path stands for; what is remote is fetched."""
    from dnnlib.download import cache_dir, fetch  # keeps requests out of programs that never download

    place = REFERENCES.get(name, name) if not Path(name).exists() else name
    if not place.startswith(("https://", "http://")):
        return Path(place)
    base = place.split("?")[0].rsplit("/", 1)[-1] or "reference.npz"
    prefix = "" if name in REFERENCES else hashlib.sha256(place.encode()).hexdigest()[:8] + "-"
    return fetch([place], cache_dir() / "fid-refs" / f"{prefix}{base}")


def content_kind(path: Path) -> str:
    """What `path` holds: `statistics` (mu, sigma), `features`, or `images`."""
    if path.suffix != ".npz" or path.is_dir():
        return "images"
    names = names_in(path)
    if "mu" in names or "sigma" in names:
        return "statistics"
    return "features" if "features" in names else "images"


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and contents of its images."""
    digest = hashlib.sha256()
    if path.is_dir():
        for name in ImageDataset(path).names:
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.sha256((path / name).read_bytes()).digest())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def split_blocks(count: int, num: int | None, seeds: Sequence[int], trials: int) -> list[np.ndarray]:
    """Indices of the images of each evaluation.

    Args:
        count: images there are.
        num: images of one evaluation; None for all (with `trials`, for an equal share).
        seeds: one random choice of `num` images for each.
        trials: consecutive blocks of images, in the order of their names; 1 for none.

    Raises:
        click.ClickException: more images are asked for than there are, or both ways at once.
    """
    if trials == 1:
        if len(seeds) > 1 and (num is None or num >= count):
            raise click.ClickException(
                f"{len(seeds)} seeds would choose the same {count} images; give --num below that, or use --trials"
            )
        return [choose(count, num, seed) for seed in seeds]
    if len(seeds) > 1:
        raise click.ClickException("several seeds and --trials are two ways of repeating; give one of them")
    size = count // trials if num is None else num
    if size < 2 or size * trials > count or (num is None and count % trials):
        raise click.ClickException(
            f"{count} images do not make {trials} blocks of {num or f'{count / trials:g}'}; change --trials or --num"
        )
    return [np.arange(t * size, (t + 1) * size) for t in range(trials)]


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
            raise click.ClickException(
                f"{path} holds {features.dtype} {list(features.shape)}; expected float32 [N, {self.detector.dim}]"
            )
        if not np.isfinite(features).all():
            raise click.ClickException(f"{path} holds features that are not finite; make it again")
        return features

    def _check_detector(self, path: Path, meta: dict[str, Any]) -> None:
        """Files of this program say which detector made them."""
        changed = [f"{k} {meta[k]}" for k, v in self.detector.identity().items() if k in meta and meta[k] != v]
        if changed:
            raise click.ClickException(f"{path} was made with {', '.join(changed)}; choose that, or make it again")

    def count(self, path: Path) -> int:
        """Number of images or features at `path`."""
        kind = content_kind(path)
        if kind == "statistics":
            raise click.ClickException(f"{path} holds statistics of images; expected images or their features")
        return len(self._read_features(path)) if kind == "features" else len(ImageDataset(path))

    def without_cache(self) -> Extractor:
        """For the reference: the cache is for the images that are judged."""
        return replace(self, cache=None)

    def reference(self, path: Path, keep: bool, moments: bool = True) -> FeatureSet:
        """The feature set of a reference: statistics, features, or all images at `path`."""
        if content_kind(path) != "statistics":
            return self.without_cache().blocks(path, [np.arange(self.count(path))], keep, moments)[0]
        if keep:
            raise click.ClickException(
                f"{path} holds mu and sigma only; this metric needs reference images or features"
            )
        arrays = read_arrays(path)
        if not {"mu", "sigma"} <= set(arrays):
            raise click.ClickException(f"{path} holds {', '.join(arrays)}; reference statistics need mu and sigma")
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
        raise click.ClickException(
            f"--features={cache} holds features of other {', '.join(changed)}; choose another file"
        )
    return True


def _digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()


def seeded_batches(sampler: Sampler, seeds: Sequence[int], class_index: int | None, batch: int) -> Iterator[Tensor]:
    """uint8 images `[B, C, H, W]` of this rank's share of `seeds`, sampled."""
    part = shard(len(seeds))
    own = seeds[part.start : part.stop]
    for start in range(0, len(own), batch):
        images = sampler.images(own[start : start + batch], class_index)
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------------
# Results


def append_records(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Append a JSON line for each record, with versions and the date: all of them or, on a full disk, none."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines = "".join(json.dumps({**record, "versions": versions, "date": date}) + "\n" for record in records)
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(lines.encode()) < len(lines.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise
