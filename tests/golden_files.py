"""Reading `tests/golden/*.npz`: numbers computed with the public reference implementations (see the README there)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One file: `meta`, arrays as tensors, and the exact weights of a network in it."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(GOLDEN / f"{name}.npz")
        self.meta: dict[str, Any] = json.loads(str(self._arrays["meta"]))

    def __contains__(self, key: str) -> bool:
        return key in self._arrays.files

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self._arrays[key])

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self._arrays.files if key.startswith(prefix)]

    def weights(self, net: str) -> dict[str, Tensor]:
        """State dict: int8 times a power of two for parameters, buffers as they are."""
        state = {}
        for key in self.keys(f"{net}/q/"):
            name = key[len(net) + 3 :]
            state[name] = self[key].float() * self[f"{net}/s/{name}"]
        for key in self.keys(f"{net}/b/"):
            state[key[len(net) + 3 :]] = self[key]
        return state
