"""A retriever whose searches can be held back and made to fail, and real servers over it on loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from rag_rl.server import SearchThread, Server, Service, bind
from rag_rl.types import Hit, Passage, Query


class Fake:
    """Ten passages a query, named after it; remembers its calls, waits while ``free`` is not set, fails on words."""

    fingerprint = "print-of-fake"

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.begun = threading.Semaphore(0)
        self.calls: list[tuple[list[Any], int, Any]] = []
        self.errors: dict[str, Exception] = {}
        self.score = 1.0
        self.short = False
        self.closed = False

    def __len__(self) -> int:
        return 10

    def search(self, queries, *, top_k, exclude=None):
        self.calls.append((list(queries), top_k, exclude))
        self.begun.release()
        assert self.free.wait(20)
        texts = [query.text if isinstance(query, Query) else query for query in queries]
        for text in texts:
            if text in self.errors:
                raise self.errors[text]
        found = [
            [
                Hit(
                    Passage(f"{text}/{rank}", f"text {rank} of {text}", f"Title {rank}", rank), self.score / rank, rank
                )
                for rank in range(1, top_k + 1)
            ]
            for text in texts
        ]
        return found[1:] if self.short else found

    def close(self) -> None:
        self.closed = True


@contextmanager
def running(open_retriever: Callable[[], Any], **options: Any) -> Iterator[SimpleNamespace]:
    """A server in a thread; gives ``url``, ``client``, ``service`` and ``server``."""
    service = Service(SearchThread(open_retriever), **options)
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    client = httpx.Client(base_url=url, timeout=20, trust_env=False)
    try:
        yield SimpleNamespace(url=url, client=client, service=service, server=server, thread=thread)
    finally:
        client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until_green(client: httpx.Client) -> dict[str, Any]:
    """What /health tells once it is green."""
    for _ in range(2000):
        reply = client.get("/health")
        if reply.status_code == 200:
            return reply.json()
        threading.Event().wait(0.005)
    raise AssertionError(reply.text)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture(autouse=True)
def _stops_at_once(monkeypatch):
    monkeypatch.setattr("rag_rl.server.process._LINGER_S", 0.0)


@pytest.fixture(scope="session")
def serving():
    """Context manager over a retriever: a server that is ready."""

    @contextmanager
    def start(retriever: Any, **options: Any) -> Iterator[SimpleNamespace]:
        with running(lambda: retriever, **options) as there:
            wait_until_green(there.client)
            yield there

    return start


@pytest.fixture(scope="session")
def starting():
    """Context manager over what opens a retriever: a server that may not be ready yet."""
    return running


@pytest.fixture(scope="session")
def green():
    """Waits for /health."""
    return wait_until_green
