"""The two U-Nets of EDM: `SongUNet` (DDPM++, NCSN++) and `DhariwalUNet` (ADM).

Song et al. 2021 (arXiv 2011.13456), Dhariwal & Nichol 2021 (arXiv 2105.05233), as parameterised by Karras et al. 2022
(arXiv 2206.00364, appendix F). Constructor arguments, parameter names and shapes are those that EDM pickles record, so
a published state dict loads strictly. EDM2's network has the same levels of other blocks. The step-condition branch of
SFD-v exists only with `use_step_condition=True`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import arrange
from .embeddings import FourierEmbedding, PositionalEmbedding
from .initial import kaiming_normal, kaiming_uniform, xavier_uniform, zeros
from .layers import Conv2d, GroupNorm, Linear, UNetBlock


class LevelledUNet(nn.Module, ABC):
    """A U-Net whose encoder goes down through resolutions that halve, and whose decoder comes up again.

    A subclass says what a block is, and calls `_build_levels`. The decoder's blocks whose names have `block` take over
    what the encoder made.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    use_step_condition: bool
    #: What all residual blocks are built with.
    _block: dict[str, Any]
    #: Whether every decoder block of an attention resolution attends, or the last one only.
    _attends_throughout = True

    @abstractmethod
    def _make_block(self, in_channels: int, out_channels: int, is_encoder: bool, **kind: Any) -> nn.Module:
        """A residual block; `kind` is one of `up`, `down` and `attention`, or nothing."""

    def _build_levels(
        self,
        stem: nn.Module,
        channels: int,
        widths: Sequence[int],
        img_resolution: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
    ) -> int:
        """Make `enc`, from the `stem` of so many `channels` on, and `dec`; returns the channels of the last block."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips = [channels]
        for level, width in enumerate(widths):
            size = img_resolution >> level
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = stem
            else:
                self.enc[f"{name}_down"] = self._make_block(channels, channels, True, down=True)
                self._add_encoder_aux(name, channels)
                skips.append(channels)
            for i in range(num_blocks):
                block = self._make_block(channels, width, True, attention=size in attn_resolutions)
                self.enc[f"{name}_block{i}"] = block
                channels = width
                skips.append(channels)
        for level in range(len(widths) - 1, -1, -1):
            size = img_resolution >> level
            name = f"{size}x{size}"
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = self._make_block(channels, channels, False, attention=True)
                self.dec[f"{name}_in1"] = self._make_block(channels, channels, False)
            else:
                self.dec[f"{name}_up"] = self._make_block(channels, channels, False, up=True)
            for i in range(num_blocks + 1):
                attention = size in attn_resolutions and (self._attends_throughout or i == num_blocks)
                block = self._make_block(channels + skips.pop(), widths[level], False, attention=attention)
                self.dec[f"{name}_block{i}"] = block
                channels = widths[level]
            self._add_decoder_aux(name, is_first=level == len(widths) - 1, is_last=level == 0, channels=channels)
        return channels

    def _add_encoder_aux(self, name: str, channels: int) -> None:
        """Layers beside the encoder at a lower resolution, for a subclass that has them."""

    def _add_decoder_aux(self, name: str, is_first: bool, is_last: bool, channels: int) -> None:
        """Layers beside the decoder at the end of a resolution, for a subclass that has them."""


class _UNet(LevelledUNet):
    """What both U-Nets share: the way through the levels, and the step-condition mapping."""

    label_dropout: float

    def _make_block(self, in_channels: int, out_channels: int, is_encoder: bool, **kind: Any) -> UNetBlock:
        return UNetBlock(in_channels, out_channels, **kind, **self._block)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        step_condition: Tensor | None = None,
    ) -> Tensor:
        """Raw network output F for `x` `[B, C, H, W]` and `noise_labels` `[1]` or `[B]`."""
        x = arrange(x)
        emb = self._embed(noise_labels, class_labels, augment_labels).expand(x.shape[0], -1)
        step_emb = None if step_condition is None else self.embed_steps(step_condition, x.shape[0])
        x, skips = self._encode(x, emb, step_emb)
        return self._decode(x, skips, emb, step_emb)

    @abstractmethod
    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """`[1 or B, emb_channels]` of everything but the step condition."""

    def _encode(self, x: Tensor, emb: Tensor, step_emb: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The last features, and those that the decoder takes over."""
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                x = block(x, emb, step_emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        return x, skips

    @abstractmethod
    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor, step_emb: Tensor | None) -> Tensor:
        """The output `[B, out_channels, H, W]`."""

    def _build_step_mapping(self, embedding: nn.Module, channels: int, init: dict[str, Any]) -> None:
        self.map_step = embedding
        self.map_step_layer0 = Linear(channels, self._block["emb_channels"], **init)
        self.map_step_layer1 = Linear(self._block["emb_channels"], self._block["emb_channels"], **init)

    def embed_steps(self, step_condition: Tensor, batch: int) -> Tensor:
        """Embed `num_steps` (scalar, `[1]` or `[B]`) to `[B, emb_channels]`."""
        if not self.use_step_condition:
            raise ValueError("this network has no step-condition layers; build it with use_step_condition=True")
        emb = F.silu(self.map_step_layer0(self.map_step(step_condition.reshape(-1))))
        return F.silu(self.map_step_layer1(emb)).expand(batch, -1)

    def _label_input(self, class_labels: Tensor) -> Tensor:
        """Drop whole label rows while training, so that a model can learn to do without them."""
        if self.training and self.label_dropout:
            keep = torch.rand([len(class_labels), 1], device=class_labels.device) >= self.label_dropout
            class_labels = class_labels * keep.to(class_labels.dtype)
        return class_labels


