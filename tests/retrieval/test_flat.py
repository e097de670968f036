from __future__ import annotations

import numpy as np
import pytest

from rag_rl.errors import MissingPackageError
from rag_rl.retrieval import flat


@pytest.fixture
def vectors():
    rng = np.random.default_rng(1)
    return rng.standard_normal((1000, 16)).astype(np.float32), rng.standard_normal((7, 16)).astype(np.float32)


def test_faiss_equals_its_flat_index_on_a_mapped_file(tmp_path, vectors):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    matrix, queries = vectors
    matrix.tofile(tmp_path / "v")
    mapped = np.memmap(tmp_path / "v", dtype=np.float32, mode="r").reshape(-1, 16)
    index = faiss.IndexFlatIP(16)
    index.add(matrix)
    expected_scores, expected_rows = index.search(queries, 10)
    scores, rows = flat.FlatBackend(mapped).search(queries, 10)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


@pytest.mark.parametrize("block", [7, 999, 1000, 5000])
@pytest.mark.parametrize("top_k", [1, 10, 1000])
def test_exact_search_equals_sorting_everything(vectors, block, top_k):
    matrix, queries = vectors
    scores, rows = flat.exact_search(matrix, queries, top_k, block=block)
    every = queries @ matrix.T
    np.testing.assert_array_equal(rows, np.argsort(-every, axis=1)[:, :top_k])
    np.testing.assert_allclose(scores, -np.sort(-every, axis=1)[:, :top_k], rtol=1e-4, atol=1e-5)


def test_missing_faiss_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingPackageError, match=r"faiss is not installed: pip install 'rag-rl\[cpu\]'"):
        flat.import_faiss()
