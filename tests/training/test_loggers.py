"""--log: what reaches TensorBoard and Weights & Biases, by stand-ins for both packages and, where installed, by themselves."""

from __future__ import annotations

import json
import signal
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from tiny import STATS, invoke, only_run, run_ranks, same, teacher, train_flags, weights

from dnnlib import UserError
from torch_utils import distributed
from training import loop
from training.distill import Distiller
from training.loggers import RunLogger, need_logger
from training.report import Report

ITERATE = "training.distill:Distiller.iterate"
CURVES = {"seconds", "loss", "loss/4/0", "loss/4/1", "loss/4/2", "sec_per_kimg", "sec_per_tick", "maintenance", "lr",
          "skipped", "cpumem"}  # fmt: skip


class Calls(list):
    """What a stand-in was asked for, in order."""

    def of(self, name):
        return [values for kind, values in self if kind == name]


class Writer:
    """As torch.utils.tensorboard.SummaryWriter; `fails` breaks it at its so-many-th scalar."""

    calls, fails = Calls(), 0

    def __init__(self, log_dir, purge_step):
        self.calls.append(("open", (log_dir, purge_step)))
        self.file_writer = SimpleNamespace(add_summary=lambda summary: self.calls.append(("settings", summary)))

    def add_scalar(self, tag, value, step):
        self.calls.append(("scalar", (tag, value, step)))
        if len(self.calls.of("scalar")) == self.fails:
            raise OSError(28, "No space left on device")

    def add_image(self, tag, pixels, step, dataformats):
        self.calls.append(("image", (tag, pixels.shape, step, dataformats)))

    def flush(self):
        self.calls.append(("flush", None))

    def close(self):
        self.calls.append(("close", None))


@pytest.fixture
def tensorboard(monkeypatch):
    monkeypatch.setattr(Writer, "calls", Calls())
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter, module.summary = Writer, SimpleNamespace(hparams=lambda *args: [args])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Writer


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    calls = Calls()

    def record(name):
        return lambda *args, **kwargs: calls.append((name, (args, kwargs)))

    def init(**kwargs):
        record("init")(**kwargs)
        return SimpleNamespace(define_metric=record("metric"), log=record("log"), finish=record("finish"))

    module = ModuleType("wandb")
    module.init, module.calls = init, calls
    module.Settings, module.Image = lambda **kwargs: kwargs, lambda picture: picture.size
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def stats_of(run_dir):
    return [json.loads(line) for line in (run_dir / STATS).read_text().splitlines()]


def interrupt(monkeypatch, at):
    """An error instead of iteration `at`."""
    original, count = Distiller.iterate, []

    def iterate(self, *args):
        count.append(1)
        if len(count) == at:
            raise OSError(5, "broken")
        return original(self, *args)

    monkeypatch.setattr(Distiller, "iterate", iterate)


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_numbers_of_the_plain_file(tensorboard, tmp_path):
    invoke("train", *train_flags(teacher(), outdir=tmp_path, snap=2), "--log=tensorboard").ok()
    run_dir = only_run(tmp_path)
    calls, stats = tensorboard.calls, stats_of(run_dir)
    assert calls.of("open") == [(str(run_dir), 0)]
    expected = [(tag, line[tag], line["images"]) for line in stats for tag in line if tag in CURVES]
    assert calls.of("scalar") == expected and {tag for tag, *_ in expected} == CURVES
    assert [step for _, _, step, _ in calls.of("image")] == [32, 64]
    tag, (height, width, channels), _, order = calls.of("image")[0]
    assert tag == "teacher and student" and width > height and channels == 3 and order == "HWC"
    ((settings, metrics),) = calls.of("settings")
    assert settings["lr"] == 1e-3 and settings["M"] == 1 and settings["afs"] is True and settings["processes"] == 1
    assert all(isinstance(v, bool | int | float | str) for v in settings.values()) and list(metrics) == ["loss"]
    assert calls[-1][0] == "close" and (run_dir / "teacher-and-student-000000.png").exists()


def test_tensorboard_forgets_what_came_after_the_state(tensorboard, monkeypatch, tmp_path):
    args = [*train_flags(teacher(), outdir=tmp_path, dump=2, M=0), "--log=tensorboard"]
    with monkeypatch.context() as patch:
        interrupt(patch, at=7)  # 48 images were reported, 32 are saved
        invoke("train", *args).refused("broken")
    assert tensorboard.calls[-1][0] == "close"
    invoke("train", *args).ok()
    assert [purge for _, purge in tensorboard.calls.of("open")] == [0, 33]
    steps = [step for tag, _, step in tensorboard.calls.of("scalar") if tag == "loss"]
    assert steps == [16, 32, 48, 48, 64]


def test_without_the_option_nothing_is_imported(tensorboard, wandb, tmp_path):
    invoke("train", *train_flags(teacher(), outdir=tmp_path, total_kimg=0.016, M=0)).ok()
    assert not tensorboard.calls and not wandb.calls
    assert json.loads((only_run(tmp_path) / "training_options.json").read_text())["launch"]["log"] is None


# --- Weights & Biases ------------------------------------------------------------------------------------------------


