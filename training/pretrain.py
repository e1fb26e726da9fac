"""Train a small teacher on one's own images: `python -m training.pretrain --data=images.zip --outdir=teachers/mine`.

EDM's objective (Karras et al. 2022, table 1 and equation 8): with σ = exp(P_mean + P_std·z) and noise n ~ N(0, σ²),

    E [ (σ² + σ_d²) / (σ σ_d)² · ‖D(y + n; σ) − y‖² ]

minimised by Adam; the weights kept are an exponential moving average. The learning rate is constant after a warm-up and
falls linearly to zero over the last part of the run, so that a run can be prolonged by the same command with a larger
`--kimg`. All random numbers of an iteration derive from (seed, iteration): a run that was stopped and started again
ends with the weights of an uninterrupted one.
"""

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from dnnlib import Logger, UserError, format_count, format_duration, make_folder, one_line_errors, write_text
from dnnlib.options import Command, section
from models.precond import EDMPrecond
from torch_utils.checkpoint import read_state, save_network, save_state, usable_state
from torch_utils.device import (
    PRECISIONS,
    configure_backends,
    device_option,
    pick_device,
    pick_precision,
    precision_option,
)
from torch_utils.images import draw_grid, save_picture, square_rows, to_uint8
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.random import derive_seed, generator, sample_generators, stacked_randn

P_MEAN, P_STD = -1.2, 1.2
GRAD_LIMIT = 1e5


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a run; all but `kimg`, `decay`, `precision` and `snap_kimg` must stay the same on resuming."""

    data: str
    network: dict[str, Any]
    kimg: float = 2000
    batch: int = 64
    lr: float = 2e-3
    warmup_kimg: float = 10
    decay: float = 0.3
    ema_kimg: float = 50
    xflip: bool = False
    precision: str = "fp32"
    seed: int = 0
    snap_kimg: float = 50


def edm_loss(net: EDMPrecond, images: Tensor, labels: Tensor | None, rng: torch.Generator) -> Tensor:
    """EDM's weighted denoising loss, mean over everything, for images in [-1, 1]."""
    z = torch.randn([len(images), 1, 1, 1], generator=rng)
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    sigma = (P_MEAN + P_STD * z).exp().to(images.device)
    weight = (sigma.square() + net.sigma_data**2) / (sigma * net.sigma_data).square()
    return (weight * (net(images + sigma * noise, sigma, labels) - images).square()).mean()


