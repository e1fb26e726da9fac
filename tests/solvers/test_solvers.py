"""Solvers against recorded reference trajectories, exact solutions, and the properties that distillation relies on."""

import itertools
import json
import math
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from golden_files import GOLDEN

from solvers import SOLVERS, SamplingPlan, Solver, get_schedule, get_solver, solve
from solvers.steppers import TwoStage, threshold

FILES = [dict(np.load(GOLDEN / f"{name}.npz")) for name in ("solvers", "solvers_dpmpp")]
RECORDED = [(i, key) for i, file in enumerate(FILES) for key in file if "/afs" in key]

#: One solver of every kind and order: name and options.
ALL = {
    **{name: (name, {}) for name in ("euler", "heun", "dpm")},
    **{f"ipndm{k}": ("ipndm", {"max_order": k}) for k in (1, 2, 3, 4)},
    **{f"dpmpp{k}": ("dpmpp", {"max_order": k}) for k in (1, 2, 3)},
    "dpmpp3-nolof": ("dpmpp", {"lower_order_final": False}),
    "dpmpp3-eps": ("dpmpp", {"predict_x0": False}),
    "dpmpp3-thr": ("dpmpp", {"thresholding": True}),
}


@pytest.fixture(params=ALL)
def solver(request):
    name, options = ALL[request.param]
    return get_solver(name, **options)


class Mixture:
    """Posterior mean under a mixture of Gaussians of one width; records the noise levels it is called at."""

    def __init__(self, dtype=torch.float32):
        self.means, self.std, self.weights = (
            torch.from_numpy(FILES[0][k]).to(dtype) for k in ("means", "std", "weights")
        )
        self.sigmas = []

    def __call__(self, x, sigma):
        self.sigmas.append(sigma)
        variance = self.std**2 + sigma**2
        distance = ((x[:, None] - self.means) ** 2).flatten(2).sum(2)
        share = torch.softmax(self.weights.log() - distance / (2 * variance), dim=1)
        mean = (share[:, :, None, None, None] * self.means).sum(1)
        return (self.std**2 * x + sigma**2 * mean) / variance


def noise(sigma=1.0, dtype=torch.float32):
    return torch.from_numpy(FILES[0]["noise"]).to(dtype) * float(sigma)


SIGMAS = get_schedule("polynomial", 7, 0.006, 80.0)


# --- Recorded trajectories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, key", RECORDED, ids=[key for _, key in RECORDED])
def test_recorded_trajectory_and_nfe(file, key):
    golden = FILES[file]
    name, *variant, schedule, steps, afs = key.split("/")
    thresholding = variant[:1] == ["x0"] and not name.startswith("nothr_")
    name = name.removeprefix("nothr_")
    solver = get_solver(
        name.rstrip("1234"),
        int(name[-1]) if name[-1].isdigit() else None,
        predict_x0="eps" not in variant,
        lower_order_final="nolof" not in variant,
        thresholding=thresholding,
    )
    sigmas, denoise = golden[f"t_steps/{schedule}/{steps}"], Mixture()
    states = solve(solver, denoise, noise(sigmas[0]), sigmas.tolist(), afs=afs == "afs1")
    # The recorded values carry float32 rounding of up to 2e-4 themselves.
    np.testing.assert_allclose(states.numpy(), golden[key], rtol=0, atol=3e-4)
    nfe = json.loads(str(golden["meta"]))["nfe"][key]
    assert nfe == len(denoise.sigmas) == SamplingPlan(solver, len(sigmas), afs == "afs1").nfe


# --- Exact solutions ---------------------------------------------------------------------------------------------


def from_rest(x, sigma):
    """D for dx/dsigma = 2 (1.5 - sigma)^5 x, x(1.5) = 1: at rest at first, so low-order warm-up steps cost nothing."""
    return x - sigma * 2 * (1.5 - sigma) ** 5 * x


