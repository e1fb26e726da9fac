"""`python -m training.dataset_tool`: images as they are published → a zip of square images of one size.

The archive has the layout of EDM's data sets: `00000/img00000000.png` in the order of the source, and `dataset.json`
with labels. What sources there are, `training.datasets.sources` says.
"""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from dnnlib import UserError, one_line_errors, write_text
from dnnlib.options import Command, Whole, section
from dnnlib.progress import progress
from torch_utils.image_writer import ImageWriter
from torch_utils.metrics.pixels import remarks

from .datasets.captions import captions_of, read_coco
from .datasets.sources import Files, Source, open_pictures
from .datasets.squares import TRANSFORMS, Conversion
from .options import dry_run_option, show_plan

LABEL_KINDS = ("auto", "folders", "none")
#: Images that are decoded ahead of those that are written.
AHEAD = 64


def parse_resolution(context: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`64`, or `512x384`."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", value)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= height <= width <= 8192:
        raise UserError(f"{value!r} does not parse; expected a side such as 64, or width x height such as 512x384",
                        "resolution")  # fmt: skip
    return width, height


def coco_captions(pictures: Source, path: Path) -> list[str]:
    """A caption for each of the pictures, from a file of COCO's."""
    if not isinstance(pictures, Files):
        raise UserError("is for COCO's images, a folder or a zip of them", "captions")
    return captions_of(pictures.images.names, read_coco(path), path)


def write_archive(source: Source, count: int, conversion: Conversion, writer: ImageWriter) -> int:
    """Convert and write the first `count` images that are not there yet; returns how many the archive has."""
    missing = writer.missing(range(count))
    with ThreadPoolExecutor() as pool, progress(len(missing)) as bar:
        for start in range(0, len(missing), AHEAD):
            part = missing[start : start + AHEAD]
            for index, square in zip(part, pool.map(partial(conversion, source), part)):
                if square is not None:
                    writer.write([index], square[None])
            bar.update(len(part))
    writer.flush()
    kept = sorted(set(range(count)) - set(writer.missing(range(count))))
    if not kept:
        raise UserError("no image is large enough", "resolution")
    writer.close(kept, None if source.labels is None else {index: source.labels[index] for index in kept})
    return len(kept)


@click.command(cls=Command)
@section("Images")
@click.option("--source", help="Folder, zip or npz of images; original CIFAR-10 (tar.gz or folder); lmdb folder of "
              "LSUN", metavar="PATH", type=click.Path(path_type=Path), required=True)  # fmt: skip
@click.option("--dest", help="Archive to write", metavar="ZIP", type=click.Path(path_type=Path), required=True)
@click.option("--resolution", help="Side of the images; width x height for center-crop-wide; default: their own",
              metavar="INT|WxH", callback=parse_resolution)  # fmt: skip
@click.option("--transform", help="How an image becomes a square; default: it has to be one",
              type=click.Choice(list(TRANSFORMS)))  # fmt: skip
@click.option("--upright", help="Apply the EXIF orientation of photographs", is_flag=True)
@click.option("--max_images", help="Take only so many, from the first on", type=Whole(1, 10**9))
@section("Classes")
@click.option("--labels", help="auto: those of dataset.json or CIFAR-10; folders: each first folder is a class",
              type=click.Choice(LABEL_KINDS), default="auto")  # fmt: skip
@click.option("--captions", help="COCO's captions_….json: one caption for each image goes into DEST as .txt, for "
              "--prompts and fid.py clip", metavar="JSON", type=click.Path(path_type=Path))  # fmt: skip
@click.option("--split", help="Part of CIFAR-10", type=click.Choice(["train", "test"]), default="train")
@section("Machine")
@dry_run_option
def main(source: Path, dest: Path, max_images: int | None, labels: str, split: str, **opts: Any) -> None:
    """Make a zip of square images from a folder, an archive, or the original files of a data set.

    The same command goes on where it was stopped; the archive appears when it is complete.

    \b
    Examples:
      python -m training.dataset_tool --source=my-images --dest=my-dataset.zip --resolution=64 --transform=center-crop
      python -m training.dataset_tool --source=cifar-10-python.tar.gz --dest=cifar10-32x32.zip
    """
    conversion = Conversion(opts["resolution"], opts["transform"], opts["upright"])
    if dest.suffix != ".zip":
        raise UserError(f"{dest} is not a name ending in .zip; choose one that is", "dest")
    if opts["dry_run"] and not source.exists():
        return show_plan(source=str(source), missing=[str(source)], **asdict(conversion), dest=str(dest))
    pictures = open_pictures(source, labels, split)
    if labels == "none":
        pictures.labels = None
    texts = None if opts["captions"] is None else coco_captions(pictures, opts["captions"])
    count = min(len(pictures), max_images or len(pictures))
    classes = 0 if pictures.labels is None else len(set(pictures.labels))
    plan = {"source": str(source), "images": count, "classes": classes, **asdict(conversion), "dest": str(dest)}
    if opts["dry_run"]:
        return show_plan(**plan)
    made_of = {k: v for k, v in plan.items() if k != "dest"} | {"digest": pictures.digest(), "labels": labels}
    writer = ImageWriter(dest, False, json.loads(json.dumps(made_of)))
    kept = write_archive(pictures, count, conversion, writer)
    if texts is not None:  # image i is called by its number, whatever is left out
        write_text(dest.with_suffix(".txt"), "".join(f"{text}\n" for text in texts[:count]))
    for line in remarks(pictures.headers, "applied" if opts["upright"] else "not applied"):
        click.echo(line, err=True)
    left_out = f"; {count - kept} were too small" if kept < count else ""
    done = "There already:" if writer.is_complete else "Wrote"
    click.echo(
        f"{done} {kept} images, {classes or 'no'} classes, {'in' if writer.is_complete else 'to'} {dest}{left_out}"
    )


if __name__ == "__main__":
    one_line_errors(main)()
