"""Options that several commands share: which samples, which detector, which record, which machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dnnlib import UserError
from dnnlib.options import Real, Whole, device_option, offline_option, section
from dnnlib.progress import is_first_process
from models.detectors import NAMES, check_detector
from models.detectors.inception import RESIZES
from models.registry import known_names
from models.sampling import SamplerOptions
from solvers import SCHEDULES, SOLVERS
from torch_utils.graphs import MODES

from .evaluation.figures import PRDC, check_suffix
from .evaluation.results import METRICS
from .evaluation.sources import REFERENCES

MAX_SEED, MAX_RANGE = 2**32 - 1, 10**7


def combined(*decorators: Callable) -> Callable:
    """Several click decorators as one, in this order."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


# ------------------------------------------------------------------------------------------------------------------
# Samples


def parse_seeds(context: click.Context | None, param: click.Parameter | None, value: str) -> list[int]:
    """`0,3,10-12` → [0, 3, 10, 11, 12]; duplicates are dropped, the order is kept."""
    seeds: dict[int, None] = {}
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if not match or not first <= last <= MAX_SEED or len(seeds) + last - first >= MAX_RANGE:
            raise UserError(f"--seeds={value!r} does not parse at {part!r}; expected a list such as 0-63 or 1,2,5-10")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def describe_seeds(seeds: Sequence[int]) -> str:
    """`0-4999`, or the whole list where it has gaps."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def seed_blocks(seeds: list[int], trials: int) -> list[list[int]]:
    """The seeds, and the same pattern shifted past its end for every further trial."""
    step = max(seeds) - min(seeds) + 1
    if max(seeds) + (trials - 1) * step > MAX_SEED:
        raise UserError(f"--trials={trials} runs past the last seed, {MAX_SEED}; use lower --seeds")
    return [[seed + t * step for seed in seeds] for t in range(trials)]


teacher_option = click.option(
    "--teacher", "teacher_path", help="Where a student's own teacher is, if it was moved", metavar="PATH"
)
also_option = click.option("--also", help="One more student of the same teacher; may be given several times",
                           metavar="PATH", multiple=True)  # fmt: skip
cuda_graph_option = click.option(
    "--cuda_graph", help="CUDA: replay runs of the frozen network as one launch; auto: where that is faster",
    type=click.Choice(MODES), default="auto"
)  # fmt: skip
num_steps_option = click.option("--num_steps", help="SFD-v: timestamps of the student; default: its own",
                                type=Whole(2, 1000))  # fmt: skip
compared_seeds_option = click.option("--seeds", help="Random seeds, one image each, for every sampler or snapshot",
                                     metavar="LIST", default="0-1999", callback=parse_seeds)  # fmt: skip
#: A model, and what it is to make.
sample_options = combined(
    section("What to sample"),
    click.option("--model_path", help="Student: file, run directory or run number; `teacher`: of --dataset_name; or "
                 "the file of a teacher of your own", metavar="PATH", required=True),
    click.option("--dataset_name", help="Checked against the student; needed for a teacher. One of " + known_names(),
                 metavar="NAME"),
    click.option("--seeds", help="Random seeds, one image each, e.g. 1,2,5-10", metavar="LIST", default="0-63",
                 callback=parse_seeds),
    click.option("--class", "class_index", help="Class of all images; default: random by seed",
                 type=Whole(0, 10**6)),
    click.option("--prompt", help="Caption of all images, for a text-conditioned model", metavar="TEXT"),
    click.option("--prompts", help="File of captions, one in each line, or a CSV file with a column text: seed i gets "
                 "number i, and they start again at the end; default: random by seed", metavar="TXT|CSV"),
    click.option("--guidance_rate", help="Guidance towards the caption or the class, 1 for none; default: the rate "
                 "that the student records, or the teacher's own", type=Real(-1000, 1000)),
    teacher_option,
)  # fmt: skip
#: How it samples; with those of `sample_options` the fields of `SamplerOptions`.
solver_options = combined(
    section("Student"),
    click.option("--num_steps", help="Timestamps. Student: one of 4–7 for SFD-v. Teacher: default 18",
                 type=Whole(2, 10_000)),
    section("Teacher"),
    click.option("--solver", help="Teacher: solver; default: heun", type=click.Choice(SOLVERS)),
    click.option("--max_order", help="Teacher: order of a multistep solver", type=Whole(1, 4)),
    click.option("--predict_x0", help="Teacher: DPM-Solver++ predicts the data; default: True", type=bool),
    click.option("--lower_order_final", help="Teacher: DPM-Solver++ lowers its last orders; default: True", type=bool),
    click.option("--thresholding", help="Teacher: dynamic thresholding; default: False", type=bool),
    click.option("--schedule_type", help="Teacher: time schedule; default: polynomial", type=click.Choice(SCHEDULES)),
    click.option("--schedule_rho", help="Teacher: exponent of the schedule; default: 7",
                 type=Real(0, 1000, min_open=True)),
    click.option("--afs", help="Teacher: analytical first step; default: False", type=bool),
    click.option("--guide", help="Teacher: file or registered name of a second network, which guidance leads away from",
                 metavar="PATH|NAME"),
    click.option("--denoise_to_zero", help="Teacher: one more evaluation, from sigma_min to 0; default: with heun",
                 type=bool),
)  # fmt: skip


def sampler_options(opts: dict[str, Any]) -> SamplerOptions:
    """What a command line asks of a sampler."""
    return SamplerOptions(**{name: opts[name] for name in SamplerOptions.__dataclass_fields__})


# ------------------------------------------------------------------------------------------------------------------
# Evaluation


def check_detector_option(context: click.Context, param: click.Parameter, value: str) -> str:
    """Find a wrong name before anything is loaded."""
    check_detector(value)
    return value


def parse_npz(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.endswith(".npz"):
        raise UserError(f"--{param.name}={value} is not a name ending in .npz; choose one that is")
    return value


def parse_ints(context: click.Context | None, param: click.Parameter, value: str) -> list[int]:
    """`0` or `0,1,2` → integers without repetition."""
    parts = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch("[0-9]{1,10}", part) for part in parts) or len(set(parts)) != len(parts):
        raise UserError(f"--{param.name}={value[:80]!r} does not parse; expected a list such as 0 or 0,1,2")
    return [int(part) for part in parts]


def parse_metrics(context: click.Context | None, param: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    if set(names) & {"prdc", *PRDC}:
        raise UserError(f"--metrics={value!r}: precision, recall, density and coverage are computed by prdc.py calc")
    if not set(names) <= set(METRICS) or len(set(names)) != len(names):
        raise UserError(f"--metrics={value!r} is unknown; expected a list of {', '.join(METRICS)}")
    return names


metrics_option = click.option(
    "--metrics", help="List of " + ", ".join(METRICS), metavar="LIST", default="fid", callback=parse_metrics
)
ref_option = click.option(
    "--ref", help="Reference: .npz of mu and sigma (path or URL), images as for --images, .npz of features, or one of "
    + ", ".join(REFERENCES), metavar="NPZ|URL|PATH|NAME", required=True
)  # fmt: skip
images_option = click.option(
    "--images", help="Folder (searched in depth), zip or npz of images, or .npz of features", metavar="PATH",
    required=True,
)  # fmt: skip
detector_options = combined(
    click.option("--detector", help=f"Feature network: {', '.join(NAMES)}, a local .pth, or a TorchScript .pt",
                 metavar="NAME|PATH", default="inception", callback=check_detector_option),
    click.option("--resize", help="How Inception gets its 299 pixels: tf1 (EDM, StyleGAN), or as pytorch-fid",
                 type=click.Choice(RESIZES), default="tf1"),
    click.option("--detector-runs-code", help="Allow a TorchScript --detector, which is a program", is_flag=True),
)  # fmt: skip
record_options = combined(
    click.option("--desc", help="Text for the record", metavar="STR"),
    click.option("--features", help="Keep the features of the images here; used again if they fit", metavar="NPZ",
                 callback=parse_npz),
    click.option("--out", help="File that gets a JSON line for each metric", metavar="JSONL", default="metrics.jsonl"),
)  # fmt: skip


def parse_figure(context: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    return None if value is None else check_suffix(Path(value), param.name)


figure_option = click.option("--figure", help="Where to draw; its suffix says as what", metavar="PNG|PDF|SVG",
                             callback=parse_figure)  # fmt: skip
dry_run_option = click.option("-n", "--dry-run", help="Print what would be done, then stop", is_flag=True)


def show_plan(**plan: Any) -> None:
    """What a command would do, as JSON, of rank 0."""
    if is_first_process():
        click.echo(json.dumps(plan, indent=2))


machine_options = combined(
    click.option("--batch", help="Images at a time, per process", type=Whole(1, 2**20), default=64),
    click.option("--workers", help="Processes that decode images, per process", type=Whole(0, 1024), default=2),
    device_option,
    offline_option,
    dry_run_option,
)  # fmt: skip
