"""Reading rankings: duplicate, missing and foreign numbers are repaired by a stated rule, and counted."""

from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError
from rag_rl.generation import ScriptedGenerator
from rag_rl.generation.ranking import LikelihoodRanker, ListwiseRanker, Ranking, parse_ranking
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


# ---- by likelihood


@pytest.fixture(scope="module")
def reader():
    from rag_rl.generation import TransformersGenerator
    from rag_rl.tiny import FOLDER

    return TransformersGenerator.from_pretrained(str(FOLDER / "reader"), device="cpu", batch_size=3)


PASSAGES = [
    "Kelsabert is by craft a painter. The home of Kelsabert is Gilawick.",
    "Dunnedric lives in Waloton. Dunnedric works as a weaver.",
    "Waloton lies on the Elmabrook.",
    "Seldaham is known for tin.",
]


def test_a_passage_goes_first_for_which_the_query_is_likely(reader):
    ranker = LikelihoodRanker(reader, prompt="tiny_question")
    queries = ["Where does Dunnedric live?", "What is Seldaham known for?", "What is the craft of Kelsabert?"]
    found = ranker.rank(queries, [PASSAGES, PASSAGES[1:], PASSAGES[:2]])
    assert [one.order[0] for one in found] == [1, 2, 0]
    assert [sorted(one.order) for one in found] == [[0, 1, 2, 3], [0, 1, 2], [0, 1]]
    assert not any(one.repaired for one in found)
    assert (ranker.unreadable, ranker.missing) == (0, 0)


def test_log_probabilities_are_the_models_own(reader):
    import torch

    ranker = LikelihoodRanker(reader, prompt="tiny_question")
    asked = [
        (f"Write a question about this passage.\n{text}", query)
        for text, query in zip(PASSAGES, ["Where does he live?", "Who?", "What is Waloton?", "Why?"], strict=True)
    ]
    found = ranker._log_probs(asked)
    for (content, query), score in zip(asked, found, strict=True):
        start = reader.encode([[{"role": "user", "content": content}]])[0]
        reply = reader.tokenizer(query, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = reader.model(input_ids=torch.tensor([start + reply])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(reply))
        assert score == pytest.approx(expected, abs=1e-3)


def test_fields_of_the_prompt(reader, tmp_path):
    prompt = tmp_path / "ask.txt"
    prompt.write_text("$task A $query_type of $length words: $passage")
    ranker = LikelihoodRanker(reader, prompt=str(prompt), fields={"query_type": "claim"}, max_passage_words=2)
    assert ranker._prompt("who is it", "one two three", "Find it.") == "Find it. A claim of 3 words: one two"
    assert LikelihoodRanker(reader).rank([], []) == []


def test_what_a_likelihood_needs(reader, tmp_path):
    with pytest.raises(ConfigError, match="needs a model in this process, not ScriptedGenerator: rank listwise"):
        LikelihoodRanker(ScriptedGenerator(["x"]), prompt="tiny_question")
    with pytest.raises(ConfigError, match="max_passage_words must be at least 1"):
        LikelihoodRanker(reader, max_passage_words=0)
    with pytest.raises(ConfigError, match=r"\$passage"):
        LikelihoodRanker(reader, prompt="augment_query")
    (tmp_path / "odd.txt").write_text("$passage $colour")
    with pytest.raises(ConfigError, match="asks for"):
        LikelihoodRanker(reader, prompt=str(tmp_path / "odd.txt"))


def test_a_passage_longer_than_the_context(reader):
    from rag_rl.errors import DataError

    ranker = LikelihoodRanker(reader, prompt="tiny_question", max_passage_words=5000)
    with pytest.raises(DataError, match="longer than"):
        ranker.rank(["Who?"], [["word " * 4000]])
