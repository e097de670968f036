"""Recipes and tools as modules, to be looked at without being run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path) -> ModuleType:
    """Imports a script that is in no package."""
    specification = importlib.util.spec_from_file_location(f"looked_at_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses and typing look a class's module up
    specification.loader.exec_module(module)
    return module
