"""What the tests of fid.py and prdc.py share: a detector of six features, images, and ways to call the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import Patches, Result, flags, invoke, write_images

from training.evaluation.records import read_records

DETECTOR = "patches.pt"


def write_files(root: Path, fake: int, real: int) -> Path:
    """The detector, and the folders `fake` and `real` of so many images."""
    torch.jit.script(Patches()).save(str(root / DETECTOR))
    write_images(root / "fake", fake, seed=1)
    write_images(root / "real", real, seed=2)
    return root


def evaluation(files: Path, *defaults: dict[str, Any], **changes: Any) -> list[str]:
    """Flags of a command with this detector on the CPU."""
    common = dict(detector=files / DETECTOR, device="cpu")
    return [*flags(common, *defaults, changes), "--detector-runs-code"]


def run(script: str, command: str, files: Path, *more: str, **changes: Any) -> Result:
    return invoke(script, command, *evaluation(files, **changes), *more)


def calc(files: Path, *more: str, **changes: Any) -> Result:
    return run("fid", "calc", files, *more, **{"images": files / "fake", "ref": files / "real", **changes})


def prdc(files: Path, *more: str, **changes: Any) -> Result:
    return run("prdc", "calc", files, *more, **{"images": files / "fake", "images_ref": files / "real", **changes})


def records(path: str | Path = "metrics.jsonl") -> list[dict[str, Any]]:
    return read_records(path)


def values(path: str | Path = "metrics.jsonl") -> list[Any]:
    return [record["value"] for record in records(path)]
