"""recipes/self_boost.py, through its real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import SGD, difference, manifest_of, metrics_of, rows_of, steps_of, write_lines

RECIPE = "self_boost"
FOUND = {"recall@10", "success@10", "mrr@10", "ndcg@10"}
STEPS = ("round_1/queries", "round_1/augmenter", "round_1/retriever")
SHORT = {
    "headroom_samples": None, "boost_rounds": 1, "gate_share": 0.3, "synthesis_passages": 40, "data_eval_size": 11,
    "preference_candidates": 3, "preference_batch_size": 2, "augmenter_max_new_tokens": 16, "max_steps": 6,
    "per_device_train_batch_size": 4, "distill_max_steps": 6, "distill_per_device_train_batch_size": 4,
    "distill_group_size": 4, "distill_batch_size": 2,
}  # fmt: skip


@pytest.fixture
def copied(trained_run, tmp_path) -> Path:
    """A copy of the finished run that may be changed."""
    return shutil.copytree(trained_run, tmp_path / "run")


def results_of(folder: Path) -> dict[str, int]:
    """When each step's result was written."""
    return {
        step: (folder / step / name).stat().st_mtime_ns
        for step, name in zip(STEPS, ("synthetic/summary.json", "metrics.json", "metrics.json"), strict=True)
    }


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=11, more={"baselines", "over_baselines", "evaluated_on", "rounds"})
    assert set(found["before"]) == set(found["after"]) == {*FOUND, "augmentation_words"}
    assert set(found["baselines"]) == {"no_augmentation", "kept_retriever_alone"}
    assert set(found["baselines"]["kept_retriever_alone"]) == FOUND
    assert found["evaluated_on"] == "questions of people"
    (one,) = found["rounds"]
    assert one["queries"]["learnt"] + one["queries"]["held_out"] == one["queries"]["usable"]
    for part in ("augmenter", "retriever"):
        step = trained_run / "round_1" / part
        assert manifest_of(step)["kept"] == one[part]["kept"]
        gate = one[part]["gate"]
        assert (gate["before"], gate["after"]) == tuple(
            metrics_of(step)[when]["ndcg@10"] for when in ("before", "after")
        )
        assert one[part]["kept"] == (gate["after"] > gate["before"])
    assert found["train_seconds"] == pytest.approx(
        sum(one[part]["train_seconds"] for part in ("augmenter", "retriever"))
    )


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    more = {"baseline_no_augmentation.jsonl", "round_1", "augmenter", "retriever"}
    check_run_folder(trained_run, more, portable=[f"{step}/manifest.json" for step in STEPS])
    assert {path.name for path in (trained_run / "round_1").iterdir()} == {"queries", "augmenter", "retriever"}
    for part, recipe in (("augmenter", "dpo_augmenter"), ("retriever", "distill_retriever")):
        step = trained_run / "round_1" / part
        assert (metrics_of(step)["recipe"], steps_of(step)) == (recipe, [1, 2, 3, 4, 5, 6])
    report = (trained_run / "report.html").read_text()
    assert "Rounds" in report
    assert "round_1/retriever/report.html" in report


@pytest.mark.smoke
def test_nothing_held_out_is_learnt_from(trained_run):
    from rag_rl.data.reinforced_ir import read_examples, read_queries

    people = {row["question"] for row in rows_of(trained_run, "after")}
    gate = {row["question"] for row in rows_of(trained_run / "round_1" / "retriever", "after")}
    assert gate == {row["question"] for row in rows_of(trained_run / "round_1" / "augmenter", "after")}
    learnt = {one.query for one in read_queries(trained_run / "round_1" / "augmenter" / "generator" / "queries.json")}
    assert learnt == {one.query for one in read_examples(trained_run / "round_1/retriever/retriever/train.jsonl")}
    assert not learnt & (people | gate)
    assert not any("?" in query for query in learnt), "keywords, as the config has it"


@pytest.mark.smoke
def test_the_kept_pair_is_an_assembly_that_finds_what_was_measured(trained_run):
    from rag_rl.config.assemblies import build_assembly_search, plan_assembly

    plan = plan_assembly({"retriever_run": str(trained_run), "augmenter_model": str(trained_run)})
    search = build_assembly_search(plan)
    assert (plan.augmenter.augmenter_prompt, plan.augmenter.augmenter_weight) == ("tiny_passage", 0.5)
    for row in rows_of(trained_run, "after")[:3]:
        (hits,) = search.retriever.search([row["question"]], top_k=10)
        assert [hit.passage.doc_id for hit in hits] == [passage["doc_id"] for passage in row["passages"]]


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run)


# ---- a changed setting


