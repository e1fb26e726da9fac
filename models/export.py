"""Students for other programs: `python -m models.export diffusers|edm|program`.

Every form holds a network without step condition. Told one number of timestamps, the branch of SFD-v modulates each
block by a constant, which goes into the layer that modulates by noise level, h (1 + s) + b being that layer's:

    (h (1 + s) + b)(1 + s') + b' = h (1 + [s (1 + s') + s']) + [b (1 + s') + b']

so a student of several NFEs is exported for one of them, exactly.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from dnnlib import make_folder, one_line_errors, replacing
from dnnlib.cli import Group, offline_option, section
from solvers import solve
from torch_utils.device import PLAIN, use_path

from .diffusers_folder import Pipeline, write_pipeline
from .edm_export import plain_network, write_edm_pickle
from .guided_unet import ResBlock
from .loading import find_student, load_student, own_latent_space, read_published, row_config
from .model import Student
from .precond import CFGPrecond, DiscreteNoise, EDMPrecond, Precond
from .registry import ROWS, get_row
from .sampling import Sampler, student_sampler
from .text import find_tokenizer
from .unet_layers import UNetBlock

INSTALL_ONNX = "pip install onnx onnxscript onnxruntime"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: An ONNX file is one message of Protocol Buffers, which has a limit.
ONNX_LIMIT = 2**31
#: How far an exported step may be from ours, beside the size of its result; float32 rounding is some 1e-6.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class OpenedStudent:
    """A student for one number of timestamps.

    Attributes:
        model: as it was loaded.
        net: its network, without step condition.
        sampler: the steps it takes.
        path: its file.
    """

    model: Student
    net: Precond
    sampler: Sampler
    path: Path

    @property
    def steps(self) -> Tensor:
        """Noise levels of the steps that evaluate the network, and the end, float64."""
        return self.sampler.sigmas[int(self.sampler.afs) :]

    @property
    def initial_scale(self) -> float:
        """Standard normal noise times this is the state at `steps[0]`; the analytical first step is part of it."""
        first, second = self.sampler.sigmas[:2].tolist()
        return first + (second - first) * first / (1 + first**2) ** 0.5 if self.sampler.afs else first

    @property
    def licence(self) -> str:
        """Of the weights it was distilled from."""
        row = ROWS.get(self.model.dataset_name)
        return "that of its teacher" if row is None else row.licence

    def record(self) -> dict[str, Any]:
        """What a file says beside the weights; JSON-serialisable."""
        return {
            "exported_from": self.path.name,
            "teacher": self.model.dataset_name,
            "licence_of_weights": self.licence,
            "num_steps": len(self.sampler.sigmas),
            "afs": self.sampler.afs,
            "sigmas": self.steps.tolist(),
            "initial_scale": self.initial_scale,
        }


def open_student(model_path: str, num_steps: int | None = None) -> OpenedStudent:
    """The student of a file, run directory or run number, for `num_steps` timestamps.

    Raises:
        click.ClickException: not a student, or one that does not serve that many.
    """
    path = find_student(model_path)
    model = load_student(path)
    sampler = student_sampler(model, num_steps)
    net = fold_step_condition(model.net, len(sampler.sigmas)) if sampler.step_condition is not None else model.net
    return OpenedStudent(model, net, sampler, path)


@torch.no_grad()
def fold_step_condition(net: Precond, num_steps: int) -> Precond:
    """The network without step-condition layers that gives what `net` gives when told `num_steps`."""
    folded = type(net)(**{**net.init_kwargs, "use_step_condition": False})
    state = {name: tensor.clone() for name, tensor in net.state_dict().items() if name in folded.state_dict()}
    embedded = net.model.embed_steps(torch.tensor([float(num_steps)]), 1)
    for name, block in net.named_modules():
        if isinstance(block, ResBlock) and block.emb_nfe_layers is not None:
            modulation = block.emb_nfe_layers(embedded)[0]
            _modulate(state, f"{name}.emb_layers.1", modulation, block.use_scale_shift_norm)
        elif isinstance(block, UNetBlock) and block.affine_step is not None:
            _modulate(state, f"{name}.affine", block.affine_step(embedded)[0], block.adaptive_scale)
    folded.load_state_dict(state)
    folded.compute_dtype = net.compute_dtype
    return folded.eval().requires_grad_(False)


def _modulate(state: dict[str, Tensor], layer: str, constant: Tensor, scales: bool) -> None:
    """Follow what `layer` does to a block by a constant modulation: scale and shift, or shift alone."""
    weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
    if not scales:
        bias += constant
        return
    scale, shift = constant.chunk(2)
    factor = (1 + scale).repeat(2)
    weight *= factor[:, None]
    bias.mul_(factor).add_(torch.cat([scale, shift]))


# ------------------------------------------------------------------------------------------------------------------
# Forms


def to_diffusers(student: OpenedStudent, dest: Path) -> None:
    """Write a student of Stable Diffusion as a folder of diffusers, see `models.diffusers_folder`."""
    net, name = student.net, student.model.dataset_name
    if not isinstance(net, CFGPrecond) or not student.model.has_text:
        raise click.ClickException(
            f"{student.path} is a student of {name}; a pipeline of diffusers is made of students of ms_coco, "
            "use `edm` or `program`"
        )
    row = get_row(name)
    config = row_config(row)
    tensors, source = read_published(row, own_latent_space(student.model.sampling, str(student.path)))
    write_pipeline(
        Pipeline(
            net,
            # A file says itself what its network is; the rest is as in the teacher.
            {**config, "network": net.init_kwargs},
            tensors,
            find_tokenizer(source),
            student.sampler.sigmas,
            student.sampler.afs,
            student.sampler.guidance_rate,
            row.licence,
            row.origin,
            student.record(),
        ),
        dest,
    )


def to_edm(student: OpenedStudent, dest: Path) -> None:
    """Write a student with an EDM network as a pickle in EDM's layout, see `models.edm_export`."""
    if not isinstance(student.net, EDMPrecond):
        raise click.ClickException(
            f"{student.path} is a student of {student.model.dataset_name}, whose network EDM's tools do not know; "
            "use `diffusers` for ms_coco, or `program`"
        )
    sampling = replace(
        student.model.sampling, num_steps=len(student.sampler.sigmas), use_step_condition=False, teacher_path=None
    )
    record = student.record()
    content = {"training_kwargs": asdict(sampling), "sigmas": record["sigmas"], "student": record}
    make_folder(dest.parent, "--dest")
    write_edm_pickle(plain_network(student.net, (sampling.sigma_min, sampling.sigma_max)), content, dest)


