"""Readers for the multi-hop environment: one that follows a known decomposition, and an LLM in a ReAct-like loop."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rag_rl.errors import ConfigError, DataError
from rag_rl.prompts import render, render_passages, require_placeholders
from rag_rl.reasoning.asking import Asker
from rag_rl.reasoning.multihop import Failure, Finish, HopRecord, Observation, Search, Status, Trajectory
from rag_rl.text import ANSWER_MARKER, extract_answer, split_thinking
from rag_rl.types import Generator, Hit, Question

UNKNOWN = "unknown"
"""Stands in a sub-question for the answer of an earlier hop that was not found."""

_REFERENCE = re.compile(r"#(\d+)")
_DECISION = re.compile(r"^\W*(?:SEARCH\W*?:[\s*]*(?P<query>.*)|FINISH\b)", re.MULTILINE | re.IGNORECASE)
_STATUS: dict[str, Status] = {"FOUND": "found", "NOT_FOUND": "not_found", "AMBIGUOUS": "ambiguous"}
_SHOWN = 5


class DecompositionReader:
    """Follows the decomposition that comes with a question (the tiny world, MuSiQue): no model has to plan.

    ``question.meta["decomposition"]`` holds for each hop ``question`` (``#1`` stands for what the first hop told),
    and, where the data has them, ``follow_up``, ``answer`` and ``gold_doc_id``. The last observation is the answer.

    Without a generator the reading is scripted: a hop tells its known answer if its gold document is among the hits,
    and every hop that its question refers to was found; else nothing. With one, the passages and the question with its
    references filled in are put to the generator, and the answer in its reply is the observation. A reference to a hop
    that told nothing is filled in as "unknown".

    Args:
        generator: reads; None for scripted reading.
        follow_up: whether hops after the first put their ``follow_up`` wording to the retriever, where there is one
            ("Which river is it?"): it means different things after different hops. The generator is asked the question
            in full all the same.
        history: whether queries carry the question and the hops so far.
        prompt: name or path of a prompt with ``$passages`` and ``$question``.
        answer_marker: what stands before the answer in a reply.
        max_new_tokens: budget of a reply in tokens.
        temperature: 0 for greedy.
        seed: of the sampling.
        generator_type: "instruct" and "api" get a user turn, "base" plain text.
        give_up_after: failed calls in a row that stop the run, as in ``Asker``.

    Raises:
        ConfigError: a setting is out of range, or the prompt lacks a placeholder.
    """

    def __init__(
        self,
        generator: Generator | None = None,
        *,
        follow_up: bool = True,
        history: bool = True,
        prompt: str = "answer",
        answer_marker: str = ANSWER_MARKER,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int | None = None,
        generator_type: Literal["api", "base", "instruct"] = "instruct",
        give_up_after: int = 3,
    ) -> None:
        _require(prompt, "passages", "question")
        self.follow_up, self.history = follow_up, history
        self.prompt, self.answer_marker = prompt, answer_marker
        self._asker: Asker | None = None
        if generator is not None:
            self._asker = Asker(
                generator,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                chat=generator_type != "base",
                give_up_after=give_up_after,
            )

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """Takes the next hop of each decomposition, or stops behind the last one.

        Args:
            trajectories: B trajectories.

        Returns:
            B decisions.

        Raises:
            DataError: questions without a usable decomposition; names the first ones and counts them.
        """
        self._check([t.question for t in trajectories if not t.hops])
        return [self._next(trajectory) for trajectory in trajectories]

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Hit]]
    ) -> list[Observation | Failure]:
        """Reads what was found, by script or by the generator.

        Args:
            trajectories: B trajectories, without the current hop.
            searches: the current hop of each.
            hits: what was found for each, in reading order.

        Returns:
            B observations.

        Raises:
            BackendError: the generator's backend is broken.
        """
        if self._asker is None:
            return [self._scripted(t, found) for t, found in zip(trajectories, hits, strict=True)]
        prompts = [
            render(self.prompt, passages=render_passages([hit.passage for hit in found]), question=self._asked(t))
            for t, found in zip(trajectories, hits, strict=True)
        ]
        replies = self._asker.ask(prompts)
        return [r if isinstance(r, Failure) else _observed(self._answer_in(r.text)) for r in replies]

    def answer(self, trajectories: Sequence[Trajectory]) -> list[str | Failure | None]:
        """Gives the last observation; nothing where hops are missing, since ``max_hops`` was too low for them.

        Args:
            trajectories: B trajectories.

        Returns:
            B answers, empty where the last hop told nothing.
        """
        return [t.hops[-1].observation if len(t.hops) == len(_decomposition(t.question)) else "" for t in trajectories]

    def _next(self, trajectory: Trajectory) -> Search | Finish:
        steps = _decomposition(trajectory.question)
        if len(trajectory.hops) == len(steps):
            return Finish()
        step = steps[len(trajectory.hops)]
        text = self._asked(trajectory)
        if self.follow_up and trajectory.hops:
            text = step.get("follow_up") or text
        gold = step.get("gold_doc_id")
        return Search(trajectory.query(text, history=self.history), (gold,) if gold is not None else ())

    def _asked(self, trajectory: Trajectory) -> str:
        """The next sub-question, its references filled in."""
        question: str = _decomposition(trajectory.question)[len(trajectory.hops)]["question"]

        def told(reference: re.Match[str]) -> str:
            hop = _referred(reference, trajectory.hops)
            return reference.group() if hop is None else hop.observation or UNKNOWN

        return _REFERENCE.sub(told, question)

    def _scripted(self, trajectory: Trajectory, hits: Sequence[Hit]) -> Observation:
        step = _decomposition(trajectory.question)[len(trajectory.hops)]
        needed = [_referred(reference, trajectory.hops) for reference in _REFERENCE.finditer(step["question"])]
        known = all(hop is None or hop.observation for hop in needed)
        found = known and any(hit.passage.doc_id == step["gold_doc_id"] for hit in hits)
        return _observed(step["answer"] if found else None)

    def _answer_in(self, reply: str) -> str | None:
        return extract_answer(reply, marker=self.answer_marker)

    def _check(self, questions: Sequence[Question]) -> None:
        needed = ["question"] if self._asker else ["question", "answer", "gold_doc_id"]
        distinct = {question.qid: question for question in questions}.values()
        bad = [
            question.qid
            for question in distinct
            if not (steps := _decomposition(question)) or not all(_has(s, name) for s in steps for name in needed)
        ]
        if bad:
            more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            raise DataError(
                f"{len(bad)} of {len(distinct)} questions have no decomposition with {', '.join(needed)} in each hop: "
                f"{', '.join(map(repr, bad[:_SHOWN]))}{more}; leave them out, or take a reader that asks for itself"
            )


class ReActReader:
    """An LLM that plans, reads and answers: the ReAct pipeline of HARR (section 5.1), one short call each.

    Before each hop it is asked for the next search, or to finish, from the question and what the searches so far told;
    after it, for an answer to the sub-query from the passages alone, with a status, as JSON; in the end, for the
    answer to the question. A reply to the first call that holds neither a search nor FINISH counts as FINISH; one to
    the second that cannot be parsed is ambiguous and empty, as in the authors' code.

    Args:
        generator: the LLM, local or served.
        history: whether queries carry the question and the hops so far; the LLM itself sees them always.
        query_prompt: name or path of the first prompt, with ``$question`` and ``$history``.
        observe_prompt: of the second, with ``$query`` and ``$passages``.
        answer_prompt: of the third, with ``$question`` and ``$history``.
        answer_marker: what stands before the answer in the third reply.
        max_new_tokens: budget of a reply in tokens.
        temperature: 0 for greedy.
        seed: of the sampling.
        generator_type: "instruct" and "api" get a user turn, "base" plain text.
        give_up_after: failed calls in a row that stop the run, as in ``Asker``.

    Raises:
        ConfigError: a setting is out of range, or a prompt lacks a placeholder.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        history: bool = True,
        query_prompt: str = "react_query",
        observe_prompt: str = "react_observe",
        answer_prompt: str = "react_answer",
        answer_marker: str = ANSWER_MARKER,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        generator_type: Literal["api", "base", "instruct"] = "instruct",
        give_up_after: int = 3,
    ) -> None:
        _require(query_prompt, "question", "history")
        _require(observe_prompt, "query", "passages")
        _require(answer_prompt, "question", "history")
        self.history, self.answer_marker = history, answer_marker
        self.query_prompt, self.observe_prompt, self.answer_prompt = query_prompt, observe_prompt, answer_prompt
        self._asker = Asker(
            generator,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=generator_type != "base",
            give_up_after=give_up_after,
        )

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """Asks for the next search of each trajectory, or whether it is at its end.

        Args:
            trajectories: B trajectories.

        Returns:
            B decisions; their notes hold the replies.

        Raises:
            BackendError: the generator's backend is broken.
        """
        decisions: list[Search | Finish | Failure] = []
        replies = self._asker.ask([self._about(self.query_prompt, t) for t in trajectories])
        for trajectory, reply in zip(trajectories, replies, strict=True):
            if isinstance(reply, Failure):
                decisions.append(reply)
            elif text := read_search(reply.text):
                decisions.append(Search(trajectory.query(text, history=self.history), note=reply.text))
            else:
                decisions.append(Finish(note=reply.text))
        return decisions

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Hit]]
    ) -> list[Observation | Failure]:
        """Asks what the passages tell about each sub-query.

        Args:
            trajectories: B trajectories; not read, an observation depends on sub-query and passages alone.
            searches: the current hop of each.
            hits: what was found for each, in reading order.

        Returns:
            B observations.

        Raises:
            BackendError: the generator's backend is broken.
        """
        del trajectories
        prompts = [
            render(self.observe_prompt, passages=render_passages([hit.passage for hit in found]), query=s.query.text)
            for s, found in zip(searches, hits, strict=True)
        ]
        return [r if isinstance(r, Failure) else read_observation(r.text) for r in self._asker.ask(prompts)]

    def answer(self, trajectories: Sequence[Trajectory]) -> list[str | Failure | None]:
        """Asks for the answers.

        Args:
            trajectories: B trajectories.

        Returns:
            B answers; empty where the reply holds none.

        Raises:
            BackendError: the generator's backend is broken.
        """
        replies = self._asker.ask([self._about(self.answer_prompt, t) for t in trajectories])
        return [
            r if isinstance(r, Failure) else extract_answer(r.text, marker=self.answer_marker) or "" for r in replies
        ]

    def _about(self, prompt: str, trajectory: Trajectory) -> str:
        return render(prompt, question=trajectory.question.question, history=render_history(trajectory.hops))


