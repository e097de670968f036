"""BM25 over words, the usual baseline of a dense retriever; scored by ``bm25s``, an optional package."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from rag_rl.errors import ConfigError, DataError, MissingPackageError
from rag_rl.retrieval.encoder import query_text
from rag_rl.types import Hit, Passage, Query

_WORD = re.compile(r"\w+")


class BM25Retriever:
    """Ranks passages by the words that they share with a query (Robertson & Zaragoza 2009, Lucene's variant).

    Titles count as text. Words are runs of letters and digits in lower case; none is left out or cut to its stem, so
    that names match and no language is assumed. The corpus and its scores are held in memory.

    Args:
        passages: the corpus.
        k1: how soon repeating a word stops counting, above 0.
        b: how much longer passages are discounted, in [0, 1].

    Raises:
        MissingPackageError: ``bm25s`` is not installed.
        ConfigError: a number out of range.
        DataError: the corpus is empty, or has no word in it.
    """

    def __init__(self, passages: Iterable[Passage], *, k1: float = 1.2, b: float = 0.75) -> None:
        if k1 <= 0 or not 0.0 <= b <= 1.0:
            raise ConfigError(f"BM25 needs k1 above 0 and b in [0, 1], got {k1} and {b}")
        try:
            import bm25s  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise MissingPackageError("bm25s is not installed: pip install 'rag-rl[bm25]'") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # which it sets to everything
        self.passages: list[Passage] = list(passages)
        words = [words_of(passage.contents) for passage in self.passages]
        if not any(words):
            raise DataError("BM25 needs a corpus with at least one word in it")
        self._k1, self._b = k1, b
        self._model: Any = bm25s.BM25(method="lucene", k1=k1, b=b)
        self._model.index(words, show_progress=False)
        self._known: Collection[str] = self._model.vocab_dict

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def fingerprint(self) -> str:
        """Hash over the corpus and the settings."""
        digest = hashlib.sha256(f"bm25 {self._k1} {self._b}".encode())
        for passage in self.passages:
            digest.update(
                repr((passage.doc_id, passage.title, passage.text, passage.chunk)).encode("utf-8", "replace")
            )
        return digest.hexdigest()

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The passages of the highest score; of equal ones the earlier in the corpus.

        Args:
            queries: B queries; of a ``Query`` its text.
            top_k: how many, from 1 to the size of the corpus.
            exclude: B collections of document ids that must not be returned.

        Returns:
            A list of hits a query, shorter where fewer passages share a word with it.

        Raises:
            ConfigError: ``top_k`` is out of range, or ``exclude`` has another length than ``queries``.
        """
        if not 1 <= top_k <= len(self.passages):
            raise ConfigError(
                f"retriever_top_k must be between 1 and {len(self.passages)}, the number of passages, got {top_k}"
            )
        if exclude is not None and len(exclude) != len(queries):
            raise ConfigError(f"exclude has {len(exclude)} collections for {len(queries)} queries")
        left_out = exclude or [()] * len(queries)
        return [self._best(query_text(query), top_k, banned) for query, banned in zip(queries, left_out, strict=True)]

    def _best(self, query: str, top_k: int, banned: Collection[str]) -> list[Hit]:
        words = [word for word in words_of(query) if word in self._known]
        if not words:
            return []
        scores = np.asarray(self._model.get_scores(words))
        shared = np.flatnonzero(scores > 0)
        if not banned and len(shared) > top_k:  # a full sort of a large corpus would take longer than the scores
            edge = np.partition(scores[shared], -top_k)[-top_k]
            shared = shared[scores[shared] >= edge]
        hits: list[Hit] = []
        for row in shared[np.argsort(-scores[shared], kind="stable")]:
            if len(hits) == top_k:
                break
            passage = self.passages[row]
            if passage.doc_id not in banned:
                hits.append(Hit(passage, float(scores[row]), len(hits) + 1))
        return hits


def words_of(text: str) -> list[str]:
    """Cuts a text into the words that are compared.

    Args:
        text: any.

    Returns:
        Runs of letters and digits, in lower case.

    Example:
        >>> words_of("Who rules Elm-ton?")
        ['who', 'rules', 'elm', 'ton']
    """
    return _WORD.findall(text.lower())
