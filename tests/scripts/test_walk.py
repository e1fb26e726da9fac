"""docs/own-teacher.md: its commands, in its order, from images or from a pickle of EDM to pictures and numbers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from edm_pickle_files import write_edm_pickle
from PIL import Image
from tiny import ROOT, Patches, invoke, only_run, tiny_network, write_images

from models.loading import read_sampling
from models.paths import find_student
from torch_utils.checkpoint import read_settings

DOCUMENT = (ROOT / "docs" / "own-teacher.md").read_text(encoding="utf-8")
COMMANDS = [
    re.findall(r"^python .+", block, re.M) for block in re.findall(r"^```\.bash\n(.+?)^```", DOCUMENT, re.M | re.S)
]
#: What makes the walk short; later flags win.
MACHINE = "--device=cpu --precision=fp32"
SHORTER = {
    "training.pretrain": f"--channels=16 --mult=1,2 --attn=8 --kimg=0.128 --batch=16 --snap=1 {MACHINE}",
    "train.py": f"--total_kimg=0.016 --batch=8 --batch-gpu=8 {MACHINE}",
    "sample.py": f"--seeds=0-7 {MACHINE}",
    "fid.py ref": "--detector=patches.pt --detector-runs-code --device=cpu --workers=0",
    "fid.py calc": "--detector=patches.pt --detector-runs-code --device=cpu --workers=0",
    "fid.py compare": f"--detector=patches.pt --detector-runs-code --workers=0 --seeds=0-8 --nearest_k=2 {MACHINE}",
}
FROM_IMAGES, FROM_PICKLE = COMMANDS


def words_of(command: str) -> list[str]:
    """What follows `python`, or `python -m`."""
    return shlex.split(command.removeprefix("python ").removeprefix("-m "))


def run(command: str) -> None:
    script, *arguments = words_of(command)
    key = next(key for key in SHORTER if " ".join([script, *arguments]).startswith(key))
    invoke(script.removesuffix(".py"), *arguments, *shlex.split(SHORTER[key])).ok()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with `my-images`, in two sub-folders as people have them."""
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Patches()).save("patches.pt")
    write_images(Path("my-images/a"), 20, (16, 16))
    write_images(Path("my-images/b"), 20, (16, 16), seed=1)


def check_results(name: str) -> None:
    student = find_student("0")
    settings = read_sampling(student)
    assert (
        settings.nfe == 2
        and settings.dataset_name == name
        and only_run(Path("exps")).name.startswith(f"00000-{name}-4-2-")
    )
    for picture in ("pictures/student/grid.png", "pictures/compare.png"):
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    records = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    assert [(r["metric"], r["N"], r["reference_N"]) for r in records] == [("FD(patches.pt)", 8, 40)]
    compared = [json.loads(line) for line in (student.parent / "metrics.jsonl").read_text().splitlines()]
    assert len(compared) == 8 and {r["reference_N"] for r in compared} == {40}


def test_from_images_to_numbers():
    for command in FROM_IMAGES:
        run(command)
    assert read_settings("teachers/mine/teacher.safetensors")["training"]["images_seen"] == 128
    assert Path("pictures/teacher/grid.png").is_file()
    check_results("mine")


def test_from_a_pickle_of_edm_to_numbers():
    recorded = dict(
        img_resolution=16, img_channels=3, label_dim=0, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[8], augment_dim=9, dropout=0.13,
    )  # fmt: skip
    write_edm_pickle(Path("network-snapshot-200000.pkl"), tiny_network(**recorded), recorded)
    start = next(i for i, command in enumerate(FROM_IMAGES) if command.startswith("python train.py"))
    for command in (*FROM_PICKLE, *FROM_IMAGES[start + 1 :]):
        run(command)
    check_results("network-snapshot-200000")


def test_a_dry_run_of_every_command_writes_nothing():
    before = sorted(Path().rglob("*"))
    for command in (*FROM_IMAGES, *FROM_PICKLE):
        script, *arguments = words_of(command)
        if arguments[0] != "compare":  # needs the run, beside which its files go
            assert "{" in invoke(script.removesuffix(".py"), *arguments, "--dry-run").ok().output
    assert sorted(Path().rglob("*")) == before
