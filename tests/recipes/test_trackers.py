"""``--report_to`` works in every recipe that trains, as in TRL; what is not installed is said at once."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
from transformers import TrainingArguments

from rag_rl.config.trackers import TRACKERS
from tests.recipes.run_folders import logged

SMALL = {"data_eval_size": 4, "data_train_size": 32, "max_steps": 2, "save_steps": 2, "logging_steps": 1}
# Of each recipe: what makes it short, and tags that TensorBoard must have.
CHAINS = {"reasoner_baselines": "[]", "reasoner_max_steps": 2}
RECIPES = {
    "grpo_generator": ({"headroom_samples": 0, "per_device_train_batch_size": 16}, {"reward", "rewards/em", "loss"}),
    "grpo_retriever": ({"reader_name": "scripted", "per_device_train_batch_size": 16}, {"reward", "loss"}),
    "sft_reasoner": ({**CHAINS, "per_device_train_batch_size": 4}, {"loss", "mean_token_accuracy"}),
    "ppo_reasoner": (
        {**CHAINS, "per_device_train_batch_size": 8, "rollout_batch_size": 32},
        {"reward", "loss/policy_avg", "kl"},
    ),
    "train_reranker": ({"per_device_train_batch_size": 4, "reranker_candidates": 5}, {"loss"}),
    "distill_retriever": (
        {"data_train_size": None, "synthesis_passages": 24, "per_device_train_batch_size": 8, "group_size": 4},
        {"loss"},
    ),
    "grpo_reasoner": (
        {**CHAINS, "per_device_train_batch_size": 4, "num_generations": 4, "data_train_size": 8},
        {"reward", "loss"},
    ),
    "dpo_augmenter": (
        {"data_train_size": 8, "preference_candidates": 3, "preference_batch_size": 8, "augmenter_max_new_tokens": 8}
        | {"per_device_train_batch_size": 2},
        {"loss", "rewards/margins"},
    ),
    "grpo_reranker": ({"per_device_train_batch_size": 4, "reranker_candidates": 5, "start_steps": 0}, {"reward"}),
}
# Its trainers are those of dpo_augmenter and distill_retriever, each with a folder of its own.
IN_STEPS = {"self_boost"}


def flags_of(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def test_every_recipe_that_trains_is_here(load_recipe):
    found = {
        path.stem
        for path in (Path(__file__).parents[2] / "recipes").glob("*.py")
        if any(issubclass(one, TrainingArguments) for one in load_recipe(path.stem).ARGUMENTS)
    }
    assert found == {*RECIPES, *IN_STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensorboard_gets_what_is_logged(recipe, run_here, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    changes, tags = RECIPES[recipe]
    settings = {**SMALL, **changes, "output_dir": "out", "report_to": "tensorboard", "disable_tqdm": True}
    assert run_here(recipe, *flags_of(settings)) == 0
    (events,) = Path("out", "runs").glob("*/events.out.tfevents.*")  # where transformers, and so TRL, puts them
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert {f"train/{tag}" for tag in tags} <= set(found.Tags()["scalars"])
    for tag in tags:
        told = {event.step: event.value for event in found.Scalars(f"train/{tag}")}
        assert told == pytest.approx(logged(Path("out"), tag), rel=1e-5, abs=1e-7)
        assert len(told) == 2, "one a step"


@pytest.mark.slow
def test_without_a_tracker_the_run_folder_is_enough(run_here, tmp_path):
    changes, tags = RECIPES["sft_reasoner"]
    assert run_here("sft_reasoner", *flags_of({**SMALL, **changes, "output_dir": tmp_path / "out"})) == 0
    assert not (tmp_path / "out" / "runs").exists()
    assert all(logged(tmp_path / "out", tag) for tag in tags)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0


def test_a_tracker_that_is_not_installed(refused, tmp_path):
    missing = next(
        (name for name, modules in TRACKERS.items() if modules and not any(map(util.find_spec, modules))), ""
    )
    if not missing:
        pytest.skip("every tracker that transformers knows is here")
    line = refused("grpo_generator", "--report_to", missing, "--output_dir", tmp_path / "out")
    assert f"report_to {missing}: " in line
    assert "is not installed: pip install " in line
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_a_tracker_that_there_is_not(refused, tmp_path):
    line = refused("ppo_reasoner", "--report_to", "tensorbord", "--output_dir", tmp_path / "out")
    assert line.endswith("report_to: there is no tracker 'tensorbord'; the closest one is tensorboard")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["build_index", "evaluate_rag"])
def test_what_trains_nothing_reports_nothing(recipe, refused):
    assert "unknown flag --report_to" in refused(recipe, "--report_to", "tensorboard")
