"""recipes/train_reranker.py, through its real command line."""

from __future__ import annotations

import pytest

from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import difference, history_of, metrics_of, rows_of, steps_of, write_lines

RECIPE = "train_reranker"
SHORT = {"headroom_samples": None, "per_device_train_batch_size": 4, "reranker_candidates": 8}
ORDER = {"recall@3", "success@3", "mrr@10", "ndcg@10", "recall@all", "pairwise_accuracy"}


def pair_rows(count: int, first: int = 0) -> list[dict]:
    """Rows of a file; every second one shares its chunk with the next."""
    return [
        {
            "query_text": f"Where does number {i} live?",
            "positives": [{"doc_id": "p", "text": f"Number {i} lives in house {i}."}],
            "negatives": [{"doc_id": f"n{j}", "text": f"Number {i} once met {j}."} for j in range(3)],
            "source_chunk": f"c{i // 2}",
            "meta": {"domain": "houses"},
        }
        for i in range(first, first + count)
    ]


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=20)
    assert set(found["before"]) == set(found["ci95"]) == ORDER
    assert set(found["after"]) == ORDER | {"mean_margin"}
    assert all(0.0 <= value <= 1.0 for value in found["before"].values())
    # Both order the same candidates, and no order finds more of them.
    assert found["before"]["recall@all"] == found["after"]["recall@all"]
    for name, (low, high) in found["ci95"].items():
        assert low <= found["after"][name] - found["before"][name] <= high


@pytest.mark.smoke
def test_before_is_the_retrievers_order(trained_run):
    from rag_rl.data import load_questions

    gold = {q.question: q.gold_doc_ids for q in load_questions(str(FOLDER / "data" / "heldout_1hop.jsonl"))}
    for row in rows_of(trained_run, "before"):
        assert tuple(row["gold_doc_ids"]) == gold[row["question"]]
        scores = [passage["score"] for passage in row["passages"]]
        assert scores == sorted(scores, reverse=True)
        assert all(-1.0 <= score <= 1.0 for score in scores), "cosines of the retriever"
    for row in rows_of(trained_run, "after"):
        scores = [passage["score"] for passage in row["passages"]]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    more = {"modules.json", "model.safetensors", "config.json", "tokenizer.json"}
    check_run_folder(trained_run, more, portable=("config.json", "modules.json"))
    assert steps_of(trained_run) == [1, 2, 3]


@pytest.mark.smoke
def test_the_trained_model_loads_by_itself_with_the_scores_that_were_measured(trained_run):
    import torch
    from sentence_transformers import CrossEncoder

    plain = CrossEncoder(str(trained_run), device="cpu")
    for row in rows_of(trained_run, "after")[:3]:
        pairs = [(row["question"], passage["text"]) for passage in row["passages"]]
        scores = plain.predict(pairs, activation_fn=torch.nn.Identity()).tolist()
        assert scores == pytest.approx([passage["score"] for passage in row["passages"]], abs=1e-4)


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run)


@pytest.mark.smoke
@pytest.mark.parametrize("config", ["tiny", "tiny_qlora"])
def test_the_same_seed_gives_the_same_metrics(run_here, brief, tmp_path, config, trained_run):
    flags = ["--config", config, *brief(max_steps=2)]
    for name in ("one", "two"):
        assert run_here(RECIPE, *flags, "--output_dir", tmp_path / name) == 0
    assert metrics_of(tmp_path / "one")["after"] == metrics_of(tmp_path / "two")["after"]
    assert not list((tmp_path / "one").glob("adapter_*")), "tiny_qlora saves merged weights"