def test_wandb_is_offline_and_goes_on_as_the_same_run(wandb, monkeypatch, tmp_path):
    args = [*train_flags(teacher(), outdir=tmp_path, M=0), "--log=wandb"]
    with monkeypatch.context() as patch:
        interrupt(patch, at=6)
        invoke("train", *args).refused("broken")
    invoke("train", *args).ok()
    run_dir = only_run(tmp_path)
    first, second = (kwargs for _, kwargs in wandb.calls.of("init"))
    assert first == second and first["mode"] == "offline" and first["resume"] == "allow" and len(first["id"]) == 16
    assert first["dir"] == str(run_dir) and first["name"] == run_dir.name and first["project"] == "sfd"
    assert first["config"]["batch"] == 8 and first["settings"] == {"console": "off"}
    assert [kwargs["exit_code"] for _, kwargs in wandb.calls.of("finish")] == [1, 0]
    points = [(kwargs["step"], values) for (values,), kwargs in wandb.calls.of("log")]
    assert [(step, values["loss"]) for step, values in points if "loss" in values] == [
        (line["images"], line["loss"]) for line in stats_of(run_dir)
    ]
    assert all(values["kimg"] == step / 1000 for step, values in points)
    assert [step for step, values in points if "teacher and student" in values] == [64]
    assert (("*",), {"step_metric": "kimg"}) in wandb.calls.of("metric")


def test_wandb_settings_of_the_user_hold(wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    RunLogger("wandb", tmp_path, {}, 0, print)
    ((_, kwargs),) = wandb.calls.of("init")
    assert (kwargs["mode"], kwargs["project"]) == ("online", "mine")


def test_every_run_has_an_id_of_its_own(wandb, tmp_path):
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        RunLogger("wandb", tmp_path / name, {}, 0, print)
    a, b, again = (kwargs["id"] for _, kwargs in wandb.calls.of("init"))
    assert a == again != b


# --- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_made(name, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(loop, "train", lambda *args, **kwargs: pytest.fail("nothing may be loaded"))
    args = train_flags(teacher(), outdir=tmp_path / "exps")
    for more in ([], ["--dry-run"]):
        invoke("train", *args, f"--log={name}", *more).refused(rf"--log={name} needs .*; run: pip install {name}$")
    assert not (tmp_path / "exps").exists()


def test_a_folder_named_wandb_is_not_taken_for_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="run: pip install wandb$"):
        need_logger("wandb")
    sys.modules.pop("wandb")


def test_a_logger_that_does_not_start_is_one_line_and_one_that_breaks_costs_no_training(
    tensorboard, wandb, monkeypatch, tmp_path
):
    def unreachable(**kwargs):
        raise RuntimeError("no server\nand more")

    monkeypatch.setattr(wandb, "init", unreachable)
    args = train_flags(teacher(), outdir=tmp_path / "a", total_kimg=0.048, M=0)
    invoke("train", *args, "--log=wandb").refused(r"--log=wandb cannot start \(no server\)")
    monkeypatch.setattr(tensorboard, "fails", len(CURVES) + 1)
    broken = invoke("train", *args, "--log=tensorboard").ok()  # the run that was made before
    assert broken.output.count("Warning: --log=tensorboard has ended ([Errno 28] No space left on device)") == 1
    run_dir = only_run(tmp_path / "a")
    assert [line["images"] for line in stats_of(run_dir)] == [16, 32, 48]
    assert not tensorboard.calls.of("image") and len(tensorboard.calls.of("scalar")) == len(CURVES) + 1
    assert "No space left" in (run_dir / "log.txt").read_text()
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "b", total_kimg=0.048, M=0)).ok()
    assert same(weights(run_dir), weights(only_run(tmp_path / "b")))


def test_what_is_not_finite_has_no_point(tensorboard, tmp_path):
    logger = RunLogger("tensorboard", tmp_path, {}, 0, print)
    logger.scalars({"images": 8, "kimg": 0.008, "loss": None, "lr": 0.5, "timestamp": 1e9}, 8)
    assert tensorboard.calls.of("scalar") == [("lr", 0.5, 8)]


def test_another_rank_logs_nothing(tensorboard, monkeypatch, tmp_path):
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        report = Report(tmp_path, SimpleNamespace(images=0, distiller=None))
        with report.logged("tensorboard", {}):
            report.log("a line")
        assert bool(tensorboard.calls) is (rank == 0)
        tensorboard.calls.clear()
    assert (tmp_path / "log.txt").read_text() == "a line\n"


# --- The packages themselves -----------------------------------------------------------------------------------------


def test_tensorboard_itself_reads_every_point_once(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = [*train_flags(teacher(), outdir=tmp_path, dump=2, M=0), "--log=tensorboard"]
    for processes, at in ((1, 3), (2, 7)):  # before its first state, then after reporting more than is saved
        result = run_ranks("train", args, tmp_path, processes, kill=(ITERATE, at))
        assert result.code == -signal.SIGKILL, result.output
        time.sleep(1)  # TensorBoard reads files in the order of the second in which they were made
    invoke("train", *args).ok()
    run_dir = only_run(tmp_path)
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 3
    read = EventAccumulator(str(run_dir)).Reload()
    stats = stats_of(run_dir)
    for tag in CURVES:
        assert [point.step for point in read.Scalars(tag)] == [16, 32, 48, 64]
        assert [point.value for point in read.Scalars(tag)] == pytest.approx([line[tag] for line in stats])
    assert [picture.step for picture in read.Images("teacher and student")] == [64]
    assert "_hparams_/session_start_info" in read.summary_metadata


def test_wandb_itself_keeps_an_offline_run(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    invoke("train", *train_flags(teacher(), outdir=tmp_path, M=0), "--log=wandb").ok()
    run_dir = only_run(tmp_path)
    name = (run_dir / "wandb-id.txt").read_text().strip()
    (offline,) = run_dir.glob(f"wandb/offline-run-*-{name}")
    assert (offline / f"run-{name}.wandb").stat().st_size > 0
    assert len(list(offline.glob("files/media/images/*.png"))) == 1
