"""A machine that interprets the opcodes of pickles without executing anything that they name.

Unpickling calls whatever a file says, so the `pickle` module never sees a foreign file. This machine imports nothing;
its caller's `find_global` turns a global into an inert record or one of a few constructors (`pickle_globals`), and
refuses any other by name.

A hostile file costs no more than a good one: lengths are checked against the bytes that are there before anything is
allocated, steps are counted, tensors may not add up to more than the file, and nothing recurses without a limit.
"""

from __future__ import annotations

import mmap
import os
import pickle  # names of opcodes only
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from .pickle_records import ArrayRecord, Budget, ClassRecord, Function, NumpyType, ObjectRecord, Refused, numpy_values


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
        keys = checked_keys(values[::2])
        self._container(dict).update(zip(keys, values[1::2]))

    def add_items(self, values: list[Any]) -> None:
        self._container(set).update(checked_keys(values))

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
        if type(function) is not Function or type(args) is not tuple:
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
        self.push(frozenset(checked_keys(self.pop_mark())))

    def build(self) -> None:
        """`__setstate__`, which here stores a dict and does no more."""
        state = self.pop()
        target = self.top()
        if type(target) is ObjectRecord and type(state) is dict:
            target.state = state
        elif type(target) is ArrayRecord and type(state) is tuple:
            target.values = numpy_values(self.budget, state)
        elif type(target) is not NumpyType or type(state) is not tuple or state[1:2] not in (("<",), ("|",)):
            raise Refused("is refused: it sets the state of something that is not a module")


def checked_keys(keys: list[Any]) -> list[str]:
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
