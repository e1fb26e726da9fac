"""`python -m training.dataset_tool`: images as they are published → a zip of square images of one size.

Sources are a folder or archive of images of any sizes (ImageNet, FFHQ, AFHQ, COCO), an `.npz`, the original CIFAR-10
(`cifar-10-python.tar.gz` or `-binary`, packed or not) and LSUN's `lmdb` folders. The archive has the layout of EDM's
data sets: `00000/img00000000.png` in the order of the source, and `dataset.json` with labels. Pixels are read as
everywhere in this program (`torch_utils.metrics.image_set`).

CIFAR-10's batches are pickles of arrays. They are read by an unpickler that knows numpy's arrays as inert records and
refuses every other name, so nothing in them is executed.
"""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import hashlib
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
from PIL import Image, ImageOps

from dnnlib import UserError, first_line, need, one_line_errors
from dnnlib.options import Command, Whole, section
from dnnlib.progress import progress
from torch_utils.image_writer import ImageWriter
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.metrics.pixels import ImageHeader, open_image, remarks, to_pixels

from .options import dry_run_option

LABEL_KINDS = ("auto", "folders", "none")
CIFAR_SIDE = 32
CIFAR_BATCH = re.compile(r"(?:.*/)?(data_batch_[1-5]|test_batch)(\.bin)?")
#: Bytes of a batch of CIFAR-10, with room.
MOST_BATCH = 1 << 26
#: Images that are decoded ahead of those that are written.
AHEAD = 64


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


# ------------------------------------------------------------------------------------------------------------------
# Sources


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


class Cifar10:
    """The original CIFAR-10: 32×32 colour images with one of ten classes, in the order of the batches."""

    def __init__(self, path: Path, split: str) -> None:
        wanted = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        found = {name: batch for name, batch in _cifar_batches(path) if name in wanted}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise UserError(f"{path} holds no {', '.join(missing)}; expected the original CIFAR-10, whole")
        batches = [found[name] for name in wanted]
        self.pixels = np.concatenate([pixels for pixels, _ in batches])
        self.labels: list[int] | None = [label for _, labels in batches for label in labels]
        self.headers: dict[str, ImageHeader] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int, upright: bool) -> np.ndarray:
        return self.pixels[index].reshape(3, CIFAR_SIDE, CIFAR_SIDE).transpose(1, 2, 0)

    def digest(self) -> str:
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


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


# ------------------------------------------------------------------------------------------------------------------
# CIFAR-10


def _cifar_batches(path: Path) -> Iterator[tuple[str, tuple[np.ndarray, list[int]]]]:
    """Name, pixels uint8 `[N, 3072]` and labels of every batch in a folder or tar archive."""
    if path.is_dir():
        for name in sorted(os.listdir(path)):
            match = CIFAR_BATCH.fullmatch(name)
            if match:
                with open(path / name, "rb") as file:
                    yield match[1], _read_batch(file.read(MOST_BATCH), bool(match[2]), f"{name} in {path}")
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                match = CIFAR_BATCH.fullmatch(member.name)
                stream = archive.extractfile(member) if match and member.isfile() else None
                if match and stream is not None:
                    content = stream.read(MOST_BATCH)
                    yield match[1], _read_batch(content, bool(match[2]), f"{member.name} in {path}")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable tar archive ({first_line(error)}); get it again") from None


def _read_batch(content: bytes, is_binary: bool, place: str) -> tuple[np.ndarray, list[int]]:
    """A batch in the binary version (a label, then 3072 pixels, for each image) or the python version (a pickle)."""
    size = 3 * CIFAR_SIDE**2
    if is_binary:
        if not content or len(content) % (size + 1):
            raise UserError(f"{place} is no batch of CIFAR-10: it has {len(content)} bytes, not {size + 1} an image")
        rows = np.frombuffer(content, np.uint8).reshape(-1, size + 1)
        pixels, labels = rows[:, 1:], rows[:, 0].tolist()
    else:
        batch = read_inert(content, place)
        data = batch.get(b"data") if isinstance(batch, dict) else None
        labels = batch.get(b"labels") if isinstance(batch, dict) else None
        if not isinstance(data, ArrayRecord) or not isinstance(labels, list):
            raise UserError(f"{place} is no batch of CIFAR-10: data and labels are missing")
        pixels = data.values(place)
        if pixels.ndim != 2 or pixels.shape[1] != size:
            raise UserError(f"{place} holds data {list(pixels.shape)}; expected [N, {size}]")
    if len(labels) != len(pixels) or not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise UserError(f"{place} does not have a label from 0 to 9 for every image")
    return pixels, labels


class ArrayRecord:
    """What a pickle says of a numpy array; nothing of numpy is called until `values`."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self, place: str) -> np.ndarray:
        """uint8 values in their shape."""
        try:
            _, shape, dtype, is_fortran, content = self.state
            if not isinstance(dtype, TypeRecord) or dtype.code not in (b"u1", "u1"):
                raise ValueError("they are not uint8")
            return np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")
        except (TypeError, ValueError) as error:
            raise UserError(f"{place} holds an array that is not readable ({first_line(error)})") from None


class TypeRecord:
    """What a pickle says of the type of numbers."""

    def __init__(self, code: Any = None, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Knows three names of numpy, as records, and refuses all others."""

    NAMES = {"ndarray": ArrayRecord, "_reconstruct": ArrayRecord, "dtype": TypeRecord}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.NAMES:
            return self.NAMES[name]
        raise UserError(f"{module}.{name} is no part of CIFAR-10; this file wants to run code, do not open it")


