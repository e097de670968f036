"""Settings of runs that only show that a recipe runs in some way: two steps, of as little as there can be."""

from __future__ import annotations

from typing import Any

# Two steps of two rows a process; with ``max_steps`` 2.
BRIEF: dict[str, dict[str, Any]] = {
    "sft_reasoner": {
        "data_train_size": 6, "data_eval_size": 3, "reasoner_baselines": "[]", "reasoner_max_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "dpo_augmenter": {
        "data_train_size": 6, "data_eval_size": 3, "preference_candidates": 3, "preference_batch_size": 6,
        "augmenter_max_new_tokens": 8, "per_device_train_batch_size": 2,
    },
    "grpo_generator": {
        "data_train_size": 8, "data_eval_size": 3, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 12, "headroom_samples": 0, "reward_names": "summing:digest", "reward_weights": 1.0,
    },
    "grpo_reasoner": {
        "data_train_size": 4, "data_eval_size": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "num_generations": 4, "reasoner_max_steps": 2, "reasoner_baselines": "[]", "max_completion_length": 256,
    },
}  # fmt: skip

# A reward that differs between any two completions, however short: there is something to learn in every group.
SUMMING = """
def digest(*, completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]
"""