def learning_rate(config: PretrainConfig, nimg: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay` of the run."""
    warmup = min(nimg / max(config.warmup_kimg * 1000, 1), 1.0)
    remaining = max(1 - nimg / (config.kimg * 1000), 0.0)
    return config.lr * min(warmup, remaining / config.decay if config.decay > 0 else 1.0)


def ema_beta(config: PretrainConfig, nimg: int) -> float:
    """Decay for a half-life of `ema_kimg`, at most a twentieth of what was seen so far."""
    half_life = min(config.ema_kimg * 1000, 0.05 * nimg)
    return 0.5 ** (config.batch / max(half_life, 1e-8))


def batch_indices(config: PretrainConfig, count: int, iteration: int) -> Tensor:
    """Indices `[batch]` of an iteration: epochs of a fresh random order, without gaps or repeats."""
    positions = range(iteration * config.batch, (iteration + 1) * config.batch)
    orders: dict[int, Tensor] = {}
    for epoch in {p // count for p in positions}:
        orders[epoch] = torch.randperm(count, generator=generator(config.seed, 1, epoch))
    return torch.stack([orders[p // count][p % count] for p in positions])


class Trainer:
    """State of a run: network, moving average, optimizer, counters."""

    def __init__(self, config: PretrainConfig, device: torch.device, outdir: Path) -> None:
        self.config, self.device, self.outdir = config, device, outdir
        dataset = ImageDataset(config.data)
        self.images = torch.from_numpy(dataset.load_all())
        self.labels = None
        if config.network["label_dim"]:
            self.labels = torch.nn.functional.one_hot(torch.from_numpy(dataset.labels), config.network["label_dim"])
        torch.manual_seed(derive_seed(config.seed, 0))
        self.net = EDMPrecond(**config.network).to(device).train()
        self.net.compute_dtype = PRECISIONS[config.precision]
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
        self.iteration, self.seconds, self.skipped = 0, 0.0, 0

    @property
    def nimg(self) -> int:
        return self.iteration * self.config.batch

    def step(self) -> Tensor:
        """One iteration; returns the loss without waiting for the device."""
        config = self.config
        torch.manual_seed(derive_seed(config.seed, 2, self.iteration))  # dropout
        rng = generator(config.seed, 3, self.iteration)
        index = batch_indices(config, len(self.images), self.iteration)
        images = self.images[index]
        if config.xflip:
            flip = torch.rand(len(images), generator=rng) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(3), images)
        images = images.to(self.device).float() / 127.5 - 1
        labels = None if self.labels is None else self.labels[index].to(self.device).float()

        self.optimizer.zero_grad(set_to_none=True)
        loss = edm_loss(self.net, images, labels, rng)
        loss.backward()
        for param in self.net.parameters():
            if param.grad is not None:
                torch.nan_to_num(param.grad, nan=0, posinf=GRAD_LIMIT, neginf=-GRAD_LIMIT, out=param.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.nimg)
        self.optimizer.step()
        self.iteration += 1
        self._update_average()
        return loss.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        beta = ema_beta(self.config, self.nimg)
        for average, value in zip(self.ema.parameters(), self.net.parameters()):
            average.lerp_(value, 1 - beta)

    def save(self) -> None:
        """Write the training state, the averaged network and a picture of samples."""
        counters = dict(iteration=self.iteration, seconds=self.seconds)
        modules = dict(net=self.net.state_dict(), ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict())
        save_state(self.outdir / "state.pt", {**modules, **counters, "config": asdict(self.config)})
        settings = {
            "format": "teacher",
            "network": {"class": "EDMPrecond", **self.config.network},
            "training": {**asdict(self.config), "images_seen": self.nimg, "seconds": round(self.seconds)},
        }
        save_network(self.outdir / "teacher.safetensors", self.ema.state_dict(), settings)
        save_picture(draw_grid(square_rows(self.sample(64))), self.outdir / "samples.png")

    def load(self) -> None:
        """Continue from the state in the run directory; refuse a state of other settings."""
        state = read_state(self.outdir / "state.pt")
        free = {"kimg", "decay", "snap_kimg", "precision"}
        mine, saved = asdict(self.config), state.get("config", {})
        changed = [
            f"{k}: {saved.get(k)} there, {v} here" for k, v in mine.items() if k not in free and saved.get(k) != v
        ]
        if changed:
            raise UserError(
                f"{self.outdir} holds a run of other settings ({'; '.join(changed)}); use them, or another --outdir"
            )
        with usable_state(self.outdir / "state.pt"):
            self.net.load_state_dict(state["net"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.iteration, self.seconds = state["iteration"], state["seconds"]

    @torch.no_grad()
    def sample(self, count: int) -> Any:
        """Images of the averaged network for seeds 0 … count−1 by 18-step Heun, uint8 `[N, H, W, C]`."""
        from solvers import get_schedule, get_solver, solve

        sigmas = get_schedule("polynomial", 18, 0.002, 80.0)
        shape = (self.ema.img_channels, self.ema.img_resolution, self.ema.img_resolution)
        noise = stacked_randn(sample_generators(range(count)), shape).to(self.device)
        labels = None
        if self.labels is not None:
            labels = self.labels[torch.arange(count) % len(self.labels)].to(self.device).float()
        states = solve(get_solver("heun"), lambda x, s: self.ema(x, s, labels), noise * 80.0, sigmas, every=17)
        return to_uint8(states[-1])


def train(config: PretrainConfig, device: torch.device, outdir: Path) -> None:
    """Run or continue a pre-training run in `outdir`."""
    make_folder(outdir, "--outdir")
    log = Logger(outdir / "log.txt")
    trainer = Trainer(config, device, outdir)
    if (outdir / "state.pt").exists():
        trainer.load()
        log(f"Continuing at {trainer.nimg / 1000:.1f} kimg")
    write_text(outdir / "training_options.json", json.dumps(asdict(config), indent=2))
    size = format_count(sum(p.numel() for p in trainer.net.parameters()))
    log(f"{len(trainer.images)} images, {size} parameters, {config.precision} on {device}, to {config.kimg:g} kimg")
    for line in run(trainer):
        log(line)
    log(f"Done: {outdir / 'teacher.safetensors'} and {outdir / 'samples.png'}")
    log.close()


def run(trainer: Trainer) -> Iterator[str]:
    """Iterate to the end of the run, saving every `snap_kimg`; yields a status line for each snapshot."""
    config = trainer.config
    total = int(config.kimg * 1000)
    losses: list[Tensor] = []
    started, before = time.time(), trainer.seconds
    next_snap = trainer.nimg + config.snap_kimg * 1000
    with tqdm(total=total, initial=trainer.nimg, unit="img", dynamic_ncols=True) as progress:
        while trainer.nimg < total:
            losses.append(trainer.step())
            progress.update(config.batch)
            if trainer.nimg >= next_snap or trainer.nimg >= total:
                next_snap += config.snap_kimg * 1000
                trainer.seconds = before + time.time() - started
                trainer.save()
                loss = torch.stack(losses).mean().item()
                losses.clear()
                yield f"kimg {trainer.nimg / 1000:<9.1f} loss {loss:<8.4f} time {format_duration(trainer.seconds)}"


def check_network(network: dict[str, Any]) -> None:
    """Refuse widths and levels that no U-Net can have, before anything is built."""
    levels, size, width = network["channel_mult"], network["img_resolution"], network["model_channels"]
    if not levels or min(levels) < 1:
        raise UserError(f"--mult={levels} is unusable; expected a list of positive integers such as 1,2,3")
    if size % 2 ** (len(levels) - 1):
        raise UserError(f"images of {size}×{size} cannot be halved {len(levels) - 1} times; use fewer levels in --mult")
    try:
        with torch.device("meta"):
            net = EDMPrecond(**network)
            net(torch.zeros(1, network["img_channels"], size, size), torch.ones(1))
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"--channels={width} with --mult={levels} makes no network ({reason}); try --channels=32"
        ) from None


def _integers(value: str) -> list[int]:
    return [int(part) for part in value.split(",") if part]


@click.command(cls=Command)
@section("Data and output")
@click.option("--data", help="Square images of one size: folder or zip", metavar="PATH", required=True)
@click.option(
    "--outdir", help="Where to save the run; an unfinished one there is continued", metavar="DIR", required=True
)
@click.option(
    "--cond", help="Train a class-conditional model from the labels of dataset.json", type=bool, default=False
)
@click.option("--xflip", help="Mirror half of the images", type=bool, default=False)
@section("Network")
@click.option("--channels", help="Width of the first level", type=click.IntRange(min=4), default=32)
@click.option("--mult", help="Width of each level, in multiples of --channels", metavar="LIST", default="1,2,3")
@click.option("--blocks", help="Residual blocks per level", type=click.IntRange(min=1), default=1)
@click.option("--attn", help="Resolutions with self-attention", metavar="LIST", default="8")
@click.option("--dropout", help="Dropout probability", type=click.FloatRange(0, 1), default=0.0)
@section("Optimisation")
@click.option(
    "--kimg", help="Length of the run, thousands of images", type=click.FloatRange(min=0, min_open=True), default=2000
)
@click.option("--batch", help="Images in an iteration", type=click.IntRange(min=1), default=64)
@click.option("--lr", help="Learning rate of Adam, after a warm-up of 10 kimg",
              type=click.FloatRange(min=0, min_open=True), default=2e-3)  # fmt: skip
@click.option(
    "--decay", help="Last part of the run over which the rate falls to zero", type=click.FloatRange(0, 1), default=0.3
)
@click.option("--ema", help="Half-life of the averaged weights, kimg", type=click.FloatRange(min=0), default=50)
@click.option("--seed", help="Random seed", type=click.IntRange(min=0), default=0)
@section("Machine")
@precision_option
@device_option
@section("Progress")
@click.option("--snap", help="Save every so many kimg", type=click.FloatRange(min=0, min_open=True), default=50)
@click.option("-n", "--dry-run", help="Check and print what would be done, then stop", is_flag=True)
def main(data: str, outdir: str, **opts: Any) -> None:
    """Train a small EDM teacher on a folder or zip of images, on one device.

    The same command continues a run that was stopped.

    \b
    Examples:
      python -m training.pretrain --data=my-images --outdir=teachers/mine
      python -m training.pretrain --data=my-images.zip --outdir=teachers/mine --kimg=5000 --mult=1,2,2 --xflip=True
    """
    dataset = ImageDataset(data)
    channels, height, width = dataset.load(0).shape
    if height != width:
        raise UserError(f"{data} holds images of {height}×{width}; expected square ones, so crop them first")
    if opts["cond"] and not dataset.label_dim:
        raise UserError(f"--cond=True needs labels in dataset.json, {data} has none")
    try:
        mult, attn = _integers(opts["mult"]), _integers(opts["attn"])
    except ValueError:
        raise UserError("--mult and --attn are lists of integers such as 1,2,3") from None
    network = dict(
        img_resolution=height,
        img_channels=channels,
        label_dim=dataset.label_dim if opts["cond"] else 0,
        model_type="SongUNet",
        model_channels=opts["channels"],
        channel_mult=mult,
        num_blocks=opts["blocks"],
        attn_resolutions=attn,
        dropout=opts["dropout"],
    )
    check_network(network)
    device = pick_device(opts["device"])
    configure_backends()
    config = PretrainConfig(
        data=data,
        network=network,
        kimg=opts["kimg"],
        batch=opts["batch"],
        lr=opts["lr"],
        decay=opts["decay"],
        ema_kimg=opts["ema"],
        xflip=opts["xflip"],
        precision=pick_precision(opts["precision"], device),
        seed=opts["seed"],
        snap_kimg=opts["snap"],
    )
    if opts["dry_run"]:
        plan = {**asdict(config), "images": len(dataset), "device": str(device), "outdir": outdir}
        click.echo(json.dumps(plan, indent=2))
        return
    train(config, device, Path(outdir))


if __name__ == "__main__":
    one_line_errors(main)()
