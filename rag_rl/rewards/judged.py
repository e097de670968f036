"""Reward from a judge: a language model, a reward model, or an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from rag_rl.errors import BackendError, ConfigError
from rag_rl.rewards.columns import column, final_answers, text_lists
from rag_rl.text import ANSWER_MARKER
from rag_rl.types import Judge, JudgeCase

# Columns that a case has a place of its own for.
_TAKEN = ("question", "answers", "passages")


def judged_reward(
    judge: Judge,
    *,
    name: str = "judged",
    answer_marker: str = ANSWER_MARKER,
    without_citations: bool = False,
    meta_columns: Sequence[str] = (),
) -> Callable[..., Coroutine[Any, Any, list[float | None]]]:
    """Makes the reward of a judge's verdicts, as the ``async def`` that lets TRL run several of them at once.

    Reads the column ``question`` and, where the dataset has them, ``answers`` and ``passages``; whether they are
    needed is the rubric's affair. Where the trainer passes ``log_metric``, each batch logs ``judge/<name>/readable``
    (share of the verdicts asked for that have a score; 1.0 where none was asked for) and ``judge/<name>/mean`` (of
    these scores; a batch without one repeats the last mean known).

    A judge that errs at random costs speed, one that can be talked round is trained to be talked round: keep an exact
    reward beside it, and watch its agreement with exact match.

    Args:
        judge: what scores the answers.
        name: of the reward, in logs and messages.
        answer_marker: what precedes the answer; "" to have the whole completion judged, without its thinking.
        without_citations: whether ``[i]`` marks are removed from the answers first.
        meta_columns: columns of the dataset that go into the cases' ``meta``.

    Returns:
        A reward with values in [0, 1]. A completion without an answer gets 0.0 and is not shown to the judge; a
        verdict without a score is None.

    Raises:
        ConfigError: a meta column that a case has a place of its own for.
    """
    taken = [meta for meta in meta_columns if meta in _TAKEN]
    if taken:
        raise ConfigError(f"reward {name!r}: {', '.join(taken)} stands in every case already; leave it out of meta")
    last_mean = math.nan

    async def reward(*, completions: list[Any], **columns: Any) -> list[float | None]:
        nonlocal last_mean
        rows = len(completions)
        questions = column("question", columns, rows=rows, reward=name)
        golds = _lists_if_any("answers", columns, rows=rows, reward=name)
        passages = _lists_if_any("passages", columns, rows=rows, reward=name)
        metas = {meta: column(meta, columns, rows=rows, reward=name) for meta in meta_columns}
        answers = final_answers(completions, marker=answer_marker, without_citations=without_citations)
        asked = [row for row, answer in enumerate(answers) if answer is not None]
        cases = [
            JudgeCase(
                questions[row],
                answers[row] or "",
                tuple(golds[row]),
                tuple(passages[row]),
                {meta: values[row] for meta, values in metas.items()},
            )
            for row in asked
        ]
        verdicts = await judge.judge(cases) if cases else []
        if len(verdicts) != len(cases):
            raise BackendError(f"judge {name!r} returned {len(verdicts)} verdicts for {len(cases)} cases")
        scores: list[float | None] = [0.0] * rows
        known = []
        for row, verdict in zip(asked, verdicts, strict=True):
            scores[row] = verdict.score
            if verdict.score is None:
                continue
            if not 0.0 <= verdict.score <= 1.0:  # written so that NaN is caught too
                raise BackendError(f"judge {name!r} returned the score {verdict.score}: expected [0, 1], or None")
            known.append(verdict.score)
        log_metric = columns.get("log_metric")
        if log_metric is not None and rows:
            # The same names for every batch: TRL gathers metric by metric, and one that a rank lacks stops the others.
            last_mean = sum(known) / len(known) if known else last_mean
            log_metric(f"judge/{name}/readable", len(known) / len(cases) if cases else 1.0)
            log_metric(f"judge/{name}/mean", last_mean)
        return scores

    reward.__name__ = name
    return reward


def _lists_if_any(field: str, columns: Mapping[str, Any], *, rows: int, reward: str) -> list[list[str]]:
    if columns.get(field) is None:
        return [[] for _ in range(rows)]
    return text_lists(field, columns, rows=rows, reward=reward)
