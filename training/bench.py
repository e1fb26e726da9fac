"""How fast this program is on a device: `python -m training.bench`.

Networks have their published shapes and random weights, so nothing is downloaded. Every stage runs the code of
`train.py` and `sample.py`, and the best of its runs counts. On the CPU, time is that of the processor over the threads,
which other programs on the machine lengthen less than the clock's.
"""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from dnnlib import format_count, make_folder, one_line_errors, write_text
from dnnlib.options import Command, Whole, device_option, precision_option, section
from models.building import build_on_meta, highest_sigma, row_config
from models.detectors.inception import InceptionV3
from models.latent import LatentSpace
from models.loading import load_teacher, make_student
from models.model import Cond, DiffusionModel
from models.networks.autoencoders import AUTOENCODERS
from models.networks.layers import freeze
from models.published.state_dicts import FIRST_STAGE
from models.registry import DatasetSpec, get_row
from models.sampling import Sampler, network_batch
from torch_utils.device import (
    PRECISIONS,
    channels_last_on,
    configure_backends,
    pick_device,
    pick_precision,
    prefers_channels_last,
)
from torch_utils.graphs import Graphs, check_mode
from torch_utils.images import to_uint8
from torch_utils.metrics.frechet import frechet_distance
from torch_utils.metrics.prdc import precision_recall_density_coverage

from .config import DistillConfig
from .cost import TRAINED, Cost, matrix_peak, run_cost, timed
from .distill import Distiller, Teacher
from .inputs import fill_randomly, random_inputs
from .memory import largest_micro_batch
from .options import cuda_graph_option, dry_run_option, show_plan
from .report import memory

#: Evaluations of the students that are sampled.
NFES = (2, 3, 4, 5)
FEATURES = 2048
#: A stage that has taken so many seconds begins no further run, so that all of them end within minutes.
STAGE_SECONDS = 15.0


@dataclass
class Timing:
    """One line of the table.

    Attributes:
        stage: what is timed.
        items: samples, images or features that one run processes.
        flops: operations of one run as the network is written, 0 where they are not counted.
        seconds: of the best run.
        runs: of which it is the best.
        memory: most memory during the stage, bytes; on the CPU since the start of the program.
    """

    stage: str
    items: int
    flops: float = 0.0
    seconds: float = float("inf")
    runs: int = 0
    memory: int = 0

    def to_json(self, peak: float) -> dict[str, Any]:
        rate = self.flops / self.seconds
        return {
            **asdict(self),
            "per_second": self.items / self.seconds,
            "tflops": rate / 1e12 if self.flops else None,
            "share_of_peak": rate / peak if self.flops else None,
        }


@dataclass
class Setup:
    """Teacher and student of a data set in a precision, with what they are run on."""

    distiller: Distiller
    samples: Tensor
    cond: Cond


def random_teacher(row: DatasetSpec, device: torch.device) -> DiffusionModel:
    """The published network of `row`, and its guide, with random weights."""
    nets = [build_on_meta(each).to_empty(device=device) for each in (row, row.guide) if each is not None]
    for net in nets:
        fill_randomly(net)
    latent = None if row.codec is None else _random_latent_space(row)
    space = (row.sigma_min, highest_sigma(row, nets[0]), latent)
    return freeze(DiffusionModel(nets[0], row.name, *space, guide=nets[1] if row.guide is not None else None))


def make_setup(teacher: DiffusionModel, config: DistillConfig, cuda_graph: str = "off") -> Setup:
    """What a run of `config` with this teacher computes, in its precision; for the mode see `Graphs`."""
    sampling = config.sampling(teacher.sigma_min, teacher.sigma_max)
    student = make_student(teacher, sampling)
    teacher.compute_dtype = student.compute_dtype = PRECISIONS[config.precision]
    trajectories = Teacher(teacher, config, sampling, Graphs(cuda_graph))
    size = largest_micro_batch(trajectories, student, None, config.batch)
    distiller = Distiller(trajectories, student, config, size)
    torch.manual_seed(0)
    inputs = random_inputs(teacher.net, config.batch, next(teacher.parameters()).device)
    return Setup(distiller, inputs["x"], inputs.get("condition", inputs.get("class_labels")))


def _random_latent_space(row: DatasetSpec) -> LatentSpace:
    config = row_config(row)
    spec = {name: value for name, value in config["first_stage"].items() if name not in ("class", "scale_factor")}
    stage = AUTOENCODERS[config["first_stage"]["class"]](**spec)
    fill_randomly(stage)
    tensors = {FIRST_STAGE + name: tensor for name, tensor in stage.state_dict().items()}
    return LatentSpace(config, lambda: (tensors, Path("random weights")))


