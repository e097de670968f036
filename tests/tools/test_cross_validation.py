"""The cross-validation holds every question out once and pools what came out; two folds of the tiny world."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rag_rl.errors import DataError
from rag_rl.tiny import FOLDER
from tests.scripts import load

ROOT = Path(__file__).parents[2]
FLAGS = {
    "config": "tiny_scripted", "folds": 2, "seed": 3, "data_train": None, "data_eval": "null", "max_steps": 2,
    "reader_name": "none", "reader_reward": "ndcg", "per_device_train_batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    return load(ROOT / "tools" / "cross_validation.py")


def row(qid: str, value: float, *gold: str) -> dict:
    return {"qid": qid, "scores": {"ndcg@10": value}, "gold_doc_ids": list(gold)}


def test_new_documents_are_gold_in_no_other_fold(tool):
    folds = [[row("a", 0, "1"), row("b", 0, "2", "3")], [row("c", 0, "3", "4"), row("d", 0, "5")], [row("e", 0, "5")]]
    assert tool.new_documents(folds) == {"a"}
    # Questions of one fold may share a document: they are held out together.
    assert tool.new_documents([[row("a", 0, "1"), row("b", 0, "1")], [row("c", 0, "2")]]) == {"a", "b", "c"}


def test_table_pairs_questions(tool):
    before, after = [row("a", 0.0), row("b", 0.5)], [row("a", 0.5), row("b", 1.0)]
    line = "| GRPO | ndcg@10 | 0.250 | 0.750 | +0.500 [+0.500, +0.500] | 2 | 7 |"
    assert tool.table(before, after, "GRPO", "7") == [line]
    with pytest.raises(DataError, match="not about the same questions"):
        tool.table(before, after[::-1], "GRPO", "7")


@pytest.mark.slow
def test_folds_and_baseline(tool, tmp_path, monkeypatch, capfd):
    questions = (FOLDER / "data" / "demo_1hop.jsonl").read_text().splitlines()[:60]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    flags = {**FLAGS, "data_train": tmp_path / "questions.jsonl", "out": tmp_path / "out", "baseline": "mnrl"}
    command = [
        "cross_validation.py",
        "grpo_retriever",
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]
    monkeypatch.setattr(sys, "argv", command)
    tool.main()
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    folds = [tmp_path / "out" / "tiny_scripted" / f"fold{number}" for number in range(2)]
    pooled = {}
    for name in ("before.jsonl", "after.jsonl", "mnrl/after.jsonl"):
        rows = [json.loads(line) for fold in folds for line in (fold / name).read_text().splitlines()]
        assert sorted(r["qid"] for r in rows) == sorted(json.loads(line)["qid"] for line in questions)
        pooled[name] = sum(r["scores"]["ndcg@10"] for r in rows) / len(rows)
    for side, name in (("GRPO", "after.jsonl"), ("MNRL", "mnrl/after.jsonl")):
        (line,) = [line for line in printed if line.startswith(f"| {side} | ndcg@10")]
        assert line.startswith(f"| {side} | ndcg@10 | {pooled['before.jsonl']:.3f} | {pooled[name]:.3f} | ")
        assert "| 60 |" in line
    # Two steps hardly move a ranking, but they move the scores behind it.
    first = {name: json.loads((folds[0] / name).read_text().splitlines()[0]) for name in pooled}
    assert len({rows["passages"][0]["score"] for rows in first.values()}) == 3
    # The baseline searches an index of its own, which its own encoder made.
    assert (folds[0] / "mnrl" / "index" / "manifest.json").is_file()
    # A finished baseline is not run again; that a finished fold is not, tests/recipes shows.
    times = {path: path.stat().st_mtime_ns for path in folds[0].rglob("*")}
    tool.run_baseline(folds[0], 3, bf16=False)
    assert {path: path.stat().st_mtime_ns for path in folds[0].rglob("*")} == times


@pytest.mark.slow
def test_folds_of_a_reranker(tool, tmp_path, monkeypatch, capfd):
    questions = (FOLDER / "data" / "demo_1hop.jsonl").read_text().splitlines()[:60]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    flags = {
        "config": "tiny", "folds": 3, "data_train": tmp_path / "questions.jsonl", "data_eval": "null", "max_steps": 1,
        "per_device_train_batch_size": 4, "reranker_candidates": 8, "out": tmp_path / "out",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["cross_validation.py", "train_reranker", "--only", "0", "2", *words])
    tool.main()
    printed = capfd.readouterr().out
    folds = [tmp_path / "out" / "train_reranker-tiny" / f"fold{number}" for number in (0, 2)]
    assert sorted((tmp_path / "out" / "train_reranker-tiny").iterdir()) == folds
    rows = [json.loads(line) for fold in folds for line in (fold / "after.jsonl").read_text().splitlines()]
    assert 30 <= len({r["qid"].split()[1] for r in rows}) == len(rows) < 60, "a question is held out in one fold only"
    (line,) = [line for line in printed.splitlines() if line.startswith("| cross-encoder | ndcg@10")]
    assert f"| {len(rows)} |" in line
    assert "documents of no training question" not in printed, "the fold that was left out was trained on"


def test_a_reranker_has_no_such_baseline(tool, monkeypatch, capsys):
    words = ["cross_validation.py", "train_reranker", "--config", "tiny", "--baseline", "mnrl"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        tool.main()
    assert "it goes with grpo_retriever" in capsys.readouterr().err
