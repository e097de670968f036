"""Replies from a server that speaks the OpenAI protocol: Gemini, OpenAI, vLLM, ``transformers serve``, ..."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import random
import re
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from rag_rl.errors import BackendError, ConfigError, MissingPackageError
from rag_rl.judges.llm import ChatError, Reply
from rag_rl.types import Prompt

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
GEMINI_URL = "https://generativelanguage.googleapis.com/v1beta/openai/"

_NO_KEY = "EMPTY"
_LONGEST_BACKOFF_S = 30.0
# A shorter "key" is a word that satisfies some server ("EMPTY", "none", "x"); taking it out would spoil replies.
_SHORTEST_SECRET = 8
_UNKNOWN_MODEL = re.compile(
    r"model_not_found|pinned to|(unknown|invalid|unsupported|no such) model"
    r"|\bmodel\b.{0,120}?\b(not found|not exist|unknown|not available|is not supported)",
    re.IGNORECASE | re.DOTALL,
)
_BAD_KEY = re.compile(r"api[ _-]?key", re.IGNORECASE)
# Gemini tells the pause in the body and not in a header.
_RETRY_DELAY = re.compile(r'"retryDelay"\s*:\s*"([\d.]+)s"')


class OpenAIChat:
    """A served model as a ``rag_rl.judges.llm.Chat``, by chat completions.

    Repeats are our own, and those of the openai client are off. The client's would cover status, lost connections and
    Retry-After as well; but it draws its jitter from the global random state, which a training's seed governs, takes
    a body that was cut off without a length for a reply, cannot tell how many requests it sent, and its pauses cannot
    be set.

    The key is read from the environment at each call, is part of no message, and is taken out of every text that
    comes back.

    Args:
        model: name under which the server knows the model.
        base_url: such as ``http://127.0.0.1:8000/v1``; None for the variable ``OPENAI_BASE_URL``, else OpenAI's own.
        api_key_env: name of the environment variable with the key; "" for a server that wants none. Servers on
            loopback may go without in any case.
        timeout_s: patience for one request from sending it to the end of its reply, in seconds, > 0.
        max_retries: repeats of one request after a 408, 409, 429 or 5xx, a lost connection, a timeout or a reply that
            is no chat completion, >= 0.
        backoff_s: the first pause in seconds, >= 0; it doubles up to 30 s, less up to half by chance.
        longest_wait_s: the longest pause that a server may ask for (Retry-After); one that asks for more is not
            waited for, and the call fails.
        temperature: >= 0; None leaves it to the server, for models that take no other than theirs.
        max_tokens: budget of one reply in tokens, >= 1; None leaves it to the server. Models that reason spend it on
            their reasoning, too.
        limit_field: name of the field for that budget; newer OpenAI models want "max_completion_tokens".
        json_mode: whether to ask for JSON by ``response_format``. Many servers ignore it, so replies are read with the
            same care; one that refuses it is asked without.
        extra_body: further fields of every request (``{"reasoning_effort": "none"}``).
        sleep: how to pause.
        seed: of the pauses' chance part; None for another one each time.

    Attributes:
        name: model and address, without credentials.
        requests: sent so far, repeats included.

    Raises:
        ConfigError: a value out of range, or no key in the environment for a server that is not on loopback.
        MissingPackageError: openai is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 60.0,
        max_retries: int = 5,
        backoff_s: float = 0.5,
        longest_wait_s: float = 120.0,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        json_mode: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        seed: int | None = None,
    ) -> None:
        if timeout_s <= 0.0:
            raise ConfigError(f"judge_timeout_s must be above 0, got {timeout_s}")
        if max_retries < 0 or backoff_s < 0.0 or longest_wait_s < 0.0:
            raise ConfigError(
                "judge_max_retries, backoff_s and longest_wait_s must be 0 or more, "
                f"got {max_retries}, {backoff_s} and {longest_wait_s}"
            )
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"judge_max_tokens must be at least 1, got {max_tokens}")
        if temperature is not None and temperature < 0.0:
            raise ConfigError(f"judge_temperature must be 0 or more, got {temperature}")
        self.model = model
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self.name = f"{model} at {_without_credentials(self.base_url)}"
        self.api_key_env = api_key_env
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.backoff_s = backoff_s
        self.longest_wait_s = longest_wait_s
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.limit_field = limit_field
        self.json_mode = json_mode
        self.extra_body = dict(extra_body or {})
        self.requests = 0
        self._takes_json_mode = True
        self._sleep = sleep
        self._jitter = random.Random(seed)
        # One client a loop: connections belong to the loop that opened them, and judges of several rubrics may share
        # a chat.
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncOpenAI] = weakref.WeakKeyDictionary()
        # What is missing is told now, before anything is trained; and the import takes a second, which in the loop
        # would hold up everything in flight.
        self._make_client = _client_class()
        self._key()

    @classmethod
    def gemini(
        cls,
        model: str = "gemini-2.5-flash",
        *,
        base_url: str = GEMINI_URL,
        api_key_env: str = "GOOGLE_API_KEY",
        max_tokens: int | None = 8192,
        **options: Any,
    ) -> OpenAIChat:
        """Google's models through their OpenAI-compatible endpoint.

        Args:
            model: such as "gemini-2.5-flash".
            base_url: the endpoint.
            api_key_env: name of the environment variable with the key.
            max_tokens: larger than elsewhere, since these models reason before they answer.
            **options: as for the class.

        Returns:
            A chat.

        Raises:
            ConfigError: a value out of range, or no key in the environment.
        """
        return cls(model, base_url=base_url, api_key_env=api_key_env, max_tokens=max_tokens, **options)

    @property
    def fingerprint(self) -> str:
        """Tells apart settings that shape replies."""
        shaping = [self.temperature, self.max_tokens, self.json_mode, self.extra_body]
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]

    async def complete(self, prompt: Prompt) -> Reply:
        """Asks the server.

        Args:
            prompt: text (one user turn) or chat turns.

        Returns:
            Its reply.

        Raises:
            ChatError: the server refuses this request or goes on failing; names model and address.
            BackendError: the server refuses the key or the model, so that every request would fail; names model and
                address and says what to check.
            ConfigError: the key is gone from the environment.
        """
        requests = repeats = 0
        while True:
            requests += 1
            self.requests += 1
            outcome = await self._request(prompt)
            # Raised here, where no variable holds the key and no handler the client's own exception with its headers.
            if isinstance(outcome, Reply):
                return replace(outcome, requests=requests)
            if outcome.without_json_mode:
                continue
            if outcome.check:
                raise BackendError(f"{self.name}: {outcome.text}; check {outcome.check}")
            asks_for_more = (outcome.wait_s or 0.0) > self.longest_wait_s
            if not outcome.may_pass or asks_for_more or repeats >= self.max_retries:
                break
            repeats += 1
            pause = outcome.wait_s
            if pause is None:
                pause = min(_LONGEST_BACKOFF_S, self.backoff_s * 2 ** (repeats - 1)) * self._jitter.uniform(0.5, 1.0)
            logger.info("%s: %s; repeat %d of %d in %.1f s", self.name, outcome.text, repeats, self.max_retries, pause)
            await self._sleep(pause)
        asks = f"; it asks to wait {outcome.wait_s:.0f} s" if asks_for_more else ""
        raise ChatError(
            f"{self.name}: no answer after {requests} request{'s' if requests > 1 else ''}: {outcome.text}{asks}",
            requests=requests,
        )

    async def aclose(self) -> None:
        """Closes the connections that were opened in the running loop; the next call opens new ones."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else _NO_KEY
        if key:
            return key
        if _is_loopback(self.base_url):
            return _NO_KEY
        raise ConfigError(
            f"no key for {self.name}: set the environment variable {self.api_key_env}, "
            f"or name another one (judge_api_key_env; empty for a server that wants no key)"
        )

    def _client(self, key: str) -> AsyncOpenAI:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._make_client(api_key=key, base_url=self.base_url, max_retries=0, timeout=self.timeout_s)
            self._clients[loop] = client
        elif client.api_key != key:
            client.api_key = key
        return client

    async def _request(self, prompt: Prompt) -> Reply | _Trouble:
        key = self._key()
        client = self._client(key)
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        with_json_mode = self.json_mode and self._takes_json_mode
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.max_tokens is not None:
            body[self.limit_field] = self.max_tokens
        if with_json_mode:
            body["response_format"] = {"type": "json_object"}
        try:
            # The client's own timeout is one for each step; a server that sends a byte now and then would never end.
            reply: Any = await asyncio.wait_for(
                client.chat.completions.create(**body, extra_body=self.extra_body or None), self.timeout_s
            )
            outcome = _read_reply(reply)
        except (asyncio.TimeoutError, APITimeoutError):
            outcome = _Trouble(f"no reply within {self.timeout_s:g} s")
        except APIConnectionError as error:
            outcome = _Trouble(f"the connection failed ({error.__cause__ or error})")
        except APIStatusError as error:
            outcome = self._refusal(error, with_json_mode=with_json_mode)
        except json.JSONDecodeError:
            # A body without a length that was cut off, or a page of some gateway that calls itself JSON.
            outcome = _Trouble("the reply is not JSON")
        except OpenAIError as error:
            outcome = _Trouble(_one_line(str(error)), may_pass=False)
        return replace(outcome, text=self._without_secrets(outcome.text, key))

    def _refusal(self, error: APIStatusError, *, with_json_mode: bool) -> _Trouble:
        status, told = error.status_code, _told(error)
        text = f"HTTP {status}: {told}"
        if status == 400 and with_json_mode and "response_format" in error.response.text:
            if self._takes_json_mode:
                self._takes_json_mode = False
                logger.info("%s refuses response_format: going on without it", self.name)
            return _Trouble(text, without_json_mode=True)
        key = f"the key in the environment variable {self.api_key_env or '(none is named)'}"
        if status in (401, 403) or (status == 400 and _BAD_KEY.search(told)):
            return _Trouble(text, check=key)
        if status == 402 or error.code == "insufficient_quota":
            return _Trouble(text, check=f"the plan behind {key}")
        if status == 404 or (status in (400, 422) and _UNKNOWN_MODEL.search(f"{error.code} {told}")):
            return _Trouble(text, check=f"the model's name {self.model!r} and the base URL (it mostly ends in /v1)")
        may_pass = status in (408, 409, 429) or status >= 500
        return _Trouble(text, may_pass=may_pass, wait_s=_retry_after(error.response.headers, error.response.text))

    def _without_secrets(self, text: str, key: str) -> str:
        parts = urlsplit(self.base_url)
        for secret in (key, parts.password or "", *(pair.partition("=")[2] for pair in parts.query.split("&"))):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text


def _client_class() -> type[AsyncOpenAI]:
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise MissingPackageError("openai is not installed: pip install openai") from error
    return AsyncOpenAI


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a request brought no reply."""

    text: str
    may_pass: bool = True
    check: str = ""  # what to check, where every other request would fail as well
    wait_s: float | None = None
    without_json_mode: bool = False