def network_stages(setup: Setup, config: DistillConfig) -> dict[str, Callable[[], Any]]:
    """What is timed, by the name of its stage."""
    distiller, x, cond = setup.distiller, setup.samples, setup.cond
    steps, student = config.num_steps, distiller.student
    sigmas = distiller.teacher.sigmas(steps)[:: config.M + 1]

    def teach() -> None:
        for part, conditions in _parts(x, cond, distiller.micro_batch_size):
            distiller.teacher.trajectory(part * student.sigma_max, conditions, steps)

    def step() -> None:
        """The second step, the first one that is not analytical."""
        student.train()
        parts = _parts(x * float(sigmas[1]), cond, distiller.micro_batch_size)
        states, conditions = [part for part, _ in parts], [part for _, part in parts]
        distiller._step(1, states, states, conditions, sigmas[1:3], student.sampling)

    def make_sampler(nfe: int) -> Sampler:
        settings, mode = replace(student.sampling, num_steps=nfe + 1 + config.afs), distiller.teacher.graphs.mode
        return Sampler(student, settings.plan, settings.schedule(student.noise_schedule), graphs=Graphs(mode))

    def sample(sampler: Sampler) -> None:
        student.eval()
        for part, conditions in _parts(x, cond, min(distiller.micro_batch_size, network_batch(student, len(x)))):
            states = sampler.run(part * student.sigma_max, conditions)
            if not student.is_latent:
                to_uint8(states)

    actions: dict[str, Callable[[], Any]] = {
        "training iteration": lambda: distiller.iterate(x, cond, steps),
        "teacher trajectory": teach,
        "student step": step,
    }
    actions |= {f"sampling, NFE {nfe}": partial(sample, make_sampler(nfe)) for nfe in NFES}
    if student.is_latent:
        actions["decoding"] = lambda: student.decode(x[:4])
    return actions


def _parts(x: Tensor, cond: Cond, size: int) -> list[tuple[Tensor, Cond]]:
    parts = x.split(size)
    return list(zip(parts, [None] * len(parts) if cond is None else cond.split(size)))


def _untimed(stage: str, cost: Cost, batch: int) -> Timing:
    """The line of a stage of the networks, without times."""
    evaluations = {
        "training iteration": cost.teacher + TRAINED * cost.student,
        "teacher trajectory": cost.teacher,
        "student step": TRAINED,
        "decoding": 0,
    }
    count = evaluations[stage] if stage in evaluations else int(stage.split()[-1])
    return Timing(stage, 4 if stage == "decoding" else batch, count * cost.flops * batch)


