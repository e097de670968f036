"""Retrieval with augmented queries: a generator writes a pseudo-passage, and its vector is mixed into the query's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from rag_rl.errors import ConfigError, DataError
from rag_rl.retrieval.encoder import Encoder, query_text
from rag_rl.retrieval.history import token_counter
from rag_rl.types import Array, Hit, IntArray, Query

AUGMENTATION_PREFIX = "Generate the topic about this passage: "
"""What Reinforced-IR puts before every augmentation when it is embedded, in training and in use."""

Side: TypeAlias = Literal["document", "query"]

_SETTINGS, _PROMPT = "augmentation.json", "augmentation_prompt.txt"
# Scores held at a time while weights are tried, two float32 matrices of so many numbers.
_SCORES_AT_ONCE = 1 << 24


class Augmenter(Protocol):
    """Queries in, pseudo-passages out; ``rag_rl.generation.augmenting.QueryAugmenter`` is one."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the texts would."""
        ...

    def augment(self, queries: Sequence[str], *, task_instruction: str, answer_type: str) -> list[str | None]:
        """Returns a text a query, None where there is none."""
        ...


class _Searchable(Protocol):
    def search(
        self, queries: Sequence[str | Query], *, top_k: int, exclude: Sequence[Collection[str]] | None = None
    ) -> list[list[Hit]]: ...


class _Index(Protocol):
    def with_query_encoder(self, encoder: Encoder) -> _Searchable: ...


@dataclass(frozen=True, slots=True)
class TunedWeight:
    """The weight that found most.

    Attributes:
        weight: of the query, in [0, 1]; 1 means that augmenting does not help.
        scores: mean nDCG@k of each weight that was tried.
    """

    weight: float
    scores: Mapping[float, float]


def mix_vectors(
    queries: Array,
    augmentations: Array,
    *,
    weight: float = 0.8,
    there: np.ndarray | None = None,
    normalize: bool = False,
) -> Array:
    """Mixes query vectors with those of their augmentations: ``weight * q + (1 - weight) * a``.

    Args:
        queries: (B, D).
        augmentations: (B, D).
        weight: of the query, in [0, 1].
        there: (B,) False where a query has no augmentation: its vector stays as it is. None for all.
        normalize: bring mixed vectors to length 1. That changes no order of inner products, only their scale; the
            published code leaves it out.

    Returns:
        (B, D) float32.

    Raises:
        ConfigError: the weight is out of range, or shapes differ.

    Example:
        >>> mix_vectors(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), weight=0.75).tolist()
        [[0.75, 0.25]]
    """
    _check_weight(weight)
    if queries.shape != augmentations.shape or queries.ndim != 2:
        raise ConfigError(f"query and augmentation vectors must be (B, D), got {queries.shape}, {augmentations.shape}")
    mixed = weight * queries + (1.0 - weight) * augmentations
    if normalize:
        mixed /= np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-12)
    if there is not None:
        mixed = np.where(there[:, None], mixed, queries)
    return np.ascontiguousarray(mixed, dtype=np.float32)


def tune_weight(
    queries: Array,
    augmentations: Array,
    documents: Array,
    gold: IntArray,
    *,
    weights: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    k: int = 10,
) -> TunedWeight:
    """Tries weights on queries whose passages are known, such as held-out synthetic ones.

    Products are linear in the vectors, so that two matrix products serve all weights. Ties of a score with the gold
    passage's are counted half; of equal weights the one that trusts the query more wins.

    Args:
        queries: (B, D) vectors.
        augmentations: (B, D) vectors; those of queries without an augmentation are the query's own.
        documents: (N, D), may be memory-mapped.
        gold: (B,) row of each query's passage.
        weights: to try, in [0, 1].
        k: cut-off of nDCG.

    Returns:
        The best weight, and the score of each.

    Raises:
        ConfigError: no query, no weight, or one out of range.
    """
    if not len(queries) or not weights:
        raise ConfigError("a weight is tuned on at least one query, with at least one weight to try")
    for weight in weights:
        _check_weight(weight)
    sums = dict.fromkeys(weights, 0.0)
    step = max(1, _SCORES_AT_ONCE // len(documents))
    for start in range(0, len(queries), step):
        piece = slice(start, start + step)
        of_query, of_text = queries[piece] @ documents.T, augmentations[piece] @ documents.T
        own = gold[piece][:, None]
        for weight in weights:
            scores = weight * of_query + (1.0 - weight) * of_text
            mine = np.take_along_axis(scores, own, 1)
            ranks = 1.0 + (scores > mine).sum(1) + ((scores == mine).sum(1) - 1) / 2
            sums[weight] += float(np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0).sum())
    means = {weight: total / len(queries) for weight, total in sums.items()}
    return TunedWeight(max(means, key=lambda weight: (means[weight], weight)), means)


