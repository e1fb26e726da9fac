"""Distance by the features of a teacher's own encoder, and a second stage that trains with it."""

from __future__ import annotations

import pytest
import torch
from tiny import only_run, second_stage, student

from dnnlib import UserError
from models.detectors.encoder import EncoderDistance
from models.loading import load_student
from training.config import DistillConfig, check


def test_distance_is_zero_only_for_equals_has_gradients_and_leaves_no_hooks():
    model = load_student(student("seven"))
    distance = EncoderDistance(model)
    x, y = torch.randn([2, 2, *model.shape], generator=torch.Generator().manual_seed(0))
    assert distance(x, x).tolist() == [0, 0]
    x.requires_grad_()
    found = distance(x, y)
    assert found.shape == (2,) and bool((found > 0).all()) and bool((found <= 4).all())
    torch.testing.assert_close(found, distance(y, x.detach()))
    found.sum().backward()
    assert x.grad is not None and float(x.grad.abs().min(dim=0).values.max()) > 0
    assert not any(module._forward_hooks for module in model.net.modules())


def test_a_network_without_encoder_is_refused():
    model = load_student(student("seven"))
    del model.net.model.enc
    with pytest.raises(UserError, match="has no encoder whose features could be compared"):
        EncoderDistance(model)


def test_second_stage_trains_with_it_and_the_first_refuses_it(tmp_path):
    weights = []
    for lpips in ("teacher", "off"):
        second_stage(student("seven"), outdir=tmp_path / lpips, total_kimg=0.008, lpips=lpips).ok()
        net = load_student(only_run(tmp_path / lpips)).net
        weights.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert not torch.equal(*weights)
    with pytest.raises(UserError, match="--lpips=teacher is a loss of the second stage"):
        check(DistillConfig("tiny", lpips="teacher"))
