"""From a file, or a name, to a `DiffusionModel`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError, first_line, need, sha256_of
from torch_utils.checkpoint import check_state_dict, read_network, read_settings, save_network
from torch_utils.device import moved_to

from .building import build_network, describe_network, highest_sigma, network_spec, read_config, row_config
from .diffusers_precond import DiffusersPrecond
from .diffusers_space import AnySpace, FolderSpace, read_space
from .latent import LatentScale, LatentSpace
from .model import DiffusionModel, SamplingSettings, Student
from .networks.autoencoders import INSTALL_TAMING
from .networks.clip_text import INSTALL_TRANSFORMERS
from .networks.layers import freeze
from .noise import HIGHEST, DiscreteNoise
from .precond import CFGPrecond, Precond
from .published.diffusers import is_folder, is_stable_diffusion, read_first_stage, read_stable_diffusion
from .published.diffusers_folder import folder_digest, open_folder, read_denoiser
from .published.edm_pickle import read_edm_pickle
from .published.reference_students import is_reference_student, read_reference_student
from .published.state_dicts import AVERAGE, FIRST_STAGE, IGNORED, TEXT, UNET
from .published.torch_checkpoint import read_checkpoint
from .registry import ROWS, DatasetSpec, fetch_autoencoder, fetch_weights, get_row

RUNS_DIR = Path("exps")
#: A student of a run directory; the published code writes pickles.
SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.(?:safetensors|pkl)")
#: What `training.pretrain` leaves in its run directory.
TEACHER_FILE = "teacher.safetensors"
#: What describes the autoencoder of EDM2's networks on latents, those of the user too.
EDM2_LATENTS = "edm2-img512"


def load_teacher(
    dataset_name: str | None,
    model_path: str | os.PathLike | int | None = None,
    device: torch.device | str = "cpu",
    guide_path: str | os.PathLike | None = None,
) -> DiffusionModel:
    """The pre-trained model of a data set, in eval mode without gradients.

    Args:
        dataset_name: a name of `models.registry`; None with `model_path` for a model of one's own.
        model_path: a teacher of one's own: a run of `training.pretrain` (directory or number) or its file, a pickle of
            EDM's training, or a folder of diffusers; for a data set of Stable Diffusion also a checkpoint in the
            published layout.
        device: where to put it.
        guide_path: a teacher of one's own that guidance leads away from, in place of this one without its condition.

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
            guide_path = fetch_weights(row.guide)
    guide = None if guide_path is None else read_guide(Path(guide_path), net)
    model = DiffusionModel(net, row.name, row.sigma_min, highest_sigma(row, net), latent, row.guidance_rate, guide)
    return freeze(model.to(device))


def read_guide(path: Path, net: Precond) -> Precond:
    """A network that guides `net`: of the same states, and of the same classes or none."""
    guide, _ = _read_own_teacher(path)

    def states(n: Precond) -> str:
        return f"{n.img_channels}×{n.img_resolution}²{' with text' if n.context_dim else ''}"

    if net.context_dim is not None or states(guide) != states(net) or guide.label_dim not in (0, net.label_dim):
        expected = f"{states(net)}, {net.label_dim} classes" + (" or none" if net.label_dim else "")
        found = f"{states(guide)}, {guide.label_dim} classes"
        raise UserError(f"{path} cannot guide this teacher: it is a network of {found}; expected {expected}")
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
    path: str | os.PathLike | None = model_path
    if path is not None and not is_folder(path):
        found = find_model(path)
        if not found.is_file() or is_teacher_file(found):
            return False, 1.0
        path = read_sampling(found).teacher_path
    if path is None or not is_folder(path):
        return False, 1.0
    folder = open_folder(Path(path))
    return folder.family.text is not None, folder.guidance_rate


def own_name(model_path: str | os.PathLike) -> str:
    """What a teacher of one's own is called: as its file, or as its folder where `training.pretrain` named the file."""
    path = Path(model_path)
    if path.is_dir():
        return re.sub(r"[^\w.-]+", "-", path.resolve().name).lstrip(".-") or "folder"
    return path.resolve().parent.name if path.name == TEACHER_FILE else path.stem


def _read_registered(row: DatasetSpec, own: Path | None = None) -> tuple[Precond, LatentSpace | None]:
    """The model of a row: the published one, or one of the user's `own` in a published layout."""
    if row.loader in ("embedded", "edm", "edm2"):
        path = fetch_weights(row)
        net, scale = _read_own_teacher(path)
        if (scale is None) != (row.codec is None):
            raise UserError(f"{path} is of {'pixels' if scale is None else 'latents'}; expected the published file")
        return net, _latent_space(net, row.name, str(path), scale=scale)
    config, (tensors, path) = row_config(row), read_published(row, own)
    if row.codec is None:
        return _published_network(config["network"], tensors, path), None
    others = (FIRST_STAGE, TEXT) if row.text else FIRST_STAGE
    rest = {name: tensor for name, tensor in tensors.items() if name.startswith(others)}
    net = _latent_network(config["network"], {k: v for k, v in tensors.items() if k not in rest}, path)
    return net, LatentSpace(config, lambda: (rest, path))


