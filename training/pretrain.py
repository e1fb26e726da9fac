"""Train a small teacher on one's own images: `python -m training.pretrain --data=images.zip --outdir=teachers/mine`.

What is trained and how, `training.pretrainer` says.
"""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from dnnlib import (
    Logger,
    UserError,
    first_line,
    format_count,
    format_duration,
    make_folder,
    one_line_errors,
    write_text,
)
from dnnlib.options import SEED, Command, Real, Whole, device_option, precision_option, section
from dnnlib.progress import progress
from torch_utils.checkpoint import read_settings
from torch_utils.device import configure_backends, pick_device, pick_precision
from torch_utils.metrics.image_set import ImageDataset

from .datasets.squares import Conversion, squares_of
from .options import dry_run_option, show_plan
from .pretrainer import KINDS, RATES, STATE, TEACHER, WIDEST, PretrainConfig, Trainer, build
from .runs import lock


def open_data(data: str, resolution: int | None, center_crop: bool) -> ImageDataset:
    """The images, squares of one size; those that are not become so, in memory."""
    if resolution is None and center_crop:
        raise UserError("needs the size of the images that it is to make", "resolution")
    if resolution is None:
        return ImageDataset(data)
    convert = Conversion((resolution, resolution), "center-crop" if center_crop else None, upright=False)
    return squares_of(Path(data), convert)


def train(config: PretrainConfig, dataset: ImageDataset, device: torch.device, outdir: Path) -> None:
    """Run or continue a pre-training run in `outdir`."""
    make_folder(outdir, "outdir")
    with lock(outdir, f"another process trains in {outdir}; wait for it, or use another --outdir"):
        log = Logger(outdir / "log.txt")
        trainer = Trainer(config, dataset, device, outdir)
        if (outdir / STATE).exists():
            trainer.load()
            log(f"Continuing at {trainer.nimg / 1000:.1f} kimg")
        elif taken := trainer.start():
            log(f"Starting from {taken} tensors of {config.transfer}, {len(trainer.net.state_dict()) - taken} are new")
        write_text(outdir / "training_options.json", json.dumps(config.to_json(), indent=2))
        size = format_count(sum(p.numel() for p in trainer.net.parameters()))
        log(
            f"{len(trainer.images)} images, {size} parameters, {config.optimizer}, {config.precision} on {device}, "
            f"to {config.kimg:g} kimg"
        )
        for line in run(trainer):
            log(line)
        log(f"Done: {outdir / TEACHER} and {outdir / 'samples.png'}")
        log.close()


def run(trainer: Trainer) -> Iterator[str]:
    """Iterate to the end of the run, saving every `snap_kimg`; yields a status line for each snapshot."""
    config = trainer.config
    total = int(config.kimg * 1000)
    losses: list[Tensor] = []
    started, before = time.time(), trainer.seconds
    next_snap = trainer.nimg + config.snap_kimg * 1000
    with progress(total, initial=trainer.nimg) as bar:
        while trainer.nimg < total:
            losses.append(trainer.step())
            bar.update(config.batch)
            if trainer.nimg >= next_snap or trainer.nimg >= total:
                next_snap += config.snap_kimg * 1000
                trainer.seconds = before + time.time() - started
                loss = _mean_loss(losses, trainer)
                losses.clear()
                trainer.save()
                yield f"kimg {trainer.nimg / 1000:<9.1f} loss {loss:<8.4f} time {format_duration(trainer.seconds)}"


def _mean_loss(losses: list[Tensor], trainer: Trainer) -> float:
    """Mean of the losses that are finite; most of them are, or the run ends here, before it saves anything."""
    values = torch.stack(losses)
    finite = values[values.isfinite()]
    weights = (p for net in (trainer.net, *trainer.averages) for p in net.parameters())
    if len(finite) < len(values) / 2 or not all(p.isfinite().all() for p in weights):
        raise UserError(
            f"loss or weights are not finite at {trainer.nimg / 1000:g} kimg; use an --lr below {trainer.config.lr:g}"
        )
    return finite.mean().item()


def check_network(network: dict[str, Any]) -> None:
    """Refuse widths and levels that no U-Net can have, before anything is built."""
    levels, size, width = network["channel_mult"], network["img_resolution"], network["model_channels"]
    if not levels or min(levels) < 1:
        raise UserError(f"--mult={levels} is unusable; expected a list of positive integers such as 1,2,3")
    if size % 2 ** (len(levels) - 1):
        raise UserError(f"images of {size}×{size} cannot be halved {len(levels) - 1} times; use fewer levels in --mult")
    try:
        with torch.device("meta"):
            net = build(network)
            net(torch.zeros(1, network["img_channels"], size, size), torch.ones(1))
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = first_line(error, 120)
        raise UserError(
            f"--channels={width} with --mult={levels} makes no network ({reason}); try --channels=32"
        ) from None


def _integers(value: str) -> list[int]:
    return [int(part) for part in value.split(",") if part]


def _widths(value: str) -> tuple[float, ...]:
    """Relative widths of averages from a list in text, each once."""
    try:
        widths = tuple(float(part) for part in value.split(","))
    except ValueError:
        widths = ()
    if not widths or not all(0.001 <= width <= WIDEST for width in widths) or len(set(widths)) < len(widths):
        raise UserError(f"--ema={value} is unusable; expected different relative widths from 0.001 to 0.288")
    return widths


