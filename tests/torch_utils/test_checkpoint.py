"""Network files from strangers: whatever is in them, one clear line and nothing executed."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import flags, invoke, newest_student, same, student, teacher, tiny_network

from dnnlib import UserError
from models import load_student, load_teacher
from models.loading import read_sampling
from models.model import SamplingSettings
from models.paths import find_student
from torch_utils.checkpoint import METADATA_KEY, read_network, read_settings, read_state, save_network, save_state

SAMPLING = {
    "dataset_name": "tiny", "num_steps": 4, "afs": True, "schedule_type": "polynomial", "schedule_rho": 7.0, "sigma_min": 0.006,
    "sigma_max": 80.0,
}  # fmt: skip


def written(path, network=None, sampling=None, tensors=None, **settings):
    """A student file with some of its settings replaced (None in `sampling` removes)."""
    own, saved = read_network(newest_student(student()))
    saved["network"] = {**saved["network"], **(network or {})}
    saved["sampling"] = {k: v for k, v in {**saved["sampling"], **(sampling or {})}.items() if v != "removed"}
    save_network(path, {**own, **(tensors or {})}, {**saved, **settings})
    return path


def refused(path, pattern):
    """By the loader, and by sample.py as one line, which may find it as late as in sampling."""
    invoke(
        "sample", *flags(model_path=path, seeds=0, outdir=path.parent / "x", device="cpu", precision="fp32")
    ).refused(pattern)
    assert not list(path.parent.rglob("*.png"))


def test_network_file_holds_what_was_saved(tmp_path):
    net = tiny_network()
    settings = {"network": {"class": "EDMPrecond", "a": [1, 2.5, None, "ü"]}, "more": {"b": True}}
    save_network(tmp_path / "n.safetensors", net.state_dict(), settings)
    tensors, read = read_network(tmp_path / "n.safetensors")
    assert same(tensors, net.state_dict()) and read == settings == read_settings(tmp_path / "n.safetensors")
    save_network(tmp_path / "h.safetensors", {k: v.half() for k, v in tensors.items()}, settings)
    half, _ = read_network(tmp_path / "h.safetensors")
    assert all(v.dtype == torch.float32 for v in half.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.safetensors", "n.safetensors"]
    assert (tmp_path / "n.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_teacher_and_student_are_read_back(tmp_path):
    model = load_teacher(None, teacher())
    assert model.dataset_name == "tiny" and (model.img_resolution, model.img_channels, model.label_dim) == (8, 3, 0)
    assert same(model.net.state_dict(), tiny_network().state_dict()) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    distilled = load_student(student())
    assert distilled.sampling.nfe == 2 and (distilled.sigma_min, distilled.sigma_max) == (0.006, 80)
    assert not distilled.training and not any(p.requires_grad for p in distilled.parameters())


@pytest.mark.parametrize("share", [0, 1, 7, 8, 9, 100, 0.1, 0.5, 0.9, 0.999999])
def test_truncated_student_is_refused(share, tmp_path):
    content = newest_student(student()).read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(share * len(content)) if isinstance(share, float) else share])
    refused(path, r"cut\.safetensors is not a readable network file")


@pytest.mark.parametrize("content", [b"garbage" * 99, bytes(range(256)) * 9, b"\xff" * 64, b"\0" * 64, b"PK\x03\x04" + b"0" * 99,
                                     b"\x80\x02}q\x00.", (2**62).to_bytes(8, "little") + b"{}"])  # fmt: skip
def test_garbage_is_refused(content, tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(content)
    refused(tmp_path / "junk.safetensors", r"junk\.safetensors is not a readable network file")


def test_damaged_headers_never_end_in_a_traceback(tmp_path):
    """Bytes of the header overwritten at random: refused in one line, or still a student."""
    content, path = bytearray(newest_student(student()).read_bytes()), tmp_path / "bent.safetensors"
    header = int.from_bytes(content[:8], "little")
    rng, survived = random.Random(0), 0
    for _ in range(150):
        bent = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 20])):
            bent[rng.randrange(8 + header)] = rng.randrange(32, 127)
        path.write_bytes(bent)
        try:
            load_student(path)
            survived += 1
        except UserError as error:
            assert "bent.safetensors" in error.message and "\n" not in error.message
    assert survived < 75


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"other": "x"}, {METADATA_KEY: ""}, {METADATA_KEY: "{ half"}, {METADATA_KEY: "[]"}, {METADATA_KEY: "null"},
     {METADATA_KEY: "3"}, {METADATA_KEY: '"network"'}, {METADATA_KEY: '{"network": []}'}, {METADATA_KEY: '{"format": "student"}'},
     {METADATA_KEY: "[" * 100_000}],
)  # fmt: skip
def test_file_without_our_settings_is_refused(metadata, tmp_path):
    save_file({"a": torch.zeros(2)}, str(tmp_path / "other.safetensors"), metadata=metadata)
    refused(tmp_path / "other.safetensors", r"other\.safetensors holds tensors without this program's settings")


@pytest.mark.parametrize(
    "network",
    [
        {"class": "os.system"}, {"class": None}, {"num_blocks": 10**9}, {"num_blocks": "4"}, {"num_blocks": -3}, {"num_blocks": 2},
        {"model_channels": 10**9}, {"model_channels": 10**30}, {"model_channels": 0}, {"model_channels": -16}, {"model_channels": 32},
        {"model_channels": 1.5}, {"model_channels": "16"}, {"channel_mult": [1] * 10**5}, {"channel_mult": []}, {"channel_mult": [0, 0]},
        {"channel_mult": [10**18, 1]}, {"channel_mult": "12"}, {"channel_mult": [1, 3]}, {"channel_mult": [1, "a"]}, {"img_channels": 4},
        {"img_channels": 0}, {"img_channels": 10**12}, {"img_channels": "3"}, {"img_channels": None}, {"label_dim": 5}, {"label_dim": -1},
        {"label_dim": 10**15}, {"img_resolution": 16}, {"img_resolution": 0}, {"img_resolution": -8}, {"img_resolution": 10**9},
        {"img_resolution": "8"}, {"img_resolution": 7.5}, {"attn_resolutions": 4}, {"attn_resolutions": None}, {"attn_resolutions": [8, 4]},
        {"model_type": "UNet"}, {"model_type": ["SongUNet"]}, {"model_type": "DhariwalUNet"}, {"channel_mult_emb": 10**9},
        {"resample_filter": []}, {"resample_filter": "ab"}, {"resample_filter": [[1, 1]]},
        {"embedding_type": "none"}, {"encoder_type": 3}, {"unheard_of": 1}, {"use_step_condition": True}, {"dropout": "much"},
        {"dropout": 7}, {"sigma_data": "half"}, {"sigma_data": 0}, {"sigma_data": None}, {"augment_dim": 10**12},
        {"in_channels": 3}, {"self": 1},
    ],
    ids=lambda network: "-".join(f"{k}={str(v)[:20]}" for k, v in network.items()),
)  # fmt: skip
def test_absurd_network_settings_are_refused(network, tmp_path):
    refused(written(tmp_path / "odd.safetensors", network=network), r"odd\.safetensors")


@pytest.mark.parametrize(
    "sampling",
    [{name: "removed"} for name in SAMPLING]
    + [
        {"num_steps": 2}, {"num_steps": 0}, {"num_steps": 10**9}, {"num_steps": 4.0}, {"num_steps": "4"}, {"num_steps": None},
        {"schedule_type": "cosine"}, {"schedule_type": ["polynomial"]}, {"schedule_type": "discrete"}, {"schedule_rho": 0},
        {"schedule_rho": -7}, {"schedule_rho": float("nan")}, {"schedule_rho": "7"}, {"schedule_rho": 10**6}, {"sigma_min": 0},
        {"sigma_min": 80.0}, {"sigma_min": -1}, {"sigma_max": float("inf")}, {"sigma_max": float("nan")}, {"sigma_max": "80"},
        {"sigma_min": None}, {"afs": "no"}, {"afs": None}, {"use_step_condition": True}, {"use_step_condition": "yes"},
        {"dataset_name": None}, {"dataset_name": ["tiny"]}, {"dataset_name": "../../outside"}, {"guidance_rate": "much"},
        {"is_second_stage": "maybe"}, {"schedule_type": "time_uniform", "sigma_min": 79.9},
    ],
    ids=lambda sampling: "-".join(f"{k}={str(v)[:20]}" for k, v in sampling.items()),
)  # fmt: skip
def test_sampling_settings_out_of_range_are_refused(sampling, tmp_path):
    refused(written(tmp_path / "odd.safetensors", sampling=sampling), r"odd\.safetensors")


@pytest.mark.parametrize("sampling", [None, [], "x", 3])
def test_sampling_settings_that_are_no_settings_are_refused(sampling, tmp_path):
    tensors, settings = read_network(newest_student(student()))
    save_network(tmp_path / "odd.safetensors", tensors, {**settings, "sampling": sampling})
    refused(tmp_path / "odd.safetensors", r"odd\.safetensors does not hold usable sampling settings")


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    own, settings = read_network(newest_student(student()))
    name = "model.map_layer0.weight"
    cases = {
        "shape": ({**own, name: own[name][:-1]}, rf"1 difference.*{name} is \[63, 16\], not \[64, 16\]"),
        "missing": ({k: v for k, v in own.items() if k != name}, rf"missing {name}"),
        "more": ({**own, "extra": torch.zeros(1)}, r"unexpected extra"),
        "none": ({}, r"missing"),
        "integers": ({**own, name: own[name].to(torch.int8)}, name),
    }
    for case, (tensors, pattern) in cases.items():
        save_network(tmp_path / f"{case}.safetensors", tensors, settings)
        refused(tmp_path / f"{case}.safetensors", pattern)


# --- Fuzzing ---------------------------------------------------------------------------------------------------------

FUZZ = settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12,
)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64",
                                  "I8", "U64", "BOOL", "X"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 16, 2**31, 2**63 - 1, -1]), max_size=4),
        "data_offsets": st.lists(st.sampled_from([0, 1, 2, 16, 64, 2**40, 2**64 - 1, -1]), min_size=2, max_size=2),
    }
)  # fmt: skip


def one_line_or_fine(read, path, bound=1 << 26):
    """A click error of one line that names the file, or nothing; and no more memory than `bound` bytes of Python's."""
    tracemalloc.start()
    try:
        return read(path)
    except UserError as error:
        assert path.name in error.message and "\n" not in error.message
        return None
    finally:
        assert tracemalloc.get_traced_memory()[1] < bound
        tracemalloc.stop()