def read_published(row: DatasetSpec, own: Path | None = None) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a row's published file under its names, and the file; or those of the user's `own` model."""
    need_packages(row)
    if own is not None:
        return read_stable_diffusion(own, row_config(row)), own
    path = fetch_weights(row)
    return read_checkpoint(path), path


def need_packages(row: DatasetSpec) -> None:
    """Find that a package is missing before gigabytes are fetched for it; a UserError says how to install it."""
    if row.text:
        need("transformers", INSTALL_TRANSFORMERS)
    if row.codec == "vq-f4":
        need("taming.modules.vqvae.quantize", INSTALL_TAMING)


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
            "back, or say where it is by --teacher=PATH"
        )


def _published_network(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Precond:
    """The network of a bare state dict."""
    net = describe_network(spec, str(path))
    check_state_dict(net.model.state_dict(), tensors, path)
    net.model.load_state_dict(_float32(tensors), assign=True)
    return net


def _latent_network(spec: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> Precond:
    """The network of a latent-diffusion checkpoint: its moving average, where the file has one."""
    net = describe_network(spec, str(path))
    expected = net.model.state_dict()
    averages = {name: AVERAGE + name.replace(".", "") for name in expected}
    published = {UNET + name: tensor for name, tensor in expected.items()}
    has_average = any(name.startswith(AVERAGE) for name in tensors)
    if has_average:
        published |= {averages[name]: tensor for name, tensor in expected.items()}
    check_state_dict(published, {name: t for name, t in tensors.items() if name not in IGNORED}, path)
    _check_noise(net.noise_schedule, tensors.get("alphas_cumprod"), path)
    chosen = {name: tensors[averages[name] if has_average else UNET + name] for name in expected}
    net.model.load_state_dict(_float32(chosen), assign=True)
    return net


def _check_noise(own: DiscreteNoise | None, recorded: Tensor | None, path: Path) -> None:
    """Refuse a file whose model was trained at other noise levels."""
    if recorded is None:
        return
    levels = None if own is None else own.alphas_cumprod
    if levels is None or recorded.shape != levels.shape or not torch.allclose(recorded.double(), levels, rtol=1e-2):
        raise UserError(f"{path} records another noise schedule than its model has; expected the published file")


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which do not change with the file."""
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


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
        return LatentSpace(config, partial(_read_autoencoder, config["first_stage"]), scale)
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


def _read_autoencoder(stage: Mapping[str, Any]) -> tuple[dict[str, Tensor], Path]:
    path = fetch_autoencoder()
    return read_first_stage(path, stage), path


def _read_own_teacher(path: Path) -> tuple[Precond, LatentScale | None]:
    """A teacher of one's own, and how its latents are scaled, if it is one of EDM2 on latents."""
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
        spec, scale = settings["network"], _recorded_scale(settings.get("latents"), path)
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


def digest_of(path: str | os.PathLike) -> str:
    """What a model's file, or folder, holds: SHA-256 as hex digits."""
    path = Path(path)
    return folder_digest(path) if path.is_dir() else sha256_of(path)


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
            raise UserError(
                f"{s.teacher_path}, the teacher of {source}, is not there; say where it is by --teacher=PATH"
            )
        with_teacher(s, s.teacher_path, source)
    return load_teacher(s.dataset_name, s.teacher_path, next(student.parameters()).device, s.guide_path)


def _recorded_scale(values: Any, path: Path) -> LatentScale | None:
    """How a student's latents are scaled, if its file says so."""
    try:
        return None if values is None else LatentScale(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None


def read_sampling(path: str | os.PathLike) -> SamplingSettings:
    """The sampling settings in a student file, without reading its weights where it is ours."""
    path = Path(path)
    if path.suffix == ".pkl":
        return read_reference_student(path)[2]
    settings = read_settings(path)
    if settings.get("format") != "student":
        raise UserError(f"{path} is a teacher, not a student")
    return SamplingSettings.from_json(settings.get("sampling"), str(path))


def is_teacher_file(path: Path) -> bool:
    """Whether this is a teacher: Stable Diffusion, a pickle of EDM's training, or what `training.pretrain` writes."""
    if is_stable_diffusion(path):
        return True
    if path.suffix == ".pkl":
        return not is_reference_student(path)
    return read_settings(path).get("format") == "teacher"


def find_model(path: str | os.PathLike | int, runs_dir: Path = RUNS_DIR) -> Path:
    """Resolve what commands take as a model: a file, a folder of diffusers, or a run by its directory or number.

    Of a run it is the newest student, or the teacher that `training.pretrain` made there.

    Raises:
        UserError: no such run, or one without either.
    """
    found = find_run(path, runs_dir)
    own = found / TEACHER_FILE
    return own if own.is_file() else found if is_stable_diffusion(found) else _newest_student(found)


def find_student(path: str | os.PathLike | int, runs_dir: Path = RUNS_DIR) -> Path:
    """Resolve a file, a run directory or a run number to the newest student file; a UserError if there is none."""
    return _newest_student(find_run(path, runs_dir))


def find_run(path: str | os.PathLike | int, runs_dir: Path = RUNS_DIR) -> Path:
    """The directory of a run number; any other path as it is."""
    path = Path(str(path))
    if not re.fullmatch(r"\d{1,9}", str(path)) or path.exists():
        return path
    number = f"{int(str(path)):05d}"
    runs = sorted(runs_dir.glob(f"{number}-*")) if runs_dir.is_dir() else []
    if not runs:
        raise UserError(f"run {path} does not exist under ./{runs_dir}; expected a folder {number}-…")
    return runs[0]


def _newest_student(path: Path) -> Path:
    if not path.is_dir():
        return path
    snapshots = [(int(m[1]), p) for p in path.iterdir() if (m := SNAPSHOT.fullmatch(p.name))]
    if not snapshots:
        raise UserError(f"{path} holds no network-snapshot-*.safetensors or .pkl; has it saved one yet?")
    return max(snapshots)[1]
