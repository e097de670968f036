"""Settings of ``StepGRPOTrainer``: TRL's of GRPO, how steps are credited, and guards against a collapse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig

from rag_rl.errors import ConfigError


@dataclass
class StepGRPOConfig(GRPOConfig):  # type: ignore[misc]
    """Arguments of the trainer.

    ``max_completion_length`` is the budget of a whole chain: steps and documents; ``num_generations`` counts chains
    a question.

    Raises:
        ConfigError: a value out of range, or a setting of TRL that chains do not go with.
    """

    step_credit: Literal["trajectory", "step", "return_to_go"] = field(
        default="trajectory",
        metadata={
            "help": "what the tokens of a step are credited with: trajectory (the mean reward of the chain's steps), "
            "step (the step's own reward) or return_to_go (its own and all later ones); the latter two are compared "
            "with the same step of the question's other chains"
        },
    )
    guard_stop: bool = field(
        default=False,
        metadata={
            "help": "stop where a guard below is crossed guard_patience logs in a row, and go back to the checkpoint "
            "with the best reward; crossed guards are logged in any case"
        },
    )
    guard_patience: int = field(default=3, metadata={"help": "logs in a row that a guard must be crossed in"})
    guard_min_searches: float | None = field(default=0.1, metadata={"help": "fewest searches a question"})
    guard_max_invalid_steps: float | None = field(
        default=0.5, metadata={"help": "largest share of steps that cannot be parsed"}
    )
    guard_min_analysis_words: float | None = field(
        default=2.0, metadata={"help": "shortest mean length of an analysis, in words"}
    )
    guard_max_repetition: float | None = field(
        default=0.5, metadata={"help": "largest share of a step's 4-grams that repeat earlier ones of the same step"}
    )
    guard_min_entropy: float | None = field(default=None, metadata={"help": "smallest mean entropy of a token, nats"})
    guard_max_kl: float | None = field(
        default=None, metadata={"help": "largest KL divergence a token from the start model; needs beta above 0"}
    )
    guard_max_zero_variance: float | None = field(
        default=None, metadata={"help": "largest share of chains in groups whose rewards are all alike"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_credit not in ("trajectory", "step", "return_to_go"):
            raise ConfigError(f"step_credit must be trajectory, step or return_to_go, got {self.step_credit!r}")
        if self.guard_patience < 1:
            raise ConfigError(f"guard_patience must be at least 1, got {self.guard_patience}")
        if self.guard_max_kl is not None and not self.beta:
            raise ConfigError("guard_max_kl needs a KL term: set beta above 0")
        if self.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel computes the loss where the mask of the documents cannot be audited: leave it off"
            )
