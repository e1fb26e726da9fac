"""Students for other programs, and Stable Diffusion from other programs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from edm_pickle_files import randomised
from published import CONFIGS, known_as_published, latent_checkpoint, write_captions, write_published
from safetensors.torch import load_file, save_file
from test_clip_text import write_tokenizer
from tiny import NETWORK, SAMPLE, TRAIN, flags, invoke, only_run, png_names, shared_folder
from torch import Tensor

from dnnlib import UserError
from models import load_student, load_teacher
from models.export.diffusers import spacing_of
from models.export.fold import fold_step_condition
from models.export.program import example_inputs, to_program
from models.export.student import open_student
from models.loading import make_student, save_student
from models.model import SamplingSettings, Student
from models.precond import CFGPrecond, EDMPrecond
from models.prompts import Prompts
from models.published.diffusers import is_stable_diffusion
from models.sampling import draw_latents
from solvers import get_schedule, solve

PIXELS = SamplingSettings("tiny", 4, True, "polynomial", 7.0, 0.006, 80.0)
LATENTS = SamplingSettings("ms_coco", 4, True, "discrete", 1.0, 0.1, 14.614, guidance_type="cfg", guidance_rate=7.5)
ADM = dict(NETWORK, model_type="DhariwalUNet", label_dim=3, model_channels=32, attn_resolutions=[4])
NCSN = dict(NETWORK, embedding_type="fourier", encoder_type="residual", resample_filter=[1, 3, 3, 1], augment_dim=9)
NETWORKS = {"ddpm": NETWORK, "ncsn": NCSN, "adm": ADM}


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def edm_student(path: Path, network: dict[str, Any], settings: SamplingSettings = PIXELS) -> Path:
    net = randomised(EDMPrecond(**network, use_step_condition=settings.use_step_condition))
    save_student(path, Student(net, settings), {})
    return path


@pytest.fixture(scope="module")
def published():
    """Within this fixture, ms_coco is a tiny model in the published layout."""
    pytest.importorskip("transformers", reason="pip install transformers")
    cache = shared_folder() / "export"
    write_published("ms_coco", cache)
    write_captions(cache)
    write_tokenizer(cache / "tokenizer")
    with known_as_published("ms_coco", cache):
        yield cache


def latent_student(path: Path, **changes: Any) -> Path:
    teacher = load_teacher("ms_coco")
    student = make_student(teacher, replace(LATENTS, sigma_max=teacher.sigma_max, **changes))
    randomised(student.net, seed=1)
    save_student(path, student, {})
    return path


# --- Step conditions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_gives_what_the_conditioned_one_gives(name):
    net = randomised(EDMPrecond(**NETWORKS[name], use_step_condition=True))
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 0.5]), None
    if net.label_dim:
        labels = torch.eye(3)[:2]
    results = []
    for steps in (4, 7):
        folded = fold_step_condition(net, steps)
        assert not any("step" in name for name in folded.state_dict())
        results.append(net(x, sigma, labels, step_condition=steps))
        torch.testing.assert_close(folded(x, sigma, labels), results[-1], atol=2e-5, rtol=1e-5)
    assert (results[0] - results[1]).abs().max() > 1e-3  # or the condition would do nothing


@pytest.mark.parametrize("scales", [False, True])
def test_a_folded_latent_network_gives_what_the_conditioned_one_gives(scales):
    spec = {**CONFIGS["ms_coco"]["network"], "use_scale_shift_norm": scales, "use_step_condition": True}
    net = randomised(CFGPrecond(**{k: v for k, v in spec.items() if k != "class"}))
    x, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    expected = net(x, 2.0, condition=condition, step_condition=5)
    torch.testing.assert_close(fold_step_condition(net, 5)(x, 2.0, condition=condition), expected, atol=2e-5, rtol=1e-5)
    assert (net(x, 2.0, condition=condition, step_condition=4) - expected).abs().max() > 1e-3


# --- diffusers -------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "two": dict(),
    "no AFS": dict(num_steps=3, afs=False),
    "karras": dict(num_steps=6, schedule_type="polynomial", schedule_rho=7.0),
    "logsnr": dict(num_steps=6, schedule_type="logsnr"),
    "explicit": dict(num_steps=6),
    "one": dict(num_steps=3),
    "variable": dict(num_steps=5, use_step_condition=True, schedule_type="polynomial", schedule_rho=7.0),
}


def the_diffusers_package() -> ModuleType:
    return pytest.importorskip("diffusers", reason="pip install --no-deps diffusers importlib_metadata zipp")


@torch.no_grad()
def pipeline_states(folder: Path, noise: Tensor, condition: Tensor, empty: Tensor, rate: float) -> list[Tensor]:
    """What the scheduler and the network of a folder make of noise, as diffusers' own pipeline calls them."""
    diffusers = the_diffusers_package()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    record = json.loads((folder / "sfd.json").read_text())
    if scheduler.config.use_karras_sigmas or scheduler.config.use_exponential_sigmas:
        scheduler.set_timesteps(len(record["sigmas"]) - 1)
    else:
        scheduler.set_timesteps(sigmas=record["sigmas"])
    x = noise * scheduler.init_noise_sigma
    states = [x]
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([x, x]), t)
        context = torch.cat([empty.expand(len(x), -1, -1), condition])
        without, with_text = unet(model_input, t, encoder_hidden_states=context).sample.chunk(2)
        x = scheduler.step(without + rate * (with_text - without), t, x).prev_sample
        states.append(x)
    return [state / record["state_scale"] for state in states]


