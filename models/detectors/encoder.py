"""Distance of states by the features of a diffusion model's own encoder: perceptual, and nothing to fetch.

The half of a U-Net that goes down in resolution knows what its images are made of (features of denoisers serve as those
of classifiers do: Baranchuk et al. 2022, arXiv 2112.03126). Both states are shown to it as images with little noise,
and the outputs of all its blocks are compared as LPIPS compares those of VGG-16: each pixel's features divided by their
norm, squared differences added over channels, mean over pixels and blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib import UserError

from ..model import Cond, DiffusionModel, Student
from .lpips import unit

#: Noise level that states are said to have; none is added.
SIGMA = 0.2
#: What raw networks call the blocks of their encoders.
ENCODERS = ("enc", "input_blocks", "net.down_blocks")


class EncoderDistance:
    """Distance of states, differentiable with respect to them, by a frozen model of pixels or latents.

    Args:
        model: whose features are compared; a student is told the number of timestamps that it was made for.

    Raises:
        UserError: a network without encoder, as a transformer is.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self._model, self._blocks = model, encoder_blocks(model)
        self._step_condition = model.sampling.step_condition if isinstance(model, Student) else None

    def __call__(self, x: Tensor, y: Tensor, cond: Cond = None) -> Tensor:
        """Distance of each pair of states `[B, C, H, W]` with conditions `cond`, `[B]` float32."""
        pairs = list(zip(self.features(x, cond), self.features(y, cond)))
        return torch.stack([(unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)

    def features(self, x: Tensor, cond: Cond = None) -> list[Tensor]:
        """Output `[B, channels, height, width]` of each block, float32."""
        with _outputs(self._blocks) as kept:
            self._model.denoiser(cond, step_condition=self._step_condition)(x, x.new_full((), SIGMA))
        return [output.float() for output in kept]


def encoder_blocks(model: DiffusionModel) -> list[nn.Module]:
    """The modules whose outputs are those of a network's encoder, block by block."""
    for name in ENCODERS:
        try:
            found: Any = model.net.model.get_submodule(name)
        except AttributeError:
            continue
        blocks = found.values() if isinstance(found, nn.ModuleDict) else found
        return [block[-1] if isinstance(block, nn.ModuleList) else block for block in blocks]
    raise UserError(f"the network of {model.dataset_name} has no encoder whose features could be compared")


@contextmanager
def _outputs(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Keeps what each of `blocks` puts out. Hooks stay no longer: the model is a teacher besides."""
    kept: list[Tensor] = []

    def keep(block: nn.Module, inputs: Any, output: Any) -> None:
        # A level of diffusers gives its last features, and beside them those of all its layers.
        kept.extend(output[1] if isinstance(output, tuple) else [output])

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
