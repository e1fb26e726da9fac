"""Time schedules and solvers of the probability-flow ODE, and one driver that runs them.

Everything is in the variance-exploding form: a state x at noise level sigma follows

    dx/dsigma = (x - D(x; sigma)) / sigma

from sigma_max down to sigma_min, where D is the denoiser (Karras et al. 2022, arXiv 2206.00364, eq. 1 and 3). A run
takes three things, made apart from each other:

    sigmas = get_schedule("polynomial", num_steps=4, sigma_min=0.006, sigma_max=80.0)
    solver = get_solver("dpmpp", max_order=3)
    states = solve(solver, denoise, noise * sigmas[0], sigmas)

The package imports torch and the standard library alone.
"""

from .driver import Callback, Denoiser, solve
from .plan import SamplingPlan
from .schedules import SCHEDULES, NoiseSchedule, get_schedule
from .steppers import SOLVERS, Solver, get_solver

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Callback",
    "Denoiser",
    "NoiseSchedule",
    "SamplingPlan",
    "Solver",
    "get_schedule",
    "get_solver",
    "solve",
]
