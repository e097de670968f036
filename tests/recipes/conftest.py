"""Recipes inside the test process: importing TRL once instead of once a test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str], ModuleType]:
    """Imports recipes by name, each once."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            specification = importlib.util.spec_from_file_location(f"tested_{name}", RECIPES / f"{name}.py")
            assert specification is not None
            assert specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            sys.modules[specification.name] = module  # where dataclasses and typing look a class's module up
            specification.loader.exec_module(module)
            loaded[name] = module
        return loaded[name]

    load("grpo_generator")  # here, not in a test: transformers' log handler keeps the stderr that it meets at import
    return load


@pytest.fixture
def run_here(load_recipe, monkeypatch) -> Callable[..., int]:
    """Runs a recipe as its command line does, in this process: ``run_here("grpo_generator", *flags)`` -> exit code."""
    from rag_rl.run import launch

    def run(name: str, *flags: object) -> int:
        module = load_recipe(name)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        try:
            launch(module.main)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def refused(run_here, capsys) -> Callable[..., str]:
    """Runs a recipe that must refuse its input; gives its one line, which names the recipe first."""

    def run(name: str, *flags: object, code: int = 2) -> str:
        capsys.readouterr()
        found = run_here(name, *flags)
        error = capsys.readouterr().err
        ours = [line for line in error.splitlines() if f"{name}.py: " in line]
        assert (found, len(ours)) == (code, 1), error
        assert "Traceback" not in error
        return ours[0]

    return run
