"""A student of a diffusers folder as a folder that the stock pipeline runs, with our steps in a stock scheduler.

**Steps.** `DDIMScheduler` holds y = x / √(1 + σ²) and takes y to x_0 + σ' n, both predicted, again divided by
√(1 + σ'²): that is our Euler step. Its `trained_betas` make a table with r entries for each step. Every r-th is a noise
level of ours, and the first one is that where the last step ends; with `timestep_spacing="trailing"` and K steps it
visits exactly these.

**Scale.** The analytical first step only scales the noise n, x_1 = a n, and a pipeline starts at y_1 = n. So it holds
g y with g = √(1 + σ_1²) / a: the weights of the first layer are divided by g, the last layer is multiplied by g, and so
is the decoder's scale (with 1 / √(1 + σ²) of the last level, as it expects x). In pixel space images stay g y.

**Times.** The scheduler tells the network the K positions k_i in its table rather than our times τ_i. Both are embedded
by a fixed e(·), with more features than there are steps, so one matrix does for all of them: the layer W behind becomes
W + W (E_τ − E_k) E_k⁺, with which W' e(k_i) = W e(τ_i).

A flow is sampled by `FlowMatchEulerDiscreteScheduler`, which holds y = x / (1 + σ) and takes Euler steps in
t = σ / (1 + σ), the same ones again; its `sigmas` are our t, passed to the pipeline, and times are as they are. There
g = (1 + σ_1) / a. It always ends at σ = 0: the pipeline's last latents are the denoised ones of our last step.

The vectors of a step-conditioned student are in the biases of the layers that embed the noise level, see `fold`.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dnnlib import UserError, write_text

from ..diffusers_precond import DiffusersPrecond
from ..diffusers_space import FolderSpace
from ..noise import FlowNoise
from ..published.diffusers import read_json
from ..published.diffusers_folder import EXPORTED, NETWORK_WEIGHTS, VARIANTS, Folder, open_folder
from .card import write_card
from .diffusers import VERSION
from .student import OpenedStudent, new_folder, write_json

#: Entries of the scheduler's table for each step, so that float32 holds each ratio of neighbours well.
ENTRIES = 64
#: How far the exported network may be from ours, beside its largest output; float32 rounding is some 1e-6.
TOLERANCE = 1e-4


def to_folder(student: OpenedStudent, dest: Path) -> None:
    """Write the folder, all or nothing; `dest` must not exist.

    Raises:
        UserError: it exists, cannot be written, or the network has no such form.
    """
    net = student.net
    assert isinstance(net, DiffusersPrecond)
    if (net.is_latent or net.label_dim > 0) and net.init_kwargs["module"] == "UNet2DModel":
        kind = "latents" if net.is_latent else "classes"
        raise UserError(f"{student.path} is a UNet2DModel with {kind}, for which diffusers has no pipeline")
    teacher = open_folder(str(student.model.sampling.teacher_path)) if net.is_latent else None
    network = stock_network(student)
    with new_folder(dest) as temporary:
        part = net.model.family.part
        config = {"_class_name": net.init_kwargs["module"], "_diffusers_version": VERSION, **net.init_kwargs["config"]}
        write_json(temporary / part / "config.json", config)
        tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(tensors, str(temporary / part / f"{NETWORK_WEIGHTS}.safetensors"), metadata={"format": "pt"})
        scheduler = flow_config(student) if is_flow(student) else ddim_config(student)
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        index = {"_class_name": "DDIMPipeline"} if teacher is None else _copy_rest(student, teacher, temporary)
        index |= {"_diffusers_version": VERSION, part: ["diffusers", net.init_kwargs["module"]]}
        write_json(temporary / "model_index.json", {**index, "scheduler": ["diffusers", scheduler["_class_name"]]})
        record = {
            **student.record(),
            "state_scale": state_scale(student),
            "guidance_scale": student.sampler.plan.guidance_rate,
        }
        write_json(temporary / EXPORTED, record)
        how = _how(student, dest.name, str(index["_class_name"]))
        write_text(temporary / "README.md", write_card(student, how, "diffusers"))


def is_flow(student: OpenedStudent) -> bool:
    return isinstance(student.net.noise_schedule, FlowNoise)


def state_scale(student: OpenedStudent) -> float:
    """g."""
    first = float(student.steps[0])
    return (1 + first if is_flow(student) else math.sqrt(1 + first**2)) / student.initial_scale


def end_scale(student: OpenedStudent) -> float:
    """The pipeline's last latents are this times ours."""
    return state_scale(student) / (1 if is_flow(student) else math.sqrt(1 + float(student.steps[-1]) ** 2))


def told_times(student: OpenedStudent) -> Tensor:
    """What the scheduler tells the network at its steps, `[K]`: positions k_i in its table, or the times of a flow."""
    if isinstance(student.net.noise_schedule, FlowNoise):
        return student.net.noise_schedule.step(student.steps[:-1])
    return torch.arange(len(student.steps) - 1, 0, -1) * ENTRIES - 1


