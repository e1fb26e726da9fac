"""Pickles of EDM networks: every published layout is read exactly, and nothing in any file is executed."""

import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from edm_pickle_files import (
    Persistent,
    foreign_names,
    randomised,
    write_edm2_pickle,
    write_edm_pickle,
    write_reference_student,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dnnlib import UserError
from models import EDM2Precond, EDMPrecond
from models.building import build_network
from models.latent import LatentScale
from models.published.edm_pickle import read_edm_pickle
from models.published.pickle_records import MAX_STEPS

IMAGES = dict(img_resolution=16, img_channels=3)
SONG = dict(IMAGES, model_type="SongUNet", model_channels=8, num_blocks=1, attn_resolutions=[8])
NETS = {
    "ddpmpp": dict(SONG, channel_mult=[1, 2], augment_dim=9, dropout=0.13),
    "ddpmpp-labels": dict(SONG, channel_mult=[1, 2, 2], label_dim=10, channel_mult_emb=2, num_blocks=2),
    "ncsnpp": dict(
        SONG,
        channel_mult=[2, 2],
        embedding_type="fourier",
        encoder_type="residual",
        channel_mult_noise=2,
        resample_filter=[1, 3, 3, 1],
    ),
    "song-skip": dict(SONG, channel_mult=[1, 1], encoder_type="skip", decoder_type="skip", attn_resolutions=[]),
    "adm": dict(
        img_resolution=16,
        img_channels=1,
        label_dim=10,
        model_type="DhariwalUNet",
        model_channels=32,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[8],
        use_fp16=True,
    ),
}
EDM2 = dict(IMAGES, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8],
            channels_per_head=16, dropout=0.1)  # fmt: skip
TRAINING = dict(dataset_name="cifar10", num_steps=4, M=3, afs=True, schedule_rho=7.0, max_order=None)


def make(name, **kwargs):
    return randomised(EDMPrecond(**NETS[name], **kwargs))


def assert_same(file, net):
    """The file has the tensors of `net`, bitwise and in order, and builds a network that computes the same."""
    expected = net.state_dict()
    assert list(file.state_dict) == list(expected)
    for name, tensor in file.state_dict.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, net.img_channels, 16, 16, generator=generator) * 3
    call = dict(sigma=torch.tensor([0.5, 7.0]), class_labels=torch.eye(2, net.label_dim) if net.label_dim else None)
    rebuilt = build_network({"class": file.class_name, **file.init_kwargs}, file.state_dict, "file")
    rebuilt.requires_grad_(False)
    steps = [None, 5] if net.model.use_step_condition else [None]
    for step in steps:
        torch.testing.assert_close(rebuilt(x, step_condition=step, **call), net(x, step_condition=step, **call))


AUDITED = ["exec", "compile", "import", "os", "subprocess", "pickle", "ctypes", "socket"]


@pytest.fixture(scope="session")
def audit():
    """Names of audited events between `start` and `stop`, other than opening the file itself."""
    events, recording = [], []

    def hook(event, args):
        if recording and event.split(".")[0] in AUDITED:
            events.append(event)

    sys.addaudithook(hook)  # cannot be removed again, so there is one for all tests

    class Audit:
        def __enter__(self):
            events.clear()
            recording.append(True)
            return events

        def __exit__(self, *exc_info):
            recording.clear()

    return Audit()


# What can be read


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", NETS)
def test_published_layout(tmp_path, audit, name, protocol):
    net, canary = make(name), tmp_path / "canary"
    source = f"open({str(canary)!r}, 'w')"
    path = write_edm_pickle(tmp_path / "net.pkl", net, NETS[name], source=source, protocol=protocol)
    assert source.encode() in path.read_bytes()
    with audit as events:
        file = read_edm_pickle(path)
    assert not events and not canary.exists()
    assert (file.class_name, file.key, file.training_kwargs) == ("EDMPrecond", "ema", None)
    assert file.init_kwargs == NETS[name]
    assert_same(file, net)
    exec(source)
    assert canary.exists()


def test_positional_and_numpy_constructor_arguments(tmp_path):
    net, kwargs = make("ddpmpp"), dict(NETS["ddpmpp"])
    args = (kwargs.pop("img_resolution"), np.int64(kwargs.pop("img_channels")))
    kwargs.update(channel_mult=tuple(kwargs["channel_mult"]), dropout=np.float64(0.13), use_fp16=np.bool_(False))
    kwargs.update(sigma_data=np.float32(0.5))
    path = write_edm_pickle(tmp_path / "net.pkl", net, kwargs, args=args)
    file = read_edm_pickle(path)
    assert file.init_kwargs == {**NETS["ddpmpp"], "use_fp16": False, "sigma_data": 0.5}
    assert {type(value) for value in file.init_kwargs.values()} == {int, str, list, float, bool}
    assert_same(file, net)