def _read_reply(reply: Any) -> Reply | _Trouble:
    """The text of the first choice; some gateways send status 200 without one."""
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        told = reply if isinstance(reply, str) else getattr(reply, "error", None)
        return _Trouble(f"the reply is no chat completion{f': {_one_line(str(told))}' if told else ''}")
    usage = getattr(reply, "usage", None)
    prompt_tokens, completion_tokens, total_tokens = (
        getattr(usage, f"{kind}_tokens", None) or 0 for kind in ("prompt", "completion", "total")
    )
    return Reply(
        # Null where the whole budget went into reasoning.
        choices[0].message.content or "",
        prompt_tokens=prompt_tokens,
        # Gemini counts its reasoning, which is paid for like the reply, in the total only.
        completion_tokens=max(completion_tokens, total_tokens - prompt_tokens),
        finish_reason="length" if choices[0].finish_reason == "length" else "stop",
    )


def _told(error: APIStatusError) -> str:
    """The server's own words, from whichever of the usual forms the body has (Gemini wraps its error in a list)."""
    body: Any = error.body
    if isinstance(body, list) and body:
        body = body[0]
    for name in ("error", "message", "detail"):
        if isinstance(body, Mapping) and body.get(name):
            body = body[name]
    return _one_line(body if isinstance(body, str) else error.response.text) or "(no explanation)"


def _retry_after(headers: Mapping[str, str], body: str) -> float | None:
    """Seconds that the server asks to wait: as milliseconds, as seconds, as a date, or as Gemini tells it."""
    for header, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        given = headers.get(header)
        if given is None:
            continue
        try:
            seconds = float(given) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(given).timestamp() - time.time()
            except ValueError:
                continue
        if seconds == seconds:  # not NaN
            return max(0.0, seconds)
    found = _RETRY_DELAY.search(body)
    try:
        return None if found is None else float(found[1])
    except ValueError:
        return None


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _one_line(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
