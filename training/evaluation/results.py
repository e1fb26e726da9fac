"""From feature sets to results: a metric of one or several trials as fields of a record, and as lines on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import numpy as np

from dnnlib import UserError
from models.detectors import Detector
from torch_utils.metrics.features import FeatureSet
from torch_utils.metrics.frechet import frechet_distance
from torch_utils.metrics.inception_score import inception_score
from torch_utils.metrics.kernel import kernel_distance

#: Name in `--metrics` → whether it needs the features of the images, and those of the reference, rather than moments.
METRICS = {"fid": (False, False), "kid": (True, True), "is": (True, False)}


def needs(metrics: Sequence[str]) -> tuple[bool, bool, bool]:
    """Whether features of images are needed, moments of both sides, and features of the reference."""
    images, reference = (any(METRICS[name][side] for name in metrics) for side in (0, 1))
    return images, "fid" in metrics, reference


def check_metrics(metrics: Sequence[str], detector: Detector) -> None:
    """Refuse what a detector cannot give."""
    if "is" in metrics and detector.class_weights is None:
        raise UserError(
            f"--metrics=is needs class logits, and {detector.name} has none: choose --detector=inception, or metrics "
            "of the features; expected a list of fid, kid"
        )


def judge(sets: Sequence[FeatureSet], reference: FeatureSet, metric: str, detector: Detector) -> dict[str, Any]:
    """One metric of every set, against the reference where it needs one, as fields of a record."""
    published = detector.label == "FID"
    if metric == "is":
        assert detector.class_weights is not None  # check_metrics refuses others
        scores = [inception_score(s.features, detector.class_weights) for s in sets]
        label = "IS" if published else f"IS({detector.name})"
        return {"metric": label, **summarise([s[0] for s in scores], max), "split_std": [s[1] for s in scores]}
    if metric == "kid":
        found = [kernel_distance(s.features, reference.features) for s in sets]
        spread = {"subset_std": [k.std for k in found], "subset_size": found[0].subset_size}
        return {
            "metric": "KID" if published else f"KD({detector.name})",
            **summarise([k.mean for k in found]),
            **spread,
        }
    values = [frechet_distance(s.mu, s.sigma, reference.mu, reference.sigma) for s in sets]
    return {"metric": detector.label, **summarise(values)}


def summarise(values: Sequence[float], best: Any = min) -> dict[str, Any]:
    """One value, or the best of several (as EDM reports) with mean and standard deviation."""
    if len(values) == 1:
        return {"value": values[0]}
    spread = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}
    return {"value": best(values), **spread, "trials": list(values)}


def show(result: dict[str, Any]) -> None:
    """The bare number for FID, as EDM prints it; anything else with its name."""
    name = result["metric"]
    if "trials" not in result:
        deviation = result.get("subset_std") or result.get("split_std")
        spread = f" ± {deviation[0]:g}" if deviation else ""
        click.echo(f"{result['value']:g}" if name == "FID" else f"{name} {result['value']:g}{spread}")
        return
    click.echo(f"{name} of {len(result['trials'])} trials: " + ", ".join(f"{value:g}" for value in result["trials"]))
    click.echo(f"{name} mean {result['mean']:g} ± {result['std']:g}")
    click.echo(f"{name} {'maximum' if result['value'] == max(result['trials']) else 'minimum'} {result['value']:g}")
