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

Where torch's own normalisation is faster, it makes z, in the same way. It knows no shift, which is added before.
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
CACHED = 1 << 17
#: Pixels from which torch's own kernel goes through half-precision features in the order of memory.
MANY_PIXELS = 1024


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
        normalize = _by_torch if _suits_torch(x, weight) else _by_parts
        x, y, *moments = normalize(x, weight, bias, shift, groups, eps, silu)
        ctx.save_for_backward(x, weight, *moments)
        ctx.silu, ctx.inputs = silu, [None if t is None else (t.dtype, t.ndim == 1) for t in (weight, bias, shift)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *moments = ctx.saved_tensors
        work, grad = _Work(x, moments[0].shape[1]), _pixels(grad.contiguous(memory_format=torch.channels_last))
        grad_x, wide, own, w = torch.empty_like(x), work.buffer(), [], work.by_group(weight)
        for part, pixels, spare in work.parts(x):
            rstd, centre, scale, offset = (moment[part] for moment in moments)
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
            # Of a shift there is no use where there is none.
            s1 = b if ctx.inputs[2] is None else pixels.sum(1).view(work.groups)
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


def _suits_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own kernel is the faster one: on the CPU, in float32 or for many pixels, with weights for all."""
    is_wide = x.dtype == weight.dtype
    is_large = x.shape[2] * x.shape[3] >= MANY_PIXELS and weight.dtype == torch.float32
    return x.device.type == "cpu" and weight.ndim == 1 and (is_wide or is_large)


def _by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, ...]:
    """What was normalised, with its shift, and the result; of each group or channel r, m − μ, A and B."""
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    work = _Work(x, groups)
    y, mean, rstd = torch.native_group_norm(x, weight, bias, len(x), x.shape[1], work.count, groups, eps)
    centre, rstd = -mean[:, :, None].to(work.dtype), rstd[:, :, None].to(work.dtype)
    scale = rstd * work.by_group(weight)
    offset = torch.addcmul(work.by_group(bias), centre, scale)
    return x, F.silu(y, inplace=True) if silu else y, rstd, centre, scale, offset


def _by_parts(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, ...]:
    """The same, but for the shift, which is not in what it says was normalised."""
    work, y = _Work(x, groups), torch.empty_like(x)
    w, beta = work.by_group(weight), work.by_group(bias)
    m = None if shift is None else work.by_group(shift)
    moments = []
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
        moments.append((rstd, centre, scale, offset))
    return x, y, *map(torch.cat, zip(*moments))


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
