"""Memory of a run: counted without a GPU, tried out with stand-ins for one."""

import types

import pytest
import torch
from test_distill import make_distiller
from test_guided_unet import TINY

from dnnlib import UserError
from models.building import build_on_meta
from models.precond import CFGPrecond
from models.registry import get_row
from training import cost, memory
from training.config import DistillConfig

LATENT = {k: v for k, v in TINY.items() if k not in ("in_channels", "out_channels")}


def latent_on_meta() -> CFGPrecond:
    with torch.device("meta"):
        return CFGPrecond(16, 3, 0.001, 0.02, **LATENT)


def test_storages_are_counted_while_they_live():
    given = torch.empty(1000, device="meta")
    with memory.StorageCounter() as counter:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100).t() + 1
        del a
        b.mul_(2)
        c = given.exp()
        assert counter.peak == 8000
        del b, c
        (torch.empty(1500, device="meta") + 1).sum()
    assert counter.peak == 12000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_step_is_linear_in_its_samples(checkpointing):
    net = latent_on_meta()
    sizes = [memory.step_memory(net, torch.float16, n, checkpointing) for n in (100, 200, 300)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=1e-3)
    # Weights as they are computed with are there once, not for every sample.
    assert sizes[1] - sizes[0] > 0.95 * sizes[0]


def test_memory_of_precisions_checkpointing_and_accumulation():
    net = latent_on_meta()
    exact, half = (memory.step_memory(net, dtype, 100) for dtype in (torch.float32, torch.float16))
    assert 0.45 < half / exact < 0.6
    assert memory.step_memory(net, torch.float16, 100, gradient_checkpointing=True) < 0.7 * half
    gradients = 4 * sum(p.numel() for p in net.parameters())
    again = memory.step_memory(net, torch.float16, 100, accumulates=True)
    assert 0 < again - half < 1.1 * gradients
    assert net.model.gradient_checkpointing is False


def test_what_a_run_takes_on_each_process():
    net, config = build_on_meta(get_row("emoji32")), DistillConfig("emoji32", batch=64, precision="bf16")
    size = sum(p.numel() for p in net.parameters())
    one, two = memory.run_memory(config, net, 16), memory.run_memory(config, net, 16, processes=2)
    assert one.weights == two.weights == 18 * size and one.gradients == 4 * size
    assert one.states == 10 * 64 * 3 * 32 * 32 * 4 == 2 * two.states
    assert two.gradients == 2 * one.gradients  # all of them fit in the buckets
    assert one.total == one.weights + one.gradients + one.states + one.step


@pytest.mark.slow
def test_memory_of_stable_diffusion():
    """14.4 GiB of weights and moments, 3.2 of gradients, 0.16 a sample where gradients are there already."""
    net, config = build_on_meta(get_row("ms_coco")), DistillConfig("ms_coco", batch=128, precision="fp16")
    small, large = (memory.run_memory(config, net, n, gradient_checkpointing=True) for n in (16, 32))
    assert small.weights / 2**30 == pytest.approx(14.4, abs=0.1)
    assert small.gradients / 2**30 == pytest.approx(3.2, abs=0.05)
    assert (large.step - small.step) / 16 / 2**30 == pytest.approx(0.161, abs=0.005)


def test_the_micro_batch_that_auto_will_find(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=1000))
    found = [cost._auto_micro_batch(lambda n: 100 + each * n, 128, torch.device("cuda")) for each in (1, 10, 100, 1000)]
    assert found == [128, 64, 8, 1]


# --- Trials ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"),
])  # fmt: skip
def test_a_micro_batch_is_halved_until_it_fits(error):
    tried = []

    def trial(size: int) -> None:
        tried.append(size)
        if size > 10:
            raise error

    assert memory.fitting_size(trial, 48) == 6 and tried == [48, 24, 12, 6]
    tried.clear()
    assert memory.fitting_size(trial, 35) == 7 and tried == [35, 7]

    def never(size: int) -> None:
        raise error

    with pytest.raises(UserError, match="one sample does not fit") as refused:
        memory.fitting_size(never, 8)
    assert str(error)[:15] in refused.value.message and "\n" not in refused.value.message


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    ValueError("out of memory"),
])  # fmt: skip
def test_other_errors_are_not_taken_for_a_lack_of_memory(error):
    def trial(size: int) -> None:
        raise error

    with pytest.raises(type(error), match=str(error).split(" (")[0]):
        memory.fitting_size(trial, 8)


def test_a_trial_takes_what_an_iteration_keeps_and_leaves_nothing(monkeypatch):
    distiller = make_distiller("sfd", dropout=0.0)

    def peak(size: int, share: int) -> int:
        with memory.StorageCounter() as counter:
            memory.memory_trial(distiller.teacher, distiller.student, None, share)(size)
        return counter.peak

    small, large = peak(2, 4), peak(2, 104)
    sample = 4 * distiller.student.img_channels * distiller.student.img_resolution**2
    assert large - small == (2 * distiller.config.num_steps + 2) * 100 * sample
    assert all(p.grad is None for p in distiller.trained) and not distiller.optimizer.state
    size = 4 * sum(p.numel() for p in distiller.trained)
    assert small > 3 * size  # gradients and the moments of Adam
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert peak(2, 4) - small == memory.BUCKETS
