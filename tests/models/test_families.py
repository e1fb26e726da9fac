"""Every family of teachers by commands: train.py (SFD, SFD-v, guided), sample.py, fid.py, export, bench, dry runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_folders import package, write_pipeline, write_unet
from edm_pickle_files import randomised, write_edm2_pickle, write_edm_pickle
from published import known_as_published, write_captions, write_published
from test_clip_text import write_tokenizer
from test_edm2_teachers import BIAS, LATENTS, PIXELS, SCALE, cache, published  # noqa: F401
from test_edm2_teachers import NETWORK as EDM2_NETWORK
from tiny import NETWORK, SAMPLE, TRAIN, Patches, flags, invoke, only_run, png_names, tiny_network, write_images

from dnnlib import UserError
from models import EDM2Precond
from models.detectors.encoder import EncoderDistance
from models.loading import load_teacher

#: Two short iterations.
SHORT = dict(total_kimg=0.008, batch=4, M=0, tick=0.004, lr=1e-3)
FOLDERS = {"unet": {}, "sd1": {"prompt": "a cat"}, "sd2": {"prompt": "a cat"}, "sdxl": {"prompt": "a cat"},
           "sd3": {"prompt": "a cat"}, "dit": {"class": 1}}  # fmt: skip
FILES = {"lsun_bedroom": {}, "lsun_cat": {}, "imagenet64_cm": {"class": 5}, "imagenet256_adm": {"class": 5},
         "imagenet256_adm_uncond": {}, "lsun_bedroom_ldm": {}, "ffhq_ldm": {}, "ms_coco": {"prompt": "a cat"}}  # fmt: skip
EDM = {"edm": {}, "edm-classes": {"class": 1}, "edm2": {"class": 1}, "edm2-latents": {"class": 1}}
PAIRS = {PIXELS: {"class": 1}, LATENTS: {"class": 1}}
GIVEN: dict[str, dict[str, Any]] = {**FOLDERS, **FILES, **EDM, **PAIRS}
FAST = ("dit", "edm2-latents")


def write_edm(family: str) -> tuple[str, dict[str, Any]]:
    """A pickle of EDM's training, or a pair of EDM2's; its place, and flags that guide it."""
    if family.startswith("edm2"):
        latents = (SCALE, BIAS) if family == "edm2-latents" else None
        for seed, path in enumerate(("network.pkl", "guide.pkl")):
            kwargs = {**EDM2_NETWORK, "img_channels": 4 if latents else 3, "label_dim": 0 if seed else 3}
            net = randomised(EDM2Precond(**kwargs), seed)
            net.unet.out_gain.fill_(0.5)
            write_edm2_pickle(Path(path), net, kwargs, latents)
        return "network.pkl", {"guide": "guide.pkl"}
    kwargs = {**NETWORK, "label_dim": 3 if family == "edm-classes" else 0}
    write_edm_pickle(Path("network.pkl"), tiny_network(**kwargs), kwargs)
    return "network.pkl", {}


@contextmanager
def teacher_of(family: str, folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Flags that name the tiny teacher, and more that guide it, besides the rate."""
    if family in FILES:
        write_published(family, folder)
        write_tokenizer(folder / "tokenizer")
        with known_as_published(family, folder):
            yield {"dataset_name": family}, {}
    elif family in PAIRS:
        yield {"dataset_name": family}, {}
    elif family in EDM:
        path, guide = write_edm(family)
        yield {"model_path": path}, guide
    else:
        scheduler = {"prediction_type": "v_prediction"} if family == "sd2" else None
        kind = "sd" if family in ("sd1", "sd2") else family
        write_unet(Path(family)) if kind == "unet" else write_pipeline(Path(family), kind, scheduler)
        yield {"model_path": family}, {"negative_prompt": "a dog"} if "prompt" in FOLDERS[family] else {}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder and cache with captions, without network; a detector and reference images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SFD_OFFLINE", "1")
    write_captions(tmp_path / "cache")
    torch.jit.script(Patches()).save("patches.pt")
    write_images(Path("real"), 8, (16, 16))


