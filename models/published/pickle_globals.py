"""The names that a pickle may use: constructors of tensors and of plain values, each with what it makes of a file.

None of them runs anything of the file; any other name is refused, or stands for nothing, as the reader decides.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch

from .pickle_machine import Machine, checked_keys
from .pickle_records import (
    ArrayRecord,
    Budget,
    ClassRecord,
    Function,
    NumpyType,
    ObjectRecord,
    Refused,
    StorageRecord,
    TensorRecord,
    extent,
    shown,
)


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
    fits = fits and max(math.prod(size), *size, 0) <= storage.numel and offset + extent(size, stride) <= storage.numel
    if not fits:
        raise Refused("is refused: a tensor reaches outside of its storage")
    return TensorRecord(storage, offset, size, stride)


def _numpy_type(budget: Budget, code: str) -> NumpyType:
    if code not in _NUMPY_CODES:
        raise Refused(f"is refused: NumPy values of type {shown(code)}; expected numbers")
    return NumpyType(struct.Struct("<" + _NUMPY_CODES[code]))


def _numpy_scalar(budget: Budget, dtype: NumpyType, data: memoryview) -> int | float | bool:
    if len(data) != dtype.layout.size:
        raise Refused("is damaged: a NumPy number of the wrong length")
    return dtype.layout.unpack(data)[0]


def _numpy_array(budget: Budget, cls: ClassRecord, shape: tuple, code: memoryview) -> ArrayRecord:
    """NumPy pickles an empty array first, and sets its values afterwards."""
    if (cls.module, cls.name) != NUMPY_ARRAY:
        raise Refused("is refused: an array of something that is not NumPy")
    return ArrayRecord()


def _ordered_dict(budget: Budget, pairs: list[Any] | None = None) -> dict[str, Any]:
    """Python 2 pickled the items as a list of pairs; Python 3 sets them afterwards."""
    pairs = pairs or []
    budget.spend(len(pairs))  # one list can be made into many dicts
    if any(type(pair) is not list or len(pair) != 2 for pair in pairs):
        raise Refused("is damaged: an ordered dict of something that is not pairs")
    return dict(zip(checked_keys([key for key, _ in pairs]), (value for _, value in pairs)))


def _set(budget: Budget, values: list[Any]) -> set[str]:
    budget.spend(len(values))  # one list can be made into many sets
    return set(checked_keys(values))


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
        Function("torch_utils.persistence._reconstruct_persistent_obj", (dict,), _persistent_object),
        Function("torch.storage._load_from_bytes", (memoryview,), _storage),
        Function("torch._utils._rebuild_tensor_v2", (StorageRecord, int, tuple, tuple), _tensor, ignored=3),
        Function("torch._utils._rebuild_parameter", (TensorRecord,), lambda budget, tensor: tensor, ignored=2),
        Function("torch.Size", (tuple,), lambda budget, size: size),
        Function("torch.device", (str,), lambda budget, name: name, ignored=1),
        Function("collections.OrderedDict", (list,), _ordered_dict, optional=1),
        Function("builtins.set", (list,), _set),
        Function("numpy.dtype", (str,), _numpy_type, ignored=2),
        Function("numpy.core.multiarray.scalar", (NumpyType, memoryview), _numpy_scalar),
        Function("numpy._core.multiarray.scalar", (NumpyType, memoryview), _numpy_scalar),
        Function("numpy.core.multiarray._reconstruct", (ClassRecord, tuple, memoryview), _numpy_array),
        Function("numpy._core.multiarray._reconstruct", (ClassRecord, tuple, memoryview), _numpy_array),
    )
}


def _find_storage_type(module: str, name: str) -> torch.dtype:
    if module not in ("torch", "torch.cuda") or name not in STORAGE_DTYPES:
        raise refuse_global(module, name)
    return STORAGE_DTYPES[name]
