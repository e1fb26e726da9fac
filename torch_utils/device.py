"""Which device and which precision to compute with."""

import click
import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """The device that `name` asks for (`cuda`, `cuda:1`, `mps`, `cpu`); None picks the fastest there is.

    A bare `cuda` becomes the GPU of this process' `local_rank`.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.ClickException(f"--device is {name!r}; expected cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise click.ClickException(
                f"--device={name} needs GPU {index}, this machine shows {count}; use --device=cpu"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise click.ClickException("--device=mps is not available here; use --device=cpu")
    if device.type not in ("cpu", "mps"):
        raise click.ClickException(f"--device is {name!r}; expected cpu, cuda, cuda:N or mps")
    return device


def configure_backends(benchmark: bool = True) -> None:
    """Let cuDNN time its algorithms, and keep float32 exact: no TF32, and no half-precision sums."""
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def pick_precision(name: str | None, device: torch.device) -> str:
    """`name` itself, or the default of the device: fp16 on CUDA, bf16 on a CPU with native bf16, else fp32."""
    if name is not None:
        return name
    if device.type == "cuda":
        return "fp16"
    # Emulated bf16 is slower than fp32, so the CPU must have the instructions.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and native() else "fp32"
