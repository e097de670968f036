"""An assembly that orders given candidates: what training a reranker is evaluated with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_rl.data import PairRow
from rag_rl.data.pairs import RETRIEVED
from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.assembly import Answered, Asked
from rag_rl.evaluation.scoring import Row, make_row, retrieval_scores
from rag_rl.trainers.reranker_trainer import ranking_scores
from rag_rl.types import Generation, Hit, Question


class RerankingAssembly:
    """Held-out queries with their candidates, ordered by the retriever or by a cross-encoder.

    The candidates of a mined row are what the retriever found, in its order; a relevant document that it did not find
    counts as missed. Of a row from a file nobody knows an order: its candidates are all of its documents, and what
    stands before training is the order of the model that training starts from.

    Args:
        rows: to evaluate on.
        top_k: cut-off of ``recall@k`` and ``success@k``.
        batch_size: pairs a forward pass.

    Raises:
        ConfigError: ``top_k`` below 1.
        DataError: there is no row, or some rows have the retriever's order and others do not.
    """

    def __init__(self, rows: Sequence[PairRow], *, top_k: int, batch_size: int = 64) -> None:
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        if not rows:
            raise DataError("there is no query to evaluate on")
        ordered = [RETRIEVED in row.meta for row in rows]
        if any(ordered) and not all(ordered):
            raise DataError(
                f"{sum(ordered)} of {len(rows)} held-out rows have the retriever's order in their meta "
                f"({RETRIEVED!r}): either all of them must have it, or none"
            )
        self.top_k, self.batch_size, self.retrieved = top_k, batch_size, all(ordered)
        self.cross_encoder: Any = None
        self.questions: list[Question] = []
        self._candidates: dict[str, list[Hit]] = {}
        for number, row in enumerate(rows):
            qid = f"{number} {row.meta.get('qid', '')}".strip()
            gold = tuple(dict.fromkeys(passage.doc_id for passage in row.positives))
            self.questions.append(Question(qid, row.query, (), gold))
            known = {passage.doc_id: passage for passage in (*row.positives, *row.negatives)}
            order = [doc_id for doc_id in row.meta[RETRIEVED] if doc_id in known] if self.retrieved else list(known)
            self._candidates[qid] = [
                Hit(known[doc_id], 1.0 / rank, rank) for rank, doc_id in enumerate(order, start=1)
            ]

    def lists(self) -> list[tuple[str, list[str], list[float]]]:
        """The candidates of each query, for an evaluator.

        Returns:
            Query, texts, and 1 for each relevant one, 0 for the others.
        """
        return [
            (
                question.question,
                [hit.passage.contents for hit in self._candidates[question.qid]],
                [float(hit.passage.doc_id in question.gold_doc_ids) for hit in self._candidates[question.qid]],
            )
            for question in self.questions
        ]

    def under_training(self, trainer: Any, *, batch_size: int) -> RerankingAssembly:
        """What a reranker is measured against: the retriever's own order, or, without one, the model as it is.

        Args:
            trainer: of a cross-encoder.
            batch_size: not used; the assembly has its own.

        Returns:
            A new assembly.
        """
        del batch_size
        return self.with_cross_encoder(None if self.retrieved else trainer.model)

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> RerankingAssembly:
        """The same candidates, ordered by a cross-encoder that was saved.

        Args:
            folder: a run folder.
            device: where the model goes.
            batch_size: not used; the assembly has its own.

        Returns:
            A new assembly.
        """
        del batch_size
        from sentence_transformers import CrossEncoder

        return self.with_cross_encoder(CrossEncoder(str(folder), device=str(device)))

    def with_cross_encoder(self, model: Any) -> RerankingAssembly:
        """The same candidates under another order.

        Args:
            model: a ``CrossEncoder``; None keeps the retriever's order.

        Returns:
            A new assembly.
        """
        twin = copy.copy(self)
        twin.cross_encoder = model
        return twin

    def answer(self, questions: Sequence[Question]) -> list[list[Answered]]:
        """Orders the candidates of queries.

        Args:
            questions: B of ``self.questions``.

        Returns:
            B lists of one answer, whose ``hits`` are the candidates, best first.

        Raises:
            BackendError: a score is not a number.
        """
        found: Sequence[Sequence[Hit]] = [self._candidates[question.qid] for question in questions]
        if self.cross_encoder is not None:
            from rag_rl.retrieval.reranked import rerank

            texts = [question.question for question in questions]
            found = rerank(self.cross_encoder, texts, found, batch_size=self.batch_size)
        return [
            [
                Answered(
                    Asked(question, tuple(hits), tuple(hits[: self.top_k]), question.question), Generation(""), None
                )
            ]
            for question, hits in zip(questions, found, strict=True)
        ]

    def row(self, answered: Answered) -> Row:
        """Scores one ordered list.

        Args:
            answered: of ``answer``.

        Returns:
            A row with ``recall@k success@k mrr@10 ndcg@10``, in which every relevant document counts, found or not;
            ``recall@all``, the same in every order; ``pairwise_accuracy`` among the candidates, and
            the ``mean_margin`` of the cross-encoder; the last two are None where the candidates are all of one kind.
        """
        hits, gold = answered.asked.hits, answered.asked.question.gold_doc_ids
        scores = retrieval_scores(hits, gold, top_k=self.top_k)
        found = ranking_scores([hit.score for hit in hits], [float(h.passage.doc_id in gold) for h in hits])
        scores["recall@all"] = len({h.passage.doc_id for h in hits} & set(gold)) / len(gold)
        scores["pairwise_accuracy"] = found.get("pairwise_accuracy")
        if self.cross_encoder is not None:  # ranks have no margin
            scores["mean_margin"] = found.get("mean_margin")
        return make_row(answered, scores)
