"""Layers shared by the U-Nets, under the parameter names of the published checkpoints.

A layer computes in the dtype of its input and casts its own float32 weights to it, so one float32 module serves a
half-precision core (Karras et al. 2022, arXiv 2206.00364, appendix C). The embedding branch stays float32: it is tiny
and carries the noise level.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import Self  # comes with torch

from torch_utils.device import is_plain

from .attention import attend_to_pixels
from .group_norm import GroupNormFunction, is_channels_last
from .initial import DEFAULT_INIT, Init, zeros

#: Weight, and bias or None, as a layer computes with them.
Weights = tuple[Tensor, Any]
#: Channels of a head, where their number is not told.
HEAD = 64
#: Gradients of so many layers are in half precision at a time.
LAYERS_AT_A_TIME = 32
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Weighted(nn.Module):
    """A layer with float32 `weight` and `bias`, either of which may be None, that computes in other dtypes.

    It casts its weights in every forward, alone or as `cast_together` does, or once, where `freeze` was called.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    #: Factor of the weights as they are computed with.
    gain: float = 1.0
    _is_frozen: bool = False
    _kept: Weights | None = None
    #: Whether the features have another dtype than the weights, and their cast within `cast_together`.
    _is_cast: bool = False
    _together: Weights | None = None

    def keep_weights(self) -> None:
        """Cast the weights when they are first used; again once others are loaded, or the layer was moved."""
        self._is_frozen, self._kept = True, None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._is_frozen, self._kept = False, None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def _weights(self, x: Tensor) -> Weights:
        """Weight and bias times `gain`, in the dtype and memory order of `x`."""
        if not self._is_frozen or is_plain():  # what is kept is no part of a traced program
            return self._convert(x)
        if self._kept is None or self._kept[0].dtype != x.dtype:
            self._kept = self._convert(x)
        return self._kept

    def _convert(self, x: Tensor) -> Weights:
        if self.weight is None:
            raise ValueError("a layer without weights only resamples")
        if self._together is not None:
            return self._together
        self._is_cast = self.weight.dtype != x.dtype
        weight: Tensor = self.weight if self.gain == 1 else self.weight * self.gain
        bias: Tensor | None = self.bias if self.gain == 1 or self.bias is None else self.bias * self.gain
        if weight.ndim == x.ndim == 4 and is_channels_last(x):
            weight = weight.to(x.dtype, memory_format=torch.channels_last)
        return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


