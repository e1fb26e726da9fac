"""The program on a GPU that is not there: fake tensors on `cuda`, forwards and backwards, at full size (tests/fake_cuda).

What would mix devices, make the host wait for a value, or train in half precision is found here, and kernels are counted.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.registry import ROWS

DRIVE = Path(__file__).parents[1] / "fake_cuda"
#: At most so many kernels in a step of the student with its optimizer, and in each of the 12 steps of a trajectory, for
#: every architecture that is published; `-autog` has a second network as its guide. EDM2 scales its weights in each pass.
CEILINGS = {
    "cifar10": (1610, 460), "ffhq": (2070, 590), "imagenet64": (2380, 680), "lsun_bedroom": (2430, 680),
    "imagenet64_cm": (2570, 720), "imagenet256_adm": (2800, 770), "lsun_bedroom_ldm": (1500, 440),
    "ffhq_ldm": (1500, 440), "ms_coco": (2300, 750), "edm2-img64-s-fid": (6580, 750),
    "edm2-img512-s-autog-fid": (6580, 1500),
}  # fmt: skip


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    """A library that lets a CPU build of torch take fake CUDA tensors, built against this torch."""
    if torch.backends.cuda.is_built():
        pytest.skip("this build of torch has CUDA itself; gpu-check runs there")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    dest, home = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    include, lib = home / "include", home / "lib"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    command += [str(DRIVE / "guard.cpp"), "-o", str(dest), f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"torch {torch.__version__} is not the release that this was written for: {done.stderr[-300:]}")
    return dest


def drive(guard: Path, what: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(DRIVE / "drive.py"), str(guard), what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CEILINGS)
def test_published_networks(guard, name):
    found = drive(guard, name)
    assert found["devices"] == ["cuda"] and found["gradients"] == ["torch.float32"] and found["without_gradient"] == 0
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert {"training iteration", "teacher trajectory", "student step", "sampling, NFE 2"} <= stages.keys()
    assert ("decoding" in stages) == (ROWS[name].codec is not None)
    # Nothing crosses between host and device, but the guidance's and the schedule's numbers, which go with the launches.
    assert {stage: found["crossings"] for stage, found in stages.items() if found["crossings"]} == {}
    found = stages["student step"]["kernels"], stages["teacher trajectory"]["kernels"] / 12
    assert all(100 < count <= ceiling for count, ceiling in zip(found, CEILINGS[name])), found


@pytest.mark.slow
def test_evaluation(guard):
    found = drive(guard, "evaluation")
    assert found["devices"] == ["cuda"] and found["gradients"] == ["torch.float32"]
    assert all(50 < stage["kernels"] < 1500 and stage["crossings"] == [] for stage in found["stages"])
