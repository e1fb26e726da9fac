"""Guidance: its formula, for labels, and what it costs."""

import pytest
import torch

from models.guidance import guided
from models.model import DiffusionModel
from models.precond import EDMPrecond

NETWORK = dict(img_resolution=8, img_channels=3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])


def model(label_dim: int) -> DiffusionModel:
    torch.manual_seed(0)
    net = EDMPrecond(**NETWORK, label_dim=label_dim, model_type="DhariwalUNet").eval().requires_grad_(False)
    for param in net.parameters():
        param.add_(0.1 * torch.randn_like(param))  # what is new ends in zeros
    return DiffusionModel(net, "tiny", 0.002, 80.0)


def test_the_formula():
    x, sigma = torch.randn(2, 3), torch.tensor(2.0)
    denoise = guided(lambda x, s: x / s, lambda x, s: x * s, 3.0)
    torch.testing.assert_close(denoise(x, sigma), 3 * (x / sigma) - 2 * (x * sigma))
    assert guided(denoise, None, 1.0) is denoise


def test_labels_are_guided_by_zero_labels():
    teacher, x, sigma = model(4), torch.randn(3, 3, 8, 8), torch.tensor([0.3, 2.0, 20.0])
    labels = torch.eye(4)[[2, 0, 3]]
    free, bound = (teacher.denoise(x, sigma, y) for y in (torch.zeros(3, 4), labels))
    assert (bound - free).abs().max() > 1e-3
    torch.testing.assert_close(teacher.denoise(x, sigma, labels, guidance_rate=2.5), free + 2.5 * (bound - free))
    assert torch.equal(teacher.denoise(x, sigma, labels, guidance_rate=1.0), bound)
    assert torch.equal(teacher.denoise(x, sigma, labels), bound)
    torch.testing.assert_close(teacher.denoiser(labels, 2.5)(x, sigma), free + 2.5 * (bound - free))


def test_an_unconditional_model_takes_no_guidance_and_no_conditions():
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no conditions"):
        model(0).denoise(x, 1.0, guidance_rate=2.0)
    with pytest.raises(ValueError, match="no classes"):
        model(0).denoise(x, 1.0, torch.ones(1, 4))
    with pytest.raises(ValueError, match="no text"):
        model(4).denoise(x, 1.0, condition=torch.ones(1, 2, 4))
