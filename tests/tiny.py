"""Helpers for tests of the commands: a tiny teacher, and three ways to run a script.

`invoke` runs it in this process (fastest), `run_ranks` in forked processes that form a gloo group (no import cost, and
they can be killed at an exact iteration), `run_script` as a user does, in new processes, under torchrun if asked.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import importlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dnnlib import one_line_errors
from models.building import network_spec
from models.model import SamplingSettings
from models.precond import EDMPrecond
from models.registry import ROWS, DatasetSpec
from torch_utils.checkpoint import read_network, save_network
from training.config import DistillConfig

ROOT = Path(__file__).resolve().parent.parent
NETWORK = dict(
    img_resolution=8, img_channels=3, label_dim=0, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[4], dropout=0.0,
)  # fmt: skip
#: Flags of a training run of eight short iterations, two to a tick.
TRAIN = {
    "total_kimg": 0.064, "batch": 8, "lr": 1e-3, "num_steps": 4, "M": 1, "tick": 0.016, "snap": 100, "dump": 1,
    "precision": "fp32", "device": "cpu",
}  # fmt: skip
SAMPLE = {"precision": "fp32", "device": "cpu"}
STATE, STATS, OPTIONS = "training-state.pt", "stats.jsonl", "training_options.json"


# --- A detector ------------------------------------------------------------------------------------------------------


class Patches(torch.nn.Module):
    """Six features: mean colours of the whole and of a corner."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = images.float() / 64
        return torch.cat([x.mean((2, 3)), x[:, :, :4, :4].mean((2, 3))], dim=1)


# --- Files -----------------------------------------------------------------------------------------------------------


def tiny_network(seed: int = 0, **changes: Any) -> EDMPrecond:
    """A network with random weights everywhere; fresh ones end in almost nothing and would hide most defects."""
    torch.manual_seed(seed)
    net = EDMPrecond(**{**NETWORK, **changes}).eval()
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn_like(param), alpha=0.05)
    return net


