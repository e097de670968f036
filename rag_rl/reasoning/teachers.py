"""Teachers, and rejection sampling: how the cold-start chains come about (R3-RAG, arXiv 2505.23794).

A teacher plays each question until one of its chains ends with a right answer. The first attempt is greedy, later ones
are sampled. Failed chains are kept: with a correct one they make preference pairs.

Departure from the authors' code: there, later attempts also search for sub-queries of each query; here they differ by
sampling alone. Their cut-off of the documents, which leaves all but the first step with at most one new one, is not
taken over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from tqdm import tqdm  # type: ignore[import-untyped]

from rag_rl.errors import ConfigError, DataError
from rag_rl.metrics import exact_match
from rag_rl.reasoning.multihop import (
    ExcludingPolicy,
    Failure,
    Finish,
    Observation,
    Reader,
    Search,
    Trajectory,
)
from rag_rl.reasoning.step_environment import StepEnvironment, StepTrajectory, StepWriter, decide_by, read_record
from rag_rl.reasoning.step_judging import judge_answers, run_judging
from rag_rl.reasoning.steps import ANALYSIS_LABEL, ANSWER_LABEL, QUERY_LABEL
from rag_rl.reasoning.trajectories import append_trajectories, read_trajectories
from rag_rl.types import Generator, Judge, Question, Retriever

logger = logging.getLogger(__name__)

Wording: TypeAlias = Callable[[Question, int], tuple[str, str] | None]
"""What is said about a hop, from 0: a sentence that states its fact, and one that says that it is needed. None for a
question that it has no words for."""

_REFERENCE = re.compile(r"#(\d+)")
_SENTENCE = re.compile(r"[^.!?]*[.!?]?")


class Teacher(Protocol):
    """Writes chains for others to learn from."""

    def writer(self, attempt: int) -> Reader:
        """Returns who writes the steps of an attempt, from 1; keeps a ``StepRecord`` in each decision's note."""
        ...


class OracleTeacher:
    """Writes right chains from the decomposition that comes with a question: no model, and never a wrong step.

    ``question.meta["decomposition"]`` holds for each hop ``question`` (``#1`` stands for what the first hop told),
    ``answer`` and ``gold_doc_id``; or, as in 2WikiMultihopQA, ``subject``, ``relation`` and ``object``, with as many
    gold documents in the same order. A question over one hop needs none. A hop is known as soon as its document has
    been shown, whichever query found it. As long as it has not, the hop's query is asked again, and finds other
    documents, since those already shown are not found again. Where the last hop's answer is not the question's (a
    comparison), the last step restates all facts and gives the question's.

    Args:
        wording: of analyses; by default, and where it has no words, what the document says about the fact, and the
            hop's question. On the tiny world it should be the words that its language model knows.

    Attributes:
        repeats: it always writes the same, so that a second attempt at a question is none.
    """

    repeats = True

    def __init__(self, wording: Wording | None = None) -> None:
        self.wording = wording

    def writer(self, attempt: int) -> OracleTeacher:
        """Gives the writer of an attempt.

        Args:
            attempt: has no effect, the oracle always writes the same.

        Returns:
            Itself.
        """
        del attempt
        return self

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """Writes the next step of each trajectory.

        Args:
            trajectories: B trajectories.

        Returns:
            B decisions.

        Raises:
            DataError: questions without a usable decomposition; names the first and counts them.
        """
        bad = [t.question.qid for t in trajectories if not _hops(t.question)]
        if bad:
            raise DataError(
                f"{len(bad)} of {len(trajectories)} questions have no decomposition with question, answer and "
                f"gold_doc_id in each hop, or with subject, relation and object for each gold document, first "
                f"{bad[0]!r}: leave them out, or take a language model as teacher"
            )
        return [decide_by(t, read_record(len(t.hops) + 1, self._step(t))) for t in trajectories]

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Any]]
    ) -> list[Observation | Failure]:
        """Tells nothing: the documents are read when the next step is written.

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
        """Gives no answer to a chain that ran out of steps.

        Args:
            trajectories: B trajectories.

        Returns:
            B times None.
        """
        return [None] * len(trajectories)

    def _step(self, trajectory: Trajectory) -> str:
        hops = _hops(trajectory.question)
        known = _known(hops, trajectory, len(trajectory.hops))
        before = _known(hops, trajectory, len(trajectory.hops) - 1)
        said = [self._words(trajectory, hop)[0] for hop in range(before, known)]
        if known == len(hops):
            told, accepted = hops[-1]["answer"], trajectory.question.answers
            if accepted and exact_match(told, accepted) == 0.0:
                told, said = accepted[0], [self._words(trajectory, hop)[0] for hop in range(known)]
            action = f"{ANSWER_LABEL} {told}"
            said = said or [self._words(trajectory, known - 1)[0]]
        else:
            action = f"{QUERY_LABEL} {_asked(hops, known)}"
            said.append(self._words(trajectory, known)[1])
        return f"Step {len(trajectory.hops) + 1}:\n{ANALYSIS_LABEL} {' '.join(said)}\n{action}"

    def _words(self, trajectory: Trajectory, hop: int) -> tuple[str, str]:
        words = self.wording(trajectory.question, hop) if self.wording is not None else None
        if words is not None:
            return words
        hops = _hops(trajectory.question)
        asked, answer = _asked(hops, hop), hops[hop]["answer"]
        shown = [hit.passage for done in trajectory.hops for hit in done.hits]
        text = next((passage.text for passage in shown if passage.doc_id == hops[hop]["gold_doc_id"]), "")
        stated = next((found for sentence in _SENTENCE.findall(text) if answer in (found := sentence.strip())), None)
        return stated or f"{asked} {answer}.", f"I need to know: {asked}"


class GeneratorTeacher:
    """A language model as teacher, local or served.

    Args:
        generator: the model.
        first_prompt: name or path of the prompt for the first step, with ``$question``.
        next_prompt: name or path of the prompt for every other, with ``$question`` and ``$steps``.
        temperatures: of the first, the second, ... attempt; the last one holds for all further ones.
        tries: how often an invalid step is written anew, where it is sampled, >= 1.
        max_new_tokens: budget of a step in tokens.
        seed: of the sampling; each attempt has its own.
        generator_type: "instruct" and "api" get a user turn, "base" plain text.
        give_up_after: failed calls in a row that stop the run, as in ``Asker``.

    Raises:
        ConfigError: a setting is out of range, or a prompt lacks a placeholder.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        first_prompt: str = "r3_first_step",
        next_prompt: str = "r3_next_step",
        temperatures: Sequence[float] = (0.0, 0.9),
        tries: int = 2,
        max_new_tokens: int = 256,
        seed: int | None = 0,
        generator_type: Literal["api", "base", "instruct"] = "instruct",
        give_up_after: int = 3,
    ) -> None:
        if not temperatures or min(temperatures) < 0.0:
            raise ConfigError(f"temperatures must be one or more numbers from 0, got {list(temperatures)}")
        self.temperatures, self.seed = tuple(temperatures), seed
        self._generator = generator
        self._settings: dict[str, Any] = {
            "first_prompt": first_prompt,
            "next_prompt": next_prompt,
            "tries": tries,
            "max_new_tokens": max_new_tokens,
            "generator_type": generator_type,
            "give_up_after": give_up_after,
        }
        self._writers: dict[int, StepWriter] = {}
        self.writer(1)  # a missing placeholder shows now

    def writer(self, attempt: int) -> StepWriter:
        """Gives the writer of an attempt.

        Args:
            attempt: from 1.

        Returns:
            A writer at the attempt's temperature; the same one every time.
        """
        if attempt not in self._writers:
            self._writers[attempt] = StepWriter(
                self._generator,
                temperature=self.temperatures[min(attempt, len(self.temperatures)) - 1],
                renumber=True,
                seed=None if self.seed is None else self.seed + 1_000_003 * attempt,
                **self._settings,
            )
        return self._writers[attempt]


