from __future__ import annotations

import json
import logging

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from transformers import TrainerControl, TrainerState

from rag_rl.trainers.step_grpo_config import StepGRPOConfig
from rag_rl.trainers.step_grpo_guard import CollapseGuard, Guard, guards_of


class Run:
    """A training as a callback sees it: its state, its switches, and its folder."""

    def __init__(self, folder, **settings):
        bounds = {"guard_min_analysis_words": None, "guard_max_repetition": None, "guard_stop": True}
        shared = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8}
        self.args = StepGRPOConfig(output_dir=str(folder), **{**bounds, **shared, **settings})
        self.guard = CollapseGuard(self.args)
        self.state, self.control, self.folder = TrainerState(), TrainerControl(), folder

    def log(self, **logs):
        self.state.global_step += 1
        self.guard.on_log(self.args, self.state, self.control, logs={"reward": 0.0, **logs})
        return self.control.should_training_stop

    def save(self):
        checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
        checkpoint.mkdir()
        self.guard.on_save(self.args, self.state, self.control)
        return checkpoint


@pytest.mark.parametrize(
    ("guard", "value", "crossed"),
    [
        (Guard("searches", 0.5, least=True), 0.4, True),
        (Guard("searches", 0.5, least=True), 0.5, False),
        (Guard("repetition", 0.5), 0.6, True),
        (Guard("repetition", 0.5), 0.5, False),
    ],
)
def test_a_bound(guard, value, crossed):
    assert guard.crossed(value) is crossed


def test_guards_of_settings(tmp_path):
    run = Run(tmp_path, beta=0.1, guard_max_kl=1.0, guard_min_entropy=0.01, guard_max_zero_variance=0.9)
    assert guards_of(run.args) == [
        Guard("searches", 0.1, least=True),
        Guard("invalid_steps", 0.5),
        Guard("entropy", 0.01, least=True),
        Guard("kl", 1.0),
        Guard("frac_reward_zero_std", 0.9),
    ]


def test_stops_after_so_many_logs_in_a_row(tmp_path, caplog):
    run = Run(tmp_path, guard_patience=2)
    assert not run.log(searches=1.0)
    assert not run.log(searches=0.0)
    assert not run.log(searches=1.0), "one good log in between begins anew"
    assert not run.log(searches=0.05)
    assert run.log(searches=0.02)
    assert run.guard.stopped == "searches is 0.02, below 0.1 (2 logs in a row)"
    assert "step 2: the policy may be collapsing: searches is 0, below 0.1" in caplog.text
    assert "there is no checkpoint to go back to" in caplog.text
    assert not run.args.load_best_model_at_end


def test_what_was_never_kept_is_not_lost(tmp_path):
    run = Run(tmp_path, guard_patience=1)
    assert not any([run.log(invalid_steps=0.9), run.log(invalid_steps=0.8)])
    assert not run.log(invalid_steps=0.4)
    assert run.log(invalid_steps=0.6)


def test_without_guard_stop_it_only_says_so(tmp_path, caplog):
    run = Run(tmp_path, guard_stop=False, guard_patience=1)
    run.log(searches=1.0)
    assert not run.log(searches=0.0)
    assert "may be collapsing" in caplog.text
    run.save()
    assert run.state.best_model_checkpoint is None, "keeping a best checkpoint changes which ones are deleted"


def test_other_logs_and_missing_values_are_nothing(tmp_path):
    run = Run(tmp_path, guard_patience=1)
    run.log(searches=1.0)
    assert not run.log(searches=None)
    assert not run.log(searches=float("nan"))
    run.guard.on_log(run.args, run.state, run.control, logs={"train_loss": 0.1, "searches": 0.0})
    run.guard.on_log(run.args, run.state, run.control, logs=None)
    assert not run.control.should_training_stop


def test_goes_back_to_the_best_of_the_sound_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run = Run(tmp_path, guard_patience=2)
    run.log(searches=1.0, reward=0.5)
    run.log(searches=1.0, reward=0.7)
    best = run.save()
    assert (run.state.best_metric, run.state.best_model_checkpoint) == (0.6, str(best))
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    run.log(searches=1.0, reward=0.55)
    assert run.save() != best
    assert run.state.best_model_checkpoint == str(best), "a lower reward"
    run.log(searches=0.0, reward=0.9)
    run.save()
    assert run.state.best_model_checkpoint == str(best), "a higher one, found by not searching any more"
    assert run.log(searches=0.0, reward=0.9)
    assert run.args.load_best_model_at_end
    assert f"going back to {best}" in caplog.text


def test_a_checkpoint_without_a_log_is_not_compared(tmp_path):
    run = Run(tmp_path)
    run.save()
    assert run.state.best_model_checkpoint is None