def gaussian(x, sigma):
    """D for data N(0, 0.5^2): x(sigma) = x(sigma_max) sqrt((0.25 + sigma^2) / (0.25 + sigma_max^2))."""
    return x * 0.25 / (0.25 + sigma**2)


EXACT = {
    from_rest: (0.5, 1.5, math.exp(-1 / 3)),
    gaussian: (0.006, 80.0, math.sqrt((0.25 + 0.006**2) / (0.25 + 80**2))),
}


def final_error(solver, denoise, schedule, rho, steps):
    sigma_min, sigma_max, exact = EXACT[denoise]
    sigmas = get_schedule(schedule, steps + 1, sigma_min, sigma_max, rho)
    return abs(solve(solver, denoise, torch.ones(1, 1, dtype=torch.float64), sigmas)[-1].item() - exact)


@pytest.mark.parametrize(
    "denoise, schedule, rho, name, options, order",
    [
        (gaussian, "polynomial", 7, "euler", {}, 1),
        (gaussian, "polynomial", 7, "heun", {}, 2),
        (gaussian, "polynomial", 7, "dpm", {}, 2),
        (gaussian, "polynomial", 7, "ipndm", {"max_order": 2}, 2),
        (gaussian, "polynomial", 7, "dpmpp", {"max_order": 1}, 1),
        (gaussian, "polynomial", 7, "dpmpp", {"max_order": 2}, 2),
        (gaussian, "polynomial", 7, "dpmpp", {"max_order": 2, "predict_x0": False}, 2),
        (from_rest, "polynomial", 1, "ipndm", {"max_order": 2}, 2),
        (from_rest, "polynomial", 1, "ipndm", {"max_order": 3}, 3),
        (from_rest, "polynomial", 1, "ipndm", {"max_order": 4}, 4),
        # Constant Adams-Bashforth coefficients are those of even spacing.
        (from_rest, "logsnr", None, "ipndm", {"max_order": 4}, 2),
        (from_rest, "logsnr", None, "dpmpp", {"max_order": 2, "lower_order_final": False}, 2),
        (from_rest, "logsnr", None, "dpmpp", {"max_order": 2, "lower_order_final": False, "predict_x0": False}, 2),
        # Second order, as in the reference, whose trajectories are matched: m'' is half of the second derivative.
        (from_rest, "logsnr", None, "dpmpp", {"max_order": 3, "lower_order_final": False}, 2),
        (from_rest, "logsnr", None, "dpmpp", {"max_order": 3, "lower_order_final": False, "predict_x0": False}, 2),
        # Uneven in lambda; the last step is of order 1.
        (from_rest, "polynomial", 3, "dpmpp", {"max_order": 2}, 2),
        (from_rest, "polynomial", 3, "dpmpp", {"max_order": 3}, 2),
    ],
)
def test_order_of_convergence(denoise, schedule, rho, name, options, order):
    solver = get_solver(name, **options)
    coarse, fine = (final_error(solver, denoise, schedule, rho or 7, steps) for steps in (256, 512))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("predict_x0", [True, False])
def test_dpmpp_of_order_3_is_more_accurate_than_of_order_2(predict_x0):
    second, third = (
        final_error(get_solver("dpmpp", order, predict_x0, lower_order_final=False), from_rest, "logsnr", 7, 128)
        for order in (2, 3)
    )
    assert third < second / 3


# Thresholding changes the equation.
@pytest.mark.parametrize("solver", [key for key in ALL if key != "dpmpp3-thr"], indirect=True)
def test_all_solvers_agree_on_the_mixture(solver):
    x = noise(80, torch.float64)
    truth = solve(get_solver("heun"), Mixture(torch.float64), x, get_schedule("polynomial", 401, 0.006, 80.0))[-1]
    states = solve(solver, Mixture(torch.float64), x, get_schedule("polynomial", 201, 0.006, 80.0))
    first_order = solver in (get_solver("euler"), get_solver("ipndm", 1), get_solver("dpmpp", 1))
    torch.testing.assert_close(states[-1], truth, rtol=0, atol=0.05 if first_order else 2e-3)