@pytest.mark.parametrize("latents", [None, ([0.12, 0.11, 0.13], [-0.7, 0, 0.5])], ids=["pixels", "latents"])
def test_edm2(tmp_path, audit, latents):
    net, canary = randomised(EDM2Precond(**EDM2)), tmp_path / "canary"
    source = f"open({str(canary)!r}, 'w')"
    path = write_edm2_pickle(tmp_path / "net.pkl", net, EDM2, latents, source=source)
    with audit as events:
        file = read_edm_pickle(path)
    assert not events and not canary.exists() and source.encode() in path.read_bytes()
    assert (file.class_name, file.key, file.is_student, file.init_kwargs) == ("EDM2Precond", "ema", False, EDM2)
    if latents is None:
        assert file.latents is None
    else:
        assert file.latents == LatentScale(*(np.float32(values).tolist() for values in latents))
    net.load_state_dict({name: tensor.half().float() for name, tensor in net.state_dict().items()})
    assert_same(file, net)


def test_edm2_without_an_encoder_is_in_pixel_space(tmp_path):
    net = EDM2Precond(**EDM2)
    kwargs = {name: value for name, value in EDM2.items() if name not in ("img_resolution", "img_channels")}
    file = read_edm_pickle(write_edm2_pickle(tmp_path / "net.pkl", net, kwargs, args=(16, 3), encoder=None))
    assert file.latents is None and file.init_kwargs == EDM2


def array(value):
    return np.array(value, np.float32)


@pytest.mark.parametrize("encoder, match", [
    (Persistent("FluxEncoder", {}, ""), "holds a FluxEncoder as its encoder"),
    ([1], "holds a list as its encoder"),
    (Persistent("StabilityVAEEncoder", {"vae_name": "a/b"}, ""), "on the latents of a/b; expected stabilityai/sd-vae"),
    (dict(scale=array([1, 2]), bias=array([1])), "not a number for each channel"),
    (dict(scale=[1.0], bias=[1.0]), "encoder has no scale and bias"),
    (dict(scale=array([0]), bias=array([1])), "scale and bias of latents are not usable"),
    (dict(scale=array([np.inf]), bias=array([1])), "scale and bias of latents are not usable"),
    (dict(scale=np.array(["a"]), bias=array([1])), "NumPy values of type U1"),
    (dict(scale=np.ones([2, 2], order="F"), bias=array([1])), "array of another size"),
])  # fmt: skip
def test_unusable_encoders_of_edm2(tmp_path, encoder, match):
    if isinstance(encoder, dict):
        encoder = Persistent("StabilityVAEEncoder", {"vae_name": "stabilityai/sd-vae-ft-mse", **encoder}, "")
    refused(write_edm2_pickle(tmp_path / "net.pkl", EDM2Precond(**EDM2), EDM2, encoder=encoder), match)


def test_arrays_are_numpys_and_as_large_as_they_say(tmp_path):
    path = write_edm2_pickle(tmp_path / "net.pkl", EDM2Precond(**EDM2), EDM2, ([1.0] * 4, [0.5] * 4))
    content, data = path.read_bytes(), array([0.5] * 4).tobytes()
    assert content.count(b"\x10" + data) == 1
    path.write_bytes(content.replace(b"\x10" + data, b"\x10" + data[:12] + b"\x00\x00\xc0\x7f"))  # nan
    refused(path, "scale and bias of latents are not usable")
    path.write_bytes(content.replace(b"K\x04\x85", b"K\x05\x85"))
    refused(path, "array of another size")
    path.write_bytes(content.replace(b"ndarray", b"ndarrai"))
    refused(path, r"numpy\.ndarrai is neither")


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_reference_student(tmp_path, audit, name, step):
    net = make(name, use_step_condition=step)
    path = write_reference_student(tmp_path / "student.pkl", net, TRAINING, beside=step)
    with audit as events:
        file = read_edm_pickle(path)
    assert not events
    assert file.key == "model" and file.training_kwargs == TRAINING
    assert file.init_kwargs.get("use_step_condition", False) == step
    for argument, value in NETS[name].items():
        # Dropout 0.1 is the default, which leaves its trace in the attribute as any other value.
        assert file.init_kwargs[argument] == value, argument
    assert file.init_kwargs["dropout"] == NETS[name].get("dropout", 0.1)
    assert (file.init_kwargs["sigma_data"], file.init_kwargs["sigma_max"]) == (0.5, float("inf"))
    assert_same(file, net)


