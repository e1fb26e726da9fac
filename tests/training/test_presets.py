"""Presets: what the file holds, what it means to train.py, and what README.md says of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from tiny import ROOT, invoke

import train
from models.registry import ROWS
from training import presets


def planned(*args: str) -> dict:
    output = invoke("train", *args, "--dry-run").ok().output
    return json.loads(output[: output.index("\n}") + 2])


def test_the_file_is_yaml():
    """Read here by a few lines of our own, and by everything else that knows the format."""
    yaml = pytest.importorskip("yaml")
    text = presets.FILE.read_text(encoding="utf-8")
    assert presets.read_entries(text) == yaml.load(text, yaml.BaseLoader)


def test_every_teacher_has_six():
    """Named like it; those of the embedded images are of the teacher with classes."""
    families, listed = presets.families(), presets.read_presets()
    fast = {f"{name}-fast": name for name in ("cifar10", "imagenet64", "ffhq", "afhqv2")}
    assert len(families) >= 9 and set(listed) == {
        "quickstart",
        *fast,
        *(p.name for six in families.values() for p in six),
    }
    for name, six in families.items():
        assert {p.flags["dataset_name"] for p in six} == {"emoji32-cond" if name == "emoji32" else name} <= ROWS.keys()
    assert {name: listed[name].flags["dataset_name"] for name in fast} == fast
    assert listed["quickstart"].flags["dataset_name"] == "emoji32-cond"


@pytest.mark.parametrize(
    "text", ["a: 1", "s:\n  a: {b: c}\n  a: {b: c}", "  a: {b: c}", "s:\n    a: {b: c}", "s:\n  a: {b}"]
)
def test_what_the_reader_does_not_know_is_refused(text):
    with pytest.raises(ValueError):
        presets.read_entries(text)


def test_a_later_entry_wins_and_a_presets_own_is_last():
    lsun, second = presets.find_preset("lsun_bedroom"), presets.find_preset("emoji32-1nfe")
    assert (lsun.flags["lr"], lsun.flags["batch"], lsun.holds) == ("1e-5", "128", "4")
    assert (second.flags["M"], second.flags["denoise_to_zero"], second.flags["lpips"]) == ("2", "False", "off")


def test_a_fast_preset_is_its_teachers_with_muon_for_half_as_long():
    plain, fast = presets.find_preset("cifar10"), presets.find_preset("cifar10-fast")
    assert (
        fast.flags == {**plain.flags, "optimizer": "muon", "total_kimg": "100"} and plain.flags["total_kimg"] == "200"
    )
    assert (plain.fid, fast.fid, fast.hours) == ("4.53", "-", "-")  # what is published is not of these


def test_presets_stand_for_their_arguments():
    options = {name.lstrip("-") for param in train.main.params for name in param.opts}
    for name, preset in presets.read_presets().items():
        assert preset.flags.keys() <= options, name
    for name in ("quickstart", "cifar10-v", "ffhq_ldm"):
        assert planned(f"--preset={name}") == planned(*presets.arguments(presets.find_preset(name)))


def test_flags_override_a_preset_wherever_they_stand():
    settings = planned("--lr=1e-3", "--preset=cifar10-v", "--M=2")
    assert (settings["lr"], settings["M"], settings["total_kimg"]) == (1e-3, 2, 800)


@pytest.mark.parametrize("name, warned", [("cifar10", True), ("emoji32", False)])
def test_a_published_teacher_on_the_cpu_is_a_warning_with_the_estimate(name, warned, monkeypatch, tmp_path):
    monkeypatch.setattr("train.estimate", lambda *args: "Memory: x\nTime: about 53d")
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    monkeypatch.setattr("train.loop.train", lambda *args, **kwargs: None)
    output = invoke("train", f"--preset={name}", "--device=cpu").ok().output
    warning = f"Warning: preset {name} is made for GPUs and runs on the CPU. Time: about 53d\n"
    assert output == (warning if warned else "")


def test_an_unknown_name_or_flag_suggests_the_nearest():
    result = CliRunner().invoke(train.main, ["--preset=imagenet-64"])
    assert result.exit_code == 2 and "did you mean imagenet64 or" in result.output
    assert "--total_kimg" in CliRunner().invoke(train.main, ["--total_king=3"]).output


def test_the_readme_has_the_table_of_the_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert presets.with_table(text) == text, "run python -m training.presets --write"
    assert presets.with_table(text.replace("4.53", "4.54")) == text


def test_the_list_needs_no_packages():
    """As `bash launch.sh` asks for it before anything is installed: -S leaves packages out, -I what is set outside."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from training.presets import main; sys.exit(main(sys.argv[1:]))"
    for args, words in (([], "cifar10-3nfe"), (["arguments", "cifar10"], "--total_kimg=200")):
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, "table"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Error: usage") and done.stderr.count("\n") == 1
