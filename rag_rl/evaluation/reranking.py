"""An assembly that orders given candidates: what training a reranker is evaluated with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_rl.data import PairRow
from rag_rl.data.pairs import ANSWERS, RETRIEVED, RETRIEVED_SCORES
from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.assembly import Answered, Asked
from rag_rl.evaluation.scoring import Row, answer_scores, make_row, retrieval_scores
from rag_rl.reasoning import Environment, SingleSearch
from rag_rl.trainers.reranker_grpo import GivenHits, PlayedReward
from rag_rl.trainers.reranker_trainer import ranking_scores
from rag_rl.types import Generation, Hit, Question


class RerankingAssembly:
    """Held-out queries with their candidates, ordered by the retriever or by a cross-encoder.

    The candidates of a mined row are what the retriever found, in its order; a relevant document that it did not find
    counts as missed. Of a row from a file nobody knows an order: its candidates are all of its documents, and what
    stands before training is the order of the model that training starts from.

    Args:
        rows: to evaluate on, or to reinforce on.
        top_k: cut-off of ``recall@k`` and ``success@k``, and passages that a reader is shown.
        batch_size: pairs a forward pass.
        retriever_weight: part of the retriever's own score in the order, as in ``rag_rl.retrieval.reranked.rerank``.
        environment: of one search a question: who reads what is ranked first. None where nobody does.

    Raises:
        ConfigError: ``top_k`` below 1.
        DataError: there is no row; some rows have the retriever's order, scores or accepted answers and others do not;
            or they are needed and none has them.
    """

    def __init__(
        self,
        rows: Sequence[PairRow],
        *,
        top_k: int,
        batch_size: int = 64,
        retriever_weight: float = 0.0,
        environment: Environment | None = None,
    ) -> None:
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        if not rows:
            raise DataError("there is no query to evaluate on")
        self.retrieved = _all_have(rows, RETRIEVED, "the retriever's order")
        scored = _all_have(rows, RETRIEVED_SCORES, "the retriever's scores")
        if retriever_weight and not (self.retrieved and scored):
            raise DataError(
                "reranker_retriever_weight needs the retriever's scores: mine the rows, or write them into their meta "
                f"({RETRIEVED!r} and {RETRIEVED_SCORES!r})"
            )
        self.answers = environment is not None and not isinstance(environment.reader, SingleSearch)
        if self.answers and not _all_have(rows, ANSWERS, "accepted answers"):
            raise DataError(f"no row has accepted answers in its meta ({ANSWERS!r}): what is read cannot be scored")
        self.top_k, self.batch_size, self.retriever_weight = top_k, batch_size, retriever_weight
        self.environment = environment
        self.cross_encoder: Any = None
        self.questions: list[Question] = []
        self._against_start = not self.retrieved
        self._candidates: dict[str, list[Hit]] = {}
        for number, row in enumerate(rows):
            qid = f"{number} {row.meta.get('qid', '')}".strip()
            self.questions.append(_question(qid, row))
            self._candidates[qid] = _candidates(row, retrieved=self.retrieved, scored=scored)

    def lists(self) -> list[tuple[str, list[str], list[float]]]:
        """The candidates of each query, for an evaluator or a trainer.

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

    def reward(self) -> PlayedReward:
        """What the environment gives for an order of the candidates, for a trainer.

        Returns:
            A reward of orders over ``lists()``.

        Raises:
            ConfigError: there is no environment.
        """
        if self.environment is None:
            raise ConfigError("an order is rewarded by an environment, and there is none")
        candidates = [[hit.passage for hit in self._candidates[question.qid]] for question in self.questions]
        return PlayedReward(self.environment, self.questions, candidates)

    def against_start(self) -> RerankingAssembly:
        """The same, measured against the model that training starts from also where the retriever's order is known.

        Returns:
            A new assembly.
        """
        twin = copy.copy(self)
        twin._against_start = True
        return twin

    def baselines(self) -> dict[str, RerankingAssembly]:
        """What a reinforced reranker has to beat beside its start.

        Returns:
            The retriever's own order, where it is known.
        """
        return {"retriever": self} if self.retrieved else {}

    def under_training(self, trainer: Any, *, batch_size: int) -> RerankingAssembly:
        """What a reranker is measured against: the retriever's own order, or, without one, the model as it is.

        Args:
            trainer: of a cross-encoder.
            batch_size: not used; the assembly has its own.

        Returns:
            A new assembly.
        """
        del batch_size
        return self.with_cross_encoder(trainer.model if self._against_start else None)

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
        """Orders the candidates of queries, and has the first of them read where somebody reads.

        Args:
            questions: B of ``self.questions``.

        Returns:
            B lists of one answer, whose ``hits`` are the candidates, best first.

        Raises:
            BackendError: a score is not a number, or the reader's backend is broken.
        """
        found: Sequence[Sequence[Hit]] = [self._candidates[question.qid] for question in questions]
        if self.cross_encoder is not None:
            from rag_rl.retrieval.reranked import rerank

            texts = [question.question for question in questions]
            found = rerank(
                self.cross_encoder,
                texts,
                found,
                batch_size=self.batch_size,
                retriever_weight=self.retriever_weight,
            )
        asked = [
            Asked(question, tuple(hits), tuple(hits[: self.top_k]), question.question)
            for question, hits in zip(questions, found, strict=True)
        ]
        if self.environment is None or not self.answers:
            return [[Answered(one, Generation(""), None)] for one in asked]
        shown = GivenHits([[hit.passage for hit in one.shown] for one in asked])
        played = self.environment.rollout(questions, shown)
        return [
            [Answered(one, Generation(trajectory.answer or ""), trajectory.answer, trajectory)]
            for one, trajectory in zip(asked, played, strict=True)
        ]

    def row(self, answered: Answered) -> Row:
        """Scores one ordered list.

        Args:
            answered: of ``answer``.

        Returns:
            A row with ``recall@k success@k mrr@10 ndcg@10``, in which every relevant document counts, found or not;
            ``recall@all``, the same in every order; ``pairwise_accuracy`` among the candidates, and
            the ``mean_margin`` of the cross-encoder; the last two are None where the candidates are all of one kind.
            Where somebody reads, also ``em f1 contains_em`` of the answer; all are None where the reader failed.
        """
        hits, question = answered.asked.hits, answered.asked.question
        gold = question.gold_doc_ids
        scores = answer_scores(answered.answer, question.answers) if self.answers else {}
        scores |= retrieval_scores(hits, gold, top_k=self.top_k)
        found = ranking_scores([hit.score for hit in hits], [float(h.passage.doc_id in gold) for h in hits])
        scores["recall@all"] = len({h.passage.doc_id for h in hits} & set(gold)) / len(gold)
        scores["pairwise_accuracy"] = found.get("pairwise_accuracy")
        if self.cross_encoder is not None:  # ranks have no margin
            scores["mean_margin"] = found.get("mean_margin")
        return make_row(answered, scores if answered.failure is None else dict.fromkeys(scores))


