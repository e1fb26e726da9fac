"""Precision, recall, density, coverage: recorded values, the published package, brute force, ties, properties."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from golden_files import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import flags, invoke, run_ranks, write_images

from prdc import compute_prdc
from torch_utils.metrics import prdc as manifold

GOLDEN = Golden("metrics")
NAMES = ("precision", "recall", "density", "coverage")


def brute_force(real, fake, k):
    """The definitions, with all differences in float64; exact for small integers."""
    real, fake = np.asarray(real, dtype=np.float64), np.asarray(fake, dtype=np.float64)

    def distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    real_radii, fake_radii = (np.sort(distances(s, s), axis=1)[:, k] for s in (real, fake))
    between = distances(real, fake)
    inside = between < real_radii[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (between < fake_radii[None]).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": inside.any(1).mean(),
    }


def sets(n=120, m=90, dim=16, seed=0, spread=0.9):
    rng = np.random.default_rng(seed)
    scale = np.exp(-np.arange(dim) / dim * 3)
    return (rng.standard_normal([n, dim]) * scale + 1).astype(np.float32), (
        rng.standard_normal([m, dim]) * scale * spread + 1.1
    ).astype(np.float32)


def close(found, expected):
    assert set(found) == set(NAMES)
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def fast_type(request, monkeypatch):
    """The type of the approximate distances, whatever this machine would choose."""
    monkeypatch.setattr(manifold, "_fast_type", lambda device: request.param)
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(manifold, "TILE", 16)
    monkeypatch.setattr(manifold, "EXACT_BLOCK", 64)
    monkeypatch.setattr(manifold, "TERMS", 3)
    monkeypatch.setattr(manifold, "SPARE", 1)


def test_equals_the_recorded_values(fast_type):
    found = compute_prdc(GOLDEN["features_real"], GOLDEN["features_fake"], nearest_k=5)
    assert found == {name: float(GOLDEN[f"prdc/k5/{name}"]) for name in NAMES}


def test_zero_rows_explain_what_the_reference_prints():
    """Its script evaluates an array of twice as many rows, half of them never filled."""
    padded = [torch.cat([f, torch.zeros_like(f)]) for f in (GOLDEN["features_real"], GOLDEN["features_fake"])]
    close(compute_prdc(*padded), {name: float(GOLDEN[f"prdc_zero_padded/k5/{name}"]) for name in NAMES})


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_brute_force(k, dtype, small_tiles, fast_type):
    real, fake = (s.astype(dtype) for s in sets())
    close(compute_prdc(real, fake, k), brute_force(real, fake, k))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_ties_and_duplicates_are_exact(seed, n, m, dim, values):
    """On a grid of few points nearly every comparison is a tie."""
    rng = np.random.default_rng(seed)
    real, fake = (rng.integers(0, values + 1, [size, dim]).astype(np.float32) for size in (n, m))
    for k in {1, min(n, m) - 1}:
        for dtype in (torch.float32, torch.bfloat16):
            with mock.patch.object(manifold, "_fast_type", lambda device, dtype=dtype: dtype):
                close(compute_prdc(real, fake, k), brute_force(real, fake, k))


def test_duplicates_in_tiles(small_tiles, fast_type):
    rng = np.random.default_rng(0)
    real = rng.integers(0, 3, [50, 3]).astype(np.float32)
    fake = np.concatenate([real[:30], real[:10]])
    close(compute_prdc(real, fake, 3), brute_force(real, fake, 3))


def test_far_from_the_origin(fast_type):
    """Where |x|² is large, x² + y² − 2xy alone has no digits left in float32."""
    real, fake = sets()
    real, fake = real.astype(np.float64) + 1e4, fake.astype(np.float64) + 1e4
    close(compute_prdc(real, fake), brute_force(real, fake, 5))


def clusters(count, dim, apart, rng):
    """Small integers around two corners: all squared distances are exact in float64, many are equal."""
    corner = rng.integers(0, 2, [count, 1]) * apart
    return (rng.integers(0, 3, [count, dim]) + corner).astype(np.float32)


@pytest.mark.parametrize("apart", [0, 16, 300, 2**13, 2**21])
def test_small_clusters_far_apart(apart, small_tiles, fast_type):
    """Centring does not help against this cancellation: products tell the clusters apart, but not their members."""
    rng = np.random.default_rng(apart)
    real, fake = clusters(70, 5, apart, rng), clusters(60, 5, apart, rng)
    close(compute_prdc(real, fake, 3), brute_force(real, fake, 3))


@pytest.mark.parametrize("seed", range(4))
def test_differences_below_the_precision_of_float32(seed, small_tiles, fast_type):
    """Squared distances such as 2²⁶ and 2²⁶ + 1 differ, and equal ones are equal."""
    rng = np.random.default_rng(seed)

    def points(count):
        far = rng.choice([0, 2**12, 2**13], [count, 3])
        return np.concatenate([far, rng.integers(0, 2, [count, 2])], axis=1).astype(np.float32)

    real, fake = points(60), points(50)
    for k in (1, 5, 20):
        close(compute_prdc(real, fake, k), brute_force(real, fake, k))


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-60, 2.0**60, 2.0**120])
def test_no_scale_is_too_small_or_too_large(scale, fast_type):
    """Squares of these are below or above what float32 can hold."""
    real, fake = clusters(40, 4, 2, np.random.default_rng(0)), clusters(30, 4, 2, np.random.default_rng(1))
    scaled = (real * np.float32(scale), fake * np.float32(scale))
    close(compute_prdc(*scaled, 3), brute_force(real, fake, 3))


def test_a_collapsed_set(small_tiles, fast_type):
    real, _ = sets(60, 1, 4)
    fake = np.repeat(real[:2], 25, axis=0)
    close(compute_prdc(real, fake, 5), brute_force(real, fake, 5))
    assert compute_prdc(fake, fake, 5) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


@pytest.mark.parametrize("dim", [7, 256, 700])
@pytest.mark.parametrize("whole", [False, True])
def test_approximate_distances_keep_their_margin(dim, whole, fast_type):
    rng = np.random.default_rng(dim)
    x = torch.from_numpy(rng.standard_normal([80, dim]) * np.exp(-np.arange(dim) / 50)).float()
    x[40:] = x[:40] * 1.001  # nearly parallel: products are as large as they can be
    if whole:  # small integers are exact in bfloat16: only their products are rounded
        x = x.sign() * (8 * x.abs() + 1).floor().clamp(max=9) / 16
    centre = torch.zeros(dim, dtype=torch.float64)
    copy = manifold._Points(x, centre, 0.25, torch.device("cpu")).copy(fast_type)
    exact = (x.double()[:, None] - x.double()).square().sum(-1) / 16
    error = (manifold._approximate(copy, copy, manifold._Workspace(x.device)) - exact).abs()
    margin = torch.stack([manifold._margin(copy, copy, limits) for limits in exact.T], dim=1)  # every distance a limit
    assert bool((error <= margin).all())
    assert bool((margin < 0.02 * (copy.squares[:, None] + copy.squares.max())).all())  # or nothing would be certain


def test_float32_takes_over_where_bfloat16_leaves_too_much_open(small_tiles, monkeypatch):
    used = []
    approximate = manifold._approximate
    monkeypatch.setattr(manifold, "_fast_type", lambda device: torch.bfloat16)
    monkeypatch.setattr(manifold, "_approximate", lambda x, *rest: used.append(x.values.dtype) or approximate(x, *rest))
    rng = np.random.default_rng(0)
    compute_prdc(*(rng.standard_normal([100, 3]).astype(np.float32) * 10 for _ in range(2)), 2)
    assert used.count(torch.float32) < used.count(torch.bfloat16)
    used.clear()
    compute_prdc(*(clusters(100, 8, 300, rng) for _ in range(2)), 2)
    assert used.count(torch.float32) > used.count(torch.bfloat16)


def test_white_features_leave_little_open(monkeypatch):
    """All their distances are nearly equal, so this rests on a narrow margin."""
    used, decided = [], []
    approximate, exact = manifold._approximate, manifold._exact
    monkeypatch.setattr(manifold, "_fast_type", lambda device: torch.bfloat16)
    monkeypatch.setattr(manifold, "_approximate", lambda x, *rest: used.append(x.values.dtype) or approximate(x, *rest))
    monkeypatch.setattr(manifold, "_exact", lambda x, y, i, j: decided.append(len(i)) or exact(x, y, i, j))
    rng = np.random.default_rng(0)
    compute_prdc(*(rng.standard_normal([800, 2048], dtype=np.float32) for _ in range(2)))
    assert set(used) == {torch.bfloat16}
    assert sum(decided) < 1600 * 16  # 6 for each are the least


def test_bfloat16_is_for_processors_that_multiply_it_faster():
    assert manifold._fast_type(torch.device("cuda")) == torch.float32
    assert manifold._fast_type(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_swapping_the_sets_swaps_precision_and_recall():
    real, fake = sets()
    there, back = compute_prdc(real, fake), compute_prdc(fake, real)
    assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])
    assert there["precision"] != there["recall"]


def test_metamorphic_properties():
    real, fake = sets()
    expected = compute_prdc(real, fake)
    rng = np.random.default_rng(1)
    close(compute_prdc(real[rng.permutation(len(real))], fake[rng.permutation(len(fake))]), expected)
    close(compute_prdc(real * 4, fake * 4), expected)
    same = compute_prdc(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = compute_prdc(real, fake + 1000)
    assert set(far.values()) == {0.0}
    more = compute_prdc(real, fake, nearest_k=20)
    assert all(more[name] >= expected[name] for name in ("precision", "recall", "coverage"))


def test_equals_the_published_package(fast_type):
    module = published_prdc()
    for n, m, dim in ((400, 300, 64), (150, 200, 2048)):
        real, fake = sets(n, m, dim)
        fake -= fake.mean(0) - real.mean(0)
        expected = module.compute_prdc(real, fake, nearest_k=5)
        close(compute_prdc(real, fake), expected)
        assert 0 < expected["coverage"] <= 1 and expected["density"] > 0


def published_prdc():
    """The package has the name of our script, so it is loaded from its file."""
    pytest.importorskip("sklearn", reason="the published prdc needs scikit-learn")
    try:
        path = importlib.metadata.distribution("prdc").locate_file("prdc/prdc.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps prdc")
    spec = importlib.util.spec_from_file_location("published_prdc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("real, fake, k, words", [
    (np.zeros([5, 3]), np.zeros([9, 3]), 5, "at least 6 features"),
    (np.zeros([9, 3]), np.zeros([9, 4]), 5, r"expected \[N, D\]"),
    (np.zeros([9, 3]), np.zeros([9]), 5, r"expected \[N, D\]"),
    (np.full([9, 3], np.nan), np.zeros([9, 3]), 5, "not finite"),
    (np.zeros([9, 3]), np.zeros([9, 3]), 0, "nearest_k=0"),
])  # fmt: skip
def test_unusable_sets_are_refused(real, fake, k, words):
    with pytest.raises(ValueError, match=words):
        compute_prdc(real, fake, k)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Pixels(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().flatten(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prdc")
    torch.jit.script(Pixels()).save(str(root / "pixels.pt"))
    write_images(root / "fake", 30, size=(64, 64), seed=1)
    write_images(root / "real", 40, size=(64, 64), seed=2)
    return root


def arguments(files: Path, *more, **changes):
    defaults = dict(images=files / "fake", images_ref=files / "real", num=30, detector=files / "pixels.pt")
    defaults["device"] = "cpu"
    return ["calc", *flags(defaults, changes), "--detector-runs-code", *more]


def records() -> list[dict]:
    return [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]


def test_the_command_equals_the_function(files):
    from torch_utils.metrics.image_set import ImageDataset

    output = invoke("prdc", *arguments(files, num=30)).ok().output
    fake = ImageDataset(files / "fake").load_all().reshape(30, -1).astype(np.float32)
    chosen = np.arange(40)
    np.random.RandomState(0).shuffle(chosen)
    real = ImageDataset(files / "real").load_all()[np.sort(chosen[:30])].reshape(30, -1).astype(np.float32)
    expected = brute_force(real, fake, 5)
    (record,) = records()
    close(record["value"], expected)
    assert all(f"{name} {expected[name]:g}" in output for name in NAMES)
    assert (record["N"], record["reference_N"], record["nearest_k"], record["metric"]) == (30, 30, 5, "PRDC(pixels.pt)")


def test_two_processes_print_the_same(files, tmp_path):
    invoke("prdc", *arguments(files)).ok()
    run_ranks("prdc", arguments(files, batch=7, workers=0), tmp_path, processes=2).ok()
    one, two = records()
    assert one["value"] == two["value"]


def test_features_are_kept_and_used_again(files):
    first = invoke("prdc", *arguments(files, features="kept.npz")).ok().output
    again = invoke("prdc", *arguments(files, images="kept.npz")).ok().output
    assert first.splitlines()[-4:] == again.splitlines()[-4:]
    invoke("prdc", *arguments(files, features="kept.npz", num=20)).refused("kept.npz holds features of other indices")


def test_bad_input_is_one_line(files, tmp_path):
    (tmp_path / "empty").mkdir()
    for changes, words in (
        (dict(num=31), "--num: found 30 images, fewer than 31"),
        (dict(num=5), "--num=5 is too few for --nearest_k=5"),
        (dict(images=tmp_path / "empty"), "holds no image"),
        (dict(images_ref=tmp_path / "absent"), "absent does not exist"),
        (dict(nearest_k=0), "nearest_k"),
        (dict(features="kept.txt"), "ending in .npz"),
    ):
        invoke("prdc", *arguments(files, **changes)).refused(words)
    assert not Path("metrics.jsonl").exists()


def test_a_dry_run_does_nothing(files):
    output = invoke("prdc", *arguments(files, "-n")).ok().output
    assert json.loads(output)["num"] == 30 and not Path("metrics.jsonl").exists()
