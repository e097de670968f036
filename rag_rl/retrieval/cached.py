"""A retriever that remembers: retrieval for a dataset happens once, however many epochs or runs read it."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from rag_rl.errors import BackendError, ConfigError
from rag_rl.types import Hit, Passage, Query

# Below sqlite's oldest limit on the parameters of one statement.
_KEYS_PER_STATEMENT = 500


class _Fingerprinted(Protocol):
    @property
    def fingerprint(self) -> str: ...

    def search(
        self, queries: Sequence[str | Query], *, top_k: int, exclude: Sequence[Collection[str]] | None = None
    ) -> list[list[Hit]]: ...


class CachedRetriever:
    """Answers repeated searches from memory or disk; only what is new reaches the retriever, in one batch.

    The key is (fingerprint of the retriever, query with its question and history, k, excluded ids), so a change of the
    index or of the encoder never meets an old answer. A search that fails stores nothing.

    Args:
        retriever: any retriever with a ``fingerprint``.
        folder: where answers outlive the process; None: in memory only. Several processes of one machine may share it
            (sqlite in WAL mode: not on a network file system).
        max_in_memory: how many answers are held in memory.

    Raises:
        ConfigError: the retriever has no fingerprint.
        BackendError: the cache file cannot be opened.
    """

    def __init__(
        self, retriever: _Fingerprinted, folder: str | Path | None = None, *, max_in_memory: int = 50_000
    ) -> None:
        if not hasattr(retriever, "fingerprint"):
            raise ConfigError(f"{type(retriever).__name__} has no fingerprint, so its answers cannot be cached")
        self.retriever = retriever
        self._memory: OrderedDict[bytes, list[Hit]] = OrderedDict()
        self._max_in_memory = max_in_memory
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._local = threading.local()
        if folder is not None:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BackendError(f"cannot make the retrieval cache folder {folder}: {error.strerror}") from error
            self._path = Path(folder) / "hits.sqlite3"
            self._database()

    @property
    def fingerprint(self) -> str:
        """The retriever's own: a cache changes no answer."""
        return self.retriever.fingerprint

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The retriever's answers, old or new.

        Args:
            queries: B queries.
            top_k: how many hits a query.
            exclude: B collections of document ids that must not be returned.

        Returns:
            A list of hits a query, best first.

        Raises:
            ConfigError: ``exclude`` has another length than ``queries``.
            BackendError: the cache file fails.
        """
        if exclude is not None and len(exclude) != len(queries):
            raise ConfigError(f"exclude has {len(exclude)} collections for {len(queries)} queries")
        excluded: Sequence[Collection[str]] = exclude if exclude is not None else [()] * len(queries)
        fingerprint = self.retriever.fingerprint
        keys = [_key(fingerprint, query, top_k, ids) for query, ids in zip(queries, excluded, strict=True)]
        known = self._load(keys)
        # A query that occurs twice in the batch is searched once.
        missing = {key: place for place, key in reversed(list(enumerate(keys))) if key not in known}
        if missing:
            places = sorted(missing.values())
            found = self.retriever.search(
                [queries[place] for place in places],
                top_k=top_k,
                exclude=None if exclude is None else [excluded[place] for place in places],
            )
            fresh = {keys[place]: hits for place, hits in zip(places, found, strict=True)}
            self._store(fresh)
            known.update(fresh)
        return [[Hit(hit.passage, hit.score, hit.rank) for hit in known[key]] for key in keys]

    def close(self) -> None:
        """Closes this thread's connection to the cache file."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _load(self, keys: Sequence[bytes]) -> dict[bytes, list[Hit]]:
        known = {}
        with self._lock:
            for key in keys:
                if key in self._memory:
                    self._memory.move_to_end(key)
                    known[key] = self._memory[key]
        rest = list({key for key in keys if key not in known})
        if self._path is None or not rest:
            return known
        stored = {}
        try:
            for start in range(0, len(rest), _KEYS_PER_STATEMENT):
                some = rest[start : start + _KEYS_PER_STATEMENT]
                marks = ",".join("?" * len(some))
                for key, value in self._database().execute(f"SELECT key, hits FROM hits WHERE key IN ({marks})", some):
                    stored[bytes(key)] = _hits_from_json(value)
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._broken(error) from error
        self._remember(stored)
        return {**known, **stored}

    def _store(self, fresh: dict[bytes, list[Hit]]) -> None:
        self._remember(fresh)
        if self._path is None:
            return
        rows = [(key, _hits_to_json(hits)) for key, hits in fresh.items()]
        try:
            with self._database() as connection:  # one transaction
                connection.executemany("INSERT OR REPLACE INTO hits VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _remember(self, fresh: dict[bytes, list[Hit]]) -> None:
        with self._lock:
            self._memory.update(fresh)
            while len(self._memory) > self._max_in_memory:
                self._memory.popitem(last=False)

    def _database(self) -> sqlite3.Connection:
        # sqlite connections survive neither another thread nor a fork.
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None and self._local.process == os.getpid():
            return connection
        assert self._path is not None
        try:
            connection = sqlite3.connect(self._path, timeout=60.0)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS hits (key BLOB PRIMARY KEY, hits TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise self._broken(error) from error
        self._local.connection, self._local.process = connection, os.getpid()
        return connection

    def _broken(self, error: Exception) -> BackendError:
        return BackendError(f"the retrieval cache {self._path} fails ({error}); deleting it loses nothing else")


def _key(fingerprint: str, query: str | Query, top_k: int, exclude: Collection[str]) -> bytes:
    # A plain text and a Query without history are the same search.
    asked = query if isinstance(query, Query) else Query(query)
    parts = [fingerprint, asked.text, asked.question, asked.history, top_k, sorted(set(exclude))]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _hits_to_json(hits: Sequence[Hit]) -> str:
    rows = [
        [hit.passage.doc_id, hit.passage.text, hit.passage.title, hit.passage.chunk, float(hit.score), hit.rank]
        for hit in hits
    ]
    return json.dumps(rows)


def _hits_from_json(text: str) -> list[Hit]:
    return [
        Hit(Passage(doc_id, content, title, chunk), score, rank)
        for doc_id, content, title, chunk, score, rank in json.loads(text)
    ]
