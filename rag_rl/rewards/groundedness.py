"""Reward for answers that stand in the passages shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.rewards.columns import asks_yes_or_no, final_answers, padded_tokens, text_lists
from rag_rl.text import ANSWER_MARKER
from rag_rl.types import Reward

# Words in the passages but nowhere in one piece are weak support: without this, a list of every entity of the context
# would count as fully grounded.
_SCATTERED = 0.5
# A short passage may be quoted up to half; an answer of this many words is never taken for a copy of it.
_NEVER_A_COPY = 3


def groundedness_reward(
    *,
    answer_marker: str = ANSWER_MARKER,
    free_words: int = 6,
    max_words: int = 20,
    without_citations: bool = False,
) -> Reward:
    """Makes the groundedness reward: is the short answer in, or made of words of, the passages shown?

    1.0 when the answer's normalised tokens stand contiguously in one passage; else half of the share of its tokens
    (with multiplicity) that the passages hold. Then a cap against copying: beyond ``free_words`` words, or half of the
    passage quoted if that is less, credit falls linearly to nothing at ``max_words`` words.

    It cannot tell a right answer from a wrong one of the same passages: it belongs beside an answer reward, with less
    weight. Reads the column ``passages`` and, if it is there, ``answers``: a yes/no question is None in all its rows,
    since no passage states its answer.

    Args:
        answer_marker: what precedes the answer; "" when the whole completion is the answer.
        free_words: words that cost nothing, at least 1.
        max_words: words at which nothing is left, above ``free_words``.
        without_citations: whether ``[i]`` marks are removed from the answer first.

    Returns:
        A reward with values in [0, 1]; 0.0 without an answer or without passages; None for yes/no questions.

    Raises:
        ConfigError: not ``1 <= free_words < max_words``.
    """
    if not 1 <= free_words < max_words:
        raise ConfigError(f"groundedness: need 1 <= free_words < max_words, got {free_words} and {max_words}")

    def reward(*, completions: list[Any], **columns: Any) -> list[float | None]:
        rows = len(completions)
        passages = text_lists("passages", columns, rows=rows, reward="groundedness")
        golds: list[list[str]] = [[] for _ in range(rows)]
        if columns.get("answers") is not None:
            golds = text_lists("answers", columns, rows=rows, reward="groundedness")
        answers = final_answers(completions, marker=answer_marker, without_citations=without_citations)
        return [
            None if asks_yes_or_no(gold) else _support(answer, texts, free_words, max_words)
            for answer, texts, gold in zip(answers, passages, golds, strict=True)
        ]

    reward.__name__ = "groundedness"
    return reward


def _support(answer: str | None, passages: Sequence[str], free_words: int, max_words: int) -> float:
    run = padded_tokens(answer or "")
    words = run.split()
    if not words:
        return 0.0
    sources = [padded_tokens(passage) for passage in passages]
    quoted = [len(source.split()) for source in sources if run in source]
    if quoted:
        # The longest passage that holds the answer: a quote is a copy only if it is one of all of them.
        free_words = min(free_words, max(_NEVER_A_COPY, max(quoted) // 2))
        support = 1.0
    else:
        held = Counter(word for source in sources for word in source.split())
        support = _SCATTERED * (Counter(words) & held).total() / len(words)
    brevity = (max_words - len(words)) / (max_words - free_words)
    return support * min(1.0, max(0.0, brevity))
