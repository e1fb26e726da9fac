"""Checkpoints and archives of other people: every layout is read, hostile and damaged files are one clear line."""

import argparse
import builtins
import collections
import contextlib
import datetime
import decimal
import hashlib
import io
import logging
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import threading
import types
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dnnlib import UserError
from models.published import archives, pickle_records, torch_checkpoint
from models.published.archives import extract_member
from models.published.torch_checkpoint import read_checkpoint
from torch_utils.checkpoint import check_state_dict


def tensors():
    """Of every kind that published files hold, in an order that is not the alphabet's."""
    torch.manual_seed(0)
    return {
        "model.weight": torch.randn(7, 5), "model.bias": torch.randn(5).half(), "betas": torch.rand(3).double(),
        "ema.num_updates": torch.tensor(3, dtype=torch.int32), "positions": torch.arange(4), "b": torch.randn(3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }  # fmt: skip


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_safetensors(content, path):
    save_file(content, path)


FORMATS = pytest.mark.parametrize("save", [save_zip, save_legacy])


def error_of(path):
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = caught.value.message
    assert "\n" not in message and message.startswith(str(path)) and len(message) < 500 + len(str(path))
    return message


def same(found, expected):
    return list(found) == list(expected) and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


# --- Good files ------------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3, "hash": 2**70}])
def test_state_dicts_bare_and_wrapped(tmp_path, save, wrap):
    save(wrap(tensors()), tmp_path / "a.ckpt")
    state = read_checkpoint(tmp_path / "a.ckpt")
    assert same(state, tensors())
    assert all(type(value) is torch.Tensor and value.data_ptr() % 64 == 0 for value in state.values())


@FORMATS
def test_state_dict_of_a_module(tmp_path, save):
    """`Module.state_dict` has an attribute besides its items, and transposed tensors are saved as they lie."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    net[0].weight.data = torch.randn(3, 2).t()
    save(net.state_dict(), tmp_path / "a.pt")
    state = read_checkpoint(tmp_path / "a.pt")
    assert same(state, net.state_dict()) and state["0.weight"].is_contiguous()


def test_safetensors(tmp_path):
    expected = {name: value.detach() for name, value in tensors().items()}
    save_safetensors(expected, tmp_path / "a.safetensors")
    assert all(same({k: v}, {k: expected[k]}) for k, v in read_checkpoint(tmp_path / "a.safetensors").items())


@FORMATS
def test_tensors_that_share_their_values(tmp_path, save):
    values = torch.arange(6.0)
    save({"all": values, "part": values[2:4], "none": torch.empty(0)}, tmp_path / "a.pt")
    state = read_checkpoint(tmp_path / "a.pt")
    assert same(state, {"all": values, "part": values[2:4], "none": torch.empty(0)})


@pytest.fixture
def lightning(monkeypatch):
    """Classes that a Lightning checkpoint refers to; they can be imported while it is written, and not thereafter."""
    modules = {
        name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "ldm", "ldm.util")
    }
    exec(
        "class ModelCheckpoint: pass\ndef helper(*args): raise SystemExit('ran')",
        modules["pytorch_lightning.callbacks"].__dict__,
    )
    exec("class Config(dict): pass\nclass Steps(list): pass", modules["ldm.util"].__dict__)
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield modules
    assert not any(name in sys.modules for name in modules)


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def lightning_content(modules):
    callback = modules["pytorch_lightning.callbacks"].ModelCheckpoint
    config, steps = modules["ldm.util"].Config, modules["ldm.util"].Steps
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
    return {
        "epoch": 1, "pytorch-lightning_version": "1.4.2", "state_dict": collections.OrderedDict(tensors()),
        "callbacks": {callback: {"best_model_score": np.float64(0.5), "monitor": "val/loss", "dirpath": Path("/x")}},
        "optimizer_states": [optimizer], "lr_schedulers": [], "instance": callback(), "array": np.arange(3),
        "hyper_parameters": {"config": config(a=config(b=1)), "steps": steps([1, 2]), "args": argparse.Namespace(x=1)},
        "counts": collections.defaultdict(list, a=[1]), "set": {1, "a"}, "bytes": b"abc", "device": torch.device("cpu"),
        "call": Calls(modules["pytorch_lightning.callbacks"].helper, "x"),
    }  # fmt: skip


@FORMATS
def test_what_a_training_leaves_beside_the_weights_is_not_imported(tmp_path, save, lightning):
    save(lightning_content(lightning), tmp_path / "a.ckpt")
    for name in lightning:
        del sys.modules[name]
    state = read_checkpoint(tmp_path / "a.ckpt")
    assert same(state, tensors()) and not any(name in sys.modules for name in lightning)


def extras():
    """What trainings were seen to leave beside the weights, each by its name."""
    return {
        "datetime": datetime.datetime.now(datetime.timezone.utc), "timedelta": datetime.timedelta(1),
        "TorchVersion": torch.torch_version.TorchVersion("2.1.0"), "decimal": decimal.Decimal("1.5"),
        "uuid": uuid.uuid4(), "numpy state": np.random.get_state(), "numpy generator": np.random.default_rng(1),
        "random state": random.getstate(), "torch state": torch.get_rng_state(), "date": np.datetime64("2020-01-01"),
        "text type": np.dtype("U5"), "sparse": torch.eye(3).to_sparse(), "set": frozenset({1, (2,)}),
        "bytes": bytearray(b"ab"), "integer": 2**3000, "slice": slice(1), "complex": 1j, "ellipsis": Ellipsis,
        "keys": {1: 2, (3, 4): 5, None: 6},
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@FORMATS
@pytest.mark.parametrize("name", extras())
def test_harmless_objects_beside_the_weights_are_passed_over(tmp_path, save, name):
    for content in ({"state_dict": tensors(), "more": extras()[name]}, {**tensors(), "more": extras()[name]}):
        save(content, tmp_path / "a.ckpt")
        found = read_checkpoint(tmp_path / "a.ckpt")
        found.pop("more", None)  # a tensor
        assert same(found, tensors())


@FORMATS
def test_objects_of_other_packages_beside_the_weights_are_passed_over(tmp_path, save, monkeypatch):
    """Trainers of transformers keep their arguments there, with enumerations and settings of other packages."""
    module = types.ModuleType("transformers.training_args")
    source = """
import enum
class Strategy(enum.Enum):
    STEPS = "steps"
class Arguments:
    def __init__(self): self.strategy, self.seeds = Strategy.STEPS, {1, 2}
class WithNames:
    def __new__(cls, *args, **names): return object.__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"a": 2}
