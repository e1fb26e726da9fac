"""A run's snapshots one after the other: Fréchet distance against kimg, resumable, one line of `metrics.jsonl` each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dnnlib import sha256_of
from models.detectors import load_detector
from models.opening import open_sampler
from models.sampling import SamplerOptions
from torch_utils import distributed
from torch_utils.device import PRECISIONS

from ..cost import training_cost
from ..options import describe_seeds
from ..runs import snapshot_name
from .commands import record_distance
from .extractor import Extractor, Reference
from .records import find_record
from .sources import open_reference

#: Images at a time of an evaluation along a training run.
EVALUATION_BATCH = 64


def evaluate(
    paths: dict[int, Path],
    options: SamplerOptions,
    seeds: Sequence[int],
    reference: Reference,
    extractor: Extractor,
    precision: str,
    out: Path,
) -> list[dict[str, Any]]:
    """A record for every snapshot, in order, and what its training took; none that `out` holds is computed again.

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
            cost = distributed.on_first_rank(partial(training_cost, path))
            shown = {"images": opened.name, **key, **cost}
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
        open_ref = open_reference(ref, statistics=True)
        self.every, self.seeds, self.precision = every, range(num), precision
        self.extractor = Extractor(load_detector(detector, device), EVALUATION_BATCH, workers=0)
        source = open_ref()
        self.reference = Reference(ref, source, self.extractor.reference(source, keep=False))

    def __call__(self, run_dir: Path, images: int) -> str:
        """Evaluate the snapshot at `images`, every rank its share; returns a line for the log."""
        how = (SamplerOptions(), self.seeds, self.reference, self.extractor, self.precision)
        (found,) = evaluate({images // 1000: run_dir / snapshot_name(images)}, *how, run_dir / "metrics.jsonl")
        return f"{found['metric']} {found['value']:g} of {len(self.seeds)} images at kimg {found['kimg']}"
