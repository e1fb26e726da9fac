"""Fréchet inception distance (FID), kernel inception distance (KID), inception score; of images or of a sampler."""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import ArrayLike

from dnnlib import UserError, make_folder, one_line_errors
from dnnlib.options import Group, Whole, precision_option, section
from dnnlib.progress import say
from models.detectors import Detector
from models.detectors.clip_score import DEFAULT as CLIP
from models.detectors.clip_score import ClipScorer, clip_score
from models.opening import open_sampler, plan_sampler
from models.paths import find_student
from models.prompts import read_prompts
from models.sampling import SamplerOptions
from torch_utils import distributed
from torch_utils.arrays import write_arrays
from torch_utils.device import PRECISIONS, pick_device, pick_precision
from torch_utils.image_writer import refuse_samples
from torch_utils.metrics.features import FeatureSet
from torch_utils.metrics.frechet import frechet_distance
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.metrics.kernel import kernel_distance
from training.evaluation import comparison
from training.evaluation.clip import all_cosines, match_captions
from training.evaluation.commands import (
    check,
    check_outputs,
    describe_reference,
    finish,
    join,
    missing_paths,
    open_extractor,
)
from training.evaluation.curve import evaluate
from training.evaluation.figures import can_draw, draw_by_kimg
from training.evaluation.functions import Images, feature_sets
from training.evaluation.records import append_records
from training.evaluation.results import check_metrics, needs
from training.evaluation.sources import open_images, open_reference, split_blocks
from training.options import (
    also_option,
    compared_seeds_option,
    describe_seeds,
    detector_options,
    figure_option,
    images_option,
    machine_options,
    metrics_option,
    num_steps_option,
    parse_ints,
    parse_npz,
    record_options,
    ref_option,
    sample_options,
    sampler_options,
    seed_blocks,
    show_plan,
    solver_options,
    teacher_option,
)
from training.runs import find_run, snapshots


def calculate_fid(mu: ArrayLike, sigma: ArrayLike, mu_ref: ArrayLike, sigma_ref: ArrayLike) -> float:
    """FID from means `[D]` and covariances `[D, D]`: |μ − μᵣ|² + tr Σ + tr Σᵣ − 2 tr (Σ Σᵣ)^½, finite and ≥ 0.

    Raises:
        ValueError: shapes that do not fit together, or numbers that are not finite.
    """
    return frechet_distance(mu, sigma, mu_ref, sigma_ref)


def compute_fid(images: Images, reference: Images, detector: str | Path | Detector = "inception", **how: Any) -> float:
    """Fréchet distance of two sets of images; with the detector `inception` this is the FID.

    Args:
        images: folder, archive or file of images (or features), or uint8 `[N, H, W, C]` in memory.
        reference: the same; or statistics, a URL, or a registered name such as `cifar10`.
        detector: name, path of weights, or a detector of `models.detectors.load_detector`.
        how: `resize`, `batch`, `workers`, `device` of `training.evaluation.functions.feature_sets`.

    Raises:
        UserError: images, reference or detector that cannot be used, in one line.
    """
    found, expected = feature_sets(images, reference, False, detector, **how)
    return frechet_distance(found.mu, found.sigma, expected.mu, expected.sigma)


def compute_kid(images: Images, reference: Images, detector: str | Path | Detector = "inception", **how: Any) -> float:
    """Kernel distance of two sets of images, the mean over subsets; arguments as for `compute_fid`, no statistics."""
    found, expected = feature_sets(images, reference, True, detector, **how)
    return kernel_distance(found.features, expected.features).mean


# ------------------------------------------------------------------------------------------------------------------
# Commands


@click.group(cls=Group)
def main() -> None:
    """FID, KID, inception score, CLIP score; `fid.py COMMAND --help` has options and examples."""


@main.command()
@section("What to compare")
@images_option
@ref_option
@click.option("--num", help="Images to use, chosen by --seed; default: all", type=Whole(2, 10**9))
@click.option("--seed", help="Choice of --num images; several make as many trials", metavar="LIST", default="0",
              callback=parse_ints)  # fmt: skip
@click.option("--trials", help="Split the images, in the order of their names, into so many blocks (of --num)",
              type=Whole(1, 10_000), default=1)  # fmt: skip