def evaluation_stages(device: torch.device, quick: bool) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Features, Fréchet distance and PRDC on made-up data; the published detector with random weights."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, [2 if quick else 16, 3, 32, 32], dtype=np.uint8)).to(device)
    detector = InceptionV3().eval().requires_grad_(False).to(device)
    fill_randomly(detector)
    dim, count = (64, 200) if quick else (FEATURES, 5000)
    real, fake = rng.standard_normal([2, count, dim]).astype(np.float32)
    moments = [(f.mean(0, dtype=np.float64), np.cov(f, rowvar=False)) for f in (real, fake)]
    with torch.no_grad():
        detector(images[:1])

    def extract() -> None:
        with torch.no_grad():
            detector(images)

    return {
        "Inception features": (len(images), extract),
        f"Fréchet distance, {dim} dimensions": (1, lambda: frechet_distance(*moments[0], *moments[1])),
        f"PRDC of {count} features": (count, lambda: precision_recall_density_coverage(real, fake, device=device)),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU since the last call, on the CPU since the start of the program."""
    found = memory(device)
    return int(found.get("gpumem", found["cpumem"]) * 2**30)


def rounds(repeats: int) -> Iterator[int]:
    """Up to `repeats` rounds of a stage, of which none but the first begins after `STAGE_SECONDS`."""
    start = time.perf_counter()
    for i in range(repeats):
        if i == 0 or time.perf_counter() - start < STAGE_SECONDS:
            yield i


def measure(
    timing: Timing, action: Callable[[], Any], device: torch.device, repeats: int, warm_up: bool = False
) -> Timing:
    """`timing` with the best of up to `repeats` runs of `action`."""
    if warm_up:
        action()
    for timing.runs, _ in enumerate(rounds(repeats), 1):
        peak_memory(device)
        timing.seconds = min(timing.seconds, timed(action, device))
        timing.memory = max(timing.memory, peak_memory(device))
    return timing


def line(timing: Timing, peak: float) -> str:
    """A row of the table."""
    values = timing.to_json(peak)
    rate = f"{values['tflops']:9.3f} {100 * values['share_of_peak']:7.0f} %" if timing.flops else f"{'':19s}"
    memory = f"{timing.memory / 2**30:8.2f}" if timing.memory else f"{'':8s}"
    return f"{timing.stage:33s} {timing.seconds:9.3f} {values['per_second']:9.1f} {rate} {memory}".rstrip()


HEADER = f"{'stage':33s} {'seconds':>9s} {'items/s':>9s} {'TFLOP/s':>9s} {'of peak':>9s} {'GiB':>8s}"


@click.command(cls=Command)
@section("What to time")
@click.option("--dataset_name", help="Whose network to run, with random weights; default: emoji32", metavar="NAME")
@click.option("--model_path", help="A teacher of your own in its place: file, run, or folder of diffusers",
              metavar="PATH")  # fmt: skip
@click.option("--batch", help="Samples in a training iteration", type=Whole(1, 2**20), default=64)
@click.option("--repeats", help="Most runs of each stage; the best counts", type=Whole(1, 1000), default=3)
@click.option("--quick", help="One run of every stage, small evaluation stages", is_flag=True)
@section("Record")
@click.option("--json", "json_path", help="Write everything to this file too", metavar="FILE")
@section("Machine")
@precision_option
@click.option("--channels_last", help="Memory order of the U-Nets; default: True on the CPU alone", type=bool)
@device_option
@cuda_graph_option
@dry_run_option
def main(dataset_name: str | None, model_path: str | None, batch: int, json_path: str | None, **opts: Any) -> None:
    """Time training, sampling and evaluation on this device.

    \b
    Examples:
      python -m training.bench --dataset_name=emoji32
      python -m training.bench --dataset_name=cifar10 --batch=128 --json=cifar10.json
      python -m training.bench --model_path=path/to/stable-diffusion-2-1 --batch=8
    """
    if model_path is None:
        dataset_name = dataset_name or "emoji32"
        get_row(dataset_name)
    device = pick_device(opts["device"])
    precision = pick_precision(opts["precision"], device)
    check_mode(opts["cuda_graph"], device)
    if opts["channels_last"] is None:
        opts["channels_last"] = prefers_channels_last(device)
    if opts["dry_run"]:
        plan = {"dataset_name": dataset_name, "model_path": model_path, "batch": batch, **opts}
        return show_plan(**plan | {"precision": precision, "device": str(device)}, json=json_path)
    if json_path is not None:
        make_folder(Path(json_path).resolve().parent, "json_path")
    configure_backends()
    with channels_last_on(*[device.type] * opts["channels_last"]):
        repeats = 1 if opts["quick"] else opts["repeats"]
        if model_path is not None:
            teacher = load_teacher(dataset_name, model_path, device)
        else:
            teacher = random_teacher(get_row(str(dataset_name)), device)
        schedule: dict[str, Any] = dict(schedule_type="discrete", schedule_rho=1) if teacher.has_text else {}
        config = DistillConfig(
            teacher.dataset_name, model_path=model_path, batch=batch, precision=precision, **schedule
        )
        results = run_stages(teacher, config, opts["quick"], repeats, opts["cuda_graph"])
    if json_path is not None:
        write_text(Path(json_path), json.dumps(results, indent=2))


def run_stages(
    teacher: DiffusionModel, config: DistillConfig, quick: bool, repeats: int, cuda_graph: str = "off"
) -> dict[str, Any]:
    """Time every stage and print a line for each; what is recorded of them."""
    device, batch, precision = next(teacher.parameters()).device, config.batch, config.precision
    # On the CPU a product in float16 may be emulated, and takes for ever.
    dtypes = {"fp32", precision} if device.type == "cpu" else PRECISIONS
    peaks = {name: matrix_peak(device, PRECISIONS[name]) for name in PRECISIONS if name in dtypes}
    cost = run_cost(config, teacher.net, guide=teacher.guide)
    setup = make_setup(teacher, config, cuda_graph)
    about = {
        "dataset_name": teacher.dataset_name, "device": _device_name(device), "threads": torch.get_num_threads(),
        "precision": precision, "channels_last": prefers_channels_last(device), "batch": batch,
        "cuda_graph": cuda_graph,
        "micro_batch": setup.distiller.micro_batch_size, "repeats": repeats, "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    click.echo(", ".join(f"{name} {value}" for name, value in about.items()))
    rates = ", ".join(f"{name} {format_count(rate)}FLOP/s" for name, rate in peaks.items())
    click.echo(f"matrix product: {rates}; one evaluation: {format_count(cost.flops)}FLOP\n\n{HEADER}")
    timings: list[Timing] = []
    for stage, action in network_stages(setup, config).items():
        # The first stage runs everything that the others do.
        timings.append(measure(_untimed(stage, cost, batch), action, device, repeats, warm_up=not timings))
        click.echo(line(timings[-1], peaks[precision]))
    del setup, action
    for stage, (items, action) in evaluation_stages(device, quick).items():
        timings.append(measure(Timing(stage, items), action, device, repeats))
        click.echo(line(timings[-1], peaks[precision]))
    results = {"about": about, "matrix_peaks": peaks, "flops_per_evaluation": cost.flops}
    return results | {"timings": [timing.to_json(peaks[precision]) for timing in timings]}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


if __name__ == "__main__":
    one_line_errors(main)()
