"""The HTTP client against real servers on loopback: ours, and scripted ones that misbehave."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.parts import build_retriever
from rag_rl.errors import BackendError, ConfigError, IndexMismatchError
from rag_rl.retrieval import CachedRetriever, build_index, http, open_index
from rag_rl.retrieval.http import HTTPRetriever, check_token
from rag_rl.server import Limits, SearchThread, Server, Service, bind
from rag_rl.types import Query, Retriever

pytestmark = pytest.mark.server

TOKEN = "-".join(["marked", "fake", "token"])
QUERIES = [f"alpha{i} beta{i * 7} gamma{i * 13}" for i in range(0, 300, 17)]


@pytest.fixture(autouse=True)
def _stops_at_once(monkeypatch):
    monkeypatch.setattr("rag_rl.server.process._LINGER_S", 0.0)
    monkeypatch.delenv("RAG_RL_RETRIEVER_TOKEN", raising=False)


@contextmanager
def serving(open_retriever, **options):
    """A server of ours in a thread; gives its address and its service."""
    service = Service(SearchThread(open_retriever), **options)
    sock = bind("127.0.0.1", 0)
    server = Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{sock.getsockname()[1]}", service=service)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def client_of(*urls, **options):
    retriever = HTTPRetriever(urls, **{"wait_s": 10.0, "backoff_s": 0.01, **options})
    try:
        yield retriever
    finally:
        retriever.close()


@pytest.fixture
def index(tmp_path, passages, encoder):
    """An index of 300 passages, opened; closed by the server that serves it."""
    build_index(passages, encoder, tmp_path / "index", progress=False)
    return open_index(tmp_path / "index", encoder)


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


HEALTH = {
    "passages": 10,
    "fingerprint": "f",
    "encoder": "e",
    "limits": {"top_k": 10, "queries": 100, "query_chars": 100, "exclude": 10, "body_bytes": 10_000},
}
HIT = {"passage": {"doc_id": "d", "title": "", "text": "t", "chunk": 0}, "score": 0.5, "rank": 1}


@contextmanager
def scripted(*replies, health=HEALTH):
    """A server that answers searches with these, the last one over and over; None hangs up."""
    left = list(replies)
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, content, headers=()):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in [*headers, ("Content-Length", str(len(body)))]:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer(200, health)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((body, self.headers.get("Authorization")))
            reply = left.pop(0) if len(left) > 1 else left[0]
            if reply is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.answer(*reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", seen=seen)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def failure(kind, call, *args, **options) -> str:
    """The message of the error that a call must raise."""
    with pytest.raises(kind) as error:
        call(*args, **options)
    return str(error.value)


def results(*lists, fingerprint="f"):
    return 200, {"fingerprint": fingerprint, "results": list(lists)}


# ---- the same as a direct search


def test_the_same_hits_as_a_direct_search(index):
    asked = [*QUERIES, Query(QUERIES[3], "a question", (("who?", "she"),))]
    exclude = [["d0", "d17"], *[[] for _ in asked[1:]]]
    direct = index.search(asked, top_k=7), index.search(asked, top_k=7, exclude=exclude)
    with serving(lambda: index) as there, client_of(there.url) as client:
        assert client.search(asked, top_k=7) == direct[0]
        assert client.search(asked, top_k=7, exclude=exclude) == direct[1]
        assert client.search(QUERIES[:1], top_k=1, exclude=[{"d0"}])[0][0].passage.doc_id != "d0"
        assert client.search([], top_k=7) == []
        assert len(client) == 300
        assert client.fingerprint == index.manifest.fingerprint
        assert isinstance(client, Retriever)
        assert client.retries == 0


def test_out_of_range_as_in_a_direct_search(index):
    with serving(lambda: index, limits=Limits(max_top_k=300)) as there, client_of(there.url) as client:
        for top_k in (0, 301):
            with pytest.raises(ConfigError, match=r"retriever_top_k must be (at least 1|between 1 and 300)"):
                client.search(["a"], top_k=top_k)
        with pytest.raises(ConfigError, match="one collection of doc ids a query: 1 for 2"):
            client.search(["a", "b"], top_k=1, exclude=[[]])
        assert len(client.search(["a"], top_k=300)[0]) == 300


def test_a_cache_serves_both_ways_to_an_index(index, tmp_path):
    direct = CachedRetriever(index, tmp_path / "cache").search(QUERIES, top_k=3)
    with serving(lambda: index) as there, client_of(there.url) as client:
        assert CachedRetriever(client, tmp_path / "cache").search(QUERIES, top_k=3) == direct
        assert there.service.accepted == 0


def test_a_retriever_without_a_fingerprint():
    health = {**HEALTH, "fingerprint": None}
    with scripted(results([HIT], fingerprint=None), health=health) as there, client_of(there.url) as client:
        assert client.search(["a"], top_k=1)[0][0].passage.doc_id == "d"
        assert not hasattr(client, "fingerprint")
        assert "has no fingerprint" in failure(ConfigError, CachedRetriever, client)


# ---- shards


@pytest.fixture
def shards(tmp_path, passages, encoder):
    """The same passages in three indexes of 5, 195 and 100."""
    opened = []
    for number, (first, last) in enumerate([(0, 5), (5, 200), (200, 300)]):
        build_index(passages[first:last], encoder, tmp_path / f"shard{number}", progress=False)
        opened.append(open_index(tmp_path / f"shard{number}", encoder))
    return opened


def test_shards_are_merged_by_score(index, shards):
    whole = index.search(QUERIES, top_k=20)
    index.close()
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(lambda shard=shard: shard)).url for shard in shards]
        client = stack.enter_context(client_of(*urls, fingerprints=[shard.fingerprint for shard in shards]))
        found = client.search(QUERIES, top_k=20)
        assert len(client) == 300
        other = stack.enter_context(client_of(*reversed(urls)))
        assert client.fingerprint != other.fingerprint
        without = client.search(QUERIES[:1], top_k=20, exclude=[["d0"]])
        with pytest.raises(ConfigError, match="between 1 and 300, the number of passages at"):
            client.search(["a"], top_k=301)
    for hits, right in zip(found, whole, strict=True):
        assert [hit.passage for hit in hits] == [hit.passage for hit in right]
        assert [hit.rank for hit in hits] == list(range(1, 21))
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in right], abs=1e-6)
    assert [hit.passage for hit in without[0][:19]] == [hit.passage for hit in whole[0][1:]]


def test_the_same_index_twice_is_no_pair_of_shards():
    with scripted(results()) as one, scripted(results()) as two, client_of(one.url, two.url) as client:
        told = failure(IndexMismatchError, client.search, ["a"], top_k=1)
        assert "serve the same index, so that every hit would come twice" in told


def test_scores_of_other_encoders_are_not_merged():
    health = {**HEALTH, "encoder": "another", "fingerprint": "g"}
    with scripted(results()) as one, scripted(results(), health=health) as two, client_of(one.url, two.url) as client:
        told = failure(IndexMismatchError, client.search, ["a"], top_k=1)
        assert told.startswith(f"{one.url} and {two.url} have different encoders")


def test_one_dead_shard_is_an_error_and_not_fewer_hits():
    health = {**HEALTH, "fingerprint": "g"}
    for other in (results([HIT]), (503, {})):
        start = time.monotonic()
        with scripted(other) as one, scripted((404, {}), health=health) as two:
            with client_of(one.url, two.url, backoff_s=1.0) as client:
                told = failure(BackendError, client.search, ["a"], top_k=1)
            assert told.startswith(f"{two.url}: HTTP 404")
        assert time.monotonic() - start < 5.0, "the other one is no longer waited for"


# ---- fingerprints


def test_the_expected_index(index):
    fingerprint = index.manifest.fingerprint
    with serving(lambda: index) as there:
        with client_of(there.url, fingerprints=[fingerprint]) as client:
            client.wait_until_ready()
        with client_of(there.url, fingerprints=["another"]) as client:
            told = failure(IndexMismatchError, client.wait_until_ready)
        assert told.startswith(f"{there.url} serves the index {fingerprint}, expected another (retriever_fingerprint)")


def test_an_index_that_changes_under_way():
    with scripted(results([HIT]), results([HIT], fingerprint="g")) as there, client_of(there.url) as client:
        client.search(["a"], top_k=1)
        with pytest.raises(BackendError, match=f"{there.url} serves another index than before: g, at first f"):
            client.search(["a"], top_k=1)


# ---- waiting


def test_a_dead_address_is_named():
    url = f"http://127.0.0.1:{closed_port()}"
    start = time.monotonic()
    with client_of(url, wait_s=0.3) as client:
        told = failure(BackendError, client.search, ["a"], top_k=1)
    assert re.match(rf"the retriever {url} gives no answer \(\d+ requests in 0 s\): cannot connect \(", told)
    assert time.monotonic() - start < 5.0
    with client_of(url, wait_s=0.0) as client, pytest.raises(BackendError, match=r"\(1 request in 0 s\)"):
        client.wait_until_ready()


def test_a_server_that_still_loads_is_waited_for(index, caplog):
    gate = threading.Event()

    def open_retriever():
        assert gate.wait(10)
        return index

    with serving(open_retriever) as there, client_of(there.url) as client:
        threading.Timer(0.3, gate.set).start()
        assert client.search(QUERIES[:1], top_k=1)[0][0].passage.doc_id == "d0"
        assert client.retries >= 1
        assert f"{there.url}: HTTP 503: loading; asking again for up to 10 s" in caplog.text


def test_what_passes_is_tried_again():
    replies = [(503, {"detail": "busy"}), (502, b"<html>"), None, (429, {}), (500, {}), results([HIT])]
    with scripted(*replies) as there, client_of(there.url) as client:
        assert client.search(["a"], top_k=1)[0][0].score == 0.5
        assert client.retries == 5
        assert len(there.seen) == 6


def test_retry_after_is_kept_to():
    with scripted((503, {}, [("Retry-After", "1")]), results([HIT])) as there, client_of(there.url) as client:
        client.wait_until_ready()
        start = time.monotonic()
        client.search(["a"], top_k=1)
        assert 1.0 <= time.monotonic() - start < 5.0


def test_a_reply_that_does_not_come(index):
    slow = threading.Event()

    class Slow:  # its probe is answered at once
        def __init__(self):
            self.count = 0

        def search(self, queries, *, top_k, exclude=None):
            self.count += 1
            if self.count > 1:
                slow.wait(10)
            return index.search(queries, top_k=top_k)

    with serving(Slow) as there, client_of(there.url, timeout_s=0.2, wait_s=0.3) as client:
        with pytest.raises(BackendError, match=f"{there.url} gives no answer .*: no reply within 0.2 s"):
            client.search(["a"], top_k=1)
        slow.set()


# ---- what is not tried again


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((404, {"detail": "Not Found"}), "HTTP 404: Not Found: is this a server of rag-rl"),
        ((302, b"", [("Location", "http://127.0.0.1:9/")]), "HTTP 302: : is this a server of rag-rl"),
        ((200, b"<html>"), "it answers with no JSON"),
        ((200, {"result": []}), "answers with something else than hits: "),
        (results("ab"), "answers with something else than hits: "),
        (results([{**HIT, "score": None}]), "answers with something else than hits: "),
        ((200, b'{"fingerprint":"f","results":[[%s]]}' % json.dumps({**HIT, "score": float("nan")}).encode()), "hits"),
        (results(), "answers 0 queries of 1"),
        (results([HIT], [HIT]), "answers 2 queries of 1"),
    ],
)
def test_answers_that_are_none(reply, expected):
    with scripted(reply) as there, client_of(there.url) as client:
        with pytest.raises(BackendError) as error:
            client.search(["a"], top_k=1)
        assert there.url in str(error.value)
        assert expected in str(error.value)
        assert len(there.seen) == 1


@pytest.mark.parametrize("health", [{"status": "ok"}, [], {**HEALTH, "limits": {"top_k": 3}}, {**HEALTH, "limits": 3}])
def test_another_kind_of_server(health):
    with scripted(results(), health=health) as there, client_of(there.url) as client:
        told = failure(BackendError, client.wait_until_ready)
        assert told.startswith(f"{there.url}: this is no server of rag-rl: /health tells ")


def test_a_refused_request():
    with scripted((422, {"detail": "no such\nthing"})) as there, client_of(there.url) as client:
        told = failure(ConfigError, client.search, ["a"], top_k=1)
        assert told == f"{there.url} refuses the request: HTTP 422: no such thing"


# ---- the token


def test_the_token_comes_from_the_environment(index, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(lambda: index, token=TOKEN) as there:
        for wrong in (None, "wrong"):
            if wrong:
                monkeypatch.setenv("RAG_RL_RETRIEVER_TOKEN", wrong)
            with client_of(there.url) as client, pytest.raises(BackendError) as error:
                client.search(["a"], top_k=1)
            assert f"{there.url}: HTTP 401" in str(error.value)
            assert "read from the environment variable RAG_RL_RETRIEVER_TOKEN" in str(error.value)
            assert client.retries == 0
        monkeypatch.setenv("RAG_RL_RETRIEVER_TOKEN", TOKEN)
        monkeypatch.setenv("OTHER", TOKEN)
        for env in ("RAG_RL_RETRIEVER_TOKEN", "OTHER"):
            with client_of(there.url, token_env=env) as client:
                assert len(client.search(["a"], top_k=1)) == 1
    assert TOKEN not in caplog.text


def test_no_token_is_sent_where_none_is_set():
    with scripted(results([HIT])) as there, client_of(there.url, token_env="") as client:
        client.search(["a"], top_k=1)
        assert there.seen == [({"queries": ["a"], "top_k": 1}, None)]


def test_a_token_that_no_header_can_hold(monkeypatch):
    monkeypatch.setenv("RAG_RL_RETRIEVER_TOKEN", "two words")
    with scripted(results([HIT])) as there, client_of(there.url) as client:
        told = failure(ConfigError, client.search, ["a"], top_k=1)
        assert told.startswith("the token in the environment variable RAG_RL_RETRIEVER_TOKEN must be printable ASCII")
        assert "two words" not in told
    assert check_token(TOKEN, "here") == TOKEN


# ---- limits of the server


def test_what_is_too_much_for_one_request_goes_in_several(index):
    asked = [Query(text, "q", (("h", "i"),)) if place % 3 else text for place, text in enumerate(QUERIES * 2)]
    exclude = [[f"d{place}"] for place in range(len(asked))]
    direct = index.search(asked, top_k=4), index.search(asked, top_k=4, exclude=exclude)
    for limits in (Limits(max_queries=5), Limits(max_body_bytes=400), Limits(max_queries=1)):
        build = open_index(index.folder, index.encoder)
        with serving(lambda build=build: build, limits=limits) as there, client_of(there.url) as client:
            for found, right in zip(
                (client.search(asked, top_k=4), client.search(asked, top_k=4, exclude=exclude)), direct, strict=True
            ):
                assert [[hit.passage for hit in hits] for hits in found] == [
                    [hit.passage for hit in hits] for hits in right
                ]
            assert there.service.accepted > 6
            assert client.retries == 0


def test_no_request_is_larger_than_the_server_takes():
    seen = []
    for room in (120, 150, 151, 200):
        health = {**HEALTH, "limits": {**HEALTH["limits"], "body_bytes": room}}
        with scripted((404, {}), health=health) as there, client_of(there.url, max_concurrency=1) as client:
            (shard,) = client._ready()
            bodies = list(http._bodies(shard, ["é" * 5, Query("b", "c"), "d" * 20] * 5, [["x"]] * 15, 3))
            assert sum(count for _, count, _ in bodies) == 15
            assert [first for first, _, _ in bodies] == [sum(n for _, n, _ in bodies[:i]) for i in range(len(bodies))]
            assert max(len(body) for _, _, body in bodies) <= room
            seen.append(len(bodies))
            for first, count, body in bodies:
                content = json.loads(body)
                assert len(content["queries"]) == len(content["exclude"]) == count
                assert content["top_k"] == 3
                assert (
                    content["queries"][0]
                    == ["é" * 5, {"text": "b", "question": "c", "history": []}, "d" * 20][first % 3]
                )
    assert seen == sorted(seen, reverse=True)


def test_a_long_query_is_cut_as_an_encoder_would(caplog):
    with scripted(results([HIT])) as there, client_of(there.url) as client:
        client.search(["a" * 101], top_k=1)
        client.search([Query("b" * 100, "c" * 50, (("d" * 10, "e" * 10),))], top_k=1)
        (one, _), (two, _) = there.seen
        assert one["queries"] == ["a" * 100]
        assert two["queries"][0]["text"] == "b" * 30
        assert caplog.text.count(f"{there.url} takes 100 characters a query: longer ones are cut at their end") == 1
        with pytest.raises(
            ConfigError, match=r"at most 100 characters a query: the question and the hops .* have 101"
        ):
            client.search([Query("b", "c" * 101)], top_k=1)


def test_limits_that_cannot_be_met():
    with scripted(results([HIT]), health={**HEALTH, "passages": 1000}) as there, client_of(there.url) as client:
        with pytest.raises(
            ConfigError, match="gives at most 10 hits a query, 11 were asked for: start it with a high"
        ):
            client.search(["a"], top_k=11)
        with pytest.raises(ConfigError, match="takes at most 10 excluded ids a query, got 11"):
            client.search(["a"], top_k=1, exclude=[[str(i) for i in range(11)]])
        with pytest.raises(ConfigError, match="takes at most 10000 bytes, one query has"):
            client.search(["a"], top_k=1, exclude=[["x" * 9990]])


# ---- settings


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ([], "retriever_url is empty"),
        ("127.0.0.1:8000", "must look like http://127.0.0.1:8000, got '127.0.0.1:8000'"),
        ("ftp://host", "must look like"),
        ("http://", "must look like"),
        ("http://host:8000/?a=b", "must look like"),
        ("http://host:port", "is no address"),
        ("http://me:secret@host", "must not hold a name or a password"),
        (["http://a:1", "http://a:1/"], "names a server twice: http://a:1, http://a:1"),
    ],
)
def test_addresses_that_are_none(urls, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        HTTPRetriever(urls)
    assert "secret" not in str(error.value)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="one fingerprint an address: 2 for 1"):
        HTTPRetriever("http://a:1", fingerprints=["a", "b"])
    for bad in ({"timeout_s": 0.0}, {"wait_s": -1.0}, {"backoff_s": 0.0}):
        with pytest.raises(ConfigError, match="retriever_timeout_s and backoff_s must be above 0"):
            HTTPRetriever("http://a:1", **bad)
    with pytest.raises(ConfigError, match="max_concurrency must be at least 1, got 0"):
        HTTPRetriever("http://a:1", max_concurrency=0)


def test_by_the_names_of_the_command_line(index, monkeypatch):
    monkeypatch.setenv("OTHER", TOKEN)
    with serving(lambda: index, token=TOKEN) as there:
        args = RetrieverArguments(
            retriever_name="http",
            retriever_url=[there.url],
            retriever_fingerprint=[index.manifest.fingerprint],
            retriever_token_env="OTHER",
            retriever_timeout_s=5.0,
            retriever_wait_s=6.0,
        )
        client = build_retriever(args, DataArguments())
        assert isinstance(client, HTTPRetriever)
        assert (client.timeout_s, client.wait_s) == (5.0, 6.0)
        assert client.search(QUERIES[:1], top_k=1)[0][0].passage.doc_id == "d0"
        client.close()
        with pytest.raises(IndexMismatchError):
            build_retriever(dataclasses.replace(args, retriever_fingerprint=["x"]), DataArguments())
        with pytest.raises(ConfigError, match="retriever_shuffled needs the dense retriever"):
            build_retriever(dataclasses.replace(args, retriever_shuffled=True), DataArguments())


def test_names_that_do_not_go_together():
    with pytest.raises(ConfigError, match="retriever_name http needs retriever_url"):
        RetrieverArguments(retriever_name="http")
    with pytest.raises(ConfigError, match="retriever_url needs retriever_name http, got dense"):
        RetrieverArguments(retriever_url=["http://a:1"])
    assert RetrieverArguments(retriever_name="own:make", retriever_url=["http://a:1"]).retriever_url
