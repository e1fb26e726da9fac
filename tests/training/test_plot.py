"""Plots of runs: what is read, what is projected, that files are written, and what is refused."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flags, invoke, known_as_tiny, student

import sample
from dnnlib import UserError
from models import load_student
from models.sampling import draw_latents, student_sampler
from sample import draw_sheet
from solvers import solve
from training import plot
from training.evaluation import figures as figures_module
from training.plot import Trajectories, read_distances, read_losses, trace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib", reason="pip install matplotlib")


@pytest.fixture
def figures(monkeypatch) -> list[Any]:
    """The figures that a command draws."""
    drawn: list[Any] = []
    save = figures_module.save_figure
    for module in (plot, figures_module):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: (drawn.append(figure), save(figure, path)))
    return drawn


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 100


def write_run(name: str, lines: list[dict[str, Any]]) -> Path:
    run_dir = Path(name)
    run_dir.mkdir()
    (run_dir / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_losses_of_several_runs_share_panels(figures):
    first = write_run(
        "a", [{"kimg": k, "loss": 0, "loss/4/1": 9 - k, "loss/4/2": None if k == 2 else k} for k in (1, 2, 3)]
    )
    second = write_run("b", [{"kimg": 1, "loss/5/1": 4.0, "loss/4/1": 2.0}])
    assert read_losses(first) == {(4, 1): ([1, 2, 3], [8, 7, 6]), (4, 2): ([1, 3], [1, 3])}
    invoke("training.plot", first, second).ok()
    assert is_picture(first / "losses.png") and not (second / "losses.png").exists()
    panels = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figures[0].axes}
    assert panels["num_steps 4, step 1"] == ["a", "b"] and panels["num_steps 4, step 2"] == ["a"]
    assert panels["num_steps 5, step 1"] == ["b"] and panels["num_steps 5, step 2"] == []


@pytest.mark.parametrize("kind", ["plain", "variable"])
def test_losses_of_a_real_run(kind):
    run_dir = student(kind)
    invoke("training.plot", run_dir, *flags(dict(dest="losses.png"))).ok()
    assert is_picture(Path("losses.png"))
    assert all(len(kimg) == len(losses) > 0 for kimg, losses in read_losses(run_dir).values())


def test_a_number_means_a_run_under_exps():
    shutil.copytree(student(), Path("exps") / "00007-mine")
    invoke("training.plot", 7).ok()
    assert is_picture(Path("exps/00007-mine/losses.png"))
    invoke("training.plot", 8).refused("run 8 does not exist")


def test_a_line_that_was_cut_off_is_left_out():
    run_dir = write_run("a", [{"kimg": 1, "loss/4/1": 2.0}])
    with open(run_dir / "stats.jsonl", "a") as file:
        file.write('{"kimg": 2, "loss/4')
    assert read_losses(run_dir) == {(4, 1): ([1], [2.0])}


@pytest.mark.parametrize(
    "content, message",
    [("", "holds no losses"), ("{}\n", "holds no losses"), ("7\n", "line 1 is not a JSON object"), ("x\n{}\n", "line 1 is not a JSON object"),
     ("[" * 9999 + "\n{}\n", "line 1 is not a JSON object"), (None, "does not exist")],
)  # fmt: skip
def test_other_files_are_refused(content, message):
    Path("a").mkdir()
    if content is not None:
        Path("a/stats.jsonl").write_text(content)
    invoke("training.plot", "a").refused(message)
    assert not Path("a/losses.png").exists()


def test_an_analytical_step_trains_nothing_and_is_not_drawn(figures):
    lines = [{"kimg": k, "loss/4/0": 9.0, "loss/4/1": 2.0, "loss/4/2": 1.0} for k in (1, 2)]
    for name, afs in (("a", True), ("b", False)):
        run_dir = write_run(name, lines)
        (run_dir / "training_options.json").write_text(json.dumps({"config": {"afs": afs}}))
        invoke("training.plot", run_dir, f"--dest={name}.pdf").ok()
        assert Path(f"{name}.pdf").read_bytes().startswith(b"%PDF")
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    assert titles[0] == ["num_steps 4, step 1", "num_steps 4, step 2"] and len(titles[1]) == 3
    invoke("training.plot", run_dir, "--dest=x.jpg").refused("--dest: x.jpg is no figure")


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    invoke("training.plot", student()).refused("pip install matplotlib")


# --- Trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, num_steps", [("plain", None), ("variable", 6), ("second", None)])
def test_trajectories_are_those_of_the_run(kind, num_steps):
    run_dir = student(kind)
    with known_as_tiny():
        found = trace(run_dir, num_steps, 2, CPU)
    model = load_student(run_dir)
    sampler = student_sampler(model, num_steps)
    x, _ = draw_latents(model, [0, 1])
    with torch.no_grad():
        expected = solve(sampler.plan.solver, model.denoise if sampler.step_condition is None else
                         lambda x, s: model.denoise(x, s, step_condition=sampler.step_condition), x, sampler.sigmas,
                         sampler.plan.afs)  # fmt: skip
    assert torch.equal(found.student, expected.flatten(2))
    assert torch.equal(found.teacher[0], x.flatten(1)) and torch.equal(found.deviation[0], torch.zeros(2))
    assert found.teacher[:: found.stride].shape == found.student.shape
    # A short training leaves the student near its teacher, compared with the way they go.
    assert 0 < found.deviation[-1].max() < 0.1 * (found.teacher[0] - found.teacher[-1]).abs().mean()


def test_the_plane_of_a_trajectory_that_is_plane_shows_all_of_it():
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 2, generator=rng)).Q.T
    flat = torch.tensor([[9.0, 0.0], [5.0, 2.0], [2.0, 1.5], [0.0, 0.0]])
    teacher = (flat @ basis + torch.randn(20, generator=rng))[:, None]
    student = teacher[::3] + torch.stack([torch.zeros(1, 20), 0.5 * basis[:1]])
    found = Trajectories(teacher, student, 3, torch.tensor([9.0, 1.0]))
    plane, own = found.plane(0)
    torch.testing.assert_close(torch.cdist(plane, plane), torch.cdist(flat, flat), atol=1e-4, rtol=1e-4)
    assert plane[0, 0] > 0 and plane[plane[:, 1].abs().argmax(), 1] > 0
    torch.testing.assert_close((own[1] - plane[3]).norm(), torch.tensor(0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.deviation[:, 0], torch.stack([torch.tensor(0.0), 0.5 * basis[0].abs().mean()]))


def test_the_plot_of_trajectories(figures):
    run_dir = student()
    result = invoke("training.plot", run_dir, "--trajectory", *flags(dict(num=2, dest="t.png", device="cpu"))).ok()
    assert is_picture(Path("t.png")) and "Mean |student − teacher|" in result.output
    assert [axes.get_title() for axes in figures[0].axes] == ["seed 0", "seed 1", "mean |student − teacher|"]
    invoke("training.plot", run_dir, run_dir, "--trajectory").refused("of one run")
    invoke("training.plot", run_dir, "--trajectory", "--num_steps=6").refused(
        "num_steps: the student was distilled for 4"
    )
    invoke("training.plot", write_run("a", []), "--trajectory").refused("holds no training_options.json")


# --- Distances -------------------------------------------------------------------------------------------------------

PRDC = dict(precision=0.5, recall=0.5, density=0.5, coverage=0.5)


def result(label: str, nfe: int, value: float, **more: Any) -> dict[str, Any]:
    return dict(metric="FID", value=value, label=label, nfe=nfe, prdc=PRDC, N=10, reference_sha256="r", **more)


def write_results(place: Path, records: list[dict[str, Any]]) -> Path:
    place.mkdir(exist_ok=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return place


def test_distances_against_nfe():
    both = [result("teacher, Heun", 35, 1.0), result("Euler", 2, 9.0)]
    first = write_results(
        Path("a"), [result("student", 3, 2.0), result("student", 2, 9.0), *both, result("student", 2, 3.0)]
    )
    second = write_results(Path("b"), [result("student", 2, 4.0), *both])
    found = [(r["label"], r["nfe"], r["value"]) for r in read_distances([first, second], "nfe")]
    assert found == [("student a", 2, 3.0), ("Euler", 2, 9.0), ("student b", 2, 4.0), ("student a", 3, 2.0),
                     ("teacher, Heun", 35, 1.0)]  # fmt: skip
    invoke("training.plot", first, second, "--fd=nfe").ok()
    assert is_picture(Path("a/fd-nfe.png"))


def test_distances_against_kimg(figures):
    records = [dict(metric="FID", value=9 - k, images=f"00000-run-network-snapshot-{k:06d}", N=10) for k in (4, 2)]
    records.append(dict(metric="FID", value=3.0, images="samples/other/network-snapshot-000003-nfe2", N=10))
    place = write_results(Path("a"), records)
    invoke("training.plot", place / "metrics.jsonl", "--fd=kimg").ok()
    assert is_picture(Path("a/fd-kimg.png"))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert lines == {"00000-run": [[2, 7], [4, 5]], "samples/other": [[3, 3]]}


def test_results_that_cannot_be_compared_are_refused():
    place = write_results(Path("a"), [result("student", 2, 2.0), {**result("student", 3, 2.0), "N": 11}])
    invoke("training.plot", place, "--fd=nfe").refused("cannot be compared")
    invoke("training.plot", place, "--fd=kimg").refused("no results by kimg")
    with pytest.raises(UserError, match="does not exist"):
        read_distances([write_run("b", [])], "nfe")


# --- Sheets of sample.py ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dpi", [96, 300])
@pytest.mark.parametrize("size, count", [(8, 1), (16, 3), (64, 2), (500, 1)])
def test_a_sheet_has_room_for_its_names_at_any_size(size, count, dpi):
    rows = [np.full([count, size, size, 3], shade, np.uint8) for shade in (90, 200)]
    names = ["teacher, DPM-Solver++, NFE 5", "b"]
    sheet = np.asarray(draw_sheet(rows, names, ["7", "4294967295", "8"][:count], dpi))
    tile = size * max(1, round(64 * dpi / 96 / size))
    left = sheet.shape[1] - count * tile
    top = sheet.shape[0] - 2 * tile
    assert (sheet[top : top + tile, left:] == 90).all() and (sheet[top + tile :, left:] == 200).all()

    def ink(part: np.ndarray) -> int:
        return int((part < 128).any(2).sum())

    assert ink(sheet[top : top + tile, :left]) > ink(sheet[top + tile :, :left]) > 0
    assert ink(sheet[:, left - 2 : left]) == 0  # no name runs into the images
    assert all(ink(sheet[:top, left + c * tile : left + (c + 1) * tile]) for c in range(count))


def test_a_grid_says_which_seeds_its_rows_are(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        sample, "draw_sheet", lambda rows, names, *_: drawn.update(names=names) or draw_sheet(rows, names, [], 96)
    )
    sampler = SimpleNamespace(images=lambda *_: np.zeros([5, 16, 16, 3], np.uint8))
    sample.write_grid(sampler, [3, 4, 5, 9, 12], None, 1, Path("x"), 96)
    assert drawn["names"] == ["seeds 3 to 5", "seeds 9 to 12"]
    assert is_picture_of(Path("x/grid.png"), minimum=32)


def test_labels_of_a_paper_are_drawn_at_its_resolution():
    """Three times the dots, in the same inches: letters that are not the small ones enlarged."""
    images = [np.full([2, 32, 32, 3], 255, np.uint8)]
    small, large = (draw_sheet(images, ["seeds 0 to 1"], ["seed 0", "seed 1"], dpi) for dpi in (96, 288))
    assert abs(large.width - 3 * small.width) <= 8 and large.height == 3 * small.height
    enlarged = small.resize(large.size, Image.Resampling.NEAREST)
    edges = [np.abs(np.diff(np.asarray(sheet.convert("L")).astype(int), axis=1)).sum() for sheet in (large, enlarged)]
    assert (np.asarray(large) < 128).sum() > 3 * (np.asarray(small) < 128).sum() and edges[0] != edges[1]


def test_a_picture_says_its_dots_per_inch(monkeypatch):
    sampler = SimpleNamespace(images=lambda *_: np.zeros([4, 16, 16, 3], np.uint8))
    for dpi in (96, 300):
        path = sample.write_grid(sampler, [0, 1, 2, 3], None, 1, Path("x"), dpi)
        with Image.open(path) as picture:
            assert picture.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1) and picture.height == 2 * 16 * round(
                dpi / 24
            )


def is_picture_of(path: Path, minimum: int) -> bool:
    with Image.open(path) as image:
        return min(image.size) >= minimum
