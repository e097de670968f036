"""Reward for short completions."""

from __future__ import annotations

from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.rewards.columns import column, final_answers
from rag_rl.text import ANSWER_MARKER
from rag_rl.types import Reward


def length_reward(*, target: int, limit: int, answer_marker: str = ANSWER_MARKER) -> Reward:
    """Makes the length reward: full up to a target number of tokens, falling linearly to nothing at the limit.

    Thinking counts: the tokens are those of the whole completion (column ``completion_ids``, which TRL passes).

    Args:
        target: tokens that cost nothing, at least 1.
        limit: tokens at which nothing is left, above ``target``; at most the trainer's ``max_completion_length``, or
            a completion that runs into it keeps some credit.
        answer_marker: what precedes the answer; a completion without an answer (a bare citation is none) gets 0.0.

    Returns:
        A reward with values in [0, 1], never None.

    Raises:
        ConfigError: not ``1 <= target < limit``.
    """
    if not 1 <= target < limit:
        raise ConfigError(f"length reward: need 1 <= target < limit, got target {target} and limit {limit}")

    def reward(*, completions: list[Any], **columns: Any) -> list[float | None]:
        token_ids = column("completion_ids", columns, rows=len(completions), reward="length")
        answers = final_answers(completions, marker=answer_marker, without_citations=True)
        return [
            0.0 if answer is None else min(1.0, max(0.0, (limit - len(ids)) / (limit - target)))
            for answer, ids in zip(answers, token_ids, strict=True)
        ]

    reward.__name__ = "length"
    return reward