def render_history(hops: Sequence[HopRecord]) -> str:
    r"""Writes the hops so far for an LLM.

    Args:
        hops: oldest first.

    Returns:
        A numbered line a hop; "(none)" for none.

    Example:
        >>> from rag_rl.types import Query
        >>> render_history([HopRecord(Query("Who built it?"), [], "Mira", "ambiguous")])
        '1. Who built it? -> Mira (uncertain)'
    """
    lines = []
    for number, hop in enumerate(hops, start=1):
        doubt = " (uncertain)" if hop.status == "ambiguous" and hop.observation else ""
        lines.append(f"{number}. {hop.query.text} -> {hop.learnt}{doubt}")
    return "\n".join(lines) or "(none)"


def read_search(reply: str) -> str | None:
    r"""Finds the next search in a reply to ``react_query``.

    Args:
        reply: its thinking parts are split off first.

    Returns:
        The text after "SEARCH:" on its line; None where FINISH comes first, or neither is there.

    Example:
        >>> read_search("The mayor is missing.\nSEARCH: Who is the mayor of Elmton?")
        'Who is the mayor of Elmton?'
        >>> read_search("FINISH") is None
        True
    """
    _, said = split_thinking(reply)
    decision = _DECISION.search(said or "")
    return ((decision and decision.group("query")) or "").strip(" \t*`<>") or None


