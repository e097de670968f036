from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.generation import OpenAIGenerator
from rag_rl.generation.openai_generator import _is_loopback, _retry_after
from rag_rl.types import Generator

KEY = "-".join(["marked", "fake", "key", "0123456789"])


class Stub:
    """A server on loopback: ``answer(number, path, body)`` gives the status, the headers and the reply."""

    def __init__(self, answer):
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.in_flight = self.most_in_flight = 0
        lock, stub = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stub.requests)
                    stub.requests.append(
                        (self.path, body, {name.lower(): value for name, value in self.headers.items()})
                    )
                    stub.in_flight += 1
                    stub.most_in_flight = max(stub.most_in_flight, stub.in_flight)
                status, headers, reply = answer(number, self.path, body)
                with lock:
                    stub.in_flight -= 1
                payload = json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(payload))}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.end_headers()
                    self.wfile.write(payload)
                except BrokenPipeError:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve():
    stubs = []

    def start(answer):
        stubs.append(Stub(answer))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.server.shutdown()
        stub.server.server_close()


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def chat(text, finish="stop"):
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }


def echo(number, path, body):
    return 200, {}, chat(f"re: {body['messages'][-1]['content']}")


def failing(times, status=503, headers=None, message="try later"):
    def answer(number, path, body):
        if number < times:
            return status, headers or {}, {"error": {"message": message}}
        return echo(number, path, body)

    return answer


def ask(generator, prompts=("hello",), **more):
    settings = {"max_new_tokens": 8, "temperature": 0.0, **more}
    return generator.generate(list(prompts), **settings)


def texts(rows):
    return [[one.text for one in row] for row in rows]


def test_replies_come_in_the_order_of_the_prompts(serve):
    def slow_first(number, path, body):
        time.sleep(0.05 if body["messages"][-1]["content"].endswith("0") else 0.0)
        return echo(number, path, body)

    stub = serve(slow_first)
    generator = OpenAIGenerator("m", base_url=stub.url, max_concurrency=4)
    assert isinstance(generator, Generator)
    rows = ask(generator, [f"p{i}" for i in range(40)])
    assert texts(rows) == [[f"re: p{i}"] for i in range(40)]
    assert rows[0][0].prompt_tokens == 7
    assert rows[0][0].token_ids is None
    assert 1 < stub.most_in_flight <= 4
    assert (generator.requests, generator.retries) == (40, 0)
    assert ask(generator, []) == []
    generator.close()
    assert texts(ask(generator)) == [["re: hello"]], "a closed generator starts anew"


def test_what_is_sent(serve):
    stub = serve(echo)
    generator = OpenAIGenerator("m", base_url=stub.url, extra_body={"top_k": 5})
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    ask(generator, ["plain", turns], temperature=0.5, top_p=0.9, stop=["a", "b", "c", "d", "e"], seed=3)
    first, second = sorted((body for _, body, _ in stub.requests), key=lambda body: body["seed"])
    assert first == {
        "model": "m",
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a", "b", "c", "d"],
        "seed": 3,
        "messages": [{"role": "user", "content": "plain"}],
        "top_k": 5,
    }
    assert second["messages"] == turns
    assert {path for path, _, _ in stub.requests} == {"/v1/chat/completions"}
    ask(OpenAIGenerator("m", base_url=stub.url, limit_field="max_completion_tokens"))
    assert stub.requests[-1][1]["max_completion_tokens"] == 8


def test_n_is_as_many_requests_with_a_seed_each(serve):
    stub = serve(lambda number, path, body: (200, {}, chat(f"{body['messages'][0]['content']}{body['seed']}")))
    generator = OpenAIGenerator("m", base_url=stub.url)
    assert texts(ask(generator, ["a", "b"], n=2, temperature=1.0, seed=10)) == [["a10", "a11"], ["b12", "b13"]]
    assert all("n" not in body for _, body, _ in stub.requests)
    assert texts(ask(generator, ["a"], n=3, temperature=0.0, seed=1)) == [["a1"] * 3]
    assert generator.requests == 5


