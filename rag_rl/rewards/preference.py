"""Which of several augmentations of a query a retriever prefers: pairs for DPO (Reinforced-IR, arXiv 2502.11562).

The published rule looks at one number a candidate, its similarity to the passage that the query was written for, and
so rewards whatever is similar to most passages. ``retrieval_signal`` and ``preference_pairs`` ask instead whether the
passage comes out above mined hard negatives, and can keep length out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rag_rl.errors import ConfigError
from rag_rl.types import Array

Signal: TypeAlias = Literal["margin", "reciprocal_rank"]


@dataclass(frozen=True, slots=True)
class Preference:
    """One pair of candidates of a query.

    Attributes:
        query: place of the query, from 0.
        chosen: place of the better candidate among the query's, from 0.
        rejected: place of the worse one.
        chosen_score: of the better one, by the rule that made the pair.
        rejected_score: of the worse one.
    """

    query: int
    chosen: int
    rejected: int
    chosen_score: float
    rejected_score: float


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs, and what became of the queries that have none.

    Attributes:
        pairs: in the order of the queries, of one query the widest apart first.
        too_few: queries with fewer than two valid candidates.
        no_gain: queries whose best candidate does not help.
        too_alike: queries whose candidates that help are no better than the others, or differ too much in length.
    """

    pairs: list[Preference]
    too_few: int = 0
    no_gain: int = 0
    too_alike: int = 0


def published_pairs(
    queries: Array,
    documents: Array,
    candidates: Array,
    *,
    weight: float = 0.8,
    threshold: float = 0.95,
    valid: np.ndarray | None = None,
) -> Preferences:
    """The published rule: best against worst candidate, where the best helps and the worst is clearly worse.

    With ``r = <q, d>`` and ``s_j = <w q + (1 - w) a_j, d>`` the pair of the largest and the smallest ``s`` is kept iff
    ``s_max > r`` and ``threshold * (s_max - w r) >= s_min - w r``. The mix cancels: with ``u_j = <a_j, d>`` these are
    ``u_max > r`` and ``threshold * u_max >= u_min``. For negative products the second test is odd (a smallest
    candidate that is only a little worse passes).

    Args:
        queries: (B, D) vectors.
        documents: (B, D) of the passages that the queries were written for.
        candidates: (B, N, D) of the augmentations, prefix included.
        weight: w, the query's share of the mix, in [0, 1).
        threshold: as above, above 0.
        valid: (B, N) False where there is no candidate; None for all.

    Returns:
        At most one pair a query; scores are ``s / r``, as published. A query with ``r = 0`` has no pair (no gain).

    Raises:
        ConfigError: shapes that do not fit, or a value out of range.

    Example:
        >>> q, d = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
        >>> published_pairs(q, d, np.array([[[0.0, 1.2], [0.0, 2.0], [0.0, 1.0]]])).pairs[0].chosen
        1
    """
    valid = _check(queries, documents, candidates, weight, valid)
    if threshold <= 0.0:
        raise ConfigError(f"threshold must be above 0, got {threshold}")
    raw = np.einsum("bd,bd->b", queries, documents)
    mixed = weight * raw[:, None] + (1.0 - weight) * np.einsum("bnd,bd->bn", candidates, documents)
    best, worst = np.where(valid, mixed, -np.inf).argmax(1), np.where(valid, mixed, np.inf).argmin(1)
    lines = np.arange(len(raw))
    highest, lowest = mixed[lines, best], mixed[lines, worst]
    enough = valid.sum(1) >= 2
    helps = (highest > raw) & (raw != 0.0)
    apart = ((highest - weight * raw) * threshold >= lowest - weight * raw) & (highest > lowest)
    pairs = [
        Preference(int(i), int(best[i]), int(worst[i]), float(highest[i] / raw[i]), float(lowest[i] / raw[i]))
        for i in np.flatnonzero(enough & helps & apart)
    ]
    return Preferences(pairs, int((~enough).sum()), int((enough & ~helps).sum()), int((enough & helps & ~apart).sum()))


