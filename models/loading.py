"""From a file, or a name, to a `DiffusionModel`."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, sha256_of
from torch_utils.checkpoint import read_network, read_settings, save_network
from torch_utils.device import moved_to

from .building import build_network, highest_sigma, network_spec, read_config, row_config
from .diffusers_precond import DiffusersPrecond
from .diffusers_space import AnySpace, FolderSpace, read_space, scaling_of
from .latent import LatentScale, LatentSpace
from .model import DiffusionModel, SamplingSettings, Student
from .networks.layers import freeze
from .noise import HIGHEST
from .paths import digest_of, find_model, find_student, is_teacher_file, own_name
from .precond import CFGPrecond, Precond
from .published.diffusers import is_folder, is_stable_diffusion
from .published.diffusers_folder import open_folder, read_denoiser
from .published.edm_pickle import read_edm_pickle
from .published.networks import latent_network, published_network, read_autoencoder, read_published
from .published.reference_students import read_reference_student
from .published.state_dicts import FIRST_STAGE, TEXT
from .registry import ROWS, DatasetSpec, fetch_weights, get_row

#: What describes the autoencoder of EDM2's networks on latents, those of the user too.
EDM2_LATENTS = "edm2-img512"
#: Loaders of files that describe their network themselves.
DESCRIBED = ("embedded", "edm", "edm2")


def load_teacher(
    dataset_name: str | None,
    model_path: str | os.PathLike | int | None = None,
    device: torch.device | str = "cpu",
    guide_path: str | os.PathLike | None = None,
    with_guide: bool = True,
) -> DiffusionModel:
    """The pre-trained model of a data set, in eval mode without gradients.

    Args:
        dataset_name: a name of `models.registry`; None with `model_path` for a model of one's own.
        model_path: a teacher of one's own: a run of `training.pretrain` (directory or number) or its file, a pickle of
            EDM's training, or a folder of diffusers; for a data set of Stable Diffusion also a checkpoint in the
            published layout.
        device: where to put it.
        guide_path: what guidance leads away from, in place of this one without its condition; see `find_guide`.
        with_guide: whether a registered teacher comes with its guide; without guidance it is not even fetched.

    Raises:
        UserError: unknown name, unreadable file, one that is not what it should be, or a guide that does not fit.
    """
    latent: AnySpace | None
    own = None if model_path is None else find_model(model_path)
    if own is not None and is_folder(own) and not _is_stable_diffusion(dataset_name):
        net, latent, row = _read_folder(dataset_name, own)
    elif own is not None and is_stable_diffusion(own):
        row = _stable_diffusion_row(dataset_name, own)
        net, latent = _read_registered(row, own)
    elif own is not None:
        (net, scale), name = _read_own_teacher(own), dataset_name or own_name(own)
        latent = _latent_space(net, name, str(own), scale=scale)
        spec = DatasetSpec(name, "file", (str(own),), net.img_resolution, net.img_channels, net.label_dim)
        row = get_row(name) if isinstance(net, CFGPrecond) and latent is not None else spec
    elif dataset_name is None:
        raise UserError("is missing; give the name of a data set, or the file of a teacher", "dataset_name")
    else:
        row = get_row(dataset_name)
        net, latent = _read_registered(row)
        if row.guide is not None and guide_path is None:
            guide_path = fetch_weights(row.guide) if with_guide else None
    guide = None if guide_path is None else read_guide(guide_path, net, latent is not None, scaling_of(latent))
    rate = 1.0 if row.guide is not None and guide is None else row.guidance_rate
    model = DiffusionModel(net, row.name, row.sigma_min, highest_sigma(row, net), latent, rate, guide)
    return freeze(model.to(device))


def find_guide(guide: str | os.PathLike) -> Path:
    """The file or folder of a teacher that guides: a registered one by its name, fetched, or as `find_model` takes it.

    What is called like a registered one is ./NAME.

    Raises:
        UserError: no such model, or a registered one of another layout than those of EDM and EDM2.
    """
    if str(guide) not in ROWS:
        return find_model(guide)
    row = get_row(str(guide))
    if row.loader not in DESCRIBED:
        raise UserError(f"{row.name} cannot be a guide by its name; expected one of EDM, EDM2, or emoji32", "guide")
    return fetch_weights(row)


def read_guide(path: str | os.PathLike, net: Precond, is_latent: bool, scaling: LatentScale | None = None) -> Precond:
    """A network that guides `net`: of the same states, and of the same classes or none.

    Args:
        path: as `find_guide` takes it.
        is_latent, scaling: whether these states are latents, and how they are scaled, where that is known.

    Raises:
        UserError: it has other states or classes, or latents that are scaled in another way.
    """
    found = find_guide(path)
    guide: Precond
    if is_folder(found):
        folder = open_folder(found)
        guide, space = read_denoiser(folder), read_space(folder)
        found_scaling = scaling_of(space)
    else:
        guide, found_scaling = _read_own_teacher(found)

    def states(n: Precond, is_latent: bool) -> str:
        kind = "latents" if is_latent else "pixels"
        return f"{n.img_channels}×{n.img_resolution}² {kind}{' with text' if n.context_dim else ''}"

    needed, own = states(net, is_latent), states(guide, found_scaling is not None)
    if net.context_dim is not None or own != needed or guide.label_dim not in (0, net.label_dim):
        expected = f"{needed}, {net.label_dim} classes" + (" or none" if net.label_dim else "")
        own += f", {guide.label_dim} classes"
        raise UserError(f"{path} cannot guide this teacher: it is a network of {own}; expected {expected}", "guide")
    if scaling is not None and found_scaling is not None and not scaling.is_close(found_scaling):
        raise UserError(f"{path} cannot guide this teacher: its latents are scaled in another way", "guide")
    return guide


def _is_stable_diffusion(dataset_name: str | None) -> bool:
    """Whether a data set's model is Stable Diffusion v1, whose folders are read without diffusers."""
    return dataset_name in ROWS and ROWS[dataset_name].loader == "stable-diffusion"


