"""What a command line names as a set of images: the images, their features, or their statistics.

A set is opened once. Whatever it is, it knows its path, what it holds and a fingerprint of that; images and features
also how many they are, and give parts of themselves by index.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from dnnlib import UserError, sha256_of
from models.registry import ASSETS
from torch_utils import distributed
from torch_utils.arrays import described, read_arrays, read_headers, read_meta
from torch_utils.metrics.features import choose
from torch_utils.metrics.frechet import check_moments
from torch_utils.metrics.image_set import ImageDataset

EDM_REFERENCES = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs"
#: Reference statistics by the name of the data set (as EDM publishes them), and the images shipped with this program.
REFERENCES: dict[str, str] = {
    "cifar10": f"{EDM_REFERENCES}/cifar10-32x32.npz",
    "ffhq": f"{EDM_REFERENCES}/ffhq-64x64.npz",
    "afhqv2": f"{EDM_REFERENCES}/afhqv2-64x64.npz",
    "imagenet64": f"{EDM_REFERENCES}/imagenet-64x64.npz",
    "emoji32": str(ASSETS / "emoji-32x32.zip"),
}
#: The entry of a feature file's description that its rows must have.
CHECKSUM = "features_sha256"


# ------------------------------------------------------------------------------------------------------------------
# What a path holds


@dataclass(frozen=True)
class StoredFeatures:
    """Features, float32 `[N, D]` in the order of their images, and what is known of their making."""

    path: Path
    rows: np.ndarray
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def read(cls, path: Path) -> StoredFeatures:
        """Features of this program, whose checksum is compared, or of others."""
        arrays = read_arrays(path, ("features", "meta"))
        if "features" not in arrays:
            raise UserError(f"{path} holds no features; choose another file")
        rows, meta = arrays["features"], read_meta(arrays)
        if rows.ndim != 2 or rows.dtype != np.float32 or 0 in rows.shape:
            raise UserError(f"{path} holds features {rows.dtype} {list(rows.shape)}; expected float32 [N, D]")
        if len(rows) < 2:
            raise UserError(f"{path} holds features of one image; expected two or more")
        if "meta" in arrays and meta.get(CHECKSUM) != rows_checksum(rows):
            raise UserError(f"{path} does not hold the features that were written there; remove it and make it again")
        if not np.isfinite(rows).all():
            raise UserError(f"{path} holds features that are not finite; make it again")
        return cls(path, rows, meta)

    def fingerprint(self) -> str:
        return sha256_of(self.path)


@dataclass(frozen=True)
class StoredStatistics:
    """Mean `[D]` and covariance `[D, D]` of features, float64, and what is known of their making."""

    path: Path
    mu: np.ndarray
    sigma: np.ndarray
    meta: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> StoredStatistics:
        arrays = read_arrays(path, ("mu", "sigma", "meta"))
        if not {"mu", "sigma"} <= set(arrays):
            raise UserError(f"{path} holds {', '.join(arrays)}; reference statistics need mu and sigma")
        try:
            mu, sigma, _ = check_moments(arrays["mu"], arrays["sigma"])
        except ValueError as error:
            raise UserError(f"{path} holds no mean and covariance: {error}; make it again with fid.py ref") from None
        return cls(path, mu.numpy(), sigma.numpy(), read_meta(arrays))

    @property
    def count(self) -> int | None:
        """Of how many images, if the file says so."""
        num = self.meta.get("num")
        return num if type(num) is int else None

    def fingerprint(self) -> str:
        return sha256_of(self.path)


Source = ImageDataset | StoredFeatures | StoredStatistics


def open_source(path: str | Path, statistics: bool = False) -> Source:
    """What `path` holds; of statistics beside images or features (as in guided-diffusion's files) those asked for.

    Raises:
        UserError: nothing is there, or nothing of use.
    """
    path = Path(path)
    if path.suffix == ".npy" and path.is_file():
        raise UserError(f"{path} is a single array; expected an .npz of mu and sigma (fid.py ref writes one) or images")
    if path.suffix != ".npz" or path.is_dir():
        return ImageDataset(path)
    headers = read_headers(path)
    has_statistics = "mu" in headers or "sigma" in headers
    if has_statistics and statistics:
        return StoredStatistics.read(path)
    if "features" in headers:
        return StoredFeatures.read(path)
    if any(header.is_images for header in headers.values()):
        return ImageDataset(path)
    if has_statistics:
        return StoredStatistics.read(path)
    raise UserError(
        f"{path} holds {described(headers)}; expected one uint8 array of images [N, H, W, 1 or 3], features, "
        "or statistics mu and sigma"
    )


def open_images(path: str | Path) -> ImageDataset | StoredFeatures:
    """Images or their features.

    Raises:
        UserError: statistics, too, for they cannot be told apart into images.
    """
    source = open_source(path)
    if isinstance(source, StoredStatistics):
        raise UserError(f"{path} holds mu and sigma only; this metric needs images or their features")
    return source


@overload
def open_reference(name: str, statistics: Literal[False]) -> Callable[[], ImageDataset | StoredFeatures]: ...


@overload
def open_reference(name: str, statistics: bool) -> Callable[[], Source]: ...


def open_reference(name: str, statistics: bool) -> Callable[[], Source]:
    """A function that gives what a name of `REFERENCES`, a URL or a path stands for.

    What is on this machine is opened now, so that a wrong path is found before anything is fetched; what is remote is
    fetched by rank 0 when the function is called.

    Args:
        statistics: take a mean and a covariance, and rather than the images beside them; else they are refused.
    """

    def opened_at(path: str | Path) -> Source:
        return open_source(path, True) if statistics else open_images(path)

    place = REFERENCES.get(name, name) if not Path(name).exists() else name
    if not place.startswith(("https://", "http://")):
        opened = opened_at(place)
        return lambda: opened
    prefix = "" if name in REFERENCES else hashlib.sha256(place.encode()).hexdigest()[:8] + "-"
    return lambda: opened_at(distributed.on_first_rank(functools.partial(_fetch, place, prefix)))


def _fetch(url: str, prefix: str) -> Path:
    from dnnlib.download import cache_dir, fetch  # keeps requests out of programs that never download

    base = url.split("?")[0].rsplit("/", 1)[-1] or "reference.npz"
    return fetch([url], cache_dir() / "fid-refs" / f"{prefix}{base}")


def rows_checksum(rows: np.ndarray) -> str:
    """SHA-256 over the shape and the values of features."""
    digest = hashlib.sha256(repr(rows.shape).encode())
    digest.update(np.ascontiguousarray(rows, dtype="<f4").data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# Which images


def split_blocks(count: int, num: int | None, seeds: Sequence[int], trials: int) -> list[np.ndarray]:
    """Indices of the images of each evaluation.

    Args:
        count: images there are.
        num: images of one evaluation; None for all (with `trials`, for an equal share).
        seeds: one random choice of `num` images for each.
        trials: consecutive blocks of images, in the order of their names; 1 for none.

    Raises:
        UserError: more images are asked for than there are, or both ways at once.
    """
    if trials == 1:
        if len(seeds) > 1 and (num is None or num >= count):
            raise UserError(
                f"{len(seeds)} seeds would choose the same {count} images; give --num below that, or use --trials"
            )
        return [choose(count, num, seed) for seed in seeds]
    if len(seeds) > 1:
        raise UserError("several seeds and --trials are two ways of repeating; give one of them")
    size = count // trials if num is None else num
    if size < 2 or size * trials > count or (num is None and count % trials):
        raise UserError(
            f"{count} images do not make {trials} blocks of {num or f'{count / trials:g}'}; change --trials or --num"
        )
    return [np.arange(t * size, (t + 1) * size) for t in range(trials)]
