"""EDM networks from pickles that other people publish, read without executing anything.

Unpickling calls whatever a file names, and EDM's files carry Python source that their persistence hook runs. So the
`pickle` module never sees them: a small machine interprets the opcodes. It imports nothing; a global is looked up in
two tables and becomes an inert record or one of a few constructors of this module, and any other is refused by name.

Two layouts are read, and the networks in both are `EDMPrecond` around a `SongUNet` or a `DhariwalUNet`:

- NVlabs/edm: `{'ema': net, ...}`. Every EDM class is pickled as a call of `_reconstruct_persistent_obj` with one dict
  of source text (never looked at), class name and instance `__dict__`; the constructor arguments are recorded.
- students of the reference SFD code: `{'model': net, ...}` with plain instances of the classes in
  `models.networks_edm`, and the settings of the training in `training_kwargs`, on the network or beside it. Where no
  constructor arguments are recorded, attributes and the tensors' names and shapes tell them.

A hostile file costs no more than a good one: lengths are checked against the bytes that are there before anything is
allocated, steps are counted, tensors may not add up to more than the file, and nothing recurses without a limit.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle  # names of opcodes only
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from torch import Tensor

#: The largest published network takes 90 thousand.
MAX_STEPS = 1_000_000
MAX_DEPTH = 16
MAX_NAME = 300

#: Arguments of EDMPrecond in their order, for files that record some by position.
PRECOND_ARGUMENTS = [
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "model_type",
]
UNREADABLE_PRECONDS = ("VPPrecond", "VEPrecond", "iDDPMPrecond")


@dataclass(frozen=True)
class EDMPickle:
    """A network as its file describes it.

    Attributes:
        class_name: class of the network, `EDMPrecond`.
        init_kwargs: its constructor arguments by name: numbers, strings, bools, None, lists and dicts of these. They
            are the file's claim: names and sizes are for the builder to check, before it allocates.
        state_dict: float32 tensors on the CPU under their published names, in the order of `Module.state_dict`.
        training_kwargs: settings of a student of the reference, as far as they are plain values; else None.
        key: where in the file the network was, `ema` or `model`.
    """

    class_name: str
    init_kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]
    training_kwargs: dict[str, Any] | None
    key: str


def read_edm_pickle(path: str | os.PathLike) -> EDMPickle:
    """Read the network in a pickle of NVlabs/edm or of the reference SFD code; nothing in it is executed.

    Raises:
        click.ClickException: no such file, a file of another kind, one that is damaged, or one that wants to run code.
    """
    try:
        data = _map_file(path)
        budget = _Budget()
        content = _Machine(data, 0, budget, _find_global).load()
        return _describe(content, budget, max_bytes=len(data))
    except _Refused as error:
        raise click.ClickException(f"{path} {error}") from None


class _Refused(Exception):
    """Why a file is not read: the rest of a sentence that begins with its path."""


class _NotPlain(_Refused):
    """A value is not a number, string, bool, None, or a list or dict of these."""


def _shown(text: str) -> str:
    """Text from a file, fit for one line of a terminal."""
    return ascii(text[:100])[1:-1]


def _map_file(path: str | os.PathLike) -> memoryview:
    if not os.path.isfile(path):
        raise _Refused("does not exist; expected the pickle of an EDM network")
    with open(path, "rb") as file:
        if file.read(1) != pickle.PROTO:
            raise _Refused("is not a pickle (protocol 2 or later); expected the pickle of an EDM network")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


# ------------------------------------------------------------------------------------------------------------------
# What a file can consist of


@dataclass(eq=False)
class _Budget:
    """Steps that are left for one file. Reading and converting draw on it, so that no nesting makes work explode."""

    steps: int = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise _Refused(f"takes more than {MAX_STEPS} steps to read, far more than any EDM network")


@dataclass(eq=False)
class _Class:
    """The name of a class of modules."""

    module: str
    name: str


@dataclass(eq=False)
class _Object:
    """An instance, as its class's name and its `__dict__`."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Function:
    """A constructor of this module: `build(budget, *args)`, with arguments of exactly these types.

    `ignored` more are accepted and dropped.
    """

    name: str
    types: tuple[type, ...]
    build: Callable[..., Any]
    ignored: int = 0

    def __call__(self, budget: _Budget, args: tuple) -> Any:
        extra = len(args) - len(self.types)
        if not 0 <= extra <= self.ignored or any(type(arg) is not kind for arg, kind in zip(args, self.types)):
            raise _Refused(f"is damaged: {self.name} with unexpected arguments")
        return self.build(budget, *args[: len(self.types)])