def _stable_diffusion_row(dataset_name: str | None, model_path: str | os.PathLike) -> DatasetSpec:
    if dataset_name is None or not _is_stable_diffusion(dataset_name):
        name = next(name for name in ROWS if _is_stable_diffusion(name))
        raise UserError(f"{model_path} is a Stable Diffusion model; name its data set, {name}", "dataset_name")
    return ROWS[dataset_name]


def _read_folder(dataset_name: str | None, path: Path) -> tuple[Precond, FolderSpace | None, DatasetSpec]:
    """The model in a folder of diffusers, by that package; with a `dataset_name`, it has to be of that size.

    Sampling starts at its own highest noise level, or at `HIGHEST` where that is higher.
    """
    folder = open_folder(path)
    if dataset_name in ROWS:
        row, size = ROWS[dataset_name], folder.config["sample_size"]
        expected = row.latent_resolution if folder.is_latent else row.resolution
        if size != expected:
            raise UserError(
                f"{path} has states of {size}², {dataset_name} of {expected}²; leave it out", "dataset_name"
            )
    net, latent = read_denoiser(folder), read_space(folder)
    spec = DatasetSpec(
        dataset_name or own_name(path),
        "file",
        (str(path),),
        net.img_resolution,
        net.img_channels,
        net.label_dim,
        folder.family.sigma_min,
        min(net.noise_schedule.sigma_max, HIGHEST),
        text=net.context_dim is not None,
        guidance_rate=folder.guidance_rate,
    )
    return net, latent, spec


def guidance_of(dataset_name: str | None, model_path: str | os.PathLike | None = None) -> tuple[bool, float]:
    """Whether a teacher is conditioned on captions, and the rate that it is guided with unless another one is given.

    This reads no weights. A student at `model_path` answers for its teacher.
    """
    if dataset_name in ROWS:
        return ROWS[dataset_name].text, ROWS[dataset_name].guidance_rate
    path: str | os.PathLike | None = None if model_path is None else find_model(model_path)
    if isinstance(path, Path) and path.is_file() and not is_teacher_file(path):
        path = read_sampling(path).teacher_path
    if path is None or not is_folder(path):
        return False, 1.0
    folder = open_folder(Path(path))
    return folder.family.text is not None, folder.guidance_rate


def _read_registered(row: DatasetSpec, own: Path | None = None) -> tuple[Precond, LatentSpace | None]:
    """The model of a row: the published one, or one of the user's `own` in a published layout."""
    if row.loader in DESCRIBED:
        path = fetch_weights(row)
        net, scale = _read_own_teacher(path)
        if (scale is None) != (row.codec is None):
            raise UserError(f"{path} is of {'pixels' if scale is None else 'latents'}; expected the published file")
        return net, _latent_space(net, row.name, str(path), scale=scale)
    config, (tensors, path) = row_config(row), read_published(row, own)
    if row.codec is None:
        return published_network(config["network"], tensors, path), None
    others = (FIRST_STAGE, TEXT) if row.text else FIRST_STAGE
    rest = {name: tensor for name, tensor in tensors.items() if name.startswith(others)}
    net = latent_network(config["network"], {k: v for k, v in tensors.items() if k not in rest}, path)
    return net, LatentSpace(config, lambda: (rest, path))


def own_latent_space(sampling: SamplingSettings, source: str) -> Path | None:
    """Where a student's first stage and text encoder are, if its teacher was a Stable Diffusion model of the user."""
    path = sampling.teacher_path
    if path is None or not _is_stable_diffusion(sampling.dataset_name):
        return None
    _check_there(path, source)
    return Path(path) if is_stable_diffusion(path) else None


