from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from rag_rl.errors import ConfigError, DataError, RunFolderError
from rag_rl.evaluation.comparison import (
    compare,
    comparison_summary,
    comparison_table,
    counted,
    flips,
    metric_names,
    open_sides,
    p_words,
)
from rag_rl.evaluation.scoring import confidence_intervals, mean_metrics, write_rows


def row(i, em, *, question=None, **scores):
    return {
        "qid": f"q{i}",
        "question": question or f"Which river is number {i}?",
        "answers": ["Mira"],
        "gold_doc_ids": ["d2"],
        "passages": [{"doc_id": "d2", "title": "Elmton", "text": "Elmton lies on the Mira.", "score": 0.8}],
        "reply": "It is there.",
        "answer": "Mira" if em else "Orl",
        "scores": {"em": em, "f1": em, **scores},
        "rewards": {},
    }


BEFORE = [row(i, float(i % 2), steps=2.0) for i in range(40)]
AFTER = [row(i, float(i % 4 > 0 and i != 3), steps=2.0 + i % 2) for i in range(40)]
RECALL = [row(i, float(i % 5 == 0), **{"recall@3": 1.0}) for i in range(40)]


def training(folder: Path, before=BEFORE, after=AFTER, **more) -> Path:
    """A finished run of a training, as ``Run.finish`` leaves it."""
    folder.mkdir()
    write_rows(folder / "before.jsonl", before)
    write_rows(folder / "after.jsonl", after)
    write_rows(folder / "baseline_one_shot.jsonl", RECALL)
    log = [{"step": s, "reward": s / 50, "loss": 1 / s} for s in range(1, 31)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    settings = {"recipe": "grpo_generator", "config": "tiny", "made_with": {"rag-rl": "0.0.9"}, "learning_rate": 1e-3}
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump({**settings, **more}))
    summary = {
        "status": "complete",
        "before": mean_metrics(before),
        "after": mean_metrics(after),
        "n_eval": len(after),
        "ci95": confidence_intervals(before, after),
        "baselines": {"one_shot": mean_metrics(RECALL)},
    }
    (folder / "metrics.json").write_text(json.dumps(summary))
    return folder


def evaluation(folder: Path, rows=RECALL, baselines=()) -> Path:
    """A finished evaluation, as ``EvaluationRun`` leaves it."""
    folder.mkdir()
    write_rows(folder / "rows.jsonl", rows)
    for name in baselines:
        write_rows(folder / f"baseline_{name}.jsonl", BEFORE)
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump({"recipe": "evaluate_rag", "config": "tiny"}))
    summary = {
        "status": "complete",
        "metrics": mean_metrics(rows),
        "n_eval": len(rows),
        "baselines": {name: mean_metrics(BEFORE) for name in baselines},
    }
    (folder / "metrics.json").write_text(json.dumps(summary))
    return folder


def test_sides_of_runs(tmp_path):
    run, scored = training(tmp_path / "run"), evaluation(tmp_path / "scored", baselines=["bm25"])
    assert [(s.name, s.what) for s in open_sides(str(run))] == [("run before", "before"), ("run after", "after")]
    assert [s.name for s in open_sides(str(run), baselines=True)] == ["run before", "run after", "run one_shot"]
    assert [(s.name, s.what) for s in open_sides(str(scored))] == [("scored", "assembly")]
    assert [s.name for s in open_sides(str(scored), baselines=True)] == ["scored assembly", "scored bm25"]
    (side,) = open_sides(f"mine={run}:after")
    assert (side.name, side.what, len(side.rows), len(side.log_history)) == ("mine", "after", 40, 30)
    assert [s.name for s in open_sides(f"mine={run}")] == ["mine before", "mine after"]
    (bm25,) = open_sides(f"{scored}:baseline_bm25")
    assert (bm25.name, bm25.what, bm25.log_history) == ("scored bm25", "baseline_bm25", [])
    with pytest.raises(RunFolderError, match="has no side 'baseline_x'; it has before, after, baseline_one_shot"):
        open_sides(f"{run}:baseline_x")


def test_folders_whose_names_hold_our_signs(tmp_path):
    run = training(tmp_path / "lr=1e-3:b")
    assert [s.name for s in open_sides(str(run))] == ["lr=1e-3:b before", "lr=1e-3:b after"]


def test_figures_are_those_of_the_run(tmp_path):
    run = training(tmp_path / "run")
    found = compare(open_sides(str(run)))
    summary = json.loads((run / "metrics.json").read_text())
    change = found.differences[0].metrics["em"]
    assert change["ci95"] == summary["ci95"]["em"]
    assert change["difference"] == pytest.approx(summary["after"]["em"] - summary["before"]["em"])
    assert (found.main, found.n_eval, counted(found)) == ("em", 40, "40 questions.")
    assert metric_names(found) == ["em", "f1", "steps"], "the main metric first, counts last"


def test_flips_are_the_questions_that_changed(tmp_path):
    found = compare(open_sides(str(training(tmp_path / "run"))))
    flipped = flips(found, found.differences[0])
    assert flipped == {"gained": [i for i in range(40) if i % 4 == 2], "lost": [3]}
    table = comparison_table(found)
    assert table.splitlines()[-2:] == [
        "40 questions.",
        "run after against run before: 10 questions became right by em, 1 wrong",
    ]
    assert "  run after                 0.725  0.575 to 0.850     +0.225  " in table
    assert "p" in table.splitlines()[0]