def test_base_models_use_completions(serve):
    reply = {"id": "1", "object": "text_completion", "created": 0, "model": "m"}
    reply["choices"] = [{"index": 0, "finish_reason": "length", "text": " Mira", "logprobs": None}]
    stub = serve(lambda number, path, body: (200, {}, reply))
    generator = OpenAIGenerator("m", base_url=stub.url, generator_type="base")
    one = ask(generator, [[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]])[0][0]
    assert (one.text, one.finish_reason, one.prompt_tokens) == (" Mira", "length", 0)
    assert stub.requests[0][0] == "/v1/completions"
    assert stub.requests[0][1]["prompt"] == "s\n\nu"


def test_stop_strings_are_cut_even_if_the_server_leaves_them(serve):
    stub = serve(lambda *_: (200, {}, chat("one. two", finish="length")))
    one = ask(OpenAIGenerator("m", base_url=stub.url), stop=["."])[0][0]
    assert (one.text, one.finish_reason) == ("one", "stop")


def test_null_content_is_an_empty_text(serve):
    stub = serve(lambda *_: (200, {}, chat(None, finish="length")))
    one = ask(OpenAIGenerator("m", base_url=stub.url))[0][0]
    assert (one.text, one.finish_reason) == ("", "length")


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_passing_trouble_is_retried_and_counted(serve, status):
    stub = serve(failing(2, status))
    generator = OpenAIGenerator("m", base_url=stub.url, backoff_s=0.01)
    assert texts(ask(generator)) == [["re: hello"]]
    assert (generator.requests, generator.retries, len(stub.requests)) == (3, 2, 3)


def test_retries_are_bounded(serve):
    stub = serve(failing(99, 500, message="the engine fell over"))
    generator = OpenAIGenerator("m", base_url=stub.url, backoff_s=0.01, max_retries=2)
    with pytest.raises(BackendError, match=r"after 3 requests: HTTP 500: .*the engine fell over") as caught:
        ask(generator)
    assert stub.url in str(caught.value)
    assert len(stub.requests) == 3


def test_what_cannot_pass_is_not_retried(serve):
    stub = serve(failing(99, 404, message="no such model"))
    with pytest.raises(BackendError, match=r"'m' gave no answer after 1 request: HTTP 404: .*no such model"):
        ask(OpenAIGenerator("m", base_url=stub.url))
    assert len(stub.requests) == 1


def refusing(status, refused=("p1",), message="bad"):
    """Refuses some prompts; the others take a moment."""

    def answer(number, path, body):
        if body["messages"][0]["content"] in refused:
            return status, {}, {"error": {"message": message}}
        time.sleep(0.02)
        return echo(number, path, body)

    return answer


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500])
def test_a_broken_backend_calls_the_others_off(serve, status):
    stub = serve(refusing(status))
    with pytest.raises(BackendError, match=f"HTTP {status}"):
        ask(OpenAIGenerator("m", base_url=stub.url, max_concurrency=2, max_retries=0), [f"p{i}" for i in range(200)])
    time.sleep(0.1)
    assert len(stub.requests) < 20