def _check_there(path: str, source: str) -> None:
    if not Path(path).exists():
        raise UserError(
            f"{source} is a student of {path}, which is not there; its decoder and text encoder are needed: put it "
            "back, or say where it is",
            "teacher_path",
        )


def _latent_space(
    net: Precond, dataset_name: str, source: str, own: Path | None = None, scale: LatentScale | None = None
) -> LatentSpace | None:
    """What a network in a latent space needs besides.

    That is in the published file of its data set, or in the user's `own`; of EDM2's networks, which have a `scale` of
    their latents, it is a file of its own.
    """
    if scale is not None:
        if len(scale.scale) != net.img_channels:
            raise UserError(f"{source} scales {len(scale.scale)} channels, its network has {net.img_channels}")
        row = ROWS.get(dataset_name)
        config = read_config(EDM2_LATENTS if row is None or row.config is None else row.config)
        return LatentSpace(config, partial(read_autoencoder, config["first_stage"]), scale)
    if not isinstance(net, CFGPrecond):
        return None
    row, has_text = ROWS.get(dataset_name), net.context_dim is not None
    space = (net.img_channels, net.img_resolution, has_text)
    if row is None or (row.latent_channels, row.latent_resolution, row.text) != space:
        kind = f"{net.img_channels}×{net.img_resolution}² latents {'with' if has_text else 'without'} text"
        raise UserError(
            f"{source} is a network for {kind}, which {dataset_name} does not have; "
            "expected one of a latent data set, whose published file decodes them"
        )
    return LatentSpace(row_config(row), lambda: read_published(row, own))


def _folder_space(net: DiffusersPrecond, sampling: SamplingSettings, source: str) -> FolderSpace | None:
    """What a student's network in a latent space needs besides, from its teacher's folder."""
    if not net.is_latent:
        return None
    if sampling.teacher_path is None:
        raise UserError(f"{source} is a student of a folder of diffusers, but does not say which; train it again")
    _check_there(sampling.teacher_path, source)
    folder = open_folder(sampling.teacher_path)
    if (folder.module, folder.config["in_channels"]) != (net.init_kwargs["module"], net.img_channels):
        raise UserError(f"{source} is a student of a {net.init_kwargs['module']}, {folder.path} holds another model")
    return read_space(folder)


def _read_own_teacher(path: Path) -> tuple[Precond, LatentScale | None]:
    """A teacher of one's own, and how its latents are scaled, if it is one of EDM2 on latents."""
    if not path.exists():
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
        hub = f"; nothing is fetched by a name of the Hub: hf download {path} --local-dir DIR" if is_name else ""
        raise UserError(f"{path} does not exist; expected the file, folder or run of a teacher{hub}")
    scale = None
    if path.suffix == ".pkl":
        pickled = read_edm_pickle(path)
        is_student, tensors, scale = pickled.is_student, pickled.state_dict, pickled.latents
        spec = {"class": pickled.class_name, **pickled.init_kwargs}
    else:
        tensors, settings = read_network(path)
        is_student, spec = settings.get("format") != "teacher", settings["network"]
    if is_student:
        raise UserError(f"{path} is a student, not a teacher; a second stage distils it further", "is_second_stage")
    return build_network(spec, tensors, str(path)), scale


def make_student(teacher: DiffusionModel, sampling: SamplingSettings) -> Student:
    """A trainable copy of `teacher`, with step-condition layers if `sampling` asks for them and it has none.

    New layers take the global generator's numbers and end in zero weights, so that the student starts as its teacher.
    Where there are none, no weight is drawn, and none has memory twice.
    """
    kind, device = type(teacher.net), next(teacher.parameters()).device
    arguments = {**teacher.net.init_kwargs, "use_step_condition": sampling.use_step_condition}
    with torch.device("meta"):
        net = kind(**arguments)
    weights = {name: tensor.clone() for name, tensor in teacher.net.state_dict().items()}
    missing = net.state_dict().keys() - weights.keys()
    if weights.keys() - net.state_dict().keys() or any("step" not in name and "nfe" not in name for name in missing):
        raise ValueError("the student's network must be the teacher's, with or without step-condition layers")
    if missing:
        weights = kind(**arguments).to(device).state_dict() | weights
    net.load_state_dict(weights, assign=True)
    net.freeze_unused()
    net.normalize_weights()
    return moved_to(device, Student(net, sampling, teacher.latent))


