"""`make new-recipe` writes a skeleton that passes the checks of recipes, and never overwrites."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import load

ROOT = Path(__file__).parents[2]
NEIGHBOUR = "grpo_generator"
README = f"""# Recipes

| recipe | trains | config | measured |
|---|---|---|---|
| `{NEIGHBOUR}.py` | generator | tiny | em 0.5 -> 0.8 |

Text after the table.
"""

if not (ROOT / "recipes" / "configs" / NEIGHBOUR / "tiny.yaml").is_file():
    pytest.skip("no recipes yet", allow_module_level=True)


TOOL = load(ROOT / "tools" / "new_recipe.py")


@pytest.fixture
def project(tmp_path):
    """A copy of what a recipe touches, so that the test leaves the project alone."""
    for part in ("recipes", "tests/recipes"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("tests/conftest.py", "tests/scripts.py", "tests/loopback.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "recipes" / "README.md").write_text(README)
    return tmp_path


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)


def test_skeleton_passes_the_checks(project):
    written = TOOL.write_recipe(project, "grpo_cite", NEIGHBOUR)
    assert len(written) == 4
    checks = ["tests/recipes/test_anatomy.py", "tests/recipes/test_configs.py"]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *checks, "-k", "grpo_cite", cwd=project)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
    linted = run("-m", "ruff", "check", "recipes/grpo_cite.py", "tests/recipes/test_grpo_cite.py", cwd=project)
    assert linted.returncode == 0, linted.stdout
    formatted = run("-m", "ruff", "format", "--check", "recipes", "tests/recipes/test_grpo_cite.py", cwd=project)
    assert formatted.returncode == 0, formatted.stdout


def test_skeleton_says_that_it_is_one(project):
    TOOL.write_recipe(project, "grpo_cite", NEIGHBOUR)
    done = run("recipes/grpo_cite.py", cwd=project)
    assert done.returncode == 1
    assert "is a skeleton" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (project / "runs").exists()


def test_row_stands_below_the_neighbours(project):
    TOOL.write_recipe(project, "grpo_cite", NEIGHBOUR)
    lines = (project / "recipes" / "README.md").read_text().splitlines()
    assert lines[5] == "| `grpo_cite.py` | (fill in) | (fill in) | not run yet |"
    assert [*lines[:5], *lines[6:]] == README.splitlines()


@pytest.mark.parametrize("name", ["", "Cite", "grpo-cite", "1st", "../up", "grpo_cite.py"])
def test_bad_names_are_refused(project, name):
    with pytest.raises(TOOL.NewRecipeError, match="NAME must be"):
        TOOL.write_recipe(project, name, NEIGHBOUR)


def test_existing_names_are_refused(project):
    with pytest.raises(TOOL.NewRecipeError, match=rf"{NEIGHBOUR}\.py.* already there"):
        TOOL.write_recipe(project, NEIGHBOUR, NEIGHBOUR)
    assert (project / "recipes" / "README.md").read_text() == README


def test_unknown_neighbour_is_refused(project):
    with pytest.raises(TOOL.NewRecipeError, match=r"there are: .*grpo_generator"):
        TOOL.write_recipe(project, "grpo_cite", "grpo_nothing")
    assert not (project / "recipes" / "grpo_cite.py").exists()


def test_command_line_ends_in_one_line():
    done = run("tools/new_recipe.py", "Bad-Name", cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
