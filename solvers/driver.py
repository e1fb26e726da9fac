"""The driver: runs a solver along given noise levels and returns the states it passes.

Distillation (SFD, arXiv 2409.19681) needs three runs, all the same call: the teacher over its whole schedule,
of which only the states at the student's timestamps are kept; one step of the student, over two noise levels; and
sampling, over all of the student's.

The analytical first step (AFS, from GENIE, arXiv 2210.05475) stands for the first evaluation of a run. For large
sigma a state is almost pure noise, so the state itself, scaled to unit variance (that of the data taken as 1),
predicts the noise: the direction x / sqrt(1 + sigma^2), which needs no network. It stands for what the denoiser gives,
so no solver knows of it.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .steppers import History, Solver

#: Noisy x [batch, ...] and noise level (0-d tensor of x's dtype, on x's device) to clean x [batch, ...].
Denoiser = Callable[[Tensor, Tensor], Tensor]


class Callback(Protocol):
    """What `solve` calls in each step; samplers of k-diffusion tell the same."""

    def __call__(self, *, x: Tensor, i: int, sigma: float, denoised: Tensor) -> object: ...


def solve(
    solver: Solver,
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    afs: bool = False,
    every: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate dx/dsigma = (x - D(x; sigma)) / sigma along the given noise levels.

    Gradients are the caller's business: everything is differentiable, and nothing is switched off here.

    Args:
        solver: from `get_solver`. It is not changed and can be used again.
        denoise: the denoiser D. A result in another dtype is converted to x's.
        x: state at sigmas[0], that is, already scaled; [batch, ...], float32 or float64.
        sigmas: noise levels [N], N >= 2, positive and strictly decreasing, of any dtype and device.
        afs: replace the first evaluation by the analytical first step. Later ones, also of the first step of a
            solver with two evaluations per step, call the denoiser.
        every: keep the states 0, every, 2 every, ... only; must divide N - 1. M + 1 keeps, of a teacher with M
            inserted timestamps, the states at the student's.
        callback: called in step i with the state x at noise level `sigma` that it starts from, and D(x; sigma).

    Returns:
        States [(N-1)/every + 1, *x.shape] in x's dtype, the first being x.

    Raises:
        ValueError: noise levels, `every` or the dtype of x are not as described.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    _check(x, sigmas, every)
    times = sigmas.tolist()

    def evaluate(x: Tensor, sigma: float) -> Tensor:
        # Filled, not copied: a fill takes its value with the launch, so the host never waits for the device.
        return denoise(x, x.new_full((), sigma)).to(x.dtype)

    history: History = deque(maxlen=solver.history)
    states = [x]
    for i, sigma in enumerate(times[:-1]):
        denoised = analytical_first_step(x, sigma) if afs and i == 0 else evaluate(x, sigma)
        if callback is not None:
            callback(x=x, i=i, sigma=sigma, denoised=denoised)
        x = solver.step(x, denoised, times[i:], history, evaluate)
        if (i + 1) % every == 0:
            states.append(x)
    return torch.stack(states)


def analytical_first_step(x: Tensor, sigma: float) -> Tensor:
    """D = x - sigma x / sqrt(1 + sigma^2), what AFS takes for the denoiser at the highest noise level."""
    level = x.new_full((), sigma)
    return x - level * x / torch.sqrt(1 + level**2)


def _check(x: Tensor, sigmas: Tensor, every: int) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"states must be float32 or float64, got {x.dtype}: convert x before solving")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas must be a row of at least 2 noise levels, got shape {list(sigmas.shape)}: "
            "a single step takes its start and its end"
        )
    times = sigmas.tolist()
    if not all(0 < s < math.inf for s in times):
        raise ValueError(f"sigmas must be positive and finite, got {times}: end at a sigma_min above 0")
    if not all(s > t for s, t in itertools.pairwise(times)):
        raise ValueError(f"sigmas must be strictly decreasing, got {times}: order them from sigma_max to sigma_min")
    if every < 1 or (len(times) - 1) % every:
        raise ValueError(
            f"every must divide the number of steps, got every={every} for {len(times) - 1} steps: "
            "use M + 1 for a schedule with M inserted timestamps"
        )