@FUZZ
@given(
    st.dictionaries(st.text(max_size=12), ENTRY, max_size=4),
    JSON,
    st.binary(max_size=64),
    st.integers(-9, 9) | st.just(2**60),
)
def test_any_header_is_one_line_or_a_network(tmp_path, entries, metadata, content, lie):
    """A header that says anything: dtypes, shapes and offsets that do not fit, a wrong length, settings of any form."""
    header = json.dumps({**entries, "__metadata__": {METADATA_KEY: json.dumps(metadata)}}).encode()
    (tmp_path / "x.safetensors").write_bytes(
        struct.pack("<Q", max(len(header) + lie, 0) if lie > 8 else len(header)) + header + content
    )
    for read in (read_settings, read_network, load_student):
        assert one_line_or_fine(read, tmp_path / "x.safetensors") is None or read is not load_student


@FUZZ
@given(
    st.sampled_from(["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "F64", "BF16", "U16", "BOOL"]),
    st.integers(0, 64),
)
def test_any_type_of_number_is_one_line_or_float32(tmp_path, dtype, count):
    bits = {"F4": 4, "F6_E2M3": 6, "C64": 64, "F64": 64, "BF16": 16, "U16": 16}.get(dtype, 8)
    size = count * bits // 8
    header = json.dumps({"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, size]},
                         "__metadata__": {METADATA_KEY: '{"network": {}}'}}).encode()  # fmt: skip
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    found = one_line_or_fine(read_network, tmp_path / "x.safetensors")
    assert found is None or found[0]["a"].dtype == torch.float32


@FUZZ
@given(JSON, JSON, JSON)
def test_any_settings_are_one_line(tmp_path, network, sampling, more):
    own, _ = read_network(newest_student(student()))
    save_network(
        tmp_path / "x.safetensors",
        {"a": own["model.map_layer0.weight"]},
        {"format": "student", "network": network, "sampling": sampling, "training": more},
    )
    assert one_line_or_fine(load_student, tmp_path / "x.safetensors") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    own = read_network(newest_student(student()))[0]["model.map_layer0.weight"].clone()
    own[3, 5] = value
    refused(
        written(tmp_path / "odd.safetensors", tensors={"model.map_layer0.weight": own}),
        r"odd\.safetensors.*map_layer0\.weight.*not finite",
    )


@FUZZ
@given(st.data())
def test_no_damage_of_a_training_state_goes_unnoticed(tmp_path, data):
    """Bytes overwritten, removed or added anywhere: one line, or the very same state."""
    path = tmp_path / "s.pt"
    save_state(path, {"a": torch.arange(300.0), "b": {"c": [1, 2.5, None, "x"]}})
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["overwrite", "cut", "insert", "remove"]))
    if kind == "overwrite":
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content[at:] = {"cut": b"", "insert": bytes([7]) + content[at:], "remove": content[at + 1 :]}[kind]
    path.write_bytes(content)
    state = one_line_or_fine(read_state, path)
    assert state is None or (torch.equal(state["a"], torch.arange(300.0)) and state["b"] == {"c": [1, 2.5, None, "x"]})