@pytest.mark.smoke
def test_a_gate_that_refuses_everything_leaves_the_untrained_pair(copied, run_here, refused, brief):
    changed = [*brief(gate_min_gain=2.0), "--output_dir", copied]
    line = refused(RECIPE, *changed)
    assert "holds this run with other settings (gate_min_gain: 0.0 -> 2.0)" in line
    assert "--resume_from_checkpoint true" in line
    made = results_of(copied)
    assert run_here(RECIPE, *changed, "--resume_from_checkpoint", "true") == 0
    now = results_of(copied)
    assert [now[step] for step in STEPS[:2]] == [made[step] for step in STEPS[:2]], "they do not depend on the gate"
    start = manifest_of(copied / "round_1" / "augmenter")["inputs"]["model_name_or_path"]
    assert manifest_of(copied / "round_1" / "retriever")["inputs"]["augmenter_model"] == start, (
        "what was refused is out"
    )
    found = metrics_of(copied)
    assert [found["rounds"][0][part]["kept"] for part in ("augmenter", "retriever")] == [False, False]
    assert found["after"] == found["before"]


@pytest.mark.smoke
def test_a_changed_setting_redoes_exactly_what_depends_on_it(copied, run_here, brief):
    made = results_of(copied)
    flags = [*brief(distill_learning_rate=0.01, gate="false"), "--output_dir", copied]
    assert run_here(RECIPE, *flags, "--resume_from_checkpoint", "true") == 0
    now = results_of(copied)
    assert [step for step in STEPS if now[step] != made[step]] == ["round_1/retriever"]
    found = metrics_of(copied)
    assert [found["rounds"][0][part]["kept"] for part in ("augmenter", "retriever")] == [True, True]
    assert found["after"] != found["before"]


@pytest.mark.slow
def test_a_step_that_comes_out_otherwise_redoes_what_comes_after(copied, run_here, brief):
    """Two rounds: the second is new, and all of it depends on what the first has left."""
    flags = [*brief(boost_rounds=2, gate="false"), "--output_dir", copied, "--resume_from_checkpoint", "true"]
    assert run_here(RECIPE, *flags) == 0
    made = results_of(copied)
    second = {part: manifest_of(copied / "round_2" / part) for part in ("queries", "augmenter", "retriever")}
    first = manifest_of(copied / "round_1" / "retriever")
    assert second["retriever"]["inputs"]["retriever"] != first["inputs"]["retriever"], "it starts from the kept one"
    assert second["queries"]["seed"] != manifest_of(copied / "round_1" / "queries")["seed"]
    assert run_here(RECIPE, *flags, "--preference_candidates", "4") == 0
    now = results_of(copied)
    assert now["round_1/queries"] == made["round_1/queries"]
    assert now["round_1/augmenter"] > made["round_1/augmenter"]
    redone = {part: manifest_of(copied / "round_2" / part) for part in second}
    assert redone["queries"] == second["queries"]
    for name in ("retriever", "model_name_or_path"):
        assert redone["augmenter"]["inputs"][name] != second["augmenter"]["inputs"][name]


