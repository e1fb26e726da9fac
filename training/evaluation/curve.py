"""A run's snapshots one after the other: Fréchet distance against kimg, resumable, one line of `metrics.jsonl` each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, sha256_of
from models.detectors import check_detector, load_detector
from models.opening import open_sampler
from models.sampling import SamplerOptions
from torch_utils import distributed
from torch_utils.device import PRECISIONS

from ..options import describe_seeds
from .commands import record_distance
from .extractor import Extractor, Reference
from .records import find_record
from .sources import open_reference

#: Images at a time of an evaluation along a training run.
EVALUATION_BATCH = 64
SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.safetensors")


def snapshots(run_dir: Path) -> dict[int, Path]:
    """The students of a run by kimg, ascending.

    Raises:
        UserError: there is none.
    """
    found = {int(match[1]): path for path in run_dir.iterdir() if (match := SNAPSHOT.fullmatch(path.name))}
    if not found:
        raise UserError(f"{run_dir} holds no network-snapshot-….safetensors; a run writes one every --snap ticks")
    return dict(sorted(found.items()))


def evaluate(
    paths: dict[int, Path],
    options: SamplerOptions,
    seeds: Sequence[int],
    reference: Reference,
    extractor: Extractor,
    precision: str,
    out: Path,
) -> list[dict[str, Any]]:
    """A record for every snapshot, in order; those that `out` holds already are not computed again.

    Args:
        paths: students by kimg.
        precision: of the students.
        out: JSON lines.
    """
    facts = {"seeds": describe_seeds(seeds), "precision_of_samples": precision, **reference.facts}
    found = []
    for kimg, path in paths.items():
        key = {**facts, "snapshot": path.name, "kimg": kimg, "N": len(seeds), **options.chosen()}
        key |= {"snapshot_sha256": distributed.on_first_rank(partial(sha256_of, path)), **extractor.detector.identity()}
        result = distributed.on_first_rank(partial(find_record, out, key))
        if result is None:
            opened = open_sampler(str(path), None, options, extractor.detector.device, PRECISIONS[precision])
            made = extractor.sampled(opened.sampler, seeds, desc=path.stem)
            shown = {"images": opened.name, **key}
            result = record_distance(made, reference.features, extractor.detector, shown, out)
        found.append(result)
    return found


class Evaluation:
    """Along a training run: the Fréchet distance of its snapshots, as `fid.py curve` computes it.

    Args:
        every: of so many snapshots one is evaluated, and the last one.
        ref: as for `fid.py`, images or statistics.
        detector: name or path.
        num: images; seeds 0 to num − 1.

    Raises:
        UserError: a reference or detector that cannot be used, before the run begins.
    """

    def __init__(self, every: int, ref: str, detector: str, num: int, device: torch.device, precision: str) -> None:
        check_detector(detector)
        open_ref = open_reference(ref, statistics=True)
        self.every, self.seeds, self.precision, self.seen = every, range(num), precision, 0
        self.extractor = Extractor(load_detector(detector, device), EVALUATION_BATCH, workers=0)
        source = open_ref()
        self.reference = Reference(ref, source, self.extractor.reference(source, keep=False))

    def __call__(self, path: Path, is_last: bool = False) -> str | None:
        """Evaluate a snapshot if it is its turn, every rank its share; returns a line that says the result."""
        self.seen += 1
        match = SNAPSHOT.fullmatch(path.name)
        if match is None or (self.seen % self.every and not is_last):
            return None
        how = (SamplerOptions(), self.seeds, self.reference, self.extractor, self.precision)
        (found,) = evaluate({int(match[1]): path}, *how, path.parent / "metrics.jsonl")
        return f"{found['metric']} {found['value']:g} of {len(self.seeds)} images at kimg {found['kimg']}"
