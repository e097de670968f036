"""A small deterministic encoder and corpora for the retrieval tests; scripts in subprocesses import it as well."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rag_rl.types import Passage


class StubEncoder:
    """A bag of words: each word is a fixed random vector, a text their normalised sum; counts what it embeds."""

    def __init__(self, dimension: int = 32, seed: int = 0, fail_after: int | None = None) -> None:
        self.dimension, self.seed, self.fail_after = dimension, seed, fail_after
        self._table = np.random.default_rng(seed).standard_normal((2048, dimension)).astype(np.float32)
        self.documents: list[str] = []
        self.query_calls = 0

    @property
    def settings(self) -> dict[str, object]:
        return {"name": "stub", "seed": self.seed, "dimension": self.dimension}

    @property
    def fingerprint(self) -> str:
        return f"stub {self.dimension} {self.seed}"

    def _encode(self, texts):
        rows = [[zlib.crc32(w.encode()) % 2048 for w in re.findall(r"\w+", text.lower())] or [0] for text in texts]
        sums = np.stack([self._table[row].sum(axis=0) for row in rows])
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    def encode_queries(self, queries):
        self.query_calls += 1
        return self._encode([getattr(query, "text", query) for query in queries])

    def encode_documents(self, texts):
        if self.fail_after is not None and len(self.documents) >= self.fail_after:
            raise RuntimeError("the device is gone")
        self.documents += texts
        return self._encode(texts)


def make_passages(count: int, chunks: int = 1) -> list[Passage]:
    """Passages of which every one has words of its own, with some non-ASCII."""
    return [
        Passage(f"d{i // chunks}", f"alpha{i} beta{i * 7} gamma{i * 13} – {'é' * (i % 5)}", f"Title {i}", i % chunks)
        for i in range(count)
    ]


@pytest.fixture
def encoder() -> StubEncoder:
    return StubEncoder()


@pytest.fixture
def passages() -> list[Passage]:
    return make_passages(300)


@pytest.fixture
def stub():
    """The encoder's class."""
    return StubEncoder


@pytest.fixture
def corpus():
    """Makes corpora: (count, chunks a document)."""
    return make_passages


@pytest.fixture
def run_script():
    """Runs Python source in its own process, with this file's helpers at hand."""

    def run(source: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        here = Path(__file__)
        lines = f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[2])!r}]\n"
        command = [sys.executable, "-c", lines + source, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if check:
            assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def chroma_server(tmp_path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a real Chroma server, and its process."""
    pytest.importorskip("chromadb", reason="chromadb is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "chroma"
    command = [program, "run", "--path", tmp_path / "server", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline, "the Chroma server did not come up in 60 s"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()
