"""Every YAML file below recipes/configs/ parses against its recipe and opens with what a reader has to know."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
YAMLS = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.y*ml"))

configs = pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.as_posix())
if not RECIPES:
    pytest.skip("no recipes yet", allow_module_level=True)


def header_of(path: Path) -> str:
    """The comment that opens a config, one line a line."""
    lines = (CONFIGS / path).read_text(encoding="utf-8").splitlines()
    opening = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#").strip() for line in opening)


def test_there_are_configs():
    assert len(YAMLS) >= len(RECIPES) > 0
    assert not [path for path in YAMLS if path.suffix != ".yaml"], "configs end in .yaml"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_tiny_config(recipe):
    assert (CONFIGS / recipe.stem / "tiny.yaml").is_file(), "the embedded default: no arguments must mean a quick run"


@configs
def test_config_belongs_to_a_recipe(path):
    assert (ROOT / "recipes" / f"{path.parts[0]}.py").is_file()


@configs
def test_config_parses(path, monkeypatch, load_recipe):
    from rag_rl.config import read_arguments

    monkeypatch.setenv("RAG_RL_DATA", "data")
    recipe = ROOT / "recipes" / f"{path.parts[0]}.py"
    arguments = load_recipe(recipe.stem).ARGUMENTS
    argv = ["--config", str(CONFIGS / path)]
    # A config for GPUs asks for bf16. Without a GPU transformers refuses that, unless the CPU is asked for as well.
    if any(field.name == "use_cpu" for owner in arguments for field in dataclasses.fields(owner)):
        argv += ["--use_cpu", "true"]
    assert len(read_arguments(recipe, *arguments, argv=argv)) == len(arguments)


@configs
def test_header_says_how_to_launch_it(path):
    header = header_of(path)
    launches = [line for line in header.replace("\\\n", " ").splitlines() if line.startswith("accelerate launch ")]
    mine = [line for line in launches if f"recipes/{path.parts[0]}.py" in line]
    assert mine, f"expected a comment line `accelerate launch ... recipes/{path.parts[0]}.py ...`"
    if path.name != "tiny.yaml":  # which is what a recipe takes without being asked
        named = rf"--config (recipes/configs/{re.escape(path.as_posix())}|{re.escape(path.stem)})(\s|$)"
        assert any(re.search(named, line) for line in mine), f"expected --config {path.stem} in the launch line"


@configs
def test_header_says_what_it_needs_and_what_came_out(path):
    header = header_of(path)
    assert re.search(r"^Needs: +\S", header, flags=re.MULTILINE), "# Needs: GPU memory, services, data"
    measured = re.search(r"^Measured: +(\S.*)", header, flags=re.MULTILINE)
    assert measured, "# Measured: figure, hardware and date; or: not run yet"
    dated = re.search(r"\b20\d\d-\d\d-\d\d\b", header)
    assert dated or "not run yet" in measured[1] or "recipes/README.md" in measured[1], measured[1]
