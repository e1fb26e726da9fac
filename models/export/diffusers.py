"""A student as a folder of diffusers that its stock pipeline runs."""

from __future__ import annotations

from pathlib import Path

from dnnlib import UserError

from ..loading import own_latent_space, read_published, row_config
from ..networks.clip_text import find_tokenizer
from ..precond import CFGPrecond
from ..published.diffusers import Pipeline, write_pipeline
from ..registry import get_row
from .student import OpenedStudent


def to_diffusers(student: OpenedStudent, dest: Path) -> None:
    """Write a student of Stable Diffusion as a folder of diffusers, see `models.published.diffusers`."""
    net, name = student.net, student.model.dataset_name
    if not isinstance(net, CFGPrecond) or not student.model.has_text:
        raise UserError(
            f"{student.path} is a student of {name}; a pipeline of diffusers is made of students of ms_coco, "
            "use `program`"
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
