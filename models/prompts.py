"""Captions for text-conditioned models: from a file, from a command line, or drawn by seed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, first_line
from torch_utils.checkpoint import PathLike
from torch_utils.random import draw_classes

from .model import DiffusionModel
from .registry import fetch_captions


def read_prompts(path: PathLike) -> list[str]:
    """Captions of a file: each line of a `.txt`, or the column `text` of a `.csv`, UTF-8; empty ones are left out.

    Raises:
        UserError: no such file, one of another kind, or one without captions.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".csv"):
        raise UserError(f"{path} is not a list of captions; expected a .txt, or a .csv with a column text")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            captions = file.read().splitlines() if suffix == ".txt" else _text_column(file, path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a list of captions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path} is not a readable .csv ({first_line(error)})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise UserError(f"{path} holds no captions; expected at least one")
    return captions


def _text_column(file: Any, path: Path) -> list[str]:
    rows = csv.DictReader(file, strict=True)
    if "text" not in (rows.fieldnames or []):
        columns = ", ".join(rows.fieldnames or []) or "none"
        raise UserError(f"{path} has no column text; it has {columns[:120]}")
    return [row["text"] or "" for row in rows]


@dataclass(frozen=True)
class Prompts:
    """Captions for a text-conditioned model.

    Attributes:
        texts: one or more.
        drawn: each seed draws its caption; otherwise seed i gets number i, and they start again at the end.
    """

    texts: Sequence[str]
    drawn: bool = False

    def choose(self, seeds: Sequence[int], generators: Sequence[torch.Generator]) -> list[str]:
        """The caption of each seed, whose generator has drawn its noise."""
        if self.drawn:
            return [self.texts[i] for i in draw_classes(generators, len(self.texts)).tolist()]
        return [self.texts[seed % len(self.texts)] for seed in seeds]


def captions_by_seed() -> Prompts:
    """The captions that text-conditioned models are trained and evaluated with."""
    return Prompts(read_prompts(fetch_captions()), drawn=True)


def given_prompts(prompt: str | None, path: PathLike | None) -> Prompts | None:
    """The captions that somebody gives, one or a file of them; None for neither.

    Raises:
        UserError: both, or a file that cannot be used.
    """
    if prompt is not None and path is not None:
        raise UserError("one caption and a file of captions were given; leave one of them out", "prompts")
    if prompt is not None:
        return Prompts([prompt])
    return None if path is None else Prompts(read_prompts(path))


def prompts_for(model: DiffusionModel, captions: Prompts | None = None, about: str = "prompt") -> Prompts | None:
    """Captions for a text-conditioned model: `captions` that were given by the option `about`, else by seed; else None.

    Raises:
        UserError: captions for a model without text.
    """
    if model.has_text:
        return captions_by_seed() if captions is None else captions
    model.check_prompt(None if captions is None else captions.texts[0], about)
    return None