@dataclass(eq=False)
class _NumpyType:
    """`numpy.dtype`: the layout of one number."""

    layout: struct.Struct


@dataclass(eq=False)
class _Storage:
    """Bytes of the file that hold `numel` values."""

    data: memoryview
    dtype: torch.dtype
    numel: int


@dataclass(eq=False)
class _Tensor:
    """A view of a storage, checked to lie inside it. Only the tensors that are wanted become real."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, as a view and as a copy."""
        return max(math.prod(self.size), _extent(self.size, self.stride)) * self.storage.dtype.itemsize

    def materialise(self) -> Tensor:
        """A contiguous float32 copy."""
        extent = _extent(self.size, self.stride)
        itemsize = self.storage.dtype.itemsize
        values = torch.empty(extent, dtype=self.storage.dtype)
        start = self.offset * itemsize
        # A copy of bytes: torch cannot wrap the file's read-only memory.
        memoryview(values.view(torch.uint8).numpy())[:] = self.storage.data[start : start + extent * itemsize]
        return values.as_strided(self.size, self.stride).contiguous().float()


def _extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of values from the first to the last of a view."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride)) if math.prod(size) else 0


# ------------------------------------------------------------------------------------------------------------------
# The pickle machine


class _Machine:
    """Interprets one pickle that begins at `position` of `data`.

    It knows the opcodes that pickles of protocol 2 to 5 use for plain data and objects, and refuses the others (text
    opcodes of protocol 0, the extension registry, out-of-band buffers). Bytes become views of `data`; `find_global`
    maps names to records; keys are strings, so that no crafted hash makes a dict slow.
    """

    def __init__(
        self,
        data: memoryview,
        position: int,
        budget: _Budget,
        find_global: Callable[[str, str], Any],
        persistent_load: Callable[[Any], Any] | None = None,
    ) -> None:
        self.data, self.position, self.budget = data, position, budget
        self.find_global, self.persistent_load = find_global, persistent_load
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Run to the end of the pickle → its value; `position` is behind it."""
        while True:
            self.budget.spend(1)
            opcode = self.take(1)[0]
            if opcode == pickle.STOP[0]:
                return self.pop()
            handler = _HANDLERS.get(opcode)
            if handler is None:
                known = pickletools.code2op.get(chr(opcode))
                if known is None:
                    raise _Refused(f"is damaged: 0x{opcode:02x} is no pickle opcode")
                raise _Refused(f"is refused: the pickle opcode {known.name} has no place in the file of a network")
            handler(self)

    # Input

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise _Refused("is truncated or damaged: it announces more bytes than it has")
        view = self.data[self.position : end]
        self.position = end
        return view

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, count: int) -> str:
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError:
            raise _Refused("is damaged: a text is not UTF-8") from None

    def line(self) -> str:
        """Text up to a newline, as the oldest opcode for globals has it."""
        length = bytes(self.data[self.position : self.position + 256]).find(b"\n")
        if length < 0:
            raise _Refused("is damaged: a name does not end")
        text = self.text(length)
        self.position += 1
        return text

    # Stack and memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("is damaged: it takes a value where there is none")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise _Refused("is damaged: it closes a list that was not opened")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _Refused("is damaged: it refers to a value that is not there")
        self.push(self.memo[index])

    # Containers

    def append(self, values: list[Any]) -> None:
        self._container(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise _Refused("is damaged: a key without a value")
        keys = _checked_keys(values[::2])
        self._container(dict).update(zip(keys, values[1::2]))

    def add_items(self, values: list[Any]) -> None:
        self._container(set).update(_checked_keys(values))

    def _container(self, kind: type) -> Any:
        container = self.top()
        if type(container) is not kind:
            raise _Refused(f"is damaged: items for a {kind.__name__} that is none")
        return container

    # Globals and objects

    def protocol(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            raise _Refused(f"is a pickle of protocol {version}; expected 2 to 5")

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.position:
            raise _Refused("is truncated or damaged: it announces more bytes than it has")

    def long_integer(self) -> None:
        self.push(self.number(self.number(1), signed=True))

    def stack_global(self) -> None:
        module, name = self.pop_many(2)
        if type(module) is not str or type(name) is not str:
            raise _Refused("is damaged: the name of a global is not a text")
        self.push(self.find_global(module, name))

    def persistent(self) -> None:
        value = self.pop()
        if self.persistent_load is None:
            raise _Refused("is refused: it refers to objects outside of the file (a persistent id)")
        self.push(self.persistent_load(value))

    def reduce(self) -> None:
        function, args = self.pop_many(2)
        if type(function) is not _Function or type(args) is not tuple:
            raise _Refused("is refused: it calls something that is not a constructor of tensors or plain values")
        self.push(function(self.budget, args))

    def new_object(self) -> None:
        cls, args = self.pop_many(2)
        if type(cls) is not _Class or args != ():
            raise _Refused("is refused: it builds something that is not a module or a dict")
        self.push({} if cls.module == "dnnlib.util" else _Object(cls.name))

    def build(self) -> None:
        """`__setstate__`, which here stores a dict and does no more."""
        state = self.pop()
        target = self.top()
        if type(target) is _Object and type(state) is dict:
            target.state = state
        elif type(target) is not _NumpyType or type(state) is not tuple or state[1:2] not in (("<",), ("|",)):
            raise _Refused("is refused: it sets the state of something that is not a module")


def _checked_keys(keys: list[Any]) -> list[str]:
    if any(type(key) is not str for key in keys):
        raise _Refused("is refused: the keys of a dict or set are not texts")
    return keys


_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    opcode[0]: handler
    for opcode, handler in {
        pickle.PROTO: _Machine.protocol,
        pickle.FRAME: _Machine.frame,
        pickle.MARK: _Machine.mark,
        pickle.POP: lambda m: m.pop(),
        pickle.POP_MARK: lambda m: m.pop_mark(),
        pickle.DUP: lambda m: m.push(m.top()),
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.BININT: lambda m: m.push(m.number(4, signed=True)),
        pickle.BININT1: lambda m: m.push(m.number(1)),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: _Machine.long_integer,
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(m.number(1))),
        pickle.BINUNICODE: lambda m: m.push(m.text(m.number(4))),
        pickle.BINUNICODE8: lambda m: m.push(m.text(m.number(8))),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(1))),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
        pickle.BINBYTES8: lambda m: m.push(m.take(m.number(8))),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.TUPLE1: lambda m: m.push(tuple(m.pop_many(1))),
        pickle.TUPLE2: lambda m: m.push(tuple(m.pop_many(2))),
        pickle.TUPLE3: lambda m: m.push(tuple(m.pop_many(3))),
        pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.APPEND: lambda m: m.append(m.pop_many(1)),
        pickle.APPENDS: lambda m: m.append(m.pop_mark()),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.SETITEM: lambda m: m.set_items(m.pop_many(2)),
        pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
        pickle.EMPTY_SET: lambda m: m.push(set()),
        pickle.ADDITEMS: lambda m: m.add_items(m.pop_mark()),
        pickle.FROZENSET: lambda m: m.push(frozenset(_checked_keys(m.pop_mark()))),
        pickle.BINPUT: lambda m: m.put(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.put(m.number(4)),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.BINGET: lambda m: m.get(m.number(1)),
        pickle.LONG_BINGET: lambda m: m.get(m.number(4)),
        pickle.GLOBAL: lambda m: m.push(m.find_global(m.line(), m.line())),
        pickle.STACK_GLOBAL: _Machine.stack_global,
        pickle.BINPERSID: _Machine.persistent,
        pickle.REDUCE: _Machine.reduce,
        pickle.NEWOBJ: _Machine.new_object,
        pickle.BUILD: _Machine.build,
    }.items()
}

# ------------------------------------------------------------------------------------------------------------------
# The names that a file may use


def _refuse_global(module: str, name: str) -> _Refused:
    return _Refused(
        f"is refused: {_shown(module)}.{_shown(name)} is neither a tensor nor a plain container; this file wants to "
        "run code, so do not open it with other programs either"
    )


def _persistent_object(budget: _Budget, meta: dict[str, Any]) -> _Object:
    name, state = meta.get("class_name"), meta.get("state")
    if meta.get("type") != "class" or type(name) is not str or type(state) is not dict:
        raise _Refused("is damaged: a persistent object without class name or state")
    return _Object(name, state)


def _tensor(budget: _Budget, storage: _Storage, offset: int, size: tuple, stride: tuple) -> _Tensor:
    fits = len(size) == len(stride) <= 8 and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
    # The strides of dimensions without extent mean nothing, and can be larger than torch accepts.
    stride = tuple(step if n > 1 else 1 for n, step in zip(size, stride)) if fits else ()
    # No more values than the storage has: views that repeat values would multiply the memory.
    fits = fits and max(math.prod(size), *size, 0) <= storage.numel and offset + _extent(size, stride) <= storage.numel
    if not fits:
        raise _Refused("is refused: a tensor reaches outside of its storage")
    return _Tensor(storage, offset, size, stride)


def _numpy_type(budget: _Budget, code: str) -> _NumpyType:
    if code not in _NUMPY_CODES:
        raise _Refused(f"is refused: NumPy values of type {_shown(code)}; expected numbers")
    return _NumpyType(struct.Struct("<" + _NUMPY_CODES[code]))


def _numpy_scalar(budget: _Budget, dtype: _NumpyType, data: memoryview) -> int | float | bool:
    if len(data) != dtype.layout.size:
        raise _Refused("is damaged: a NumPy number of the wrong length")
    return dtype.layout.unpack(data)[0]


def _set(budget: _Budget, values: list[Any]) -> set[str]:
    budget.spend(len(values))  # one list can be made into many sets
    return set(_checked_keys(values))


def _storage(budget: _Budget, data: memoryview) -> _Storage:
    """What a storage pickles itself as: `torch.save` in the format that it had before zip files.

    That is five pickles (magic number, version, machine, description, keys), the number of values, and the values.
    `torch.load` is not asked: before 2.6 it could be made to run code in spite of `weights_only`, and it allocates what
    a file announces.
    """
    values, position = [], 0
    try:
        for _ in range(5):
            machine = _Machine(data, position, budget, _find_storage_type, persistent_load=lambda value: value)
            values.append(machine.load())
            position = machine.position
    except _Refused as error:
        raise _Refused(f"holds a tensor that {error}") from None
    magic, version, system, description, keys = values
    known = type(magic) is type(version) is int and (magic, version) == (_TORCH_MAGIC, _TORCH_VERSION)
    if not known or type(system) is not dict or system.get("little_endian") is not True:
        raise _Refused("is refused: a tensor is not in torch's format for pickled storages")
    kinds = (str, torch.dtype, str, str, int, type(None))
    if type(description) is not tuple or tuple(map(type, description)) != kinds or description[0] != "storage":
        raise _Refused("is refused: a tensor's storage is not described as torch does")
    _, dtype, key, _, numel, _ = description
    if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != key:
        raise _Refused("is refused: a tensor with other than one storage")
    count, content = data[position : position + 8], data[position + 8 :]
    fits = len(count) == 8 and int.from_bytes(count, "little") == numel and len(content) == numel * dtype.itemsize
    if not fits:
        raise _Refused(f"is truncated or damaged: {_shown(str(numel))} values announced, {len(content)} bytes there")
    return _Storage(content, dtype, numel)


_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_VERSION = 1001

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_NUMPY_CODES = {
    **{"f2": "e", "f4": "f", "f8": "d", "b1": "?"},
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}

_FUNCTIONS = {
    tuple(function.name.rsplit(".", 1)): function
    for function in (
        _Function("torch_utils.persistence._reconstruct_persistent_obj", (dict,), _persistent_object),
        _Function("torch.storage._load_from_bytes", (memoryview,), _storage),
        _Function("torch._utils._rebuild_tensor_v2", (_Storage, int, tuple, tuple), _tensor, ignored=3),
        _Function("torch._utils._rebuild_parameter", (_Tensor,), lambda budget, tensor: tensor, ignored=2),
        _Function("torch.Size", (tuple,), lambda budget, size: size),
        _Function("torch.device", (str,), lambda budget, name: name, ignored=1),
        _Function("collections.OrderedDict", (), lambda budget: {}),
        _Function("builtins.set", (list,), _set),
        _Function("numpy.dtype", (str,), _numpy_type, ignored=2),
        _Function("numpy.core.multiarray.scalar", (_NumpyType, memoryview), _numpy_scalar),
        _Function("numpy._core.multiarray.scalar", (_NumpyType, memoryview), _numpy_scalar),
    )
}

_CLASSES = {
    "dnnlib.util": {"EasyDict"},
    "models.networks_edm": {
        *("EDMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock", "Conv2d", "Linear", "GroupNorm"),
        *("PositionalEmbedding", "FourierEmbedding", *UNREADABLE_PRECONDS),
    },
}
_TORCH_MODULE = re.compile(r"torch\.nn\.modules\.[a-z]+")
_DTYPES = {str(dtype).split(".")[1] for dtype in _STORAGE_DTYPES.values()}


def _find_global(module: str, name: str) -> Any:
    if (module, name) in _FUNCTIONS:
        return _FUNCTIONS[module, name]
    if name in _CLASSES.get(module, ()) or (_TORCH_MODULE.fullmatch(module) and name.isidentifier()):
        return _Class(module, name)
    if module == "torch" and name in _DTYPES:
        return f"torch.{name}"
    raise _refuse_global(module, name)


def _find_storage_type(module: str, name: str) -> torch.dtype:
    if module not in ("torch", "torch.cuda") or name not in _STORAGE_DTYPES:
        raise _refuse_global(module, name)
    return _STORAGE_DTYPES[name]


# ------------------------------------------------------------------------------------------------------------------
# From records to a description


def _describe(content: Any, budget: _Budget, max_bytes: int) -> EDMPickle:
    if type(content) is not dict:
        raise _Refused("does not hold a dict with a network under 'ema' or 'model'")
    key = next((key for key in ("ema", "model") if key in content), None)
    if key is None:
        raise _Refused(f"holds no network under 'ema' or 'model' but {_shown(', '.join(content) or 'nothing')}")
    net = content[key]
    unet = _check_classes(net, key)
    state_dict = _state_dict(net, max_bytes)
    arguments = _recorded_arguments(net, budget)
    if arguments is None:
        arguments = _inferred_arguments(net, unet, state_dict, budget)
    # The reference's networks have these layers whether or not they were trained with them, and do not record it.
    if any(".affine_step." in name for name in state_dict):
        arguments["use_step_condition"] = True
    training = content.get("training_kwargs", net.state.get("training_kwargs"))
    training = _plain_entries(training, budget) if type(training) is dict else None
    return EDMPickle(net.class_name, arguments, state_dict, training, key)


def _check_classes(net: Any, key: str) -> _Object:
    """Check that `net` is of a class that can be built, and return the U-Net in it."""
    name = net.class_name if type(net) is _Object else type(net).__name__
    if name in UNREADABLE_PRECONDS:
        raise _Refused(f"holds a {name}, which this program does not have; expected EDMPrecond")
    if type(net) is not _Object or name != "EDMPrecond":
        raise _Refused(f"holds a {_shown(name)} under '{key}'; expected EDMPrecond")
    unet = _child(net, "_modules", "model")
    name = unet.class_name if type(unet) is _Object else type(unet).__name__
    if name not in ("SongUNet", "DhariwalUNet"):
        raise _Refused(f"holds an EDMPrecond around a {_shown(name)}; expected SongUNet or DhariwalUNet")
    return unet


def _child(module: Any, *names: str) -> Any:
    """Follow entries of nested dicts and modules; None where there is none."""
    for name in names:
        entries = module.state if type(module) is _Object else module
        module = entries.get(name) if type(entries) is dict else None
    return module


def _state_dict(net: _Object, max_bytes: int) -> dict[str, Tensor]:
    tensors: dict[str, _Tensor] = {}
    for name, tensor in _named_tensors(net, "", set()):
        if name in tensors:
            raise _Refused(f"is damaged: two tensors are called {_shown(name)}")
        if not tensor.storage.dtype.is_floating_point:
            raise _Refused(f"holds {_shown(name)} as {tensor.storage.dtype}; expected floating-point numbers")
        tensors[name] = tensor
    if sum(tensor.nbytes for tensor in tensors.values()) > max_bytes:
        raise _Refused("is refused: its tensors take more memory than the file has")
    return {name: tensor.materialise() for name, tensor in tensors.items()}


def _named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, _Tensor]]:
    """Parameters and persistent buffers in the order of `Module.state_dict`."""
    groups = [_child(module, group) for group in ("_parameters", "_buffers", "_modules")]
    if type(module) is not _Object or any(type(group) is not dict for group in groups):
        raise _Refused(f"is damaged: {_shown(prefix) or 'the network'} is not a torch module")
    # Sharing would be a cycle, or a few bytes that stand for millions of tensors.
    places = {id(module), *map(id, groups)}
    if len(places) != 4 or places & seen or prefix.count(".") > MAX_DEPTH:
        raise _Refused("is refused: modules that contain each other")
    seen |= places
    parameters, buffers, children = groups
    hidden = module.state.get("_non_persistent_buffers_set")
    hidden = hidden if type(hidden) is set else ()
    for name, tensor in (*parameters.items(), *((k, v) for k, v in buffers.items() if k not in hidden)):
        if tensor is None:
            continue
        name = _joined(prefix, name)
        if type(tensor) is not _Tensor:
            raise _Refused(f"is damaged: {_shown(name)} is not a tensor")
        yield name, tensor
    for name, child in children.items():
        if child is not None:
            yield from _named_tensors(child, _joined(prefix, name) + ".", seen)


def _joined(prefix: str, name: str) -> str:
    # Long names that many modules share would multiply the memory that a file takes.
    if len(prefix) + len(name) > MAX_NAME:
        raise _Refused(f"is refused: a tensor's name has more than {MAX_NAME} characters")
    return prefix + name


def _plain(value: Any, budget: _Budget, depth: int = 0) -> Any:
    """A copy of numbers, strings, bools, None, and lists and dicts of these; tuples become lists."""
    budget.spend(1)
    if value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < 2**63):
        return value
    if depth < MAX_DEPTH and type(value) in (list, tuple):
        return [_plain(item, budget, depth + 1) for item in value]
    if depth < MAX_DEPTH and type(value) is dict:
        return {key: _plain(item, budget, depth + 1) for key, item in value.items()}
    raise _NotPlain("is refused: a constructor argument is not a number, string, bool, None or a list of these")


def _plain_entries(values: dict[str, Any], budget: _Budget, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The entries that are plain; what a training leaves beside them (tensors, modules) is of no use here."""
    plain = {}
    for name in values if names is None else [name for name in names if name in values]:
        try:
            plain[name] = _plain(values[name], budget)
        except _NotPlain:
            continue
    return plain


