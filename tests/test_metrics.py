from __future__ import annotations

import math
import random
import tracemalloc

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rl.metrics import (
    all_gold_at_k,
    contains_match,
    exact_match,
    mrr_at_k,
    ndcg_at_k,
    ndcg_of_ids,
    paired_bootstrap,
    recall_at_k,
    success_at_k,
    token_f1,
)

WORDS = st.lists(st.sampled_from(["mira", "elm", "the", "brook", "in", "a"]), max_size=5).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "contains", "f1"),
    [
        ("the Mira.", ["Mira"], 1.0, 1.0, 1.0),
        ("Mira", ["Elm", "Mira"], 1.0, 1.0, 1.0),
        ("It is the Mira", ["Mira"], 0.0, 1.0, 0.5),
        ("Mirabrook", ["Mira"], 0.0, 0.0, 0.0),
        ("brook Mira", ["Mira brook"], 0.0, 0.0, 1.0),
        ("Mira Mira Mira", ["Mira"], 0.0, 1.0, 0.5),
        ("Mira Mira", ["Mira Mira Elm"], 0.0, 0.0, 0.8),
        ("", ["Mira"], 0.0, 0.0, 0.0),
        ("the", ["Mira"], 0.0, 0.0, 0.0),
        (None, ["Mira"], 0.0, 0.0, 0.0),
        ("Mira", [], 0.0, 0.0, 0.0),
        # Answers that normalise to nothing: the empty prediction must not match them.
        ("A", ["A"], 1.0, 1.0, 1.0),
        ("", ["A"], 0.0, 0.0, 0.0),
        ("the", ["A"], 0.0, 0.0, 0.0),
        ("", [""], 0.0, 0.0, 0.0),
    ],
)
def test_answer_metrics(prediction: str | None, answers: list[str], em: float, contains: float, f1: float) -> None:
    assert exact_match(prediction, answers) == em
    assert contains_match(prediction, answers) == contains
    assert token_f1(prediction, answers) == pytest.approx(f1)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_exact_match_implies_the_others_and_no_answer_is_hurt_by_an_alias(prediction: str, answers: list[str]) -> None:
    em, contains, f1 = (metric(prediction, answers) for metric in (exact_match, contains_match, token_f1))
    assert em <= contains
    assert em <= f1 <= 1.0
    assert token_f1(prediction, [*answers, "mira elm"]) >= f1


def test_a_bare_string_of_answers_is_refused() -> None:
    for metric in (exact_match, contains_match, token_f1):
        with pytest.raises(TypeError, match=r"write \['Mira'\]"):
            metric("M", "Mira")


def test_ranking_metrics_by_hand() -> None:
    ranking = ["d3", "d1", "d1", "d2"]
    assert recall_at_k(ranking, {"d1", "d2"}, k=3) == 0.5
    assert recall_at_k(ranking, {"d1", "d2"}, k=4) == 1.0
    assert all_gold_at_k(ranking, ["d1", "d2"], k=3) == 0.0
    assert all_gold_at_k(ranking, ["d1", "d2"], k=4) == 1.0
    assert success_at_k(ranking, ["d1", "d2"], k=1) == 0.0
    assert success_at_k(ranking, ["d1", "d2"], k=2) == 1.0
    assert mrr_at_k(ranking, ["d2"], k=10) == 0.25
    assert mrr_at_k(ranking, ["d2"], k=3) == 0.0
    # The second chunk of d1 takes rank 3 and earns nothing; d2 stands at rank 4.
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert ndcg_of_ids(ranking, {"d1": 2, "d2": 1}, k=10) == pytest.approx(
        (2 / math.log2(3) + 1 / math.log2(5)) / ideal
    )
    assert ndcg_at_k([1.0], [1.0, 1.0], k=1) == 1.0
    assert ndcg_at_k([], [1.0], k=5) == 0.0


def test_unscorable_is_none() -> None:
    for metric in (recall_at_k, all_gold_at_k, success_at_k, mrr_at_k):
        assert metric(["d1"], [], k=5) is None
    assert ndcg_of_ids(["d1"], {}, k=5) is None
    assert ndcg_of_ids(["d1"], {"d1": 0.0}, k=5) is None


