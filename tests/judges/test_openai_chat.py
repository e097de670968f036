from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.judges import Chat, ChatError, LLMJudge, OpenAIChat, Reply, VerdictCache
from rag_rl.judges.openai_chat import GEMINI_URL, _is_loopback, _retry_after
from rag_rl.types import JudgeCase, Verdict


class Pauses(list):
    """Pauses that are noted and not kept."""

    async def __call__(self, seconds):
        self.append(seconds)


def make(server, **settings):
    settings = {"sleep": Pauses(), "seed": 0, **settings}
    return OpenAIChat("m", base_url=getattr(server, "url", server), **settings)


def ask(chat, prompt="hello"):
    async def once():
        try:
            return await chat.complete(prompt)
        finally:
            await chat.aclose()

    return asyncio.run(once())


def failing(times, answer):
    """``answer`` for the first requests, "fine" after that."""
    return lambda request: answer if request.number < times else "fine"


def error(status, message="try later", **more):
    return {"status": status, "body": {"error": {"message": message}}, **more}


def test_what_is_sent_and_what_comes_back(chat_server):
    server = chat_server(lambda request: f"re: {request.text}")
    chat = make(server, extra_body={"reasoning_effort": "none"})
    assert isinstance(chat, Chat)
    assert ask(chat) == Reply("re: hello", prompt_tokens=7, completion_tokens=2)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert ask(chat, turns).text == "re: u"
    first, second = server.requests
    assert first.path == "/v1/chat/completions"
    assert first.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "max_tokens": 1024,
        "reasoning_effort": "none",
    }
    assert second.body["messages"] == turns
    assert chat.requests == 2
    assert chat.name == f"m at {server.url}"


def test_what_can_be_left_to_the_server(chat_server):
    server = chat_server(lambda request: "fine")
    ask(make(server, temperature=None, max_tokens=None))
    assert sorted(server.requests[0].body) == ["messages", "model"]
    ask(make(server, max_tokens=5, limit_field="max_completion_tokens"))
    assert server.requests[1].body["max_completion_tokens"] == 5
    assert "max_tokens" not in server.requests[1].body


def test_the_gemini_contract(chat_server, monkeypatch, fake_key):
    """Path, bearer key from GOOGLE_API_KEY, model and body, as Google's compatible endpoint wants them."""
    monkeypatch.setenv("GOOGLE_API_KEY", fake_key)
    monkeypatch.setenv("OPENAI_API_KEY", "another-key-altogether")
    assert OpenAIChat.gemini().base_url == GEMINI_URL == "https://generativelanguage.googleapis.com/v1beta/openai/"
    server = chat_server(lambda request: {"text": '{"score": 1}', "usage": {
        "prompt_tokens": 20, "completion_tokens": 198, "total_tokens": 623}})  # fmt: skip
    reply = ask(OpenAIChat.gemini(base_url=f"{server.origin}/v1beta/openai/"), "Judge this.")
    (request,) = server.requests
    assert request.path == "/v1beta/openai/chat/completions"
    assert request.headers["authorization"] == f"Bearer {fake_key}"
    assert request.headers["content-type"] == "application/json"
    assert request.body == {
        "model": "gemini-2.5-flash",
        "messages": [{"role": "user", "content": "Judge this."}],
        "temperature": 0.0,
        "max_tokens": 8192,
    }
    # Its reasoning is in the total only, and is paid for as output.
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ('{"score": 1}', 20, 603)


def test_gemini_wants_its_own_key(chat_server, monkeypatch, fake_key):
    chat_server(lambda request: "fine")
    monkeypatch.setenv("OPENAI_API_KEY", fake_key)
    with pytest.raises(ConfigError, match="set the environment variable GOOGLE_API_KEY"):
        OpenAIChat.gemini()


