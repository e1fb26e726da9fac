"""From names and files to models: the registry, EDM pickles in their published layout, students."""

import pytest
import torch
from edm_pickle_files import write_edm_pickle

from dnnlib import UserError
from models import EDMPrecond, load_student, load_teacher
from models.building import build_network, network_spec
from models.loading import make_student, save_student
from models.model import SamplingSettings
from models.paths import find_student
from models.registry import ROWS, get_row

TINY = dict(
    img_resolution=8, img_channels=3, label_dim=0, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[4], augment_dim=9, dropout=0.13,
)  # fmt: skip
SAMPLING = SamplingSettings("cifar10", 4, True, "polynomial", 7.0, 0.006, 80.0)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return EDMPrecond(**TINY).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    monkeypatch.setenv("SFD_OFFLINE", "1")
    return tmp_path


def test_a_registered_teacher_is_read_from_its_published_pickle(net, cache):
    (cache / "cifar10").mkdir()
    write_edm_pickle(cache / "cifar10" / "edm-cifar10-32x32-uncond-vp.pkl", net, TINY)
    teacher = load_teacher("cifar10")
    assert (teacher.dataset_name, teacher.sigma_min, teacher.sigma_max) == ("cifar10", 0.006, 80.0)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(teacher.denoise(x, 2.0), net(x, 2.0))
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.loader != "embedded"])
def test_a_missing_file_names_its_place_and_its_url_when_offline(cache, name):
    with pytest.raises(UserError) as error:
        load_teacher(name)
    row = get_row(name)
    url = row.sources[0]
    assert str(cache / (row.folder or name) / url.rsplit("/", 1)[1]) in error.value.message
    assert url in error.value.message


def test_a_pickle_of_ones_own_is_a_teacher(net, tmp_path):
    path = write_edm_pickle(tmp_path / "network-snapshot-000100.pkl", net, TINY)
    teacher = load_teacher(None, path)
    assert teacher.dataset_name == "network-snapshot-000100" and teacher.img_resolution == 8


@pytest.mark.parametrize("name, classes", [("emoji32", 0), ("emoji32-cond", 9)])
def test_the_embedded_teachers_are_there(name, classes):
    teacher = load_teacher(name)
    assert teacher.shape == (3, 32, 32) and teacher.label_dim == ROWS[name].label_dim == classes
    frequencies = teacher.net.class_frequencies
    assert frequencies is None if classes == 0 else frequencies[1] == max(frequencies)  # most emoji are people
    labels = torch.eye(classes) if classes else None
    clean = teacher.denoise(torch.zeros(max(classes, 1), 3, 32, 32), 0.01, labels)
    assert clean.isfinite().all() and clean.abs().max() < 2


def test_no_name_and_no_file_is_refused():
    with pytest.raises(UserError, match="give the name of a data set, or the file of a teacher"):
        load_teacher(None)


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_student_comes_back_as_it_was_saved(net, tmp_path, conditioned):
    teacher = load_teacher(None, write_edm_pickle(tmp_path / "t.pkl", net, TINY))
    sampling = SamplingSettings(**{**vars(SAMPLING), "use_step_condition": conditioned})
    student = make_student(teacher, sampling)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    save_student(tmp_path / "network-snapshot-000001.safetensors", student, {"images": 1000})
    loaded = load_student(tmp_path)
    assert loaded.sampling == sampling and loaded.sigma_max == 80.0
    mine, theirs = student.net.state_dict(), loaded.net.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    x = torch.randn(1, 3, 8, 8)
    step = sampling.step_condition
    assert torch.equal(loaded.denoise(x, 1.0, step_condition=step), student.eval().denoise(x, 1.0, step_condition=step))


def test_the_weights_of_a_student_are_copied_and_not_drawn():
    """New layers of a step condition alone are, and nothing is shared with the teacher."""
    teacher = load_teacher("emoji32")
    for conditioned in (False, True):
        state = torch.random.get_rng_state()
        student = make_student(teacher, SamplingSettings(**{**vars(SAMPLING), "use_step_condition": conditioned}))
        assert torch.equal(torch.random.get_rng_state(), state) == (not conditioned)
        own, theirs = student.net.state_dict(), teacher.net.state_dict()
        assert all(torch.equal(own[k], v) and own[k].data_ptr() != v.data_ptr() for k, v in theirs.items())
        assert (len(own) > len(theirs)) == conditioned and all(p.isfinite().all() for p in student.parameters())
        assert all(p.requires_grad for name, p in student.named_parameters() if "augment" not in name)


def test_the_newest_snapshot_of_a_run_directory_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kimg in (5, 100, 20):
        (tmp_path / f"network-snapshot-{kimg:06d}.safetensors").touch()
    assert find_student(tmp_path).name == "network-snapshot-000100.safetensors"
    run = tmp_path / "exps" / "00007-emoji32-4-2"
    run.mkdir(parents=True)
    (run / "network-snapshot-000003.safetensors").touch()
    assert find_student("7").parent.resolve() == run
    with pytest.raises(UserError, match=r"run 8 does not exist .* expected a folder 00008-"):
        find_student("8")


@pytest.mark.parametrize("change, message", [
    ({"class": "os.system"}, "expected EDMPrecond"),
    ({"model_channels": 2**40}, "expected 1 to 16384"),
    ({"model_channels": "16"}, "expected 1 to 16384"),
    ({"num_blocks": 10**9}, "num_blocks 1000000000; expected 1 to 64"),
    ({"channel_mult": 3}, "channel_mult 3; expected a list"),
    ({"model_type": "VPPrecond"}, "cannot be built"),
    ({"sides": 4}, "unknown arguments: sides"),
    ({"img_channels": 1}, r"differences, first model\.enc\.8x8_conv\.weight"),
    ({"class_frequencies": [0.5, 0.5]}, "class_frequencies must be 0 numbers"),
    ({"class_frequencies": "often"}, "cannot be built"),
    ({"class_frequencies": [float("nan")], "label_dim": 1}, "class_frequencies must be 1 numbers"),
    ({"use_step_condition": True}, r"missing model\.map_step_layer0\.weight"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_tensors_are_one_line(net, change, message):
    with pytest.raises(UserError, match=message) as error:
        build_network({**network_spec(net), **change}, net.state_dict(), "file")
    assert "\n" not in error.value.message and len(error.value.message) < 500
