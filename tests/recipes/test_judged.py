"""recipes/grpo_generator.py with a judge: the oracle, endpoints that cost, fail and repeat secrets, a real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rag_rl.evaluation import judge_agreement
from rag_rl.run import last_checkpoint, launch
from rag_rl.tiny import FOLDER
from rag_rl.tiny.oracle import OracleJudge
from rag_rl.types import JudgeCase
from tests.loopback import ChatServer, free_port
from tests.recipes.run_folders import logged, metrics_of, read_lines, rows_of

ROOT = Path(__file__).parents[2]
RECIPE = "grpo_generator"
GOLD = {
    row["question"]: tuple(row["answers"])
    for name in ("demo_1hop", "heldout_1hop")
    for row in read_lines(FOLDER / "data" / f"{name}.jsonl")
}


def verdicts_in(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "verdicts.jsonl")


def oracle_on(rows: list[dict[str, Any]]) -> list[float | None]:
    cases = [JudgeCase(row["question"], row["answer"] or "", gold=GOLD[row["question"]]) for row in rows]
    return [verdict.score for verdict in asyncio.run(OracleJudge().judge(cases))]


@pytest.mark.smoke
def test_the_oracle_through_the_code_path_of_a_judge(run_recipe, short, tmp_path):
    flags = short(max_steps=2, headroom_samples=0)
    done = run_recipe(RECIPE, "--config", "tiny_judged", *flags, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    found = metrics_of(tmp_path / "run")
    assert (found["config"], found["status"]) == ("tiny_judged", "complete")
    rows = rows_of(tmp_path / "run", "before")
    assert [row["rewards"]["judged"] for row in rows] == oracle_on(rows)
    for when in ("before", "after"):
        assert found[when]["em"] <= found[when]["judge_accuracy"] <= found[when]["contains_em"]
        assert found[when]["judge_readable"] == 1.0
    assert set(logged(tmp_path / "run", "judge/judged/readable").values()) == {1.0}
    assert logged(tmp_path / "run", "rewards/none") == {1: 0.0, 2: 0.0}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "How often the judge oracle decides as others do" in report
    assert "exact match, before training" in report
    assert "exact match, after training" in report


# ---- an endpoint that does as it is told


class Endpoint(ChatServer):
    """Judges by the tiny_judge prompt: 1 where the given answer is the right one; ``answer`` may do something else."""

    def __init__(self) -> None:
        self.usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        self.asked: list[str] = []
        self.answer: Callable[[int], tuple[int, str] | None] = lambda number: None
        self._lock = threading.Lock()
        super().__init__()

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self.asked.append(prompt)
            number = len(self.asked)
        gold, given = (re.search(f"{name} answer: ?(.*)", prompt)[1] for name in ("Right", "Given"))
        return self.answer(number) or (200, json.dumps({"score": int(gold == given)}))


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Endpoint() as found:
        yield found


@pytest.fixture
def judged(short, tmp_path) -> Callable[..., list[str]]:
    """Makes the flags of a short run that an endpoint judges; verdicts are kept in a folder of the test's own."""

    def flags(address: str, folder: Path, *more: object, model: str = "m", **changes: Any) -> list[str]:
        judge = {
            "judge_name": "openai",
            "judge_model": model,
            "judge_base_url": f"http://{address}",
            "judge_rubric": "tiny_judge",
            "judge_cache": str(tmp_path / "cache"),
            "output_dir": str(folder),
        }
        words = [word for name, value in judge.items() for word in (f"--{name}", value)]
        return ["--config", "tiny_judged", *short(headroom_samples=0, **changes), *words, *map(str, more)]

    return flags


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if f"{RECIPE}.py: " in line]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.slow
def test_a_budget_stops_the_run_which_goes_on_where_it_stopped(run_here, judged, endpoint, tmp_path, capfd):
    settings = {"max_steps": 4, "save_steps": 50}
    whole = tmp_path / "whole"
    assert run_here(RECIPE, *judged(endpoint.address, whole, "--judge_cache", tmp_path / "other", **settings)) == 0
    needed = len(endpoint.asked)
    before = sum(row["answer"] is not None for row in rows_of(whole, "before"))
    endpoint.asked.clear()
    capfd.readouterr()

    folder, limit = tmp_path / "run", before + (needed - before) // 2
    flags = judged(endpoint.address, folder, **settings)
    assert run_here(RECIPE, *flags, "--judge_max_calls", limit) == 2
    line = one_line(capfd.readouterr().err)
    assert f"the judge's budget is used up ({limit} calls of judge_max_calls={limit})" in line
    assert line.endswith("raise the limit and go on with --resume_from_checkpoint true")
    assert len(endpoint.asked) == limit
    stopped = last_checkpoint(folder)
    assert stopped is not None
    assert Path(stopped).name in ("checkpoint-1", "checkpoint-2", "checkpoint-3")
    assert not (folder / "metrics.json").exists()

    # The same limit again: what is spent is spent, over all continuations.
    assert run_here(RECIPE, *flags, "--judge_max_calls", limit, "--resume_from_checkpoint", "true") == 2
    assert len(endpoint.asked) == limit
    assert last_checkpoint(folder) == stopped

    assert run_here(RECIPE, *flags, "--judge_max_calls", 1000, "--resume_from_checkpoint", "true") == 0
    assert max(Counter(endpoint.asked).values()) == 1, "nothing is paid for twice"
    assert len(endpoint.asked) == needed
    assert logged(folder, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-9)
    assert metrics_of(folder)["after"] == pytest.approx(metrics_of(whole)["after"])
    assert "step" not in capfd.readouterr().out.splitlines()


