"""The rules that tests/conftest.py enforces: no network, and no silent skips in CI."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).with_name("conftest.py").read_text()
SKIPPING = """
import pytest

def test_package():
    pytest.importorskip("a_package_that_nobody_has")

def test_named():
    pytest.skip("faiss is not installed: pip install 'rag-rl[cpu]'")

def test_data():
    pytest.skip("needs real data")
"""


def outcome(folder: Path, tests: str, *, ci: bool) -> tuple[int, str]:
    """Runs `tests` under our conftest in a process of their own; returns the exit status and pytest's closing line."""
    (folder / "conftest.py").write_text(FIXTURES)
    (folder / "test_it.py").write_text(tests)
    environment = {**os.environ, "RAG_RL_CI": "1" if ci else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    return done.returncode, done.stdout.strip().splitlines()[-1]


def test_missing_package_is_a_skip_at_home(tmp_path):
    status, line = outcome(tmp_path, SKIPPING, ci=False)
    assert status == 0
    assert line.startswith("3 skipped")


def test_missing_package_is_a_failure_in_ci(tmp_path):
    status, line = outcome(tmp_path, SKIPPING, ci=True)
    assert status == 1
    assert line.startswith("2 failed, 1 skipped")


def test_module_level_skip_is_a_failure_in_ci(tmp_path):
    tests = "import pytest\npytest.importorskip('a_package_that_nobody_has')\n"
    assert outcome(tmp_path, tests, ci=False)[0] == 5  # nothing collected
    assert outcome(tmp_path, tests, ci=True)[0] not in (0, 5)


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80)])
def test_connections_out_are_refused(address):
    with (
        socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as out,
        pytest.raises(RuntimeError, match="loopback only"),
    ):
        out.connect(address)


def test_name_lookups_are_refused():
    with pytest.raises(RuntimeError, match="loopback only"):
        socket.create_connection(("example.org", 443), timeout=1)


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            client.sendall(b"x")
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5):
            pass


def test_unix_sockets_are_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a unix socket has about 100 bytes
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("s")
        server.listen()
        client.connect("s")


def test_hub_is_off():
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("_repeat", [1, 2])
def test_seeds_are_fixed(_repeat):
    assert random.random() == random.Random(0).random()