def our_states(student: Any, noise: Tensor, condition: Tensor, empty: Tensor, rate: float) -> Tensor:
    model, sampler = student.model, student.sampler

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        given = dict(condition=condition, unconditional_condition=empty, guidance_rate=rate)
        return model.denoise(x, sigma, step_condition=sampler.step_condition, **given)

    return solve(sampler.plan.solver, denoise, noise * model.sigma_max, sampler.sigmas, sampler.plan.afs)[
        int(sampler.plan.afs) :
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_latents_equal_those_of_diffusers_step_by_step(name, published):
    the_diffusers_package()
    path = latent_student(Path("student.safetensors"), **SCHEDULES[name])
    invoke("models.export", "diffusers", *flags(dict(model_path=path, dest="sd"))).ok()
    student = open_student(str(path))
    noise = torch.randn(2, *student.model.shape, generator=torch.Generator().manual_seed(1))
    condition, empty = student.model.encode_text(["a cat, a", "dog"]), student.model.encode_text([""])
    ours = our_states(student, noise, condition, empty, rate=7.5)
    theirs = pipeline_states(Path("sd"), noise, condition, empty, rate=7.5)
    assert len(theirs) == len(ours) == len(student.steps)
    for state, expected in zip(theirs, ours):
        assert float((state - expected).abs().max() / expected.abs().max()) < 2e-5
    plain = "num_inference_steps=" in Path("sd/README.md").read_text().split("guidance_scale")[0]
    assert plain == (name != "explicit")


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_times_of_the_scheduler_are_ours(options, published):
    diffusers = the_diffusers_package()
    path = latent_student(Path("student.safetensors"), **options)
    invoke("models.export", "diffusers", *flags(dict(model_path=path, dest="sd"))).ok()
    student = open_student(str(path))
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained("sd", subfolder="scheduler")
    scheduler.set_timesteps(sigmas=student.steps.tolist())  # as the README of the folder says, for every schedule
    assert torch.equal(scheduler.sigmas.double(), student.steps.float().double())
    times = 1000 * student.model.noise_schedule.sigma_inv(student.steps[:-1]) - 1
    assert (scheduler.timesteps.double() - times).abs().max() < 0.01  # of a thousand steps of training


@pytest.mark.slow
def test_the_pipeline_of_diffusers_makes_our_images(published):
    diffusers = the_diffusers_package()
    path = latent_student(Path("student.safetensors"))
    invoke("models.export", "diffusers", *flags(dict(model_path=path, dest="sd"))).ok()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("sd")
    pipe.set_progress_bar_config(disable=True)
    student = open_student(str(path))
    x, condition = draw_latents(student.model, [5], prompts=Prompts(["a cat, b"]))
    empty = student.model.encode_text([""])
    expected = student.model.decode(our_states(student, x / student.model.sigma_max, condition, empty, 7.5)[-1])
    options = dict(num_inference_steps=2, guidance_scale=7.5, height=16, width=16, output_type="pt")
    made = pipe("a cat, b", latents=x / student.model.sigma_max, **options).images
    torch.testing.assert_close(made, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


def test_a_folder_of_diffusers_is_a_teacher(published):
    diffusers = the_diffusers_package()
    folder = write_folder(Path("teacher"))
    for part, cls in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        report = cls.from_pretrained(folder, subfolder=part, output_loading_info=True)[1]
        assert not any(report.values()), report  # the real package agrees that this is its layout
    theirs, own = load_teacher("ms_coco", folder), load_teacher("ms_coco")
    assert theirs.net.state_dict().keys() == own.net.state_dict().keys()
    assert all(torch.equal(t, own.net.state_dict()[name]) for name, t in theirs.net.state_dict().items())
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(theirs.decode(latents), own.decode(latents))
    assert torch.equal(theirs.encode_text(["a cat, c"]), own.encode_text(["a cat, c"]))


def write_folder(folder: Path, old_names: bool = False) -> Path:
    """The tiny model as a folder of diffusers: an export, with the published scheduler."""
    path = latent_student(folder.with_suffix(".safetensors"), afs=False)
    student = load_student(path)
    student.net.load_state_dict(load_teacher("ms_coco").net.state_dict())
    save_student(path, student, {})
    invoke("models.export", "diffusers", *flags(dict(model_path=path, dest=folder))).ok()
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if old_names:
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(weights)
        for new, old in names.items():
            tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
        save_file(tensors, weights)
    return folder


@pytest.mark.parametrize("layout", ["folder", "old names", "half", "ckpt", "safetensors"])
def test_teachers_of_ones_own_are_read_in_every_layout(layout, published):
    own, tolerance = load_teacher("ms_coco"), 0.0
    if layout in ("ckpt", "safetensors"):
        path = Path(f"own.{layout}")
        state = {k: t.clone() for k, t in latent_checkpoint("ms_coco", with_average=False).items()}
        torch.save({"state_dict": state}, path) if layout == "ckpt" else save_file(state, path)
    else:
        path = write_folder(Path("own"), old_names=layout == "old names")
    if layout == "half":
        weights = path / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({k: t.half() for k, t in load_file(weights).items()}, weights.with_suffix(".fp16.safetensors"))
        weights.unlink()
        weights.with_suffix(".fp16.safetensors").rename(weights.parent / "diffusion_pytorch_model.fp16.safetensors")
        tolerance = 1e-3
    assert is_stable_diffusion(path)
    teacher = load_teacher("ms_coco", path)
    for name, tensor in teacher.net.state_dict().items():
        torch.testing.assert_close(tensor, own.net.state_dict()[name], atol=tolerance, rtol=0)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(teacher.decode(latents), own.decode(latents))


def test_from_a_folder_to_a_student_and_its_images(published):
    folder = write_folder(Path("own"))
    short = dict(total_kimg=0.004, batch=4, M=0, tick=0.004, schedule_type="discrete", schedule_rho=1)
    arguments = dict(dataset_name="ms_coco", model_path=folder, outdir="runs", **short)
    invoke("train", *flags(TRAIN, arguments)).ok()
    run_dir = only_run(Path("runs"))
    invoke("sample", *flags(SAMPLE, dict(model_path=run_dir, seeds="0-1", outdir="out"))).ok()
    teacher = dict(model_path=folder, dataset_name="ms_coco", seeds="0-1", outdir="of-teacher", num_steps=3)
    invoke("sample", *flags(SAMPLE, teacher)).ok()
    assert png_names(Path("out")) == png_names(Path("of-teacher")) == ["000000.png", "000001.png"]
    folder.rename("elsewhere")
    invoke("sample", *flags(SAMPLE, dict(model_path=run_dir, seeds="0-1"))).refused(
        r"student of \S*own, which is not there"
    )


def _damage(folder: Path, part: str, **changes: Any) -> None:
    path = folder / part / "config.json" if part != "scheduler" else folder / part / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: _damage(f, "scheduler", prediction_type="v_prediction"), "prediction_type v_prediction, expected eps"),
        (lambda f: _damage(f, "scheduler", trained_betas=[0.1]), "trained_betas"),
        (lambda f: _damage(f, "scheduler", rescale_betas_zero_snr=True), "rescale_betas_zero_snr True, expected False"),
        (lambda f: _damage(f, "unet", attention_head_dim=8), "attention_head_dim 8, expected 4"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("[" * 9999), "not a JSON object"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "holds no diffusion_pytorch_model"),
        (lambda f: (f / "unet" / "config.json").write_text("7"), "not a JSON object"),
        (lambda f: save_file({"conv_in.bias": torch.zeros(32)}, f / "unet" / "diffusion_pytorch_model.safetensors"),
         "missing model.diffusion_model"),
        (lambda f: save_file({**load_file(f / "unet" / "diffusion_pytorch_model.safetensors"), "x": torch.zeros(1)},
                             f / "unet" / "diffusion_pytorch_model.safetensors"), "unexpected model.diffusion_model.x"),
    ],
)  # fmt: skip
def test_other_folders_are_refused(damage, message, published):
    folder = write_folder(Path("own"))
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_teacher("ms_coco", folder)


