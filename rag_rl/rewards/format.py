"""Reward for the asked form of an answer."""

from __future__ import annotations

from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.rewards.columns import final_answers
from rag_rl.text import ANSWER_MARKER, answer_tokens, completion_text, has_format
from rag_rl.types import Reward


def format_reward(*, answer_marker: str = ANSWER_MARKER, max_answer_words: int | None = 16) -> Reward:
    """Makes the format reward: one marker, one short answer line, nothing after it.

    Stricter than the metric ``format`` by its cap on words, without which a copy of the context on the answer line
    would have the right form, and by taking a bare citation for no answer.

    Args:
        answer_marker: what precedes the answer; "" when the whole completion is the answer.
        max_answer_words: normalised words that an answer may have, at least 1; None for any number.

    Returns:
        A reward with values 0.0 and 1.0, never None.

    Raises:
        ConfigError: ``max_answer_words`` below 1.
    """
    if max_answer_words is not None and max_answer_words < 1:
        raise ConfigError(f"max_answer_words must be at least 1 or None, got {max_answer_words}")

    def reward(*, completions: list[Any], **_: Any) -> list[float | None]:
        answers = final_answers(completions, marker=answer_marker, without_citations=True)
        return [
            float(
                answer is not None
                and has_format(completion_text(completion), marker=answer_marker)
                and (max_answer_words is None or len(answer_tokens(answer)) <= max_answer_words)
            )
            for completion, answer in zip(completions, answers, strict=True)
        ]

    reward.__name__ = "format"
    return reward
