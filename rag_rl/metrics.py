"""Answer metrics, ranking metrics and the paired bootstrap. Pure functions over strings and numbers, no torch.

Answer metrics take the maximum over all accepted answers. Ranking metrics give None where nothing is relevant: such a
question cannot be scored, which is not 0. Ranks count passages as shown: a second chunk of a document takes up a rank
but earns nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from rag_rl.text import normalize_answer

# Resampled indices held at once: 2**21 four-byte integers and as many eight-byte differences, 24 MB.
_BOOTSTRAP_CELLS = 2**21


def _accepted(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of accepted answers, got the string {answers!r}: write [{answers!r}]")
    return answers


def _same_bare_text(prediction: str, answer: str) -> bool:
    """Compares answers that normalisation leaves empty ("A", "The The"), which otherwise equal an empty prediction."""
    return bool(prediction.strip()) and prediction.strip().lower() == answer.strip().lower()


def exact_match(prediction: str | None, answers: Sequence[str]) -> float:
    """Tells whether a prediction equals an accepted answer after normalisation (SQuAD v1.1 exact match).

    One departure: where normalisation leaves nothing of the accepted answer ("A"), the texts themselves are compared
    without regard to case, so that an empty prediction does not match.

    Args:
        prediction: the answer given; None for no answer.
        answers: every accepted answer.

    Returns:
        1.0 or 0.0; 0.0 for no answer or no accepted answers.

    Raises:
        TypeError: ``answers`` is a string.

    Example:
        >>> exact_match("the Mira.", ["Elm", "Mira"])
        1.0
    """
    return _maximum(prediction, answers, lambda ours, gold: float(ours == gold))


def contains_match(prediction: str | None, answers: Sequence[str]) -> float:
    """Tells whether an accepted answer stands in a prediction, as a contiguous run of normalised tokens.

    Args:
        prediction: the answer given; None for no answer.
        answers: every accepted answer.

    Returns:
        1.0 or 0.0. A prediction that lists everything gets 1.0: a metric, not a reward.

    Raises:
        TypeError: ``answers`` is a string.

    Example:
        >>> contains_match("It is the Mira.", ["Mira"]), contains_match("It is the Mirabrook.", ["Mira"])
        (1.0, 0.0)
    """
    return _maximum(prediction, answers, lambda ours, gold: float(f" {gold} " in f" {ours} "))


def token_f1(prediction: str | None, answers: Sequence[str]) -> float:
    """Measures the overlap of normalised tokens with the closest accepted answer (SQuAD v1.1 F1).

    Tokens count with multiplicity: a repeated right word is right once. Answers that normalise to nothing are compared
    as in ``exact_match``.

    Args:
        prediction: the answer given; None for no answer.
        answers: every accepted answer.

    Returns:
        Harmonic mean of token precision and recall in [0, 1], the maximum over answers; 0.0 for no answer.

    Raises:
        TypeError: ``answers`` is a string.

    Example:
        >>> token_f1("the river Mira", ["Mira"])
        0.6666666666666666
    """
    return _maximum(prediction, answers, _overlap)


def _overlap(ours: str, gold: str) -> float:
    predicted, accepted = Counter(ours.split()), Counter(gold.split())
    common = (predicted & accepted).total()
    return 2 * common / (predicted.total() + accepted.total())


def _maximum(prediction: str | None, answers: Sequence[str], score: Callable[[str, str], float]) -> float:
    answers = _accepted(answers)
    if prediction is None:
        return 0.0
    ours = normalize_answer(prediction)
    best = 0.0
    for answer in answers:
        gold = normalize_answer(answer)
        best = max(best, score(ours, gold) if gold else float(_same_bare_text(prediction, answer)))
    return best


def recall_at_k(doc_ids: Sequence[str], gold: Collection[str], *, k: int) -> float | None:
    """Share of the gold documents among the first k passages.

    Args:
        doc_ids: documents of the returned passages, best first; a document may occur more than once.
        gold: documents that hold the evidence.
        k: cut-off in ranks, at least 1.

    Returns:
        A value in [0, 1]; None without gold documents.

    Raises:
        ValueError: ``k`` below 1.

    Example:
        >>> recall_at_k(["d1", "d1", "d2"], ["d1", "d2"], k=2)
        0.5
    """
    found, wanted = _found(doc_ids, gold, k)
    return len(found) / len(wanted) if wanted else None


def all_gold_at_k(doc_ids: Sequence[str], gold: Collection[str], *, k: int) -> float | None:
    """Tells whether every gold document is among the first k passages.

    Args:
        doc_ids: documents of the returned passages, best first.
        gold: documents that hold the evidence.
        k: cut-off in ranks, at least 1.

    Returns:
        1.0 or 0.0; None without gold documents.

    Raises:
        ValueError: ``k`` below 1.

    Example:
        >>> all_gold_at_k(["d1", "d3", "d2"], ["d1", "d2"], k=2)
        0.0
    """
    found, wanted = _found(doc_ids, gold, k)
    return float(found == wanted) if wanted else None


def success_at_k(doc_ids: Sequence[str], gold: Collection[str], *, k: int) -> float | None:
    """Tells whether any gold document is among the first k passages.

    Args:
        doc_ids: documents of the returned passages, best first.
        gold: documents that hold the evidence.
        k: cut-off in ranks, at least 1.

    Returns:
        1.0 or 0.0; None without gold documents.

    Raises:
        ValueError: ``k`` below 1.

    Example:
        >>> success_at_k(["d1", "d3", "d2"], ["d1", "d2"], k=2)
        1.0
    """
    found, wanted = _found(doc_ids, gold, k)
    return float(bool(found)) if wanted else None


def mrr_at_k(doc_ids: Sequence[str], gold: Collection[str], *, k: int) -> float | None:
    """Reciprocal rank of the first gold document, from rank 1.

    Args:
        doc_ids: documents of the returned passages, best first.
        gold: documents that hold the evidence.
        k: cut-off in ranks, at least 1.

    Returns:
        A value in [0, 1], 0.0 when none is among the first k; None without gold documents.

    Raises:
        ValueError: ``k`` below 1.

    Example:
        >>> mrr_at_k(["d3", "d1"], ["d1"], k=10)
        0.5
    """
    _check_cut_off(k)
    wanted = set(gold)
    if not wanted:
        return None
    return next((1.0 / rank for rank, doc_id in enumerate(doc_ids[:k], start=1) if doc_id in wanted), 0.0)


def ndcg_at_k(gains: Sequence[float], ideal: Sequence[float], *, k: int) -> float | None:
    """Share of the best possible discounted gain that one ranking reaches.

    Discount ``1 / log2(rank + 1)``, rank from 1, as in Burges et al. 2005; gain is linear, not their ``2**g - 1`` (the
    convention of trec_eval). Järvelin & Kekäläinen 2002 instead divide by ``log2(rank)`` from rank 2 on: the numbers
    are not comparable.

    Args:
        gains: judged gain of each returned passage, best rank first. >= 0, no unit; may be shorter than ``k``.
        ideal: every judged gain for the query, any order, returned or not.
        k: cut-off in ranks.

    Returns:
        A value in [0, 1]; None when nothing was judged relevant: unscorable, which is not 0.

    Raises:
        ValueError: ``k`` below 1, or a negative gain.

    Example:
        >>> ndcg_at_k([0.0, 1.0], [1.0], k=10)
        0.6309297535714575
    """
    _check_cut_off(k)
    for gain in (*gains, *ideal):
        if not gain >= 0:  # written so that NaN is caught too
            raise ValueError(f"gains must be 0 or more, got {gain}")
    best = _discounted(sorted(ideal, reverse=True)[:k])
    return _discounted(gains[:k]) / best if best > 0 else None


def ndcg_of_ids(doc_ids: Sequence[str], gains: Mapping[str, float], *, k: int) -> float | None:
    """``ndcg_at_k`` of a ranking given as document ids.

    Args:
        doc_ids: documents of the returned passages, best first. A document earns its gain where it first occurs.
        gains: judged gain of each document, >= 0; documents that are not in it count as 0.
        k: cut-off in ranks.

    Returns:
        A value in [0, 1]; None when nothing was judged relevant.

    Raises:
        ValueError: ``k`` below 1, or a negative gain.

    Example:
        >>> ndcg_of_ids(["d2", "d1"], {"d1": 1.0}, k=10)
        0.6309297535714575
    """
    left = dict(gains)
    return ndcg_at_k([left.pop(doc_id, 0.0) for doc_id in doc_ids], list(gains.values()), k=k)


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of mean(after - before) over questions drawn with replacement (Efron 1979).

    Memory stays bounded (about 24 MB) whatever the number of questions and resamples.

    Args:
        before: one value a question.
        after: one value for each of the same questions, in the same order.
        n_resamples: how many resamples, at least 1.
        seed: of the resampling; the same one gives the same interval.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        ValueError: lengths differ, nothing was given, a value is not finite, or an option is out of range.

    Example:
        >>> paired_bootstrap([0.0, 0.0, 1.0], [1.0, 1.0, 2.0])
        (1.0, 1.0)
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must hold the same questions, got {len(before)} and {len(after)} values")
    if not len(before):
        raise ValueError("at least one question is needed, got none")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    n = len(change)
    if not np.isfinite(change).all():
        raise ValueError("every value must be finite: leave out the questions that could not be scored, in both lists")
    rng = np.random.default_rng(seed)
    means = np.empty(n_resamples)
    block = max(1, _BOOTSTRAP_CELLS // n)
    for start in range(0, n_resamples, block):
        rows = min(block, n_resamples - start)
        drawn = rng.integers(0, n, size=(rows, n), dtype=np.int32)
        means[start : start + rows] = change[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _found(doc_ids: Sequence[str], gold: Collection[str], k: int) -> tuple[set[str], set[str]]:
    _check_cut_off(k)
    wanted = set(gold)
    return wanted.intersection(doc_ids[:k]), wanted


def _check_cut_off(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
