"""The process: real ones, started from the command line, and what they leave behind."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rl import cli
from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.errors import ConfigError
from rag_rl.retrieval.http import HTTPRetriever
from rag_rl.server import Limits, SearchThread, Service, bind, is_loopback, process, read_token, serve

pytestmark = pytest.mark.server

TOKEN = "-".join(["marked", "fake", "token"])
CORPUS = DataArguments(data_corpus="${tiny}/data/corpus.jsonl")
TINY = RetrieverArguments(retriever_encoder="${tiny}/encoder")


@contextmanager
def command(*flags: object, env: dict[str, str] | None = None):
    """``rag-rl serve`` in a process of its own, killed at the end if it is still there."""
    words = [sys.executable, "-m", "rag_rl.cli", "serve", *map(str, flags)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch):
    monkeypatch.delenv("RAG_RL_RETRIEVER_TOKEN", raising=False)
    ours = logging.getLogger("rag_rl")
    level = ours.level
    yield
    ours.setLevel(level)  # the command shows what it does


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def refused(capsys, *flags: object, code: int = 2) -> str:
    """The one line with which the command line ends, in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *map(str, flags)])
    error = capsys.readouterr().err
    assert stop.value.code == code
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith(("rag-rl: error: ", "rag-rl: stopped: "))]
    return line.partition(": ")[2].partition(": ")[2]


# ---- the port


def test_a_port_that_is_taken():
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1 port {port} \(Address already in use\)"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()  # and free again at once


def test_ports_and_hosts_that_cannot_be(monkeypatch):
    with pytest.raises(ConfigError, match="port must be between 0 and 65535, got 70000"):
        bind("127.0.0.1", 70_000)

    # Tests may look up no names: what the look-up gives is fixed, what binding makes of it is real.
    elsewhere = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 8012))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [elsewhere])
    with pytest.raises(ConfigError, match=r"cannot listen on node7 port 8012 \(.*\): give another --host or --port"):
        bind("node7", 8012)

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="cannot listen on host 'node7': Name or service not known"):
        bind("node7", 8012)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6():
    try:
        sock = bind("::1", 0)
    except ConfigError:
        pytest.skip("no IPv6 loopback here")
    assert sock.family == socket.AF_INET6
    sock.close()


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.5", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "node7")))


# ---- the token


def test_reading_the_token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAG_RL_RETRIEVER_TOKEN", raising=False)
    assert read_token() is None
    monkeypatch.setenv("RAG_RL_RETRIEVER_TOKEN", TOKEN)
    monkeypatch.setenv("OTHER", f"{TOKEN}-2")
    assert read_token() == TOKEN
    assert read_token("OTHER") == f"{TOKEN}-2"
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}-3\n")
    assert read_token("OTHER", path) == f"{TOKEN}-3"


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", "gr\u00fcn".encode(), b"a\nb"])
def test_tokens_that_no_header_can_hold(tmp_path, content):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="must be printable ASCII without spaces, and not empty") as error:
        read_token(path=path)
    assert str(path) in str(error.value)
    assert "two" not in str(error.value), "not even a wrong one is shown"


def test_token_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        read_token(path=tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: it is no text"):
        read_token(path=tmp_path / "binary")


# ---- serving in this process


def test_serve_until_a_signal(fake, caplog):
    caplog.set_level("INFO", logger="rag_rl")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in (signal.SIGTERM, signal.SIGINT):
        service = Service(SearchThread(lambda: fake))
        sock = bind("127.0.0.1", 0)
        port = sock.getsockname()[1]

        def ask_and_stop(port=port, number=number):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                    connection.request("POST", "/retrieve", '{"queries": ["a"]}')
                    if connection.getresponse().status == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.01)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=ask_and_stop)
        thread.start()
        serve(service, sock)
        thread.join(10)
        assert (service.accepted, service.answered) == (1, 1)
        assert f"listening on http://127.0.0.1:{port}" in caplog.text
    assert caplog.text.count("ready: 10 passages, fingerprint print-of-fake") == 2
    assert caplog.text.count("stopped: 1 requests accepted, 1 answered, in 2 searches") == 2
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_reason_why_nothing_can_be_served_is_raised():
    def open_retriever():
        raise ConfigError("no encoder")

    with pytest.raises(ConfigError, match="no encoder"):
        serve(Service(SearchThread(open_retriever)), bind("127.0.0.1", 0))


def test_open_connections_may_still_ask_for_a_moment(fake, starting, green, monkeypatch):
    monkeypatch.setattr(process, "_LINGER_S", 1.0)
    with starting(lambda: fake) as there:
        green(there.client)
        there.server.should_exit = True
        while not there.service.stopping:
            time.sleep(0.005)
        last = there.client.post("/search", json={"queries": ["a"]})
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", there.client.base_url.port), 5)


