"""Reading rankings: duplicate, missing and foreign numbers are repaired by a stated rule, and counted."""

from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError
from rag_rl.generation import ScriptedGenerator
from rag_rl.generation.ranking import ListwiseRanker, Ranking, parse_ranking
from rag_rl.types import Generation


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[2] > [1] > [3]", Ranking((1, 0, 2))),
        ("2 > 1 > 3", Ranking((1, 0, 2))),
        ("2, 1, 3", Ranking((1, 0, 2))),
        ("[2] > [2] > [1] > [3]", Ranking((1, 0, 2), duplicates=1)),
        ("[3]", Ranking((2, 0, 1), missing=2)),
        ("[3] > [0] > [4] > [1] > [2]", Ranking((2, 0, 1), foreign=2)),
        ("The 3 best of 3 are: [2] > [3] > [1].", Ranking((1, 2, 0))),
        ("1. I looked at 3 passages.\n3 > 2 > 1", Ranking((2, 1, 0))),
        ("<think>[1] > [2]</think>[3] > [2] > [1]", Ranking((2, 1, 0))),
        ("2.5 points\nrank 2 > 1 > 3", Ranking((1, 0, 2))),
        ("none of them", Ranking(None, missing=3)),
        ("[7] > [8]", Ranking(None, missing=3, foreign=2)),
        ("<think>[1] > [2] > [3]", Ranking(None, missing=3)),
        ("", Ranking(None, missing=3)),
        ("0 > 1 > 2", Ranking((0, 1, 2), missing=1, foreign=1)),
    ],
)
def test_reading(reply, expected):
    assert parse_ranking(reply, 3) == expected
    assert expected.repaired == (expected != Ranking(expected.order) or expected.order is None)


def test_nothing_to_rank():
    with pytest.raises(ValueError, match="at least 1"):
        parse_ranking("[1]", 0)


def test_what_is_asked_and_counted():
    generator = ScriptedGenerator(["[2] > [1]", "[1] > [1] > [5]", "no"])
    ranker = ListwiseRanker(generator, max_passage_words=3)
    found = ranker.rank(["q", "r", "s"], [["one two three four", "b"], ["a", "b"], ["a"]], task_instruction="Find it.")
    assert [one.order for one in found] == [(1, 0), (0, 1), None]
    assert (ranker.unreadable, ranker.duplicates, ranker.missing, ranker.foreign) == (1, 1, 1, 1)
    first = generator.prompts[0][0]["content"]
    assert "Find it." in first
    assert "\n[1] one two three\n[2] b\n" in first
    assert "all 2 passages" in first


def test_a_failed_request_is_no_ranking():
    class Failing:
        def generate(self, prompts, **options):
            return [[Generation("[1] > [2]", finish_reason="error")], []]

    ranker = ListwiseRanker(Failing())
    assert [one.order for one in ranker.rank(["q", "r"], [["a", "b"], ["a"]])] == [None, None]
    assert ranker.unreadable == 2


def test_no_query_asks_nobody():
    assert ListwiseRanker(ScriptedGenerator([])).rank([], []) == []


def test_prompts_that_do_not_fit(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("$query")
    with pytest.raises(ConfigError, match=r"no \$passages"):
        ListwiseRanker(ScriptedGenerator([]), prompt=str(path))
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        ListwiseRanker(ScriptedGenerator([]), max_passage_words=0)
