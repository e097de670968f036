"""Hard negatives: passages that a search ranks high for a query and that are not its own.

The rules are those of Reinforced-IR (arXiv 2502.11562), whose published code turns every row of 2,000 ranks into a
list and scans it in Python; here a few gathers serve all queries (benchmarks/reinforced_ir.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rag_rl.errors import ConfigError
from rag_rl.types import Array, IntArray

NegativeRule: TypeAlias = Literal["below_positive", "hard", "random"]

_WINDOW = 50
_HARD_RANKS = (30, 200)  # from 0, the second excluded
# Queries at a time: bounds the memory of the comparisons, and fits the caches.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Negatives:
    """Mined negatives of B queries.

    Attributes:
        rows: (B, n) int64 rows of the document matrix in the order of their ranks, -1 where a query has fewer.
        counts: (B,) how many each has.
        fallback: (B,) True where the rule could not be followed and the ranks 30 to 199 were drawn from.
        missing: how many queries did not find their own passage at all; part of the fallbacks.
        copies: exact copies of a query's own passage that were dropped from what the rule had taken.
        repeated: passages dropped because an equal one came before.
    """

    rows: IntArray
    counts: IntArray
    fallback: np.ndarray
    missing: int
    copies: int
    repeated: int


def mine_negatives(
    scores: Array,
    rows: IntArray,
    positives: IntArray,
    *,
    n: int = 15,
    rule: NegativeRule = "below_positive",
    ratio: float = 0.95,
    margin: float | None = None,
    groups: IntArray | None = None,
    corpus_size: int | None = None,
    seed: int = 0,
) -> Negatives:
    """Chooses hard negatives from the ranked passages of queries.

    ``below_positive``, the published "95neg": from the first rank after the query's own passage whose score is at most
    ``ratio`` times that passage's score, 50 ranks are taken. Exact copies of the query's own passage are dropped, of
    equal passages the first is kept, and the first ``n`` of what is left are the negatives. Where the own passage was
    not found, or no rank is low enough, 50 random ones of the ranks 30 to 199 (from 0) take the place of those 50, in
    the order of their ranks; where there are not so many, all ranks there are. ``hard`` does that for every query;
    ``random`` draws 50 rows from the whole corpus.

    A ratio means little for negative scores, where 0.95 of the score lies above it; ``margin`` does not depend on
    where zero is.

    Args:
        scores: (B, K) of a search, falling within a row. Those of the same search that ranked ``rows``: the published
            code reads the query's scores at the ranks of its augmentation.
        rows: (B, K) int64 rows of the document matrix.
        positives: (B,) row of each query's own passage.
        n: negatives a query, from 1 to 50.
        rule: which one.
        ratio: below_positive: largest share of the own passage's score, above 0.
        margin: below_positive: in place of the ratio, how much lower than the own passage's score, at least 0.
        groups: (N,) equal for passages with equal texts (``text_groups``); None where all texts differ.
        corpus_size: N, for random; else unused.
        seed: of what is drawn.

    Returns:
        Rows of the negatives, and how they came about.

    Raises:
        ConfigError: a value out of range, or shapes that do not fit.

    Example:
        >>> found = mine_negatives(np.array([[1.0, 0.97, 0.95, 0.5]]), np.array([[7, 4, 2, 9]]), np.array([7]), n=2)
        >>> found.rows.tolist()
        [[2, 9]]
    """
    _check(scores, rows, positives, n, ratio, margin)
    if rule not in ("below_positive", "hard", "random"):
        raise ConfigError(f"the rule for negatives must be below_positive, hard or random, got {rule!r}")
    if rule == "random" and not corpus_size:
        raise ConfigError("the rule random draws from the whole corpus: corpus_size must be given")
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        piece = slice(start, start + _ROWS_AT_ONCE)
        if rule == "random":
            taken = _distinct(rng, len(rows[piece]), corpus_size or 0)
            fallback, missing = np.zeros(len(taken), dtype=bool), 0
        else:
            taken, fallback, missing = _ranked(scores[piece], rows[piece], positives[piece], rule, ratio, margin, rng)
        parts.append((*_cleaned(taken, positives[piece], groups, n), fallback, missing))
    if not parts:
        empty = np.empty((0, n), dtype=np.int64)
        return Negatives(empty, empty[:, 0], np.empty(0, dtype=bool), 0, 0, 0)
    kept, counts, copies, repeated, fallback_of, missing_of = zip(*parts, strict=True)
    return Negatives(
        np.concatenate(kept),
        np.concatenate(counts),
        np.concatenate(fallback_of),
        sum(missing_of),
        sum(copies),
        sum(repeated),
    )


def text_groups(texts: Iterable[str]) -> IntArray:
    """Numbers texts so that equal ones have the same number.

    Args:
        texts: N texts, of which 16 bytes each are kept.

    Returns:
        (N,) int64.

    Example:
        >>> text_groups(["a", "b", "a"]).tolist()
        [0, 1, 0]
    """
    first: dict[bytes, int] = {}
    numbers = [first.setdefault(hashlib.blake2b(t.encode(), digest_size=16).digest(), len(first)) for t in texts]
    return np.array(numbers, dtype=np.int64)


def _ranked(
    scores: Array,
    rows: IntArray,
    positives: IntArray,
    rule: str,
    ratio: float,
    margin: float | None,
    rng: np.random.Generator,
) -> tuple[IntArray, np.ndarray, int]:
    """(b, 50) rows that the rule takes, -1 where there are fewer; which are fallbacks; how many found no positive."""
    width = rows.shape[1]
    start = np.full(len(rows), width)
    missing = 0
    if rule == "below_positive":
        own = rows == positives[:, None]
        place = own.argmax(1)
        found = own[np.arange(len(rows)), place]
        missing = int(len(rows) - found.sum())
        at = scores[np.arange(len(rows)), place]
        limit = at * ratio if margin is None else at - margin
        start = np.where(found, np.maximum(_first_at_most(scores, limit), place + 1), width)
    ranks = start[:, None] + np.arange(_WINDOW)
    fallback = start >= width
    if fallback.any():
        low, high = (_HARD_RANKS[0], min(width, _HARD_RANKS[1])) if width >= _HARD_RANKS[0] + _WINDOW else (0, width)
        drawn = _distinct(rng, int(fallback.sum()), high - low)
        ranks[fallback] = np.where(drawn >= 0, drawn + low, width)
    taken = np.where(ranks < width, np.take_along_axis(rows, np.minimum(ranks, width - 1), 1), -1)
    return taken, fallback, missing


def _first_at_most(scores: Array, limit: Array) -> IntArray:
    """First rank of each row whose score is at most its limit, K where there is none: one bisection over all rows."""
    low, high = np.zeros(len(scores), dtype=np.int64), np.full(len(scores), scores.shape[1], dtype=np.int64)
    lines = np.arange(len(scores))
    for _ in range(scores.shape[1].bit_length()):
        middle = (low + high) // 2
        # Where low has met high there is nothing left to look at; the clipped look-up changes nothing.
        reached = (scores[lines, np.minimum(middle, scores.shape[1] - 1)] <= limit) | (low == high)
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle + 1)
    return low


def _distinct(rng: np.random.Generator, count: int, size: int) -> IntArray:
    """(count, 50) different numbers below ``size`` in rising order a row, filled up with -1 at the end."""
    found = np.full((count, _WINDOW), -1, dtype=np.int64)
    if size <= _WINDOW:
        found[:, :size] = np.arange(size)
    elif size <= 8 * _WINDOW:
        keys = rng.random((count, size))
        found[:] = np.sort(np.argpartition(keys, _WINDOW, axis=1)[:, :_WINDOW], axis=1)
    else:  # a key for each of a large corpus would be far more numbers than are drawn
        found[:] = np.array([np.sort(rng.choice(size, _WINDOW, replace=False)) for _ in range(count)]).reshape(-1, 50)
    return found


def _cleaned(
    taken: IntArray, positives: IntArray, groups: IntArray | None, n: int
) -> tuple[IntArray, IntArray, int, int]:
    """Drops copies of the positives and repetitions; the first n that are left, how many, and what was dropped."""
    valid = taken >= 0
    texts = taken if groups is None else np.where(valid, groups[taken], -1)
    own = positives if groups is None else groups[positives]
    copies = valid & (texts == own[:, None])
    # A stable sort puts equal texts side by side, the best ranked of them first.
    order = np.argsort(texts, axis=1, kind="stable")
    in_order = np.take_along_axis(texts, order, 1)
    again = np.zeros(taken.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], 1)
    repeated = again & valid & ~copies
    keep = valid & ~copies & ~repeated
    first = np.argsort(~keep, axis=1, kind="stable")[:, :n]
    kept = np.where(np.take_along_axis(keep, first, 1), np.take_along_axis(taken, first, 1), -1)
    return kept, (kept >= 0).sum(1), int(copies.sum()), int(repeated.sum())


def _check(scores: Array, rows: IntArray, positives: IntArray, n: int, ratio: float, margin: float | None) -> None:
    if scores.ndim != 2 or scores.shape != rows.shape or positives.shape != rows.shape[:1] or not rows.shape[1]:
        raise ConfigError(
            f"scores and rows must be (B, K) and positives (B,), got {scores.shape}, {rows.shape}, {positives.shape}"
        )
    if not 1 <= n <= _WINDOW:
        raise ConfigError(f"negatives a query must be between 1 and {_WINDOW}, got {n}")
    if ratio <= 0.0:
        raise ConfigError(f"the ratio of a negative's score to the positive's must be above 0, got {ratio}")
    if margin is not None and margin < 0.0:
        raise ConfigError(f"the margin between a negative's score and the positive's must be at least 0, got {margin}")
