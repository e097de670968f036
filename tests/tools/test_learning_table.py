"""The learning tables: each control has flags that its recipe takes; drawn labels; a row by hand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from rag_rl.config import read_arguments
from rag_rl.data import PairRow
from rag_rl.errors import ConfigError
from rag_rl.types import Passage
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
    flags = [flag.format(out="runs", seed=1) for flag in TOOL.FURTHER[recipe][kind]]
    path = ROOT / "recipes" / f"{recipe}.py"
    arguments = load(path).ARGUMENTS
    read_arguments(path, *arguments, argv=[*flags, "--seed", "1"])
    with pytest.raises(ConfigError, match="unknown"):
        read_arguments(path, *arguments, argv=[*flags, "--seeed", "1"])


def test_drawn_labels():
    documents = [Passage(f"d{i}", f"text {i}") for i in range(6)]
    rows = [PairRow(f"q{i}", tuple(documents[:1]), tuple(documents[1:]), meta={"n": i}) for i in range(300)]
    drawn = TOOL.draw_labels(rows)
    assert [(row.query, row.meta) for row in drawn] == [(row.query, row.meta) for row in rows]
    for row in drawn:
        assert len(row.positives) == 1
        assert sorted(one.doc_id for one in (*row.positives, *row.negatives)) == [one.doc_id for one in documents]
    # Each document is as likely as any other; the bounds are over four standard deviations away.
    counts = Counter(row.positives[0].doc_id for row in drawn)
    assert all(20 < counts[one.doc_id] < 80 for one in documents)


def test_a_row():
    found = {
        "before": {"em": 0.25},
        "after": {"em": 0.5},
        "ci95": {"em": [0.1, 0.4]},
        "n_eval": 8,
        "train_seconds": 7.4,
    }
    assert TOOL.row("seed 1", found, ["em"]) == "| seed 1 | 0.250 -> 0.500 [+0.100, +0.400] | 8 | 7 |"
