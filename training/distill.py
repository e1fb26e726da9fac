"""One iteration of Simple and Fast Distillation (arXiv 2409.19681, algorithm 1).

The teacher's solver runs once, without gradients, and leaves its states x̃ at the student's times t_0 > … > t_{N−1}.
The student then walks the same timestamps by Euler steps from its *own* states, and after each step is pulled to x̃:

    x_{i+1} = x_i + (t_{i+1} − t_i) (x_i − D_θ(x_i; t_i)) / t_i        θ ← Adam( ∇_θ Σ |x_{i+1} − x̃_{i+1}| / batch )

with x_{i+1} detached before the next step, so that it learns to repair the error it has made so far. With AFS, step 0
needs no network and trains nothing.

The second stage of a model in pixel space adds LPIPS on the last step. The published code adds the mean LPIPS of the
batch to every element of |x_{N−1} − x̃_{N−1}| before the sum. That equals C·H·W · LPIPS(x_{N−1}, x̃_{N−1}) beside the L1
norm of each sample, which does not depend on how a batch is split; in the mean over elements, both weigh the same.
This weight, the customary one where first stages are trained (VQGAN), is used for both forms of LPIPS, and for the
distance by features of the teacher's own encoder, which serves latents too and has nothing to fetch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dnnlib import UserError
from models.detectors.encoder import EncoderDistance
from models.detectors.lpips import LPIPS, load_lpips
from models.loading import load_student, load_teacher
from models.model import Cond, DiffusionModel, SamplingSettings, Student
from solvers import Callback, Denoiser, SamplingPlan, get_schedule, get_solver, solve
from torch_utils import distributed
from torch_utils.graphs import Graphs

from .config import DistillConfig, first_student
from .optimizers import make_optimizer

EULER = get_solver("euler")
#: Distance of two batches of states with their conditions, one for each pair.
Perceptual = LPIPS | EncoderDistance


def load_source(
    config: DistillConfig, device: torch.device | str = "cpu", teacher_path: str | None = None
) -> DiffusionModel:
    """The model that a run distils: a diffusion model or, in the second stage, a student.

    `teacher_path` is where the teacher of that student is, if not where it was.
    """
    if config.is_second_stage:
        return load_student(first_student(config.model_path), device, teacher_path)
    is_guided = config.training_rate != 1
    return load_teacher(config.dataset_name, config.model_path, device, config.guide, with_guide=is_guided)


class Teacher:
    """The trajectories that a student is distilled from, of a diffusion model or, in the second stage, of a student."""

    def __init__(
        self, model: DiffusionModel, config: DistillConfig, sampling: SamplingSettings, graphs: Graphs | None = None
    ) -> None:
        self.model, self.config, self.sampling = model, config, sampling
        self.graphs = Graphs() if graphs is None else graphs

    def plan(self, num_steps: int) -> SamplingPlan:
        """How a trajectory for a student of `num_steps` timestamps is made."""
        return self.config.teacher_plan(num_steps, self.model.sampling if isinstance(self.model, Student) else None)

    def sigmas(self, num_steps: int) -> Tensor:
        """The teacher's timestamps for a student of `num_steps`; every (M+1)-th is the student's."""
        s = self.sampling
        count = self.config.teacher_steps(num_steps)
        return get_schedule(s.schedule_type, count, s.sigma_min, s.sigma_max, s.schedule_rho, self.model.noise_schedule)

    def denoiser(self, cond: Cond, plan: SamplingPlan) -> Denoiser:
        """The model's, conditioned on labels or text, for trajectories of this plan."""
        model, step_condition = self.model, None
        if isinstance(model, Student):
            step_condition = replace(model.sampling, num_steps=plan.num_steps).step_condition
        return model.denoiser(cond, plan.guidance_rate, step_condition)

    def trajectory(self, x: Tensor, cond: Cond, num_steps: int, callback: Callback | None = None) -> Tensor:
        """States at the student's timestamps, `[num_steps, *x.shape]`, from `x` at σ_max.

        With `denoise_to_zero`, the last one is what the denoiser makes of it: what is left of the noise at σ_min is
        visible in a metric, and a student can learn to leave it out at no cost of its own. For `callback` see `solve`.
        """
        if callback is not None:  # which looks at every step
            return self._trajectory(x, cond, num_steps, callback)
        run = partial(self._trajectory, num_steps=num_steps)
        return self.model.replayed(self.graphs, run, num_steps, x, cond)

    @torch.no_grad()
    def _trajectory(self, x: Tensor, cond: Cond, num_steps: int, callback: Callback | None = None) -> Tensor:
        plan, sigmas = self.plan(num_steps), self.sigmas(num_steps)
        denoise = self.denoiser(cond, plan)
        states = solve(plan.solver, denoise, x, sigmas, plan.afs, self.config.M + 1, callback)
        if plan.denoise_to_zero:
            states[-1] = denoise(states[-1], x.new_full((), float(sigmas[-1])))
        return states


