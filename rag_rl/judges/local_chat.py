"""Replies from a generator in this process."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rag_rl.errors import ConfigError
from rag_rl.judges.llm import Reply
from rag_rl.types import Generation, Generator, Prompt


class LocalChat:
    """Any ``rag_rl.types.Generator`` as a ``rag_rl.judges.llm.Chat``; prompts asked at the same time are one batch.

    The generator runs in a thread, one batch at a time; what is asked meanwhile makes up the next batch. So the
    judge's ``concurrency`` is what fills a batch.

    Args:
        generator: a model in this process.
        model: what to call it; a part of the cache's key. None for the ``name_or_path`` of the generator's model.
        max_new_tokens: budget of one reply in tokens, >= 1.
        temperature: 0 for greedy.
        stop: strings that end a reply.
        seed: of sampling.
        max_batch: prompts in one call of the generator, >= 1; a larger batch than the generator takes in one pass is
            split by the generator itself.

    Attributes:
        name: the model and where it runs.
        batches: calls of the generator so far.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        model: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        max_batch: int = 64,
    ) -> None:
        if max_new_tokens < 1 or max_batch < 1:
            raise ConfigError(
                f"judge_max_tokens and max_batch must be at least 1, got {max_new_tokens} and {max_batch}"
            )
        if temperature < 0.0:
            raise ConfigError(f"judge_temperature must be 0 or more, got {temperature}")
        self.generator = generator
        self.model = model or _model_of(generator)
        self.name = f"{self.model} in this process"
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.stop = tuple(stop)
        self.seed = seed
        self.max_batch = max_batch
        self.batches = 0
        # One thread: two passes of one model at once would take the memory of both and the time of both.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="local-judge")
        self._queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue] = weakref.WeakKeyDictionary()

    @property
    def fingerprint(self) -> str:
        """Tells apart settings that shape replies."""
        return repr((self.max_new_tokens, self.temperature, self.stop, self.seed))

    async def complete(self, prompt: Prompt) -> Reply:
        """Asks the generator, together with whatever else is asked now.

        Args:
            prompt: text or chat turns.

        Returns:
            Its reply.

        Raises:
            BackendError: the generator's own; it fails the whole batch.
        """
        queue = self._queues.setdefault(asyncio.get_running_loop(), _Queue())
        batch = queue.open
        if batch is None:
            batch = queue.open = _Batch()
            batch.task = asyncio.ensure_future(self._run(queue, batch))
        place = len(batch.prompts)
        batch.prompts.append(prompt)
        if len(batch.prompts) >= self.max_batch:
            queue.open = None
        # One caller that is called off takes nobody else's reply along.
        generation = (await asyncio.shield(batch.task))[place]
        return Reply(
            generation.text,
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=len(generation.token_ids or ()),
            finish_reason=generation.finish_reason,
        )

    def close(self) -> None:
        """Ends the thread; a closed chat cannot be asked again."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _run(self, queue: _Queue, batch: _Batch) -> list[Generation]:
        async with queue.turn:
            await asyncio.sleep(0)  # whoever was woken together with this batch gets into it
            if queue.open is batch:
                queue.open = None
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._generate, batch.prompts)

    def _generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        self.batches += 1
        rows = self.generator.generate(
            prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, stop=self.stop, seed=self.seed
        )
        return [row[0] for row in rows]


@dataclass(eq=False)
class _Batch:
    prompts: list[Prompt] = field(default_factory=list)
    task: asyncio.Future[list[Generation]] = field(init=False)


@dataclass(eq=False)
class _Queue:
    """What one loop asks: the batch that still takes prompts, and whose turn it is."""

    open: _Batch | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


def _model_of(generator: Generator) -> str:
    model = getattr(generator, "model", None)
    name = model if isinstance(model, str) else getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else type(generator).__name__
