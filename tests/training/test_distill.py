"""The distillation step: recorded iterations, splitting, LPIPS, non-finite losses."""

import math
from dataclasses import replace

import pytest
import torch
from golden_files import Golden
from test_lpips import make_lpips

import models.detectors.lpips
from dnnlib import UserError
from models import EDMPrecond
from models.detectors.lpips import LPIPS
from models.loading import make_student
from models.model import DiffusionModel, SamplingSettings, Student
from training.config import DistillConfig, check, follow_teacher
from training.distill import Distiller, Teacher, distance, perceptual_loss
from training.optimizers import make_optimizer

GOLDEN = Golden("training_steps")
#: As recommended: losses rtol 1e-4; states rtol 1e-4 of the largest value; parameters atol 2e-6 for 99.9 %, else 4·lr.
LOSS, STATE, PARAM = 1e-4, 1e-4, 2e-6


def teacher_model(run: dict) -> DiffusionModel:
    """The recorded network as a teacher; in the second stage, as a student with the recorded settings."""
    conditioned = run.get("tk", {}).get("use_step_condition", False)
    net = EDMPrecond(**GOLDEN.meta["net"], use_step_condition=conditioned)
    state = GOLDEN.weights("net")
    net.load_state_dict({k: v for k, v in state.items() if conditioned or "step" not in k})
    if "tk" in run:
        model = Student(net, SamplingSettings("golden", 7, sigma_min=0.006, sigma_max=80.0, **run["tk"]))
    else:
        model = DiffusionModel(net, "golden", GOLDEN.meta["sigma_min"], GOLDEN.meta["sigma_max"])
    return model.eval().requires_grad_(False)


def make_distiller(name: str, micro: int | None = None, lpips: LPIPS | None = None, **changes) -> Distiller:
    run = GOLDEN.meta["runs"][name]
    own = {k: run[k] for k in run if k not in ("seq", "thr", "tk")}
    uses_threshold = run["sampler_tea"] == "dpmpp" and run.get("thr", True)
    config = DistillConfig("golden", batch=GOLDEN.meta["batch"], thresholding=uses_threshold, **{**own, **changes})
    source = teacher_model(run)
    if config.is_second_stage:
        config = replace(config, thresholding=False)
        config = follow_teacher(config, source.sampling)
    sampling = config.sampling(source.sigma_min, source.sigma_max)
    student = make_student(source, sampling)
    # The reference starts its step-condition layers at random values, recorded with the network.
    student.net.load_state_dict({k: v for k, v in GOLDEN.weights("net").items() if k in student.net.state_dict()})
    return Distiller(Teacher(source, config, sampling), student, config, micro or config.batch, lpips)


def test_denoise_to_zero_ends_trajectories_with_the_denoiser():
    """The same states but for the last one, which is the denoiser's at σ_min; the student is pulled to that one."""
    plain, denoised = (make_distiller("sfd", denoise_to_zero=on) for on in (False, True))
    x = GOLDEN["noise"][0] * 80
    before, after = (d.teacher.trajectory(x, None, 4) for d in (plain, denoised))
    assert torch.equal(before[:-1], after[:-1])
    assert torch.equal(after[-1], plain.teacher.model.denoise(before[-1], torch.tensor(0.006)))
    assert not torch.equal(before[-1], after[-1])
    target, states = denoised.iterate(GOLDEN["noise"][0], None, 4)
    assert torch.equal(target[-1], after[-1])
    expected = (states[-1] - target[-1]).abs().sum() / len(x)
    assert denoised.losses.flush()[4, 2] == pytest.approx(float(expected), rel=1e-6)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", GOLDEN.meta["runs"])
def test_iterations_equal_the_reference(name):
    run = GOLDEN.meta["runs"][name]
    distiller = make_distiller(name)
    start = {k: v.clone() for k, v in distiller.student.net.named_parameters()}
    lr = distiller.config.lr
    for it in range(GOLDEN.meta["iterations"]):
        num_steps = run.get("seq", [run["num_steps"]] * 3)[it]
        teacher, student = distiller.iterate(GOLDEN["noise"][it], None, num_steps)
        losses = [v for k, v in sorted(distiller.losses.flush().items())]
        assert relative(teacher, GOLDEN[f"{name}/it{it}/teacher"]) < STATE
        assert relative(student, GOLDEN[f"{name}/it{it}/student"]) < STATE
        recorded = GOLDEN[f"{name}/it{it}/loss_sum_over_batch"]
        torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), recorded, rtol=LOSS, atol=0)
        params = dict(distiller.student.net.named_parameters())
        _compare_parameters(name, it, params, start, lr)


