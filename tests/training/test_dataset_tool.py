"""`training.dataset_tool`: from files of any layout to a zip of squares."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import flags, invoke, run_ranks, write_images

from torch_utils.metrics.image_set import ImageDataset
from training.datasets.squares import center_crop, center_crop_dhariwal, center_crop_wide

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def tool(source, *more, dest="x.zip", **changes):
    return invoke("training.dataset_tool", *flags({"source": source, "dest": dest}, changes), *more)


def test_a_folder_becomes_an_archive_in_the_order_of_its_names(tmp_path):
    data = write_images(tmp_path / "data", 5)
    (data / "dataset.json").write_text(json.dumps({"labels": [[f"{i:04d}.png", 4 - i] for i in range(5)]}))
    assert "Wrote 5 images, 5 classes, to x.zip" in tool(data).ok().output
    made = ImageDataset("x.zip")
    assert made.names == [f"00000/img{i:08d}.png" for i in range(5)] and made.labels.tolist() == [4, 3, 2, 1, 0]
    assert np.array_equal(made.load_all(), ImageDataset(data).load_all())
    assert not list(Path().glob(".x.zip*"))
    tool(data, dest="none.zip", labels="none").ok()
    assert ImageDataset("none.zip").labels is None
    tool("x.zip", dest="y.zip", max_images=3).ok()
    assert ImageDataset("y.zip").labels.tolist() == [4, 3, 2]


def test_photographs_of_any_size_and_format(tmp_path):
    """ImageNet's layout: a folder for each class; sizes, modes and suffixes as they come."""
    sizes = {"n01/a.JPEG": (40, 30), "n01/b.JPEG": (20, 50), "n02/c.png": (33, 33), "n02/d.png": (16, 16)}
    for index, (name, size) in enumerate(sizes.items()):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if name.endswith("d.png") else "RGB", size, 50 * index).save(tmp_path / "data" / name)
    tool("data", resolution=16, transform="center-crop", labels="folders").ok()
    made = ImageDataset("x.zip")
    assert made.shape == (3, 16, 16) and made.labels.tolist() == [0, 0, 1, 1]
    np.savez("x.npz", ImageDataset("x.zip").load_all().transpose(0, 2, 3, 1))
    tool("x.npz", dest="y.zip", resolution=8).ok()
    assert ImageDataset("y.zip").shape == (3, 8, 8)


def test_pixels_and_orientation_are_read_as_everywhere(tmp_path):
    (tmp_path / "data").mkdir()
    Image.fromarray(np.full([8, 8], 257 * 9, np.uint16)).save("data/wide.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save("data/clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.zeros([8, 8, 3], np.uint8)
    turned[:, :4] = 200
    Image.fromarray(turned).save("data/turned.png", exif=exif)
    said = tool("data").ok().output
    assert "1 of 3 images can be transparent and are composed on white (clear.png is the first)" in said
    assert said.count("1 of 3 images have an EXIF orientation, which is not applied (turned.png is the first)") == 1
    assert "which is applied" in tool("data", "--upright", dest="y.zip").ok().output
    clear, stored, wide = ImageDataset("x.zip").load_all()
    assert (clear == 255).all() and (wide == 9).all() and np.array_equal(stored, turned.transpose(2, 0, 1))
    assert np.array_equal(ImageDataset("y.zip").load(1), np.rot90(turned, -1).transpose(2, 0, 1))


# --- Transforms ------------------------------------------------------------------------------------------------------


def picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=2).astype(np.uint8)


def test_a_crop_at_the_centre_keeps_its_pixels():
    found = center_crop(picture(10, 17), 10, 10)
    assert np.array_equal(found, picture(10, 17)[:, 3:13])
    assert center_crop(picture(40, 30), 15, 15).shape == (15, 15, 3)
    assert np.array_equal(center_crop_dhariwal(picture(10, 17), 10, 10), picture(10, 17)[:, 3:13])
    assert center_crop_dhariwal(picture(99, 70), 16, 16).shape == (16, 16, 3)


def test_a_wide_crop_is_on_a_black_square_and_not_enlarged():
    found = center_crop_wide(picture(12, 20), 16, 12)
    assert found.shape == (16, 16, 3) and not found[:2].any() and not found[14:].any()
    assert np.array_equal(found[2:14], picture(12, 20)[:, 2:18])
    tall = center_crop_wide(picture(30, 16), 16, 12)
    assert np.array_equal(tall[2:14], picture(30, 16)[9:21])
    assert center_crop_wide(picture(11, 20), 16, 12) is None and center_crop_wide(picture(40, 15), 16, 12) is None


def test_too_small_images_are_left_out_and_counted(tmp_path):
    for index, size in enumerate([(16, 12), (9, 9), (32, 24)]):
        write_images(tmp_path / "data" / str(index), 1, size=size)
    output = tool("data", resolution="16x12", transform="center-crop-wide", labels="folders").ok().output
    assert "Wrote 2 images" in output and "1 were too small" in output
    assert ImageDataset("x.zip").labels.tolist() == [0, 2]


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


