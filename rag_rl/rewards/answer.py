"""Rewards for the right answer: exact match, token F1, and a guarded form of "contains the answer".

All three read the columns ``answers`` and, for questions whose evidence was not shown, ``passages`` or the pair
``gold_doc_ids`` and ``passage_ids``. A sample whose evidence was not retrieved teaches guessing; ``unanswerable`` says
what is done about it:

- ``"keep"``: scored like any other;
- ``"drop"``: None, so that the sample has no part in the update;
- ``"abstain"``: 1.0 for the explicit answer "not in the context", 0.0 for anything else, a lucky guess included.

Whichever is chosen, the share of such rows is logged as ``rewards/unanswerable`` when the dataset lets it be known.
Where it can be known and evidence was shown, "not in the context" is simply wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from rag_rl.errors import ConfigError
from rag_rl.metrics import contains_match, exact_match, token_f1
from rag_rl.rewards.columns import answerable_rows, final_answers, text_lists
from rag_rl.text import ANSWER_MARKER, answer_tokens, normalize_answer
from rag_rl.types import Reward

Unanswerable: TypeAlias = Literal["keep", "drop", "abstain"]

ABSTENTION = "not in the context"


def em(
    *, answer_marker: str = ANSWER_MARKER, unanswerable: Unanswerable = "keep", without_citations: bool = False
) -> Reward:
    """Makes the exact-match reward.

    Nothing but the answer itself earns it, so lists, copies and repetitions get 0.0. What stands before the answer
    line is not seen: pair it with ``length_reward``.

    Args:
        answer_marker: what precedes the answer; "" when the whole completion is the answer.
        unanswerable: what to do where the evidence was not shown; see the module.
        without_citations: whether ``[i]`` marks are removed from the answer before it is compared.

    Returns:
        A reward with values 0.0 and 1.0, None for dropped rows.

    Raises:
        ConfigError: ``unanswerable`` is not one of the three.
    """
    return _answer_reward("em", exact_match, answer_marker, unanswerable, without_citations)


def f1(
    *, answer_marker: str = ANSWER_MARKER, unanswerable: Unanswerable = "keep", without_citations: bool = False
) -> Reward:
    """Makes the token-F1 reward.

    Words beyond the accepted answer cost precision, a repeated right word counts once. Naming two candidates of which
    one is right still earns more (0.67 for single words) than a coin toss between them: use ``em`` where that matters.

    Args:
        answer_marker: what precedes the answer; "" when the whole completion is the answer.
        unanswerable: what to do where the evidence was not shown; see the module.
        without_citations: whether ``[i]`` marks are removed from the answer before it is compared.

    Returns:
        A reward with values in [0, 1], None for dropped rows.

    Raises:
        ConfigError: ``unanswerable`` is not one of the three.
    """
    return _answer_reward("f1", token_f1, answer_marker, unanswerable, without_citations)


def contains_em(
    *,
    answer_marker: str = ANSWER_MARKER,
    free_words: int = 0,
    unanswerable: Unanswerable = "keep",
    without_citations: bool = False,
) -> Reward:
    """Makes the reward for an answer that contains an accepted one, wrapped in as few words as possible.

    **Not the metric of that name**, which gives 1.0 to an answer that lists or copies everything. Here an answer of n
    normalised words that contains an accepted one of g words earns ``g / n``: one candidate out of m of equal length
    earns as much as a draw among the m, so that listing never pays, and each wrapping word that goes pays at once.

    Args:
        answer_marker: what precedes the answer; "" when the whole completion is the answer.
        free_words: words beyond the accepted answer that cost nothing, at least 0. Above 0, a list of up to
            ``free_words + 1`` short candidates earns full credit.
        unanswerable: what to do where the evidence was not shown; see the module.
        without_citations: whether ``[i]`` marks are removed from the answer before it is compared.

    Returns:
        A reward with values in [0, 1], None for dropped rows; 1.0 for the accepted answer alone.

    Raises:
        ConfigError: ``free_words`` below 0, or ``unanswerable`` is not one of the three.
    """
    if free_words < 0:
        raise ConfigError(f"free_words must be 0 or more, got {free_words}")

    def score(answer: str | None, golds: Sequence[str]) -> float:
        if answer is None or not contains_match(answer, golds):
            return 0.0
        words = len(answer_tokens(answer)) - free_words
        matched = (max(1, len(answer_tokens(gold))) for gold in golds if contains_match(answer, [gold]))
        return max(min(1.0, gold_words / max(1, words)) for gold_words in matched)

    return _answer_reward("contains_em", score, answer_marker, unanswerable, without_citations)


def abstains(answer: str | None) -> bool:
    """Tells whether an answer is the explicit "not in the context".

    Args:
        answer: the answer given; None for no answer.

    Returns:
        True when nothing but this phrase was said, articles, case and punctuation aside.

    Example:
        >>> abstains("Not in the context."), abstains("Mira, or it is not in the context")
        (True, False)
    """
    return answer is not None and normalize_answer(answer) == normalize_answer(ABSTENTION)


def _answer_reward(
    name: str,
    score: Callable[[str | None, Sequence[str]], float],
    marker: str,
    unanswerable: Unanswerable,
    without_citations: bool,
) -> Reward:
    if unanswerable not in ("keep", "drop", "abstain"):
        raise ConfigError(f"unanswerable must be 'keep', 'drop' or 'abstain', got {unanswerable!r}")

    def reward(*, completions: list[Any], **columns: Any) -> list[float | None]:
        rows = len(completions)
        golds = text_lists("answers", columns, rows=rows, reward=name)
        answerable = answerable_rows(columns, rows=rows, reward=name)
        shows = columns.get("passages") is not None or (
            columns.get("gold_doc_ids") is not None and columns.get("passage_ids") is not None
        )
        if unanswerable != "keep" and not shows:
            raise ConfigError(
                f"reward {name!r} with unanswerable={unanswerable!r} needs the column 'passages', or 'gold_doc_ids' "
                "and 'passage_ids': without them it cannot know what was shown"
            )
        log_metric = columns.get("log_metric")
        if log_metric is not None and shows:
            # Whatever the rows hold: TRL gathers metric by metric, and a name that one rank lacks stops the others.
            log_metric("rewards/unanswerable", answerable.count(False) / max(1, rows))
        scores: list[float | None] = []
        answers = final_answers(completions, marker=marker, without_citations=without_citations)
        for answer, accepted, shown in zip(answers, golds, answerable, strict=True):
            if shown is False and unanswerable == "drop":
                scores.append(None)
            elif shown is False and unanswerable == "abstain":
                scores.append(float(abstains(answer)))
            elif unanswerable == "abstain" and abstains(answer):
                scores.append(0.0)  # or F1 would pay for "in" where the accepted answer has that word
            else:
                scores.append(score(answer, accepted))
        return scores

    reward.__name__ = name
    return reward