@pytest.mark.parametrize("trouble", [429, 500, 502, 503, 408, 409, "cut", "cut unsized", "hang", "no choices", "page"])
def test_passing_trouble_is_retried_and_counted(chat_server, trouble):
    async def answer(request):
        if request.number >= 2:
            return "fine"
        if trouble == "cut":
            return {"text": "half", "cut_at": 40}
        if trouble == "cut unsized":
            return {"text": "half", "cut_at": 40, "sized": False}
        if trouble == "hang":
            await asyncio.sleep(60.0)
        if trouble == "no choices":
            return {"body": {"error": "overloaded"}}
        if trouble == "page":
            return {"body": "<html>busy</html>", "headers": {"Content-Type": "text/html"}}
        return error(trouble)

    server = chat_server(answer)
    pauses = Pauses()
    chat = make(server, sleep=pauses, timeout_s=0.2 if trouble == "hang" else 10.0)
    assert ask(chat) == Reply("fine", 7, 2, requests=3)
    assert len(server.requests) == chat.requests == 3
    assert len(pauses) == 2


def test_pauses_double_up_to_a_cap_less_a_part_by_chance(chat_server):
    pauses = Pauses()
    with pytest.raises(ChatError, match="after 9 requests"):
        ask(make(chat_server(failing(99, error(503))), sleep=pauses, max_retries=8, backoff_s=1.0, seed=7))
    full = [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, full, strict=True))
    jitter = random.Random(7)
    assert pauses == [most * jitter.uniform(0.5, 1.0) for most in full]


def test_pausing_leaves_the_global_random_state_alone(chat_server):
    random.seed(3)
    before = random.getstate()
    ask(OpenAIChat("m", base_url=chat_server(failing(3, error(503))).url, backoff_s=0.001))
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "2.5"}, 2.5),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
    ],
)
def test_retry_after_is_honoured(chat_server, headers, expected):
    pauses = Pauses()
    ask(make(chat_server(failing(1, error(429, headers=headers))), sleep=pauses))
    assert pauses == [expected]


def test_retry_after_as_a_date(chat_server):
    pauses = Pauses()
    headers = {"Retry-After": formatdate(time.time() + 20, usegmt=True)}
    ask(make(chat_server(failing(1, error(503, headers=headers))), sleep=pauses))
    assert len(pauses) == 1
    assert 15.0 < pauses[0] <= 20.0


def test_the_pause_that_gemini_tells_in_the_body(chat_server):
    pauses = Pauses()
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}]
    body = [{"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": details}}]
    ask(make(chat_server(failing(1, {"status": 429, "body": body})), sleep=pauses))
    assert pauses == [34.5]


def test_retry_after_in_all_its_forms():
    assert _retry_after({"retry-after": formatdate(time.time() - 10, usegmt=True)}, "") == 0.0
    assert _retry_after({"retry-after": "-3"}, "") == 0.0
    assert _retry_after({"retry-after": "soon"}, "") is None
    assert _retry_after({"retry-after": "nan"}, "") is None
    assert _retry_after({}, '{"retryDelay": "1.2.3s"}') is None
    assert _retry_after({}, "") is None


def test_a_server_that_asks_for_hours_is_not_waited_for(chat_server):
    server = chat_server(failing(99, error(429, headers={"Retry-After": "7200"})))
    pauses = Pauses()
    with pytest.raises(ChatError, match=r"after 1 request: HTTP 429: try later; it asks to wait 7200 s"):
        ask(make(server, sleep=pauses))
    assert (len(server.requests), pauses) == (1, [])
    assert ask(make(chat_server(failing(1, error(429, headers={"Retry-After": "90"}))), sleep=pauses)).text == "fine"
    assert pauses == [90.0]


def test_retries_are_bounded_and_the_endpoint_is_named(chat_server):
    server = chat_server(failing(99, error(500, "the engine\nfell over " + "x" * 1000)))
    with pytest.raises(ChatError) as caught:
        ask(make(server, max_retries=2))
    told = str(caught.value)
    assert told.startswith(f"m at {server.url}: no answer after 3 requests: HTTP 500: the engine fell over xxx")
    assert len(told) < 450
    assert caught.value.requests == len(server.requests) == 3
    assert isinstance(caught.value, BackendError)