class StudentStep(nn.Module):
    """One Euler step of a student: state at `sigma` → state at `sigma_next`, noise levels being scalars.

    A class-conditional student takes one-hot labels `[B, label_dim]` besides; a text-conditioned one conditions
    `[B, tokens, width]` and, if its guidance rate is not 1, those of the empty caption.
    """

    def __init__(self, student: OpenedStudent) -> None:
        super().__init__()
        self.has_text, self.guidance_rate = student.model.has_text, student.sampler.guidance_rate
        self.net: nn.Module = student.net
        if isinstance(student.net, EDMPrecond):
            self.net = plain_network(student.net, (student.model.sigma_min, student.model.sigma_max))
        elif isinstance(student.net, CFGPrecond):
            student.net.noise_schedule = TableTimes(student.net.noise_schedule)  # type: ignore[assignment]  # for `step`

    def forward(self, x: Tensor, sigma: Tensor, sigma_next: Tensor, *given: Tensor) -> Tensor:
        if not self.has_text:
            clean = self.net(x, sigma, *given)
        else:
            clean = self.net(x, sigma, condition=given[0])
            if self.guidance_rate != 1:
                # What guidance does to noise it does to D = x − σ ε.
                without = self.net(x, sigma, condition=given[1])
                clean = without + self.guidance_rate * (clean - without)
        return x + (sigma_next - sigma) / sigma * (x - clean)


class TableTimes(nn.Module):
    """`DiscreteNoise.step` in operations that ONNX has too: a search becomes a count."""

    log_alphas: Tensor

    def __init__(self, noise: DiscreteNoise) -> None:
        super().__init__()
        self.steps = noise.steps
        self.register_buffer("log_alphas", noise.alphas_cumprod.log().flip(0).float() / 2)

    def step(self, sigma: Tensor) -> Tensor:
        log_alpha = -torch.log1p(sigma.float().square()) / 2
        low = ((self.log_alphas[None] < log_alpha[:, None]).sum(1) - 1).clamp(0, self.steps - 2)
        first, second = self.log_alphas[low], self.log_alphas[low + 1]
        return self.steps - 1 - (low + (log_alpha - first) / (second - first))


def example_inputs(student: OpenedStudent, batch: int) -> tuple[Tensor, ...]:
    """Arguments of `StudentStep` for its first step, from fixed random numbers."""
    rng, model = torch.Generator().manual_seed(0), student.model
    sigma, sigma_next = student.steps[:2].float()
    inputs = [torch.randn(batch, *model.shape, generator=rng) * student.initial_scale, sigma, sigma_next]
    if model.label_dim:
        inputs.append(torch.eye(model.label_dim)[torch.arange(batch) % model.label_dim])
    if student.net.context_dim is not None:
        tokens = (row_config(get_row(model.dataset_name)).get("text") or {}).get("max_position_embeddings", 77)
        count = 1 if student.sampler.guidance_rate == 1 else 2
        inputs += torch.randn(count, batch, tokens, student.net.context_dim, generator=rng)
    return tuple(inputs)