"""
    exec(source, module.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.training_args", module)
        for protocol in (2, 4):
            content = {"state_dict": tensors(), "args": module.Arguments()}
            if protocol == 4:  # before, names were given by a call of `getattr`
                content["more"] = module.WithNames()
            torch.save(content, tmp_path / f"{protocol}.ckpt", pickle_protocol=protocol)
    for protocol in (2, 4):
        assert same(read_checkpoint(tmp_path / f"{protocol}.ckpt"), tensors())


@FORMATS
def test_what_is_wanted_must_be_tensors(tmp_path, save):
    """A weight that is something else is missed by name where the network is filled, and no tensor at all is said."""
    save({"state_dict": {"weight": datetime.timedelta(1)}}, tmp_path / "a.ckpt")
    assert "does not hold a state dict: weight is not a tensor" in error_of(tmp_path / "a.ckpt")
    save({"a": torch.ones(1), "b": decimal.Decimal(1)}, tmp_path / "a.ckpt")
    assert list(read_checkpoint(tmp_path / "a.ckpt")) == ["a"]


def test_tensors_are_views_of_the_file(tmp_path):
    """A file of gigabytes is neither copied nor read before its tensors are, and never changed."""
    path = tmp_path / "a.ckpt"
    save_zip(tensors(), path)
    before = path.read_bytes()
    state = read_checkpoint(path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(str(path))]
        place = state["model.weight"].data_ptr()
        assert any(int(first, 16) <= place < int(last, 16) for first, last in ranges)
    state["model.weight"].zero_()
    assert path.read_bytes() == before


# --- Hostile files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path):
    """A path that nothing may make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