def write_teacher(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A teacher file as `training.pretrain` writes it."""
    net = tiny_network(seed, **changes)
    settings = {"format": "teacher", "network": network_spec(net), "training": {"images_seen": 0}}
    save_network(path, net.state_dict(), settings)
    return Path(path)


@functools.cache
def shared_folder() -> Path:
    """A folder of this test session, for files that many tests read and none changes."""
    folder = Path(tempfile.mkdtemp(prefix="sfd-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def teacher() -> Path:
    return write_teacher(shared_folder() / "tiny.safetensors")


@functools.cache
def class_teacher() -> Path:
    """A teacher with three classes."""
    return write_teacher(shared_folder() / "classes.safetensors", label_dim=3)


def student(kind: str = "plain") -> Path:
    """The run directory of a student that was trained for two iterations.

    `plain` (2 NFE), `noafs` (3 NFE), `seven` (num_steps=7), `variable` (SFD-v), `classes`, `second` and
    `second-variable` (1 NFE, from `seven` and `variable`).
    """
    return _student(kind)


@functools.cache
def _student(kind: str) -> Path:
    changes: dict[str, Any] = {
        "plain": {}, "noafs": {"afs": False}, "seven": {"num_steps": 7, "M": 0}, "variable": {"use_step_condition": True, "M": 0},
        "classes": {"model_path": class_teacher()} if kind == "classes" else {},
    }.get(kind, {})  # fmt: skip
    outdir, short = shared_folder() / kind, {"total_kimg": 0.016}
    if kind.startswith("second"):
        source = student("variable" if kind.endswith("variable") else "seven")
        result = second_stage(source, outdir=outdir, **short)
    else:
        result = invoke("train", *train_flags(teacher(), **short, outdir=outdir, **changes))
    return only_run(outdir) if result.ok() else outdir


def known_as_tiny() -> Any:
    """Within this context, `tiny` is a data set of the registry, with the tiny teacher."""
    return mock.patch.dict(ROWS, tiny=DatasetSpec("tiny", "embedded", (str(teacher()),), 8))


def second_stage(source: Path, *more: str, **changes: Any) -> Result:
    stage = {"dataset_name": "tiny", "is_second_stage": True, "num_steps": 3, "M": 2, "lpips": "off"}
    with known_as_tiny():
        return invoke("train", *train_flags(source, **{**stage, **changes}), *more)


def seven_steps(config: DistillConfig) -> SamplingSettings | None:
    """For `source_settings`: a student of 7 timestamps that a second stage of any data set could distil."""
    first = replace(config, num_steps=7, is_second_stage=False)
    return first.sampling(0.006, 80) if config.is_second_stage else None


def write_images(folder: Path, count: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> Path:
    """Smooth random pictures (a few colours, low frequencies), so that there is something to learn."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, [2, 2, 3], dtype=np.uint8))
        small.resize(size, Image.Resampling.BILINEAR).convert(mode).save(folder / f"{i:04d}.png")
    return folder


def flags(*defaults: dict[str, Any], **changes: Any) -> list[str]:
    """`--name=value` for everything that is not None."""
    merged: dict[str, Any] = {}
    for values in (*defaults, changes):
        merged.update(values)
    return [
        f"--{name.replace('batch_gpu', 'batch-gpu')}={value}" for name, value in merged.items() if value is not None
    ]


def train_flags(teacher: Path | None, **changes: Any) -> list[str]:
    return flags(TRAIN, {"model_path": teacher}, changes)


def run_dirs(outdir: Path) -> list[Path]:
    return sorted(p for p in Path(outdir).glob("[0-9]*-*") if p.is_dir())


def only_run(outdir: Path) -> Path:
    dirs = run_dirs(outdir)
    assert len(dirs) == 1, dirs
    return dirs[0]


def newest_student(run_dir: Path) -> Path:
    return max(run_dir.glob("network-snapshot-*.safetensors"))


def weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a student file, or of the newest one in a run directory."""
    return read_network(newest_student(path) if path.is_dir() else path)[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def pixels(folder: Path, seed: int) -> np.ndarray:
    with Image.open(Path(folder) / f"{seed:06d}.png") as image:
        return np.array(image)


def png_names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*.png"))


# --- Running ---------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    code: int
    output: str

    def ok(self) -> Result:
        assert self.code == 0, f"exit code {self.code}\n{self.output}"
        return self

    def refused(self, pattern: str) -> Result:
        """One clear line: exit code, no traceback, `Error:` once, and what `pattern` says."""
        assert "Traceback" not in self.output, self.output
        assert self.code not in (0, None), self.output
        lines = [line for line in self.output.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1, self.output
        assert re.search(pattern, lines[0]), f"{pattern!r} not in {lines[0]!r}"
        return self


def invoke(script: str, *args: Any) -> Result:
    """Run a script's command in this process, exactly as its last line does (`one_line_errors`)."""
    module = importlib.import_module(script)  # `training.pretrain` is a script too, `models.export` a package
    main = (importlib.import_module(f"{script}.__main__") if hasattr(module, "__path__") else module).main
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        with mock.patch.object(sys, "argv", [f"{script}.py", *map(str, args)]):
            try:
                one_line_errors(main)()
            except SystemExit as error:
                code = error.code or 0
            except Exception:  # what the interpreter would do with it
                output.write(traceback.format_exc())
                code = 1
    return Result(code, output.getvalue())


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.elastic", "train", "sample"])
    # The server looks for them where it is started, which can be the folder of a test.
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()
    return context


def _rank_main(script: str, args: list[str], env: dict[str, str], cwd: str, log: str, kill: tuple[str, int] | None,
               disk: int | None) -> None:  # fmt: skip
    os.chdir(cwd)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.dump_traceback_later(60, file=sys.stderr)  # tells where a process hangs
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    if kill is not None:
        _kill_at_call(*kill)
    if disk is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    sys.argv = [f"{script}.py", *args]
    module = importlib.import_module(script)  # `training.pretrain` is a script too, `models.export` a package
    main = (importlib.import_module(f"{script}.__main__") if hasattr(module, "__path__") else module).main
    try:
        one_line_errors(main)()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _kill_at_call(name: str, count: int) -> None:
    """SIGKILL this process instead of the `count`-th call of `package.module:Class.method`."""
    module, _, attribute = name.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    is_static = isinstance(vars(owner).get(last), staticmethod) if isinstance(owner, type) else False
    setattr(owner, last, staticmethod(counted) if is_static else counted)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_ranks(
    script: str, args: list[str], cwd: Path, processes: int = 1, kill: tuple[str, int] | None = None, threads: int = 1,
    disk: int | None = None,
) -> list[tuple[Any, Path]]:  # fmt: skip
    """Start a script in `processes` forked processes; `disk` is the size that no file may exceed, as on a full disk."""
    Path(cwd).mkdir(parents=True, exist_ok=True)
    base = {"OMP_NUM_THREADS": str(threads)}
    if processes > 1:
        base |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        env = dict(base, RANK=str(rank), LOCAL_RANK=str(rank)) if processes > 1 else base
        log = Path(cwd) / f".rank{rank}-{time.monotonic_ns()}.log"
        process = _context().Process(
            target=_rank_main, args=(script, list(map(str, args)), env, str(cwd), str(log), kill, disk)
        )
        process.start()
        started.append((process, log))
    return started


def wait_ranks(started: list[tuple[Any, Path]], timeout: float = 120) -> Result:
    """Wait as torchrun does: when one process fails, the others are ended. Output in the order of ranks."""
    deadline, failed = time.monotonic() + timeout, None
    while any(process.is_alive() for process, _ in started) and failed is None and time.monotonic() < deadline:
        time.sleep(0.02)
        failed = next((p for p, _ in started if p.exitcode not in (None, 0)), None)
    grace = time.monotonic() + 5
    while failed is not None and any(p.is_alive() for p, _ in started) and time.monotonic() < grace:
        time.sleep(0.02)  # an error that every rank sees is printed by rank 0, perhaps a little later
    hanging = [p for p, _ in started if p.is_alive()]
    for process in hanging:
        process.kill()
    for process, _ in started:
        process.join()
    output = "".join(log.read_text() for _, log in started if log.exists())
    for _, log in started:
        log.unlink(missing_ok=True)
    codes = [p.exitcode for p, _ in started]
    code = next((c for c in codes if c), 0)
    return Result(code, output + ("\n(timed out)" if hanging and failed is None else ""))


def run_ranks(script: str, args: list[str], cwd: Path, processes: int = 1, **kwargs: Any) -> Result:
    timeout = kwargs.pop("timeout", 120)
    return wait_ranks(start_ranks(script, args, cwd, processes, **kwargs), timeout)


def run_script(script: str, *args: Any, cwd: Path, processes: int = 0, timeout: float = 300, **popen: Any) -> Result:
    """A script (`train.py`) or module (`-m` form: `training.pretrain`) in new processes; torchrun if `processes`."""
    target = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *torchrun, *target, *map(str, args)], cwd=cwd, env=env, timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen,
    )  # fmt: skip
    return Result(done.returncode, done.stdout)
