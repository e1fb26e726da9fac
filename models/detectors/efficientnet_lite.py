"""EfficientNet-Lite (Liu 2020; Tan and Le 2019) as a feature extractor: 1280 pooled features.

Inverted bottlenecks without squeeze-and-excitation, ReLU6, and the padding of TensorFlow (`SAME`: the odd pixel goes to
the bottom and right). Parameters are named as in the published PyTorch conversion. Images of any size are resized to
64×64 (bilinear, antialiased, half-pixel centres) and scaled to (v − 127) / 128, as the original networks were trained.
Lite1 is Lite0 with more blocks in its inner stages, and weights of its own.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import hardtanh, interpolate, pad

SIZE = 64
FEATURES = 1280
#: kernel, stride, expansion, output channels, repeats of each stage of Lite0.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """Convolution without bias whose output has ⌈in / stride⌉ pixels a side."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-length // stride) - 1) * stride + kernel - length, 0) for length in x.shape[:1:-1]]
        return super().forward(pad(x, [side for m in missing for side in (m // 2, m - m // 2)]))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


def _relu6(x: Tensor) -> Tensor:
    return hardtanh(x, 0.0, 6.0, inplace=True)


class Bottleneck(nn.Module):
    """1×1 expansion (if any), depthwise convolution, 1×1 projection; added to the input where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        if expansion != 1:
            self._expand_conv = SameConv2d(in_channels, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv2d(inner, out_channels, 1)
        self._bn2 = _norm(out_channels)
        self.is_expanded = expansion != 1
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = _relu6(self._bn0(self._expand_conv(x))) if self.is_expanded else x
        y = _relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.is_residual else y


class EfficientNetLite(nn.Module):
    """uint8 images `[B, 3, H, W]` → features `[B, 1280]`.

    Args:
        depth: factor of the repeats of all stages but the first and the last, rounded up: 1 for Lite0, 1.1 for Lite1.
    """

    def __init__(self, depth: float = 1.0) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for stage, (kernel, stride, expansion, out_channels, repeats) in enumerate(STAGES):
            is_inner = 0 < stage < len(STAGES) - 1
            for index in range(math.ceil(repeats * depth) if is_inner else repeats):
                blocks.append(Bottleneck(channels, out_channels, kernel, stride if index == 0 else 1, expansion))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels, FEATURES, 1)
        self._bn1 = _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, 1000)  # not used for features; the published file has it

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images → what the first convolution sees, float32 `[B, 3, 64, 64]`."""
        x = interpolate(images.float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        return (x - 127) / 128

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.prepare(images))

    def pool(self, x: Tensor) -> Tensor:
        """Scaled images of any size → features `[B, 1280]`."""
        x = _relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return _relu6(self._bn1(self._conv_head(x))).mean((2, 3))
