"""Dense retrieval over an index folder: opening it, with every check, and searching it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rag_rl.errors import ConfigError, IndexDamagedError, IndexMismatchError
from rag_rl.retrieval import chroma
from rag_rl.retrieval.approximate import SUFFIX, ApproximateBackend
from rag_rl.retrieval.build import open_matrix
from rag_rl.retrieval.encoder import Encoder
from rag_rl.retrieval.flat import FlatBackend
from rag_rl.retrieval.index_settings import IndexSettings
from rag_rl.retrieval.manifest import Manifest, check_encoder, read_manifest, unpack_vector, verify_files
from rag_rl.retrieval.passages import PassageStore
from rag_rl.types import Array, Hit, IntArray, Query

# An approximate backend may find a little less than on the day it was built (Chroma replays its last rows in any
# order; another processor rounds otherwise, and a walk through a graph takes another turn).
_MIN_PROBE_OVERLAP = 0.8
# Another device or precision moves a vector by far less, another model by far more.
_MAX_VECTOR_DRIFT = 0.1


class _Backend(Protocol):
    def search(self, vectors: Array, top_k: int) -> tuple[Array, IntArray]: ...

    def close(self) -> None: ...


def open_index(
    folder: str | Path,
    encoder: Encoder,
    *,
    chroma_url: str | None = None,
    index: IndexSettings | None = None,
) -> DenseRetriever:
    """Opens an index after checking that it is whole, fits the encoder and answers as it did when it was made.

    Every file is read once for its checksum: some damage (a cut Chroma graph) changes results without any error.

    Args:
        folder: an index folder made by ``build_index``.
        encoder: the encoder that made it.
        chroma_url: another address of the Chroma server than at building time.
        index: what kind of FAISS' index it must be; its parameters of the search are searched with, and enter the
            fingerprint. None: whatever it is.

    Returns:
        The retriever.

    Raises:
        IndexDamagedError: the folder is no finished index, or files are missing, cut or changed.
        IndexMismatchError: it was made with another encoder, or is of another kind.
        BackendError: the Chroma server does not answer.
        ConfigError: a server address for an index without Chroma, or a parameter of the search out of range.
        MissingPackageError: the backend's package is not installed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if chroma_url is not None and manifest.backend != "chroma":
        raise ConfigError(f"retriever_chroma_url {chroma_url}: the index {folder} has backend {manifest.backend}")
    check_encoder(f"the index {folder}", manifest.encoder, manifest.encoder_settings, encoder)
    searched = dict(manifest.index)
    if index is not None and index.kind != "flat" and manifest.backend != "faiss":
        raise IndexMismatchError(
            f"the index {folder} has backend {manifest.backend}, retriever_index {index.kind} is for faiss: leave it "
            "out, or build one in another folder"
        )
    if index is not None and manifest.backend == "faiss":
        searched = index.opened(manifest.index, f"the index {folder}")
    verify_files(folder, manifest)
    matrix = open_matrix(folder, manifest.dimension)
    backend: _Backend
    if manifest.backend == "chroma":
        url = chroma_url or manifest.chroma["url"]
        database = None if url else folder / manifest.chroma["folder"]
        client = chroma.connect(folder=database, url=url)
        backend = chroma.ChromaBackend(client, manifest.chroma["collection"], matrix, where=url or str(database))
    elif manifest.index:
        (name,) = [name for name in manifest.files if name.endswith(SUFFIX)]
        backend = ApproximateBackend(folder / name, matrix, manifest.index)
    else:
        backend = FlatBackend(matrix)
    retriever = DenseRetriever(folder, manifest, matrix, PassageStore(folder), backend, encoder)
    try:
        _run_probes(retriever, manifest)
    except (IndexDamagedError, IndexMismatchError):
        retriever.close()
        raise
    if isinstance(backend, ApproximateBackend):  # the probes are asked as they were, everything else as is wanted now
        backend.settings = searched
        retriever.manifest = dataclasses.replace(manifest, index=searched)
    return retriever


