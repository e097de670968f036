"""The environment of a step model (R3-RAG, arXiv 2505.23794): it writes steps, the environment searches.

One loop, ``rag_rl.reasoning.rollout``, serves both this environment and the retriever's: here the reader
(``StepWriter``) is what is trained, and the policy is any retriever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rag_rl.errors import ConfigError
from rag_rl.metrics import exact_match
from rag_rl.reasoning.asking import Asker
from rag_rl.reasoning.multihop import (
    ExcludingPolicy,
    Failure,
    Finish,
    HopRecord,
    Observation,
    Reader,
    Search,
    TopK,
    Trajectory,
    retrieve_for,
    rollout,
)
from rag_rl.reasoning.step_prompts import Chain, Layout, StepPrompt, StepPrompts
from rag_rl.reasoning.step_rewards import EndState
from rag_rl.reasoning.steps import Step, has_step_format, parse_step
from rag_rl.types import Generation, Generator, Hit, Passage, Prompt, Query, Question, Retriever


@dataclass(slots=True)
class StepRecord:
    """One step that was written, and what came of it.

    Attributes:
        number: from 1.
        text: what the model wrote.
        step: what was read in it; None for an invalid step.
        problem: why it is invalid; empty for a valid one.
        hits: what its query found, in reading order.
        prompt: what the model was asked; None for a step that was given and not asked for.
        prompt_ids: the prompt's token ids, where the generator tells them (``encode``).
        completion_ids: the text's token ids, where the generator tells them.
        finish_reason: of the generation.
        left_out: how many documents the prompt had no room for.
        rejected: what was written before it in vain, where invalid steps are written anew.
        scores: process scores in [0, 1] by name; None where there is no verdict.
    """

    number: int
    text: str
    step: Step | None
    problem: str = ""
    hits: list[Hit] = field(default_factory=list)
    prompt: Prompt | None = None
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    finish_reason: str = "stop"
    left_out: int = 0
    rejected: tuple[str, ...] = ()
    scores: dict[str, float | None] = field(default_factory=dict)

    @property
    def passages(self) -> list[Passage]:
        """What its query found."""
        return [hit.passage for hit in self.hits]

    @property
    def searches(self) -> bool:
        """Whether the step asks a query."""
        return self.step is not None and self.step.query is not None


@dataclass(slots=True)
class StepTrajectory:
    """A chain of steps.

    Attributes:
        question: the question.
        steps: in order; all but the last one search.
        state: how it ended; None while it goes on, where nobody could judge its answer, and for a dropped one.
        failure: why it was dropped (a call to a backend failed); None for a sound one. A dropped trajectory has no
            reward, and its steps are not to be trained on.
        attempt: which attempt at the question it is, from 1; None where nobody counts.
    """

    question: Question
    steps: list[StepRecord] = field(default_factory=list)
    state: EndState | None = None
    failure: str | None = None
    attempt: int | None = None

    @property
    def answer(self) -> str | None:
        """The final answer; None where there is none."""
        last = self.steps[-1].step if self.steps else None
        return last.answer if last is not None else None

    @property
    def searches(self) -> list[StepRecord]:
        """The steps that search."""
        return [record for record in self.steps if record.searches]

    @property
    def is_open(self) -> bool:
        """Whether another step may follow: it was neither dropped nor ended."""
        return self.failure is None and self.state is None and all(record.searches for record in self.steps)

    @property
    def chain(self) -> Chain:
        """What the next step is asked about."""
        found = [(record.step, record.passages) for record in self.steps if record.step is not None]
        return Chain(self.question.question, [step for step, _ in found], [passages for _, passages in found])

    def before(self, number: int) -> StepTrajectory:
        """Goes back to the state in which a step was written.

        Args:
            number: of the step, from 1.

        Returns:
            An open trajectory of the steps before it; their records are shared.
        """
        return StepTrajectory(self.question, self.steps[: number - 1], attempt=self.attempt)


class StepWriter:
    """A generator that writes steps, as a ``Reader`` of the rollout loop.

    Its decisions carry a ``StepRecord`` in their notes. A step that cannot be parsed ends its trajectory without an
    answer, after ``tries`` of them; greedy steps are written once, they would only be repeated.

    Args:
        generator: the model under training, a teacher, or any other. Where it has ``encode`` and ``prompt_limit``, as
            local models do, prompts are kept as token ids and fitted into its context.
        first_prompt: as in ``StepPrompts``, for teachers.
        next_prompt: as in ``StepPrompts``, for teachers.
        max_new_tokens: budget of a step in tokens, >= 1.
        max_prompt_tokens: longest prompt; None for what the generator takes.
        temperature: 0 for greedy.
        tries: how often an invalid step is written anew until it ends its trajectory, >= 1.
        renumber: whether steps are taken whatever number they bear, as in ``parse_step``; for teachers.
        seed: of the sampling; the same seed and the same calls give the same steps. None for the global state.
        generator_type: "instruct" and "api" get a user turn, "base" plain text.
        layout: as in ``StepPrompts``.
        give_up_after: failed calls in a row that stop the run, as in ``Asker``.
        synchronised: as in ``rollout``; writing anew makes further calls.

    Attributes:
        prompts: makes the prompts.

    Raises:
        ConfigError: a setting is out of range, or a prompt lacks a placeholder.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        first_prompt: str | None = None,
        next_prompt: str | None = None,
        max_new_tokens: int = 512,
        max_prompt_tokens: int | None = None,
        temperature: float = 1.0,
        tries: int = 1,
        renumber: bool = False,
        seed: int | None = None,
        generator_type: Literal["api", "base", "instruct"] = "instruct",
        layout: Layout = "turn",
        give_up_after: int = 3,
        synchronised: Callable[[bool], bool] = bool,
    ) -> None:
        if tries < 1:
            raise ConfigError(f"tries must be at least 1, got {tries}")
        limit = getattr(generator, "prompt_limit", None)
        bounds = [max_prompt_tokens, limit(max_new_tokens) if limit is not None else None]
        self.prompts = StepPrompts(
            chat=generator_type != "base",
            layout=layout,
            first=first_prompt,
            following=next_prompt,
            encode=getattr(generator, "encode", None),
            max_tokens=min((bound for bound in bounds if bound is not None), default=None),
        )
        self.tries = tries if temperature > 0.0 else 1
        self.renumber, self.synchronised = renumber, synchronised
        self._seed, self._calls = seed, 0
        self._asker = Asker(
            generator,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=generator_type != "base",
            give_up_after=give_up_after,
        )

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """Writes the next step of each trajectory.

        Args:
            trajectories: B trajectories whose hops hold the records of their steps.

        Returns:
            B decisions; an invalid step is a ``Finish`` with an empty answer.

        Raises:
            BackendError: the generator's backend is broken.
            DataError: a question alone does not fit into a prompt.
        """
        prompts = self.prompts.make([_records_of(t).chain for t in trajectories])
        decided: list[Search | Finish | Failure] = [Failure("not asked")] * len(trajectories)
        pending = list(range(len(trajectories)))
        rejected: list[tuple[str, ...]] = [()] * len(trajectories)
        for attempt in range(self.tries):
            if attempt and not self.synchronised(bool(pending)):
                break
            again = []
            for i, reply in zip(pending, self._written([prompts[i] for i in pending]), strict=True):
                if isinstance(reply, Failure):
                    decided[i] = reply
                    continue
                record = read_record(len(trajectories[i].hops) + 1, reply.text, renumber=self.renumber)
                record.completion_ids, record.finish_reason = reply.token_ids, reply.finish_reason
                record.prompt, record.prompt_ids = prompts[i].prompt, prompts[i].ids
                record.left_out, record.rejected = prompts[i].left_out, rejected[i]
                decided[i] = decide_by(trajectories[i], record)
                if record.step is None:
                    again.append(i)
                    rejected[i] = (*rejected[i], record.text)
            pending = again
        return decided

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Hit]]
    ) -> list[Observation | Failure]:
        """Tells nothing: the documents themselves go into the next prompt.

        Args:
            trajectories: B trajectories.
            searches: their searches.
            hits: what was found.

        Returns:
            B empty observations.
        """
        del searches, hits
        return [Observation("", "ambiguous")] * len(trajectories)

    def answer(self, trajectories: Sequence[Trajectory]) -> list[str | Failure | None]:
        """Gives no answer: a chain that has none within its steps has failed.

        Args:
            trajectories: B trajectories.

        Returns:
            B times None.
        """
        return [None] * len(trajectories)

    def _written(self, prompts: Sequence[StepPrompt]) -> list[Generation | Failure]:
        # Another seed for each call: with the same one a step written anew would be the same again.
        self._asker.seed = None if self._seed is None else self._seed + self._calls
        self._calls += 1
        return self._asker.ask([prompt.prompt for prompt in prompts])