class New:
    """Pickled as `cls.__new__(cls, *args)`, as plain objects are."""

    def __init__(self, cls, *args):
        self.cls, self.args = cls, args

    def __reduce_ex__(self, protocol):
        import copyreg

        return copyreg.__newobj__, (self.cls, *self.args)


class Sets(Calls):
    """Pickled as a call whose result gets a state."""

    def __reduce__(self):
        return self.function, self.args, {"x": 1}


ATTACKS = {
    "system": lambda c: Calls(os.system, f"touch {c}"),
    "exec": lambda c: Calls(exec, f"open({str(c)!r}, 'w')"),
    "open": lambda c: Calls(open, str(c), "w"),
    "getattr": lambda c: Calls(getattr, Calls(__import__, "os"), "system"),
    "Popen": lambda c: Calls(subprocess.Popen, ["touch", str(c)]),
    "nested torch.load": lambda c: Calls(torch.load, io.BytesIO(pickle.dumps(Calls(os.system, f"touch {c}")))),
    "nested pickle": lambda c: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {c}"))),
    "hub": lambda c: Calls(torch.hub.load, "a/b", "c"),
    "numpy file": lambda c: Calls(np.save, str(c), 1),
    "tensor method": lambda c: Calls(torch.Tensor.apply_, torch.ones(1), len),
    "shutil": lambda c: Calls(shutil.copy, __file__, str(c)),
    "path": lambda c: Calls(Path.touch, Path(c)),
    "from a placeholder": lambda c: Calls(builtins.getattr, collections.defaultdict(list), "__class__"),
    "eval in a set": lambda c: {Calls(eval, f"open({str(c)!r}, 'w')")},
    "state": lambda c: Sets(os.system, f"touch {c}"),
    "class that acts": lambda c: Calls(io.FileIO, str(c), "w"),
    "logging": lambda c: Calls(logging.FileHandler, str(c)),
    "thread": lambda c: Calls(threading.Timer, 0, print),
}


@pytest.mark.filterwarnings("ignore")
@FORMATS
@pytest.mark.parametrize("name", ATTACKS)
def test_code_is_refused_by_name_wherever_it_stands(tmp_path, canary, save, name):
    attack, path = ATTACKS[name](canary), tmp_path / "a.ckpt"
    for content in (
        {"state_dict": tensors(), "callbacks": attack},
        {"state_dict": {"a": attack}},
        [attack],
        {"a": attack},
    ):
        save(content, path)
        canary.unlink(missing_ok=True)  # should writing it have run something
        message = error_of(path)
        assert "is refused" in message and "wants to run code" in message, message


