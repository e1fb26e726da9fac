"""Other people's implementations, for tests that compare with them where they are installed."""

import importlib
from types import ModuleType

import pytest


def published(module: str) -> ModuleType:
    """The module; the test is skipped where it, or what it needs (torchvision), is absent or does not fit torch."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{module} cannot be imported ({str(error).splitlines()[0][:80]})")
