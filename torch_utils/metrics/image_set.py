"""Images in a folder or a zip archive, in the layout of EDM's data sets, or in an `.npz` file.

PNG or JPEG files anywhere below the root, in the order of their names; `dataset.json` at the root may hold `labels`, a
list of `[file name, class index]`. An `.npz` holds one uint8 array `[N, H, W, C]` or `[N, H, W]`, the layout of
guided-diffusion's samples; integer labels beside it are not read.
"""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dnnlib import UserError

from ..arrays import NO_ARRAYS, UNREADABLE

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
#: The formats behind them. Pillow knows others by their content, among them some that start programs.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
#: Bytes that one file in an archive may unpack to.
MOST_BYTES = 1 << 28
#: What Pillow raises on an image that is damaged, or larger than anybody needs.
NO_IMAGE = (UnidentifiedImageError, SyntaxError, ValueError, LookupError, TypeError, Image.DecompressionBombError,
            MemoryError)  # fmt: skip


class ImageDataset:
    """Random access to the images below `path`.

    Args:
        path: a folder (searched recursively), a zip archive, or an `.npz` of images.

    Raises:
        UserError: the path is missing, holds no image, or its labels do not match.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._archive: zipfile.ZipFile | None = None
        self._array: np.ndarray | None = None
        self.labels: np.ndarray | None = None
        if self.path.suffix == ".npz" and not self.path.is_dir():
            self._array = read_image_array(self.path)
            self.names = [f"image {index}" for index in range(len(self._array))]
            return
        if self.path.is_dir():
            files = (p for p in self.path.rglob("*") if p.is_file())
            names = [p.relative_to(self.path).as_posix() for p in files]
        elif zipfile.is_zipfile(self.path):
            names = self._zip().namelist()
        else:
            raise UserError(f"{path} is neither a folder nor a zip archive; expected one with images")
        # Hidden files are no images: what a killed process was writing, and what macOS puts beside each file.
        hidden = re.compile(r"(^|/)\.[^/]*$")
        self.names = sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not hidden.search(n))
        if not self.names:
            raise UserError(f"{path} holds no image; expected files ending in {', '.join(EXTENSIONS)}")
        self.labels = self._read_labels() if "dataset.json" in names else None

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict:
        # An open archive cannot cross into a worker process; each opens its own.
        return {**self.__dict__, "_archive": None}

    @property
    def label_dim(self) -> int:
        """Number of classes, 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def load(self, index: int) -> np.ndarray:
        """Image `index` as uint8 `[C, H, W]`; a grey one has C = 1, any other mode becomes RGB."""
        if self._array is not None:
            return self._array[index]
        name = self.names[index]
        try:
            with Image.open(io.BytesIO(self._read(name)), formats=FORMATS) as image:
                pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except (*NO_IMAGE, *UNREADABLE) as error:
            raise UserError(f"{name} in {self.path} is not a readable image ({error})") from None
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def load_all(self) -> np.ndarray:
        """All images as uint8 `[N, C, H, W]`; they must share one shape."""
        first = self.load(0)
        images = np.empty([len(self), *first.shape], dtype=np.uint8)
        for index in range(len(self)):
            image = self.load(index)
            if image.shape != first.shape:
                raise UserError(
                    f"{self.names[index]} in {self.path} has shape {image.shape}, the first image {first.shape}; "
                    "resize and convert the images to one shape (channels, height, width)"
                )
            images[index] = image
        return images

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (*UNREADABLE, ValueError) as error:
                raise UserError(f"{self.path} is a damaged zip archive ({error}); make it again") from None
        return self._archive

    def _read(self, name: str) -> bytes:
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        size = self._zip().getinfo(name).file_size
        if size > MOST_BYTES:
            raise OSError(f"it unpacks to {size} bytes, more than any image")
        return self._zip().read(name)

    def _read_labels(self) -> np.ndarray | None:
        try:
            pairs = json.loads(self._read("dataset.json"))["labels"]
            if pairs is None:
                return None
            by_name = {name: label for name, label in pairs} if isinstance(pairs, list) else {}
            found = [by_name[name] for name in self.names]
            if not all(type(label) is int and 0 <= label < 2**31 for label in found):
                raise ValueError
        except (KeyError, TypeError, ValueError, RecursionError, *UNREADABLE):
            raise UserError(
                f"dataset.json in {self.path} must hold `labels`: null or one [file name, class index] for each image"
            ) from None
        return np.array(found, dtype=np.int64)


def read_image_array(path: Path) -> np.ndarray:
    """The images in an `.npz` file as uint8 `[N, C, H, W]`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a folder, zip or npz of images") from None
    except NO_ARRAYS as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is not a readable npz file ({reason[0][:120]})") from None
    arrays = [a for a in found.values() if a.dtype == np.uint8 and a.ndim in (3, 4) and a.shape[3:] in ((), (1,), (3,))]
    if len(arrays) != 1 or arrays[0].size == 0:
        shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in found.items())
        raise UserError(f"{path} holds {shapes or 'nothing'}; expected one uint8 array [N, H, W, 1 or 3]")
    images = arrays[0] if arrays[0].ndim == 4 else arrays[0][..., None]
    return images.transpose(0, 3, 1, 2)