# --- Relations between solvers -----------------------------------------------------------------------------------


def test_ipndm_of_order_1_is_euler_to_the_bit():
    runs = [solve(get_solver(*args), Mixture(), noise(80), SIGMAS) for args in (("euler",), ("ipndm", 1))]
    assert torch.equal(*runs)


@pytest.mark.parametrize("predict_x0", [True, False])
def test_dpmpp_of_order_1_is_euler(predict_x0):
    solvers = get_solver("euler"), get_solver("dpmpp", 1, predict_x0)
    runs = [solve(s, Mixture(torch.float64), noise(80, torch.float64), SIGMAS) for s in solvers]
    torch.testing.assert_close(*runs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["ipndm", "dpmpp"])
def test_a_single_step_of_a_multistep_solver_is_euler(name):
    runs = [solve(get_solver(n), Mixture(torch.float64), noise(80, torch.float64), SIGMAS[:2]) for n in ("euler", name)]
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


def test_lower_order_final_leaves_the_warm_up():
    # Two steps of max_order 3 never reach it, so the second keeps its order 2. No recorded trajectory is this short.
    sigmas = get_schedule("polynomial", 3, 0.006, 80.0)
    runs = [
        solve(s, Mixture(), noise(80), sigmas) for s in (get_solver("dpmpp", 3), get_solver("dpmpp", 2, True, False))
    ]
    assert torch.equal(*runs)


def test_default_orders_are_the_highest():
    assert all(get_solver(name) == get_solver(name, order) for name, order in {"ipndm": 4, "dpmpp": 3}.items())


def test_options_of_other_solvers_are_ignored():
    for name in ("euler", "heun", "dpm"):
        assert get_solver(name, max_order=3, predict_x0=False, lower_order_final=False) == get_solver(name)


# --- Analytical first step ---------------------------------------------------------------------------------------


def test_afs_moves_along_the_scaled_state():
    x, (start, end) = noise(80, torch.float64), SIGMAS[:2].tolist()
    states = solve(get_solver("euler"), None, x, [start, end], afs=True)
    torch.testing.assert_close(states[1], x + (end - start) * x / math.sqrt(1 + start**2), rtol=1e-12, atol=0)


def test_afs_replaces_exactly_the_first_evaluation(solver):
    plain, replaced = Mixture(), Mixture()
    solve(solver, plain, noise(80), SIGMAS)
    solve(solver, replaced, noise(80), SIGMAS, afs=True)
    assert replaced.sigmas == plain.sigmas[1:]


def test_afs_belongs_to_the_run():
    solver, denoise = get_solver("heun"), Mixture()
    runs = [solve(solver, denoise, noise(80), SIGMAS, afs=afs) for afs in (True, False, True, False)]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3]) and not torch.equal(runs[0], runs[1])


def test_steps_of_a_student_chain_to_its_run():
    euler, x = get_solver("euler"), noise(80)
    states = solve(euler, Mixture(), x, SIGMAS, afs=True)
    for i in range(len(SIGMAS) - 1):
        x = solve(euler, Mixture(), x, SIGMAS[i : i + 2], afs=i == 0)[-1]
        assert torch.equal(x, states[i + 1])


# --- The driver --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_every_is_slicing(solver, every):
    states = solve(solver, Mixture(), noise(80), SIGMAS)
    assert torch.equal(solve(solver, Mixture(), noise(80), SIGMAS, every=every), states[::every])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_and_what_the_denoiser_is_given(solver, dtype):
    denoise, x = Mixture(dtype), noise(80, dtype)
    kept = x.clone()
    states = solve(solver, denoise, x, SIGMAS)
    assert states.shape == (7, *x.shape) and states.dtype == dtype
    assert torch.equal(states[0], x) and torch.equal(x, kept)
    assert all(s.ndim == 0 and s.dtype == dtype and s.device == x.device for s in denoise.sigmas)
    levels = torch.stack(denoise.sigmas).unflatten(0, (-1, solver.evaluations))
    assert torch.equal(levels[:, 0], SIGMAS[:-1].to(dtype))
    if isinstance(solver, TwoStage):
        middles = [s ** (1 - solver.ratio) * t**solver.ratio for s, t in itertools.pairwise(SIGMAS.tolist())]
        assert levels[:, 1].tolist() == torch.tensor(middles, dtype=dtype).tolist()


