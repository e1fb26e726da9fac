"""Precision, recall, density and coverage of images against reference images."""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

from pathlib import Path
from typing import Any

import click
import torch
from numpy.typing import ArrayLike

from dnnlib import UserError, one_line_errors
from dnnlib.options import Group, section
from fid import detector_options, machine_options, open_extractor, record_options, show_plan
from torch_utils import distributed
from torch_utils.metrics.prdc import precision_recall_density_coverage
from training.evaluation.records import append_records
from training.evaluation.sources import fingerprint, locate, split_blocks


def compute_prdc(
    real: ArrayLike, fake: ArrayLike, nearest_k: int = 5, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of feature sets `[N, D]` and `[M, D]`.

    Precision is the share of fake features inside a real ball, recall the share of real ones inside a fake ball; a ball
    reaches to the k-th neighbour in its own set, and its surface is outside.

    Raises:
        ValueError: shapes that do not fit, nearest_k or fewer features, or numbers that are not finite.
    """
    return precision_recall_density_coverage(real, fake, nearest_k, device)


@click.group(cls=Group)
def main() -> None:
    """Precision, recall, density and coverage; `prdc.py calc --help` has options and examples."""


@main.command()
@section("What to compare")
@click.option("--images", help="Folder (searched in depth), zip or npz of images, or .npz of features", metavar="PATH",
              required=True)  # fmt: skip
@click.option("--images_ref", help="Real images, given alike; or emoji32 for those of this program", metavar="PATH",
              required=True)  # fmt: skip
@click.option("--num", help="Images to use of each set, chosen by --seed; a smaller reference is used whole",
              type=click.IntRange(min=2), default=5000)  # fmt: skip
@click.option("--seed", help="Choice of the images", type=click.IntRange(min=0), default=0)
@section("How")
@click.option("--nearest_k", help="Neighbours that a ball reaches to", type=click.IntRange(min=1), default=5)
@detector_options
@section("Record")
@record_options
@section("Machine")
@machine_options
def calc(images: str, images_ref: str, num: int, seed: int, nearest_k: int, **opts: Any) -> None:
    """Compare images with reference images.

    \b
    Examples:
      python prdc.py calc --images=samples/ --images_ref=cifar10-32x32.zip
      torchrun --standalone --nproc_per_node=4 -- prdc.py calc --images=samples.zip --images_ref=data/ --num=50000
    """
    if num <= nearest_k:
        raise UserError(f"--num={num} is too few for --nearest_k={nearest_k}; give at least {nearest_k + 1}")
    if opts["dry_run"]:
        show_plan(images=images, images_ref=images_ref, num=num, seed=seed, nearest_k=nearest_k,
                  detector=opts["detector"])  # fmt: skip
        return
    extractor = open_extractor(opts, opts["features"])
    ref_path = distributed.on_first_rank(lambda: locate(images_ref))
    blocks = split_blocks(extractor.count(Path(images)), num, [seed], trials=1)
    ref_count = extractor.count(ref_path)
    ref_block = split_blocks(ref_count, min(num, ref_count), [seed], trials=1)[0]
    if len(ref_block) <= nearest_k:
        raise UserError(f"{images_ref} has {ref_count} images, too few for --nearest_k={nearest_k}")
    fake = extractor.blocks(Path(images), blocks, keep=True, moments=False)[0]
    real = extractor.without_cache().blocks(ref_path, [ref_block], keep=True, moments=False)[0]

    def work() -> None:
        values = compute_prdc(real.features, fake.features, nearest_k, extractor.detector.device)
        for name, value in values.items():
            click.echo(f"{name} {value:g}")
        published = extractor.detector.label == "FID"
        facts = dict(metric="PRDC" if published else f"PRDC({extractor.detector.name})", value=values, N=fake.count,
                     images=images, seed=seed, nearest_k=nearest_k, reference=images_ref, reference_N=real.count,
                     reference_sha256=fingerprint(ref_path), desc=opts["desc"])  # fmt: skip
        append_records(opts["out"], [{**facts, **extractor.detector.identity()}])

    distributed.on_first_rank(work)
    distributed.shutdown()


if __name__ == "__main__":
    one_line_errors(main)()