def read_record(number: int, text: str, *, renumber: bool = False) -> StepRecord:
    """Reads a step that was written.

    Args:
        number: which step of its chain it is, from 1.
        text: what was written.
        renumber: as in ``parse_step``.

    Returns:
        The record; without a step where the text holds no valid one.
    """
    parsed = parse_step(text, number, renumber=renumber)
    return StepRecord(number, text, parsed.step, parsed.problem)


def decide_by(trajectory: Trajectory, record: StepRecord) -> Search | Finish:
    """Does what a step says.

    Args:
        trajectory: up to the step.
        record: of the step; kept in the note.

    Returns:
        A search that does not find again what the chain has shown, or the end; with an empty answer after an invalid
        step.
    """
    if record.step is None or record.step.query is None:
        return Finish(record.step.answer if record.step is not None else "", note=record)
    shown = {hit.passage.doc_id for hop in trajectory.hops for hit in hop.hits}
    return Search(Query(record.step.query), note=record, exclude=shown)


def judged_by_match(trajectory: StepTrajectory) -> bool | None:
    """Judges a final answer by exact match with any accepted answer.

    Args:
        trajectory: one that ended with an answer.

    Returns:
        Whether it is right; None for a question without accepted answers.
    """
    return exact_match(trajectory.answer, trajectory.question.answers) == 1.0 if trajectory.question.answers else None