class AugmentedRetriever:
    """An encoder whose queries are augmented by a generator, and, over an index, a retriever (arXiv 2502.11562).

    The published use, ``q @ d.T`` ranks::

        retriever = AugmentedRetriever(SentenceEncoder("facebook/contriever"), QueryAugmenter(generator))
        q = retriever.encode_queries(task_instruction="Given a question, ...", answer_type="passage", queries=[...])
        d = retriever.encode_corpus([...])

    Both models are loaded before and stay loaded. It works with any of them, trained for each other or not. As an
    ``Encoder`` it also fits into ``DenseRetriever.with_query_encoder``, and opens the index that its encoder made:
    document vectors are the encoder's own.

    Args:
        encoder: makes all vectors.
        augmenter: writes the texts.
        index: where ``search`` looks; a ``DenseRetriever``. None: there is no search.
        weight: of the query in the mix, in [0, 1]; ``tune_weight`` finds one. At 1 nothing is written.
        prefix: put before each augmentation when it is embedded.
        side: which side of the encoder embeds augmentations; in use the published code has the document side.
        normalize: as in ``mix_vectors``.
        task_instruction: what the search is for, where a call does not say.
        answer_type: what is to be written, where a call does not say.

    Attributes:
        augmented: queries that have been augmented, so far.
        without: queries that got no augmentation and were searched as they are.
        too_long: augmentations that the encoder cut, with their prefix, at its longest text; counted where the
            encoder has a tokenizer.

    Raises:
        ConfigError: the weight or the side is out of range.
    """

    def __init__(
        self,
        encoder: Encoder,
        augmenter: Augmenter,
        *,
        index: _Index | None = None,
        weight: float = 0.8,
        prefix: str = AUGMENTATION_PREFIX,
        side: Side = "document",
        normalize: bool = False,
        task_instruction: str = "",
        answer_type: str = "passage",
    ) -> None:
        _check_weight(weight)
        if side not in ("document", "query"):
            raise ConfigError(f"side must be document or query, got {side!r}")
        self.encoder, self.augmenter = encoder, augmenter
        self.weight, self.prefix, self.side, self.normalize = weight, prefix, side, normalize
        self.task_instruction, self.answer_type = task_instruction, answer_type
        self.augmented = self.without = self.too_long = 0
        tokenizer = getattr(getattr(encoder, "model", None), "tokenizer", None)
        self._limit: int | None = getattr(encoder, "max_length", None)
        self._count = None
        if tokenizer is not None and self._limit is not None:
            self._count = token_counter(tokenizer, prompt=getattr(encoder, f"{side}_prompt", ""))
        self._index = None if index is None else index.with_query_encoder(self)

    @property
    def dimension(self) -> int:
        """Width D of a vector."""
        return self.encoder.dimension

    @property
    def fingerprint(self) -> str:
        """The encoder's own: document vectors are the same."""
        return self.encoder.fingerprint

    @property
    def query_fingerprint(self) -> str:
        """Changes whenever the vectors of queries would."""
        parts = [self.encoder.fingerprint, self.augmenter.fingerprint, self._settings()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The encoder's own."""
        settings: Mapping[str, Any] = getattr(self.encoder, "settings", {})
        return settings

    def encode_queries(
        self, queries: Sequence[str | Query], *, task_instruction: str | None = None, answer_type: str | None = None
    ) -> Array:
        """Vectors of queries, mixed with those of their augmentations.

        Args:
            queries: B queries; of a ``Query`` its text.
            task_instruction: what the search is for; None for the retriever's own.
            answer_type: what is to be written; None for the retriever's own.

        Returns:
            (B, D) float32; of a query without an augmentation the encoder's own.

        Raises:
            BackendError: as the generator raises it.
        """
        if self.weight == 1.0 or not queries:
            return self.encoder.encode_queries(queries)
        plain, added, there = self.encode_parts(queries, task_instruction=task_instruction, answer_type=answer_type)
        return mix_vectors(plain, added, weight=self.weight, there=there, normalize=self.normalize)

    def encode_parts(
        self, queries: Sequence[str | Query], *, task_instruction: str | None = None, answer_type: str | None = None
    ) -> tuple[Array, Array, np.ndarray]:
        """Vectors of queries and of their augmentations apart, for ``tune_weight``.

        Args:
            queries: as in ``encode_queries``, like the others.
            task_instruction: as there.
            answer_type: as there.

        Returns:
            (B, D) of the queries; (B, D) of the augmentations, the query's own where there is none; and (B,) whether
            there is one.

        Raises:
            BackendError: as the generator raises it.
            DataError: the augmenter gave another number of texts than queries.
        """
        written = self.augmenter.augment(
            [query_text(query) for query in queries],
            task_instruction=self.task_instruction if task_instruction is None else task_instruction,
            answer_type=self.answer_type if answer_type is None else answer_type,
        )
        if len(written) != len(queries):
            raise DataError(f"the augmenter gave {len(written)} texts for {len(queries)} queries")
        there = np.array([text is not None for text in written], dtype=bool)
        texts = [self.prefix + text for text in written if text is not None]
        self.augmented += len(texts)
        self.without += len(written) - len(texts)
        if self._count is not None and self._limit is not None:
            self.too_long += sum(count > self._limit for count in self._count(texts))
        plain = self.encoder.encode_queries(queries)
        added = plain.copy()
        if texts:
            encode = self.encoder.encode_documents if self.side == "document" else self.encoder.encode_queries
            added[there] = encode(texts)
        return plain, added, there

    def encode_documents(self, texts: Sequence[str]) -> Array:
        """The encoder's own document vectors.

        Args:
            texts: N texts.

        Returns:
            (N, D) float32.
        """
        return self.encoder.encode_documents(texts)

    def encode_corpus(self, corpus: Sequence[str]) -> Array:
        """The same under its published name.

        Args:
            corpus: N texts.

        Returns:
            (N, D) float32.
        """
        return self.encode_documents(corpus)

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The best passages of each augmented query.

        Args:
            queries: B queries.
            top_k: how many.
            exclude: B collections of document ids that must not be returned.

        Returns:
            A list of hits a query, best first.

        Raises:
            ConfigError: there is no index, or as the index raises it.
            BackendError: the index or the generator failed.
        """
        if self._index is None:
            raise ConfigError("this augmented retriever has no index to search: give it one")
        return self._index.search(queries, top_k=top_k, exclude=exclude)

    def save(self, folder: str | Path) -> None:
        """Keeps the settings and the prompt with a model.

        Args:
            folder: of the encoder or of the generator; made where it is missing.

        Raises:
            DataError: the disk refuses.
        """
        target, template = Path(folder), getattr(self.augmenter, "template", None)
        try:
            target.mkdir(parents=True, exist_ok=True)
            if template is not None:
                (target / _PROMPT).write_text(template + "\n", encoding="utf-8")
            (target / _SETTINGS).write_text(json.dumps(self._settings(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(
        cls, folder: str | Path, encoder: Encoder, augmenter: Augmenter, *, index: _Index | None = None
    ) -> AugmentedRetriever:
        """Puts a retriever together with the settings that were kept.

        Args:
            folder: as in ``save``.
            encoder: makes the vectors.
            augmenter: writes the texts, asked by the prompt that was kept.
            index: as in the constructor.

        Returns:
            A retriever.

        Raises:
            DataError: the settings are missing or cannot be read.
            ConfigError: the augmenter asks by another prompt, or a setting is unknown.
        """
        path = Path(folder) / _SETTINGS
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            prompt = Path(folder) / _PROMPT
            kept = prompt.read_text(encoding="utf-8").rstrip("\n") if prompt.is_file() else None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        if kept is not None and getattr(augmenter, "template", kept) != kept:
            raise ConfigError(f"the augmenter asks by another prompt than the one that was kept: take prompt={prompt}")
        try:
            return cls(encoder, augmenter, index=index, **settings)
        except TypeError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _settings(self) -> dict[str, Any]:
        names = ("weight", "prefix", "side", "normalize", "task_instruction", "answer_type")
        return {name: getattr(self, name) for name in names}


def _check_weight(weight: float) -> None:
    if not 0.0 <= weight <= 1.0:
        raise ConfigError(f"the query's weight in the mix must lie in [0, 1], got {weight}")