@section("How")
@metrics_option
@detector_options
@section("Record")
@record_options
@section("Machine")
@machine_options
def calc(images: str, ref: str, num: int | None, seed: list[int], trials: int, **opts: Any) -> None:
    """Distance of images from a reference.

    \b
    Examples:
      python fid.py calc --images=samples/ --ref=cifar10
      python fid.py calc --images=samples.zip --ref=my-dataset.zip --metrics=fid,kid --detector=efficientnet-lite0
    """
    keep, moments, keep_ref = needs(opts["metrics"])
    plan = {"images": images, "num": num, "seed": seed, "trials": trials, "ref": ref}
    plan |= {"metrics": opts["metrics"], "detector": opts["detector"]}
    if opts["dry_run"] and (missing := missing_paths(images, ref)):
        return show_plan(**plan, missing=missing)
    source, open_ref = open_images(images), open_reference(ref, statistics=not keep_ref)
    blocks = split_blocks(len(source), num, seed, trials)
    check(source)
    if opts["dry_run"]:
        return show_plan(**plan | {"found": len(source), "num": len(blocks[0])})
    extractor = open_extractor(opts)
    check_metrics(opts["metrics"], extractor.detector)
    reference = describe_reference(ref, open_ref, extractor, keep_ref, moments)
    sets = extractor.describe(source, blocks, keep, moments, opts["features"])
    finish(sets, reference, extractor, dict(images=images, seed=seed), opts)


@main.command()
@section("What to describe")
@click.option("--data", help="Folder, zip or npz of images", metavar="PATH", required=True)
@click.option("--dest", help="Where to write mu and sigma", metavar="NPZ", required=True, callback=parse_npz)
@click.option("--features", help="Keep the features too, for kid and prdc.py; used again if it fits", metavar="NPZ",
              callback=parse_npz)  # fmt: skip
@section("How")
@detector_options
@section("Machine")
@machine_options
def ref(data: str, dest: str, **opts: Any) -> None:
    """Reference statistics of a data set.

    \b
    Examples:
      python fid.py ref --data=my-dataset.zip --dest=my-dataset.npz
    """
    plan = {"data": data, "dest": dest, **{name: opts[name] for name in ("features", "detector", "resize")}}
    if opts["dry_run"] and (missing := missing_paths(data)):
        return show_plan(**plan, missing=missing)
    source = open_images(data)
    check(source)
    if opts["dry_run"]:
        return show_plan(**plan, found=len(source))
    check_outputs(dest=dest)
    extractor = open_extractor(opts)
    found = extractor.describe(source, [np.arange(len(source))], keep=False, cache=opts["features"])[0]
    meta = {"num": len(source), **extractor.detector.identity()}
    distributed.on_first_rank(lambda: write_arrays(dest, meta, mu=found.mu, sigma=found.sigma))
    say(f"Wrote mu and sigma of {len(source)} images to {dest}")
    distributed.shutdown()


