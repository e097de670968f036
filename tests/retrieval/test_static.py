from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.retrieval import ShuffledRetriever, StaticRetriever, build_index, open_index
from rag_rl.types import Passage, Query, Retriever

A, B, C = Passage("a", "1"), Passage("b", "2"), Passage("c", "3")


def test_static_answers():
    retriever = StaticRetriever({"q": [A, B, C], "r": []})
    assert isinstance(retriever, Retriever)
    first, second, third = retriever.search(["q", "r", Query("q", question="?")], top_k=2)
    assert [(hit.passage, hit.score, hit.rank) for hit in first] == [(A, 1.0, 1), (B, 0.5, 2)]
    assert second == []
    assert third == first
    excluded = retriever.search(["q"], top_k=2, exclude=[{"a"}])[0]
    assert [(hit.passage, hit.rank) for hit in excluded] == [(B, 1), (C, 2)]


def test_static_unknown_query():
    with pytest.raises(DataError, match="no passages for the query 'z'"):
        StaticRetriever({"q": [A]}).search(["z"], top_k=1)
    assert StaticRetriever({}, default=[B]).search(["z"], top_k=1)[0][0].passage is B


def test_static_bad_arguments():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        StaticRetriever({"q": [A]}).search(["q"], top_k=0)
    with pytest.raises(ConfigError, match="0 collections for 1 queries"):
        StaticRetriever({"q": [A]}).search(["q"], top_k=1, exclude=[])


def test_static_fingerprint():
    assert StaticRetriever({"q": [A]}).fingerprint == StaticRetriever({"q": [A]}).fingerprint
    assert StaticRetriever({"q": [A]}).fingerprint != StaticRetriever({"q": [B]}).fingerprint
    assert StaticRetriever({"q": [A]}).fingerprint != StaticRetriever({"q": [A]}, default=[]).fingerprint


@pytest.fixture
def dense(tmp_path, corpus, encoder):
    pytest.importorskip("faiss", reason="faiss is not installed")
    build_index(corpus(100), encoder, tmp_path / "i", progress=False)
    return open_index(tmp_path / "i", encoder)


def test_shuffled_keeps_scores_and_loses_texts(dense):
    queries = [f"alpha{i} beta{i * 7} gamma{i * 13} title {i}" for i in range(20)]
    right = dense.search(queries, top_k=5)
    wrong = ShuffledRetriever(dense, seed=0).search(queries, top_k=5)
    for i, (good, bad) in enumerate(zip(right, wrong, strict=True)):
        assert good[0].passage.doc_id == f"d{i}"
        assert [hit.score for hit in bad] == [hit.score for hit in good]
        assert [hit.rank for hit in bad] == [1, 2, 3, 4, 5]
        # Position by position, never the right text.
        assert all(b.passage != g.passage for g, b in zip(good, bad, strict=True))
        assert bad[0].passage.doc_id != f"d{i}"


def test_shuffled_permutes_the_whole_corpus(dense):
    hits = ShuffledRetriever(dense, seed=3).search(["alpha1"], top_k=100)[0]
    assert len({hit.passage.doc_id for hit in hits}) == 100


def test_shuffled_is_a_function_of_the_seed(dense):
    def texts(seed):
        return [h.passage.doc_id for h in ShuffledRetriever(dense, seed=seed).search(["alpha1"], top_k=10)[0]]

    assert texts(1) == texts(1) != texts(2)
    prints = {ShuffledRetriever(dense, seed=s).fingerprint for s in (1, 2)} | {dense.fingerprint}
    assert len(prints) == 3


def test_shuffled_excludes_what_it_returns(dense):
    shuffled = ShuffledRetriever(dense, seed=0)
    hits = shuffled.search(["alpha1"], top_k=5)[0]
    banned = [hit.passage.doc_id for hit in hits[:3]]
    kept = shuffled.search(["alpha1"], top_k=5, exclude=[banned])[0]
    assert [h.passage for h in kept[:2]] == [h.passage for h in hits[3:]]
    assert len(kept) == 5
    assert shuffled.search([], top_k=5) == []


def test_shuffled_needs_two_passages(tmp_path, encoder):
    pytest.importorskip("faiss", reason="faiss is not installed")
    build_index([A], encoder, tmp_path / "one", progress=False)
    with pytest.raises(ConfigError, match="at least 2 passages"):
        ShuffledRetriever(open_index(tmp_path / "one", encoder))
