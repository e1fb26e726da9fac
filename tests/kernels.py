"""Counts the kernels that a GPU would launch, on tensors without memory (the meta device, or fake CUDA tensors)."""

from __future__ import annotations

import collections
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What launches nothing.
VIEWS = """
    view _unsafe_view transpose permute expand slice select unsqueeze squeeze detach alias t as_strided split chunk
    split_with_sizes unbind _reshape_alias lift_fresh empty empty_like new_empty empty_strided new_empty_strided view_as
    unfold diagonal narrow is_same_size sym_size sym_stride device
"""
#: Tensors that one launch of a kernel for lists takes, about (torch's own has 30 to 110, by operation).
LIST = 64


class KernelCounter(TorchDispatchMode):
    """Kernels by the name of their operation, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self._views = frozenset(VIEWS.split())

    @property
    def total(self) -> int:
        return sum(self.kernels.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name.startswith(("_foreach", "_fused_adam", "_amp_foreach")):
            self.kernels[name] += -(-len(args[0]) // LIST)
        elif name not in self._views and any(isinstance(t, Tensor) for t in tree_leaves((out, args))):
            self.kernels[name] += 1
        return out
