"""What the commands of fid.py and prdc.py have in common beside their options."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, make_folder
from dnnlib.progress import say
from models.detectors import Detector, load_detector
from torch_utils import distributed
from torch_utils.device import configure_backends, pick_device
from torch_utils.metrics.features import FeatureSet
from torch_utils.metrics.image_set import ImageDataset

from .extractor import Extractor, Reference
from .records import append_records
from .results import judge, show
from .sources import REFERENCES, Source


def join(device: str | None) -> torch.device:
    """The device of this process, which joins the process group and sets the backends up."""
    found = pick_device(device)
    configure_backends()
    distributed.init(found)
    return found


def open_extractor(opts: dict[str, Any]) -> Extractor:
    """Join the process group, set the backends up and load the detector that the options name."""
    check_outputs(features=opts.get("features"), out=opts.get("out"))
    detector = load_detector(opts["detector"], join(opts["device"]), opts["resize"], opts["detector_runs_code"])
    return Extractor(detector, opts["batch"], opts["workers"])


def check_outputs(**paths: str | Path | None) -> None:
    """Find files that cannot be written before any work is done; folders are made. Names are those of the options."""
    for about, path in paths.items():
        if path is not None:
            make_folder(Path(path).parent, about)
            if Path(path).is_dir() or Path(path).is_fifo():
                raise UserError(f"{path} is no file; choose another name", about)
            if Path(path).exists() and not os.access(path, os.W_OK):
                raise UserError(f"{path} cannot be written; choose another name", about)


def check(source: Source) -> None:
    """Read the headers of all images, before any work is done; say what will happen to them."""
    if isinstance(source, ImageDataset):
        _ = source.shape
        for line in source.remarks:
            say(line)


def describe_reference(
    name: str, opened: Callable[[], Source], extractor: Extractor, keep: bool, moments: bool = True
) -> Reference:
    """The feature set of what `open_reference` has found for a name; for `keep` and `moments` see `Extractor`."""
    source = opened()
    check(source)
    return Reference(name, source, extractor.reference(source, keep, moments))


def record_distance(
    made: FeatureSet, reference: FeatureSet, detector: Detector, facts: dict[str, Any], out: Path
) -> dict[str, Any]:
    """The Fréchet distance of a set as a record with `facts`, which rank 0 appends to `out`."""

    def work() -> dict[str, Any]:
        result = {**judge([made], reference, "fid", detector), **facts}
        append_records(out, [result])
        return result

    return distributed.on_first_rank(work)


def missing_paths(*names: str) -> list[str]:
    """Those of images and references that are not there yet; a dry run of a later step of a plan says so."""
    return [name for name in names if name not in REFERENCES and "://" not in name and not Path(name).exists()]


def finish(
    sets: Sequence[FeatureSet],
    reference: Reference,
    extractor: Extractor,
    record: dict[str, Any],
    opts: dict[str, Any],
) -> None:
    """Compute, print and write every metric on rank 0, and leave the process group.

    Args:
        sets: one for every trial.
        record: what else belongs to every record.
    """
    detector, count = extractor.detector, sets[0].count
    facts = {"N": count, **record, **reference.facts, "desc": opts["desc"], **detector.identity()}

    def work() -> None:
        found = []
        for metric in opts["metrics"]:
            if metric == "fid" and count is not None and count <= detector.dim:
                say(f"Warning: {count} images for {detector.dim} features: the number is biased upwards; compare it "
                    f"only with numbers from {count} images, or use --metrics=kid")  # fmt: skip
            found.append({**judge(sets, reference.features, metric, detector), **facts})
        append_records(opts["out"], found)  # first, for nobody may be there to read the rest
        for result in found:
            show(result)

    distributed.on_first_rank(work)
    distributed.shutdown()
