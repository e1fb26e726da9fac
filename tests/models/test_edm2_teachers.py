"""EDM2's published files as teachers: tiny networks in their layout go from pickle to students, images and FID."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from edm_pickle_files import randomised, write_edm2_pickle
from golden_files import Golden
from PIL import Image
from published import STAGE, random_state
from safetensors.torch import save_file
from tiny import SAMPLE, TRAIN, Patches, flags, invoke, only_run, png_names, shared_folder

from dnnlib import UserError
from models import EDM2Precond, load_student, load_teacher, prefetch, registry
from models.building import build_on_meta
from models.latent import LatentScale, LatentSpace
from models.loading import save_student
from models.model import DiffusionModel, SamplingSettings, Student
from models.networks.autoencoders import KLAutoencoder
from models.published.state_dicts import OLD_ATTENTION, is_stage_matrix, stage_name
from models.registry import ROWS
from training.config import DistillConfig
from training.cost import estimate, run_cost

CPU = torch.device("cpu")
NETWORK = dict(img_resolution=8, img_channels=3, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
               attn_resolutions=[4], channels_per_head=16)  # fmt: skip
#: As published: from the mean and the standard deviation of the latents.
SCALE, BIAS = [0.1199, 0.1082, 0.1348, 0.1524], [-0.6966, -0.3517, -0.0162, 0.3277]
STAGE_SPEC = dict(**{"class": "KLAutoencoder"}, embed_dim=4, z_channels=4, **STAGE)
PIXELS, LATENTS = "edm2-img64-s-autog-fid", "edm2-img512-s-guid-fid"


@pytest.fixture(scope="module")
def cache() -> Path:
    """A cache directory with two pairs of files and the autoencoder, which no test changes."""
    folder = shared_folder() / "edm2"
    if folder.exists():
        return folder
    (folder / "edm2").mkdir(parents=True)
    for name, changes, latents in ((PIXELS, {}, None), (LATENTS, {"img_channels": 4}, (SCALE, BIAS))):
        row = ROWS[name]
        for seed, each in enumerate((row, row.guide)):
            kwargs = {**NETWORK, **changes, "label_dim": 3 if each.label_dim else 0}
            kwargs["model_channels"] = 16 if each is row else 8 * 2
            net = randomised(EDM2Precond(**kwargs), seed)
            net.unet.out_gain.fill_(0.5)
            write_edm2_pickle(folder / "edm2" / each.path.name, net, kwargs, latents)
    write_autoencoder(folder / "sd-vae-ft-mse" / "diffusion_pytorch_model.safetensors")
    for name, stage in (("edm2-img64", {}), ("edm2-img512", {"first_stage": STAGE_SPEC})):
        network = {"class": "EDM2Precond", **NETWORK, "img_channels": 4 if stage else 3}
        (folder / f"{name}.yaml").write_text(json.dumps({"network": network, **stage}))
    return folder


def write_autoencoder(path: Path) -> Path:
    """As diffusers published it, before its attention got other names."""
    net = KLAutoencoder(**{k: v for k, v in STAGE_SPEC.items() if k != "class"})
    levels, old = len(STAGE_SPEC["ch_mult"]), {new: old for old, new in OLD_ATTENTION.items()}
    state = {}
    for name, tensor in random_state(net, 5).items():
        tensor = tensor[:, :, 0, 0] if is_stage_matrix(name) else tensor
        published = stage_name(name, levels)
        for new, before in old.items():
            published = published.replace(f".{new}.", f".{before}.")
        state[published] = tensor.contiguous()
    assert any("query" in name for name in state)
    path.parent.mkdir(parents=True)
    save_file(state, path)
    return path


@pytest.fixture
def published(cache, tmp_path, monkeypatch):
    """The registry expects the tiny files, and nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFD_CACHE", str(cache))
    monkeypatch.setenv("SFD_OFFLINE", "1")
    monkeypatch.setattr(registry, "VAE_SHA256", None)
    rows = {}
    for name in (PIXELS, LATENTS):
        row = ROWS[name]
        config = str(cache / f"{row.config}.yaml")
        size = dict(resolution=16, latent_resolution=8) if row.codec else dict(resolution=8)
        guide = replace(row.guide, config=config, network={"label_dim": 3 if row.guide.label_dim else 0}, **size)
        rows[name] = replace(row, config=config, network={}, label_dim=3, guide=guide, **size)
    with mock.patch.dict(ROWS, rows), mock.patch("models.loading.EDM2_LATENTS", str(cache / "edm2-img512.yaml")):
        yield


