"""Where images are: a folder or archive of images of any sizes (ImageNet, FFHQ, AFHQ, COCO), an `.npz`, CIFAR-10, LSUN.

Pixels are read as everywhere in this program (`torch_utils.metrics.image_set`).
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ImageOps

from dnnlib import UserError, first_line, need
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.metrics.pixels import ImageHeader, open_image, to_pixels

from .cifar10 import CIFAR_BATCH, Cifar10


class Source(Protocol):
    """Pictures by index as uint8 arrays, and the class of each if there are classes.

    Attributes:
        headers: of the files that were loaded, by name.
    """

    labels: list[int] | None
    headers: dict[str, ImageHeader]

    def __len__(self) -> int: ...

    def load(self, index: int, upright: bool) -> np.ndarray: ...

    def digest(self) -> str: ...


class Files:
    """Images in a folder, an archive or an `.npz`.

    Args:
        labels: `auto`: those of `dataset.json`, if there is one; `folders`: the first folders of the names, in order.
    """

    def __init__(self, path: Path, labels: str) -> None:
        self.images = ImageDataset(path)
        self.labels: list[int] | None = None
        self.headers: dict[str, ImageHeader] = {}
        if labels == "auto" and self.images.labels is not None:
            self.labels = self.images.labels.tolist()
        if labels == "folders":
            folders = [name.split("/")[0] if "/" in name else "" for name in self.images.names]
            if "" in folders or len(set(folders)) == 1:
                raise UserError(f"{path} has no folders that could be classes; leave the labels out", "labels")
            classes = {folder: index for index, folder in enumerate(sorted(set(folders)))}
            self.labels = [classes[folder] for folder in folders]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, upright: bool) -> np.ndarray:
        if self.images.path.suffix == ".npz":
            return self.images.load(index).transpose(1, 2, 0)
        name = self.images.names[index]
        with self.images.open(name) as image:
            self.headers[name] = ImageHeader.of(image)
            return to_pixels(ImageOps.exif_transpose(image) if upright else image)

    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.images.names).encode(errors="surrogateescape")).hexdigest()


class Lsun:
    """An LSUN category: an lmdb folder of encoded images, in the order of its keys."""

    labels: list[int] | None = None

    def __init__(self, path: Path) -> None:
        self.headers: dict[str, ImageHeader] = {}
        lmdb = need("lmdb", "pip install lmdb")
        try:
            self.store = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise UserError(f"{path} is not a readable lmdb folder ({first_line(error)})") from None
        with self.store.begin() as transaction, closing(transaction.cursor()) as cursor:
            self.keys = list(cursor.iternext(keys=True, values=False))
        if not self.keys:
            raise UserError(f"{path} holds no image")

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, upright: bool) -> np.ndarray:
        key = self.keys[index]
        with self.store.begin() as transaction:
            content = transaction.get(key)
        with open_image(lambda: io.BytesIO(content), repr(key)) as image:
            self.headers[repr(key)] = ImageHeader.of(image)
            return to_pixels(ImageOps.exif_transpose(image) if upright else image)

    def digest(self) -> str:
        return hashlib.sha256(b"\0".join(self.keys)).hexdigest()


def open_pictures(path: Path, labels: str, split: str) -> Source:
    """The source at a path, by what is there."""
    if path.is_dir() and (path / "data.mdb").exists():
        return Lsun(path)
    if path.is_dir() and any(CIFAR_BATCH.fullmatch(name) for name in os.listdir(path)):
        return Cifar10(path, split)
    if path.is_file() and tarfile.is_tarfile(path):
        return Cifar10(path, split)
    if split != "train":
        raise UserError(f"{path} has no split but all of it; it is CIFAR-10 that has a test split", "split")
    return Files(path, labels)
