"""What a command line names as images, features or statistics, and which of them are taken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dnnlib import UserError
from models.registry import ASSETS
from models.sampling import Sampler
from torch_utils.arrays import names_in
from torch_utils.metrics.features import choose, shard
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


def seeded_batches(sampler: Sampler, seeds: Sequence[int], class_index: int | None, batch: int) -> Iterator[Tensor]:
    """uint8 images `[B, C, H, W]` of this rank's share of `seeds`, sampled."""
    part = shard(len(seeds))
    own = seeds[part.start : part.stop]
    for start in range(0, len(own), batch):
        images = sampler.images(own[start : start + batch], class_index)
        yield torch.from_numpy(images).permute(0, 3, 1, 2)
