"""The data sets this program knows: one frozen row per `dataset_name`."""

from dataclasses import dataclass
from pathlib import Path

import click

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"


@dataclass(frozen=True)
class DatasetRow:
    """A teacher: where its weights come from and what it expects.

    Attributes:
        name: the `dataset_name`.
        loader: `embedded` (shipped with this program), `edm` (a pickle of NVlabs/edm), or the name of a family whose
            loader is not there yet.
        source: file name under `assets/`, or URL.
        resolution, channels: of the images.
        label_dim: number of classes, 0 for an unconditional model.
        sigma_min, sigma_max: noise levels between which it is distilled and sampled.
        network: constructor arguments of the network, where the source does not record them.
        text: whether it is conditioned on captions.
    """

    name: str
    loader: str
    source: str
    resolution: int
    channels: int = 3
    label_dim: int = 0
    sigma_min: float = 0.006
    sigma_max: float = 80.0
    text: bool = False


ROWS = {
    row.name: row
    for row in (
        DatasetRow("emoji32", "embedded", "emoji32-teacher.safetensors", 32),
        DatasetRow("cifar10", "edm", f"{EDM_URL}/edm-cifar10-32x32-uncond-vp.pkl", 32),
        DatasetRow("ffhq", "edm", f"{EDM_URL}/edm-ffhq-64x64-uncond-vp.pkl", 64),
        DatasetRow("afhqv2", "edm", f"{EDM_URL}/edm-afhqv2-64x64-uncond-vp.pkl", 64),
        DatasetRow("imagenet64", "edm", f"{EDM_URL}/edm-imagenet-64x64-cond-adm.pkl", 64, label_dim=1000),
        DatasetRow("lsun_bedroom", "consistency-models", "edm_bedroom256_ema.pt", 256),
        DatasetRow(
            "lsun_bedroom_ldm",
            "latent-diffusion",
            "https://ommer-lab.com/files/latent-diffusion/lsun_bedrooms.zip",
            256,
        ),
        DatasetRow("ffhq_ldm", "latent-diffusion", "https://ommer-lab.com/files/latent-diffusion/ffhq.zip", 256),
        DatasetRow(
            "ms_coco",
            "stable-diffusion",
            "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/v1-5-pruned-emaonly.ckpt",
            512,
            sigma_min=0.1,
            text=True,
        ),
    )
}


def get_row(dataset_name: str) -> DatasetRow:
    """The row of `dataset_name`, or one clear line with the names there are."""
    if dataset_name not in ROWS:
        raise click.ClickException(f"unknown dataset_name {dataset_name!r}; expected one of {', '.join(ROWS)}")
    return ROWS[dataset_name]
