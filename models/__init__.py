"""Networks, preconditioning, the registry of data sets, and loaders."""

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

from .loading import load_student, load_teacher
from .model import DiffusionModel, SamplingSettings, Student
from .networks.edm_unets import DhariwalUNet, SongUNet
from .precond import EDM2Precond, EDMPrecond

__all__ = [
    "DhariwalUNet",
    "DiffusionModel",
    "EDM2Precond",
    "EDMPrecond",
    "SamplingSettings",
    "SongUNet",
    "Student",
    "load_student",
    "load_teacher",
]
