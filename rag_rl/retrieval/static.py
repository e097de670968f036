"""Retrievers that search nothing: fixed answers for tests, and a control that returns the wrong texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from rag_rl.errors import ConfigError, DataError
from rag_rl.retrieval.encoder import query_text
from rag_rl.types import Array, Hit, IntArray, Passage, Query


class StaticRetriever:
    """Answers from a table; for tests, examples and fixed contexts.

    Args:
        passages: query text -> its passages, best first. Scores are 1, 1/2, 1/3, ...
        default: answer to any other query; None: such a query is an error.
    """

    def __init__(self, passages: Mapping[str, Sequence[Passage]], *, default: Sequence[Passage] | None = None) -> None:
        self._passages = {query: tuple(listed) for query, listed in passages.items()}
        self._default = None if default is None else tuple(default)

    @property
    def fingerprint(self) -> str:
        """Hash over the table."""
        table = {query: [_fields(p) for p in listed] for query, listed in self._passages.items()}
        default = None if self._default is None else [_fields(p) for p in self._default]
        return hashlib.sha256(json.dumps(["static", table, default], sort_keys=True).encode()).hexdigest()

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The table's answers.

        Args:
            queries: B queries; of a ``Query`` its text counts.
            top_k: at most so many hits, at least 1.
            exclude: B collections of document ids that must not be returned.

        Returns:
            A list of hits a query, shorter than ``top_k`` where the table has fewer.

        Raises:
            ConfigError: ``top_k`` is below 1, or ``exclude`` has another length than ``queries``.
            DataError: a query is not in the table and there is no default.
        """
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        if exclude is not None and len(exclude) != len(queries):
            raise ConfigError(f"exclude has {len(exclude)} collections for {len(queries)} queries")
        results = []
        for place, query in enumerate(queries):
            listed = self._passages.get(query_text(query), self._default)
            if listed is None:
                raise DataError(f"the static retriever has no passages for the query {query_text(query)!r}")
            kept = [p for p in listed if exclude is None or p.doc_id not in exclude[place]][:top_k]
            results.append([Hit(p, 1.0 / rank, rank) for rank, p in enumerate(kept, start=1)])
        return results


class _VectorSearch(Protocol):
    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def encode_queries(self, queries: Sequence[str | Query]) -> Array: ...

    def search_hits(
        self,
        vectors: Array,
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
        passage_rows: IntArray | None = None,
    ) -> list[list[Hit]]: ...


class ShuffledRetriever:
    """A control: searches as the real one does, then returns each row's text from somewhere else in the corpus.

    Scores, ranks and the distribution of texts stay as they were; only which text belongs to which vector is lost. A
    part that claims to read what was retrieved must fall to its level without retrieval here.

    Args:
        retriever: a ``DenseRetriever``.
        seed: of the permutation, in which no passage keeps its place.

    Raises:
        ConfigError: the corpus has a single passage.
    """

    def __init__(self, retriever: _VectorSearch, seed: int = 0) -> None:
        count = len(retriever)
        if count < 2:
            raise ConfigError("a shuffled retriever needs at least 2 passages, the index holds 1")
        self.retriever, self.seed = retriever, seed
        order = np.random.default_rng(seed).permutation(count)
        # One cycle through all rows: a plain permutation would leave about one passage in its place.
        self._rows = np.empty(count, dtype=np.int64)
        self._rows[order] = np.roll(order, -1)

    @property
    def fingerprint(self) -> str:
        """The retriever's own with the seed."""
        return hashlib.sha256(f"shuffled {self.seed} {self.retriever.fingerprint}".encode()).hexdigest()

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The scores of the right passages with the texts of others.

        Args:
            queries: B queries.
            top_k: how many hits, from 1 to the size of the corpus.
            exclude: B collections of document ids that must not be returned.

        Returns:
            A list of hits a query, best score first.

        Raises:
            ConfigError: ``top_k`` is out of range, or ``exclude`` has another length than ``queries``.
        """
        if not queries:
            return []
        vectors = self.retriever.encode_queries(queries)
        return self.retriever.search_hits(vectors, top_k=top_k, exclude=exclude, passage_rows=self._rows)


def _fields(passage: Passage) -> list[str | int]:
    return [passage.doc_id, passage.text, passage.title, passage.chunk]