def read_inert(content: bytes, place: str) -> Any:
    """A pickle of plain containers and arrays, nothing in it executed.

    Raises:
        UserError: any other content, or damage.
    """
    try:
        return _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{place} is refused: {error.message}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UserError(f"{place} is not a readable pickle ({first_line(error)}); get it again") from None


# ------------------------------------------------------------------------------------------------------------------
# Squares


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


def parse_resolution(context: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`64`, or `512x384`."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", value)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= height <= width <= 8192:
        raise UserError(f"{value!r} does not parse; expected a side such as 64, or width x height such as 512x384",
                        "resolution")  # fmt: skip
    return width, height


def check_size(transform: str | None, size: tuple[int, int] | None) -> None:
    """Refuse sizes that a transform cannot make a square of."""
    if transform is not None and size is None:
        raise UserError(f"{transform} needs the size of the images that it is to make", "resolution")
    is_wide = size is not None and size[0] != size[1]
    if is_wide != (transform == "center-crop-wide"):
        expected = "width x height, such as 512x384" if not is_wide else "a square, for all but center-crop-wide"
        raise UserError(f"expected {expected}", "resolution")


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
            raise UserError(f"image {index} is {height}×{width}; choose how it becomes a square", "transform")
        if self.transform is None or self.size is None:
            square: np.ndarray | None = resized(pixels, *(self.size or (width, height)))
        else:
            square = TRANSFORMS[self.transform](pixels, *self.size)
        return square if square is None else square.reshape(*square.shape[:2], -1)


def write_archive(source: Source, count: int, conversion: Conversion, writer: ImageWriter) -> int:
    """Convert and write the first `count` images that are not there yet; returns how many the archive has."""
    missing = writer.missing(range(count))
    with ThreadPoolExecutor() as pool, progress(len(missing)) as bar:
        for start in range(0, len(missing), AHEAD):
            part = missing[start : start + AHEAD]
            for index, square in zip(part, pool.map(partial(conversion, source), part)):
                if square is not None:
                    writer.write([index], square[None])
            bar.update(len(part))
    writer.flush()
    kept = sorted(set(range(count)) - set(writer.missing(range(count))))
    if not kept:
        raise UserError("no image is large enough", "resolution")
    writer.close(kept, None if source.labels is None else {index: source.labels[index] for index in kept})
    return len(kept)


@click.command(cls=Command)
@section("Images")
@click.option("--source", help="Folder, zip or npz of images; original CIFAR-10 (tar.gz or folder); lmdb folder of "
              "LSUN", metavar="PATH", type=click.Path(path_type=Path), required=True)  # fmt: skip
@click.option("--dest", help="Archive to write", metavar="ZIP", type=click.Path(path_type=Path), required=True)
@click.option("--resolution", help="Side of the images; width x height for center-crop-wide; default: their own",
              metavar="INT|WxH", callback=parse_resolution)  # fmt: skip
@click.option("--transform", help="How an image becomes a square; default: it has to be one",
              type=click.Choice(list(TRANSFORMS)))  # fmt: skip
@click.option("--upright", help="Apply the EXIF orientation of photographs", is_flag=True)
@click.option("--max_images", help="Take only so many, from the first on", type=Whole(1, 10**9))
@section("Classes")
@click.option("--labels", help="auto: those of dataset.json or CIFAR-10; folders: each first folder is a class",
              type=click.Choice(LABEL_KINDS), default="auto")  # fmt: skip
@click.option("--split", help="Part of CIFAR-10", type=click.Choice(["train", "test"]), default="train")
@section("Machine")
@dry_run_option
def main(source: Path, dest: Path, max_images: int | None, labels: str, split: str, **opts: Any) -> None:
    """Make a zip of square images from a folder, an archive, or the original files of a data set.

    The same command goes on where it was stopped; the archive appears when it is complete.

    \b
    Examples:
      python -m training.dataset_tool --source=my-images --dest=my-dataset.zip --resolution=64 --transform=center-crop
      python -m training.dataset_tool --source=cifar-10-python.tar.gz --dest=cifar10-32x32.zip
    """
    conversion = Conversion(opts["resolution"], opts["transform"], opts["upright"])
    if dest.suffix != ".zip":
        raise UserError(f"{dest} is not a name ending in .zip; choose one that is", "dest")
    if opts["dry_run"] and not source.exists():
        plan = {"source": str(source), "missing": [str(source)], **asdict(conversion), "dest": str(dest)}
        return click.echo(json.dumps(plan, indent=2))
    pictures = open_pictures(source, labels, split)
    if labels == "none":
        pictures.labels = None
    count = min(len(pictures), max_images or len(pictures))
    classes = 0 if pictures.labels is None else len(set(pictures.labels))
    plan = {"source": str(source), "images": count, "classes": classes, **asdict(conversion), "dest": str(dest)}
    if opts["dry_run"]:
        return click.echo(json.dumps(plan, indent=2))
    made_of = {k: v for k, v in plan.items() if k != "dest"} | {"digest": pictures.digest(), "labels": labels}
    writer = ImageWriter(dest, False, json.loads(json.dumps(made_of)))
    kept = write_archive(pictures, count, conversion, writer)
    for line in remarks(pictures.headers, "applied" if opts["upright"] else "not applied"):
        click.echo(line, err=True)
    left_out = f"; {count - kept} were too small" if kept < count else ""
    done = "There already:" if writer.is_complete else "Wrote"
    click.echo(
        f"{done} {kept} images, {classes or 'no'} classes, {'in' if writer.is_complete else 'to'} {dest}{left_out}"
    )


if __name__ == "__main__":
    one_line_errors(main)()
