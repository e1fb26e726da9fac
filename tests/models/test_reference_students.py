"""Students distilled by the reference: read, sampled and distilled further; hostile files are refused and run nothing."""

import contextlib
import importlib
import os
import pickle
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_pickle_files import foreign_names, randomised, write_edm_pickle, write_reference_student
from tiny import NETWORK, SAMPLE, TRAIN, flags, invoke, known_as_tiny, newest_student, only_run, png_names, weights

from dnnlib import UserError
from models import EDMPrecond, load_student, load_teacher
from models.building import build_network
from models.loading import read_sampling, save_student
from models.paths import find_student, is_teacher_file
from models.published.reference_students import read_reference_student

#: What the reference's training leaves, besides what its students are sampled with.
TRAINING = dict(
    dataset_name="tiny", num_steps=4, sampler_stu="euler", sampler_tea="dpmpp", M=3, schedule_type="polynomial",
    schedule_rho=7, afs=True, max_order=3, sigma_min=0.006, sigma_max=80.0, predict_x0=True, lower_order_final=True,
    use_step_condition=False, is_second_stage=False, guidance_type=None, guidance_rate=0.0, model_path=None,
)  # fmt: skip
STEPS = {**TRAINING, "use_step_condition": True}
SONG = {"augment_dim": 9, "embedding_type": "fourier"}
ADM = dict(model_type="DhariwalUNet", model_channels=32, label_dim=3)
KINDS = {"ddpmpp": {"augment_dim": 9}, "ncsnpp": SONG, "adm": ADM}
LAYOUTS = ["plain", "beside", "persistent"]


def make(**changes) -> EDMPrecond:
    return randomised(EDMPrecond(**{**NETWORK, **changes}))


def write(path: Path, net: EDMPrecond, training: dict = TRAINING, layout: str = "plain", **more) -> Path:
    if layout == "persistent":
        attributes = {"training_kwargs": training, **more.pop("attributes", {})}
        recorded = {name: v for name, v in net.init_kwargs.items() if name != "use_step_condition"}
        return write_edm_pickle(path, net, recorded, key="model", attributes=attributes, **more)
    return write_reference_student(path, net, training, beside=layout == "beside", **more)


def assert_same(student, net: EDMPrecond, step: float | None) -> None:
    x = torch.randn(2, *student.shape, generator=torch.Generator().manual_seed(1)) * 9
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    expected = net(x, torch.tensor([9.0, 0.3]), labels, step_condition=step)
    found = student(x, torch.tensor([9.0, 0.3]), labels, step_condition=student.sampling.step_condition)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training, step", [(TRAINING, None), (STEPS, 4.0)])
def test_student_computes_what_the_reference_computes(tmp_path, kind, layout, training, step):
    """The layers for the step condition are in the file either way."""
    net = make(**KINDS[kind], use_step_condition=True)
    student = load_student(write(tmp_path / "student.pkl", net, training, layout))
    assert student.sampling.step_condition == step and student.sampling.is_variable == (step is not None)
    assert student.net.model.use_step_condition == (step is not None)
    assert_same(student, net, step)


def test_what_is_written_is_what_pickle_writes_of_modules(tmp_path):
    net = make(**KINDS["ddpmpp"], use_step_condition=True)
    path = write(tmp_path / "student.pkl", net)
    with foreign_names() as classes, open(path, "rb") as file:
        theirs = pickle.load(file)["model"]
        assert type(theirs) is classes["EDMPrecond"] and isinstance(theirs, torch.nn.Module)
    expected = theirs.state_dict()
    spec, tensors, _ = read_reference_student(write(tmp_path / "steps.pkl", net, STEPS))
    assert list(tensors) == list(expected) and all(torch.equal(tensors[k], expected[k]) for k in tensors)
    assert theirs.training_kwargs == TRAINING and spec["class"] == type(theirs).__name__


def test_settings(tmp_path):
    net, path = make(), tmp_path / "student.pkl"
    spec, tensors, sampling = read_reference_student(write(path, net))
    assert build_network(spec, tensors, "student").init_kwargs["model_channels"] == 16
    assert (sampling.dataset_name, sampling.num_steps, sampling.afs, sampling.nfe) == ("tiny", 4, True, 2)
    assert (sampling.schedule_type, sampling.schedule_rho) == ("polynomial", 7)
    assert (sampling.sigma_min, sampling.sigma_max) == (0.006, 80.0)
    assert not (sampling.use_step_condition or sampling.is_second_stage) and sampling.guidance_type is None
    other = dict(TRAINING, num_steps=np.int64(6), afs=np.bool_(False), schedule_type="logsnr", is_second_stage=True)
    sampling = read_reference_student(write(path, net, other))[2]
    assert (sampling.num_steps, sampling.afs, sampling.schedule_type, sampling.nfe) == (6, False, "logsnr", 5)
    assert sampling.is_second_stage
    assert read_sampling(path) == sampling


