"""`models.export half`: the same file with weights in half precision, for students and teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import invoke, known_as_tiny, newest_student, student, teacher, weights, write_teacher

from models import load_student, load_teacher
from torch_utils.checkpoint import read_network, read_settings, save_network

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def halved(model_path: Path) -> Path:
    invoke("models.export", "half", f"--model_path={model_path}", "--dest=half.safetensors").ok()
    return Path("half.safetensors")


@pytest.mark.parametrize("kind", ["plain", "classes", "variable"])
def test_a_student_keeps_its_settings_and_its_weights_up_to_rounding(kind):
    path = halved(student(kind))
    expected = read_settings(newest_student(student(kind)))
    expected["training"]["model_path"] = Path(expected["training"]["model_path"]).name
    assert read_settings(path) == expected
    whole, half = weights(student(kind)), weights(path)
    assert half.keys() == whole.keys() and any(not torch.equal(half[name], whole[name]) for name in whole)
    for name, values in whole.items():
        assert ((half[name] - values).abs() <= values.abs() * 2**-11 + 2**-25).all(), name
    with safe_open(str(path), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 2 * sum(values.numel() for values in whole.values())


@pytest.mark.parametrize("kind, steps", [("plain", (None,)), ("classes", (None,)), ("variable", (4, 7))])
def test_its_images_are_those_of_the_whole_one_but_for_rounding(kind, steps):
    whole, half = load_student(student(kind)), load_student(halved(student(kind)))
    for model in (whole, half):
        model.compute_dtype = torch.float32
    assert half.sampling == whole.sampling
    for num_steps in steps:
        a, b = (model.sample(range(8), num_steps=num_steps).astype(int) for model in (whole, half))
        assert abs(a - b).max() <= 3 and a.std() > 10
    with known_as_tiny():
        invoke("sample", "--model_path=half.safetensors", "--seeds=0-3", "--grid=True", "--device=cpu").ok()


def test_a_teacher_is_taken_too():
    whole, half = load_teacher(None, teacher()), load_teacher(None, halved(teacher()))
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([5.0, 0.5])
    torch.testing.assert_close(half.denoise(x, sigma), whole.denoise(x, sigma), atol=1e-2, rtol=1e-2)
    invoke("train", f"--model_path={Path('half.safetensors').resolve()}", "--dry-run").ok()


def test_a_teacher_does_not_say_where_its_images_were():
    tensors, settings = read_network(teacher())
    save_network("own.safetensors", tensors, {**settings, "training": {"data": "/home/me/photos.zip", "kimg": 2}})
    assert read_settings(halved(Path("own.safetensors")))["training"] == {"data": "photos.zip", "kimg": 2}


def test_what_cannot_be_halved_is_one_line():
    def refused(words: str, model_path: Path | str, dest: str = "x.safetensors") -> None:
        invoke("models.export", "half", f"--model_path={model_path}", f"--dest={dest}").refused(words)
        assert not Path("x.safetensors").exists()

    refused("ending in .safetensors", teacher(), "x.pt")
    refused("nowhere.safetensors does not exist", "nowhere.safetensors")
    Path("x.pkl").touch()
    refused("x.pkl is not a .safetensors file of train.py", "x.pkl")
    own = write_teacher(Path("own.safetensors"))
    refused("is the model itself", own, "./own.safetensors")
    tensors, settings = read_network(own)
    name = next(iter(tensors))
    save_network("large.safetensors", {**tensors, name: tensors[name] + 1e5}, settings)
    refused(
        f"large.safetensors holds 1000.. in {name.replace('.', '[.]')}; half precision ends at 65504",
        "large.safetensors",
    )
