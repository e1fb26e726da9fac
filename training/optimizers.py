"""Optimizers: Adam as published, or Muon for the weights between hidden layers with Adam for the rest.

Muon (Jordan 2024, github.com/KellerJordan/Muon) moves a matrix W along its momentum with all singular values made about
equal. With gradient G, momentum M ← β M + (1 − β) G, and the look-ahead N = β M + (1 − β) G of Nesterov,

    W ← W − lr · 0.2 √max(rows, columns) · U Vᵀ        for N = U S Vᵀ

where the factor gives a move of the root mean square that Adam's moves have (Liu et al. 2025, arXiv 2502.16982), so
that one rate serves both up to a small factor. U Vᵀ is found by Newton-Schulz steps, up to singular values of 0.7 to
1.2. A convolution counts as the matrix `[out, in·k·k]`.

torch.optim.Muon takes parameters of two dimensions only, one at a time, and cannot leave a step out on the device;
hence own code. Everything is a function of the averaged gradients alone, so all processes hold the same state, for any
number of them and any micro-batch.

For r ≤ c of rows and columns, a step costs 4 r² c + 34 r³ operations for each matrix, in float32, whatever the batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

#: Coefficients of a Newton-Schulz step X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, and the number of steps.
QUINTIC, STEPS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.999), 1e-8
#: Rate of the matrices, relative to that of the rest.
MATRIX_RATE = 2.0


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with equal singular values, about 1, to `[n, rows, columns]`; a zero matrix stays zero.

    Of X_k = P_k X_0 only the Gram matrix X_k X_kᵀ over the shorter side is iterated, with P_k beside it, so that the
    longer side is touched twice.
    """
    a, b, c = QUINTIC
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)
    gram = x @ x.mT
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    product = eye
    for k in range(STEPS):
        step = a * eye + b * gram + c * (gram @ gram)
        product = step @ product if k > 0 else step
        if k < STEPS - 1:
            gram = step @ gram @ step
    x = product @ x
    return x.mT if is_tall else x


def hidden_matrices(model: nn.Module, img_channels: int, label_dim: int = 0) -> Iterator[nn.Parameter]:
    """The trained weights of `model` from hidden features to hidden features.

    Not among them: norms and biases, embeddings of classes or tokens, and layers that read or write images (with up to
    one channel more than these have).
    """
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for param in model.parameters():
        if not param.requires_grad or param.ndim < 2 or id(param) in tables:
            continue
        outputs, inputs = param.shape[:2]
        if min(outputs, inputs) > img_channels + 1 and inputs != label_dim:
            yield param


class Muon(torch.optim.Optimizer):
    """Muon for some parameters, Adam for others.

    `lr` is the rate of Adam; a group's own rate is `lr` times its `rate`. As with torch's fused optimizers, an
    attribute `found_inf` (0 or 1, float32, on the device) leaves a step out without the host waiting.

    Args:
        params: all parameters.
        matrices: those among them that Muon moves, each of at least two dimensions.
        lr: learning rate.
        fused: use one kernel for Adam's parameters (CPU and CUDA).
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self, params: Iterable[nn.Parameter], matrices: Iterable[nn.Parameter], lr: float, fused: bool = True
    ) -> None:
        chosen = {id(p): p for p in matrices}
        groups = [
            dict(params=list(chosen.values()), lr=lr * MATRIX_RATE, rate=MATRIX_RATE, kind="muon"),
            dict(params=[p for p in params if id(p) not in chosen], lr=lr, rate=1.0, kind="adam"),
        ]
        super().__init__([group for group in groups if group["params"]], dict(lr=lr, fused=fused))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["kind"] == "muon" else self._adam)(params, group)

    def _muon(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        keep = params[0].new_ones(()) if self.found_inf is None else 1 - self.found_inf.to(params[0].dtype)
        # Times zero would not be enough for a gradient that is not finite.
        grads = [torch.where(keep > 0, p.grad, 0) for p in params if p.grad is not None]
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        pace = (1 - MOMENTUM) * keep
        torch._foreach_mul_(momenta, 1 - pace)
        torch._foreach_add_(momenta, torch._foreach_mul(grads, pace))
        ahead = torch._foreach_lerp(grads, momenta, MOMENTUM)
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            by_shape[p.shape[0], p[0].numel()].append(i)
        for (rows, columns), alike in by_shape.items():
            moves = orthogonalize(torch.stack([ahead[i].reshape(rows, columns) for i in alike]))
            moves = moves * (group["lr"] * 0.2 * max(rows, columns) ** 0.5 * keep)
            torch._foreach_sub_([params[i] for i in alike], [m.view_as(params[i]) for i, m in zip(alike, moves)])

    def _adam(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                # The fused kernel counts on the device of the parameters, the other one on the CPU.
                device = p.device if group["fused"] else "cpu"
                step = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in params]
        if not group["fused"] and self.found_inf is not None:
            raise RuntimeError("found_inf needs fused=True")
        adam(
            list(params),
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"],
            weight_decay=0,
            eps=EPS,
            maximize=False,
        )


def make_optimizer(
    name: str, model: nn.Module, lr: float, img_channels: int, label_dim: int = 0, fused: bool = True
) -> torch.optim.Optimizer:
    """`adam` or `muon` for the trained parameters of `model`, at the start of a run.

    Args:
        name: of the optimizer.
        model: network that reads and writes images of `img_channels` and labels of `label_dim`.
        lr: learning rate of Adam's parameters.
        img_channels, label_dim: see `hidden_matrices`.
        fused: one kernel for Adam, which can leave a step out by `found_inf`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "muon":
        return Muon(trained, hidden_matrices(model, img_channels, label_dim), lr, fused)
    return torch.optim.Adam(trained, lr=lr, betas=BETAS, eps=EPS, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr`, times the group's own factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)
