from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.rewards.groundedness import groundedness_reward

PASSAGES = [
    "Elmton\nElmton lies on the Mira Brook. The pride of Elmton is tin. Its mayor is Falbert, a miller by trade.",
    "Zanford\nZanford lies on the Ros Flow. The pride of Zanford is silk.",
]


def grounded(text: str, passages: list[str] = PASSAGES, **options: int) -> float | None:
    return groundedness_reward(**options)(prompts=[""], completions=[text], passages=[passages])[0]


def test_contiguous_scattered_and_foreign_words() -> None:
    assert groundedness_reward().__name__ == "groundedness"
    assert grounded("Answer: the Mira Brook.") == 1.0
    assert grounded("Answer: Ros Flow") == 1.0
    assert grounded("Answer: Brook Mira") == 0.5
    assert grounded("Answer: Mira Pond") == 0.25
    assert grounded("Answer: Paris") == 0.0
    assert grounded("Answer: Mir") == 0.0
    assert grounded("Answer: the") == 0.0
    assert grounded("") == 0.0
    assert grounded("<think>Answer: tin") == 0.0
    assert grounded("Answer: tin", passages=[]) == 0.0


def test_repetition_counts_only_as_often_as_the_passages_say_it() -> None:
    assert grounded("Answer: tin tin tin tin") == 0.125


def test_copies_lose() -> None:
    assert grounded("Answer: " + " ".join(PASSAGES).replace("\n", " ")) == 0.0
    whole_passage = grounded("Answer: " + PASSAGES[1].replace("\n", " "))
    assert whole_passage is not None
    assert 0 < whole_passage < 0.7
    # Even a passage of one short sentence: five of its five words are too many.
    sentence = "Paris is the capital of France."
    assert grounded("Answer: " + sentence, passages=[sentence]) == pytest.approx(15 / 17)
    assert grounded("Answer: Paris", passages=[sentence]) == 1.0
    # The same words quoted from a long passage are no copy.
    assert grounded("Answer: " + sentence, passages=[sentence, sentence + " word" * 20]) == 1.0


def test_yes_no_questions_have_no_groundedness() -> None:
    reward = groundedness_reward()
    scores = reward(
        prompts=[""] * 3,
        completions=["Answer: yes", "", "Answer: tin"],
        passages=[PASSAGES] * 3,
        answers=[["yes"], ["no"], ["tin"]],
    )
    assert scores == [None, None, 1.0]


def test_citation_marks_and_refusals() -> None:
    assert groundedness_reward(without_citations=True)(
        prompts=[""], completions=["Answer: tin [1]"], passages=[PASSAGES]
    ) == [1.0]
    with pytest.raises(ConfigError, match="free_words < max_words"):
        groundedness_reward(free_words=5, max_words=5)
    with pytest.raises(DataError, match="passages"):
        groundedness_reward()(prompts=[""], completions=["Answer: tin"])
