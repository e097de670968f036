"""recipes/grpo_reranker.py, through its real command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER

RECIPE = "grpo_reranker"
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / f"{RECIPE}.py"
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
# DESIGN section 4, and what a reinforced reranker stands against beside its start.
KEYS = {
    "recipe", "config", "seed", "status", "before", "after", "n_eval", "num_processes", "ci95", "train_seconds",
    "eval_seconds", "peak_memory_bytes", "baselines", "over_baselines",
}  # fmt: skip
ORDER = {"recall@3", "success@3", "mrr@10", "ndcg@10", "recall@all", "pairwise_accuracy"}
ANSWER = {"em", "f1", "contains_em"}


@pytest.fixture(scope="module")
def brief(short) -> Callable[..., list[str]]:
    """Flags of a short run with a scripted reader; ``brief(reader_reward="ndcg")`` changes some."""
    changed = {
        "headroom_samples": None,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "reranker_candidates": 8,
        "start_steps": 3,
        "reader_name": "scripted",
        "reader_reward": "f1",
    }
    return lambda **changes: short(**{**changed, **changes})


@pytest.fixture(scope="module")
def trained_run(run_recipe, brief, tmp_path_factory) -> Path:
    """The folder of a short, finished run whose reader is a model; plain python, no launcher."""
    folder = tmp_path_factory.mktemp("reinforced") / "run"
    flags = ["--config", "tiny_reader", *brief(reader_name="decomposition")]
    done = run_recipe(RECIPE, *flags, "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def rows_of(folder: Path, when: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{when}.jsonl").read_text().splitlines()]


def history_of(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(trained_run):
    found = metrics_of(trained_run)
    assert set(found) == KEYS
    assert (found["recipe"], found["config"], found["seed"]) == (RECIPE, "tiny_reader", 42)
    assert (found["status"], found["n_eval"], found["num_processes"]) == ("complete", 20, 1)
    assert set(found["before"]) == set(found["after"]) == ORDER | ANSWER | {"mean_margin"}
    assert set(found["baselines"]["retriever"]) == ORDER | ANSWER
    everyone = (found["before"], found["after"], found["baselines"]["retriever"])
    assert len({one["recall@all"] for one in everyone}) == 1, "the same candidates"
    for name, (low, high) in found["ci95"].items():
        assert low <= found["after"][name] - found["before"][name] <= high


@pytest.mark.smoke
def test_the_reader_answers_from_what_is_ranked_first(trained_run):
    from rag_rl.data import load_questions

    answers = {q.question: q.answers for q in load_questions(str(FOLDER / "data" / "heldout_1hop.jsonl"))}
    for when in ("before", "after", "baseline_retriever"):
        for row in rows_of(trained_run, when):
            assert tuple(row["answers"]) == answers[row["question"]]
            assert len(row["passages"]) == 3
            assert row["reply"]
        assert any(row["scores"]["f1"] > 0 for row in rows_of(trained_run, when))


@pytest.mark.smoke
def test_run_folder(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert names >= {
        "README.md", "resolved_config.yaml", "trainer_state.json", "curves.png", "report.html", "metrics.json",
        "before.jsonl", "after.jsonl", "baseline_retriever.jsonl", "modules.json", "model.safetensors", "config.json",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".part", ".tmp", ".bin", ".pt", ".pkl"))]
    history = history_of(trained_run)
    assert [entry["step"] for entry in history] == [1, 2, 3], "the supervised steps are not the run's"
    for entry in history:
        assert 0.0 <= entry["reward"] <= 1.0
        assert entry["unscored"] == 0.0


@pytest.mark.smoke
@pytest.mark.parametrize("reward", ["f1", "ndcg"])
def test_the_same_seed_gives_the_same_metrics(run_here, brief, tmp_path, reward, trained_run):
    name = "scripted" if reward == "f1" else "none"
    flags = brief(max_steps=2, reader_name=name, reader_reward=reward)
    for folder in ("one", "two"):
        assert run_here(RECIPE, *flags, "--output_dir", tmp_path / folder) == 0
    assert metrics_of(tmp_path / "one")["after"] == metrics_of(tmp_path / "two")["after"]
    assert (metrics_of(tmp_path / "one")["after"].keys() >= ANSWER) == (reward == "f1")


@pytest.mark.smoke
def test_nothing_is_learnt_from_a_constant_reward(run_here, brief, tmp_path, trained_run):
    assert run_here(RECIPE, *brief(reader_reward="constant"), "--output_dir", tmp_path / "run") == 0
    found = metrics_of(tmp_path / "run")
    assert found["after"] == pytest.approx(found["before"], abs=1e-6)
    assert [entry["frac_reward_zero_std"] for entry in history_of(tmp_path / "run")] == [1.0, 1.0, 1.0]


@pytest.mark.smoke
def test_it_goes_on_from_a_supervised_run(run_here, brief, short, tmp_path, trained_run):
    shared = {"headroom_samples": None, "per_device_train_batch_size": 4, "reranker_candidates": 8}
    shared |= {"retriever_top_k": 3}
    taught = tmp_path / "taught"
    assert run_here("train_reranker", *short(**shared), "--output_dir", taught) == 0
    flags = brief(**shared, start_steps=0, reranker_model=taught)
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    start, end = metrics_of(tmp_path / "run")["before"], metrics_of(taught)["after"]
    assert {name: start[name] for name in end} == pytest.approx(end, abs=1e-5)


@pytest.mark.smoke
def test_rows_from_files(run_here, brief, tmp_path, trained_run):
    rows = [
        {
            "query_text": f"Where does number {i} live?",
            "positives": [{"doc_id": "p", "text": f"Number {i} lives in house {i}."}],
            "negatives": [{"doc_id": f"n{j}", "text": f"Number {i} once met {j}."} for j in range(3)],
            "meta": {"answers": [f"house {i}"]},
        }
        for i in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--train_file", path, "--valid_size", 4, "--retriever_top_k", 1]
    assert run_here(RECIPE, *brief(max_steps=2), *flags, "--output_dir", tmp_path / "run") == 0
    found = metrics_of(tmp_path / "run")
    assert found["n_eval"] == 4
    assert "baselines" not in found, "nobody knows a retriever's order"
    # The scripted reader tells the answer exactly where the right document is shown.
    assert found["after"]["em"] == found["after"]["success@1"]


# ---- resume


@pytest.mark.slow
def test_killed_and_resumed(run_recipe, kill_and_resume, brief, tmp_path):
    flags = brief(max_steps=60, save_steps=5, data_train_size=40)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_recipe(RECIPE, *flags, "--output_dir", whole, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    # What the supervised steps before them taught is in the checkpoint: they are not taken again.
    assert kill_and_resume(RECIPE, *flags, folder=killed, cwd=tmp_path) < 60
    assert [entry["step"] for entry in history_of(killed)] == list(range(1, 61))
    assert [entry["reward"] for entry in history_of(killed)] == pytest.approx(
        [entry["reward"] for entry in history_of(whole)], abs=1e-6
    )
    assert metrics_of(killed)["before"] == metrics_of(whole)["before"]
    assert metrics_of(killed)["after"] == pytest.approx(metrics_of(whole)["after"], abs=1e-4)


# ---- several processes


@pytest.mark.slow
def test_two_processes_do_what_one_does(run_recipe, launch_recipe, brief, tmp_path):
    """With plain gradient descent, which shows a gradient that is off by a factor."""
    from safetensors.torch import load_file

    same = {"max_steps": 3, "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "data_eval_size": 21}
    same |= {"learning_rate": 0.05, "max_grad_norm": 0.0, "start_steps": 0}
    alone, both = tmp_path / "alone", tmp_path / "both"
    done = run_recipe(RECIPE, *brief(**same, per_device_train_batch_size=8), "--output_dir", alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    launch_recipe(RECIPE, *brief(**same, per_device_train_batch_size=4), "--output_dir", both, cwd=tmp_path)
    assert (metrics_of(alone)["num_processes"], metrics_of(both)["num_processes"]) == (1, 2)
    for when in ("before", "after"):
        assert metrics_of(both)[when] == pytest.approx(metrics_of(alone)[when], abs=1e-4)
    one, two = load_file(alone / "model.safetensors"), load_file(both / "model.safetensors")
    start = load_file(FOLDER / "encoder" / "model.safetensors")
    body = {name: name.removeprefix("model.") for name in one if name.removeprefix("model.") in start}
    moved = max((one[name] - start[old]).abs().max().item() for name, old in body.items())
    apart = max((one[name] - two[name]).abs().max().item() for name in one)
    assert moved > 1e-4
    assert apart < 2e-3 * moved
    for ours, theirs in zip(history_of(both), history_of(alone), strict=True):
        for name in ("reward", "frac_reward_zero_std", "unscored", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


# ---- bad input


@pytest.fixture
def bad(refused, brief, tmp_path) -> Callable[..., str]:
    """Runs the recipe with flags that it must refuse; gives its one line."""

    def run(*flags: object, code: int = 2, **changes: object) -> str:
        output = tmp_path / "run"
        line = refused(RECIPE, *brief(**changes), "--output_dir", output, *flags, code=code)
        assert not (output / "metrics.json").exists()
        return line

    return run


def test_rows_without_answers(bad, tmp_path):
    row = {"query_text": "Who?", "positives": [{"doc_id": "p", "text": "Tom."}], "negatives": []}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "query_text": f"Who is {i}?"}) + "\n" for i in range(8)))
    line = bad("--train_file", path, "--valid_size", 2)
    assert "no row has accepted answers in its meta ('answers')" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reader_name": "react"}, "reader_name react words its own searches"),
        ({"reader_name": "none"}, "reader_name none answers nothing: set reader_reward to ndcg"),
        ({"reader_reward": "bleu"}, "reader_reward must be one of f1, ndcg"),
        ({"reranker_model": "no/such-model"}, "the cross-encoder no/such-model cannot be loaded: "),
        ({"retriever_top_k": 9}, "retriever_top_k is 9, above the 8 candidates of query"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"start_steps": -1}, "start_steps must be at least 0, got -1"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"per_device_train_batch_size": 64, "start_steps": 0}, "a batch takes 64 queries, there are 32 to train on"),
    ],
)
def test_settings_that_mean_nothing(bad, changes, expected):
    assert expected in bad(**changes)