def perceptual_loss(config: DistillConfig, source: DiffusionModel) -> Perceptual | None:
    """What the last step of a second stage adds to L1, by what it distils; None for nothing.

    Raises:
        UserError: weights of LPIPS are not to be had, images are not RGB or grey, or the teacher has no encoder.
    """
    if not config.is_second_stage or config.lpips == "off":
        return None
    if config.lpips == "teacher":
        return EncoderDistance(source)
    if source.is_latent:
        if config.lpips == "standard":
            raise UserError(
                f"--lpips=standard compares images, and {source.dataset_name} is distilled on latents; leave it out, "
                "or use --lpips=teacher"
            )
        return None
    if source.img_channels not in (1, 3):
        raise UserError(
            f"--lpips={config.lpips} compares RGB or grey images, the model has {source.img_channels} channels; "
            "use --lpips=off or --lpips=teacher"
        )
    try:
        return load_lpips(config.lpips, next(source.parameters()).device)
    except UserError as error:
        raise UserError(
            f"{error.message}; --lpips=off trains without it, --lpips=teacher with its own features"
        ) from None


def distance(new: Tensor, target: Tensor, knee: float | None = None) -> Tensor:
    """|d| of every element; with a knee c, c log(1 + |d|/c): |d| where d is small, and large ones weigh less."""
    error = (new - target).abs()
    return error if knee is None else knee * torch.log1p(error / knee)


class Losses:
    """Running sums of the loss for every (num_steps, step), kept on the device until they are asked for."""

    def __init__(self, most_steps: int, device: torch.device) -> None:
        self._sums = torch.zeros([2, most_steps + 1, most_steps], device=device)

    def add(self, num_steps: int, step: int, loss: Tensor) -> None:
        self._sums[0, num_steps, step] += loss
        self._sums[1, num_steps, step] += 1

    def flush(self) -> dict[tuple[int, int], float]:
        """Means over all ranks since the last call, by (num_steps, step); the sums start anew."""
        total, count = distributed.all_reduce_sum(self._sums.clone()).cpu()
        self._sums.zero_()
        return {(n, i): float(total[n, i] / count[n, i]) for n, i in count.nonzero().tolist()}


