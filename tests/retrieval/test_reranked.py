"""Retrieve, rerank, keep: with scripted scores, and with a real cross-encoder over a real index."""

from __future__ import annotations

import pytest
import torch

from rag_rl.errors import BackendError, ConfigError
from rag_rl.retrieval import CachedRetriever, RerankedRetriever, StaticRetriever
from rag_rl.tiny import FOLDER
from rag_rl.types import Hit, Passage, Query, Retriever

PASSAGES = [Passage(f"d{i}", f"Text {i}.", "Title" if i == 2 else "") for i in range(6)]


class Scores:
    """Scores a pair by a table; remembers what it was asked."""

    fingerprint = "scores"

    def __init__(self, table: dict[str, float]) -> None:
        self.table, self.asked = table, []

    def predict(self, inputs, *, batch_size, activation_fn, show_progress_bar):
        self.asked.append((list(inputs), batch_size))
        return activation_fn(torch.tensor([self.table.get(text, 0.0) for _, text in inputs]))


@pytest.fixture
def static() -> StaticRetriever:
    return StaticRetriever({"one": PASSAGES, "two": PASSAGES[::-1]})


def ids(hits) -> list[str]:
    return [hit.passage.doc_id for hit in hits]


def test_candidates_are_found_scored_together_and_cut(static):
    scorer = Scores({"Text 3.": 2.0, "Title\nText 2.": 3.0, "Text 5.": 9.0})
    reranked = RerankedRetriever(static, scorer, candidates=4, batch_size=7)
    assert isinstance(reranked, Retriever)
    first, second = reranked.search(["one", Query("two", question="whole")], top_k=2)
    assert (ids(first), ids(second)) == (["d2", "d3"], ["d5", "d2"])
    assert [(hit.score, hit.rank) for hit in first] == [(3.0, 1), (2.0, 2)]
    ((pairs, size),) = scorer.asked
    assert (len(pairs), size) == (8, 7)
    assert pairs[2] == ("one", "Title\nText 2.")
    assert pairs[4] == ("two", "Text 5.")


def test_equal_scores_keep_the_retrievers_order(static):
    assert ids(RerankedRetriever(static, Scores({}), candidates=3).search(["two"], top_k=3)[0]) == ["d5", "d4", "d3"]


class Found:
    """Finds the same three documents for everything, with scores."""

    def search(self, queries, *, top_k, exclude=None):
        scored = zip(PASSAGES[:3], (0.9, 0.8, 0.1), strict=True)
        return [[Hit(p, score, rank) for rank, (p, score) in enumerate(scored, start=1)] for _ in queries]


def test_the_retrievers_score_has_a_part_in_the_order():
    # Standardised, the retriever's are 0.84, 0.56, -1.40, and the cross-encoder's -1.22, 0.00, 1.22.
    scorer = Scores({"Text 0.": 1.0, "Text 1.": 2.0, "Title\nText 2.": 3.0})
    orders = {
        weight: RerankedRetriever(Found(), scorer, candidates=3, retriever_weight=weight).search(["q"], top_k=3)[0]
        for weight in (0.0, 0.5, 1.0)
    }
    assert {weight: ids(hits) for weight, hits in orders.items()} == {
        0.0: ["d2", "d1", "d0"],
        0.5: ["d1", "d2", "d0"],
        1.0: ["d0", "d1", "d2"],
    }
    assert [hit.score for hit in orders[0.0]] == [3.0, 2.0, 1.0]
    own = [0.9 - 0.6, 0.8 - 0.6, 0.1 - 0.6]
    spread = (sum(x * x for x in own) / 3) ** 0.5
    assert orders[0.5][0].score == pytest.approx(0.5 * own[1] / spread)
    # Candidates that the cross-encoder does not tell apart keep the retriever's order.
    same = RerankedRetriever(Found(), Scores({}), candidates=3, retriever_weight=0.5)
    assert ids(same.search(["q"], top_k=3)[0]) == ["d0", "d1", "d2"]


def test_more_than_the_candidates_can_be_asked_for(static):
    assert len(RerankedRetriever(static, Scores({}), candidates=2).search(["one"], top_k=5)[0]) == 5


def test_excluded_documents_are_no_candidates(static):
    found = RerankedRetriever(static, Scores({"Text 1.": 5.0}), candidates=2).search(
        ["one"], top_k=2, exclude=[{"d0", "d1"}]
    )
    assert ids(found[0]) == ["d2", "d3"]


def test_nothing_asked_nothing_found(static):
    scorer = Scores({})
    assert RerankedRetriever(static, scorer, candidates=2).search([], top_k=1) == []
    assert RerankedRetriever(StaticRetriever({"x": []}), scorer, candidates=2).search(["x"], top_k=1) == [[]]
    assert scorer.asked == []


def test_scores_that_are_no_numbers_stop_it(static):
    with pytest.raises(BackendError, match="scores that are not numbers for 1 of 3 pairs, first for 'one'"):
        RerankedRetriever(static, Scores({"Text 1.": float("nan")}), candidates=3).search(["one"], top_k=1)


@pytest.mark.parametrize("options", [{"candidates": 0}, {"candidates": 1, "batch_size": 0}])
def test_numbers_that_mean_nothing(static, options):
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        RerankedRetriever(static, Scores({}), **options)
    with pytest.raises(ConfigError, match="retriever_top_k must be at least 1, got 0"):
        RerankedRetriever(static, Scores({}), candidates=1).search(["one"], top_k=0)
    with pytest.raises(ConfigError, match=r"reranker_retriever_weight must lie in \[0, 1\], got 1.5"):
        RerankedRetriever(static, Scores({}), candidates=1, retriever_weight=1.5)


def test_its_answers_can_be_cached(static):
    scorer = Scores({"Text 3.": 1.0})
    cached = CachedRetriever(RerankedRetriever(static, scorer, candidates=4))
    assert cached.search(["one"], top_k=2) == cached.search(["one"], top_k=2)
    assert len(scorer.asked) == 1
    other = RerankedRetriever(static, scorer, candidates=5)
    assert other.fingerprint != cached.fingerprint
    weighted = RerankedRetriever(static, scorer, candidates=4, retriever_weight=0.5)
    assert weighted.fingerprint != cached.fingerprint


def test_a_real_cross_encoder(static):
    from sentence_transformers import CrossEncoder

    torch.manual_seed(0)
    model = CrossEncoder(str(FOLDER / "encoder"), num_labels=1, device="cpu")
    reranked = RerankedRetriever(static, model, candidates=6, batch_size=2)
    (hits,) = reranked.search(["one"], top_k=6)
    expected = model.predict([("one", p.contents) for p in PASSAGES], activation_fn=torch.nn.Identity()).tolist()
    assert [hit.score for hit in hits] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert ids(hits) == [PASSAGES[i].doc_id for i in sorted(range(6), key=lambda i: -expected[i])]
    before = reranked.fingerprint
    assert reranked.fingerprint == before
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert reranked.fingerprint != before
