"""recipes/grpo_reasoner.py, through its real command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER

RECIPE = "grpo_reasoner"
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / f"{RECIPE}.py"
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
# DESIGN section 4; baselines where they are asked for.
KEYS = {
    "recipe", "config", "seed", "status", "before", "after", "n_eval", "num_processes", "ci95", "train_seconds",
    "eval_seconds", "peak_memory_bytes", "baselines", "over_baselines",
}  # fmt: skip
LOGGED = {
    "loss", "reward", "reward_std", "frac_reward_zero_std", "entropy", "searches", "steps", "invalid_steps", "format",
    "analysis_words", "repetition", "unscored", "injected", "correct", "incorrect", "fail", "invalid",
}  # fmt: skip


@pytest.fixture(scope="module")
def brief(short) -> Callable[..., list[str]]:
    """Flags of a short run: 4 questions x 4 chains a step; ``brief(step_reward="outcome_only")`` changes some."""
    changed = {
        "headroom_samples": None,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "data_eval_size": 12,
        "reasoner_max_steps": 3,
        "max_completion_length": 320,
    }
    return lambda **changes: short(**{**changed, **changes})


@pytest.fixture(scope="module")
def trained_run(run_recipe, brief, tmp_path_factory) -> Path:
    """The folder of a short, finished run."""
    folder = tmp_path_factory.mktemp("reasoner") / "run"
    done = run_recipe(RECIPE, *brief(), "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder.parent / "stderr.txt").write_text(done.stderr)
    return folder


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def rows_of(folder: Path, when: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{when}.jsonl").read_text().splitlines()]


def history_of(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(trained_run):
    found = metrics_of(trained_run)
    assert set(found) == KEYS
    assert (found["recipe"], found["config"], found["seed"]) == (RECIPE, "tiny", 42)
    assert (found["status"], found["n_eval"], found["num_processes"]) == ("complete", 12, 1)
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
def test_run_folder(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert names >= {
        "README.md", "resolved_config.yaml", "trainer_state.json", "curves.png", "report.html", "metrics.json",
        "before.jsonl", "after.jsonl", "model.safetensors", "config.json", "tokenizer.json",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".part", ".tmp", ".bin", ".pt", ".pkl"))]
    history = history_of(trained_run)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    for entry in history:
        assert entry.keys() >= LOGGED
        assert entry["unscored"] == 0.0
    for name in ("README.md", "resolved_config.yaml", "config.json"):
        assert str(ROOT) not in (trained_run / name).read_text(), f"{name} names a path of this machine"


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
def test_started_again_it_says_so_and_does_nothing(trained_run, run_here, brief, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}
    assert run_here(RECIPE, *brief(), "--output_dir", trained_run) == 0
    assert f"{trained_run} is already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")} == before


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
    assert [entry["step"] for entry in history_of(folder)] == list(range(1, 9))


@pytest.mark.slow
def test_two_processes(launch_recipe, brief, tmp_path):
    folder = tmp_path / "run"
    flags = brief(max_steps=2, per_device_train_batch_size=4)
    done = launch_recipe(RECIPE, *flags, "--output_dir", folder, cwd=tmp_path)
    found = metrics_of(folder)
    assert (found["num_processes"], found["n_eval"], found["status"]) == (2, 12, "complete")
    assert [entry["step"] for entry in history_of(folder)] == [1, 2]
    assert "injected tokens of" in done.stderr


# ---- bad input: one line, exit code 2 (1 where a backend fails)


@pytest.fixture
def bad(refused, brief, tmp_path):
    """Runs the recipe on bad input; the output folder must hold no run afterwards that could be taken for one."""

    def run(*flags: object, code: int = 2, **changes: object) -> str:
        line = refused(RECIPE, *brief(**changes), "--output_dir", tmp_path / "run", *flags, code=code)
        assert not (tmp_path / "run" / "metrics.json").exists()
        return line

    return run


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
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = bad(data_train=tmp_path / "train.jsonl")
    assert "train.jsonl" in line
    assert "line 2" in line


def test_no_retriever(bad):
    assert "a reasoner needs a retriever" in bad(retriever_name="none")