class SongUNet(_UNet):
    """DDPM++ (`positional`, `standard`, `standard`) and NCSN++ (`fourier`, `residual`, `standard`).

    Args:
        img_resolution: height and width at input and output.
        in_channels, out_channels: colour channels.
        label_dim: number of classes, 0 for an unconditional model.
        augment_dim: length of the augmentation label, 0 for none.
        model_channels, channel_mult: width, and its multiplier per resolution.
        channel_mult_emb, channel_mult_noise: widths of the embeddings, as multiples of `model_channels`.
        num_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention.
        dropout, label_dropout: probabilities.
        embedding_type: `positional` or `fourier`.
        encoder_type: `standard`, `skip` or `residual`; decoder_type: `standard` or `skip`.
        resample_filter: taps of the resampling filter.
        use_step_condition: add the branch that embeds `step_condition`.
    """

    _attends_throughout = False

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        use_step_condition: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check_choice("decoder_type", decoder_type, ("standard", "skip"))
        self.label_dropout, self.use_step_condition = label_dropout, use_step_condition
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init = xavier_uniform()
        self._encoder_type, self._decoder_type = encoder_type, decoder_type
        self._aux_channels, self._out_channels = in_channels, out_channels
        self._taps = resample_filter
        self._block = dict(
            emb_channels=emb_channels,
            num_heads=1,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
            use_step_condition=use_step_condition,
            init=init,
            init_last=xavier_uniform(1e-5),
            init_attention=xavier_uniform(math.sqrt(0.2)),
        )

        def embedding() -> nn.Module:  # the published weights expect sines before cosines
            if embedding_type == "positional":
                return PositionalEmbedding(noise_channels, endpoint=True, sines_first=True)
            return FourierEmbedding(noise_channels, sines_first=True)

        self.map_noise = embedding()
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        if use_step_condition:
            self._build_step_mapping(embedding(), noise_channels, dict(init=init))
        widths = [model_channels * m for m in channel_mult]
        stem = Conv2d(in_channels, model_channels, kernel=3, init=init)
        self._build_levels(stem, model_channels, widths, img_resolution, num_blocks, attn_resolutions)

    def _add_encoder_aux(self, name: str, channels: int) -> None:
        caux, init = self._aux_channels, self._block["init"]
        if self._encoder_type == "skip":
            self.enc[f"{name}_aux_down"] = Conv2d(caux, caux, kernel=0, down=True, resample_filter=self._taps)
            self.enc[f"{name}_aux_skip"] = Conv2d(caux, channels, kernel=1, init=init)
        if self._encoder_type == "residual":
            self.enc[f"{name}_aux_residual"] = Conv2d(
                caux, channels, kernel=3, init=init, down=True, fused=True, resample_filter=self._taps
            )
            self._aux_channels = channels

    def _add_decoder_aux(self, name: str, is_first: bool, is_last: bool, channels: int) -> None:
        out = self._out_channels
        if self._decoder_type == "skip" and not is_first:
            self.dec[f"{name}_aux_up"] = Conv2d(out, out, kernel=0, up=True, resample_filter=self._taps)
        if self._decoder_type == "skip" or is_last:
            self.dec[f"{name}_aux_norm"] = GroupNorm(channels, eps=1e-6)
            self.dec[f"{name}_aux_conv"] = Conv2d(channels, out, kernel=3, init=self._block["init_last"])

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self._label_input(class_labels) * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor, step_emb: Tensor | None) -> Tensor:
        image: Any = None  # images from the first aux_conv on
        for name, block in self.dec.items():
            if "aux_up" in name:
                image = block(image)
            elif "aux_norm" in name:
                normed = block(x, silu=True)
            elif "aux_conv" in name:
                image = block(normed) if image is None else image + block(normed)
            else:
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, emb, step_emb)
        return image


class DhariwalUNet(_UNet):
    """ADM. Arguments as `SongUNet`'s; attention heads have 64 channels and labels enter after the noise mapping."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        use_step_condition: bool = False,
    ) -> None:
        super().__init__()
        self.label_dropout, self.use_step_condition = label_dropout, use_step_condition
        emb_channels = model_channels * channel_mult_emb
        third = kaiming_uniform(math.sqrt(1 / 3))
        own: dict[str, Any] = dict(init=third, init_bias=third)
        self._block = dict(
            emb_channels=emb_channels, dropout=dropout, use_step_condition=use_step_condition, init_last=zeros, **own
        )
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=zeros) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **own)
        self.map_layer1 = Linear(emb_channels, emb_channels, **own)
        label_init = kaiming_normal(math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=label_init) if label_dim else None
        if use_step_condition:
            self._build_step_mapping(PositionalEmbedding(model_channels), model_channels, own)
        widths = [model_channels * m for m in channel_mult]
        stem = Conv2d(in_channels, widths[0], kernel=3, **own)
        cout = self._build_levels(stem, widths[0], widths, img_resolution, num_blocks, attn_resolutions)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, kernel=3, init=zeros)

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self._label_input(class_labels))
        return F.silu(emb)

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor, step_emb: Tensor | None) -> Tensor:
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb, step_emb)
        return self.out_conv(self.out_norm(x, silu=True))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
