"""The multi-hop environment of HARR (arXiv 2602.03645, section 3), and the rollout loop that other environments share.

A question is answered in hops: the *reader* puts a sub-query, the *retrieval policy* returns an ordered list of
passages, the reader notes in one line what they tell, and in the end it answers. For HARR the policy is trained and
the reader is the environment; for a reasoner (R3-RAG) it is the other way round. The loop knows neither: each of them
may keep whatever its training needs, in ``HopRecord.action`` and in the notes.

Departures from the authors' code: a failed call drops its trajectory, which then has no reward (theirs becomes an
answer of score 0), and a trajectory without any search stays without one (theirs is trained on a made-up action).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, cast

from rag_rl.errors import BackendError, ConfigError
from rag_rl.metrics import token_f1
from rag_rl.types import Hit, Query, Question, Retriever

Status: TypeAlias = Literal["found", "not_found", "ambiguous"]

_WITHOUT_ANSWER = {"found": "not found", "not_found": "not found", "ambiguous": "unclear"}


@dataclass(slots=True)
class HopRecord:
    """One search of a trajectory, and what came of it.

    Attributes:
        query: what was searched for; carries the question and the earlier hops, unless history is off.
        hits: the passages, in the order in which the reader saw them.
        observation: what they told, in one line; empty for nothing.
        status: whether they held what was sought.
        action: what the policy returned beside the hits.
        gold_doc_ids: documents that hold what was sought, so far as known; else those of the whole question.
        note: what the reader keeps of its decision to search.
    """

    query: Query
    hits: list[Hit]
    observation: str
    status: Status
    action: Any = None
    gold_doc_ids: tuple[str, ...] = ()
    note: Any = None

    @property
    def success(self) -> bool | None:
        """Whether a gold document is among the hits; None where none is known."""
        if not self.gold_doc_ids:
            return None
        return any(hit.passage.doc_id in self.gold_doc_ids for hit in self.hits)

    @property
    def learnt(self) -> str:
        """The observation in words, also where there is none: what later hops are told."""
        return self.observation or _WITHOUT_ANSWER[self.status]


@dataclass(slots=True)
class Trajectory:
    """One way of answering a question.

    Attributes:
        question: the question.
        hops: the searches, in order.
        answer: what the reader answered; empty or None where it gave none, which is a wrong answer.
        failure: why this trajectory was dropped (a call to a backend failed); None for a sound one. A dropped
            trajectory has no reward, and its hops are not to be trained on.
        note: what the reader keeps of its decision to stop.
    """

    question: Question
    hops: list[HopRecord] = field(default_factory=list)
    answer: str | None = None
    failure: str | None = None
    note: Any = None

    @property
    def searched(self) -> bool:
        """Whether there is any action in it: the reader may answer without a search."""
        return bool(self.hops)

    def query(self, text: str, *, history: bool = True) -> Query:
        """Makes the next search request.

        Args:
            text: the sub-query.
            history: whether it carries the question and the hops so far.

        Returns:
            The sub-query, with the state around it or bare.
        """
        if not history:
            return Query(text)
        return Query(text, self.question.question, tuple((hop.query.text, hop.learnt) for hop in self.hops))


@dataclass(frozen=True, slots=True)
class Search:
    """A reader's decision to search.

    Attributes:
        query: what for.
        gold_doc_ids: documents that hold it, where known; empty for those of the question.
        note: kept in the hop.
        exclude: documents that shall not be found again, such as those already shown. A reader that excludes any
            needs an ``ExcludingPolicy``.
    """

    query: Query
    gold_doc_ids: tuple[str, ...] = ()
    note: Any = None
    exclude: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """A reader's decision not to search any more.

    Attributes:
        answer: the answer; None where the reader is still to be asked for it (``Reader.answer``).
        note: kept in the trajectory.
    """

    answer: str | None = None
    note: Any = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed while others passed: drops its trajectory.

    Attributes:
        reason: for the log.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What a reader took from the passages of one search.

    Attributes:
        text: one line; empty for nothing.
        status: whether they held what was sought.
    """

    text: str
    status: Status


