"""Which augmentation is preferred: the published rule and the better signals, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rag_rl.errors import ConfigError
from rag_rl.rewards.preference import Preference, preference_pairs, published_pairs, retrieval_signal

# Along one axis every product is the product of two numbers: q = 1, d = 1, so r = 1 and u_j is the candidate itself.
ONE = np.ones((1, 1))


def published(*candidates: float, query: float = 1.0, **options):
    vectors = np.array(candidates).reshape(1, -1, 1)
    return published_pairs(query * ONE, ONE, vectors, **options)


def test_best_against_worst():
    (pair,) = published(1.1, 1.5, 0.4, 1.2).pairs
    # s = 0.8 + 0.2 u: 1.1 and 0.88, over r = 1.
    assert pair == Preference(0, 1, 2, pytest.approx(1.1), pytest.approx(0.88))


@pytest.mark.parametrize(
    ("best", "worst", "kept"),
    [
        (1.5, 1.42, True),  # 0.95 * 1.5 = 1.425 >= 1.42
        (1.5, 1.43, False),
        (1.01, 0.5, True),
        (1.0, 0.5, False),  # not above the bare query
        (0.9, 0.1, False),
    ],
)
def test_threshold_and_gain(best, worst, kept):
    found = published(best, worst)
    assert len(found.pairs) == kept
    assert found.no_gain == (best <= 1.0)
    assert found.too_alike == (best > 1.0 and not kept)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8])
def test_the_mix_cancels(weight):
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(2, 200, 8))
    candidates = rng.normal(size=(200, 5, 8))
    r = np.einsum("bd,bd->b", queries, documents)
    u = np.einsum("bnd,bd->bn", candidates, documents)
    expected = np.flatnonzero((u.max(1) > r) & (0.95 * u.max(1) >= u.min(1)))
    found = published_pairs(queries, documents, candidates, weight=weight)
    assert [pair.query for pair in found.pairs] == expected.tolist()
    assert [pair.chosen for pair in found.pairs] == u.argmax(1)[expected].tolist()
    assert len(found.pairs) + found.no_gain + found.too_alike == 200


def test_missing_candidates_are_no_candidates():
    valid = np.array([[True, False, True]])
    (pair,) = published(1.2, 9.0, 1.0, valid=valid).pairs
    assert (pair.chosen, pair.rejected) == (0, 2)
    assert published(1.2, 9.0, valid=valid[:, :2]).too_few == 1


def test_a_score_of_zero_divides_nothing():
    found = published(1.0, 0.5, query=0.0)
    assert (found.pairs, found.no_gain) == ([], 1)


QUERY, PASSAGE = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
NEAR, FAR = [0.0, 1.0], [1.0, 0.0]
NEGATIVES = np.array([[[0.6, 0.2], [0.1, 0.1]]])


def test_margin_by_hand():
    found, bare = retrieval_signal(QUERY, PASSAGE, np.array([[NEAR, FAR]]), NEGATIVES, weight=0.5)
    # Mixed with NEAR: (0.5, 0.5), product with the passage 0.5, with the negatives 0.4 and 0.1; FAR leaves the query.
    np.testing.assert_allclose(found, [[0.1, -0.6]])
    np.testing.assert_allclose(bare, [-0.6])


def test_reciprocal_rank_by_hand():
    found, bare = retrieval_signal(
        QUERY, PASSAGE, np.array([[NEAR, FAR]]), NEGATIVES, weight=0.5, kind="reciprocal_rank"
    )
    np.testing.assert_allclose(found, [[1.0, 1 / 3]])
    np.testing.assert_allclose(bare, [1 / 3])


def test_a_tie_is_lost():
    found, _ = retrieval_signal(QUERY, QUERY, np.array([[FAR]]), QUERY[:, None], kind="reciprocal_rank")
    assert found.item() == 0.5


def test_missing_negatives_are_no_negatives():
    there = np.array([[False, True]])
    found, _ = retrieval_signal(QUERY, PASSAGE, np.array([[NEAR]]), NEGATIVES, weight=0.5, negatives_valid=there)
    assert found.item() == pytest.approx(0.5 - 0.1)
    none, _ = retrieval_signal(
        QUERY, PASSAGE, np.array([[NEAR]]), NEGATIVES, weight=0.5, negatives_valid=np.zeros((1, 2), dtype=bool)
    )
    assert none.item() == pytest.approx(0.5)


def test_generic_text_is_not_preferred():
    """What is similar to everything wins by the published rule and loses by the margin."""
    query, passage = np.array([[1.0, 0.0, 0.0]]), np.array([[0.5, 0.5, 1.0]])
    negatives = np.array([[[0.5, 0.5, -1.0]]])
    generic, specific = [3.0, 3.0, 0.0], [0.5, 0.5, 1.0]
    candidates = np.array([[generic, specific]])
    assert published_pairs(query, passage, candidates).pairs[0].chosen == 0
    signal, bare = retrieval_signal(query, passage, candidates, negatives)
    assert preference_pairs(signal, bare).pairs[0].chosen == 1


def test_gain_and_gap_are_absolute():
    signal = np.array([[0.5, 0.45, 0.1]])
    assert preference_pairs(signal, np.array([0.5])).no_gain == 1
    assert preference_pairs(signal, np.array([0.3]), min_gain=0.25).no_gain == 1
    assert preference_pairs(signal, np.array([0.3]), min_gap=0.4).too_alike == 1
    (pair,) = preference_pairs(signal, np.array([0.3]), min_gap=0.39).pairs
    assert pair == Preference(0, 0, 2, 0.5, 0.1)


def test_several_pairs_use_a_candidate_once():
    found = preference_pairs(np.array([[0.9, 0.8, 0.1, 0.2], [0.0, 0.0, 0.0, 0.0]]), np.array([0.0, 0.0]), per_query=5)
    assert [(p.query, p.chosen, p.rejected) for p in found.pairs] == [(0, 0, 2), (0, 1, 3)]
    assert found.no_gain == 1


def test_length_is_controlled():
    signal, lengths = np.array([[0.9, 0.8, 0.1]]), np.array([[100, 20, 18]])
    assert preference_pairs(signal, np.zeros(1), lengths=lengths).pairs[0].chosen == 0
    (pair,) = preference_pairs(signal, np.zeros(1), lengths=lengths, max_length_ratio=1.5).pairs
    assert (pair.chosen, pair.rejected) == (1, 2)
    (pair,) = preference_pairs(signal, np.zeros(1), lengths=lengths, length_penalty=0.005).pairs
    assert pair == Preference(0, 1, 2, pytest.approx(0.7), pytest.approx(0.01))


def test_too_few_candidates():
    assert preference_pairs(np.array([[0.9, 0.8]]), np.zeros(1), valid=np.array([[True, False]])).too_few == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: published_pairs(ONE, np.ones((2, 1)), np.ones((1, 2, 1))),
            r"got \(\(1, 1\), \(2, 1\), \(1, 2, 1\)\)",
        ),
        (lambda: published_pairs(ONE, ONE, np.ones((2, 2, 1))), r"candidates \(B, N, D\)"),
        (lambda: published(1.0, 2.0, weight=1.0), r"must lie in \[0, 1\), got 1.0"),
        (lambda: published(1.0, 2.0, threshold=0.0), "threshold must be above 0"),
        (lambda: published(1.0, 2.0, valid=np.ones((1, 3), dtype=bool)), r"valid must be \(B, N\)"),
        (lambda: retrieval_signal(ONE, ONE, np.ones((1, 2, 1)), np.ones((1, 0, 1))), r"negatives must be \(B, K, D\)"),
        (lambda: retrieval_signal(ONE, ONE, np.ones((1, 2, 1)), np.ones((1, 1, 1)), kind="rank"), "got 'rank'"),
        (lambda: retrieval_signal(ONE, ONE, np.ones((1, 2, 1)), np.ones((1, 1, 1)), weight=1.1), r"\[0, 1\], got 1.1"),
        (lambda: preference_pairs(np.ones((1, 2)), np.ones(2)), r"baseline \(B,\)"),
        (lambda: preference_pairs(np.ones((1, 2)), np.ones(1), length_penalty=0.1), "need the lengths"),
        (lambda: preference_pairs(np.ones((1, 2)), np.ones(1), min_gap=-1.0), "must be at least 0"),
        (lambda: preference_pairs(np.ones((1, 2)), np.ones(1), per_query=0), "at least 1, got 0"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
