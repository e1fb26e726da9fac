"""Pipelines of diffusers with latents, classes and text, beside the package's own: from a folder to images and back."""

import csv
import json
import socket
from pathlib import Path

import pytest
import torch
from diffusers_folders import DIT, SD3, package, relative, write_pipeline
from safetensors.torch import load_file
from test_diffusers_precond import our_states, their_states, train
from tiny import SAMPLE, TRAIN, Patches, flags, invoke, only_run, png_names, write_images

from dnnlib import UserError
from models.conditions import Conditions
from models.diffusers_text import TextEncoders
from models.export.folder import end_scale, is_flow, state_scale
from models.export.student import open_student
from models.loading import load_student, load_teacher
from models.published.diffusers_folder import open_folder
from models.registry import CAPTIONS_URL
from solvers import get_solver, solve

PIPELINES = {
    "sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "dit": "DiTPipeline",
    "sd3": "StableDiffusion3Pipeline",
}  # fmt: skip
V = {"prediction_type": "v_prediction"}
CAPTIONS = ["a cat", "a dog, b"]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder, captions in the cache, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SFD_OFFLINE", "1")
    path = tmp_path / "cache" / "ms_coco" / CAPTIONS_URL.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([caption] for caption in CAPTIONS)])
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something connects to the network"))


def write(kind: str, **scheduler) -> Path:
    return write_pipeline(Path(kind), kind, {**(V if kind == "sd" else {}), **scheduler})


def arguments(kind: str, noise, **more):
    """What the stock pipeline takes for two samples that start at `noise`."""
    if kind == "dit":
        return dict(class_labels=[1, 7], generator=torch.Generator().manual_seed(3), **more)
    return dict(prompt=CAPTIONS, latents=noise, height=16, width=16, **more)


def start():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def condition(model, kind: str):
    return torch.eye(DIT["num_embeds_ada_norm"])[[1, 7]] if kind == "dit" else model.encode_text(CAPTIONS)


# --- Teachers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_guided_trajectory_is_that_of_the_pipeline(kind):
    """Conditions, guidance, noise levels, times and decoding at once."""
    folder = write(kind)
    pipe, teacher = getattr(package(), PIPELINES[kind]).from_pretrained(folder), load_teacher(None, folder)
    states, images = their_states(pipe, **arguments(kind, start(), guidance_scale=3.0, num_inference_steps=4))
    states = states[:, :2]  # the pipeline of DiT holds each twice
    denoise = teacher.denoiser(condition(teacher, kind), 3.0)
    if kind == "sd3":
        times = pipe.scheduler.sigmas.double()
        sigmas, first = (times / (1 - times))[1:-1], states[1] / (1 - float(times[1]))  # t = 1 is σ = ∞
        scale = 1 - float(times[-2])
    else:
        levels = teacher.net.noise_schedule.alphas_cumprod[pipe.scheduler.timesteps]
        sigmas, first = ((1 - levels) / levels).sqrt(), start() / levels[0].sqrt().float()
        scale = float(levels[-1].sqrt())
    with torch.no_grad():
        found = solve(get_solver("euler"), denoise, first, sigmas)[-1] * scale
    assert relative(found, states[-2]) < 3e-6
    decoded = teacher.decode(states[-1]) / 2 + 0.5
    assert relative(decoded.clamp(0, 1), images) < 1e-5


@pytest.mark.parametrize("changes", [{}, dict(dual_attention_layers=[0], qk_norm="rms_norm")], ids=["3", "3.5"])
def test_both_transformers_of_stable_diffusion_3(changes):
    folder = write_pipeline(Path("sd3"), "sd3", **changes)
    net = load_teacher(None, folder).net
    x, cond = torch.randn(2, 4, 8, 8), net.example_condition(2, torch.device("cpu"))
    expected = net.model.net(
        x / 3, timestep=torch.full([2], 1000 * 2 / 3), encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled
    ).sample
    torch.testing.assert_close(net(x, 2.0, condition=cond), x / 3 - 2 / 3 * expected, rtol=1e-4, atol=1e-5)


def test_encoders_give_what_the_pipeline_gives_alone_or_together():
    for kind in ("sdxl", "sd3"):
        folder = write(kind)
        pipe, teacher = getattr(package(), PIPELINES[kind]).from_pretrained(folder), load_teacher(None, folder)
        given = dict(prompt=CAPTIONS[0], prompt_2=None) | ({"prompt_3": None} if kind == "sd3" else {})
        tokens, without, pooled, without_pooled = pipe.encode_prompt(**given)
        both, nothing = teacher.encode_text(CAPTIONS[::-1]), teacher.latent.encode_nothing(torch.device("cpu"))
        assert relative(both.tokens[1:], tokens) < 1e-5 and relative(both.pooled[1:], pooled) < 1e-5
        torch.testing.assert_close(nothing.tokens, without, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nothing.pooled, without_pooled, rtol=1e-4, atol=1e-4)
        assert torch.equal(both.tokens[1:], teacher.encode_text(CAPTIONS[:1]).tokens)


