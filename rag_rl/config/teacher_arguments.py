"""The flags of a reasoner's cold start: who writes the chains, and which of them are learnt from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rag_rl.errors import ConfigError


@dataclass
class TeacherArguments:
    """Who writes chains for a reasoner to learn from. Defaults of attempts, steps and temperature are the paper's."""

    teacher_name: str = field(
        default="oracle",
        metadata={
            "help": "oracle (follows the decomposition or the evidence that comes with a question; no model), local "
            "(a model in this process), openai (any endpoint of that protocol, see teacher_base_url), or "
            "package.module:attribute"
        },
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "local: Hub id or folder; openai: the endpoint's name of it"}
    )
    teacher_base_url: str | None = field(
        default=None,
        metadata={"help": "openai: the endpoint, as http://host:port/v1; default OPENAI_BASE_URL or OpenAI's own"},
    )
    teacher_api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "openai: environment variable with the key; none is needed on this machine"},
    )
    teacher_type: Literal["base", "instruct"] = field(
        default="instruct", metadata={"help": "instruct gets chat turns, base plain text (completions)"}
    )
    teacher_first_prompt: str = field(
        default="r3_first_step",
        metadata={"help": "of the first step: name of a packaged prompt, or a text file's path; with $question"},
    )
    teacher_next_prompt: str = field(
        default="r3_next_step", metadata={"help": "of every other step: the same, with $question and $steps"}
    )
    teacher_max_attempts: int = field(
        default=7, metadata={"help": "chains a question until one is right; the oracle has one"}
    )
    teacher_max_steps: int = field(
        default=7, metadata={"help": "steps of a chain, the one that answers included; more than a reasoner will have"}
    )
    teacher_tries: int = field(
        default=2, metadata={"help": "how often a step that cannot be read is written, where it is sampled"}
    )
    teacher_temperature: float = field(
        default=0.9, metadata={"help": "of the second and every further attempt; the first one is greedy"}
    )
    teacher_max_new_tokens: int = field(default=256, metadata={"help": "budget of a step, in tokens"})
    teacher_seed: int = field(default=0, metadata={"help": "of the sampling, where the teacher heeds one"})
    teacher_batch_size: int = field(
        default=64, metadata={"help": "questions that are played at a time; local: prompts a batch as well"}
    )
    teacher_concurrency: int = field(default=16, metadata={"help": "openai: requests at a time"})
    teacher_timeout_s: float = field(default=60.0, metadata={"help": "openai: patience for one request, in seconds"})
    teacher_max_retries: int = field(
        default=4, metadata={"help": "openai: repeats of a request after 429, 5xx, a lost connection or a time-out"}
    )
    teacher_extra_body: dict[str, Any] = field(
        default_factory=dict, metadata={"help": 'openai: more fields of each request, {"reasoning_effort": "low"}'}
    )

    def __post_init__(self) -> None:
        for name in ("max_attempts", "max_steps", "tries", "max_new_tokens", "batch_size", "concurrency"):
            value = getattr(self, f"teacher_{name}")
            if value < 1:
                raise ConfigError(f"teacher_{name} must be at least 1, got {value}")
        if self.teacher_temperature < 0.0:
            raise ConfigError(f"teacher_temperature must be at least 0, got {self.teacher_temperature}")


@dataclass
class ColdStartArguments:
    """Which chains a reasoner learns from."""

    coldstart_path: str | None = field(
        default=None,
        metadata={
            "help": "trajectories.jsonl of build_trajectories; by default the teacher writes chains for data_train "
            "into the run folder first"
        },
    )
    coldstart_states: list[Literal["correct", "incorrect", "fail", "invalid"]] = field(
        default_factory=lambda: ["correct"],
        metadata={"help": "end states of the chains that are learnt from; an invalid step is never learnt"},
    )
    coldstart_size: int | None = field(
        default=None, metadata={"help": "chains that are learnt from, at most; drawn by the seed"}
    )
    coldstart_validation: float = field(
        default=0.0,
        metadata={"help": "share of the questions whose chains are kept for eval_loss (with eval_strategy)"},
    )

    def __post_init__(self) -> None:
        if not self.coldstart_states:
            raise ConfigError("coldstart_states must name one or more end states, got none")
        if self.coldstart_size is not None and self.coldstart_size < 1:
            raise ConfigError(f"coldstart_size must be at least 1, got {self.coldstart_size}")
        if not 0.0 <= self.coldstart_validation < 1.0:
            raise ConfigError(f"coldstart_validation must lie in [0, 1), got {self.coldstart_validation}")
