"""The U-Net of the guided-diffusion family, under its published parameter names.

One class serves the published models (Dhariwal & Nichol 2021, arXiv 2105.05233, and its descendants):

    guided-diffusion,
    latent-diffusion       self-attention whose 3·C channels are split (head, q/k/v, channel), 1-D projections
    Stable Diffusion v1    transformer blocks: self-attention, attention to the text, feed-forward
    consistency-models     self-attention split (q/k/v, head, channel), 2-D projections, residual blocks that resample

The step-condition branch of SFD-v (`nfe_embed`, `emb_nfe_layers`) exists only with `use_step_condition=True` and ends
in zero weights, so that a student starts as its teacher. Layers compute in the dtype of their input, see `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import arrange, attend_to_pixels
from .embeddings import PositionalEmbedding
from .initial import zeros
from .layers import QKV, Conv2d, Linear, Pointwise
from .transformer_blocks import OWN, SpatialTransformer, norm_of

ATTENTION_TYPES = ("legacy", "flash", "transformer")


class Downsample(nn.Module):
    """Convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, kernel=3, stride=2, **OWN)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Every pixel twice, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, kernel=3, **OWN)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ClassEmbedding(nn.Module):
    """One vector for each class: labels `[B, label_dim]`, one-hot or zeros, to `[B, channels]`."""

    def __init__(self, label_dim: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(label_dim, channels))

    def forward(self, labels: Tensor) -> Tensor:
        return labels @ self.weight.to(labels.dtype)


class ResBlock(nn.Module):
    """Residual block with noise-level modulation and optional ×2 resampling, `[B, in, H, W]` → `[B, out, H', W']`.

    The step condition modulates in the same way, after the noise level. The activations have their published places
    among the layers, and are computed with the normalisations before them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        *,
        up: bool = False,
        down: bool = False,
        use_scale_shift_norm: bool = False,
        use_step_condition: bool = False,
    ) -> None:
        super().__init__()
        self.up, self.down, self.use_scale_shift_norm = up, down, use_scale_shift_norm
        modulations = out_channels * (2 if use_scale_shift_norm else 1)
        self.in_layers = nn.Sequential(
            norm_of(in_channels), nn.SiLU(), Conv2d(in_channels, out_channels, kernel=3, **OWN)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, modulations, **OWN))
        self.emb_nfe_layers = None
        if use_step_condition:
            self.emb_nfe_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, modulations, init=zeros))
        last = Conv2d(out_channels, out_channels, kernel=3, init=zeros)
        self.out_layers = nn.Sequential(norm_of(out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = None
        if in_channels != out_channels:
            self.skip_connection = Conv2d(in_channels, out_channels, kernel=1, **OWN)

    def forward(self, x: Tensor, emb: Tensor, step_emb: Tensor | None = None) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(self._resample(norm(x, silu=True)))
        x = self._resample(x)
        modulations = [self.emb_layers(emb)]
        if self.emb_nfe_layers is not None and step_emb is not None:
            modulations.append(self.emb_nfe_layers(step_emb))
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            h = norm(h, silu=True, modulations=[m.chunk(2, dim=1) for m in modulations])
        else:
            h = norm(h, silu=True, shift=sum(modulations[1:], modulations[0]))
        return (x if self.skip_connection is None else self.skip_connection(x)) + conv(dropout(h))

    def _resample(self, x: Tensor) -> Tensor:
        if self.up:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.down else x


class SelfAttention(nn.Module):
    """Attention among the pixels of `[B, C, H, W]`, added to its input; `layout` is `legacy` or `flash`."""

    def __init__(self, channels: int, num_heads: int, layout: str) -> None:
        super().__init__()
        dims = 2 if layout == "flash" else 1
        self.num_heads = num_heads
        self.norm = norm_of(channels)
        self.qkv = QKV(channels, num_heads if layout == "legacy" else 1, dims, **OWN)
        self.proj_out = Pointwise(channels, channels, dims, init=zeros)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(attend_to_pixels(self.qkv(self.norm(x)), self.num_heads))


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net: its width, its residual blocks, and what makes their attention, if they have one."""

    channels: int
    blocks: int
    attention: Callable[[int], nn.Module] | None


