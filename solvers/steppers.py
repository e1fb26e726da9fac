"""Solvers: how to get from one noise level to the next.

With the direction d(x, sigma) = (x - D(x; sigma)) / sigma, h the step in lambda = -log(sigma) (the half log
signal-to-noise ratio of the variance-exploding form, where alpha = 1), s the current and t the next noise level:

    euler   x + (t - s) d(x, s), also known as DDIM
    heun    average of the directions at both ends (Karras 2022, arXiv 2206.00364, alg. 1)
    dpm     direction at the geometric midpoint (DPM-Solver-2, arXiv 2206.00927, alg. 1, r = 1/2)
    ipndm   Adams-Bashforth on earlier directions, with lower orders until enough are known (iPNDM, in DEIS,
            arXiv 2204.13902; after PNDM, arXiv 2202.09778)
    dpmpp   multistep exponential integrator on earlier predictions of the data, or of the noise (DPM-Solver++,
            arXiv 2211.01095)

A solver holds settings only and can be shared by any number of runs; what a multistep solver looks back on belongs
to the run. All coefficients are Python floats: they are computed in double precision, and none waits for a device.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

#: The denoiser as a solver sees it: state and noise level to clean x.
Denoise = Callable[[Tensor, float], Tensor]

#: What earlier steps of a run predicted, newest first, each with its noise level.
History = deque[tuple[float, Tensor]]

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

THRESHOLD_QUANTILE = 0.995


@dataclass(frozen=True)
class Solver(ABC):
    """One step of the ODE dx/dsigma = (x - D(x; sigma)) / sigma."""

    #: Evaluations of the denoiser per step.
    evaluations: ClassVar[int] = 1

    @property
    def history(self) -> int:
        """How many predictions of earlier steps a step may use."""
        return 0

    @abstractmethod
    def step(self, x: Tensor, denoised: Tensor, sigmas: Sequence[float], history: History, evaluate: Denoise) -> Tensor:
        """Advance x from sigmas[0] to sigmas[1].

        Args:
            x: state at sigmas[0], [batch, ...], float32 or float64.
            denoised: D(x; sigmas[0]), of x's shape and dtype.
            sigmas: the current noise level, the next one, and all that follow to the end of the run.
            history: newest predictions of the run so far, at most `history` of them; the step adds its own.
            evaluate: the denoiser, for what a step evaluates besides.

        Returns:
            State at sigmas[1], a new tensor of x's shape and dtype.
        """


def direction(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """dx/dsigma = (x - D) / sigma (Karras 2022, eq. 1 and 3), which is also the noise prediction."""
    return (x - denoised) / sigma


@dataclass(frozen=True)
class Euler(Solver):
    """x + (t - s) d(x, s): first order."""

    def step(self, x: Tensor, denoised: Tensor, sigmas: Sequence[float], history: History, evaluate: Denoise) -> Tensor:
        sigma, sigma_next = sigmas[:2]
        return x + (sigma_next - sigma) * direction(x, denoised, sigma)


@dataclass(frozen=True)
class TwoStage(Solver):
    """An Euler step to m = s^(1-r) t^r, then x + (t - s) ((1 - 1/2r) d(x, s) + 1/2r d(x_m, m)): second order.

    r = 1/2 is DPM-Solver-2 (arXiv 2206.00927, alg. 1), whose exponentials cancel in the variance-exploding form.
    r = 1 is Heun's method (Karras 2022, alg. 1). The last step is second order too, as sigma_min is not 0.
    """

    ratio: float
    evaluations: ClassVar[int] = 2

    def step(self, x: Tensor, denoised: Tensor, sigmas: Sequence[float], history: History, evaluate: Denoise) -> Tensor:
        sigma, sigma_next = sigmas[:2]
        middle = sigma ** (1 - self.ratio) * sigma_next**self.ratio
        first = direction(x, denoised, sigma)
        x_middle = x + (middle - sigma) * first
        second = direction(x_middle, evaluate(x_middle, middle), middle)
        weight = 1 / (2 * self.ratio)
        return x + (sigma_next - sigma) * ((1 - weight) * first + weight * second)


@dataclass(frozen=True)
class Multistep(Solver):
    """x_next = keep x + sum_j weight_j prediction_j over the newest predictions of the run."""

    max_order: int

    @property
    def history(self) -> int:
        return self.max_order - 1

    @abstractmethod
    def predict(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        """What the method interpolates: data or noise, [batch, ...]."""

    @abstractmethod
    def coefficients(self, known: Sequence[float], sigmas: Sequence[float]) -> tuple[float, Sequence[float]]:
        """`keep` and the weights, newest first, given the noise levels of all known predictions, newest first."""

    def step(self, x: Tensor, denoised: Tensor, sigmas: Sequence[float], history: History, evaluate: Denoise) -> Tensor:
        newest = (sigmas[0], self.predict(x, denoised, sigmas[0]))
        recent = [newest, *history]
        history.appendleft(newest)
        keep, weights = self.coefficients([sigma for sigma, _ in recent], sigmas)
        # Small terms first: the state can be a hundred times larger than its change.
        change = weights[0] * newest[1]
        for weight, (_, prediction) in zip(weights[1:], recent[1:], strict=False):
            change = change + weight * prediction
        return keep * x + change


@dataclass(frozen=True)
class IPNDM(Multistep):
    """Adams-Bashforth with constant coefficients, order min(known directions, max_order); order 1 is Euler.

    The coefficients are those of evenly spaced sigmas whatever the schedule (iPNDM, arXiv 2204.13902), so orders
    above 2 are reached on even spacing only.
    """

    def predict(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        return direction(x, denoised, sigma)

    def coefficients(self, known: Sequence[float], sigmas: Sequence[float]) -> tuple[float, Sequence[float]]:
        return 1.0, [(sigmas[1] - sigmas[0]) * c for c in ADAMS_BASHFORTH[len(known) - 1]]


@dataclass(frozen=True)
class DPMPP(Multistep):
    """DPM-Solver++, multistep (arXiv 2211.01095; alg. 2 is order 2 with data prediction).

    Data prediction m = D, with z = -h:    x_next = (t/s) x - (phi_1 m + phi_2 m' + phi_3 m'')
    Noise prediction m = d, with z = h:    x_next = x - t (phi_1 m + phi_2 m' + phi_3 m'')

    phi_1 = e^z - 1, phi_2 = phi_1/z - 1, phi_3 = phi_2/z - 1/2; m' and m'' are the first and second divided
    differences of the known predictions in lambda/h. Order 1 is Euler; order 2 has phi_1/2 in place of phi_2.

    A second divided difference is half a second derivative, and phi_3 wants the whole. Published implementations
    leave the 2 out, and so does this one, to give the published teachers: max_order 3 converges with second order.

    With lower_order_final, steps of max_order are lowered to the number of steps left, which is stabler for few
    steps. Warm-up steps, before max_order is reached, keep their order.
    """

    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False

    def predict(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        if not self.predict_x0:
            return direction(x, denoised, sigma)
        return threshold(denoised) if self.thresholding else denoised

    def coefficients(self, known: Sequence[float], sigmas: Sequence[float]) -> tuple[float, Sequence[float]]:
        sigma, sigma_next = sigmas[:2]
        order = min(len(known), self.max_order)
        if self.lower_order_final and order == self.max_order:
            order = min(order, len(sigmas) - 1)
        h = math.log(sigma / sigma_next)
        ratios = [math.log(older / newer) / h for newer, older in itertools.pairwise(known[:order])]
        z, keep, scale = (-h, sigma_next / sigma, 1.0) if self.predict_x0 else (h, 1.0, sigma_next)
        return keep, [-scale * weight for weight in self._weights(z, ratios)]

    @staticmethod
    def _weights(z: float, ratios: Sequence[float]) -> list[float]:
        """Weights of the predictions in phi_1 m + phi_2 m' + phi_3 m''; ratios are earlier steps in lambda over h."""
        phi_1 = math.expm1(z)
        if len(ratios) == 0:
            return [phi_1]
        if len(ratios) == 1:
            slope = phi_1 / (2 * ratios[0])
            return [phi_1 + slope, -slope]
        phi_2 = phi_1 / z - 1
        phi_3 = phi_2 / z - 1 / 2
        bend = (phi_2 * ratios[0] + phi_3) / (ratios[0] + ratios[1])
        newer, older = (phi_2 + bend) / ratios[0], bend / ratios[1]
        return [phi_1 + newer, -newer - older, older]


def threshold(denoised: Tensor) -> Tensor:
    """Dynamic thresholding: clip each sample to [-q, q] and divide by q (Imagen, arXiv 2205.11487, sec. 2.3).

    q is the 99.5 % quantile of the sample's absolute values (linear between neighbours), at least 1.

    Args:
        denoised: [batch, ...], float32 or float64, any device and size.

    Returns:
        A tensor of the same shape and dtype within [-1, 1].
    """
    magnitudes = denoised.abs().flatten(1)
    rank = THRESHOLD_QUANTILE * (magnitudes.shape[1] - 1)
    below = math.floor(rank)
    # torch.quantile refuses more than 2^24 elements; the few largest are all that is needed.
    largest = magnitudes.topk(magnitudes.shape[1] - below, dim=1).values
    lower, upper = largest[:, -1], largest[:, -2:][:, 0]
    limit = torch.lerp(lower, upper, rank - below).clamp(min=1).view(-1, *[1] * (denoised.ndim - 1))
    return denoised.clamp(-limit, limit) / limit


#: Each solver with its defaults, the highest order among them.
SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "heun": TwoStage(ratio=1.0),
    "dpm": TwoStage(ratio=0.5),
    "ipndm": IPNDM(max_order=4),
    "dpmpp": DPMPP(max_order=3),
}


def get_solver(
    name: str,
    max_order: int | None = None,
    predict_x0: bool = True,
    lower_order_final: bool = True,
    thresholding: bool = False,
) -> Solver:
    """Make a solver.

    Args:
        name: one of SOLVERS.
        max_order: highest order of a multistep solver, 1 to 4 for ipndm and 1 to 3 for dpmpp; None takes the highest.
            The others have one fixed order and ignore it, so that one set of options serves every solver.
        predict_x0: dpmpp works on predictions of the data (True) or of the noise (False); others ignore it.
        lower_order_final: dpmpp lowers its order in the last steps; others ignore it.
        thresholding: dpmpp with predict_x0 clips and rescales each prediction, see `threshold`. Meant for data in
            [-1, 1], not for latents.

    Raises:
        ValueError: unknown name, max_order out of range, or thresholding asked of a solver that has none.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: use one of {', '.join(SOLVERS)}")
    if thresholding and not (name == "dpmpp" and predict_x0):
        raise ValueError(
            f"thresholding needs solver dpmpp with predict_x0=True, got {name} with predict_x0={predict_x0}: "
            "turn thresholding off or change the solver"
        )
    solver = SOLVERS[name]
    options: dict[str, Any] = dict(
        predict_x0=predict_x0, lower_order_final=lower_order_final, thresholding=thresholding
    )
    if isinstance(solver, Multistep) and max_order is not None:
        highest = solver.max_order
        if not isinstance(max_order, int) or not 1 <= max_order <= highest:
            raise ValueError(
                f"max_order of {name} must be a whole number from 1 to {highest}, got {max_order!r}: "
                f"choose one of these, or leave it out for {highest}"
            )
        options["max_order"] = max_order
    return replace(solver, **{key: value for key, value in options.items() if hasattr(solver, key)})