@contextlib.contextmanager
def torch_pickle(path, records=(), **options):
    """Write a torch archive around opcodes of one's own."""
    opcodes = [b"\x80\x02"]
    yield opcodes
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", b"".join(opcodes))
        archive.writestr("archive/version", b"3\n")
        for name, content in dict(records).items():
            archive.writestr(f"archive/{name}", content)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor_opcodes(key="0", numel=2, size=(2,), stride=(1,), offset=0, storage="FloatStorage"):
    """`_rebuild_tensor_v2` of a storage, as torch.save writes it."""

    def number(value):
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage_id = (
        b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    )
    arguments = (
        b"(" + storage_id + number(offset) + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def write_tensors(path, *tensors, records=(), **options):
    with torch_pickle(path, records, **options) as opcodes:
        opcodes.append(b"}(")
        for i, tensor in enumerate(tensors):
            opcodes.append(text(f"{i:04d}") + tensor)
        opcodes.append(b"u.")
    return path


def test_getattr_chain(tmp_path, canary):
    """`getattr(__import__('os'), 'system')('touch …')`, which only opcodes can say."""
    with torch_pickle(tmp_path / "a.pt") as opcodes:
        opcodes += [b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(", text("os"), b"tR", text("system"), b"tR("]
        opcodes += [text(f"touch {canary}"), b"tR."]
    assert "builtins.getattr is neither a tensor" in error_of(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "use", [b"(" + text("x") + b"tR", b")\x81", b")\x81}b", b"}b", b"K\x01a", b"(K\x01e", b"K\x01K\x02s"]
)
def test_names_that_are_let_through_stand_for_nothing(tmp_path, use):
    """Called, built, given a state, filled: it stays a placeholder, and is no tensor."""
    with torch_pickle(tmp_path / "a.pt") as opcodes:
        opcodes += [b"}", text("weight"), b"cpytorch_lightning.no\nsuch\n", use, b"s."]
    assert "weight is not a tensor" in error_of(tmp_path / "a.pt")


def test_the_handwritten_archive_is_a_good_one(tmp_path):
    path = write_tensors(tmp_path / "a.pt", tensor_opcodes(), records={"data/0": struct.pack("<2f", 1, 2)})
    assert same(read_checkpoint(path), {"0000": torch.tensor([1.0, 2.0])})
    assert same(torch.load(path, weights_only=True), {"0000": torch.tensor([1.0, 2.0])})


VALUES = {"data/0": bytes(8)}
LIES = {
    "more values than there are": (dict(numel=2**60), VALUES, "announced in data/0"),
    "fewer values than there are": (dict(numel=1), VALUES, "announced in data/0"),
    "beyond its storage": (dict(size=(3,)), VALUES, "outside of its storage"),
    "offset": (dict(offset=1), VALUES, "outside of its storage"),
    "negative offset": (dict(offset=-1), VALUES, "outside of its storage"),
    "huge size": (dict(size=(2**62, 4)), VALUES, "outside of its storage|unexpected"),
    "repeated values": (dict(size=(2**40,), stride=(0,)), VALUES, "outside of its storage"),
    "no such storage": (dict(key="1"), VALUES, "does not hold archive/data/1"),
    "a path": (dict(key="../../../etc/passwd"), VALUES, "does not hold"),
    "strange storage": (dict(storage="Storage"), VALUES, "0000 is not a tensor"),
    "big-endian": (dict(), {**VALUES, "byteorder": b"big"}, "big-endian"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_about_tensors(tmp_path, name):
    changes, records, pattern = LIES[name]
    path = write_tensors(tmp_path / "a.pt", tensor_opcodes(**changes), records=records)
    with pytest.raises(UserError, match=pattern):
        read_checkpoint(path)


def test_compressed_values_are_no_bomb(tmp_path):
    path = write_tensors(
        tmp_path / "a.pt", tensor_opcodes(numel=1 << 22, size=(1 << 22,)), records={"data/0": bytes(1 << 24)},
        compression=zipfile.ZIP_DEFLATED,
    )  # fmt: skip
    assert path.stat().st_size < 100_000 and "compressed or encrypted" in error_of(path)


def test_the_same_bytes_may_not_be_described_many_times(tmp_path):
    """Transposed views are copied: a hundred of one storage would be a hundred copies."""
    side = 100
    square = tensor_opcodes(numel=side**2, size=(side, side), stride=(1, side))
    path = write_tensors(tmp_path / "a.pt", *[square] * 100, records={"data/0": bytes(4 * side**2)})
    assert "more memory than the file has" in error_of(path)
    # One storage under two types is two storages; unaligned ones are copied.
    kinds = [tensor_opcodes(storage=kind, numel=size, size=(size,)) for kind, size in
             (("FloatStorage", 2500), ("IntStorage", 2500), ("HalfStorage", 5000), ("ShortStorage", 5000))]  # fmt: skip
    path = write_tensors(tmp_path / "b.pt", *kinds, records={"data/0": bytes(10_000)})
    assert "more memory than the file has" in error_of(path)


TWO_VALUES = struct.pack("<2f", 1, 2)


def legacy_file(path, *, numel=2, content=TWO_VALUES, keys=("0",), count=2, **system):
    """torch's format before zip files, around one tensor."""
    values = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, **system}]
    tensor = tensor_opcodes(numel=numel).replace(b"tQ", b"NtQ", 1)
    data = b"".join(pickle.dumps(value, 2) for value in values) + b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."
    path.write_bytes(data + pickle.dumps(list(keys), 2) + struct.pack("<q", count) + content)
    return path


def test_tensors_as_the_oldest_torch_wrote_them(tmp_path):
    """Before torch 0.4: another function, and parameters as instances of their class with a state."""
    path = legacy_file(tmp_path / "a.pt")
    old = (
        tensor_opcodes()
        .replace(b"_v2", b"")
        .replace(b"\x89ccollections\nOrderedDict\n)Rt", b"t")
        .replace(b"tQ", b"NtQ", 1)
    )
    data = path.read_bytes().replace(tensor_opcodes().replace(b"tQ", b"NtQ", 1), old)
    path.write_bytes(data)
    expected = {"a": torch.tensor([1.0, 2.0])}
    assert same(read_checkpoint(path), expected) and same(torch.load(path, weights_only=True), expected)
    for call in (b"R", b"\x81"):
        parameter = b"ctorch.nn.parameter\nParameter\n" + old + b"\x85" + call + b"(\x88\x89}tb"
        path.write_bytes(data.replace(old, parameter))
        assert same(read_checkpoint(path), expected)


def test_lies_in_the_old_format(tmp_path):
    path = tmp_path / "a.pt"
    assert same(read_checkpoint(legacy_file(path)), {"a": torch.tensor([1.0, 2.0])})
    assert same(torch.load(path, weights_only=True), {"a": torch.tensor([1.0, 2.0])})
    for changes, message in (
        (dict(count=3), "announces more values"), (dict(numel=2**50, count=2**50), "announces more values"),
        (dict(content=b"1234"), "announces more values"), (dict(keys=()), "do not belong"),
        (dict(keys=("0", "0")), "do not belong"), (dict(keys=("1",)), "do not belong"),
        (dict(keys=(0,)), "do not belong"), (dict(little_endian=False), "little-endian"), (dict(count=-1), "announces more"),
    ):  # fmt: skip
        assert message in error_of(legacy_file(path, **changes))


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"),
    (b"<html>not here</html>", "is not a checkpoint"),
    (b"\x80\x02K\x01.", "truncated or damaged"),
    (pickle.dumps({"a": 1}, 2) * 9, "not one of torch.save"),
    (b"PK\x03\x04" + bytes(100), "damaged zip archive"),
    (struct.pack("<Q", 2**40) + b"{}", "not a readable safetensors file"),
    (struct.pack("<Q", 100) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(100), "not a readable safetensors file"),
    (struct.pack("<Q", 100) + b"{" * 100, "not a readable safetensors file"),
])  # fmt: skip
def test_other_files(tmp_path, content, message):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert message in error_of(tmp_path / "a.ckpt")


def test_files_that_are_not_there_or_hold_no_weights(tmp_path):
    assert "does not exist; expected a checkpoint" in error_of(tmp_path / "a.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")  # opening it would wait for ever
    assert "is no regular file; expected a checkpoint" in error_of(tmp_path / "pipe.ckpt")
    assert "does not exist" in error_of(tmp_path)
    path = tmp_path / "a.pt"
    for content in ([torch.ones(1)], {}, torch.ones(1), {"state_dict": {}}):
        save_zip(content, path)
        assert "does not hold a state dict" in error_of(path)
    save_zip({"model": {"a": torch.ones(1)}}, path)
    assert "model is not a tensor" in error_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/model.ckpt", b"x")
    assert "not one of torch.save; if it holds a checkpoint, unpack it" in error_of(path)


def test_endless_work_is_refused(tmp_path, monkeypatch):
    with torch_pickle(tmp_path / "a.pt") as opcodes:
        opcodes += [b"N0"] * 600 + [b"."]
    monkeypatch.setattr(torch_checkpoint, "Budget", lambda: pickle_records.Budget(1000))
    assert "steps" in error_of(tmp_path / "a.pt")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_one_line_or_harmless(data):
    """Bytes overwritten or cut off anywhere: an error for the user, or tensors."""
    save = data.draw(st.sampled_from([save_zip, save_legacy, save_safetensors]))
    path = FUZZED / "a.ckpt"
    if save not in WHOLE:
        save({name: value.detach() for name, value in tensors().items()}, path)
        WHOLE[save] = path.read_bytes()
    content = bytearray(WHOLE[save])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.unlink(missing_ok=True)  # tensors of the last example are mapped
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))])
    try:
        assert all(isinstance(value, torch.Tensor) for value in read_checkpoint(path).values())
    except UserError as error:
        assert "\n" not in error.message