def test_student_settings_keep_what_is_plain(tmp_path):
    odd = dict(dtype=torch.float16, device=torch.device("cuda", 0), size=torch.Size([2, 3]), weights=torch.zeros(3))
    path = write_reference_student(tmp_path / "student.pkl", make("ddpmpp"), {**TRAINING, **odd})
    kept = dict(TRAINING, dtype="torch.float16", device="cuda", size=[2, 3])
    assert read_edm_pickle(path).training_kwargs == kept


def test_step_layers_of_a_persistent_student_are_seen(tmp_path):
    net = make("ddpmpp", use_step_condition=True)
    file = read_edm_pickle(write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"]))
    assert file.init_kwargs == {**NETS["ddpmpp"], "use_step_condition": True}
    assert_same(file, net)


def test_half_precision_cuda_and_strided_tensors(tmp_path):
    net = make("ddpmpp").half()
    weight = net.model.enc["16x16_conv"].weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    large = torch.arange(99, dtype=torch.float16)
    net.model.map_layer0.bias.data = large[3 : 3 + 2 * len(net.model.map_layer0.bias) : 2]
    path = write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"])
    # Files written on a GPU say so; where a tensor lived is of no interest.
    content = path.read_bytes()
    assert content.count(b"\x03\x00\x00\x00cpu") > 50 and b"half" not in content
    path.write_bytes(content.replace(b"\x03\x00\x00\x00cpu", b"\x03\x00\x00\x00gpu"))
    file = read_edm_pickle(path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(file.state_dict[name], tensor.float()) and file.state_dict[name].is_contiguous()


def test_bfloat16_and_double(tmp_path):
    net = make("ddpmpp").to(torch.bfloat16)
    net.model.map_layer0.weight.data = net.model.map_layer0.weight.data.double() / 3
    file = read_edm_pickle(write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"]))
    assert all(torch.equal(file.state_dict[name], tensor.float()) for name, tensor in net.state_dict().items())


def test_buffers_that_are_not_saved_are_left_out(tmp_path):
    net = make("ddpmpp")
    net.model.register_buffer("scratch", torch.zeros(3), persistent=False)
    path = write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"])
    assert "model.scratch" not in read_edm_pickle(path).state_dict


# What cannot


def refused(path, match):
    """Reading `path` is one clear line."""
    with pytest.raises(UserError, match=match) as caught:
        read_edm_pickle(path)
    message = caught.value.message
    assert message.startswith(str(path)) and message.isprintable() and len(message) < len(str(path)) + 250
    return message


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """What it calls may be called in turn."""


OS = Call(importlib.import_module, "os")


def text(value):
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def touch(canary):
    return f"touch '{canary}'"


def call_system(module, name, canary):
    """A call of the global `module.name`, by the opcodes of protocol 4."""
    return b"\x80\x04" + text(module) + text(name) + pickle.STACK_GLOBAL + text(touch(canary)) + b"\x85R."


def nested_save(canary):
    buffer = io.BytesIO()
    torch.save(Call(os.system, touch(canary)), buffer, _use_new_zipfile_serialization=False)
    return pickle.dumps({"ema": Call(torch.storage._load_from_bytes, buffer.getvalue())})


def nested_zip(canary):
    buffer = io.BytesIO()
    torch.save(Call(os.system, touch(canary)), buffer)
    return pickle.dumps({"ema": Call(torch.storage._load_from_bytes, buffer.getvalue())})


def overwritten_memo(canary):
    """Memo 0 holds an allowed name until it is overwritten, and every use goes through the memo."""
    names = [("collections", b"\x00"), ("OrderedDict", b"\x01"), ("os", b"\x00"), ("system", b"\x01")]
    stored = b"".join(text(name) + b"q" + place + b"0" for name, place in names)
    return b"\x80\x04" + stored + b"h\x00h\x01\x93q\x020h\x02" + text(touch(canary)) + b"\x85R."


def registered_extension(canary):
    return b"\x80\x02" + pickle.EXT1 + b"\xf0" + text(touch(canary)) + b"\x85R."


def state_of_a_class(canary):
    """`__setstate__` of a class that a file brings along, reached by BUILD."""
    inner = pickle.dumps(Call(eval, f"type('C', (), dict(__setstate__=lambda s, x: open({str(canary)!r}, 'w')))()"))
    return inner[:-1] + b"Nb."


def write_through_partial(canary):
    return pickle.dumps({"ema": Call(functools.partial(os.system, touch(canary)))})


LIVE = {
    "os-system": (lambda c: pickle.dumps({"ema": Call(os.system, touch(c))}), r"posix\.system"),
    "os-system-protocol-2": (lambda c: b"\x80\x02cos\nsystem\n" + text(touch(c)) + b"\x85R.", r"os\.system"),
    "other-key": (lambda c: pickle.dumps({"ema": None, "loss_fn": Call(os.system, touch(c))}), r"posix\.system"),
    "eval": (lambda c: pickle.dumps(Call(eval, f"open({str(c)!r}, 'w')")), r"builtins\.eval"),
    "exec": (lambda c: pickle.dumps(Call(exec, f"open({str(c)!r}, 'w')")), r"builtins\.exec"),
    "open": (lambda c: pickle.dumps(Call(open, str(c), "w")), r"(_?io)\.open"),
    "popen": (lambda c: pickle.dumps(Call(subprocess.Popen, ["touch", str(c)])), r"subprocess\.Popen"),
    "nested-torch-save": (nested_save, r"holds a tensor .*posix\.system"),
    "nested-torch-save-zip": (nested_zip, r"holds a tensor .*PERSID"),
    "getattr": (lambda c: pickle.dumps(Call(Call(getattr, OS, "system"), touch(c))), r"builtins\.getattr"),
    "dotted-name": (
        lambda c: call_system("torch.nn.modules.module", "torch.os.system", c),
        r"module\.torch\.os\.system",
    ),
    "dotted-allowed": (lambda c: call_system("torch", "os.system", c), r"torch\.os\.system"),
    "partial": (write_through_partial, r"functools\.partial"),
    "methodcaller": (
        lambda c: pickle.dumps(Call(operator.methodcaller("system", touch(c)), OS)),
        r"operator\.methodcaller",
    ),
    "memo": (overwritten_memo, r"os\.system"),
    "extension": (registered_extension, "EXT1"),
    "inst": (lambda c: b"\x80\x02(" + text(touch(c)) + b"ios\nsystem\n.", "INST"),
    "obj": (lambda c: b"\x80\x02(csubprocess\nPopen\n](" + text("touch") + text(str(c)) + b"eo.", r"subprocess\.Popen"),
    "setstate": (state_of_a_class, r"builtins\.eval"),
}


@pytest.mark.parametrize("name", LIVE)
def test_code_is_refused_by_name(tmp_path, audit, name):
    build, match = LIVE[name]
    canary, path = tmp_path / "canary", tmp_path / "hostile.pkl"
    path.write_bytes(build(canary))
    with audit as events:
        message = refused(path, match)
    assert not events and not canary.exists()
    assert "is refused" in message and ("wants to run code" in message or "opcode" in message)

    # The same bytes do run code where they are simply unpickled.
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        pickle.loads(path.read_bytes())
    except Exception:
        pass  # what it does after the canary is of no interest
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)
    deadline = time.time() + 10
    while not canary.exists() and time.time() < deadline:
        time.sleep(0.01)
    assert canary.exists()


def hook_call(meta):
    return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85R"


MODULE = b"ctorch.nn.modules.module\nModule\n"


def storage_bytes(tensor):
    """What a tensor's storage pickles itself as."""
    typed = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
    return typed.__reduce__()[1][0]


def load_storage(data):
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"


def integer(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def view(offset, size, stride, storage=None):
    """`_rebuild_tensor_v2` on six values."""
    storage = load_storage(storage_bytes(torch.zeros(6))) if storage is None else storage
    size, stride = (b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(offset) + size + stride + b"\x89}tR"


def laughs(depth=60):
    """A list of two lists of two lists … that takes a few bytes per level."""
    return b"]" + b"q\x000" + b"".join(b"](h\x00h\x00eq\x000" for _ in range(depth)) + b"h\x00"


def zip_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(50_000_000))
    return load_storage(buffer.getvalue())


INERT = {
    "unsupported-class": (hook_call(b"}"), "persistent object without class name"),
    "call-of-a-class": (MODULE + b")R", "calls something"),
    "call-of-a-value": (b"])R", "calls something"),
    "ordered-dict-with-number-key": (b"ccollections\nOrderedDict\n]](K\x01K\x02ea\x85R", "keys of a dict"),
    "ordered-dict-of-texts": (b"ccollections\nOrderedDict\n](" + text("ab") + b"e\x85R", "not pairs"),
    "ordered-dict-of-a-dict": (b"ccollections\nOrderedDict\n}\x85R", "unexpected arguments"),
    "ordered-dict-with-more": (b"ccollections\nOrderedDict\n]]\x86R", "unexpected arguments"),
    "old-text-too-long": (b"T\xff\xff\xff\xff", "announces more bytes"),
    "ordered-dict-subclass": (b"ccollections\nCounter\n)R", r"collections\.Counter"),
    "slots-state": (MODULE + b")\x81}}\x86b", "sets the state"),
    "state-of-a-function": (b"ccollections\nOrderedDict\n}b", "sets the state"),
    "state-of-a-dict": (b"}}b", "sets the state"),
    "new-object-of-a-function": (b"ccollections\nOrderedDict\n)\x81", "builds something"),
    "new-object-with-keywords": (MODULE + b")}\x92", "does not hold a dict"),
    "new-object-with-arguments": (MODULE + b"K\x01\x85\x81", "builds something"),
    "private-name-of-torch": (b"ctorch.nn.modules.module\nModule.__init__.__globals__\n", r"__globals__"),
    "another-module-of-torch": (b"ctorch.nn.modules.module.torch\nload\n", r"torch\.load"),
    "dtype-look-alike": (b"ctorch\nload\n", r"torch\.load"),
    "storage-outside-of-bytes": (b"ctorch\nFloatStorage\n", r"torch\.FloatStorage"),
    "module-with-newline": (text("os\n\x1b[2Jfine") + text("system") + b"\x93", r"os\\n\\x1b\[2Jfine\.system"),
    "persistent-id": (text("x") + b"Q", "persistent id"),
    "persistent-id-as-text": (b"Px\n", "PERSID"),
    "out-of-band-buffer": (b"\x97", "NEXT_BUFFER"),
    "unknown-opcode": (b"\xff", "0xff"),
    "number-as-global": (b"K\x01K\x02\x93", "not a text"),
    "name-without-end": (b"c" + b"x" * 300, "does not end"),
    "object-array": (b"cnumpy\ndtype\n" + text("O8") + b"\x85R", "type O8"),
    "number-of-the-wrong-length": (
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x85RC\x04aaaa\x86R",
        "wrong length",
    ),
    "big-endian-number": (b"cnumpy\ndtype\n" + text("f8") + b"\x85RK\x03" + text(">") + b"\x86b", "sets the state"),
    "number-key": (b"}K\x01K\x02s", "keys of a dict"),
    "tuple-key": (b"})" + b"\x85" * 100_000 + b"Ns", "keys of a dict"),  # hashing it would overflow the C stack
    "key-without-value": (b"}(" + text("x") + b"u", "key without a value"),
    "items-for-a-number": (b"K\x01(K\x01e", "that is none"),
    "empty-stack": (b"R", "where there is none"),
    "below-a-mark": (b"K\x01(0", "where there is none"),
    "mark-that-is-not-there": (b"t", "not opened"),
    "memo-that-is-not-there": (b"h\x07", "not there"),
    "memo-far-away": (b"K\x01r\xff\xff\xff\x7f", "does not hold a dict"),
    "huge-bytes": (b"\x8e" + struct.pack("<Q", 2**62), "announces more bytes"),
    "huge-bytes-32": (b"B" + struct.pack("<I", 2**32 - 1), "announces more bytes"),
    "huge-text": (b"\x8d" + struct.pack("<Q", 2**63), "announces more bytes"),
    "huge-frame": (b"\x95" + struct.pack("<Q", 2**62), "announces more bytes"),
    "huge-bytearray": (b"\x96" + struct.pack("<Q", 2**40), "announces more bytes"),
    "huge-integer": (b"\x8b" + struct.pack("<i", 2**31 - 1), "announces more bytes"),
    "many-steps": (b"]" * (MAX_STEPS + 1), "steps to read"),
    "deep-lists": (b"]" * 100_000 + b"a" * 99_999, "does not hold a dict"),
    "deep-tuples": (b")" + b"\x85" * 100_000, "does not hold a dict"),
    "zip-bomb": (zip_bomb(), "PERSID"),
    "storage-of-nothing": (load_storage(b""), "holds a tensor that is truncated"),
    "storage-with-foreign-magic": (load_storage(b"\x80\x02K\x01." * 5), "torch's format"),
    "storage-that-announces-more": (
        load_storage(storage_bytes(torch.zeros(6)).replace(b"K\x06N", b"J\xff\xff\xff\x7fN")),
        "2147483647 values announced, 24 bytes",
    ),
    "storage-that-announces-more-twice": (
        load_storage(
            storage_bytes(torch.zeros(6))
            .replace(b"K\x06N", b"J\xff\xff\xff\x7fN")
            .replace(struct.pack("<q", 6) + bytes(24), struct.pack("<q", 2**31 - 1) + bytes(24))
        ),
        "2147483647 values announced, 24 bytes",
    ),
    "storage-of-objects": (
        load_storage(storage_bytes(torch.zeros(6)).replace(b"torch\nFloatStorage", b"builtins\nFloatStorage")),
        r"builtins\.FloatStorage",
    ),
    "big-endian": (
        load_storage(storage_bytes(torch.zeros(6)).replace(b"endianq\x02\x88", b"endianq\x02\x89")),
        "torch's format",
    ),
    "view-offset": (view(6, [1], [1]), "outside of its storage"),
    "view-negative-offset": (view(-1, [1], [1]), "outside of its storage"),
    "view-size": (view(0, [7], [1]), "outside of its storage"),
    "view-negative-size": (view(0, [-1, -1], [1, 1]), "outside of its storage"),
    "view-negative-stride": (view(5, [2], [-1]), "outside of its storage"),
    "view-stride": (view(0, [2, 2], [4, 2]), "outside of its storage"),
    "view-lengths": (view(0, [2, 2], [1]), "outside of its storage"),
    "view-dimensions": (view(0, [1] * 9, [1] * 9), "outside of its storage"),
    "view-repeated": (view(0, [10**12], [0]), "outside of its storage"),
    "view-overflow": (view(0, [2**63, 2**63], [2**63, 2**63]), "outside of its storage"),
    "view-overflow-empty": (view(0, [0, 2**70], [1, 1]), "outside of its storage"),
    "view-of-a-list": (view(0, [1], [1], storage=b"]"), "unexpected arguments"),
}


@pytest.mark.parametrize("name", INERT)
def test_malformed_is_refused(tmp_path, audit, name):
    body, match = INERT[name]
    path = tmp_path / "malformed.pkl"
    path.write_bytes(b"\x80\x04" + body + b".")
    start = time.perf_counter()
    with audit as events:
        refused(path, match)
    assert not events and time.perf_counter() - start < 20


@pytest.mark.parametrize("name", [name for name in INERT if re.match("huge|memo|storage|view|zip", name)])
def test_announced_lengths_are_not_allocated(tmp_path, name):
    path = tmp_path / "malformed.pkl"
    path.write_bytes(b"\x80\x04" + INERT[name][0] + b".")
    tracemalloc.start()
    try:
        refused(path, INERT[name][1])
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_views_that_fit_are_read(tmp_path):
    """The checks above refuse nothing but what lies outside."""
    fitting = [([2, 3], [3, 1], 0), ([3, 2], [1, 3], 0), ([1, 6], [2**70, 1], 0), ([], [], 5), ([0], [1], 6)]
    for size, stride, offset in fitting:
        path = tmp_path / "net.pkl"
        path.write_bytes(b"\x80\x04" + view(offset, size, stride) + b".")
        refused(path, "does not hold a dict")


@pytest.mark.parametrize("keep", [0, 1, 2, 50, 0.1, 0.5, 0.9, -1])
def test_truncated(tmp_path, keep):
    path = write_edm_pickle(tmp_path / "net.pkl", make("ddpmpp"), NETS["ddpmpp"])
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(path, "truncated or damaged|not a pickle|is empty")


def test_not_a_pickle(tmp_path):
    path = tmp_path / "net.pkl"
    refused(path, "does not exist")
    refused(tmp_path, "does not exist")
    path.write_text("<html>404</html>")
    refused(path, "is not a pickle")
    torch.save({"ema": 1}, path)
    refused(path, "is not a pickle")
    path.write_bytes(pickle.dumps({"ema": 1}, protocol=0))
    refused(path, "is not a pickle")
    path.write_bytes(b"\x80\x07.")
    refused(path, "protocol 7")
    path.write_bytes(b"\x80\x04\x8c\x02\xff\xfe.")
    refused(path, "not UTF-8")


def test_other_contents(tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"G": 1, "D\n": 2}))
    refused(path, r"no network under 'ema' or 'model' but G, D\\n")
    path.write_bytes(pickle.dumps({"ema": [1]}))
    refused(path, "holds a list under 'ema'; expected EDMPrecond")


def test_texts_and_dicts_of_python_2(tmp_path):
    path = tmp_path / "net.pkl"
    pairs = b"](](U\x01aK\x01e](T\x02\x00\x00\x00bcNee"
    path.write_bytes(b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.")
    refused(path, "holds no network under 'ema' or 'model' but a, bc$")


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditioning_is_refused_by_name(tmp_path, name):
    net = make("ddpmpp")
    path = write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"], class_name=name)
    refused(path, f"holds a {name}, which this program does not have; expected EDMPrecond")
    path = write_reference_student(tmp_path / "student.pkl", net, {}, class_name="VPPrecond")
    refused(path, "holds a VPPrecond, which this program does not have; expected EDMPrecond")
    path = write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"], class_name="GANPrecond")
    refused(path, "holds a GANPrecond under 'ema'; expected EDMPrecond")


def with_modules(tmp_path, change, kwargs=None):
    """A published file after `change(net)`; its networks are our modules, so any graph of modules can be made."""
    net = make("ddpmpp")
    change(net)
    return write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"] if kwargs is None else kwargs)


def test_other_networks_inside(tmp_path):
    path = with_modules(tmp_path, lambda net: setattr(net, "model", nn.ModuleDict()))
    refused(path, "EDMPrecond around a ModuleDict; expected SongUNet or DhariwalUNet")
    path = with_modules(tmp_path, lambda net: setattr(net, "model", None))
    refused(path, "EDMPrecond around a NoneType")


def test_tensors_that_no_network_has(tmp_path):
    path = with_modules(tmp_path, lambda net: net.register_buffer("count", torch.zeros(3, dtype=torch.int64)))
    refused(path, "holds count as torch.int64")
    path = with_modules(tmp_path, lambda net: net._buffers.update(weight="text"))
    refused(path, "weight is not a tensor")
    path = with_modules(tmp_path, lambda net: net._buffers.update({"model.map_layer0.bias": torch.zeros(3)}))
    refused(path, "two tensors are called model.map_layer0.bias")


def test_cycles_and_shared_modules(tmp_path):
    with foreign_names() as classes:
        net = object.__new__(classes["EDMPrecond"])
        unet = object.__new__(classes["SongUNet"])
        vars(net).update(_parameters={}, _buffers={}, _modules={"model": unet})
        vars(unet).update(_parameters={}, _buffers={}, _modules={"net": net})
        path = tmp_path / "net.pkl"
        path.write_bytes(pickle.dumps({"ema": net}))
        refused(path, "modules that contain each other")
        vars(unet).update(_modules={})
        unet._modules["self"] = unet
        path.write_bytes(pickle.dumps({"ema": net}))
        refused(path, "modules that contain each other")
        shared = {}
        vars(unet).update(_parameters=shared, _buffers=shared, _modules={})
        path.write_bytes(pickle.dumps({"ema": net}))
        refused(path, "modules that contain each other")
        # A chain of modules, each ten times in the one above it: 10^14 places in a few kilobytes.
        leaf = nn.Identity()
        for _ in range(14):
            above = nn.Identity()
            above._modules.update({str(i): leaf for i in range(10)})
            leaf = above
        vars(unet).update(_parameters={}, _buffers={}, _modules={"leaf": leaf})
        path.write_bytes(pickle.dumps({"ema": net}))
        refused(path, "modules that contain each other")


def test_one_storage_for_many_tensors(tmp_path):
    """Views of one storage could multiply the memory that a file takes."""

    def share(net):
        big = torch.zeros(1_000_000)
        for i in range(20):
            net.register_buffer(f"big{i}", big)

    refused(with_modules(tmp_path, share), "more memory than the file has")

    def spread(net):
        ends = torch.zeros(1_000_000)[::999_999]
        for i in range(20):
            net.register_buffer(f"ends{i}", ends)

    refused(with_modules(tmp_path, spread), "more memory than the file has")


def test_one_long_name_for_many_tensors(tmp_path):
    def name(net):
        net.add_module("x" * 1000, nn.BatchNorm2d(1))

    refused(with_modules(tmp_path, name), "name has more than 300 characters")


def test_constructor_arguments_that_are_not_plain(tmp_path):
    net = make("ddpmpp")
    for value in (torch.zeros(2), nn.Identity(), {"x"}, 2**70):
        path = write_edm_pickle(tmp_path / "net.pkl", net, {**NETS["ddpmpp"], "dropout": value})
        refused(path, "constructor argument")
    path = write_edm_pickle(tmp_path / "net.pkl", net, NETS["ddpmpp"], args=(1,) * 9)
    refused(path, "not recorded as EDM does")
    cycle = [1]
    cycle.append(cycle)
    path = write_edm_pickle(tmp_path / "net.pkl", net, {**NETS["ddpmpp"], "channel_mult": cycle})
    refused(path, "constructor argument")


def test_lists_that_explode_when_copied(tmp_path):
    """Sixteen levels are within the depth that is allowed, and 10^16 copies are not."""
    value = [1]
    for _ in range(14):
        value = [value] * 10
    path = write_edm_pickle(tmp_path / "net.pkl", make("ddpmpp"), {**NETS["ddpmpp"], "channel_mult": value})
    refused(path, "steps to read")
    path.write_bytes(b"\x80\x04" + laughs() + b".")
    refused(path, "does not hold a dict")


def test_students_without_recognisable_tensors(tmp_path):
    net = make("ddpmpp")
    net.model.enc = nn.ModuleDict()
    refused(write_reference_student(tmp_path / "s.pkl", net, {}), "without encoder blocks")
    net = make("ddpmpp")
    net.model.map_layer0 = None
    refused(write_reference_student(tmp_path / "s.pkl", net, {}), "without a usable model.map_layer0.weight")
    net = make("ddpmpp")
    net.model.map_layer0.weight.data = torch.zeros(8)[:0].reshape(0, 4)
    refused(write_reference_student(tmp_path / "s.pkl", net, {}), "without a usable model.map_layer0.weight")


# Anything at all


SNIPPETS = [b"cos\nsystem\n", b"q\x00", b"h\x00", b"\x8a\xff", *(bytes([byte]) for byte in b"Rb\x81\x930(tue\x94.")]
MUTATION = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.one_of(
        st.tuples(st.just("replace"), st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("insert"), st.one_of(st.sampled_from(SNIPPETS), st.binary(min_size=1, max_size=9))),
        st.tuples(st.just("delete"), st.integers(1, 40)),
        st.tuples(st.just("swap"), st.integers(1, 300)),
    ),
)


fuzz = settings(deadline=2000, max_examples=300, derandomize=True)


def mutate(content, mutations):
    for where, (kind, what) in mutations:
        at = int(where * len(content))
        if kind == "replace":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + what :]
        else:
            middle, end = at + what, at + 2 * what
            content = content[:at] + content[middle:end] + content[at:middle] + content[end:]
    return content


