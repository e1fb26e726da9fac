"""LPIPS: how far apart two images look, by the features of VGG-16 (Zhang et al. 2018, arXiv 1801.03924).

    d(x, y) = Σ_l mean_hw Σ_c w_lc (x̂_lchw − ŷ_lchw)²

x̂_l are the features behind the last ReLU before each of VGG's five poolings, each pixel's divided by its norm over the
channels; w_l are the published linear heads, fitted to human judgements. Images are resized to 224×224 beforehand.

Two modes differ in what VGG sees. `standard` is the definition of the authors: images in [-1, 1], max pooling.
`reference` is what the second stage of the published SFD code computes, on which its one-step results rest: the mean
and deviation of images in [0, 1] are applied to images in [-1, 1], and VGG's poolings are averages.

It is in single precision throughout: it is made of small differences, and a VGG in bfloat16 moves it by up to 2e-3
relative on the recorded images.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.download import cache_dir, fetch
from torch_utils.checkpoint import check_state_dict

from ..published.torch_checkpoint import read_checkpoint

MODES = ("reference", "standard")
SIZE = 224
#: ImageNet's statistics of the colours in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-10

#: The five linear heads: as torch-fidelity publishes them, and from the authors' repository.
HEADS_URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
)
HEADS_FILE = "weights-vgg16-lpips.pth"
#: VGG-16 trained on ImageNet; torchvision's file has the first digits of its checksum in its name.
VGG_URLS = ("https://download.pytorch.org/models/vgg16-397923af.pth",)
VGG_FILE, VGG_SHA256, VGG_SIZE = "vgg16-397923af.pth", "397923af", 553_433_881

#: Channels of VGG-16's convolutions between poolings.
LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class LPIPS(nn.Module):
    """Distance of images, differentiable with respect to them, with frozen weights under their published names.

    Args:
        mode: `reference` or `standard`, see above.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mode: str) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
        is_standard = mode == "standard"
        pool = nn.MaxPool2d if is_standard else nn.AvgPool2d
        layers: list[nn.Module] = []
        self._heads: dict[int, nn.Module] = {}
        cin = 3
        for level, widths in enumerate(LEVELS):
            layers += [pool(kernel_size=2, stride=2)] if level else []
            for cout in widths:
                layers += [nn.Conv2d(cin, cout, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                cin = cout
            # The published heads were fitted behind a dropout layer, which is index 0.
            head = nn.Sequential(nn.Identity(), nn.Conv2d(cin, 1, kernel_size=1, bias=False))
            self.add_module(f"lin{level}", nn.ModuleDict({"model": head}))
            self._heads[len(layers) - 1] = head
        self._layers, self.vgg16 = layers, nn.ModuleDict({"features": nn.Sequential(*layers)})
        # Colours in [-1, 1] have this mean, and twice the deviation of those in [0, 1].
        mean = [2 * m - 1 for m in MEAN] if is_standard else MEAN
        deviation = [2 * d for d in DEVIATION] if is_standard else DEVIATION
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).reshape(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor, cond: object = None) -> Tensor:
        """Distance of each pair, `[B]` float32, of images `[B, 1 or 3, H, W]` in [-1, 1]; grey ones become RGB.

        What the images show, `cond`, is of use to other distances only.
        """
        distance = torch.zeros(len(x), device=x.device)
        a, b = self._prepare(x), self._prepare(y)
        for index, layer in enumerate(self._layers):
            a, b = layer(a), layer(b)
            if index in self._heads:
                distance = distance + self._heads[index]((unit(a) - unit(b)).square()).mean(dim=(1, 2, 3))
        return distance

    def _prepare(self, images: Tensor) -> Tensor:
        images = images.float().expand(-1, 3, -1, -1)
        images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return (images - self.mean) / self.deviation


def unit(features: Tensor) -> Tensor:
    """Each pixel's features divided by their norm; the gradient is zero, not infinite, where all of them are zero."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def fetch_lpips() -> list[Path]:
    """The files that LPIPS is made of, its heads and VGG-16; what is not there is fetched.

    Raises:
        UserError: one is not to be had, or is not the expected one.
    """
    folder = cache_dir() / "lpips"
    return [fetch(HEADS_URLS, folder / HEADS_FILE), fetch(VGG_URLS, folder / VGG_FILE, VGG_SHA256, size=VGG_SIZE)]


def load_lpips(mode: str, device: torch.device | str = "cpu") -> LPIPS:
    """LPIPS of `mode` with the published weights, fetched on first use.

    Raises:
        UserError: weights that are missing, unreachable, damaged, or of another network.
    """
    paths = fetch_lpips()
    state: dict[str, Tensor] = {}
    for path in paths:
        # torchvision's names have no prefix; the classifier behind its features is of no use.
        tensors = read_checkpoint(path).items()
        state |= {re.sub("^features", "vgg16.features", k): v for k, v in tensors if not k.startswith("classifier.")}
    net = LPIPS(mode)
    check_state_dict(net.state_dict(), state, " with ".join(map(str, paths)))
    net.load_state_dict(state)
    # The channels of a pixel side by side: faster on the CPU.
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not declare it
