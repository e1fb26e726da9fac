"""What can go wrong with the numbers of a run, or with those who started it, and what is done about it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError
from torch_utils import distributed
from torch_utils.transfers import Download

from .distill import Distiller

#: Iterations in a row with a step left out after which half precision is given up, and after which a run is hopeless.
MAX_OVERFLOWS, MAX_BAD_IN_A_ROW = 5, 20


class LaggedCount:
    """Reads a counter on the device without holding it up: on CUDA, `poll` gives the value of the call before.

    The lag is exactly one call, so that what follows from it does not depend on timing.
    """

    def __init__(self, counter: Tensor, value: int = 0) -> None:
        self._counter, self._value = counter, value
        self._pending: Download | None = None

    def poll(self) -> int:
        if self._counter.device.type != "cuda":
            self._value = int(self._counter)
            return self._value
        pending = Download(self._counter)
        self.wait()
        self._pending = pending
        return self._value

    def wait(self) -> None:
        """Take in what is on its way."""
        if self._pending is not None:
            self._value, self._pending = int(self._pending.get()), None


class Health:
    """Losses and weights that are not finite: half precision is given up first, then the run.

    Attributes:
        half_off: whether the run goes on in single precision, after half precision has overflowed.
    """

    def __init__(self, distiller: Distiller) -> None:
        self.distiller, self.half_off = distiller, False
        self._skips, self._bad_losses = LaggedCount(distiller.skipped), LaggedCount(distiller.bad_losses)
        self._seen_skips, self._seen_bad_losses, self._bad_in_a_row = 0, 0, 0

    def check(self, images: int) -> str | None:
        """Look at the skipped steps after an iteration; a line for the log if the precision has changed.

        Raises:
            UserError: steps have been left out in `MAX_BAD_IN_A_ROW` iterations in a row.
        """
        before, self._seen_skips = self._seen_skips, self._skips.poll()
        bad_before, self._seen_bad_losses = self._seen_bad_losses, self._bad_losses.poll()
        if self._seen_skips == before:
            self._bad_in_a_row = 0
            return None
        self._bad_in_a_row += 1
        # One gradient that overflows costs a step; a loss that does, or gradients that do so again and again, the run.
        bad_loss = self._seen_bad_losses > bad_before
        if self.distiller.config.precision == "fp16" and not self.half_off:
            if not bad_loss and self._bad_in_a_row < MAX_OVERFLOWS:
                return None
            self.switch_half_off()
            what = "A loss was" if bad_loss else f"Gradients of {MAX_OVERFLOWS} iterations in a row were"
            return f"{what} not finite at kimg {images / 1000:g}: continuing in float32"
        if self._bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise UserError(
                f"the loss is not finite, or its gradients: {self._seen_skips} steps skipped up to kimg "
                f"{images / 1000:g}; lower --lr, or check the teacher with sample.py --model_path=teacher"
            )
        return None

    def check_weights(self, images: int) -> None:
        """Refuse to go on with, or to save, weights that are not finite; waits for the device."""
        finite = torch.stack([param.isfinite().all() for param in self.distiller.trained])
        if not finite.all():
            raise UserError(
                f"{int((~finite).sum())} of {len(finite)} weights of the student are not finite at kimg "
                f"{images / 1000:g}; lower --lr={self.distiller.config.lr:g}"
            )

    def switch_half_off(self) -> None:
        self.half_off = True
        self.distiller.student.compute_dtype = self.distiller.teacher.model.compute_dtype = torch.float32

    def state_dict(self) -> dict[str, Any]:
        self._skips.wait()
        self._bad_losses.wait()
        return {
            "skipped": int(self.distiller.skipped),
            "seen_skips": self._seen_skips,
            "bad_losses": int(self.distiller.bad_losses),
            "seen_bad_losses": self._seen_bad_losses,
            "half_off": self.half_off,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.distiller.skipped.fill_(state["skipped"])
        self.distiller.bad_losses.fill_(state["bad_losses"])
        self._skips = LaggedCount(self.distiller.skipped, state["skipped"])
        self._bad_losses = LaggedCount(self.distiller.bad_losses, state["bad_losses"])
        # On CUDA the last step's skip may not have been seen yet.
        self._seen_skips, self._seen_bad_losses = state["seen_skips"], state["seen_bad_losses"]
        if state["half_off"]:
            self.switch_half_off()


class StopRequests:
    """Signals to any rank, or the end of the launcher; all ranks learn of them after the same iteration."""

    def __init__(self, device: torch.device) -> None:
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stops = torch.zeros((), device=device)
        self._count = LaggedCount(self._stops)

    @property
    def is_orphan(self) -> bool:
        """Whether torchrun, which started this process, has been killed: nobody would end it with the other ranks."""
        return self._launcher is not None and os.getppid() != self._launcher

    def poll(self, asked: bool) -> bool:
        """Whether the run is to stop; `asked`: a signal came to this rank."""
        asked = asked or self.is_orphan
        if distributed.world_size() == 1:
            return asked
        self._stops.fill_(asked)
        distributed.all_reduce_sum(self._stops)
        return self._count.poll() > 0