def test_noise_levels(tmp_path):
    """From the settings, else from the network, else the reference's."""
    net, path = make(), tmp_path / "student.pkl"
    assert read_reference_student(write(path, net, dict(TRAINING, sigma_min=0.01)))[2].sigma_min == 0.01
    without = {name: value for name, value in TRAINING.items() if not name.startswith("sigma")}
    sampling = read_reference_student(write(path, net, without, sigma_min=0.02, sigma_max=70.0))[2]
    assert (sampling.sigma_min, sampling.sigma_max) == (0.02, 70.0)
    sampling = read_reference_student(write(path, net, without, sigma_min=0, sigma_max=float("inf")))[2]
    assert (sampling.sigma_min, sampling.sigma_max) == (0.006, 80.0)


def test_run_directory_of_the_published_code(tmp_path):
    for kimg in (50, 200, 100):
        write(tmp_path / f"network-snapshot-{kimg:06d}.pkl", make(), {**TRAINING, "num_steps": 4 + (kimg == 200)})
    assert load_student(find_student(tmp_path)).sampling.num_steps == 5


def test_sampled_as_a_student_of_this_program(tmp_path):
    paths = [write(tmp_path / "student.pkl", make()), tmp_path / "student.safetensors"]
    save_student(paths[1], load_student(paths[0]), {})
    folders = [tmp_path / path.suffix[1:] for path in paths]
    for path, folder in zip(paths, folders):
        invoke("sample", *flags(SAMPLE, model_path=path, seeds="0-1", outdir=folder, batch=2)).ok()
    names = png_names(folders[0])
    assert len(names) == 2 and names == png_names(folders[1])
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


@pytest.mark.parametrize("training", [dict(TRAINING, num_steps=7), STEPS])
def test_distilled_further(tmp_path, training):
    """Also where the layers for the step condition are there and were never used."""
    path = write(tmp_path / "student.pkl", make(use_step_condition=True), training)
    stage = dict(is_second_stage=True, num_steps=3, M=2, lpips="off", outdir=tmp_path / "exps", total_kimg=0.008)
    with known_as_tiny():
        invoke("train", *flags(TRAIN, stage, model_path=path)).ok()
    run = only_run(tmp_path / "exps")
    sampling = load_student(run).sampling
    assert (sampling.dataset_name, sampling.nfe, sampling.is_second_stage) == ("tiny", 1, True)
    assert sampling.use_step_condition == training["use_step_condition"]
    assert any("step" in name for name in weights(newest_student(run))) == training["use_step_condition"]


# What cannot be used


def refused(path: Path, match: str, read=read_reference_student) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    assert caught.value.message.startswith(str(path)) and caught.value.message.isprintable()


def test_teachers_and_students_are_told_apart(tmp_path):
    teacher = write_edm_pickle(tmp_path / "teacher.pkl", make(), NETWORK)
    student = write(tmp_path / "student.pkl", make())
    assert is_teacher_file(teacher) and not is_teacher_file(student)
    refused(teacher, "is a teacher, not a student")
    refused(student, "is a student, not a teacher", lambda path: load_teacher(None, path))
    assert load_teacher(None, teacher).dataset_name == "teacher"


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"num_steps": 10**9}, "out of range: num_steps"),
        ({"num_steps": "4"}, "out of range: num_steps"),
        ({"num_steps": 2}, "out of range: num_steps"),
        ({"afs": "yes"}, "a flag is not true or false"),
        ({"use_step_condition": 1}, "a flag is not true or false"),
        ({"schedule_type": "cosine"}, "out of range: schedule_type"),
        ({"schedule_rho": float("nan")}, "out of range: schedule_rho"),
        ({"schedule_rho": [7]}, "a number is not a number"),
        ({"sigma_min": 90.0}, "out of range: sigma_min, sigma_max"),
        ({"dataset_name": "../../etc"}, "out of range: dataset_name"),
        ({"dataset_name": "a\x1b[2J"}, "out of range: dataset_name"),
        ({"sampler_stu": "heun"}, "for the solver 'heun'; expected euler"),
        ({"sampler_stu": "\x1b[2J"}, r"for the solver '\\x1b\[2J'; expected euler"),
    ],
)
def test_settings_out_of_range(tmp_path, changes, match):
    refused(write(tmp_path / "student.pkl", make(), {**TRAINING, **changes}), match)


