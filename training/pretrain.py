"""Train a small teacher on one's own images: `python -m training.pretrain --data=images.zip --outdir=teachers/mine`.

EDM's objective (Karras et al. 2022, table 1 and equation 8): with σ = exp(P_mean + P_std·z) and noise n ~ N(0, σ²),

    E [ (σ² + σ_d²) / (σ σ_d)² · ‖D(y + n; σ) − y‖² ]

minimised by Adam or Muon. EDM2's networks estimate the log variance u(σ) of what is left of it, and minimise

    E [ e^{−u(σ)} (σ² + σ_d²) / (σ σ_d)² · ‖D(y + n; σ) − y‖² / dim + u(σ) ]

(arXiv 2312.02696); their weights are normalised after each step. The learning rate is constant after a warm-up and
falls linearly to zero over the last part of the run, so that a run can be prolonged by the same command with a larger
`--kimg`. All random numbers of an iteration derive from (seed, iteration): a run that was stopped and started again
ends with the weights of an uninterrupted one.

The weights kept are averages θ̂ over the iterations t so far, weighted by t^γ (Karras et al. 2024, arXiv 2312.02696,
section 3.1). Such a profile has a relative width, the standard deviation of its weights in units of the run's length,

    θ̂ ← β θ̂ + (1 − β) θ      β = (1 − 1/t)^(γ+1)      width² = (γ + 1) / ((γ + 2)² (γ + 3))

and several are kept at once, since only their samples tell which is best.

A class-conditional network sees no label, a zero vector, for a part of the images (Ho & Salimans 2022), so that it also
denoises without one, which guidance needs.
"""

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from dnnlib import Logger, UserError, format_count, format_duration, make_folder, one_line_errors, write_text
from dnnlib.options import SEED, Command, Real, Whole, device_option, precision_option, section
from dnnlib.progress import progress
from models.precond import EDM2Precond, EDMPrecond
from torch_utils.checkpoint import (
    read_network,
    read_settings,
    read_state,
    save_network,
    save_state,
    usable_state,
)
from torch_utils.device import PRECISIONS, configure_backends, pick_device, pick_precision
from torch_utils.images import draw_grid, save_picture, square_rows, to_uint8
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.random import derive_seed, draw_classes, generator, sample_generators, stacked_randn

from .optimizers import make_optimizer, set_learning_rate
from .runs import lock

P_MEAN, P_STD = -1.2, 1.2
GRAD_LIMIT = 1e5
STATE, TEACHER = "state.pt", "teacher.safetensors"
#: The widest profile: equal weight for all iterations, γ = 0.
WIDEST = 12**-0.5


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a run; all but `kimg`, `decay`, `precision` and `snap_kimg` must stay the same on resuming.

    Attributes:
        data: path of the images.
        network: arguments of `EDMPrecond`, or of the `class` that it names.
        kimg, warmup_kimg, snap_kimg: thousands of images.
        optimizer: `adam` or `muon`.
        decay: last part of the run, over which the learning rate falls to zero.
        ema: relative widths of the averages, up to 0.288; the first one is `teacher.safetensors`.
        label_dropout: probability that an image is seen without its label.
        transfer: network file whose tensors the run starts from, where name and shape agree.
    """

    data: str
    network: dict[str, Any]
    kimg: float = 2000
    batch: int = 64
    optimizer: str = "adam"
    lr: float = 2e-3
    warmup_kimg: float = 10
    decay: float = 0.3
    ema: tuple[float, ...] = (0.05,)
    label_dropout: float = 0.0
    transfer: str | None = None
    xflip: bool = False
    precision: str = "fp32"
    seed: int = 0
    snap_kimg: float = 50

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON gives them back."""
        return json.loads(json.dumps(asdict(self)))


Network = EDMPrecond | EDM2Precond
#: What sets the networks of `--arch` apart, and the learning rate that suits each.
KINDS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"model_type": "SongUNet"}, "edm2": {"class": EDM2Precond.__name__, "use_fp16": False}
}  # fmt: skip
RATES = {"ddpmpp": 2e-3, "edm2": 1e-2}


def build(network: dict[str, Any]) -> Network:
    """The network of a run, with random weights."""
    arguments = {name: value for name, value in network.items() if name != "class"}
    if network.get("class") == EDM2Precond.__name__:
        return EDM2Precond(**arguments)
    return EDMPrecond(**arguments)


def edm_loss(net: Network, images: Tensor, labels: Tensor | None, rng: torch.Generator) -> Tensor:
    """The loss of a network's kind, mean over everything, for images in [-1, 1]."""
    z = torch.randn([len(images), 1, 1, 1], generator=rng)
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    sigma = (P_MEAN + P_STD * z).exp().to(images.device)
    weight = (sigma.square() + net.sigma_data**2) / (sigma * net.sigma_data).square()
    loss = weight * (net(images + sigma * noise, sigma, labels) - images).square()
    if isinstance(net, EDM2Precond):
        variance = net.log_variance(sigma)
        loss = loss / variance.exp() + variance
    return loss.mean()


