"""What a sampler takes, known before there is a model: the one place that counts network evaluations per image."""

from dataclasses import dataclass

from .steppers import Solver


@dataclass(frozen=True)
class SamplingPlan:
    """How a model is sampled, without the model and its noise levels.

    Attributes:
        solver: from `get_solver`.
        num_steps: timestamps, one more than steps; at least 2.
        afs: whether the first evaluation is the analytical first step, which needs no network.
        guidance_rate: of classifier-free guidance, which evaluates the network twice unless it is 1.
        denoise_to_zero: end with the denoiser at sigma_min, one evaluation more.
    """

    solver: Solver
    num_steps: int
    afs: bool = False
    guidance_rate: float = 1.0
    denoise_to_zero: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"num_steps counts timestamps and must be at least 2, got {self.num_steps}")

    @property
    def nfe(self) -> int:
        """Network evaluations per image (NFE)."""
        evaluations = self.solver.evaluations * (self.num_steps - 1) - self.afs + self.denoise_to_zero
        return evaluations * (1 if self.guidance_rate == 1 else 2)