@pytest.fixture(scope="module")
def fuzz_files(tmp_path_factory):
    """Small files whose bytes are mostly structure."""
    folder = tmp_path_factory.mktemp("fuzz")
    kwargs = dict(SONG, model_channels=4, channel_mult=[1], channel_mult_emb=1, attn_resolutions=[])
    net = EDMPrecond(**kwargs)
    teacher = write_edm_pickle(folder / "teacher.pkl", net, kwargs, source="raise SystemExit")
    student = write_reference_student(folder / "student.pkl", net, TRAINING)
    return folder, [teacher.read_bytes(), student.read_bytes()]


@fuzz
@given(st.integers(0, 1), st.lists(MUTATION, min_size=1, max_size=4))
def test_damaged_files_are_read_or_refused(fuzz_files, audit, which, mutations):
    folder, contents = fuzz_files
    path = folder / "mutated.pkl"
    path.write_bytes(mutate(contents[which], mutations))
    with audit as events:
        try:
            file = read_edm_pickle(path)
        except UserError as error:
            assert error.message.isprintable()
        else:
            assert all(tensor.dtype == torch.float32 for tensor in file.state_dict.values())
    assert not events


@fuzz
@given(st.lists(st.one_of(st.sampled_from(SNIPPETS), st.binary(max_size=6)), max_size=30))
def test_noise_is_refused(fuzz_files, audit, parts):
    path = fuzz_files[0] / "noise.pkl"
    path.write_bytes(b"\x80\x04" + b"".join(parts))
    with audit as events, pytest.raises(UserError):
        read_edm_pickle(path)
    assert not events
