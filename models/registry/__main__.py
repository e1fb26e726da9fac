"""Print what is known of every data set: `python -m models.registry [--json]`. Nothing is downloaded.

Networks are built on the meta device, from `models/configs/`, so parameters and operations need no weights.
"""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import json
import os
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from dnnlib import format_count, one_line_errors
from dnnlib.options import Command, section
from torch_utils.device import plain_operations

from ..building import build_on_meta
from ..networks.clip_text import VIT_L_14
from . import ROWS, DatasetSpec

NOTES = """
(in parentheses) what the network sees: latents of a first stage
parameters       of the network: first stage and text encoder come on top
GFLOPs           of one evaluation for one image, two operations for each multiply-add; guidance takes two evaluations
sigma            noise levels between which models are distilled and sampled
published        by the authors, without distillation"""


#: By network: many of EDM2's files are of the same.
_measured: dict[tuple[Any, ...], dict[str, Any]] = {}


def measure(row: DatasetSpec) -> dict[str, Any]:
    """Parameters, and operations of one evaluation, of a row's network, and the highest noise level of its own."""
    key = (row.config or row.name, *sorted(row.network.items()))
    if key in _measured:
        return _measured[key]
    with torch.device("meta"), torch.no_grad(), plain_operations(), FlopCounterMode(display=False) as counter:
        net = build_on_meta(row).eval()
        parameters = sum(param.numel() for param in net.parameters())
        shape = (1, net.img_channels, net.img_resolution, net.img_resolution)
        tokens = VIT_L_14["max_position_embeddings"]
        text = {} if net.context_dim is None else {"condition": torch.empty(1, tokens, net.context_dim)}
        net(torch.empty(shape), torch.empty(1), **text)
    own_max = None if net.noise_schedule is None else net.noise_schedule.sigma_max
    _measured[key] = {
        "parameters": parameters, "gflops": counter.get_total_flops() / 1e9, "own_sigma_max": own_max
    }  # fmt: skip
    return _measured[key]


def describe(row: DatasetSpec) -> dict[str, Any]:
    """Everything that the table shows, for JSON."""
    measured = measure(row)
    sigma_max = measured["own_sigma_max"] if row.sigma_max is None else row.sigma_max
    return {
        "name": row.name,
        "source": row.origin,
        "urls": [] if row.loader == "embedded" else list(row.sources),
        "resolution": row.resolution,
        "channels": row.channels,
        "latent_resolution": row.latent_resolution,
        "latent_channels": row.latent_channels,
        "labels": row.label_dim,
        "text": row.text,
        "parameters": measured["parameters"],
        "gflops": round(measured["gflops"], 2),
        "sigma_min": row.sigma_min,
        "sigma_max": round(sigma_max, 4),
        "guidance_rate": row.guidance_rate,
        "guide": None if row.guide is None else row.guide.sources[0].rsplit("/", 1)[1],
        "published": row.published,
        "licence": row.licence,
        "file": str(row.path),
        "unpacked": None if row.member is None else str(row.weights_path),
        "sha256": row.sha256,
        "present": all(r.path.is_file() or r.weights_path.is_file() for r in (row, row.guide) if r is not None),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Two lines a data set: aligned columns, and the file with its state."""
    columns = ["name", "source", "resolution", "channels", "labels", "parameters", "GFLOPs", "sigma", "guidance"]
    cells = [[*columns, "published", "licence of the weights"]]
    for row in rows:
        resolution, channels = (
            f"{row[size]} ({row[f'latent_{size}']})" if row[f"latent_{size}"] else str(row[size])
            for size in ("resolution", "channels")
        )
        labels = "text" if row["text"] else str(row["labels"] or "–")
        sigma = f"{row['sigma_min']:g}–{row['sigma_max']:.4g}"
        guidance = f"{row['guidance_rate']:g}" if row["guidance_rate"] != 1 else "–"
        size = [format_count(row["parameters"]), f"{row['gflops']:.1f}"]
        about = [resolution, channels, labels, *size, sigma, guidance, row["published"] or "–", row["licence"]]
        cells.append([row["name"], row["source"], *about])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    for i, row in enumerate(rows, start=1):
        origin = "" if row["present"] or not row["urls"] else f", from {row['urls'][0]}"
        guide = f", guided by {row['guide']}" if row["guide"] else ""
        lines[i] += f"\n    {'present' if row['present'] else 'missing'}: {_short(row['file'])}{guide}{origin}"
    return "\n".join([*lines, NOTES])


def _short(path: str) -> str:
    """Relative to the current directory, where that says it without `..`."""
    return os.path.relpath(path) if Path(path).absolute().is_relative_to(Path.cwd()) else path


@click.command(cls=Command)
@section("Form")
@click.option("--json", "as_json", help="Print JSON, with every field", is_flag=True)
def main(as_json: bool) -> None:
    """Print the data sets that this program knows, and which of their files are there.

    \b
    Examples:
      python -m models.registry
      python -m models.registry --json
    """
    rows = [describe(row) for row in ROWS.values()]
    click.echo(json.dumps(rows, indent=2) if as_json else table(rows))


if __name__ == "__main__":
    one_line_errors(main)()
