from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rag_rl.config.assemblies import ARGUMENTS
from tests.recipes.run_folders import metrics_of, rows_of, times_of

RECIPE = "evaluate_rag"
SHORT = ["--data_eval_size", "24"]


@pytest.fixture(scope="module")
def evaluated(run_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    done = run_recipe(RECIPE, *SHORT, "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 questions." in done.stdout
    return folder


def test_arguments_are_those_that_a_file_may_set(load_recipe):
    assert load_recipe(RECIPE).ARGUMENTS == ARGUMENTS


def test_the_packaged_reader_is_scored(evaluated):
    found = metrics_of(evaluated)
    assert (found["n_eval"], found["config"]) == (24, "tiny")
    assert set(found["metrics"]) == {
        *("em", "f1", "contains_em", "format", "recall@3", "success@3", "all_gold@3", "mrr@10", "ndcg@10"),
        *("searches", "tokens", "prompt_tokens", "seconds"),
    }
    assert 0.2 < found["metrics"]["em"] < 0.9, "it reads well and has bad habits"
    assert found["metrics"]["recall@3"] > 0.7
    assert found["metrics"]["searches"] == 1.0
    assert found["over_baselines"]["no_retrieval"]["em"]["difference"] > 0.1
    one = rows_of(evaluated, "rows")[0]
    assert len(one["passages"]) == 3, "shown, though ten are searched for"
    assert one["scores"]["seconds"] > 0


def test_the_same_questions_and_answers_as_before_a_training(evaluated, finished_run):
    before = {row["qid"]: row for row in rows_of(finished_run, "before")}
    both = [(row, before[row["qid"]]) for row in rows_of(evaluated, "rows") if row["qid"] in before]
    assert len(both) >= 10
    for ours, theirs in both:
        assert (ours["reply"], ours["passages"]) == (theirs["reply"], theirs["passages"])
        assert ours["scores"]["em"] == theirs["scores"]["em"]


def test_a_trained_generator_by_its_folder(run_here, finished_run, tmp_path):
    folder = tmp_path / "run"
    flags = ["--generator_model", finished_run, "--evaluation_depth", 1, "--evaluation_baselines", "[]"]
    assert run_here(RECIPE, "--data_eval_size", 20, "--output_dir", folder, *flags) == 0
    after = {row["qid"]: row for row in rows_of(finished_run, "after")}
    assert {row["qid"]: row["reply"] for row in rows_of(folder, "rows")} == {
        qid: row["reply"] for qid, row in after.items()
    }
    theirs = metrics_of(finished_run)["after"]
    assert {name: metrics_of(folder)["metrics"][name] for name in theirs} == pytest.approx(theirs)


def test_a_search_without_anybody_who_answers(run_here, tmp_path):
    folder = tmp_path / "run"
    flags = ["--generator_model", "null", "--evaluation_baselines", "bm25"]
    assert run_here(RECIPE, *SHORT, "--output_dir", folder, *flags) == 0
    found = metrics_of(folder)
    assert set(found["metrics"]) == {
        "recall@3", "success@3", "all_gold@3", "mrr@10", "ndcg@10", "searches", "seconds"
    }  # fmt: skip
    assert found["baselines"]["bm25"]["recall@3"] > 0.9, "every name of the tiny world stands in its passage"


def test_chains_with_their_baselines(run_here, tmp_path):
    folder = tmp_path / "run"
    flags = [
        *("--generator_model", "null", "--reasoner_model", "${tiny}/reader", "--reasoner_max_step_tokens", 48),
        *("--data_eval", "${tiny}/data/heldout_2hop.jsonl", "--data_eval_size", 8),
        *("--evaluation_baselines", "one_shot", "no_retrieval", "--evaluation_one_shot_prompt", "tiny_answer"),
    ]
    assert run_here(RECIPE, "--output_dir", folder, *flags) == 0
    found = metrics_of(folder)
    assert {"steps", "searches", "passages", "tokens", "all_gold@3"} <= found["metrics"].keys()
    assert set(found["baselines"]) == {"one_shot", "no_retrieval"}
    assert (found["baselines"]["one_shot"]["searches"], found["baselines"]["no_retrieval"]["searches"]) == (1.0, 0.0)
    assert all("steps" in row for row in rows_of(folder, "rows"))
    assert '<ol class="chain">' in (folder / "report.html").read_text()


def test_a_finished_evaluation_says_so(run_here, evaluated, capsys):
    before = times_of(evaluated)
    assert run_here(RECIPE, *SHORT, "--output_dir", evaluated) == 0
    assert f"{evaluated} is already finished: see" in capsys.readouterr().out
    assert times_of(evaluated) == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--retriver_top_k", 3], "unknown flag --retriver_top_k; the closest valid one is --retriever_top_k"),
        (["--retriever_name", "elastic"], "retriever_name must be"),
        (["--generator_model", "no/such/model"], "cannot load the model 'no/such/model'"),
        (["--evaluation_baselines", "one_shot"], "evaluation_baselines: one_shot is for a reasoner"),
        (["--data_eval", "none.jsonl"], "none.jsonl"),
        (["--retriever_run", "no/such/run"], "no/such/run holds no run"),
        (["--reasoner_model", "x"], "generator_model and reasoner_model exclude each other"),
    ],
)
def test_what_cannot_be_evaluated(refused, tmp_path, flags, expected):
    assert expected in refused(RECIPE, *SHORT, "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_questions_about_another_corpus(refused, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"qid": "1", "question": "Who?", "answers": ["x"], "gold_doc_ids": ["elsewhere"]}\n')
    line = refused(RECIPE, "--data_eval", path, "--output_dir", tmp_path / "run")
    assert "1 of 1 questions have gold documents that the corpus does not hold (1: elsewhere)" in line


def test_a_half_written_run_as_a_part(refused, finished_run, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(finished_run, half, ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
    line = refused(RECIPE, *SHORT, "--generator_model", half, "--output_dir", tmp_path / "run")
    assert "cannot load the model" in line
    (half / "metrics.json").write_text('{"status": ')
    line = refused(RECIPE, *SHORT, "--generator_model", half, "--output_dir", tmp_path / "run")
    assert "half is damaged: metrics.json or resolved_config.yaml cannot be read" in line


@pytest.mark.slow
def test_killed_and_gone_on_with(kill_when, run_recipe, tmp_path):
    folder = tmp_path / "run"
    flags = ["--data_eval_size", "400", "--evaluation_batch_size", "8", "--output_dir", folder]
    part = folder / ".rows.0.part"
    kill_when(lambda: part.is_file() and part.stat().st_size > 20_000, RECIPE, *flags, cwd=tmp_path)
    known = part.read_bytes()
    assert 0 < known.count(b"\n") < 400
    done = run_recipe(RECIPE, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 400 questions are answered already" in done.stderr
    assert metrics_of(folder)["n_eval"] == 400
    whole = (folder / "rows.jsonl").read_bytes()
    assert all(line in whole for line in known.split(b"\n")[:-1]), "what was answered is not asked again"


@pytest.mark.slow
def test_two_processes_share_the_work(launch_recipe, tmp_path, evaluated):
    folder = tmp_path / "run"
    done = launch_recipe(RECIPE, *SHORT, "--output_dir", folder, cwd=tmp_path)
    assert done.stdout.count("24 questions.") == 1
    assert metrics_of(folder)["num_processes"] == 2
    same = [{**row, "scores": {**row["scores"], "seconds": 0}} for row in rows_of(folder, "rows")]
    assert same == [{**row, "scores": {**row["scores"], "seconds": 0}} for row in rows_of(evaluated, "rows")]


@pytest.mark.smoke
def test_help(run_recipe):
    done = run_recipe(RECIPE, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for flag in (
        "--retriever_run",
        "--generator_model",
        "--reasoner_model",
        "--augmenter_model",
        "--retriever_reranker",
    ):
        assert flag in done.stdout
    assert "(unset)" not in done.stdout, "the defaults are those that apply"
