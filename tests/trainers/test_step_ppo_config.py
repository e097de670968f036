"""rag_rl.trainers.step_ppo_config: the paper's defaults, and settings that do not go together."""

from __future__ import annotations

import dataclasses

import pytest

from rag_rl.errors import ConfigError
from rag_rl.trainers.step_ppo_config import StepPPOConfig


def make(**settings):
    return StepPPOConfig(**{"output_dir": "out", "use_cpu": True, "bf16": False, **settings})


def test_defaults_are_the_papers():
    config = make()
    assert (config.learning_rate, config.value_learning_rate) == (5e-7, 9e-6)
    assert (config.kl_coef, config.gamma, config.lam) == (0.01, 1.0, 1.0)
    assert (config.cliprange, config.cliprange_value, config.num_ppo_epochs) == (0.2, 0.2, 1)
    assert (config.temperature, config.outcome_multiplier) == (1.0, "rollout")


def test_what_trl_gets_wrong_for_steps():
    config = make()
    assert config.stop_token == "eos"
    assert config.num_sample_generations == 0
    assert config.missing_eos_penalty is None
    assert config.max_grad_norm == 1.0
    assert str(config.lr_scheduler_type.value) == "constant"


def test_what_the_trainer_computes_is_no_flag():
    flags = {field.name for field in dataclasses.fields(StepPPOConfig) if field.init}
    assert not flags & {"stop_token", "response_length", "total_episodes", "reward_model_path", "batch_size"}
    assert flags >= {"num_rounds", "updates_per_round", "outcome_multiplier", "save_total_limit", "seed", "kl_coef"}


@pytest.mark.parametrize(
    ("settings", "updates"),
    [({"num_rounds": 3, "updates_per_round": 5}, 15), ({"num_rounds": 3, "max_steps": 7}, 7)],
)
def test_total_updates(settings, updates):
    assert make(**settings).total_updates == updates


def test_local_size():
    assert make(per_device_train_batch_size=4, gradient_accumulation_steps=8).local_size == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"updates_per_round": 0}, "updates_per_round must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"value_learning_rate": -1.0}, "value_learning_rate must not be below 0"),
        ({"max_dropped": 1.0}, r"max_dropped must be in \[0, 1\), got 1.0"),
        ({"outcome_multiplier": "judge"}, "outcome_multiplier must be rollout or none, got 'judge'"),
        ({"num_mini_batches": 2, "gradient_accumulation_steps": 2}, "needs gradient_accumulation_steps 1"),
        ({"num_mini_batches": 3, "per_device_train_batch_size": 8}, "must be a multiple of num_mini_batches"),
        ({"whiten_rewards": True, "per_device_train_batch_size": 4}, "whiten_rewards needs at least 8"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
