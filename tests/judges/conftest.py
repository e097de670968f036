"""A server of the OpenAI protocol on loopback that answers, stalls and breaks off as it is told."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias

import pytest


@dataclass
class Request:
    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass
class Response:
    """What to send.

    ``body`` None: a chat completion of ``text``. ``cut_at``: bytes of the body after which the connection breaks.
    ``sized``: whether the body's length is announced.
    """

    text: str | None = None
    finish: str = "stop"
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 2})
    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    sized: bool = True

    @property
    def payload(self) -> bytes:
        body = self.body
        if body is None:
            message = {"role": "assistant", "content": self.text}
            choice = {"index": 0, "finish_reason": self.finish, "message": message}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            if self.usage is not None:
                body["usage"] = self.usage
        return (body if isinstance(body, str) else json.dumps(body)).encode()


Answered: TypeAlias = "str | dict[str, Any]"
Answer: TypeAlias = "Callable[[Request], Answered | Awaitable[Answered]]"


class ChatServer:
    """Answers with ``answer(request)``: a reply's text or the fields of a ``Response``, awaited where need be."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10.0)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10.0)

    def _run(self, ready: threading.Event) -> None:
        self._loop.run_until_complete(self._serve(ready))
        self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        self._stop = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=512)
        self.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.url = f"{self.origin}/v1"
        ready.set()
        await self._stop.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._talk(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client gave up on us
        finally:
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        request = Request(len(self.requests), head[0].split(" ")[1], headers, body)
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answered = self.answer(request)
            if inspect.isawaitable(answered):
                answered = await _unless_hung_up(answered, reader)
        finally:
            self.in_flight -= 1
        if answered is None:
            return False
        response = Response(text=answered) if isinstance(answered, str) else Response(**answered)
        payload = response.payload
        sent = {"Content-Type": "application/json", **response.headers}
        if response.sized:
            sent["Content-Length"] = str(len(payload))
        else:
            sent["Connection"] = "close"
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in sent.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + payload[: response.cut_at])
        await writer.drain()
        if response.cut_at is not None or not response.sized:
            writer.close()
            await writer.wait_closed()
            return False
        return True


async def _unless_hung_up(answering: Awaitable[Answered], reader: asyncio.StreamReader) -> Answered | None:
    """The answer, or None as soon as the client hangs up."""
    tasks = [asyncio.ensure_future(answering), asyncio.ensure_future(reader.read(1))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], ChatServer]]:
    """Starts servers: ``chat_server(answer).url``."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "GOOGLE_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[ChatServer] = []

    def start(answer: Answer) -> ChatServer:
        servers.append(ChatServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def fake_key() -> str:
    """A key that stands for nothing and is easy to search for."""
    return "-".join(["marked", "fake", "key", "0123456789"])