@main.command()
@sample_options
@solver_options
@section("What to compare")
@ref_option
@click.option("--trials", help="Repeat with as many following blocks of seeds", type=Whole(1, 10_000), default=1)
@section("How")
@metrics_option
@detector_options
@section("Record")
@record_options
@section("Machine")
@precision_option
@machine_options
def gen(model_path: str, seeds: list[int], class_index: int | None, ref: str, trials: int, **opts: Any) -> None:
    """Sample and evaluate in one go, without writing images; samplers are described as for sample.py.

    \b
    Examples:
      torchrun --standalone --nproc_per_node=4 fid.py gen --model_path=0 --seeds=0-49999 --ref=cifar10
      python fid.py gen --model_path=teacher --dataset_name=cifar10 --seeds=0-49999 --trials=3 --ref=cifar10
    """
    device = pick_device(opts["device"])
    precision = pick_precision(opts["precision"], device)
    choices = sampler_options(opts)
    blocks = seed_blocks(seeds, trials)
    if trials > 1 and opts["features"]:
        raise UserError("--features holds the images of one evaluation; leave it or --trials out")
    keep, moments, keep_ref = needs(opts["metrics"])
    if opts["dry_run"]:
        plan = dict(model_path=model_path, images=len(seeds), trials=trials, ref=ref, metrics=opts["metrics"])
        sampling = plan_sampler(model_path, opts["dataset_name"], choices)
        plan["nfe"] = None if sampling is None else sampling.nfe
        plan |= {**choices.chosen(), "detector": opts["detector"], "precision": precision, "device": str(device)}
        return show_plan(**plan, missing=missing_paths(ref))
    open_ref = open_reference(ref, statistics=not keep_ref)
    dtype, teacher_path = PRECISIONS[precision], opts["teacher_path"]
    opened = open_sampler(model_path, opts["dataset_name"], choices, device, dtype, teacher_path)
    opened.sampler.model.check_class(class_index)
    extractor = open_extractor(opts)
    check_metrics(opts["metrics"], extractor.detector)
    reference = describe_reference(ref, open_ref, extractor, keep_ref, moments)
    identity = {**opened.identity, "nfe": opened.sampler.nfe, "class": class_index, "precision": precision}
    sampled = partial(extractor.sampled, opened.sampler, class_index=class_index, desc=opened.name)
    if opts["features"] is None:
        sets = [sampled(block, keep=keep, moments=moments) for block in blocks]
    else:
        made_of = {"sampler": identity, "seeds": describe_seeds(seeds)}
        features = extractor.cached(opts["features"], made_of, lambda: sampled(seeds, keep=True, moments=False))
        sets = [FeatureSet.from_features(features, moments)]
    record = dict(images=opened.name, sampler=identity, seeds=describe_seeds(seeds))
    finish(sets, reference, extractor, record, opts)


@main.command()
@section("What to compare")
@click.option("--model_path", help="Student: file, run directory or run number", metavar="PATH", required=True)
@also_option
@teacher_option
@compared_seeds_option
@click.option("--ref", help="Reference images or their features; emoji32 for those of this program", metavar="PATH",
              required=True)  # fmt: skip
@click.option("--nearest_k", help="Neighbours that a ball of precision and recall reaches to",
              type=Whole(1, 1000), default=5)  # fmt: skip
@section("Where to")
@click.option("--outdir", help="Folder for metrics.jsonl, .md, .csv, .tex and .png; default: that of the student",
              metavar="DIR")  # fmt: skip
@figure_option
@section("How")
@detector_options
@click.option("--recompute", help="Compute all anew, also what ships with this program or stands in metrics.jsonl",
              is_flag=True)  # fmt: skip
@section("Machine")
@precision_option
@machine_options
def compare(
    model_path: str, also: tuple[str, ...], seeds: list[int], ref: str, nearest_k: int, outdir: str | None, **opts: Any
) -> None:
    """FID and PRDC of a student, its teacher and training-free solvers, for the same seeds: tables and a plot.

    A second run of the same command computes only what is missing.

    \b
    Examples:
      python fid.py compare --model_path=0 --ref=emoji32 --detector=efficientnet-lite0
      python fid.py compare --model_path=0 --also=1 --also=2 --ref=emoji32 --detector=efficientnet-lite0
    """
    device = pick_device(opts["device"])
    precision = pick_precision(opts["precision"], device)
    if len(seeds) <= nearest_k:
        raise UserError(f"{len(seeds)} --seeds are too few for --nearest_k={nearest_k}; give more")
    place = Path(outdir) if outdir else find_student(model_path).parent
    if opts["dry_run"]:
        return show_plan(model_path=model_path, also=[*also], images=len(seeds), ref=ref, outdir=str(place),
                         detector=opts["detector"], precision=precision, device=str(device),
                         missing=missing_paths(ref))  # fmt: skip
    open_ref = open_reference(ref, statistics=False)
    refuse_samples(place)
    distributed.on_first_rank(lambda: make_folder(place, "outdir"))
    how = SamplerOptions(), device, PRECISIONS[precision], opts["teacher_path"]
    student, *others = (open_sampler(path, None, *how) for path in (model_path, *also))
    rows = comparison.samplers(student, precision, others)
    extractor = open_extractor(opts)
    reference = describe_reference(ref, open_ref, extractor, keep=True)
    known = () if opts["recompute"] else (place / "metrics.jsonl", comparison.SHIPPED)
    results = comparison.compare(rows, seeds, reference, nearest_k, extractor, place / "metrics.jsonl", known)

    def show_all() -> None:
        paths = comparison.write(results, place, opts["figure"] or place / "metrics.png")
        click.echo(paths[0].read_text(encoding="utf-8"))
        click.echo("Wrote " + ", ".join(map(str, paths)))

    distributed.on_first_rank(show_all)
    distributed.shutdown()


