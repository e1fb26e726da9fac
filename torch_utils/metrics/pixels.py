"""The pixels of an image file, whatever its format, and what has to be said of them.

uint8, grey or RGB. 16-bit grey is scaled (v / 257, rounded), of 16-bit colours the high byte is taken; what is
transparent is composed on white; palettes, CMYK and the like become RGB. Of several frames the first is read. An EXIF
orientation is not applied: pixels are read as they are stored, as by the tools that published numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from dnnlib import UserError, first_line

from ..arrays import UNREADABLE

#: Pillow knows other formats by their content, among them some that start programs.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
#: What Pillow raises on an image that is damaged, or larger than anybody needs.
NO_IMAGE = (SyntaxError, ValueError, LookupError, TypeError, Image.DecompressionBombError, MemoryError)
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
#: From the values of PNG's grey of 2 and 4 bits to those of 8, as Pillow reads all of them but the transparent one.
GREY_SCALES = {"L;2": 85, "L;4": 17}
ORIENTATION = 0x0112


@contextmanager
def open_image(opened: Callable[[], IO[bytes]], place: str) -> Iterator[Image.Image]:
    """The image in the file that `opened` gives; whatever is wrong with it becomes one line that begins with `place`.

    Raises:
        UserError: it is none, or damaged.
    """
    try:
        with opened() as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise UserError(f"{place} is not a readable image (none of {', '.join(FORMATS)}, or damaged)") from None
    except (*NO_IMAGE, *UNREADABLE) as error:
        raise UserError(f"{place} is not a readable image ({first_line(error)})") from None


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image file says: height and width, and what becomes of its pixels."""

    size: tuple[int, int]
    is_grey: bool
    is_transparent: bool
    is_turned: bool
    is_animated: bool

    @classmethod
    def of(cls, image: Image.Image) -> ImageHeader:
        return cls(
            (image.height, image.width),
            is_grey=image.mode in GREY_MODES,
            is_transparent=image.mode in ALPHA_MODES or "transparency" in image.info,
            is_turned="exif" in image.info and image.getexif().get(ORIENTATION, 1) not in (0, 1),
            is_animated=getattr(image, "n_frames", 1) > 1,
        )


def remarks(headers: Mapping[str, ImageHeader], turned: str = "not applied") -> Iterator[str]:
    """What happens to images that are not plain ones, a line for each kind of them.

    Args:
        headers: by name.
        turned: what is done with an EXIF orientation.
    """
    kinds = {
        "can be transparent and are composed on white": [n for n, h in headers.items() if h.is_transparent],
        f"have an EXIF orientation, which is {turned}": [n for n, h in headers.items() if h.is_turned],
        "have several frames, of which the first is read": [n for n, h in headers.items() if h.is_animated],
    }
    for what, names in kinds.items():
        if names:
            yield f"{len(names)} of {len(headers)} images {what} ({names[0]} is the first)"


def to_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an image of any mode as uint8 `[H, W]`, if it is grey, or `[H, W, 3]`.

    Raises:
        ValueError: values that have no scale.
    """
    transparency, stored = image.info.get("transparency"), _stored_as(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"pixel format {image.mode} has no scale; make it 8 or 16 bits a channel")
        grey = ((values + 128) // 257).astype(np.uint8)  # v / 257, rounded
        return grey if transparency is None else np.where(values == transparency, np.uint8(255), grey)
    if stored == "RGB;16B" and transparency is not None:
        raise ValueError("16-bit colours, one of them transparent, are not read; make it 8 bits a channel")
    is_grey = image.mode in GREY_MODES
    if stored in GREY_SCALES and transparency is not None:
        image = image.copy()  # decoded, or the value would be read again
        image.info["transparency"] = transparency * GREY_SCALES[stored]
    if image.mode in ALPHA_MODES or transparency is not None:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("L" if is_grey else "RGB"))


def _stored_as(image: Image.Image) -> str:
    """Pillow's word for how a PNG that is not decoded yet stores its pixels; empty for others."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles and image.format == "PNG" else ""
