"""Chroma as the search backend: embedded in the index folder, or a server.

Chroma holds vectors and row numbers only; texts stay in the index folder. Its search is approximate (HNSW).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rag_rl.errors import BackendError, ConfigError, IndexDamagedError, MissingPackageError
from rag_rl.retrieval.flat import exact_search
from rag_rl.types import Array, IntArray

# A bound on the reply: Chroma answers one request as one JSON document.
_QUERIES_PER_REQUEST = 1024
_REMEDY = "delete the index folder and build the index again"


def import_chromadb() -> Any:
    """The chromadb module.

    Returns:
        The module.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import chromadb
    except ImportError as error:
        raise MissingPackageError("chromadb is not installed: pip install 'rag-rl[cpu]' (or [gpu])") from error
    return chromadb


@contextmanager
def _chroma_errors(where: str, doing: str) -> Iterator[None]:
    """Turns whatever Chroma and its HTTP client raise into one error that names the place."""
    import httpx
    from chromadb.errors import ChromaError

    try:
        yield
    except (ChromaError, httpx.HTTPError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackendError(f"Chroma at {where} failed to {doing}: {reason}") from error


def connect(*, folder: Path | None = None, url: str | None = None) -> Any:
    """A Chroma client, telemetry off.

    Args:
        folder: folder of an embedded database.
        url: address of a server, ``http://host:port``; one of the two is given.

    Returns:
        The client.

    Raises:
        BackendError: no server answers at the address, or the database does not open.
        ConfigError: the address is none.
    """
    chromadb = import_chromadb()
    settings = chromadb.config.Settings(anonymized_telemetry=False)
    if url is None:
        with _chroma_errors(str(folder), "open its database"):
            return chromadb.PersistentClient(str(folder), settings=settings)
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 8000)
    except ValueError as error:
        raise ConfigError(f"retriever_chroma_url {url!r} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"retriever_chroma_url must look like http://127.0.0.1:8000, got {url!r}")
    import httpx

    try:
        return chromadb.HttpClient(host=parts.hostname, port=port, ssl=parts.scheme == "https", settings=settings)
    except (ValueError, OSError, httpx.HTTPError, chromadb.errors.ChromaError) as error:
        raise BackendError(
            f"no Chroma server answers at {url}; start one with: "
            f"chroma run --path FOLDER --host {parts.hostname} --port {port}"
        ) from error


def fill(
    client: Any, collection: str, matrix: Array, *, where: str, batch_size: int, tick: Callable[[int], None]
) -> None:
    """Puts every vector into a collection, under its row number as id.

    A collection that is partly filled, by a build that was killed, is filled up.

    Args:
        client: from ``connect``.
        collection: its name, 3 to 512 characters.
        matrix: (N, D) float32.
        where: the place, for messages.
        batch_size: rows a request; capped by what the client accepts.
        tick: called with the number of rows after each request.

    Raises:
        BackendError: Chroma failed (disk full, server gone).
    """
    with _chroma_errors(where, "store the vectors"):
        # Inner product, so that 1 - distance is the score of the other backend as well. Chroma's graph goes to disk
        # after sync_threshold writes (at least 2): a smaller collection would have a file that each opening makes
        # anew, and that no checksum fits.
        hnsw = {
            "space": "ip",
            "sync_threshold": max(2, min(1000, len(matrix))),
            "batch_size": max(2, min(100, len(matrix))),
        }
        target = client.get_or_create_collection(collection, configuration={"hnsw": hnsw}, embedding_function=None)
        step = min(batch_size, client.get_max_batch_size())
        # Rows go in ascending and a request is one transaction; one request more is sent again to be safe.
        first = max(0, target.count() - step)
        tick(first)
        for start in range(first, len(matrix), step):
            block = np.ascontiguousarray(matrix[start : start + step])
            # upsert: add() ignores ids that are there already, without a word.
            ids = [str(row) for row in range(start, start + len(block))]
            target.upsert(ids=ids, embeddings=block)
            if len(matrix) == 1:
                target.upsert(ids=ids, embeddings=block)  # the second write that the threshold asks for
            tick(len(block))


class ChromaBackend:
    """Approximate search in a Chroma collection.

    Args:
        client: from ``connect``.
        collection: its name.
        matrix: (N, D) float32, the same vectors; completes answers that come short.
        where: the place, for messages.

    Raises:
        IndexDamagedError: the collection is not there or has another size.
        BackendError: Chroma failed.
    """

    def __init__(self, client: Any, collection: str, matrix: Array, *, where: str) -> None:
        from chromadb.errors import NotFoundError

        self._client, self._matrix, self._where = client, matrix, where
        try:
            with _chroma_errors(where, "open the collection"):
                self._collection = client.get_collection(collection, embedding_function=None)
                count = self._collection.count()
        except BackendError as error:
            if isinstance(error.__cause__, NotFoundError):
                raise IndexDamagedError(f"Chroma at {where} has no collection {collection}: {_REMEDY}") from error
            raise
        if count != len(matrix):
            raise IndexDamagedError(
                f"the collection {collection} of Chroma at {where} holds {count} vectors, "
                f"expected {len(matrix)}: {_REMEDY}"
            )

    def search(self, vectors: Array, top_k: int) -> tuple[Array, IntArray]:
        """The best rows of each query, found approximately.

        Args:
            vectors: (B, D) float32.
            top_k: from 1 to N.

        Returns:
            Inner products (B, K) and rows (B, K), best first.

        Raises:
            BackendError: Chroma failed.
        """
        scores = np.empty((len(vectors), top_k), dtype=np.float32)
        rows = np.empty((len(vectors), top_k), dtype=np.int64)
        for start in range(0, len(vectors), _QUERIES_PER_REQUEST):
            block = vectors[start : start + _QUERIES_PER_REQUEST]
            with _chroma_errors(self._where, "search"):
                reply = self._collection.query(query_embeddings=block, n_results=top_k, include=["distances"])
            # The graph may reach fewer rows than were asked for; those queries are searched exactly.
            short = [place for place, found in enumerate(reply["ids"]) if len(found) < top_k]
            for place in short:
                best, found = exact_search(self._matrix, block[place : place + 1], top_k)
                reply["ids"][place], reply["distances"][place] = found[0].tolist(), (1.0 - best[0]).tolist()
            rows[start : start + len(block)] = [[int(row) for row in found] for found in reply["ids"]]
            scores[start : start + len(block)] = reply["distances"]
        np.subtract(1.0, scores, out=scores)
        return scores, rows

    def close(self) -> None:
        """Closes the client."""
        self._client.close()