def _compare_parameters(name, it, params, start, lr):
    prefix = f"{name}/it{it}/param/"
    recorded = [k[len(prefix) :] for k in GOLDEN.keys(prefix) if not k.endswith("qkv.bias")]
    errors = torch.cat([(params[k].detach() - GOLDEN[prefix + k]).abs().flatten() for k in recorded if k in params])
    assert len(errors) and (errors < PARAM).float().mean() >= 0.999 and errors.max() <= 4 * lr
    for k, norm in zip(GOLDEN.meta["param_names"], GOLDEN[f"{name}/it{it}/delta_l2"]):
        if k in params and not k.endswith("qkv.bias"):
            delta = (params[k].detach() - start[k]).norm().item()
            assert delta == pytest.approx(float(norm), rel=1e-3, abs=1e-7), k


def test_a_knee_forgives_large_errors():
    new, target = torch.tensor([1.0, -0.5, 1e-4, 2.0]), torch.tensor([1.0, 0.5, 0.0, -1.0])
    assert distance(new, target).tolist() == pytest.approx([0, 1, 1e-4, 3])
    assert distance(new, target, 0.1).tolist() == pytest.approx(
        [0, 0.1 * math.log(11), 1e-4, 0.1 * math.log(31)], rel=1e-3
    )
    far = torch.tensor([0.3], requires_grad=True)
    distance(far, torch.zeros(1), 0.1).sum().backward()
    assert far.grad.item() == pytest.approx(0.25)  # 1 / (1 + |d|/c)
    assert distance(new, target, 1e9).tolist() == pytest.approx([0, 1, 1e-4, 3])


def test_micro_batches_accumulate_to_the_same_weights():
    whole, split = make_distiller("sfd_nothr"), make_distiller("sfd_nothr", micro=1)
    for it in range(3):
        states = [d.iterate(GOLDEN["noise"][it], None, 4)[1] for d in (whole, split)]
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(whole.student.named_parameters(), split.student.parameters()):
        assert (a - b).abs().max() <= 1e-5, name


def test_second_stage_with_lpips_equals_the_reference():
    recorded = Golden("lpips")
    lpips, values = make_lpips("reference"), []
    lpips.register_forward_hook(lambda module, inputs, output: values.append(output.detach()))
    distiller = make_distiller("stage2_v", lpips=lpips)
    start = {k: v.clone() for k, v in distiller.student.net.named_parameters()}
    teacher, student = distiller.iterate(GOLDEN["noise"][0], None, 3)
    assert relative(teacher, recorded["stage2/teacher"]) < STATE
    for i in range(2):
        assert relative(student[i], recorded[f"stage2/student/step{i}"]) < STATE
    assert len(values) == 1  # the first step has L1 alone
    torch.testing.assert_close(values[0], recorded["stage2/lpips_last"], rtol=1e-3, atol=0)
    expected = [recorded["stage2/l1/step0"], recorded["stage2/l1/step1"] + 192 * recorded["stage2/lpips_last"].mean()]
    found = [v for k, v in sorted(distiller.losses.flush().items())]
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected), rtol=1e-3, atol=0)
    name = "model.dec.8x8_aux_conv.weight"
    param = dict(distiller.student.net.named_parameters())[name]
    assert relative(param.grad, recorded[f"stage2/grad/{name}"]) < 1e-3
    errors, lr = (param.detach() - recorded[f"stage2/param/{name}"]).abs(), distiller.config.lr
    assert (errors < PARAM).float().mean() >= 0.999 and errors.max() <= 4 * lr
    assert (param - start[name]).abs().max() > lr / 2


def last_gradient(distiller: Distiller, noise: torch.Tensor) -> torch.Tensor:
    """Of the last step of an iteration in which the weights stay, all parameters in one vector."""
    distiller._update = lambda loss: None
    distiller.iterate(noise, None, 3)
    return torch.cat([p.grad.flatten() for p in distiller.trained if p.grad is not None])


@pytest.mark.parametrize("mode", ["reference", "standard"])
def test_lpips_does_not_depend_on_how_a_batch_is_split(mode, monkeypatch):
    monkeypatch.setattr(models.detectors.lpips, "SIZE", 16)
    noise, lpips = GOLDEN["noise"][0], make_lpips(mode)
    whole, without = make_distiller("stage2_v", lpips=lpips), make_distiller("stage2_v")
    expected, l1 = last_gradient(whole, noise), last_gradient(without, noise)
    split = last_gradient(make_distiller("stage2_v", micro=1, lpips=lpips), noise)
    halves = [make_distiller("stage2_v", lpips=lpips) for _ in range(2)]  # as two ranks, which average
    ranks = sum(last_gradient(half, part) for half, part in zip(halves, noise.split(2))) / 2
    # Poolings and ReLUs make the gradient jump where rounding decides, so single entries may differ.
    lpips_part = (expected - l1).norm()
    assert (split - expected).norm() < 0.05 * lpips_part and (ranks - expected).norm() < 0.05 * lpips_part
    losses = [d.losses.flush()[3, 1] for d in (whole, *halves, without)]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)
    assert losses[0] > 1.01 * losses[3] and lpips_part > 0.01 * l1.norm()


def test_lpips_of_a_run():
    config = DistillConfig("golden", num_steps=3, M=2, is_second_stage=True)
    student = teacher_model({})
    for changes in ({"is_second_stage": False}, {"lpips": "off"}):
        assert perceptual_loss(replace(config, **changes), student) is None
    latent = teacher_model({})
    latent.latent = object()
    assert perceptual_loss(config, latent) is None
    with pytest.raises(UserError, match="--lpips=standard compares images, and golden is distilled on lat"):
        perceptual_loss(replace(config, lpips="standard"), latent)
    student.net.img_channels = 4
    with pytest.raises(UserError, match="RGB or grey images, the model has 4 channels; use --lpips=off"):
        perceptual_loss(config, student)


def test_lpips_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("SFD_OFFLINE", "1")
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    config = DistillConfig("golden", num_steps=3, M=2, is_second_stage=True)
    pattern = "weights-vgg16-lpips.pth is not there; get it from https://.*; --lpips=off trains without it"
    with pytest.raises(UserError, match=pattern):
        perceptual_loss(config, teacher_model({}))


def test_lpips_is_for_the_second_stage():
    with pytest.raises(UserError, match="--lpips=standard is a loss of the second stage"):
        check(DistillConfig("golden", lpips="standard"))
    check(DistillConfig("golden", num_steps=3, M=2, is_second_stage=True, lpips="standard"))
    check(DistillConfig("golden", num_steps=3, M=2, is_second_stage=True))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_never_reaches_weights_or_moments(poison, fused, optimizer):
    distiller = make_distiller("sfd_nothr")
    # Not fused, as on MPS.
    distiller.optimizer = make_optimizer(optimizer, distiller.student, 5e-5, img_channels=3, fused=fused)
    distiller.iterate(GOLDEN["noise"][0], None, 4)
    before = {k: v.clone() for k, v in distiller.student.net.state_dict().items()}
    moments = [{k: v.clone() for k, v in s.items()} for s in distiller.optimizer.state.values()]
    noise = GOLDEN["noise"][1].clone()
    noise[2, 0, 0, 0] = poison
    distiller.iterate(noise, None, 4)
    assert int(distiller.skipped) == 2  # both trained steps; the first one is analytical
    assert all(torch.equal(v, before[k]) for k, v in distiller.student.net.state_dict().items())
    assert all(torch.equal(s[k], m[k]) for s, m in zip(distiller.optimizer.state.values(), moments) for k in m)
    distiller.iterate(GOLDEN["noise"][1], None, 4)
    assert int(distiller.skipped) == 2
    assert any(not torch.equal(v, before[k]) for k, v in distiller.student.net.state_dict().items())


def test_student_starts_as_its_teacher_also_with_step_condition():
    source = teacher_model({})
    config = DistillConfig("golden", use_step_condition=True)
    student = make_student(source, config.sampling(0.006, 80.0)).eval()
    x = torch.randn(2, *student.shape) * 5
    assert torch.equal(student.denoise(x, 5.0, step_condition=6), source.denoise(x, 5.0))


def test_analytical_step_needs_no_network_and_trains_nothing():
    distiller = make_distiller("sfd_nothr")
    calls = []
    distiller.student.register_forward_hook(lambda *args: calls.append(1))
    before = [p.clone() for p in distiller.trained]
    distiller._step(
        0,
        [GOLDEN["noise"][0] * 80],
        [torch.zeros(4, 3, 8, 8)],
        [None],
        torch.tensor([80.0, 10.0]),
        distiller.student.sampling,
    )
    assert not calls and all(torch.equal(a, b) for a, b in zip(before, distiller.trained))


def test_dropout_of_the_student_is_on_and_replaceable():
    net = EDMPrecond(**{**GOLDEN.meta["net"], "dropout": 0.5})
    x = torch.randn(1, 3, 8, 8)
    assert not torch.equal(net.train()(x, 1.0), net(x, 1.0))
    net.set_dropout(0.0)
    assert torch.equal(net(x, 1.0), net(x, 1.0))


def test_a_gradient_that_overflows_does_not_stop_its_weight():
    """As a gradient of 1e5, it would stay in Adam's second moment: the weight moved by 0.0009 where 0.156 is right."""
    distiller = make_distiller("sfd", lr=1e-3)
    twin = make_distiller("sfd", lr=1e-3)
    weight, other = distiller.trained[0], twin.trained[0]
    start = weight.detach().clone()
    for step in range(40):
        for it in (distiller, twin):
            for param in it.trained:
                param.grad = torch.ones_like(param)
        if step == 3:
            weight.grad.view(-1)[0] = float("inf")
        else:
            twin._update(torch.ones(()))
        distiller._update(torch.ones(()))
    assert torch.equal(weight, other) and float((weight.detach() - start).abs().min()) > 0.9 * 39 * 1e-3
    assert int(distiller.skipped) == 1 and int(distiller.bad_losses) == 0 and int(twin.skipped) == 0
