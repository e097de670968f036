"""What every test runs under: no network but loopback, no model hub, fixed seeds; and the rule about skips in CI."""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports the libraries that read them; subprocesses inherit them.
os.environ.update(
    ANONYMIZED_TELEMETRY="False",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
    MPLBACKEND="Agg",
)
# Tiny matrices are slower on several threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MISSING_PACKAGE = re.compile(r"not installed|could not import|No module named", re.IGNORECASE)


class NetworkBlockedError(RuntimeError):
    """A test without the mark `network` tried to leave the machine."""


def is_local(address: Any) -> bool:
    """Whether a socket address stays on this machine: a path, loopback, or the unspecified address."""
    if not isinstance(address, tuple):  # AF_UNIX: a path
        return True
    host = address[0]
    if host in ("", "localhost", None):
        return True
    try:
        ip = ipaddress.ip_address(host.split("%")[0])
    except ValueError:  # a name that would have to be looked up
        return False
    return ip.is_loopback or ip.is_unspecified


_open_to_all = False


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuses connections and name look-ups that leave the machine, in fixtures of every scope as well."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        if not (_open_to_all or is_local(address)):
            raise NetworkBlockedError(f"tests reach loopback only, and this goes to {address!r}: mark it `network`")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name != socket.gethostname():  # its own name: torch's rendezvous asks for it
            check((name,))
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def _network_where_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    global _open_to_all
    _open_to_all = request.node.get_closest_marker("network") is not None
    yield
    _open_to_all = False


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:  # nobody waits for torch who does not use it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What a command does to logging, it does to its own process: `rag-rl ask` turns warnings off."""
    ours = logging.getLogger("rag_rl")
    level = ours.level
    yield
    logging.disable(logging.NOTSET)
    ours.setLevel(level)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets, named by RAG_RL_DATA."""
    named = os.environ.get("RAG_RL_DATA")
    if not named:
        pytest.skip("needs real data: set RAG_RL_DATA to the folder that holds hotpotqa/, scifact/, ...")
    root = Path(named).resolve()
    assert root.is_dir(), f"RAG_RL_DATA names {root}, and there is no such folder"
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the indexes of tests out of the user's cache; all runs of a session share them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_RL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# The tiny config cut down to seconds: what a run leaves is all there, what it learns is nothing.
SHORT = {
    "max_steps": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "data_train_size": 32,
    "data_eval_size": 20,
    "headroom_samples": 2,
    "per_device_train_batch_size": 16,
}


@pytest.fixture(scope="session")
def short() -> Callable[..., list[str]]:
    """Makes the flags of a short run of grpo_generator; ``short(max_steps=5)`` changes one, None leaves it out."""

    def flags(**changes: Any) -> list[str]:
        chosen = {name: value for name, value in {**SHORT, **changes}.items() if value is not None}
        return [word for name, value in chosen.items() for word in (f"--{name}", *str(value).split())]

    return flags


@pytest.fixture(scope="session")
def run_recipe() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a recipe in a process of its own: ``run_recipe("grpo_generator", *flags, cwd=..., env={...})``."""

    def run(
        recipe: str | Path, *flags: object, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        path = Path(__file__).parents[1] / "recipes" / f"{recipe}.py" if isinstance(recipe, str) else recipe
        return subprocess.run(
            [sys.executable, str(path), *map(str, flags)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, **(env or {})},
            **options,
        )

    return run


@pytest.fixture(scope="session")
def finished_run(
    run_recipe: Callable[..., subprocess.CompletedProcess[str]],
    short: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a short, finished run of recipes/grpo_generator.py; tests that write to it take a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = run_recipe("grpo_generator", *short(), "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


# ------------------------------------------------------------------------------------------------------------------
# In CI (RAG_RL_CI=1) everything is installed, so a test that skips for want of a package has not been run: a failure.


def _fail_if_package_missing(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("RAG_RL_CI") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if MISSING_PACKAGE.search(reason):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skipped in CI for a missing package ({reason})"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    _fail_if_package_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    _fail_if_package_missing(report)
    return report
