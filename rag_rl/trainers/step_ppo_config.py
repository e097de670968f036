"""Settings of ``StepPPOTrainer``: TRL's of PPO, with the defaults of R3-RAG, and what its rounds need."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

# TRL warns of all that is experimental in it; its version is pinned here.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.ppo import PPOConfig

from rag_rl.errors import ConfigError


@dataclass
class StepPPOConfig(PPOConfig):  # type: ignore[misc]
    """Arguments of the trainer.

    An update is ``per_device_train_batch_size`` x ``gradient_accumulation_steps`` steps on each process, each step one
    episode. ``max_steps`` counts updates and, where it is set, takes the place of ``num_rounds`` x
    ``updates_per_round``. Every ``save_steps`` updates, and after the last one, there is a checkpoint; a run that goes
    on in the middle of a round collects new states for what is left of it.

    Raises:
        ConfigError: a value out of range, or settings of TRL that do not go together.
    """

    num_rounds: int = field(
        default=16, metadata={"help": "rounds; in each the current policy plays questions, and their states are used"}
    )
    updates_per_round: int = field(
        default=4, metadata={"help": "updates on the states of a round; 1 collects new ones before each update"}
    )
    outcome_multiplier: Literal["rollout", "none"] = field(
        default="rollout",
        metadata={
            "help": "rollout: each step is played on to the end of its chain with the current weights, and the end "
            "scales its reward; none: a step that searches earns its process score as it is, which saves that play"
        },
    )
    value_learning_rate: float = field(default=9e-6, metadata={"help": "of the value model; the policy's is its own"})
    rollout_batch_size: int = field(default=64, metadata={"help": "steps written in one pass of the policy"})
    max_dropped: float = field(
        default=0.5,
        metadata={"help": "share of an update's steps that may be left without a reward; above it the run stops"},
    )
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "arguments of from_pretrained, where the model is given by its name"}
    )

    # R3-RAG's (arXiv 2505.23794); TRL has 3e-6, 0.7, 0.05, 0.95 and 4.
    learning_rate: float = field(default=5e-7, metadata={"help": "of the policy"})
    temperature: float = field(default=1.0, metadata={"help": "of the sampling"})
    kl_coef: float = field(default=0.01, metadata={"help": "weight of the KL penalty on each token"})
    lam: float = field(default=1.0, metadata={"help": "lambda of GAE, within a step"})
    num_ppo_epochs: int = field(default=1, metadata={"help": "passes over the steps of an update"})
    # TRL has 0.1, for one optimiser and one gradient norm over both models. Here each has its own.
    vf_coef: float = field(default=1.0, metadata={"help": "weight of the value loss"})
    # transformers has a linear one. A constant one does not depend on how many rounds are planned.
    lr_scheduler_type: str = field(default="constant", metadata={"help": "schedule of both learning rates"})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "gradients of policy and value model are clipped to it, each by itself; 0: not"}
    )
    logging_steps: float = field(default=1, metadata={"help": "updates between two logs, which show their means"})

    # Without it TRL takes the end token away from the policy, which then never stops.
    stop_token: Any = field(default="eos", init=False)
    stop_token_id: Any = field(default=None, init=False)
    # The budget of a step is the setup's.
    response_length: Any = field(default=1, init=False)
    # All of these either have no meaning for steps or follow from others.
    missing_eos_penalty: Any = field(default=None, init=False)
    num_sample_generations: Any = field(default=0, init=False)
    total_episodes: Any = field(default=None, init=False)
    dataset_num_proc: Any = field(default=None, init=False)
    sft_model_path: Any = field(default=None, init=False)
    reward_model_path: Any = field(default=None, init=False)
    world_size: Any = field(default=None, init=False)
    num_total_batches: Any = field(default=None, init=False)
    micro_batch_size: Any = field(default=None, init=False)
    local_batch_size: Any = field(default=None, init=False)
    batch_size: Any = field(default=None, init=False)
    local_mini_batch_size: Any = field(default=None, init=False)
    mini_batch_size: Any = field(default=None, init=False)
    model_adapter_name: Any = field(default=None, init=False)
    ref_adapter_name: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_rounds", "updates_per_round", "rollout_batch_size", "num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "value_learning_rate", "kl_coef", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be below 0, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}: PPO learns from samples")
        if not 0 <= self.max_dropped < 1:
            raise ConfigError(f"max_dropped must be in [0, 1), got {self.max_dropped}")
        if self.outcome_multiplier not in ("rollout", "none"):
            raise ConfigError(f"outcome_multiplier must be rollout or none, got {self.outcome_multiplier!r}")
        if self.num_mini_batches > 1 and self.gradient_accumulation_steps > 1:
            raise ConfigError(
                "num_mini_batches above 1 needs gradient_accumulation_steps 1: TRL makes one optimiser step a batch "
                "where gradients are accumulated"
            )
        if self.local_size % self.num_mini_batches:
            raise ConfigError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) must be a multiple of "
                f"num_mini_batches ({self.num_mini_batches})"
            )
        if self.whiten_rewards and self.local_size // self.num_mini_batches < 8:
            raise ConfigError("whiten_rewards needs at least 8 steps a minibatch")

    @property
    def local_size(self) -> int:
        """Steps of an update on one process."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps)

    @property
    def total_updates(self) -> int:
        """Updates of the whole run."""
        return int(self.max_steps) if self.max_steps > 0 else self.num_rounds * self.updates_per_round
