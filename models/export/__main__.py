"""Students for other programs, and in half the space: `python -m models.export diffusers|program|half|hub`."""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import json
from collections.abc import Callable
from pathlib import Path

import click

from dnnlib import one_line_errors, write_text
from dnnlib.options import Group, Whole, offline_option, section

from ..diffusers_precond import DiffusersPrecond
from .card import how_to_sample_program, write_card
from .diffusers import to_diffusers
from .folder import to_folder
from .half import to_half
from .hub import FILE, check_repo, hub_card, to_hub
from .program import to_program
from .student import open_student

# ------------------------------------------------------------------------------------------------------------------
# Commands


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What the forms have in common."""
    for option in (
        offline_option,
        section("Machine"),
        click.option(
            "--num_steps", help="SFD-v: timestamps to export for; default: the student's own", type=Whole(2, 1000)
        ),
        click.option("--dest", help="Where to write", metavar="PATH", required=True, type=Path),
        click.option("--model_path", help="Student: file, run directory or run number", metavar="PATH", required=True),
        section("What to export"),
    ):
        command = option(command)
    return command


@click.group(cls=Group)
def main() -> None:
    """Write a student for other programs; docs/interchange.md says what is exact, `COMMAND --help` has examples."""


@main.command()
@_options
def diffusers(model_path: str, dest: Path, num_steps: int | None) -> None:
    """A student of Stable Diffusion, or of any folder of diffusers, as a folder with its steps in the scheduler.

    \b
    Examples:
      python -m models.export diffusers --model_path=0 --dest=sd-student
    """
    student = open_student(model_path, num_steps)
    write = to_folder if isinstance(student.net, DiffusersPrecond) else to_diffusers
    write(student, dest)
    click.echo(f"Pipeline: {dest}; how to sample it stands in {dest / 'README.md'}")


@main.command()
@_options
def program(model_path: str, dest: Path, num_steps: int | None) -> None:
    """One step of a student as .pt2 (torch.export) or .onnx.

    For any batch size. ONNX needs onnx, onnxscript and onnxruntime.

    \b
    Examples:
      python -m models.export program --model_path=0 --dest=step.pt2
      python -m models.export program --model_path=0 --dest=step.onnx
    """
    student = open_student(model_path, num_steps)
    worst = to_program(student, dest)
    card = dest.with_suffix(".md")
    write_text(card, write_card(student, how_to_sample_program(student, dest.name), "pytorch"))
    click.echo(f"Program: {dest}; differs from our step by {worst:.1g} of the largest value; how to use it: {card}")


@main.command()
@section("What to export")
@click.option("--model_path", help="Student or teacher of this program: file, run directory or run number",
              metavar="PATH", required=True)  # fmt: skip
@click.option("--dest", help="Where to write", metavar="PATH", required=True, type=Path)
def half(model_path: str, dest: Path) -> None:
    """The file itself with weights in half precision: half the size, for all that reads such files.

    \b
    Examples:
      python -m models.export half --model_path=0 --dest=my-student.safetensors
    """
    source = to_half(model_path, dest)
    megabytes = [path.stat().st_size / 1e6 for path in (dest, source)]
    click.echo(f"{dest}: {megabytes[0]:.2f} MB, from {source} of {megabytes[1]:.2f} MB")


@main.command()
@section("What to send")
@click.option("--model_path", help="Student: file, run directory or run number", metavar="PATH", required=True)
@click.option("--repo", help="Repository of the Hugging Face Hub; made if it is not there", metavar="NAME/REPO",
              required=True)  # fmt: skip
@click.option("--private", help="Make it a private one", is_flag=True)
@section("Machine")
@offline_option
@click.option("-n", "--dry-run", help="Print the files and the card, then stop", is_flag=True)
def hub(model_path: str, repo: str, private: bool, dry_run: bool) -> None:
    """A student's file and a model card as a repository of the Hugging Face Hub.

    Needs huggingface_hub, and its login (`hf auth login`) or HF_TOKEN.

    \b
    Examples:
      python -m models.export hub --model_path=0 --repo=me/emoji32-sfd
    """
    check_repo(repo)
    student = open_student(model_path)
    if dry_run:
        click.echo(json.dumps({"repo": repo, "private": private, "files": [FILE, "README.md"]}, indent=2))
        click.echo(hub_card(student, repo))
    else:
        click.echo(f"Sent: {to_hub(student, repo, private)}")


if __name__ == "__main__":
    one_line_errors(main)()
