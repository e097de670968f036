"""recipes/ppo_reasoner.py, through its real command line."""

from __future__ import annotations

import shutil

import pytest

from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import history_of, metrics_of, names_in, steps_of

RECIPE = "ppo_reasoner"
SHORT = {
    "headroom_samples": None, "updates_per_round": 2, "reasoner_max_steps": 3, "per_device_train_batch_size": 8,
}  # fmt: skip
METRICS = {"em", "f1", "contains_em", "format", "steps", "searches", "passages", "recall@3", "all_gold@3"}
LOGGED = {
    "reward", "reward_std", "kl", "entropy", "loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "format",
    "searches", "dropped", "round", "weights", "rollout/weights", "rollout/searches", "rollout/invalid",
}  # fmt: skip


def updates_of(folder):
    """What was logged at each step: a reward, and PPO's own losses."""
    return history_of(folder, "reward")


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    assert "collapse" not in (trained_run.parent / "stderr.txt").read_text(), "the packaged reader knows the form"
    found = check_metrics(trained_run, n_eval=20, more={"baselines", "over_baselines"})
    assert set(found["before"]) == set(found["after"]) == METRICS
    assert set(found["baselines"]) == {"one_shot", "no_retrieval"}
    for when in ("before", "after"):
        assert found[when]["em"] <= found[when]["contains_em"] <= 1.0
        assert 0.0 <= found[when]["format"] <= 1.0
        assert found[when]["searches"] <= found[when]["steps"] <= 3.0
    assert 0 < found["train_seconds"] < 300


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    more = {"model.safetensors", "config.json", "tokenizer.json", "baselines.json"}
    check_run_folder(trained_run, more, pickled={"training_args.bin"})
    history = updates_of(trained_run)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert [entry["round"] for entry in history] == [1, 1, 2]
    for entry in history:
        assert entry.keys() >= LOGGED
        assert entry["val/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert entry["dropped"] == 0
    assert history[0]["rollout/weights"] == history[1]["rollout/weights"] != history[2]["rollout/weights"]


@pytest.mark.smoke
def test_the_trained_model_loads_by_itself(trained_run):
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(trained_run)
    start = AutoModelForCausalLM.from_pretrained(FOLDER / "reader")
    pairs = zip(trained.parameters(), start.parameters(), strict=True)
    assert any(not one.equal(two) for one, two in pairs), "training must have changed something"


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run, own_process=True)


@pytest.mark.slow
def test_with_lora_a_judge_and_without_the_outcome(run_here, brief, tmp_path):
    flags = brief(
        max_steps=1, use_peft="true", lora_r=4, lora_target_modules="all-linear", judge_name="oracle",
        step_reward="paper", outcome_multiplier="none", save_merged="true", reasoner_layout="chat",
    )  # fmt: skip
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    names = names_in(tmp_path / "run")
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith("adapter")]
    assert "judge_accuracy" in metrics_of(tmp_path / "run")["after"]


# ---- slow: the control, interruptions, two processes


@pytest.mark.slow
def test_a_constant_reward_teaches_nothing(run_here, brief, tmp_path):
    """Advantages are whitened, so that even a constant moves the weights: by chance, and not towards answers."""
    gains = []
    for seed in (1, 2, 3):
        folder = tmp_path / str(seed)
        flags = brief(
            max_steps=6, per_device_train_batch_size=64, data_train_size=None, data_eval_size=150, save_steps=6,
            step_reward="constant", reasoner_baselines="no_retrieval", reasoner_max_steps=5, updates_per_round=4,
        )  # fmt: skip
        assert run_here(RECIPE, *flags, "--seed", seed, "--output_dir", folder) == 0
        found = metrics_of(folder)
        gains.append(found["after"]["em"] - found["before"]["em"])
        assert {entry["reward"] for entry in updates_of(folder)} == {1.0}
    assert sum(gains) / 3 <= 0.03


@pytest.mark.slow
def test_killed_and_resumed(kill_and_resume, brief, tmp_path):
    folder = tmp_path / "run"
    assert kill_and_resume(RECIPE, *brief(max_steps=6, save_steps=2), folder=folder, cwd=tmp_path) in (2, 4)
    assert steps_of(folder, "reward") == list(range(1, 7))
    assert [entry["round"] for entry in updates_of(folder)] == [1, 1, 2, 2, 3, 3]
    assert metrics_of(folder)["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    "peft", [(), ("--use_peft", "true", "--lora_target_modules", "all-linear")], ids=["full", "lora"]
)
def test_two_processes(launch_recipe, brief, tmp_path, peft, trained_run):
    folder = tmp_path / "run"
    flags = brief(per_device_train_batch_size=8)
    done = launch_recipe(RECIPE, *flags, *peft, "--output_dir", folder, cwd=tmp_path)
    found = metrics_of(folder)
    assert (found["num_processes"], found["n_eval"]) == (2, 20)
    assert found["before"] == pytest.approx(metrics_of(trained_run)["before"], abs=1e-6)
    assert steps_of(folder, "reward") == [1, 2, 3]
    assert done.stdout.count("held-out questions; trained") == 1


# ---- bad input: one line, exit code 2


def test_a_reward_that_needs_a_judge(bad):
    assert "this step reward needs verdicts on document_relevance" in bad("--step_reward", "paper")


def test_an_unknown_reward(bad):
    assert "a step reward is one of paper" in bad("--step_reward", "format")


def test_a_rule_that_needs_the_outcome(bad):
    line = bad("--step_reward", "return_to_go", "--judge_name", "oracle", "--outcome_multiplier", "none")
    assert "outcome_multiplier none gives each search its process score alone" in line


def test_a_setting_out_of_range(bad):
    assert "temperature must be above 0, got 0.0" in bad("--temperature", "0")


def test_questions_without_answers(bad, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"qid": "q1", "question": "Where is it?"}\n')
    line = bad("--data_train", path)
    assert f"{path}" in line
    assert "answers" in line


def test_a_question_that_does_not_fit(bad):
    line = bad("--reasoner_max_prompt_tokens", "5")
    assert "questions are longer than the 5 tokens of a prompt even without any steps" in line


def test_an_adapter_as_the_start(bad, tmp_path):
    start = tmp_path / "adapter"
    shutil.copytree(FOLDER / "reader", start)
    (start / "adapter_config.json").write_text("{}")
    assert "save that run with --save_merged true" in bad("--model_name_or_path", start)
