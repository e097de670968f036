"""Asking a generator many things of which some may fail: what is an accident, and what is a broken backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rag_rl.errors import BackendError, ConfigError
from rag_rl.reasoning.multihop import Failure
from rag_rl.types import Generation, Generator, Prompt

logger = logging.getLogger(__name__)

# Prompts of a failed call that are asked alone before anything else, to tell an accident from a broken backend; and
# into how many parts the rest is cut, so that one bad prompt of 128 costs about 20 calls.
_PROBES, _PARTS = 3, 8


class Asker:
    """Asks for one reply a prompt; a prompt that fails alone is a ``Failure``, a broken backend raises.

    A call succeeds or fails as a whole (``Generator.generate`` raises ``BackendError``), so after a failed one three
    of its prompts, spread over the call, are asked alone, then the rest in smaller and smaller parts. A prompt that
    fails alone has failed. So has one that the generator itself marks, by an empty list in place of a reply or by the
    ``finish_reason`` "error", which costs no second call. When ``give_up_after`` prompts have failed in a row, without
    a reply to any other between them, over all calls, the backend is taken to be broken. The generator's own repeats
    come on top.

    At temperature 0 a prompt that occurs more than once in a call is asked once.

    Args:
        generator: who is asked.
        max_new_tokens: budget of a reply in tokens, >= 1.
        temperature: 0 for greedy.
        seed: of the sampling.
        chat: whether prompts are given as one user turn, or as plain text (for base models).
        give_up_after: failures in a row that make a backend broken, >= 1.

    Raises:
        ConfigError: ``give_up_after`` is below 1.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        chat: bool = True,
        give_up_after: int = 3,
    ) -> None:
        if give_up_after < 1:
            raise ConfigError(f"give_up_after must be at least 1, got {give_up_after}")
        self.generator = generator
        self.max_new_tokens, self.temperature, self.seed, self.chat = max_new_tokens, temperature, seed, chat
        self.give_up_after = give_up_after
        self._failed_in_a_row = 0

    def ask(self, prompts: Sequence[Prompt]) -> list[Generation | Failure]:
        """Asks.

        Args:
            prompts: B prompts: texts, or chats, which are sent as they are.

        Returns:
            B replies, in their order.

        Raises:
            BackendError: the backend is taken to be broken; the generator's own error, which names it.
            DataError: a prompt is too long for the model (where the generator itself can tell).
        """
        places: dict[str | int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(repr(prompt) if self.temperature == 0.0 else place, []).append(place)
        asked = [prompts[where[0]] for where in places.values()]
        replies: list[Generation | Failure] = [Failure("not asked")] * len(prompts)
        for where, reply in zip(places.values(), self._replies(asked), strict=True):
            for place in where:
                replies[place] = reply
        return replies

    def _replies(self, prompts: Sequence[Prompt]) -> list[Generation | Failure]:
        replies: list[Generation | Failure] = [Failure("not asked")] * len(prompts)
        pending = [list(range(len(prompts)))]
        whole = True
        while pending:
            part = pending.pop(0)
            try:
                given = self._call([prompts[i] for i in part])
            except BackendError as error:
                if not part:
                    raise
                if len(part) == 1:
                    self._failed_in_a_row += 1
                    if self._failed_in_a_row >= self.give_up_after:
                        raise
                    replies[part[0]] = Failure(str(error))
                else:
                    pending[:0] = _cut(part, probes=_PROBES if whole else 0)
                whole = False
                continue
            for i, reply in zip(part, given, strict=True):
                replies[i] = reply
        failures = [reply.reason for reply in replies if isinstance(reply, Failure)]
        if failures:
            logger.warning("%d of %d prompts failed, the first: %s", len(failures), len(prompts), failures[0])
        return replies

    def _call(self, prompts: Sequence[Prompt]) -> list[Generation | Failure]:
        asked: list[Prompt] = [
            [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        rows = self.generator.generate(
            asked, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
        )
        replies = [_read(row) for row in rows]
        failed = sum(isinstance(reply, Failure) for reply in replies)
        self._failed_in_a_row = self._failed_in_a_row + failed if failed == len(replies) else 0
        if self._failed_in_a_row >= self.give_up_after:
            raise BackendError(
                f"{type(self.generator).__name__} gave no reply to {self._failed_in_a_row} prompts in a row"
            )
        return replies


def _read(row: Sequence[Generation]) -> Generation | Failure:
    if not row:
        return Failure("the generator gave no reply")
    if row[0].finish_reason == "error":
        return Failure(row[0].text or "the generator marked its reply as failed")
    return row[0]


def _cut(part: Sequence[int], *, probes: int) -> list[list[int]]:
    """Cuts a call into smaller ones: first so many single prompts, spread over it, then parts of the others.

    The parts are strided: prompts that fail for a common reason, such as those about one question, are neighbours, and
    must not look like a broken backend.
    """
    step = max(1, -(-len(part) // max(1, probes)))
    alone = list(part[::step]) if probes else []
    rest = [i for i in part if i not in set(alone)]
    return [[i] for i in alone] + [rest[start::_PARTS] for start in range(min(_PARTS, len(rest)))]
