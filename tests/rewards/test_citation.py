from __future__ import annotations

from typing import Any

import pytest

from rag_rl.rewards.citation import citation_reward

PASSAGES = ["Elmton lies on the Mira.", "Zanford lies on the Ros.", "Falton lies on the Dun."]


def cited(text: str, *, answers: list[str] | None = None, passages: list[str] = PASSAGES, **ids: Any) -> float | None:
    return citation_reward()(
        prompts=[""],
        completions=[text],
        answers=[["Mira"] if answers is None else answers],
        passages=[passages],
        **{name: [value] for name, value in ids.items()},
    )[0]


def test_one_right_citation_is_best() -> None:
    assert citation_reward().__name__ == "citation"
    assert cited("It lies there [1].\nAnswer: Mira") == 1.0
    assert cited("Answer: Mira [1]") == 1.0
    assert cited("[1] says so, and [1] again.\nAnswer: Mira") == 1.0
    assert cited("Answer: Mira [2]") == 0.0
    assert cited("Answer: Mira [1][2]") == 0.5
    assert cited("Answer: Mira [1, 9]") == 0.5
    assert cited("Answer: Mira [1, 2, 3]") == pytest.approx(1 / 3)
    assert cited("Answer: Mira") == 0.0


def test_citing_all_never_beats_citing_one_even_when_most_are_right() -> None:
    passages = ["the Mira", "a Mira", "Mira!", "Dun"]
    one, every = cited("Answer: Mira [2]", passages=passages), cited("Answer: Mira [1,2,3,4]", passages=passages)
    assert one == 1.0
    assert every == 0.25
    assert cited("Answer: Mira [1,2,3]", passages=passages[:3]) == pytest.approx(1 / 3)


def test_thinking_and_empty_answers_do_not_cite() -> None:
    assert cited("<think>[1]</think>Answer: Mira") == 0.0
    assert cited("<think>hm [1] Answer: Mira [1]") == 0.0
    assert cited("[1]") == 0.0
    assert cited("[1] Answer: [1]") == 0.0
    assert cited("") == 0.0


def test_gold_documents_decide_where_they_are_named() -> None:
    ids = {"passage_ids": ["d1", "d2", "d2"], "gold_doc_ids": ["d1", "d2", "d8"]}
    assert cited("Answer: Mira [1][2]", **ids) == 1.0
    assert cited("Answer: Mira [1][3]", **ids) == 1.0
    assert cited("Answer: Mira [1]", **ids) == 0.5
    assert cited("Answer: Mira [1][2][3]", **ids) == pytest.approx(2 / 3)
    assert cited("Answer: yes [1][2]", answers=["yes"], **ids) == 1.0
    assert cited("Answer: Mira [1]", passage_ids=["d1", "d2", "d3"], gold_doc_ids=["d8"]) is None


def test_unscorable_questions() -> None:
    assert cited("Answer: Elm [1]", answers=["Elm"]) is None
    assert cited("", answers=["Elm"]) is None
    assert cited("Answer: yes [1]", answers=["yes"]) is None
    assert cited("Answer: Mira", passages=[]) is None
