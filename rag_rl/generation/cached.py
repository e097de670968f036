"""A generator that remembers its greedy replies: the trajectories of a group ask the same things again and again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from rag_rl.errors import ConfigError
from rag_rl.types import Generation, Generator, Prompt


class CachedGenerator:
    """Answers repeated prompts from memory; only what is new reaches the generator, in one batch and once.

    Only greedy calls (temperature 0) are remembered: the key is the prompt with ``max_new_tokens`` and ``stop``, all
    that a greedy reply depends on. Sampled calls pass through. A call that fails stores nothing, and neither does a
    reply that is none. For a model that does not change: one under training needs none, or one of its own a step.

    Args:
        generator: who answers what is new.
        max_in_memory: replies to remember, the latest used; >= 1.

    Attributes:
        hits: prompts that were answered from memory, or by another prompt of the same call.
        misses: prompts that were asked of the generator.

    Raises:
        ConfigError: ``max_in_memory`` is below 1.

    Example:
        >>> from rag_rl.generation import ScriptedGenerator
        >>> cached = CachedGenerator(ScriptedGenerator(["Mira."]))
        >>> replies = cached.generate(["Who?", "Who?"], max_new_tokens=4, temperature=0.0)
        >>> [reply.text for (reply,) in replies], cached.hits, cached.misses
        (['Mira.', 'Mira.'], 1, 1)
    """

    def __init__(self, generator: Generator, *, max_in_memory: int = 50_000) -> None:
        if max_in_memory < 1:
            raise ConfigError(f"max_in_memory must be at least 1, got {max_in_memory}")
        self.generator = generator
        self.max_in_memory = max_in_memory
        self.hits = self.misses = 0
        self._replies: OrderedDict[bytes, Generation] = OrderedDict()
        self._lock = threading.Lock()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[list[Generation]]:
        """The generator's replies, old or new.

        Args:
            prompts: B prompts.
            n: continuations a prompt, >= 1; greedy ones are asked for once and repeated.
            max_new_tokens: budget of one continuation in tokens.
            temperature: 0 for greedy; anything else is not remembered.
            top_p: share of the probability mass that is sampled from.
            stop: strings that end a continuation.
            seed: of sampled calls.

        Returns:
            B lists of ``n`` generations; an empty list where the generator gave none.

        Raises:
            BackendError: as the generator raises it.
            ConfigError: ``n`` is below 1, or as the generator raises it.
        """
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        generate = partial(
            self.generator.generate,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            seed=seed,
        )
        if temperature != 0.0:
            return generate(prompts, n=n)
        keys = [_key(prompt, max_new_tokens, stop) for prompt in prompts]
        known: dict[bytes, Generation] = {}
        with self._lock:
            for key in keys:
                if key in self._replies:
                    self._replies.move_to_end(key)
                    known[key] = self._replies[key]
        new: dict[bytes, Prompt] = {}
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in known:
                new.setdefault(key, prompt)
        if new:
            replies = generate(list(new.values()))
            fresh = {key: row[0] for key, row in zip(new, replies, strict=True) if row}
            known.update(fresh)
            self._remember(fresh)
        with self._lock:
            self.misses += len(new)
            self.hits += len(keys) - len(new)
        return [[known[key]] * n if key in known else [] for key in keys]

    def _remember(self, fresh: dict[bytes, Generation]) -> None:
        with self._lock:
            # "error" marks a request that failed alone: it may pass the next time.
            self._replies.update({key: reply for key, reply in fresh.items() if reply.finish_reason != "error"})
            while len(self._replies) > self.max_in_memory:
                self._replies.popitem(last=False)


def _key(prompt: Prompt, max_new_tokens: int, stop: Sequence[str]) -> bytes:
    return hashlib.sha256(json.dumps([prompt, max_new_tokens, list(stop)]).encode()).digest()
