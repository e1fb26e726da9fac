"""The data sets this program knows: one frozen row per `dataset_name`. `python -m models.registry` prints them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.download import cache_dir, derive, fetch

from ..published.archives import extract_member
from . import edm2

ASSETS = Path(__file__).resolve().parent.parent.parent / "assets"
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
LDM_URL = "https://ommer-lab.com/files/latent-diffusion"
SD_FILE = "resolve/main/v1-5-pruned-emaonly.ckpt"
#: MIT licence.
VAE_URL = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.safetensors"
VAE_SHA256 = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"
#: 30,000 captions of MS-COCO's validation set of 2014, in the column `text`.
CAPTIONS_URL = (
    "https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1/MS-COCO_val2014_30k_captions.csv"
)

CM_URL = "https://openaipublic.blob.core.windows.net/consistency"
ADM_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"

EDM: dict[str, Any] = dict(loader="edm", licence="CC BY-NC-SA 4.0", origin="EDM")
CM: dict[str, Any] = dict(loader="state-dict", licence="MIT", origin="Consistency Models")
#: Their own noise levels, from that of the first step.
ADM: dict[str, Any] = dict(
    loader="state-dict", licence="MIT", origin="Guided Diffusion", sigma_min=0.01, sigma_max=None
)
LDM: dict[str, Any] = dict(loader="latent-diffusion", member="model.ckpt", codec="vq-f4", licence="MIT", origin="LDM")
VQ_F4: dict[str, Any] = dict(resolution=256, latent_channels=3, latent_resolution=64, sigma_max=None)


@dataclass(frozen=True)
class DatasetSpec:
    """A teacher: where its weights come from and what it expects.

    Attributes:
        name: the `dataset_name`.
        loader: `embedded` (shipped with this program), `edm` and `edm2` (pickles of these), `state-dict` (bare, as
            consistency-models and guided-diffusion publish), `latent-diffusion`, `stable-diffusion`, or `file` (of the
            user).
        sources: addresses of the same file, tried in order; of an embedded one its name under `assets/`.
        resolution, channels: of the images.
        member: the file wanted, if the source is a zip archive.
        latent_channels, latent_resolution: what the network sees, where that is not pixels.
        label_dim: number of classes, 0 for an unconditional model.
        sigma_min, sigma_max: noise levels between which it is distilled and sampled; None is the model's own.
        text: whether it is conditioned on captions.
        guidance_rate: default of classifier-free guidance in sampling, 1 for none.
        config: `models/configs/NAME.yaml` describes the networks; None where the file itself does.
        network: arguments in which this network differs from the one in `config`.
        codec: first stage between pixels and latents, `vq-f4`, `kl-f8`, or `sd-vae-ft-mse`, whose file is its own.
        guide: the network that guidance leads away from, where that is another one.
        sha256: checksum of the file, where one is published.
        size: bytes of the file, where that is known.
        licence, origin: of the weights.
        published: the best number that its authors publish, with the metric.
        folder: where the file is below the cache directory; None is a folder of the row's name.
    """

    name: str
    loader: str
    sources: tuple[str, ...]
    resolution: int
    channels: int = 3
    label_dim: int = 0
    sigma_min: float = 0.006
    sigma_max: float | None = 80.0
    member: str | None = None
    latent_channels: int | None = None
    latent_resolution: int | None = None
    text: bool = False
    guidance_rate: float = 1.0
    config: str | None = None
    network: dict[str, Any] = field(default_factory=dict, hash=False)
    codec: str | None = None
    sha256: str | None = None
    size: int | None = None
    licence: str = "unknown"
    origin: str = "file"
    published: str | None = None
    guide: DatasetSpec | None = None
    folder: str | None = None

    @property
    def path(self) -> Path:
        """Where the file is expected: as it was published, not yet unpacked."""
        if self.loader == "embedded":
            return ASSETS / self.sources[0]
        return cache_dir() / (self.folder or self.name) / self.sources[0].rsplit("/", 1)[-1]

    @property
    def weights_path(self) -> Path:
        """Where the weights are, or will be once `path` is unpacked."""
        return self.path if self.member is None else self.path.with_name(self.member)


ROWS = {
    row.name: row
    for row in (
        DatasetSpec(
            "emoji32", "embedded", ("emoji32-teacher.safetensors",), 32, licence="OFL 1.1", origin="this project"
        ),
        DatasetSpec("emoji32-cond", "embedded", ("emoji32-cond-teacher.safetensors",), 32, label_dim=9,
                    licence="OFL 1.1", origin="this project"),
        DatasetSpec("cifar10", sources=(f"{EDM_URL}/edm-cifar10-32x32-uncond-vp.pkl",), resolution=32,
                   config="cifar10", **EDM),
        DatasetSpec("ffhq", sources=(f"{EDM_URL}/edm-ffhq-64x64-uncond-vp.pkl",), resolution=64, config="ffhq", **EDM),
        DatasetSpec("afhqv2", sources=(f"{EDM_URL}/edm-afhqv2-64x64-uncond-vp.pkl",), resolution=64,
                   config="afhqv2", **EDM),
        DatasetSpec("imagenet64", sources=(f"{EDM_URL}/edm-imagenet-64x64-cond-adm.pkl",), resolution=64,
                   label_dim=1000, config="imagenet64", **EDM),
        DatasetSpec("lsun_bedroom", sources=(f"{CM_URL}/edm_bedroom256_ema.pt",), resolution=256,
                    config="lsun_bedroom", **CM),
        DatasetSpec("lsun_cat", sources=(f"{CM_URL}/edm_cat256_ema.pt",), resolution=256, config="lsun_cat", **CM),
        DatasetSpec("imagenet64_cm", sources=(f"{CM_URL}/edm_imagenet64_ema.pt",), resolution=64, label_dim=1000,
                    config="imagenet64_cm", **CM),
        DatasetSpec("imagenet256_adm", sources=(f"{ADM_URL}/256x256_diffusion.pt",), resolution=256, label_dim=1000,
                    config="imagenet256_adm", **ADM),
        DatasetSpec("imagenet256_adm_uncond", sources=(f"{ADM_URL}/256x256_diffusion_uncond.pt",), resolution=256,
                    config="imagenet256_adm_uncond", size=2_211_383_297,
                    sha256="a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1", **ADM),
        DatasetSpec("lsun_bedroom_ldm", sources=(f"{LDM_URL}/lsun_bedrooms.zip",), config="lsun_bedroom_ldm",
                   **LDM, **VQ_F4),
        DatasetSpec("ffhq_ldm", sources=(f"{LDM_URL}/ffhq.zip",), config="ffhq_ldm", **LDM, **VQ_F4),
        DatasetSpec(
            "ms_coco",
            "stable-diffusion",
            (
                f"https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/{SD_FILE}",
                f"https://huggingface.co/runwayml/stable-diffusion-v1-5/{SD_FILE}",  # its first home
            ),
            512,
            sigma_min=0.1,
            sigma_max=None,
            latent_channels=4,
            latent_resolution=64,
            text=True,
            guidance_rate=7.5,
            config="ms_coco",
            codec="kl-f8",
            size=4_265_380_512,
            sha256="cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
            licence="CreativeML OpenRAIL-M",
            origin="Stable Diffusion 1.5",
        ),
    )
}  # fmt: skip
ROWS |= {
    fields["name"]: DatasetSpec(**fields, guide=None if guide is None else DatasetSpec(**guide))
    for fields, guide in edm2.rows()
}


def known_names() -> str:
    """The names there are, for a line or two; those of EDM2's many files in short."""
    names = [name for name, row in ROWS.items() if row.loader != "edm2"]
    return ", ".join([*names, "edm2-img64-… and edm2-img512-… (python -m models.registry)"])


