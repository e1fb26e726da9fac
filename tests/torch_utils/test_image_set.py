"""Which files are the images of a set, and which pixels they have; what would silently be another set is refused."""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import write_images

from dnnlib import UserError
from torch_utils.arrays import read_arrays
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.metrics.pixels import to_pixels

RAMP = np.array([[0, 8, 16, 24, 32, 40]], dtype=np.uint8)


def saved(folder: Path, name: str, image: Image.Image, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    return folder


def loaded(folder: Path) -> np.ndarray:
    return ImageDataset(folder).load_all()[0]


# --- Pixels ----------------------------------------------------------------------------------------------------------


def test_sixteen_bit_grey_has_the_values_of_eight(tmp_path):
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(loaded(saved(tmp_path / "a", "x.png", wide)), RAMP[None])
    noisy = Image.fromarray(np.array([[128, 129, 65535, 65406, 300]], dtype=np.uint16))  # v / 257, rounded
    assert loaded(saved(tmp_path / "b", "x.png", noisy)).tolist() == [[[0, 1, 255, 254, 1]]]


def write_png(folder: Path, width: int, bits: int, colour: int, row: bytes, clear: bytes = b"") -> Path:
    """A PNG of one row, in forms that Pillow reads but does not write; `clear`: which value is transparent."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    for kind, body in parts:
        if body or kind != b"tRNS":
            content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (folder / "x.png").write_bytes(content)
    return folder


def test_sixteen_bit_colour_has_the_values_of_eight(tmp_path):
    row = np.repeat(RAMP[0], 3).astype(">u2") * 257
    assert np.array_equal(loaded(write_png(tmp_path, 6, 16, 2, row.tobytes())), np.repeat(RAMP[None], 3, axis=0))
    for clear in (row[3:6], row[3:6] >> 8):  # Pillow would compare them with the high bytes
        with pytest.raises(UserError, match="16-bit colours, one of them transparent"):
            loaded(write_png(tmp_path, 6, 16, 2, row.tobytes(), clear.tobytes()))


@pytest.mark.parametrize("bits, row, values", [
    (1, b"\x50", [255, 255, 255, 255]), (2, b"\x1b", [0, 255, 170, 255]), (4, b"\x01\x23", [0, 255, 34, 51]),
])  # fmt: skip
def test_grey_of_few_bits_can_be_transparent(bits, row, values, tmp_path):
    """The value is of the file's bits, not of the eight that they are read as."""
    folder = write_png(tmp_path, 4, bits, 0, row, struct.pack(">H", bits > 1))
    assert loaded(folder).ravel().tolist() == values
    assert "composed on white" in ImageDataset(folder).remarks[0]


def test_frames_after_the_first_are_said_not_to_be_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in (9, 200)]
    for name in ("a.png", "b.webp"):
        saved(tmp_path / name, name, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        dataset = ImageDataset(tmp_path / name)
        assert dataset.load(0)[0, 0, 0] == 9 and "1 of 1 images have several frames" in dataset.remarks[0]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_values_of_pixel_formats_without_a_scale_are_refused(mode):
    values = {"I;16": None, "I": np.array([[70000]], np.int32), "F": np.array([[0.5]], np.float32)}[mode]
    if values is None:
        assert to_pixels(Image.fromarray(np.array([[65535]], np.uint16))).tolist() == [[255]]
        return
    with pytest.raises(ValueError, match=f"pixel format {mode} has no scale"):
        to_pixels(Image.fromarray(values))


def test_thirty_two_bit_integers_of_a_sixteen_bit_file_are_scaled():
    """As older versions of Pillow open a 16-bit grey PNG."""
    assert np.array_equal(to_pixels(Image.fromarray(RAMP.astype(np.int32) * 257)), RAMP)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P-index", "RGB-key", "L-key", "I;16-key", "webp"])
def test_transparency_is_white_and_said_once(mode, tmp_path):
    """A red or black pixel that cannot be seen, beside an opaque one."""
    clear, opaque = (200, 0, 0, 0), (200, 0, 0, 255)
    image = Image.new("RGBA", (2, 1), opaque)
    image.putpixel((0, 0), clear)
    options, suffix = {}, "png"
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "P":
        image = image.quantize(4)
    elif mode == "P-index":
        image = Image.new("P", (2, 1), 1)
        image.putpalette([200, 0, 0, 200, 0, 0])
        image.putpixel((0, 0), 0)
        options = {"transparency": 0}
    elif mode == "RGB-key":
        image = Image.new("RGB", (2, 1), (200, 0, 0))
        image.putpixel((0, 0), (1, 2, 3))
        options = {"transparency": (1, 2, 3)}
    elif mode == "L-key":
        image = Image.fromarray(np.array([[7, 90]], np.uint8))
        options = {"transparency": 7}
    elif mode == "I;16-key":
        image = Image.fromarray(np.array([[7, 90 * 257]], np.uint16))
        options = {"transparency": 7}
    elif mode == "webp":
        suffix, options = "webp", {"lossless": True, "exact": True}
    write_images(tmp_path / "x", 2, size=(2, 1), mode="L" if mode.startswith(("L", "I")) else "RGB")
    dataset = ImageDataset(saved(tmp_path / "x", f"y.{suffix}", image, **options))
    pixels = dataset.load(2)
    assert (pixels[:, 0, 0] == 255).all() and pixels[0, 0, 1] in (200, 90, 60, 59)
    (remark,) = dataset.remarks
    assert f"1 of 3 images can be transparent and are composed on white (y.{suffix} is the first)" in remark


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    image = Image.new("RGBA", (1, 1), (0, 100, 200, 51))
    assert loaded(saved(tmp_path, "x.png", image)).ravel().tolist() == [204, 224, 244]


def test_an_opaque_palette_needs_no_remark(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    dataset = ImageDataset(saved(tmp_path, "x.png", image))
    assert dataset.remarks == [] and dataset.load(0)[:, 0, 0].tolist() == [10, 20, 30]


def test_an_exif_orientation_is_not_applied_and_said(tmp_path):
    image = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    dataset = ImageDataset(saved(tmp_path, "x.png", image, exif=exif))
    assert dataset.shape == (3, 2, 3) and np.array_equal(dataset.load(0).transpose(1, 2, 0), np.asarray(image))
    assert "1 of 1 images have an EXIF orientation, which is not applied (x.png" in dataset.remarks[0]
    exif[0x0112] = 1
    assert ImageDataset(saved(tmp_path, "x.png", image, exif=exif)).remarks == []


# --- Which files -----------------------------------------------------------------------------------------------------


def zipped(path: Path, *names: str) -> Path:
    """An archive with one image under each name, whatever the names are."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(buffer, "PNG")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of duplicates
        for name in names:
            archive.writestr(name, "{}" if name.endswith(".json") else buffer.getvalue())
    return path


HIDDEN = (".ipynb_checkpoints/0000-checkpoint.png", "sub/.Trash/a/b.png", "._0000.png", "__MACOSX/._0000.png",
          ".git/objects/x.png", "__MACOSX/0000.png", "sub/@eaDir/0002.png/SYNOPHOTO_THUMB_M.png",
          "$RECYCLE.BIN/x.png", "lost+found/x.png")  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_hidden_files_and_folders_are_not_of_the_set(kind, tmp_path):
    names = ["./0001.png", "0000.png", "sub/0002.png"] if kind == "zip" else ["0000.png", "0001.png", "sub/0002.png"]
    path = zipped(tmp_path / "x.zip", *names, *HIDDEN, "sub/.cache/dataset.json")
    if kind == "folder":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "x")
        path = tmp_path / "x"
    assert ImageDataset(path).names == names


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", "a.png", "b.png", "a.png")
    with pytest.raises(UserError, match="two entries named a.png"):
        ImageDataset(path)
    with pytest.raises(UserError, match=r"two entries named dataset\.json"):
        ImageDataset(zipped(tmp_path / "y.zip", "a.png", "dataset.json", "dataset.json"))
    for other in ("./a.png", "x/../a.png", "/a.png", ".//a.png"):
        with pytest.raises(UserError, match=r"two entries named .*a\.png and .*a\.png, which are one name"):
            ImageDataset(zipped(tmp_path / "z.zip", "a.png", "b.png", other))


def test_links_lead_to_images_or_are_an_error(tmp_path):
    data = write_images(tmp_path / "x", 2)
    elsewhere = write_images(tmp_path / "elsewhere", 3)
    (data / "more").symlink_to(elsewhere)
    (data / "z.png").symlink_to(elsewhere / "0000.png")
    assert len(ImageDataset(data)) == 6
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png in .* cannot be read .*a link to nothing"):
        ImageDataset(data)
    (data / "gone.png").unlink()
    (data / "more" / "again").symlink_to(data)
    with pytest.raises(UserError, match="one folder, whose images would count twice"):
        ImageDataset(data)


def test_what_is_no_regular_file_is_refused(tmp_path):
    data = write_images(tmp_path / "x", 2)
    os.mkfifo(data / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png in .* is no regular file"):
        ImageDataset(data)


def test_images_that_are_not_read_are_counted(tmp_path):
    data = write_images(tmp_path / "x", 2)
    for name in ("a.tif", "b.TIFF", "c.tif", "notes.txt"):
        (data / name).write_bytes(b"")
    (remark,) = ImageDataset(data).remarks
    assert "not read: 2 .tif, 1 .tiff; images end in" in remark


def labels(*pairs) -> str:
    return json.dumps({"labels": list(pairs)})


@pytest.mark.parametrize(
    "content, words",
    [
        (labels(["0000.png", 0], ["0001.png", 1], ["0000.png", 1]), "names 0000.png twice"),
        (labels(["0000.png", 0]), "has no label for 0001.png"),
        (labels(["0000.png", 0], ["0001.png", 1], ["0002.png", 1]), "names 0002.png, which is not there"),
        (labels(["0000.png", 0], ["0001.png", True]), "0001.png.*True.* is no label"),
        (labels(["0000.png", 0], [["0001.png"], 0]), "is no label"),
        ("[" * 100_000, "not readable JSON"),
        ("[" * 100_000 + "]" * 100_000, "not readable JSON"),
        ('{"labels": ' + "1" * 5000 + "}", "not readable JSON"),
    ],
)
def test_labels_that_are_ambiguous_are_named(content, words, tmp_path):
    data = write_images(tmp_path / "x", 2)
    (data / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=rf"dataset\.json in .*({words})"):
        ImageDataset(data)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_one_folder_down_are_named(kind, tmp_path):
    path = zipped(tmp_path / "x.zip", "sub/a.png", "sub/dataset.json")
    if kind == "folder":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "x")
        path = tmp_path / "x"
    with pytest.raises(UserError, match=r"labels in sub/dataset\.json; dataset\.json must be at the root"):
        ImageDataset(path)


def test_a_part_of_a_set_keeps_names_labels_and_channels(tmp_path):
    data = write_images(tmp_path / "x", 4)
    Image.open(data / "0002.png").convert("L").save(data / "0002.png")
    (data / "dataset.json").write_text(labels(*([f"{i:04d}.png", i] for i in range(4))))
    whole = ImageDataset(data)
    part = whole[np.array([2, 0])]
    assert part.names == ["0002.png", "0000.png"] and part.labels.tolist() == [2, 0]
    assert np.array_equal(part.load_all(), whole.load_all()[[2, 0]]) and part.shape == (3, 8, 8)
    np.savez(tmp_path / "x.npz", whole.load_all().transpose(0, 2, 3, 1))
    array = ImageDataset(tmp_path / "x.npz")[np.array([3, 1])]
    assert np.array_equal(array[np.array([1])].load_all(), whole.load_all()[[1]])


def test_headers_alone_are_read_for_the_shape(tmp_path):
    """Damage behind the header is found when the image is read, not before."""
    data = write_images(tmp_path / "x", 3, size=(64, 64))
    (data / "0001.png").write_bytes((data / "0001.png").read_bytes()[:100])
    dataset = ImageDataset(data)
    assert dataset.shape == (3, 64, 64)
    with pytest.raises(UserError, match=r"0001\.png in .* is not a readable image"):
        dataset.load(1)


# --- Arrays ----------------------------------------------------------------------------------------------------------


def bomb(path: Path, **arrays) -> Path:
    """5 MB that unpack to gigabytes, beside what is asked for."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue())
    return path


def test_arrays_that_are_not_asked_for_stay_packed(tmp_path):
    path = bomb(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3), other=np.zeros(20 << 20, dtype=np.uint8))
    tracemalloc.start()
    assert set(read_arrays(path, ("mu", "sigma"))) == {"mu", "sigma"}
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_what_unpacks_to_far_more_than_the_file_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch_utils.arrays.FREE_BYTES", 1 << 20)
    path = bomb(tmp_path / "x.npz", arr_0=np.zeros([1024, 32, 32, 3], dtype=np.uint8))
    for read in (ImageDataset, read_arrays):
        with pytest.raises(UserError, match=r"x\.npz is not a readable \.npz file .*far more than the file has"):
            read(path)
    rng = np.random.default_rng(0)
    np.savez_compressed(path, arr_0=rng.integers(0, 256, [1024, 32, 32, 3], dtype=np.uint8))
    assert len(ImageDataset(path)) == 1024


def test_only_what_is_asked_for_must_be_usable(tmp_path, monkeypatch):
    """Objects, and what unpacks to far too much, beside the statistics."""
    monkeypatch.setattr("torch_utils.arrays.FREE_BYTES", 1 << 20)
    path, junk = tmp_path / "x.npz", np.array([{}], dtype=object)
    np.savez_compressed(path, mu=np.zeros(3), sigma=np.eye(3), junk=junk, large=np.zeros(1 << 22, np.uint8))
    assert set(read_arrays(path, ("mu", "sigma"))) == {"mu", "sigma"}
    for name, words in (("junk", "junk holds objects"), ("large", "large unpacks to 4194432 bytes, far more")):
        with pytest.raises(UserError, match=words):
            read_arrays(path, (name,))


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8, 1), (8, 8, 4), (2, 8, 8, 4), (2, 3, 8, 8), (8, 8)])
def test_arrays_that_are_no_set_of_images_are_refused(shape, tmp_path):
    """One image `[H, W, 3]`, too: read as `[N, H, W]` it would be eight."""
    np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"holds arr_0 uint8 \[.*expected one uint8 array \[N, H, W, 1 or 3\]"):
        ImageDataset(tmp_path / "x.npz")


def test_two_arrays_of_one_name_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("mu.npy", buffer.getvalue())
    with pytest.raises(UserError, match="two arrays of one name"):
        read_arrays(tmp_path / "x.npz")
