"""Group normalisation of images whose pixels lie one after the other, each with its channels (channels_last).

Convolutions are fastest in this memory order on the CPU; torch's own normalisation is several times slower in it
where groups have few channels and images few pixels. With n pixels, D channels in a group, and sums over pixels per
sample and channel, s₁ = Σ x and s₂ = Σ x², and an optional shift m of the input,

    μ = mean_D(s₁ + n m) / n      r = 1 / √(mean_D(s₂ + 2 m s₁ + n m²) / n − μ² + ε)
    z = A x + B      A = r w      B = (m − μ) A + β      y = z or SiLU(z)

so all but two sums and one scaling works on [B, C], and what modulates the features is free, as m or within w and β.
Backwards, with ĝ = ∂L/∂z, a = Σ ĝ x, b = Σ ĝ:

    ∂L/∂w = r (a + (m − μ) b)      ∂L/∂β = b      ∂L/∂x = A ĝ + k x + c      ∂L/∂m = A b + k s₁ + n c
    k = −r² mean_D(w ∂L/∂w) / n      c = k (m − μ) − r mean_D(w b) / n

Half-precision features are widened to float32, and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: On the CPU a batch goes through in parts of so many float32 values, which stay in the cache between operations.
CACHED = 1 << 19


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` `[B, C, H, W]` is in this order."""
    return x.is_contiguous(memory_format=torch.channels_last)


class GroupNormFunction(torch.autograd.Function):
    """`apply(x, weight, bias, shift, groups, eps, silu)`.

    `x` is `[B, C, H, W]` in channels_last, weight and bias are `[C]` or `[B, C]`, shift is None or `[B, C]`; returns
    `[B, C, H, W]` in the dtype and order of `x`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:
        work, y = _Work(x, groups), torch.empty_like(x)
        w, beta = work.by_group(weight), work.by_group(bias)
        m = None if shift is None else work.by_group(shift)
        saved = []
        for part, pixels, spare in work.parts(x):
            s1 = pixels.sum(1).view(work.groups)
            s2 = torch.mul(pixels, pixels, out=spare).sum(1).view(work.groups)
            first = s1
            if m is not None:
                s2 = s2.addcmul_(m[part], torch.add(2 * s1, m[part], alpha=work.count))
                first = torch.add(s1, m[part], alpha=work.count)
            mean = work.mean(first)
            rstd = work.mean(s2).addcmul_(mean, mean, value=-1).clamp_(min=0).add_(eps).rsqrt_()
            centre = -mean if m is None else m[part] - mean
            scale = rstd * _of(w, part)
            offset = torch.addcmul(_of(beta, part), centre, scale)
            torch.addcmul(_row(offset), pixels, _row(scale), out=spare)
            _pixels(y)[part].copy_(F.silu(spare, inplace=True) if silu else spare)
            saved += [s1, rstd, centre, scale, offset]
        ctx.save_for_backward(x, w, *saved)
        ctx.silu, ctx.inputs = silu, [None if t is None else (t.dtype, t.ndim == 1) for t in (weight, bias, shift)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *saved = ctx.saved_tensors
        work, grad = _Work(x, saved[0].shape[1]), _pixels(grad.contiguous(memory_format=torch.channels_last))
        grad_x, wide, own = torch.empty_like(x), work.buffer(), []
        for i, (part, pixels, spare) in enumerate(work.parts(x)):
            s1, rstd, centre, scale, offset = saved[5 * i : 5 * i + 5]
            g = wide[: len(pixels)].copy_(grad[part])
            if ctx.silu:
                torch.addcmul(_row(offset), pixels, _row(scale), out=spare)
                torch.ops.aten.silu_backward(g, spare, grad_input=g)
            b = g.sum(1).view(work.groups)
            a = torch.mul(g, pixels, out=spare).sum(1).view(work.groups)
            grad_w = torch.addcmul(a, centre, b).mul_(rstd)
            k = work.mean(_of(w, part) * grad_w).mul_(rstd).mul_(rstd).neg_()
            c = torch.addcmul(work.mean(_of(w, part) * b).mul_(rstd).neg_(), k, centre).expand_as(scale)
            torch.addcmul(_row(c), pixels, _row(k.expand_as(scale)), out=spare).addcmul_(g, _row(scale))
            _pixels(grad_x)[part].copy_(spare)
            own.append((grad_w, b, scale * b + k * s1 + work.count * c))
        grads: list[Tensor | None] = []
        for values, kind in zip(zip(*own), ctx.inputs):
            if kind is None:
                grads.append(None)
                continue
            dtype, is_shared = kind
            value = torch.cat(values).flatten(1)
            grads.append((value.sum(0) if is_shared else value).to(dtype))
        return grad_x, *grads, None, None, None


class _Work:
    """How a batch is gone through: its parts, in at least float32, and its groups of channels."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.count = x.shape[2] * x.shape[3]
        self.groups = (-1, groups, x.shape[1] // groups)
        cached = CACHED // (self.count * x.shape[1]) if x.device.type == "cpu" else len(x)
        self._size = max(1, min(len(x), cached))
        self._empty = partial(x.new_empty, (self._size, self.count, x.shape[1]), dtype=self.dtype)

    def buffer(self) -> Tensor:
        """Room for the largest part."""
        return self._empty()

    def by_group(self, value: Tensor) -> Tensor:
        """`[C]` or `[B, C]` as `[1 or B, groups, channels of a group]`."""
        return value.to(self.dtype).reshape(self.groups)

    def mean(self, sums: Tensor) -> Tensor:
        """Mean over the pixels and channels of a group, from sums over pixels; `[B, groups, 1]`."""
        return sums.sum(2, keepdim=True).mul_(1 / (self.count * self.groups[2]))

    def parts(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of the batch, their pixels (not to be written to), and a buffer of the same shape."""
        pixels, spare = _pixels(x), self.buffer()
        wide = None if x.dtype == self.dtype else self.buffer()
        for start in range(0, len(x), self._size):
            part = slice(start, start + self._size)
            values = pixels[part]
            yield part, values if wide is None else wide[: len(values)].copy_(values), spare[: len(values)]


def _pixels(x: Tensor) -> Tensor:
    """A view of `x` as `[B, H·W, C]`."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _row(value: Tensor) -> Tensor:
    """`[B, groups, channels of a group]` as `[B, 1, C]`, to be broadcast over pixels."""
    return value.reshape(len(value), 1, -1)


def _of(value: Tensor, part: slice) -> Tensor:
    """That part of values of each sample; all of those that samples share."""
    return value if len(value) == 1 else value[part]