def test_a_compressed_training_state_is_refused(tmp_path):
    """It could unpack to anything."""
    save_state(tmp_path / "s.pt", {"a": torch.zeros(1 << 20)})
    with (
        zipfile.ZipFile(tmp_path / "s.pt") as source,
        zipfile.ZipFile(tmp_path / "t.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    with pytest.raises(UserError, match=r"t\.pt is not a readable training state .*compressed"):
        read_state(tmp_path / "t.pt")


# --- What is read back -----------------------------------------------------------------------------------------------


def test_settings_round_trip_and_unknown_ones_are_ignored():
    settings = SamplingSettings(**SAMPLING)
    assert SamplingSettings.from_json(json.loads(json.dumps({**SAMPLING, "later": 1})), "x") == settings
    assert (settings.nfe, settings.step_condition, settings.is_variable) == (2, None, False)
    variable = SamplingSettings(**SAMPLING, use_step_condition=True)
    assert (variable.step_condition, variable.is_variable) == (4.0, True)
    second = SamplingSettings(**{**SAMPLING, "num_steps": 3}, use_step_condition=True, is_second_stage=True)
    assert (second.nfe, second.step_condition, second.is_variable) == (1, 3.0, False)


def test_teacher_is_not_a_student(tmp_path):
    with pytest.raises(UserError, match="is a teacher, not a student"):
        load_student(teacher())
    with pytest.raises(UserError, match="is a teacher, not a student"):
        read_sampling(teacher())
    with pytest.raises(UserError, match="dataset_name"):
        load_teacher(None)
    with pytest.raises(UserError, match="unknown dataset_name"):
        load_teacher("nosuch")


def test_student_is_not_a_teacher():
    with pytest.raises(UserError, match="student"):
        load_teacher(None, newest_student(student()))


def test_finding_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("00000-a", "00001-b", "00010-c"):
        (tmp_path / "exps" / name).mkdir(parents=True)
        for images in ("000002", "000010"):
            (tmp_path / "exps" / name / f"network-snapshot-{images}.safetensors").touch()
            (tmp_path / "exps" / name / f".1.tmp.network-snapshot-{images}9.safetensors").touch()
    assert str(find_student("1")) == "exps/00001-b/network-snapshot-000010.safetensors"
    assert str(find_student("10")) == str(find_student("00010")) == "exps/00010-c/network-snapshot-000010.safetensors"
    assert str(find_student("exps/00000-a")) == "exps/00000-a/network-snapshot-000010.safetensors"
    with pytest.raises(UserError, match="run 2 does not exist"):
        find_student("2")
    (tmp_path / "7").touch()
    assert str(find_student("7")) == "7"


def test_training_state_round_trip(tmp_path):
    state = {"a": torch.arange(3), "b": {"c": 1.5, "d": [True, None, "x"]}}
    save_state(tmp_path / "s.pt", state)
    read = read_state(tmp_path / "s.pt")
    assert torch.equal(read["a"], state["a"]) and read["b"] == state["b"]
    with pytest.raises(TypeError):
        save_state(tmp_path / "s.pt", {"a": (lambda: 1).__code__})
    assert read_state(tmp_path / "s.pt")["b"] == state["b"] and [p.name for p in tmp_path.iterdir()] == ["s.pt"]


def test_a_pipe_is_no_training_state(tmp_path):
    os.mkfifo(tmp_path / "state.pt")
    with pytest.raises(UserError, match="no regular file"):
        read_state(tmp_path / "state.pt")
    with pytest.raises(UserError, match="does not exist"):
        read_settings(tmp_path / "state.pt")
