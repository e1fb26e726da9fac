"""From network output to pictures."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dnnlib import replacing


def quantized(images: Tensor) -> Tensor:
    """Images in [-1, 1], `[N, C, H, W]` → uint8 `[N, H, W, C]`, on their device."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def to_uint8(images: Tensor) -> np.ndarray:
    """The same on the CPU, as an array."""
    return quantized(images).cpu().numpy()


def to_pil(image: np.ndarray) -> Image.Image:
    """A uint8 `[H, W, C]` array as a PIL image; one channel becomes grey."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def draw_grid(rows: Sequence[np.ndarray], labels: Sequence[str] | None = None, scale: int = 1) -> Image.Image:
    """One picture of rows of uint8 images `[N, H, W, C]`, each row with its label above it."""
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    header = 16 if labels else 0
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * width, len(rows) * (height + header)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        top = r * (height + header)
        if labels:
            draw.text((4, top + 2), labels[r], fill="black")
        for c, pixels in enumerate(row):
            tile = to_pil(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (c * width, top + header))
    return canvas


def square_rows(images: np.ndarray) -> list[np.ndarray]:
    """Split `[N, H, W, C]` into rows of a nearly square grid."""
    columns = math.ceil(math.sqrt(len(images)))
    return [images[i : i + columns] for i in range(0, len(images), columns)]


def save_picture(picture: Image.Image, path: str | Path, dpi: int = 96) -> None:
    """Write a PNG that says how many dots make an inch, all or nothing."""
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", dpi=(dpi, dpi))