def test_settings_that_are_missing(tmp_path):
    path = tmp_path / "student.pkl"
    refused(write(path, make(), {"M": 3, "afs": True}), "without dataset_name, num_steps, schedule_type, schedule_rho")
    refused(write(path, make(), STEPS), r"missing model.map_step_layer0.weight", load_student)


def test_students_on_latents_are_named(tmp_path):
    path = write(tmp_path / "student.pkl", make(), class_name="CFGPrecond")
    refused(path, "holds a CFGPrecond, a student on latents; of the reference's students, EDMPrecond is read")


# Files that run code


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def placeholder(command: str) -> None:
    """Its name becomes one of the same length, which leads out of a module that students refer to."""


PLACEHOLDER = ("placeholder_modules", "torch_os_system")
DOTTED = ("models.networks_edm", "torch.os.system")
placeholder.__module__, placeholder.__qualname__ = PLACEHOLDER


def touch(canary: Path) -> str:
    return f"touch '{canary}'"


def hostile_file(canary: Path) -> str:
    path = canary.with_name("weights.npy")
    np.save(path, np.array([Call(os.system, touch(canary))], dtype=object), allow_pickle=True)
    return str(path)


def script(canary: Path) -> str:
    path = canary.with_name("setup.cfg")
    path.write_text(f"open({str(canary)!r}, 'w')")
    return str(path)


def module(canary: Path) -> str:
    canary.with_name("harmless_looking.py").write_text(f"open({str(canary)!r}, 'w')")
    return "harmless_looking"


#: Where in a student it hides, what it calls, and what the refusal names.
HOSTILE = {
    "setting": (lambda c: {"training": {"lr": Call(os.system, touch(c))}}, r"posix\.system"),
    "setting-in-a-list": (
        lambda c: {"training": {"seeds": [1, (2, Call(eval, f"open({str(c)!r}, 'w')"))]}},
        r"builtins\.eval",
    ),
    "attribute": (lambda c: {"attributes": {"guidance_rate": Call(exec, f"open({str(c)!r}, 'w')")}}, r"builtins\.exec"),
    "hook": (lambda c: {"attributes": {"_forward_hooks": {"0": Call(os.system, touch(c))}}}, r"posix\.system"),
    "buffer": (lambda c: {"attributes": {"_buffers": {"scale": Call(os.system, touch(c))}}}, r"posix\.system"),
    "parameter": (
        lambda c: {
            "attributes": {
                "_parameters": {"w": Call(torch._utils._rebuild_parameter, Call(os.system, touch(c)), True, {})}
            }
        },
        r"posix\.system",
    ),
    "numpy-load": (lambda c: {"attributes": {"mean": Call(np.load, hostile_file(c), None, True)}}, r"numpy\.load"),
    "run-path": (lambda c: {"attributes": {"version": Call(runpy.run_path, script(c))}}, r"runpy\.run_path"),
    "import": (lambda c: {"attributes": {"model_source": Call(importlib.import_module, module(c))}}, r"import_module"),
    "dotted-name": (lambda c: {"attributes": {"act": Call(placeholder, touch(c))}}, r"edm\.torch\.os\.system"),
}


@pytest.mark.parametrize("layout", ["plain", "persistent"])
@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_refused_by_name(tmp_path, monkeypatch, name, layout):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, PLACEHOLDER[0], SimpleNamespace(**{PLACEHOLDER[1]: placeholder}))
    canary, (build, match) = tmp_path / "canary", HOSTILE[name]
    hidden = build(canary)
    training, attributes = {**TRAINING, **hidden.get("training", {})}, hidden.get("attributes", {})
    more = {"attributes": attributes} if layout == "persistent" else attributes
    path = write(tmp_path / "student.pkl", make(), training, layout, **more)
    content = path.read_bytes()
    for old, new in zip(PLACEHOLDER, DOTTED):
        content = content.replace(old.encode(), new.encode())
    path.write_bytes(content)
    assert not canary.exists()
    for read in (read_reference_student, load_student, is_teacher_file, lambda path: load_teacher(None, path)):
        refused(path, rf"is refused: .*({match}) is neither a tensor nor a plain container", read)
    assert not canary.exists() and "harmless_looking" not in sys.modules

    # The same file does run code where it is simply unpickled.
    with foreign_names(), contextlib.suppress(Exception):  # what it does after the canary is of no interest
        pickle.loads(path.read_bytes())
    sys.modules.pop("harmless_looking", None)
    deadline = time.time() + 10
    while not canary.exists() and time.time() < deadline:
        time.sleep(0.01)
    assert canary.exists()
