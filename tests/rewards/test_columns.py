from __future__ import annotations

import pytest

from rag_rl.errors import DataError
from rag_rl.rewards.columns import (
    answerable_rows,
    asks_yes_or_no,
    column,
    final_answers,
    gold_and_shown,
    padded_tokens,
    passages_with_answer,
    text_lists,
)


def test_a_missing_or_misshapen_column_is_named() -> None:
    with pytest.raises(DataError, match="reward 'em' needs the column 'answers'"):
        column("answers", {}, rows=1, reward="em")
    with pytest.raises(DataError, match="one value for each of 2 rows, got 1 values"):
        column("answers", {"answers": [["Mira"]]}, rows=2, reward="em")
    with pytest.raises(DataError, match="got one string"):
        column("answers", {"answers": "Mi"}, rows=2, reward="em")
    with pytest.raises(DataError, match="must hold lists of texts, row 1 holds 'Mira'"):
        text_lists("answers", {"answers": [["Mira"], "Mira"]}, rows=2, reward="em")
    with pytest.raises(DataError, match="row 0 holds"):
        text_lists("answers", {"answers": [[3]]}, rows=1, reward="em")
    assert text_lists("answers", {"answers": [None, ("Mira",)]}, rows=2, reward="em") == [[], ["Mira"]]


def test_final_answers_read_texts_and_messages() -> None:
    completions = [
        "<think>Answer: Elm</think>Answer: Mira [2]",
        [{"role": "assistant", "content": "Answer: Mira"}],
        "<think>Answer: Mira",
        "[2]",
    ]
    assert final_answers(completions, marker="Answer:") == ["Mira [2]", "Mira", None, "[2]"]
    assert final_answers(completions, marker="Answer:", without_citations=True) == ["Mira", "Mira", None, None]


def test_passages_with_answer_needs_whole_tokens_in_a_row() -> None:
    passages = ["The Mira-brook.", "On the Mira, a brook", "mira and brook", ""]
    assert passages_with_answer(passages, ["Mira Brook"]) == {2}
    assert passages_with_answer(passages, ["Mira", "Mirabrook"]) == {1, 2, 3}
    assert passages_with_answer(passages, ["the"]) == set()
    assert padded_tokens("") == "  "


def test_answerable_rows() -> None:
    texts = {"answers": [["Mira"], ["Elm"], ["yes"]], "passages": [["on the Mira"], ["on the Mira"], ["on the Mira"]]}
    assert answerable_rows(texts, rows=3, reward="em") == [True, False, None]
    assert answerable_rows({"answers": [["Mira"]]}, rows=1, reward="em") == [None]
    # Gold documents, where named, decide, whatever the texts say.
    ids = {"gold_doc_ids": [["d2"], ["d1", "d9"], []], "passage_ids": [["d1"], ["d1"], ["d1"]]}
    assert answerable_rows({**texts, **ids}, rows=3, reward="em") == [False, True, None]
    assert gold_and_shown({"gold_doc_ids": [["d2"]]}, rows=1, reward="em") == ([[]], None)


def test_asks_yes_or_no() -> None:
    assert asks_yes_or_no(["Yes.", "no"])
    assert not asks_yes_or_no(["no", "Nobody"])
