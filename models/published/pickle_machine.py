"""A machine that interprets the opcodes of pickles without executing anything that they name.

Unpickling calls whatever a file says, so the `pickle` module never sees a foreign file. This machine imports nothing;
its caller's `find_global` turns a global into an inert record or one of a few constructors in `FUNCTIONS`, and refuses
any other by name.

A hostile file costs no more than a good one: lengths are checked against the bytes that are there before anything is
allocated, steps are counted, tensors may not add up to more than the file, and nothing recurses without a limit.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle  # names of opcodes only
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: The largest published network takes 90 thousand.
MAX_STEPS = 1_000_000


class Refused(Exception):
    """Why a file is not read: the rest of a sentence that begins with its path."""


class NotPlain(Refused):
    """A value is not a number, string, bool, None, or a list or dict of these."""


def shown(text: str) -> str:
    """Text from a file, fit for one line of a terminal."""
    return ascii(text[:100])[1:-1]


def map_file(path: str | os.PathLike, expected: str) -> memoryview:
    """The bytes of a file, read when they are used; writing to them changes a copy.

    Raises:
        Refused: it is not there, is a folder, a pipe or a device, or is empty; `expected` says what it should be.
    """
    if not os.path.isfile(path):
        kind = "is no regular file" if os.path.exists(path) and not os.path.isdir(path) else "does not exist"
        raise Refused(f"{kind}; expected {expected}")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise Refused(f"is empty; expected {expected}")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


# ------------------------------------------------------------------------------------------------------------------
# What a file can consist of


@dataclass(eq=False)
class Budget:
    """Steps that are left for one file. Reading and converting draw on it, so that no nesting makes work explode."""

    steps: int = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise Refused(f"takes more than {MAX_STEPS} steps to read, far more than any network")


@dataclass(eq=False)
class ClassRecord:
    """The name of a class of modules."""

    module: str
    name: str


@dataclass(eq=False)
class ObjectRecord:
    """An instance, as its class's name and its `__dict__`."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Function:
    """A constructor of this module: `build(budget, *args)`, with arguments of exactly these types.

    The last `optional` of them may be absent, and `ignored` more are accepted and dropped.
    """

    name: str
    types: tuple[type, ...]
    build: Callable[..., Any]
    ignored: int = 0
    optional: int = 0

    def __call__(self, budget: Budget, args: tuple) -> Any:
        extra = len(args) - len(self.types)
        fits = -self.optional <= extra <= self.ignored
        if not fits or any(type(arg) is not kind for arg, kind in zip(args, self.types)):
            raise Refused(f"is damaged: {self.name} with unexpected arguments")
        return self.build(budget, *args[: len(self.types)])


@dataclass(eq=False)
class _NumpyType:
    """`numpy.dtype`: the layout of one number."""

    layout: struct.Struct


@dataclass(eq=False)
class ArrayRecord:
    """A small `numpy.ndarray`: its numbers, in row-major order."""

    values: list[int | float | bool] = field(default_factory=list)


@dataclass(eq=False)
class StorageRecord:
    """Bytes of the file that hold `numel` values."""

    data: memoryview
    dtype: torch.dtype
    numel: int


@dataclass(eq=False)
class TensorRecord:
    """A view of a storage, checked to lie inside it. Only the tensors that are wanted become real."""

    storage: StorageRecord
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
        values.view(torch.uint8).numpy().data[:] = self.storage.data[start : start + extent * itemsize]
        return values.as_strided(self.size, self.stride).contiguous().float()


def _extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of values from the first to the last of a view."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride)) if math.prod(size) else 0


# ------------------------------------------------------------------------------------------------------------------
# The pickle machine


