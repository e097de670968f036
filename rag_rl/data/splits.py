"""Splits of a question set that do not leak and do not move."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Question


def split_questions(
    questions: Sequence[Question],
    *,
    eval_size: int | float,
    seed: int,
    by: Callable[[Question], str] | None = None,
) -> tuple[list[Question], list[Question]]:
    """Splits questions into those to train on and those to evaluate on.

    The side of a question follows from a hash of ``seed`` and its ``qid``: neither the order of the file nor the
    Python version matters. Questions with the same text, up to case and spaces, stay on one side.

    Args:
        questions: with ids of their own.
        eval_size: an int is the number of evaluation questions; a float in (0, 1) is their share. Where groups do not
            fit, the number falls short by less than the smallest group that was left.
        seed: another seed is another split.
        by: a key of a question; questions of the same key stay on one side as well, for example
            ``lambda q: q.gold_doc_ids[0]``. None: only equal texts stay together.

    Returns:
        Training questions and evaluation questions, each in their given order.

    Raises:
        ConfigError: ``eval_size`` has no meaning, or leaves one side empty.
        DataError: two questions have the same id.

    Example:
        >>> questions = [Question(f"q{i}", f"Question {i}?", ("yes",)) for i in range(10)]
        >>> train, held_out = split_questions(questions, eval_size=0.2, seed=0)
        >>> len(train), len(held_out)
        (8, 2)
    """
    if len({question.qid for question in questions}) != len(questions):
        raise DataError("questions to split must have ids of their own; some id stands there twice")
    wanted = _number_of(eval_size, len(questions))
    groups = sorted(_groups(questions, by), key=lambda group: _order(seed, min(questions[i].qid for i in group)))
    held_out: set[int] = set()
    for group in groups:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out or len(held_out) == len(questions):
        side = "evaluation" if not held_out else "training"
        raise ConfigError(
            f"eval_size {eval_size} leaves no {side} question: {len(questions)} questions are in {len(groups)} groups "
            f"that must stay together, the smallest of {min(map(len, groups))}"
        )
    train = [question for i, question in enumerate(questions) if i not in held_out]
    return train, [question for i, question in enumerate(questions) if i in held_out]


def fold_questions(
    questions: Sequence[Question], *, folds: int, fold: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Splits questions for cross-validation: every question is held out in exactly one fold.

    The fold of a question follows from a hash of ``seed`` and its ``qid``, as in ``split_questions``; questions with
    the same text, up to case and spaces, are in one fold.

    Args:
        questions: with ids of their own.
        folds: how many, at least 2.
        fold: which one is held out, from 0.
        seed: another seed is another partition.

    Returns:
        Questions of the other folds, and those of this one, each in their given order.

    Raises:
        ConfigError: there is no such fold, or fewer questions than folds.
        DataError: two questions have the same id.

    Example:
        >>> questions = [Question(f"q{i}", f"Question {i}?", ("yes",)) for i in range(9)]
        >>> sorted(q.qid for fold in range(3) for q in fold_questions(questions, folds=3, fold=fold, seed=0)[1])
        ['q0', 'q1', 'q2', 'q3', 'q4', 'q5', 'q6', 'q7', 'q8']
    """
    if len({question.qid for question in questions}) != len(questions):
        raise DataError("questions to split must have ids of their own; some id stands there twice")
    if folds < 2 or not 0 <= fold < folds:
        raise ConfigError(
            f"data_fold must be between 0 and data_folds - 1, with 2 folds or more: got {fold} of {folds}"
        )
    groups = sorted(_groups(questions, None), key=lambda group: _order(seed, min(questions[i].qid for i in group)))
    if len(groups) < folds:
        raise ConfigError(f"{len(groups)} different questions cannot be split into {folds} folds")
    held_out = {i for group in groups[fold::folds] for i in group}
    train = [question for i, question in enumerate(questions) if i not in held_out]
    return train, [question for i, question in enumerate(questions) if i in held_out]


def _number_of(eval_size: int | float, total: int) -> int:
    if isinstance(eval_size, bool) or not isinstance(eval_size, (int, float)):
        raise ConfigError(f"eval_size must be a whole number or a share in (0, 1), got {eval_size!r}")
    if isinstance(eval_size, float):
        if not 0.0 < eval_size < 1.0:
            raise ConfigError(
                f"eval_size as a share must lie in (0, 1), got {eval_size}; a number of questions is an int"
            )
        wanted = round(eval_size * total)
    else:
        wanted = eval_size
    if not 0 < wanted < total:
        side = "evaluation" if wanted < 1 else "training"
        raise ConfigError(f"eval_size {eval_size} leaves no {side} question: there are {total} in all")
    return wanted


def _order(seed: int, qid: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{qid}".encode(), digest_size=16).digest()


def _groups(questions: Sequence[Question], by: Callable[[Question], str] | None) -> list[list[int]]:
    """Connects questions that share a text or a key, directly or through others (union-find)."""
    parent = list(range(len(questions)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, object], int] = {}
    for i, question in enumerate(questions):
        keys: list[tuple[str, object]] = [("text", " ".join(question.question.casefold().split()))]
        if by is not None:
            keys.append(("by", by(question)))
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(questions)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