@pytest.mark.parametrize("status", [400, 408, 413, 422])
def test_a_request_that_fails_alone_is_marked_and_the_others_go_on(serve, status, monkeypatch):
    stub = serve(refusing(status, message=f"the filter says no to {KEY}"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    generator = OpenAIGenerator("m", base_url=stub.url, max_retries=2, backoff_s=0.01)
    rows = ask(generator, ["p0", "p1", "p2"])
    assert [[one.finish_reason for one in row] for row in rows] == [["stop"], ["error"], ["stop"]]
    assert (rows[0][0].text, rows[2][0].text) == ("re: p0", "re: p2")
    sent = 3 if status == 408 else 1  # what cannot pass is not repeated
    said = (
        rf"{stub.url}: model 'm' gave no answer after {sent} requests?: HTTP {status}: .*the filter says no to \*{{3}}"
    )
    assert re.fullmatch(said, rows[1][0].text)
    assert len(stub.requests) == 2 + sent


def test_copies_of_a_request_that_fails_alone_are_marked_as_well(serve):
    rows = ask(OpenAIGenerator("m", base_url=serve(refusing(400)).url), ["p0", "p1"], n=2)
    assert [[one.finish_reason for one in row] for row in rows] == [["stop"] * 2, ["error"] * 2]


def test_a_call_of_which_every_request_fails_is_a_broken_backend(serve):
    stub = serve(refusing(400, refused=("p0", "p1", "p2"), message="no room"))
    generator = OpenAIGenerator("m", base_url=stub.url)
    with pytest.raises(BackendError, match=rf"all 3 requests failed, the first: {stub.url}: .*HTTP 400: .*no room"):
        ask(generator, ["p0", "p1", "p2"])
    with pytest.raises(BackendError, match=rf"^{stub.url}: model 'm' gave no answer after 1 request: HTTP 400"):
        ask(generator, ["p0"])


def test_a_slow_prompt_is_marked(serve):
    def answer(number, path, body):
        time.sleep(0.6 if body["messages"][0]["content"] == "p1" else 0.0)
        return echo(number, path, body)

    generator = OpenAIGenerator("m", base_url=serve(answer).url, timeout_s=0.25, max_retries=1, backoff_s=0.01)
    rows = ask(generator, ["p0", "p1", "p2"])
    assert [row[0].finish_reason for row in rows] == ["stop", "error", "stop"]
    assert rows[1][0].text.endswith("gave no answer after 2 requests: no reply within 0.25 s")


def test_a_server_that_hangs_is_given_up_before_every_request_has_timed_out(serve):
    stub = serve(lambda *_: (time.sleep(1.0), (200, {}, chat("late")))[1])
    generator = OpenAIGenerator("m", base_url=stub.url, timeout_s=0.2, max_retries=0, max_concurrency=3)
    with pytest.raises(BackendError, match=r"no reply within 0\.2 s"):
        ask(generator, [f"p{i}" for i in range(60)])
    assert generator.requests <= 6


def test_a_prompt_that_is_answered_without_a_choice_is_marked(serve):
    def answer(number, path, body):
        if body["messages"][0]["content"] == "p0":
            return 200, {}, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}
        return echo(number, path, body)

    rows = ask(OpenAIGenerator("m", base_url=serve(answer).url, max_retries=1, backoff_s=0.01), ["p0", "p1"])
    assert [row[0].finish_reason for row in rows] == ["error", "stop"]
    assert rows[0][0].text.endswith("after 2 requests: the reply holds no choices")


@pytest.mark.parametrize("header", [{"Retry-After": "1"}, {"retry-after-ms": "1000"}])
def test_retry_after_is_honoured(serve, header):
    stub = serve(failing(1, 429, header))
    started = time.monotonic()
    assert texts(ask(OpenAIGenerator("m", base_url=stub.url, backoff_s=0.0))) == [["re: hello"]]
    assert 1.0 <= time.monotonic() - started < 3.0


def test_retry_after_in_its_three_forms():
    assert _retry_after({"retry-after": "2.5"}) == 2.5
    assert _retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert 8.0 < (_retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) or 0.0) <= 10.0
    assert _retry_after({"retry-after": formatdate(time.time() - 10, usegmt=True)}) == 0.0
    assert _retry_after({"retry-after": "soon"}) is None
    assert _retry_after({}) is None


def test_a_server_that_asks_for_hours_is_not_waited_for(serve):
    stub = serve(failing(99, 429, {"Retry-After": "7200"}))
    with pytest.raises(BackendError, match="asks to wait 7200 s"):
        ask(OpenAIGenerator("m", base_url=stub.url))
    assert len(stub.requests) == 1


def test_a_reply_without_choices_is_trouble_not_an_empty_text(serve):
    stub = serve(lambda number, path, body: (200, {}, {"error": "overloaded"}) if number == 0 else echo(0, path, body))
    generator = OpenAIGenerator("m", base_url=stub.url, backoff_s=0.01)
    assert texts(ask(generator)) == [["re: hello"]]
    assert generator.retries == 1


def test_a_slow_server_times_out(serve):
    stub = serve(lambda *_: (time.sleep(0.6), (200, {}, chat("late")))[1])
    with pytest.raises(BackendError, match=r"after 2 requests: no reply within 0\.1 s"):
        ask(OpenAIGenerator("m", base_url=stub.url, timeout_s=0.1, max_retries=1, backoff_s=0.01))


def test_a_dead_endpoint_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    generator = OpenAIGenerator("m", base_url=f"http://127.0.0.1:{port}/v1", max_retries=2, backoff_s=0.01)
    with pytest.raises(BackendError, match=rf"127\.0\.0\.1:{port}/v1: .* after 3 requests: cannot connect"):
        ask(generator, ["a", "b", "c"])


