"""A student from Python: the images that `sample.py` writes, and one line for what it cannot be asked for."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SAMPLE, flags, invoke, student, teacher

from dnnlib import UserError
from models import load_student, load_teacher
from models.sampling import SamplerOptions, draw_latents, teacher_sampler
from torch_utils.images import to_uint8


def written(folder, **options):
    """What `sample.py` writes, uint8 `[N, H, W, C]`, in the order of seeds."""
    invoke("sample", *flags({"device": "cpu"}, options, outdir=folder)).ok()
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize(
    "kind, options", [("plain", {}), ("classes", {}), ("variable", {"num_steps": 6}), ("second", {})]
)
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


def test_a_batch_of_one_costs_no_more_than_a_large_one():
    """On the CPU a network sees 16 samples, whatever is asked for: seeds share them."""
    model = load_student(student())
    seen = []
    with mock.patch.object(type(model.net), "forward", lambda net, x, *_, **__: seen.append(len(x)) or x):
        for batch in (1, 5, 64):
            seen.clear()
            model.sample(range(20), batch=batch)
            assert seen == [16] * 2 * 2  # two evaluations of each of two blocks


# --- Teachers ----------------------------------------------------------------------------------------------------------


def edm_sampler(denoise, x, num_steps, sigma_min, sigma_max, rho=7.0):
    """Algorithm 1 of Karras et al. 2022 (arXiv 2206.00364): Heun, and an Euler step to 0 in the end; float64."""
    i = torch.arange(num_steps, dtype=torch.float64)
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    times = torch.cat(
        [(ends[0] + i / (num_steps - 1) * (ends[1] - ends[0])) ** rho, torch.zeros(1, dtype=torch.float64)]
    )
    for now, then in zip(times[:-1], times[1:]):
        slope = (x - denoise(x, now)) / now
        end = x + (then - now) * slope
        if then > 0:
            end = x + (then - now) * (slope + (end - denoise(end, then)) / then) / 2
        x = end
    return x


def test_a_teacher_is_sampled_as_edm_does_with_35_evaluations():
    model = load_teacher(None, teacher())
    model.compute_dtype = torch.float32
    sampler = teacher_sampler(model, SamplerOptions())
    x, _ = draw_latents(model, [0, 1])
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return model.denoise(x.float(), sigma.float()).double()

    expected = edm_sampler(denoise, x.double(), 18, model.sigma_min, model.sigma_max)
    assert sampler.nfe == len(calls) == 35
    found = sampler.run(x, None)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    shorter = teacher_sampler(model, SamplerOptions(denoise_to_zero=False))
    assert shorter.nfe == 34 and not torch.allclose(shorter.run(x, None), found, atol=1e-4)


def test_teachers_are_found_as_commands_find_models(tmp_path, monkeypatch):
    """The run directory of a pre-training, or its number under `./exps`."""
    monkeypatch.chdir(tmp_path)
    run = Path("exps/00003-mine")
    run.mkdir(parents=True)
    shutil.copy(teacher(), run / "teacher.safetensors")
    for path in (run, run / "teacher.safetensors", "3", 3):
        assert load_teacher(None, path).dataset_name == "00003-mine"
        invoke("sample", *flags(SAMPLE, model_path=path, seeds=0, num_steps=2, outdir=f"x{path}".replace("/", ""))).ok()
    with pytest.raises(UserError, match="is a student, not a teacher"):
        load_teacher(None, student())
    with pytest.raises(UserError, match="run 4 does not exist"):
        load_teacher(None, 4)