@contextmanager
def cast_together(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the weights of all layers that computed in half precision before are cast to `dtype`, in a few launches.

    Their gradients are cast back in a few, too. That replaces two to four launches for each layer, a third of those of
    a training step on a GPU, and changes no bit.
    """
    layers = [m for m in module.modules() if isinstance(m, Weighted) and m._is_cast and m.weight is not None]
    for start in range(0, len(layers), LAYERS_AT_A_TIME):
        part = layers[start : start + LAYERS_AT_A_TIME]
        own = [(layer, p) for layer in part for p in (layer.weight, layer.bias) if p is not None]
        cast = iter(_CastTogether.apply(dtype, [layer.gain for layer, _ in own], *[p for _, p in own]))
        for layer in part:
            layer._together = (next(cast), None if layer.bias is None else next(cast))
    try:
        yield
    finally:
        for layer in layers:
            layer._together = None


class _CastTogether(torch.autograd.Function):
    """`apply(dtype, gains, *params)`: each parameter times its gain, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, gains: list[float], *params: Tensor) -> tuple[Tensor, ...]:
        ctx.gains, ctx.dtypes = gains, [p.dtype for p in params]
        ctx.set_materialize_grads(False)
        cast = [torch.empty_like(p, dtype=dtype) for p in params]
        torch._foreach_copy_(cast, params if set(gains) == {1.0} else torch._foreach_mul(params, gains))
        return tuple(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found = [(g, gain, dtype) for g, gain, dtype in zip(grads, ctx.gains, ctx.dtypes) if g is not None]
        wide = [torch.empty_like(g, dtype=dtype) for g, _, dtype in found]
        if found:
            torch._foreach_copy_(wide, [g for g, _, _ in found])
            if set(ctx.gains) != {1.0}:
                torch._foreach_mul_(wide, [gain for _, gain, _ in found])
        results = iter(wide)
        return None, None, *(None if g is None else next(results) for g in grads)


def freeze(module: AnyModule) -> AnyModule:
    """Eval mode without gradients, weights cast once; who then changes them in place calls this again."""
    for layer in module.eval().requires_grad_(False).modules():
        if isinstance(layer, Weighted):
            layer.keep_weights()
    return module


class Linear(Weighted):
    """`x @ weight.T + bias` for `[B, in_features]`, with the initialisations that EDM uses."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init: Init = DEFAULT_INIT,
        init_bias: Init = zeros,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(init([out_features, in_features], in_features, out_features))
        self.bias = nn.Parameter(init_bias([out_features], in_features, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._weights(x))


class Conv2d(Weighted):
    """Convolution with optional ×2 resampling; `kernel=0` resamples only.

    `fused` lets a convolution and the filter that halves share one padding, as NCSN++'s residual encoder does. With
    weights, the result is multiplied by `gain`.
    """

    resample_filter: Tensor  # None where nothing is resampled

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
        stride: int = 1,
        gain: float = 1.0,
        init: Init = DEFAULT_INIT,
        init_bias: Init = zeros,
    ) -> None:
        super().__init__()
        self.up, self.down, self.fused, self.stride, self.gain = up, down, fused, stride, gain
        fans = (in_channels * kernel**2, out_channels * kernel**2)
        self.weight = nn.Parameter(init([out_channels, in_channels, kernel, kernel], *fans)) if kernel else None
        self.bias = nn.Parameter(init_bias([out_channels], *fans)) if kernel else None
        self.register_buffer("resample_filter", _outer_filter(resample_filter) if up or down else None)
        # Two equal taps are an average pool or a nearest-neighbour repeat, far cheaper than a grouped convolution.
        self._is_box = len(resample_filter) == 2 and resample_filter[0] == resample_filter[1]

    def _upsample(self, x: Tensor, padding: int) -> Tensor:
        if self._is_box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        kernel = (4 * self.resample_filter.to(x.dtype)).expand(x.shape[1], 1, -1, -1)
        return F.conv_transpose2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)

    def _downsample(self, x: Tensor, padding: int) -> Tensor:
        if self._is_box:
            return F.avg_pool2d(x, 2)
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)

    def _convolve(self, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, *self._weights(x), stride=self.stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        pad = 0 if self.weight is None else self.weight.shape[-1] // 2
        filter_pad = (self.resample_filter.shape[-1] - 1) // 2 if self.up or self.down else 0
        if self.fused:
            weight, bias = self._weights(x)
            bias_free = F.conv2d(x, weight, padding=pad + filter_pad)
            return self._downsample(bias_free, 0) + bias.reshape(1, -1, 1, 1)
        if self.up and self._is_box and self.weight is not None and pad == 0 and not is_plain():
            return self._upsample(self._convolve(x, 0), 0)  # a quarter of the products
        if self.up:
            x = self._upsample(x, filter_pad)
        if self.down:
            x = self._downsample(x, filter_pad)
        return x if self.weight is None else self._convolve(x, pad)


class Pointwise(Conv2d):
    """1×1 convolution whose published weight has `dims` trailing dimensions of 1."""

    weight: nn.Parameter

    def __init__(
        self, in_channels: int, out_channels: int, dims: int, init: Init = DEFAULT_INIT, init_bias: Init = zeros
    ) -> None:
        super().__init__(in_channels, out_channels, kernel=1, init=init, init_bias=init_bias)
        self.weight = nn.Parameter(self.weight.detach().reshape([out_channels, in_channels] + [1] * dims))

    def _convert(self, x: Tensor) -> Weights:
        weight, bias = super()._convert(x)
        return weight.flatten(1)[:, :, None, None], bias


class QKV(Pointwise):
    """1×1 convolution to queries, keys and values: three blocks of channels, each in the order (head, channel).

    The published weights have `parts` of queries, keys and values each: as many as channels, as heads, or one. Softmax
    ignores what a key bias adds, so its gradient is rounding noise, which Adam would turn into steps of full size: it
    gets none.
    """

    def __init__(self, channels: int, parts: int, dims: int = 2, **init: Init) -> None:
        super().__init__(channels, 3 * channels, dims, **init)
        self._split = (parts, 3, channels // parts)

    def _convert(self, x: Tensor) -> Weights:
        own = super()._convert(x)
        weight, bias = (p.unflatten(0, self._split).transpose(0, 1).flatten(0, 2) for p in own)
        q, k, v = bias.chunk(3)
        return weight, torch.cat([q, k.detach(), v])


def _outer_filter(resample_filter: Sequence[float]) -> Tensor:
    """Normalised separable filter `[1, 1, k, k]`, the published buffer shape."""
    taps = torch.tensor(resample_filter, dtype=torch.float32)
    return (torch.outer(taps, taps) / taps.sum().square())[None, None]


class GroupNorm(Weighted):
    """Group normalisation with at least `min_channels` channels in each of at most 32 groups."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, channels: int, eps: float = 1e-5, min_channels: int = 4) -> None:
        super().__init__()
        self.groups = min(32, channels // min_channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        silu: bool = False,
        shift: Tensor | None = None,
        modulations: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Tensor:
        """Normalise `x + shift`, then `· (1 + scale) + shift` for each of `modulations`, then SiLU if asked for.

        Shifts and scales are `[B, channels]`, float32.
        """
        if is_channels_last(x) and not is_plain():
            weight: Tensor = self.weight
            bias: Tensor = self.bias
            for scale, offset in modulations:
                weight, bias = weight * (scale + 1), torch.addcmul(offset, bias, scale + 1)
            return GroupNormFunction.apply(x, weight, bias, shift, self.groups, self.eps, silu)
        if shift is not None:
            x = x + _spread(shift, x)
        x = F.group_norm(x, self.groups, *self._weights(x), self.eps)
        for scale, offset in modulations:
            x = torch.addcmul(_spread(offset, x), x, _spread(scale, x) + 1)
        return F.silu(x) if silu else x


def _spread(value: Tensor, x: Tensor) -> Tensor:
    """`[B, C]` in the dtype of the images `x`, to be broadcast over their pixels."""
    return value[:, :, None, None].to(x.dtype)


class UNetBlock(nn.Module):
    """Residual block with noise-level modulation, optional ×2 resampling, step condition and self-attention.

    Input `[B, in_channels, H, W]`, embedding `[B, emb_channels]` and, with `use_step_condition`, a second embedding of
    the same shape whose modulation is applied after the first (SFD-v, one model for several NFEs).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        use_step_condition: bool = False,
        init: Init = DEFAULT_INIT,
        init_bias: Init = zeros,
        init_last: Init = zeros,
        init_attention: Init | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_heads = 0 if not attention else num_heads or out_channels // HEAD
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        own: dict[str, Any] = dict(init=init, init_bias=init_bias)
        resampling: dict[str, Any] = dict(up=up, down=down, resample_filter=resample_filter)
        modulations = out_channels * (2 if adaptive_scale else 1)

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resampling, **own)
        self.affine = Linear(emb_channels, modulations, **own)
        # Zero weights: a step-conditioned student starts exactly as its teacher.
        self.affine_step = Linear(emb_channels, modulations, init=zeros) if use_step_condition else None
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, gain=skip_scale, init=init_last)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, gain=skip_scale, **resampling, **own)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            bias = init_bias if init_attention is None else zeros
            self.qkv = QKV(out_channels, out_channels, init=init_attention or init, init_bias=bias)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, gain=skip_scale, init=init_last)

    def forward(self, x: Tensor, emb: Tensor, step_emb: Tensor | None = None) -> Tensor:
        residual = x if self.skip is None else self.skip(x)
        h = self.conv0(self.norm0(x, silu=True))
        h = self._modulate(h, emb, step_emb)
        h = self.conv1(F.dropout(h, self.dropout, training=self.training))
        x = self._join(h, residual, self.skip is not None and self.skip.weight is not None)
        if not self.num_heads:
            return x
        out = attend_to_pixels(self.qkv(self.norm2(x)), self.num_heads)
        return self._join(self.proj(out), x)

    def _join(self, x: Tensor, residual: Tensor, scaled: bool = False) -> Tensor:
        """(x + residual) · skip_scale, where x has the factor already, and a `scaled` residual too."""
        return torch.add(x, residual, alpha=1.0 if scaled else self.skip_scale)

    def _modulate(self, x: Tensor, emb: Tensor, step_emb: Tensor | None) -> Tensor:
        modulations = [self.affine(emb)]
        if self.affine_step is not None and step_emb is not None:
            modulations.append(self.affine_step(step_emb))
        if not self.adaptive_scale:
            return self.norm1(x, silu=True, shift=sum(modulations[1:], modulations[0]))
        return self.norm1(x, silu=True, modulations=[m.chunk(2, dim=1) for m in modulations])
