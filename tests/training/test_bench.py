"""The benchmark runs every stage, and says what is so."""

import json

import pytest
import torch
from click.testing import CliRunner
from diffusers_folders import write_unet
from published import known_as_published
from test_cost import tiny_on_meta

from training import bench


def run_bench(tmp_path, *args: str) -> dict:
    path = tmp_path / "bench.json"
    done = CliRunner().invoke(
        bench.main, ["--quick", "--batch=4", "--device=cpu", f"--json={path}", *args], catch_exceptions=False
    )
    assert done.exit_code == 0
    results = json.loads(path.read_text())
    for row in results["timings"]:
        assert row["stage"] in done.output and row["seconds"] > 0
    return results


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_benchmark_of_a_small_network(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(bench, "build_on_meta", lambda row: tiny_on_meta())
    if not whole:  # random weights for the detector take seconds
        monkeypatch.setattr(bench, "InceptionV3", torch.nn.Identity)
    results = run_bench(tmp_path, "--precision=fp32", f"--channels_last={not whole}")
    assert results["about"]["channels_last"] == (not whole)
    rows = {row["stage"]: row for row in results["timings"]}
    flops = results["flops_per_evaluation"] * 4
    assert rows["training iteration"]["flops"] == 18 * flops and rows["sampling, NFE 5"]["flops"] == 5 * flops
    for name in ("training iteration", "teacher trajectory", "student step", "sampling, NFE 2"):
        row = rows[name]
        assert row["per_second"] == pytest.approx(row["items"] / row["seconds"])
        assert row["share_of_peak"] == pytest.approx(row["flops"] / row["seconds"] / results["matrix_peaks"]["fp32"])
    assert all(row["runs"] == 1 for row in rows.values())
    assert any("PRDC" in name for name in rows) and any("Fréchet" in name for name in rows)


def test_slow_stages_run_less_often(monkeypatch):
    assert list(bench.rounds(3)) == [0, 1, 2]
    monkeypatch.setattr(bench, "STAGE_SECONDS", 0.0)
    assert list(bench.rounds(3)) == [0]


def test_benchmark_of_a_folder_of_diffusers(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "InceptionV3", torch.nn.Identity)
    folder = write_unet(tmp_path / "ddpm")
    results = run_bench(tmp_path, f"--model_path={folder}", "--precision=fp32", "--channels_last=False")
    assert results["about"]["dataset_name"] == "ddpm"
    rows = {row["stage"]: row for row in results["timings"]}
    assert rows["training iteration"]["flops"] == 18 * 4 * results["flops_per_evaluation"] > 0


@pytest.mark.slow
def test_benchmark_of_a_latent_model(tmp_path):
    with known_as_published("ms_coco", tmp_path):
        rows = {row["stage"]: row for row in run_bench(tmp_path, "--dataset_name=ms_coco")["timings"]}
    assert rows["decoding"]["per_second"] > 0 and rows["training iteration"]["tflops"] > 0