def test_a_dead_endpoint_before_anything_was_done(run_here, judged, endpoint, tmp_path, capfd):
    folder = tmp_path / "run"
    flags = judged("127.0.0.1:9/v1", folder, "--judge_max_retries", 0, max_steps=1, data_eval_size=30)
    assert run_here(RECIPE, *flags) == 1
    line = one_line(capfd.readouterr().err)
    assert "stopped: 20 calls of the judge in a row failed, the last: m at http://127.0.0.1:9/v1: no answer" in line
    assert not (folder / "before.json").exists()
    # With the flag it begins; the endpoint may be another one.
    again = judged(endpoint.address, folder, "--resume_from_checkpoint", "true", max_steps=1, data_eval_size=30)
    assert run_here(RECIPE, *again) == 0
    assert logged(folder, "loss").keys() == {1}


def test_no_key_is_left_anywhere(load_recipe, judged, endpoint, tmp_path, monkeypatch, capfd, caplog):
    """The endpoint repeats key and password in its verdicts and in its errors, and refuses the key in mid-run."""
    secrets = ["-".join(["marked", "fake", name, "0123456789"]) for name in ("key", "password", "token")]
    monkeypatch.setenv("OPENAI_API_KEY", secrets[0])
    echoed = " and ".join(secrets[:2])
    replies = {0: (200, json.dumps({"reason": echoed, "score": 1})), 1: (500, echoed), 2: (200, f"no JSON: {echoed}")}
    endpoint.answer = lambda number: (401, f"{echoed} are refused") if number > 35 else replies.get(number % 7)
    folder = tmp_path / "run"
    flags = judged(f"me:{secrets[1]}@{endpoint.address}", folder, "--hub_token", secrets[2])

    def run(*more: str) -> str:
        module = load_recipe(RECIPE)
        monkeypatch.setattr(sys, "argv", [module.__file__, *flags, *more])
        try:
            launch(module.main)
        except SystemExit as stop:
            return f"code {stop.code}\n{''.join(traceback.format_exception(stop))}"
        return ""

    with caplog.at_level("INFO"):
        said = run()
        assert said.startswith("code 1\n")
        assert "***" in said
        assert "check the key in the environment variable OPENAI_API_KEY" in said
        assert f"m at http://{endpoint.address}: HTTP 401" in said
        endpoint.answer = lambda number: replies.get(number % 7)
        assert run("--resume_from_checkpoint", "true") == ""
    assert metrics_of(folder)["status"] == "complete"
    output = capfd.readouterr()
    held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {folder / "report.html", folder / "verdicts.jsonl", tmp_path / "cache" / "verdicts.sqlite"} <= set(held)
    held |= {Path(name): text.encode() for name, text in (
        ("out", output.out), ("err", output.err), ("log", caplog.text), ("exception", said))}  # fmt: skip
    found = [(path.name, secret) for path, content in held.items() for secret in secrets if secret.encode() in content]
    # transformers keeps its own arguments, with the token for its hub, in every checkpoint.
    assert [place for place in found if place[0] != "training_args.bin"] == []
    assert b"*** and ***" in held[folder / "verdicts.jsonl"]


# ---- slow: several processes, a real server


