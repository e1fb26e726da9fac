"""CUDA graphs without CUDA: on the CPU, operations between begin and end of a capture are noted, and done again.

As on a GPU, a replay works in the memory of the capture, and a value that the host reads during one is an error.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_utils import graphs

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"}
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"


class Graph(TorchDispatchMode):
    """In place of `torch.cuda.CUDAGraph`."""

    made: list[Graph] = []

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.replays = 0
        Graph.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS and args[0].dtype != torch.float64:  # schedules are on the CPU
            raise RuntimeError(NOT_PERMITTED)
        out = func(*args, **(kwargs or {}))
        self.launches.append((func, args, kwargs or {}, out))
        return out

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert pool is not None and capture_error_mode == "thread_local"
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.launches:
            again = func(*args, **kwargs)
            for own, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                    own.copy_(new)


@contextlib.contextmanager
def graphs_on_the_cpu() -> Iterator[list[Graph]]:
    """Within, `torch_utils.graphs` takes the CPU for a GPU; the graphs that were made."""
    Graph.made = []
    cuda = types.SimpleNamespace(
        CUDAGraph=Graph,
        Stream=object,
        stream=lambda stream: contextlib.nullcontext(),
        graph_pool_handle=object,
        synchronize=lambda: None,
        empty_cache=lambda: None,
    )
    stand_in = types.SimpleNamespace(**{**vars(torch), "cuda": cuda})
    with mock.patch.object(graphs, "DEVICE_TYPE", "cpu"), mock.patch.object(graphs, "torch", stand_in):
        yield Graph.made
