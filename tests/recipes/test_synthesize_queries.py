"""recipes/synthesize_queries.py through its command line: questions that other recipes take, and a kill in between."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from rag_rl.data import load_corpus, load_questions
from rag_rl.generation.synthesis import holds
from rag_rl.tiny import FOLDER

RECIPE = "synthesize_queries"


@pytest.mark.slow
def test_tiny(run_recipe, tmp_path):
    done = run_recipe(RECIPE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "synthetic" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["passages"], summary["wanted"]) == (400, 400)
    assert summary["kept"] >= 360
    assert summary["success@10"] >= 0.8
    texts = {passage.doc_id: passage.contents for passage in load_corpus(FOLDER / "data" / "corpus.jsonl")}
    questions = load_questions(folder / "questions.jsonl")
    assert len(questions) == summary["kept"]
    assert all(holds(texts[q.gold_doc_ids[0]], q.answers[0]) for q in questions)
    assert sorted(path.name for path in (folder / "prompts").iterdir()) == ["tiny_answer.txt", "tiny_question.txt"]


FLAGS = ["--synthesis_passages", "24", "--synthesis_batch_size", "4", "--retriever_encoder", ""]


def test_a_csv_becomes_questions_for_another_recipe(run_here, short, tmp_path, capsys):
    passages = list(load_corpus(FOLDER / "data" / "corpus.jsonl"))[:60]
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", "text"], *([p.doc_id, p.text] for p in passages)])
    flags = ["--data_corpus", tmp_path / "mine.csv", "--data_id_column", "name"]
    folder = tmp_path / "out"
    assert run_here(RECIPE, *flags, "--synthesis_passages", 60, "--output_dir", folder) == 0
    assert "success@10" in capsys.readouterr().out
    flags += ["--data_train", folder / "questions.jsonl", "--data_eval_size", 8, "--data_train_size", 24]
    short_flags = short(max_steps=1, headroom_samples=0, data_eval_size=None, data_train_size=None)
    config = tmp_path / "other.yaml"
    tiny = (Path(__file__).parents[2] / "recipes" / "configs" / "grpo_generator" / "tiny.yaml").read_text()
    config.write_text("".join(line for line in tiny.splitlines(True) if not line.startswith("data_eval:")))
    flags = ["--config", config, *flags, *short_flags, "--output_dir", tmp_path / "run"]
    assert run_here("grpo_generator", *flags) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n_eval"] == 8
    assert metrics["before"]["recall@3"] > 0.5


def test_a_plain_corpus_of_texts(run_here, tmp_path):
    texts = [passage.contents for passage in load_corpus(FOLDER / "data" / "corpus.jsonl")][:30]
    (tmp_path / "corpus.json").write_text(json.dumps(texts))
    flags = ["--data_corpus", tmp_path / "corpus.json", "--synthesis_writer", "sentences", "--with_answers", "false"]
    flags += ["--synthesis_check", "none", "--output_dir", tmp_path / "out"]
    assert run_here(RECIPE, *flags) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["success@10"] > 0.8


@pytest.mark.slow
def test_killed_and_started_again(run_here, kill_when, tmp_path):
    assert run_here(RECIPE, *FLAGS, "--output_dir", tmp_path / "whole") == 0
    folder = tmp_path / "out"
    rows = folder / "synthesis.jsonl"
    flags = [*FLAGS, "--output_dir", folder]
    kill_when(lambda: rows.is_file() and rows.stat().st_size > 0, RECIPE, *flags, cwd=tmp_path)
    kept = rows.read_bytes()
    assert 0 < kept.count(b"\n") < 24
    assert not (folder / "queries.json").exists()
    # As a kill in the middle of a line would leave it.
    rows.write_bytes(kept[:-10])
    assert run_here(RECIPE, *FLAGS, "--output_dir", folder) == 0
    for name in ("queries.json", "questions.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run_here, launch_recipe, tmp_path):
    flags = ["--synthesis_passages", "22", "--synthesis_batch_size", "4"]
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "alone") == 0
    done = launch_recipe(RECIPE, *flags, "--output_dir", tmp_path / "both", cwd=tmp_path)
    assert all(f"process {number} of 2" in done.stderr for number in (1, 2))
    assert done.stdout.count("success@10") == 1, "one process prints"
    alone, both = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("alone", "both")
    )
    assert both == alone


def test_bad_input_is_one_line(refused, tmp_path):
    (tmp_path / "corpus.json").write_text('["a", 3]')
    output = ["--output_dir", tmp_path / "out"]
    assert "item 2: must be text, got number 3" in refused(RECIPE, "--data_corpus", tmp_path / "corpus.json", *output)
    assert "there is no task 'nqq'" in refused(RECIPE, "--synthesis_task", "nqq", *output)
    assert "set with_answers true" in refused(RECIPE, "--with_answers", "false", *output)
    assert "unknown flag --learning_rate" in refused(RECIPE, "--learning_rate", 1, *output)
