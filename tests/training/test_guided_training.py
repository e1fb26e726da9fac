"""A guided teacher, and a student that needs no guidance: trajectories, settings, counts, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from tiny import (
    SAMPLE,
    class_teacher,
    flags,
    invoke,
    only_run,
    pixels,
    run_dirs,
    same,
    second_stage,
    shared_folder,
    teacher,
    tiny_network,
    train_flags,
    write_teacher,
)  # fmt: skip

from dnnlib import UserError
from models import load_student, load_teacher
from models.loading import load_teacher_of
from models.registry import get_row
from solvers import solve
from training.config import DistillConfig, check, describe, settle
from training.cost import estimate, flops_per_evaluation, run_cost
from training.distill import Teacher, load_source
from training.loop import load_models
from training.memory import run_memory

CPU = torch.device("cpu")
SHORT = {"total_kimg": 0.016}


def config(**changes) -> DistillConfig:
    given = dict(dataset_name="classes", model_path=str(class_teacher()), guidance_type="teacher", guidance_rate=2.5)
    return DistillConfig(**{**given, "batch": 4, "M": 1, "lpips": "off", **changes})


@pytest.fixture(scope="module")
def guide():
    """An unconditional network of another width, as EDM2's guides are."""
    return write_teacher(shared_folder() / "guide.safetensors", 3, model_channels=8)


@pytest.fixture(scope="module")
def worse():
    """A smaller network with classes, for autoguidance."""
    return write_teacher(shared_folder() / "worse.safetensors", 4, model_channels=8, label_dim=3)


