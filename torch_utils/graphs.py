"""CUDA graphs: what a function launches is recorded once, and then replayed in one launch.

For that the function must launch the same kernels whatever the values of its inputs, and the host must read none of
them: a trajectory along fixed noise levels does. A replay works in the memory of the recording, so inputs are copied
to where they were then, and the result is copied out of it before the next replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError, first_line

from .device import is_plain

MODES = ("auto", "on", "off")
DEVICE_TYPE = "cuda"
#: `auto` keeps a graph whose replay takes at most this part of the time of the launches one by one.
WORTH = 0.95
#: Graphs that are kept, each with memory of its inputs and result; they share the rest.
MOST = 32

#: A function of some tensors, the first of which is there.
Function = Callable[..., Tensor]


def check_mode(mode: str, device: torch.device) -> None:
    """Refuse graphs where there are none.

    Raises:
        UserError: `mode` is `on`, and `device` is no GPU of CUDA.
    """
    if mode == "on" and device.type != DEVICE_TYPE:
        raise UserError(f"on needs a GPU of CUDA, and this is on {device.type}; leave it out", "cuda_graph")


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    result: Tensor

    def replay(self, values: tuple[Tensor | None, ...]) -> Tensor:
        for own, value in zip(self.inputs, values, strict=True):
            if own is not None and value is not None:
                own.copy_(value)
        self.graph.replay()
        return self.result.clone()


class Graphs:
    """Calls of functions on a GPU, replayed from the third call with equal keys and shapes on.

    The first one runs as it is, so that what happens once has happened: weights are cast, cuDNN has timed its
    algorithms, captions are encoded. The second one records. Where that fails, a line says why, and everything goes on
    without graphs.

    What a function uses beside its inputs must stay where it is, weights above all.

    Args:
        mode: `off`, `on`, or `auto`, which keeps graphs that are faster than what they stand for: those of small
            networks and batches, whose launches take longer than their kernels.
        say: what to do with that line.
    """

    def __init__(self, mode: str = "off", say: Callable[[str], Any] = print) -> None:
        self.mode, self.say = mode, say
        #: By key and shapes. None where nothing was recorded yet, or a graph is not worth it.
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._settled: set[Hashable] = set()
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, function: Function, key: Hashable, *values: Tensor | None) -> Tensor:
        """`function(*values)`, without gradients. The key stands for all that it depends on besides."""
        device = next(value.device for value in values if value is not None)
        if self.mode == "off" or device.type != DEVICE_TYPE or is_plain():
            return function(*values)
        shapes = tuple(None if value is None else (value.shape, value.dtype) for value in values)
        signature = key, shapes
        if signature not in self._recordings:
            if len(self._recordings) < MOST:
                self._recordings[signature] = None
            return function(*values)
        if signature not in self._settled:
            self._settled.add(signature)
            self._recordings[signature] = self._try(function, values)
        recording = self._recordings[signature]
        return function(*values) if recording is None else recording.replay(values)

    def _try(self, function: Function, values: tuple[Tensor | None, ...]) -> _Recording | None:
        """A recording; None if there cannot be one, or it is not worth it."""
        try:
            recording = self._record(function, values)
            if self.mode == "auto" and _seconds(recording.replay, values) > WORTH * _seconds(function, *values):
                return None
            return recording
        except RuntimeError as error:  # CUDA's errors, and those of memory, are of this class
            self.mode = "off"
            self.say(f"Without CUDA graphs: {first_line(error.__context__ or error)}")
            return None

    def _record(self, function: Function, values: tuple[Tensor | None, ...]) -> _Recording:
        inputs = [None if value is None else value.clone() for value in values]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            function(*inputs)  # libraries get their work space on this stream
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # What other threads do, writing images or watching NCCL, is no part of it.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = function(*inputs)
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return _Recording(graph, inputs, result)


def _seconds(function: Callable[..., Any], *values: Any) -> float:
    """How long the device takes, from the first launch on."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(*values)
    torch.cuda.synchronize()
    return time.perf_counter() - start