@main.command()
@section("What to score")
@images_option
@click.option("--captions", help="File of captions as --prompts takes it: number i is of the image of seed i, or the "
              "i-th of other names", metavar="TXT|CSV", required=True)  # fmt: skip
@section("How")
@click.option("--model", help=f"CLIP model: {CLIP}, or a folder of transformers with model.safetensors",
              metavar="NAME|DIR", default=CLIP)  # fmt: skip
@section("Record")
@click.option("--desc", help="Text for the record", metavar="STR")
@click.option("--out", help="File that gets a JSON line", metavar="JSONL", default="metrics.jsonl")
@section("Machine")
@machine_options
def clip(images: str, captions: str, model: str, desc: str | None, out: str, **opts: Any) -> None:
    """CLIP score of images and the captions that they were made from; needs transformers.

    \b
    Examples:
      python fid.py clip --images=samples/ --captions=captions.txt
    """
    if opts["dry_run"]:
        return show_plan(images=images, captions=captions, model=model, missing=missing_paths(images, captions))
    check_outputs(out=out)
    source, texts = ImageDataset(images), read_prompts(captions)
    matched = match_captions(source.names, texts)
    check(source)
    scorer = ClipScorer(model, join(opts["device"]))
    value, error = clip_score(all_cosines(source, matched, scorer, opts["batch"], opts["workers"]))

    def work() -> None:
        click.echo(f"CLIP score {value:g} ± {error:g}")
        digest = hashlib.sha256("\n".join(matched).encode()).hexdigest()
        facts = {"metric": "CLIP score", "value": value, "standard_error": error, "N": len(source), "images": images}
        facts |= {"captions": captions, "captions_sha256": digest, "model": scorer.name, "model_sha256": scorer.sha256}
        append_records(out, [{**facts, "desc": desc}])

    distributed.on_first_rank(work)
    distributed.shutdown()


@main.command()
@click.argument("run", metavar="RUN")
@section("What to compare")
@compared_seeds_option
@ref_option
@num_steps_option
@section("Where to")
@click.option("--out", help="JSON lines, one for a snapshot; default: metrics.jsonl of the run", type=Path,
              metavar="JSONL")  # fmt: skip
@figure_option
@section("How")
@detector_options
@section("Machine")
@precision_option
@machine_options
def curve(run: str, seeds: list[int], ref: str, num_steps: int | None, **opts: Any) -> None:
    """FID of every snapshot of a run (a directory, or a number under ./exps) against kimg: a line each, and a plot.

    A second run of the same command computes only what is missing, so it can follow a run that trains.

    \b
    Examples:
      python fid.py curve 0 --ref=emoji32 --detector=efficientnet-lite0
    """
    device = pick_device(opts["device"])
    precision = pick_precision(opts["precision"], device)
    place = find_run(run)
    paths = snapshots(place)
    out = opts["out"] or place / "metrics.jsonl"
    if opts["dry_run"]:
        return show_plan(run=str(place), snapshots=[path.name for path in paths.values()], images=len(seeds), ref=ref,
                         out=str(out), detector=opts["detector"], precision=precision, device=str(device),
                         missing=missing_paths(ref))  # fmt: skip
    open_ref = open_reference(ref, statistics=True)
    extractor = open_extractor({**opts, "out": out})
    reference = describe_reference(ref, open_ref, extractor, keep=False)
    results = evaluate(paths, SamplerOptions(num_steps=num_steps), seeds, reference, extractor, precision, out)

    def show_all() -> None:
        for result in results:
            click.echo(f"{result['kimg']} kimg: {result['metric']} {result['value']:g}")
        if not can_draw():
            return
        figure = opts["figure"] or place / "fd-kimg.png"
        draw_by_kimg([{**result, "series": place.name} for result in results], figure)
        click.echo(f"Plot: {figure}")

    distributed.on_first_rank(show_all)
    distributed.shutdown()


if __name__ == "__main__":
    one_line_errors(main)()
