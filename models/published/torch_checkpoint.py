"""Checkpoints and archives that other people publish, read without executing anything.

A checkpoint is a state dict, bare or under `state_dict` in what PyTorch Lightning writes, in torch's zip format, in the
format that torch had before, or as `.safetensors`. Trainings leave objects of their own beside the weights. So that
neither they nor anything else is imported, `pickle` and `torch.load` never see the file (`weights_only=True` refuses
such objects, and before torch 2.6 could be made to run code): `pickle_machine` interprets it, and an object becomes a
placeholder without content. Only what is wanted has to be tensors. Nothing of a file runs here in any case; one that
names functions, or the parts of Python's library that act on a system, is refused, with a warning for other programs.

Tensors are views of the mapped file: only what is used is read, and memory is shared with other processes. In the zip
format they have checksums, which are compared; the older format has none.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dnnlib import UserError, first_line

from .archives import DAMAGED_ZIP
from .pickle_globals import FUNCTIONS, STORAGE_DTYPES, TORCH_MAGIC, TORCH_VERSION, refuse_global
from .pickle_machine import Machine, map_file
from .pickle_records import Budget, Refused, StorageRecord, TensorRecord, shown

#: Kernels take other paths, and round in another order, where tensors are less aligned than those that torch allocates.
ALIGNMENT = 64


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a state dict as it is stored → tensors on the CPU, of the types in the file, in its order.

    The tensors are views of the file, which may be written to (the file does not change), where they are aligned
    in it, else copies.

    Raises:
        UserError: no such file, a file of another kind, one that is damaged, or one that wants to run code.
    """
    try:
        data = map_file(path, "a checkpoint (.ckpt, .pt, .pth or .safetensors)")
        if data[:4] == b"PK\x03\x04":
            return _state_dict(_read_zip(path, data), len(data))
        if data[:1] == b"\x80":
            return _state_dict(_read_legacy(data), len(data))
        if data[8:9] == b"{":
            return _read_safetensors(path)
        raise Refused("is not a checkpoint (.ckpt, .pt, .pth or .safetensors); it is damaged, or another file")
    except Refused as error:
        raise UserError(f"{path} {error}") from None


# ------------------------------------------------------------------------------------------------------------------
# Pickles of torch.save


class _Placeholder:
    """What stands for anything that is not wanted: calling it, filling it and setting its state change nothing."""


_PLACEHOLDER = _Placeholder()


class _CheckpointMachine(Machine):
    """Interprets a checkpoint: tensors, lists and dicts become records, everything else `_PLACEHOLDER`."""

    def reduce(self) -> None:
        function, args = self.pop_many(2)
        is_known = type(args) is tuple and not any(arg is _PLACEHOLDER for arg in args)
        if function is _PLACEHOLDER or not is_known:
            self.push(_PLACEHOLDER)
        else:
            self.stack += [function, args]
            super().reduce()

    def new_object(self) -> None:
        self.reduce()  # of what is known here, a class is no more than a function

    def persistent(self) -> None:
        """A storage of a kind that is not read stands for nothing."""
        value = self.top()
        if type(value) is tuple and any(part is _PLACEHOLDER for part in value):
            self.pop()
            self.push(_PLACEHOLDER)
        else:
            super().persistent()

    def new_object_ex(self) -> None:
        self.pop()
        self.reduce()

    def frozen_set(self) -> None:
        self.pop_mark()
        self.push(_PLACEHOLDER)

    def build(self) -> None:
        """State dicts carry the versions of their modules as attributes, which nothing needs."""
        self.pop()
        self.top()

    def append(self, values: list[Any]) -> None:
        if self.top() is not _PLACEHOLDER:
            super().append(values)

    def set_items(self, values: list[Any]) -> None:
        """Items whose keys are not texts are no weights: the state of an optimizer, or that of callbacks by class."""
        if self.top() is not _PLACEHOLDER:
            pairs = (values[i : i + 2] for i in range(0, len(values), 2) if type(values[i]) is str)
            super().set_items(list(itertools.chain.from_iterable(pairs)))

    def add_items(self, values: list[Any]) -> None:
        self.top()