def get_row(dataset_name: str) -> DatasetSpec:
    """The row of `dataset_name`, or one clear line with the names there are."""
    if dataset_name not in ROWS:
        near = difflib.get_close_matches(dataset_name, ROWS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown dataset_name {dataset_name!r}{meant}; expected one of {known_names()}")
    return ROWS[dataset_name]


def fetch_weights(row: DatasetSpec) -> Path:
    """The file with a row's weights, verified; downloaded and unpacked once for all processes that ask.

    Raises:
        UserError: the file is neither there nor to be had, or it is not the expected one.
    """
    if row.loader == "embedded":
        return row.path
    member = row.member
    if member is None or not row.weights_path.exists():
        fetch(row.sources, row.path, row.sha256, size=row.size)
    if member is None:
        return row.path
    return derive(row.weights_path, lambda: extract_member(row.path, member, row.weights_path))


def fetch_autoencoder() -> Path:
    """Stability's autoencoder, which decodes the latents of EDM2, as diffusers publishes it."""
    path = cache_dir() / "sd-vae-ft-mse" / VAE_URL.rsplit("/", 1)[1]
    return fetch([VAE_URL], path, VAE_SHA256, size=334_643_276)


def fetch_captions() -> Path:
    """The captions that Stable Diffusion is trained and evaluated with: a CSV file whose column `text` has them."""
    return fetch([CAPTIONS_URL], cache_dir() / "ms_coco" / CAPTIONS_URL.rsplit("/", 1)[1])