def _all_have(rows: Sequence[PairRow], name: str, what: str) -> bool:
    """Whether the rows have something in their meta: all of them, or none."""
    having = [name in row.meta for row in rows]
    if any(having) and not all(having):
        raise DataError(
            f"{sum(having)} of {len(rows)} rows have {what} in their meta ({name!r}): either all of them must, or none"
        )
    return all(having)


def _candidates(row: PairRow, *, retrieved: bool, scored: bool) -> list[Hit]:
    known = {passage.doc_id: passage for passage in (*row.positives, *row.negatives)}
    order = list(row.meta[RETRIEVED]) if retrieved else list(known)
    scores = (
        list(row.meta[RETRIEVED_SCORES]) if retrieved and scored else [1.0 / rank for rank in range(1, len(order) + 1)]
    )
    if len(scores) != len(order):
        raise DataError(f"query {row.query!r}: {RETRIEVED_SCORES} has {len(scores)} values for {len(order)} documents")
    # What mining guards against is retrieved, and no candidate.
    kept = [(known[doc_id], float(score)) for doc_id, score in zip(order, scores, strict=True) if doc_id in known]
    return [Hit(passage, score, rank) for rank, (passage, score) in enumerate(kept, start=1)]


def _question(qid: str, row: PairRow) -> Question:
    """A row as a question of one search: who reads for it needs no plan."""
    gold = tuple(dict.fromkeys(passage.doc_id for passage in row.positives))
    answers = tuple(map(str, row.meta.get(ANSWERS, ())))
    hop = {"question": row.query, "answer": answers[0] if answers else "", "gold_doc_id": gold[0]}
    return Question(qid, row.query, answers, gold, meta={"decomposition": [hop]})
