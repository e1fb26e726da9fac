"""What commands take as a model: a file, a folder of diffusers, or a run of this program by its directory or number."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dnnlib import UserError, sha256_of
from torch_utils.checkpoint import read_settings

from .published.diffusers import is_stable_diffusion
from .published.diffusers_folder import folder_digest
from .published.edm_pickle import read_edm_pickle

RUNS_DIR = Path("exps")
#: A student of a run directory; the published code writes pickles.
SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.(?:safetensors|pkl)")
#: What `training.pretrain` leaves in its run directory.
TEACHER_FILE = "teacher.safetensors"


def find_model(path: str | os.PathLike | int) -> Path:
    """Resolve what commands take as a model: a file, a folder of diffusers, or a run by its directory or number.

    Of a run it is the newest student, or the teacher that `training.pretrain` made there; of a model in the cache of
    the Hugging Face Hub (`models--NAME--REPO`) the snapshot that was fetched last.

    Raises:
        UserError: no such run, or one without either.
    """
    found = find_run(path)
    revisions = sorted((found / "snapshots").glob("*/"), key=lambda revision: revision.stat().st_mtime)
    if revisions and (found / "blobs").is_dir():
        return revisions[-1]
    own = found / TEACHER_FILE
    return own if own.is_file() else found if is_stable_diffusion(found) else _newest_student(found)


def find_student(path: str | os.PathLike | int) -> Path:
    """Resolve a file, a run directory or a run number to the newest student file; a UserError if there is none."""
    return _newest_student(find_run(path))


def find_run(path: str | os.PathLike | int) -> Path:
    """The directory of a run number; any other path as it is."""
    path = Path(str(path))
    if not re.fullmatch(r"\d{1,9}", str(path)) or path.exists():
        return path
    number = f"{int(str(path)):05d}"
    runs = sorted(RUNS_DIR.glob(f"{number}-*"))
    if not runs:
        raise UserError(f"run {path} does not exist under ./{RUNS_DIR}; expected a folder {number}-…")
    return runs[0]


def snapshots(run_dir: Path) -> dict[int, Path]:
    """The students of a run directory by kimg, ascending."""
    found = [(int(m[1]), path) for path in run_dir.iterdir() if (m := SNAPSHOT.fullmatch(path.name))]
    return dict(sorted(found))


def _newest_student(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = snapshots(path)
    if not found:
        raise UserError(f"{path} holds no network-snapshot-*.safetensors or .pkl; has it saved one yet?")
    return found[max(found)]


def own_name(model_path: str | os.PathLike) -> str:
    """What a teacher of one's own is called: as its file, or as its folder where `training.pretrain` named the file."""
    path = Path(model_path)
    if path.is_dir() and path.parent.name == "snapshots":  # of the Hub's cache
        return own_name(path.parent.parent)
    if path.is_dir():
        return re.sub(r"[^\w.-]+", "-", path.resolve().name).lstrip(".-") or "folder"
    return path.resolve().parent.name if path.name == TEACHER_FILE else path.stem


def is_teacher_file(path: Path) -> bool:
    """Whether this is a teacher: Stable Diffusion, a pickle of EDM's training, or what `training.pretrain` writes."""
    if is_stable_diffusion(path):
        return True
    if path.suffix == ".pkl":
        return not read_edm_pickle(path).is_student
    return read_settings(path).get("format") == "teacher"


def digest_of(path: str | os.PathLike) -> str:
    """What a model's file, or folder, holds: SHA-256 as hex digits."""
    path = Path(path)
    return folder_digest(path) if path.is_dir() else sha256_of(path)
