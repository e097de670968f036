"""recipes/ppo_reasoner.py, through its real command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER

RECIPE = "ppo_reasoner"
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / f"{RECIPE}.py"
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
# DESIGN section 4, and what is measured beside the start model.
KEYS = {
    "recipe", "config", "seed", "status", "before", "after", "n_eval", "num_processes", "ci95", "train_seconds",
    "eval_seconds", "peak_memory_bytes", "baselines", "over_baselines",
}  # fmt: skip
METRICS = {"em", "f1", "contains_em", "format", "steps", "searches", "passages", "recall@3", "all_gold@3"}
LOGGED = {
    "reward", "reward_std", "kl", "entropy", "loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "format",
    "searches", "dropped", "round", "weights", "rollout/weights", "rollout/searches", "rollout/invalid",
}  # fmt: skip


@pytest.fixture(scope="module")
def brief(short):
    """Flags of a short run; ``brief(updates_per_round=1)`` changes some."""
    own = {"headroom_samples": None, "updates_per_round": 2, "reasoner_max_steps": 3}
    own |= {"per_device_train_batch_size": 8}
    return lambda **changes: short(**{**own, **changes})


@pytest.fixture(scope="module")
def trained_run(run_recipe, brief, tmp_path_factory):
    """The folder of a short, finished run."""
    folder = tmp_path_factory.mktemp("ppo") / "run"
    done = run_recipe(RECIPE, *brief(), "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "collapse" not in done.stderr, "the packaged reader knows the form"
    return folder


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def history_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "reward" in entry]


@pytest.mark.smoke
def test_metrics(trained_run):
    found = metrics_of(trained_run)
    assert set(found) == KEYS
    assert (found["recipe"], found["config"], found["seed"]) == (RECIPE, "tiny", 42)
    assert (found["status"], found["n_eval"], found["num_processes"]) == ("complete", 20, 1)
    assert set(found["before"]) == set(found["after"]) == METRICS
    assert set(found["baselines"]) == {"one_shot", "no_retrieval"}
    for when in ("before", "after"):
        assert found[when]["em"] <= found[when]["contains_em"] <= 1.0
        assert 0.0 <= found[when]["format"] <= 1.0
        assert found[when]["searches"] <= found[when]["steps"] <= 3.0
    assert 0 < found["train_seconds"] < 300


@pytest.mark.smoke
def test_run_folder(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert names >= {
        "README.md", "resolved_config.yaml", "trainer_state.json", "curves.png", "report.html", "metrics.json",
        "before.jsonl", "after.jsonl", "model.safetensors", "config.json", "tokenizer.json", "baselines.json",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".part", ".tmp", ".pkl"))]
    history = history_of(trained_run)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert [entry["round"] for entry in history] == [1, 1, 2]
    for entry in history:
        assert entry.keys() >= LOGGED
        assert entry["val/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert entry["dropped"] == 0
    assert history[0]["rollout/weights"] == history[1]["rollout/weights"] != history[2]["rollout/weights"]
    for name in ("README.md", "resolved_config.yaml", "config.json"):
        assert str(ROOT) not in (trained_run / name).read_text(), f"{name} names a path of this machine"


@pytest.mark.smoke
def test_the_trained_model_loads_by_itself(trained_run):
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(trained_run)
    start = AutoModelForCausalLM.from_pretrained(FOLDER / "reader")
    pairs = zip(trained.parameters(), start.parameters(), strict=True)
    assert any(not one.equal(two) for one, two in pairs), "training must have changed something"


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(trained_run, run_recipe, brief):
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}
    done = run_recipe(RECIPE, *brief(), "--output_dir", trained_run)
    assert done.returncode == 0, done.stderr
    assert f"{trained_run} is already finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")} == before


@pytest.mark.slow
def test_with_lora_a_judge_and_without_the_outcome(run_here, brief, tmp_path):
    flags = brief(
        max_steps=1, use_peft="true", lora_r=4, lora_target_modules="all-linear", judge_name="oracle",
        step_reward="paper", outcome_multiplier="none", save_merged="true", reasoner_layout="chat",
    )  # fmt: skip
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
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
        assert {entry["reward"] for entry in history_of(folder)} == {1.0}
    assert sum(gains) / 3 <= 0.03


@pytest.mark.slow
def test_killed_and_resumed(kill_and_resume, brief, tmp_path):
    folder = tmp_path / "run"
    assert kill_and_resume(RECIPE, *brief(max_steps=6, save_steps=2), folder=folder, cwd=tmp_path) in (2, 4)
    assert [entry["step"] for entry in history_of(folder)] == list(range(1, 7))
    assert [entry["round"] for entry in history_of(folder)] == [1, 1, 2, 2, 3, 3]
    assert metrics_of(folder)["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    "peft", [(), ("--use_peft", "true", "--lora_target_modules", "all-linear")], ids=["full", "lora"]
)
def test_two_processes(launch_recipe, brief, tmp_path, peft):
    folder = tmp_path / "run"
    flags = brief(per_device_train_batch_size=8, data_eval_size=21)
    done = launch_recipe(RECIPE, *flags, *peft, "--output_dir", folder, cwd=tmp_path)
    found = metrics_of(folder)
    assert (found["num_processes"], found["n_eval"]) == (2, 21)
    assert [entry["step"] for entry in history_of(folder)] == [1, 2, 3]
    assert done.stdout.count("held-out questions; trained") == 1


# ---- bad input: one line, exit code 2


@pytest.fixture
def bad(refused, brief, tmp_path):
    """Runs the recipe on bad input; the output folder must hold no run afterwards that could be taken for one."""

    def run(*flags, code=2, **changes):
        output = tmp_path / "run"
        line = refused(RECIPE, *brief(**changes), "--output_dir", output, *flags, code=code)
        assert not (output / "metrics.json").exists()
        return line

    return run


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
    import shutil

    start = tmp_path / "adapter"
    shutil.copytree(FOLDER / "reader", start)
    (start / "adapter_config.json").write_text("{}")
    assert "save that run with --save_merged true" in bad("--model_name_or_path", start)
