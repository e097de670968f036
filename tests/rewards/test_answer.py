from __future__ import annotations

from typing import Any

import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.rewards.answer import ABSTENTION, abstains, contains_em, em, f1
from rag_rl.types import Reward


def score(reward: Reward, *texts: str, answers: list[str], **columns: Any) -> list[float | None]:
    shared = {name: [value] * len(texts) for name, value in columns.items()}
    return reward(prompts=["q"] * len(texts), completions=list(texts), answers=[answers] * len(texts), **shared)


def test_names() -> None:
    assert [make().__name__ for make in (em, f1, contains_em)] == ["em", "f1", "contains_em"]


def test_values() -> None:
    texts = ("Answer: the Mira", "Answer: Elm", "Answer: It is the Mira", "<think>Answer: Mira", "")
    assert score(em(), *texts, answers=["Mira", "river Mira"]) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert score(f1(), *texts, answers=["Mira"]) == [1.0, 0.0, 0.5, 0.0, 0.0]
    assert score(contains_em(), *texts, answers=["Mira"]) == [1.0, 0.0, pytest.approx(1 / 3), 0.0, 0.0]


def test_contains_em_is_guarded() -> None:
    scores = score(contains_em(), "Answer: Mira", "Answer: Mira, Elm", "Answer: Mira Mira Mira Mira", answers=["Mira"])
    assert scores == [1.0, 0.5, 0.25]
    # The longest alias that is there counts.
    assert score(contains_em(), "Answer: the river Mira", answers=["Mira", "river Mira"]) == [1.0]
    lenient = contains_em(free_words=2)
    assert score(lenient, "Answer: It is the Mira", "Answer: so it is the Mira", answers=["Mira"]) == [1.0, 0.5]
    assert score(contains_em(), "Answer: A", "Answer: B", answers=["A"]) == [1.0, 0.0]


def test_listing_candidates_never_pays_more_than_drawing_one() -> None:
    candidates = ["Mira", "Elm", "Zan", "Ros"]
    for count in (2, 3, 4):
        listed = score(contains_em(), "Answer: " + ", ".join(candidates[:count]), answers=["Mira"])
        assert listed == [pytest.approx(1 / count)]


def test_messages_markers_and_citations() -> None:
    message = [{"role": "assistant", "content": "Answer: Mira"}]
    assert em()(prompts=["q"], completions=[message], answers=[["Mira"]]) == [1.0]
    assert score(em(answer_marker=""), "Mira", "Answer: Mira", answers=["Mira"]) == [1.0, 0.0]
    assert score(em(answer_marker="####"), "so #### Mira", answers=["Mira"]) == [1.0]
    assert score(em(), "Answer: Mira [2]", answers=["Mira"]) == [0.0]
    assert score(em(without_citations=True), "Answer: Mira [2]", answers=["Mira"]) == [1.0]


@pytest.mark.parametrize("make", [em, f1, contains_em])
def test_unanswerable(make: Any) -> None:
    texts = ("Answer: Mira", "Answer: Not in the context.", "Answer: Elm")
    away: dict[str, Any] = {"answers": ["Mira"], "passages": ["It lies on the Elm."]}
    shown: dict[str, Any] = {"answers": ["Mira"], "passages": ["It lies on the Mira."]}
    assert score(make(), *texts, **away) == [1.0, 0.0, 0.0]
    assert score(make(unanswerable="drop"), *texts, **away) == [None, None, None]
    assert score(make(unanswerable="abstain"), *texts, **away) == [0.0, 1.0, 0.0]
    for how in ("keep", "drop", "abstain"):
        assert score(make(unanswerable=how), *texts, **shown) == [1.0, 0.0, 0.0]
    # Gold documents, where named, decide.
    ids = {"gold_doc_ids": ["d7"], "passage_ids": ["d1"]}
    assert score(make(unanswerable="drop"), *texts, **shown, **ids) == [None, None, None]
    # A yes/no question cannot be told unanswerable from texts.
    assert score(make(unanswerable="drop"), "Answer: yes", answers=["yes"], passages=["Elm"]) == [1.0]


def test_abstaining_on_an_answerable_question_earns_nothing_by_shared_words() -> None:
    shown: dict[str, Any] = {"answers": ["Not in Love"], "passages": ["Their song is Not in Love."]}
    assert score(f1(unanswerable="abstain"), "Answer: not in the context", **shown) == [0.0]
    assert abstains(ABSTENTION)
    assert not abstains(None)


def test_the_share_of_unanswerable_rows_is_logged_under_the_same_name_in_every_batch() -> None:
    logged: list[tuple[str, float]] = []
    for passage in ("the Mira", "the Elm"):
        em()(
            prompts=["q", "q"],
            completions=["", ""],
            answers=[["Mira"], ["Mira"]],
            passages=[["the Mira"], [passage]],
            log_metric=lambda name, value: logged.append((name, value)),
        )
    assert logged == [("rewards/unanswerable", 0.0), ("rewards/unanswerable", 0.5)]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="'keep', 'drop' or 'abstain', got 'skip'"):
        em(unanswerable="skip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="free_words"):
        contains_em(free_words=-1)
    with pytest.raises(DataError, match="reward 'f1' needs the column 'answers'"):
        f1()(prompts=["q"], completions=["a"])
    with pytest.raises(ConfigError, match="needs the column 'passages'"):
        score(em(unanswerable="drop"), "Answer: Mira", answers=["Mira"])
