"""Write images, one for each seed, from a distilled student or from a teacher with any solver."""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dnnlib import UserError, make_folder, one_line_errors, write_text
from dnnlib.options import Command, Whole, device_option, offline_option, precision_option, section
from dnnlib.progress import progress
from models.latent import DECODE_PRECISIONS, pick_decode_precision
from models.opening import ComparedSampler, OpenedSampler, named_students, open_sampler, plan_sampler, rivals
from models.sampling import Sampler
from torch_utils import distributed
from torch_utils.device import PRECISIONS, configure_backends, pick_device, pick_precision
from torch_utils.graphs import check_mode
from torch_utils.image_writer import ImageWriter, refuse_samples
from torch_utils.images import draw_grid, save_picture, square_rows
from training.options import (
    also_option,
    cuda_graph_option,
    dry_run_option,
    sample_options,
    sampler_options,
    show_plan,
    solver_options,
)

#: Pixels at the usual dots per inch: height of a line of text, its letters, and an image where small ones are enlarged.
LABEL, LETTERS, TILE, DPI = 16, 10, 64, 96


def write_images(sampler: Sampler, seeds: list[int], class_index: int | None, batch: int, writer: ImageWriter) -> int:
    """Sample and write what is not there yet, this rank its share; returns how many were missing."""
    missing = distributed.on_first_rank(lambda: writer.missing(seeds))
    share = missing[distributed.rank() :: distributed.world_size()]
    with progress(len(share), show=distributed.rank() == 0) as bar:
        done = 0
        for images in sampler.batches(share, class_index, batch):
            writer.write(share[done : done + len(images)], images)
            done += len(images)
            bar.update(len(images))
    writer.close(seeds)
    return len(missing)


def draw_sheet(rows: Sequence[np.ndarray], names: Sequence[str], columns: Sequence[str], dpi: int) -> Image.Image:
    """Rows of uint8 images `[N, H, W, C]` with names on their left and above the columns.

    Small images are enlarged by a whole number; labels have their size in inches, and are drawn at that resolution.
    """
    tiles = draw_grid(rows, scale=max(1, round(TILE * dpi / DPI / rows[0].shape[1])))
    font = ImageFont.load_default(LETTERS * dpi / DPI)
    label, edge = (math.ceil(pixels * dpi / DPI) for pixels in (LABEL, 4))
    height, width = tiles.height // len(rows), tiles.width // max(len(row) for row in rows)
    left, top = 2 * edge + math.ceil(max(map(font.getlength, names))), label if columns else 0
    sheet = Image.new("RGB", (left + tiles.width, top + tiles.height), "white")
    sheet.paste(tiles, (left, top))
    draw = ImageDraw.Draw(sheet)
    for r, name in enumerate(names):
        draw.text((edge, top + (r + 0.5) * height), name, "black", font, anchor="lm")
    for c, name in enumerate(columns):
        start = left + c * width + max(width - font.getlength(name), 0) / 2
        draw.text((start, label / 2), name, "black", font, anchor="lm")
    return sheet


def write_grid(sampler: Sampler, seeds: list[int], class_index: int | None, batch: int, outdir: Path, dpi: int) -> Path:
    """All images in one picture, `grid.png`; rows say which seeds they are of."""
    images = sampler.images(seeds, class_index, batch)
    make_folder(outdir, "outdir")
    rows = square_rows(images)
    parts = [seeds[i : i + len(rows[0])] for i in range(0, len(seeds), len(rows[0]))]
    names = [f"seed {part[0]}" if len(part) == 1 else f"seeds {part[0]} to {part[-1]}" for part in parts]
    save_picture(draw_sheet(rows, names, [], dpi), outdir / "grid.png", dpi)
    return outdir / "grid.png"


def write_comparison(
    student: OpenedSampler,
    also: Sequence[OpenedSampler],
    seeds: list[int],
    class_index: int | None,
    batch: int,
    outdir: Path,
    dpi: int,
) -> Path:
    """One sheet, `compare.png`: rows are samplers, columns seeds; `compare.md` has distances to the first row."""
    students, plan = named_students(student, also), student.sampler.plan
    same = plan.num_steps - 1 - plan.afs  # without AFS, so many steps give the evaluations of the student
    rows = rivals(student, [("euler", same), ("dpmpp", same), ("dpmpp", 5)])
    rows += [ComparedSampler(label, opened.sampler, opened.identity) for label, opened in students.items()]
    images = [row.sampler.images(seeds, class_index, batch) for row in rows]
    distances = [float(np.sqrt(np.square(image / 255.0 - images[0] / 255.0).mean())) for image in images]
    make_folder(outdir, "outdir")
    labels = [f"{row.label}, NFE {row.sampler.nfe}" for row in rows]
    columns = [f"seed {seed}" for seed in seeds]
    save_picture(draw_sheet(images, labels, columns, dpi), outdir / "compare.png", dpi)
    lines = ["| sampler | NFE | RMSE to the first row |", "|---|---|---|"]
    lines += [
        f"| {row.label} | {row.sampler.nfe} | {distance:.4f} |" for row, distance in zip(rows, distances, strict=True)
    ]
    write_text(outdir / "compare.md", "\n".join(lines) + "\n")
    click.echo("\n".join(lines))
    return outdir / "compare.png"