def check_student(name: str, family: str, settings: dict[str, Any], nfe: int) -> Path:
    """Plan, train, sample, measure and export one student; its run directory."""
    given, text = GIVEN[family], "prompt" in GIVEN[family]
    command = flags(TRAIN, SHORT, settings, dict(outdir=name))
    assert f"NFE {nfe}" in invoke("train", *command, "--dry-run").ok().output and not Path(name).exists()
    invoke("train", *command).ok()
    run = only_run(Path(name))
    sampled = dict(model_path=run, seeds="0-3", **given)
    assert f"NFE {nfe}," in invoke("sample", *flags(SAMPLE, sampled, dict(outdir=f"{name}-images"))).ok().output
    assert len({Path(f"{name}-images", png).read_bytes() for png in png_names(Path(f"{name}-images"))}) == 4
    evaluation = ["--ref=real", "--detector=patches.pt", "--detector-runs-code", "--device=cpu", f"--out={name}.jsonl"]
    invoke("fid", "calc", f"--images={name}-images", *evaluation).ok()
    invoke("fid", "gen", *flags(sampled, dict(precision="fp32")), *evaluation).ok()
    calc, gen = (json.loads(line)["value"] for line in Path(f"{name}.jsonl").read_text().splitlines())
    assert calc == gen > 0
    exported = invoke("models.export", "diffusers", *flags(dict(model_path=run, dest=f"{name}-folder")))
    if family in FOLDERS or family == "ms_coco":
        assert exported.ok() and Path(f"{name}-folder", "model_index.json").is_file()
    else:
        exported.refused("of students of ms_coco and of folders of diffusers, use `program`")
    if not (family in FOLDERS and text) and name == "variable":
        invoke("models.export", "program", *flags(dict(model_path=run, dest="step.pt2"))).ok()
    return run


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in GIVEN]
)
def test_from_teacher_to_students_numbers_and_export(family, request, tmp_path, monkeypatch):
    if family in PAIRS or family == "edm2-latents":
        request.getfixturevalue("published")
    if family in FOLDERS:
        package()
        logger = "diffusers.models.modeling_utils.logger.warning"
        monkeypatch.setattr(logger, lambda text, *_: pytest.fail(text))  # nothing to puzzle a user
    given, conditional = GIVEN[family], bool(GIVEN[family])
    with teacher_of(family, tmp_path / "cache") as (teacher, guide):
        text = dict(schedule_type="discrete", schedule_rho=1) if "prompt" in given else {}
        settings, unguided = {**teacher, **text}, 2 * (1 + ("prompt" in given))
        check_student("plain", family, settings, unguided)
        check_student("variable", family, dict(settings, use_step_condition=True), unguided)
        if conditional:  # one evaluation a step then, also where text is guided in sampling by default
            run = check_student("guided", family, {**settings, **guide, "guidance_rate": 2}, 2)
            assert run.name.endswith("-w2")
        else:
            invoke("train", *flags(TRAIN, SHORT, settings, dict(guidance_rate=2))).refused("guidance_rate")
        timed = flags(teacher, dict(batch=2, precision="fp32", device="cpu"))
        assert "{" in invoke("training.bench", *timed, "--dry-run").ok().output
        assert "training iteration" in invoke("training.bench", *timed, "--quick").ok().output


@pytest.mark.parametrize("family, blocks", [("edm", 4), ("edm2", 4), ("imagenet64_cm", 4), ("ms_coco", 4), ("unet", 3),
                                            ("sd1", 3)])  # fmt: skip
def test_the_encoders_of_all_u_nets_measure_distances(family, blocks, tmp_path):
    """One block at each of two levels and what comes between; the first convolution too where it is one of a list."""
    given = GIVEN[family]
    with teacher_of(family, tmp_path / "cache") as (teacher, _):
        model = load_teacher(teacher.get("dataset_name"), teacher.get("model_path"))
        cond = model.encode_text(["a cat"] * 2) if "prompt" in given else None
    cond = torch.eye(model.label_dim)[[0, 1]] if "class" in given else cond
    distance = EncoderDistance(model)
    x, y = torch.randn([2, 2, *model.shape], generator=torch.Generator().manual_seed(0))
    assert len(distance.features(x, cond)) == blocks
    assert distance(x, x, cond).tolist() == [0, 0] and bool((distance(x, y, cond) > 0).all())


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_transformers_have_no_encoder(family, tmp_path):
    with teacher_of(family, tmp_path / "cache") as (teacher, _), pytest.raises(UserError, match="has no encoder"):
        EncoderDistance(load_teacher(None, teacher["model_path"]))