def test_what_is_no_student_of_stable_diffusion_is_refused(published):
    pixels = edm_student(Path("pixels.safetensors"), NETWORK)
    invoke("models.export", "diffusers", *flags(dict(model_path=pixels, dest="sd"))).refused("students of ms_coco")
    latents = latent_student(Path("latents.safetensors"))
    Path("there").mkdir()
    invoke("models.export", "diffusers", *flags(dict(model_path=latents, dest="there"))).refused("there exists")
    invoke("train", *flags(TRAIN, dict(model_path="own.ckpt"))).refused(
        "--dataset_name: own.ckpt is a Stable Diffusion model; name its data set, ms_coco"
    )
    assert sorted(p.name for p in Path().iterdir()) == ["latents.safetensors", "pixels.safetensors", "there"]


def test_spacings():
    karras, exponential = (get_schedule(kind, 7, 0.1, 14.6)[1:] for kind in ("polynomial", "logsnr"))
    assert spacing_of(karras) == "use_karras_sigmas" and spacing_of(exponential) == "use_exponential_sigmas"
    assert spacing_of(torch.tensor([5.0, 2.0, 1.0, 0.1], dtype=torch.float64)) is None
    assert spacing_of(torch.tensor([5.0, 2.0, 0.1], dtype=torch.float64)) is not None