class Distiller:
    """Student, teacher and optimizer; `iterate` processes one batch.

    Args:
        teacher, student, config: as the run has them.
        micro_batch_size: samples at a time.
        perceptual: what `perceptual_loss` gives for the run.

    Attributes:
        skipped: number of optimizer steps left out because the loss or a gradient was not finite; a device tensor.
        bad_losses: number of those whose loss was not finite; a device tensor.
        losses: statistics since they were last flushed.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        config: DistillConfig,
        micro_batch_size: int,
        perceptual: Perceptual | None = None,
    ) -> None:
        self.teacher, self.student, self.config, self.perceptual = teacher, student, config, perceptual
        self.micro_batch_size = micro_batch_size
        self.device = next(student.parameters()).device
        self.trained = [p for p in student.parameters() if p.requires_grad]
        # The fused kernels of CPU and CUDA can leave a step out by themselves, see `_update`.
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = make_optimizer(
            config.optimizer, student, config.lr, student.img_channels, student.label_dim, fused
        )
        self.skipped, self.bad_losses = torch.zeros([2], device=self.device)
        self._one = torch.ones((), device=self.device)
        self.losses = Losses(max(config.step_choices), self.device)

    def iterate(self, noise: Tensor, cond: Cond, num_steps: int) -> tuple[Tensor, Tensor]:
        """Train on this rank's share of a batch.

        Args:
            noise: standard normal `[local batch, C, H, W]`, on the device.
            cond: one-hot labels `[local batch, label_dim]`, text conditions `[local batch, tokens, width]`, or None.
            num_steps: the student's timestamps.

        Returns:
            Teacher and student states after each step, `[num_steps − 1, local batch, C, H, W]` both.
        """
        sampling = replace(self.student.sampling, num_steps=num_steps)
        sigmas = self.teacher.sigmas(num_steps)[:: self.config.M + 1]
        latents = (noise * sampling.sigma_max).split(self.micro_batch_size)
        conds = [None] * len(latents) if cond is None else list(cond.split(self.micro_batch_size))
        targets = [self.teacher.trajectory(x, y, num_steps)[1:] for x, y in zip(latents, conds)]
        states, visited = list(latents), []
        self.student.train()
        for i in range(num_steps - 1):
            step_targets = [target[i] for target in targets]
            states = self._step(i, states, step_targets, conds, sigmas[i : i + 2], sampling)
            visited.append(torch.cat(states))
        return torch.cat(targets, dim=1), torch.stack(visited)

    def _step(
        self,
        i: int,
        states: Sequence[Tensor],
        targets: Sequence[Tensor],
        conds: Sequence[Cond],
        sigmas: Tensor,
        sampling: SamplingSettings,
    ) -> list[Tensor]:
        """One Euler step of every micro-batch, then one optimizer step; returns the detached new states."""
        analytical = sampling.afs and i == 0
        perceptual = self.perceptual if i == sampling.num_steps - 2 else None
        local_batch = sum(len(x) for x in states)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        new_states = []
        for x, target, cond in zip(states, targets, conds):
            denoise = self.student.denoiser(cond, step_condition=sampling.step_condition)
            new = solve(EULER, denoise, x, sigmas, afs=analytical)[-1]
            # Gradients are averaged over ranks, so dividing by the local batch divides by the whole one.
            loss = distance(new, target, self.config.loss_knee).sum() / local_batch
            if perceptual is not None:
                loss = loss + perceptual(new, target, cond).sum() * (new[0].numel() / local_batch)
            if not analytical:
                loss.backward()
            total += loss.detach()
            new_states.append(new.detach())
        if not analytical:
            self._update(total)
        self.losses.add(sampling.num_steps, i, total)
        return new_states

    def _update(self, loss: Tensor) -> None:
        """A step, unless the loss of any rank or a gradient is not finite.

        Fused kernels decide that without the host waiting. A gradient that overflowed is no large gradient: clipped and
        squared, it would fill Adam's second moment and stop its weight for thousands of steps.
        """
        distributed.average_gradients(self.trained, distributed.COMPRESSIONS[self.config.grad_compression])
        bad_loss = distributed.all_reduce_sum((~loss.isfinite()).float()).clamp(max=1)
        bad = bad_loss.clone()
        # As GradScaler does, with a scale of 1: one pass over all gradients, which are the same on every rank.
        grads = [param.grad for param in self.trained if param.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, bad, self._one)
        # The fused kernel reads these as GradScaler sets them: with found_inf = 1, weights and moments stay.
        if self.optimizer.defaults["fused"]:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad  # type: ignore[attr-defined]  # not declared
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        self.student.net.normalize_weights()
        self.skipped += bad
        self.bad_losses += bad_loss
