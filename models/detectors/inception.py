"""Inception-v3 as the Fréchet inception distance uses it: TensorFlow's graph of 2015-12-05, 2048 pooled features.

It differs from the network of torchvision in its average pools, which leave the padding out, in a max pool in the last
block, and in its 1008 classes. Parameters are named as in the published PyTorch conversions.

Two conventions of feeding it exist. They move a FID by more than most papers' improvements, so a result names its own:

- `tf1`: bilinear resize of TensorFlow 1 (pixel i of the output reads at i·in/out: no half-pixel shift, edges clamped),
  pixels (v − 128) / 128. The original FID, StyleGAN, EDM, torch-fidelity.
- `pytorch-fid`: bilinear resize with half-pixel centres, pixels 2 v / 255 − 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

SIZE = 299
FEATURES = 2048
RESIZES = ("tf1", "pytorch-fid")


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = False
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()


def _average(x: Tensor) -> Tensor:
    """Mean of the neighbours that are inside the image."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35×35: 1×1, 5×5 and double 3×3 convolutions, and an average pool."""

    def __init__(self, in_channels: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(in_channels, 64, 1)
        self.branch5x5_1 = Conv(in_channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, same=True)
        self.branch3x3dbl_1 = Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, same=True)
        self.branch3x3dbl_3 = Conv(96, 96, 3, same=True)
        self.branch_pool = Conv(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], dim=1)


class BlockB(nn.Module):
    """35×35 → 17×17."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, same=True)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17×17: 7×7 convolutions as pairs of 1×7 and 7×1, with `inner` channels between them."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        wide, tall = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, wide, same=True)
        self.branch7x7_3 = Conv(inner, 192, tall, same=True)
        self.branch7x7dbl_1 = Conv(768, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, tall, same=True)
        self.branch7x7dbl_3 = Conv(inner, inner, wide, same=True)
        self.branch7x7dbl_4 = Conv(inner, inner, tall, same=True)
        self.branch7x7dbl_5 = Conv(inner, 192, wide, same=True)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], dim=1)


class BlockD(nn.Module):
    """17×17 → 8×8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), same=True)
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), same=True)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8×8: 3×3 convolutions that fork into 1×3 and 3×1; the last block of the network pools by maximum."""

    def __init__(self, in_channels: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.branch1x1 = Conv(in_channels, 320, 1)
        self.branch3x3_1 = Conv(in_channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), same=True)
        self.branch3x3_2b = Conv(384, 384, (3, 1), same=True)
        self.branch3x3dbl_1 = Conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, same=True)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), same=True)
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), same=True)
        self.branch_pool = Conv(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.is_last else _average(x)
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(pooled)], dim=1)


class InceptionV3(nn.Module):
    """uint8 images `[B, 3, H, W]` → features `[B, 2048]`.

    Args:
        resize: one of `RESIZES`, which also says how pixels are scaled.
    """

    def __init__(self, resize: str = "tf1") -> None:
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize is {resize!r}, expected one of {', '.join(RESIZES)}")
        self.resize = resize
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, is_last=False)
        self.Mixed_7c = BlockE(2048, is_last=True)
        self.fc = nn.Linear(2048, 1008)  # not used for features; the published file has it

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images → what the first convolution sees, float32 `[B, 3, 299, 299]`."""
        x = images.float()
        if self.resize == "tf1":
            return (resize_tf1(x, SIZE) - 128) / 128
        return interpolate(x / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False) * 2 - 1

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images)[-1].mean((2, 3))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Activations with 64, 192, 768 and 2048 channels."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(self.prepare(images))))
        stages = [max_pool2d(x, 3, stride=2)]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(stages[-1]))
        stages.append(max_pool2d(x, 3, stride=2))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(stages[-1]))))
        stages.append(self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))))
        stages.append(self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(stages[-1]))))
        return stages


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """Bilinear resize of float images `[B, C, H, W]` to `size`×`size`, as TensorFlow 1 does without `align_corners`."""
    for dim in (3, 2):
        length = x.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
        low = place.long().clamp_max(length - 1)  # rounding can reach past the end
        weight = (place - low).reshape([-1] + [1] * (3 - dim))
        start = x.index_select(dim, low)
        x = start + (x.index_select(dim, (low + 1).clamp_max(length - 1)) - start) * weight
    return x
