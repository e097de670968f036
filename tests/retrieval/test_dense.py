from __future__ import annotations

import shutil

import numpy as np
import pytest

from rag_rl.errors import BackendError, ConfigError, IndexDamagedError, IndexMismatchError
from rag_rl.retrieval import DenseRetriever, build_index, open_index
from rag_rl.retrieval.manifest import write_manifest
from rag_rl.types import DenseIndex, Query, Retriever

pytest.importorskip("faiss", reason="faiss is not installed")


@pytest.fixture
def folder(tmp_path, passages, encoder):
    build_index(passages, encoder, tmp_path / "index", progress=False)
    return tmp_path / "index"


@pytest.fixture
def index(folder, encoder) -> DenseRetriever:
    return open_index(folder, encoder)


def words(i):
    return f"alpha{i} beta{i * 7} gamma{i * 13} title {i}"


def test_protocols_and_size(index, passages):
    assert isinstance(index, Retriever)
    assert isinstance(index, DenseIndex)
    assert len(index) == 300
    assert index.dimension == 32
    assert index.passages[17] == passages[17]


def test_search_equals_brute_force(index, passages, encoder):
    queries = [words(i) for i in range(0, 300, 7)]
    matrix = encoder._encode([p.contents for p in passages])
    scores = encoder.encode_queries(queries) @ matrix.T
    for row, hits in zip(scores, index.search(queries, top_k=10), strict=True):
        assert [h.passage for h in hits] == [passages[i] for i in np.argsort(-row)[:10]]
        np.testing.assert_allclose([h.score for h in hits], -np.sort(-row)[:10], rtol=1e-5)
        assert [h.rank for h in hits] == list(range(1, 11))
        assert all(type(h.score) is float for h in hits)


def test_search_of_one_query_equals_search_in_a_batch(index):
    queries = [words(i) for i in range(30)]
    batch = index.search(queries, top_k=5)
    for query, hits in zip(queries, batch, strict=True):
        alone = index.search([query], top_k=5)[0]
        assert [h.passage for h in alone] == [h.passage for h in hits]


def test_query_objects_are_read_by_their_text(index):
    assert index.search([Query(words(3), question="other")], top_k=3) == index.search([words(3)], top_k=3)


def test_vectors_is_one_gather(index, passages, encoder):
    rows = np.array([[0, 299], [5, 5]])
    got = index.vectors(rows)
    assert got.shape == (2, 2, 32)
    assert got.dtype == np.float32
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got[0, 1], encoder._encode([passages[299].contents])[0])
    # Nothing was read into memory: the matrix lies over the file.
    assert not index.matrix.flags.owndata
    assert not index.matrix.flags.writeable
    for bad in (-1, 300):
        with pytest.raises(IndexError):
            index.vectors(np.array([bad]))


def test_search_vectors(index):
    vectors = index.encode_queries([words(4), words(5)])
    scores, rows = index.search_vectors(vectors, top_k=3)
    assert scores.shape == rows.shape == (2, 3)
    assert rows.dtype == np.int64
    assert rows[:, 0].tolist() == [4, 5]
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", vectors, index.vectors(rows)), rtol=1e-5)
    assert index.search_vectors(vectors[:0], top_k=3)[1].shape == (0, 3)
    # What numpy arithmetic makes of vectors: float64, another memory order.
    _, again = index.search_vectors(np.asfortranarray(vectors.astype(np.float64)), top_k=3)
    np.testing.assert_array_equal(again, rows)


@pytest.mark.parametrize("shape", [(2, 31), (32,), (1, 2, 32)])
def test_vectors_of_another_width(index, shape):
    with pytest.raises(IndexMismatchError, match=r"needs \(B, 32\)"):
        index.search_vectors(np.zeros(shape), top_k=1)


@pytest.mark.parametrize("top_k", [0, -1, 301])
def test_top_k_out_of_range(index, top_k):
    for call in (lambda: index.search(["a"], top_k=top_k), lambda: index.search([], top_k=top_k)):
        with pytest.raises(ConfigError, match=f"retriever_top_k must be between 1 and 300.*got {top_k}"):
            call()


def test_no_queries(index):
    assert index.search([], top_k=3) == []


def test_all_passages(index):
    hits = index.search(["alpha1"], top_k=300)[0]
    assert len({h.passage.doc_id for h in hits}) == 300


def test_exclude_is_filled_up(index):
    queries = [words(i) for i in range(10)]
    full = index.search(queries, top_k=20)
    exclude = [[h.passage.doc_id for h in hits[:i]] for i, hits in enumerate(full)]
    got = index.search(queries, top_k=10, exclude=exclude)
    for i, (hits, before) in enumerate(zip(got, full, strict=True)):
        assert [h.passage for h in hits] == [h.passage for h in before[i : i + 10]]
        assert [h.rank for h in hits] == list(range(1, 11))