def retrieval_signal(
    queries: Array,
    documents: Array,
    candidates: Array,
    negatives: Array,
    *,
    kind: Signal = "margin",
    weight: float = 0.8,
    negatives_valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How well each augmented query tells its passage from mined hard negatives, and how well the bare query does.

    Args:
        queries: (B, D) vectors.
        documents: (B, D) of the passages that the queries were written for.
        candidates: (B, N, D) of the augmentations, prefix included.
        negatives: (B, K, D) of passages that are not the query's, K at least 1.
        kind: ``margin``, the product with the passage less the largest with a negative; or ``reciprocal_rank`` of the
            passage among the negatives, ties lost.
        weight: the query's share of the mix, in [0, 1].
        negatives_valid: (B, K) False where there is no negative; None for all. A query without any has the margin of
            its product alone, and rank 1.

    Returns:
        (B, N) of the candidates, and (B,) of the bare queries.

    Raises:
        ConfigError: shapes that do not fit, or a value out of range.

    Example:
        >>> found, bare = retrieval_signal(
        ...     np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), np.array([[[0.0, 1.0]]]), np.array([[[0.5, 0.0]]]),
        ...     weight=0.5,
        ... )
        >>> found.item(), bare.item()  # 0.5 - 0.25, 0 - 0.5
        (0.25, -0.5)
    """
    _check(queries, documents, candidates, weight, None, most=1.0)
    if negatives.ndim != 3 or negatives.shape[:1] + negatives.shape[2:] != queries.shape or not negatives.shape[1]:
        raise ConfigError(f"negatives must be (B, K, D), got {negatives.shape} for queries {queries.shape}")
    if kind not in ("margin", "reciprocal_rank"):
        raise ConfigError(f"the signal must be margin or reciprocal_rank, got {kind!r}")
    bare = np.broadcast_to(queries[:, None, :], (len(queries), 1, queries.shape[1]))
    asked = np.concatenate([weight * bare + (1.0 - weight) * candidates, bare], axis=1)  # (B, N + 1, D)
    own = np.einsum("bnd,bd->bn", asked, documents)
    others = np.einsum("bnd,bkd->bnk", asked, negatives)
    if negatives_valid is not None:
        others = np.where(negatives_valid[:, None, :], others, -np.inf)
    if kind == "reciprocal_rank":
        found = 1.0 / (1.0 + (others >= own[..., None]).sum(-1))
    else:
        highest = others.max(-1)
        found = own - np.where(np.isneginf(highest), 0.0, highest)
    return found[:, :-1], found[:, -1]


def preference_pairs(
    signal: np.ndarray,
    baseline: np.ndarray,
    *,
    min_gain: float = 0.0,
    min_gap: float = 0.0,
    per_query: int = 1,
    lengths: np.ndarray | None = None,
    length_penalty: float = 0.0,
    max_length_ratio: float | None = None,
    valid: np.ndarray | None = None,
) -> Preferences:
    """Pairs of candidates by any signal, with absolute bounds, where length need not decide.

    A candidate may be chosen if its signal is more than ``min_gain`` above the bare query's, and is paired with one
    that is more than ``min_gap`` below it. The widest gap goes first; a candidate is in one pair only.

    Args:
        signal: (B, N) of the candidates, higher is better.
        baseline: (B,) of the bare queries.
        min_gain: at least 0.
        min_gap: at least 0.
        per_query: most pairs a query, at least 1.
        lengths: (B, N) of the candidates, in tokens.
        length_penalty: taken off the signal for each token, at least 0.
        max_length_ratio: the longer candidate of a pair has at most so many times the tokens of the shorter one, at
            least 1; None for any.
        valid: (B, N) False where there is no candidate; None for all.

    Returns:
        Pairs; scores are the signal, its penalty included.

    Raises:
        ConfigError: shapes that do not fit, a value out of range, or lengths are needed.

    Example:
        >>> found = preference_pairs(np.array([[0.9, 0.1, 0.5, 0.4]]), np.array([0.3]), per_query=2)
        >>> [(pair.chosen, pair.rejected) for pair in found.pairs]
        [(0, 1), (2, 3)]
    """
    _check_pairing(signal, baseline, lengths, length_penalty, max_length_ratio, min(min_gain, min_gap), per_query)
    valid = np.ones(signal.shape, dtype=bool) if valid is None else valid
    scores = signal if lengths is None else signal - length_penalty * lengths
    pairs: list[Preference] = []
    counts = {"too_few": 0, "no_gain": 0, "too_alike": 0}
    for i, (row, there) in enumerate(zip(scores, valid, strict=True)):
        helps = there & (row > baseline[i] + min_gain)
        if there.sum() < 2 or not helps.any():
            counts["too_few" if there.sum() < 2 else "no_gain"] += 1
            continue
        gaps = row[:, None] - row[None, :]
        fits = helps[:, None] & there[None, :] & (gaps > min_gap)
        if max_length_ratio is not None and lengths is not None:
            length = np.maximum(lengths[i], 1)
            fits &= np.maximum(length[:, None] / length, length / length[:, None]) <= max_length_ratio
        found: list[Preference] = []
        while len(found) < per_query and fits.any():
            chosen, rejected = np.unravel_index(np.where(fits, gaps, -np.inf).argmax(), gaps.shape)
            found.append(Preference(i, int(chosen), int(rejected), float(row[chosen]), float(row[rejected])))
            for used in (chosen, rejected):
                fits[used, :] = fits[:, used] = False
        counts["too_alike"] += not found
        pairs += found
    return Preferences(pairs, **counts)


def _check(
    queries: Array,
    documents: Array,
    candidates: Array,
    weight: float,
    valid: np.ndarray | None,
    most: float = 0.999999,
) -> np.ndarray:
    shapes = queries.shape, documents.shape, candidates.shape
    if queries.ndim != 2 or documents.shape != queries.shape or candidates.ndim != 3 or not candidates.shape[1]:
        raise ConfigError(f"queries and documents must be (B, D) and candidates (B, N, D), got {shapes}")
    if candidates.shape[:1] + candidates.shape[2:] != queries.shape:
        raise ConfigError(f"queries and documents must be (B, D) and candidates (B, N, D), got {shapes}")
    if not 0.0 <= weight <= most:
        raise ConfigError(f"the query's weight must lie in [0, 1{']' if most == 1.0 else ')'}, got {weight}")
    if valid is None:
        return np.ones(candidates.shape[:2], dtype=bool)
    if valid.shape != candidates.shape[:2]:
        raise ConfigError(f"valid must be (B, N), got {valid.shape} for candidates {candidates.shape}")
    return valid


def _check_pairing(
    signal: np.ndarray,
    baseline: np.ndarray,
    lengths: np.ndarray | None,
    length_penalty: float,
    max_length_ratio: float | None,
    least: float,
    per_query: int,
) -> None:
    if (
        signal.ndim != 2
        or baseline.shape != signal.shape[:1]
        or (lengths is not None and lengths.shape != signal.shape)
    ):
        given = None if lengths is None else lengths.shape
        raise ConfigError(
            f"signal and lengths must be (B, N), baseline (B,), got {signal.shape}, {given}, {baseline.shape}"
        )
    if lengths is None and (length_penalty or max_length_ratio is not None):
        raise ConfigError("length_penalty and max_length_ratio need the lengths of the candidates")
    if least < 0.0 or length_penalty < 0.0:
        raise ConfigError("min_gain, min_gap and length_penalty must be at least 0")
    if per_query < 1 or (max_length_ratio is not None and max_length_ratio < 1.0):
        raise ConfigError(f"per_query and max_length_ratio must be at least 1, got {per_query} and {max_length_ratio}")
