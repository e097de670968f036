"""An assembly that searches hop by hop: what training a retriever is evaluated with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.evaluation.assembly import Answered, Asked
from rag_rl.evaluation.scoring import Row, answer_scores, make_row, retrieval_scores
from rag_rl.reasoning import Environment, TopK, Trajectory
from rag_rl.retrieval import DenseRetriever, HistoryEncoder, SentenceEncoder
from rag_rl.types import Generation, Question


class SearchAssembly:
    """A retriever and the environment that it is asked in. Evaluation is deterministic: the best k of each hop.

    Args:
        environment: reader, number of hops, reward.
        retriever: over the index; its encoder is the one to be trained.
        encoder: makes the text of a state, around a ``SentenceEncoder``.
        top_k: passages a hop.
        answers: whether the reader answers; else only what was retrieved is scored.

    Raises:
        ConfigError: ``top_k`` below 1.
    """

    def __init__(
        self,
        environment: Environment,
        retriever: DenseRetriever,
        encoder: HistoryEncoder,
        *,
        top_k: int,
        answers: bool = True,
    ) -> None:
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        self.environment, self.encoder, self.top_k, self.answers = environment, encoder, top_k, answers
        self.retriever = retriever.with_query_encoder(encoder)

    def under_training(self, trainer: Any, *, batch_size: int) -> SearchAssembly:
        """This assembly: the trainer trains its encoder in place.

        Args:
            trainer: a ``RetrieverGRPOTrainer`` around the same encoder.
            batch_size: not used; the encoder has its own.

        Returns:
            This assembly.
        """
        del trainer, batch_size
        return self

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> SearchAssembly:
        """The same assembly around an encoder that was saved; the index stays.

        Args:
            folder: a run folder.
            device: where the encoder goes.
            batch_size: not used; the encoder keeps its own.

        Returns:
            A new assembly.
        """
        del batch_size
        old = self.encoder.encoder
        if not isinstance(old, SentenceEncoder):
            raise ConfigError(f"only a SentenceEncoder can be loaded from a folder, not {type(old).__name__}")
        saved = old.trained(folder, devices=str(device))
        encoder = HistoryEncoder(
            saved, self.encoder.enabled, max_tokens=self.encoder.max_tokens, template=self.encoder.template
        )
        twin = copy.copy(self)
        twin.encoder, twin.retriever = encoder, self.retriever.with_query_encoder(encoder)
        return twin

    def answer(self, questions: Sequence[Question]) -> list[list[Answered]]:
        """Plays questions.

        Args:
            questions: B questions.

        Returns:
            B lists of one answer; its ``generation`` holds the hops as text.
        """
        played = self.environment.rollout(questions, TopK(self.retriever, self.top_k))
        return [[_answered(trajectory)] for trajectory in played]

    def row(self, answered: Answered) -> Row:
        """Scores one played question.

        With answers: ``em f1 contains_em``, and over the hops ``recall@k`` (share of the gold documents that any hop
        found), ``all_gold@k`` (whether every one was found) and ``success@k`` (share of hops that found one of
        theirs). Without: ``recall@k success@k mrr@10 ndcg@10`` of the one search. All of them are None for a dropped
        trajectory: it has no score, which is not 0, and what its later hops would have found is not known.

        Args:
            answered: of ``answer``.

        Returns:
            A row for JSON.
        """
        trajectory = answered.trajectory
        if not isinstance(trajectory, Trajectory):
            raise ConfigError("this answer comes from another assembly: it has no hops to be scored")
        question = trajectory.question
        scores: dict[str, float | None] = {}
        if self.answers:
            scores = answer_scores(trajectory.answer, question.answers)
        gold = set(question.gold_doc_ids)
        if gold and self.answers:
            found = {hit.passage.doc_id for hop in trajectory.hops for hit in hop.hits}
            hops = [hop.success for hop in trajectory.hops if hop.success is not None]
            scores[f"recall@{self.top_k}"] = len(found & gold) / len(gold)
            scores[f"all_gold@{self.top_k}"] = float(gold <= found)
            scores[f"success@{self.top_k}"] = sum(hops) / len(hops) if hops else 0.0
        elif gold:
            scores |= retrieval_scores(answered.asked.hits, question.gold_doc_ids, top_k=self.top_k)
        return make_row(answered, scores if trajectory.failure is None else dict.fromkeys(scores))


def _answered(trajectory: Trajectory) -> Answered:
    hits = tuple(hit for hop in trajectory.hops for hit in hop.hits)
    lines = [f"{hop.query.text} -> {hop.learnt}" for hop in trajectory.hops]
    if trajectory.failure is not None:
        lines.append(f"failed: {trajectory.failure}")
    asked = Asked(trajectory.question, hits, hits, trajectory.question.question)
    return Answered(asked, Generation("\n".join(lines)), trajectory.answer, trajectory)