def to_program(student: OpenedStudent, dest: Path) -> float:
    """Write one step as `.pt2` (torch.export) or `.onnx`, and run it beside ours.

    Returns:
        The largest difference of the two results, relative to the largest value.

    Raises:
        click.ClickException: another suffix, packages are missing, or the program does something else.
    """
    writers = {".pt2": _write_pt2, ".onnx": _write_onnx}
    if dest.suffix not in writers:
        raise click.ClickException(f"--dest={dest} is neither a .pt2 (torch.export) nor a .onnx file")
    if dest.suffix == ".onnx":
        _need_onnx(student)
    make_folder(dest.parent, "--dest")
    student.net.compute_dtype = torch.float32
    # The first is traced; a batch of one would become part of the program.
    cases = [example_inputs(student, batch) for batch in (2, 3, 1)]
    with torch.no_grad():
        # Before the network is changed to be traced.
        expected = [_our_step(student, inputs) for inputs in cases]
        step = StudentStep(student).eval().requires_grad_(False)
        dims = tuple({0: torch.export.Dim("batch")} if t.ndim else None for t in cases[0])
        shapes = dims[:3] + (dims[3:],) * (len(dims) > 3)
        with use_path(replace(PLAIN, sdpa=True)):  # what the fast path keeps between calls is no part of a program
            exported = torch.export.export(step, cases[0], dynamic_shapes=shapes, strict=False)
    with replacing(dest) as temporary:
        run = writers[dest.suffix](exported, student.record(), temporary)
        differences = [(run(*inputs) - right).abs().max() / right.abs().max() for inputs, right in zip(cases, expected)]
        worst = float(torch.stack(differences).max())
        if not worst < TOLERANCE:
            raise click.ClickException(f"{dest} was not written: its result is off by {worst:.1g} of the largest value")
    return worst


def _our_step(student: OpenedStudent, inputs: tuple[Tensor, ...]) -> Tensor:
    """The first step of the sampler that evaluates the network, as it takes it."""
    x, given, model, sampler = inputs[0], inputs[3:], student.model, student.sampler
    arguments: dict[str, Any] = {"class_labels": given[0] if given else None}
    if model.has_text:
        arguments = dict(condition=given[0], unconditional_condition=given[-1], guidance_rate=sampler.guidance_rate)
    denoise = partial(model.denoise, step_condition=sampler.step_condition, **arguments)
    return solve(sampler.solver, denoise, x, student.steps[:2])[-1]


def _write_pt2(exported: torch.export.ExportedProgram, record: dict[str, Any], path: Path) -> Callable[..., Tensor]:
    torch.export.save(exported, path, extra_files={"sfd.json": json.dumps(record)})
    return torch.export.load(path).module()


def _need_onnx(student: OpenedStudent) -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"ONNX needs {', '.join(missing)}; run: {INSTALL_ONNX}, or write a .pt2 file")
    size = sum(p.numel() * p.element_size() for p in student.net.parameters())
    if size >= ONNX_LIMIT:
        raise click.ClickException(
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


# ------------------------------------------------------------------------------------------------------------------
# Commands


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What the forms have in common."""
    for option in (
        offline_option,
        section("Machine"),
        click.option("--num_steps", help="SFD-v: timestamps to export for; default: the student's own", type=int),
        click.option("--dest", help="Where to write", metavar="PATH", required=True, type=Path),
        click.option("--model_path", help="Student: file, run directory or run number", metavar="PATH", required=True),
        section("What to export"),
    ):
        command = option(command)
    return command


@click.group(cls=Group)
def main() -> None:
    """Write a student for other programs; docs/interchange.md says what is exact, `COMMAND --help` has examples."""


@main.command()
@_options
def diffusers(model_path: str, dest: Path, num_steps: int | None) -> None:
    """A student of Stable Diffusion as a pipeline folder with its steps in the scheduler.

    \b
    Examples:
      python -m models.export diffusers --model_path=0 --dest=sd-student
    """
    to_diffusers(open_student(model_path, num_steps), dest)
    click.echo(f"Pipeline: {dest}; how to sample it stands in {dest / 'README.md'}")


@main.command()
@_options
def edm(model_path: str, dest: Path, num_steps: int | None) -> None:
    """A student with an EDM network as a pickle for tools that expect ['ema'].

    Like every EDM pickle, it runs code where it is loaded by other programs: the source of its network.

    \b
    Examples:
      python -m models.export edm --model_path=0 --dest=student.pkl
    """
    student = open_student(model_path, num_steps)
    to_edm(student, dest)
    sigmas = ", ".join(f"{sigma:g}" for sigma in student.steps.tolist())
    click.echo(f"Pickle: {dest}; start at {student.initial_scale:g} × noise, Euler steps at {sigmas}")


@main.command()
@_options
def program(model_path: str, dest: Path, num_steps: int | None) -> None:
    """One step of a student as .pt2 (torch.export) or .onnx.

    For any batch size. ONNX needs onnx, onnxscript and onnxruntime.

    \b
    Examples:
      python -m models.export program --model_path=0 --dest=step.pt2
      python -m models.export program --model_path=0 --dest=step.onnx
    """
    student = open_student(model_path, num_steps)
    worst = to_program(student, dest)
    click.echo(f"Program: {dest}; differs from our step by {worst:.1g} of the largest value")


if __name__ == "__main__":
    one_line_errors(main)()
