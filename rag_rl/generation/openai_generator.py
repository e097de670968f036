"""Generation by a server that speaks the OpenAI protocol: OpenAI, Gemini, vLLM, ``transformers serve``, ..."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import random
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

from rag_rl.errors import BackendError, ConfigError, MissingPackageError
from rag_rl.generation.prompting import cut_at_stop, prompt_text
from rag_rl.types import Generation, Prompt

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

ServedType: TypeAlias = Literal["api", "instruct", "base"]
_T = TypeVar("_T")

_DEFAULT_URL = "https://api.openai.com/v1"
_MOST_STOPS = 4  # more than these are refused by OpenAI; all of them are looked for in the reply anyway
_LONGEST_BACKOFF_S = 30.0
_LONGEST_RETRY_AFTER_S = 300.0


class OpenAIGenerator:
    """A served model as a ``rag_rl.types.Generator``.

    Requests run concurrently on one event loop in a thread of its own, so that it can be called from plain code and
    from within a running event loop alike (which it blocks until the replies are there).

    A request that fails for itself alone (refused with HTTP 400, 413 or 422; timed out, or answered without a choice,
    at every repeat) gives a generation with ``finish_reason`` "error" and the reason as its text; the others go on.
    Everything else that fails is a broken backend: the call raises, and nothing goes on asking. So does a call of
    which every request failed, and one of which as many have timed out as may be in flight before any was answered.

    The key is read from the environment at each call; it is not kept, and taken out of every message.

    Args:
        model: name under which the server knows the model.
        base_url: such as ``http://127.0.0.1:8000/v1``; None for the variable ``OPENAI_BASE_URL``, else OpenAI's own.
        api_key_env: name of the environment variable with the key; "" for a server that wants none. Servers on
            loopback may go without in any case.
        generator_type: "api" and "instruct" use chat completions (a plain-text prompt becomes one user turn); "base"
            uses completions (chat turns are written as plain text).
        max_concurrency: requests in flight, >= 1.
        timeout_s: patience for one request, in seconds, > 0.
        max_retries: repeats of one request after a 408, 409, 429 or 5xx, a lost connection or a timeout, >= 0. The
            pause doubles from ``backoff_s`` to 30 s, or is the one that the server asks for (Retry-After).
        backoff_s: first pause in seconds, >= 0.
        limit_field: name of the field for the token budget; newer OpenAI models want "max_completion_tokens".
        extra_body: further fields of every request, for what a server offers beyond the protocol.

    Attributes:
        requests: requests sent so far, repeats included.
        retries: repeats among them.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        generator_type: ServedType = "api",
        max_concurrency: int = 16,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        backoff_s: float = 0.5,
        limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if generator_type not in ("api", "instruct", "base"):
            raise ConfigError(f"generator_type must be 'api', 'instruct' or 'base', got {generator_type!r}")
        if max_concurrency < 1:
            raise ConfigError(f"generator_max_concurrency must be at least 1, got {max_concurrency}")
        if timeout_s <= 0.0:
            raise ConfigError(f"generator_timeout_s must be above 0, got {timeout_s}")
        if max_retries < 0 or backoff_s < 0.0:
            raise ConfigError(f"generator_max_retries and backoff_s must be 0 or more, got {max_retries}, {backoff_s}")
        self.model = model
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL
        self.api_key_env = api_key_env
        self.generator_type: ServedType = generator_type
        self.max_concurrency = max_concurrency
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.backoff_s = backoff_s
        self.limit_field = limit_field
        self.extra_body = dict(extra_body or {})
        self.requests = 0
        self.retries = 0
        self._jitter = random.Random()  # its own, so that no repeat moves the global random state
        self._thread = _LoopThread()
        self._client: AsyncOpenAI | None = None

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
        """Asks the server for continuations.

        Args:
            prompts: B prompts.
            n: continuations a prompt, >= 1: as many requests, since many servers ignore the protocol's own ``n``. At
                temperature 0 one request, its reply repeated.
            max_new_tokens: budget of one continuation in tokens, >= 1.
            temperature: 0 for greedy, else > 0. ``transformers serve`` samples only if the served model's
                ``generation_config.json`` says ``do_sample: true``.
            top_p: share of the probability mass that is sampled from, in (0, 1].
            stop: strings that end a continuation; the text is cut before them even where the server is not up to it.
            seed: each request gets one of its own, counted up from this; honouring it is the server's affair.

        Returns:
            B lists of ``n`` generations, without token ids; those of a request that failed alone are marked "error".

        Raises:
            BackendError: the server cannot be reached, refuses the key or the model, goes on failing, or every request
                failed; names the base URL.
            ConfigError: a value out of range, or no key in the environment.
            MissingPackageError: openai is not installed.
        """
        if n < 1 or max_new_tokens < 1:
            raise ConfigError(f"n and max_new_tokens must be at least 1, got {n} and {max_new_tokens}")
        if temperature < 0.0 or not 0.0 < top_p <= 1.0:
            raise ConfigError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
        if isinstance(stop, str) or not all(stop):
            raise ConfigError(f"stop must be a list of non-empty strings, got {stop!r}")
        copies = 1 if temperature == 0.0 else n
        bodies = []
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(copies)):
            body = {"model": self.model, self.limit_field: max_new_tokens, "temperature": temperature}
            if top_p != 1.0:
                body["top_p"] = top_p
            if stop:
                body["stop"] = list(stop)[:_MOST_STOPS]
            if seed is not None:
                body["seed"] = seed + number
            if self.generator_type == "base":
                body["prompt"] = prompt_text(prompt)
            else:
                body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            bodies.append(body)
        if not bodies:
            return []
        replies = self._thread.run(self._ask_all(bodies, list(stop), self._key()))
        return [replies[start : start + copies] * (n // copies) for start in range(0, len(replies), copies)]

    def close(self) -> None:
        """Closes the connections and ends the thread; the next call starts anew."""
        client, self._client = self._client, None
        if client is not None:
            self._thread.run(client.close())
        self._thread.close()

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else "EMPTY"
        if key:
            return key
        if _is_loopback(self.base_url):
            return "EMPTY"
        raise ConfigError(
            f"no key for {self.base_url}: set the environment variable {self.api_key_env}, "
            f"or name another one (the ..._api_key_env beside its ..._base_url; empty for a server that wants no key)"
        )

    async def _ask_all(self, bodies: Sequence[dict[str, Any]], stop: Sequence[str], key: str) -> list[Generation]:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise MissingPackageError("openai is not installed: pip install openai") from error
        if self._client is None:
            # Made once, for its connections; the key goes onto a copy that lives as long as this call.
            self._client = AsyncOpenAI(api_key="EMPTY", base_url=self.base_url, max_retries=0, timeout=self.timeout_s)
        client = self._client.with_options(api_key=key)
        slots = asyncio.Semaphore(self.max_concurrency)
        answered = timed_out = 0

        async def one(body: dict[str, Any]) -> Generation:
            nonlocal answered, timed_out
            async with slots:
                try:
                    generation = await self._ask(client, body, stop, key)
                except _LoneFailureError as failure:
                    timed_out += failure.timed_out
                    if failure.timed_out and not answered and timed_out >= self.max_concurrency:
                        raise  # a server that hangs would cost a timeout a request
                    return Generation(str(failure), finish_reason="error")
                answered += 1
                return generation

        tasks = [asyncio.ensure_future(one(body)) for body in bodies]
        try:
            replies = list(await asyncio.gather(*tasks))
        finally:
            # After a failure (or an interrupt) nothing goes on asking in the background.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not answered:
            many = f"all {len(replies)} requests failed, the first: " if len(replies) > 1 else ""
            raise BackendError(f"{many}{replies[0].text}")
        return replies

    async def _ask(self, client: AsyncOpenAI, body: dict[str, Any], stop: Sequence[str], key: str) -> Generation:
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        attempt, trouble = 0, ""
        while True:
            self.requests += 1
            asked_for: float | None = None
            alone = timed_out = False
            try:
                if self.generator_type == "base":
                    reply: Any = await client.completions.create(**body, extra_body=self.extra_body)
                else:
                    reply = await client.chat.completions.create(**body, extra_body=self.extra_body)
                generation = _read_reply(reply, stop)
                if generation is not None:
                    return generation
                # With status 200: what some services make of a prompt that their filter refuses.
                trouble, again, alone = "the reply holds no choices", True, True
            except APITimeoutError:
                trouble, again = f"no reply within {self.timeout_s:g} s", True
                alone = timed_out = True
            except APIConnectionError as error:
                trouble, again = f"cannot connect ({error.__cause__ or error})", True
            except APIStatusError as error:
                trouble = f"HTTP {error.status_code}: {_one_line(error.message)}"
                again = error.status_code in (408, 409, 429) or error.status_code >= 500
                timed_out = error.status_code == 408
                alone = timed_out or error.status_code in (400, 413, 422)
                asked_for = _retry_after(error.response.headers)
                if error.status_code in (401, 403):
                    trouble += f" (the key is read from the environment variable {self.api_key_env or '(none)'})"
            except OpenAIError as error:
                trouble, again = _one_line(str(error)), False
            if not again or attempt >= self.max_retries or (asked_for or 0.0) > _LONGEST_RETRY_AFTER_S:
                break
            attempt += 1
            self.retries += 1
            pause = asked_for
            if pause is None:
                pause = min(_LONGEST_BACKOFF_S, self.backoff_s * 2 ** (attempt - 1)) * self._jitter.uniform(0.75, 1.0)
            message = _without(key, trouble)
            logger.info("%s: %s; repeat %d of %d in %.1f s", self.base_url, message, attempt, self.max_retries, pause)
            await asyncio.sleep(pause)
        asks = f"; it asks to wait {asked_for:.0f} s" if asked_for is not None else ""
        message = (
            f"{self.base_url}: model {self.model!r} gave no answer after {attempt + 1} "
            f"request{'s' if attempt else ''}: {_without(key, trouble)}{asks}"
        )
        # Raised outside of the handler on purpose: the client's own exception holds the request, and with it the key.
        if alone:
            raise _LoneFailureError(message, timed_out=timed_out)
        raise BackendError(message)


class _LoneFailureError(BackendError):
    """A request failed, which says nothing about the others."""

    def __init__(self, message: str, *, timed_out: bool) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class _LoopThread:
    """One event loop in a daemon thread, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: threading.Thread | None = None

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._worker = threading.Thread(target=self._loop.run_forever, name="openai-generator", daemon=True)
                self._worker.start()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        with self._lock:
            loop, worker, self._loop, self._worker = self._loop, self._worker, None, None
        if loop is not None and worker is not None:
            loop.call_soon_threadsafe(loop.stop)
            worker.join()
            loop.close()


def _read_reply(reply: Any, stop: Sequence[str]) -> Generation | None:
    """Text of the first choice; None for a reply without one, which some gateways send with status 200."""
    choices = getattr(reply, "choices", None)
    if not choices:
        return None
    choice = choices[0]
    # Chat content is null where the whole budget went into a reasoning field.
    text: str = (choice.text if hasattr(choice, "text") else choice.message.content) or ""
    cut = cut_at_stop(text, stop)
    reason = "length" if choice.finish_reason == "length" and cut is None else "stop"
    usage = getattr(reply, "usage", None)
    return Generation(
        text if cut is None else cut,
        finish_reason=reason,
        prompt_tokens=(getattr(usage, "prompt_tokens", None) or 0),
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: as milliseconds, as seconds, or as a date."""
    given = headers.get("retry-after-ms")
    try:
        if given is not None:
            return max(0.0, float(given) / 1000.0)
        given = headers.get("retry-after")
        return None if given is None else max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(given)).timestamp() - time.time())
    except ValueError:
        return None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _one_line(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


def _without(key: str, text: str) -> str:
    return text if key == "EMPTY" else text.replace(key, "***")
