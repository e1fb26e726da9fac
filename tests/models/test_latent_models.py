"""Published teachers that are no EDM pickles, from their files to images: LSUN in pixels, latent and Stable Diffusion."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from PIL import Image
from published import (
    CAPTIONS,
    CONFIGS,
    known_as_published,
    latent_checkpoint,
    unet_state,
    write_captions,
    write_published,
)
from test_clip_text import write_tokenizer
from tiny import (
    SAMPLE,
    Patches,
    flags,
    invoke,
    newest_student,
    only_run,
    png_names,
    same,
    shared_folder,
    train_flags,
    weights,
)

from dnnlib import UserError
from models import load_student, load_teacher, sampling
from models.building import build_network, build_on_meta, network_spec, read_config
from models.latent import LatentSpace
from models.loading import make_student, save_student
from models.model import SamplingSettings
from models.networks.autoencoders import AUTOENCODERS
from models.opening import open_sampler
from models.precond import CFGPrecond, EDMPrecond
from models.prompts import Prompts
from models.published.networks import latent_network
from models.registry import ROWS
from models.sampling import SamplerOptions, draw_latents, student_sampler, teacher_sampler
from solvers import solve
from torch_utils.checkpoint import read_settings
from training import distill, loop
from training.conditions import Batches, draw_captions
from training.config import DistillConfig
from training.report import Pictures

NAMES = ("lsun_bedroom", "lsun_bedroom_ldm", "ffhq_ldm", "ms_coco")
NEEDS = {"lsun_bedroom_ldm": "taming", "ffhq_ldm": "taming", "ms_coco": "transformers"}
SHORT = {"total_kimg": 0.008, "batch": 4, "M": 1, "tick": 0.004}
SAMPLING = SamplingSettings("ms_coco", 4, True, "discrete", 1.0, 0.1, 14.6, guidance_type="cfg", guidance_rate=7.5)
CPU = torch.device("cpu")


def need(name: str) -> None:
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "CPU_BATCH", 4)  # a fixed size, as always, but no more than most tests sample


@pytest.fixture(scope="module")
def files() -> Path:
    """A cache directory with the four files, captions and a tokenizer, which no test changes."""
    cache = shared_folder() / "published"
    if not cache.exists():
        for name in NAMES:
            write_published(name, cache)
        write_captions(cache)
        write_tokenizer(cache / "tokenizer")
    return cache


def trained(name: str, files: Path, **changes) -> Path:
    """The run directory of a student that was trained for two iterations."""
    outdir = shared_folder() / f"runs-{name}-{'-'.join(map(str, changes.values()))}"
    if not outdir.exists():
        schedule = {} if name == "lsun_bedroom" else {"schedule_type": "discrete", "schedule_rho": 1}
        arguments = {"dataset_name": name, **SHORT, **schedule, **changes}
        with known_as_published(name, files):
            invoke("train", *train_flags(None, outdir=outdir, **arguments)).ok()
    return only_run(outdir)


def sample(name: str, files: Path, model, *more: str, **changes):
    with known_as_published(name, files):
        return invoke("sample", *flags(SAMPLE, {"model_path": model, "seeds": "0-3"}, changes), *more)


# --- From file to PNG ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_from_the_published_file_to_images_and_their_fid(name, files):
    need(name)
    run_dir = trained(name, files)
    size = 8 if name == "lsun_bedroom" else 16
    with Image.open(next(run_dir.glob("teacher-and-student-*.png"))) as picture:
        assert picture.width >= 10 * size
    sample(name, files, run_dir, outdir="student").ok()
    sample(name, files, "teacher", dataset_name=name, outdir="teacher", solver="dpmpp", num_steps=4).ok()
    for folder in ("student", "teacher"):
        images = [np.asarray(Image.open(Path(folder) / png)) for png in png_names(folder)]
        assert len(images) == 4 and all(image.shape == (size, size, 3) and image.std() > 3 for image in images)
        assert len({image.tobytes() for image in images}) == 4
    torch.jit.script(Patches()).save("patches.pt")
    evaluation = ["--detector=patches.pt", "--detector-runs-code", "--device=cpu"]
    invoke("fid", "calc", "--images=student", "--ref=teacher", *evaluation).ok()
    with known_as_published(name, files):
        arguments = ["--model_path", run_dir, "--seeds=0-3", "--precision=fp32", "--ref=teacher"]
        invoke("fid", "gen", *arguments, *evaluation).ok()
    calc, gen = (json.loads(line)["value"] for line in Path("metrics.jsonl").read_text().splitlines())
    assert calc == gen > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_is_what_its_file_holds(name, files):
    need(name)
    with known_as_published(name, files):
        teacher = load_teacher(name)
        assert teacher.is_latent == (name != "lsun_bedroom") and teacher.has_text == (name == "ms_coco")
        assert same(teacher.net.model.state_dict(), unet_state(name, 1 if "ldm" in name else 0))  # the moving average
        channels = 4 if name == "ms_coco" else 3
        assert teacher.shape == (channels, 8, 8) and teacher.label_dim == 0
        expected = {"lsun_bedroom": (0.006, 80), "ms_coco": (0.1, 14.6146)}.get(name, (0.006, 83.8225))
        assert (teacher.sigma_min, teacher.sigma_max) == pytest.approx(expected, rel=1e-5)
        assert teacher.guidance_rate == (7.5 if name == "ms_coco" else 1)
        assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
        images = teacher.decode(torch.randn(3, channels, 8, 8))
        assert images.shape == (3, 3, *[16 if teacher.is_latent else 8] * 2) and images.dtype == torch.float32
        assert all(key.startswith("net.") for key in teacher.state_dict())  # first stage and text are not trained


def test_latents_are_divided_by_the_scale_factor_before_decoding(files):
    with known_as_published("ms_coco", files):
        teacher = load_teacher("ms_coco")
        latents = torch.randn(2, 4, 8, 8)
        decoder = teacher.latent.decoder()
        assert torch.equal(teacher.decode(latents), decoder.decode(latents / 0.18215))


def test_noise_predictors_take_the_discrete_schedule(files):
    with known_as_published("ms_coco", files):
        teacher = load_teacher("ms_coco")
    sampler = teacher_sampler(teacher, SamplerOptions(num_steps=5, schedule_type="discrete", schedule_rho=1.0))
    times = teacher.noise_schedule.sigma_inv(sampler.sigmas)
    torch.testing.assert_close(times.diff(), times.diff()[:1].expand(4), rtol=1e-6, atol=1e-9)
    assert sampler.sigmas[0] == teacher.sigma_max and sampler.sigmas[-1] == 0.1 and sampler.nfe == 2 * (2 * 4 + 1)


@pytest.mark.parametrize("name, file", [
    ("lsun_bedroom_ldm", "ldm-lsun_bedrooms"), ("ffhq_ldm", "ldm-ffhq"), ("ms_coco", "stable-diffusion-v1"),
])  # fmt: skip
def test_every_published_name_is_accounted_for(name, file):
    """Full size, without memory: network, moving average, first stage and text encoder are all there is."""
    need(name)
    published = json.loads((GOLDEN / f"{file}.json").read_text())["tensors"]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    spec = read_config(name)
    tensors["alphas_cumprod"] = build_on_meta(ROWS[name]).noise_schedule.alphas_cumprod
    parts = {
        prefix: {k for k in tensors if k.startswith(prefix)} for prefix in ("first_stage_model.", "cond_stage_model.")
    }
    others = {k: v for k, v in tensors.items() if not k.startswith(tuple(parts))}
    net = latent_network(spec["network"], others, Path("published"))
    assert len(net.state_dict()) == sum(key.startswith("model.diffusion_model.") for key in published)
    stage = {k: v for k, v in spec["first_stage"].items() if k not in ("class", "scale_factor")}
    with torch.device("meta"):
        names = AUTOENCODERS[spec["first_stage"]["class"]](**stage).state_dict()
    assert {f"first_stage_model.{key}" for key in names} == parts["first_stage_model."]
    assert bool(parts["cond_stage_model."]) == ROWS[name].text
    del others["model.diffusion_model.middle_block.1.norm.weight"]
    with pytest.raises(UserError, match=r"missing model\.diffusion_model\.middle_block\.1\.norm\.weight"):
        latent_network(spec["network"], others, Path("published"))


# --- Files that are not as they should be ----------------------------------------------------------------------------


def broken(name: str, cache: Path, change) -> str:
    """The message that loading a changed file gives."""
    state = unet_state(name) if name == "lsun_bedroom" else latent_checkpoint(name, name != "ms_coco")
    change(state)
    write_published(name, cache, state)
    with known_as_published(name, cache), pytest.raises(UserError) as error:
        load_teacher(name)
    assert "\n" not in error.value.message and len(error.value.message) < 600
    return error.value.message


@pytest.mark.parametrize("name, change, expected", [
    ("lsun_bedroom", lambda s: s.pop("out.2.bias"), "1 differences, first missing out.2.bias"),
    ("lsun_bedroom", lambda s: s.update(label_emb=torch.zeros(3)), "unexpected label_emb"),
    ("lsun_bedroom", lambda s: s.update({"out.2.bias": torch.zeros(6)}), r"out.2.bias is [6], not [3]"),
    ("ffhq_ldm", lambda s: s.pop("model.diffusion_model.out.2.bias"), "missing model.diffusion_model.out.2.bias"),
    ("ffhq_ldm", lambda s: s.pop("model_ema.diffusion_modelout2bias"), "missing model_ema.diffusion_modelout2bias"),
    ("ffhq_ldm", lambda s: s.update({"model_ema.diffusion_modelextra": torch.zeros(3)}), "unexpected model_ema.diffusion_modelextra"),
    ("ffhq_ldm", lambda s: s.update({"cond_stage_model.x": torch.zeros(3)}), "unexpected cond_stage_model.x"),
    ("ms_coco", lambda s: s.update(surprise=torch.zeros(3)), "unexpected surprise"),
    ("ms_coco", lambda s: s.update(alphas_cumprod=s["alphas_cumprod"].flip(0)), "another noise schedule"),
    ("ms_coco", lambda s: s.update(alphas_cumprod=torch.ones(10)), "another noise schedule"),
])  # fmt: skip
def test_differences_are_named(name, change, expected, tmp_path):
    need(name)
    assert expected in broken(name, tmp_path, change)


def test_what_may_be_absent(tmp_path):
    """The noise schedule, and the moving average: then the weights themselves are used."""
    need("ffhq_ldm")
    state = latent_checkpoint("ffhq_ldm", with_average=False)
    del state["betas"], state["alphas_cumprod"]
    write_published("ffhq_ldm", tmp_path, state)
    with known_as_published("ffhq_ldm", tmp_path):
        assert same(load_teacher("ffhq_ldm").net.model.state_dict(), unet_state("ffhq_ldm"))


def test_half_precision_files_become_float32(tmp_path):
    state = {key: value.half() for key, value in unet_state("lsun_bedroom").items()}
    write_published("lsun_bedroom", tmp_path, state)
    with known_as_published("lsun_bedroom", tmp_path):
        teacher = load_teacher("lsun_bedroom")
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    assert same(teacher.net.model.state_dict(), {key: value.float() for key, value in state.items()})


@pytest.mark.parametrize(
    "prefix, part", [("first_stage_model.", "first_stage_model"), ("cond_stage_model.", "cond_stage_model")]
)
def test_a_file_without_decoder_or_text_encoder_is_found_before_anything_is_sampled(prefix, part, tmp_path):
    need("ms_coco")
    state = {k: v for k, v in latent_checkpoint("ms_coco", False).items() if not k.startswith(prefix)}
    write_published("ms_coco", tmp_path, state)
    write_tokenizer(tmp_path / "tokenizer")
    write_captions(tmp_path)
    sample("ms_coco", tmp_path, "teacher", dataset_name="ms_coco", outdir="x").refused(f"holds no {part}")
    arguments = train_flags(None, dataset_name="ms_coco", **SHORT)
    with known_as_published("ms_coco", tmp_path):
        invoke("train", *arguments).refused(f"holds no {part}")
    assert not png_names(Path("x")) and not list(Path("exps").glob("*/*.safetensors"))


def test_an_absent_file_names_its_place_and_its_address(tmp_path):
    for name in NAMES:
        with known_as_published(name, tmp_path), pytest.raises(UserError) as error:
            load_teacher(name)
        assert str(tmp_path / name) in error.value.message and "https://" in error.value.message


# --- Students --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_student_starts_as_its_teacher(name, files):
    need(name)
    with known_as_published(name, files):
        teacher = load_teacher(name)
    for conditioned in (False, True):
        settings = SamplingSettings(name, 4, True, "polynomial", 7.0, 0.1, 10.0, use_step_condition=conditioned)
        student = make_student(teacher, settings).eval()
        x, sigma = torch.randn(2, *teacher.shape), torch.tensor([0.5, 9.0])
        text = {"condition": torch.randn(2, 16, 32)} if teacher.has_text else {}
        found = student.denoise(x, sigma, step_condition=settings.step_condition, **text)
        assert torch.equal(found, teacher.denoise(x, sigma, **text))
        assert any("nfe" in key for key in student.state_dict()) == conditioned
        assert student.latent is teacher.latent


def test_a_students_file_holds_its_network_and_the_rest_is_read_when_it_is_needed(files, tmp_path):
    need("ffhq_ldm")
    path = newest_student(trained("ffhq_ldm", files))
    assert all(key.startswith("model.") for key in weights(path))
    assert read_settings(path)["network"]["class"] == "CFGPrecond"
    with known_as_published("ffhq_ldm", tmp_path):  # nothing is there
        student = load_student(path)
        assert student.denoise(torch.randn(1, 3, 8, 8), 1.0).shape == (1, 3, 8, 8)
        with pytest.raises(UserError, match="ffhq.zip"):
            student.decode(torch.randn(1, 3, 8, 8))
    reads = []
    original = LatentSpace._part
    with (
        known_as_published("ffhq_ldm", files),
        mock.patch.object(LatentSpace, "_part", lambda s, p: reads.append(p) or original(s, p)),
    ):
        student = load_student(path)
        first = student.decode(torch.ones(1, 3, 8, 8))
        assert torch.equal(student.decode(torch.ones(1, 3, 8, 8)), first) and reads == ["first_stage_model."]
        assert torch.equal(load_teacher("ffhq_ldm").decode(torch.ones(1, 3, 8, 8)), first)


def test_variable_and_second_stage_students_of_a_latent_teacher(files, tmp_path):
    need("ffhq_ldm")
    variable = trained("ffhq_ldm", files, use_step_condition=True)
    sample("ffhq_ldm", files, variable, outdir="five", num_steps=5).ok()
    assert len(png_names(Path("five"))) == 4
    arguments = dict(dataset_name="ffhq_ldm", is_second_stage=True, model_path=variable, num_steps=3, M=2)
    arguments |= {"schedule_type": "discrete", "schedule_rho": 1, "outdir": tmp_path / "second"}
    with known_as_published("ffhq_ldm", files):
        invoke("train", *flags(train_defaults(), arguments)).ok()
        student = load_student(only_run(tmp_path / "second"))
        assert student.sampling.nfe == 1 and student.is_latent
    sample("ffhq_ldm", files, only_run(tmp_path / "second"), outdir="one").ok()
    assert len(png_names(Path("one"))) == 4


def train_defaults() -> dict:
    return {**SHORT, "lr": 1e-3, "precision": "fp32", "device": "cpu"}


@pytest.mark.parametrize("change, message", [
    ({"class": ["CFGPrecond"]}, "expected EDMPrecond, EDM2Precond, ConsistencyPrecond, CFGPrecond"),
    ({"class": "EDMPrecond"}, "unknown arguments: .*linear_start"),
    ({"timesteps": 10**9}, "timesteps 1000000000; expected 2 to 100000"),
    ({"timesteps": 1000.5}, "timesteps 1000.5"),
    ({"linear_end": 1.5}, "linear_end 1.5"),
    ({"linear_start": -1}, "linear_start -1"),
    ({"num_res_blocks": 10**6}, "num_res_blocks 1000000"),
    ({"transformer_depth": 10**6}, "transformer_depth 1000000"),
    ({"transformer_depth": 2}, "missing model.input_blocks"),
    ({"channel_mult": [1] * 40}, "expected a list of up to 16 numbers"),
    ({"channel_mult": []}, "cannot be built"),
    ({"attention_resolutions": 2}, "cannot be built"),
    ({"img_resolution": 10**9}, "img_resolution 1000000000"),
    ({"img_resolution": 8.5}, "img_resolution 8.5"),
    ({"model_channels": 2**40}, "expected 1 to 16384"),
    ({"num_heads": "4"}, "cannot be built"),
    ({"num_heads": 0}, "cannot be built"),
    ({"context_dim": -1}, "cannot be built"),
    ({"context_dim": None}, "cannot be built"),
    ({"use_step_condition": True}, "missing model.nfe_embed"),
    ({"sigma_data": 0.5}, "unknown arguments: sigma_data"),
])  # fmt: skip
def test_settings_of_a_latent_network_that_do_not_fit_are_one_line(change, message):
    spec = CONFIGS["ms_coco"]["network"]
    tensors = {f"model.{key}": value for key, value in unet_state("ms_coco").items()}
    assert isinstance(build_network(spec, tensors, "file"), CFGPrecond)
    with pytest.raises(UserError, match=message) as error:
        build_network({**spec, **change}, tensors, "file")
    assert "\n" not in error.value.message and len(error.value.message) < 500


@pytest.mark.parametrize("dataset_name", ["cifar10", "nosuch", "ffhq_ldm"])
def test_a_latent_student_of_a_data_set_without_such_latents_is_refused(dataset_name, files, tmp_path):
    with known_as_published("ms_coco", files):
        teacher = load_teacher("ms_coco")
    student = make_student(teacher, SAMPLING)
    student.sampling = SamplingSettings(**{**vars(SAMPLING), "dataset_name": dataset_name})
    save_student(tmp_path / "s.safetensors", student, {})
    with pytest.raises(UserError, match=f"4×8² latents with text, which {dataset_name} does not have"):
        load_student(tmp_path / "s.safetensors")


def test_a_saved_network_is_rebuilt_from_its_own_description(files):
    with known_as_published("ms_coco", files):
        net = load_teacher("ms_coco").net
    spec = json.loads(json.dumps(network_spec(net)))
    again = build_network(spec, net.state_dict(), "file")
    assert network_spec(again) == network_spec(net) and same(again.state_dict(), net.state_dict())


# --- Captions and guidance -------------------------------------------------------------------------------------------


def contents(folder: str) -> list[bytes]:
    return [(Path(folder) / png).read_bytes() for png in png_names(Path(folder))]


def test_captions_of_a_file_one_caption_and_captions_by_seed(files):
    need("ms_coco")
    run_dir = trained("ms_coco", files)
    Path("two.txt").write_text("a cat\na dog\n")
    Path("two.csv").write_text('text,other\n"a cat",1\na dog,2\n')
    ways = {
        "cat": {"prompt": "a cat"}, "dog": {"prompt": "a dog"}, "txt": {"prompts": "two.txt"}, "csv": {"prompts": "two.csv"},
        "seeds": {}, "rate": {"prompt": "a cat", "guidance_rate": 2}, "none": {"prompt": "a cat", "guidance_rate": 1},
    }  # fmt: skip
    for name, changes in ways.items():
        result = sample("ms_coco", files, run_dir, outdir=name, batch=3, **changes).ok()
        assert f"NFE {2 if name == 'none' else 4}," in result.output  # guidance doubles it
    cat, dog = contents("cat"), contents("dog")
    assert all(a != b for a, b in zip(cat, dog))
    assert contents("txt") == contents("csv") == [cat[0], dog[1], cat[2], dog[3]]  # seed i gets caption i
    assert all(a != b for a, b in zip(cat, contents("rate"))) and all(a != b for a, b in zip(cat, contents("none")))
    sample("ms_coco", files, run_dir, outdir="later", seeds="3,2", prompts="two.txt").ok()
    assert contents("later") == [cat[2], dog[3]]
    with known_as_published("ms_coco", files):
        student = load_student(run_dir)
        prompts = Prompts(CAPTIONS, drawn=True)
        found = student_sampler(student, prompts=prompts).images(range(4))
    assert [Image.fromarray(image).tobytes() for image in found] == [
        Image.open(Path("seeds") / png).tobytes() for png in png_names(Path("seeds"))
    ]
    sample("ms_coco", files, run_dir, outdir="cat", prompt="a dog").refused("cat")  # another caption, the same folder


def test_planned_evaluations_of_a_student_recorded_without_guidance(files, tmp_path):
    without = SamplingSettings(**{**vars(SAMPLING), "guidance_type": None, "guidance_rate": 1.0})
    with known_as_published("ms_coco", files):
        save_student(tmp_path / "s.safetensors", make_student(load_teacher("ms_coco"), without), {})
    for guidance, nfe in ((None, without.nfe), (1, without.nfe), (7.5, 2 * without.nfe)):
        arguments = dict(
            model_path=tmp_path / "s.safetensors", seeds="0", outdir=tmp_path / "x", prompt="a", device="cpu"
        )
        arguments |= {"guidance_rate": guidance}
        result = invoke("sample", *flags(arguments), "--dry-run").ok()
        assert json.loads(result.output)["nfe"] == nfe
        with known_as_published("ms_coco", files):
            assert f"NFE {nfe}, 1 images" in invoke("sample", *flags(arguments)).ok().output
        shutil.rmtree(tmp_path / "x")


def test_flags_of_captions_that_do_not_fit_are_refused(files):
    need("ms_coco")
    run_dir = trained("ms_coco", files)
    Path("two.txt").write_text("a cat\n")
    both = sample("ms_coco", files, run_dir, outdir="x", prompt="a", prompts="two.txt")
    both.refused(r"--prompts: one caption and a file")
    sample("ms_coco", files, run_dir, outdir="x", prompts="none.txt").refused(r"none\.txt does not exist")
    sample("ms_coco", files, run_dir, outdir="x", **{"class": 0}).refused("--class: ms_coco has no classes")
    sample("ms_coco", files, run_dir, outdir="x", prompt="a", guidance_rate="nan").refused(
        "--guidance_rate.*nan is not a finite number"
    )
    refusals = {"prompt": "has no text", "prompts": "has no text", "guidance_rate": "has neither classes nor text"}
    for (name, why), value in zip(refusals.items(), ("a", "two.txt", 2)):
        result = sample("lsun_bedroom", files, "teacher", dataset_name="lsun_bedroom", outdir="x", **{name: value})
        result.refused(f"--{name}: lsun_bedroom {why}")
    assert not Path("x").exists()


def test_one_sheet_of_teacher_and_student_with_guidance(files):
    need("ms_coco")
    result = sample(
        "ms_coco", files, trained("ms_coco", files), compare=True, outdir="x", seeds="0-1", prompt="a cat"
    ).ok()
    rows = [line.split("|")[2].strip() for line in result.output.splitlines() if line.startswith("| ")][1:]
    assert rows == ["70", "4", "4", "10", "4"] and Path("x/compare.png").exists()


def test_guidance_follows_its_formula(files):
    need("ms_coco")
    with known_as_published("ms_coco", files):
        teacher = load_teacher("ms_coco")
        cat, dog, empty = teacher.encode_text(["a cat", "a dog", ""]).split(1)
        pair = torch.cat([cat, dog])
        x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 5.0])
        free, bound = (teacher.denoise(x, sigma, condition=c) for c in (empty.expand(2, -1, -1), pair))
        found = teacher.denoise(x, sigma, **teacher.conditioning(pair, 3.0))
        torch.testing.assert_close(found, free + 3 * (bound - free), atol=1e-4, rtol=1e-4)
        assert torch.equal(teacher.denoise(x, sigma, **teacher.conditioning(pair)), bound)
        assert torch.equal(teacher.denoise(x, sigma, condition=pair, guidance_rate=1.0), bound)
        with pytest.raises(ValueError, match="takes a condition and no labels"):
            teacher.denoise(x, sigma)


def test_training_is_without_guidance_and_with_captions_drawn_for_the_whole_batch(files, tmp_path):
    need("ms_coco")
    seen, iterate, batches, forward = [], distill.Distiller.iterate, set(), CFGPrecond.forward

    def recorded(distiller, noise, given, num_steps):
        seen.append(given)
        return iterate(distiller, noise, given, num_steps)

    def watched(net, x, *args, **kwargs):
        batches.add((len(x), len(kwargs["condition"])))
        return forward(net, x, *args, **kwargs)

    arguments = dict(dataset_name="ms_coco", outdir=tmp_path, guidance_rate=None, seed=5, batch_gpu=2)
    with mock.patch.object(distill.Distiller, "iterate", recorded), mock.patch.object(CFGPrecond, "forward", watched):
        with (
            known_as_published("ms_coco", files),
            mock.patch("training.report.save_picture"),
            mock.patch("training.report.Pictures.draw"),
        ):
            invoke("train", *flags(train_defaults(), arguments)).ok()
            teacher = load_teacher("ms_coco")
            expected = [teacher.encode_text(draw_captions(5, i, 4, CAPTIONS)) for i in range(2)]
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, expected))
    assert batches == {(2, 2)}  # accumulated, and never the one empty caption
    with known_as_published("ms_coco", files):
        settings = load_student(only_run(tmp_path)).sampling
    assert (settings.guidance_type, settings.guidance_rate, settings.nfe) == ("cfg", 7.5, 4)


@pytest.mark.parametrize("negative", [None, "dog; 'x'"])
def test_a_guided_teacher_leads_away_from_the_negative_caption(files, tmp_path, negative):
    need("ms_coco")
    config = DistillConfig("ms_coco", guidance_type="teacher", guidance_rate=3.0, negative_prompt=negative, M=0,
                           schedule_type="discrete", schedule_rho=1)  # fmt: skip
    with known_as_published("ms_coco", files):
        teacher, student = loop.load_models(config, CPU)
        cat, free = student.encode_text(["a cat"]), student.encode_text([negative or ""])
        assert (free - student.encode_text([""])).abs().max() > 0 or negative is None
        x, sigma = torch.randn(1, 4, 8, 8), 5.0
        bound, unbound = (student.denoise(x, sigma, condition=c) for c in (cat, free))
        found = teacher.denoiser(cat, teacher.plan(4))(x, sigma)
        torch.testing.assert_close(found, unbound + 3 * (bound - unbound), atol=1e-4, rtol=1e-4)
    s = student.sampling
    assert (s.guidance_type, s.training_guidance_rate, s.negative_prompt, s.plan.nfe) == ("teacher", 3.0, negative, 2)
    assert teacher.plan(4).nfe == 2 * 3


def test_pictures_show_captions_of_a_file(files, tmp_path):
    """The first column is of the first caption; training takes its own all the same."""
    need("ms_coco")
    (tmp_path / "captions.txt").write_text("a red cat\na blue dog\n")
    shown, drawn = [], Pictures.draw
    arguments = dict(dataset_name="ms_coco", guidance_rate=None, seed=5)

    def recorded(pictures):
        shown.append(pictures.prompts)
        return drawn(pictures)

    with known_as_published("ms_coco", files), mock.patch.object(Pictures, "draw", recorded):
        for name, path in (("plain", None), ("file", tmp_path / "captions.txt")):
            arguments |= dict(outdir=tmp_path / name, validation_prompts=path)
            invoke("train", *flags(train_defaults(), arguments)).ok()
    assert shown[-1] == Prompts(["a red cat", "a blue dog"]) and shown[0].drawn
    assert same(weights(only_run(tmp_path / "plain")), weights(only_run(tmp_path / "file")))


def test_captions_of_an_iteration_do_not_depend_on_anything_else():
    captions = [str(i) for i in range(1000)]
    drawn = draw_captions(0, 3, 64, captions)
    assert drawn == draw_captions(0, 3, 64, captions) and len(set(drawn)) > 50
    assert drawn != draw_captions(0, 4, 64, captions) and drawn != draw_captions(1, 3, 64, captions)


def test_images_depend_on_their_seed_alone(files):
    need("ms_coco")
    with known_as_published("ms_coco", files):
        options = SamplerOptions(num_steps=3, solver="euler")
        sampler = open_sampler("teacher", "ms_coco", options, CPU, torch.float32).sampler
        whole = sampler.images(range(5))
        assert all((sampler.images([seed])[0] == whole[seed]).all() for seed in range(5))
        x, given = draw_latents(sampler.model, [0, 1], prompts=sampler.prompts)
        states = sampler.run(x, given)
        text = sampler.model.conditioning(given, 7.5)
        by_hand = solve(sampler.plan.solver, lambda x, s: sampler.model.denoise(x, s, **text), x, sampler.sigmas)[-1]
        assert torch.equal(states, by_hand)


def test_ranks_take_their_shares_of_one_draw_of_captions():
    config, prompts = DistillConfig("ms_coco", batch=8, seed=3), Prompts([str(i) for i in range(1000)], True)
    batches = Batches(config, mock.Mock(has_text=True, encode_text=list), prompts, CPU)
    shares = [batches.draw_cond(7, slice(rank * 2, rank * 2 + 2)) for rank in range(4)]
    assert sum(shares, []) == batches.draw_cond(7, slice(0, 8)) and len(set(map(tuple, shares))) == 4


def test_resuming_a_run_with_captions_gives_the_same_student(files, tmp_path):
    need("ms_coco")
    arguments = dict(train_defaults(), dataset_name="ms_coco", total_kimg=0.012, M=0, dump=1)
    iterate, calls = distill.Distiller.iterate, []

    def stops_after_two(distiller, *args):
        if len(calls) == 2:
            raise UserError("stopped")
        calls.append(1)
        return iterate(distiller, *args)

    with known_as_published("ms_coco", files):
        invoke("train", *flags(arguments, outdir=tmp_path / "whole")).ok()
        with mock.patch.object(distill.Distiller, "iterate", stops_after_two):
            invoke("train", *flags(arguments, outdir=tmp_path / "parts")).refused("stopped")
        assert "Continuing" in invoke("train", *flags(arguments, outdir=tmp_path / "parts")).ok().output
    assert same(weights(only_run(tmp_path / "whole")), weights(only_run(tmp_path / "parts")))


def test_gradient_checkpointing_trains_the_same_student(files, tmp_path):
    config = DistillConfig("lsun_bedroom", total_kimg=0.004, batch=2, M=0, dropout=0.2)
    with known_as_published("lsun_bedroom", files):
        for name in ("without", "with"):
            options = dict(intervals=loop.Intervals(), gradient_checkpointing=name == "with")
            loop.train(config, loop.Place(tmp_path / name), CPU, **options)
    assert same(weights(only_run(tmp_path / "without")), weights(only_run(tmp_path / "with")))
    with pytest.raises(UserError, match="gradient_checkpointing: is for latent, LSUN and EDM2 networks"):
        EDMPrecond(
            8, 3, model_type="SongUNet", model_channels=16, channel_mult=[1], num_blocks=1
        ).checkpoint_gradients()