def batches(count: int = 3) -> dict[str, tuple[np.ndarray, list[int]]]:
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {n: (rng.integers(0, 256, [count, 3072], np.uint8), rng.integers(0, 10, count).tolist()) for n in names}


class Python2(pickle._Pickler):
    """Writes byte strings as Python 2 did."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def as_python_2(content) -> bytes:
    file = io.BytesIO()
    Python2(file, protocol=2).dump(content)
    return file.getvalue()


def write_cifar(folder: Path, kind: str) -> Path:
    """As the University of Toronto publishes it; the pickles of Python 2 have byte strings as keys."""
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches().items():
        if kind == "bin":
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = {b"batch_label": b"1", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"] * len(labels)}
            (folder / name).write_bytes(as_python_2(content))
    (folder / "readme.html").write_text("")
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["py", "bin"])
def test_the_original_cifar_10(kind, packed, tmp_path):
    source = write_cifar(tmp_path / f"cifar-10-batches-{kind}", kind)
    if packed:
        with tarfile.open("cifar.tar.gz", "w:gz") as archive:
            archive.add(source, source.name)
        source = Path("cifar.tar.gz")
    assert "Wrote 15 images, " in tool(source).ok().output
    tool(source, dest="test.zip", split="test").ok()
    expected = batches()
    for path, names in (("x.zip", list(expected)[:5]), ("test.zip", ["test_batch"])):
        made = ImageDataset(path)
        pixels = np.concatenate([expected[name][0] for name in names])
        assert np.array_equal(made.load_all(), pixels.reshape(-1, 3, 32, 32))
        assert made.labels.tolist() == [label for name in names for label in expected[name][1]]


class Runs:
    def __init__(self, what):
        self.what = what

    def __reduce__(self):
        return self.what


def test_pickles_of_cifar_10_run_nothing(tmp_path):
    for index, what in enumerate((
        (os.mkdir, (str(tmp_path / "executed"),)), (eval, ("open('executed', 'w')",)),
        (np.memmap, (str(tmp_path / "executed"), "uint8", "w+", 0, 9)),
        (np.load, (str(tmp_path / "executed"),)), (getattr, ("text", "upper")),
    )):  # fmt: skip
        folder = write_cifar(tmp_path / str(index), "py")
        (folder / "data_batch_3").write_bytes(as_python_2({b"data": Runs(what), b"labels": [0]}))
        tool(folder).refused("data_batch_3 in .* is refused: .* this file wants to run code")
        assert not (tmp_path / "executed").exists() and not Path("x.zip").exists()


@pytest.mark.parametrize("change", ["cut", "flip", "shape", "labels", "float", "missing", "text", "brackets"])
def test_damaged_batches_are_one_line(change, tmp_path):
    folder = write_cifar(tmp_path / "cifar", "py")
    path = folder / "data_batch_2"
    pixels, labels = batches()["data_batch_2"]
    content = {
        "shape": {b"data": pixels[:, :-1].copy(), b"labels": labels}, "labels": {b"data": pixels, b"labels": labels[:-1]},
        "float": {b"data": pixels.astype(np.float32), b"labels": labels}, "text": "no batch",
        "brackets": {b"data": [[]], b"labels": labels},
    }.get(change)  # fmt: skip
    if content is not None:
        path.write_bytes(as_python_2(content))
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif change == "flip":
        path.write_bytes(b"\x80\x02" + bytes(255 - b for b in path.read_bytes()[2:200]))
    else:
        path.unlink()
    tool(folder).refused("data_batch_2")
    assert not Path("x.zip").exists()


def test_damaged_binary_batches_and_archives_are_one_line(tmp_path):
    folder = write_cifar(tmp_path / "cifar", "bin")
    content = (folder / "data_batch_1.bin").read_bytes()
    for bad in (b"", content[:-1], bytes([11]) + content[1:]):
        (folder / "data_batch_1.bin").write_bytes(bad)
        tool(folder).refused("data_batch_1")
    with tarfile.open("x.tar.gz", "w:gz") as archive:
        archive.add(write_cifar(tmp_path / "whole", "py"), "cifar")
    Path("x.tar.gz").write_bytes(Path("x.tar.gz").read_bytes()[:3000])
    tool("x.tar.gz").refused("x.tar.gz")


# --- LSUN ------------------------------------------------------------------------------------------------------------


def write_lsun(folder: Path, sizes: dict[bytes, tuple[int, int]]) -> Path:
    """An lmdb folder as LSUN publishes it: encoded photographs by keys that are hashes; the red of each is its key's."""
    lmdb = pytest.importorskip("lmdb", reason="pip install lmdb")
    with lmdb.open(str(folder), map_size=1 << 20) as store, store.begin(write=True) as transaction:
        for key, size in sizes.items():
            file = io.BytesIO()
            Image.new("RGB", size, (key[0], 0, 0)).save(file, "WEBP", lossless=True)
            transaction.put(key, file.getvalue())
    return folder