WHOLE = {}


def flipped(path, value, bit):
    """Flip one bit of a float32 of the file that has this value."""
    content = bytearray(path.read_bytes())
    start = content.index(struct.pack("<f", value))
    content[start + bit // 8] ^= 1 << bit % 8
    path.unlink()  # it may be mapped
    path.write_bytes(content)


@pytest.mark.parametrize("bit", [0, 7, 22, 30, 31])
def test_flipped_bits_of_weights_are_noticed_where_they_can_be(bit, tmp_path):
    """The zip format has checksums; in the older one, numbers that are no longer finite are refused by every network."""
    state = {"a": torch.tensor([1.5, 1.25]), "b": torch.ones(3)}
    for save, crc in ((save_zip, True), (save_zip, False), (save_legacy, True)):
        path = tmp_path / f"{save.__name__}-{crc}.pth"
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(crc)
        save(state, path)
        torch.serialization.set_crc32_options(before)
        assert same(read_checkpoint(path), state)
        flipped(path, 1.5, bit)
        if save is save_zip and crc:
            assert "a checksum in it does not fit" in error_of(path)
        elif bit == 30:  # 1.5 becomes NaN
            with pytest.raises(UserError, match=r"\.pth holds numbers in a that are not finite"):
                check_state_dict(state, read_checkpoint(path), path)
        else:
            check_state_dict(state, read_checkpoint(path), path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_networks_refuse_numbers_that_are_not_finite(dtype, value):
    values = torch.zeros(3, 5).to(dtype)
    expected = {"a": torch.empty(3, 5, device="meta"), "b": torch.empty(0), "n": torch.zeros(2, dtype=torch.int64)}
    found = {"a": values, "b": torch.empty(0), "n": torch.zeros(2, dtype=torch.int64)}
    check_state_dict(expected, found, "x.pth")
    values[2, 4] = value
    with pytest.raises(UserError, match=r"x\.pth holds numbers in a that are not finite"):
        check_state_dict(expected, found, "x.pth")


@pytest.fixture(autouse=True, scope="module")
def fuzzed(tmp_path_factory):
    global FUZZED
    FUZZED = tmp_path_factory.mktemp("fuzzed")


# --- Zip archives ----------------------------------------------------------------------------------------------------

BODY = bytes(range(256)) * 40


def write_zip(path, entries, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def refused(path, dest, pattern, suffix="model.ckpt"):
    """One clear line, and nothing written anywhere."""
    before = {file for file in path.parent.parent.rglob("*")}
    with pytest.raises(UserError, match=pattern) as caught:
        extract_member(path, suffix, dest)
    assert "\n" not in caught.value.message
    assert {file for file in path.parent.parent.rglob("*")} == before


@pytest.fixture
def place(tmp_path):
    (tmp_path / "cache" / "ldm").mkdir(parents=True)
    return tmp_path / "cache" / "ldm"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["model.ckpt", "ldm/beds/model.ckpt", "./model.ckpt"])
def test_member_is_found_by_the_end_of_its_name(place, name, compression):
    entries = {"config.yaml": b"x", "other-model.ckpt": b"y", name: BODY}
    path = write_zip(place / "a.zip", entries, compression=compression)
    dest = place / "new" / "weights.ckpt"
    assert extract_member(path, "model.ckpt", dest) == dest and dest.read_bytes() == BODY
    assert [file.name for file in dest.parent.iterdir()] == ["weights.ckpt"]


HOSTILE_NAMES = ["../model.ckpt", "../../../tmp/model.ckpt", "/model.ckpt", "a/../../model.ckpt", "..\\x/model.ckpt"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_point_elsewhere_are_refused(place, name):
    refused(write_zip(place / "a.zip", {name: BODY}), place / "model.ckpt", "points outside of the archive")


def test_other_names_in_the_archive_decide_nothing(place):
    path = write_zip(place / "a.zip", {"../canary": b"x", "/canary": b"x", "model.ckpt": BODY})
    extract_member(path, "model.ckpt", place / "out.ckpt")
    assert sorted(file.name for file in place.parent.rglob("*")) == ["a.zip", "ldm", "out.ckpt"]


def test_links_are_refused(place):
    info = zipfile.ZipInfo("model.ckpt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(place / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    refused(place / "a.zip", place / "model.ckpt", "is a link or a device")


def test_bombs_are_refused(place, monkeypatch):
    path = write_zip(place / "a.zip", {"model.ckpt": bytes(1_000_000)}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archives, "MAX_UNCHECKED", 1000)
    refused(path, place / "model.ckpt", r"grows from \d{3} to 1,000,000 bytes")
    change_directory(path, 20, "<I", 500_000)  # a packed size that the archive claims, but does not have
    refused(path, place / "model.ckpt", r"grows from 1,\d{3} to 1,000,000 bytes")


def test_no_room(place, monkeypatch):
    path = write_zip(place / "a.zip", {"model.ckpt": BODY})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    refused(path, place / "model.ckpt", "needs 1 MB, 0 MB are free; make room")


def change_directory(path, offset, layout, value, local=None):
    """Overwrite a number in the directory of an archive of one file, and perhaps in the file's own header."""
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, data.index(b"PK\x01\x02") + offset, value)
    if local is not None:
        struct.pack_into(layout, data, local, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [len(BODY) - 100, len(BODY) + 100])
def test_lies_about_the_length(place, size, compression):
    path = write_zip(place / "a.zip", {"model.ckpt": BODY}, compression=compression)
    refused(change_directory(path, 24, "<I", size, local=22), place / "model.ckpt", "damaged")


def test_damage(place):
    dest = place / "model.ckpt"
    refused(place / "none.zip", dest, "does not exist; expected a zip archive with model.ckpt")
    (place / "page.zip").write_bytes(b"<html>")
    refused(place / "page.zip", dest, "damaged or no zip archive")
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(place / "a.zip", {"model.ckpt": os.urandom(1000) + BODY}, compression=kind)
        data = bytearray(path.read_bytes())
        data[300] ^= 255
        path.write_bytes(data)
        refused(path, dest, "damaged")
        path.write_bytes(data[:-500])
        refused(path, dest, "damaged")
    encrypted = change_directory(write_zip(place / "e.zip", {"model.ckpt": BODY}), 8, "<H", 1, local=6)
    refused(encrypted, dest, "damaged or no zip archive .*encrypted")
    refused(write_zip(place / "l.zip", {"model.ckpt": BODY}, compression=zipfile.ZIP_LZMA), dest, "unusual way")


def test_a_file_there_before_survives_a_bad_archive(place):
    dest = place / "model.ckpt"
    dest.write_bytes(b"old")
    path = write_zip(place / "a.zip", {"model.ckpt": BODY})
    change_directory(path, 16, "<I", 1, local=14)  # the checksum, which is compared at the very end
    refused(path, dest, "damaged")
    assert dest.read_bytes() == b"old"


def test_none_or_several(place):
    refused(write_zip(place / "a.zip", {}), place / "x", "holds no files called model.ckpt .it is empty.; expected one")
    refused(
        write_zip(place / "a.zip", {"my-model.ckpt": b""}),
        place / "x",
        r"holds no files called model.ckpt \(my-model.ckpt\)",
    )
    refused(write_zip(place / "a.zip", {"a/model.ckpt": b"", "b/model.ckpt": b""}), place / "x", "holds 2 files")
    path = write_zip(place / "a.zip", {"a/model.ckpt": b"1", "b/model.ckpt": b"2"})
    assert extract_member(path, "b/model.ckpt", place / "x").read_bytes() == b"2"


def test_checkpoint_from_an_archive(place):
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors()}, buffer)
    path = write_zip(place / "a.zip", {"ldm/model.ckpt": buffer.getvalue()})
    assert same(read_checkpoint(extract_member(path, "model.ckpt", place / "model.ckpt")), tensors())
    assert hashlib.sha256((place / "model.ckpt").read_bytes()).digest() == hashlib.sha256(buffer.getvalue()).digest()
