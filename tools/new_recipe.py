"""Writes the skeleton of a recipe: ``python tools/new_recipe.py NAME [--like RECIPE]``.

The skeleton is a copy of a neighbour, since recipes are made to be copied and a copy is never out of date. Its
docstring becomes a form to fill in, and until that is done it stops with one line that says so. With it come its tiny
config, a row in recipes/README.md and a test. All of it passes tests/recipes/test_anatomy.py and test_configs.py.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORM = '''"""(fill in: one line that says what is trained, and how).

Trains: (fill in: which part, and which of its weights.)
Data: (fill in: the columns that are read; docs/data_formats.md has the formats.)
Rewards: (fill in: each term with its weight, and when a completion cannot be scored.)
Needs: (fill in: GPU memory, services; tiny: 2 CPU cores, minutes.)
Paper: (fill in: title and arXiv number, then how this differs.)
CPU: accelerate launch recipes/{name}.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/{name}.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/{name}.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""
'''
STOP = '    raise SystemExit(f"{__file__} is a skeleton: fill in docstring and steps, then delete this line")\n'
HEADER = """# The embedded default of recipes/{name}.py: a tiny world, a tiny model, nothing to download.
#
#   accelerate launch recipes/{name}.py
#
# Needs: 2 CPU cores.
# Measured: not run yet.
"""
TEST = '''"""recipes/{name}.py, through its real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "{name}.py"


@pytest.mark.smoke
@pytest.mark.xfail(reason="a skeleton: delete this line when the recipe is filled in", strict=True)
def test_three_steps(tmp_path):
    flags = ["--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, str(RECIPE), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "complete"
    # Say here which figure this recipe must move, and that three steps leave a part that loads again.
'''


class NewRecipeError(Exception):
    """The skeleton cannot be written; the message says why."""


def skeleton(source: str, name: str, like: str) -> str:
    """Makes the skeleton of one recipe from the text of another.

    Args:
        source: the neighbour's text.
        name: of the new recipe.
        like: name of the neighbour.

    Returns:
        The text with the form for a docstring, which stops at the start of ``main``.

    Raises:
        NewRecipeError: the neighbour has not the anatomy of a recipe.
    """
    tree = ast.parse(source)
    main = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"), None)
    if main is None or ast.get_docstring(tree) is None or ast.get_docstring(main) is None:
        raise NewRecipeError(f"recipes/{like}.py has no docstring, or no main() with one: give another --like")
    lines = source.splitlines(keepends=True)
    after_form, after_main = tree.body[0].end_lineno, main.body[0].end_lineno
    body = [*lines[after_form:after_main], STOP, *lines[after_main:]]
    return FORM.format(name=name) + "".join(body)


def with_row(readme: str, name: str, like: str) -> str | None:
    """Adds a row for a recipe to the table that has its neighbour's.

    Args:
        readme: the text of recipes/README.md.
        name: of the new recipe.
        like: name of the neighbour.

    Returns:
        The text with one row more, below the last row of that table; None where no table has the neighbour.
    """
    lines = readme.splitlines(keepends=True)
    rows = [number for number, line in enumerate(lines) if line.startswith("|") and f"{like}.py" in line.split("|")[1]]
    if not rows:
        return None
    last = rows[0]
    while last + 1 < len(lines) and lines[last + 1].startswith("|"):
        last += 1
    cells = ["(fill in)"] * max(lines[rows[0]].strip().strip("|").count("|"), 1)
    cells[-1] = "not run yet"
    row = f"| `{name}.py` | {' | '.join(cells)} |\n"
    return "".join([*lines[:last], lines[last].rstrip("\n") + "\n", row, *lines[last + 1 :]])


def write_recipe(root: Path, name: str, like: str) -> list[str]:
    """Writes recipe, tiny config, test and table row.

    Args:
        root: the project.
        name: of the new recipe.
        like: name of the recipe that it starts from.

    Returns:
        What was written, one line each.

    Raises:
        NewRecipeError: a bad or taken name, or no such neighbour; nothing is written then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise NewRecipeError(f"NAME must be words in small letters joined by _, such as grpo_cite; got {name!r}")
    neighbour, neighbour_config = root / "recipes" / f"{like}.py", root / "recipes" / "configs" / like / "tiny.yaml"
    if not (neighbour.is_file() and neighbour_config.is_file()):
        known = ", ".join(sorted(path.stem for path in (root / "recipes").glob("*.py")))
        raise NewRecipeError(
            f"there is no recipe {like!r} with a tiny config to start from; there are: {known or 'none'}"
        )
    settings = re.sub(r"\A(#.*\n)+", "", neighbour_config.read_text(encoding="utf-8"))
    files = {
        root / "recipes" / f"{name}.py": skeleton(neighbour.read_text(encoding="utf-8"), name, like),
        root / "recipes" / "configs" / name / "tiny.yaml": HEADER.format(name=name) + settings,
        root / "tests" / "recipes" / f"test_{name}.py": TEST.format(name=name),
    }
    taken = [str(path.relative_to(root)) for path in files if path.exists()]
    if taken:
        raise NewRecipeError(f"{' and '.join(taken)} already there: take another NAME")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    written = [str(path.relative_to(root)) for path in files]
    readme = root / "recipes" / "README.md"
    table = with_row(readme.read_text(encoding="utf-8"), name, like) if readme.is_file() else None
    if table is None:
        written.append(f"(no row in recipes/README.md: it has no table with {like}.py; add one)")
    else:
        readme.write_text(table, encoding="utf-8")
        written.append("a row in recipes/README.md")
    return written


def main() -> None:
    """Reads the command line; ends with status 2 and one line where the skeleton cannot be written."""
    parser = argparse.ArgumentParser(description="Write the skeleton of a recipe.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="such as grpo_cite")
    parser.add_argument("--like", default="grpo_generator", help="the recipe to start from (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        written = write_recipe(ROOT, arguments.name, arguments.like)
    except NewRecipeError as error:
        print(f"new-recipe: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(written))
    print("Next: docs/add_a_recipe.md, step 3.")


if __name__ == "__main__":
    main()
