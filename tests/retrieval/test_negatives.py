"""The 95% rule and its fallbacks, worked by hand, and against a scan in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from rag_rl.errors import ConfigError
from rag_rl.retrieval.negatives import mine_negatives, text_groups


def one(scores, rows, positive, **options):
    """One query."""
    return mine_negatives(
        np.array([scores], dtype=np.float32), np.array([rows]), np.array([positive]), **{"n": 3, **options}
    )


def test_starts_at_the_first_rank_that_is_low_enough():
    # 0.95 * 2.0 = 1.9: the ranks of 5 and 6 are too close to the positive.
    found = one([2.5, 2.0, 1.95, 1.91, 1.9, 1.5, 1.0], [3, 4, 5, 6, 7, 8, 9], 4)
    assert found.rows.tolist() == [[7, 8, 9]]
    assert (found.counts.tolist(), found.fallback.tolist(), found.missing) == ([3], [False], 0)


def test_only_ranks_after_the_positive_count():
    # What stands before the positive is a better match, and perhaps a right one.
    found = one([3.0, 1.0, 1.0, 0.9], [1, 2, 3, 4], 3)
    assert found.rows.tolist() == [[4, -1, -1]]
    assert found.counts.tolist() == [1]


def test_a_margin_does_not_depend_on_where_zero_is():
    scores, rows = [-1.0, -1.02, -1.2, -1.5], [1, 2, 3, 4]
    assert one(scores, rows, 1, margin=0.1).rows.tolist() == [[3, 4, -1]]
    # 0.95 * -1.0 lies above the positive itself: every rank after it is "low enough".
    assert one(scores, rows, 1).rows.tolist() == [[2, 3, 4]]


def test_copies_and_repetitions_are_dropped():
    groups = text_groups(["own", "a", "own", "b", "a", "c", "d"])
    found = one([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0, 1, 2, 3, 4, 5, 6], 0, groups=groups)
    assert found.rows.tolist() == [[1, 3, 5]]
    assert (found.copies, found.repeated) == (1, 1)


def test_the_window_is_fifty_ranks():
    scores, rows = np.linspace(1.0, 0.0, 200), np.arange(200)
    groups = np.where(rows < 60, 0, rows)  # the positive and 59 copies of it: the first at 0.95 is rank 10
    found = one(scores, rows, 0, groups=groups, n=50)
    assert found.counts.tolist() == [0]
    assert found.copies == 50


@pytest.mark.parametrize("positive", [999, 0], ids=["not found", "no rank is low enough"])
def test_fallback_draws_from_ranks_30_to_199(positive):
    rows = np.arange(1000, 1300)
    rows[0] = 0
    found = one(np.linspace(1.0, 0.99, 300), rows, positive, n=15)
    ranks = found.rows[0] - 1000
    assert found.fallback.tolist() == [True]
    assert found.missing == (positive == 999)
    assert ranks.min() >= 30
    assert ranks.max() < 200
    assert np.all(np.diff(ranks) > 0)
    # The first 15 of 50 drawn from 170 ranks: all 50 reach further.
    wide = one(np.linspace(1.0, 0.99, 300), rows, positive, n=50)
    assert wide.counts.tolist() == [50]
    assert wide.rows[0].max() - 1000 > 150
    assert found.rows.tolist() == one(np.linspace(1.0, 0.99, 300), rows, positive, n=15).rows.tolist()
    assert found.rows.tolist() != one(np.linspace(1.0, 0.99, 300), rows, positive, n=15, seed=1).rows.tolist()


def test_fallback_with_few_ranks_takes_all_there_are():
    found = one([1.0, 0.99, 0.98], [4, 5, 6], 4)
    assert found.rows.tolist() == [[5, 6, -1]]
    assert (found.fallback.tolist(), found.copies) == ([True], 1)


def test_hard_is_the_fallback_for_all():
    scores, rows = np.linspace(1.0, 0.0, 300), np.arange(300)
    found = one(scores, rows, 40, rule="hard", n=50)
    assert found.rows.max() < 200
    assert found.rows[found.rows >= 0].min() >= 30
    assert 40 not in found.rows


def test_random_draws_from_the_whole_corpus():
    found = mine_negatives(
        np.ones((40, 2), dtype=np.float32), np.zeros((40, 2), int), np.full(40, 7), rule="random", corpus_size=5000
    )
    assert found.counts.tolist() == [15] * 40
    assert found.rows.max() > 1000
    assert all(len(set(row)) == 15 for row in found.rows.tolist())
    few = mine_negatives(np.ones((1, 2)), np.zeros((1, 2), int), np.array([1]), rule="random", corpus_size=4, n=5)
    assert few.rows.tolist() == [[0, 2, 3, -1, -1]]


def scan(scores, rows, positive, groups, n):
    """The rule as one reads it, for a query that does not fall back; None where it does."""
    if positive not in rows:
        return None
    place = rows.index(positive)
    start = next((i for i in range(place + 1, len(rows)) if scores[i] <= np.float32(0.95) * scores[place]), None)
    if start is None:
        return None
    kept, seen = [], {groups[positive]}
    for row in rows[start : start + 50]:
        if groups[row] not in seen:
            kept.append(row)
            seen.add(groups[row])
    return kept[:n]


def test_many_queries_are_as_a_scan_of_each():
    rng = np.random.default_rng(0)
    queries, width, corpus = 1500, 120, 400  # more than one block
    scores = -np.sort(-rng.normal(size=(queries, width)).astype(np.float32), axis=1) + 3
    rows = np.array([rng.choice(corpus, width, replace=False) for _ in range(queries)])
    positives = np.where(rng.random(queries) < 0.7, rows[:, 3], rng.integers(0, corpus, queries))
    groups = rng.integers(0, 150, corpus)
    found = mine_negatives(scores, rows, positives, groups=groups)
    compared = 0
    for i in range(queries):
        expected = scan(scores[i], rows[i].tolist(), positives[i], groups, 15)
        assert found.fallback[i] == (expected is None)
        if expected is not None:
            assert found.rows[i, : len(expected)].tolist() == expected
            assert found.counts[i] == len(expected)
            compared += 1
    assert compared > 1000
    assert found.missing == sum(p not in r for p, r in zip(positives, rows, strict=True))


def test_no_query():
    found = mine_negatives(np.empty((0, 5)), np.empty((0, 5), int), np.empty(0, int))
    assert found.rows.shape == (0, 15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "between 1 and 50, got 0"),
        ({"n": 51}, "between 1 and 50, got 51"),
        ({"ratio": 0.0}, "must be above 0, got 0.0"),
        ({"margin": -1.0}, "must be at least 0, got -1.0"),
        ({"rule": "nearest"}, "below_positive, hard or random, got 'nearest'"),
        ({"rule": "random"}, "corpus_size must be given"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        one([1.0, 0.5], [1, 2], 1, **options)


def test_shapes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"got \(2, 3\), \(2, 2\), \(2,\)"):
        mine_negatives(np.ones((2, 3)), np.ones((2, 2), int), np.ones(2, int))
