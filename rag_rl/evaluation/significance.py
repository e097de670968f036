"""How sure a mean is, and a difference of means: intervals and tests over questions.

None of it covers what another seed of training would change, and p-values are those of single comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Signs or draws held at once.
_CELLS = 2**21
# So many questions that differ are tried in all their sign patterns; beyond, patterns are drawn.
_EXACT = 13
# Up to so many distinct values, a resample is drawn as the number of times that each occurs.
_DISTINCT = 1024


def permutation_test(
    one: Sequence[float], other: Sequence[float], *, n_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided paired permutation test: how often chance alone would tell two assemblies so far apart.

    If it made no difference which assembly answered, each question's two values could be swapped: the sign of its
    difference is a coin. p is the share of such swaps whose mean difference is at least as far from 0 as the one seen
    (Fisher 1935). Where at most 13 questions differ all patterns are tried, and p is exact; else patterns are drawn,
    and p is (1 + as far) / (1 + drawn), which is never 0.

    Args:
        one: a value a question.
        other: one for each of the same questions, in the same order.
        n_permutations: patterns drawn, at least 1.
        seed: of the drawing.

    Returns:
        p in (0, 1]; 1 where no question differs.

    Raises:
        ValueError: lengths differ, nothing was given, a value is not finite, or ``n_permutations`` below 1.

    Example:
        >>> permutation_test([0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0])
        0.25
    """
    if len(one) != len(other):
        raise ValueError(f"both sides must hold the same questions, got {len(one)} and {len(other)} values")
    if not len(one):
        raise ValueError("at least one question is needed, got none")
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, got {n_permutations}")
    change = np.asarray(other, dtype=np.float64) - np.asarray(one, dtype=np.float64)
    if not np.isfinite(change).all():
        raise ValueError("every value must be finite: leave out the questions that could not be scored, on both sides")
    change = change[change != 0]
    n = len(change)
    if not n:
        return 1.0
    # Sums in another order differ in their last digits, and a tie with what was seen must count.
    seen = abs(float(change.sum())) - 1e-9 * float(np.abs(change).sum())
    if n <= _EXACT:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2 * patterns - 1) @ change) >= seen).mean())
    rng = np.random.default_rng(seed)
    as_far, total = 0, float(change.sum())
    block = max(1, _CELLS // n)
    for start in range(0, n_permutations, block):
        rows = min(block, n_permutations - start)
        swapped = np.unpackbits(rng.integers(0, 256, size=(rows, -(-n // 8)), dtype=np.uint8), axis=1, count=n)
        # The sum of all minus twice that of the swapped ones.
        as_far += int((np.abs(total - 2 * (swapped @ change)) >= seen).sum())
    return (1 + as_far) / (1 + n_permutations)


def mean_interval(
    values: Sequence[float], *, n_resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a mean over questions drawn with replacement (Efron 1979).

    Args:
        values: one a question.
        n_resamples: how many resamples, at least 1.
        seed: of the resampling.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        ValueError: nothing was given, a value is not finite, or an option is out of range.

    Example:
        >>> mean_interval([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """
    if not len(values):
        raise ValueError("at least one question is needed, got none")
    if n_resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"n_resamples must be at least 1 and level in (0, 1), got {n_resamples} and {level}")
    given = np.asarray(values, dtype=np.float64)
    if not np.isfinite(given).all():
        raise ValueError("every value must be finite: leave out the questions that could not be scored")
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(given, return_counts=True)
    means: npt.NDArray[np.float64]
    if len(distinct) == 1:
        return float(distinct[0]), float(distinct[0])
    if len(distinct) <= _DISTINCT:
        # Which of the questions with a value are drawn does not matter, only how many: much less to draw.
        drawn = rng.multinomial(len(given), counts / len(given), size=n_resamples)
        means = drawn @ distinct / len(given)
    else:
        means = np.empty(n_resamples)
        block = max(1, _CELLS // len(given))
        for start in range(0, n_resamples, block):
            rows = min(block, n_resamples - start)
            places = rng.integers(0, len(given), size=(rows, len(given)), dtype=np.int32)
            means[start : start + rows] = given[places].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
