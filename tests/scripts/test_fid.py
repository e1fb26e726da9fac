"""FID and KID: recorded values, scipy, closed forms, metamorphic properties; and the commands of fid.py."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from evaluating import calc, evaluation, records, run, write_files
from golden_files import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Patches, flags, invoke, run_ranks, run_script, teacher, write_images

from fid import calculate_fid
from torch_utils.metrics.frechet import covariance_factor
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.metrics.kernel import kernel_distance

GOLDEN = Golden("metrics")
pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def gaussian(dim, n, seed=0, scale=1.0):
    """Mean and covariance of n random vectors with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal([n, dim]) @ rng.standard_normal([dim, dim]) * scale / dim**0.5 + rng.standard_normal(dim)
    return x.mean(0), np.cov(x.T).reshape(dim, dim)


def by_square_root(mu, sigma, mu_ref, sigma_ref):
    root = scipy.linalg.sqrtm(sigma @ sigma_ref).real
    return np.square(mu - mu_ref).sum() + np.trace(sigma + sigma_ref - 2 * root)


# --- Algebra ---------------------------------------------------------------------------------------------------------


def moments(name):
    return GOLDEN[f"mu_{name}"], GOLDEN[f"sigma_{name}"]


def test_equals_the_recorded_values():
    found = calculate_fid(*moments("fake"), *moments("real"))
    assert found == pytest.approx(float(GOLDEN["fid"]), rel=1e-6)
    assert found == pytest.approx(float(GOLDEN["fid_pytorch_fid"]), rel=1e-6)
    assert calculate_fid(*moments("few"), *moments("real")) == pytest.approx(float(GOLDEN["fid_few"]), rel=1e-3)
    assert 0 <= calculate_fid(*moments("real"), *moments("real")) < 1e-9


@pytest.mark.parametrize("dim", [1, 2, 17, 100])
def test_equals_scipys_square_root(dim):
    a, b = gaussian(dim, 3 * dim + 10, 0), gaussian(dim, 4 * dim + 10, 1)
    assert calculate_fid(*a, *b) == pytest.approx(by_square_root(*a, *b), rel=1e-6)


@given(st.lists(st.tuples(*[st.floats(0, 1e3)] * 2), min_size=1, max_size=12), st.floats(-10, 10))
@settings(max_examples=60, deadline=None)
def test_equals_the_closed_form_of_diagonal_covariances(pairs, shift):
    a, b = (np.array(values) for values in zip(*pairs))
    zero = np.zeros(len(a))
    expected = shift**2 * len(a) + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = calculate_fid(zero, np.diag(a), zero + shift, np.diag(b))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(a.max(), b.max(), 1))


@pytest.mark.parametrize("count", [2, 3, 20, 63, 64, 65])
def test_singular_covariances_give_real_finite_numbers(count):
    """By another route: Σ₁^½ is U √λ Uᵀ, and tr (Σ₁^½ Σ₂ Σ₁^½)^½ the sum of roots of its eigenvalues."""
    a, b = gaussian(64, count, 0), gaussian(64, 40, 1)
    values, vectors = np.linalg.eigh(a[1])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b[1] @ root).clip(0)).sum()
    expected = np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1]) - 2 * overlap
    found = calculate_fid(*a, *b)
    assert np.isfinite(found) and found >= 0
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(calculate_fid(*b, *a), rel=1e-9)
    assert 0 <= calculate_fid(*a, *a) < 1e-6 * np.trace(a[1])


def test_constant_features_have_no_covariance():
    zero = np.zeros([8, 8])
    assert calculate_fid(np.ones(8), zero, np.zeros(8), zero) == 8
    assert calculate_fid(np.ones(8), zero, np.ones(8), np.eye(8)) == 8


def test_factors_multiply_to_the_covariance():
    for count in (5, 64, 300):
        sigma = torch.from_numpy(gaussian(64, count)[1])
        factor = covariance_factor(sigma)
        torch.testing.assert_close(factor @ factor.T, sigma, rtol=1e-9, atol=1e-9)
        assert factor.shape[1] == min(count - 1, 64)