def test_exclude_of_documents_with_many_chunks(tmp_path, corpus, encoder):
    build_index(corpus(300, 100), encoder, tmp_path / "i", progress=False)
    index = open_index(tmp_path / "i", encoder)
    hits = index.search([words(5), words(250)], top_k=30, exclude=[["d0"], {"d0", "d1"}])
    assert [len(h) for h in hits] == [30, 30]
    assert {h.passage.doc_id for h in hits[0]} <= {"d1", "d2"}
    assert {h.passage.doc_id for h in hits[1]} == {"d2"}
    # Fewer are left than were asked for: those, and no error.
    left = index.search([words(5)], top_k=150, exclude=[["d0", "d1"]])[0]
    assert len(left) == 100
    assert left[-1].rank == 100
    assert index.search([words(5)], top_k=3, exclude=[["d0", "d1", "d2"]]) == [[]]


def test_bad_exclude(index):
    with pytest.raises(ConfigError, match="1 for 2 queries"):
        index.search(["a", "b"], top_k=1, exclude=[[]])
    with pytest.raises(ConfigError, match="got a string"):
        index.search(["a"], top_k=1, exclude=["d1"])


def test_opening_embeds_next_to_nothing(folder, stub):
    fresh = stub()
    open_index(folder, fresh)
    assert len(fresh.documents) == 1
    assert fresh.query_calls == 1


def test_wrong_encoder(folder, stub):
    with pytest.raises(IndexMismatchError, match=r"another encoder .*seed 0 there, 1 here"):
        open_index(folder, stub(seed=1))
    with pytest.raises(IndexMismatchError, match="dimension 32 there, 16 here"):
        open_index(folder, stub(dimension=16))


@pytest.mark.parametrize(("side", "said"), [("encode_queries", "query"), ("encode_documents", "document")])
def test_same_fingerprint_and_other_vectors(folder, encoder, monkeypatch, side, said):
    original = getattr(encoder, side)
    monkeypatch.setattr(encoder, side, lambda texts: -original(texts))
    with pytest.raises(IndexMismatchError, match=f"its {said} vector is another one"):
        open_index(folder, encoder)


@pytest.mark.parametrize("name", ["vectors.f32", "passages.jsonl", "passages.ends", "manifest.json"])
@pytest.mark.parametrize("damage", ["garbage", "same size", "one bit", "truncated", "empty", "deleted", "longer"])
def test_damage_is_found_and_named(folder, encoder, name, damage):
    path = folder / name
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "garbage": b"garbage" * 100,
        "same size": bytes(b ^ 0x5A for b in content),
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "truncated": content[:middle],
        "empty": b"",
        "longer": content + b"\0",
    }
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(IndexDamagedError) as caught:
        open_index(folder, encoder)
    assert str(path) in str(caught.value)
    assert "build" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_probe_that_fails(folder, encoder, index):
    """A backend that answers wrongly although every file is sound, as a Chroma server might."""
    from dataclasses import replace

    probes = [replace(p, scores=[s - 0.5 for s in p.scores]) for p in index.manifest.probes]
    write_manifest(folder, replace(index.manifest, probes=probes))
    with pytest.raises(IndexDamagedError, match="answers the stored queries differently"):
        open_index(folder, encoder)


def test_no_folder(tmp_path, encoder):
    with pytest.raises(IndexDamagedError, match=r"manifest\.json is missing"):
        open_index(tmp_path / "nowhere", encoder)


def test_a_moved_index_opens(folder, encoder, tmp_path):
    before = open_index(folder, encoder).search([words(9)], top_k=3)
    shutil.move(folder, tmp_path / "elsewhere")
    assert open_index(tmp_path / "elsewhere", encoder).search([words(9)], top_k=3) == before


def test_chroma_url_without_chroma(folder, encoder):
    with pytest.raises(ConfigError, match="has backend faiss"):
        open_index(folder, encoder, chroma_url="http://127.0.0.1:1")


def test_fingerprint_is_of_content(tmp_path, folder, passages, encoder, index):
    build_index(passages, encoder, tmp_path / "again", batch_size=7, progress=False)
    assert open_index(tmp_path / "again", encoder).fingerprint == index.fingerprint
    build_index(passages[:-1], encoder, tmp_path / "less", progress=False)
    assert open_index(tmp_path / "less", encoder).fingerprint != index.fingerprint


def test_another_query_encoder(index, stub):
    trained = stub()
    trained._table = trained._table + 0.01
    other = index.with_query_encoder(_Renamed(trained))
    assert other.fingerprint != index.fingerprint
    assert other.passages is index.passages
    assert other.search([words(3)], top_k=1)[0][0].passage.doc_id == "d3"
    assert index.with_query_encoder(index.encoder).fingerprint == index.fingerprint
    with pytest.raises(IndexMismatchError, match="width 16"):
        index.with_query_encoder(stub(dimension=16))


class _Renamed:
    fingerprint = "trained"

    def __init__(self, inner):
        self.dimension, self.encode_queries, self.encode_documents = (
            inner.dimension,
            inner.encode_queries,
            inner.encode_documents,
        )


def test_errors_of_the_encoder_pass_through(index, monkeypatch):
    def broken(queries):
        raise BackendError("no device")

    monkeypatch.setattr(index.encoder, "encode_queries", broken)
    with pytest.raises(BackendError, match="no device"):
        index.search(["a"], top_k=1)
