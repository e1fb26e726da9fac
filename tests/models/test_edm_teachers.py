"""EDM's published data sets from a file in the published layout (tiny networks) to images and their FID."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_pickle_files import write_edm_pickle
from PIL import Image
from tiny import SAMPLE, TRAIN, Patches, flags, invoke, only_run, png_names, tiny_network

from models.registry import ROWS

CLASSES = dict(label_dim=5, model_type="DhariwalUNet", dropout=0.1)
NETWORK = dict(
    img_resolution=8, img_channels=3, label_dim=0, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[4], augment_dim=9, dropout=0.13,
)  # fmt: skip
NAMES = [name for name, row in ROWS.items() if row.loader == "edm"]


@pytest.mark.parametrize("name", NAMES)
def test_from_the_published_file_to_images_and_their_fid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFD_OFFLINE", "1")
    has_classes = ROWS[name].label_dim > 0
    recorded = {k: v for k, v in NETWORK.items() if not has_classes or k != "augment_dim"}
    recorded |= CLASSES if has_classes else {}
    place = Path("src") / name
    place.mkdir(parents=True)
    write_edm_pickle(place / ROWS[name].sources[0].rsplit("/", 1)[1], tiny_network(**recorded), recorded)

    invoke("train", *flags(TRAIN, dataset_name=name, total_kimg=0.032)).ok()
    run_dir = only_run(Path("exps"))
    assert run_dir.name == f"00000-{name}-4-2-dpmpp-1-poly7-afs"
    invoke("sample", *flags(SAMPLE, model_path=0, dataset_name=name, seeds="0-3", outdir="student")).ok()
    teacher = dict(model_path="teacher", dataset_name=name, solver="dpmpp", num_steps=4, seeds="0-3", outdir="teacher")
    invoke("sample", *flags(SAMPLE, teacher)).ok()
    for folder in ("student", "teacher"):
        images = [np.asarray(Image.open(Path(folder) / png)) for png in png_names(Path(folder))]
        assert len(images) == 4 and all(image.shape == (8, 8, 3) for image in images)
        assert len({image.tobytes() for image in images}) == 4

    torch.jit.script(Patches()).save("patches.pt")
    evaluation = ["--detector=patches.pt", "--detector-runs-code", "--device=cpu", "--ref=teacher"]
    invoke("fid", "calc", "--images=student", *evaluation).ok()
    invoke("fid", "gen", "--model_path=0", "--seeds=0-3", "--precision=fp32", *evaluation).ok()
    calc, gen = (json.loads(line)["value"] for line in Path("metrics.jsonl").read_text().splitlines())
    assert calc == gen > 0
