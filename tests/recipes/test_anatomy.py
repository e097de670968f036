"""Every recipe has the same anatomy, so that who has read one can read them all (docs/add_a_recipe.md)."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FIELDS = ["Trains", "Data", "Rewards", "Needs", "Paper", "CPU", "One node", "Cluster"]
MAX_LINES = 120
# HTTP, regular expressions and files of pickled objects have their place in rag_rl, not in a recipe.
BANNED_IMPORTS = {"re", "regex", "requests", "httpx", "urllib", "aiohttp", "openai", "pickle"}

recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
if not RECIPES:
    pytest.skip("no recipes yet", allow_module_level=True)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def main_of(path: Path) -> ast.FunctionDef:
    return next(node for node in tree_of(path).body if isinstance(node, ast.FunctionDef) and node.name == "main")


def fields_of(path: Path) -> dict[str, str]:
    """The fields of a recipe's docstring, in the order in which they stand."""
    docstring = ast.get_docstring(tree_of(path)) or ""
    pieces = re.split(rf"^({'|'.join(FIELDS)}):", docstring, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


@recipes
def test_it_can_be_held_in_the_head(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: what recipes share belongs in rag_rl"


@recipes
def test_docstring_has_the_fixed_fields(path):
    fields = fields_of(path)
    assert list(fields) == FIELDS, (
        f"expected the lines {', '.join(f'{name}:' for name in FIELDS)}, each once, in order"
    )
    assert not [name for name, text in fields.items() if not text], "an empty field"


@recipes
@pytest.mark.parametrize("field", ["CPU", "One node", "Cluster"])
def test_docstring_says_how_to_launch_it(path, field):
    text = fields_of(path)[field]
    # A recipe that cannot run there may say so: "CPU: no (needs ...)".
    assert f"recipes/{path.name}" in text or text.lower().startswith("no"), text


@recipes
def test_one_function_and_at_most_one_dataclass(path):
    body = tree_of(path).body
    assert [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)] == ["main"]
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    assert len(classes) <= 1
    for node in classes:
        assert [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list] == ["dataclass"]
        methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
        assert not methods, "recipe-only flags are data; what they do belongs in rag_rl"
    nested = [node for node in ast.walk(main_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(nested) == 1, "a helper function inside main() is still a helper function"


@recipes
def test_arguments_are_declared(path):
    assigned = [node for node in tree_of(path).body if isinstance(node, ast.Assign)]
    declared = [node.value for node in assigned if [ast.unparse(target) for target in node.targets] == ["ARGUMENTS"]]
    assert len(declared) == 1, "expected one ARGUMENTS = (Dataclass, ...), which test_configs.py reads as well"
    assert isinstance(declared[0], ast.Tuple)
    calls = [node for node in ast.walk(main_of(path)) if isinstance(node, ast.Call)]
    given = [[ast.unparse(argument).lstrip("*") for argument in call.args] for call in calls]
    assert ["__file__", "ARGUMENTS"] in given, "expected start_run(__file__, ARGUMENTS)"


@recipes
def test_six_numbered_comments(path):
    text = path.read_text(encoding="utf-8")
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    numbered = [(int(found[1]), token) for token in comments if (found := re.match(r"# (\d)\. \S", token.string))]
    assert [number for number, _ in numbered] == [1, 2, 3, 4, 5, 6]
    main = main_of(path)
    assert all(main.lineno < token.start[0] <= (main.end_lineno or 0) for _, token in numbered)


@recipes
def test_what_does_not_belong_in_a_recipe(path):
    found = []
    for node in ast.walk(tree_of(path)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Try):
            found.append(f"line {line}: try: errors of the user end in rag_rl.run, others must be seen")
        # Rounds of training, with their trainers spelled out inside, are no samples.
        rounds = isinstance(node, ast.For) and ast.unparse(node.iter).endswith(".rounds")
        if isinstance(node, ast.For | ast.AsyncFor | ast.While) and not rounds:
            found.append(f"line {line}: a loop over samples belongs in rag_rl")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"line {line}: import {name}" for name in names if name.split(".")[0] in BANNED_IMPORTS]
            found += [f"line {line}: a recipe imports no recipe" for name in names if name.split(".")[0] == "recipes"]
    assert not found


@recipes
def test_trainer_call_is_spelled_out(path):
    if fields_of(path)["Trains"].lower().startswith("nothing"):
        return  # a data recipe
    calls = [node for node in ast.walk(main_of(path)) if isinstance(node, ast.Call)]
    trainers = [call for call in calls if ast.unparse(call.func).endswith("Trainer")]
    assert trainers, "expected a call such as GRPOTrainer(model=..., reward_funcs=..., args=...) in main()"
    for call in trainers:
        names = [keyword.arg for keyword in call.keywords]
        assert None not in names, f"line {call.lineno}: ** hides what the trainer is given"
        assert len(names) >= 3, f"line {call.lineno}: name the arguments"
        assert len(call.args) <= 1, f"line {call.lineno}: name the arguments"