def test_bad_cut_offs_and_gains() -> None:
    for metric in (recall_at_k, all_gold_at_k, success_at_k, mrr_at_k):
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            metric(["d1"], ["d1"], k=0)
    with pytest.raises(ValueError, match="k must be"):
        ndcg_at_k([1.0], [1.0], k=0)
    for gain in (-1.0, math.nan):
        with pytest.raises(ValueError, match="gains must be 0 or more"):
            ndcg_at_k([gain], [1.0], k=3)
        with pytest.raises(ValueError, match="gains must be 0 or more"):
            ndcg_at_k([1.0], [gain], k=3)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ranking_metrics_agree_with_ir_measures(k: int) -> None:
    rng = random.Random(k)
    documents = [f"d{i}" for i in range(30)]
    gains, rankings = {}, {}
    for query in range(200):
        judged = rng.sample(documents, rng.randint(1, 12))
        gains[f"q{query}"] = {d: float(rng.randint(0, 3)) for d in judged} | {judged[0]: 1.0}
        rankings[f"q{query}"] = rng.sample(documents, rng.randint(1, 20))
    qrels = {query: {d: int(g) for d, g in judged.items()} for query, judged in gains.items()}
    run = {query: {d: -float(r) for r, d in enumerate(ranking)} for query, ranking in rankings.items()}
    measures = {
        ir_measures.nDCG @ k: lambda ranking, judged, _: ndcg_of_ids(ranking, judged, k=k),
        ir_measures.R @ k: lambda ranking, _, gold: recall_at_k(ranking, gold, k=k),
        ir_measures.RR @ k: lambda ranking, _, gold: mrr_at_k(ranking, gold, k=k),
        ir_measures.Success @ k: lambda ranking, _, gold: success_at_k(ranking, gold, k=k),
    }
    compared = 0
    for theirs in ir_measures.iter_calc(list(measures), qrels, run):
        judged = gains[theirs.query_id]
        gold = [d for d, gain in judged.items() if gain > 0]
        ours = measures[theirs.measure](rankings[theirs.query_id], judged, gold)
        assert ours == pytest.approx(theirs.value, abs=1e-6), (theirs.query_id, theirs.measure)
        compared += 1
    assert compared == 4 * 200


def test_paired_bootstrap_covers_what_theory_says() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0.0, 1.0, 400)
    change = rng.normal(0.1, 0.5, 400)
    low, high = paired_bootstrap(before, before + change, seed=1)
    error = 1.96 * change.std() / math.sqrt(400)
    assert low == pytest.approx(change.mean() - error, abs=0.01)
    assert high == pytest.approx(change.mean() + error, abs=0.01)
    narrow = paired_bootstrap(before, before + change, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_paired_bootstrap_is_paired_and_seeded() -> None:
    before, after = [0.0, 1.0] * 50, [0.5, 1.5] * 50
    assert paired_bootstrap(before, after) == (0.5, 0.5)  # the questions differ, their change does not
    noise = [float(i % 7) for i in range(100)]
    assert paired_bootstrap(before, noise, seed=3) == paired_bootstrap(before, noise, seed=3)
    assert paired_bootstrap(before, noise, seed=3) != paired_bootstrap(before, noise, seed=4)


def test_paired_bootstrap_needs_little_memory() -> None:
    before, after = np.zeros(10_000), (np.arange(10_000) % 2).astype(float)
    tracemalloc.start()
    low, high = paired_bootstrap(before, after, n_resamples=2_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < 0.5 < high
    assert peak < 64 * 2**20  # all 2,000 x 10,000 indices at once would be 160 MB


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ([0.0], [0.0, 1.0], {}, "same questions, got 1 and 2"),
        ([], [], {}, "at least one question"),
        ([math.nan], [0.0], {}, "finite"),
        ([0.0], [1.0], {"n_resamples": 0}, "n_resamples"),
        ([0.0], [1.0], {"level": 1.0}, "level"),
    ],
)
def test_paired_bootstrap_refuses(before: list[float], after: list[float], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(before, after, **options)
