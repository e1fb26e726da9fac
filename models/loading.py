"""From a file, or a name, to a `DiffusionModel`."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from dnnlib.download import cache_dir, fetch
from torch_utils.checkpoint import check_state_dict, read_network, read_settings, save_network
from torch_utils.edm_pickle import read_edm_pickle

from .model import DiffusionModel, SamplingSettings
from .precond import NETWORKS, EDMPrecond
from .registry import ASSETS, DatasetRow, get_row

RUNS_DIR = Path("exps")
SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.safetensors")


def build_network(spec: dict[str, Any], tensors: dict[str, Tensor], source: str) -> EDMPrecond:
    """The network that `spec` (`class` and constructor arguments) describes, with `tensors` as its weights.

    It is built without memory first, so that a file whose settings ask for more than its tensors hold is refused
    before anything is allocated.
    """
    arguments = {name: value for name, value in spec.items() if name != "class"}
    if spec.get("class") != "EDMPrecond":
        raise click.ClickException(f"{source} holds a network of class {spec.get('class')!r}; expected EDMPrecond")
    _check_arguments(arguments, source)
    try:
        with torch.device("meta"):
            net = EDMPrecond(**arguments)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise click.ClickException(f"{source} describes a network that cannot be built ({error})") from None
    check_state_dict(net.state_dict(), tensors, source)
    net.load_state_dict(tensors, assign=True)
    return net.eval()


def _check_arguments(arguments: dict[str, Any], source: str) -> None:
    """Refuse unknown arguments, and counts that would take for ever to build."""
    known = set(inspect.signature(EDMPrecond).parameters)
    for network in NETWORKS.values():
        known |= set(inspect.signature(network).parameters)
    unknown = set(arguments) - known
    blocks, levels = arguments.get("num_blocks", 1), arguments.get("channel_mult", [])
    if unknown:
        raise click.ClickException(f"{source} describes a network with unknown arguments: {', '.join(sorted(unknown))}")
    for name, lowest, highest in (("sigma_data", 1e-6, 1e3), ("dropout", 0, 1), ("label_dropout", 0, 1)):
        value = arguments.get(name, 0.5)
        if type(value) not in (int, float) or not lowest <= value <= highest:
            raise click.ClickException(
                f"{source} describes a network with {name} {value!r}; expected {lowest:g} to {highest:g}"
            )
    if not isinstance(blocks, int) or blocks > 64 or not isinstance(levels, (list, tuple)) or len(levels) > 16:
        raise click.ClickException(
            f"{source} describes an unusable network (num_blocks {blocks!r}, channel_mult {str(levels)[:60]})"
        )


def load_teacher(
    dataset_name: str | None, model_path: str | os.PathLike | None = None, device: torch.device | str = "cpu"
) -> DiffusionModel:
    """The pre-trained model of a data set, in eval mode without gradients.

    Args:
        dataset_name: a name of `models.registry`; None with `model_path` for a model of one's own.
        model_path: a teacher of one's own: a `.safetensors` file of `training.pretrain`, or a pickle of EDM's training.
        device: where to put it.

    Raises:
        click.ClickException: unknown name, unreadable file, or a loader that is not there yet.
    """
    if model_path is not None:
        net, name = _read_own_teacher(Path(model_path)), dataset_name or Path(model_path).stem
        row = DatasetRow(name, "file", str(model_path), net.img_resolution, net.img_channels, net.label_dim)
    elif dataset_name is None:
        raise click.ClickException("no dataset_name and no model_path; give --dataset_name, or the file of a teacher")
    else:
        row = get_row(dataset_name)
        net = _read_registered(row)
    model = DiffusionModel(net, row.name, row.sigma_min, row.sigma_max)
    return model.to(device).eval().requires_grad_(False)


def _read_registered(row: DatasetRow) -> EDMPrecond:
    if row.loader == "embedded":
        return _read_own_teacher(ASSETS / row.source)
    if row.loader == "edm":
        return _read_own_teacher(fetch([row.source], cache_dir() / row.name / row.source.rsplit("/", 1)[1]))
    raise click.ClickException(
        f"the loader of {row.name} ({row.loader}) is not part of this version; use emoji32 or one "
        "of the EDM teachers, or --model_path with a teacher of your own"
    )


def _read_own_teacher(path: Path) -> EDMPrecond:
    if path.suffix == ".pkl":
        pickled = read_edm_pickle(path)
        return build_network({"class": pickled.class_name, **pickled.init_kwargs}, pickled.state_dict, str(path))
    tensors, settings = read_network(path)
    if settings.get("format") != "teacher":
        raise click.ClickException(
            f"{path} is a student, not a teacher; to distil it further, add --is_second_stage=True"
        )
    return build_network(settings["network"], tensors, str(path))


def make_student(teacher: DiffusionModel, sampling: SamplingSettings) -> DiffusionModel:
    """A trainable copy of `teacher`, with step-condition layers if `sampling` asks for them and it has none.

    New layers take the global generator's numbers and end in zero weights, so that the student starts as its teacher.
    """
    net = EDMPrecond(**{**teacher.net.init_kwargs, "use_step_condition": sampling.use_step_condition})
    missing, unexpected = net.load_state_dict(teacher.net.state_dict(), strict=False)
    if unexpected or any("step" not in name for name in missing):
        raise ValueError("the student's network must be the teacher's, with or without step-condition layers")
    if net.model.map_augment is not None:
        net.model.map_augment.requires_grad_(False)  # sampling has no augmentation labels: it never sees a gradient
    device = next(teacher.parameters()).device
    return DiffusionModel(net, teacher.dataset_name, sampling.sigma_min, sampling.sigma_max, sampling).to(device)


def network_spec(net: EDMPrecond) -> dict[str, Any]:
    """What `build_network` needs to know besides the weights."""
    return {"class": type(net).__name__, **net.init_kwargs}


def save_student(path: str | os.PathLike, student: DiffusionModel, training: dict[str, Any]) -> None:
    """Write a student as one `.safetensors` file with the settings that it needs, and those that made it."""
    sampling = asdict(student.sampling)
    settings = {"format": "student", "network": network_spec(student.net), "sampling": sampling, "training": training}
    save_network(path, student.net.state_dict(), settings)


def load_student(path: str | os.PathLike, device: torch.device | str = "cpu") -> DiffusionModel:
    """A distilled model, in eval mode without gradients; `.sampling` holds its settings.

    Args:
        path: a file, a run directory (its newest snapshot), or the number of a run under `./exps`.

    Raises:
        click.ClickException: no such file or run, or one that is not a student.
    """
    path = find_student(path)
    sampling = read_sampling(path)
    tensors, settings = read_network(path)
    net = build_network(settings["network"], tensors, str(path))
    if net.model.use_step_condition != sampling.use_step_condition:
        raise click.ClickException(
            f"{path} contradicts itself: its network and its settings differ in use_step_condition"
        )
    model = DiffusionModel(net, sampling.dataset_name, sampling.sigma_min, sampling.sigma_max, sampling)
    try:
        sampling.schedule(model.noise_schedule)
    except ValueError as error:
        raise click.ClickException(f"{path} holds a student that cannot be sampled: {error}") from None
    return model.to(device).eval().requires_grad_(False)


def read_sampling(path: str | os.PathLike) -> SamplingSettings:
    """The sampling settings in a student file, without reading its weights."""
    settings = read_settings(path)
    if settings.get("format") != "student":
        raise click.ClickException(f"{path} is a teacher, not a student; sample it with --model_path=teacher")
    return SamplingSettings.from_json(settings.get("sampling"), str(path))


def is_teacher_file(path: Path) -> bool:
    """Whether a network file is a teacher: a pickle of EDM's training, or what `training.pretrain` writes."""
    return path.suffix == ".pkl" or read_settings(path).get("format") == "teacher"


def find_student(path: str | os.PathLike, runs_dir: Path = RUNS_DIR) -> Path:
    """Resolve a file, a run directory or a run number to the newest student file."""
    if re.fullmatch(r"\d+", str(path)) and not Path(path).exists():
        runs = sorted(runs_dir.glob(f"{int(path):05d}-*")) if runs_dir.is_dir() else []
        if not runs:
            raise click.ClickException(
                f"run {path} does not exist under ./{runs_dir}; expected a folder {int(path):05d}-…"
            )
        path = runs[0]
    if not Path(path).is_dir():
        return Path(path)
    snapshots = [(int(m[1]), p) for p in Path(path).iterdir() if (m := SNAPSHOT.fullmatch(p.name))]
    if not snapshots:
        raise click.ClickException(f"{path} holds no network-snapshot-*.safetensors; the run has not saved one yet")
    return max(snapshots)[1]
