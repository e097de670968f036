from __future__ import annotations

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest

from rag_rl.errors import BackendError, IndexDamagedError
from rag_rl.retrieval import StaticRetriever
from rag_rl.server import About, SearchThread, search_thread
from rag_rl.types import Passage


def ids(found) -> bytes:
    return " ".join(",".join(hit.passage.doc_id for hit in hits) for hits in found).encode()


def with_thread(open_retriever, work, **options):
    """Runs ``await work(thread)`` in a loop with a thread that has opened its retriever, or failed to."""

    async def main():
        search = SearchThread(open_retriever, **options)
        opened = asyncio.Event()
        search.start(opened.set)
        await asyncio.wait_for(opened.wait(), 10)
        try:
            return await asyncio.wait_for(work(search), 20)
        finally:
            search.stop(5)

    return asyncio.run(main())


async def begun(fake):
    """Returns when the next search has begun."""
    assert await asyncio.get_running_loop().run_in_executor(None, fake.begun.acquire, True, 10)


def test_what_waits_is_searched_together_and_each_gets_its_own(fake):
    async def work(search):
        await begun(fake)  # the probe
        fake.free.clear()
        first = search.submit(["a"], 1, None, ids)
        await begun(fake)
        rest = [
            search.submit(["b", "c"], 2, None, ids),
            search.submit(["d"], 1, None, ids),
            search.submit([], 2, None, ids),
            search.submit(["e"], 2, None, ids),
            search.submit(["f"], 2, [["x"]], ids),
            search.submit(["g"], 2, [[]], ids),
        ]
        fake.free.set()
        return [await reply for reply in [first, *rest]]

    replies = with_thread(lambda: fake, work)
    assert replies == [b"a/1", b"b/1,b/2 c/1,c/2", b"d/1", b"", b"e/1,e/2", b"f/1,f/2", b"g/1,g/2"]
    assert fake.calls == [
        (["probe"], 3, None),
        (["a"], 1, None),
        (["b", "c", "e"], 2, None),
        (["d"], 1, None),
        (["f", "g"], 2, [["x"], []]),
    ]
    assert fake.closed


def test_no_call_grows_beyond_the_batch(fake):
    async def work(search):
        await begun(fake)
        fake.free.clear()
        held = search.submit(["a"], 1, None, ids)
        await begun(fake)
        sizes = [3, 2, 4, 9, 1]
        replies = [search.submit([f"q{n}"] * n, 1, None, ids) for n in sizes]
        fake.free.set()
        await held
        return [(await reply).split() for reply in replies]

    assert with_thread(lambda: fake, work, max_batch=5) == [[b"q%d/1" % n] * n for n in (3, 2, 4, 9, 1)]
    # A request goes whole; later ones that still fit go before one that does not.
    assert [len(queries) for queries, _, _ in fake.calls[2:]] == [5, 5, 9]


def test_many_at_once_never_get_another_ones_answer(fake):
    draw = random.Random(0)

    async def one(search, number):
        await asyncio.sleep(draw.random() * 0.05)
        queries = [f"{number}-{i}" for i in range(draw.randint(0, 4))]
        top_k = draw.randint(1, 3)
        expected = " ".join(",".join(f"{query}/{r}" for r in range(1, top_k + 1)) for query in queries)
        return await search.submit(queries, top_k, None, ids) == expected.encode()

    async def work(search):
        return await asyncio.gather(*(one(search, number) for number in range(500)))

    assert with_thread(lambda: fake, work) == [True] * 500
    assert len(fake.calls) < 500


def test_no_request_fails_for_anothers_sake(fake):
    fake.errors["bad"] = TypeError("no text")

    async def work(search):
        await begun(fake)
        fake.free.clear()
        held = search.submit(["a"], 1, None, ids)
        await begun(fake)
        replies = [search.submit([text], 1, None, ids) for text in ("b", "bad", "c")]
        fake.free.set()
        await held
        return await asyncio.gather(*replies, return_exceptions=True), await search.check()

    (one, two, three), trouble = with_thread(lambda: fake, work)
    assert (one, three) == (b"b/1", b"c/1")
    assert isinstance(two, TypeError)
    assert trouble == "", "a bad request says nothing about the retriever"


def test_a_reply_that_cannot_be_written_fails_alone(fake):
    def broken(found):
        raise ValueError("cannot write")

    async def work(search):
        replies = [search.submit(["a"], 1, None, ids), search.submit(["b"], 1, None, broken)]
        return await asyncio.gather(*replies, return_exceptions=True)

    one, two = with_thread(lambda: fake, work)
    assert one == b"a/1"
    assert str(two) == "cannot write"


def test_a_broken_backend_shows_until_the_probe_passes(fake):
    async def work(search):
        before = await search.check()
        fake.errors.update(a=BackendError("Chroma is gone"), probe=BackendError("Chroma is still gone"))
        with pytest.raises(BackendError, match="Chroma is gone"):
            await search.submit(["a"], 1, None, ids)
        during = await search.check()
        fake.errors.clear()
        return before, during, await search.check()

    assert with_thread(lambda: fake, work) == ("", "Chroma is still gone", "")