class StepEnvironment:
    """Plays chains: all running questions write their step in one call, and search in one.

    Args:
        writer: writes the steps: a ``StepWriter``, or any ``Reader`` that keeps a ``StepRecord`` in the note of each
            decision.
        retriever: finds documents; or a policy with an ``exclude``.
        top_k: documents a search, >= 1; has no effect on a policy.
        max_steps: steps of a chain, >= 1; one that has searched so often and not answered has failed.
        judged: tells whether a final answer is right, None where nobody can tell. A judge that is a service comes
            afterwards: ``judge_answers``.
        synchronised: as in ``rollout``.

    Raises:
        ConfigError: ``top_k`` or ``max_steps`` is below 1.
    """

    def __init__(
        self,
        writer: Reader,
        retriever: Retriever | ExcludingPolicy,
        *,
        top_k: int = 3,
        max_steps: int = 5,
        judged: Callable[[StepTrajectory], bool | None] = judged_by_match,
        synchronised: Callable[[bool], bool] = bool,
    ) -> None:
        if max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {max_steps}")
        self.writer = writer
        self.policy = TopK(retriever, top_k) if isinstance(retriever, Retriever) else retriever
        self.max_steps, self.judged, self.synchronised = max_steps, judged, synchronised

    def rollout(self, questions: Sequence[Question]) -> list[StepTrajectory]:
        """Plays questions from the beginning.

        Args:
            questions: B questions; for a group, a question G times.

        Returns:
            B trajectories, none of them open.

        Raises:
            BackendError: the generator or the retriever is broken.
            DataError: a question alone does not fit into a prompt.
        """
        return self.roll_on([StepTrajectory(question) for question in questions])

    def roll_on(self, trajectories: Sequence[StepTrajectory]) -> list[StepTrajectory]:
        """Plays trajectories to their ends.

        Args:
            trajectories: B of them; those that are not open stay as they are, the others are not changed.

        Returns:
            B trajectories, none of them open.

        Raises:
            BackendError: the generator or the retriever is broken.
            DataError: a question alone does not fit into a prompt.
        """
        begun = [trajectory for trajectory in trajectories if trajectory.is_open]
        played = rollout(
            [trajectory.question for trajectory in begun],
            reader=self.writer,
            policy=self.policy,
            max_hops=self.max_steps,
            synchronised=self.synchronised,
            begun=[_hops_of(trajectory) for trajectory in begun],
        )
        ended = iter([self._ended(new, old.attempt) for new, old in zip(played, begun, strict=True)])
        return [next(ended) if trajectory.is_open else trajectory for trajectory in trajectories]

    def take(self, trajectories: Sequence[StepTrajectory], texts: Sequence[str]) -> list[StepTrajectory]:
        """Adds a step that was written elsewhere, such as by a trainer, to each trajectory; one batched search.

        Args:
            trajectories: B open ones; not changed.
            texts: of their next steps.

        Returns:
            B trajectories with one step more, open where it searches and others may follow.

        Raises:
            ConfigError: a trajectory is not open.
            BackendError: the retriever is broken.
        """
        if not all(trajectory.is_open for trajectory in trajectories):
            raise ConfigError("a step can only follow on an open trajectory, one of these has ended")
        taken = [_hops_of(trajectory) for trajectory in trajectories]
        decisions = [decide_by(t, read_record(len(t.hops) + 1, x)) for t, x in zip(taken, texts, strict=True)]
        searching = [(t, d) for t, d in zip(taken, decisions, strict=True) if isinstance(d, Search)]
        if self.synchronised(bool(searching)):
            found = retrieve_for(self.policy, [search for _, search in searching])
            for (trajectory, search), (hits, action) in zip(searching, found, strict=True):
                trajectory.hops.append(_hop(trajectory.question, search.note, hits, action))
        for trajectory, decision in zip(taken, decisions, strict=True):
            if isinstance(decision, Finish):
                trajectory.answer, trajectory.note = decision.answer, decision.note
        return [
            self._ended(new, old.attempt)
            if isinstance(decision, Finish) or len(new.hops) >= self.max_steps
            else _records_of(new, old.attempt)
            for new, old, decision in zip(taken, trajectories, decisions, strict=True)
        ]

    def _ended(self, played: Trajectory, attempt: int | None) -> StepTrajectory:
        ended = _records_of(played, attempt)
        if ended.failure is not None:
            return ended
        if played.note is None:
            ended.state = "fail"
        elif ended.steps[-1].step is None:
            ended.state = "invalid"
        else:
            right = self.judged(ended)
            ended.state = None if right is None else "correct" if right else "incorrect"
        return ended


