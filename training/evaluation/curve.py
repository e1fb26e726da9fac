"""A run's snapshots one after the other: Fréchet distance against kimg, resumable, one line of `metrics.jsonl` each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, sha256_of
from models.sampling import SamplerOptions, open_sampler
from torch_utils import distributed
from torch_utils.metrics.features import FeatureSet, extract
from torch_utils.metrics.frechet import frechet_distance

from .extractor import Extractor
from .records import append_records, find_record
from .sources import seeded_batches

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
        key = {**facts, "snapshot": path.name, "kimg": kimg, "N": len(seeds), **options.given()}
        key |= {"snapshot_sha256": distributed.on_first_rank(partial(sha256_of, path)), **extractor.detector.identity()}
        result = distributed.on_first_rank(partial(find_record, out, key))
        if result is None:
            opened = open_sampler(str(path), None, options, extractor.detector.device, dtype)
            batches = seeded_batches(opened.sampler, seeds, None, extractor.batch)
            made = extract(batches, extractor.detector, len(seeds), desc=path.stem)
            result = distributed.on_first_rank(partial(_judge, made, reference, key, extractor, opened.name, out))
        found.append(result)
    return found


def _judge(
    made: FeatureSet, reference: FeatureSet, key: dict[str, Any], extractor: Extractor, name: str, out: Path
) -> dict[str, Any]:
    value = frechet_distance(made.mu, made.sigma, reference.mu, reference.sigma)
    result = {"metric": extractor.detector.label, "value": value, "images": name, **key}
    append_records(out, [result])
    return result
