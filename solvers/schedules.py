"""Time schedules: where between sigma_max and sigma_min a solver stops.

Each schedule maps the progress u_i = i/(N-1), i = 0 ... N-1, to a noise level, with u = 0 at sigma_max and u = 1 at
sigma_min. Three of the four are even steps in the rho-th root of some variable v, which runs from v_max to v_min:

    v(u) = (v_max^(1/rho) + u (v_min^(1/rho) - v_max^(1/rho)))^rho

    polynomial     v = sigma                                                       Karras 2022, eq. 5
    logsnr         even steps in log(sigma); the limit of polynomial for rho -> inf
    time_uniform   v = time of the VP-SDE, sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1), from t = 1 to
                   t = 0.001, with beta_d and beta_min such that both ends are met     Karras 2022, table 1
    discrete       v = time of a model's own noise schedule, sigma(t) given by the model

A teacher with M timestamps inserted between neighbours of N student timestamps has (M+1)(N-1)+1 of them. Progress
is one correctly rounded division and no value depends on its neighbours, so every (M+1)-th is a student's timestamp.

All arithmetic is in double precision. Single precision loses up to 1 % near sigma_min in time_uniform.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import torch

SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete")

VP_LAST_TIME = 1e-3


class NoiseSchedule(Protocol):
    """Noise level as a function of a model's own time, and its inverse; float64 CPU tensors of shape [n] in and out.

    Times are positive, and sigma grows with t.
    """

    def sigma(self, t: torch.Tensor) -> torch.Tensor: ...

    def sigma_inv(self, sigma: torch.Tensor) -> torch.Tensor: ...


def get_schedule(
    schedule_type: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,
    noise_schedule: NoiseSchedule | None = None,
) -> torch.Tensor:
    """Noise levels of a run, from sigma_max down to sigma_min.

    Args:
        schedule_type: one of SCHEDULES.
        num_steps: number of timestamps, at least 2; a run has one step less.
        sigma_min, sigma_max: both ends, 0 < sigma_min < sigma_max; the result starts and ends on them exactly.
        rho: exponent, > 0; larger values put more timestamps near sigma_min. 'logsnr' has none and ignores it.
        noise_schedule: the model's sigma(t) and sigma_inv(sigma). Used by 'discrete' alone, which needs it.

    Returns:
        float64 CPU tensor [num_steps], strictly decreasing.

    Raises:
        ValueError: a setting is out of range, or the settings do not give a strictly decreasing schedule.
    """
    _check(schedule_type, num_steps, sigma_min, sigma_max, rho)
    progress = [i / (num_steps - 1) for i in range(num_steps)]
    if schedule_type == "polynomial":  # Karras 2022, eq. 5
        values = _even_in_root(progress, sigma_max, sigma_min, rho)
    elif schedule_type == "logsnr":
        values = [sigma_max * math.exp(u * math.log(sigma_min / sigma_max)) for u in progress]
    elif schedule_type == "time_uniform":
        values = time_uniform(progress, sigma_min, sigma_max, rho)
    else:
        values = discrete(progress, sigma_min, sigma_max, rho, noise_schedule)
    sigmas = torch.tensor([sigma_max, *values[1:-1], sigma_min], dtype=torch.float64, device="cpu")
    if not all(s > t for s, t in itertools.pairwise(sigmas.tolist())):
        raise ValueError(
            f"the {schedule_type} schedule of {num_steps} timestamps from {sigma_max} to {sigma_min} with rho {rho} "
            "is not strictly decreasing: use fewer timestamps, a wider range or another schedule_type"
        )
    return sigmas


def time_uniform(progress: Sequence[float], sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """Even steps in t^(1/rho) of the VP-SDE, Karras 2022, table 1, column VP.

    Raises ValueError where the VP-SDE through both ends is not increasing in t: sigma_min too near to sigma_max.
    """
    log_min, log_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_max - log_min / VP_LAST_TIME) / (1 - VP_LAST_TIME)
    beta_min = log_max - beta_d / 2
    if beta_min + beta_d <= 0:
        raise ValueError(
            f"no VP-SDE has sigma_min {sigma_min} at t = {VP_LAST_TIME} and sigma_max {sigma_max} at t = 1: "
            "lower sigma_min, raise sigma_max, or use another schedule_type than time_uniform"
        )
    times = _even_in_root(progress, 1.0, VP_LAST_TIME, rho)
    return [math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t)) for t in times]


def discrete(
    progress: Sequence[float], sigma_min: float, sigma_max: float, rho: float, noise_schedule: NoiseSchedule | None
) -> list[float]:
    """Even steps in t^(1/rho) of a model's own time.

    Both ends are taken to the power 1/rho. The reference implementation leaves the first as it is, which is the same
    for rho = 1 or t_max = 1 and otherwise starts at a sigma that is not sigma_max.
    """
    if noise_schedule is None:
        raise ValueError(
            "schedule_type discrete needs the model's noise schedule, got None: "
            "pass an object with sigma(t) and sigma_inv(sigma), or use another schedule_type"
        )
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64, device="cpu")
    t_max, t_min = noise_schedule.sigma_inv(ends).tolist()
    if not 0 < t_min < t_max:
        raise ValueError(
            f"sigma_max {sigma_max} and sigma_min {sigma_min} lie at times {t_max} and {t_min} of the noise schedule, "
            "expected t_max > t_min > 0: use a sigma range that the model covers"
        )
    times = torch.tensor(_even_in_root(progress, t_max, t_min, rho), dtype=torch.float64, device="cpu")
    return noise_schedule.sigma(times).tolist()


def _even_in_root(progress: Sequence[float], first: float, last: float, rho: float) -> list[float]:
    """Values from first to last, 0 < last < first, evenly spaced after taking their rho-th root."""
    # The ratio is below 1, so that no power of it overflows however small rho is.
    ratio = (last / first) ** (1 / rho)
    return [first * (1 + u * (ratio - 1)) ** rho for u in progress]


def _check(schedule_type: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> None:
    if schedule_type not in SCHEDULES:
        raise ValueError(f"unknown schedule_type {schedule_type!r}: use one of {', '.join(SCHEDULES)}")
    if not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"num_steps counts timestamps and must be a whole number of at least 2, got {num_steps!r}")
    if not (0 < sigma_min < sigma_max and math.isfinite(sigma_max)):
        raise ValueError(
            f"expected finite 0 < sigma_min < sigma_max, got sigma_min {sigma_min} and sigma_max {sigma_max}: "
            "give the range of noise levels that the model was trained on"
        )
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho must be finite and greater than 0, got {rho}: 7 is the usual choice")