class Reader(Protocol):
    """Asks, reads and answers. Batch-first: one result per trajectory in the order given, and none for none."""

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """Returns what each trajectory does next."""
        ...

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Hit]]
    ) -> list[Observation | Failure]:
        """Returns what each search told; the hop is not yet among the trajectory's."""
        ...

    def answer(self, trajectories: Sequence[Trajectory]) -> list[str | Failure | None]:
        """Returns the answers of trajectories that stopped, or ran out of hops, without one."""
        ...


class RetrievalPolicy(Protocol):
    """Chooses passages for queries: the retriever under training, or ``TopK``."""

    def retrieve(self, queries: Sequence[Query]) -> list[tuple[list[Hit], Any]]:
        """Returns for each query the hits to be read, in reading order, and what training needs to know of them."""
        ...


class ExcludingPolicy(RetrievalPolicy, Protocol):
    """A policy that can leave documents out: what readers with ``Search.exclude`` need."""

    def retrieve(
        self, queries: Sequence[Query], *, exclude: Sequence[Collection[str]] | None = None
    ) -> list[tuple[list[Hit], Any]]:
        """Returns what ``RetrievalPolicy.retrieve`` does, without the ``exclude``-d doc ids of each query."""
        ...


class TopK:
    """The deterministic policy: the best passages, best first, and no action. For evaluation.

    Args:
        retriever: any; a history-aware one reads the whole ``Query``.
        top_k: passages a hop, >= 1.

    Raises:
        ConfigError: ``top_k`` is below 1.
    """

    def __init__(self, retriever: Retriever, top_k: int) -> None:
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        self.retriever, self.top_k = retriever, top_k

    def retrieve(
        self, queries: Sequence[Query], *, exclude: Sequence[Collection[str]] | None = None
    ) -> list[tuple[list[Hit], Any]]:
        """Searches.

        Args:
            queries: B queries.
            exclude: B collections of document ids that must not be found; None for none.

        Returns:
            B pairs of hits and None.

        Raises:
            ConfigError: as the retriever raises it.
            BackendError: as the retriever raises it.
        """
        # Not named where there is nothing to exclude: a retriever of the user's own may not know the argument.
        more: dict[str, Any] = {} if exclude is None else {"exclude": exclude}
        return [(hits, None) for hits in self.retriever.search(queries, top_k=self.top_k, **more)]


def rollout(
    questions: Sequence[Question],
    *,
    reader: Reader,
    policy: RetrievalPolicy,
    max_hops: int,
    synchronised: Callable[[bool], bool] = bool,
    begun: Sequence[Trajectory] | None = None,
) -> list[Trajectory]:
    """Answers questions hop by hop: one batched call of reader and policy a hop, over all that still go on.

    For a group, give a question G times.

    Args:
        questions: B questions, repeats allowed.
        reader: decides, reads and answers.
        policy: retrieves.
        max_hops: most searches a question, >= 1; who has not stopped then is asked for the answer.
        synchronised: tells whether a flag is set on any rank, for readers or policies whose calls are collective
            (``PolicyGenerator.synchronised``): then every rank makes the same calls, with nothing in them where it has
            finished. ``bool`` for calls that each process makes by itself.
        begun: a trajectory a question to go on from, with the hops made so far, which count; changed in place. None
            to begin all of them.

    Returns:
        B trajectories, in the order of the questions.

    Raises:
        ConfigError: ``max_hops`` is below 1.
        BackendError: the reader or the policy is broken, or every trajectory of two or more questions failed.
        DataError: a question does not suit the reader.
    """
    if max_hops < 1:
        raise ConfigError(f"max_hops must be at least 1, got {max_hops}")
    trajectories = [Trajectory(question) for question in questions] if begun is None else list(begun)
    active, unanswered = trajectories, []
    for _ in range(max_hops):
        unanswered += [trajectory for trajectory in active if len(trajectory.hops) >= max_hops]
        active = [trajectory for trajectory in active if len(trajectory.hops) < max_hops]
        going: list[Trajectory] = []
        searches: list[Search] = []
        for trajectory, decision in zip(active, reader.decide(active), strict=True):
            match decision:
                case Search():
                    going.append(trajectory)
                    searches.append(decision)
                case Finish():
                    trajectory.answer, trajectory.note = decision.answer, decision.note
                    if decision.answer is None:
                        unanswered.append(trajectory)
                case Failure():
                    trajectory.failure = decision.reason
        active = going
        if not synchronised(bool(active)):
            break
        found = retrieve_for(policy, searches)
        hits = [listed for listed, _ in found]
        told = reader.observe(active, searches, hits)
        for trajectory, search, (listed, action), observation in zip(active, searches, found, told, strict=True):
            if isinstance(observation, Failure):
                trajectory.failure = observation.reason
                continue
            gold = search.gold_doc_ids or trajectory.question.gold_doc_ids
            trajectory.hops.append(
                HopRecord(search.query, listed, observation.text, observation.status, action, gold, search.note)
            )
        active = [trajectory for trajectory in active if trajectory.failure is None]
    unanswered += active
    if synchronised(bool(unanswered)):
        for trajectory, answer in zip(unanswered, reader.answer(unanswered), strict=True):
            if isinstance(answer, Failure):
                trajectory.failure = answer.reason
            else:
                trajectory.answer = answer
    _raise_if_all_failed(trajectories)
    return trajectories


