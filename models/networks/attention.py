"""Attention among the pixels of images, and in what memory order images and pixels lie."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_utils.device import is_plain, prefers_channels_last

#: Pairs of tokens up to which gradients of attention are computed by products on the CPU.
FEW_PAIRS = 256**2


def arrange(x: Tensor) -> Tensor:
    """Images in the memory order that the layers compute in on their device."""
    order = torch.channels_last if prefers_channels_last(x.device) else torch.contiguous_format
    return x.contiguous(memory_format=order)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of queries `[B, heads, N, C]` to keys and values `[B, heads, M, C]`.

    Fused kernels want the channels of a head side by side. On the meta device, where memory and kernels are counted, it
    is the one of CUDA that keeps no products. That of the CPU is slow backwards, where few tokens go without it.
    """
    has_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.device.type == "cpu" and has_gradient and q.shape[2] * k.shape[2] <= FEW_PAIRS and not is_plain():
        return _FewTokens.apply(q, k, v)
    if q.device.type == "meta" and not is_plain() and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, has_gradient)[0]
    return F.scaled_dot_product_attention(q, k, v)


class _FewTokens(torch.autograd.Function):
    """Attention `P v` with P = softmax(q kᵀ / √C), which is computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        q = q * q.shape[-1] ** -0.5
        p = torch.softmax(q @ k.mT, dim=-1)
        grad_p = torch.ops.aten._softmax_backward_data(grad @ v.mT, p, -1, p.dtype)
        return (grad_p @ k).mul_(q.shape[-1] ** -0.5), grad_p.mT @ q, p.mT @ grad


def to_tokens(x: Tensor) -> Tensor:
    """Images `[B, C, H, W]` as a row of pixels `[B, H·W, C]`, the channels of a pixel side by side."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_images(tokens: Tensor, height: int, width: int) -> Tensor:
    """`[B, H·W, C]` as images `[B, C, H, W]`, in their memory order."""
    return arrange(tokens.transpose(1, 2).unflatten(2, (height, width)))


def attend_to_pixels(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention among the pixels of images, `[B, 3·C, H, W]` as from `QKV` → `[B, C, H, W]`."""
    q, k, v = to_tokens(qkv).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return to_images(attend(q, k, v).transpose(1, 2).flatten(2), *qkv.shape[2:])