def images_in(folder: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(Path(folder) / png)) for png in png_names(Path(folder))]


@pytest.mark.parametrize("variable", [False, True], ids=["SFD", "SFD-v"])
@pytest.mark.parametrize("name", [PIXELS, LATENTS])
def test_from_the_published_pair_to_images_and_their_fid(name, variable, published):
    size, rate = (16, 1.4) if name == LATENTS else (8, 1.7)
    short = dict(dataset_name=name, total_kimg=0.032, lr=1e-2, M=0, use_step_condition=variable)
    result = invoke("train", *flags(TRAIN, short)).ok()
    run_dir = only_run(Path("exps"))
    assert run_dir.name.startswith(f"00000-{name}-4") and run_dir.name.endswith(f"-afs-w{rate:g}"), result.output
    invoke("sample", *flags(SAMPLE, model_path=0, seeds="0-3", outdir="student")).ok()
    options = dict(model_path="teacher", dataset_name=name, solver="dpmpp", num_steps=4, seeds="0-3", outdir="teacher")
    assert "NFE 6," in invoke("sample", *flags(SAMPLE, options)).ok().output  # guided
    for folder in ("student", "teacher"):
        images = images_in(folder)
        assert len(images) == 4 and all(image.shape == (size, size, 3) for image in images)
        assert len({image.tobytes() for image in images}) == 4
    torch.jit.script(Patches()).save("patches.pt")
    evaluation = ["--detector=patches.pt", "--detector-runs-code", "--device=cpu", "--ref=teacher"]
    invoke("fid", "gen", "--model_path=0", "--seeds=0-3", "--precision=fp32", *evaluation).ok()
    assert json.loads(Path("metrics.jsonl").read_text())["value"] > 0
    student = load_student(run_dir)
    settings = student.sampling
    assert (settings.guidance_type, settings.training_guidance_rate, settings.plan.guidance_rate) == (
        "teacher",
        rate,
        1.0,
    )
    assert student.guide is None and isinstance(student.net, EDM2Precond)
    # Weights stay normalised, and what a student never evaluates stays what it was.
    teacher = load_teacher(name)
    weight = student.net.unet.enc["8x8_block0"].conv_res0.weight
    assert (weight.square().mean((1, 2, 3)).sqrt() - 1).abs().max() < 1e-3
    assert torch.equal(student.net.logvar_linear.weight, teacher.net.logvar_linear.weight)
    assert not torch.equal(weight, teacher.net.unet.enc["8x8_block0"].conv_res0.weight)


def test_the_guided_denoiser_is_that_of_the_pair(published):
    teacher = load_teacher(LATENTS)
    assert (teacher.guidance_rate, teacher.label_dim, teacher.guide.label_dim) == (1.4, 3, 0)
    x, labels = torch.randn(2, 4, 8, 8), torch.eye(3)[:2]
    bound, free = teacher.net(x, 2.0, labels), teacher.guide(x, 2.0)
    found = teacher.denoise(x, 2.0, labels, guidance_rate=1.4)
    torch.testing.assert_close(found, free + 1.4 * (bound - free), atol=1e-5, rtol=1e-5)


def test_recorded_guidance_and_guided_sampler():
    """The reference's numbers, through the denoiser of a teacher with a guide."""
    from test_edm2 import build, sample

    golden = Golden("edm2_networks")
    nets = [build(golden, name).requires_grad_(False) for name in ("pixels", "guide")]
    teacher = DiffusionModel(nets[0], "pixels", 0.002, 80.0, guide=nets[1])
    for key in golden.keys("pixels/guided/guide/rate"):
        inputs = (golden[f"pixels/{name}"] for name in ("x", "sigma", "labels"))
        found = teacher.denoise(*inputs, guidance_rate=float(key.split("rate")[1]))
        torch.testing.assert_close(found, golden[key], atol=5e-5, rtol=1e-4)
    denoise = teacher.denoiser(golden["pixels/sampler/labels"], 1.4)
    with torch.no_grad():
        images = sample(denoise, golden["pixels/sampler/noise"])
    torch.testing.assert_close(images, golden["pixels/sampler/guided1.4"], atol=1e-3, rtol=1e-3)