def test_captions_are_encoded_once_and_encoders_can_leave(monkeypatch):
    computed, compute = [], TextEncoders._compute
    monkeypatch.setattr(TextEncoders, "_compute", lambda self, p, d: computed.extend(p) or compute(self, p, d))
    text = TextEncoders(open_folder(write("sdxl")))
    cpu = torch.device("cpu")
    assert text.prepare(CAPTIONS * 3, cpu) and computed == ["", *CAPTIONS]
    rows = text.encode([CAPTIONS[1], CAPTIONS[0], CAPTIONS[1]], cpu)
    assert len(computed) == 3 and torch.equal(rows.tokens[0], rows.tokens[2])
    monkeypatch.setattr("models.conditions.KEPT", 3 * rows.split(1)[0].tokens.nbytes)
    assert not text.prepare(CAPTIONS * 3 + ["a", "b", "c"], cpu)  # too many: they are encoded as they come
    assert len(text.encode(["a", "b", "c", "d"], cpu)) == 4 and len(text._captions._kept) <= 3


def test_conditions_are_cut_like_tensors():
    whole = Conditions(torch.arange(6.0).reshape(3, 2, 1), torch.arange(3.0)[:, None])
    parts = whole.split(2)
    assert [len(part) for part in parts] == [2, 1] and parts[1].time_ids is None
    assert torch.equal(Conditions.cat(parts).tokens, whole.tokens) and len(parts[1].expand(5)) == 5


# --- Students --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_from_a_pipeline_to_images_and_back(kind):
    """train.py (SFD, or SFD-v), sample.py, fid.py and export, and the stock pipeline beside our sampler."""
    folder = write(kind)
    run_dir = train(folder, use_step_condition=kind in ("sd", "sd3"), batch=2, total_kimg=0.004)
    sampled = dict(SAMPLE, model_path=run_dir, seeds="0-1", outdir="out")
    invoke("sample", *flags(sampled, {} if kind == "dit" else dict(prompt="a cat"))).ok()
    assert png_names(Path("out")) == ["000000.png", "000001.png"]
    if kind in ("sdxl", "dit"):
        torch.jit.script(Patches()).save("patches.pt")
        measured = dict(model_path=run_dir, seeds="0-3", ref=write_images(Path("real"), 4), detector="patches.pt")
        invoke("fid", "gen", *flags(SAMPLE, measured), "--detector-runs-code").ok()
        assert json.loads(Path("metrics.jsonl").read_text())["N"] == 4
    invoke("models.export", "diffusers", *flags(dict(model_path=run_dir, dest="exported"))).ok()
    if kind != "dit":
        program = dict(model_path=run_dir, dest="step.pt2")
        invoke("models.export", "program", *flags(program)).refused("text encoders of diffusers")
    student = open_student(str(run_dir))
    pipe = getattr(package(), PIPELINES[kind]).from_pretrained("exported")
    steps = dict(num_inference_steps=len(student.steps) - 1)
    if is_flow(student):
        steps = dict(sigmas=(student.steps / (1 + student.steps))[:-1].tolist())
    rate = student.sampler.plan.guidance_rate
    states, images = their_states(pipe, **arguments(kind, start(), guidance_scale=rate, **steps))
    ours = our_states(student, start(), condition(student.model, kind))
    sigmas = student.steps.float()[:, None, None, None, None]
    if is_flow(student):  # which ends at zero
        with torch.no_grad():
            denoise = student.model.denoiser(condition(student.model, kind), rate, student.sampler.step_condition)
            ours[-1] = denoise(ours[-2], float(student.steps[-2]))
        sigmas[-1] = 0
    scale = state_scale(student) / (1 + sigmas if is_flow(student) else (1 + sigmas**2).sqrt())
    assert relative(states, ours * scale) < 2e-5
    assert float(scale[-1]) == pytest.approx(end_scale(student))
    assert relative(images, (student.model.decode(ours[-1]) / 2 + 0.5).clamp(0, 1)) < 2e-5
    folder.rename("elsewhere")
    with pytest.raises(UserError, match=rf"student of \S*{kind}, which is not there"):
        load_student(run_dir)


