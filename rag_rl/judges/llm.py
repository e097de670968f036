"""A judge that asks a language model: many cases at once, each by a rubric, nothing asked twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Protocol, runtime_checkable

from rag_rl.errors import BackendError, ConfigError
from rag_rl.judges.budget import Budget, BudgetExceededError
from rag_rl.judges.cache import VerdictCache, case_hash, cases_key
from rag_rl.judges.log import VerdictLog
from rag_rl.judges.loop_thread import LoopThread
from rag_rl.types import JudgeCase, Prompt, Verdict

logger = logging.getLogger(__name__)

# Unreadable replies in a row before the user is told: the run goes on, but learns nothing from this judge.
_UNREADABLE_IN_A_ROW = 20


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered.

    Attributes:
        text: its words.
        prompt_tokens: read by it; 0 where the backend does not tell.
        completion_tokens: written by it, its reasoning included; 0 where the backend does not tell.
        requests: sent until it came, >= 1.
        finish_reason: ``"length"`` where it ran into its token limit.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 1
    finish_reason: str = "stop"


class ChatError(BackendError):
    """One call brought no reply, also after its repeats; another one may.

    Args:
        message: names the endpoint and the last cause.
        requests: sent for it, >= 1.
    """

    def __init__(self, message: str, *, requests: int = 1) -> None:
        super().__init__(message)
        self.requests = requests


@runtime_checkable
class Chat(Protocol):
    """Where a judge's replies come from.

    One with ``async def aclose()`` is closed with its judge; one with a ``fingerprint`` (a text) tells by it which
    settings shape its replies, so that verdicts of other settings are not taken from the cache.

    Attributes:
        name: for errors and logs: "gemini-2.5-flash at https://host/path".
        model: what the endpoint calls the model.
    """

    name: str
    model: str

    async def complete(self, prompt: Prompt) -> Reply:
        """Returns the model's reply; ChatError: this call failed after its repeats; BackendError: every call would."""
        ...