def test_latents_and_pixels_equal_the_reference():
    from torch_utils.images import to_uint8

    golden = Golden("edm2_networks")
    scale = LatentScale(golden["vae/scale"].tolist(), golden["vae/bias"].tolist())
    raw = scale.latents(golden["vae/final_latents"])
    torch.testing.assert_close(raw, golden["vae/raw_latents"], atol=5e-5, rtol=1e-4)
    decoded = torch.from_numpy(to_uint8(golden["rgb/x"])).permute(0, 3, 1, 2)
    assert torch.equal(decoded, golden["rgb/decoded"])


def test_latents_decode_to_images_of_the_usual_range(published):
    """The autoencoder of EDM2 is given images in [0, 1], ours are in [-1, 1]."""
    latent = load_teacher(LATENTS).latent
    states = torch.randn(2, 4, 8, 8)
    bias, scale = (torch.tensor(v)[:, None, None] for v in (BIAS, SCALE))
    expected = 2 * latent.decoder().decode((states - bias) / scale) - 1
    torch.testing.assert_close(latent.decode(states), expected, atol=1e-2, rtol=1e-3)  # recorded in float32
    assert load_teacher(PIXELS).latent is None


def test_a_pickle_of_ones_own_on_latents(published, cache):
    """It says how its latents are scaled, and so does its student's file."""
    row = ROWS[LATENTS]
    short = dict(model_path=row.path, guide=row.guide.path, guidance_rate=1.4, total_kimg=0.016, M=0, num_steps=3)
    invoke("train", *flags(TRAIN, short)).ok()
    run_dir = only_run(Path("exps"))
    assert run_dir.name.split("-3-1-")[0] == f"00000-{row.path.stem}"
    latent = load_student(run_dir).latent
    assert isinstance(latent, LatentSpace) and latent.scale.scale == torch.tensor(SCALE).tolist()
    invoke("sample", *flags(SAMPLE, model_path=run_dir, seeds="0-1", outdir="out")).ok()
    assert all(image.shape == (16, 16, 3) for image in images_in("out"))


def test_a_guide_on_pixels_cannot_guide_a_network_on_latents(published):
    arguments = dict(dataset_name=LATENTS, guide=ROWS[PIXELS].path, outdir="x")
    invoke("train", *flags(TRAIN, arguments)).refused(
        r"cannot guide this teacher: it is a network of 3×8² pixels, 3 classes"
    )


def test_a_guide_with_latents_of_another_scale_is_refused(published, tmp_path):
    kwargs = {**NETWORK, "img_channels": 4}
    write_edm2_pickle(tmp_path / "other.pkl", randomised(EDM2Precond(**kwargs)), kwargs, ([0.5] * 4, BIAS))
    arguments = dict(dataset_name=LATENTS, guide="other.pkl", outdir="x")
    invoke("train", *flags(TRAIN, arguments)).refused(r"--guide: \S*other.pkl cannot guide .* scaled in another way")


def test_without_guidance_the_guide_is_not_needed(published, cache, tmp_path, monkeypatch):
    (tmp_path / "alone" / "edm2").mkdir(parents=True)
    (tmp_path / "alone" / "edm2" / ROWS[PIXELS].path.name).symlink_to(ROWS[PIXELS].path)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "alone"))
    invoke("train", *flags(TRAIN, dataset_name=PIXELS)).refused("xs-0134217")
    short = dict(dataset_name=PIXELS, total_kimg=0.008, M=0, guidance_type="uncond")
    invoke("train", *flags(TRAIN, short)).ok()
    assert load_student(only_run(Path("exps"))).sampling.training_guidance_rate == 1
    options = dict(model_path="teacher", dataset_name=PIXELS, num_steps=3, seeds="0-1", guidance_rate=1, outdir="x")
    invoke("sample", *flags(SAMPLE, options)).ok()
    assert load_teacher(PIXELS, with_guide=False).guidance_rate == 1