def test_metamorphic_properties():
    a, b = gaussian(32, 100, 0), gaussian(32, 100, 1)
    expected = calculate_fid(*a, *b)
    turn = scipy.linalg.qr(np.random.default_rng(2).standard_normal([32, 32]))[0]
    turned = [(turn @ mu + 5, turn @ sigma @ turn.T) for mu, sigma in (a, b)]
    assert calculate_fid(*turned[0], *turned[1]) == pytest.approx(expected, rel=1e-9)
    assert calculate_fid(*b, *a) == pytest.approx(expected, rel=1e-9)
    scaled = [(3 * mu, 9 * sigma) for mu, sigma in (a, b)]
    assert calculate_fid(*scaled[0], *scaled[1]) == pytest.approx(9 * expected, rel=1e-9)
    assert calculate_fid(a[0] + 1, a[1], a[0], a[1]) == pytest.approx(32, rel=1e-6)


@pytest.mark.parametrize("args, words", [
    ((np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)), "shapes are"),
    ((np.zeros(3), np.eye(2), np.zeros(3), np.eye(3)), "shapes are"),
    ((np.zeros([3, 1]), np.eye(3), np.zeros([3, 1]), np.eye(3)), "shapes are"),
    ((np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3)), "not finite"),
    ((np.zeros(3), np.full([3, 3], np.inf), np.zeros(3), np.eye(3)), "not finite"),
])  # fmt: skip
def test_unusable_statistics_are_refused(args, words):
    with pytest.raises(ValueError, match=words):
        calculate_fid(*args)


def test_kid_is_the_unbiased_estimate():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal([7, 5]).astype(np.float32) for _ in range(2))

    def kernel(a, b):
        return (float(a.astype(float) @ b.astype(float)) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i, j in pairs if i != j) / 42
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 49
    found = kernel_distance(x, y)
    assert found.mean == pytest.approx(expected, rel=1e-9) and found.std == 0 and found.subset_size == 7