_REBUILD = FUNCTIONS["torch._utils", "_rebuild_tensor_v2"]
_PARAMETER = FUNCTIONS["torch._utils", "_rebuild_parameter"]
_TENSOR_FUNCTIONS = {
    ("torch._utils", "_rebuild_tensor_v2"): _REBUILD,
    ("torch._utils", "_rebuild_tensor"): _REBUILD,  # torch before 0.4, as in torchvision's VGG
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("torch.nn.parameter", "Parameter"): _PARAMETER,
    ("collections", "OrderedDict"): FUNCTIONS["collections", "OrderedDict"],
}
_PLAIN_TYPES = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set"}
_PLAIN_TYPES |= {"slice", "str", "tuple", "Ellipsis", "NotImplemented"}
#: Python's library under names that it no longer has, or not everywhere.
_LIBRARY = {"__builtin__", "commands", "posix", "nt", "posixpath", "ntpath", "imp", "distutils", "__main__"}
_NUMPY_FUNCTIONS = {"scalar", "_reconstruct"}
#: What makes values and no more, by module: these names, or (None) all there are. Beside that, the names of classes of
#: packages outside of Python's library stand for nothing.
_HARMLESS: dict[str, set[str] | None] = {
    **dict.fromkeys(("builtins", "__builtin__"), _PLAIN_TYPES),
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), _NUMPY_FUNCTIONS),
    "numpy": {"dtype", "ndarray"},
    "numpy.random": None,
    "collections": {"defaultdict", "deque", "Counter"},
    "copyreg": {"_reconstructor"},
    "_codecs": {"encode"},
    "datetime": None,
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "uuid": {"UUID", "SafeUUID"},
    "types": {"SimpleNamespace"},
    "argparse": {"Namespace"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "typing": {"Any"},
    "torch": {
        "device",
        "Size",
        "per_tensor_affine",
        "per_channel_affine",
        *(str(dtype).split(".")[1] for dtype in STORAGE_DTYPES.values()),
    },
    "torch._utils": {"_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_device_tensor_from_numpy"},
    "torch.serialization": {"_get_layout"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch.nn": None,
    "torch.optim": None,
    "pytorch_lightning": None,
    "lightning": None,
    "lightning_fabric": None,
    "omegaconf": None,
    "ldm": None,
}


def _find_global(module: str, name: str) -> Any:
    if (module, name) in _TENSOR_FUNCTIONS:
        return _TENSOR_FUNCTIONS[module, name]
    if module in ("torch", "torch.cuda") and name in STORAGE_DTYPES:
        return STORAGE_DTYPES[name]
    if name in (_HARMLESS.get(module) or ()):
        return _PLACEHOLDER
    packages = list(itertools.accumulate(module.split("."), lambda parent, child: f"{parent}.{child}"))
    if any(_HARMLESS.get(package, ()) is None for package in packages):
        return _PLACEHOLDER
    is_class = re.fullmatch(r"_*[A-Z]\w*", name.rpartition(".")[2])
    if is_class and packages[0] not in sys.stdlib_module_names and packages[0] not in _LIBRARY:
        return _PLACEHOLDER
    raise refuse_global(module, name)


def _read_zip(path: str | os.PathLike, data: memoryview) -> Any:
    """The format of torch since 1.6: a zip archive of `NAME/data.pkl` and, not compressed, `NAME/data/KEY`."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: info for info in archive.infolist()}
    except DAMAGED_ZIP as error:
        raise Refused(f"is a damaged zip archive ({first_line(error)})") from None
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise Refused("is a zip archive, but not one of torch.save; if it holds a checkpoint, unpack it")
    root = roots[0]
    if f"{root}byteorder" in records and _content(data, records[f"{root}byteorder"]) != b"little":
        raise Refused("holds numbers in big-endian order; expected little-endian")
    storages: dict[tuple[str, torch.dtype], StorageRecord] = {}

    def find_storage(key: str, dtype: torch.dtype, numel: int) -> StorageRecord:
        if (key, dtype) not in storages:
            if f"{root}data/{key}" not in records:
                raise Refused(f"is damaged: it does not hold {shown(root)}data/{shown(key)}")
            record = records[f"{root}data/{key}"]
            content = _content(data, record)
            storages[key, dtype] = StorageRecord(content, dtype, len(content) // dtype.itemsize, record.CRC)
        if storages[key, dtype].data.nbytes != numel * dtype.itemsize:
            raise Refused(f"is damaged: {shown(str(numel))} values announced in data/{shown(key)}, others are there")
        return storages[key, dtype]

    machine = _CheckpointMachine(
        _content(data, records[f"{root}data.pkl"]), 0, Budget(), _find_global, lambda value: find_storage(*_id(value))
    )
    return machine.load()


def _content(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of a file in an archive that is not compressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise Refused(f"is refused: {shown(info.filename)} in it is compressed or encrypted; torch.save does neither")
    header = data[max(info.header_offset, 0) :][:30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Refused(f"is a damaged zip archive ({shown(info.filename)} is not where it should be)")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))  # name, and what aligns the content
    if start + info.file_size > len(data):
        raise Refused(f"is truncated or damaged: {shown(info.filename)} reaches beyond its end")
    return data[start : start + info.file_size]


def _read_legacy(data: memoryview) -> Any:
    """The format of torch before 1.6: magic number, version, machine, content and keys as pickles, then the values."""
    budget, position = Budget(), 0
    storages: dict[str, StorageRecord] = {}

    def find_storage(value: Any) -> StorageRecord:
        key, dtype, numel = _id(value)
        storage = storages.setdefault(key, StorageRecord(data[:0], dtype, numel))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise Refused("is damaged: it describes a tensor's storage in two ways")
        return storage

    def load() -> Any:
        nonlocal position
        machine = _CheckpointMachine(data, position, budget, _find_global, find_storage)
        value = machine.load()
        position = machine.position
        return value

    if [load(), load()] != [TORCH_MAGIC, TORCH_VERSION]:
        raise Refused("is a pickle, but not one of torch.save")
    system, content, keys = load(), load(), load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("holds numbers in another order than little-endian")
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise Refused("is damaged: its values do not belong to its tensors")
    for storage in [storages[key] for key in keys]:
        count = int.from_bytes(data[position : position + 8], "little")
        size = storage.numel * storage.dtype.itemsize
        if count != storage.numel or position + 8 + size > len(data):
            raise Refused("is truncated or damaged: it announces more values than it has")
        storage.data = data[position + 8 : position + 8 + size]
        position += 8 + size
    return content


def _id(value: Any) -> tuple[str, torch.dtype, int]:
    """Key, type and length of the storage that a persistent id names."""
    kinds = (str, torch.dtype, str, str, int)
    known = type(value) is tuple and tuple(map(type, value[:5])) == kinds and value[0] == "storage" and value[4] >= 0
    if not known or value[5:] not in ((), (None,)):
        raise Refused("is refused: a tensor's storage is not described as torch does")
    return value[2], value[1], value[4]


def _state_dict(content: Any, max_bytes: int) -> dict[str, Tensor]:
    """The tensors of a state dict, which take no more memory than the file; what else it holds is left out."""
    if type(content) is dict and type(content.get("state_dict")) is dict:
        content = content["state_dict"]
    if type(content) is not dict or not content:
        raise Refused("does not hold a state dict; expected names and tensors, bare or under 'state_dict'")
    names, content = list(content), {name: value for name, value in content.items() if type(value) is TensorRecord}
    if not content:
        raise Refused(f"does not hold a state dict: {shown(names[0])} is not a tensor")
    storages = {id(record.storage): record.storage for record in content.values()}
    _check_memory((storage.data.nbytes for storage in storages.values()), max_bytes)
    views = {key: _flat(storage) for key, storage in storages.items()}
    tensors = {
        name: views[id(record.storage)].as_strided(record.size, record.stride, record.offset)
        for name, record in content.items()
    }
    _check_memory((tensor.nbytes for tensor in tensors.values() if not tensor.is_contiguous()), max_bytes)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _check_memory(sizes: Iterable[int], max_bytes: int) -> None:
    """Before anything is copied: a hostile file can describe the same bytes many times."""
    if sum(sizes) > max_bytes:
        raise Refused("is refused: its tensors take more memory than the file has")


def _flat(storage: StorageRecord) -> Tensor:
    if storage.numel == 0:
        return torch.empty(0, dtype=storage.dtype)
    if storage.crc and zlib.crc32(storage.data) != storage.crc:  # torch can be told to write none, which is 0
        raise Refused("is damaged: a checksum in it does not fit its values; get it again")
    content = torch.frombuffer(storage.data, dtype=torch.uint8)
    return _aligned(content).view(storage.dtype)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Refused(f"is not a readable safetensors file ({first_line(error)})") from None
