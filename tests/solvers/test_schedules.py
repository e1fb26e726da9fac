"""Schedules against recorded reference values, and the properties that distillation relies on."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_files import GOLDEN as FILES
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import SCHEDULES, get_schedule

GOLDEN = dict(np.load(FILES / "schedules.npz"))
META = json.loads(str(GOLDEN["meta"]))
STEPS = [key for key in GOLDEN if key.split("/")[0] in SCHEDULES]

quick = settings(deadline=None, max_examples=100, derandomize=True)


class LatentSchedule:
    """sigma(t) of a latent diffusion model: log(alpha) piecewise linear in t, also beyond the outermost points."""

    def __init__(self, alphas_cumprod):
        # Float32 as in the network that the recorded values were made with.
        self.log_alpha = 0.5 * np.log(alphas_cumprod.astype(np.float32)).astype(np.float64)
        self.t = np.arange(1, len(alphas_cumprod) + 1) / len(alphas_cumprod)

    @staticmethod
    def interpolate(x, xs, ys):
        right = np.clip(np.searchsorted(xs, x), 1, len(xs) - 1)
        slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + slope * (x - xs[right - 1])

    def sigma(self, t):
        assert t.dtype == torch.float64
        return torch.expm1(-2 * torch.from_numpy(self.interpolate(t.numpy(), self.t, self.log_alpha))).sqrt()

    def sigma_inv(self, sigma):
        assert sigma.dtype == torch.float64
        log_alpha = -0.5 * np.log1p(sigma.numpy() ** 2)
        return torch.from_numpy(self.interpolate(log_alpha, self.log_alpha[::-1], self.t[::-1]))


NETS = {net: LatentSchedule(GOLDEN[f"cfg/{net}/alphas_cumprod"]) for net in META["nets"]}


#: A noise schedule that reaches small noise levels before t = 0.
SHIFTED = SimpleNamespace(sigma=lambda t: t + 1, sigma_inv=lambda sigma: sigma - 1)


def noise_schedule_for(schedule_type):
    return NETS["ldm"] if schedule_type == "discrete" else None


def tolerance(key):
    kind, double = key.split("/")[0], key.endswith("_f64")
    if kind == "time_uniform":
        # Single precision cancels near sigma_min in the recorded float32 values.
        return 1e-6 if double else 1e-2
    if double:
        return 1e-9
    if kind == "discrete":
        return 5e-4
    return 1e-3 if "/rho1/" in key else 1e-5


@pytest.mark.parametrize("key", STEPS)
def test_recorded_values(key):
    kind, *where, steps = key.removesuffix("_f64").split("/")
    rho = float(where.pop().removeprefix("rho")) if kind != "logsnr" else 7.0
    if kind == "discrete":
        net, low = where
        noise_schedule, ends = NETS[net], (META["discrete_ranges"][low][0], float(GOLDEN[f"cfg/{net}/sigma_max"]))
    else:
        noise_schedule, ends = None, META["ranges"][where[0]]
    sigmas = get_schedule(kind, int(steps.removeprefix("n")), *ends, rho, noise_schedule)
    np.testing.assert_allclose(sigmas.numpy(), GOLDEN[key], rtol=tolerance(key))


@pytest.mark.parametrize("net", NETS)
def test_the_noise_schedules_used_here_are_the_recorded_ones(net):
    sigmas, times = torch.from_numpy(GOLDEN["cfg/sigma_points"]), torch.from_numpy(GOLDEN["cfg/t_points"])
    # Float32 logarithms near sigma = 0 limit the recorded values.
    np.testing.assert_allclose(NETS[net].sigma_inv(sigmas), GOLDEN[f"cfg/{net}/sigma_inv_out"], rtol=1e-3)
    np.testing.assert_allclose(NETS[net].sigma(times), GOLDEN[f"cfg/{net}/sigma_out"], rtol=5e-4)
    np.testing.assert_allclose(1000 * NETS[net].sigma_inv(sigmas) - 1, GOLDEN[f"cfg/{net}/c_noise"], atol=1e-2)


@quick
@given(
    kind=st.sampled_from(["polynomial", "logsnr"]),
    steps=st.integers(2, 60),
    sigma_min=st.floats(1e-4, 1.0),
    factor=st.floats(1.5, 1e5),
    rho=st.floats(0.2, 50.0),
)
def test_decreasing_between_exact_ends_for_any_settings(kind, steps, sigma_min, factor, rho):
    sigmas = get_schedule(kind, steps, sigma_min, sigma_min * factor, rho)
    assert sigmas.shape == (steps,) and sigmas.dtype == torch.float64 and sigmas.device.type == "cpu"
    assert sigmas[0].item() == sigma_min * factor and sigmas[-1].item() == sigma_min
    assert bool((sigmas.diff() < 0).all())


@quick
@given(
    kind=st.sampled_from(["time_uniform", "discrete"]),
    steps=st.integers(2, 60),
    sigma_min=st.floats(0.006, 0.1),
    sigma_max=st.floats(14.0, 83.0),
    rho=st.floats(0.5, 8.0),
)
def test_decreasing_between_exact_ends_in_the_range_of_a_model(kind, steps, sigma_min, sigma_max, rho):
    sigmas = get_schedule(kind, steps, sigma_min, sigma_max, rho, noise_schedule_for(kind))
    assert sigmas[0].item() == sigma_max and sigmas[-1].item() == sigma_min
    assert bool((sigmas.diff() < 0).all())


@quick
@given(kind=st.sampled_from(SCHEDULES), steps=st.integers(2, 9), inserted=st.integers(0, 6), rho=st.floats(1.0, 9.0))
def test_every_student_timestamp_is_one_of_the_teacher(kind, steps, inserted, rho):
    ends = (0.006, 80.0, rho, noise_schedule_for(kind))
    student = get_schedule(kind, steps, *ends)
    teacher = get_schedule(kind, (inserted + 1) * (steps - 1) + 1, *ends)[:: inserted + 1]
    if kind == "discrete":  # evaluated by the model, on vectors of different lengths
        torch.testing.assert_close(teacher, student, rtol=1e-12, atol=0)
    else:
        assert torch.equal(teacher, student)


@quick
@given(sigma_min=st.floats(0.001, 0.5), sigma_max=st.floats(1.0, 100.0), steps=st.integers(3, 20))
def test_polynomial_tends_to_logsnr(sigma_min, sigma_max, steps):
    near, limit = (get_schedule(k, steps, sigma_min, sigma_max, 1e6) for k in ("polynomial", "logsnr"))
    torch.testing.assert_close(near, limit, rtol=1e-4, atol=0)


def test_polynomial_of_rho_1_is_evenly_spaced():
    torch.testing.assert_close(get_schedule("polynomial", 5, 1.0, 9.0, rho=1).tolist(), [9.0, 7.0, 5.0, 3.0, 1.0])


def test_logsnr_is_a_geometric_sequence():
    torch.testing.assert_close(get_schedule("logsnr", 4, 0.1, 100.0).tolist(), [100.0, 10.0, 1.0, 0.1])


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_discrete_starts_where_it_is_told_to(rho):
    # A range that ends inside the model's, so t_max < 1: the reference takes only t_min to the power 1/rho and starts
    # at another sigma. No recorded value covers it.
    net = NETS["sd"]
    sigmas = get_schedule("discrete", 3, 0.5, 3.0, rho, net)
    t_max, t_min = net.sigma_inv(torch.tensor([3.0, 0.5], dtype=torch.float64)).tolist()
    middle = ((t_max ** (1 / rho) + t_min ** (1 / rho)) / 2) ** rho
    expected = [3.0, net.sigma(torch.tensor([middle], dtype=torch.float64)).item(), 0.5]
    torch.testing.assert_close(sigmas.tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schedule_type": "cosine"}, "unknown schedule_type 'cosine': use one of polynomial, logsnr, time_uniform, d"),
        ({"num_steps": 1}, "num_steps .* at least 2, got 1"),
        ({"num_steps": 2.5}, "whole number of at least 2, got 2.5"),
        ({"sigma_min": 80.0}, "sigma_min < sigma_max, got sigma_min 80.0 and sigma_max 80.0"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max, got sigma_min 0.0"),
        ({"sigma_min": -1.0}, "got sigma_min -1.0"),
        ({"sigma_min": math.nan}, "got sigma_min nan"),
        ({"sigma_max": math.nan}, "sigma_max nan"),
        ({"sigma_max": math.inf}, "finite .* sigma_max inf"),
        ({"rho": 0.0}, "rho must be finite and greater than 0, got 0.0"),
        ({"rho": math.nan}, "rho must be .* got nan"),
        ({"schedule_type": "discrete"}, "discrete needs the model's noise schedule, got None: pass an object with"),
        ({"schedule_type": "discrete", "noise_schedule": SHIFTED}, "times 79.0 and -0.994 .* t_max > t_min > 0"),
        ({"schedule_type": "time_uniform", "sigma_min": 1.0, "sigma_max": 2.0}, "no VP-SDE has sigma_min 1.0 at"),
        ({"schedule_type": "time_uniform", "sigma_min": 30.0}, "no VP-SDE has sigma_min 30.0 at"),
        ({"num_steps": 10, "sigma_min": math.nextafter(80.0, 0.0)}, "is not strictly decreasing: use fewer"),
    ],
)
def test_bad_settings_are_refused_in_one_line(change, message):
    valid = {"schedule_type": "polynomial", "num_steps": 4, "sigma_min": 0.006, "sigma_max": 80.0}
    with pytest.raises(ValueError, match=message) as error:
        get_schedule(**(valid | change))
    assert "\n" not in str(error.value)
