"""recipes/grpo_reasoner.py, through its real command line."""

from __future__ import annotations

import re

import pytest

from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import history_of, metrics_of, rows_of, steps_of, write_lines

RECIPE = "grpo_reasoner"
# Four questions x four chains a step.
SHORT = {
    "headroom_samples": None, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
    "num_generations": 4, "data_eval_size": 12, "reasoner_max_steps": 3, "max_completion_length": 320,
}  # fmt: skip
LOGGED = {
    "loss", "reward", "reward_std", "frac_reward_zero_std", "entropy", "searches", "steps", "invalid_steps", "format",
    "analysis_words", "repetition", "unscored", "injected", "correct", "incorrect", "fail", "invalid",
}  # fmt: skip


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=12, more={"baselines", "over_baselines"})
    assert set(found["before"]) == set(found["after"]) == set(found["ci95"])
    assert set(found["before"]) >= {"em", "f1", "contains_em", "format", "searches", "steps", "recall@3", "all_gold@3"}
    for when in ("before", "after"):
        assert found[when]["em"] <= found[when]["f1"]
        assert 0.0 <= found[when]["format"] <= 1.0
        assert 1.0 <= found[when]["steps"] <= 3.0
        assert found[when]["searches"] <= found[when]["steps"]
    for name, (low, high) in found["ci95"].items():
        assert low <= found["after"][name] - found["before"][name] <= high
    assert set(found["baselines"]) == {"one_shot", "no_retrieval"}
    assert 0 < found["train_seconds"] < 300


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    check_run_folder(trained_run, {"model.safetensors", "config.json", "tokenizer.json"})
    history = history_of(trained_run)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    for entry in history:
        assert entry.keys() >= LOGGED
        assert entry["unscored"] == 0.0


@pytest.mark.smoke
def test_the_mask_was_audited(trained_run):
    told = (trained_run.parent / "stderr.txt").read_text()
    found = re.search(r"mask audit: (\d+) injected tokens of (\d+), no gradient", told)
    assert found
    assert 0 < int(found[1]) < int(found[2])


@pytest.mark.smoke
def test_rows_tell_step_by_step(trained_run):
    before, after = rows_of(trained_run, "before"), rows_of(trained_run, "after")
    assert [row["qid"] for row in before] == [row["qid"] for row in after]
    assert all(1 <= len(row["steps"]) <= 3 for row in after)


@pytest.mark.smoke
def test_the_trained_model_loads_by_itself(trained_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained_run)
    start = AutoModelForCausalLM.from_pretrained(FOLDER / "reader")
    weights, first = dict(model.named_parameters()), dict(start.named_parameters())
    assert weights.keys() == first.keys()
    assert any(not weights[name].equal(first[name]) for name in weights), "training must have changed something"
    assert AutoTokenizer.from_pretrained(trained_run).chat_template


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run)


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["step", "return_to_go"])
def test_another_credit_with_the_oracle(run_here, brief, tmp_path, credit):
    flags = brief(
        max_steps=1, step_credit=credit, step_reward="paper", judge_name="oracle", judge_rubric="answer_correctness"
    )
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    (entry,) = history_of(tmp_path / "run")
    assert entry["unscored"] == 0.0
    assert "judge_accuracy" in metrics_of(tmp_path / "run")["after"]


# ---- slow: the control, launchers, interruptions


@pytest.mark.slow
def test_a_constant_reward_teaches_nothing(run_here, brief, tmp_path):
    """Chains of a group that are all worth the same have no advantage: what is learnt is learnt from the reward."""
    flags = brief(max_steps=3, step_reward="constant", reasoner_baselines="one_shot")
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    found = metrics_of(tmp_path / "run")
    assert found["after"] == found["before"]
    assert [entry["grad_norm"] for entry in history_of(tmp_path / "run")] == [0.0] * 3


@pytest.mark.slow
def test_killed_and_resumed(kill_and_resume, brief, tmp_path):
    folder = tmp_path / "run"
    assert kill_and_resume(RECIPE, *brief(max_steps=8, save_steps=2), folder=folder, cwd=tmp_path) < 8
    assert steps_of(folder) == list(range(1, 9))


@pytest.mark.slow
def test_two_processes(launch_recipe, brief, tmp_path, trained_run):
    folder = tmp_path / "run"
    flags = brief(max_steps=2, per_device_train_batch_size=4)
    done = launch_recipe(RECIPE, *flags, "--output_dir", folder, cwd=tmp_path)
    found = metrics_of(folder)
    assert (found["num_processes"], found["n_eval"], found["status"]) == (2, 12, "complete")
    assert found["before"] == pytest.approx(metrics_of(trained_run)["before"], abs=1e-6)
    assert steps_of(folder) == [1, 2]
    assert "injected tokens of" in done.stderr


# ---- bad input: one line, exit code 2 (1 where a backend fails)


def test_a_layout_without_sequences(bad):
    assert "set reasoner_layout: chat" in bad(reasoner_layout="turn")


def test_a_budget_without_room(bad):
    line = bad(max_completion_length=95)
    assert "max_completion_length (95) is the budget of a whole chain, and has no room for two steps" in line


def test_a_reward_that_needs_a_judge(bad):
    line = bad(step_reward="paper")
    assert "this step reward needs verdicts on document_relevance: name a judge (judge_name)" in line


def test_an_unknown_credit(bad):
    assert "step_credit" in bad(step_credit="stepwise")


def test_a_divergence_that_is_not_measured(bad):
    assert "guard_max_kl needs a KL term" in bad(guard_max_kl=0.5)


def test_a_question_without_answers(bad, tmp_path):
    rows = [
        {"qid": "q1", "question": "Where?", "answers": ["Elmton"]},
        {"qid": "q2", "question": "Who?", "answers": []},
    ]
    line = bad(data_train=write_lines(tmp_path / "train.jsonl", rows))
    assert "train.jsonl" in line
    assert "line 2" in line


def test_no_retriever(bad):
    assert "a reasoner needs a retriever" in bad(retriever_name="none")
