"""The CLIP score of a set of images: which caption belongs to which, and the cosines of all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dnnlib import UserError
from models.detectors.clip_score import ClipScorer
from torch_utils.metrics.features import decoded_batches, for_all_batches, gather_rows
from torch_utils.metrics.image_set import ImageDataset

#: Names of sample.py, in folders and in archives.
SEED = re.compile(r"(?:.*/)?(?:img)?(\d{1,10})\.png")


def match_captions(names: Sequence[str], captions: Sequence[str]) -> list[str]:
    """The caption of each image: of `000012.png`, as `sample.py` names them, the one that it was sampled with, number
    12 (they start again at the end); of others that in its place.

    Raises:
        UserError: other names, and not as many captions.
    """
    seeds = [SEED.fullmatch(name) for name in names]
    if all(seeds):
        return [captions[int(seed[1]) % len(captions)] for seed in seeds if seed]
    if len(captions) != len(names):
        raise UserError(
            f"there are {len(captions)} captions for {len(names)} images that are not named by seeds; expected one for "
            "each image, in the order of their names",
            "captions",
        )
    return list(captions)


def all_cosines(
    images: ImageDataset, captions: Sequence[str], scorer: ClipScorer, batch: int, workers: int
) -> np.ndarray:
    """Cosines float32 `[N]` of images and captions, the same on every rank, each of which computes its share."""
    found = [torch.zeros(0)]

    def score(first: int, pixels: Tensor) -> None:
        found.append(scorer.cosines(pixels, captions[first : first + len(pixels)]))

    for_all_batches(score, decoded_batches(images, batch, workers), len(images))
    return gather_rows(torch.cat(found)[:, None], len(images))[:, 0].numpy()
