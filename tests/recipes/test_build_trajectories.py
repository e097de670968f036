"""recipes/build_trajectories.py, through its real command line."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from rag_rl.reasoning import read_trajectories
from rag_rl.tiny import FOLDER
from tests.loopback import ChatServer
from tests.recipes.run_folders import read_lines, write_lines

RECIPE = "build_trajectories"
FILES = ["dpo.jsonl", "summary.json", "trajectories.jsonl", "trajectories_config.yaml"]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.smoke
def test_tiny(run_recipe, tmp_path):
    done = run_recipe(RECIPE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "trajectories" / "tiny"
    assert sorted(os.listdir(folder)) == FILES
    found = summary_of(folder)
    assert (found["questions"], found["chains"], found["unfinished"]) == (300, 300, 0)
    assert found["states"] == {"correct": found["solved"], "incorrect": 0, "fail": found["given_up"], "invalid": 0}
    assert found["solved"] > 270
    assert "chains in     trajectories/tiny/trajectories.jsonl\n" in done.stdout
    assert "chains: 100%" in done.stderr, "a bar shows how far it is"
    held_out = (FOLDER / "data" / "heldout_2hop.jsonl").read_text()
    chains = read_trajectories(folder / "trajectories.jsonl")
    assert not [chain.question.qid for chain in chains if f'"{chain.question.qid}"' in held_out]
    # In the words that the packaged model was taught.
    assert chains[0].steps[0].step.analysis.startswith("I need the ")


def test_started_again_it_asks_nothing_and_says_the_same(run_here, tmp_path, capsys):
    flags = ["--data_train_size", 40, "--output_dir", tmp_path]
    assert run_here(RECIPE, *flags) == 0
    told, before = capsys.readouterr().out, (tmp_path / "trajectories.jsonl").read_bytes()
    assert run_here(RECIPE, *flags, "--teacher_name", "oracle") == 0
    assert capsys.readouterr().out == told
    assert (tmp_path / "trajectories.jsonl").read_bytes() == before


def test_chains_over_one_hop(run_here, tmp_path):
    flags = ["--data_train", "${tiny}/data/demo_1hop.jsonl", "--data_eval", "${tiny}/data/heldout_1hop.jsonl"]
    assert run_here(RECIPE, *flags, "--data_train_size", 50, "--output_dir", tmp_path) == 0
    found = summary_of(tmp_path)
    assert found["solved"] > 40
    assert found["steps"]["2"] > 35


# ---- a served teacher


class Taught(ChatServer):
    """A teacher that answers in the grammar, and right at the attempts of its plan.

    Each question is asked about once more with every further attempt; ``asked`` notes question, attempt, number of
    earlier steps and temperature. It answers so many requests and refuses all others.
    """

    def __init__(self, right_at: dict[str, int], pause: float = 0.0) -> None:
        self.right_at, self.answers, self.pause = right_at, 10**9, pause
        self.asked: list[tuple[str, int, int, float]] = []
        self.attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__()

    def reply(self, body: dict) -> tuple[int, str]:
        text = self.step(body)
        time.sleep(self.pause)
        return (403, "gone") if text is None else (200, text)

    def step(self, body: dict) -> str | None:
        asked = body["messages"][-1]["content"].rpartition("The question: ")[2]
        question, steps = asked.splitlines()[0], asked.count("Step ")
        with self._lock:
            self.answers -= 1
            if self.answers < 0:
                return None
            self.attempts[question] += not steps
            attempt = self.attempts[question]
            self.asked.append((question, attempt, steps, body["temperature"]))
        if not steps:
            return f"The problem analysis: I look it up.\nThe retrieval query: {question}"
        answer = question.split()[-1] if attempt >= self.right_at[question] else f"wrong {attempt}"
        return f"Step {steps + 1}:\nThe problem analysis: So it is.\nThe final answer: {answer}"


PLAN = {f"What is the number {i}": i % 3 + 1 for i in range(6)} | {"What is the number 6": 99}


@pytest.fixture
def taught() -> Iterator[Taught]:
    with Taught(dict(PLAN)) as found:
        yield found


@pytest.fixture
def asks(tmp_path, taught):
    """Flags of a run with the served teacher: two questions at a time, three attempts."""
    rows = [{"qid": q.split()[-1], "question": q, "answers": [q.split()[-1]]} for q in PLAN]
    write_lines(tmp_path / "asked.jsonl", rows)
    held_out = write_lines(tmp_path / "held_out.jsonl", [{"qid": "h", "question": "Who?", "answers": ["Nobody"]}])
    teacher = {"teacher_name": "openai", "teacher_model": "m", "teacher_base_url": taught.url}
    settings = {"data_train": tmp_path / "asked.jsonl", "data_eval": held_out, **teacher}
    settings |= {"teacher_max_attempts": 3, "teacher_batch_size": 2, "teacher_max_retries": 0}
    settings["output_dir"] = tmp_path / "run"
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.server
def test_rejection_sampling(run_here, asks, taught, tmp_path):
    assert run_here(RECIPE, *asks) == 0
    chains = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    assert [(c.question.qid, c.attempt, c.state) for c in chains if c.question.qid in "0126"] == [
        ("0", 1, "correct"),
        ("1", 1, "incorrect"),
        ("1", 2, "correct"),
        *[("2", attempt, "incorrect") for attempt in (1, 2)],
        ("2", 3, "correct"),
        *[("6", attempt, "incorrect") for attempt in (1, 2, 3)],
    ]
    # The first attempt is greedy, the others are sampled; a solved question is not asked again.
    assert {(attempt, temperature) for _, attempt, _, temperature in taught.asked} == {(1, 0.0), (2, 0.9), (3, 0.9)}
    attempts = {question: min(at, 3) for question, at in PLAN.items()}
    assert taught.attempts == attempts
    assert len(taught.asked) == 2 * sum(attempts.values())
    found = summary_of(tmp_path / "run")
    assert (found["solved"], found["given_up"], found["chains"]) == (6, 1, 15)
    assert found["attempts"] == {"1": 2, "2": 2, "3": 2}
    # A failed chain and the right one about the same question part at the answer.
    pairs = read_lines(tmp_path / "run" / "dpo.jsonl")
    assert len(pairs) == found["dpo_pairs"] == 6
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    assert pairs[0]["chosen"][0]["content"].endswith("The final answer: 1")
    assert pairs[0]["rejected"][0]["content"].endswith("The final answer: wrong 1")
    assert "The retrieval documents: [1] " in pairs[0]["prompt"][0]["content"]
    assert sorted(os.listdir(tmp_path / "run" / "prompts")) == ["r3_first_step.txt", "r3_next_step.txt"]


@pytest.mark.server
def test_a_teacher_that_goes_away_is_named_and_the_run_goes_on(run_here, refused, asks, taught, tmp_path):
    taught.answers = 11
    line = refused(RECIPE, *asks, code=1)
    assert line.startswith(f"{RECIPE}.py: stopped: ")
    assert taught.url in line
    assert "HTTP 403" in line
    left = (tmp_path / "run" / "trajectories.jsonl").read_bytes()
    assert left, "what is finished is on the disk"
    taught.answers, taught.asked = 10**9, []
    # What is attempted anew is a new attempt for this server; the plan is met sooner.
    assert run_here(RECIPE, *asks) == 0
    assert (tmp_path / "run" / "trajectories.jsonl").read_bytes().startswith(left)
    assert not {question for question, *_ in taught.asked} & {"What is the number 0", "What is the number 1"}
    assert summary_of(tmp_path / "run")["solved"] == 6


@pytest.mark.server
@pytest.mark.slow
def test_killed_and_started_again(asks, taught, tmp_path, kill_when, run_recipe):
    taught.pause = 0.1
    path = tmp_path / "run" / "trajectories.jsonl"
    kill_when(lambda: path.is_file() and path.read_bytes().count(b"\n") >= 4, RECIPE, *asks, cwd=tmp_path)
    left = path.read_bytes()
    done = {chain.question.qid for chain in read_trajectories(path, cut_end=True) if chain.state == "correct"}
    assert not (tmp_path / "run" / "summary.json").exists()
    with path.open("ab") as file:
        file.write(b'{"qid": "5", "quest')
    taught.pause, taught.asked = 0.0, []
    finished = run_recipe(RECIPE, *asks, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert path.read_bytes().startswith(left)
    assert not {question.split()[-1] for question, *_ in taught.asked} & done
    found = summary_of(tmp_path / "run")
    assert (found["solved"], found["given_up"]) == (6, 1)
    assert len(read_trajectories(path)) == found["chains"]


# ---- bad input


def test_a_prompt_without_a_placeholder(refused, asks, tmp_path, taught):
    (tmp_path / "mine.txt").write_text("Write the next step about $question.")
    line = refused(RECIPE, *asks, "--teacher_next_prompt", tmp_path / "mine.txt")
    assert "mine.txt' has no $steps" in line
    assert not taught.asked
    assert not (tmp_path / "run").exists()


def test_a_question_without_answers(refused, tmp_path):
    rows = [{"qid": "1", "question": "Who?", "answers": ["Mira"]}, {"qid": "2", "question": "When?", "answers": []}]
    asked = write_lines(tmp_path / "asked.jsonl", rows)
    line = refused(RECIPE, "--data_train", asked, "--output_dir", tmp_path / "run")
    assert "asked.jsonl: 1 bad row: line 2: " in line
    assert "answers" in line


def test_questions_that_the_oracle_cannot_play(refused, tmp_path):
    rows = [{"qid": "1", "question": "Who?", "answers": ["Mira"]}]
    line = refused(
        RECIPE, "--data_train", write_lines(tmp_path / "asked.jsonl", rows), "--output_dir", tmp_path / "run"
    )
    assert "1 of 1 questions have no decomposition" in line
    assert "take a language model as teacher" in line


def test_a_folder_of_other_chains(refused, run_here, tmp_path):
    assert run_here(RECIPE, "--data_train_size", 10, "--output_dir", tmp_path) == 0
    line = refused(RECIPE, "--data_train_size", 10, "--output_dir", tmp_path, "--retriever_top_k", 2)
    assert "holds chains that came about otherwise (retriever_top_k: 3 -> 2): give another --output_dir" in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--teacher_name", "oracel"], "teacher_name must be oracle, local, openai"),
        (["--teacher_name", "openai"], "needs a model: set teacher_model"),
        (["--teacher_max_attempts", 0], "teacher_max_attempts must be at least 1, got 0"),
        (["--retriever_name", "none"], "retriever_name must not be none"),
        (["--learning_rate", 1], "unknown flag --learning_rate"),
    ],
)
def test_settings_that_mean_nothing(refused, tmp_path, flags, expected):
    assert expected in refused(RECIPE, *flags, "--output_dir", tmp_path / "run")


def test_twowiki(run_here, data_root, tmp_path, monkeypatch):
    """Real questions over a corpus of their own documents, by the tiny encoder: mechanics, not retrieval."""
    monkeypatch.setenv("RAG_RL_DATA", str(data_root))
    rows = read_lines(data_root / "twowiki" / "train.jsonl")[:8]
    wanted = {doc_id for row in rows for doc_id in row["gold_doc_ids"]}
    lines = (data_root / "twowiki" / "corpus.jsonl").read_text().splitlines()
    corpus = write_lines(tmp_path / "corpus.jsonl", [r for r in map(json.loads, lines) if r["doc_id"] in wanted])
    flags = [
        "--config",
        "tiny_twowiki",
        "--data_corpus",
        corpus,
        "--data_train",
        write_lines(tmp_path / "q.jsonl", rows),
    ]
    flags += ["--retriever_encoder", "${tiny}/encoder", "--retriever_top_k", 5, "--output_dir", tmp_path / "run"]
    assert run_here(RECIPE, *flags) == 0
    chains = read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    right = [chain for chain in chains if chain.state == "correct"]
    assert len(right) >= 6
    assert right[0].steps[0].step.query.startswith("What is the ")
