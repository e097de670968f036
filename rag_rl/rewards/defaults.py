"""The combination that a generator over retrieved context is trained with unless told otherwise."""

from __future__ import annotations

from rag_rl.rewards.answer import Unanswerable, em
from rag_rl.rewards.combine import RewardPart
from rag_rl.rewards.format import format_reward
from rag_rl.rewards.groundedness import groundedness_reward
from rag_rl.rewards.length import length_reward
from rag_rl.text import ANSWER_MARKER


def default_parts(
    *,
    answer_marker: str = ANSWER_MARKER,
    length_target: int = 64,
    length_limit: int = 256,
    unanswerable: Unanswerable = "keep",
) -> list[RewardPart]:
    """Makes the default parts: exact match 1.0 (required), format 0.2, groundedness 0.2, length 0.1.

    The answer weighs twice as much as all the others together, so that no wrong answer, however well formed, short and
    quoted, comes near a right one. Exact match rather than F1, because F1 pays for naming two candidates.

    Args:
        answer_marker: what precedes the answer; "" when the whole completion is the answer.
        length_target: tokens that cost nothing.
        length_limit: tokens at which the length part has nothing left: the trainer's ``max_completion_length``.
        unanswerable: what to do where the evidence was not shown; see ``rag_rl.rewards.answer``.

    Returns:
        Parts for ``combine``.

    Raises:
        ConfigError: an option is out of range.
    """
    return [
        RewardPart("em", em(answer_marker=answer_marker, unanswerable=unanswerable), 1.0, required=True),
        RewardPart("format", format_reward(answer_marker=answer_marker), 0.2),
        RewardPart("groundedness", groundedness_reward(answer_marker=answer_marker), 0.2),
        RewardPart(
            "length", length_reward(target=length_target, limit=length_limit, answer_marker=answer_marker), 0.1
        ),
    ]