class GuidedUNet(nn.Module):
    """U-Net of guided-diffusion, latent-diffusion, Stable Diffusion v1 and consistency-models.

    Args:
        in_channels, out_channels: channels of the states, and of what is said of them.
        model_channels, channel_mult: width, and its multiplier per resolution.
        num_res_blocks: residual blocks per resolution.
        attention_resolutions: down-sampling factors at which there is attention.
        attention_type: `legacy` or `flash` self-attention, or `transformer` blocks that attend to a context.
        num_head_channels: channels of a head; or num_heads: number of heads. One of them.
        transformer_depth, context_dim: of the transformer blocks.
        label_dim: number of classes, whose embedding is added to that of the noise level; 0 for none.
        dropout: probability in residual blocks.
        use_scale_shift_norm: embeddings scale and shift after the second normalisation, rather than shift before it.
        resblock_updown: residual blocks resample, rather than convolutions.
        use_step_condition: add the branch that embeds `step_condition`.

    `gradient_checkpointing = True` keeps only the inputs of blocks while training and computes the rest again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        attention_type: str = "legacy",
        num_head_channels: int | None = None,
        num_heads: int | None = None,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        label_dim: int = 0,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_step_condition: bool = False,
    ) -> None:
        super().__init__()
        if (num_heads is None) == (num_head_channels is None):
            raise ValueError("give one of num_heads and num_head_channels")
        if model_channels % 2 or any(model_channels * mult % min(model_channels * mult, 32) for mult in channel_mult):
            raise ValueError(f"model_channels {model_channels} times {channel_mult} does not split in groups")
        if attention_type not in ATTENTION_TYPES:
            raise ValueError(f"attention_type is {attention_type!r}, expected one of {', '.join(ATTENTION_TYPES)}")
        if (attention_type == "transformer") != (context_dim is not None):
            raise ValueError("context_dim belongs to attention_type transformer, and is needed there")
        self.use_step_condition, self.context_dim = use_step_condition, context_dim
        self.gradient_checkpointing = False
        emb_channels = 4 * model_channels
        self._block: dict[str, Any] = dict(
            emb_channels=emb_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            use_step_condition=use_step_condition,
        )

        def attention(channels: int) -> nn.Module:
            heads = (num_heads or 0) if num_head_channels is None else channels / num_head_channels
            if heads < 1 or channels % heads or heads != int(heads):
                raise ValueError(f"{channels} channels do not split into {heads:g} heads")
            if context_dim is not None:
                return SpatialTransformer(channels, context_dim, int(heads), transformer_depth)
            return SelfAttention(channels, int(heads), attention_type)

        levels = [
            Level(model_channels * mult, num_res_blocks, attention if 2**i in attention_resolutions else None)
            for i, mult in enumerate(channel_mult)
        ]
        self.positions = PositionalEmbedding(model_channels)
        self.time_embed = _embedding_layers(model_channels, emb_channels)
        self.label_emb = ClassEmbedding(label_dim, emb_channels) if label_dim else None
        self.nfe_embed = _embedding_layers(model_channels, emb_channels) if use_step_condition else None
        skips = self._build_encoder(in_channels, levels, resblock_updown)
        widest = levels[-1].channels
        self.middle_block = nn.ModuleList(
            [ResBlock(widest, widest, **self._block), attention(widest), ResBlock(widest, widest, **self._block)]
        )
        self._build_decoder(skips, levels, resblock_updown)
        end = Conv2d(levels[0].channels, out_channels, kernel=3, init=zeros)
        self.out = nn.Sequential(norm_of(levels[0].channels), nn.SiLU(), end)

    def _build_encoder(self, in_channels: int, levels: list[Level], resblock_updown: bool) -> list[int]:
        """Make `input_blocks`; returns the channels of everything that the decoder takes over, in order."""
        channels = levels[0].channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([Conv2d(in_channels, channels, kernel=3, **OWN)])])
        skips = [channels]
        for level in levels:
            for _ in range(level.blocks):
                layers: list[nn.Module] = [ResBlock(channels, level.channels, **self._block)]
                channels = level.channels
                layers += [] if level.attention is None else [level.attention(channels)]
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(channels)
            if level is not levels[-1]:
                layers = [Downsample(channels)]
                if resblock_updown:
                    layers = [ResBlock(channels, channels, down=True, **self._block)]
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(channels)
        return skips

    def _build_decoder(self, skips: list[int], levels: list[Level], resblock_updown: bool) -> None:
        """Make `output_blocks`, each of which takes the last of `skips` besides."""
        self.output_blocks, channels = nn.ModuleList(), levels[-1].channels
        for level in reversed(levels):
            for i in range(level.blocks + 1):
                layers: list[nn.Module] = [ResBlock(channels + skips.pop(), level.channels, **self._block)]
                channels = level.channels
                layers += [] if level.attention is None else [level.attention(channels)]
                if level is not levels[0] and i == level.blocks:
                    up = ResBlock(channels, channels, up=True, **self._block) if resblock_updown else Upsample(channels)
                    layers.append(up)
                self.output_blocks.append(nn.ModuleList(layers))

    def forward(
        self, x: Tensor, times: Tensor, cond: Tensor | None = None, step_condition: Tensor | None = None
    ) -> Tensor:
        """Raw output for `x` `[B, C, H, W]` at `times` `[1]` or `[B]`, which may be fractions.

        `cond` is the context `[B, M, context_dim]` of transformer blocks, or labels `[1, label_dim]` or
        `[B, label_dim]`; `step_condition` (scalar, `[1]` or `[B]`) is num_steps.
        """
        if (cond is None) != (self.context_dim is None and self.label_emb is None):
            raise ValueError("a network with transformer blocks or classes needs a condition, another one takes none")
        emb = self.time_embed(self.positions(times))
        if self.label_emb is not None and cond is not None:
            emb = emb + self.label_emb(cond.to(emb.dtype))
        emb = emb.expand(x.shape[0], -1)
        step_emb = None if step_condition is None else self.embed_steps(step_condition, x.shape[0])
        context = None if self.context_dim is None or cond is None else cond.to(x.dtype)
        x, skips = arrange(x), []
        for layers in self.input_blocks:
            x = self._run(layers, x, emb, step_emb, context)
            skips.append(x)
        x = self._run(self.middle_block, x, emb, step_emb, context)
        for layers in self.output_blocks:
            x = self._run(layers, torch.cat([x, skips.pop()], dim=1), emb, step_emb, context)
        norm, _, conv = self.out
        return conv(norm(x, silu=True))

    def embed_steps(self, step_condition: Tensor, batch: int) -> Tensor:
        """Embed `num_steps` (scalar, `[1]` or `[B]`) to `[B, emb_channels]`."""
        if self.nfe_embed is None:
            raise ValueError("this network has no step-condition layers; build it with use_step_condition=True")
        return self.nfe_embed(self.positions(step_condition.reshape(-1))).expand(batch, -1)

    def _run(
        self, layers: nn.Module, x: Tensor, emb: Tensor, step_emb: Tensor | None, context: Tensor | None
    ) -> Tensor:
        arguments: tuple[Tensor | None, ...]
        for layer in layers.children():
            if isinstance(layer, ResBlock):
                arguments = (x, emb, step_emb)
            elif isinstance(layer, SpatialTransformer):
                arguments = (x, context)
            else:
                arguments = (x,)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x


def _embedding_layers(channels: int, emb_channels: int) -> nn.Sequential:
    return nn.Sequential(Linear(channels, emb_channels, **OWN), nn.SiLU(), Linear(emb_channels, emb_channels, **OWN))