@runtime_checkable
class Rubric(Protocol):
    """How cases become prompts and replies become verdicts.

    Attributes:
        name: of the rubric.
        version: changes whenever the prompt or the way replies are read changes.
    """

    name: str
    version: str

    def group(self, cases: Sequence[JudgeCase]) -> list[list[int]]:
        """Returns which cases are asked together, as positions: each position once; mostly one case a group."""
        ...

    def prompt(self, cases: Sequence[JudgeCase]) -> Prompt:
        """Returns the prompt for one group of cases."""
        ...

    def parse(self, reply: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Returns one verdict a case of the group; raises ValueError with the reason where the reply is unreadable."""
        ...


class LLMJudge:
    """A language model as a ``rag_rl.types.Judge``.

    All asking happens in one event loop in a thread of the judge's own, so that ``judge`` can be awaited from any
    loop, from several at once, and from one after another.

    A case whose reply stays unreadable, or whose call fails for good, gets a verdict without a score and with the
    reason. Where call after call fails, the run stops.

    Args:
        chat: where replies come from.
        rubric: what is asked.
        name: of the judge, in the cache and the log; None for the chat's name. Give one where the address of an
            endpoint changes and what is behind it does not.
        concurrency: calls in flight, over all callers, >= 1.
        cache: readable verdicts by case; None for no cache. Identical cases of one batch are asked once in any case.
        budget: checked before each call; None for no limit.
        log: of all verdicts; None for no log.
        attempts: times that a case is put to the model until its reply can be read, >= 1.
        max_failed_in_a_row: failed calls in a row (each after its repeats) that stop the run, >= 1.

    Attributes:
        asked: calls so far, repeats after unreadable replies included.
        from_cache: groups of cases whose verdicts were known.
        unreadable: groups that got no score because no reply could be read.
        failed: groups that got no score because the call failed.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        chat: Chat,
        rubric: Rubric,
        *,
        name: str | None = None,
        concurrency: int = 32,
        cache: VerdictCache | None = None,
        budget: Budget | None = None,
        log: VerdictLog | None = None,
        attempts: int = 3,
        max_failed_in_a_row: int = 20,
    ) -> None:
        for setting, value in (
            ("concurrency", concurrency),
            ("attempts", attempts),
            ("max_failed_in_a_row", max_failed_in_a_row),
        ):
            if value < 1:
                raise ConfigError(f"judge_{setting} must be at least 1, got {value}")
        self.chat = chat
        self.rubric = rubric
        self.name = name or chat.name
        self.concurrency = concurrency
        self.cache = cache
        self.budget = budget
        self.log = log
        self.attempts = attempts
        self.max_failed_in_a_row = max_failed_in_a_row
        self.asked = self.from_cache = self.unreadable = self.failed = 0
        self._failed_in_a_row = self._unreadable_in_a_row = 0
        self._thread = LoopThread("llm-judge", getattr(chat, "aclose", None))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = asyncio.Semaphore(concurrency)

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Judges cases, as many at once as ``concurrency`` allows.

        Args:
            cases: B cases; the rubric says which fields it reads.

        Returns:
            B verdicts in the order of the cases.

        Raises:
            BackendError: every call would fail (a key that is refused, an unknown model), or
                ``max_failed_in_a_row`` of them did; or cache or log cannot be written. Calls in flight are called off.
            BudgetExceededError: the budget is used up. Calls in flight are waited for first, and kept in the cache.
            ConfigError: a case's ``meta`` cannot be written as JSON.
        """
        if not cases:
            return []
        return await asyncio.wrap_future(self._thread.submit(self._judge(list(cases))))

    def close(self) -> None:
        """Calls off what is in flight, closes the chat and ends the thread; the next call starts anew."""
        self._thread.close()

    async def _judge(self, cases: list[JudgeCase]) -> list[Verdict]:
        if self._loop is not asyncio.get_running_loop():  # after a close()
            self._loop, self._slots = asyncio.get_running_loop(), asyncio.Semaphore(self.concurrency)
        identity = f"{self.name} {getattr(self.chat, 'fingerprint', '')}"
        places: dict[bytes, list[list[int]]] = {}
        for positions in self._groups(cases):
            together = [cases[i] for i in positions]
            key = cases_key(identity, self.chat.model, self.rubric.name, self.rubric.version, together)
            places.setdefault(key, []).append(positions)
        groups = {key: _Group(key, [cases[i] for i in same[0]], len(same)) for key, same in places.items()}
        found = {} if self.cache is None else self.cache.load(list(groups))
        self.from_cache += len(found)
        for key, verdicts in found.items():
            self._write_log(groups[key], verdicts, cached=True)
        rest = [group for key, group in groups.items() if key not in found]
        answered = await self._all(rest)
        found.update({group.key: verdicts for group, verdicts in zip(rest, answered, strict=True)})
        results: list[Verdict | None] = [None] * len(cases)
        for key, same in places.items():
            for positions in same:
                for position, verdict in zip(positions, found[key], strict=True):
                    results[position] = verdict
        return [verdict for verdict in results if verdict is not None]

    def _groups(self, cases: Sequence[JudgeCase]) -> list[list[int]]:
        groups = self.rubric.group(cases)
        if sorted(i for group in groups for i in group) != list(range(len(cases))):
            raise ValueError(
                f"rubric {self.rubric.name!r} must put each of {len(cases)} cases into one group, got {groups}"
            )
        return [group for group in groups if group]

    async def _all(self, groups: Sequence[_Group]) -> list[list[Verdict]]:
        """Asks groups concurrently; after a failure nothing goes on in the background."""
        if not groups:
            return []

        async def in_turn(group: _Group) -> list[Verdict]:
            async with self._slots:
                try:
                    return await self._ask(group)
                except BackendError:
                    # Here and not below, where the next in turn would have been asked already.
                    for task in tasks:
                        if task is not asyncio.current_task():
                            task.cancel()
                    raise

        tasks = [asyncio.ensure_future(in_turn(group)) for group in groups]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failures = _failures(tasks)
            if failures and all(isinstance(error, BudgetExceededError) for error in failures):
                # What is in flight is paid for. What still waits for its turn meets the empty budget at once.
                await asyncio.wait(tasks, return_when=asyncio.ALL_COMPLETED)
                failures = _failures(tasks)
            if failures:
                raise min(failures, key=lambda error: isinstance(error, BudgetExceededError))
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, group: _Group) -> list[Verdict]:
        prompt = self.rubric.prompt(group.cases)
        trouble = ""
        for _ in range(self.attempts):
            if self.budget is not None:
                self.budget.reserve()
            self.asked += 1
            group.attempts += 1
            try:
                reply = await self.chat.complete(prompt)
            except ChatError as error:
                return self._give_up(group, error)
            self._failed_in_a_row = 0
            group.add(reply)
            if self.budget is not None:
                self.budget.record_reply(
                    self.chat.name,
                    prompt_tokens=reply.prompt_tokens,
                    completion_tokens=reply.completion_tokens,
                    requests=reply.requests,
                )
            try:
                verdicts = self._read(reply, group.cases)
            except ValueError as error:
                trouble = str(error)
                continue
            self._unreadable_in_a_row = 0
            if self.cache is not None and all(verdict.score is not None for verdict in verdicts):
                self.cache.store(group.key, verdicts)
            self._write_log(group, verdicts)
            return verdicts
        return self._not_read(group, trouble)

    def _read(self, reply: Reply, cases: Sequence[JudgeCase]) -> list[Verdict]:
        try:
            verdicts = self.rubric.parse(reply.text, cases)
        except ValueError as error:
            if reply.finish_reason == "length":
                raise ValueError(f"{error} (the reply was cut at its token limit)") from error
            raise
        if len(verdicts) != len(cases):
            raise ValueError(f"{len(verdicts)} verdicts were read for {len(cases)} cases")
        for verdict in verdicts:
            if verdict.score is not None and not 0.0 <= verdict.score <= 1.0:
                raise ValueError(f"the score {verdict.score} is not in [0, 1]")
        return verdicts

    def _not_read(self, group: _Group, trouble: str) -> list[Verdict]:
        self.unreadable += 1
        self._unreadable_in_a_row += 1
        if self._unreadable_in_a_row == _UNREADABLE_IN_A_ROW:
            logger.warning(
                "%s: the replies on %d cases in a row could not be read by rubric %s (%s)",
                self.chat.name,
                _UNREADABLE_IN_A_ROW,
                self.rubric.name,
                trouble,
            )
        times = f"{self.attempts} replies" if self.attempts > 1 else "1 reply"
        return self._without_score(group, f"unreadable after {times}: {trouble}")

    def _give_up(self, group: _Group, error: ChatError) -> list[Verdict]:
        group.requests += error.requests
        if self.budget is not None:
            self.budget.record_failure(requests=error.requests)
        self.failed += 1
        self._failed_in_a_row += 1
        verdicts = self._without_score(group, str(error))
        if self._failed_in_a_row >= self.max_failed_in_a_row:
            raise BackendError(
                f"{self.max_failed_in_a_row} calls of the judge in a row failed, the last: {error}"
            ) from error
        return verdicts

    def _without_score(self, group: _Group, reason: str) -> list[Verdict]:
        verdicts = [Verdict(None, reason) for _ in group.cases]
        self._write_log(group, verdicts)
        return verdicts

    def _write_log(self, group: _Group, verdicts: Sequence[Verdict], *, cached: bool = False) -> None:
        if self.log is None:
            return
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        for case, verdict in zip(group.cases, verdicts, strict=True):
            self.log.write(
                {
                    "time": time,
                    "judge": self.name,
                    "model": self.chat.model,
                    "rubric": self.rubric.name,
                    "version": self.rubric.version,
                    "case": case_hash(case),
                    "question": case.question,
                    "answer": case.answer,
                    "score": verdict.score,
                    "reason": verdict.reason,
                    "cached": cached,
                    "count": group.count,
                    "asked_together": len(group.cases),
                    "attempts": group.attempts,
                    "requests": group.requests,
                    "prompt_tokens": group.prompt_tokens,
                    "completion_tokens": group.completion_tokens,
                }
            )


@dataclass(slots=True)
class _Group:
    """Cases that are asked together, and what asking them took."""

    key: bytes
    cases: list[JudgeCase]
    count: int  # how often they stand in the batch
    attempts: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, reply: Reply) -> None:
        self.requests += reply.requests
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens


def _failures(tasks: Iterable[asyncio.Future[list[Verdict]]]) -> list[BaseException]:
    return [error for task in tasks if task.done() and not task.cancelled() and (error := task.exception())]
