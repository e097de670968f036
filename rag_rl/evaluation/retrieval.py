"""An assembly that searches a corpus with an encoder whose both sides are trained: documents are embedded anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.assembly import Answered, Asked
from rag_rl.evaluation.scoring import Row, make_row, retrieval_scores
from rag_rl.retrieval import Encoder, SentenceEncoder
from rag_rl.types import Array, Generation, Hit, IntArray, Passage, Question

# Passages that are embedded, searched and let go of at a time: bounds the memory at so many vectors.
_BLOCK = 16_384


def search_corpus(
    encoder: Encoder, passages: Sequence[Passage], queries: Sequence[str], *, top_k: int, block: int = _BLOCK
) -> tuple[Array, IntArray]:
    """Embeds a corpus piece by piece and keeps the best of each query; no index is made. Exact.

    With several processes each takes its share of the pieces, and all get the whole result.

    Args:
        encoder: of queries and documents.
        passages: N passages.
        queries: B texts.
        top_k: from 1 to N.
        block: passages at a time.

    Returns:
        Inner products (B, K) and rows (B, K), best first.

    Raises:
        ConfigError: ``top_k`` is out of range.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    if not 1 <= top_k <= len(passages):
        raise ConfigError(
            f"retriever_top_k must be between 1 and {len(passages)}, the passages of the corpus, got {top_k}"
        )
    asked = encoder.encode_queries(queries)
    state = PartialState()
    best: list[tuple[Array, IntArray]] = []
    for start in range(state.process_index * block, len(passages), state.num_processes * block):
        texts = [passage.contents for passage in passages[start : start + block]]
        scores = asked @ encoder.encode_documents(texts).T
        rows = np.broadcast_to(np.arange(start, start + len(texts), dtype=np.int64), scores.shape)
        best = [_merged([*best, (scores, rows)], top_k)]
    everyone: list[tuple[Array, IntArray]] = gather_object(best) if state.num_processes > 1 else best
    return _merged(everyone, top_k)


def _merged(parts: Sequence[tuple[Array, IntArray]], top_k: int) -> tuple[Array, IntArray]:
    scores, rows = (np.concatenate(one, axis=1) for one in zip(*parts, strict=True))
    if scores.shape[1] > top_k:
        best = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


class RetrievalAssembly:
    """Held-out questions, searched for in a corpus by an encoder.

    Training moves documents as well as queries, so that an index made before is of no use after. Documents are
    embedded anew for each evaluation, and their vectors let go of again.

    Args:
        passages: the corpus.
        questions: held out, with gold documents.
        encoder: the one to be trained.
        top_k: passages a question; ``mrr@10`` and ``ndcg@10`` see no more than these.
        wrap: makes what is searched with of the encoder, such as an ``AugmentedRetriever``. None: the encoder itself.

    Raises:
        ConfigError: ``top_k`` is out of range.
        DataError: there is no question, or one has no gold document.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        questions: Sequence[Question],
        encoder: SentenceEncoder,
        *,
        top_k: int,
        wrap: Callable[[SentenceEncoder], Encoder] | None = None,
    ) -> None:
        if not 1 <= top_k <= len(passages):
            raise ConfigError(
                f"retriever_top_k must be between 1 and {len(passages)}, the passages of the corpus, got {top_k}"
            )
        if not questions:
            raise DataError("there is no question to evaluate on")
        bare = [question.qid for question in questions if not question.gold_doc_ids]
        if bare:
            raise DataError(f"{len(bare)} of {len(questions)} questions name no gold document: {', '.join(bare[:5])}")
        self.passages, self.questions, self.encoder, self.top_k = passages, list(questions), encoder, top_k
        self._wrap = wrap
        self._found: dict[str, list[Hit]] = {}

    def under_training(self, trainer: Any, *, batch_size: int) -> RetrievalAssembly:
        """What the encoder finds as it is now.

        Args:
            trainer: trains the encoder in place.
            batch_size: not used; the encoder has its own.

        Returns:
            A new assembly.
        """
        del trainer, batch_size
        return self.with_encoder(self.encoder)

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> RetrievalAssembly:
        """What an encoder finds that was saved.

        Args:
            folder: a run folder.
            device: where the encoder goes.
            batch_size: not used; the encoder keeps its own.

        Returns:
            A new assembly.
        """
        del batch_size
        return self.with_encoder(self.encoder.trained(folder, devices=str(device)))

    def with_encoder(self, encoder: SentenceEncoder) -> RetrievalAssembly:
        """Embeds the corpus and searches for all questions at once; with several processes all must call it.

        Args:
            encoder: searches.

        Returns:
            A new assembly, which keeps what was found.
        """
        twin = copy.copy(self)
        twin.encoder = encoder
        search = encoder if self._wrap is None else self._wrap(encoder)
        texts = [question.question for question in self.questions]
        scores, rows = search_corpus(search, self.passages, texts, top_k=self.top_k)
        twin._found = {
            question.qid: [
                Hit(self.passages[row], score, rank)
                for rank, (score, row) in enumerate(zip(*one, strict=True), start=1)
            ]
            for question, *one in zip(self.questions, scores.tolist(), rows.tolist(), strict=True)
        }
        return twin

    def answer(self, questions: Sequence[Question]) -> list[list[Answered]]:
        """What was found for questions.

        Args:
            questions: B of ``self.questions``.

        Returns:
            B lists of one answer, whose ``hits`` are the passages, best first.

        Raises:
            ConfigError: nothing has been searched for: take ``under_training`` or ``reloaded`` first.
        """
        if not self._found:
            raise ConfigError("nothing has been searched for yet: evaluate what under_training or reloaded returns")
        return [
            [Answered(Asked(one, hits, hits, one.question), Generation(""), None)]
            for one in questions
            for hits in [tuple(self._found[one.qid])]
        ]

    def row(self, answered: Answered) -> Row:
        """Scores one list.

        Args:
            answered: of ``answer``.

        Returns:
            A row with ``recall@k success@k mrr@10 ndcg@10``.
        """
        hits, gold = answered.asked.hits, answered.asked.question.gold_doc_ids
        return make_row(answered, retrieval_scores(hits, gold, top_k=self.top_k))
