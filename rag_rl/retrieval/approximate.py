"""Approximate inner-product search with FAISS: a graph over the memory-mapped vectors, or lists of compressed ones.

The file of an index holds what the kind adds to the vectors: the links of the graph, or centroids and codes. It is
memory-mapped too. The vectors themselves stay where they are, in one place for every kind, so that training gathers
them and every score is the inner product of the vectors, whatever found it.

Such a file is read by FAISS' own C++ code, unlike that of a flat index: open only what you trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rag_rl.errors import IndexDamagedError
from rag_rl.retrieval.flat import import_faiss
from rag_rl.retrieval.index_settings import OF_SEARCH
from rag_rl.types import Array, IntArray

logger = logging.getLogger(__name__)

SUFFIX = ".faiss"
"""Of the file in the index folder."""

_SEED = 0
_ROWS_AT_ONCE = 16_384
# A killed build loses at most so much work on the graph or the lists, training not counted.
_SECONDS_BETWEEN_SAVES = 600.0
# Numbers gathered at a time when candidates are scored again: 64 MB.
_NUMBERS_AT_ONCE = 1 << 24


def file_name(settings: Mapping[str, Any]) -> str:
    """What the file of an index is called: another name for everything that is built in.

    Args:
        settings: as from ``IndexSettings.resolved``, of a kind that is not flat.

    Returns:
        A name that begins with the kind.

    Example:
        >>> file_name({"kind": "hnsw", "hnsw_m": 32, "ef_construction": 128, "ef_search": 64})
        'hnsw-9e17a612.faiss'
    """
    built = {name: value for name, value in settings.items() if name not in OF_SEARCH}
    number = hashlib.sha256(json.dumps(built, sort_keys=True).encode()).hexdigest()[:8]
    return f"{settings['kind']}-{number}{SUFFIX}"


def build_file(path: Path, matrix: Array, settings: Mapping[str, Any], *, tick: Callable[[int], Any]) -> None:
    """Builds the graph or the lists over the vectors, or goes on with what a killed build has saved.

    The vectors are read from the matrix in blocks. In memory are, for ``hnsw``, a copy of them and the graph; for
    ``ivf_pq`` the codes, and the sample during training. Where faiss-gpu and a GPU are there, the k-means of
    ``ivf_pq`` and the assignment to its lists run on all of them.

    Args:
        path: the file, finished where it holds all rows.
        matrix: (N, D) float32; may be memory-mapped.
        settings: as from ``IndexSettings.resolved``, of a kind that is not flat.
        tick: called with the number of rows after each block.

    Raises:
        OSError: the file cannot be written.
        MissingPackageError: faiss is not installed.
    """
    faiss = import_faiss()
    graph = settings["kind"] == "hnsw"
    saved = time.monotonic()
    index = _saved(faiss, path, matrix, graph=graph)
    if index is None:
        index = _empty_graph(faiss, matrix, settings) if graph else _trained_lists(faiss, matrix, settings)
    if graph:
        index.hnsw.efConstruction = settings["ef_construction"]
        add = index.add
    else:
        add = _adder(faiss, index)
    tick(index.ntotal)
    for start in range(index.ntotal, len(matrix), _ROWS_AT_ONCE):
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
            _save(faiss, index, path, graph=graph)
            saved = time.monotonic()
        block = np.ascontiguousarray(matrix[start : start + _ROWS_AT_ONCE])
        add(block)
        tick(len(block))
    _save(faiss, index, path, graph=graph)


def _empty_graph(faiss: Any, matrix: Array, settings: Mapping[str, Any]) -> Any:
    return faiss.IndexHNSWFlat(matrix.shape[1], settings["hnsw_m"], faiss.METRIC_INNER_PRODUCT)


def _trained_lists(faiss: Any, matrix: Array, settings: Mapping[str, Any]) -> Any:
    count, width = matrix.shape
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(width),
        width,
        settings["nlist"],
        settings["pq_m"],
        settings["pq_bits"],
        faiss.METRIC_INNER_PRODUCT,
    )
    size = min(settings["sample"], count)
    rows = np.random.default_rng(_SEED).choice(count, size, replace=False, shuffle=False)
    logger.info("training %d lists from %d vectors", settings["nlist"], size)
    # Of the same type as the quantizer itself, so that where there is no GPU nothing else happens than without it.
    index.clustering_index = kmeans = _on_gpus(faiss, faiss.IndexFlatIP(width))
    index.train(matrix[np.sort(rows)])
    index.clustering_index = None
    del kmeans
    return index


def _adder(faiss: Any, index: Any) -> Callable[[Array], None]:
    quantizer = _on_gpus(faiss, faiss.downcast_index(index.quantizer))

    def add(block: Array) -> None:
        _, lists = quantizer.search(block, 1)
        lists = np.ascontiguousarray(lists[:, 0])
        index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(lists), None)

    return add


def _on_gpus(faiss: Any, index: Any) -> Any:
    # faiss-cpu has neither the name nor a GPU.
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        return faiss.index_cpu_to_all_gpus(index)
    return index


def _save(faiss: Any, index: Any, path: Path, *, graph: bool) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        # Through Python's file: FAISS' own writer does not notice a disk that runs full with the last buffer.
        with temporary.open("wb") as file:
            flags = faiss.IO_FLAG_SKIP_STORAGE if graph else 0
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, 1 << 20), flags)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _saved(faiss: Any, path: Path, matrix: Array, *, graph: bool) -> Any:
    if not path.exists():
        return None
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        logger.warning("%s cannot be read (%s) and is built anew", path, _first_line(error))
        return None
    if index.ntotal > len(matrix):
        return None
    logger.info("%s: %d of %d vectors are done", path, index.ntotal, len(matrix))
    if graph:
        storage = faiss.IndexFlatIP(matrix.shape[1])
        for start in range(0, index.ntotal, _ROWS_AT_ONCE):
            storage.add(matrix[start : min(start + _ROWS_AT_ONCE, index.ntotal)])
        _set_storage(index, storage)
    return index


def _set_storage(index: Any, storage: Any) -> None:
    index.storage, index.own_fields = storage, False
    index.referenced_objects = [storage]  # FAISS' own name for what must live as long


def _over(faiss: Any, matrix: Array) -> Any:
    """A flat index over the memory of the matrix, without a copy; nothing can be added to it."""
    flat = faiss.IndexFlatIP(matrix.shape[1])
    nobody = faiss.MaybeOwnedVectorUInt8()  # lends its empty pointer to an owner: the memory is Python's
    memory = faiss.swig_ptr(matrix.view(np.uint8))
    flat.codes = faiss.MaybeOwnedVectorUInt8.create_view(memory, matrix.nbytes, nobody.owner)
    flat.ntotal = len(matrix)
    flat.referenced_objects = [matrix]
    return flat


class ApproximateBackend:
    """Search in a graph, or in lists of compressed vectors with exact scores at the end.

    Args:
        path: made by ``build_file``.
        matrix: (N, D) float32, C-contiguous, the same vectors; may be memory-mapped.
        settings: as from ``IndexSettings.resolved``, or with other values for the search.

    Raises:
        IndexDamagedError: the file cannot be read, or is of other vectors.
        MissingPackageError: faiss is not installed.
    """

    def __init__(self, path: Path, matrix: Array, settings: Mapping[str, Any]) -> None:
        self._faiss = faiss = import_faiss()
        self._matrix, self.settings = matrix, settings
        graph = settings["kind"] == "hnsw"
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IndexDamagedError(
                f"{path} cannot be read ({_first_line(error)}): delete the folder and build the index again"
            ) from error
        kind = faiss.IndexHNSWFlat if graph else faiss.IndexIVFPQ
        if not isinstance(index, kind) or (index.ntotal, index.d) != matrix.shape:
            raise IndexDamagedError(
                f"{path} holds a {type(index).__name__} of {index.ntotal} vectors of width {index.d}, expected "
                f"{kind.__name__}, {len(matrix)} and {matrix.shape[1]}: delete the folder and build the index again"
            )
        if graph:
            _set_storage(index, _over(faiss, matrix))
        self._index = index

    def search(self, vectors: Array, top_k: int) -> tuple[Array, IntArray]:
        """The best rows of each query, as far as they are found.

        Args:
            vectors: (B, D) float32.
            top_k: from 1 to N.

        Returns:
            Inner products (B, K) and rows (B, K), best first.
        """
        if self.settings["kind"] == "hnsw":
            asked = self._faiss.SearchParametersHNSW(efSearch=max(self.settings["ef_search"], top_k))
            scores, rows = self._index.search(vectors, top_k, params=asked)
        else:
            scores, rows = self._search_lists(vectors, top_k)
        # Not everything can be reached through the graph, nor lies in the lists that were looked into.
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = self._faiss.knn(
                vectors[short], self._matrix, top_k, metric=self._faiss.METRIC_INNER_PRODUCT
            )
        return scores, rows

    def _search_lists(self, vectors: Array, top_k: int) -> tuple[Array, IntArray]:
        candidates = min(len(self._matrix), top_k * self.settings["refine"])
        asked = self._faiss.SearchParametersIVF(nprobe=self.settings["nprobe"])
        scores = np.empty((len(vectors), top_k), dtype=np.float32)
        rows = np.empty((len(vectors), top_k), dtype=np.int64)
        step = max(1, _NUMBERS_AT_ONCE // (candidates * self._matrix.shape[1]))
        for start in range(0, len(vectors), step):
            block = vectors[start : start + step]
            _, found = self._index.search(block, candidates, params=asked)  # (b, candidates), -1 where there are fewer
            exact = np.matmul(self._matrix[found], block[:, :, None])[:, :, 0]
            exact[found < 0] = -np.inf
            best = np.argsort(-exact, axis=1, kind="stable")[:, :top_k]
            scores[start : start + step] = np.take_along_axis(exact, best, axis=1)
            rows[start : start + step] = np.take_along_axis(found, best, axis=1)
        return scores, rows

    def close(self) -> None:
        """Lets go of the file."""
        self._index = None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
