"""The routes and their limits, over real connections to a server on loopback."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.retrieval import StaticRetriever
from rag_rl.server import Limits, Service, service
from rag_rl.types import Passage, Query

pytestmark = pytest.mark.server

TOKEN = "-".join(["marked", "fake", "token"])


@pytest.fixture(scope="module")
def table():
    """A server whose retriever has fixed answers."""
    return StaticRetriever(
        {
            "who?": [Passage("d1", "First.\nMore.", 'A "title"', 2), Passage("d2", "Second.")],
            "half": [Passage("d3", "half a pair: \ud83d")],
            "größe": [Passage("d4", "日本語")],
        },
        default=[Passage("d0", "Nothing.")],
    )


@pytest.fixture(scope="module")
def at(table, serving):
    """Client of that server."""
    with serving(table, limits=Limits(max_top_k=5, max_queries=4, max_query_chars=20, max_body_bytes=500)) as there:
        yield there.client


def post(client, path="/search", **content):
    return client.post(path, json=content)


# ---- health


def test_health_is_red_then_green(fake, starting, green):
    gate = threading.Event()

    def open_retriever():
        assert gate.wait(10)
        return fake

    with starting(open_retriever) as there:
        red = there.client.get("/health")
        assert (red.status_code, red.json()) == (503, {"status": "unavailable", "detail": "loading"})
        assert red.headers["retry-after"] == "1"
        refused = post(there.client, queries=["a"])
        assert (refused.status_code, refused.json(), refused.headers["retry-after"]) == (
            503,
            {"detail": "loading"},
            "1",
        )
        gate.set()
        told = green(there.client)
        told.pop("version")
        assert told == {
            "status": "ok",
            "passages": 10,
            "fingerprint": "print-of-fake",
            "encoder": None,
            "limits": {"top_k": 10, "queries": 1024, "query_chars": 32768, "exclude": 1000, "body_bytes": 8388608},
        }


def test_health_turns_red_with_the_backend_and_green_again(fake, serving):
    with serving(fake) as there:
        fake.errors.update(a=BackendError("Chroma is\ngone"), probe=BackendError("Chroma is gone"))
        failed = post(there.client, queries=["a"])
        assert (failed.status_code, failed.json()) == (502, {"detail": "Chroma is gone"})
        red = there.client.get("/health")
        assert (red.status_code, red.json()["detail"]) == (503, "Chroma is gone")
        fake.errors.clear()
        assert there.client.get("/health").status_code == 200


# ---- our route


def test_search(at, table):
    reply = post(at, queries=["who?", {"text": "who?", "question": "q", "history": [["a", "b"]]}, "x"], top_k=2)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    first = {"doc_id": "d1", "title": 'A "title"', "text": "First.\nMore.", "chunk": 2}
    second = {"doc_id": "d2", "title": "", "text": "Second.", "chunk": 0}
    nothing = {"doc_id": "d0", "title": "", "text": "Nothing.", "chunk": 0}
    hits = [{"passage": first, "score": 1.0, "rank": 1}, {"passage": second, "score": 0.5, "rank": 2}]
    assert reply.json() == {
        "fingerprint": table.fingerprint,
        "results": [hits, hits, [{"passage": nothing, "score": 1.0, "rank": 1}]],
    }


def test_search_hands_on_what_it_was_asked(fake, serving):
    with serving(fake, top_k=4) as there:
        assert post(there.client, queries=["a"]).status_code == 200
        history = {"text": "b", "question": "q?", "history": [["s", "t"], ["u", "v"]]}
        assert post(there.client, queries=[history, "c"], top_k=1, exclude=[["x", "y"], []]).status_code == 200
        assert post(there.client, queries=[]).json() == {"fingerprint": "print-of-fake", "results": []}
    assert fake.calls[1:3] == [
        (["a"], 4, None),
        ([Query("b", "q?", (("s", "t"), ("u", "v"))), "c"], 1, [["x", "y"], []]),
    ]


def test_text_of_any_kind(at):
    assert post(at, queries=["größe"]).json()["results"][0][0]["passage"]["text"] == "日本語"
    reply = post(at, queries=["half"])
    assert reply.content.isascii()
    assert reply.json()["results"][0][0]["passage"]["text"] == "half a pair: \ud83d"


# ---- Search-R1's route


def test_retrieve_with_scores(at):
    reply = post(at, "/retrieve", queries=["who?", "x"], topk=2, return_scores=True)
    assert reply.json() == {
        "result": [
            [
                {"document": {"id": "d1", "contents": '"A "title""\nFirst.\nMore.'}, "score": 1.0},
                {"document": {"id": "d2", "contents": "\nSecond."}, "score": 0.5},
            ],
            [{"document": {"id": "d0", "contents": "\nNothing."}, "score": 1.0}],
        ]
    }


def test_retrieve_without_scores(at):
    reply = post(at, "/retrieve", queries=["x"], topk=1, something_else=3)
    assert reply.json() == {"result": [[{"id": "d0", "contents": "\nNothing."}]]}


@pytest.mark.parametrize("said", [{}, {"topk": None}, {"topk": 0}])
def test_retrieve_where_topk_is_not_said(fake, serving, said):
    with serving(fake) as there:
        reply = post(there.client, "/retrieve", queries=["a"], **said)
        assert len(reply.json()["result"][0]) == 3


# ---- the token


def test_wrong_token(fake, serving):
    wrong = [
        "",
        TOKEN,
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN} x",
        "Bearer é",
    ]
    with serving(fake, token=TOKEN) as there:
        for headers in ({}, *({"Authorization": header.encode("latin-1")} for header in wrong)):
            for path in ("/search", "/retrieve"):
                reply = there.client.post(path, json={"queries": ["a"]}, headers=headers)
                assert reply.status_code == 401, headers
                assert reply.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in reply.text
    assert len(fake.calls) == 1, "only the probe was searched"


def test_right_token(fake, serving, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(fake, token=TOKEN) as there:
        for word in ("Bearer", "bearer"):
            reply = there.client.post("/search", json={"queries": ["a"]}, headers={"Authorization": f"{word} {TOKEN}"})
            assert reply.status_code == 200
        fake.errors["a"] = BackendError("gone")
        there.client.post("/search", json={"queries": ["a"]}, headers={"Authorization": f"Bearer {TOKEN}"})
    assert "gone" in caplog.text
    assert TOKEN not in caplog.text


# ---- limits


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ({"queries": ["a"], "top_k": 0}, "the number of hits must be between 1 and 5"),
        ({"queries": ["a"], "top_k": 6}, "the number of hits must be between 1 and 5"),
        ({"queries": ["a"], "top_k": 10**400}, "the number of hits must be between 1 and 5"),
        ({"queries": ["a"] * 5}, "5 queries, at most 4 are taken"),
        ({"queries": ["a", "b" * 21]}, "queries[1]: 21 characters, at most 20 are taken"),
        (
            {"queries": [{"text": "b" * 10, "question": "c" * 5, "history": [["d" * 3, "e" * 3]]}]},
            "queries[0]: 21 characters, at most 20 are taken",
        ),
        ({"queries": ["a"], "exclude": [[], []]}, "exclude must have one list a query: 2 for 1 queries"),
        ({"queries": ["a"], "topk": 3}, "topk: Extra inputs are not permitted"),
        ({"queries": "a"}, "queries: Input should be a valid array"),
        ({"queries": [3]}, "queries[0]: Input should be a valid string"),
        ({"queries": ["a"], "top_k": True}, "top_k: Input should be a valid integer"),
        ({"queries": ["a"], "top_k": 1.5}, "top_k: Input should be a valid integer"),
        ({"queries": [{"text": "a", "history": [["b"]]}]}, "queries[0].history[0][1]: Field required"),
        ({}, "queries: Field required"),
    ],
)
def test_what_is_refused(at, content, detail):
    reply = at.post("/search", content=json.dumps(content))
    assert (reply.status_code, reply.json()) == (422, {"detail": detail})


def test_excluded_ids_have_a_limit(fake, serving):
    with serving(fake, limits=Limits(max_exclude=2)) as there:
        assert post(there.client, queries=["a"], exclude=[["x", "y"]]).status_code == 200
        reply = post(there.client, queries=["a"], exclude=[["x", "y", "z"]])
        assert (reply.status_code, reply.json()) == (422, {"detail": "exclude: at most 2 ids a query are taken"})


def test_no_more_hits_than_there_are_passages(fake, serving):
    with serving(fake) as there:
        assert post(there.client, queries=["a"], top_k=10).status_code == 200
        assert "between 1 and 10" in post(there.client, queries=["a"], top_k=11).json()["detail"]


@pytest.mark.parametrize("path", ["/search", "/retrieve"])
def test_long_bodies(at, path):
    def pieces():
        for _ in range(20):
            yield b" " * 100

    for body in (b" " * 501, pieces()):
        reply = at.post(path, content=body)
        assert (reply.status_code, reply.json()) == (413, {"detail": "at most 500 bytes are taken"})
    whole = json.dumps({"queries": ["x"]}).encode().ljust(500)
    assert at.post(path, content=whole).status_code == 200


def test_a_full_server_says_come_back(fake, serving):
    with serving(fake, limits=Limits(max_requests=3)) as there, ThreadPoolExecutor(3) as pool:
        fake.free.clear()
        held = [pool.submit(post, there.client, queries=[f"q{i}"], top_k=1) for i in range(3)]
        deadline = time.monotonic() + 10
        while there.service.accepted < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        refused = post(there.client, queries=["one more"])
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json() == {"detail": "busy: 3 requests are being answered"}
        assert there.client.get("/health").status_code == 200, "full is not ill"
        fake.free.set()
        assert [one.result().json()["results"][0][0]["passage"]["doc_id"] for one in held] == ["q0/1", "q1/1", "q2/1"]
        assert post(there.client, queries=["one more"]).status_code == 200
        assert (there.service.accepted, there.service.answered) == (4, 4)


def test_a_body_that_does_not_arrive(fake, serving, monkeypatch):
    monkeypatch.setattr(service, "_BODY_PATIENCE_S", 0.05)
    with serving(fake) as there, socket.create_connection(("127.0.0.1", there.client.base_url.port), 10) as raw:
        raw.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_goes_away(fake, serving, caplog):
    with serving(fake) as there:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", there.client.base_url.port), 10) as raw:
                raw.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert post(there.client, queries=["a"]).status_code == 200
    assert "Traceback" not in caplog.text


def test_limits_must_make_sense():
    with pytest.raises(ConfigError, match="max_queries must be at least 1, got 0"):
        Limits(max_queries=0)
    with pytest.raises(ConfigError, match="max_exclude must be at least 0, got -1"):
        Limits(max_exclude=-1)
    with pytest.raises(ConfigError, match=r"top_k must be between 1 and 5 \(max_top_k\), got 6"):
        Service(None, limits=Limits(max_top_k=5), top_k=6)


# ---- what fails


def test_errors_of_a_search(fake, serving, caplog):
    fake.errors.update(user=DataError("no such\nthing"), bug=TypeError("secret details"))
    with serving(fake) as there:
        reply = post(there.client, queries=["user"])
        assert (reply.status_code, reply.json()) == (422, {"detail": "no such thing"})
        reply = post(there.client, queries=["bug"])
        assert (reply.status_code, reply.json()) == (500, {"detail": "the search failed; the server's log says why"})
        assert "secret details" in caplog.text
        fake.score = float("nan")
        reply = post(there.client, queries=["a"])
        assert (reply.status_code, reply.json()) == (502, {"detail": "the retriever gave a score that is not finite"})
        assert (there.service.accepted, there.service.answered) == (3, 3)


def test_other_paths_and_methods(at):
    assert at.get("/search").status_code == 405
    assert at.post("/health").status_code == 405
    assert at.get("/").status_code == 404
    assert at.get("/openapi.json").status_code == 404
    assert at.get("/docs").status_code == 404


# ---- malformed requests


def malformed(draw: random.Random) -> bytes:
    """A body that no route may take: random bytes, cut or spoilt JSON, or JSON of another shape."""
    good = json.dumps({"queries": ["who?", {"text": "a", "history": [["b", "c"]]}], "top_k": 3}).encode()
    kind = draw.randrange(8)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return good[: draw.randrange(len(good))]
    if kind == 2:
        place = draw.randrange(len(good))
        return b"{" + good[:place] + draw.randbytes(1 + draw.randrange(5)) + good[place:]
    if kind == 3:
        return draw.choice([b"[", b'{"queries":', b'{"queries":[{"text":']) * draw.randrange(1, 50)
    if kind == 4:
        return b" " * draw.randrange(501, 5000)
    wrong = [
        None,
        True,
        -1,
        1.5,
        "a",
        [],
        [[]],
        {},
        {"text": 1},
        [None],
        ["\ud800"],
        [{"text": "a", "more": 1}],
        10**50,
    ]
    if kind == 5:
        return json.dumps(draw.choice([one for one in wrong if one != []])).encode()
    if kind == 6:
        return json.dumps({"queries": draw.choice([one for one in wrong if one != []])}).encode()
    key = draw.choice(["top_k", "exclude", "Queries", "query", ""])
    bad = [one for one in wrong if one not in ([], None) and not (key == "exclude" and one == [[]])]
    return json.dumps({"queries": ["who?"], key: draw.choice(bad)}).encode()


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_malformed_requests(table, serving, caplog, count):
    draw = random.Random(count)
    counts: dict[int, int] = {}
    with serving(table, limits=Limits(max_top_k=5, max_queries=4, max_query_chars=20, max_body_bytes=500)) as there:
        for number in range(count):
            body = malformed(draw)
            content_type = draw.choice(["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
            reply = there.client.post("/search", content=body, headers={"Content-Type": content_type})
            assert 400 <= reply.status_code < 500, (number, body, reply.text)
            assert len(reply.json()["detail"]) <= 300
            counts[reply.status_code] = counts.get(reply.status_code, 0) + 1
        assert set(counts) == {400, 413, 422}
        assert min(counts.values()) > count / 20, counts
        assert (there.service.accepted, there.service._present) == (0, 0)
        assert there.client.get("/health").status_code == 200
        assert post(there.client, queries=["who?"]).json()["results"][0][0]["passage"]["doc_id"] == "d1"
    assert "Traceback" not in caplog.text


def test_what_is_not_even_http(fake, serving):
    draw = random.Random(0)
    lines = [b"POST /search HTTP/1.1\r\n", b"GET /health HTTP/9.9\r\n", b"\r\n\r\n", b"Content-Length: -5\r\n\r\n"]
    with serving(fake) as there:
        for number in range(100):
            with socket.create_connection(("127.0.0.1", there.client.base_url.port), 10) as raw:
                raw.sendall(lines[number % 4] + draw.randbytes(draw.randrange(1, 300)) + b"\r\n\r\n")
                raw.shutdown(socket.SHUT_WR)
                reply = raw.recv(1000)
                assert reply[9:10] in (b"4", b""), reply
        assert there.client.get("/health").status_code == 200
        assert post(there.client, queries=["a"]).status_code == 200


@pytest.mark.parametrize("declared", [b"9" * 14, b"9" * 19])
def test_a_body_that_is_said_to_be_huge_is_not_waited_for(fake, serving, declared):
    with serving(fake) as there, socket.create_connection(("127.0.0.1", there.client.base_url.port), 10) as raw:
        raw.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: " + declared + b"\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")


# ---- the end


def test_a_server_that_stops_closes_its_connections(fake, serving):
    with serving(fake) as there:
        assert "connection" not in post(there.client, queries=["a"]).headers
        there.service.stopping = True
        reply = post(there.client, queries=["a"])
        assert (reply.status_code, reply.headers["connection"]) == (200, "close")
        red = there.client.get("/health")
        assert (red.status_code, red.json()["detail"], red.headers["connection"]) == (503, "stopping", "close")
