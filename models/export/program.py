"""A step of a student as a program: torch.export and ONNX."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib import UserError, make_folder, replacing
from solvers import solve
from torch_utils.device import plain_operations

from ..building import row_config
from ..diffusers_precond import DiffusersPrecond
from ..guidance import Denoiser, guided
from ..registry import get_row
from .student import OpenedStudent

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: An ONNX file is one message of Protocol Buffers, which has a limit.
ONNX_LIMIT = 2**31
#: How far an exported step may be from ours, beside the size of its result; float32 rounding is some 1e-6.
TOLERANCE = 1e-4


class StudentStep(nn.Module):
    """One Euler step of a student: state at `sigma` → state at `sigma_next`, noise levels being scalars.

    A class-conditional student takes one-hot labels `[B, label_dim]` besides; a text-conditioned one conditions
    `[B, tokens, width]` and, if its guidance rate is not 1, those of the empty caption.
    """

    def __init__(self, student: OpenedStudent) -> None:
        super().__init__()
        self.has_text, self.guidance_rate = student.model.has_text, student.sampler.plan.guidance_rate
        self.net = student.net

    def forward(self, x: Tensor, sigma: Tensor, sigma_next: Tensor, *cond: Tensor) -> Tensor:
        conditional: Denoiser = self.net
        unconditional: Denoiser = self.net
        if self.has_text:
            conditional, unconditional = (partial(self.net, condition=each) for each in (cond[0], cond[-1]))
        elif cond:
            conditional = partial(self.net, class_labels=cond[0])
        clean = guided(conditional, unconditional, self.guidance_rate)(x, sigma)
        return x + (sigma_next - sigma) / sigma * (x - clean)


def example_inputs(student: OpenedStudent, batch: int) -> tuple[Tensor, ...]:
    """Arguments of `StudentStep` for its first step, from fixed random numbers."""
    rng, model = torch.Generator().manual_seed(0), student.model
    sigma, sigma_next = student.steps[:2].float()
    inputs = [torch.randn(batch, *model.shape, generator=rng) * student.initial_scale, sigma, sigma_next]
    if model.label_dim:
        inputs.append(torch.eye(model.label_dim)[torch.arange(batch) % model.label_dim])
    if student.net.context_dim is not None:
        tokens = (row_config(get_row(model.dataset_name)).get("text") or {}).get("max_position_embeddings", 77)
        count = 1 if student.sampler.plan.guidance_rate == 1 else 2
        inputs += torch.randn(count, batch, tokens, student.net.context_dim, generator=rng)
    return tuple(inputs)


def to_program(student: OpenedStudent, dest: Path) -> float:
    """Write one step as `.pt2` (torch.export) or `.onnx`, and run it beside ours.

    Returns:
        The largest difference of the two results, relative to the largest value.

    Raises:
        UserError: another suffix, packages are missing, or the program does something else.
    """
    writers = {".pt2": _write_pt2, ".onnx": _write_onnx}
    if dest.suffix not in writers:
        raise UserError(f"{dest} is neither a .pt2 (torch.export) nor a .onnx file", "dest")
    if isinstance(student.net, DiffusersPrecond) and student.net.context_dim is not None:
        raise UserError(
            f"{student.path} takes captions by text encoders of diffusers; export it as a folder: `diffusers`"
        )
    if dest.suffix == ".onnx":
        _need_onnx(student)
    make_folder(dest.parent, "dest")
    student.net.compute_dtype = torch.float32
    # The first is traced; a batch of one would become part of the program.
    cases = [example_inputs(student, batch) for batch in (2, 3, 1)]
    with torch.no_grad():
        # Before the network is changed to be traced.
        expected = [_our_step(student, inputs) for inputs in cases]
        step = StudentStep(student).eval().requires_grad_(False)
        # Diffusers does something else for larger ones, which a program cannot.
        batch = torch.export.Dim("batch", max=63 if isinstance(student.net, DiffusersPrecond) else None)
        dims = tuple({0: batch} if t.ndim else None for t in cases[0])
        shapes = dims[:3] + (dims[3:],) * (len(dims) > 3)
        with plain_operations():
            exported = torch.export.export(step, cases[0], dynamic_shapes=shapes, strict=False)
    with replacing(dest) as temporary:
        run = writers[dest.suffix](exported, student.record(), temporary)
        differences = [(run(*inputs) - right).abs().max() / right.abs().max() for inputs, right in zip(cases, expected)]
        worst = float(torch.stack(differences).max())
        if not worst < TOLERANCE:
            raise UserError(f"{dest} was not written: its result is off by {worst:.1g} of the largest value")
    return worst


def _our_step(student: OpenedStudent, inputs: tuple[Tensor, ...]) -> Tensor:
    """The first step of the sampler that evaluates the network, as it takes it."""
    x, cond, model, sampler = inputs[0], inputs[3:], student.model, student.sampler
    conditions: dict[str, Any] = {"class_labels": cond[0] if cond else None}
    if model.has_text:
        conditions = dict(condition=cond[0], unconditional_condition=cond[-1])
    conditions |= dict(guidance_rate=sampler.plan.guidance_rate, step_condition=sampler.step_condition)
    denoise = partial(model.denoise, **conditions)
    return solve(sampler.plan.solver, denoise, x, student.steps[:2])[-1]


def _write_pt2(exported: torch.export.ExportedProgram, record: dict[str, Any], path: Path) -> Callable[..., Tensor]:
    torch.export.save(exported, path, extra_files={"sfd.json": json.dumps(record)})
    return torch.export.load(path).module()


def _need_onnx(student: OpenedStudent) -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; run: pip install {' '.join(missing)}, or write a .pt2 file")
    size = sum(p.numel() * p.element_size() for p in student.net.parameters())
    if size >= ONNX_LIMIT:
        raise UserError(
            f"the network takes {size / 1e9:.1f} GB, and an ONNX file at most {ONNX_LIMIT / 1e9:.1f}; write a .pt2 file"
        )


def _write_onnx(exported: torch.export.ExportedProgram, record: dict[str, Any], path: Path) -> Callable[..., Tensor]:
    import onnxruntime

    program: Any = torch.onnx.export(exported, dynamo=True, verbose=False)
    program.model.metadata_props["sfd"] = json.dumps(record)
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})[0]
    )
