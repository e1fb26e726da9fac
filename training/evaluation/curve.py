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
from torch_utils.metrics.features import FeatureSet, extract
from torch_utils.metrics.frechet import frechet_distance

from .extractor import Extractor
from .records import append_records, find_record
from .sources import open_reference, seeded_batches

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
    reference: FeatureSet,
    extractor: Extractor,
    dtype: torch.dtype,
    facts: dict[str, Any],
    out: Path,
) -> list[dict[str, Any]]:
    """A record for every snapshot, in order; those that `out` holds already are not computed again.

    Args:
        paths: students by kimg.
        facts: what else determines a result; recorded with it.
        out: JSON lines.
    """
    found = []
    for kimg, path in paths.items():
        key = {**facts, "snapshot": path.name, "kimg": kimg, "N": len(seeds), **options.chosen()}
        key |= {"snapshot_sha256": distributed.on_first_rank(partial(sha256_of, path)), **extractor.detector.identity()}
        result = distributed.on_first_rank(partial(find_record, out, key))
        if result is None:
            opened = open_sampler(str(path), None, options, extractor.detector.device, dtype)
            batches = seeded_batches(opened.sampler, seeds, None, extractor.batch)
            made = extract(batches, extractor.detector, len(seeds), desc=path.stem)
            result = distributed.on_first_rank(partial(_judge, made, reference, key, extractor, opened.name, out))
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
        self.every, self.seeds, self.dtype, self.seen = every, range(num), PRECISIONS[precision], 0
        self.extractor = Extractor(load_detector(detector, device), EVALUATION_BATCH, workers=0)
        source = open_ref()
        self.reference = self.extractor.reference(source, keep=False)
        self.facts: dict[str, Any] = {"seeds": f"0-{num - 1}", "precision_of_samples": precision, "reference": ref}
        self.facts |= {"reference_N": self.reference.count}
        self.facts["reference_sha256"] = distributed.on_first_rank(source.fingerprint)

    def __call__(self, path: Path, is_last: bool = False) -> str | None:
        """Evaluate a snapshot if it is its turn, every rank its share; returns a line that says the result."""
        self.seen += 1
        match = SNAPSHOT.fullmatch(path.name)
        if match is None or (self.seen % self.every and not is_last):
            return None
        options, out = SamplerOptions(), path.parent / "metrics.jsonl"
        (found,) = evaluate({int(match[1]): path}, options, self.seeds, self.reference, self.extractor, self.dtype,
                            self.facts, out)  # fmt: skip
        return f"{found['metric']} {found['value']:g} of {len(self.seeds)} images at kimg {found['kimg']}"


def _judge(
    made: FeatureSet, reference: FeatureSet, key: dict[str, Any], extractor: Extractor, name: str, out: Path
) -> dict[str, Any]:
    value = frechet_distance(made.mu, made.sigma, reference.mu, reference.sigma)
    result = {"metric": extractor.detector.label, "value": value, "images": name, **key}
    append_records(out, [result])
    return result
