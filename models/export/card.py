"""Model cards: what an exported student is, where it comes from, what was measured, and how to sample it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dnnlib import format_count, parse_json, sha256_of

from ..model import VARIABLE_STEPS
from ..registry import ROWS
from .student import OpenedStudent


def write_card(student: OpenedStudent, how: str, library: str) -> str:
    """The text of a card, Markdown with the metadata that the Hugging Face Hub reads.

    Args:
        student: what is exported.
        how: a paragraph or code block that says how to sample the export.
        library: that loads it, for the Hub.
    """
    settings, row = student.model.sampling, ROWS.get(student.model.dataset_name)
    counts = VARIABLE_STEPS if settings.is_variable else (settings.num_steps,)
    nfes = " / ".join(str(replace(settings.plan, num_steps=n).nfe) for n in counts)
    metadata = {
        "license": "other" if row is None else row.licence.lower().replace(" ", "-"),
        "library_name": library,
        "pipeline_tag": "text-to-image" if student.model.has_text else "unconditional-image-generation",
        "tags": "[diffusion, distillation, few-step]",
    }
    facts = {
        "teacher": student.model.dataset_name + ("" if row is None else f" ({row.origin})"),
        "network": f"{format_count(sum(p.numel() for p in student.net.parameters()))} parameters",
        "network evaluations per image": nfes,
        "timestamps": " / ".join(map(str, counts)),
        "schedule": f"{settings.schedule_type}, rho {settings.schedule_rho:g}, sigma {settings.sigma_max:g} to "
        f"{settings.sigma_min:g}",
        "analytical first step": "yes" if settings.afs else "no",
        "guidance in sampling": f"{settings.plan.guidance_rate:g}" if settings.plan.guidance_rate != 1 else "none",
        "guidance of the teacher": f"{settings.training_guidance_rate:g}"
        if settings.training_guidance_rate != 1
        else "none",
        "classes": str(student.model.label_dim or "none"),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in metadata.items()), "---"]
    lines += [f"# Few-step student of {student.model.dataset_name}", ""]
    lines += [
        "Distilled by Simple and Fast Distillation (SFD, [arXiv 2409.19681](https://arxiv.org/abs/2409.19681)).",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    lines += ["", "## Sampling", "", how.strip(), "", "## Numbers", "", *_numbers(student.path), "", "## Licence", ""]
    lines.append(f"A derivative of its teacher's weights, whose licence is {student.licence}.")
    return "\n".join(lines) + "\n"


def _numbers(path: Path) -> list[str]:
    """What `metrics.jsonl` beside a student's file says of this very file, as a table."""
    rows = {}
    for record in _records(path.with_name("metrics.jsonl")):
        sampler = record.get("sampler")
        if isinstance(sampler, dict) and sampler.get("sha256") == sha256_of(path):
            images, reference = record.get("N"), f"{record.get('reference')}, {record.get('reference_N')} images"
            key = (record.get("metric"), sampler.get("nfe", record.get("nfe")), images, reference)
            rows[key] = record.get("value")
    if not rows:
        return ["None recorded with this file."]
    lines = ["| metric | NFE | images | reference | value |", "|---|---|---|---|---|"]
    return lines + [
        f"| {metric} | {nfe} | {images} | {reference} | {value:.4g} |"
        for (metric, nfe, images, reference), value in rows.items()
        if isinstance(value, (int, float))
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; lines that are none are passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


# ------------------------------------------------------------------------------------------------------------------
# How the forms are sampled


def how_to_sample_program(student: OpenedStudent, name: str) -> str:
    """Code that samples an exported step, `name` being a `.pt2` or `.onnx` file."""
    model = student.model
    shape, more = f"16, {', '.join(map(str, model.shape))}", ", labels" * bool(model.label_dim)
    if model.has_text:
        more = ", condition" + ", empty" * (student.sampler.plan.guidance_rate != 1)
    labels = f"labels = {{}}.eye({model.label_dim}){{}}[{{}}.arange(16) % {model.label_dim}]\n" * bool(model.label_dim)
    if name.endswith(".onnx"):
        code = f"""import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{name}")
names = [value.name for value in session.get_inputs()]
sfd = json.loads(session.get_modelmeta().custom_metadata_map["sfd"])
{labels.format("np", "", "np")}x = np.random.default_rng(0).standard_normal(({shape})) * sfd["initial_scale"]
for sigma, sigma_next in zip(sfd["sigmas"], sfd["sigmas"][1:]):
    values = (x, sigma, sigma_next{more})
    x = session.run(None, {{key: np.array(a, "f4") for key, a in zip(names, values)}})[0]
"""
    else:
        code = f"""import json
import torch

files = {{"sfd.json": ""}}
step = torch.export.load("{name}", extra_files=files).module()
sfd = json.loads(files["sfd.json"])
{labels.format("torch", "", "torch")}x = torch.randn({shape}) * sfd["initial_scale"]
for sigma, sigma_next in zip(sfd["sigmas"], sfd["sigmas"][1:]):
    x = step(x, torch.tensor(sigma), torch.tensor(sigma_next){more})
"""
    text = "; `condition` and `empty` are text features `[16, tokens, width]`" if model.has_text else ""
    what = "latents of the teacher's decoder" if model.latent is not None else "images in [-1, 1]"
    return f"```python\n{code}```\n\n`x` are {what}{text}."


def how_to_sample_student(student: OpenedStudent, repo: str, name: str) -> str:
    """Code that samples a student's own file, `name` in the Hub's `repo`."""
    kind = ', prompts="a red fox in the snow"' if student.model.has_text else ""
    kind = ", class_labels=0" if student.model.label_dim else kind
    kind += f", num_steps={student.model.sampling.num_steps}" * student.model.sampling.is_variable
    decoder = " Decoding needs the teacher's file, which is fetched on first use." * (student.model.latent is not None)
    return f"""```python
from huggingface_hub import hf_hub_download
from models import load_student  # of the program that implements SFD

student = load_student(hf_hub_download("{repo}", "{name}"))
images = student.sample(range(64){kind})  # uint8 [64, height, width, channels]
```

or `python sample.py --model_path={name} --seeds=0-63`.{decoder}"""