@click.command(cls=Command)
@sample_options
@section("Where to")
@click.option(
    "--outdir", help="Folder, or an archive x.zip; default: ./samples/<dataset>/<model>-nfe<n>, for pictures "
    "./pictures/<dataset>/<model>-nfe<n>", metavar="DIR|ZIP"
)  # fmt: skip
@click.option("--subdirs", help="A sub-folder for every 1000 seeds", is_flag=True)
@click.option("--grid", help="Write one picture grid.png of all seeds instead", type=bool, default=False)
@click.option("--compare", help="Student: write one sheet compare.png of teacher, other solvers and student instead",
              type=bool, default=False)  # fmt: skip
@also_option
@click.option("--dpi", help="Dots per inch of a picture, 300 for papers; its size in inches stays, about",
              type=Whole(DPI, 1200), default=DPI)  # fmt: skip
@solver_options
@section("Machine")
@click.option("--batch", help="Images at a time, per process", type=Whole(1, 2**20), default=64)
@precision_option
@click.option("--decode_precision", help="First stage of latent models; default: tf32 on CUDA, else fp32",
              type=click.Choice(list(DECODE_PRECISIONS)))  # fmt: skip
@device_option
@cuda_graph_option
@offline_option
@dry_run_option
def main(model_path: str, dataset_name: str | None, seeds: list[int], class_index: int | None, **opts: Any) -> None:
    """Sample images from a student, or from a teacher with any solver, one for each seed.

    A second run of the same command writes only what is missing.

    \b
    Examples:
      python sample.py --model_path=0 --seeds=0-63
      python sample.py --model_path=teacher --dataset_name=emoji32 --solver=euler --num_steps=3 --grid=True
      torchrun --standalone --nproc_per_node=4 sample.py --model_path=0 --seeds=0-49999 --batch=256
    """
    device = pick_device(opts["device"])
    precision = pick_precision(opts["precision"], device)
    check_mode(opts["cuda_graph"], device)
    pick_decode_precision(opts["decode_precision"], device)
    options = sampler_options(opts)
    if opts["also"] and not opts["compare"]:
        raise UserError("is for the sheet of --compare=True", "also")
    if opts["dry_run"]:
        plan = dict(model_path=model_path, dataset_name=dataset_name, images=len(seeds), batch=opts["batch"])
        sampling = plan_sampler(model_path, dataset_name, options)
        plan["nfe"] = None if sampling is None else sampling.nfe
        plan.update(options.chosen(), precision=precision, device=str(device), outdir=opts["outdir"])
        return show_plan(**plan)
    configure_backends()
    distributed.init(device)
    dtype, teacher_path = PRECISIONS[precision], opts["teacher_path"]
    how = device, dtype, teacher_path, opts["cuda_graph"], opts["decode_precision"]
    opened = open_sampler(model_path, dataset_name, options, *how)
    also = [open_sampler(path, dataset_name, replace(options, num_steps=None), *how) for path in opts["also"]]
    sampler, model = opened.sampler, opened.sampler.model
    model.check_class(class_index)
    # A picture among the samples would be one of the images that an evaluation counts.
    root = "pictures" if opts["grid"] or opts["compare"] else "samples"
    outdir = Path(opts["outdir"] or f"./{root}/{model.dataset_name}/{opened.name}-nfe{sampler.nfe}")
    if distributed.rank() == 0:
        click.echo(f"{opened.name}: NFE {sampler.nfe}, {len(seeds)} images, {precision} on {device} → {outdir}")
    if opts["grid"] or opts["compare"]:
        if outdir.suffix == ".zip":
            raise UserError(f"--outdir={outdir} is an archive; a single picture needs a folder")
        refuse_samples(outdir)
        # One picture is small work: rank 0 does it while the others wait.
        where = (seeds, class_index, opts["batch"], outdir, opts["dpi"])
        path = distributed.on_first_rank(
            lambda: write_comparison(opened, also, *where) if opts["compare"] else write_grid(sampler, *where)
        )
        report = f"Picture: {path}"
    else:
        identity = {**opened.identity, "class": class_index, "precision": precision}
        writer = ImageWriter(outdir, opts["subdirs"], identity)
        count = write_images(sampler, seeds, class_index, opts["batch"], writer)
        report = f"Wrote {count} images to {outdir}, {len(seeds) - count} were there already"
    if distributed.rank() == 0:
        click.echo(report)
    distributed.shutdown()


if __name__ == "__main__":
    one_line_errors(main)()
