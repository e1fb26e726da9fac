"""How a teacher is trained: objective, learning rate, averages of the weights, and the state of a run.

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

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib import UserError
from models.precond import EDM2Precond, EDMPrecond
from solvers import get_schedule, get_solver, solve
from torch_utils.checkpoint import read_network, read_settings, read_state, save_network, save_state, usable_state
from torch_utils.device import PRECISIONS
from torch_utils.images import draw_grid, save_picture, square_rows, to_uint8
from torch_utils.metrics.image_set import ImageDataset
from torch_utils.random import derive_seed, draw_classes, generator, sample_generators, stacked_randn

from .config import with_defaults
from .optimizers import make_optimizer, set_learning_rate

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
        resolution, center_crop: how images of `data` become squares of one size; None, they are.
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
    resolution: int | None = None
    center_crop: bool = False
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

    def __init__(self, config: PretrainConfig, dataset: ImageDataset, device: torch.device, outdir: Path) -> None:
        self.config, self.device, self.outdir = config, device, outdir
        self.images = torch.from_numpy(dataset.load_all())
        self.labels: Tensor | None = None
        #: Part of the images that each class has.
        self.frequencies: list[float] | None = None
        label_dim = config.network["label_dim"]
        if label_dim:
            self.labels = torch.nn.functional.one_hot(torch.from_numpy(dataset.labels), label_dim).float()
            self.frequencies = self.labels.double().mean(0).tolist()
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
            if self.frequencies is not None:
                network["class_frequencies"] = self.frequencies
            settings = {"format": "teacher", "network": network, "training": {**training, "ema": width}}
            save_network(path, average.state_dict(), settings)
        save_picture(draw_grid(square_rows(self.sample(64))), self.outdir / "samples.png")

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
        with usable_state(self.outdir / STATE):
            mine, saved = self.config.to_json(), with_defaults(state.get("config", {}), PretrainConfig)
            changed = [
                f"{k}: {saved.get(k)} there, {v} here" for k, v in mine.items() if k not in free and saved.get(k) != v
            ]
            if changed:
                raise UserError(
                    f"{self.outdir} holds a run of other settings ({'; '.join(changed)}); use them, or another --outdir"
                )
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
        sigmas = get_schedule("polynomial", 18, 0.002, 80.0)
        net = self.averages[0]
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        noise = stacked_randn(sample_generators(range(count)), shape).to(self.device)
        labels = None
        if net.label_dim:
            drawn = draw_classes([generator(self.config.seed, 4)], net.label_dim, self.frequencies, count)
            labels = torch.nn.functional.one_hot(drawn, net.label_dim).float().to(self.device)
        states = solve(get_solver("heun"), lambda x, s: net(x, s, labels), noise * 80.0, sigmas, every=17)
        return to_uint8(states[-1])