def _run_probes(retriever: DenseRetriever, manifest: Manifest) -> None:
    folder, matrix = retriever.folder, retriever.matrix
    if len(retriever.passages) != manifest.count or len(matrix) != manifest.count:
        raise IndexDamagedError(
            f"{folder} holds {len(retriever.passages)} passages and {len(matrix)} vectors, expected {manifest.count}: "
            "delete the folder and build the index again"
        )
    asked = unpack_vector(manifest.probes[0].vector)
    pairs = [
        ("query", retriever.encoder.encode_queries([manifest.probes[0].text])[0], asked),
        ("document", retriever.encoder.encode_documents([retriever.passages[0].contents])[0], matrix[0]),
    ]
    for what, here, there in pairs:
        if here.shape != there.shape or np.linalg.norm(here - there) > _MAX_VECTOR_DRIFT * max(
            float(np.linalg.norm(there)), 1e-12
        ):
            raise IndexMismatchError(
                f"the index {folder}: the encoder has the right fingerprint, yet its {what} vector is another "
                "one than when the index was made (another version of a library?): "
                "delete the folder and build the index again"
            )

    queries = np.stack([asked if p.row is None else matrix[p.row] for p in manifest.probes])
    expected_rows = np.array([p.rows for p in manifest.probes])
    expected_scores = np.array([p.scores for p in manifest.probes], dtype=np.float32)
    scores, rows = retriever.search_vectors(queries, top_k=expected_rows.shape[1])
    own = np.einsum("bd,bkd->bk", queries, retriever.vectors(rows))
    tolerance = 1e-3 * max(1.0, float(np.abs(expected_scores).max()))
    if manifest.backend == "faiss" and not manifest.index:
        # Equal scores may come in any order, so scores are compared and rows are not.
        sound = np.allclose(scores, expected_scores, atol=tolerance)
    else:
        overlap = [len(set(a) & set(b)) / len(a) for a, b in zip(rows.tolist(), expected_rows.tolist(), strict=True)]
        sound = float(np.mean(overlap)) >= _MIN_PROBE_OVERLAP
    if not sound or not np.allclose(scores, own, atol=tolerance):
        place = manifest.chroma.get("url") or folder
        raise IndexDamagedError(
            f"the index {folder}: its {manifest.backend} backend at {place} answers the stored queries differently "
            "than when it was made: delete the folder and build the index again"
        )


