"""How an image becomes a square of one size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib import UserError
from dnnlib.progress import progress
from torch_utils.metrics.image_set import ImageDataset

from .sources import Files, Source


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def center_crop(pixels: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """The largest square at the centre, resized."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return resized(np.ascontiguousarray(pixels[top : top + side, left : left + side]), width, height)


def center_crop_wide(pixels: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """The largest part of that shape at the centre, resized, on a black square; None where it is smaller than that."""
    rows, columns = pixels.shape[:2]
    rows, columns = min(rows, round(columns * height / width)), min(columns, round(rows * width / height))
    if rows < height or columns < width:
        return None
    top, left = (pixels.shape[0] - rows) // 2, (pixels.shape[1] - columns) // 2
    part = np.ascontiguousarray(pixels[top : top + rows, left : left + columns])
    square = np.zeros([width, width, *pixels.shape[2:]], dtype=np.uint8)
    start = (width - height) // 2
    square[start : start + height] = resized(part, width, height)
    return square


def center_crop_dhariwal(pixels: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """As guided-diffusion makes its ImageNet: halved by averages, then resized by cubics, then cropped."""
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = width / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - width) // 2, (image.width - width) // 2
    return np.asarray(image)[top : top + width, left : left + width]


TRANSFORMS = {
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
}


@dataclass(frozen=True)
class Conversion:
    """How an image becomes a square.

    Attributes:
        size: width and height; None keeps the images' own.
        transform: one of `TRANSFORMS`; None takes square images alone.
        upright: apply the EXIF orientation.
    """

    size: tuple[int, int] | None
    transform: str | None
    upright: bool

    def __post_init__(self) -> None:
        if self.transform is not None and self.size is None:
            raise UserError(f"{self.transform} needs the size of the images that it is to make", "resolution")
        is_wide = self.size is not None and self.size[0] != self.size[1]
        if is_wide != (self.transform == "center-crop-wide"):
            raise UserError("center-crop-wide, and nothing else, takes a width x height such as 512x384", "resolution")

    def __call__(self, source: Source, index: int) -> np.ndarray | None:
        """Image `index` as uint8 `[side, side, 1 or 3]`; None if it is too small for the transform."""
        pixels = source.load(index, self.upright)
        height, width = pixels.shape[:2]
        if self.transform is None and height != width:
            raise UserError(f"image {index} is {height}×{width}; choose how it becomes a square, by cropping")
        if self.transform is None or self.size is None:
            square: np.ndarray | None = resized(pixels, *(self.size or (width, height)))
        else:
            square = TRANSFORMS[self.transform](pixels, *self.size)
        return square if square is None else square.reshape(*square.shape[:2], -1)


def squares_of(path: Path, convert: Conversion) -> ImageDataset:
    """The images of a folder or archive as squares in memory, with their labels; grey ones become RGB beside others."""
    source = Files(path, "auto")
    with ThreadPoolExecutor() as pool, progress(len(source)) as bar:
        squares = []
        for square in pool.map(partial(convert, source), range(len(source))):
            assert square is not None  # it is center-crop-wide that leaves images out
            squares.append(square)
            bar.update(1)
    channels = max(square.shape[2] for square in squares)
    images = np.stack([np.broadcast_to(square, (*square.shape[:2], channels)) for square in squares])
    dataset = ImageDataset.of_array(images)
    dataset.labels = None if source.labels is None else np.asarray(source.labels)
    return dataset