def test_the_key_is_read_at_each_call_and_never_told(serve, monkeypatch, caplog):
    def refuse(number, path, body):
        return 500 if number % 2 == 0 else 401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}}

    stub = serve(refuse)
    caplog.set_level(logging.INFO, logger="rag_rl")
    generator = OpenAIGenerator("m", base_url=stub.url, backoff_s=0.01, api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.raises(BackendError) as caught:
        ask(generator)
    assert [headers["authorization"] for _, _, headers in stub.requests] == [f"Bearer {KEY}"] * 2
    assert "MY_KEY" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert "repeat 1 of 4" in caplog.text
    for told in (str(caught.value), repr(caught.value), caplog.text, repr(vars(generator)), str(generator._client)):
        assert KEY not in told
    assert generator._client.api_key != KEY
    monkeypatch.setenv("MY_KEY", "another")
    with pytest.raises(BackendError):
        ask(generator)
    assert stub.requests[-1][2]["authorization"] == "Bearer another"


def test_a_key_is_needed_off_loopback_only(serve, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        ask(OpenAIGenerator("m"))
    # It serves generators, reasoners, readers, augmenters, teachers, ...: none of their prefixes fits all.
    assert str(caught.value) == (
        "no key for https://api.openai.com/v1: set the environment variable OPENAI_API_KEY, or name another one "
        "(the ..._api_key_env beside its ..._base_url; empty for a server that wants no key)"
    )
    stub = serve(echo)
    ask(OpenAIGenerator("m", base_url=stub.url))
    assert stub.requests[-1][2]["authorization"] == "Bearer EMPTY"
    assert OpenAIGenerator("m", base_url="http://gpu-7:8000/v1", api_key_env="")._key() == "EMPTY"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gpu-8:8000/v1")
    assert OpenAIGenerator("m").base_url == "http://gpu-8:8000/v1"
    assert _is_loopback("http://localhost:1/v1")
    assert _is_loopback("http://[::1]:1/v1")
    assert not _is_loopback("https://api.openai.com/v1")


def test_it_can_be_called_inside_a_running_loop(serve):
    stub = serve(echo)
    generator = OpenAIGenerator("m", base_url=stub.url)

    async def inside():
        return ask(generator)

    assert texts(asyncio.run(inside())) == [["re: hello"]]
    assert texts(asyncio.run(inside())) == [["re: hello"]]


def test_threads_may_share_one(serve):
    stub = serve(echo)
    generator = OpenAIGenerator("m", base_url=stub.url)
    results: dict[int, Any] = {}

    def work(number):
        results[number] = texts(ask(generator, [f"{number}-{i}" for i in range(5)]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [[f"re: {number}-{i}"] for i in range(5)] for number in range(4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator_type": "chat"}, "generator_type"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"max_retries": -1}, "max_retries"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ConfigError, match=message):
        OpenAIGenerator("m", **change)


@pytest.mark.parametrize("change", [{"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"stop": "a"}, {"stop": [""]}])
def test_values_out_of_range(change):
    with pytest.raises(ConfigError):
        ask(OpenAIGenerator("m", base_url="http://127.0.0.1:9/v1"), **change)


@pytest.mark.server
@pytest.mark.slow
def test_with_transformers_serve(fresh_model, tokenizer, tmp_path):
    """The same greedy text from a real server as from the model in this process."""
    from rag_rl.generation import TransformersGenerator

    program = shutil.which("transformers", path=f"{Path(os.sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.fail("the transformers command is missing: pip install 'transformers[serving]'")
    folder = tmp_path / "model"
    fresh_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "hub").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [program, "serve", str(folder), "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 180
            while True:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            prompts = ["Who rules the town?", [{"role": "user", "content": "What is the capital of the state?"}]]
            turns = [[{"role": "user", "content": prompts[0]}], prompts[1]]
            url = f"http://127.0.0.1:{port}/v1"
            settings = {"max_new_tokens": 8, "temperature": 0.0}
            local = TransformersGenerator(fresh_model, tokenizer)
            served = OpenAIGenerator(str(folder), base_url=url)
            assert texts(served.generate(prompts, **settings)) == texts(local.generate(turns, **settings))
            base = OpenAIGenerator(str(folder), base_url=url, generator_type="base")
            assert texts(base.generate(prompts[:1], **settings)) == texts(local.generate(prompts[:1], **settings))
            with pytest.raises(BackendError, match="other-model"):
                OpenAIGenerator("other-model", base_url=url, max_retries=0).generate(["x"], **settings)
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