# ---- several processes


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2proc", "zero2"])
def test_two_processes_do_what_one_does(config, run_recipe, launch_recipe, brief, tmp_path):
    """With plain gradient descent, which shows a gradient that is off by a factor.

    Nothing is kept, so that both teach and learn from the same: what a trained augmenter writes may differ by a word.
    """
    same = {**SGD, "distill_learning_rate": 0.05, "gate_min_gain": 2.0}
    same |= {"max_steps": 2, "distill_max_steps": 2}
    alone, both = tmp_path / "alone", tmp_path / "both"
    batches = {"per_device_train_batch_size": 6, "distill_per_device_train_batch_size": 8}  # of 15 pairs
    done = run_recipe(RECIPE, *brief(**same, **batches), "--output_dir", alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    halves = {name: size // 2 for name, size in batches.items()}
    done = launch_recipe(RECIPE, *brief(**same, **halves), "--output_dir", both, config=config, cwd=tmp_path)
    assert [metrics_of(folder)["num_processes"] for folder in (alone, both)] == [1, 2]
    assert done.stdout.count("held-out questions; trained") == 3, "one process prints: of each step, and of the run"
    for name in (
        "queries/synthetic/queries.json", "queries/synthetic/synthesis.jsonl", "augmenter/generator/train.jsonl",
        "retriever/retriever/answers.json",
    ):  # fmt: skip
        assert (both / "round_1" / name).read_bytes() == (alone / "round_1" / name).read_bytes(), name
    for part in ("augmenter", "retriever"):
        steps = [folder / "round_1" / part for folder in (alone, both)]
        assert [metrics_of(step)["num_processes"] for step in steps] == [1, 2]
        assert steps_of(steps[0]) == steps_of(steps[1]) == [1, 2]
        for when in ("before", "after"):
            one, two = (rows_of(step, when) for step in steps)
            assert [row["qid"] for row in two] == [row["qid"] for row in one]
            assert metrics_of(steps[1])[when] == pytest.approx(metrics_of(steps[0])[when], abs=1e-6)
        start = FOLDER / {"augmenter": "reader", "retriever": "encoder_young"}[part]
        moved, apart = difference(start, steps[0]), difference(*steps)
        assert moved > 1e-5
        assert apart < 1e-2 * moved
    for when in ("before", "after"):
        assert metrics_of(both)[when] == pytest.approx(metrics_of(alone)[when], abs=1e-6)


# ---- killed


@pytest.mark.slow
def test_killed_at_every_stage_and_resumed(run_recipe, kill_when, brief, tmp_path, trained_run):
    """The queries' own stages are killed in test_synthesize_queries."""
    from rag_rl.run import last_checkpoint

    folder = tmp_path / "killed"
    flags = [*brief(), "--output_dir", folder, "--resume_from_checkpoint", "true"]
    augmenter, retriever = (folder / "round_1" / part for part in ("augmenter", "retriever"))
    stages = {
        "candidates": lambda: (augmenter / "generator" / "candidates-0.jsonl").is_file(),
        "training of the augmenter": lambda: last_checkpoint(augmenter) is not None,
        "ranking": lambda: (retriever / "retriever" / "rankings.0.jsonl").is_file(),
        "training of the retriever": lambda: last_checkpoint(retriever) is not None,
    }
    kept: dict[Path, int] = {}
    for stage, reached in stages.items():
        kill_when(reached, RECIPE, *flags, cwd=tmp_path)
        assert not (folder / "metrics.json").exists(), f"killed in {stage}"
        for path in (folder / "before.json", folder / "round_1" / "queries" / "synthetic" / "summary.json"):
            assert kept.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, f"{path} is made once"
    done = run_recipe(RECIPE, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "round_1/retriever goes on from" in done.stderr
    for part in (augmenter, retriever):
        assert steps_of(part) == [1, 2, 3, 4, 5, 6]
    for name in (
        "augmenter/generator/train.jsonl",
        "retriever/retriever/answers.json",
        "retriever/retriever/train.jsonl",
    ):
        assert (folder / "round_1" / name).read_bytes() == (trained_run / "round_1" / name).read_bytes(), name
    found, whole = metrics_of(folder), metrics_of(trained_run)
    assert found["before"] == whole["before"]
    assert found["after"] == pytest.approx(whole["after"], abs=0.05)
    for part in ("augmenter", "retriever"):
        assert (
            manifest_of(folder / "round_1" / part)["settings"]
            == manifest_of(trained_run / "round_1" / part)["settings"]
        )


# ---- bad input


def test_an_empty_corpus(bad, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("")
    assert "corpus" in bad("--data_corpus", tmp_path / "corpus.jsonl")


def test_a_corpus_that_repeats_itself(bad, tmp_path):
    texts = ("Kelsabert is by craft a painter.", "Jorobert works as a sailor.")
    rows = [{"doc_id": str(number), "text": texts[number % 2]} for number in range(20)]
    corpus = write_lines(tmp_path / "corpus.jsonl", rows)
    line = bad(
        "--data_corpus", corpus, "--data_eval", "null", "--with_answers", "false",
        "--synthesis_check", "none", gate_share=0.001,
    )  # fmt: skip
    assert "round 1: of 2 queries gate_share 0.001 holds out 0, and 2 are left to learn from" in line


def test_a_query_without_a_passage(bad, tmp_path):
    (tmp_path / "queries.json").write_text(json.dumps([{"query": "Who?", "passage": " "}]))
    line = bad("--boost_queries", tmp_path / "queries.json")
    assert "queries.json: 1 bad row: item 1: field 'passage' is empty" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"boost_rounds": 0}, "boost_rounds must be at least 1, got 0"),
        ({"gate_share": 1.5}, "gate_share must lie between 0 and 1, got 1.5"),
        ({"boost_queries": "a b"}, "boost_queries names one source a round: 1 are needed, got 2"),
        ({"data_train": "queries.json"}, "data_train is written here, round by round"),
        ({"augmenter_weight": 1.0}, "augmenter_weight 1 leaves augmentations out"),
        ({"distill_max_step": 3}, "the closest valid one is --distill_max_steps"),
        ({"retriever_name": "none"}, "retriever_name must be dense"),
    ],
)
def test_settings_that_mean_nothing(bad, changes, expected):
    assert expected in bad(**changes)