def test_a_reply_that_drips_times_out(chat_server):
    """Each byte comes in time, the reply does not."""
    gone = asyncio.Event()

    async def drip(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.02)
        gone.set()

    async def against_it():
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        chat = make(f"http://127.0.0.1:{port}/v1", timeout_s=0.3, max_retries=0)
        try:
            await chat.complete("hello")
        finally:
            await chat.aclose()
            await asyncio.wait_for(gone.wait(), 5.0)  # the client has hung up
            server.close()

    with pytest.raises(ChatError, match=r"no reply within 0\.3 s"):
        asyncio.run(against_it())


def test_a_dead_endpoint_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ChatError, match=rf"m at {url}: no answer after 3 requests: the connection failed"):
        ask(make(url, max_retries=2))


@pytest.mark.parametrize(
    ("status", "body", "check"),
    [
        (401, {"error": {"message": "no", "code": "invalid_api_key"}}, "the key in the environment variable MY_KEY"),
        (403, {"error": {"message": "no"}}, "the key in the environment variable MY_KEY"),
        (400, [{"error": {"code": 400, "message": "API key not valid."}}], "the key in the environment variable MY_"),
        (402, {"error": {"message": "no"}}, "the plan behind the key"),
        (429, {"error": {"message": "no", "code": "insufficient_quota"}}, "the plan behind the key"),
        (404, {"error": {"message": "no"}}, "the model's name 'm' and the base URL"),
        (404, "<html>", "the model's name 'm' and the base URL"),
        (400, {"detail": "Server is pinned to '/a/model'; requested 'm'."}, "the model's name 'm'"),
        (400, {"error": {"message": "The model `m` does not exist."}}, "the model's name 'm'"),
        (400, {"error": {"message": "no", "code": "model_not_found"}}, "the model's name 'm'"),
        (400, {"message": "Invalid model name passed in model=m"}, "the model's name 'm'"),
    ],
)
def test_what_every_request_would_meet_stops_at_once(chat_server, monkeypatch, fake_key, status, body, check):
    monkeypatch.setenv("MY_KEY", fake_key)
    server = chat_server(lambda request: {"status": status, "body": body})
    with pytest.raises(BackendError) as caught:
        ask(make(server, api_key_env="MY_KEY"))
    assert not isinstance(caught.value, ChatError)
    assert str(caught.value).startswith(f"m at {server.url}: HTTP {status}: ")
    assert f"; check {check}" in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens."),
        (400, "The response was filtered due to the prompt triggering the content management policy."),
        (413, "too large"),
        (422, "Unsupported value: 'temperature' does not support 0 with this model."),
    ],
)
def test_what_one_request_meets_fails_that_one_without_repeats(chat_server, status, message):
    server = chat_server(lambda request: error(status, message))
    with pytest.raises(ChatError, match=f"after 1 request: HTTP {status}: "):
        ask(make(server))
    assert len(server.requests) == 1


def test_json_is_asked_for_only_if_wanted_and_never_insisted_on(chat_server):
    ignoring = chat_server(lambda request: "plain words")
    assert ask(make(ignoring, json_mode=True)).text == "plain words"
    assert ignoring.requests[0].body["response_format"] == {"type": "json_object"}
    ask(make(ignoring))
    assert "response_format" not in ignoring.requests[1].body

    def refusing(request):
        if "response_format" in request.body:
            return error(400, "Unknown name 'response_format': cannot find field")
        return "plain words"

    server = chat_server(refusing)
    pauses = Pauses()
    chat = make(server, json_mode=True, max_retries=0, sleep=pauses)
    assert ask(chat) == Reply("plain words", 7, 2, requests=2)
    assert ask(chat) == Reply("plain words", 7, 2, requests=1)
    assert ["response_format" in request.body for request in server.requests] == [True, False, False]
    assert pauses == []


