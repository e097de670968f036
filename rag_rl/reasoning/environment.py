"""What a retriever is trained in: a reader, a number of hops, and a reward for what came out.

``MULTI-HOP`` (HARR, arXiv 2602.03645): the reader asks, reads and answers, the reward is the F1 of its answer.
Single-hop: ``SingleSearch`` searches once for the question itself, the reward compares the list with judged documents,
for users who have judgements and no reader.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from rag_rl import metrics
from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.reasoning.multihop import (
    Failure,
    Finish,
    Observation,
    Reader,
    RetrievalPolicy,
    Search,
    Trajectory,
    f1_reward,
    rollout,
)
from rag_rl.types import Array, Hit, Passage, Question

RETRIEVAL_REWARDS = ("ndcg", "recall", "reciprocal_rank", "all_gold_recall")
"""What ``retrieval_reward`` can make."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Plays questions and scores what came out.

    Attributes:
        reader: asks, reads and answers.
        max_hops: most searches a question.
        reward: of a finished trajectory, in [0, 1]; None where there is none.
        synchronised: as in ``rollout``.
    """

    reader: Reader
    max_hops: int
    reward: Callable[[Trajectory], float | None] = f1_reward
    synchronised: Callable[[bool], bool] = bool

    def rollout(self, questions: Sequence[Question], policy: RetrievalPolicy) -> list[Trajectory]:
        """Answers questions hop by hop, as ``rag_rl.reasoning.rollout``.

        Args:
            questions: B questions, repeats allowed.
            policy: retrieves.

        Returns:
            B trajectories.
        """
        return rollout(
            questions, reader=self.reader, policy=policy, max_hops=self.max_hops, synchronised=self.synchronised
        )

    def rewards(self, trajectories: Sequence[Trajectory]) -> list[float | None]:
        """Scores trajectories.

        Args:
            trajectories: B finished ones.

        Returns:
            B rewards, None for a dropped trajectory.
        """
        return [None if t.failure is not None else self.reward(t) for t in trajectories]

    def usefulness(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], pools: Sequence[Sequence[Passage]]
    ) -> Array:
        """What the reader takes from each candidate alone: the signal of the REPLUG baseline (arXiv 2301.12652).

        REPLUG takes the likelihood of the right answer under the reader; readers here may be services that tell no
        likelihoods, so it is the F1 of what the reader says. The right answer of a hop is known where the question
        comes with a decomposition; else it is that of the question.

        Args:
            trajectories: B trajectories up to the hop, without it.
            searches: the hop's search of each.
            pools: K candidates of each.

        Returns:
            (B, K) in [0, 1].

        Raises:
            BackendError: a call of the reader failed.
        """
        flat = [(t, s, p) for t, s, pool in zip(trajectories, searches, pools, strict=True) for p in pool]
        told = self.reader.observe(
            [t for t, _, _ in flat], [s for _, s, _ in flat], [[Hit(p, 0.0, 1)] for *_, p in flat]
        )
        values = []
        for (trajectory, _, _), observation in zip(flat, told, strict=True):
            if isinstance(observation, Failure):
                raise BackendError(f"the reader could not read a candidate: {observation.reason}")
            values.append(metrics.token_f1(observation.text, hop_answers(trajectory.question, len(trajectory.hops))))
        return np.array(values, dtype=np.float32).reshape(len(trajectories), -1)


class SingleSearch:
    """Searches once, for the question itself, and answers nothing: the reader of the single-hop mode."""

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """Searches for the question, then stops.

        Args:
            trajectories: B trajectories.

        Returns:
            B decisions.
        """
        return [Finish("") if t.hops else Search(t.query(t.question.question, history=False)) for t in trajectories]

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Hit]]
    ) -> list[Observation | Failure]:
        """Tells whether a list holds a judged document; needed by ``usefulness`` only.

        Args:
            trajectories: B trajectories.
            searches: their searches.
            hits: what was found.

        Returns:
            B observations: the question's first accepted answer for a list with a judged document, else nothing.
        """
        del searches
        return [
            Observation(hop_answers(t.question, 0)[0], "found")
            if any(hit.passage.doc_id in t.question.gold_doc_ids for hit in found)
            else Observation("", "not_found")
            for t, found in zip(trajectories, hits, strict=True)
        ]

    def answer(self, trajectories: Sequence[Trajectory]) -> list[str | Failure | None]:
        """Gives no answer.

        Args:
            trajectories: B trajectories.

        Returns:
            B empty answers.
        """
        return [""] * len(trajectories)


def hop_answers(question: Question, hop: int) -> tuple[str, ...]:
    """The right answers of one hop.

    Args:
        question: with a decomposition or without.
        hop: number from 0.

    Returns:
        The known answer of that hop, else the answers of the question; ``("relevant",)`` where neither is known.
    """
    steps = question.meta.get("decomposition")
    if isinstance(steps, (list, tuple)) and hop + 1 < len(steps) and steps[hop].get("answer"):
        return (str(steps[hop]["answer"]),)
    return question.answers or ("relevant",)


def retrieval_reward(name: str) -> Callable[[Trajectory], float | None]:
    """Makes a reward that compares the retrieved lists with the judged documents of the question.

    Args:
        name: ``"ndcg"`` (linear gain, cut off at the length of the list), ``"recall"`` or ``"reciprocal_rank"``, over
            the first list; or ``"all_gold_recall"``, recall over all hops together.

    Returns:
        A function of a trajectory; None where no document is judged.

    Raises:
        ConfigError: another name.
    """

    def found(trajectory: Trajectory) -> list[str]:
        hops = trajectory.hops if name == "all_gold_recall" else trajectory.hops[:1]
        return list(dict.fromkeys(hit.passage.doc_id for hop in hops for hit in hop.hits))

    def reward(trajectory: Trajectory) -> float | None:
        gold = trajectory.question.gold_doc_ids
        if not gold:
            return None
        ids = found(trajectory)
        k = max(1, len(ids))
        match name:
            case "ndcg":
                return metrics.ndcg_of_ids(ids, dict.fromkeys(gold, 1.0), k=k)
            case "reciprocal_rank":
                return metrics.mrr_at_k(ids, gold, k=k)
            case _:
                return metrics.recall_at_k(ids, gold, k=k)

    if name not in RETRIEVAL_REWARDS:
        raise ConfigError(f"a retrieval reward is one of {', '.join(RETRIEVAL_REWARDS)}, got {name!r}")
    return reward


def known_gold(
    questions: Sequence[Question], doc_ids: Collection[str], *, required: bool = False
) -> tuple[list[Question], int]:
    """Finds questions whose gold documents can be found at all.

    Args:
        questions: to train or to evaluate on.
        doc_ids: of the corpus; those that some question names are enough.
        required: whether questions that name no gold document are left out as well: those that are scored by them.

    Returns:
        Questions of which every gold document is in the corpus, or that name none; and how many are not among them.

    Raises:
        DataError: none is left.
    """
    kept = [
        q
        for q in questions
        if (q.gold_doc_ids or not required) and all(doc_id in doc_ids for doc_id in q.gold_doc_ids)
    ]
    if questions and not kept:
        named = ", ".join(questions[0].gold_doc_ids[:3]) or "none named"
        raise DataError(
            f"none of the {len(questions)} questions has its gold documents in the corpus, first "
            f"{questions[0].qid!r} ({named}): is it the right corpus?"
        )
    return kept, len(questions) - len(kept)
