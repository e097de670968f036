from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from rag_rl.evaluation.significance import mean_interval, permutation_test
from rag_rl.metrics import paired_bootstrap


def test_exact_where_few_questions_differ():
    one, other = [0.0, 0.2, 1.0, 0.5, 0.5], [1.0, 0.7, 0.9, 0.5, 1.0]
    changes = [b - a for a, b in zip(one, other, strict=True) if a != b]
    seen = abs(sum(changes))
    signs = list(product((-1, 1), repeat=len(changes)))
    as_far = sum(abs(sum(s * c for s, c in zip(sign, changes, strict=True))) >= seen - 1e-12 for sign in signs)
    assert permutation_test(one, other) == as_far / len(signs) == 4 / 16


def test_agrees_with_the_sign_test_of_right_and_wrong():
    # Of 40 questions that differ, 28 became right: McNemar's exact test.
    one, other = [0.0] * 28 + [1.0] * 12 + [1.0] * 60, [1.0] * 28 + [0.0] * 12 + [1.0] * 60
    exact = 2 * sum(math.comb(40, k) for k in range(28, 41)) / 2**40
    assert permutation_test(one, other, n_permutations=100_000) == pytest.approx(exact, abs=0.0008)
    assert permutation_test(other, one, n_permutations=100_000) == pytest.approx(exact, abs=0.0008)


def test_is_uniform_where_nothing_sets_the_two_apart():
    rng = np.random.default_rng(0)
    found = [permutation_test(*rng.normal(size=(2, 30)), n_permutations=500, seed=i) for i in range(200)]
    assert 0.42 < float(np.mean(found)) < 0.58
    assert 0.01 <= float(np.mean(np.array(found) < 0.05)) <= 0.10


def test_is_seeded_and_never_zero():
    one, other = [0.0] * 100, [1.0] * 100
    assert permutation_test(one, other, n_permutations=999) == 1 / 1000
    rng = np.random.default_rng(1)
    pair = rng.normal(size=(2, 50))
    assert permutation_test(*pair, seed=3) == permutation_test(*pair, seed=3)
    assert permutation_test(one, one) == 1.0


@pytest.mark.parametrize(
    ("one", "other", "options", "message"),
    [
        ([0.0], [0.0, 1.0], {}, "same questions, got 1 and 2"),
        ([], [], {}, "at least one question"),
        ([math.nan], [0.0], {}, "finite"),
        ([0.0], [1.0], {"n_permutations": 0}, "n_permutations"),
    ],
)
def test_permutation_test_refuses(one, other, options, message):
    with pytest.raises(ValueError, match=message):
        permutation_test(one, other, **options)


@pytest.mark.parametrize("distinct", [3, 5000])
def test_interval_of_a_mean_is_what_theory_says(distinct):
    rng = np.random.default_rng(0)
    values = rng.integers(0, distinct, size=2000) / distinct
    low, high = mean_interval(values)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=error / 15)
    assert high == pytest.approx(values.mean() + error, abs=error / 15)


def test_interval_of_a_mean_is_that_of_a_difference_from_nothing():
    values = [float(i % 3 == 0) for i in range(300)]
    assert mean_interval(values) == pytest.approx(paired_bootstrap([0.0] * 300, values), abs=0.005)
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one question"),
        ([math.inf], {}, "finite"),
        ([1.0, 0.0], {"level": 1.0}, "level"),
        ([1.0, 0.0], {"n_resamples": 0}, "n_resamples"),
    ],
)
def test_mean_interval_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, **options)