# --- Programs --------------------------------------------------------------------------------------------------------


def need_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install onnx onnxscript onnxruntime")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name, suffix",
    [
        ("ddpm", "pt2"),
        *(pytest.param(*case, marks=SLOW) for case in (("adm", "pt2"), ("ddpm", "onnx"), ("adm", "onnx"))),
    ],
)
def test_a_program_takes_our_step(name, suffix):
    if suffix == "onnx":
        need_onnx()
    path = edm_student(Path("student.safetensors"), NETWORKS[name], replace(PIXELS, use_step_condition=name == "ddpm"))
    invoke("models.export", "program", *flags(dict(model_path=path, dest=f"step.{suffix}"))).ok()
    check_program(Path(f"step.{suffix}"), path)


@SLOW
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_program_takes_our_step_on_latents(suffix, published):
    if suffix == "onnx":
        need_onnx()
    path = latent_student(Path("student.safetensors"))
    invoke("models.export", "program", *flags(dict(model_path=path, dest=f"step.{suffix}"))).ok()
    check_program(Path(f"step.{suffix}"), path)


@SLOW
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize("name", ["lsun_bedroom", "ffhq_ldm"])
def test_a_program_takes_our_step_of_the_other_published_networks(name, suffix, tmp_path):
    if suffix == "onnx":
        need_onnx()
    write_published(name, tmp_path / "cache")
    with known_as_published(name, tmp_path / "cache"):
        teacher = load_teacher(name)
        settings = SamplingSettings(name, 4, True, "logsnr", 1.0, teacher.sigma_min, teacher.sigma_max)
        student = make_student(teacher, settings)
        randomised(student.net, seed=1)
        save_student(Path("student.safetensors"), student, {})
        invoke("models.export", "program", *flags(dict(model_path="student.safetensors", dest=f"step.{suffix}"))).ok()
        check_program(Path(f"step.{suffix}"), Path("student.safetensors"))


def check_program(program: Path, path: Path) -> None:
    """Sample with nothing but the program and what it records, beside our sampler."""
    student = open_student(str(path))
    batch = 3
    inputs = example_inputs(student, batch)
    if program.suffix == ".pt2":
        extra = {"sfd.json": ""}
        module = torch.export.load(program, extra_files=extra).module()
        record = json.loads(extra["sfd.json"])
    else:
        import onnx
        import onnxruntime

        session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
        record = json.loads(next(p.value for p in onnx.load(program).metadata_props if p.key == "sfd"))

        def module(*inputs: Tensor) -> Tensor:
            names = [i.name for i in session.get_inputs()]
            return torch.from_numpy(session.run(None, {k: t.numpy() for k, t in zip(names, inputs, strict=True)})[0])

    noise = torch.randn(batch, *student.model.shape)
    x = noise * record["initial_scale"]
    with torch.no_grad():
        for sigma, after in zip(record["sigmas"], record["sigmas"][1:]):
            x = module(x, torch.tensor(sigma), torch.tensor(after), *inputs[3:])
    if student.model.has_text:
        expected = our_states(student, noise, *inputs[3:], rate=7.5)[-1]
    else:
        expected = student.sampler.run(noise * student.model.sigma_max, inputs[3] if student.model.label_dim else None)
    torch.testing.assert_close(x, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_a_program_that_cannot_be_written_is_one_line(monkeypatch):
    path = edm_student(Path("student.safetensors"), NETWORK)
    invoke("models.export", "program", *flags(dict(model_path=path, dest="step.pth"))).refused("neither a .pt2")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    invoke("models.export", "program", *flags(dict(model_path=path, dest="step.onnx"))).refused("pip install onnx")
    invoke("models.export", "program", *flags(dict(model_path=path, dest="x.pt2", num_steps=5))).refused(
        "--num_steps: the student was distilled for 4 timestamps, not 5"
    )
    assert [p.name for p in Path().iterdir()] == ["student.safetensors"]


def test_a_program_that_does_something_else_is_not_kept(monkeypatch):
    student = open_student(str(edm_student(Path("student.safetensors"), NETWORK)))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr("models.export.program._write_pt2", lambda *_: lambda x, *_: x)
    with pytest.raises(UserError, match="was not written"):
        to_program(student, Path("step.pt2"))
    assert not Path("step.pt2").exists()