def flow_config(student: OpenedStudent) -> dict[str, Any]:
    """The configuration of the scheduler of a flow."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": student.net.init_kwargs["noise"]["num_train_timesteps"],
        "shift": 1.0,
    }


def ddim_config(student: OpenedStudent) -> dict[str, Any]:
    """The scheduler's configuration."""
    places = [*told_times(student).tolist(), 0]
    levels = (-torch.log1p(student.steps.square())).tolist()  # log ᾱ
    table = np.interp(np.arange(places[0] + 1), places[::-1], levels[::-1])
    betas = -np.expm1(np.diff(table, prepend=0.0))
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": len(table),
        "trained_betas": betas.tolist(),
        "prediction_type": student.net.init_kwargs["noise"]["prediction_type"],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": False,
        "clip_sample": False,
        "steps_offset": 1,  # unused, but pipelines of Stable Diffusion ask for it
    }


@torch.no_grad()
def stock_network(student: OpenedStudent) -> nn.Module:
    """The module of diffusers that does in the pipeline what the student's network does here.

    Raises:
        UserError: it does something else.
    """
    net: Any = student.net
    folded = type(net)(**net.init_kwargs)
    folded.load_state_dict(net.state_dict())
    network, g = folded.model.net.eval().requires_grad_(False), state_scale(student)
    network.get_submodule(net.model.family.first).weight.div_(g)
    for parameter in network.get_submodule(net.model.family.last).parameters():
        parameter.mul_(g)
    own, told = net.noise_schedule.step(student.steps[:-1].float()), told_times(student)
    for name, layer in folded.model.time_embeddings().items():
        embed = network.get_submodule(name.rpartition(".")[0]).time_proj
        weight, target, place = (t.double() for t in (layer.linear_1.weight, embed(own).T, embed(told).T))
        if not is_flow(student):
            layer.linear_1.weight.copy_(weight + weight @ (target - place) @ torch.linalg.pinv(place))
    _check(student, folded)
    return network


def _check(student: OpenedStudent, folded: DiffusersPrecond) -> None:
    """Compare the networks at the first and the last step."""
    net: Any = student.net
    rng = torch.Generator().manual_seed(0)
    y = torch.randn(1, *student.model.shape, generator=rng)
    cond = net.example_condition(1, y.device)
    g, sigmas, told = state_scale(student), student.steps[:-1].float(), told_times(student)
    for i in {0, len(told) - 1}:
        expected = g * net.model(y, net.noise_schedule.step(sigmas[i : i + 1]), cond)
        found = folded.model(g * y, told[i : i + 1].float(), cond)
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE:
            raise UserError(f"{student.path} has a network that cannot be told our steps (it is off by {error:.1g})")


def _copy_rest(student: OpenedStudent, teacher: Folder, dest: Path) -> dict[str, Any]:
    """Autoencoder, text encoders and tokenizers of the teacher's folder; what its index says of them."""
    index: dict[str, Any] = {"_class_name": _pipeline(student.net)}
    for name, kind in teacher.index().items():
        is_part = isinstance(kind, list) and re.fullmatch(r"vae|(text_encoder|tokenizer)(_\d)?", name)
        if is_part and (teacher.path / name).is_dir():
            names = shutil.ignore_patterns("*.bin", "*.msgpack", "*.onnx*", "*.h5", "*.py")
            shutil.copytree(teacher.path / name, dest / name, ignore=names)
            index[name] = kind
            _drop_variant(dest / name)
        elif name in ("id2label", "force_zeros_for_empty_prompt", "requires_safety_checker"):
            index[name] = kind
        elif isinstance(kind, list) and name not in ("unet", "transformer", "scheduler"):
            index[name] = [None, None]  # such as a checker of pictures
    config = read_json(dest / "vae" / "config.json")
    config["scaling_factor"] = FolderSpace(teacher).scaling.scale[0] * end_scale(student)
    write_json(dest / "vae" / "config.json", config)
    return index


def _pipeline(net: Any) -> str:
    """The stock pipeline of a network of latents."""
    names = {"DiTTransformer2DModel": "DiTPipeline", "SD3Transformer2DModel": "StableDiffusion3Pipeline"}
    is_sdxl = net.init_kwargs["config"].get("addition_embed_type") is not None
    return names.get(net.init_kwargs["module"], f"StableDiffusion{'XL' * is_sdxl}Pipeline")


def _drop_variant(part: Path) -> None:
    """Let half-precision weights that are the only ones have the plain name."""
    for variant in VARIANTS[1:]:
        for file in part.glob(f"*{variant}.safetensors"):
            plain = file.with_name(file.name.replace(variant, ""))
            if not plain.exists():
                file.rename(plain)


def _how(student: OpenedStudent, name: str, pipeline: str) -> str:
    """How the folder is sampled, for its card."""
    count, rate = len(student.steps) - 1, student.sampler.plan.guidance_rate
    arguments = f"num_inference_steps={count}"
    if is_flow(student):
        times = ", ".join(f"{sigma / (1 + sigma):.9g}" for sigma in student.steps[:-1].tolist())
        arguments = f"sigmas=[{times}]"
    if student.net.context_dim is not None:
        arguments = f'"a photo of a cat", {arguments}, guidance_scale={rate:g}'
    elif student.net.label_dim:
        arguments = f"class_labels=[0], {arguments}, guidance_scale={rate:g}"
    return f"""```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{name}")
image = pipe({arguments}).images[0]
```

Keep the scheduler and these steps: noise levels, times and the analytical first step are folded into network and
scheduler. The states of the pipeline are {state_scale(student):.6f} times those of the student.
"""
