"""recipes/distill_retriever.py, through its real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import SGD, difference, metrics_of, names_in, rows_of, steps_of, write_lines

RECIPE = "distill_retriever"
# It writes its own queries.
SHORT = {
    "headroom_samples": None, "per_device_train_batch_size": 4, "group_size": 4, "synthesis_passages": 40,
    "augmenter_max_new_tokens": 24,
}  # fmt: skip
FOUND = {"recall@10", "success@10", "mrr@10", "ndcg@10"}


@pytest.fixture(scope="module")
def written(trained_run) -> Path:
    """Queries that need not be written again."""
    return trained_run / "synthetic"


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=20)
    assert set(found["before"]) == set(found["after"]) == set(found["ci95"]) == FOUND
    for name, (low, high) in found["ci95"].items():
        assert low <= found["after"][name] - found["before"][name] <= high


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    more = {
        "modules.json", "model.safetensors", "config.json", "tokenizer.json", "retriever", "synthetic", "prompts",
    }  # fmt: skip
    check_run_folder(trained_run, more, portable=("config.json", "modules.json"))
    assert names_in(trained_run / "prompts") == {"tiny_passage.txt", "tiny_question.txt"}
    assert steps_of(trained_run) == [1, 2, 3]


@pytest.mark.smoke
def test_published_files(trained_run):
    from rag_rl.data.reinforced_ir import read_augmented, read_examples, read_queries

    folder = trained_run / "retriever"
    before, after = read_examples(folder / "mined.jsonl"), read_examples(folder / "train.jsonl")
    assert len(before) == len(after) == len(read_queries(folder / "queries.json"))
    assert 20 <= len(after) <= 32, "without those that are worded like held-out ones"
    assert not any(one.is_distilled for one in before)
    assert all(one.is_distilled for one in after)
    assert [one.query for one in before] == [one.query for one in after]
    assert all({*b.pos, *b.neg} == {*a.pos, *a.neg} for b, a in zip(before, after, strict=True))
    assert {one.answer for one in read_augmented(folder / "answers.json")} == {one.answer for one in after} - {""}
    held_out = {row["question"] for row in rows_of(trained_run, "after")}
    assert not held_out & {one.query for one in after}


@pytest.mark.smoke
def test_the_trained_model_loads_by_itself_with_the_scores_that_were_measured(trained_run):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(trained_run), device="cpu")
    start = SentenceTransformer(str(FOLDER / "encoder_young"), device="cpu")
    for row in rows_of(trained_run, "after")[:3]:
        query = plain.encode_query(row["question"])
        scores = plain.encode_document([passage["text"] for passage in row["passages"]]) @ query
        assert scores.tolist() == pytest.approx([passage["score"] for passage in row["passages"]], abs=1e-4)
    text = ["Kelsabert is by craft a painter."]
    assert abs(plain.encode(text) - start.encode(text)).max() > 1e-4, "documents are trained, too"


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run)


@pytest.mark.smoke
def test_the_same_seed_gives_the_same_metrics(run_here, brief, tmp_path, written):
    flags = [*brief(max_steps=2), "--data_train", written]
    for name in ("one", "two"):
        assert run_here(RECIPE, *flags, "--output_dir", tmp_path / name) == 0
    assert metrics_of(tmp_path / "one")["after"] == metrics_of(tmp_path / "two")["after"]
    assert metrics_of(tmp_path / "one")["before"] != metrics_of(tmp_path / "one")["after"]


@pytest.mark.smoke
@pytest.mark.parametrize("teacher", ["none", "random"])
def test_other_teachers(run_here, brief, tmp_path, written, teacher):
    flags = brief(max_steps=2, distill_teacher=teacher, augmenter_name="none")
    assert run_here(RECIPE, *flags, "--data_train", written, "--output_dir", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "retriever" / "summary.json").read_text())
    assert summary["augmented"] == 0
    assert ("rankings" in summary) == (teacher == "random")


@pytest.mark.smoke
@pytest.mark.parametrize("file", ["mined.jsonl", "train.jsonl"])
def test_published_lists_in(run_here, brief, tmp_path, trained_run, file):
    flags = brief(max_steps=2, distill_teacher="none", data_train_size=None)
    lists = trained_run / "retriever" / file
    assert run_here(RECIPE, *flags, "--distill_files", lists, "--output_dir", tmp_path / "run") == 0
    found = metrics_of(tmp_path / "run")
    assert (found["status"], found["n_eval"]) == ("complete", 20)
    assert not (tmp_path / "run" / "synthetic").exists(), "no query is written"


# ---- slow: resume, launchers


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
def test_killed_at_every_stage_and_resumed(run_recipe, kill_when, brief, tmp_path, written):
    """The queries' own stage is killed in test_synthesize_queries; mined negatives are there whole or not at all."""
    from rag_rl.run import last_checkpoint

    flags = brief(max_steps=30, save_steps=5, distill_batch_size=1, data_train=written)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done = run_recipe(RECIPE, *flags, "--output_dir", whole, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    made = folder / "retriever"
    stages = {
        "augmentation": lambda: lines_of(made / "augmentations.0.jsonl") >= 5,
        "ranking": lambda: lines_of(made / "rankings.0.jsonl") >= 5,
        "training": lambda: last_checkpoint(folder) is not None,
    }
    kept: dict[str, bytes] = {}
    for stage, reached in stages.items():
        kill_when(reached, RECIPE, *flags, "--output_dir", folder, cwd=tmp_path)
        assert not (folder / "metrics.json").exists(), f"killed in {stage}"
        for path in (made / "augmentations.0.jsonl", made / "rankings.0.jsonl"):
            now = path.read_bytes() if path.is_file() else b""
            before = kept.get(path.name, b"")
            assert now.startswith(before[: before.rfind(b"\n") + 1]), f"{path.name} was begun anew after {stage}"
            kept[path.name] = now
    again = run_recipe(RECIPE, *flags, "--output_dir", folder, "--resume_from_checkpoint", "true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    for name in ("queries.json", "answers.json", "mined.jsonl", "train.jsonl"):
        assert (made / name).read_bytes() == (whole / "retriever" / name).read_bytes(), name
    assert steps_of(folder) == list(range(1, 31))
    assert metrics_of(folder)["before"] == metrics_of(whole)["before"]
    assert metrics_of(folder)["after"] == pytest.approx(metrics_of(whole)["after"], abs=1e-4)


@pytest.mark.slow
def test_an_unfinished_run_is_not_overwritten(run_here, refused, brief, tmp_path, written):
    flags = [*brief(max_steps=2, data_train=written), "--output_dir", tmp_path / "run"]
    assert run_here(RECIPE, *flags) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    assert "go on with --resume_from_checkpoint true" in refused(RECIPE, *flags)
    assert run_here(RECIPE, *flags, "--resume_from_checkpoint", "true") == 0
    assert steps_of(tmp_path / "run") == [1, 2]


@pytest.mark.slow
def test_accelerate_launch_without_arguments(check_plain_launch):
    check_plain_launch()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2proc", "zero2"])
def test_two_processes_do_what_one_does(config, run_recipe, launch_recipe, brief, tmp_path, written):
    """With plain gradient descent, which shows a gradient that is off by a factor."""
    same = {**SGD, "max_steps": 2, "data_eval_size": 21, "ranking_temperature": 0.1, "data_train": written}
    alone, both = tmp_path / "alone", tmp_path / "both"
    done = run_recipe(RECIPE, *brief(**same, per_device_train_batch_size=8), "--output_dir", alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    del same["data_train"]  # they write their queries themselves: the same ones
    flags = [*brief(**same, per_device_train_batch_size=4), "--output_dir", both]
    done = launch_recipe(RECIPE, *flags, config=config, cwd=tmp_path)
    assert (metrics_of(alone)["num_processes"], metrics_of(both)["num_processes"]) == (1, 2)
    for path in written.iterdir():
        if path.is_file() and path.suffix != ".yaml":
            assert (both / "synthetic" / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("answers.json", "mined.jsonl", "train.jsonl"):
        assert (both / "retriever" / name).read_bytes() == (alone / "retriever" / name).read_bytes(), name
    for when in ("before", "after"):
        assert metrics_of(both)[when] == pytest.approx(metrics_of(alone)[when], abs=1e-6)
        assert [row["qid"] for row in rows_of(both, when)] == [row["qid"] for row in rows_of(alone, when)]
    moved, apart = difference(FOLDER / "encoder_young", alone), difference(alone, both)
    assert moved > 1e-4
    assert apart < 1e-3 * moved
    assert done.stdout.count("held-out questions; trained") == 1


# ---- bad input


def test_an_empty_corpus(bad, tmp_path):
    assert "the corpus is empty" in bad("--data_corpus", write_lines(tmp_path / "corpus.jsonl", []))


def test_a_corpus_that_names_a_document_twice(bad, tmp_path):
    rows = [{"doc_id": "a", "text": "One lives in two."}] * 2
    line = bad("--data_corpus", write_lines(tmp_path / "corpus.jsonl", rows))
    assert "doc_id 'a' is already on line 1" in line


def test_a_query_without_a_passage(bad, tmp_path):
    (tmp_path / "queries.json").write_text(json.dumps([{"query": "Who?", "passage": " "}, {"query": "What?"}]))
    line = bad("--data_train", tmp_path / "queries.json")
    assert "queries.json: 2 bad rows: item 1: field 'passage' is empty; item 2: field 'passage' is missing" in line


def test_queries_of_another_corpus(bad, tmp_path):
    (tmp_path / "queries.json").write_text(json.dumps([{"query": "Who?", "passage": "Nobody of this corpus."}]))
    line = bad("--data_train", tmp_path / "queries.json")
    assert "the corpus holds no passage of any of its 1 queries" in line


def test_a_published_file_with_bad_rows(bad, tmp_path):
    rows = [{"query": "q", "answer": "", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0], "neg_scores": [0.5, 0.1]}]
    line = bad("--distill_files", write_lines(tmp_path / "train.jsonl", rows))
    assert "train.jsonl: 1 bad row: line 1: field 'neg_scores' has 2 numbers for 1 passages" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"retriever_name": "none"}, "retriever_name must be dense"),
        ({"distill_teacher": "reranker"}, "distill_teacher reranker needs one: set distill_reranker"),
        ({"augmenter_name": "none"}, "augmenter_name must not be none"),
        ({"distill_teacher": "oracle"}, "distill_teacher"),
        ({"distill_negatives": 0}, "distill_negatives must be at least 1, got 0"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"num_ranked": 9}, "num_ranked must be between 1 and group_size (4), got 9"),
        ({"per_device_train_batch_size": 64}, "a batch takes 64 queries of one corpus, the largest has "),
        ({"distill_files": "no-such.jsonl"}, "no-such.jsonl"),
        ({"distill_ranking": "listwise", "distill_prompt": "rank_passages"}, "rankings could be read"),
    ],
)
def test_settings_that_mean_nothing(bad, written, changes, expected):
    assert expected in bad(**{"data_train": written, **changes})
