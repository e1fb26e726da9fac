"""Students that were distilled by the reference SFD code, in terms of this program.

That code pickles `{'model': net}`, where `net` is its `EDMPrecond` with the settings of the training in the attribute
`training_kwargs`. `.edm_pickle` reads such a file without executing anything of it; here its settings are taken over:

- Noise levels: the recorded ones, else the network's own, else those between which the reference distils EDM networks.
- Step condition: the reference's networks have its layers always. Where the settings say that the student was trained
  without, they were never used and are left out. Of a second-stage student the reference records what its command line
  said, not what it was trained with; it is sampled as recorded, as the reference samples it.
"""

from __future__ import annotations

import math
import os
from typing import Any

from torch import Tensor

from dnnlib import UserError

from ..model import SamplingSettings
from .edm_pickle import read_edm_pickle

#: Between which noise levels the reference distils EDM networks.
SIGMA_MIN, SIGMA_MAX = 0.006, 80.0
REQUIRED = ("dataset_name", "num_steps", "afs", "schedule_type", "schedule_rho")
OPTIONAL = ("use_step_condition", "is_second_stage")


def read_reference_student(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor], SamplingSettings]:
    """Read a student of the reference → (`class` and constructor arguments of the network, its tensors, settings).

    Raises:
        UserError: a file that is no such student, is damaged, wants to run code, or has useless settings.
    """
    pickled = read_edm_pickle(path)
    recorded, network = pickled.training_kwargs, pickled.init_kwargs
    if recorded is None:
        raise UserError(f"{path} is a teacher, not a student: it has no network under 'model' with training_kwargs")
    missing = [name for name in REQUIRED if name not in recorded]
    if missing:
        raise UserError(f"{path} holds a student without {', '.join(missing)} in its training_kwargs")
    solver = recorded.get("sampler_stu", "euler")
    if solver != "euler":
        raise UserError(f"{path} holds a student for the solver {str(solver)[:40]!r}; expected euler")
    settings = {name: recorded[name] for name in (*REQUIRED, *OPTIONAL) if name in recorded}
    settings["sigma_min"] = _noise_level(recorded.get("sigma_min"), network.get("sigma_min"), SIGMA_MIN)
    settings["sigma_max"] = _noise_level(recorded.get("sigma_max"), network.get("sigma_max"), SIGMA_MAX)
    sampling = SamplingSettings.from_json(settings, str(path))
    tensors = pickled.state_dict
    if not sampling.use_step_condition:
        tensors = {name: tensor for name, tensor in tensors.items() if "step" not in name}
    spec = {"class": pickled.class_name, **network, "use_step_condition": sampling.use_step_condition}
    return spec, tensors, sampling


def _noise_level(*candidates: Any) -> float:
    """The first that is one; EDM's networks record 0 and infinity for no limit."""
    return next(value for value in candidates if type(value) in (int, float) and 0 < value < math.inf)
