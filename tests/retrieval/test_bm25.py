from __future__ import annotations

import math
import sys

import pytest

from rag_rl.errors import ConfigError, DataError, MissingPackageError
from rag_rl.types import Passage, Query

pytest.importorskip("bm25s", reason="bm25s is not installed")

from rag_rl.retrieval.bm25 import BM25Retriever, words_of

PASSAGES = [
    Passage("d0", "The river Mira flows past Elmton.", "Mira"),
    Passage("d1", "Elmton is a town. Elmton is old.", "Elmton"),
    Passage("d2", "Galton is a town by the sea."),
    Passage("d3", "Nothing of the kind."),
]


@pytest.fixture(scope="module")
def retriever() -> BM25Retriever:
    return BM25Retriever(PASSAGES)


def by_hand(query: str, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Lucene's BM25, spelt out."""
    texts = [words_of(p.contents) for p in PASSAGES]
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        total = 0.0
        for word in words_of(query):
            having = sum(word in other for other in texts)
            inverse = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            count = text.count(word)
            total += inverse * count / (count + k1 * (1 - b + b * len(text) / mean))
        scores.append(total)
    return scores


@pytest.mark.parametrize("query", ["Elmton", "Which town is old?", "the river of Galton", "is is is"])
def test_scores_are_those_of_the_formula(retriever, query):
    expected = by_hand(query)
    (hits,) = retriever.search([query], top_k=4)
    found = {hit.passage.doc_id: hit.score for hit in hits}
    assert found == pytest.approx({f"d{i}": score for i, score in enumerate(expected) if score > 0}, rel=1e-5)
    assert [hit.score for hit in hits] == sorted(found.values(), reverse=True)
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))


def test_what_shares_no_word_is_not_found(retriever):
    assert retriever.search(["zebra", ""], top_k=2) == [[], []]
    (hits,) = retriever.search(["zebra by the sea"], top_k=4)
    assert hits[0].passage.doc_id == "d2"


def test_top_k_exclude_and_queries_with_a_history(retriever):
    asked = [Query("Elmton", "Who rules Elmton?", (("a", "b"),)), "Elmton"]
    first, second = retriever.search(asked, top_k=1, exclude=[["d1"], []])
    assert [hit.passage.doc_id for hit in first] == ["d0"]
    assert [hit.passage.doc_id for hit in second] == ["d1"]


def test_equal_scores_keep_the_order_of_the_corpus():
    twins = [Passage(f"d{i}", "the same words") for i in range(50)]
    (hits,) = BM25Retriever(twins).search(["same"], top_k=3)
    assert [hit.passage.doc_id for hit in hits] == ["d0", "d1", "d2"]


def test_fingerprint_tells_corpora_and_settings_apart(retriever):
    assert retriever.fingerprint == BM25Retriever(PASSAGES).fingerprint
    assert retriever.fingerprint != BM25Retriever(PASSAGES[:3]).fingerprint
    assert retriever.fingerprint != BM25Retriever(PASSAGES, b=0.5).fingerprint


def test_bad_arguments(retriever):
    with pytest.raises(ConfigError, match="between 1 and 4, the number of passages, got 5"):
        retriever.search(["x"], top_k=5)
    with pytest.raises(ConfigError, match="exclude has 2 collections for 1 queries"):
        retriever.search(["x"], top_k=1, exclude=[[], []])
    for options in ({"k1": 0.0}, {"b": 1.5}):
        with pytest.raises(ConfigError, match="k1 above 0"):
            BM25Retriever(PASSAGES, **options)
    for empty in ([], [Passage("d0", "...")]):
        with pytest.raises(DataError, match="at least one word"):
            BM25Retriever(empty)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingPackageError, match=r"bm25s is not installed: pip install 'rag-rl\[bm25\]'"):
        BM25Retriever(PASSAGES)