@dataclass(slots=True)
class Collected:
    """What rejection sampling has brought, over all runs into one file.

    Attributes:
        solved: questions with a correct chain.
        given_up: questions without one after all attempts.
        unfinished: questions without one of which an attempt was dropped, or could not be judged; another run into
            the same file makes up for it.
        chains: all chains in the file.
    """

    solved: int = 0
    given_up: int = 0
    unfinished: int = 0
    chains: int = 0


def collect_trajectories(
    questions: Sequence[Question],
    *,
    teacher: Teacher,
    retriever: Retriever | ExcludingPolicy,
    path: str | Path,
    top_k: int = 3,
    attempts: int = 7,
    max_steps: int = 7,
    judge: Judge | None = None,
    pass_mark: float = 0.5,
    batch_size: int = 64,
    progress: bool = False,
) -> Collected:
    """Lets a teacher play questions until a chain is right, and writes all chains to a file.

    After each attempt at a batch of questions the chains are on the disk. A run into a file that is there goes on
    where it ends: questions with a correct chain are done, others go on with the attempts that are not in it.

    Args:
        questions: with accepted answers.
        teacher: writes the chains.
        retriever: finds documents; or a policy with an ``exclude``.
        path: JSONL file of trajectories.
        top_k: documents a search; those already shown do not count.
        attempts: most attempts a question, >= 1; a teacher that ``repeats`` itself has one.
        max_steps: most steps of a chain, >= 1.
        judge: of answers that match no accepted answer exactly; None: they are wrong.
        pass_mark: score from which on an answer is right.
        batch_size: questions that are played at a time, >= 1.
        progress: whether a bar shows how many questions are done.

    Returns:
        Counts over these questions.

    Raises:
        ConfigError: a number is out of range.
        DataError: questions without answers, or the file has bad rows or chains about other questions of the same ids.
        BackendError: the teacher, the retriever, the judge or the disk is broken.
    """
    for name, number in (("attempts", attempts), ("batch_size", batch_size)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")
    if unanswerable := [question.qid for question in questions if not question.answers]:
        raise DataError(
            f"{len(unanswerable)} of {len(questions)} questions have no answers, first {unanswerable[0]!r}: without "
            f"them no chain can be verified; leave these questions out"
        )
    if getattr(teacher, "repeats", False):
        attempts = 1
    done = _done(questions, path)
    with tqdm(total=len(questions), desc="chains", unit=" questions", disable=not progress) as bar:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            for attempt in range(1, attempts + 1):
                pending = [q for q in batch if not done[q.qid].solved and attempt not in done[q.qid].attempts]
                if not pending:
                    continue
                environment = StepEnvironment(teacher.writer(attempt), retriever, top_k=top_k, max_steps=max_steps)
                kept = _judged(environment.rollout(pending), judge, pass_mark)
                for trajectory in kept:
                    trajectory.attempt = attempt
                    done[trajectory.question.qid].add(trajectory)
                append_trajectories(path, kept)
            bar.set_postfix(solved=sum(one.solved for one in done.values()), refresh=False)
            bar.update(len(batch))
    found = Collected()
    for one in done.values():
        tried = set(range(1, attempts + 1)) <= one.attempts
        found.solved += one.solved
        found.given_up += not one.solved and tried
        found.unfinished += not one.solved and not tried
        found.chains += one.chains
    return found


@dataclass(slots=True)
class _Progress:
    question: str
    solved: bool = False
    chains: int = 0
    attempts: set[int] = field(default_factory=set)

    def add(self, trajectory: StepTrajectory) -> None:
        self.solved = self.solved or trajectory.state == "correct"
        self.chains += 1
        self.attempts.add(trajectory.attempt or self.chains)


def _judged(played: Sequence[StepTrajectory], judge: Judge | None, pass_mark: float) -> list[StepTrajectory]:
    unread = 0 if judge is None else run_judging(judge_answers(played, judge, pass_mark=pass_mark))
    if unread:
        logger.warning("%d of %d answers could not be judged; their chains are left out", unread, len(played))
    return [trajectory for trajectory in played if trajectory.state is not None]


def _done(questions: Sequence[Question], path: str | Path) -> dict[str, _Progress]:
    done = {question.qid: _Progress(question.question) for question in questions}
    for trajectory in read_trajectories(path, cut_end=True):
        own = trajectory.question
        if own.qid not in done:
            continue
        if done[own.qid].question != own.question:
            raise DataError(
                f"{path}: has chains about {own.question!r:.80}, but question {own.qid!r} is now "
                f"{done[own.qid].question!r:.80}: give another file"
            )
        done[own.qid].add(trajectory)
    return done


def _hops(question: Question) -> Sequence[Mapping[str, str]]:
    """The hops of a question, each with question, answer and gold_doc_id; nothing where they are not all known."""
    steps = question.meta.get("decomposition", question.meta.get("evidences"))
    steps = _from_triples(steps, question.gold_doc_ids) or steps
    if steps is None and len(question.gold_doc_ids) == 1 and question.answers:
        answer, gold = question.answers[0], question.gold_doc_ids[0]
        steps = [{"question": question.question, "answer": answer, "gold_doc_id": gold}]
    needed = ("question", "answer", "gold_doc_id")
    sound = isinstance(steps, (list, tuple)) and all(
        isinstance(step, Mapping) and all(isinstance(step.get(name), str) and step[name].strip() for name in needed)
        for step in steps
    )
    return steps if sound and steps else ()


def _from_triples(triples: Any, gold: Sequence[str]) -> list[dict[str, str]]:
    """Hops of evidence triples, one a gold document; of several objects of a subject the first one stands."""
    if not isinstance(triples, (list, tuple)):
        return []
    found: dict[tuple[str, str], str] = {}
    for triple in triples:
        parts = [triple.get(n) for n in ("subject", "relation", "object")] if isinstance(triple, Mapping) else triple
        if not (isinstance(parts, (list, tuple)) and len(parts) == 3 and all(isinstance(part, str) for part in parts)):
            return []
        found.setdefault((parts[0], parts[1]), parts[2])
    if len(found) != len(gold):
        return []
    return [
        {"question": f"What is the {relation} of {subject}?", "answer": told, "gold_doc_id": doc_id}
        for ((subject, relation), told), doc_id in zip(found.items(), gold, strict=True)
    ]


def _known(hops: Sequence[Mapping[str, str]], trajectory: Trajectory, searches: int) -> int:
    """How many hops in a row the first searches have found the documents of."""
    shown = {hit.passage.doc_id for done in trajectory.hops[: max(0, searches)] for hit in done.hits}
    return next((i for i, hop in enumerate(hops) if hop["gold_doc_id"] not in shown), len(hops))


def _asked(hops: Sequence[Mapping[str, str]], number: int) -> str:
    """The question of a hop, its references filled in."""

    def told(reference: re.Match[str]) -> str:
        earlier = int(reference.group(1))
        return hops[earlier - 1]["answer"] if 1 <= earlier <= number else reference.group()

    return _REFERENCE.sub(told, hops[number]["question"])
