"""What the commands of fid.py and prdc.py have in common beside their options."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from dnnlib import UserError, make_folder
from models.detectors import load_detector
from torch_utils import distributed
from torch_utils.device import configure_backends, pick_device
from torch_utils.metrics.image_set import ImageDataset

from .extractor import Extractor
from .sources import REFERENCES, Source


def open_extractor(opts: dict[str, Any], features: str | None = None) -> Extractor:
    """Join the process group, set the backends up and load the detector that the options name.

    Args:
        features: where to keep features.
    """
    check_outputs(features=features, out=opts.get("out"))
    device = pick_device(opts["device"], distributed.local_rank())
    configure_backends()
    distributed.init(device)
    detector = load_detector(opts["detector"], device, opts["resize"], opts["detector_runs_code"])
    return Extractor(detector, opts["batch"], opts["workers"], Path(features) if features else None)


def check_outputs(**paths: str | Path | None) -> None:
    """Find files that cannot be written before any work is done; folders are made. Names are those of the options."""
    for about, path in paths.items():
        if path is not None:
            make_folder(Path(path).parent, about)
            if Path(path).is_dir() or Path(path).is_fifo():
                raise UserError(f"{path} is no file; choose another name", about)
            if Path(path).exists() and not os.access(path, os.W_OK):
                raise UserError(f"{path} cannot be written; choose another name", about)


def say(line: str) -> None:
    """Print a remark on rank 0, apart from the results."""
    if distributed.is_first_process():
        click.echo(line, err=True)


def check(source: Source) -> None:
    """Read the headers of all images, before any work is done; say what will happen to them."""
    if isinstance(source, ImageDataset):
        _ = source.shape
        for line in source.remarks:
            say(line)


def missing_paths(*names: str) -> list[str]:
    """Those of images and references that are not there yet; a dry run of a later step of a plan says so."""
    return [name for name in names if name not in REFERENCES and "://" not in name and not Path(name).exists()]


def show_plan(**plan: Any) -> None:
    """What a command would do, as JSON."""
    if distributed.is_first_process():
        click.echo(json.dumps(plan, indent=2))