def test_lsun_is_read_in_the_order_of_its_keys(tmp_path):
    lsun = write_lsun(tmp_path / "bedroom_train_lmdb", {b"f3a0": (20, 12), b"0c71": (12, 30), b"9b": (256, 256)})
    before = {path.name: path.read_bytes() for path in lsun.iterdir()}
    output = tool(lsun, resolution=8, transform="center-crop").ok().output
    assert "Wrote 3 images, no classes" in output
    made = ImageDataset("x.zip")
    assert made.shape == (3, 8, 8) and made.load_all()[:, 0, 4, 4].tolist() == [ord("0"), ord("9"), ord("f")]
    assert {path.name: path.read_bytes() for path in lsun.iterdir()} == before
    tool(lsun, dest="two.zip", resolution=8, transform="center-crop", max_images=2).ok()
    assert len(ImageDataset("two.zip")) == 2


def test_what_is_wrong_with_lsun_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"none")
    options = dict(resolution=8, transform="center-crop")
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "lmdb", None)
        tool("broken", **options).refused("pip install lmdb")
    lsun = write_lsun(tmp_path / "lsun", {b"a": (8, 8)})
    tool("broken", **options).refused("broken is not a readable lmdb")
    import lmdb

    with lmdb.open(str(lsun)) as store, store.begin(write=True) as transaction:
        transaction.put(b"b", b"no picture")
    tool("lsun", **options).refused("b'b' is not a readable image")
    with lmdb.open(str(lsun)) as store, store.begin(write=True) as transaction:
        transaction.delete(b"a")
        transaction.delete(b"b")
    tool("lsun", **options).refused("lsun holds no image")


# --- Stopped, repeated, wrong ----------------------------------------------------------------------------------------


def test_a_killed_conversion_goes_on_and_leaves_no_half_archive(tmp_path):
    data = write_images(tmp_path / "data", 12)
    args = flags(source=data, dest=tmp_path / "x.zip", resolution=4)
    result = run_ranks("training.dataset_tool", args, tmp_path, kill=("torch_utils.image_writer:to_pil", 7))
    assert result.code == -signal.SIGKILL and not Path("x.zip").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in Path(".x.zip.parts").rglob("img*.png")}
    assert 0 < len(kept) < 12
    tool(data, dest="x.zip", resolution=8).refused("made with another size")
    tool(data, dest="x.zip", resolution=4).ok()
    tool(data, dest="y.zip", resolution=4).ok()
    with zipfile.ZipFile("x.zip") as one, zipfile.ZipFile("y.zip") as two:
        assert [(n, one.read(n)) for n in one.namelist()] == [(n, two.read(n)) for n in two.namelist()]
    assert "There already: 12 images" in tool(data, dest="x.zip", resolution=4).ok().output
    tool(data, dest="x.zip", resolution=8).refused("x.zip already exists, made otherwise")


def test_bad_input_is_one_line(tmp_path):
    write_images(tmp_path / "data", 2)
    write_images(tmp_path / "long", 2, size=(8, 6))
    (tmp_path / "long" / "0001.png").write_bytes(b"no image")
    for source, changes, words in (
        ("nothere", {}, "nothere does not exist"),
        ("data", dict(dest="x.tar"), "--dest: x.tar is not a name ending in .zip"),
        ("data", dict(resolution="0"), "--resolution: '0' does not parse"),
        ("data", dict(resolution="9" * 30), "does not parse"),
        ("data", dict(resolution="8x16"), "does not parse"),
        ("data", dict(resolution="16x8"), "center-crop-wide, and nothing else"),
        ("data", dict(transform="center-crop"), "needs the size"),
        ("data", dict(transform="center-crop-wide", resolution=8), "center-crop-wide, and nothing else"),
        ("data", dict(labels="folders"), "no folders that could be classes"),
        ("data", dict(split="test"), "it is CIFAR-10 that has a test split"),
        ("long", dict(resolution=4), "image 0 is 6×8; choose how it becomes a square"),
        ("long", dict(resolution=4, transform="center-crop"), r"0001\.png in long is not a readable image"),
    ):
        tool(source, **{"dest": f"{source}.zip", **changes}).refused(words)
        assert not Path(f"{source}.zip").exists()


def test_a_dry_run_writes_nothing(tmp_path):
    write_images(tmp_path / "data", 4)
    plan = json.loads(tool("data", "-n", resolution=4, max_images=3).ok().output)
    assert (plan["images"], plan["classes"], plan["size"]) == (3, 0, [4, 4]) and not list(Path().glob("*.zip"))
