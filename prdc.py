"""Precision, recall, density and coverage of images against reference images."""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

from pathlib import Path
from typing import Any

import click
import torch

from dnnlib import UserError, one_line_errors
from dnnlib.options import SEED, Group, Whole, section
from dnnlib.progress import say
from models.detectors import Detector
from torch_utils import distributed
from torch_utils.metrics.features import choose
from torch_utils.metrics.prdc import precision_recall_density_coverage
from training.evaluation.commands import check, missing_paths, open_extractor
from training.evaluation.functions import Images, as_features, feature_sets
from training.evaluation.records import append_records
from training.evaluation.sources import open_images, open_reference
from training.options import detector_options, images_option, machine_options, record_options, show_plan

#: Images of each set, where there are so many.
DEFAULT_NUM = 5000


def compute_prdc(
    real: Images,
    fake: Images,
    nearest_k: int = 5,
    device: torch.device | str = "cpu",
    detector: str | Path | Detector = "inception",
    **how: Any,
) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of two sets of features, or of images.

    Precision is the share of fake features inside a real ball, recall the share of real ones inside a fake ball; a ball
    reaches to the k-th neighbour in its own set, and its surface is outside.

    Args:
        real, fake: features `[N, D]` and `[M, D]`; or images, as for `fid.compute_fid`.
        detector, how: for images, as for `fid.compute_fid`.

    Raises:
        ValueError: shapes that do not fit, nearest_k or fewer features, or numbers that are not finite.
        UserError: images or a detector that cannot be used.
    """
    real_features, fake_features = as_features(real), as_features(fake)
    if real_features is None or fake_features is None:
        found, expected = feature_sets(fake, real, True, detector, device=device, **how)
        return precision_recall_density_coverage(expected.features, found.features, nearest_k, device)
    return precision_recall_density_coverage(real_features, fake_features, nearest_k, device)


@click.group(cls=Group)
def main() -> None:
    """Precision, recall, density and coverage; `prdc.py calc --help` has options and examples."""


@main.command()
@section("What to compare")
@images_option
@click.option("--images_ref", help="Real images, given alike; or emoji32 for those of this program", metavar="PATH",
              required=True)  # fmt: skip
@click.option("--num", help="Images to use of each set, chosen by --seed; a smaller reference is used whole; "
              "default: 5000, or all where there are fewer", type=Whole(2, 10**9))  # fmt: skip
@click.option("--seed", help="Choice of the images", type=SEED, default=0)
@section("How")
@click.option("--nearest_k", help="Neighbours that a ball reaches to", type=Whole(1, 1000), default=5)
@detector_options
@section("Record")
@record_options
@section("Machine")
@machine_options
def calc(images: str, images_ref: str, num: int | None, seed: int, nearest_k: int, **opts: Any) -> None:
    """Compare images with reference images.

    \b
    Examples:
      python prdc.py calc --images=samples/ --images_ref=cifar10-32x32.zip
      torchrun --standalone --nproc_per_node=4 -- prdc.py calc --images=samples.zip --images_ref=data/ --nearest_k=3
    """
    if num is not None and num <= nearest_k:
        raise UserError(f"--num={num} is too few for --nearest_k={nearest_k}; give at least {nearest_k + 1}")
    plan = {"images": images, "images_ref": images_ref, "num": num, "seed": seed, "nearest_k": nearest_k}
    if opts["dry_run"] and (missing := missing_paths(images, images_ref)):
        return show_plan(**plan, detector=opts["detector"], missing=missing)
    source, open_ref = open_images(images), open_reference(images_ref, statistics=False)
    check(source)
    count = min(DEFAULT_NUM, len(source)) if num is None else num
    if count <= nearest_k:
        raise UserError(f"{images} has {count} images, too few for --nearest_k={nearest_k}")
    chosen = choose(len(source), count, seed)
    if opts["dry_run"]:
        return show_plan(**plan | {"num": count}, detector=opts["detector"], found=len(source))
    if num is None and count < DEFAULT_NUM:
        say(f"{images} has {count} images: all are used; compare the numbers only with those of {count} images")
    extractor = open_extractor(opts)
    real_source = open_ref()
    check(real_source)
    ref_count = min(count, len(real_source))
    if ref_count <= nearest_k:
        raise UserError(f"{images_ref} has {ref_count} images, too few for --nearest_k={nearest_k}")
    fake = extractor.describe(source, [chosen], keep=True, moments=False, cache=opts["features"])[0]
    real = extractor.describe(real_source, [choose(len(real_source), ref_count, seed)], keep=True, moments=False)[0]

    def work() -> None:
        values = compute_prdc(real.features, fake.features, nearest_k, extractor.detector.device)
        published = extractor.detector.label == "FID"
        facts = dict(metric="PRDC" if published else f"PRDC({extractor.detector.name})", value=values, N=fake.count,
                     images=images, seed=seed, nearest_k=nearest_k, reference=images_ref, reference_N=real.count,
                     reference_sha256=real_source.fingerprint(), desc=opts["desc"])  # fmt: skip
        append_records(opts["out"], [{**facts, **extractor.detector.identity()}])
        for name, value in values.items():
            click.echo(f"{name} {value:g}")

    distributed.on_first_rank(work)
    distributed.shutdown()


if __name__ == "__main__":
    one_line_errors(main)()
