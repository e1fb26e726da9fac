"""EDM's networks for inference: the source that exported pickles carry (Simple and Fast Distillation, Apache-2.0).

It needs nothing but torch. Instances are not constructed but filled: with the attributes, parameters and buffers that a
pickle holds, which have the names of NVlabs/edm. It is plain where the networks in training are fast.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution with optional resampling by two; without weights it resamples only."""

    def forward(self, x):
        pad = 0 if self.weight is None else self.weight.shape[-1] // 2
        filter_pad = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.fused and self.up and self.weight is not None:
            x = self.resampled(x, max(filter_pad - pad, 0))
            return F.conv2d(x, self.weight.to(x.dtype), bias, padding=max(pad - filter_pad, 0))
        if self.fused and self.down and self.weight is not None:
            x = F.conv2d(x, self.weight.to(x.dtype), padding=pad + filter_pad)
            return self.resampled(x, 0) + bias.reshape(1, -1, 1, 1)
        if self.up or self.down:
            x = self.resampled(x, filter_pad)
        return x if self.weight is None else F.conv2d(x, self.weight.to(x.dtype), bias, padding=pad)

    def resampled(self, x, padding):
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, kernel * 4, groups=x.shape[1], stride=2, padding=padding)
        return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)


class GroupNorm(nn.Module):
    def forward(self, x):
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionalEmbedding(nn.Module):
    def forward(self, x):
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / (half - int(self.endpoint))
        angles = torch.outer(x.to(torch.float32), (1 / self.max_positions) ** steps)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    def forward(self, x):
        angles = torch.outer(x.to(torch.float32), 2 * torch.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block, modulated by the noise level, with optional self-attention."""

    def forward(self, x, emb):
        residual = x if self.skip is None else self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + modulation))
        x = self.conv1(F.dropout(x, self.dropout, training=self.training))
        x = (x + residual) * self.skip_scale
        return (x + self.attention(self.norm2(x))) * self.skip_scale if self.num_heads else x

    def attention(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(x).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(2, 3).reshape(b, c, h, w))


class SongUNet(nn.Module):
    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        cosines, sines = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sines, cosines], dim=1)
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels * class_labels.shape[1] ** 0.5)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb)))).expand(x.shape[0], -1)
        skips, aux = [], x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) * 0.5**0.5
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        image = None
        for name, block in self.dec.items():
            if "aux_up" in name:
                image = block(image)
            elif "aux_norm" in name:
                normed = F.silu(block(x))
            elif "aux_conv" in name:
                image = block(normed) if image is None else image + block(normed)
            else:
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, emb)
        return image


class DhariwalUNet(nn.Module):
    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels)
        emb = F.silu(emb).expand(x.shape[0], -1)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class EDMPrecond(nn.Module):
    """The denoiser, called as EDM's samplers do. Labels are one-hot; the result is float32."""

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma).to(x).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        half = self.use_fp16 and not force_fp32 and x.device.type == "cuda"
        variance = sigma.square() + self.sigma_data**2
        core = (x / variance.sqrt()).to(torch.float16 if half else torch.float32)
        raw = self.model(core, sigma.log().flatten() / 4, class_labels, **model_kwargs).to(torch.float32)
        return x * self.sigma_data**2 / variance + raw * sigma * self.sigma_data / variance.sqrt()

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)
