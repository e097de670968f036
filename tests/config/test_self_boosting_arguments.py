"""The flags of self-boosting, and two trainings in one file."""

from __future__ import annotations

import dataclasses

import pytest
from trl import DPOConfig

from rag_rl.config.self_boosting_arguments import BoostArguments, RetrieverTrainingArguments, retriever_training
from rag_rl.errors import ConfigError


@pytest.fixture
def training(tmp_path) -> DPOConfig:
    return DPOConfig(
        output_dir=str(tmp_path), seed=5, max_steps=7, learning_rate=1e-3, save_steps=3, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", lr_scheduler_type="cosine", warmup_steps=0.1, beta=0.3,
    )  # fmt: skip


def test_defaults():
    args = BoostArguments()
    assert (args.boost_rounds, args.gate, args.gate_share, args.gate_min_gain) == (2, True, 0.2, 0.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"boost_rounds": 0}, "boost_rounds must be at least 1, got 0"),
        ({"gate_share": 0.0}, "gate_share must lie between 0 and 1, got 0.0"),
        ({"gate_share": 1.0}, "gate_share must lie between 0 and 1, got 1.0"),
        ({"boost_queries": ["a"]}, "boost_queries names one source a round: 2 are needed, got 1"),
    ],
)
def test_settings_that_mean_nothing(options, expected):
    with pytest.raises(ConfigError, match=expected):
        BoostArguments(**options)


def test_what_is_not_said_of_the_retriever_is_as_for_the_augmenter(training, tmp_path):
    found = retriever_training(RetrieverTrainingArguments(), training)
    assert (found.max_steps, found.learning_rate, found.save_steps, found.seed) == (7, 1e-3, 3, 5)
    assert (found.output_dir, found.warmup_steps, str(found.lr_scheduler_type.value)) == (str(tmp_path), 0.1, "cosine")
    assert (found.group_size, found.num_ranked) == (16, None), "defaults of what the augmenter's training lacks"
    assert not found.gradient_checkpointing


def test_what_is_said_of_the_retriever_holds_for_it_alone(training):
    own = RetrieverTrainingArguments(distill_max_steps=2, distill_learning_rate=1e-4, distill_num_ranked=2)
    found = retriever_training(own, training)
    assert (found.max_steps, found.learning_rate, found.num_ranked) == (2, 1e-4, 2)
    assert (training.max_steps, training.learning_rate) == (7, 1e-3)


def test_values_that_do_not_go_together(training):
    with pytest.raises(ConfigError, match="group_size must be at least 2"):
        retriever_training(RetrieverTrainingArguments(distill_group_size=1), training)
    with pytest.raises(ConfigError, match=r"distill_\.\.\.: "):
        retriever_training(RetrieverTrainingArguments(distill_fp16=True, distill_bf16=True), training)


def test_nobody_sets_folder_or_seed_of_one_part_alone():
    names = {field.name for field in dataclasses.fields(RetrieverTrainingArguments)}
    assert {"distill_group_size", "distill_max_steps", "distill_per_device_train_batch_size"} <= names
    assert not {"distill_output_dir", "distill_seed", "distill_resume_from_checkpoint"} & names
    assert all(field.default is None for field in dataclasses.fields(RetrieverTrainingArguments))
