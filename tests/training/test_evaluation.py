"""Sources, caches and records: what names stand for, and files that do not hold what they should."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import calc, prdc, run, values, write_files
from PIL import Image
from tiny import Patches, flags, invoke, student, write_images

from dnnlib import UserError
from fid import calculate_fid, compute_fid, compute_kid
from models.detectors import load_detector
from prdc import compute_prdc
from torch_utils.arrays import read_arrays, write_arrays
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.metrics.inception_score import inception_score
from training.evaluation.records import append_records, read_records
from training.evaluation.sources import CHECKSUM, StoredFeatures, StoredStatistics, open_source, rows_checksum

DIM = 6
pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("evaluation"), 30, 20)


# --- Pixel formats, in every command ---------------------------------------------------------------------------------


def in_sixteen_bits(folder: Path, dest: Path) -> Path:
    dest.mkdir()
    for path in sorted(folder.iterdir()):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(dest / path.name)
    return dest


def test_the_number_of_bits_changes_no_number(files, tmp_path):
    narrow = write_images(tmp_path / "narrow", 8, mode="L")
    wide = in_sixteen_bits(narrow, tmp_path / "wide")
    calc(files, images=narrow, ref=wide).ok()
    assert values() == [pytest.approx(0, abs=1e-9)]
    prdc(files, images=narrow, images_ref=files / "real", out="p.jsonl").ok()
    prdc(files, images=wide, images_ref=files / "real", out="p.jsonl").ok()
    first, second = values("p.jsonl")
    assert first == second
    plans = [
        json.loads(invoke("training.pretrain", f"--data={data}", "--outdir=x", "--mult=1", "-n").ok().output)
        for data in (narrow, wide)
    ]
    assert plans[0]["network"]["img_channels"] == plans[1]["network"]["img_channels"] == 1
    assert np.array_equal(ImageDataset(narrow).load_all(), ImageDataset(wide).load_all())


def test_what_happens_to_pixels_is_said_once(files, tmp_path):
    data = write_images(tmp_path / "x", 6)
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(data / "7.png")
    for output in (
        calc(files, images=data, batch=1).ok().output,
        prdc(files, images=data).ok().output,
        run("fid", "ref", files, data=data, dest="x.npz").ok().output,
        invoke("training.pretrain", f"--data={data}", "--outdir=x", "--mult=1", "-n").ok().output,
    ):
        assert output.count("composed on white (7.png is the first)") == 1


def test_a_picture_among_the_samples_is_named_before_the_first_feature(files, monkeypatch):
    shutil.copytree(files / "fake", "samples")
    Image.new("RGB", (100, 50)).save("samples/metrics.png")
    monkeypatch.setattr("training.evaluation.commands.load_detector", lambda *a: pytest.fail("a detector was loaded"))
    for command in (calc, prdc):
        command(files, images="samples").refused("metrics.png in samples is 50×100")
    run("fid", "ref", files, data="samples", dest="x.npz").refused("metrics.png in samples is 50×100")


# --- Statistics ------------------------------------------------------------------------------------------------------


def covariance(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal([40, DIM])
    return x.mean(0), np.cov(x.T)


BAD_STATISTICS = {
    "negative definite": (lambda m, s: (m, -s), "not positive semi-definite"),
    "indefinite": (lambda m, s: (m, s - 0.9 * np.eye(DIM)), "not positive semi-definite"),
    "not symmetric": (lambda m, s: (m, s + np.triu(np.full([DIM, DIM], 0.1), 1)), "sigma is not symmetric"),
    "complex": (lambda m, s: (m, s + 0j), "sigma is complex128, not real"),
    "dates": (lambda m, s: (m.astype("datetime64[s]"), s), "mu is datetime64.s., not real"),
    "strings": (lambda m, s: (m.astype(str), s), "mu is <U.*, not real"),
    "truth values": (lambda m, s: (m, s > 0), "sigma is bool, not real"),
    "nan": (lambda m, s: (m * np.nan, s), "mu holds a number that is not finite"),
    "infinite": (lambda m, s: (m, s + np.inf), "sigma holds a number that is not finite"),
    "other shapes": (lambda m, s: (m[:-1], s), r"shapes are \[5\] and \[6, 6\]"),
    "a scalar": (lambda m, s: (m[0], s), r"shapes are \[\] and"),
    "empty": (lambda m, s: (m[:0], s[:0, :0]), r"shapes are \[0\]"),
    "a huge mean": (lambda m, s: (m + 1e200, s), "mu holds numbers that are too large for a distance"),
    "a huge covariance": (lambda m, s: (m, s * 1e307), "sigma holds numbers that are too large for a distance"),
    "decimals": (lambda m, s: (m.astype("V8"), s), "mu is .V8, not real"),
}


@pytest.mark.parametrize("kind", BAD_STATISTICS)
def test_statistics_that_are_no_mean_and_covariance_are_refused(kind, files):
    bend, words = BAD_STATISTICS[kind]
    mu, sigma = bend(*covariance())
    np.savez("x.npz", mu=mu, sigma=sigma)
    calc(files, ref="x.npz").refused(rf"x\.npz holds no mean and covariance: .*{words}")
    for pair in ((mu, sigma, *covariance()), (*covariance(), mu, sigma)):
        with pytest.raises(ValueError, match=words):
            calculate_fid(*pair)


def test_rounded_and_singular_statistics_are_taken():
    mu, sigma = covariance()
    np.savez("x.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    assert calculate_fid(*covariance(), *read_arrays("x.npz").values()) < 1e-6
    few = np.random.default_rng(0).standard_normal([3, 300])
    singular = np.cov(few.T).astype(np.float32)
    assert calculate_fid(few.mean(0), singular, few.mean(0), singular) < 1e-3


@pytest.mark.parametrize("make, words", [
    (lambda: np.save("x.npy", np.eye(3)), r"x\.npy is a single array; expected an \.npz of mu and sigma"),
    (lambda: np.savez("x.npz", mean=np.zeros(6), cov=np.eye(6)), r"holds mean float64 \[6\], cov float64 \[6, 6\]; .*mu and sigma"),
    (lambda: np.savez("x.npz", m=np.zeros(6), s=np.eye(6)), "statistics mu and sigma"),
    (lambda: np.savez("x.npz", mu=np.zeros(6)), "need mu and sigma"),
    (lambda: np.savez("x.npz"), "x.npz holds nothing"),
])  # fmt: skip
def test_statistics_in_other_forms_are_told_what_is_expected(make, words, files):
    make()
    (path,) = Path().glob("x.*")
    calc(files, ref=path).refused(words)


def test_reference_batches_of_guided_diffusion(files):
    """Statistics where statistics are asked for, images where images are."""
    images = ImageDataset(files / "real").load_all()
    x = Patches()(torch.from_numpy(images)).double().numpy()
    arrays = dict(mu=x.mean(0), sigma=np.cov(x.T), mu_s=np.zeros(9), sigma_s=np.eye(9))
    np.savez("adm.npz", arr_0=images.transpose(0, 2, 3, 1), **arrays)
    for reference in ("adm.npz", files / "real"):
        calc(files, ref=reference).ok()
        calc(files, ref=reference, metrics="kid", out="kid.jsonl").ok()
        calc(files, ref=files / "fake", images=reference, out="images.jsonl").ok()
        prdc(files, images_ref=reference, out="prdc.jsonl").ok()
    for name in ("metrics.jsonl", "kid.jsonl", "images.jsonl", "prdc.jsonl"):
        first, second = values(name)
        assert first == pytest.approx(second, rel=1e-6), name
    # What is asked for can be told: these statistics are others.
    np.savez("other.npz", arr_0=images.transpose(0, 2, 3, 1), **{**arrays, "mu": x.mean(0) + 3})
    calc(files, ref="other.npz").ok()
    assert values()[-1] == pytest.approx(values()[0] + ((x.mean(0) + 3 - fake_mean(files)) ** 2).sum()
                                         - ((x.mean(0) - fake_mean(files)) ** 2).sum(), rel=1e-4)  # fmt: skip
    assert isinstance(open_source("adm.npz"), ImageDataset)
    assert isinstance(open_source("adm.npz", statistics=True), StoredStatistics)


def fake_mean(files: Path) -> np.ndarray:
    return Patches()(torch.from_numpy(ImageDataset(files / "fake").load_all())).double().numpy().mean(0)


# --- Features --------------------------------------------------------------------------------------------------------


CHANGES = {
    "permuted": lambda rows: rows[::-1],
    "extra": lambda rows: np.concatenate([rows, rows[:1]]),
    "fewer": lambda rows: rows[:-1],
    "changed": lambda rows: rows + np.float32(1),
    "one number": lambda rows: np.where(np.arange(rows.size).reshape(rows.shape) == 7, np.float32(0), rows),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", ["features", "images", "ref"])
def test_feature_files_with_other_rows_are_refused(change, use, files):
    calc(files, features="kept.npz").ok()
    arrays = read_arrays("kept.npz")
    np.savez("kept.npz", meta=arrays["meta"], features=CHANGES[change](arrays["features"]))
    calc(files, **{use: "kept.npz"}).refused("kept.npz does not hold the features that were written there")
    assert len(values()) == 1


def test_a_cache_without_a_checksum_is_refused(files):
    calc(files, features="kept.npz").ok()
    arrays = read_arrays("kept.npz")
    meta = {k: v for k, v in json.loads(str(arrays["meta"])).items() if k != CHECKSUM}
    write_arrays("kept.npz", meta, features=arrays["features"])
    calc(files, features="kept.npz").refused("does not hold the features")
    np.savez("foreign.npz", features=arrays["features"])  # of another program: nothing is known of it
    calc(files, images="foreign.npz").ok()
    calc(files, features="foreign.npz").refused("holds features of other")
    np.savez("empty.npz", meta=arrays["meta"])
    calc(files, features="empty.npz").refused(r"empty\.npz holds no features")
    fewer = arrays["features"][:3]
    write_arrays("fewer.npz", {**meta, CHECKSUM: rows_checksum(fewer)}, features=fewer)
    calc(files, features="fewer.npz").refused(r"--features: fewer\.npz holds 3 features of 30 images")
    first, second = values()
    assert first == pytest.approx(second, rel=1e-9)


@pytest.mark.parametrize("rows", [
    np.zeros([0, DIM], np.float32), np.zeros([1, DIM], np.float32), np.zeros([5], np.float32),
    np.zeros([5, DIM]), np.full([5, DIM], np.nan, np.float32), np.zeros([5, 0], np.float32),
])  # fmt: skip
def test_features_that_are_none_are_one_line(rows, files):
    np.savez("x.npz", features=rows)
    for changes in (dict(images="x.npz"), dict(ref="x.npz"), dict(features="x.npz")):
        calc(files, **changes).refused("x.npz holds features")
    prdc(files, images="x.npz").refused("x.npz holds features")


def test_a_description_of_brackets_is_one_line(files):
    rows = np.ones([5, DIM], np.float32)
    np.savez("x.npz", features=rows, meta=np.array("[" * 100_000))
    calc(files, images="x.npz").refused("x.npz does not hold the features that were written there")
    np.savez("x.npz", mu=np.zeros(DIM), sigma=np.eye(DIM), meta=np.array("[" * 100_000))
    calc(files, ref="x.npz").ok()


def test_checksums_are_of_shape_and_values():
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert rows_checksum(rows) == rows_checksum(np.asfortranarray(rows))
    assert len({rows_checksum(r) for r in (rows, rows.reshape(4, 3), rows[:2], rows + 1, -rows)}) == 5
    write_arrays("x.npz", {CHECKSUM: rows_checksum(rows)}, features=rows)
    assert len(StoredFeatures.read(Path("x.npz"))) == 3


# --- Opened once -----------------------------------------------------------------------------------------------------


def test_a_set_is_opened_once(files, monkeypatch):
    """Folder, archive and features alike, with a cache, two metrics and two trials."""
    opened = []
    for cls in (ImageDataset, StoredFeatures):
        name = "__init__" if cls is ImageDataset else "read"
        original = getattr(cls, name)
        if cls is ImageDataset:
            monkeypatch.setattr(cls, name, lambda self, path, f=original: opened.append(Path(path)) or f(self, path))
        else:
            monkeypatch.setattr(cls, name, lambda path, f=original: opened.append(path) or f(path))
    calc(files, metrics="fid,kid", num=15, seed="0,1", features="kept.npz").ok()
    assert opened == [files / "fake", files / "real"]
    opened.clear()
    calc(files, images="kept.npz", metrics="fid,kid").ok()
    assert opened == [Path("kept.npz"), files / "real"]


# --- From Python -----------------------------------------------------------------------------------------------------


def test_functions_give_what_the_commands_give(files, tmp_path):
    """For folders, archives, arrays, tensors, features and statistics alike."""
    calc(files, metrics="fid,kid").ok()
    prdc(files, num=20).ok()
    fid_value, kid_value, prdc_value = values()
    images = {name: ImageDataset(files / name).load_all().transpose(0, 2, 3, 1) for name in ("fake", "real")}
    shutil.make_archive("fake", "zip", files / "fake")
    run("fid", "ref", files, data=files / "real", dest="real.npz", features="kept.npz").ok()
    detector = load_detector(str(files / "patches.pt"), "cpu", runs_code=True)
    for fake in (files / "fake", str(files / "fake"), "fake.zip", images["fake"], torch.from_numpy(images["fake"])):
        for real in (files / "real", images["real"], "real.npz", "kept.npz"):
            assert compute_fid(fake, real, detector) == pytest.approx(fid_value, rel=1e-9)
            if not isinstance(real, str) or real != "real.npz":
                assert compute_kid(fake, real, detector, batch=7) == pytest.approx(kid_value, rel=1e-9)
    found = compute_prdc(images["real"], images["fake"][:20], detector=detector)
    assert found == compute_prdc(files / "real", torch.from_numpy(images["fake"][:20]), detector=detector)
    assert set(found) == set(prdc_value)


@pytest.mark.parametrize("images, words", [
    (np.zeros([5, 8, 8, 3]), r"images are float64 \[5, 8, 8, 3\]; expected uint8"),
    (np.zeros([5, 3, 8, 8], np.uint8), r"images are uint8 \[5, 3, 8, 8\]"),
    (np.zeros([0, 8, 8, 3], np.uint8), r"images are uint8 \[0, 8"),
    ("nothere", "nothere does not exist"),
])  # fmt: skip
def test_errors_of_functions_are_exceptions_of_one_line(images, words, files, monkeypatch):
    monkeypatch.setattr("training.evaluation.functions.load_detector", lambda *a: pytest.fail("a detector was loaded"))
    for compute in (compute_fid, compute_kid):
        with pytest.raises(UserError, match=words):
            compute(images, files / "real")
        with pytest.raises(UserError, match=words):
            compute(files / "real", images)
    with pytest.raises(UserError, match=words):
        compute_prdc(images, files / "real")


def test_the_inception_score_needs_no_features_of_the_reference(files, tmp_path, monkeypatch):
    """With made-up class weights for six features; images and trials as for the other metrics."""
    weights = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0))
    calc(files, metrics="is").refused("needs class logits, and patches.pt has none")
    monkeypatch.setattr("models.detectors.Detector.class_weights", weights)
    statistics = dict(zip(("mu", "sigma"), covariance()))
    np.savez("x.npz", **statistics)
    output = calc(files, metrics="is,fid", ref="x.npz").ok().output
    calc(files, metrics="is", trials=2, out="trials.jsonl").ok()
    found, _ = read_records("metrics.jsonl")
    x = Patches()(torch.from_numpy(ImageDataset(files / "fake").load_all())).numpy()
    assert (found["value"], found["split_std"][0]) == pytest.approx(inception_score(x, weights), rel=1e-6)
    assert found["metric"] == "IS(patches.pt)" and f"IS(patches.pt) {found['value']:g} ± " in output
    (trials,) = read_records("trials.jsonl")
    assert trials["value"] == max(trials["trials"]) and trials["reference_N"] == 20


# --- Order and messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, changes, words", [
    ("fid", dict(images="nothere"), "nothere does not exist"),
    ("fid", dict(ref="nothere.npz"), "nothere.npz does not exist"),
    ("fid", dict(ref="nothere"), "nothere does not exist"),
    ("fid", dict(ref="cifar10", detector="nothere.pth"), "nothere.pth does not exist"),
    ("fid", dict(num=31), "fewer than 31"),
    ("prdc", dict(images="nothere.zip"), "nothere.zip does not exist"),
    ("prdc", dict(images_ref="nothere"), "nothere does not exist"),
    ("gen", dict(ref="nothere.npz"), "nothere.npz does not exist"),
    ("gen", dict(model_path="nothere.safetensors"), "nothere.safetensors"),
    ("compare", dict(ref="nothere.npz"), "nothere.npz does not exist"),
    ("fid", dict(out="."), "--out: . is no file"),
    ("fid", dict(out="/dev/null/x/y.jsonl"), "--out: .*cannot be written"),
    ("fid", dict(features="/dev/null/x.npz"), "--features: .*cannot be written"),
    ("prdc", dict(out="."), "--out: . is no file"),
    ("fid", dict(images="pipe.npz"), "pipe.npz is no regular file"),
    ("fid", dict(ref="pipe.zip"), "pipe.zip is no regular file"),
    ("fid", dict(out="pipe.zip"), "--out: pipe.zip is no file"),
    ("fid", dict(features="pipe.npz"), "--features: pipe.npz is no file"),
    ("fid", dict(ref="statistics.npz", metrics="kid"), "holds mu and sigma only"),
    ("prdc", dict(images_ref="statistics.npz"), "holds mu and sigma only"),
])  # fmt: skip
def test_missing_paths_are_found_before_anything_is_fetched(command, changes, words, files, monkeypatch):
    monkeypatch.setattr("dnnlib.download.fetch", lambda *a, **k: pytest.fail("something was fetched"))
    np.savez("statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name in ("pipe.npz", "pipe.zip"):  # opening one waits for its writer
        os.mkfifo(name)
    common = dict(device="cpu", workers=0)
    if command in ("gen", "compare"):
        defaults = dict(model_path=student(), ref=files / "real", precision="fp32")
    else:
        defaults = {"images": files / "fake", "ref" if command == "fid" else "images_ref": files / "real"}
    script, name = ("fid", command) if command in ("gen", "compare") else (command, "calc")
    invoke(script, name, *flags(common, defaults, changes)).refused(words)


def test_prdc_takes_what_is_there_and_says_so(files):
    output = prdc(files).ok().output
    assert "has 30 images: all are used" in output
    (record,) = read_records("metrics.jsonl")
    assert (record["N"], record["reference_N"]) == (30, 20)
    assert "all are used" not in prdc(files, num=20).ok().output


def test_wrong_turns_are_shown_the_way(files):
    for name in ("prdc", "fid,prdc", "precision", "coverage"):
        calc(files, metrics=name).refused(r"computed by prdc\.py calc")
    result = invoke("fid", f"--images={files / 'fake'}").refused(
        "--images is an option of a command: .*calc.* --images="
    )
    assert result.code == 2
    invoke("prdc", "--images_ref=x").refused("--images_ref is an option of a command: .*calc")
    invoke("fid", "--nonsense").refused("No such option")


@pytest.mark.parametrize("option", ["seed=" + "9" * 5000, "batch=" + "9" * 23, "workers=" + "9" * 9, "trials=" + "9" * 5000,
                                    "num=" + "9" * 5000])  # fmt: skip
def test_numbers_beyond_every_use_are_one_line(option, files):
    name, value = option.split("=")
    calc(files, **{name: value}).refused(name)


@pytest.mark.parametrize("script", ["fid", "prdc"])
def test_a_dry_run_says_what_the_run_does(script, files):
    command = calc if script == "fid" else prdc
    assert json.loads(command(files, "-n").ok().output)["found"] == 30
    Image.new("RGB", (9, 9)).save(files / "fake" / "odd.png")
    try:
        for more in ((), ("-n",)):
            command(files, *more).refused("odd.png in .* is 9×9")
    finally:
        (files / "fake" / "odd.png").unlink()
    assert json.loads(command(files, "-n", images="later").ok().output)["missing"] == ["later"]


# --- Records ---------------------------------------------------------------------------------------------------------


def test_records_survive_a_line_that_was_cut_off():
    append_records("x.jsonl", [{"value": 1}])
    with open("x.jsonl", "a") as file:
        file.write('{"value": 2, "na')
    assert [r["value"] for r in read_records("x.jsonl")] == [1]
    append_records("y.jsonl", [{"value": 3}])
    for line in ("7", "[]", "x", "[" * 100_000, '"' + "\ud800".encode("utf-8", "surrogatepass").decode("latin1")):
        Path("z.jsonl").write_text(line + "\n{}\n")
        with pytest.raises(UserError, match=r"z\.jsonl: line 1 is not a JSON object"):
            read_records("z.jsonl")


def test_a_full_device_for_the_records_is_one_line(files):
    calc(files, out="/dev/full").refused("/dev/full: No space left on device")
    calc(files, out="deep/x.jsonl").ok()
    assert len(values("deep/x.jsonl")) == 1


def test_an_archive_of_images_with_a_lying_directory_is_one_line(files):
    with zipfile.ZipFile("x.zip", "w") as archive:
        for path in sorted((files / "fake").iterdir()):
            archive.write(path, path.name)
    content = Path("x.zip").read_bytes()
    Path("x.zip").write_bytes(content[: len(content) // 2] + content[len(content) // 2 + 7 :])
    calc(files, images="x.zip").refused(r"x\.zip")