def test_a_file_of_the_other_kind_is_refused(published):
    row = ROWS[LATENTS]
    with mock.patch.dict(ROWS, {LATENTS: replace(row, sources=ROWS[PIXELS].sources)}):
        with pytest.raises(UserError, match="autog|s-1073741-0.045.pkl is of pixels; expected the published file"):
            load_teacher(LATENTS)


def test_missing_parts_are_named_before_a_run_starts(published, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "elsewhere"))
    for part in ("edm2", "sd-vae-ft-mse"):
        invoke("train", *flags(TRAIN, dataset_name=LATENTS)).refused(rf"elsewhere/{part}/.*nvidia|elsewhere/{part}/")
        if part == "edm2":
            (tmp_path / "elsewhere").mkdir()
            (tmp_path / "elsewhere" / "edm2").symlink_to(cache / "edm2")
    assert not Path("exps").exists()


def test_a_dry_run_needs_no_file(published, monkeypatch, tmp_path):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "empty"))
    config = DistillConfig(LATENTS, batch=2, M=1)
    net, guide = build_on_meta(ROWS[LATENTS]), build_on_meta(ROWS[LATENTS].guide)
    assert run_cost(config, net, guide=guide).teacher_work < 1.01
    assert "12 evaluations of the teacher, 2 of the student" in estimate(config, CPU, seconds=0.1)
    assert not (tmp_path / "empty").exists()


# --- The table -------------------------------------------------------------------------------------------------------


def test_rows_are_the_published_files():
    rows = {name: row for name, row in ROWS.items() if row.loader == "edm2"}
    assert len(rows) == 36 and all(row.folder == "edm2" and row.published for row in rows.values())
    for data, sizes in (("img64", "s m l xl"), ("img512", "xs s m l xl xxl")):
        assert all(f"edm2-{data}-{size}-fid" in rows for size in sizes.split())
    row = rows["edm2-img512-xxl-guid-dino"]
    assert row.sources[0].endswith("/posthoc-reconstructions/edm2-img512-xxl-0939524-0.015.pkl")
    assert row.guide.sources[0].endswith("/edm2-img512-xs-uncond-2147483-0.015.pkl")
    assert (row.guidance_rate, row.published, row.guide.label_dim) == (1.7, "FD-DINOv2 33.09", 0)
    assert all((row.guide is None) == (row.guidance_rate == 1) for row in rows.values())
    # A file that two rows name is one file.
    assert row.path == rows["edm2-img512-xxl-guid-fid"].path


@pytest.mark.parametrize("name, published", [
    ("edm2-img64-s-fid", "edm2-img64-s"), ("edm2-img512-xs-fid", "edm2-img512-xs"), ("edm2-img512-xxl-fid", "edm2-img512-xxl"),
])  # fmt: skip
def test_configured_networks_have_the_published_names_and_shapes(name, published):
    from golden_files import GOLDEN

    pytest.importorskip("omegaconf")
    net = build_on_meta(ROWS[name])
    expected = json.loads((GOLDEN / f"{published}.json").read_text())["tensors"]
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected
    row = ROWS[name]
    assert (net.img_resolution, net.img_channels, net.label_dim) == (64, row.latent_channels or row.channels, 1000)


def test_prefetch_brings_guide_and_autoencoder(published, cache):
    assert prefetch.expand([LATENTS]) == [LATENTS, "sd-vae-ft-mse"] and prefetch.expand([PIXELS]) == [PIXELS]
    line = prefetch.prefetch(LATENTS)
    assert line.startswith("there: ") and ROWS[LATENTS].path.name in line and ROWS[LATENTS].guide.path.name in line
    assert not any(name.startswith("edm2-") for name in prefetch.expand(["all"]))


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_step_conditioned_student_is_exported(suffix, tmp_path):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    net = randomised(EDM2Precond(**NETWORK, use_step_condition=True))
    sampling = SamplingSettings("tiny", 4, True, "polynomial", 7.0, 0.006, 80.0, use_step_condition=True)
    save_student(tmp_path / "student.safetensors", Student(net, sampling), {})
    arguments = dict(model_path=tmp_path / "student.safetensors", dest=tmp_path / f"step.{suffix}")
    assert "differs from our step by" in invoke("models.export", "program", *flags(arguments)).ok().output