def trajectory(settings: DistillConfig, labels: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    source = load_source(settings)
    return Teacher(source, settings, settings.sampling(source.sigma_min, source.sigma_max)).trajectory(x, labels, 4)


@pytest.mark.parametrize("kind", ["zero labels", "guide", "worse"])
def test_trajectories_are_those_of_the_guided_denoiser(kind, request):
    other = None if kind == "zero labels" else request.getfixturevalue(kind)
    settings, labels = config(guide=other and str(other)), torch.eye(3)[[2, 0]]
    source, x = load_teacher(None, class_teacher()), 80 * torch.randn(2, 3, 8, 8)
    net, lead = source.net, source.net if other is None else load_teacher(None, other).net
    led = {"zero labels": torch.zeros(2, 3), "guide": None, "worse": labels}[kind]

    def denoise(x, sigma):
        without = lead(x, sigma, led)
        return without + 2.5 * (net(x, sigma, labels) - without)

    plan = settings.teacher_plan(4)
    sigmas = settings.sampling(source.sigma_min, source.sigma_max)
    times = Teacher(source, settings, sigmas).sigmas(4)
    with torch.no_grad():
        expected = solve(plan.solver, denoise, x, times, every=2)
    torch.testing.assert_close(trajectory(settings, labels, x), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trajectory(config(guidance_rate=1.0), labels, x), expected, rtol=1e-2)


@pytest.mark.parametrize("variable", [False, True])
def test_from_the_command_line_to_images_without_guidance(variable, guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = dict(guidance_rate=2.5, guide=guide, use_step_condition=variable, **SHORT)
    invoke("train", *train_flags(class_teacher(), outdir="exps", **changes)).ok()
    run_dir = only_run(tmp_path / "exps")
    assert run_dir.name.endswith("-afs-w2.5") and ("-2to5-" if variable else "-4-2-") in run_dir.name
    student = load_student(run_dir)
    s = student.sampling
    assert (s.guidance_type, s.guidance_rate, s.training_guidance_rate) == ("teacher", 1.0, 2.5)
    assert (s.guide_path, s.nfe, student.guidance_rate, student.guide) == (str(guide), 2, 1.0, None)
    assert f"NFE {'2to5' if variable else 2}," in (run_dir / "log.txt").read_text()
    result = invoke("sample", *flags(SAMPLE, model_path=run_dir, seeds="0-1", outdir="out")).ok()
    assert "NFE 2," in result.output and (pixels(tmp_path / "out", 0) != pixels(tmp_path / "out", 1)).any()
    # The sheet shows the teacher as it was distilled: guided, at twice the evaluations.
    sheet = invoke("sample", *flags(SAMPLE, model_path=run_dir, seeds="0-1", outdir="sheet", compare=True)).ok()
    nfes = [line.split("|")[2].strip() for line in sheet.output.splitlines() if line.startswith("| ")][1:]
    assert nfes[0] == "70" and nfes[-1] == "2"


def test_a_guided_run_goes_on_where_it_stopped_and_an_unguided_one_is_another(tmp_path):
    arguments = dict(outdir=tmp_path, guidance_rate=2.0, **SHORT)
    invoke("train", *train_flags(class_teacher(), **arguments)).ok()
    invoke("train", *train_flags(class_teacher(), **{**arguments, "total_kimg": 0.016, "guidance_rate": None})).ok()
    assert [p.name.removeprefix("0000") for p in run_dirs(tmp_path)] == [
        "0-classes-4-2-dpmpp-1-poly7-afs-w2", "1-classes-4-2-dpmpp-1-poly7-afs"
    ]  # fmt: skip
    # Runs from before there was guidance recorded nothing of it; they go on as what they were.
    old = run_dirs(tmp_path)[1]
    recorded = json.loads((old / "training_options.json").read_text())
    for name in ("guide", "negative_prompt"):
        del recorded["config"][name]
    (old / "training_options.json").write_text(json.dumps(recorded))
    more = {**arguments, "guidance_rate": None, "outdir": old, "total_kimg": 0.032}
    result = invoke("train", *train_flags(class_teacher(), **more), "--nosubdir", "--resume-override").ok()
    assert "Warning: other settings than before: total_kimg 0.016 there, 0.032 here\n" in result.output


def test_second_stage_keeps_the_guidance_that_its_teacher_learnt(tmp_path):
    first = dict(guidance_rate=2.0, num_steps=7, M=0, outdir=tmp_path / "first", **SHORT)
    invoke("train", *train_flags(class_teacher(), **first)).ok()
    changes = dict(dataset_name=None, outdir=tmp_path / "second", **SHORT)
    second_stage(only_run(tmp_path / "first"), **changes).ok()
    s = load_student(only_run(tmp_path / "second")).sampling
    assert (s.guidance_type, s.training_guidance_rate, s.guidance_rate, s.nfe) == ("teacher", 2.0, 1.0, 1)
    assert "-w" not in only_run(tmp_path / "second").name  # nothing is guided in this run


def test_evaluations_are_counted_twice(guide):
    assert config().teacher_plan(4).nfe == 2 * config(guidance_rate=1.0).teacher_plan(4).nfe
    assert config().student_plan(4).nfe == 2
    assert "teacher: 12 evaluations" in describe(config(), "exps")
    net, small = tiny_network(label_dim=3), load_teacher(None, guide).net
    plain, guided = (run_cost(config(guidance_rate=rate), net) for rate in (1.0, 2.5))
    assert (guided.teacher, guided.student) == (2 * plain.teacher, plain.student)
    led = run_cost(config(guide=str(guide)), net, guide=small)
    # Half of the evaluations are the guide's.
    half = plain.teacher * (flops_per_evaluation(net) + flops_per_evaluation(small))
    assert led.flops_per_trajectory == pytest.approx(half + 3 * led.student * flops_per_evaluation(net))
    alone, together = (run_memory(config(), net, 4, guide=g).weights for g in (None, small))
    assert together == alone + 4 * sum(p.numel() for p in small.parameters())


def test_a_dry_run_counts_guidance(guide):
    arguments = dict(guidance_rate=2, guide=guide)
    output = invoke("train", *train_flags(class_teacher(), **arguments), "--dry-run").ok().output
    assert "teacher: 12 evaluations" in output
    assert "12 evaluations of the teacher, 2 of the student" in estimate(config(guide=str(guide)), CPU, seconds=0.1)
    settings = json.loads(output[: output.index("\n}") + 2])
    assert (settings["guidance_type"], settings["guidance_rate"], settings["guide"]) == ("teacher", 2.0, str(guide))


def test_the_published_way_stays_the_default_of_a_text_model():
    default = DistillConfig("ms_coco")
    assert (default.training_rate, default.sampling_rate, default.student_plan(4).nfe) == (1.0, 7.5, 4)
    published = DistillConfig("ms_coco", guidance_type="cfg", guidance_rate=5.0)
    assert (published.training_rate, published.sampling_rate) == (1.0, 5.0)
    ours = DistillConfig("ms_coco", guidance_type="teacher")
    assert (ours.training_rate, ours.sampling_rate, ours.student_plan(4).nfe) == (7.5, 1.0, 2)
    assert ours.teacher_plan(4).nfe == 2 * default.teacher_plan(4).nfe
    # As runs from before recorded a rate that was given.
    before = DistillConfig("ms_coco", guidance_rate=5.0)
    assert (before.training_rate, before.sampling_rate) == (1.0, 5.0)
    for each in (default, published, ours, before):
        check(each)
    assert ours.sampling(0.1, 14.6).plan.nfe == 2 and published.sampling(0.1, 14.6).plan.nfe == 4


@pytest.mark.parametrize("changes, pattern", [
    (dict(model_path=None, dataset_name="cifar10"), "cifar10 has neither classes nor text nor a guide"),
    (dict(guidance_type="uncond"), "--guidance_rate=2.5 does nothing with --guidance_type=uncond"),
    (dict(guidance_rate=None), "--guidance_type=teacher needs --guidance_rate"),
    (dict(guidance_rate=None, guidance_type=None, guide="x"), "--guide does nothing here"),
    (dict(is_second_stage=True, guide="x"), "--guide does nothing here"),
    (dict(negative_prompt="blurry"), "--negative_prompt does nothing here"),
    (dict(guidance_rate=float("inf")), "--guidance_rate=inf is not a finite number"),
])  # fmt: skip
def test_guidance_that_does_nothing_is_refused(changes, pattern):
    with pytest.raises(UserError, match=pattern):
        check(config(**changes))


@pytest.mark.parametrize("changes, pattern", [
    (dict(model_channels=8, img_resolution=4, attn_resolutions=[2]), "3×4² pixels, 0 classes; expected 3×8² pixels, 3 c"),
    (dict(img_channels=1), "network of 1×8² pixels, 0 classes"),
    (dict(label_dim=4), "network of 3×8² pixels, 4 classes"),
])  # fmt: skip
def test_a_guide_of_another_shape_is_refused(changes, pattern, tmp_path):
    other = write_teacher(tmp_path / "other.safetensors", **changes)
    pattern = f"other.safetensors cannot guide this teacher: .*{pattern}"
    arguments = dict(guide=other, guidance_rate=2, outdir=tmp_path)
    invoke("train", *train_flags(class_teacher(), **arguments)).refused(pattern)
    for settings in (config(guide=str(other)), config(guide=str(other), dataset_name="imagenet64", model_path=None)):
        with pytest.raises(UserError, match="cannot guide this teacher"):
            estimate(settings, CPU)


def test_an_unconditional_teacher_is_guided_by_another_network_alone(guide, tmp_path):
    arguments = dict(guidance_rate=2, outdir=tmp_path, **SHORT)
    reason = "tiny has neither classes nor text nor a guide to be guided by"
    invoke("train", *train_flags(teacher(), **arguments)).refused(f"--guidance_rate: {reason}")
    with pytest.raises(UserError, match=reason):
        estimate(config(dataset_name="tiny", model_path=str(teacher())), CPU)
    options = dict(model_path=teacher(), seeds="0", outdir=tmp_path / "images", guidance_rate=2)
    invoke("sample", *flags(SAMPLE, options)).refused("--guidance_rate: tiny has neither classes nor text nor a guide")
    assert not list(tmp_path.iterdir())
    invoke("train", *train_flags(teacher(), guide=guide, **arguments)).ok()
    assert (
        "NFE 70," in invoke("sample", *flags(SAMPLE, options, num_steps=18, denoise_to_zero=True, guide=guide)).output
    )


def test_a_registered_teacher_guides_by_its_name(tmp_path, monkeypatch):
    """Wherever the command runs, and in the student's file, whose teacher is guided by the same afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("emoji32").mkdir()  # a file of that name would be ./emoji32
    settings = settle(config(dataset_name="emoji32-cond", model_path=None, guide="emoji32"))
    teacher, student = load_models(settings, CPU)
    by_path = load_teacher("emoji32-cond", None, guide_path=get_row("emoji32").path)
    assert same(teacher.model.guide.state_dict(), by_path.guide.state_dict())
    assert settings.guide == student.sampling.guide_path == "emoji32"
    assert load_teacher_of(student, "student").guide is not None
    options = dict(
        model_path="teacher",
        dataset_name="emoji32-cond",
        guidance_rate=2,
        seeds="0-1",
        solver="dpmpp",
        num_steps=3,
        outdir="out",
    )
    assert "NFE 4," in invoke("sample", *flags(SAMPLE, options, guide="emoji32")).ok().output
    invoke("sample", *flags(SAMPLE, options, guide="lsun_bedroom")).refused("--guide: lsun_bedroom cannot be a guide")


def test_a_missing_guide_is_one_line(tmp_path):
    arguments = dict(guidance_rate=2, guide=tmp_path / "no.safetensors", outdir=tmp_path)
    invoke("train", *train_flags(class_teacher(), **arguments)).refused("no.safetensors")


def test_guides_are_no_part_of_the_student(guide):
    settings = config(guide=str(guide))
    source, student = load_models(settings, CPU)
    assert source.model.guide is not None and student.guide is None
    assert set(student.state_dict()) == {f"net.{name}" for name in tiny_network(label_dim=3).state_dict()}
    source.model.compute_dtype = torch.bfloat16
    assert source.model.guide.compute_dtype == torch.bfloat16
