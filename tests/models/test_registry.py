"""The table of data sets: where files are expected, how they are fetched ahead, and what the networks are."""

import csv
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from golden_files import GOLDEN

from dnnlib import UserError, download, sha256_of
from models import prefetch
from models.building import build_on_meta
from models.published.torch_checkpoint import read_checkpoint
from models.registry import CAPTIONS_URL, ROWS, DatasetSpec, fetch_captions, fetch_weights, get_row
from models.registry.__main__ import measure, table

FETCHED = [row for row in ROWS.values() if row.loader != "embedded"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "src"))
    monkeypatch.setenv("SFD_OFFLINE", "1")
    monkeypatch.delenv("SFD_CLIP_TOKENIZER", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "src"


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_the_data_sets_of_the_program():
    paper = [
        "emoji32",
        "cifar10",
        "ffhq",
        "afhqv2",
        "imagenet64",
        "lsun_bedroom",
        "lsun_bedroom_ldm",
        "ffhq_ldm",
        "ms_coco",
    ]
    more = ["emoji32-cond", "lsun_cat", "imagenet64_cm", "imagenet256_adm", "imagenet256_adm_uncond"]
    assert [name for name in ROWS if name in paper] == paper and set(more) < set(ROWS)
    assert all(name == row.name for name, row in ROWS.items())
    with pytest.raises(
        UserError,
        match=r"unknown dataset_name 'imagenet' \(did you mean imagenet64\?\); expected one of emoji32, emoji32-cond, cifar10",
    ):
        get_row("imagenet")


@pytest.mark.parametrize("row", FETCHED, ids=lambda row: row.name)
def test_published_files(row, cache):
    """Mirrors are of one file; it goes to the folder of its data set under its published name."""
    assert isinstance(row.sources, tuple) and all(url.startswith("https://") for url in row.sources)
    assert {url.rsplit("/", 1)[1] for url in row.sources} == {row.path.name} and row.path.parent == cache / (
        row.folder or row.name
    )
    assert (row.member is not None) == (row.path.suffix == ".zip") and row.licence != "unknown"
    latent = (row.latent_channels, row.latent_resolution, row.codec)
    assert all(latent) or latent == (None, None, None)


def test_stable_diffusion_comes_from_its_present_owner_first():
    row = ROWS["ms_coco"]
    assert "/stable-diffusion-v1-5/stable-diffusion-v1-5/" in row.sources[0] and "/runwayml/" in row.sources[1]
    assert (row.sigma_min, row.sigma_max, row.guidance_rate, row.text, len(row.sha256)) == (0.1, None, 7.5, True, 64)


@pytest.mark.parametrize("row", FETCHED, ids=lambda row: row.name)
def test_offline_names_the_place_and_the_address(row, cache):
    with pytest.raises(UserError) as error:
        fetch_weights(row)
    assert str(row.path) in error.value.message and row.sources[0] in error.value.message
    assert not cache.exists()


def test_embedded_weights_are_part_of_the_program():
    for name in ("emoji32", "emoji32-cond"):
        path = fetch_weights(ROWS[name])
        assert path.is_file() and path.parent == ROOT / "assets" and path.stat().st_size < 8.2e6


def test_weights_put_there_by_hand_are_taken_and_remembered(cache):
    row = ROWS["cifar10"]
    row.path.parent.mkdir(parents=True)
    row.path.write_bytes(b"weights")
    assert fetch_weights(row) == row.path
    assert json.loads((cache / "checksums.json").read_text())["cifar10/edm-cifar10-32x32-uncond-vp.pkl"]["size"] == 7
    row.path.write_bytes(b"others!!")
    with pytest.raises(UserError, match="not the expected file"):
        fetch_weights(row)


def test_wrong_stable_diffusion_is_refused_by_its_published_checksum():
    row = ROWS["ms_coco"]
    row.path.parent.mkdir(parents=True)
    row.path.write_bytes(b"weights")
    with pytest.raises(UserError, match="not the expected file.*the published one cc6cb27103417325"):
        fetch_weights(row)


def write_archive(row):
    row.path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"a": torch.ones(3)}}, row.path.with_name("made.ckpt"))
    with zipfile.ZipFile(row.path, "w") as archive:
        archive.write(row.path.with_name("made.ckpt"), "model.ckpt")
    row.path.with_name("made.ckpt").unlink()


def test_an_archive_is_unpacked_once(cache, monkeypatch):
    row = ROWS["ffhq_ldm"]
    write_archive(row)
    path = fetch_weights(row)
    assert path == row.weights_path == cache / "ffhq_ldm" / "model.ckpt"
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(3))
    assert set(json.loads((cache / "checksums.json").read_text())) == {"ffhq_ldm/ffhq.zip", "ffhq_ldm/model.ckpt"}
    # From then on the archive is not needed, and nothing of gigabytes is read.
    row.path.unlink()
    monkeypatch.setattr(download, "sha256_of", None)
    assert fetch_weights(row) == path


def test_a_changed_unpacked_file_is_refused():
    row = ROWS["lsun_bedroom_ldm"]
    write_archive(row)
    fetch_weights(row).write_bytes(b"other")
    with pytest.raises(UserError, match="model.ckpt is not the expected file"):
        fetch_weights(row)


def test_captions_are_read_by_their_column(cache):
    path = cache / "ms_coco" / CAPTIONS_URL.rsplit("/", 1)[1]
    with pytest.raises(UserError, match="offline"):
        fetch_captions()
    path.parent.mkdir(parents=True)
    path.write_text("image_id,text\n1,A dog\n")
    with open(fetch_captions(), newline="") as file:
        assert [line["text"] for line in csv.DictReader(file)] == ["A dog"]