@pytest.mark.smoke
def test_rows_from_files_need_neither_index_nor_faiss(run_recipe, brief, tmp_path):
    train = write_lines(tmp_path / "train.jsonl", pair_rows(12))
    valid = write_lines(tmp_path / "valid.jsonl", pair_rows(6, first=100))
    flags = [*brief(max_steps=2, loss_type="listnet"), "--train_file", train, "--valid_file", valid]
    # A module of that name that cannot be imported stands before the real one.
    (tmp_path / "faiss.py").write_text("raise ImportError('no faiss here')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    done = run_recipe(RECIPE, *flags, "--output_dir", tmp_path / "run", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = metrics_of(tmp_path / "run")
    assert found["n_eval"] == 6
    # Nobody knows a retriever's order here: before is the untrained model.
    assert set(found["before"]) == ORDER | {"mean_margin"}
    assert {row["question"] for row in rows_of(tmp_path / "run", "before")} == {
        f"Where does number {i} live?" for i in range(100, 106)
    }


@pytest.mark.smoke
def test_held_out_rows_are_split_off_with_their_chunks(run_here, brief, tmp_path):
    train = write_lines(tmp_path / "train.jsonl", pair_rows(20))
    flags = [*brief(max_steps=1), "--train_file", train, "--valid_size", 4]
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    held_out = {int(row["question"].split()[3]) for row in rows_of(tmp_path / "run", "after")}
    assert len(held_out) == 4
    assert all(number ^ 1 in held_out for number in held_out), "the two rows of a chunk go together"


@pytest.mark.smoke
def test_a_generator_reads_what_a_finished_run_ranks_first(trained_run, finished_run):
    """What ``rag-rl ask RUN --retriever_reranker RERANKER`` does."""
    import torch
    from sentence_transformers import CrossEncoder

    from rag_rl.ask import open_run

    rag = open_run(finished_run, retriever_reranker=str(trained_run), retriever_candidates=8)
    question = "Where does Gilpabert live?"
    hits = rag.ask(question).hits
    scores = CrossEncoder(str(trained_run), device="cpu").predict(
        [(question, hit.passage.contents) for hit in hits], activation_fn=torch.nn.Identity()
    )
    assert [hit.score for hit in hits] == pytest.approx(scores.tolist(), abs=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


# ---- several processes


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", "zero2"])
def test_two_processes_do_what_one_does(config, alone_and_both):
    alone, both, _ = alone_and_both(16, config, max_steps=5, data_eval_size=21, data_train_size=120)
    assert metrics_of(both)["n_eval"] == 21
    assert metrics_of(both)["before"] == metrics_of(alone)["before"]
    assert metrics_of(both)["after"] == pytest.approx(metrics_of(alone)["after"], abs=1e-4)
    moved, apart = difference(FOLDER / "encoder", alone, prefix="model."), difference(alone, both)
    assert moved > 1e-3
    assert apart < 1e-3 * moved
    # The same queries in the same steps: the loss of a step is the mean over both processes.
    for ours, theirs in zip(history_of(both), history_of(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


# ---- resume


@pytest.mark.slow
def test_killed_and_resumed(run_recipe, kill_and_resume, brief, tmp_path):
    flags = brief(max_steps=60, save_steps=5, data_train_size=40)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_recipe(RECIPE, *flags, "--output_dir", whole, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kill_and_resume(RECIPE, *flags, folder=killed, cwd=tmp_path) < 60
    assert steps_of(killed) == list(range(1, 61))
    assert metrics_of(killed)["before"] == metrics_of(whole)["before"]
    assert metrics_of(killed)["after"] == pytest.approx(metrics_of(whole)["after"], abs=1e-4)


# ---- bad input


def test_bad_rows_are_named(bad, tmp_path):
    rows = pair_rows(8)
    rows[2]["positives"] = []
    rows[4]["query_text"] = " "
    line = bad("--train_file", write_lines(tmp_path / "train.jsonl", rows))
    assert "train.jsonl: 2 bad rows: line 3: field 'positives' is empty" in line
    assert "line 5: field 'query_text' is empty" in line


def test_a_leak_is_named(bad, tmp_path):
    train = write_lines(tmp_path / "train.jsonl", pair_rows(8))
    valid = write_lines(tmp_path / "valid.jsonl", pair_rows(4, first=7))
    line = bad("--train_file", train, "--valid_file", valid)
    assert "valid.jsonl: 2 of its queries and source chunks are also in" in line
    assert "query 'Where does number 7 live?'; source_chunk 'c3'" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reranker_model": "no/such-model"}, "the cross-encoder no/such-model cannot be loaded: "),
        ({"retriever_name": "none"}, "mining needs a retriever"),
        ({"valid_file": "x.jsonl"}, "valid_file is set, but train_file is not"),
        ({"valid_size": 0}, "valid_size must be above 0"),
        ({"train_file": "no-such.jsonl"}, "no-such.jsonl"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"loss_type": "hinge"}, "loss_type"),
        ({"reranker_train": "half"}, "reranker_train"),
        ({"reranker_candidates": 0}, "reranker_candidates must be at least 1, got 0"),
        ({"reranker_false_negative_margin": 2}, "reranker_false_negative_margin must lie in [0, 1], got 2"),
        ({"reranker_train": "lora", "reranker_lora_r": 0}, "reranker_lora_r must be at least 1, got 0"),
        ({"per_device_train_batch_size": 64}, "a batch takes 64 queries, there are 32 to train on"),
    ],
)
def test_settings_that_mean_nothing(bad, changes, expected):
    assert expected in bad(**changes)