def save_student(path: str | Path, student: Student, training: dict[str, Any]) -> None:
    """Write a student as one `.safetensors` file with the settings that it needs, and those that made it."""
    sampling = asdict(student.sampling)
    settings = {"format": "student", "network": network_spec(student.net), "sampling": sampling, "training": training}
    if isinstance(student.latent, LatentSpace) and student.latent.scale is not None:
        settings["latents"] = asdict(student.latent.scale)
    save_network(path, student.net.state_dict(), settings)


def load_student(
    path: str | os.PathLike | int,
    device: torch.device | str = "cpu",
    teacher_path: str | os.PathLike | None = None,
) -> Student:
    """A distilled model, in eval mode without gradients; `.sampling` holds its settings.

    Args:
        path: a file (ours, or a pickle of the reference's training), a run directory (its newest snapshot), or the
            number of a run under `./exps`.
        device: where to put it.
        teacher_path: where the file of its teacher is, if not where it was.

    Raises:
        UserError: no such file or run, or one that is not a student.
    """
    path, scale = find_student(path), None
    if path.suffix == ".pkl":
        spec, tensors, sampling = read_reference_student(path)
    else:
        sampling = read_sampling(path)
        tensors, settings = read_network(path)
        spec = settings["network"]
        if settings.get("latents") is not None:
            scale = LatentScale.from_json(settings["latents"], str(path))
    if teacher_path is not None:
        sampling = with_teacher(sampling, teacher_path, str(path))
    net = build_network(spec, tensors, str(path))
    if net.model.use_step_condition != sampling.use_step_condition:
        raise UserError(f"{path} contradicts itself: its network and its settings differ in use_step_condition")
    latent: AnySpace | None
    if isinstance(net, DiffusersPrecond):
        latent = _folder_space(net, sampling, str(path))
    else:
        latent = _latent_space(net, sampling.dataset_name, str(path), own_latent_space(sampling, str(path)), scale)
    model = Student(net, sampling, latent)
    try:
        sampling.schedule(model.noise_schedule)
    except ValueError as error:
        raise UserError(f"{path} holds a student that cannot be sampled: {error}") from None
    return freeze(model.to(device))


def embedded_digest(dataset_name: str | None) -> str | None:
    """SHA-256 of a teacher that ships with this program, as it is now; None for others."""
    row = ROWS.get(dataset_name or "")
    return sha256_of(row.path) if row is not None and row.loader == "embedded" and row.path.exists() else None


def teacher_digest(sampling: SamplingSettings) -> str | None:
    """SHA-256 of the file of a student's teacher; None where it is not there."""
    if sampling.teacher_path is not None:
        return sampling.teacher_sha256 or digest_of(sampling.teacher_path)
    row = ROWS.get(sampling.dataset_name)
    if row is None or not row.weights_path.exists():
        return None
    return row.sha256 or sha256_of(row.weights_path)


def with_teacher(sampling: SamplingSettings, path: str | os.PathLike, source: str) -> SamplingSettings:
    """The settings of the student `source`, whose teacher's file is at `path` now.

    Raises:
        UserError: its teacher is a registered one, or another one than this.
    """
    if sampling.teacher_path is None:
        raise UserError(f"{source} is a student of {sampling.dataset_name}, which needs no place", "teacher_path")
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; expected the teacher of {source}", "teacher_path")
    if sampling.teacher_sha256 not in (None, digest_of(path)):
        raise UserError(f"{path} is not the teacher of {source}, whose contents were others", "teacher_path")
    return replace(sampling, teacher_path=os.path.abspath(path))


def load_teacher_of(student: Student, source: str) -> DiffusionModel:
    """The teacher of the student `source`, on its device.

    Raises:
        UserError: its file is gone, or holds something else than before.
    """
    s = student.sampling
    if s.teacher_path is not None:
        if not Path(s.teacher_path).exists():
            raise UserError(f"{s.teacher_path}, the teacher of {source}, is not there; say where it is", "teacher_path")
        with_teacher(s, s.teacher_path, source)
    elif None not in (s.teacher_sha256, now := embedded_digest(s.dataset_name)) and s.teacher_sha256 != now:
        raise UserError(
            f"{source} is a student of another {s.dataset_name} than ships with this version; distil it again, or use "
            "the version that it was distilled with"
        )
    device, is_guided = next(student.parameters()).device, s.training_guidance_rate != 1
    return load_teacher(s.dataset_name, s.teacher_path, device, s.guide_path, with_guide=is_guided)


def read_sampling(path: str | os.PathLike) -> SamplingSettings:
    """The sampling settings in a student file, without reading its weights where it is ours."""
    path = Path(path)
    if path.suffix == ".pkl":
        return read_reference_student(path)[2]
    settings = read_settings(path)
    if settings.get("format") != "student":
        raise UserError(f"{path} is a teacher, not a student")
    return SamplingSettings.from_json(settings.get("sampling"), str(path))