# --- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, published", [
    ("cifar10", "edm-cifar10-32x32-uncond-vp"), ("ffhq", "edm-ffhq-64x64-uncond-vp"),
    ("afhqv2", "edm-ffhq-64x64-uncond-vp"), ("imagenet64", "edm-imagenet-64x64-cond-adm"),
])  # fmt: skip
def test_configured_networks_have_the_published_names_and_shapes(name, published):
    pytest.importorskip("omegaconf")
    net = build_on_meta(ROWS[name])
    expected = json.loads((GOLDEN / f"{published}.json").read_text())["tensors"]
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected
    row = ROWS[name]
    assert (net.img_resolution, net.img_channels, net.label_dim) == (row.resolution, row.channels, row.label_dim)
    assert net.use_fp16 == (name == "imagenet64")


def test_operations_are_those_of_the_published_network():
    """CIFAR-10's network is known for 21.2 G multiply-adds."""
    pytest.importorskip("omegaconf")
    found = measure(ROWS["cifar10"])
    assert found["parameters"] == 55_733_891 and found["gflops"] == pytest.approx(2 * 21.2, abs=0.1)


@pytest.mark.slow
def test_table(cache):
    pytest.importorskip("omegaconf")
    ROWS["ffhq"].path.parent.mkdir(parents=True)
    ROWS["ffhq"].path.touch()
    ROWS["ffhq_ldm"].weights_path.parent.mkdir(parents=True)
    ROWS["ffhq_ldm"].weights_path.touch()
    command = [sys.executable, "-W", "error", "-m", "models.registry", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(ROWS)
    assert {name for name, row in rows.items() if row["present"]} == {"emoji32", "emoji32-cond", "ffhq", "ffhq_ldm"}
    # Karras et al. 2022 and Rombach et al. 2022: millions of parameters.
    millions = {"cifar10": 55.7, "ffhq": 61.8, "imagenet64": 295.9, "ffhq_ldm": 274.1, "ms_coco": 859.5}
    assert {name: round(rows[name]["parameters"] / 1e6, 1) for name in millions} == millions
    assert abs(rows["cifar10"]["gflops"] - 42.4) < 0.1 and all(row["gflops"] > 0.5 for row in rows.values())
    assert rows["ms_coco"]["guidance_rate"] == 7.5 and rows["ms_coco"]["sigma_max"] == pytest.approx(14.61, abs=0.01)
    lines = table(list(rows.values())).splitlines()
    assert max(map(len, lines[: 2 * len(ROWS) + 1])) < 260 + len(str(cache))
    for name, row in ROWS.items():
        i = next(i for i, line in enumerate(lines) if line.startswith(f"{name} "))
        assert row.licence in lines[i] and str(row.path.name) in lines[i + 1]
        assert ("present" if rows[name]["present"] else "missing") in lines[i + 1]


# --- Fetching ahead --------------------------------------------------------------------------------------------------


def run_prefetch(*names):
    result = CliRunner().invoke(prefetch.main, names, standalone_mode=False)
    return result.output.splitlines(), result.exception


def test_prefetch_says_what_is_missing_and_where(cache):
    lines, error = run_prefetch("emoji32", "cifar10", "ms_coco", "--offline")
    assert [line.split(":")[0] for line in lines] == ["emoji32", "cifar10", "ms_coco", "tokenizer", "captions"]
    assert lines[0].startswith("emoji32: there: ") and str(ROWS["emoji32"].path) in lines[0]
    assert str(ROWS["cifar10"].path) in lines[1] and ROWS["cifar10"].sources[0] in lines[1]
    assert error.message == "not everything is there; missing: cifar10, ms_coco, tokenizer, captions"
    assert not cache.exists()


def test_prefetch_all_is_everything_once():
    lines, error = run_prefetch("all", "cifar10")
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        [name for name, row in ROWS.items() if row.loader != "edm2"] + [*prefetch.OTHERS]
    )


def test_prefetch_of_an_unknown_name():
    lines, error = run_prefetch("cifar10", "imagenet")
    assert not lines and error.message.startswith(
        "unknown name 'imagenet'; expected all, emoji32, emoji32-cond, cifar10"
    )


def test_prefetch_fetches_verifies_and_unpacks(cache, monkeypatch):
    """Whatever the server sends under the published address ends in its place, once."""
    row, asked = ROWS["ffhq_ldm"], []
    write_archive(row)
    body, sha256 = row.path.read_bytes(), sha256_of(row.path)
    row.path.unlink()

    def send(urls, dest, expected, size):
        asked.append(urls)
        dest.write_bytes(body)
        download.write_record(dest, sha256)

    monkeypatch.setenv("SFD_OFFLINE", "0")
    monkeypatch.setattr(download, "_download", send)
    lines, error = run_prefetch("ffhq_ldm", "captions")
    assert error is None and asked == [list(row.sources), [CAPTIONS_URL]]
    assert lines[0].startswith(f"ffhq_ldm: fetched: {row.weights_path} (") and lines[1].startswith(
        "captions: fetched: "
    )
    lines, error = run_prefetch("ffhq_ldm", "captions")
    assert error is None and len(asked) == 2 and all(": there: " in line for line in lines)


def test_a_row_is_a_value():
    row = DatasetSpec("mine", "file", ("a.pkl",), 32)
    assert row == DatasetSpec("mine", "file", ("a.pkl",), 32) and hash(row)
    with pytest.raises(AttributeError):
        row.name = "other"
