"""The networks that EDM2 published, with a choice of averaged weights for each purpose (NVlabs/edm2).

A file is called `edm2-img64-` or `edm2-img512-`, the size of the network, `uncond` for one without classes, thousands
of images that it was trained on, and the relative width of the average of its weights. Choices made for FID end in
`-fid`, those for the Fréchet distance of DINOv2 features in `-dino`; `-guid` are guided by an unconditional network,
`-autog` by a worse one (autoguidance, arXiv 2406.02507). The last column is what was published, of 63 evaluations
(arXiv 2312.02696, tables 2, 3 and 5, and the repository); guidance doubles them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
LICENCE = "CC BY-NC-SA 4.0"
#: Channels of the first level.
WIDTHS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}

#: name: network [guide rate] metric value
TABLE = """
img64-s-fid                s-1073741-0.075                                           FID 1.58
img64-m-fid                m-2147483-0.060                                           FID 1.43
img64-l-fid                l-1073741-0.040                                           FID 1.33
img64-xl-fid               xl-0671088-0.040                                          FID 1.33
img64-s-autog-fid          s-1073741-0.045          xs-0134217-0.110         1.70    FID 1.01
img64-s-autog-dino         s-1073741-0.105          xs-0134217-0.175         2.20    FD-DINOv2 31.85
img512-xs-fid              xs-2147483-0.135                                          FID 3.53
img512-s-fid               s-2147483-0.130                                           FID 2.56
img512-m-fid               m-2147483-0.100                                           FID 2.25
img512-l-fid               l-1879048-0.085                                           FID 2.06
img512-xl-fid              xl-1342177-0.085                                          FID 1.96
img512-xxl-fid             xxl-0939524-0.070                                         FID 1.91
img512-xs-dino             xs-2147483-0.200                                          FD-DINOv2 103.39
img512-s-dino              s-2147483-0.190                                           FD-DINOv2 68.64
img512-m-dino              m-2147483-0.155                                           FD-DINOv2 58.44
img512-l-dino              l-1879048-0.155                                           FD-DINOv2 52.25
img512-xl-dino             xl-1342177-0.155                                          FD-DINOv2 45.96
img512-xxl-dino            xxl-0939524-0.150                                         FD-DINOv2 42.84
img512-xs-guid-fid         xs-2147483-0.045         xs-uncond-2147483-0.045  1.40    FID 2.91
img512-s-guid-fid          s-2147483-0.025          xs-uncond-2147483-0.025  1.40    FID 2.23
img512-m-guid-fid          m-2147483-0.030          xs-uncond-2147483-0.030  1.20    FID 2.01
img512-l-guid-fid          l-1879048-0.015          xs-uncond-2147483-0.015  1.20    FID 1.88
img512-xl-guid-fid         xl-1342177-0.020         xs-uncond-2147483-0.020  1.20    FID 1.85
img512-xxl-guid-fid        xxl-0939524-0.015        xs-uncond-2147483-0.015  1.20    FID 1.81
img512-xs-guid-dino        xs-2147483-0.150         xs-uncond-2147483-0.150  1.70    FD-DINOv2 79.94
img512-s-guid-dino         s-2147483-0.085          xs-uncond-2147483-0.085  1.90    FD-DINOv2 52.32
img512-m-guid-dino         m-2147483-0.015          xs-uncond-2147483-0.015  2.00    FD-DINOv2 41.98
img512-l-guid-dino         l-1879048-0.035          xs-uncond-2147483-0.035  1.70    FD-DINOv2 38.20
img512-xl-guid-dino        xl-1342177-0.030         xs-uncond-2147483-0.030  1.70    FD-DINOv2 35.67
img512-xxl-guid-dino       xxl-0939524-0.015        xs-uncond-2147483-0.015  1.70    FD-DINOv2 33.09
img512-s-autog-fid         s-2147483-0.070          xs-0134217-0.125         2.10    FID 1.34
img512-s-autog-dino        s-2147483-0.120          xs-0134217-0.165         2.45    FD-DINOv2 36.67
img512-xxl-autog-fid       xxl-0939524-0.075        m-0268435-0.155          2.05    FID 1.25
img512-xxl-autog-dino      xxl-0939524-0.130        m-0268435-0.205          2.30    FD-DINOv2 24.18
img512-s-uncond-autog-fid  s-uncond-2147483-0.070   xs-uncond-0134217-0.110  2.85    FID 3.86
img512-s-uncond-autog-dino s-uncond-2147483-0.090   xs-uncond-0134217-0.125  2.90    FD-DINOv2 90.39
"""


def network(data: str, name: str) -> dict[str, Any]:
    """Fields of a `DatasetSpec` that follow from a data set (`img64` or `img512`) and the name of a file of it."""
    is_latent, size = data == "img512", name.split("-")[0]
    label_dim = 0 if "-uncond-" in name else 1000
    # As they were trained; a file records its own.
    dropout = 0.1 if size not in ("xs", "s") else 0.0
    return dict(
        loader="edm2",
        sources=(f"{URL}/edm2-{data}-{name}.pkl",),
        folder="edm2",
        resolution=512 if is_latent else 64,
        label_dim=label_dim,
        latent_channels=4 if is_latent else None,
        latent_resolution=64 if is_latent else None,
        codec="sd-vae-ft-mse" if is_latent else None,
        config=f"edm2-{data}",
        network=dict(model_channels=WIDTHS[size], label_dim=label_dim, dropout=dropout),
        licence=LICENCE,
        origin="EDM2",
    )


def rows() -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Fields of the spec of each row, and of its guide's, None where it has none."""
    for line in TABLE.strip().splitlines():
        name, *files, metric, value = line.split()
        data = name.split("-")[0]
        fields = {"name": f"edm2-{name}", "published": f"{metric} {value}", **network(data, files[0])}
        if len(files) == 1:
            yield fields, None
            continue
        _, guide, rate = files
        yield {**fields, "guidance_rate": float(rate)}, {"name": f"edm2-{data}-{guide}", **network(data, guide)}
