"""recipes/grpo_reranker.py, through its real command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import difference, history_of, metrics_of, rows_of, steps_of, write_lines

RECIPE = "grpo_reranker"
# With a scripted reader.
SHORT = {
    "headroom_samples": None, "per_device_train_batch_size": 4, "num_generations": 4, "reranker_candidates": 8,
    "start_steps": 3, "reader_name": "scripted", "reader_reward": "f1",
}  # fmt: skip
ORDER = {"recall@3", "success@3", "mrr@10", "ndcg@10", "recall@all", "pairwise_accuracy"}
ANSWER = {"em", "f1", "contains_em"}


@pytest.fixture(scope="module")
def trained_run(run_recipe, brief, tmp_path_factory) -> Path:
    """The folder of a short, finished run whose reader is a model; plain python, no launcher."""
    folder = tmp_path_factory.mktemp(RECIPE) / "run"
    flags = ["--config", "tiny_reader", *brief(reader_name="decomposition")]
    done = run_recipe(RECIPE, *flags, "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=20, config="tiny_reader", more={"baselines", "over_baselines"})
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
def test_run_folder(check_run_folder, trained_run):
    more = {"baseline_retriever.jsonl", "modules.json", "model.safetensors", "config.json"}
    check_run_folder(trained_run, more)
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
    flags = ["--train_file", write_lines(tmp_path / "rows.jsonl", rows), "--valid_size", 4, "--retriever_top_k", 1]
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
    assert steps_of(killed) == list(range(1, 61))
    assert [entry["reward"] for entry in history_of(killed)] == pytest.approx(
        [entry["reward"] for entry in history_of(whole)], abs=1e-6
    )
    assert metrics_of(killed)["before"] == metrics_of(whole)["before"]
    assert metrics_of(killed)["after"] == pytest.approx(metrics_of(whole)["after"], abs=1e-4)


# ---- several processes


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2proc", "zero2"])
def test_two_processes_do_what_one_does(config, alone_and_both):
    # The rewards of both processes have one standard deviation.
    alone, both, _ = alone_and_both(8, config, max_steps=3, data_eval_size=21, start_steps=0, scale_rewards="batch")
    for when in ("before", "after"):
        assert metrics_of(both)[when] == pytest.approx(metrics_of(alone)[when], abs=1e-4)
    moved, apart = difference(FOLDER / "encoder", alone, prefix="model."), difference(alone, both)
    assert moved > 1e-4
    assert apart < 2e-3 * moved
    for ours, theirs in zip(history_of(both), history_of(alone), strict=True):
        for name in ("reward", "frac_reward_zero_std", "unscored", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


# ---- bad input


def test_rows_without_answers(bad, tmp_path):
    row = {"query_text": "Who?", "positives": [{"doc_id": "p", "text": "Tom."}], "negatives": []}
    path = write_lines(tmp_path / "rows.jsonl", ({**row, "query_text": f"Who is {i}?"} for i in range(8)))
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