def retrieve_for(policy: RetrievalPolicy, searches: Sequence[Search]) -> list[tuple[list[Hit], Any]]:
    """Lets a policy search, and leave out what the searches exclude.

    Args:
        policy: retrieves; where a search excludes anything, an ``ExcludingPolicy``.
        searches: B searches.

    Returns:
        B pairs of hits and action, as ``RetrievalPolicy.retrieve``.
    """
    queries = [search.query for search in searches]
    if not any(search.exclude for search in searches):
        return policy.retrieve(queries)
    return cast(ExcludingPolicy, policy).retrieve(queries, exclude=[search.exclude for search in searches])


def _raise_if_all_failed(trajectories: Sequence[Trajectory]) -> None:
    # One question alone may be at fault itself (too long, refused); two or more hardly are.
    if len({t.question.qid for t in trajectories}) > 1 and all(t.failure is not None for t in trajectories):
        raise BackendError(f"all {len(trajectories)} trajectories failed; the first: {trajectories[0].failure}")


def f1_reward(trajectory: Trajectory) -> float | None:
    """Scores the answer of a trajectory by token F1, the paper's only reward (HARR section 3).

    Args:
        trajectory: a finished one.

    Returns:
        The maximum over the accepted answers, in [0, 1]; 0.0 where the reader gave no answer. None for a dropped
        trajectory, which has no score.

    Example:
        >>> question = Question("q1", "Which river does Elmton lie on?", ("Mirbrook",))
        >>> f1_reward(Trajectory(question, answer="the Mirbrook")), f1_reward(Trajectory(question, failure="timeout"))
        (1.0, None)
    """
    return None if trajectory.failure is not None else token_f1(trajectory.answer, trajectory.question.answers)


def rollout_statistics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Measures a rollout, for logs.

    Args:
        trajectories: finished ones.

    Returns:
        Always the same names: ``failed``, share of dropped trajectories; and over the others ``no_search``, share
        without any search; ``hops``, mean number of searches; ``success``, share of hit lists that hold a gold
        document, of those where one is known; ``found``, share of searches after which the reader had what was
        sought. NaN where there is nothing to take a share of.

    Example:
        >>> question = Question("q1", "Who?", ("Mira",))
        >>> two = [Trajectory(question, failure="timeout"), Trajectory(question, answer="Mira")]
        >>> rollout_statistics(two)
        {'failed': 0.5, 'no_search': 1.0, 'hops': 0.0, 'success': nan, 'found': nan}
    """
    sound = [trajectory for trajectory in trajectories if trajectory.failure is None]
    hops = [hop for trajectory in sound for hop in trajectory.hops]
    return {
        "failed": _mean([trajectory.failure is not None for trajectory in trajectories]),
        "no_search": _mean([not trajectory.searched for trajectory in sound]),
        "hops": _mean([len(trajectory.hops) for trajectory in sound]),
        "success": _mean([success for hop in hops if (success := hop.success) is not None]),
        "found": _mean([hop.status == "found" for hop in hops]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
