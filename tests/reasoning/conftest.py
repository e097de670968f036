"""The tiny world with its index, and a chat server on loopback."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from rag_rl.tiny import FOLDER
from rag_rl.tiny.world import World, draw_world, questions
from rag_rl.types import Hit, Passage, Query, Question
from tests.loopback import ChatServer


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


class Replies(ChatServer):
    """Answers a prompt by ``answer(prompt)`` and refuses it where that is None; keeps the prompts."""

    def __init__(self, answer: Callable[[str], str | None]) -> None:
        self.answer = answer
        self.asked: list[str] = []
        super().__init__()

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        self.asked.append(body["messages"][-1]["content"])
        text = self.answer(self.asked[-1])
        return (400, "the content filter says no") if text is None else (200, text)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], str | None]], tuple[str, list[str]]]]:
    """Starts servers: ``reply(text)`` answers a prompt, None refuses it. Gives the base URL and the prompts so far."""
    with ExitStack() as servers:

        def start(reply: Callable[[str], str | None]) -> tuple[str, list[str]]:
            server = servers.enter_context(Replies(reply))
            return server.url, server.asked

        yield start
