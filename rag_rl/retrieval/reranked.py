"""A retriever that reorders what another one found: retrieve N, score each with the query, keep k."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rag_rl.errors import BackendError, ConfigError
from rag_rl.retrieval.encoder import query_text
from rag_rl.types import Hit, Query, Retriever


class PairScorer(Protocol):
    """Scores pairs of a query and a document, as sentence-transformers' ``CrossEncoder`` does."""

    def predict(self, inputs: Any, *, batch_size: int, activation_fn: Any, show_progress_bar: bool) -> Any:
        """Returns one number a pair, higher is better."""
        ...


class RerankedRetriever:
    """Searches with one retriever and orders what it finds with a cross-encoder.

    All pairs of all queries of a search go through the cross-encoder in one call, which sorts them by length.
    Documents of equal score keep the retriever's order.

    Args:
        retriever: finds the candidates.
        cross_encoder: orders them; it reads the text of a query, not its history, and a passage with its title.
        candidates: N, how many are found for a query; a search for more than N returns more than N.
        batch_size: pairs a forward pass.
        retriever_weight: in [0, 1], the part that the retriever's own score has in the order, as in ``rerank``.

    Raises:
        ConfigError: ``candidates`` or ``batch_size`` below 1, or a weight out of its range.
    """

    def __init__(
        self,
        retriever: Retriever,
        cross_encoder: PairScorer,
        *,
        candidates: int,
        batch_size: int = 64,
        retriever_weight: float = 0.0,
    ) -> None:
        if candidates < 1:
            raise ConfigError(f"reranker_candidates must be at least 1, got {candidates}")
        if batch_size < 1:
            raise ConfigError(f"reranker_batch_size must be at least 1, got {batch_size}")
        if not 0.0 <= retriever_weight <= 1.0:
            raise ConfigError(f"reranker_retriever_weight must lie in [0, 1], got {retriever_weight}")
        self.retriever, self.cross_encoder = retriever, cross_encoder
        self.candidates, self.batch_size, self.retriever_weight = candidates, batch_size, retriever_weight
        self._hashed: tuple[Any, str] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash over the retriever's own, the cross-encoder's weights and the settings: what was cached stays true.

        The weights are read when they have changed.

        Raises:
            AttributeError: the retriever or the cross-encoder can give none, so that nothing may be cached.
        """
        inner: str = self.retriever.fingerprint  # type: ignore[attr-defined]
        parts = ["reranked", inner, self._weights(), self.candidates, self.retriever_weight]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The best of the candidates, in the cross-encoder's order.

        Args:
            queries: B queries.
            top_k: how many hits a query.
            exclude: B collections of document ids that must not be returned.

        Returns:
            A list of hits a query, best first; their scores are those of ``rerank``.

        Raises:
            ConfigError: ``top_k`` is below 1, or ``exclude`` has another length than ``queries``.
            BackendError: a score is not a number.
        """
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        if not queries:
            return []
        found = self.retriever.search(queries, top_k=max(self.candidates, top_k), exclude=exclude)
        ordered = rerank(
            self.cross_encoder,
            queries,
            found,
            batch_size=self.batch_size,
            retriever_weight=self.retriever_weight,
        )
        return [hits[:top_k] for hits in ordered]

    def _weights(self) -> str:
        if hasattr(self.cross_encoder, "fingerprint"):
            return str(self.cross_encoder.fingerprint)
        import torch

        model: Any = self.cross_encoder
        # A write to a weight raises its version, so a training step is noticed without reading the weights.
        state = tuple((weight.data_ptr(), weight._version) for weight in model.parameters())
        if self._hashed is None or self._hashed[0] != state:
            digest = hashlib.sha256(repr(getattr(model, "max_seq_length", None)).encode())
            for name, weight in model.state_dict().items():
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data)
            self._hashed = (state, digest.hexdigest())
        return self._hashed[1]


def rerank(
    cross_encoder: PairScorer,
    queries: Sequence[str | Query],
    found: Sequence[Sequence[Hit]],
    *,
    batch_size: int,
    retriever_weight: float = 0.0,
) -> list[list[Hit]]:
    """Orders given candidates.

    Args:
        cross_encoder: scores the pairs.
        queries: B queries.
        found: B lists of candidates, with the retriever's scores.
        batch_size: pairs a forward pass.
        retriever_weight: w in [0, 1]; above 0 the order is that of ``(1 - w) z(cross-encoder) + w z(retriever)``:
            z takes the mean of a query's candidates from a score and divides by their standard deviation.

    Returns:
        The same passages in their new order, ranked from 1, with the scores that order them: without a weight the
        cross-encoder's logits.

    Raises:
        BackendError: a score is not a number.
    """
    pairs = [
        (query_text(query), hit.passage.contents) for query, hits in zip(queries, found, strict=True) for hit in hits
    ]
    if not pairs:
        return [[] for _ in found]
    from torch import nn

    # Without the sigmoid that CrossEncoder applies by default: far above 0 it makes different scores equal.
    scores = cross_encoder.predict(pairs, batch_size=batch_size, activation_fn=nn.Identity(), show_progress_bar=False)
    values = np.asarray(scores, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise BackendError(
            f"the reranker gives scores that are not numbers for {len(bad)} of {len(pairs)} pairs, first for "
            f"{pairs[bad[0]][0]!r}"
        )
    ordered = []
    start = 0
    for hits in found:
        part = values[start : start + len(hits)]
        start += len(hits)
        if retriever_weight:
            own = np.array([hit.score for hit in hits], dtype=np.float64)
            part = (1 - retriever_weight) * _standardised(part) + retriever_weight * _standardised(own)
        order = np.argsort(-part, kind="stable")
        ordered.append([Hit(hits[i].passage, float(part[i]), rank) for rank, i in enumerate(order, start=1)])
    return ordered


def _standardised(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = scores.std() if len(scores) else 0.0
    return (scores - scores.mean()) / spread if spread > 0 else np.zeros_like(scores)
