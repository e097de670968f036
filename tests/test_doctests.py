"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT) for path in (ROOT / "rag_rl").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_examples():
    assert MODULES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.as_posix())
def test_examples(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
