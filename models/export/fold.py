"""A network without step condition from a step-conditioned one.

Told one number of timestamps, the branch of SFD-v modulates each block by a constant, which goes into the layer that
modulates by noise level, h (1 + s) + b being that layer's:

    (h (1 + s) + b)(1 + s') + b' = h (1 + [s (1 + s') + s']) + [b (1 + s') + b']

so a student of several NFEs is exported for one of them, exactly. EDM2's step condition is a part of the embedding, to
which the exported network adds a constant. Networks of diffusers add one behind the layers that embed the noise level,
and it goes into their bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusers_precond import DiffusersPrecond
from ..networks.edm2_unet import EDM2UNet
from ..networks.guided_unet import ResBlock
from ..networks.layers import UNetBlock
from ..precond import Precond


@torch.no_grad()
def fold_step_condition(net: Precond, num_steps: int) -> Precond:
    """The network without step-condition layers that gives what `net` gives when told `num_steps`."""
    folded = type(net)(**{**net.init_kwargs, "use_step_condition": False})
    state = {name: tensor.clone() for name, tensor in net.state_dict().items() if name in folded.state_dict()}
    if isinstance(net, DiffusersPrecond):
        vectors = net.model.step_vectors(torch.tensor(float(num_steps)))
        for name, vector in zip(net.model.time_embeddings(), vectors):
            state[f"model.net.{name}.linear_2.bias"] += vector[0]
        return _filled(folded, state, net)
    embedded = net.model.embed_steps(torch.tensor([float(num_steps)]), 1)
    if isinstance(folded.model, EDM2UNet):
        folded.model.step_shift = embedded
    for name, block in net.named_modules():
        if isinstance(block, ResBlock) and block.emb_nfe_layers is not None:
            modulation = block.emb_nfe_layers(embedded)[0]
            _modulate(state, f"{name}.emb_layers.1", modulation, block.use_scale_shift_norm)
        elif isinstance(block, UNetBlock) and block.affine_step is not None:
            _modulate(state, f"{name}.affine", block.affine_step(embedded)[0], block.adaptive_scale)
    return _filled(folded, state, net)


def _filled(folded: Precond, state: dict[str, Tensor], net: Precond) -> Precond:
    folded.load_state_dict(state)
    folded.compute_dtype = net.compute_dtype
    return folded.eval().requires_grad_(False)


def _modulate(state: dict[str, Tensor], layer: str, constant: Tensor, scales: bool) -> None:
    """Follow what `layer` does to a block by a constant modulation: scale and shift, or shift alone."""
    weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
    if not scales:
        bias += constant
        return
    scale, shift = constant.chunk(2)
    factor = (1 + scale).repeat(2)
    weight *= factor[:, None]
    bias.mul_(factor).add_(torch.cat([scale, shift]))
