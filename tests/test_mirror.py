"""Every module has a test file in the same place: rag_rl/a/b.py <-> tests/a/test_b.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# module -> why it has no test file of its own
EXCEPTIONS = {
    "rag_rl/types.py": "plain data and protocols, used by every other test",
}
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "rag_rl").rglob("*.py"))


def defines_something(path: Path) -> bool:
    """Whether a file has functions or classes of its own; a package that only passes names on has none."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    return bool(set(defined) - {"__getattr__", "__dir__"})


def mirrored(path: Path) -> Path:
    """Where the tests of a module stand; those of a package's own ``__init__`` beside its folder, under its name."""
    inner = path.relative_to("rag_rl")
    if inner.name == "__init__.py":
        inner = inner.parent.with_suffix(".py")
    return Path("tests") / inner.parent / f"test_{inner.name.lstrip('_')}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.as_posix())
def test_module_has_tests(path):
    name = path.as_posix()
    if path.name in ("__init__.py", "__main__.py") and not defines_something(path):
        return
    if name in EXCEPTIONS:
        assert not (ROOT / mirrored(path)).exists(), f"{name} has tests now: take it out of EXCEPTIONS"
        return
    assert (ROOT / mirrored(path)).is_file(), f"{name} has no {mirrored(path)}"


def test_exceptions_exist():
    assert not [name for name in EXCEPTIONS if not (ROOT / name).is_file()]


def test_test_folders_are_no_packages():
    assert not sorted((ROOT / "tests").rglob("__init__.py")), "pytest runs with importmode=importlib"