def test_a_solver_can_be_used_again(solver):
    first = solve(solver, Mixture(), noise(80), SIGMAS)
    solve(solver, Mixture(), noise(5), SIGMAS[2:], afs=True)
    assert torch.equal(solve(solver, Mixture(), noise(80), SIGMAS), first)


def test_samples_do_not_depend_on_their_batch(solver):
    batch = solve(solver, Mixture(), noise(80), SIGMAS)
    for i in range(2):
        alone = solve(solver, Mixture(), noise(80)[i : i + 1], SIGMAS)
        torch.testing.assert_close(alone[:, 0], batch[:, i], rtol=1e-5, atol=1e-4)


def test_nothing_is_read_back_from_the_device(solver):
    # A meta tensor has no values, so any read by the host raises.
    states = solve(solver, lambda x, sigma: x / (1 + sigma**2), noise(80).to("meta"), SIGMAS, afs=True)
    assert states.device.type == "meta" and states.shape == (7, 2, 3, 4, 4)


def test_a_half_precision_denoiser_leaves_all_else_in_single(solver):
    seen = []

    def half(x, sigma):
        seen.append(x.dtype)
        return (x / (1 + sigma**2)).half()

    states = solve(solver, half, noise(80), SIGMAS)
    assert states.dtype == torch.float32 and set(seen) == {torch.float32}
    assert torch.equal(states, solve(solver, lambda x, sigma: half(x, sigma).float(), noise(80), SIGMAS))


@pytest.mark.parametrize("afs", [False, True])
def test_a_callback_sees_every_step(solver, afs):
    seen = []
    states = solve(solver, Mixture(), noise(80), SIGMAS, afs=afs, every=3, callback=lambda **step: seen.append(step))
    whole = solve(solver, Mixture(), noise(80), SIGMAS, afs=afs)
    assert torch.equal(states, whole[::3])
    assert [(step["i"], step["sigma"]) for step in seen] == list(enumerate(SIGMAS[:-1].tolist()))
    assert all(torch.equal(step["x"], state) for step, state in zip(seen, whole))
    for i, step in enumerate(seen):
        if i or not afs:
            assert torch.equal(step["denoised"], Mixture()(step["x"], torch.tensor(step["sigma"])))


class Watch(Solver):
    """Passes everything on, and keeps weak references to what the run looks back on."""

    def __init__(self, solver):
        self.solver, self.seen, self.kept = solver, [], []

    @property
    def history(self):
        return self.solver.history

    def step(self, x, denoised, sigmas, history, evaluate):
        assert isinstance(history, deque)
        self.seen.append(len(history))
        self.kept += [weakref.ref(prediction) for _, prediction in history]
        return self.solver.step(x, denoised, sigmas, history, evaluate)


def test_the_history_is_bounded_by_the_order_and_ends_with_the_run(solver):
    watch = Watch(solver)
    states = solve(watch, Mixture(), noise(80), get_schedule("polynomial", 13, 0.006, 80.0))
    assert max(watch.seen) == solver.history == getattr(solver, "max_order", 1) - 1
    assert len(states) == 13 and not any(ref() is not None for ref in watch.kept)


def test_states_between_kept_ones_are_freed():
    alive, mixture, most = [], Mixture(), 0

    def denoise(x, sigma):
        nonlocal most
        alive.append(weakref.ref(x))
        most = max(most, sum(ref() is not None for ref in alive))
        return mixture(x, sigma)

    with torch.no_grad():
        solve(get_solver("euler"), denoise, noise(80), get_schedule("polynomial", 25, 0.006, 80.0), every=12)
    assert most <= 3  # two kept states and the current one