def _recorded_arguments(net: _Object, budget: _Budget) -> dict[str, Any] | None:
    """Constructor arguments by name, or None where the file does not record them."""
    args, kwargs = net.state.get("_init_args", ()), net.state.get("_init_kwargs")
    if kwargs is None:
        return None
    if type(args) not in (list, tuple) or type(kwargs) is not dict or len(args) > len(PRECOND_ARGUMENTS):
        raise _Refused("is damaged: the constructor arguments are not recorded as EDM does")
    return _plain({**dict(zip(PRECOND_ARGUMENTS, args)), **kwargs}, budget)


def _inferred_arguments(net: _Object, unet: _Object, state: dict[str, Tensor], budget: _Budget) -> dict[str, Any]:
    """Constructor arguments that attributes, tensor names and tensor shapes show.

    Sizes come from the tensors. What leaves no trace in them (sigma range, precision, dropout) comes from attributes,
    and keeps the constructor's default where there are none.
    """

    def extent(name: str, axis: int) -> int:
        shape = state[name].shape if name in state else ()
        if len(shape) <= axis or shape[axis] == 0:
            raise _Refused(f"holds a {unet.class_name} without a usable {name}")
        return shape[axis]

    song = unet.class_name == "SongUNet"
    blocks = [re.fullmatch(r"model\.enc\.([0-9]{1,6})x\1_block[0-9]{1,6}\.conv1\.weight", name) for name in state]
    widths = {int(match[1]): extent(match[0], 0) for match in blocks if match}
    if not widths:
        raise _Refused(f"holds a {unet.class_name} without encoder blocks")
    sizes = list(widths)
    stem = f"model.enc.{sizes[0]}x{sizes[0]}_conv.weight"
    noise, embedding = extent("model.map_layer0.weight", 1), extent("model.map_layer0.weight", 0)
    channels = extent(stem, 0) if song else noise

    arguments = {
        "img_resolution": sizes[0],
        "img_channels": extent(stem, 1),
        "label_dim": extent("model.map_label.weight", 1) if "model.map_label.weight" in state else 0,
        "model_type": unet.class_name,
        "augment_dim": extent("model.map_augment.weight", 1) if "model.map_augment.weight" in state else 0,
        "model_channels": channels,
        "channel_mult": [width // channels for width in widths.values()],
        "channel_mult_emb": embedding // channels,
        "num_blocks": sum(match is not None for match in blocks) // len(sizes),
        "attn_resolutions": [size for size in sizes if f"model.enc.{size}x{size}_block0.qkv.weight" in state],
    }
    if song:
        arguments.update(_song_arguments(state), channel_mult_noise=noise // channels)
    block = _child(unet, "_modules", "enc", "_modules", f"{sizes[0]}x{sizes[0]}_block0")
    attributes = (
        (net, ("use_fp16", "sigma_min", "sigma_max", "sigma_data")),
        (unet, ("label_dropout",)),
        (block, ("dropout",)),
    )
    for module, names in attributes:
        if type(module) is _Object:
            arguments.update(_plain_entries(module.state, budget, names))
    return arguments


def _song_arguments(state: dict[str, Tensor]) -> dict[str, Any]:
    """What tells DDPM++, NCSN++ and mixtures of them apart."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in state)

    filters = [tensor for name, tensor in state.items() if name.endswith("_down.conv0.resample_filter")]
    taps = [1.0, 1.0]
    if filters and filters[0].ndim == 4 and filters[0].numel() and filters[0].isfinite().all():
        # The buffer is the outer product of normalised taps, which people give in multiples of the outermost.
        rows = filters[0][0, 0].sum(dim=1)
        taps = (rows / rows[0] if rows[0] != 0 else rows).nan_to_num().tolist()
    return {
        "embedding_type": "fourier" if "model.map_noise.freqs" in state else "positional",
        "encoder_type": "residual" if has("_aux_residual") else "skip" if has("_aux_skip") else "standard",
        "decoder_type": "skip" if has(r"\.dec\..*_aux_up") else "standard",
        "resample_filter": [round(tap) if abs(tap - round(tap)) < 1e-3 else tap for tap in taps],
    }
