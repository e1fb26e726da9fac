"""Images in a folder or a zip archive, in the layout of EDM's data sets, or in an `.npz` file.

**Which.** PNG, JPEG, BMP or WebP files anywhere below the root, in the order of their names; nothing whose path has a
hidden part (`.ipynb_checkpoints/`, `._a.png`) or a folder that systems keep for themselves (`__MACOSX/`, `@eaDir/`).
Links are followed, to folders too. What would make the set another one in silence is refused: links to nothing, two
archive entries of one name (`a.png` and `./a.png`, too), images of several sizes. `dataset.json` at the
root may hold `labels`, a list of `[file name, class index]`, one for each image. An `.npz` holds one uint8 array
`[N, H, W, C]` or `[N, H, W]`, the layout of guided-diffusion's samples; integer labels beside it are not read.

`pixels` says which pixels they have; `ImageDataset.remarks` says what of that happened.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import posixpath
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from dnnlib import UserError, check_regular, first_line, parse_json, sha256_of

from ..arrays import UNREADABLE, Header, described, read_arrays, read_headers
from .pixels import ImageHeader, open_image, remarks, to_pixels

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
#: Files that somebody may take for images of the set; they are counted in a remark.
OTHER_IMAGES = (".avif", ".gif", ".heic", ".jxl", ".npy", ".pgm", ".ppm", ".tif", ".tiff")
#: Folders, in lower case, in which systems keep copies and thumbnails.
SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
LABELS = "dataset.json"
#: A class is a number below this; a larger one is a mistake that would make labels fill the memory.
MAX_CLASSES = 1_000_000
#: Bytes that one file in an archive may unpack to.
MOST_BYTES = 1 << 28


class ImageDataset:
    """Random access to the images at `path`; headers of all files are read once, when something asks for the shape.

    Args:
        path: a folder (searched recursively), a zip archive, or an `.npz` of images.

    Attributes:
        names: file names relative to the root, in order.
        labels: class indices, int64 `[N]`, or None.

    Raises:
        UserError: the path is missing, holds no image or an ambiguous one, or its labels do not match.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.labels: np.ndarray | None = None
        self._archive: zipfile.ZipFile | None = None
        self._array: np.ndarray | None = None
        if not self.path.is_dir():
            check_regular(path)
        if self.path.suffix == ".npz" and not self.path.is_dir():
            self._hold(read_image_array(self.path))
            return
        if self.path.is_dir():
            files = sorted(_files_below(self.path))
        elif zipfile.is_zipfile(self.path):
            files = sorted(entry.filename for entry in self._zip().infolist() if not entry.is_dir())
        else:
            kind = "does not exist" if not self.path.exists() else "is neither a folder nor a zip archive"
            raise UserError(f"{path} {kind}; expected a folder, zip or npz of images")
        files = [name for name in files if not _is_hidden(name)]
        self.names = [name for name in files if name.lower().endswith(EXTENSIONS)]
        if not self.names:
            raise UserError(f"{path} holds no image; expected files ending in {', '.join(EXTENSIONS)}")
        self._check_names(files)
        self.labels = self._read_labels() if LABELS in files else None
        self._others = Counter(s for name in files if (s := PurePosixPath(name).suffix.lower()) in OTHER_IMAGES)

    @classmethod
    def of_array(cls, images: np.ndarray) -> ImageDataset:
        """Images in memory, uint8 `[N, H, W, 1 or 3]` or `[N, H, W]`.

        Raises:
            UserError: another type or shape, or no image.
        """
        if not Header(images.dtype, images.shape).is_images or 0 in images.shape:
            raise UserError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 1 or 3]")
        dataset = cls.__new__(cls)
        dataset.path, dataset.labels, dataset._archive = Path("images in memory"), None, None
        dataset._hold(images)
        return dataset

    def _hold(self, images: np.ndarray) -> None:
        self._array = (images if images.ndim == 4 else images[..., None]).transpose(0, 3, 1, 2)
        self.names = [f"image {index}" for index in range(len(images))]

    # --------------------------------------------------------------------------------------------------------------
    # What it is

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: np.ndarray) -> ImageDataset:
        """The images of these indices, in that order; shape and channels stay those of the whole set."""
        whole = {"shape": self.shape, "remarks": self.remarks, "_positions": self._positions[indices]}
        part = copy.copy(self)
        part.names = [self.names[index] for index in indices]
        part.labels = None if self.labels is None else self.labels[indices]
        part.__dict__.update(whole)
        return part

    def __getstate__(self) -> dict:
        # An open archive cannot cross into a worker process; each opens its own.
        return {**self.__dict__, "_archive": None}

    @functools.cached_property
    def _positions(self) -> np.ndarray:
        """Rows of the array that the images are."""
        return np.arange(len(self))

    @property
    def label_dim(self) -> int:
        """Number of classes, 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @functools.cached_property
    def _headers(self) -> list[ImageHeader]:
        """Of every file, compared: the sizes are equal."""
        found: list[ImageHeader] = []
        for name in self.names:
            with self.open(name) as image:
                header = ImageHeader.of(image)
            if found and header.size != found[0].size:
                sizes = ["×".join(map(str, h.size)) for h in (header, found[0])]
                raise UserError(
                    f"{name} in {self.path} is {sizes[0]} (height × width), the first image, {self.names[0]}, "
                    f"{sizes[1]}; make them equal with python -m training.dataset_tool, or remove what does not belong"
                )
            found.append(header)
        return found

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels (1 or 3), height and width of every image.

        Raises:
            UserError: a file that is no image, or images of several sizes.
        """
        if self._array is not None:
            channels, height, width = self._array.shape[1:]
            return channels, height, width
        return 1 if all(header.is_grey for header in self._headers) else 3, *self._headers[0].size

    @functools.cached_property
    def remarks(self) -> list[str]:
        """What happens to images that are not plain 8-bit ones, and what beside them is not read; one line each."""
        if self._array is not None:
            return []
        found = []
        if self._others:
            shown = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self._others.items()))
            found.append(f"not read: {shown}; images end in {', '.join(EXTENSIONS)}")
        headers = dict(zip(self.names, self._headers, strict=True))
        found += remarks(headers)
        grey = [name for name, header in headers.items() if header.is_grey]
        if 0 < len(grey) < len(headers):
            among = f"{len(grey)} of {len(headers)} images are grey among coloured ones and become RGB"
            found.append(f"{among} ({grey[0]} is the first)")
        return [f"{self.path}: {line}" for line in found]

    def fingerprint(self) -> str:
        """SHA-256 of a file; of a folder, over the names and contents of its images."""
        if not self.path.is_dir():
            return sha256_of(self.path)
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0".encode(errors="surrogateescape"))
            digest.update(hashlib.sha256((self.path / name).read_bytes()).digest())
        return digest.hexdigest()

    # --------------------------------------------------------------------------------------------------------------
    # Pixels

    def load(self, index: int) -> np.ndarray:
        """Image `index` as uint8 `[C, H, W]`, of `shape`."""
        if self._array is not None:
            return self._array[self._positions[index]]
        name, shape = self.names[index], self.shape
        with self.open(name) as image:
            pixels = to_pixels(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return np.broadcast_to(pixels, shape)

    def load_all(self) -> np.ndarray:
        """All images as uint8 `[N, C, H, W]`."""
        images = np.empty([len(self), *self.shape], dtype=np.uint8)
        for index in range(len(self)):
            images[index] = self.load(index)
        return images

    def open(self, name: str) -> AbstractContextManager[Image.Image]:
        """A file of the set as a Pillow image; whatever is wrong with it becomes one line that names it."""
        return open_image(functools.partial(self.stream, name), f"{name} in {self.path}")

    # --------------------------------------------------------------------------------------------------------------
    # Files

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (*UNREADABLE, ValueError) as error:
                raise UserError(f"{self.path} is a damaged zip archive ({first_line(error)}); make it again") from None
        return self._archive

    def stream(self, name: str) -> IO[bytes]:
        """A file of the set, open for reading."""
        if self.path.is_dir():
            return open(self.path / name, "rb")
        size = self._zip().getinfo(name).file_size
        if size > MOST_BYTES:
            raise OSError(f"it unpacks to {size} bytes, more than any image")
        return self._zip().open(name)

    def _check_names(self, files: Sequence[str]) -> None:
        """Refuse what would make it another set in silence."""
        first: dict[str, str] = {}
        for name in [] if self.path.is_dir() else files:
            plain = posixpath.normpath(name.replace("\\", "/")).lstrip("/")
            if plain in first:
                names = first[plain] if first[plain] == name else f"{first[plain]} and {name}, which are one name"
                raise UserError(f"{self.path} holds two entries named {names}; make the archive again")
            first[plain] = name
        lower = [name for name in files if name.endswith(f"/{LABELS}")]
        if lower:
            raise UserError(
                f"{self.path} has its labels in {lower[0]}; {LABELS} must be at the root, beside its images"
            )

    def _read_labels(self) -> np.ndarray | None:
        """Class indices by name; every image has one entry, and every entry an image."""
        expected = "expected `labels`: null or one [file name, class index] for each image"
        place = f"{LABELS} in {self.path}"
        try:
            with self.stream(LABELS) as file:
                content = parse_json(file.read())
        except (ValueError, MemoryError, *UNREADABLE) as error:
            raise UserError(f"{place} is not readable JSON ({first_line(error)}); {expected}") from None
        pairs = content.get("labels", False) if isinstance(content, dict) else False
        if pairs is None:
            return None
        if not isinstance(pairs, list):
            raise UserError(f"{place} holds no labels; {expected}")
        found: dict[str, int] = {}
        known = set(self.names)
        for entry in pairs:
            if not _is_label(entry):
                raise UserError(f"{place}: {str(entry)[:80]!r} is no label; {expected}")
            if entry[0] in found:
                raise UserError(f"{place} names {entry[0]} twice; {expected}")
            if entry[0] not in known:
                raise UserError(f"{place} names {entry[0]}, which is not there; {expected}")
            found[entry[0]] = entry[1]
        missing = next((name for name in self.names if name not in found), None)
        if missing is not None:
            raise UserError(f"{place} has no label for {missing}; {expected}")
        return np.array([found[name] for name in self.names], dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------------
# Files


def read_image_array(path: Path) -> np.ndarray:
    """The images in an `.npz` file, uint8 `[N, H, W, C]` or `[N, H, W]`."""
    headers = read_headers(path)
    names = [name for name, header in headers.items() if header.is_images]
    if len(names) != 1 or 0 in headers[names[0]].shape:
        raise UserError(f"{path} holds {described(headers)}; expected one uint8 array [N, H, W, 1 or 3]")
    return read_arrays(path, names)[names[0]]


def _files_below(root: Path) -> Iterator[str]:
    """Names of the files below a folder, relative to it. Links are followed; hidden folders are not entered.

    Raises:
        UserError: a folder that cannot be read or comes twice, or what is named as an image but is no file.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: dict[tuple[int, int], str] = {}
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            raise UserError(f"{folder} and {first} are one folder, whose images would count twice; remove the link")
        folders[:] = [name for name in folders if not _is_hidden(f"{name}/")]
        below = os.path.relpath(folder, root)
        for name in files:
            path = name if below == "." else PurePosixPath(below, name).as_posix()
            if _is_hidden(path):
                continue
            if name.lower().endswith(EXTENSIONS) or name == LABELS:
                _check_file(root, path)
            yield path


def _check_file(root: Path, name: str) -> None:
    try:
        is_file = stat.S_ISREG(os.stat(root / name).st_mode)
    except OSError as error:
        raise UserError(f"{name} in {root} cannot be read ({error.strerror}): a link to nothing?") from None
    if not is_file:
        raise UserError(f"{name} in {root} is no regular file; remove it")


def _is_hidden(name: str) -> bool:
    *folders, last = name.replace("\\", "/").split("/")
    starts = any(part.startswith(".") and part not in (".", "..") for part in (*folders, last))
    return starts or any(part.lower() in SYSTEM_FOLDERS for part in folders)


def _is_label(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    name, label = entry
    return isinstance(name, str) and type(label) is int and 0 <= label < MAX_CLASSES
