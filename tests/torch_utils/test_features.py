"""Sharding, decoding, moments, gathering: the same numbers however the work is split."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_images

from dnnlib import UserError
from torch_utils import distributed
from torch_utils.arrays import read_arrays, read_meta, write_arrays
from torch_utils.metrics.features import FeatureSet, Moments, choose, decoded_batches, extract
from torch_utils.metrics.image_set import ImageDataset


class Corners:
    """A detector without a network: means of five parts of each image."""

    dim, device = 6, torch.device("cpu")

    def features(self, images):
        x = images.float().expand(-1, 3, -1, -1)
        parts = [x[:, :, :3, :3], x[:, :, 4:, 4:]]
        return torch.cat([part.mean((2, 3)) for part in parts], dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "set", 23)


def as_rank(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def compute(folder, batch=4, workers=0, **kwargs) -> FeatureSet:
    dataset = ImageDataset(folder)
    batches = decoded_batches(dataset, batch, workers)
    return extract(batches, Corners(), len(dataset), **kwargs)


def test_images_are_chosen_as_edm_does():
    expected = np.arange(10)
    np.random.RandomState(7).shuffle(expected)
    assert choose(10, 4, 7).tolist() == sorted(expected[:4].tolist())
    assert choose(10, 4, 7 + 2**31).tolist() == choose(10, 4, 7).tolist()
    assert choose(10, 10, 7).tolist() == choose(10).tolist() == list(range(10))
    with pytest.raises(UserError, match="num: found 10 images, fewer than 11"):
        choose(10, 11)


@pytest.mark.parametrize("count, world", [(0, 1), (1, 2), (10, 3), (50000, 7), (3, 8)])
def test_shards_cover_everything_once_in_order(count, world, monkeypatch):
    parts = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        parts.append(distributed.shard(count))
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_moments_are_those_of_all_features(folder):
    result = compute(folder, keep=True)
    np.testing.assert_allclose(result.mu, result.features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.sigma, np.cov(result.features.astype(np.float64).T), rtol=1e-9, atol=1e-9)
    again = FeatureSet.from_features(result.features)
    np.testing.assert_allclose(again.sigma, result.sigma, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch, workers", [(1, 0), (5, 2), (64, 2)])
def test_batch_size_and_workers_change_nothing(folder, batch, workers):
    a, b = compute(folder, keep=True), compute(folder, batch, workers, keep=True)
    assert np.array_equal(a.features, b.features)
    np.testing.assert_allclose(a.sigma, b.sigma, rtol=1e-12, atol=1e-12)


def test_ranks_together_have_every_image_once(folder, monkeypatch):
    whole, sums = compute(folder, keep=True), Moments(6)
    rows = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        dataset = ImageDataset(folder)
        for images in decoded_batches(dataset, 2):
            rows.append(Corners().features(images))
            sums.add(rows[-1])
    assert np.array_equal(torch.cat(rows).numpy(), whole.features)
    for found, expected in zip(sums.finish(), (whole.mu, whole.sigma)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_features_are_not_kept_unless_asked_for(folder):
    moments, features = compute(folder), compute(folder, keep=True, moments=False)
    assert moments.kept is None and features.moments is None
    for ask in (lambda: moments.features, lambda: features.mu, lambda: features.sigma):
        with pytest.raises(ValueError, match="were not"):
            ask()


def test_a_zip_is_read_by_several_workers(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.glob("*.png")):
            archive.write(path, f"sub/{path.name}")
    whole = compute(folder, keep=True)
    for _ in range(3):
        assert np.array_equal(compute(tmp_path / "set.zip", 2, 2, keep=True).features, whole.features)


@pytest.mark.parametrize("layout", ["rgb", "grey", "grey4"])
def test_an_npz_of_images(tmp_path, folder, layout):
    images = ImageDataset(folder).load_all()
    array = images.transpose(0, 2, 3, 1)
    array = {"rgb": array, "grey": array[..., 0], "grey4": array[..., :1]}[layout]
    np.savez(tmp_path / "set.npz", arr_0=array, arr_1=np.arange(23))
    found = ImageDataset(tmp_path / "set.npz")
    assert len(found) == 23 and np.array_equal(found.load(5), images[5][: 3 if layout == "rgb" else 1])
    assert found.labels is None and found.label_dim == 0
    compute(tmp_path / "set.npz", 4, 2)


# --- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(tmp_path, workers):
    folder = write_images(tmp_path / "set", 9)
    (folder / "0006.png").write_bytes((folder / "0006.png").read_bytes()[:40])
    with pytest.raises(UserError, match="0006.png in .* is not a readable image") as error:
        compute(folder, 2, workers)
    assert "\n" not in error.value.message


def test_images_of_several_sizes_are_named_before_the_first_feature(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "set", 5)
    Image.new("RGB", (9, 8)).save(folder / "0003.png")
    monkeypatch.setattr(Corners, "features", lambda *args: pytest.fail("a feature was computed"))
    with pytest.raises(UserError, match="0003.png in .* is 8×9 .*, the first image, 0000.png, 8×8"):
        compute(folder, batch=1)


def test_grey_and_coloured_images_make_a_coloured_set(tmp_path):
    folder = write_images(tmp_path / "set", 5)
    grey = Image.open(folder / "0003.png").convert("L")
    grey.convert("RGB").save(folder / "0003.png")
    expected = compute(folder, keep=True)
    grey.save(folder / "0003.png")
    assert np.array_equal(compute(folder, keep=True).features, expected.features)
    assert ImageDataset(folder).load(3).shape == (3, 8, 8)


def test_features_that_are_not_finite_are_refused(folder, monkeypatch):
    class Broken(Corners):
        def features(self, images):
            return super().features(images) / torch.tensor([1.0] * 5 + [0.0]) * 0

    dataset = ImageDataset(folder)
    with pytest.raises(UserError, match="image 0 are not finite"):
        extract(decoded_batches(dataset, 4), Broken(), 23)


def test_one_image_is_too_few(folder):
    with pytest.raises(UserError, match="at least 2"):
        extract([], Corners(), 1)


def test_npz_files_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.array([{}], dtype=object), images=np.array([{}], dtype=object))
    for read in (read_arrays, ImageDataset):
        with pytest.raises(UserError, match="mu holds objects|holds mu object"):
            read(tmp_path / "x.npz")


def test_arrays_and_their_description_come_back(tmp_path):
    write_arrays(tmp_path / "deep" / "x.npz", {"a": 1}, mu=np.arange(3.0))
    arrays = read_arrays(tmp_path / "deep" / "x.npz")
    assert arrays["mu"].tolist() == [0, 1, 2] and read_meta(arrays) == {"a": 1}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.npz"]
