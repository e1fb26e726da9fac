"""Kernels of published networks, counted without a GPU: in half precision and contiguous layout, as GPUs compute."""

import copy

import pytest
import torch
from kernels import KernelCounter

from models.building import build_on_meta
from models.networks.group_norm import GroupNormFunction
from models.networks.layers import freeze
from models.registry import get_row
from torch_utils.device import channels_last_on
from training.inputs import random_inputs

META = torch.device("meta")
#: At most so many in an evaluation without gradients, and in a forward and a backward pass in training. At commit 13fa59e:
#: 641, 1076 and 1126 for cifar10, 1054, 1502 and 1726 for imagenet64, 821, 1338 and 1687 for ms_coco.
CEILINGS = {"cifar10": (450, 580, 630), "imagenet64": (670, 850, 1080), "ms_coco": (740, 750, 1070)}


@pytest.mark.parametrize("name", [
    "cifar10", *(pytest.param(name, marks=pytest.mark.slow) for name in ("imagenet64", "ms_coco")),
])  # fmt: skip
def test_kernels_stay_below_their_ceilings(name):
    net = build_on_meta(get_row(name))
    net.compute_dtype = torch.float16
    trained = copy.deepcopy(net).train().requires_grad_(True)
    frozen, inputs = freeze(net), random_inputs(net, 2, META)
    found = []
    for _ in range(2):  # the first time weights are cast
        trained.zero_grad(set_to_none=True)
        with torch.no_grad(), KernelCounter() as evaluation:
            frozen(**inputs)
        with KernelCounter() as forward:
            out = trained(**inputs)
        with KernelCounter() as backward:
            out.backward(torch.ones_like(out))
        found = [counter.total for counter in (evaluation, forward, backward)]
    assert all(0 < count <= ceiling for count, ceiling in zip(found, CEILINGS[name])), found
    assert "_safe_softmax" not in evaluation.kernels  # attention is fused


@pytest.mark.parametrize("batch", [2, 512])
def test_the_group_norm_of_channels_last_is_one_part_off_the_cpu(batch):
    x = torch.empty([batch, 256, 32, 32], device=META, dtype=torch.float16).to(memory_format=torch.channels_last)
    weight, bias = torch.empty([2, 256], device=META)
    with channels_last_on("meta"), KernelCounter() as counter:
        GroupNormFunction.apply(x, weight, bias, None, 32, 1e-5, True)
    assert counter.total < 40
