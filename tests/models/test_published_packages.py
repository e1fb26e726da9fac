"""The same numbers as the published torch-fidelity and pytorch-fid, from the same weights, images and features.

Both require torchvision, of which the compared parts use nothing but the import. They are loaded without it, so that
`pip install --no-deps torch-fidelity pytorch-fid` is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from test_detectors import recipe
from tiny import invoke, write_images

from fid import calculate_fid
from prdc import compute_prdc
from torch_utils.arrays import read_arrays
from torch_utils.metrics.features import FeatureSet
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.metrics.inception_score import inception_score
from torch_utils.metrics.kernel import kernel_distance


class Unused(ModuleType):
    """Stands for a module whose names are imported, but do nothing for what is compared."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def load(name: str, *unused: str) -> ModuleType:
    """A module of a package without running the package's `__init__`; the test is skipped where it is absent."""
    package = name.split(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"pip install --no-deps {package.replace('_', '-')}")
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    stand_ins = {package: bare, **{other: Unused(other) for other in unused}}
    before = {other: sys.modules.get(other) for other in stand_ins}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(name)
    finally:  # only the stand-ins go: what the module imported for itself cannot be loaded twice
        for other, module in before.items():
            sys.modules.pop(other)
            if module is not None:
                sys.modules[other] = module


def torch_fidelity(name: str) -> ModuleType:
    return load(f"torch_fidelity.{name}", "torch_fidelity.utils")


def features(count: int, seed: int, dim: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal([count, dim]) * np.exp(-np.arange(dim) / 20) + 0.1 * seed).astype(np.float32)


SETS = features(300, 0), features(250, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Made-up weights in the published layout, and two folders of images."""
    root = tmp_path_factory.mktemp("published")
    torch.save(recipe(), root / "made-up.pth")
    write_images(root / "one", 4, size=(40, 40), seed=1)
    write_images(root / "two", 5, size=(40, 40), seed=2)
    return root


def run(files: Path, command: str, *args: str) -> None:
    detector = f"--detector={files / 'made-up.pth'}"
    invoke("fid", command, detector, "--device=cpu", "--workers=0", *args).ok()


def their_features(files: Path, folder: str) -> torch.Tensor:
    module = torch_fidelity("feature_extractor_inceptionv3")
    extractor = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=files / "made-up.pth")
    return extractor(torch.from_numpy(ImageDataset(files / folder).load_all()))[0]


def test_features_of_a_folder(files, tmp_path):
    expected = their_features(files, "one")
    kept = tmp_path / "features.npz"
    run(files, "ref", f"--data={files / 'one'}", f"--dest={tmp_path / 'stat.npz'}", f"--features={kept}")
    np.testing.assert_allclose(read_arrays(kept)["features"], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(read_arrays(tmp_path / "stat.npz")["mu"], expected.mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_commands_numbers(files, tmp_path):
    """From weights and images to the last line; slow for the eigenvalues of a 2048 x 2048 matrix that is not symmetric."""
    fid, kid = torch_fidelity("metric_fid"), torch_fidelity("metric_kid")
    one, two = (their_features(files, name) for name in ("one", "two"))
    statistics = [fid.fid_features_to_statistics(f) for f in (one, two)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    out = tmp_path / "metrics.jsonl"
    run(files, "calc", f"--images={files / 'one'}", f"--ref={files / 'two'}", "--metrics=fid,kid", f"--out={out}")
    found = {record["metric"]: record["value"] for record in map(json.loads, out.read_text().splitlines())}
    assert found["FD(made-up.pth)"] == pytest.approx(expected, rel=1e-3)
    expected = kid.kid_features_to_metric(one, two, kid_subsets=100, kid_subset_size=4, verbose=False, rng_seed=2020)
    assert found["KD(made-up.pth)"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-2)


def test_moments():
    expected = torch_fidelity("metric_fid").fid_features_to_statistics(torch.from_numpy(SETS[0].astype(np.float64)))
    found = FeatureSet.from_features(SETS[0])
    np.testing.assert_allclose(found.mu, expected["mu"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sigma, expected["sigma"], rtol=1e-9, atol=1e-12)


def moments() -> list[np.ndarray]:
    return [array for s in map(FeatureSet.from_features, SETS) for array in (s.mu, s.sigma)]


def test_fid_equals_torch_fidelity():
    a, b, c, d = moments()
    statistics = {"mu": a, "sigma": b}, {"mu": c, "sigma": d}
    expected = torch_fidelity("metric_fid").fid_statistics_to_metric(*statistics, verbose=False)
    assert calculate_fid(a, b, c, d) == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)


def test_inception_score_equals_torch_fidelity():
    weights = torch.from_numpy(np.random.default_rng(3).standard_normal([30, SETS[0].shape[1]]).astype(np.float32))
    logits = torch.from_numpy(SETS[0]).double() @ weights.double().T
    isc = torch_fidelity("metric_isc").isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    expected = isc["inception_score_mean"], isc["inception_score_std"]
    assert inception_score(SETS[0], weights) == pytest.approx(expected, rel=1e-9)


def test_fid_equals_pytorch_fid():
    module = load("pytorch_fid.fid_score", "torchvision", "torchvision.transforms", "pytorch_fid.inception")
    try:
        expected = module.calculate_frechet_distance(*moments())
    except (TypeError, ValueError) as error:
        pytest.skip(f"pytorch-fid does not run with this scipy ({error})")
    assert calculate_fid(*moments()) == pytest.approx(float(expected), rel=1e-6)


def test_kid_equals_torch_fidelity():
    expected = torch_fidelity("metric_kid").kid_features_to_metric(
        *map(torch.from_numpy, SETS), kid_subsets=10, kid_subset_size=100, verbose=False, rng_seed=2020
    )
    found = kernel_distance(*SETS, subsets=10, subset_size=100)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3, abs=1e-5)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_equal_torch_fidelity(k):
    """It counts the surface of a ball as inside, which makes no difference where there are no ties."""
    real, fake = SETS
    expected = torch_fidelity("metric_prc").prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=k, prc_batch_size=100, verbose=False
    )
    found = compute_prdc(real, fake, k)
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1
    assert (found["precision"], found["recall"]) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