class Machine:
    """Interprets one pickle that begins at `position` of `data`.

    It knows the opcodes that pickles of protocol 2 to 5 use for plain data and objects, and refuses the others (text
    opcodes of protocol 0, the extension registry, out-of-band buffers). Bytes become views of `data`; `find_global`
    maps names to records; keys are strings, so that no crafted hash makes a dict slow.
    """

    def __init__(
        self,
        data: memoryview,
        position: int,
        budget: Budget,
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
                known = [op.name for op in pickletools.opcodes if op.code == chr(opcode)]
                if not known:
                    raise Refused(f"is damaged: 0x{opcode:02x} is no pickle opcode")
                raise Refused(f"is refused: the pickle opcode {known[0]} has no place in the file of a network")
            handler(self)

    # Input

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise Refused("is truncated or damaged: it announces more bytes than it has")
        view = self.data[self.position : end]
        self.position = end
        return view

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, count: int) -> str:
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError:
            raise Refused("is damaged: a text is not UTF-8") from None

    def line(self) -> str:
        """Text up to a newline, as the oldest opcode for globals has it."""
        length = bytes(self.data[self.position : self.position + 256]).find(b"\n")
        if length < 0:
            raise Refused("is damaged: a name does not end")
        text = self.text(length)
        self.position += 1
        return text

    # Stack and memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("is damaged: it takes a value where there is none")
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
            raise Refused("is damaged: it closes a list that was not opened")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused("is damaged: it refers to a value that is not there")
        self.push(self.memo[index])

    # Containers

    def append(self, values: list[Any]) -> None:
        self._container(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise Refused("is damaged: a key without a value")
        keys = _checked_keys(values[::2])
        self._container(dict).update(zip(keys, values[1::2]))

    def add_items(self, values: list[Any]) -> None:
        self._container(set).update(_checked_keys(values))

    def _container(self, kind: type) -> Any:
        container = self.top()
        if type(container) is not kind:
            raise Refused(f"is damaged: items for a {kind.__name__} that is none")
        return container

    # Globals and objects

    def protocol(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            raise Refused(f"is a pickle of protocol {version}; expected 2 to 5")

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.position:
            raise Refused("is truncated or damaged: it announces more bytes than it has")

    def long_integer(self) -> None:
        self.push(self.number(self.number(1), signed=True))

    def stack_global(self) -> None:
        module, name = self.pop_many(2)
        if type(module) is not str or type(name) is not str:
            raise Refused("is damaged: the name of a global is not a text")
        self.push(self.find_global(module, name))

    def persistent(self) -> None:
        value = self.pop()
        if self.persistent_load is None:
            raise Refused("is refused: it refers to objects outside of the file (a persistent id)")
        self.push(self.persistent_load(value))

    def reduce(self) -> None:
        function, args = self.pop_many(2)
        if type(function) is not _Function or type(args) is not tuple:
            raise Refused("is refused: it calls something that is not a constructor of tensors or plain values")
        self.push(function(self.budget, args))

    def new_object(self) -> None:
        cls, args = self.pop_many(2)
        if type(cls) is not ClassRecord or args != ():
            raise Refused("is refused: it builds something that is not a module or a dict")
        self.push({} if cls.module == "dnnlib.util" else ObjectRecord(cls.name))

    def new_object_ex(self) -> None:
        """The same with arguments by name, of which nothing here has any."""
        if self.pop() != {}:
            raise Refused("is refused: it builds something that is not a module or a dict")
        self.new_object()

    def frozen_set(self) -> None:
        self.push(frozenset(_checked_keys(self.pop_mark())))

    def build(self) -> None:
        """`__setstate__`, which here stores a dict and does no more."""
        state = self.pop()
        target = self.top()
        if type(target) is ObjectRecord and type(state) is dict:
            target.state = state
        elif type(target) is ArrayRecord and type(state) is tuple:
            target.values = _numpy_values(self.budget, state)
        elif type(target) is not _NumpyType or type(state) is not tuple or state[1:2] not in (("<",), ("|",)):
            raise Refused("is refused: it sets the state of something that is not a module")


def _checked_keys(keys: list[Any]) -> list[str]:
    if any(type(key) is not str for key in keys):
        raise Refused("is refused: the keys of a dict or set are not texts")
    return keys


_HANDLERS: dict[int, Callable[[Machine], None]] = {
    opcode[0]: handler
    for opcode, handler in {
        pickle.PROTO: Machine.protocol,
        pickle.FRAME: Machine.frame,
        pickle.MARK: Machine.mark,
        pickle.POP: lambda m: m.pop(),
        pickle.POP_MARK: lambda m: m.pop_mark(),
        pickle.DUP: lambda m: m.push(m.top()),
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.BININT: lambda m: m.push(m.number(4, signed=True)),
        pickle.BININT1: lambda m: m.push(m.number(1)),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: Machine.long_integer,
        pickle.LONG4: lambda m: m.push(m.number(m.number(4), signed=True)),
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(m.number(1))),
        pickle.BINUNICODE: lambda m: m.push(m.text(m.number(4))),
        pickle.BINUNICODE8: lambda m: m.push(m.text(m.number(8))),
        # Texts of Python 2, which wrote the older files of torch.
        pickle.SHORT_BINSTRING: lambda m: m.push(m.text(m.number(1))),
        pickle.BINSTRING: lambda m: m.push(m.text(m.number(4))),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(1))),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
        pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number(8))),
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
        pickle.FROZENSET: lambda m: m.frozen_set(),
        pickle.BINPUT: lambda m: m.put(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.put(m.number(4)),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.BINGET: lambda m: m.get(m.number(1)),
        pickle.LONG_BINGET: lambda m: m.get(m.number(4)),
        pickle.GLOBAL: lambda m: m.push(m.find_global(m.line(), m.line())),
        pickle.STACK_GLOBAL: Machine.stack_global,
        pickle.BINPERSID: lambda m: m.persistent(),
        pickle.REDUCE: lambda m: m.reduce(),
        pickle.NEWOBJ: lambda m: m.new_object(),
        pickle.NEWOBJ_EX: lambda m: m.new_object_ex(),
        pickle.BUILD: lambda m: m.build(),
    }.items()
}