def read_observation(reply: str) -> Observation:
    """Reads the JSON object of a reply to ``react_observe``.

    Args:
        reply: its thinking parts are split off first; of several objects with a status the last one counts.

    Returns:
        Its answer in one line, with its status. Ambiguous and empty where there is no such object, or it contradicts
        itself: found, and no answer.

    Example:
        >>> read_observation('The second passage says so. {"status": "FOUND", "answer": "Mira"}')
        Observation(text='Mira', status='found')
        >>> read_observation("It is Mira.")
        Observation(text='', status='ambiguous')
    """
    _, said = split_thinking(reply)
    for verdict in reversed(_objects(said or "")):
        status, answer = _STATUS.get(str(verdict.get("status")).strip().upper()), verdict.get("answer")
        if status is None or isinstance(answer, (list, dict, bool)):
            continue
        text = "" if answer is None or status == "not_found" else " ".join(str(answer).split())
        return Observation(text, "ambiguous" if status == "found" and not text else status)
    return Observation("", "ambiguous")


def _objects(text: str) -> list[dict[str, Any]]:
    decoder, found = json.JSONDecoder(), []
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            end = start + 1
        else:
            found.append(value)
        start = text.find("{", end)
    return found


def _decomposition(question: Question) -> Sequence[Mapping[str, Any]]:
    steps = question.meta.get("decomposition")
    return steps if isinstance(steps, (list, tuple)) else ()


def _has(step: Any, name: str) -> bool:
    value = step.get(name) if isinstance(step, Mapping) else None
    return isinstance(value, str) and bool(value.strip())


def _referred(reference: re.Match[str], hops: Sequence[HopRecord]) -> HopRecord | None:
    """The earlier hop that ``#n`` means; None for a number that is no hop's ("the #1 song")."""
    number = int(reference.group(1))
    return hops[number - 1] if 1 <= number <= len(hops) else None


def _observed(answer: str | None) -> Observation:
    text = " ".join((answer or "").split())
    return Observation(text, "found" if text else "not_found")


def _require(prompt: str, *fields: str) -> None:
    try:
        require_placeholders(prompt, fields)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
