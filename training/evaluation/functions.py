"""Metrics from Python: sets of images in folders, archives, files or memory, compared in three lines.

`fid.compute_fid`, `fid.compute_kid` and `prdc.compute_prdc` are made of this. Errors are `UserError`, one line each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from models.detectors import Detector, load_detector
from torch_utils.device import configure_backends, pick_device
from torch_utils.metrics.features import FeatureSet
from torch_utils.metrics.image_set import ImageDataset

from .extractor import Extractor
from .sources import open_images, open_reference

#: A folder, archive or file; or images in memory, uint8 `[N, H, W, C]`, such as `models.Student.sample` gives.
Images = str | Path | ArrayLike


def as_features(values: Images) -> Tensor | None:
    """Features `[N, D]`; None for images: a path, or pixels in memory."""
    if isinstance(values, (str, Path)):
        return None
    features = torch.as_tensor(values)
    return None if features.ndim > 2 else features


@dataclass(frozen=True)
class Comparison:
    """Two sets of images and the detector they are compared by.

    Attributes:
        images: what is judged.
        reference: what it is compared with; for the Fréchet distance also statistics, a URL or a registered name.
        detector: name, path, or a loaded one.
    """

    images: Images
    reference: Images
    detector: str | Path | Detector = "inception"
    resize: str = "tf1"
    batch: int = 64
    workers: int = 0
    device: torch.device | str | None = None

    def sets(self, keep: bool) -> tuple[FeatureSet, FeatureSet]:
        """The features of both sets (`keep`), or their moments."""
        source = open_images(self.images) if isinstance(self.images, (str, Path)) else _in_memory(self.images)
        if isinstance(self.reference, (str, Path)):
            open_ref = open_reference(str(self.reference), statistics=not keep)
        else:
            in_memory = _in_memory(self.reference)
            open_ref = lambda: in_memory  # noqa: E731
        extractor = self.extractor()
        reference = extractor.reference(open_ref(), keep, moments=not keep)
        return extractor.describe(source, [np.arange(len(source))], keep, moments=not keep)[0], reference

    def extractor(self) -> Extractor:
        detector = self.detector
        if not isinstance(detector, Detector):
            configure_backends()
            device = pick_device(None if self.device is None else str(self.device))
            detector = load_detector(str(detector), device, self.resize)
        return Extractor(detector, self.batch, self.workers)


def _in_memory(images: ArrayLike) -> ImageDataset:
    return ImageDataset.of_array(images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images))