# ------------------------------------------------------------------------------------------------------------------
# The names that a file may use


def refuse_global(module: str, name: str) -> Refused:
    return Refused(
        f"is refused: {shown(module)}.{shown(name)} is neither a tensor nor a plain container; this file wants to "
        "run code, so do not open it with other programs either"
    )


def _persistent_object(budget: Budget, meta: dict[str, Any]) -> ObjectRecord:
    name, state = meta.get("class_name"), meta.get("state")
    if meta.get("type") != "class" or type(name) is not str or type(state) is not dict:
        raise Refused("is damaged: a persistent object without class name or state")
    return ObjectRecord(name, state)


def _tensor(budget: Budget, storage: StorageRecord, offset: int, size: tuple, stride: tuple) -> TensorRecord:
    fits = len(size) == len(stride) <= 8 and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
    # The strides of dimensions without extent mean nothing, and can be larger than torch accepts.
    stride = tuple(step if n > 1 else 1 for n, step in zip(size, stride)) if fits else ()
    # No more values than the storage has: views that repeat values would multiply the memory.
    fits = fits and max(math.prod(size), *size, 0) <= storage.numel and offset + _extent(size, stride) <= storage.numel
    if not fits:
        raise Refused("is refused: a tensor reaches outside of its storage")
    return TensorRecord(storage, offset, size, stride)


def _numpy_type(budget: Budget, code: str) -> _NumpyType:
    if code not in _NUMPY_CODES:
        raise Refused(f"is refused: NumPy values of type {shown(code)}; expected numbers")
    return _NumpyType(struct.Struct("<" + _NUMPY_CODES[code]))


def _numpy_scalar(budget: Budget, dtype: _NumpyType, data: memoryview) -> int | float | bool:
    if len(data) != dtype.layout.size:
        raise Refused("is damaged: a NumPy number of the wrong length")
    return dtype.layout.unpack(data)[0]


def _numpy_array(budget: Budget, cls: ClassRecord, shape: tuple, code: memoryview) -> ArrayRecord:
    """NumPy pickles an empty array first, and sets its values afterwards."""
    if (cls.module, cls.name) != NUMPY_ARRAY:
        raise Refused("is refused: an array of something that is not NumPy")
    return ArrayRecord()


def _numpy_values(budget: Budget, state: tuple) -> list[int | float | bool]:
    kinds = (int, tuple, _NumpyType, bool, memoryview)
    if tuple(map(type, state)) != kinds:
        raise Refused("is damaged: a NumPy array of something that is not numbers")
    _, shape, dtype, is_fortran, data = state
    fits = len(shape) <= 8 and all(type(n) is int and 0 <= n <= len(data) for n in shape) and not is_fortran
    if not fits or math.prod(shape) * dtype.layout.size != len(data):
        raise Refused("is damaged: a NumPy array of another size than its values")
    budget.spend(math.prod(shape))
    return [number for (number,) in dtype.layout.iter_unpack(data)]