def test_a_second_stage_knows_its_first_teacher():
    folder = write("dit")
    short = dict(total_kimg=0.004, batch=2, tick=0.004)
    invoke("train", *flags(TRAIN, short, dict(model_path=folder, num_steps=7, M=0, outdir="first"))).ok()
    second = dict(is_second_stage=True, model_path=only_run(Path("first")), num_steps=3, M=2, outdir="second")
    invoke("train", *flags(TRAIN, short, second)).ok()
    student = load_student(only_run(Path("second")))
    assert student.sampling.teacher_path == str(folder.resolve()) and student.is_latent and student.sampling.nfe == 1


def test_what_a_text_conditioned_student_costs_is_said():
    folder = write("sdxl")
    plan = invoke("train", *flags(TRAIN, dict(model_path=folder)), "--dry-run").ok()
    assert "Student: NFE 4;" in plan.output  # guided at 5.0, the pipeline's own rate
    plan = invoke("sample", *flags(dict(model_path=folder, solver="euler", num_steps=3)), "--dry-run").ok()
    assert '"nfe": 4' in plan.output


# --- Bad input -------------------------------------------------------------------------------------------------------


def _change(file: str, **changes):
    def damage(folder):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _remove(name: str):
    return lambda folder: (folder / name).rename("removed")


def _pickled(folder):
    weights = folder / "text_encoder_2" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


TEXT_FILE, FLOW_FILE = "text_encoder_2/config.json", "scheduler/scheduler_config.json"
DAMAGES = [
    ("sdxl", _remove("text_encoder_2"), "has no text_encoder_2"),
    ("sdxl", _remove("tokenizer"), "tokenizer is missing"),
    ("sdxl", _pickled, "pytorch_model.bin, a pickle"),
    ("sdxl", _change(TEXT_FILE, architectures=["BertModel"]), "'BertModel'; expected CLIPTextModel"),
    ("sdxl", _change(TEXT_FILE, hidden_size=32), "do not hold a usable text encoder"),
    ("sdxl", _change("vae/config.json", _class_name="VQModel"), "'VQModel'; expected an AutoencoderKL"),
    ("sdxl", _change("vae/config.json", latents_mean=[0, 0, 0, 0]), "latents_mean"),
    ("sdxl", _remove("vae"), "has no vae/, which decodes its latents"),
    ("dit", _remove("vae"), "has no vae/, which decodes its latents"),
    ("sdxl", _change("vae/config.json", scaling_factor=0), "scaling_factor '0' and shift_factor '0.0'"),
    ("sdxl", _change("vae/config.json", scaling_factor="x"), "scaling_factor 'x'"),
    ("sdxl", _change("vae/config.json", shift_factor="y"), "shift_factor 'y'"),
    ("sdxl", _change("vae/config.json", block_out_channels=[8, 32]), "does not fit the network"),
    ("sdxl", _change("unet/config.json", in_channels=9), "9 channels in and 4 out"),
    ("sdxl", _change("unet/config.json", time_cond_proj_dim=8), "time_cond_proj_dim '8'; expected None"),
    ("sdxl", _change("unet/config.json", cross_attention_dim=[8, 8]), "cross_attention_dim"),
    ("sd3", _change(FLOW_FILE, use_dynamic_shifting=True), "use_dynamic_shifting"),
    ("sd3", _change("transformer/config.json", pos_embed_max_size=10**5), "pos_embed_max_size 100000"),
    ("sd3", _change(FLOW_FILE, shift=-1), "shift -1"),
    ("sd3", _change(FLOW_FILE, _class_name="DDIMScheduler"), "does not belong to a SD3Transformer2DModel"),
]  # fmt: skip


@pytest.mark.parametrize("kind, damage, message", DAMAGES)
def test_other_pipelines_are_refused(kind, damage, message):
    folder = write(kind)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        teacher = load_teacher(None, folder)
        teacher.latent.decoder()
        teacher.encode_text(["a cat"])
    assert "\n" not in error.value.message


def test_a_guide_with_latents_of_another_scale_is_refused():
    folder, other = write("dit"), write_pipeline(Path("other"), "dit")
    assert load_teacher(None, folder, guide_path=other).guide.label_dim == 1000
    _change("vae/config.json", scaling_factor=0.13)(other)
    with pytest.raises(UserError, match="its latents are scaled in another way"):
        load_teacher(None, folder, guide_path=other)


def test_sd3_without_its_largest_encoder():
    folder = write("sd3")
    (folder / "text_encoder_3").rename("removed")
    cond = load_teacher(None, folder).encode_text(["a cat"])
    assert cond.tokens.shape == (1, 77 + 256, SD3["joint_attention_dim"]) and not cond.tokens[:, 77:].any()
