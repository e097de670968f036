from __future__ import annotations

import sqlite3

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.retrieval import CachedRetriever, StaticRetriever
from rag_rl.types import Hit, Passage, Query, Retriever


class Counting:
    """Notes every search that reaches it."""

    def __init__(self, fingerprint="f"):
        self.fingerprint = fingerprint
        self.calls = []

    def search(self, queries, *, top_k, exclude=None):
        self.calls.append((list(queries), top_k, exclude))
        return [
            [
                Hit(Passage(f"{q.text if isinstance(q, Query) else q}-{r}", "é ☃", "t", r), 1 / 3 / r, r)
                for r in range(1, top_k + 1)
            ]
            for q in queries
        ]


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "cache"


def test_only_misses_reach_the_retriever_once_each(folder):
    inner = Counting()
    cached = CachedRetriever(inner, folder)
    assert isinstance(cached, Retriever)
    first = cached.search(["a", "b", "a"], top_k=2)
    assert first == Counting().search(["a", "b", "a"], top_k=2)
    second = cached.search(["c", "b", "a"], top_k=2)
    assert second[2] == first[0]
    assert [call[0] for call in inner.calls] == [["a", "b"], ["c"]]


def test_key_parts(folder):
    inner = Counting()
    cached = CachedRetriever(inner, folder)
    cached.search(["a"], top_k=2)
    cached.search([Query("a")], top_k=2)  # the same search
    assert len(inner.calls) == 1
    for queries, options in [
        (["a"], {"top_k": 3}),
        (["a"], {"top_k": 2, "exclude": [["x"]]}),
        ([Query("a", question="q")], {"top_k": 2}),
        ([Query("a", history=(("h", "i"),))], {"top_k": 2}),
    ]:
        before = len(inner.calls)
        for _ in range(2):
            cached.search(queries, **options)
        assert len(inner.calls) == before + 1
    before = len(inner.calls)
    cached.search(["a"], top_k=2, exclude=[{"x"}])  # the order and the type of the collection do not count
    cached.search(["a"], top_k=2, exclude=[()])
    assert len(inner.calls) == before
    inner.fingerprint = "another index"
    cached.search(["a"], top_k=2)
    assert len(inner.calls) == before + 1


def test_disk_outlives_the_object_bit_for_bit(tmp_path):
    expected = CachedRetriever(Counting(), tmp_path).search(["a", "b"], top_k=3)
    inner = Counting()
    assert CachedRetriever(inner, tmp_path).search(["b", "a"], top_k=3) == expected[::-1]
    assert inner.calls == []


def test_changing_a_hit_does_not_change_the_cache(folder):
    cached = CachedRetriever(Counting(), folder)
    cached.search(["a"], top_k=1)[0][0].score = 99.0
    assert cached.search(["a"], top_k=1)[0][0].score != 99.0


def test_a_failing_search_stores_nothing(folder):
    class Failing(Counting):
        def search(self, queries, *, top_k, exclude=None):
            super().search(queries, top_k=top_k)
            raise BackendError("gone")

    inner = Failing()
    cached = CachedRetriever(inner, folder)
    for _ in range(2):
        with pytest.raises(BackendError, match="gone"):
            cached.search(["a"], top_k=1)
    assert len(inner.calls) == 2


def test_memory_is_bounded():
    cached = CachedRetriever(Counting(), max_in_memory=5)
    cached.search([str(i) for i in range(20)], top_k=1)
    assert len(cached._memory) == 5


def test_many_keys_in_one_batch(tmp_path):
    queries = [str(i) for i in range(1201)]
    CachedRetriever(Counting(), tmp_path).search(queries, top_k=1)
    inner = Counting()
    assert len(CachedRetriever(inner, tmp_path).search(queries, top_k=1)) == 1201
    assert inner.calls == []


def test_several_processes_share_a_folder(tmp_path, run_script):
    source = """
from concurrent.futures import ProcessPoolExecutor
from rag_rl.retrieval import CachedRetriever, StaticRetriever
from rag_rl.types import Passage

def work(number):
    table = {str(i): [Passage(str(i), "text")] for i in range(60)}
    cached = CachedRetriever(StaticRetriever(table), sys.argv[1])
    for start in range(0, 60, 5):
        queries = [str((start + number * 13 + i) % 60) for i in range(5)]
        hits = cached.search(queries, top_k=1)
        assert [h[0].passage.doc_id for h in hits] == queries

with ProcessPoolExecutor(4) as pool:
    list(pool.map(work, range(4)))
"""
    run_script(source, tmp_path)
    with sqlite3.connect(tmp_path / "hits.sqlite3") as connection:
        assert connection.execute("SELECT count(*) FROM hits").fetchone() == (60,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_broken_cache_file_is_named(tmp_path):
    (tmp_path / "hits.sqlite3").write_bytes(b"garbage" * 1000)
    with pytest.raises(BackendError, match=r"hits\.sqlite3 fails .*deleting it"):
        CachedRetriever(Counting(), tmp_path)


def test_bad_arguments():
    class Nameless:
        def search(self, queries, *, top_k, exclude=None):
            return []

    with pytest.raises(ConfigError, match="Nameless has no fingerprint"):
        CachedRetriever(Nameless())
    with pytest.raises(ConfigError, match="2 collections for 1 queries"):
        CachedRetriever(StaticRetriever({})).search(["a"], top_k=1, exclude=[[], []])
