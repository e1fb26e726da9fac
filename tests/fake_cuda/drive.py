"""Runs the program with every tensor on a fake `cuda`: `python tests/fake_cuda/drive.py GUARD WHAT`.

WHAT is a data set, whose published network goes through all stages of the benchmark, or `evaluation`: LPIPS and the
features of the Inception network. Prints a JSON object: for each stage its kernels, what crossed between the host and
the device. A mixture of devices, and a value that the host reads, is an error.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from kernels import KernelCounter  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from models.detectors.inception import InceptionV3  # noqa: E402
from models.detectors.lpips import LPIPS  # noqa: E402
from models.registry import get_row  # noqa: E402
from training import bench  # noqa: E402
from training.config import DistillConfig  # noqa: E402

CUDA = torch.device("cuda", 0)
BATCH = 4


class FakeCuda(KernelCounter):
    """Tensors on `cuda` are fake, those on the CPU are real. Counts the kernels of the first kind.

    Attributes:
        crossings: copies between the two, by direction and shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.crossings = FakeTensorMode(allow_non_fake_inputs=True), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = kwargs.get("device")
        if not any(isinstance(t, FakeTensor) for t in given) and torch.device(device or "cpu").type != "cuda":
            return func(*args, **kwargs)
        with self.fake:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        # A number as a tensor goes with the launch.
        places = {t.device.type for t in (*given, *made) if t.ndim or t.device.type == "cuda"}
        if len(places) > 1 and func.overloadpacket.__name__ != "empty_like":
            self.crossings.append(f"{func.overloadpacket.__name__} {[(t.device.type, list(t.shape)) for t in given]}")
        return out


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel that CUDA would choose, which asks for the channels of a head side by side."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "attention falls to products and a softmax"
    keeps_sums = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, keeps_sums)[0]


def run(cuda: FakeCuda, name: str, action: Any) -> dict[str, Any]:
    cuda.kernels.clear()
    cuda.crossings.clear()
    action()
    return {"stage": name, "kernels": cuda.total, "crossings": list(cuda.crossings)}


def network(cuda: FakeCuda, name: str) -> dict[str, Any]:
    row = get_row(name)
    schedule: dict[str, Any] = dict(schedule_type="discrete", schedule_rho=1) if row.text else {}
    config = DistillConfig(name, batch=BATCH, precision="fp16", **schedule)
    setup = bench.make_setup(bench.random_teacher(row, CUDA), config)
    actions = bench.network_stages(setup, config)
    for stage in ("training iteration", "decoding"):
        # The first time frozen weights are cast, and it is found out which trained ones are; the decoder is read.
        actions.get(stage, lambda: None)()
    stages = [run(cuda, stage, action) for stage, action in actions.items()]
    trained = setup.distiller.trained
    return {
        "stages": stages,
        "optimizer": type(setup.distiller.optimizer).__name__,
        "gradients": sorted({str(p.grad.dtype) for p in trained if p.grad is not None}),
        "without_gradient": sum(p.grad is None for p in trained),
        "devices": sorted({p.device.type for p in setup.distiller.student.parameters()}),
    }


def evaluation(cuda: FakeCuda) -> dict[str, Any]:
    lpips = {mode: LPIPS(mode).to(CUDA) for mode in ("reference", "standard")}
    inception = InceptionV3().eval().requires_grad_(False).to(CUDA)
    images = torch.empty(BATCH, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    x = torch.empty(BATCH, 3, 32, 32, device=CUDA, requires_grad=True)
    actions = {f"LPIPS, {mode}": lambda net=net: net(x, x.detach()).sum().backward() for mode, net in lpips.items()}
    actions["Inception features"] = lambda: inception(images)
    stages = [run(cuda, stage, action) for stage, action in actions.items()]
    return {"stages": stages, "gradients": [str(x.grad.dtype)], "devices": [x.grad.device.type]}


def main() -> None:
    torch.set_num_threads(1)
    patches = (
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "empty_cache", lambda: None),
        mock.patch.object(bench, "fill_randomly", lambda module: None),
        mock.patch.object(bench, "to_uint8", lambda images: images),
        mock.patch.object(F, "scaled_dot_product_attention", fused),
    )
    for patch in patches:
        patch.start()
    with FakeCuda() as cuda:
        found = evaluation(cuda) if sys.argv[2] == "evaluation" else network(cuda, sys.argv[2])
    print(json.dumps(found), flush=True)
    os._exit(0)  # threads of autograd would look for the device


if __name__ == "__main__":
    main()
