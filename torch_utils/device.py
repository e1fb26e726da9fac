"""Which device, precision and memory order to compute with."""

import ctypes
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dnnlib import UserError
from dnnlib.errors import environment_number

AnyModule = TypeVar("AnyModule", bound=nn.Module)

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Parameters of glibc's mallopt: sizes from which memory comes straight from the system, or goes back to it.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


#: Devices on which the U-Nets keep the channels of a pixel side by side (channels_last).
_channels_last: frozenset[str] = frozenset({"cpu"})
_plain = False
# Neither is of a thread or context: gradient checkpointing computes layers again in autograd's own threads.


def prefers_channels_last(device: torch.device) -> bool:
    """Whether the U-Nets compute in channels_last on this device: on the CPU alone, no GPU has judged it yet."""
    return device.type in _channels_last and not _plain


@contextmanager
def channels_last_on(*device_types: str) -> Iterator[None]:
    """Within, U-Nets compute in channels_last on devices of these types, and in contiguous layout on others."""
    global _channels_last
    before, _channels_last = _channels_last, frozenset(device_types)
    try:
        yield
    finally:
        _channels_last = before


def is_plain() -> bool:
    """Whether networks compute as they are written, see `plain_operations`."""
    return _plain


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within, networks compute as they are written, in contiguous layout: so they are traced, and counted."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def pick_device(name: str | None = None) -> torch.device:
    """The device that `name` asks for (`cuda`, `cuda:1`, `mps`, `cpu`); None picks CUDA if it is there, else the CPU.

    MPS has to be asked for: nothing here has been run on it yet. A bare `cuda` becomes this process' own GPU.
    """
    local_rank = environment_number("LOCAL_RANK", 0)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{name!r} is no device; expected cpu, cuda, cuda:N or mps", "device") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        processes = environment_number("LOCAL_WORLD_SIZE", 1)
        if processes > 1 and device.index is not None:
            raise UserError(f"{name} is one GPU for {processes} processes; leave the number out", "device")
        if processes > count > 0:
            raise UserError(f"{processes} processes for {count} GPUs; start at most one for each, or use cpu", "device")
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise UserError(f"{name} needs GPU {index}, this machine shows {count}; use cpu", "device")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("mps is not available here; use cpu", "device")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"{name!r} is no device; expected cpu, cuda, cuda:N or mps", "device")
    return device


def moved_to(device: torch.device, module: AnyModule) -> AnyModule:
    """`module` on `device`. Nothing is done to one that is there: layers that are moved forget their cast weights."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return module if all(tensor.device == device for tensor in tensors) else module.to(device)


def configure_backends(benchmark: bool = True) -> None:
    """Set the process up: cuDNN times its algorithms, float32 is exact (no TF32, no half-precision sums), see below."""
    share_cores()
    keep_freed_memory()
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def use_deterministic_algorithms() -> None:
    """Of every operation the variant that gives equal bits for equal input; an error where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when first used
    torch.backends.cudnn.benchmark = False  # timing chooses among algorithms by chance
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


def pick_precision(name: str | None, device: torch.device) -> str:
    """`name` itself, or the default of the device: fp16 on CUDA, bf16 on a CPU with native bf16, else fp32."""
    if name is not None:
        return name
    if device.type == "cuda":
        return "fp16"
    # Emulated bf16 is slower than fp32, so the CPU must have the instructions.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and native() else "fp32"


@contextmanager
def tensor_floats(allowed: bool) -> Iterator[None]:
    """Within, whether CUDA may round the factors of float32 products to TF32, 10 bits of mantissa: far faster."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cublas.allow_tf32
    try:
        cudnn.allow_tf32 = cublas.allow_tf32 = allowed
        yield
    finally:
        cudnn.allow_tf32, cublas.allow_tf32 = before


def share_cores() -> int:
    """Under torchrun, give this process its share of the cores, unless the user set `OMP_NUM_THREADS`.

    torchrun sets it to 1 where the user did not, which leaves most of a workstation idle. Returns the threads of this
    process.
    """
    if environment_number("LOCAL_WORLD_SIZE", 1) > 1 and not _chose_threads():
        torch.set_num_threads(own_cores())
    return torch.get_num_threads()


def own_cores() -> int:
    """Cores that this process may use, or its share of them beside the other processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // environment_number("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Under glibc, keep freed memory for the next tensor; the system clears every page that it hands out again."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the highest value that glibc takes
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _chose_threads() -> bool:
    """Whether `OMP_NUM_THREADS` is the user's: another value than torchrun's, or in what torchrun was started with."""
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return True
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with.split(b"\0"))