@click.command(cls=Command)
@section("Data and output")
@click.option("--data", help="Square images of one size: folder or zip", metavar="PATH", required=True)
@click.option("--resolution", help="Resize images to this side; default: their own", type=Whole(4, 8192))
@click.option("--center_crop", help="Crop images of any size to the largest square at the centre", is_flag=True)
@click.option(
    "--outdir", help="Where to save the run; an unfinished one there is continued", metavar="DIR", required=True
)
@click.option(
    "--cond", help="Train a class-conditional model from the labels of dataset.json", type=bool, default=False
)
@click.option("--label_dropout", help="Part of the images that is seen without its label, for guidance",
              type=Real(0, 1), default=0.0)  # fmt: skip
@click.option("--xflip", help="Mirror half of the images", type=bool, default=False)
@section("Network")
@click.option("--arch", help="ddpmpp: EDM's network for small images; edm2: EDM2's", type=click.Choice(list(KINDS)),
              default="ddpmpp")  # fmt: skip
@click.option("--channels", help="Width of the first level", type=Whole(4, 1024), default=32)
@click.option("--mult", help="Width of each level, in multiples of --channels", metavar="LIST", default="1,2,3")
@click.option("--blocks", help="Residual blocks per level", type=Whole(1, 16), default=1)
@click.option("--attn", help="Resolutions with self-attention", metavar="LIST", default="8")
@click.option("--dropout", help="Dropout probability", type=Real(0, 1), default=0.0)
@section("Optimisation")
@click.option("--kimg", help="Length of the run, thousands of images", type=Real(0, 10**6, min_open=True), default=2000)
@click.option("--batch", help="Images in an iteration", type=Whole(1, 2**20), default=64)
@click.option("--optimizer", help="adam, or muon: Muon for weights between hidden layers, at twice the rate, Adam for "
              "the rest", type=click.Choice(["adam", "muon"]), default="adam")  # fmt: skip
@click.option("--lr", help="Learning rate of Adam, after a warm-up of 10 kimg; default: 2e-3, of edm2 1e-2",
              type=Real(0, 1000, min_open=True))  # fmt: skip
@click.option("--decay", help="Last part of the run over which the rate falls to zero", type=Real(0, 1), default=0.3)
@click.option("--ema", help="Relative widths of the averages of the weights, up to 0.288; the first is "
              "teacher.safetensors", metavar="LIST", default="0.05")  # fmt: skip
@click.option("--transfer", help="Start from the weights of this network, where names and shapes agree", metavar="FILE")
@click.option("--seed", help="Random seed", type=SEED, default=0)
@section("Machine")
@precision_option
@device_option
@section("Progress")
@click.option("--snap", help="Save every so many kimg", type=Real(0, 10**6, min_open=True), default=50)
@dry_run_option
def main(data: str, outdir: str, **opts: Any) -> None:
    """Train a small EDM teacher on a folder or zip of images, on one device.

    The same command continues a run that was stopped.

    \b
    Examples:
      python -m training.pretrain --data=my-images --outdir=teachers/mine
      python -m training.pretrain --data=my-images --resolution=64 --center_crop --outdir=teachers/mine
      python -m training.pretrain --data=my-images.zip --outdir=teachers/mine --kimg=5000 --mult=1,2,2 --xflip=True
    """
    dataset = open_data(data, opts["resolution"], opts["center_crop"])
    channels, height, width = dataset.shape
    for remark in dataset.remarks:
        click.echo(remark, err=True)
    if height != width:
        raise UserError(f"{data} holds images of {height}×{width}; expected square ones: --resolution=N --center_crop")
    if opts["cond"] and not dataset.label_dim:
        raise UserError(f"--cond=True needs labels in dataset.json, {data} has none")
    if opts["label_dropout"] and not opts["cond"]:
        raise UserError("--label_dropout is for class-conditional models; add --cond=True")
    if opts["transfer"] is not None:
        read_settings(opts["transfer"])  # before anything else is done
    try:
        mult, attn = _integers(opts["mult"]), _integers(opts["attn"])
    except ValueError:
        raise UserError("--mult and --attn are lists of integers such as 1,2,3") from None
    network = dict(
        img_resolution=height,
        img_channels=channels,
        label_dim=dataset.label_dim if opts["cond"] else 0,
        **KINDS[opts["arch"]],
        model_channels=opts["channels"],
        channel_mult=mult,
        num_blocks=opts["blocks"],
        attn_resolutions=attn,
        dropout=opts["dropout"],
    )
    if opts["arch"] == "edm2":
        network["channels_per_head"] = math.gcd(64, opts["channels"])
    check_network(network)
    device = pick_device(opts["device"])
    configure_backends()
    settings = {name: value for name, value in opts.items() if name in PretrainConfig.__dataclass_fields__}
    settings |= dict(precision=pick_precision(opts["precision"], device), ema=_widths(opts["ema"]))
    settings["lr"] = RATES[opts["arch"]] if opts["lr"] is None else opts["lr"]
    config = PretrainConfig(data, network, snap_kimg=opts["snap"], **settings)
    if opts["dry_run"]:
        return show_plan(**config.to_json(), images=len(dataset), device=str(device), outdir=outdir)
    train(config, dataset, device, Path(outdir))


if __name__ == "__main__":
    one_line_errors(main)()
