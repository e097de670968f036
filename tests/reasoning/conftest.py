"""The tiny world with its index, and a chat server on loopback."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rag_rl.tiny import FOLDER
from rag_rl.tiny.world import World, draw_world, questions
from rag_rl.types import Hit, Passage, Query, Question


@dataclass
class Tiny:
    """A world that the packaged encoder has not seen, its questions over two hops, and an index of its passages."""

    world: World
    questions: list[Question]
    retriever: Any
    encoder: Any

    @property
    def passages(self) -> dict[str, Passage]:
        return {passage.doc_id: passage for passage in self.world.passages}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    pytest.importorskip("faiss", reason="faiss is not installed")
    from rag_rl.retrieval import SentenceEncoder, build_index, open_index

    world = draw_world(3, region="heldout", sizes={"person": 40, "town": 24, "guild": 16, "river": 16})
    folder = tmp_path_factory.mktemp("tiny") / "index"
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
    build_index(world.passages, encoder, folder, progress=False)
    return Tiny(world, list(questions(world, hops=2, rng=random.Random(0))), open_index(folder, encoder), encoder)


class GoldPolicy:
    """Finds the gold document of each hop and shows it first; at the hops in ``lost`` (from 0) it finds nothing."""

    def __init__(self, tiny: Tiny, lost: tuple[int, ...] = ()) -> None:
        self.lost = lost
        self.calls: list[list[Query]] = []
        self._passages = tiny.passages
        self._gold = {q.question: [step["gold_doc_id"] for step in q.meta["decomposition"]] for q in tiny.questions}

    def retrieve(self, queries: list[Query]) -> list[tuple[list[Hit], Any]]:
        self.calls.append(list(queries))
        found = []
        for query in queries:
            hop = len(query.history)
            gold = self._gold[query.question][hop]
            others = [p for p in self._passages.values() if p.doc_id not in self._gold[query.question]][:2]
            shown = others if hop in self.lost else [self._passages[gold], *others]
            found.append(([Hit(p, 1.0 / rank, rank) for rank, p in enumerate(shown, start=1)], f"action {hop}"))
        return found


@pytest.fixture
def gold_policy(tiny: Tiny) -> Callable[..., GoldPolicy]:
    return lambda **more: GoldPolicy(tiny, **more)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], str | None]], tuple[str, list[str]]]]:
    """Starts servers: ``reply(text)`` answers a prompt, None refuses it. Gives the base URL and the prompts so far."""
    servers = []

    def start(reply: Callable[[str], str | None]) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
                asked.append(text)
                said = reply(text)
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                if said is None:
                    body = {"error": {"message": "the content filter says no"}}
                payload = json.dumps(body).encode()
                try:
                    self.send_response(400 if said is None else 200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
