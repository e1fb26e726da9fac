"""What launch.sh installs, and leaves alone: real environments and pip, with stand-ins for packages in local indexes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pip
import pytest
import torch
from conftest import ROOT

from dnnlib import packages
from torch_utils.device import pick_device

NEEDED = ("numpy", "scipy", "click", "pillow", "requests", "tqdm", "safetensors", "omegaconf")
OLD = "2.5.1+cu121"


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """A package that knows its version, and as torch that there is no GPU."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": "class cuda:\n    device_count = staticmethod(lambda: 0)\n",
        f"{module}/version.py": f"__version__ = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def index(folder: Path, wheels: Path) -> str:
    """The address of an index of these wheels."""
    for path in wheels.iterdir():
        page = folder / path.name.split("-")[0].replace("_", "-") / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as file:
            file.write(f'<a href="{path.as_uri()}">{path.name}</a><br>\n')
    return folder.as_uri()


class Place:
    """A folder with launch.sh and stand-ins for train.py, an environment and two indexes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("launch.sh", "requirements.txt", "tests/constraints.txt", "dnnlib/packages.py",
                     "training/__init__.py", "training/presets.py", "training/presets.yaml"):  # fmt: skip
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "train.py").write_text(
            "import sys, torch.version as v\nprint('torch', v.__version__, sys.argv[1:])\n"
        )
        for name in NEEDED:
            wheel(folder / "usual", name, "99.0")
        wheel(folder / "usual", "torch", "2.13.0")
        wheel(folder / "usual", "torch", "2.15.0")
        wheel(folder / "cpu", "torch", "2.13.0+cpu")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "SFD_", "CONDA", "VIRTUAL_ENV"))}
        self.env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index(folder / "index", folder / "usual")}
        self.cpu_builds(index(folder / "cpu-index", folder / "cpu"))
        # A machine without a GPU, whatever this one has.
        script = (folder / "launch.sh").read_text().replace("! -e /dev/nvidiactl", "! -e /dev/null/nvidiactl")
        (folder / "launch.sh").write_text(script)
        self.env["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.tool("nvidia-smi", "exit 9")
        self.tool("uname", "echo Linux")

    def cpu_builds(self, address: str) -> None:
        script = (self.folder / "launch.sh").read_text().splitlines()
        script = [f"CPU_BUILDS={address}" if line.startswith("CPU_BUILDS=") else line for line in script]
        (self.folder / "launch.sh").write_text("\n".join(script) + "\n")

    def tool(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def activate(self, with_pip: bool = True) -> Path:
        """An empty environment, active; returns where its packages go."""
        venv.create(self.folder / "env", with_pip=False)
        packages = next((self.folder / "env").glob("lib/python*/site-packages"))
        if with_pip:
            shutil.copytree(Path(pip.__file__).parent, packages / "pip")
        self.env |= {"VIRTUAL_ENV": str(self.folder / "env")}
        self.env["PATH"] = f"{self.folder / 'env' / 'bin'}:{self.env['PATH']}"
        return packages

    def launch(self, *args: str, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(self.folder / "launch.sh"), *(args or ("emoji32",))]
        done = subprocess.run(command, env=self.env | env, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def unpack(packages: Path, name: str, version: str) -> None:
    wheel(packages / "..", name, version)
    with zipfile.ZipFile(packages / ".." / f"{name}-{version}-py3-none-any.whl") as archive:
        archive.extractall(packages)


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_another_torch_is_not_replaced(place):
    unpack(place.activate(), "torch", OLD)
    done = place.launch("emoji32", "--seed=1")
    assert f"torch {OLD} ['--preset=emoji32', '--seed=1']" in done.stdout
    assert done.stdout.count("pip install") == 1 and r"numpy\>=1.26" in done.stdout and f"torch=={OLD}" in done.stdout
    assert "pip install" not in place.launch().stdout  # all is there


def test_pip_ends_rather_than_replace_torch(place):
    packages = place.activate()
    unpack(packages, "torch", OLD)
    shutil.rmtree(place.folder / "usual")
    for name in NEEDED:
        wheel(place.folder / "usual", name, "99.0", *["torch>=2.13"] * (name == "omegaconf"))
    wheel(place.folder / "usual", "torch", "2.13.0")
    assert "torch" in place.launch(code=1).stderr
    assert [path.name for path in packages.glob("torch-*")] == [f"torch-{OLD}.dist-info"]


def test_a_torch_without_metadata_is_there_too(place):
    packages = place.activate()
    unpack(packages, "torch", "2.6.0a0+git1")
    shutil.rmtree(packages / "torch-2.6.0a0+git1.dist-info")
    assert "torch 2.6.0a0+git1 " in place.launch().stdout and not list(packages.glob("torch-*"))


def test_without_a_gpu_torch_is_the_cpu_build_of_the_tested_release(place):
    place.activate()
    dry = place.launch("emoji32", "--dry-run").stdout
    assert "-c tests/constraints.txt torch\n" in dry and not list((place.folder / "env").glob("lib/*/*/torch"))
    assert "torch 2.13.0+cpu " in place.launch().stdout


def test_the_usual_index_serves_where_that_of_cpu_builds_does_not_answer(place):
    place.activate()
    place.cpu_builds((place.folder / "nowhere").as_uri())
    done = place.launch()
    assert "torch 2.13.0 " in done.stdout and "is not reached; the usual index" in done.stdout and not done.stderr


def test_with_a_gpu_the_usual_index_is_asked(place):
    place.activate()
    place.tool("nvidia-smi", "exit 0")
    assert "torch 2.13.0 " in place.launch(NPROC="1").stdout


def test_an_old_torch_is_one_line(place):
    unpack(place.activate(), "torch", "2.3.1")
    line = one_line(place.launch(code=2))
    assert "has torch 2.3.1, and torch>=2.4 is needed; an installed torch is never changed here" in line


def test_an_environment_without_pip_is_one_line(place):
    unpack(place.activate(with_pip=False), "torch", OLD)
    line = one_line(place.launch(code=2))
    assert "python has no pip to install numpy>=1.26 " in line and "uv pip install" in line


def test_a_torch_that_cannot_be_imported_is_one_line(place):
    unpack(place.activate(), "torch", OLD)
    (next((place.folder / "env").glob("lib/*/*/torch")) / "__init__.py").write_text("import libcudart")
    assert "see why: python -c 'import torch'" in one_line(place.launch(code=2))


def test_nothing_is_installed_unasked(place):
    packages = place.activate()
    unpack(packages, "torch", OLD)
    for arguments in (["emoji32"], ["emoji32", "--dry-run"]):
        line = one_line(place.launch(*arguments, code=2, SFD_NO_INSTALL="1"))
        assert "python lacks numpy>=1.26 " in line and "nothing is installed with SFD_NO_INSTALL" in line
    for name in NEEDED:
        unpack(packages, name, "99.0")
    assert f"torch {OLD} " in place.launch(SFD_NO_INSTALL="1").stdout


def test_numbers_are_looked_at_before_pip_runs(place):
    place.activate()
    assert "NPROC is 'two'" in one_line(place.launch(code=2, NPROC="two"))
    assert not list((place.folder / "env").glob("lib/*/*/numpy"))


def test_a_torch_outside_of_environments_is_used(place):
    """As a module or a container has it: with all that is needed as it is, else seen by the .venv that is made."""
    base = getattr(sys, "_base_executable", sys.executable)
    place.tool("python3", f'exec "{base}" -S "$@"')
    plain = place.launch("emoji32", "--dry-run").stdout
    assert "python3 -m venv .venv" in plain and "torch\\>=2.4" in plain
    module = place.folder / "module"
    module.mkdir()
    unpack(module, "torch", OLD)
    seen = place.launch("emoji32", "--dry-run", PYTHONPATH=str(module)).stdout
    assert "python3 -m venv --system-site-packages .venv" in seen and "numpy\\>=1.26" in seen
    assert f"torch=={OLD}" in seen and "torch\\>=2.4" not in seen
    for name in NEEDED:
        unpack(module, name, "99.0")
    used = place.launch(PYTHONPATH=str(module)).stdout
    assert f"torch {OLD} " in used and "venv" not in used and "pip" not in used


@pytest.mark.slow
def test_an_environment_is_made_where_there_is_none(place):
    pytest.importorskip("ensurepip")
    place.tool("python3", f'exec "{getattr(sys, "_base_executable", sys.executable)}" -S "$@"')
    assert "torch 2.13.0+cpu " in place.launch().stdout
    assert "venv .venv" not in place.launch().stdout  # it is there now


def test_a_python_that_is_too_old_is_one_line(place):
    for name in ("python3", "python", "python3.13", "python3.12", "python3.11", "python3.10"):
        place.tool(name, "exit 1")
    assert "python3 is no Python 3.10 or newer" in one_line(place.launch(code=2))


def test_on_a_mac_the_cpu_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "cpu" and pick_device("mps").type == "mps"


@pytest.mark.parametrize("script", ["train.py", "fid.py", "models/registry/__main__.py"])
def test_commands_say_that_torch_is_too_old_or_missing(script, tmp_path):
    for version, words in (("2.3.1", "torch 2.3.1 is too old in "), (None, "torch is missing in ")):
        if version:
            unpack(tmp_path / "packages", "torch", version)
        flags = [] if version else ["-S"]
        command = [sys.executable, *flags, str(ROOT / script), "--help"]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'packages' if version else tmp_path / 'none'}"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 1 and words in one_line(done) and "torch>=2.4 is needed" in done.stderr


@pytest.mark.parametrize(
    "requirement, version, met",
    [
        ("torch>=2.4", "2.4.0", True),
        ("torch>=2.4", "2.10", True),
        ("torch>=2.4", "2.3.9", False),
        ("torch>=2.4", "2.5.0a0+872d972e41.nv24.8", True),
        ("torch==2.13.0", "2.13.0+cpu", True),
        ("ruff==0.17.*", "0.17.3", True),
        ("ruff==0.17.*", "0.170.1", False),
        ("prdc==0.2", "0.2", True),
        ("einops", "0.1", True),
        ("einops", None, False),
    ],
)
def test_requirements_are_met_or_not(requirement, version, met, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda name: version)
    assert packages.is_met(requirement) == met


def test_names_that_begin_alike_are_others(monkeypatch, capsys):
    monkeypatch.setattr(packages, "installed", lambda name: "2.13.0" if name == "torch" else None)
    assert packages.main(["torch>=2.4", "torch-fidelity==0.4.0"]) == 0
    assert capsys.readouterr().out == "torch-fidelity==0.4.0\n"


def test_every_requirement_of_the_program_is_understood():
    words = ["tests/requirements.txt", "taming-transformers-rom1504==0.0.6"]
    found = list(packages.requirements([str(ROOT / words[0]), words[1]]))
    assert {packages.TORCH, "pytest>=8", words[1]} <= set(found) and len(found) == len(set(found))
    for text in found:
        packages.is_met(text)
    with pytest.raises(ValueError):
        packages.is_met("torch<3")