# --- Gradients ---------------------------------------------------------------------------------------------------


def test_gradient_of_a_student_step():
    x, weight = noise(80), torch.tensor(0.3, requires_grad=True)
    start, end = SIGMAS[2:4].tolist()
    solve(get_solver("euler"), lambda x, sigma: weight * x, x, [start, end])[-1].sum().backward()
    torch.testing.assert_close(weight.grad, (1 - end / start) * x.sum())


def test_every_solver_is_differentiable(solver):
    x = noise(3, torch.float64)[:1, :1, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: solve(solver, lambda x, s: torch.tanh(x) / (1 + s), x, [3, 1, 0.5, 0.2]), x
    )


def test_no_gradient_is_tracked_where_the_caller_wants_none():
    weight = torch.tensor(0.3, requires_grad=True)
    with torch.no_grad():
        assert not solve(get_solver("dpmpp"), lambda x, sigma: weight * x, noise(80), SIGMAS).requires_grad


# --- Dynamic thresholding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 199, 200, 201, 202, 1000])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_threshold_is_the_quantile(size, scale):
    x = scale * torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    limit = torch.quantile(x.abs(), 0.995, dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(threshold(x), x.clamp(-limit, limit) / limit)


def test_threshold_takes_more_elements_than_torch_quantile():
    size = 2**24 + 9
    x = torch.arange(size, dtype=torch.float32).mul_(4 / size)[None]
    out = threshold(x)
    assert out.dtype == torch.float32 and out.max().item() == 1
    torch.testing.assert_close(out[0, size // 2].item(), 2 / (4 * 0.995), rtol=1e-4, atol=0)


# --- Refused settings --------------------------------------------------------------------------------------------


def run(x=None, sigmas=SIGMAS, every=1):
    return solve(get_solver("euler"), Mixture(), noise(80) if x is None else x, sigmas, every=every)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: get_solver("rk45"), "unknown solver 'rk45': use one of euler, heun, dpm, ipndm, dpmpp"),
        (lambda: get_solver("dpmpp", 4), "max_order of dpmpp must be a whole number from 1 to 3, got 4"),
        (lambda: get_solver("dpmpp", 0), "from 1 to 3, got 0"),
        (lambda: get_solver("ipndm", 5), "max_order of ipndm must be a whole number from 1 to 4, got 5"),
        (lambda: get_solver("ipndm", 2.0), "whole number from 1 to 4, got 2.0"),
        (lambda: get_solver("euler", thresholding=True), "thresholding needs solver dpmpp .* got euler"),
        (lambda: get_solver("dpmpp", predict_x0=False, thresholding=True), "got dpmpp with predict_x0=False: turn"),
        (lambda: run(x=noise(80).half()), "states must be float32 or float64, got torch.float16"),
        (lambda: run(sigmas=[80.0]), r"at least 2 noise levels, got shape \[1\]"),
        (lambda: run(sigmas=SIGMAS[None]), r"got shape \[1, 7\]"),
        (lambda: run(sigmas=[80.0, 0.0]), r"positive and finite, got \[80.0, 0.0\]"),
        (lambda: run(sigmas=[80.0, math.nan]), "positive and finite, got .*nan"),
        (lambda: run(sigmas=[math.inf, 1.0]), "positive and finite, got .inf"),
        (lambda: run(sigmas=[80.0, 1.0, 1.0]), r"strictly decreasing, got \[80.0, 1.0, 1.0\]"),
        (lambda: run(every=4), "every must divide the number of steps, got every=4 for 6 steps"),
        (lambda: run(every=0), "got every=0"),
        (lambda: SamplingPlan(get_solver("euler"), 1), "num_steps .* at least 2, got 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_every_name_gives_a_solver():
    assert all(isinstance(get_solver(name), Solver) for name in SOLVERS)