FAILING = '''
import os
from accelerate import PartialState
from rag_rl.errors import BackendError
from rag_rl.judges import ScriptedJudge

class Failing:
    """Knows one verdict, and fails in the second process, when it is asked for the fourth time."""

    def __init__(self, args):
        self.asked = 0

    async def judge(self, cases):
        self.asked += 1
        if os.environ["FAILS"] == "yes" and PartialState().process_index == 1 and self.asked == 4:
            raise BackendError("the judge of one process is gone")
        return await ScriptedJudge(lambda case: float(len(case.answer) % 2)).judge(cases)
'''


@pytest.mark.slow
def test_a_judge_that_fails_in_one_process_stops_all_of_them(launch_recipe, short, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    flags = [*short(max_steps=4, save_steps=50, per_device_train_batch_size=8, headroom_samples=0), "--judge_name"]
    flags += ["failing:Failing", "--config", "tiny_judged", "--output_dir", str(tmp_path / "run")]

    def run(fails: str, *more: str, code: int) -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": str(tmp_path), "FAILS": fails}
        return launch_recipe(RECIPE, *flags, *more, cwd=tmp_path, env=env, code=code)

    stopped = run("yes", code=1)
    said = "stopped: the judge of one process is gone; go on with --resume_from_checkpoint true"
    assert stopped.stderr.count(said) == 2, stopped.stderr[-3000:]
    # Asked once for the held-out answers and once a step.
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    assert len(list((tmp_path / "run" / "checkpoint-2").glob("rng_state_*.pth"))) == 2
    run("no", "--resume_from_checkpoint", "true", code=0)
    assert list(logged(tmp_path / "run", "loss")) == [1, 2, 3, 4]
    assert metrics_of(tmp_path / "run")["num_processes"] == 2


@pytest.fixture
def judge_model() -> str:
    """What the real server serves."""
    return str(FOLDER / "reader")


@contextmanager
def transformers_serve(model: str, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Serves a model by ``transformers serve``; yields the process."""
    program = shutil.which("transformers", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program is not None, "the transformers command is missing: pip install 'transformers[serving]'"
    (folder / "hub").mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    command = [program, "serve", model, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240.0
            while True:
                assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield server
        finally:
            server.kill()
            server.wait()


@pytest.mark.slow
@pytest.mark.server
def test_a_real_server(run_recipe, judged, judge_model, tmp_path):
    """Judges well; killed in mid-run, it is waited for and named; started again, the run goes on and ends well."""
    port = free_port()
    address = f"127.0.0.1:{port}/v1"

    def flags(folder: Path, *more: object, **changes: Any) -> list[str]:
        small = {"per_device_train_batch_size": 32, "data_eval_size": 40, "data_train_size": 64, **changes}
        retries = ("--judge_max_tokens", 64, "--judge_max_retries", 2)
        return judged(address, folder, *retries, *more, model=judge_model, **small)

    with transformers_serve(judge_model, port, tmp_path) as server:
        short_run, folder = tmp_path / "short", tmp_path / "run"
        done = run_recipe(RECIPE, *flags(short_run))
        assert done.returncode == 0, done.stderr[-3000:]
        rows = verdicts_in(short_run)
        found = judge_agreement([row["score"] for row in rows], oracle_on(rows))
        assert found["readable"] >= 0.9
        assert found["kappa"] >= 0.6, found
        assert metrics_of(short_run)["after"]["judge_readable"] >= 0.9

        log = tmp_path / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, ROOT / "recipes" / f"{RECIPE}.py", *flags(folder, max_steps=16, save_steps=3)],
                stdout=output,
                stderr=output,
                cwd=tmp_path,
            )
            deadline = time.monotonic() + 120
            while last_checkpoint(folder) is None:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            server.kill()
            assert process.wait(120) == 1
    said = log.read_text()
    line = one_line(said)
    assert (
        f"20 calls of the judge in a row failed, the last: {judge_model} at http://{address}: no answer after 3"
        in line
    )
    assert line.endswith("go on with --resume_from_checkpoint true")
    assert "repeat 2 of 2 in " in said
    stopped = int(Path(last_checkpoint(folder) or "").name.split("-")[1])
    assert 3 <= stopped < 16

    with transformers_serve(judge_model, port, tmp_path):
        done = run_recipe(RECIPE, *flags(folder, max_steps=16, save_steps=3), "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from {folder / f'checkpoint-{stopped}'}" in done.stderr
    assert list(logged(folder, "loss")) == list(range(1, 17))
    assert metrics_of(folder)["status"] == "complete"
