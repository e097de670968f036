"""Settings of ``RetrieverGRPOTrainer``: sentence-transformers' training arguments, and what GRPO over lists needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainingArguments

from rag_rl.errors import ConfigError


@dataclass
class RetrieverGRPOConfig(SentenceTransformerTrainingArguments):  # type: ignore[misc]
    """Arguments of the trainer; names are TRL's where TRL has one.

    ``per_device_train_batch_size`` counts trajectories, as TRL counts completions: with 128 of them on one device and
    groups of 8, a step asks 16 questions.
    """

    num_generations: int = field(default=8, metadata={"help": "G, trajectories a question; at least 2"})
    num_candidates: int = field(
        default=30, metadata={"help": "K, the best passages of a state among which a list is sampled"}
    )
    alpha: float = field(
        default=0.05,
        metadata={
            "help": "temperature of the Plackett-Luce policy: scores are divided by it. It depends on the encoder: "
            "watch effective_pool, the number of candidates that are really in play"
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "optimiser steps a batch of trajectories"})
    epsilon: float = field(default=0.2, metadata={"help": "the ratio of a hop is clipped below 1 - epsilon"})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "and above 1 + epsilon_high; by default the same as epsilon"}
    )
    beta: float = field(
        default=0.0, metadata={"help": "weight of the KL divergence of the first pick to the encoder at the start"}
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group", metadata={"help": "advantages are divided by the standard deviation of their group or batch"}
    )
    advantage_baseline: Literal["mean", "leave_one_out"] = field(
        default="mean", metadata={"help": "what is subtracted from a reward: the group's mean, or that of the others"}
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = field(
        default="grpo",
        metadata={
            "help": "grpo: mean over the hops of a trajectory, then over trajectories; dapo: mean over all hops; "
            "dr_grpo: sum over hops, divided by a constant"
        },
    )
    objective: Literal["grpo", "replug"] = field(
        default="grpo",
        metadata={"help": "replug: the baseline that distils what the reader makes of each candidate alone"},
    )
    replug_temperature: float = field(
        default=0.1, metadata={"help": "replug: temperature of the target, over F1 in [0, 1]"}
    )
    drop_zero_variance: bool = field(
        default=True, metadata={"help": "leave groups whose rewards are all alike out of the loss and its mean"}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "write every sampled trajectory to <output_dir>/completions"}
    )

    # Not from the command line: types that no flag can hold, and that mean nothing for this trainer.
    prompts: Any = field(default=None, init=False)
    batch_sampler: Any = field(default="batch_sampler", init=False)
    multi_dataset_batch_sampler: Any = field(default="proportional", init=False)
    router_mapping: Any = field(default=None, init=False)
    learning_rate_mapping: Any = field(default=None, init=False)
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay off: the trainer reads its questions by their number"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ConfigError(f"num_generations must be at least 2, got {self.num_generations}: a group is compared")
        if self.num_iterations < 1:
            raise ConfigError(f"num_iterations must be at least 1, got {self.num_iterations}")
        if self.alpha <= 0:
            raise ConfigError(f"alpha must be above 0, got {self.alpha}")
        if self.num_candidates < 2:
            raise ConfigError(f"num_candidates must be at least 2, got {self.num_candidates}")
        if self.trajectories_per_device % self.num_generations:
            raise ConfigError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) x gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}) must be a multiple of num_generations ({self.num_generations})"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every argument, for logs and model cards; without those that are not from the command line.

        Returns:
            Name to value.
        """
        return TrainingArguments.to_dict(self)  # type: ignore[no-any-return]

    @property
    def trajectories_per_device(self) -> int:
        """Trajectories that one process samples for one optimiser step."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps)