def test_each_against_the_one_before(tmp_path):
    sides = [
        *open_sides(f"start={training(tmp_path / 'a')}:before"),
        *open_sides(f"one={tmp_path / 'a'}:after"),
        *open_sides(f"two={evaluation(tmp_path / 'b')}"),
    ]
    first = compare(sides)
    assert [(found.reference, found.other) for found in first.differences] == [(0, 1), (0, 2)]
    previous = compare(sides, against="previous")
    assert [(found.reference, found.other) for found in previous.differences] == [(0, 1), (1, 2)]
    assert set(previous.differences[1].metrics) == {"em", "f1"}, "only what both have"
    assert metric_names(previous) == ["em", "f1", "recall@3", "steps"]
    told = comparison_summary(previous)
    assert [side["name"] for side in told["sides"]] == ["start", "one", "two"]
    assert (told["differences"][1]["reference"], told["differences"][1]["other"]) == ("one", "two")
    assert told["differences"][1]["gained"] + told["differences"][1]["lost"] > 0
    assert json.loads(json.dumps(told)) == told


def test_other_questions_are_an_error_unless_the_common_ones_are_asked_for(tmp_path):
    one = training(tmp_path / "one")
    other = evaluation(tmp_path / "other", [row(i, 1.0) for i in reversed(range(30, 50))])
    sides = [*open_sides(f"{one}:after"), *open_sides(str(other))]
    message = r"one after and other are about different questions \(40 and 20; all have 10 in common\): --common"
    with pytest.raises(DataError, match=message):
        compare(sides)
    found = compare(sides, common=True)
    assert (found.n_eval, found.left_out) == (10, [30, 10])
    assert [side.table.keys[0][0] for side in found.sides] == ["q30", "q30"]
    assert [side.rows[places[0]]["qid"] for side, places in zip(found.sides, found.places, strict=True)] == ["q30"] * 2
    assert found.sides[1].summary["metrics"]["em"] == 1.0
    assert counted(found) == "10 questions that all have in common; left out: 30 of one after, 10 of other."


def test_the_same_questions_in_another_order_are_the_same(tmp_path):
    sides = [
        *open_sides(str(evaluation(tmp_path / "a"))),
        *open_sides(str(evaluation(tmp_path / "b", RECALL[::-1]))),
    ]
    found = compare(sides)
    assert found.left_out == [0, 0]
    assert found.differences[0].metrics["em"]["ci95"] == [0.0, 0.0]


def test_ids_that_mean_other_questions(tmp_path):
    other = evaluation(tmp_path / "b", [row(i, 1.0, question=f"Who is {i}?") for i in range(40)])
    sides = [*open_sides(str(evaluation(tmp_path / "a"))), *open_sides(str(other))]
    for common in (False, True):
        with pytest.raises(DataError, match="a and b have no question in common"):
            compare(sides, common=common)


def test_main_metric(tmp_path):
    sides = open_sides(str(training(tmp_path / "a")))
    assert compare(sides, main="f1").main == "f1"
    with pytest.raises(ConfigError, match="--metric ndcg@10: not all sides have it; all have em, f1, steps"):
        compare(sides, main="ndcg@10")
    ranked = [{**one, "scores": {"steps": 1.0, "mrr@10": 0.5}} for one in RECALL]
    assert compare(open_sides(str(evaluation(tmp_path / "b", ranked)))).main == "mrr@10"
    counts = [{**one, "scores": {"steps": 1.0}} for one in RECALL]
    with pytest.raises(DataError, match="have no metric in common"):
        compare(open_sides(str(evaluation(tmp_path / "c", counts))))
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "after.jsonl").unlink(), r"is damaged: after\.jsonl is missing"),
        (lambda run: (run / "metrics.json").unlink(), "holds an unfinished run"),
        (lambda run: (run / "trainer_state.json").write_text("{"), "is damaged: trainer_state.json cannot be read"),
        (
            lambda run: (run / "after.jsonl").write_bytes((run / "after.jsonl").read_bytes()[:-50]),
            r"is damaged: after\.jsonl has 39 whole rows, metrics\.json says 40",
        ),
        (
            lambda run: (run / "after.jsonl").write_text('{"id": 1}\n' * 40),
            "line 1 is no row of an evaluation as this version writes them",
        ),
    ],
)
def test_runs_that_are_damaged(tmp_path, damage, message):
    run = training(tmp_path / "run")
    damage(run)
    with pytest.raises(RunFolderError, match=message):
        open_sides(str(run))


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(RunFolderError, match="none holds no run"):
        open_sides(str(tmp_path / "none"))


def test_questions_without_a_score_are_compared_by_none(tmp_path):
    rows = [row(i, None if i < 10 else 1.0) for i in range(40)]
    run = training(tmp_path / "run", after=rows)
    found = compare(open_sides(str(run)))
    assert found.differences[0].metrics["em"]["n"] == 30
    flipped = flips(found, found.differences[0])
    assert flipped == {"gained": [i for i in range(10, 40) if i % 2 == 0], "lost": []}


def test_p_in_words():
    assert [p_words(p) for p in (1.0, 0.05, 0.0009, None)] == ["1.000", "0.050", "<0.001", ""]


def test_a_finished_run_of_a_recipe(finished_run, tmp_path):
    copy = tmp_path / "trained"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
    found = compare(open_sides(str(copy)))
    told = json.loads((copy / "metrics.json").read_text())
    assert found.sides[1].summary["metrics"] == pytest.approx(told["after"])
    assert found.differences[0].metrics["em"]["ci95"] == told["ci95"]["em"]