def test_kid_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal([2000, 16]), rng.standard_normal([2000, 16])
    same, other = kernel_distance(x, y, 40, 200), kernel_distance(x, y + 0.5, 40, 200)
    assert abs(same.mean) < 0.05 * other.mean and other.mean > 3 * other.std
    assert kernel_distance(x, y, 40, 200) == same
    assert kernel_distance(x[:50], y).subset_size == 50


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two folders of images, one of them also as zip and npz."""
    root = write_files(tmp_path_factory.mktemp("fid"), 60, 50)
    with zipfile.ZipFile(root / "fake.zip", "w") as archive:
        for path in sorted((root / "fake").glob("*.png")):
            archive.write(path, f"00000/{path.name}")
    np.savez(root / "fake.npz", arr_0=ImageDataset(root / "fake").load_all().transpose(0, 2, 3, 1))
    return root


def expected_fid(files, rows=slice(None)):
    def stats(name, rows):
        images = torch.from_numpy(ImageDataset(files / name).load_all()[rows])
        x = Patches()(images).double().numpy()
        return x.mean(0), np.cov(x.T)

    return by_square_root(*stats("fake", rows), *stats("real", slice(None)))


def test_folder_zip_and_npz_give_one_number_at_any_batch_size(files):
    for name in ("fake", "fake.zip", "fake.npz"):
        for batch in (1, 7, 64):
            calc(files, images=files / name, batch=batch).ok()
    values = [record["value"] for record in records()]
    assert values == pytest.approx([expected_fid(files)] * 9, rel=1e-6)
    assert max(values) - min(values) < 1e-9 * values[0]


def test_the_record_says_what_was_measured(files):
    output = calc(files, desc="a test", num=40, seed=3).ok().output
    (record,) = records()
    assert f"FD(patches.pt) {record['value']:g}" in output
    assert (record["metric"], record["desc"]) == ("FD(patches.pt)", "a test")
    assert (record["N"], record["seed"]) == (40, [3])
    assert record["reference_N"] == 50 and len(record["reference_sha256"]) == len(record["detector_sha256"]) == 64
    assert record["precision"] == "fp32" and record["resize"] == "its own"
    assert set(record["versions"]) == {"python", "torch", "numpy"} and record["date"].endswith("+00:00")
    assert record["images"] == str(files / "fake") and record["reference"] == str(files / "real")


def test_statistics_stand_for_their_images(files):
    run("fid", "ref", files, data=files / "real", dest="deep/real.npz", features="kept.npz").ok()
    for reference in ("deep/real.npz", "kept.npz", files / "real"):
        calc(files, ref=reference).ok()
    values = [record["value"] for record in records()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    with np.load("deep/real.npz") as file:
        assert file["mu"].shape == (6,) and file["sigma"].shape == (6, 6) and file["mu"].dtype == np.float64
        np.savez("edm.npz", mu=file["mu"], sigma=file["sigma"])  # as EDM and StyleGAN publish them
    calc(files, ref="edm.npz", out="other.jsonl").ok()
    (record,) = records("other.jsonl")
    assert record["value"] == values[0] and record["reference_N"] is None


def test_seeds_and_trials_report_mean_deviation_and_minimum(files):
    output = calc(files, num=30, seed="0,1,2").ok().output
    calc(files, trials=3, num=20).ok()
    calc(files, trials=2).ok()
    by_seed, blocks, halves = records()
    assert len(by_seed["trials"]) == len(set(by_seed["trials"])) == 3
    assert by_seed["value"] == min(by_seed["trials"])
    assert by_seed["mean"] == pytest.approx(np.mean(by_seed["trials"]))
    assert by_seed["std"] == pytest.approx(np.std(by_seed["trials"], ddof=1))
    assert f"minimum {by_seed['value']:g}" in output and f"mean {by_seed['mean']:g} ± {by_seed['std']:g}" in output
    expected = [expected_fid(files, slice(start, start + 20)) for start in (0, 20, 40)]
    assert blocks["trials"] == pytest.approx(expected, rel=1e-6)
    assert halves["N"] == 30 and len(halves["trials"]) == 2


def test_kept_features_give_the_same_numbers(files):
    calc(files, num=30, seed="0,1", metrics="fid,kid").ok()
    for _ in range(2):
        calc(files, num=30, seed="0,1", metrics="fid,kid", features="kept.npz").ok()
    found = records()
    for metric in (0, 1):
        values = [record["trials"] for record in found[metric::2]]
        np.testing.assert_allclose(values, [values[0]] * 3, rtol=1e-9)
    assert found[1]["metric"] == "KD(patches.pt)" and found[1]["subset_size"] == 30
    calc(files, features="kept.npz").refused("holds features of other indices")


def test_few_images_bring_a_warning_and_a_number(files):
    output = calc(files, num=2).ok().output
    assert "Warning: 2 images for 6 features" in output and "biased" in output
    assert "Warning" not in calc(files, num=30).ok().output
    assert all(np.isfinite(record["value"]) and record["value"] >= 0 for record in records())


def test_two_processes_give_the_same_number(files, tmp_path):
    calc(files, metrics="fid,kid").ok()
    arguments = evaluation(files, images=files / "fake.zip", ref=files / "real", batch=5, workers=1, metrics="fid,kid")
    run_ranks("fid", ["calc", *arguments], tmp_path, processes=2).ok()
    fid, kid, fid2, kid2 = (record["value"] for record in records())
    assert fid2 == pytest.approx(fid, rel=1e-9) and kid2 == kid


def test_a_damaged_image_of_another_rank_is_reported_once(files, tmp_path):
    folder = write_images(tmp_path / "set", 12)
    (folder / "0011.png").write_bytes(b"not an image")
    arguments = evaluation(files, images=folder, ref=files / "real", batch=2)
    run_ranks("fid", ["calc", *arguments], tmp_path, processes=2).refused("0011.png in")


@pytest.mark.slow
def test_under_torchrun(files, tmp_path):
    calc(files).ok()
    arguments = evaluation(files, images=files / "fake", ref=files / "real")
    run_script("fid.py", "calc", *arguments, cwd=tmp_path, processes=2).ok()
    one, two = (record["value"] for record in records())
    assert two == pytest.approx(one, rel=1e-9)


# --- gen -------------------------------------------------------------------------------------------------------------


SAMPLER = dict(solver="euler", num_steps=3, precision="fp32")


def gen(files, *more, **changes):
    return run("fid", "gen", files, *more, **{"model_path": teacher(), "ref": files / "real", **SAMPLER, **changes})


def test_sampling_and_evaluating_in_one_go_equals_doing_one_after_the_other(files):
    gen(files, seeds="0-11", batch=5).ok()
    written = dict(SAMPLER, model_path=teacher(), seeds="0-11", outdir="samples", device="cpu")
    invoke("sample", *flags(written)).ok()
    calc(files, images="samples").ok()
    one, two = records()
    assert one["value"] == two["value"]
    assert one["seeds"] == "0-11" and one["N"] == 12 and one["sampler"]["nfe"] == 2
    assert not [p for p in Path().rglob("*.png") if "samples" not in p.parts]


def test_trials_of_gen_take_the_following_seeds(files):
    gen(files, seeds="0-5", trials=2).ok()
    gen(files, seeds="6-11", features="kept.npz").ok()
    gen(files, seeds="6-11", features="kept.npz").ok()
    both, second, again = records()
    assert both["trials"][1] == pytest.approx(second["value"], rel=1e-9) and second["value"] == again["value"]
    gen(files, seeds="0-5", features="kept.npz").refused("holds features of other seeds")


def test_gen_with_two_processes(files, tmp_path):
    gen(files, seeds="0-10").ok()
    arguments = evaluation(files, SAMPLER, model_path=teacher(), ref=files / "real", seeds="0-10", batch=3)
    run_ranks("fid", ["gen", *arguments], tmp_path, processes=2).ok()
    one, two = (record["value"] for record in records())
    assert two == pytest.approx(one, rel=1e-9)


# --- Refused ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(files, tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez("other.npz", a=np.zeros(3))
    np.savez("half.npz", mu=np.zeros(6))
    np.savez("wide.npz", mu=np.zeros(20), sigma=np.zeros([20, 20]))
    np.savez("nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    Path("broken.npz").write_bytes((files / "fake.npz").read_bytes()[:500])
    Path("text.zip").write_text("no archive")
    for changes, words in (
        (dict(images="empty"), "holds no image"),
        (dict(images="absent"), "absent does not exist"),
        (dict(images="text.zip"), "neither a folder nor a zip"),
        (dict(images="absent.npz"), "absent.npz does not exist"),
        (dict(images="other.npz"), "expected one uint8 array"),
        (dict(images="wide.npz"), "needs images or their features"),
        (dict(ref="half.npz"), "need mu and sigma"),
        (dict(ref="wide.npz"), r"mu \[20\].*the detector has 6 features"),
        (dict(ref="nan.npz"), "not finite"),
        (dict(ref="broken.npz"), "not a readable .npz"),
        (dict(ref="wide.npz", metrics="kid"), "needs images or their features"),
        (dict(num=61), "--num: found 60 images, fewer than 61"),
        (dict(seed="0,1"), "give --num below that"),
        (dict(seed="0,1", num=5, trials=2), "give one of them"),
        (dict(trials=7), "do not make 7 blocks"),
        (dict(metrics="is"), "expected a list of fid, kid"),
        (dict(seed="a"), "--seed='a' does not parse"),
        (dict(detector="no-such"), "--detector: no-such is unknown"),
        (dict(features="kept.txt"), "ending in .npz"),
    ):
        calc(files, **changes).refused(words)
    run("fid", "ref", files, data=files / "real", dest="stats").refused("stats")
    assert not Path("metrics.jsonl").exists()


def test_statistics_of_another_detector_are_refused(files):
    run("fid", "ref", files, data=files / "real", dest="real.npz").ok()

    class Other(Patches):
        pass

    torch.jit.script(Other()).save("other.pt")
    calc(files, ref="real.npz", detector="other.pt").refused("was made with detector patches.pt")


def test_references_by_name_and_url_are_fetched(files, monkeypatch):
    download = pytest.importorskip("dnnlib.download")
    run("fid", "ref", files, data=files / "real", dest="real.npz").ok()
    asked = []

    def fetch(urls, dest, sha256=None):
        asked.append((urls, Path(dest)))
        return Path("real.npz")

    monkeypatch.setattr(download, "fetch", fetch)
    calc(files, ref="cifar10").ok()
    calc(files, ref="https://example.org/a/real.npz?download=1").ok()
    (urls, dest), (others, other) = asked
    assert urls == ["https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz"]
    assert dest.name == "cifar10-32x32.npz"
    assert others == ["https://example.org/a/real.npz?download=1"] and other.name.endswith("-real.npz")
    assert records()[0]["reference"] == "cifar10"


def test_unreachable_and_wrong_downloads_are_one_line(files, monkeypatch):
    monkeypatch.setenv("SFD_OFFLINE", "1")
    calc(files, ref="cifar10").refused("offline")
    calc(files, ref="https://example.org/real.npz").refused("offline")
    calc(files, detector="inception").refused("offline")
    Path("src").mkdir()
    Path("src/inception-2015-12-05.pth").write_bytes(b"something else")
    calc(files, detector="inception").refused("sha256")


@pytest.mark.parametrize("command", ["calc", "gen"])
def test_a_dry_run_does_nothing(files, command):
    output = (calc if command == "calc" else gen)(files, "-n").ok().output
    assert json.loads(output)["ref"] == str(files / "real") and not Path("metrics.jsonl").exists()