def step_statistics(trajectories: Sequence[StepTrajectory]) -> dict[str, float | None]:
    """Measures chains, for logs and as a guard against collapse.

    Args:
        trajectories: finished ones.

    Returns:
        Always the same names: ``dropped``, share of dropped trajectories; and over the others ``correct``,
        ``incorrect``, ``fail`` and ``invalid``, shares of the end states; ``steps`` and ``searches``, means a
        question; ``no_search``, share of chains without a search; over all texts that were written, those in vain
        included, ``format``, share that is exactly a step with the right number, and ``invalid_steps``, share that
        could not be parsed; ``analysis_words``, mean length of an analysis; ``left_out``, share of steps whose prompt
        had no room for all documents. None where there is nothing to take a share of.
    """
    sound = [trajectory for trajectory in trajectories if trajectory.failure is None]
    records = [record for trajectory in sound for record in trajectory.steps]
    texts = [(text, record.number) for record in records for text in (*record.rejected, record.text)]
    invalid = sum(len(record.rejected) + (record.step is None) for record in records)
    return {
        "dropped": _mean([trajectory.failure is not None for trajectory in trajectories]),
        **{
            state: _mean([trajectory.state == state for trajectory in sound])
            for state in ("correct", "incorrect", "fail", "invalid")
        },
        "steps": _mean([len(trajectory.steps) for trajectory in sound]),
        "searches": _mean([len(trajectory.searches) for trajectory in sound]),
        "no_search": _mean([not trajectory.searches for trajectory in sound]),
        "format": _mean([has_step_format(text, number) for text, number in texts]),
        "invalid_steps": invalid / len(texts) if texts else None,
        "analysis_words": _mean([len(record.step.analysis.split()) for record in records if record.step is not None]),
        "left_out": _mean([record.left_out > 0 for record in records]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _hop(question: Question, record: StepRecord, hits: list[Hit], action: object = None) -> HopRecord:
    query = record.step.query if record.step is not None else None
    return HopRecord(Query(query or ""), hits, "", "ambiguous", action, question.gold_doc_ids, record)


def _hops_of(trajectory: StepTrajectory) -> Trajectory:
    """The same chain as the rollout loop knows it."""
    return Trajectory(trajectory.question, [_hop(trajectory.question, r, r.hits) for r in trajectory.steps])


def _records_of(trajectory: Trajectory, attempt: int | None = None) -> StepTrajectory:
    """The records in the notes of a trajectory, each with what its query found."""
    steps = []
    for hop in trajectory.hops:
        hop.note.hits = hop.hits
        steps.append(hop.note)
    if trajectory.note is not None:
        steps.append(trajectory.note)
    return StepTrajectory(trajectory.question, steps, failure=trajectory.failure, attempt=attempt)
