"""Files whose settings are anything but settings: one line each, whatever stands where."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from published import known_as_published, unet_state, write_published
from safetensors.torch import save_file
from tiny import class_teacher, flags, invoke, student, tiny_network

from dnnlib import UserError
from models import load_student, load_teacher
from models.building import network_spec
from models.precond import ADMPrecond, ConsistencyPrecond, EDM2Precond
from models.sampling import draw_latents
from torch_utils.checkpoint import read_network

FEW = [None, -1, 10**400, "\x1b[31m\nx", [None]]
MANY = [
    True, 0, -(2**70), 10**9, 1e308, float("nan"), float("inf"), 0.5, "", "x", "a" * 10**5, [], [10**9], [1] * 20, [[]],
    {}, {"a": 1},
]  # fmt: skip
HOSTILE = pytest.mark.parametrize("values", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
GUIDED = dict(
    img_resolution=8, img_channels=3, label_dim=3, model_channels=32, num_res_blocks=1, channel_mult=[1],
    attention_resolutions=[1], num_head_channels=16, dropout=0.1, resblock_updown=True, use_scale_shift_norm=True,
)  # fmt: skip
NETWORKS = {
    "EDM": lambda: tiny_network(label_dim=3),
    "EDM2": lambda: EDM2Precond(8, 3, 3, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[8]),
    "consistency": lambda: ConsistencyPrecond(attention_type="flash", **GUIDED),
    "ADM": lambda: ADMPrecond(**GUIDED),
}


def refused_or_usable(load):
    """Whatever a file says, it is one printable line, or a model that draws and takes its states."""
    try:
        model = load()
        x, _ = draw_latents(model, [0])
        assert x.shape == (1, *model.shape) and model.sigma_min < model.sigma_max
    except UserError as error:
        assert error.message.isprintable() and len(error.message) < 800, error.message[:2000]


def write(path: Path, settings: dict, tensors: dict) -> Path:
    path.unlink(missing_ok=True)
    save_file(tensors, str(path), metadata={"sfd": json.dumps(settings)})
    return path


@HOSTILE
@pytest.mark.parametrize("part", ["network", "sampling"])
def test_settings_of_a_student_can_be_anything(part, values, tmp_path):
    tensors, settings = read_network(next(Path(student("classes")).glob("*.safetensors")))
    for name in settings[part]:
        for value in values:
            changed = copy.deepcopy(settings)
            changed[part][name] = value
            path = write(tmp_path / "a.safetensors", changed, tensors)
            refused_or_usable(lambda path=path: load_student(path))


@HOSTILE
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_description_of_a_teacher_can_be_anything(kind, values, tmp_path):
    net = NETWORKS[kind]()
    tensors = {name: t.contiguous() for name, t in net.state_dict().items()}
    for name in network_spec(net):
        for value in values:
            spec = {**network_spec(net), name: value}
            path = write(tmp_path / "a.safetensors", {"format": "teacher", "network": spec}, tensors)
            refused_or_usable(lambda path=path: load_teacher(None, path))


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, '{"network":' * 50_000, "9" * 5000, "null", "[]", ""])
def test_headers_that_are_no_settings(text, tmp_path):
    tensors, _ = read_network(class_teacher())
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata={"sfd": text})
    for load in (load_student, lambda path: load_teacher(None, path)):
        with pytest.raises(UserError, match="without this program's settings"):
            load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pkl", "ckpt"])
def test_pipes_are_not_waited_for(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    os.mkfifo(path)
    for name in (None, "ms_coco"):
        with pytest.raises(UserError, match="does not exist|no regular file|name its data set"):
            load_teacher(name, path)
    if suffix != "ckpt":
        with pytest.raises(UserError, match="does not exist|no regular file"):
            load_student(path)


# --- Before anything is fetched ------------------------------------------------------------------------------------------


def ask(tmp_path, monkeypatch, **changes):
    """`sample.py` of a teacher that would have to be fetched first."""
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "src"))
    monkeypatch.setenv("SFD_OFFLINE", "1")
    return invoke("sample", *flags(dict(model_path="teacher", dataset_name="ms_coco", outdir=tmp_path / "x"), changes))


def test_missing_files_are_found_first(tmp_path, monkeypatch):
    ask(tmp_path, monkeypatch).refused("offline, and .* is not there")
    ask(tmp_path, monkeypatch, prompts="none.txt").refused("none.txt does not exist; expected a list of captions")
    ask(tmp_path, monkeypatch, prompts="none.txt", prompt="a cat").refused("--prompts: one caption and a file")


@pytest.mark.parametrize("name, module, install", [
    ("ms_coco", "transformers", "pip install transformers"),
    ("ffhq_ldm", "taming.modules.vqvae.quantize", "taming-transformers"),
])  # fmt: skip
def test_missing_packages_are_found_first(name, module, install, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    ask(tmp_path, monkeypatch, dataset_name=name).refused(rf"{module} is needed and cannot be imported .*{install}")


def test_a_file_in_the_published_layout_may_hold_what_its_training_left(tmp_path):
    """The network is filled from what is wanted; a weight that is no tensor is missed by name."""

    state = {**unet_state("lsun_cat"), "step": 7, "versions": torch.torch_version.TorchVersion("2.1")}
    write_published("lsun_cat", tmp_path, state)
    with known_as_published("lsun_cat", tmp_path):
        assert load_teacher("lsun_cat").shape == (3, 8, 8)