def _ordered_dict(budget: Budget, pairs: list[Any] | None = None) -> dict[str, Any]:
    """Python 2 pickled the items as a list of pairs; Python 3 sets them afterwards."""
    pairs = pairs or []
    budget.spend(len(pairs))  # one list can be made into many dicts
    if any(type(pair) is not list or len(pair) != 2 for pair in pairs):
        raise Refused("is damaged: an ordered dict of something that is not pairs")
    return dict(zip(_checked_keys([key for key, _ in pairs]), (value for _, value in pairs)))


def _set(budget: Budget, values: list[Any]) -> set[str]:
    budget.spend(len(values))  # one list can be made into many sets
    return set(_checked_keys(values))


def _storage(budget: Budget, data: memoryview) -> StorageRecord:
    """What a storage pickles itself as: `torch.save` in the format that it had before zip files.

    That is five pickles (magic number, version, machine, description, keys), the number of values, and the values.
    `torch.load` is not asked: before 2.6 it could be made to run code in spite of `weights_only`, and it allocates what
    a file announces.
    """
    values, position = [], 0
    try:
        for _ in range(5):
            machine = Machine(data, position, budget, _find_storage_type, persistent_load=lambda value: value)
            values.append(machine.load())
            position = machine.position
    except Refused as error:
        raise Refused(f"holds a tensor that {error}") from None
    magic, version, system, description, keys = values
    known = type(magic) is type(version) is int and (magic, version) == (TORCH_MAGIC, TORCH_VERSION)
    if not known or type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("is refused: a tensor is not in torch's format for pickled storages")
    kinds = (str, torch.dtype, str, str, int, type(None))
    if type(description) is not tuple or tuple(map(type, description)) != kinds or description[0] != "storage":
        raise Refused("is refused: a tensor's storage is not described as torch does")
    _, dtype, key, _, numel, _ = description
    if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != key:
        raise Refused("is refused: a tensor with other than one storage")
    count, content = data[position : position + 8], data[position + 8 :]
    fits = len(count) == 8 and int.from_bytes(count, "little") == numel and len(content) == numel * dtype.itemsize
    if not fits:
        raise Refused(f"is truncated or damaged: {shown(str(numel))} values announced, {len(content)} bytes there")
    return StorageRecord(content, dtype, numel)


NUMPY_ARRAY = ("numpy", "ndarray")
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
TORCH_VERSION = 1001

STORAGE_DTYPES = {
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

FUNCTIONS = {
    tuple(function.name.rsplit(".", 1)): function
    for function in (
        _Function("torch_utils.persistence._reconstruct_persistent_obj", (dict,), _persistent_object),
        _Function("torch.storage._load_from_bytes", (memoryview,), _storage),
        _Function("torch._utils._rebuild_tensor_v2", (StorageRecord, int, tuple, tuple), _tensor, ignored=3),
        _Function("torch._utils._rebuild_parameter", (TensorRecord,), lambda budget, tensor: tensor, ignored=2),
        _Function("torch.Size", (tuple,), lambda budget, size: size),
        _Function("torch.device", (str,), lambda budget, name: name, ignored=1),
        _Function("collections.OrderedDict", (list,), _ordered_dict, optional=1),
        _Function("builtins.set", (list,), _set),
        _Function("numpy.dtype", (str,), _numpy_type, ignored=2),
        _Function("numpy.core.multiarray.scalar", (_NumpyType, memoryview), _numpy_scalar),
        _Function("numpy._core.multiarray.scalar", (_NumpyType, memoryview), _numpy_scalar),
        _Function("numpy.core.multiarray._reconstruct", (ClassRecord, tuple, memoryview), _numpy_array),
        _Function("numpy._core.multiarray._reconstruct", (ClassRecord, tuple, memoryview), _numpy_array),
    )
}


def _find_storage_type(module: str, name: str) -> torch.dtype:
    if module not in ("torch", "torch.cuda") or name not in STORAGE_DTYPES:
        raise refuse_global(module, name)
    return STORAGE_DTYPES[name]
