"""EDM networks as pickles for tools that expect `pickle.load(file)['ema']`.

EDM's pickles name one function, `torch_utils.persistence._reconstruct_persistent_obj`, and give it for every module the
source text of its class, the name of the class, and the instance's `__dict__`. Tools that read them run that text. What
is written here has the same layout with the source of `edm_pickled` (Apache-2.0, like all of this program). So a file
can be used wherever EDM's `torch_utils.persistence` is, with torch 2.0 or later; and, like every EDM pickle, it runs
code when it is loaded with anything but this program.

What is in the file besides marks it as a student: `training_kwargs` (its settings), `sigmas` and `student`.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dnnlib import replacing

from . import edm_pickled
from .precond import EDMPrecond

HOOK_MODULE, HOOK = "torch_utils.persistence", "_reconstruct_persistent_obj"
#: Version of the layout that EDM's loader checks.
LAYOUT = 6
#: What every module has, and values that need no code to be read; the rest serves constructors and caches.
MODULE_STATE = frozenset(vars(nn.Module()))
PLAIN = (int, float, str, type(None))


def plain_network(net: EDMPrecond, sigma_range: tuple[float, float]) -> nn.Module:
    """The network in terms of `edm_pickled`, with the same tensors.

    Args:
        net: without step condition.
        sigma_range: σ_min and σ_max that samplers are told.
    """
    plain = _plain(net)
    limits = dict(zip(("sigma_min", "sigma_max"), sigma_range))
    arguments = {name: value for name, value in net.init_kwargs.items() if name != "use_step_condition"}
    vars(plain).update(limits, _init_kwargs=arguments | limits)
    return plain


def _plain(module: nn.Module) -> nn.Module:
    """A module of ours as one of `edm_pickled`, its children too; torch's containers stay what they are."""
    names = [cls.__name__ for cls in type(module).__mro__ if hasattr(edm_pickled, cls.__name__)]
    cls = getattr(edm_pickled, names[0]) if names else type(module)
    plain = cls.__new__(cls)
    vars(plain).update({k: v for k, v in vars(module).items() if k in MODULE_STATE or isinstance(v, PLAIN)})
    children = {name: None if child is None else _plain(child) for name, child in module._modules.items()}
    vars(plain).update(_modules=children, _init_args=(), _init_kwargs={})
    return plain


def write_edm_pickle(net: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    """Write `{'ema': net, **content}`, all or nothing; `net` is from `plain_network`, `content` are plain values."""
    with _persistence(), replacing(path) as temporary, open(temporary, "wb") as file:
        _Pickler(file).dump({"ema": net, **content})


class _Pickler(pickle.Pickler):
    """Modules of `edm_pickled` become calls of EDM's hook; modules of torch and tensors stay what they are."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=4)
        self._source = inspect.getsource(edm_pickled)

    def reducer_override(self, value: Any) -> Any:
        if type(value).__module__ != edm_pickled.__name__:
            return NotImplemented
        name, state = type(value).__name__, vars(value)
        meta = dict(type="class", version=LAYOUT, module_src=self._source, class_name=name, state=state)
        return getattr(sys.modules[HOOK_MODULE], HOOK), (meta,)


@contextmanager
def _persistence() -> Iterator[None]:
    """Let pickle find the function that it is to name, which is EDM's and not here."""

    def hook(meta: dict[str, Any]) -> None:
        """Written by name; nobody calls it here."""

    hook.__module__, hook.__qualname__, hook.__name__ = HOOK_MODULE, HOOK, HOOK
    module = ModuleType(HOOK_MODULE)
    setattr(module, HOOK, hook)
    sys.modules[HOOK_MODULE] = module
    try:
        yield
    finally:
        del sys.modules[HOOK_MODULE]
