"""Every package says in one sorted ``__all__`` what it offers, and offers it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path for path in (ROOT / "rag_rl").rglob("__init__.py"))


def declared(path: Path) -> list[str] | None:
    """The literal value of ``__all__``, or None where there is none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                return ast.literal_eval(node.value)
    return None


def order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions: the order that ruff's RUF022 keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def dotted(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


def passes_names_on(path: Path) -> bool:
    """Whether the package imports names of its own modules for others to use."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(
        isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{dotted(path)}.") for node in body
    )


@pytest.mark.parametrize("path", PACKAGES, ids=dotted)
def test_names_are_declared_sorted_and_real(path):
    names = declared(path)
    if names is None:
        assert not passes_names_on(path), f"{path.relative_to(ROOT)} passes names on: list them in __all__"
        return
    assert names == sorted(set(names), key=order)
    module = importlib.import_module(dotted(path))
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing
