"""Exact inner-product search straight over the memory-mapped vectors: nothing is copied, nothing is parsed.

FAISS' brute-force kernel takes any float32 matrix, so the index needs no FAISS file: the system's page cache is the
only copy of the vectors, shared by all processes of a machine, and there is no file format to be attacked through.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rag_rl.errors import MissingPackageError
from rag_rl.types import Array, IntArray


def import_faiss() -> Any:
    """The faiss module.

    Returns:
        The module.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingPackageError(
            "faiss is not installed: pip install 'rag-rl[cpu]', or 'rag-rl[gpu]' on a machine with CUDA"
        ) from error
    return faiss


class FlatBackend:
    """FAISS' exact search over a matrix.

    Args:
        matrix: (N, D) float32, C-contiguous; may be memory-mapped.

    Raises:
        MissingPackageError: faiss is not installed.
    """

    def __init__(self, matrix: Array) -> None:
        self._faiss = import_faiss()
        self._matrix = matrix

    def search(self, vectors: Array, top_k: int) -> tuple[Array, IntArray]:
        """The best rows of each query.

        Args:
            vectors: (B, D) float32.
            top_k: from 1 to N.

        Returns:
            Inner products (B, K) and rows (B, K), best first.
        """
        scores, rows = self._faiss.knn(vectors, self._matrix, top_k, metric=self._faiss.METRIC_INNER_PRODUCT)
        return scores, rows

    def close(self) -> None:
        """Nothing to let go of."""


def exact_search(matrix: Array, vectors: Array, top_k: int, *, block: int = 16_384) -> tuple[Array, IntArray]:
    """The same in numpy, for the few searches that check or complete an approximate one.

    Args:
        matrix: (N, D) float32.
        vectors: (B, D) float32.
        top_k: from 1 to N.
        block: rows of the matrix at a time; bounds the memory at B * block scores.

    Returns:
        Inner products (B, K) and rows (B, K), best first.
    """
    scores = np.empty((len(vectors), 0), dtype=np.float32)
    rows = np.empty((len(vectors), 0), dtype=np.int64)
    for start in range(0, len(matrix), block):
        fresh = vectors @ matrix[start : start + block].T  # (B, block)
        scores = np.concatenate([scores, fresh], axis=1)
        numbers = np.arange(start, start + fresh.shape[1], dtype=np.int64)
        rows = np.concatenate([rows, np.broadcast_to(numbers, fresh.shape)], axis=1)
        if scores.shape[1] > top_k:
            best = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
            scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