def learning_rate(config: PretrainConfig, nimg: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay` of the run."""
    warmup = min(nimg / max(config.warmup_kimg * 1000, 1), 1.0)
    remaining = max(1 - nimg / (config.kimg * 1000), 0.0)
    return config.lr * min(warmup, remaining / config.decay if config.decay > 0 else 1.0)


def profile_exponent(width: float) -> float:
    """γ of the averaging profile t^γ with this relative width, in (0, 0.288]."""
    inverse = width**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


def ema_beta(width: float, iteration: int) -> float:
    """The part of an average of this relative width that stays at iteration 1, 2, …; nothing at the first."""
    return (1 - 1 / iteration) ** (profile_exponent(width) + 1)


def batch_indices(config: PretrainConfig, count: int, iteration: int) -> Tensor:
    """Indices `[batch]` of an iteration: epochs of a fresh random order, without gaps or repeats."""
    positions = range(iteration * config.batch, (iteration + 1) * config.batch)
    orders: dict[int, Tensor] = {}
    for epoch in {p // count for p in positions}:
        orders[epoch] = torch.randperm(count, generator=generator(config.seed, 1, epoch))
    return torch.stack([orders[p // count][p % count] for p in positions])


class Trainer:
    """State of a run: network, moving averages, optimizer, counters."""

    def __init__(self, config: PretrainConfig, device: torch.device, outdir: Path) -> None:
        self.config, self.device, self.outdir = config, device, outdir
        dataset = ImageDataset(config.data)
        self.images = torch.from_numpy(dataset.load_all())
        self.labels = None
        label_dim = config.network["label_dim"]
        if label_dim:
            self.labels = torch.nn.functional.one_hot(torch.from_numpy(dataset.labels), label_dim).float()
        torch.manual_seed(derive_seed(config.seed, 0))
        self.net = build(config.network).to(device).train()
        self.net.normalize_weights()
        self.net.compute_dtype = PRECISIONS[config.precision]
        self.averages = [copy.deepcopy(self.net).eval().requires_grad_(False) for _ in config.ema]
        # The kernels of CPU and CUDA are fused; nothing here leaves steps out.
        fused = config.optimizer == "muon" and device.type in ("cpu", "cuda")
        channels = config.network["img_channels"]
        self.optimizer = make_optimizer(config.optimizer, self.net, config.lr, channels, label_dim, fused)
        self.iteration, self.seconds = 0, 0.0

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
        labels = None if self.labels is None else self.labels[index]
        if labels is not None and config.label_dropout:
            labels = labels * (torch.rand([len(labels), 1], generator=rng) >= config.label_dropout)
        labels = None if labels is None else labels.to(self.device)

        self.optimizer.zero_grad(set_to_none=True)
        loss = edm_loss(self.net, images, labels, rng)
        loss.backward()
        for param in self.net.parameters():
            if param.grad is not None:
                torch.nan_to_num(param.grad, nan=0, posinf=GRAD_LIMIT, neginf=-GRAD_LIMIT, out=param.grad)
        set_learning_rate(self.optimizer, learning_rate(config, self.nimg))
        self.optimizer.step()
        self.net.normalize_weights()
        self.iteration += 1
        self._update_averages()
        return loss.detach()

    @torch.no_grad()
    def _update_averages(self) -> None:
        values: list[Tensor] = list(self.net.parameters())
        for width, average in zip(self.config.ema, self.averages):
            beta = ema_beta(width, self.iteration)
            averages: list[Tensor] = list(average.parameters())
            torch._foreach_lerp_(averages, values, 1 - beta)

    def teachers(self) -> Iterator[tuple[Path, float, Network]]:
        """File, relative width and network of each average."""
        for i, (width, average) in enumerate(zip(self.config.ema, self.averages)):
            yield self.outdir / (TEACHER if i == 0 else f"teacher-{width:g}.safetensors"), width, average

    def save(self) -> None:
        """Write the averaged networks, a picture of samples, and last the training state.

        A process that is killed on the way leaves a state that the run goes on from, with networks that are newer.
        """
        self.save_networks()
        counters = dict(iteration=self.iteration, seconds=self.seconds)
        averages = [average.state_dict() for average in self.averages]
        modules = dict(net=self.net.state_dict(), ema=averages, optimizer=self.optimizer.state_dict())
        save_state(self.outdir / STATE, {**modules, **counters, "config": self.config.to_json()})

    def save_networks(self) -> None:
        """Write the averaged networks and a picture of samples of the first."""
        for path, width, average in self.teachers():
            training = {**self.config.to_json(), "images_seen": self.nimg, "seconds": round(self.seconds)}
            network = {"class": EDMPrecond.__name__, **self.config.network}
            if self.labels is not None:
                network["class_frequencies"] = self._frequencies()
            settings = {"format": "teacher", "network": network, "training": {**training, "ema": width}}
            save_network(path, average.state_dict(), settings)
        save_picture(draw_grid(square_rows(self.sample(64))), self.outdir / "samples.png")

    def _frequencies(self) -> list[float] | None:
        """Part of the images that each class has."""
        return None if self.labels is None else self.labels.double().mean(0).tolist()

    def start(self) -> int:
        """Take what fits from the network that `transfer` names; returns the number of tensors."""
        if self.config.transfer is None:
            return 0
        found, own = read_network(self.config.transfer)[0], self.net.state_dict()
        fitting = {name: t for name, t in found.items() if name in own and own[name].shape == t.shape}
        if not fitting:
            raise UserError(
                f"--transfer={self.config.transfer} has no tensor in common with this network; use the same --channels"
            )
        for net in (self.net, *self.averages):
            net.load_state_dict(fitting, strict=False)
        return len(fitting)

    def load(self) -> None:
        """Continue from the state in the run directory; refuse a state of other settings."""
        state = read_state(self.outdir / STATE)
        free = {"kimg", "decay", "snap_kimg", "precision"}
        mine, saved = self.config.to_json(), state.get("config", {})
        changed = [
            f"{k}: {saved.get(k)} there, {v} here" for k, v in mine.items() if k not in free and saved.get(k) != v
        ]
        if changed:
            raise UserError(
                f"{self.outdir} holds a run of other settings ({'; '.join(changed)}); use them, or another --outdir"
            )
        with usable_state(self.outdir / STATE):
            self.net.load_state_dict(state["net"])
            for average, values in zip(self.averages, state["ema"], strict=True):
                average.load_state_dict(values)
            self.optimizer.load_state_dict(state["optimizer"])
            self.iteration, self.seconds = state["iteration"], state["seconds"]
        if not all(self._is_current(path) for path, _, _ in self.teachers()):
            self.save_networks()  # lost, damaged, or newer than the state

    def _is_current(self, path: Path) -> bool:
        try:
            return read_settings(path)["training"]["images_seen"] == self.nimg
        except (UserError, KeyError, TypeError):
            return False

    @torch.no_grad()
    def sample(self, count: int) -> Any:
        """Images of the first average for seeds 0 … count−1 by 18-step Heun, uint8 `[N, H, W, C]`."""
        from solvers import get_schedule, get_solver, solve

        sigmas = get_schedule("polynomial", 18, 0.002, 80.0)
        net = self.averages[0]
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        noise = stacked_randn(sample_generators(range(count)), shape).to(self.device)
        labels = None
        if self.labels is not None:
            drawn = draw_classes([generator(self.config.seed, 4)], net.label_dim, self._frequencies(), count)
            labels = torch.nn.functional.one_hot(drawn, net.label_dim).float().to(self.device)
        states = solve(get_solver("heun"), lambda x, s: net(x, s, labels), noise * 80.0, sigmas, every=17)
        return to_uint8(states[-1])


def train(config: PretrainConfig, device: torch.device, outdir: Path) -> None:
    """Run or continue a pre-training run in `outdir`."""
    make_folder(outdir, "outdir")
    held = lock(outdir)
    if held is None:
        raise UserError(f"another process trains in {outdir}; wait for it, or use another --outdir")
    with held:
        log = Logger(outdir / "log.txt")
        trainer = Trainer(config, device, outdir)
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
        reason = str(error).splitlines()[0][:120]
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
    channels, height, width = dataset.shape
    for remark in dataset.remarks:
        click.echo(remark, err=True)
    if height != width:
        raise UserError(f"{data} holds images of {height}×{width}; expected square ones, so crop them first")
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
    config = PretrainConfig(
        data=data,
        network=network,
        kimg=opts["kimg"],
        batch=opts["batch"],
        optimizer=opts["optimizer"],
        lr=RATES[opts["arch"]] if opts["lr"] is None else opts["lr"],
        decay=opts["decay"],
        ema=_widths(opts["ema"]),
        label_dropout=opts["label_dropout"],
        transfer=opts["transfer"],
        xflip=opts["xflip"],
        precision=pick_precision(opts["precision"], device),
        seed=opts["seed"],
        snap_kimg=opts["snap"],
    )
    if opts["dry_run"]:
        plan = {**config.to_json(), "images": len(dataset), "device": str(device), "outdir": outdir}
        click.echo(json.dumps(plan, indent=2))
        return
    train(config, device, Path(outdir))


if __name__ == "__main__":
    one_line_errors(main)()
