"""recipes/grpo_generator.py, through its real command line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.run_folders import KEYS, metrics_of, rows_of, steps_of

RECIPE = "grpo_generator"
SHORT: dict[str, object] = {}  # nothing beside the settings of `short`, which are made for this recipe
METRICS = {"em", "f1", "contains_em", "format", "recall@3", "success@3", "mrr@10", "ndcg@10"}


def answer_of(folder: Path) -> dict:
    command = [sys.executable, "-m", "rag_rl.cli", "ask", "--run", str(folder), "--json", "Who rules Elmton?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, finished_run):
    found = check_metrics(finished_run, n_eval=20, more={"headroom"})
    assert set(found["before"]) == set(found["after"]) == set(found["ci95"]) == METRICS
    for when in ("before", "after"):
        assert all(0.0 <= value <= 1.0 for value in found[when].values())
        assert found[when]["em"] <= found[when]["f1"]
        assert found[when]["em"] <= found[when]["contains_em"]
    assert found["before"]["recall@3"] >= 0.5, "retrieval must be in order from the start"
    for name, (low, high) in found["ci95"].items():
        assert low <= found["after"][name] - found["before"][name] <= high
    # Retrieval is the same before and after: only the reader learns.
    assert found["ci95"]["recall@3"] == [0.0, 0.0]
    assert set(found["headroom"]) == {"pass@2", "mean@2", "zero_variance_groups"}
    assert 0 < found["train_seconds"] < 300
    assert 0 < found["eval_seconds"] < 300
    assert 10**8 < found["peak_memory_bytes"] < 10**11


@pytest.mark.smoke
def test_run_folder(check_run_folder, finished_run):
    check_run_folder(finished_run, {"prompts", "model.safetensors", "config.json", "tokenizer.json"})
    assert not (finished_run / "adapter_config.json").exists(), "the tiny config saves merged weights"
    assert steps_of(finished_run) == [1, 2, 3]
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (finished_run / "report.html").read_text()
    assert "<html" in report
    assert 'src="http' not in report
    assert (finished_run / "prompts" / "tiny_answer.txt").is_file()
    assert (finished_run / "README.md").read_text().startswith("---\n")


@pytest.mark.smoke
def test_the_trained_model_loads_by_itself(finished_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rag_rl.tiny import FOLDER

    model = AutoModelForCausalLM.from_pretrained(finished_run)
    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    start = AutoModelForCausalLM.from_pretrained(FOLDER / "reader")
    weights, first = dict(model.named_parameters()), dict(start.named_parameters())
    assert weights.keys() == first.keys()
    assert any(not weights[name].equal(first[name]) for name in weights), "training must have changed something"
    assert tokenizer.decode(tokenizer("Answer: Elmton")["input_ids"]).strip() == "Answer: Elmton"


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, finished_run):
    check_started_again(finished_run, own_process=True)


@pytest.mark.smoke
def test_unmerged_adapter_answers_and_can_move(run_here, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = short(max_steps=1, save_merged="false", headroom_samples=0)
    assert run_here(RECIPE, *flags, "--output_dir", "run") == 0
    folder = tmp_path / "run"
    assert set(metrics_of(folder)) == KEYS, "no headroom, which was not asked for"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not Path(base).is_absolute()
    assert (folder / base / "config.json").is_file(), "relative to the folder of the adapter"
    assert len(answer_of(folder)["passages"]) == 3


# ---- slow: launchers, interruptions, other folders


@pytest.mark.slow
def test_accelerate_launch_without_arguments(check_plain_launch):
    check_plain_launch()


@pytest.mark.slow
def test_chroma(run_recipe, short, tmp_path, finished_run):
    done = run_recipe(RECIPE, *short(), "--config", "tiny_chroma", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics_of(tmp_path / "run")["before"] == pytest.approx(metrics_of(finished_run)["before"], abs=0.1)


NOTING = '''
import os, time

def steps(*, completions, trainer_state=None, **_):
    """Notes the step in which it is asked, and takes its time, so that there is time to be killed."""
    if trainer_state is not None:
        with open(os.environ["NOTED"], "a") as file:
            file.write(f"{trainer_state.global_step}\\n")
        time.sleep(0.5)
    return [0.0] * len(completions)
'''


@pytest.mark.slow
def test_killed_and_resumed(run_recipe, kill_when, short, tmp_path):
    from rag_rl.run import last_checkpoint

    (tmp_path / "noting.py").write_text(NOTING)
    noted = tmp_path / "steps.txt"
    env = {"PYTHONPATH": str(tmp_path), "NOTED": str(noted)}
    folder = tmp_path / "run"
    rewards = ["--reward_names", "em", "format", "noting:steps", "--reward_weights", "1.0", "0.1", "0.0"]
    flags = [*short(max_steps=12, save_steps=3, headroom_samples=0), *rewards, "--output_dir", str(folder)]

    def happened() -> bool:
        return last_checkpoint(folder) is not None and not last_checkpoint(folder).endswith("-3")

    kill_when(happened, RECIPE, *flags, cwd=tmp_path, env=env)
    checkpoint = int(Path(last_checkpoint(folder)).name.split("-")[1])
    assert checkpoint in (6, 9), "killed in the middle"
    assert not (folder / "metrics.json").exists()
    first = (folder / "before.json").read_bytes()
    seconds = json.loads((folder / "train_seconds.json").read_text())["train_seconds"]

    # Without the flag: the flag is named, and nothing is touched.
    refused = run_recipe(RECIPE, *flags, env=env, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--resume_from_checkpoint true" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr

    # A later checkpoint of which only half was written is passed over.
    half = folder / "checkpoint-11"
    shutil.copytree(last_checkpoint(folder), half)
    (half / "trainer_state.json").unlink()
    noted_before = noted.read_text().split()
    done = run_recipe(RECIPE, *flags, "--resume_from_checkpoint", "true", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from {folder / f'checkpoint-{checkpoint}'}" in done.stderr

    assert steps_of(folder) == list(range(1, 13))
    asked = noted.read_text().split()[len(noted_before) :]
    assert asked == [str(step) for step in range(checkpoint, 12)], "steps that were done must not be done again"
    assert (folder / "before.json").read_bytes() == first, "before is measured once"
    found = metrics_of(folder)
    assert found["status"] == "complete"
    # Half a second of sleep a step: both parts of the training are counted, the lost steps are not.
    assert found["train_seconds"] > seconds + 0.5 * (12 - checkpoint)
    assert math.isfinite(found["after"]["em"])


@pytest.mark.slow
def test_copy_of_the_recipe_runs_elsewhere(check_copy_elsewhere):
    check_copy_elsewhere()


@pytest.mark.slow
def test_two_processes(launch_recipe, short, tmp_path, finished_run):
    flags = [*short(per_device_train_batch_size=8, headroom_samples=0), "--output_dir", tmp_path / "run"]
    done = launch_recipe(RECIPE, *flags, cwd=tmp_path)
    found, alone = metrics_of(tmp_path / "run"), metrics_of(finished_run)
    assert found["num_processes"] == 2
    assert found["before"] == pytest.approx(alone["before"], abs=1e-9)
    assert found["n_eval"] == 20
    rows, theirs = rows_of(tmp_path / "run", "before"), rows_of(finished_run, "before")
    assert [row["qid"] for row in rows] == [row["qid"] for row in theirs]
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    # Both processes look for the folder; one of them prints.
    assert done.stdout.count("held-out questions; trained") == 1
