"""The tour: its commands are ones that the recipes take, its data leak nothing, and a stopped tour goes on."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from rag_rl import cli
from rag_rl.config import read_arguments
from rag_rl.data import load_corpus, load_questions
from rag_rl.evaluation.scoring import mean_metrics, write_rows
from rag_rl.tiny import FOLDER as TINY
from tests.scripts import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tour():
    return load(ROOT / "tools" / "tour.py")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the commands


def test_steps_in_order(tour):
    names = [step.name for step in tour.steps(42, 8421)]
    assert names[:8] == [
        "data", "index", "retriever", "reranker", "augmenter", "generator", "reasoner_sft", "reasoner",
    ]  # fmt: skip
    assert names[8:-1] == [f"score: {rung.name}" for rung in (*tour.rungs(), tour.UNTRAINED_REASONER)]
    assert names[-1] == "compare"
    assert len({step.done for step in tour.steps(42, 8421)}) == len(names), "each leaves a file of its own"


def test_each_assembly_has_one_trained_part_more(tour):
    rungs = tour.rungs()
    assert [rung.part for rung in rungs] == [
        None, "retriever", "reranker", "augmenter", "generator", "reasoner_sft", "reasoner",
    ]  # fmt: skip
    before: set[str] = set()
    for rung in rungs[1:-1]:
        trained = {word for word in rung.flags if word.startswith("runs/tour/")}
        in_place = {"runs/tour/generator"} if rung.part == "reasoner_sft" else set()
        assert trained == (before - in_place) | {f"runs/tour/{rung.part}"}
        before = trained
    # The last one is the config that users ask as well: everything of the one before it, and the trained reasoner.
    full = yaml.safe_load((ROOT / "recipes" / "configs" / "evaluate_rag" / "tour_full.yaml").read_text())
    flags = dict(zip(rungs[-2].flags[::2], rungs[-2].flags[1::2], strict=True))
    expected = {**{name.lstrip("-"): value for name, value in flags.items()}, "reasoner_model": "runs/tour/reasoner"}
    assert {name: value for name, value in full.items() if name in expected} == expected
    shared = yaml.safe_load((ROOT / "recipes" / "configs" / "evaluate_rag" / "tour.yaml").read_text())
    assert all(full[name] == shared[name] for name in ("data_corpus", "data_eval", "data_eval_size"))


def test_recipes_take_the_commands(tour, here):
    taken = 0
    for step in tour.steps(7, 8421):
        program, *words = step.command
        if program == "rag-rl":
            parsed = cli._parser().parse_args(words)
            assert len(parsed.runs) == len(tour.rungs())
            continue
        path = (here / words[0]).resolve()
        if path.parent.name != "recipes":
            assert (path, words[1:]) == (ROOT / "tools" / "tour.py", ["--write_data"])
            continue
        recipe = load(path)
        arguments = read_arguments(path, *recipe.ARGUMENTS, argv=words[1:])
        settings = {name: value for one in arguments for name, value in vars(one).items()}
        folder = "runs/tour/index" if step.name == "index" else step.done.parent.as_posix()
        assert settings["output_dir"] == folder, "what the step is known to be finished by"
        assert step.served == (settings["retriever_name"] == "http")
        if step.seed is not None:
            assert settings["seed"] == 7
        taken += 1
    assert taken == 15


def test_parts_build_on_those_before_them():
    wanted = {
        "train_reranker": {"retriever_name": "http"},
        "grpo_generator": {"retriever_name": "http", "retriever_reranker": "runs/tour/reranker"},
        "sft_reasoner": {"model_name_or_path": "runs/tour/generator", "retriever_reranker": "runs/tour/reranker"},
        "ppo_reasoner": {"model_name_or_path": "runs/tour/reasoner_sft", "retriever_reranker": "runs/tour/reranker"},
    }
    for recipe, settings in wanted.items():
        config = yaml.safe_load((ROOT / "recipes" / "configs" / recipe / "tour.yaml").read_text())
        assert {name: config[name] for name in settings} == settings


def test_dry_run_prints_what_would_run(tour, here, capsys):
    tour.main(["--dry_run", "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    commands = [tuple(shlex.split(line)) for line in lines if not line.startswith("#")]
    assert commands == [step.command for step in tour.steps(3, tour.DEFAULT_PORT)]
    assert sorted(here.iterdir()) == []


def test_server_is_the_trained_retriever(tour, here, capfd):
    # A run that is not there: the server says so and ends, and the tour does not hang on it.
    (here / "runs" / "tour").mkdir(parents=True)
    with tour._serving(8421):
        pass
    assert "rag-rl serve --run runs/tour/retriever --port 8421 &" in capfd.readouterr().out


# ---- the data


@pytest.fixture(scope="module")
def data(tour, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tour") / "data"
    tour.write_data(folder)
    return folder


def test_scored_questions(tour, data):
    scored = load_questions(data / "heldout.jsonl")
    kinds = [question.meta["kind"] for question in scored]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(tour.KINDS, 350)
    assert len(scored) >= 1_000
    documents = {passage.doc_id for passage in load_corpus(data / "corpus.jsonl")}
    assert all(set(question.gold_doc_ids) <= documents for question in scored)
    # No fact is asked for twice, as a question and as keywords.
    facts = [tuple(q.meta["chain"][:1] + q.meta["relations"]) for q in scored]
    assert len(set(facts)) == len(facts)


def test_no_entity_is_shared_with_training(data):
    names = {}
    for which in ("train_all", "dev_all", "heldout"):
        rows = load_questions(data / f"{which}.jsonl")
        names[which] = {doc_id.partition("/")[2] for question in rows for doc_id in question.gold_doc_ids}
        assert all(re.fullmatch(r"train|heldout", d.partition("/")[0]) for q in rows for d in q.gold_doc_ids)
    assert not names["train_all"] & (names["heldout"] | names["dev_all"])
    # Nor is the held-out world the packaged one, whose questions were looked at while settings were chosen.
    packaged = {row.doc_id: row.text for row in load_corpus(TINY / "data" / "corpus.jsonl")}
    ours = [p for p in load_corpus(data / "corpus.jsonl") if p.doc_id.startswith("heldout/")]
    assert not [p.doc_id for p in ours if packaged.get(p.doc_id) == p.text]


def test_what_trainings_are_measured_on_is_not_scored(data):
    scored = {(q.meta["chain"][0], *q.meta["relations"]) for q in load_questions(data / "heldout.jsonl")}
    for kind in ("hops", "facts", "keywords", "all"):
        rows = load_questions(data / f"dev_{kind}.jsonl")
        assert len(rows) >= 50
        assert not scored & {(q.meta["chain"][0], *q.meta["relations"]) for q in rows}
    assert {q.meta["kind"] for q in load_questions(data / "train_hops.jsonl")} == {"one hop", "two hops"}
    typed = load_questions(data / "train_keywords.jsonl")
    assert len(typed) == 1_500
    assert all(len(q.question.split()) == 2 for q in typed)


def test_data_are_the_same_each_time(tour, data, here, capsys):
    tour.main(["--write_data"])
    assert "1050 questions" in capsys.readouterr().out
    for file in data.iterdir():
        assert (here / "runs" / "tour" / "data" / file.name).read_bytes() == file.read_bytes()


# ---- going on


def fake(tour, name: str, code: str, done: str = "done") -> object:
    path = Path("runs/tour") / name / done
    write = f"import pathlib; p = pathlib.Path({str(path)!r}); p.parent.mkdir(parents=True, exist_ok=True); {code}"
    return tour.Step(name, f"the {name}", ("python", "-c", write), path)


def test_finished_steps_are_skipped_and_a_failed_one_is_named(tour, here, capfd, monkeypatch):
    ran = "p.write_text('x' + (p.read_text() if p.is_file() else ''))"
    fixed = here / "fixed"
    second = f"import sys; pathlib.Path({str(fixed)!r}).exists() or sys.exit(3); {ran}"
    monkeypatch.setattr(
        tour, "steps", lambda *_: [fake(tour, "a", ran), fake(tour, "b", second), fake(tour, "c", ran)]
    )
    with pytest.raises(SystemExit) as stop:
        tour.run_all(42, 1)
    printed = capfd.readouterr()
    assert stop.value.code == 1
    assert "step 2 (b) ended with exit code 3, and says above why: the same command goes on with it" in printed.err
    assert "$ python -c" in printed.out
    assert not (here / "runs" / "tour" / "c").exists()
    fixed.touch()
    seconds = tour.run_all(42, 1)
    printed = capfd.readouterr()
    assert "[1/3] the a: done" in printed.out
    assert [(here / "runs" / "tour" / name / "done").read_text() for name in "abc"] == ["x", "x", "x"]
    assert set(seconds) == {"a", "b", "c"}
    assert all(seconds[name]["cpu"] > 0 and seconds[name]["wall"] > 0 for name in seconds)
    assert json.loads((here / "runs" / "tour" / "seconds.json").read_text()) == seconds, "both attempts of b count"
    tour.run_all(42, 1)
    assert "$" not in capfd.readouterr().out


def test_what_counts_as_finished(tour, here):
    step = tour.steps(42, 1)[2]
    assert step.name == "retriever"
    assert not step.finished()
    folder = here / "runs" / "tour" / "retriever"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"status": "complete", "seed": 42}))
    assert step.finished()
    with pytest.raises(SystemExit, match="retriever was trained with seed 42, not 1"):
        tour.steps(1, 1)[2].finished()


# ---- the table


def scored(folder: Path, ems: list[float], qids: list[str]) -> None:
    rows = [
        {"qid": qid, "question": f"What is {qid}?", "answers": ["x"], "gold_doc_ids": [], "passages": [], "reply": "x",
         "answer": "x", "scores": {"em": em, "recall@3": 0.5}, "rewards": {}}
        for qid, em in zip(qids, ems, strict=True)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl", rows)
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump({"recipe": "evaluate_rag", "config": "tour"}))
    summary = {"status": "complete", "metrics": mean_metrics(rows), "n_eval": len(rows), "baselines": {}}
    (folder / "metrics.json").write_text(json.dumps(summary))


@pytest.mark.parametrize("harm", [False, True])
def test_table_says_whether_the_aims_are_met(tour, here, harm):
    qids = [f"q{i}" for i in range(90)]
    (here / "runs" / "tour" / "data").mkdir(parents=True)
    kinds = [{"qid": qid, "kind": tour.KINDS[i // 30]} for i, qid in enumerate(qids)]
    (here / "runs" / "tour" / "data" / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kinds))
    right = {"untrained": 9, "retriever": 18, "reranker": 27, "augmenter": 27, "generator": 45, "reasoner_sft": 60}
    right |= {"reasoner": 30 if harm else 72, "untrained_reasoner": 15}
    for name, count in right.items():
        scored(here / "runs" / "tour" / "assemblies" / name, [float(i < count) for i in range(90)], qids)
    lines = tour.summary_table({"retriever": {"cpu": 61.4, "wall": 100.0}}).splitlines()
    assert lines[2] == "| untrained | 0.100 | 0.300 | 0.000 | 0.000 | 0.500 |  |  |  |"
    assert re.fullmatch(
        r"\| \+ retriever \| 0\.200 \| 0\.600 \| 0\.000 \| 0\.000 \| 0\.500 \| \+0\.100 (\[\+0\.\d{3}, \+0\.\d{3}\]) "
        r"\| \+0\.100 \1 \| 61 \|",
        lines[3],
    )
    assert lines[5].startswith(
        "| + augmenter | 0.300 | 0.900 | 0.000 | 0.000 | 0.500 | +0.000 [+0.000, +0.000] | +0.200 ["
    )
    said = "\n".join(lines[9:])
    assert "90 held-out questions. Untrained, EM is 0.100 as a generator and 0.167 as a reasoner." in said
    if harm:
        assert re.search(r"beats the better of the two by \+0\.167 \[.*\] \(aim: at least 0\.25\): MISSED\.", said)
        assert "wholly below -0.02: reasoner, PPO (aim: none): MISSED." in said
    else:
        assert re.search(r"beats the better of the two by \+0\.633 \[.*\] \(aim: at least 0\.25\): met\.", said)
        assert "wholly below -0.02: none (aim: none): met." in said


def test_compare_is_a_real_command(tour):
    step = tour.steps(42, 1)[-1]
    parsed = cli._parser().parse_args(step.command[1:])
    assert isinstance(parsed, argparse.Namespace)
    assert (parsed.against, parsed.output) == ("previous", Path("runs/tour/comparison.html"))
    assert parsed.runs[0] == "untrained=runs/tour/assemblies/untrained"