def test_too_few_lists_are_an_error_and_not_an_answer(fake):
    async def work(search):
        fake.short = True
        with pytest.raises(BackendError, match="the retriever gave 1 lists of hits for 2 queries"):
            await search.submit(["a", "b"], 1, None, ids)

    with_thread(lambda: fake, work)


def test_another_answer_to_the_probe(fake, monkeypatch):
    monkeypatch.setattr(search_thread, "_PROBE_EVERY_S", 0.0)

    async def work(search):
        fake.score = 1.0005
        near = await search.check()
        fake.score = 1.1
        return near, await search.check()

    expected = "the probe query is answered otherwise than when the retriever was opened"
    assert with_thread(lambda: fake, work) == ("", expected)


def test_the_probe_is_not_repeated_within_seconds(fake):
    async def work(search):
        await asyncio.gather(*(search.check() for _ in range(20)))

    with_thread(lambda: fake, work)
    assert len(fake.calls) == 1


def test_a_search_that_hangs(fake, monkeypatch):
    monkeypatch.setattr(search_thread, "_PROBE_EVERY_S", 0.0)
    monkeypatch.setattr(search_thread, "_PROBE_PATIENCE_S", 0.05)

    async def work(search):
        fake.free.clear()
        hanging = await search.check()
        fake.free.set()
        await asyncio.sleep(0.05)
        return hanging, await search.check()

    assert with_thread(lambda: fake, work) == ("a search does not come back within 0.05 s", "")


def test_a_retriever_that_cannot_be_opened():
    def open_retriever():
        raise IndexDamagedError("vectors.f32 is\ncut")

    async def work(search):
        assert search.about is None
        return search.failure, await search.check()

    failure, trouble = with_thread(open_retriever, work)
    assert isinstance(failure, IndexDamagedError)
    assert trouble == "cannot be opened: vectors.f32 is cut"


def test_a_retriever_that_cannot_answer_its_probe_is_not_open(fake):
    fake.errors["probe"] = BackendError("no GPU")

    async def work(search):
        return search.about, await search.check()

    assert with_thread(lambda: fake, work) == (None, "cannot be opened: no GPU")


def test_while_it_is_opened(fake):
    gate = threading.Event()

    def open_retriever():
        assert gate.wait(10)
        return fake

    async def main():
        search = SearchThread(open_retriever)
        opened = asyncio.Event()
        search.start(opened.set)
        before = await search.check()
        gate.set()
        await asyncio.wait_for(opened.wait(), 10)
        after = await search.check()
        search.stop()
        return before, after

    assert asyncio.run(main()) == ("loading", "")


def test_what_waits_at_the_end_is_answered(fake):
    async def work(search):
        await begun(fake)
        fake.free.clear()
        replies = [search.submit([f"q{i}"], 1 + i % 2, None, ids) for i in range(10)]
        await begun(fake)
        threading.Timer(0.05, fake.free.set).start()
        search.stop(10)
        return [await reply for reply in replies]

    expected = [b"q%d/1" % i if i % 2 == 0 else b"q%d/1,q%d/2" % (i, i) for i in range(10)]
    assert with_thread(lambda: fake, work) == expected
    assert fake.closed


def test_what_is_told_of_a_retriever(fake):
    class Wrapped:
        retriever = fake

        def search(self, queries, *, top_k, exclude=None):
            return fake.search(queries, top_k=top_k)

    async def work(search):
        return search.about

    assert with_thread(lambda: fake, work) == About(10, "print-of-fake", None)
    assert with_thread(Wrapped, work) == About(10, None, None)
    table = StaticRetriever({}, default=[Passage("d", "text")])
    assert with_thread(lambda: table, work) == About(None, table.fingerprint, None)


def test_scores_of_the_same_kind_are_told_from_others(fake):
    def dense(document, query, **attributes):
        kept = {"probes": [SimpleNamespace(text="first words")], "encoder": document}
        encoder = SimpleNamespace(fingerprint=query, **attributes)
        found = Fakes(fake)
        found.manifest, found.encoder = SimpleNamespace(**kept), encoder
        return found

    class Fakes:
        def __init__(self, retriever):
            self.__dict__["retriever"] = retriever

        def search(self, queries, *, top_k, exclude=None):
            return self.retriever.search(queries, top_k=top_k)

    async def work(search):
        return search.about.encoder

    def told(retriever):
        return with_thread(lambda: retriever, work)

    plain = told(dense("a", "a"))
    assert plain == "a"
    assert fake.calls[0][0] == ["first words"]
    others = [dense("a", "b"), dense("a", "a", query_fingerprint="history"), Fakes(dense("a", "a"))]
    assert len({plain, *map(told, others)}) == 4
    assert told(dense("a", "b")) == told(dense("a", "b"))