def test_an_empty_or_cut_reply_is_told_as_such(chat_server):
    reply = ask(make(chat_server(lambda request: {"text": None, "finish": "length", "usage": None})))
    assert reply == Reply("", 0, 0, finish_reason="length")


def test_one_chat_serves_several_loops_at_once(chat_server):
    async def slow(request):
        await asyncio.sleep(0.05)
        return request.text

    server = chat_server(slow)
    chat = make(server)

    async def several(name):
        try:
            return [reply.text for reply in await asyncio.gather(*(chat.complete(f"{name}{i}") for i in range(8)))]
        finally:
            await chat.aclose()

    async def both():
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, several(name)) for name in "abc"))

    assert asyncio.run(both()) == [[f"{name}{i}" for i in range(8)] for name in "abc"]
    assert ask(chat, "again").text == "again"
    assert len(chat._clients) == 0


def test_the_key_is_told_nowhere(chat_server, monkeypatch, caplog, fake_key):
    """Not by messages, logs at the lowest level, representations, tracebacks with variables, nor by an echo."""

    def echo(request):
        told = f"you sent {request.headers['authorization']}"
        if request.text == "refused":
            return error(401, told)
        if request.text == "fails":
            return error(500, told)
        return f"{told} {request.text}"

    monkeypatch.setenv("MY_KEY", fake_key)
    caplog.set_level(logging.DEBUG)
    server = chat_server(echo)
    chat = make(server, api_key_env="MY_KEY")
    told = [ask(chat).text]
    assert told == ["you sent Bearer *** hello"]
    for prompt in ("refused", "fails"):
        with pytest.raises(BackendError) as caught:
            ask(chat, prompt)
        assert "you sent Bearer ***" in str(caught.value)
        assert (caught.value.__cause__, caught.value.__context__) == (None, None)
        told += [str(caught.value), repr(caught.value)]
        frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack
        ours = [frame for frame in frames if "rag_rl" in frame.filename]
        assert ours
        told += [str(frame.locals) for frame in ours]
    assert all(request.headers["authorization"] == f"Bearer {fake_key}" for request in server.requests)
    assert "repeat 1 of 5" in caplog.text
    told += [caplog.text, *(str(vars(record)) for record in caplog.records), repr(chat), str(vars(chat))]
    assert not [text for text in told if fake_key in text]


def test_credentials_in_an_address_are_not_shown(chat_server, fake_key):
    server = chat_server(lambda request: error(500, request.path))
    address = server.url.replace("://", f"://user:{fake_key}@")
    chat = make(address, max_retries=0)
    assert chat.name == f"m at {server.url}"
    with pytest.raises(ChatError) as caught:
        ask(chat)
    assert fake_key not in str(caught.value)
    chat = make(f"{server.url}?key={fake_key}", max_retries=0)
    assert chat.name == f"m at {server.url}"


def test_a_short_stand_in_for_a_key_spoils_no_reply(chat_server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "x")
    server = chat_server(lambda request: '{"max": 1}')
    assert ask(make(server, api_key_env="MY_KEY")).text == '{"max": 1}'
    assert server.requests[0].headers["authorization"] == "Bearer x"


def test_the_key_is_read_at_each_call(chat_server, monkeypatch):
    server = chat_server(lambda request: "fine")
    chat = make(server, api_key_env="MY_KEY")
    for key in ("the-first-key", "the-second-key"):
        monkeypatch.setenv("MY_KEY", key)
        ask(chat)
        assert server.requests[-1].headers["authorization"] == f"Bearer {key}"


def test_a_key_is_needed_off_loopback_only(chat_server, monkeypatch):
    server = chat_server(lambda request: "fine")
    with pytest.raises(ConfigError, match="set the environment variable OPENAI_API_KEY"):
        OpenAIChat("m")
    assert ask(make(server)).text == "fine"
    assert OpenAIChat("m", base_url="http://gpu-7:8000/v1", api_key_env="").name == "m at http://gpu-7:8000/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert OpenAIChat("m").base_url == server.url
    assert _is_loopback("http://localhost:1/v1")
    assert _is_loopback("http://[::1]:1/v1")
    assert not _is_loopback("https://api.openai.com/v1")


