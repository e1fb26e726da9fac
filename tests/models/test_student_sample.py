"""A student from Python: the images that `sample.py` writes, and one line for what it cannot be asked for."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SAMPLE, flags, invoke, student

from dnnlib import UserError
from models import load_student
from torch_utils.images import to_uint8


def written(folder, **options):
    """What `sample.py` writes, uint8 `[N, H, W, C]`, in the order of seeds."""
    invoke("sample", *flags({"device": "cpu"}, options, outdir=folder)).ok()
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("kind, options", [("plain", {}), ("classes", {}), ("variable", {"num_steps": 6}), ("second", {})])
def test_python_gives_the_images_that_the_command_writes(kind, options, tmp_path):
    """In the precision that both choose by themselves, whatever the number at a time."""
    expected = written(tmp_path / "images", model_path=student(kind), seeds="3-21", **options)
    model = load_student(student(kind))
    for batch in (1, 64):
        found = model.sample(range(3, 22), batch=batch, **options)
        assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert model.compute_dtype is None


def test_classes_are_one_for_all_or_one_for_each(tmp_path):
    expected = written(tmp_path / "images", model_path=student("classes"), seeds="0-4", **{"class": 2})
    model = load_student(student("classes"))
    each = [2, 0, 2, 1, 2]
    assert np.array_equal(model.sample(range(5), class_labels=2), expected)
    mixed = model.sample(range(5), class_labels=each)
    assert [np.array_equal(a, b) for a, b in zip(mixed, expected)] == [label == 2 for label in each]
    for same in (np.array(each), torch.tensor(each), torch.eye(3)[each]):
        assert np.array_equal(model.sample(range(5), same), mixed)


def test_own_noise_and_states(tmp_path):
    model = load_student(student())
    model.compute_dtype = torch.float32
    noise = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(20)])
    states = model.sample_states(range(20))
    assert states.dtype == torch.float32 and states.shape == (20, 3, 8, 8)
    assert np.array_equal(to_uint8(states), model.sample(range(20)))
    assert torch.equal(model.sample_states([7] * 20, noise=noise), states)
    assert not torch.equal(model.sample_states(range(20), noise=-noise), states)


@pytest.mark.parametrize(
    "kind, seeds, options, words",
    [
        ("plain", [], {}, "seeds are empty"),
        ("plain", [-1], {}, "seeds hold '-1'; expected integers"),
        ("plain", [2**32], {}, "seeds hold '4294967296'"),
        ("plain", [0.5], {}, "seeds hold '0.5'"),
        ("plain", [0], {"num_steps": 7}, "distilled for 4 timestamps, not 7"),
        ("variable", [0], {"num_steps": 9}, "9 is not what SFD-v is made for"),
        ("plain", [0], {"class_labels": 0}, "has no classes"),
        ("classes", [0], {"class_labels": 3}, "classes 0 to 2, so class 3"),
        ("classes", [0], {"class_labels": -1}, "classes 0 to 2, so class -1"),
        ("classes", [0, 1], {"class_labels": [0, 1, 2]}, r"class_labels are int64 \[3\]"),
        ("classes", [0, 1], {"class_labels": torch.ones(2, 3)}, r"class_labels are float32 \[2, 3\]"),
        ("plain", [0], {"prompts": "a cat"}, "has no text"),
        ("plain", [0], {"batch": 0}, "batch is 0"),
        ("plain", [0, 1], {"noise": torch.zeros(1, 3, 8, 8)}, r"noise is \[1, 3, 8, 8\]; expected \[2, 3, 8, 8\]"),
    ],
)
def test_what_a_student_cannot_do_is_one_line(kind, seeds, options, words):
    with pytest.raises(UserError, match=words) as error:
        load_student(student(kind)).sample(seeds, **options)
    assert "\n" not in str(error.value)
