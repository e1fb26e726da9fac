"""A student's file and its model card as a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dnnlib import UserError, first_line, need
from dnnlib.download import is_offline
from torch_utils.checkpoint import read_settings, save_network

from ..loading import save_student
from .card import how_to_sample_student, write_card
from .student import OpenedStudent, without_folders

FILE = "student.safetensors"


def hub_card(student: OpenedStudent, repo: str) -> str:
    """The card that `to_hub` sends."""
    return write_card(student, how_to_sample_student(student, repo, FILE), "pytorch")


def to_hub(student: OpenedStudent, repo: str, private: bool = False) -> str:
    """Send a student's file and its card; the repository is made if it is not there.

    Account and address are those of huggingface_hub: `hf auth login` or `HF_TOKEN`, and `HF_ENDPOINT`.

    Args:
        repo: NAME/REPOSITORY.

    Returns:
        Address of the commit.

    Raises:
        UserError: no such name, offline, the package is missing, or the Hub refuses.
    """
    check_repo(repo)
    if is_offline():
        raise UserError(f"offline (SFD_OFFLINE is set), so nothing is sent to {repo}; unset it")
    hub: Any = need("huggingface_hub", "pip install huggingface_hub")
    card = hub_card(student, repo).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        write_shared(student, file)
        try:
            api = hub.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            files = [hub.CommitOperationAdd(FILE, str(file)), hub.CommitOperationAdd("README.md", card)]
            commit = api.create_commit(repo, files, commit_message=f"Student of {student.model.dataset_name}")
        except Exception as error:  # its errors have no common base: of the account, the name, the network
            raise UserError(
                f"{repo} was not written ({first_line(error)}); see hf auth login, and HF_ENDPOINT"
            ) from None
    return str(commit.commit_url)


def write_shared(student: OpenedStudent, dest: Path) -> None:
    """Its file as others get it: the same weights, of no folder of this machine; one of the published code as ours."""
    if student.path.suffix == ".pkl":
        save_student(dest, student.model, training={})
    else:
        settings = without_folders(read_settings(student.path), "training", "sampling")
        save_network(dest, load_file(student.path), settings)


def check_repo(repo: str) -> None:
    """Refuse what is no name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is no repository; expected NAME/REPOSITORY", "repo")