def test_settings_that_shape_replies_are_told_apart():
    def fingerprint(**settings):
        return make("http://127.0.0.1:9/v1", **settings).fingerprint

    shaping = [{}, {"temperature": 1.0}, {"max_tokens": 5}, {"json_mode": True}, {"extra_body": {"top_k": 1}}]
    assert len({fingerprint(**settings) for settings in shaping}) == len(shaping)
    assert fingerprint(timeout_s=1.0, max_retries=0) == fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timeout_s": 0.0}, "judge_timeout_s must be above 0"),
        ({"max_retries": -1}, "judge_max_retries"),
        ({"backoff_s": -1.0}, "backoff_s"),
        ({"max_tokens": 0}, "judge_max_tokens must be at least 1"),
        ({"temperature": -1.0}, "judge_temperature must be 0 or more"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ConfigError, match=message):
        make("http://127.0.0.1:9/v1", **change)


@contextmanager
def transformers_serve(model, port, folder):
    """Serves a model by ``transformers serve``; yields the process."""
    program = shutil.which("transformers", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.fail("the transformers command is missing: pip install 'transformers[serving]'")
    (folder / "hub").mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    command = [program, "serve", str(model), "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240.0
            while True:
                assert server.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield server
        finally:
            server.kill()
            server.wait()


@pytest.mark.server
@pytest.mark.slow
def test_with_transformers_serve(tmp_path):
    """A real server: the same words as in this process; killed, it is named; started again, nothing is asked twice."""
    from rag_rl.generation import TransformersGenerator
    from rag_rl.tiny import FOLDER

    class Words:
        """Any reply is a verdict, and its reason."""

        name, version = "words", "1"

        def group(self, cases):
            return [[i] for i in range(len(cases))]

        def prompt(self, cases):
            return f"Judge the answer.\nQuestion: {cases[0].question}\nGiven answer: {cases[0].answer}"

        def parse(self, reply, cases):
            return [Verdict(1.0, reply)]

    model = FOLDER / "reader"
    local = TransformersGenerator.from_pretrained(str(model), device="cpu")
    cases = [JudgeCase("Which river?", f"Mira{i}") for i in range(48)]
    turns = [[{"role": "user", "content": Words().prompt([case])}] for case in cases]
    words = [row[0].text for row in local.generate(turns, max_new_tokens=8, temperature=0.0)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chat = OpenAIChat(
        str(model), base_url=f"http://127.0.0.1:{port}/v1", max_tokens=8, json_mode=True, max_retries=2, backoff_s=0.2
    )
    judge = LLMJudge(chat, Words(), cache=VerdictCache(tmp_path / "verdicts.sqlite3"))
    with transformers_serve(model, port, tmp_path) as server:
        other = OpenAIChat("other-model", base_url=chat.base_url)
        with pytest.raises(BackendError, match="check the model's name 'other-model'") as caught:
            ask(other)
        assert not isinstance(caught.value, ChatError)
        assert asyncio.run(judge.judge(cases[:16])) == [Verdict(1.0, text) for text in words[:16]]
        server.kill()
        server.wait()
        with pytest.raises(BackendError, match=rf"20 calls of the judge in a row failed.*127\.0\.0\.1:{port}/v1"):
            asyncio.run(judge.judge(cases))
        assert asyncio.run(judge.judge(cases[:16])) == [Verdict(1.0, text) for text in words[:16]]
    asked = judge.asked
    with transformers_serve(model, port, tmp_path):
        assert asyncio.run(judge.judge(cases)) == [Verdict(1.0, text) for text in words]
    assert judge.asked == asked + 32
    judge.close()
