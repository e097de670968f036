"""Who may import whom, what `import rag_rl` may load, and what no file may be called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rag_rl"
FLOOR = {"types", "errors", "text", "metrics", "prompts"}
PARTS = {"data", "retrieval", "generation", "judges", "rewards", "reasoning"}
TOP = {"ask", "evaluation", "config", "run", "server", "cli"}
# unit -> the other units of rag_rl that it may import. A part that needs another is given it, typed by its protocol.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "text": {"types", "errors"},
    "metrics": {"types", "errors", "text"},
    "prompts": {"types", "errors"},
    **dict.fromkeys(PARTS, FLOOR),
    "trainers": FLOOR | {"reasoning", "rewards"},
    "tiny": FLOOR | {"data"},
    **{unit: FLOOR | PARTS | TOP | {"trainers", "tiny"} for unit in TOP},
    "__init__": set(),
    "__main__": {"cli"},
}
NOBODY_IMPORTS = {"recipes", "tests", "benchmarks", "tools"}
HEAVY = set("torch faiss openai chromadb transformers sentence_transformers datasets trl matplotlib".split())
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, in functions and under TYPE_CHECKING as well."""
    package = [*path.relative_to(ROOT).with_suffix("").parts][:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module or ""]).strip(".")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def test_there_is_something_to_check():
    assert len(MODULES) > 5


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_stay_within_the_rules(path):
    unit = unit_of(path)
    assert unit in ALLOWED, f"rag_rl/{unit} is new: say in ALLOWED what it may import, and in DESIGN what it is for"
    for line, name in imported(path):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert parts[0] not in NOBODY_IMPORTS, f"{where}: nothing in the package knows {parts[0]}/"
        if parts[0] != "rag_rl" or len(parts) == 1 or parts[1] in (unit, "__version__"):
            continue
        assert parts[1] in ALLOWED[unit], f"{where}: rag_rl.{unit} may see only {sorted(ALLOWED[unit])}"


LIGHT = ["rag_rl", "rag_rl.config", "rag_rl.cli", *(f"rag_rl.{unit}" for unit in sorted(FLOOR))]


@pytest.mark.parametrize("name", LIGHT)
def test_import_is_light(name):
    unit = PACKAGE.joinpath(*name.split(".")[1:])
    if not (unit.with_suffix(".py").is_file() or (unit / "__init__.py").is_file()):
        pytest.skip(f"{name} is not written yet")
    code = f"import sys, {name}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"`import {name}` loads {done.stdout.strip()}: import it inside the function"


def test_no_file_has_a_name_that_says_nothing():
    folders = [ROOT / name for name in ("rag_rl", "recipes", "tests", "tools", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert not [path for path in files if path.stem in {"utils", "util", "common", "helpers", "helper", "misc"}]


def test_nothing_can_execute_what_it_loads():
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in MODULES
        for line, name in imported(path)
        if name.split(".")[0] in banned
    ]
    assert not found