# ---- the command line


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--index", "--config", "--run", "--host", "--port", "--token_file", "--max_requests", "/retrieve"):
        assert word in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--index", "x", "--port", "70000"], "manifest.json is missing: x is no index; build one with build_index"),
        (["--index", "x", "--max_queries", "0"], "max_queries must be at least 1, got 0"),
        (["--index", "x", "--token_file", "none"], "token_file none cannot be read: No such file or directory"),
        (["--run", "x"], "x holds no run (there is no resolved_config.yaml in it)"),
        (["--run", "x", "--encoder", "e"], "--encoder and --chroma_url go with --index: a config or a run has"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_what_cannot_be_served(tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *flags)


def test_no_token_on_the_command_line():
    with pytest.raises(SystemExit):
        cli.main(["serve", "--index", "x", "--token", TOKEN])


@pytest.fixture
def told(monkeypatch):
    """What the command line makes of its flags: the service and the address, in place of serving."""
    seen = SimpleNamespace()
    monkeypatch.setattr("rag_rl.server.bind", lambda host, port: (host, port))
    monkeypatch.setattr("rag_rl.server.serve", lambda service, sock: seen.__dict__.update(service=service, sock=sock))
    return seen


def test_flags_reach_the_service(told, tmp_path, monkeypatch, caplog):
    config = tmp_path / "c.yaml"
    config.write_text("retriever_encoder: ${tiny}/encoder\nretriever_top_k: 7\nlearning_rate: 1e-4\n")
    cli.main(["serve", "--config", str(config)])
    assert told.sock == ("127.0.0.1", 8000)
    assert (told.service.top_k, told.service.limits, told.service._token) == (7, Limits(), None)
    assert "no token" not in caplog.text

    flags = "--host 0.0.0.0 --port 80 --top_k 4 --max_top_k 5 --max_queries 6 --max_query_chars 7 --max_exclude 8"
    flags += " --max_body_bytes 9 --max_requests 10 --token_env OTHER"
    cli.main(["serve", "--config", str(config), *flags.split()])
    assert told.sock == ("0.0.0.0", 80)
    assert (told.service.top_k, told.service.limits) == (4, Limits(5, 6, 7, 8, 9, 10))
    assert "no token is set: whoever can reach 0.0.0.0 can search" in caplog.text
    caplog.clear()

    monkeypatch.setenv("OTHER", TOKEN)
    cli.main(["serve", "--config", str(config), *flags.replace("--top_k 4 ", "").split()])
    assert (told.service.top_k, told.service._token) == (5, TOKEN.encode()), "no more than is allowed"
    assert "no token" not in caplog.text


# ---- processes


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index of the tiny world, and the retriever over it."""
    from rag_rl.config.parts import build_corpus, build_encoder
    from rag_rl.retrieval import build_index, open_index

    folder = tmp_path_factory.mktemp("index") / "tiny"
    encoder = build_encoder(TINY)
    build_index(build_corpus(CORPUS), encoder, folder, progress=False)
    retriever = open_index(folder, encoder)
    yield retriever
    retriever.close()


def flat(found):
    return [[(hit.passage, hit.rank) for hit in hits] for hits in found]


def read_until(stream, pattern: str) -> tuple[str, str]:
    """The line that matches, and all lines before it."""
    lines = []
    for line in stream:
        lines.append(line)
        if re.search(pattern, line):
            return line, "".join(lines)
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_a_process_from_start_to_end(index, monkeypatch):
    port = free_port()
    with command("--index", index.folder, "--port", port, env={"RAG_RL_RETRIEVER_TOKEN": TOKEN}) as running:
        monkeypatch.setenv("RAG_RL_RETRIEVER_TOKEN", TOKEN)
        client = HTTPRetriever(f"http://127.0.0.1:{port}", fingerprints=[index.fingerprint], wait_s=90)
        queries = ["Who rules Elmton?", "Which river?", "silk"]
        assert flat(client.search(queries, top_k=4)) == flat(index.search(queries, top_k=4))
        second = subprocess.run(
            [sys.executable, "-m", "rag_rl.cli", "serve", "--index", str(index.folder), "--port", str(port)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1] == (
            f"rag-rl: error: cannot listen on 127.0.0.1 port {port} (Address already in use): another server has it: "
            "give another --port"
        )
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=30)
        assert running.returncode == 0
        assert f"ready: 560 passages, fingerprint {index.fingerprint}" in log
        assert log.splitlines()[-1] == "rag-rl serve: stopped: 1 requests accepted, 1 answered, in 2 searches"
        assert TOKEN not in log
        client.close()


@pytest.mark.slow
def test_a_damaged_index(index, tmp_path, capsys):
    folder = Path(shutil.copytree(index.folder, tmp_path / "copy"))
    vectors = folder / "vectors.f32"
    content = bytearray(vectors.read_bytes())
    content[1000] ^= 1
    vectors.write_bytes(content)
    expected = f"{vectors} was changed after the index was made: delete the folder and build the index again"
    assert refused(capsys, "--index", folder, "--port", 0) == expected
    vectors.write_bytes(content[:-4])
    assert refused(capsys, "--index", folder, "--port", 0).startswith(f"{vectors} has {len(content) - 4} bytes, exp")
    vectors.unlink()
    assert refused(capsys, "--index", folder, "--port", 0).startswith(f"{vectors} is missing")
    (folder / "manifest.json").write_text("{")
    assert refused(capsys, "--index", folder, "--port", 0).startswith(f"{folder / 'manifest.json'} cannot be read")


@pytest.mark.slow
def test_a_config_is_served(index, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("retriever_encoder: ${tiny}/encoder\ndata_corpus: ${tiny}/data/corpus.jsonl\nseed: 0\n")
    port = free_port()
    found = []

    def ask_and_stop():
        client = HTTPRetriever(f"http://127.0.0.1:{port}", wait_s=60)
        try:
            found.extend(client.search(["Who rules Elmton?"], top_k=4))
        finally:
            client.close()
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_and_stop)
    thread.start()
    cli.main(["serve", "--config", str(config), "--port", str(port)])
    thread.join(10)
    assert flat(found) == flat(index.search(["Who rules Elmton?"], top_k=4))


@pytest.mark.slow
def test_a_signal_while_the_index_is_opened(index):
    with command("--index", index.folder, "--port", 0) as running:
        read_until(running.stderr, "listening on ")
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=30)
        assert running.returncode == 0


class Hammer(threading.Thread):
    """A client on plain connections that asks until it is told to stop, and counts what becomes of its requests."""

    def __init__(self, port: int, expected: dict[str, list[str]], number: int, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.port, self.expected, self.number, self.over = port, expected, number, over
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        queries = list(self.expected)
        turn = self.number
        connection = None
        while not self.over.is_set():
            query = queries[turn % len(queries)]
            turn += 1
            sent = False
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                    connection.connect()
                body = json.dumps({"queries": [query], "topk": 3})
                connection.request("POST", "/retrieve", body, {"Content-Type": "application/json"})
                sent = True
                reply = connection.getresponse()
                content = reply.read()
                if reply.getheader("Connection") == "close":
                    connection.close()
                    connection = None
            except ConnectionRefusedError:
                self.outcomes["refused"] += 1
                return
            except (http.client.RemoteDisconnected, ConnectionError):
                # The server closed before it read the request; had it read it, its own count would say so.
                self.outcomes["closed" if sent else "refused"] += 1
                connection = None
                continue
            except (http.client.HTTPException, OSError) as error:
                self.outcomes[f"broken: {error!r}"] += 1
                return
            if reply.status != 200:
                self.outcomes[f"status {reply.status}"] += 1
                continue
            found = [document["id"] for document in json.loads(content)["result"][0]]
            self.outcomes["right" if found == self.expected[query] else "wrong"] += 1


@pytest.mark.slow
def test_sigterm_in_mid_load_loses_no_accepted_request(index):
    words = [f"Who rules {name}?" for name in ("Elmton", "Mariton", "Halgacrest", "Elmneham", "Belbeham")]
    found = index.search(words, top_k=3)
    expected = {word: [hit.passage.doc_id for hit in hits] for word, hits in zip(words, found, strict=True)}
    with command("--index", index.folder, "--port", 0) as running:
        line, _ = read_until(running.stderr, "listening on ")
        port = int(line.rsplit(":", 1)[1])
        read_until(running.stderr, "ready: ")
        over = threading.Event()
        hammers = [Hammer(port, expected, number, over) for number in range(32)]
        for hammer in hammers:
            hammer.start()
        time.sleep(3.0)
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=60)
        assert running.returncode == 0
        for hammer in hammers:
            hammer.join(20)
        over.set()
    outcomes = sum((hammer.outcomes for hammer in hammers), Counter())
    accepted, answered = map(int, re.search(r"stopped: (\d+) requests accepted, (\d+) answered", log).groups())
    assert set(outcomes) <= {"right", "refused", "closed"}, outcomes
    assert outcomes["right"] == accepted == answered, (outcomes, log)
    assert accepted > 100
    assert outcomes["refused"] >= 1, "the load went on until the server was gone"


@pytest.mark.slow
def test_a_restart_in_mid_load_is_not_noticed(index):
    port = free_port()
    client = HTTPRetriever(f"http://127.0.0.1:{port}", wait_s=120, backoff_s=0.05)
    words = [f"Who rules {name}?" for name in ("Elmton", "Mariton", "Halgacrest", "Elmneham", "Belbeham")]
    expected = flat(index.search(words, top_k=3))
    over = threading.Event()
    results: Counter[str] = Counter()

    def load() -> None:
        while not over.is_set():
            results["right" if flat(client.search(words, top_k=3)) == expected else "wrong"] += 1

    threads = [threading.Thread(target=load, daemon=True) for _ in range(8)]
    for turn in range(2):
        with command("--index", index.folder, "--port", port) as running:
            read_until(running.stderr, "ready: ")
            for thread in threads if turn == 0 else ():
                thread.start()
            before = results["right"]
            deadline = time.monotonic() + 60
            while results["right"] < before + 50 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert results["right"] >= before + 50
            if turn == 1:
                over.set()
                for thread in threads:
                    thread.join(30)
            running.send_signal(signal.SIGTERM)
            running.communicate(timeout=60)
    assert set(results) == {"right"}
    assert client.retries > 0
    client.close()
