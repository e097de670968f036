"""The learning tables: each control has flags that its recipe takes; exchanged questions; a row by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rag_rl.config import read_arguments
from rag_rl.errors import ConfigError
from rag_rl.tiny import FOLDER
from tests.scripts import load

ROOT = Path(__file__).parents[2]
TOOL = load(ROOT / "tools" / "learning_table.py")
CONTROLS = [(recipe, kind) for recipe, kinds in TOOL.FURTHER.items() for kind in kinds]


def test_all_recipes_that_train_and_no_others_have_a_table():
    (loop,) = re.findall(r"for recipe in ([a-z_ \t\\\n]+);", (ROOT / "Makefile").read_text(encoding="utf-8"))
    trains = {path.stem for path in (ROOT / "recipes").glob("*.py") if "run.train(" in path.read_text()}
    trains.add("self_boost")  # whose rounds train
    assert set(loop.replace("\\", " ").split()) == set(TOOL.METRICS) == trains
    assert set(TOOL.FURTHER) < trains


@pytest.mark.parametrize(("recipe", "kind"), CONTROLS)
def test_the_flags_of_a_control_are_the_recipe_s(recipe, kind):
    flags = [flag.format(out="runs", seed=1, exchanged="q.jsonl") for flag in TOOL.FURTHER[recipe][kind]]
    path = ROOT / "recipes" / f"{recipe}.py"
    arguments = load(path).ARGUMENTS
    read_arguments(path, *arguments, argv=[*flags, "--seed", "1"])
    with pytest.raises(ConfigError, match="unknown"):
        read_arguments(path, *arguments, argv=[*flags, "--seeed", "1"])


def test_exchanged_questions(tmp_path):
    source = FOLDER / "data" / "demo_1hop.jsonl"
    TOOL.exchange_questions(source, tmp_path / "new" / "q.jsonl")
    old, new = ([json.loads(line) for line in path.open()] for path in (source, tmp_path / "new" / "q.jsonl"))
    same = sum(a["question"] == b["question"] for a, b in zip(old, new, strict=True))
    assert same < 0.02 * len(old)
    assert sorted(row.pop("question") for row in old) == sorted(row.pop("question") for row in new)
    assert new == old, "nothing else is touched"


def test_a_row():
    found = {
        "before": {"em": 0.25},
        "after": {"em": 0.5},
        "ci95": {"em": [0.1, 0.4]},
        "n_eval": 8,
        "train_seconds": 7.4,
    }
    assert TOOL.row("seed 1", found, ["em"]) == "| seed 1 | 0.250 -> 0.500 [+0.100, +0.400] | 8 | 7 |"