class DenseRetriever:
    """Searches an index folder: texts in, hits out (``Retriever``), or vectors in, rows out (``DenseIndex``).

    Made by ``open_index``.

    Args:
        folder: the index folder.
        manifest: what it holds.
        matrix: (N, D) float32, memory-mapped.
        passages: the texts.
        backend: does the search.
        encoder: makes query vectors.

    Attributes:
        fingerprint: of the index and of what makes the query vectors.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        matrix: Array,
        passages: PassageStore,
        backend: _Backend,
        encoder: Encoder,
    ) -> None:
        self.folder, self.manifest, self.matrix, self.passages = folder, manifest, matrix, passages
        self.encoder = encoder
        self._backend = backend

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def dimension(self) -> int:
        """Width D of the vectors."""
        return self.manifest.dimension

    @property
    def fingerprint(self) -> str:
        """The index' own, joined by the query encoder's where that is another one, or reads histories."""
        encoder = getattr(self.encoder, "query_fingerprint", None) or self.encoder.fingerprint
        if encoder == self.manifest.encoder:
            return self.manifest.fingerprint
        return hashlib.sha256(f"{self.manifest.fingerprint}\n{encoder}".encode()).hexdigest()

    def with_query_encoder(self, encoder: Encoder) -> DenseRetriever:
        """The same index, searched with the query vectors of another encoder, such as one trained against it.

        Args:
            encoder: gives vectors of the same width.

        Returns:
            A retriever that shares everything else with this one.

        Raises:
            IndexMismatchError: its vectors have another width.
        """
        if encoder.dimension != self.dimension:
            raise IndexMismatchError(
                f"the query encoder gives vectors of width {encoder.dimension}, "
                f"the index {self.folder} has {self.dimension}"
            )
        other = copy.copy(self)
        other.encoder = encoder
        return other

    def encode_queries(self, queries: Sequence[str | Query]) -> Array:
        """Query vectors.

        Args:
            queries: B queries.

        Returns:
            (B, D) float32.
        """
        return self.encoder.encode_queries(queries)

    def vectors(self, rows: IntArray) -> Array:
        """Document vectors, in one gather.

        Args:
            rows: any shape, usually (B, K), from 0 to N - 1.

        Returns:
            (B, K, D) float32, a copy.

        Raises:
            IndexError: a row outside of the index.
        """
        rows = np.asarray(rows)
        if rows.size and int(rows.min()) < 0:
            raise IndexError(f"row {int(rows.min())} of {len(self)} vectors")
        return self.matrix[rows]

    def search_vectors(self, vectors: Array, *, top_k: int) -> tuple[Array, IntArray]:
        """The best rows of each query vector.

        Args:
            vectors: (B, D).
            top_k: K, from 1 to N.

        Returns:
            Inner products (B, K) float32 and rows (B, K) int64, best first.

        Raises:
            ConfigError: ``top_k`` is out of range.
            IndexMismatchError: the vectors have another width.
            BackendError: the backend failed.
        """
        self._check_top_k(top_k)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise IndexMismatchError(
                f"query vectors have shape {vectors.shape}, the index {self.folder} needs (B, {self.dimension})"
            )
        if not len(vectors):
            return np.empty((0, top_k), dtype=np.float32), np.empty((0, top_k), dtype=np.int64)
        return self._backend.search(vectors, top_k)

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The best passages of each query.

        Args:
            queries: B queries.
            top_k: how many, from 1 to N.
            exclude: B collections of document ids that must not be returned; others fill their places.

        Returns:
            A list of hits a query, best first; shorter than ``top_k`` only where ``exclude`` leaves fewer.

        Raises:
            ConfigError: ``top_k`` is out of range, or ``exclude`` has another length than ``queries``.
            BackendError: the backend failed.
        """
        self._check_top_k(top_k)
        _check_exclude(len(queries), exclude)
        if not queries:
            return []
        return self.search_hits(self.encode_queries(queries), top_k=top_k, exclude=exclude)

    def search_hits(
        self,
        vectors: Array,
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
        passage_rows: IntArray | None = None,
    ) -> list[list[Hit]]:
        """As ``search``, from query vectors, for callers that mix or train them.

        Args:
            vectors: (B, D).
            top_k: how many, from 1 to N.
            exclude: B collections of document ids that must not be returned.
            passage_rows: (N,) which passage is returned for each row; None: its own. For control experiments.

        Returns:
            A list of hits a query, best first.

        Raises:
            ConfigError: ``top_k`` is out of range, or ``exclude`` has another length than ``vectors``.
            BackendError: the backend failed.
        """
        _check_exclude(len(vectors), exclude)
        if exclude is None or not any(exclude):
            scores, rows = self.search_vectors(vectors, top_k=top_k)
            return self._hits(scores, rows, passage_rows)

        results: list[list[Hit]] = [[] for _ in range(len(vectors))]
        pending = list(range(len(vectors)))
        self._check_top_k(top_k)
        wanted = min(len(self), top_k + max(len(ids) for ids in exclude))
        # A document may have many chunks, so the first guess can be too low; only queries that came short ask again.
        while pending:
            scores, rows = self.search_vectors(vectors[pending], top_k=wanted)
            short = []
            for place, hits in zip(pending, self._hits(scores, rows, passage_rows), strict=True):
                kept = [hit for hit in hits if hit.passage.doc_id not in exclude[place]][:top_k]
                for rank, hit in enumerate(kept, start=1):
                    hit.rank = rank
                results[place] = kept
                if len(kept) < top_k:
                    short.append(place)
            if wanted == len(self):
                break
            pending, wanted = short, min(len(self), wanted * 2)
        return results

    def close(self) -> None:
        """Lets go of the backend and the files; retrievers made by ``with_query_encoder`` share them."""
        self._backend.close()
        self.passages.close()

    def _check_top_k(self, top_k: int) -> None:
        if not 1 <= top_k <= len(self):
            raise ConfigError(
                f"retriever_top_k must be between 1 and {len(self)}, the number of passages in {self.folder}, "
                f"got {top_k}"
            )

    def _hits(self, scores: Array, rows: IntArray, passage_rows: IntArray | None) -> list[list[Hit]]:
        if passage_rows is not None:
            rows = passage_rows[rows]
        width = rows.shape[1]
        passages = self.passages.take(rows.ravel().tolist())
        flat = list(map(Hit, passages, scores.ravel().tolist(), list(range(1, width + 1)) * len(rows)))
        return [flat[start : start + width] for start in range(0, len(flat), width)]


def _check_exclude(count: int, exclude: Sequence[Collection[str]] | None) -> None:
    if exclude is None:
        return
    if len(exclude) != count:
        raise ConfigError(f"exclude must have one collection of doc ids a query: {len(exclude)} for {count} queries")
    if any(isinstance(ids, str) for ids in exclude):
        raise ConfigError("exclude must have collections of doc ids, got a string: write ['id'] instead of 'id'")
