"""The flags of a query augmenter: how it is asked and used, which model it is, and what it learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rag_rl.errors import ConfigError


@dataclass
class AugmenterArguments:
    """How an augmenter is asked, and how what it writes enters a query's vector. Defaults are Reinforced-IR's."""

    augmenter_prompt: str = field(
        default="augment_query",
        metadata={
            "help": "name of a packaged prompt, or a text file's path; with $query or $question and, if it likes, "
            "$task and $answer_type"
        },
    )
    augmenter_task: str = field(
        default="default",
        metadata={"help": "what is searched for: a set of BEIR or AIR-Bench, or an entry of augmenter_tasks"},
    )
    augmenter_tasks: str | None = field(
        default=None, metadata={"help": "YAML file with tasks of your own; rag_rl/prompts/tasks.yaml shows the form"}
    )
    augmenter_answer_type: str | None = field(
        default=None, metadata={"help": "what an augmentation is written as; by default what the task says"}
    )
    augmenter_max_new_tokens: int = field(default=300, metadata={"help": "budget of an augmentation, in tokens"})
    augmenter_weight: float = field(
        default=0.8,
        metadata={"help": "of the query in the mix; the augmentation has the rest, and at 1 there is none"},
    )
    augmenter_prefix: str = field(
        default="Generate the topic about this passage: ",
        metadata={"help": "put before each augmentation when it is embedded"},
    )
    augmenter_side: Literal["document", "query"] = field(
        default="document", metadata={"help": "which side of the encoder embeds augmentations"}
    )
    augmenter_batch_size: int = field(default=64, metadata={"help": "augmentations a pass of a model in this process"})

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, f"augmenter_{name}")
            if value < 1:
                raise ConfigError(f"augmenter_{name} must be at least 1, got {value}")
        if not 0.0 <= self.augmenter_weight <= 1.0:
            raise ConfigError(f"augmenter_weight must lie in [0, 1], got {self.augmenter_weight}")


@dataclass
class AugmenterModelArguments:
    """Who augments, where the augmenter itself is not trained."""

    augmenter_name: str = field(
        default="local",
        metadata={
            "help": "local (a model in this process), openai (any endpoint of that protocol, see augmenter_base_url), "
            "none (queries stay as they are), or package.module:attribute"
        },
    )
    augmenter_model: str | None = field(
        default=None,
        metadata={
            "help": "local: Hub id, folder, or a run folder of dpo_augmenter, with an adapter or merged; openai: the "
            "endpoint's name of it"
        },
    )
    augmenter_adapter: str | None = field(
        default=None, metadata={"help": "local: folder or Hub id of a LoRA adapter on top of augmenter_model"}
    )
    augmenter_dtype: str | None = field(default=None, metadata={"help": "local: of the weights, e.g. bfloat16"})
    augmenter_base_url: str | None = field(
        default=None,
        metadata={"help": "openai: the endpoint, as http://host:port/v1; default OPENAI_BASE_URL or OpenAI's own"},
    )
    augmenter_api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "openai: environment variable with the key; none is needed on this machine"},
    )
    augmenter_concurrency: int = field(default=16, metadata={"help": "openai: requests at a time"})
    augmenter_timeout_s: float = field(default=60.0, metadata={"help": "openai: patience for one request, in seconds"})
    augmenter_max_retries: int = field(
        default=4, metadata={"help": "openai: repeats of a request after 429, 5xx, a lost connection or a time-out"}
    )
    augmenter_extra_body: dict[str, Any] = field(
        default_factory=dict, metadata={"help": 'openai: more fields of each request, {"reasoning_effort": "low"}'}
    )


@dataclass
class PreferenceArguments:
    """Which augmentations are compared, and what makes one of them better. Defaults are Reinforced-IR's."""

    preference_file: str | None = field(
        default=None,
        metadata={"help": "pairs to learn from, in the published form (train.jsonl); by default they are made"},
    )
    preference_base_url: str | None = field(
        default=None,
        metadata={
            "help": "an OpenAI-compatible endpoint that serves model_name_or_path, to sample candidates from; by "
            "default they are sampled in this process"
        },
    )
    preference_api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "environment variable with the endpoint's key; none is needed on this machine"},
    )
    preference_candidates: int = field(default=10, metadata={"help": "n, augmentations sampled to each query"})
    preference_temperature: float = field(default=0.9, metadata={"help": "of the sampling"})
    preference_top_p: float = field(default=0.9, metadata={"help": "share of the mass that is sampled from"})
    preference_batch_size: int = field(
        default=64, metadata={"help": "queries at a time, and after each of them a place to go on from"}
    )
    preference_signal: Literal["published", "margin", "rank", "constant", "random"] = field(
        default="published",
        metadata={
            "help": "published (similarity to the query's passage), margin over the best mined negative, rank among "
            "them (its reciprocal); or a control experiment: constant (there is no pair), random"
        },
    )
    preference_threshold: float = field(
        default=0.95,
        metadata={"help": "published: the worst of a query's augmentations has at most this share of the best one's"},
    )
    preference_negatives: int = field(
        default=15, metadata={"help": "margin, rank: other passages that the bare query finds first, its negatives"}
    )
    preference_false_negative_margin: float | None = field(
        default=None,
        metadata={
            "help": "margin, rank: what scores above (1 - margin) times the passage's own score is no negative, since "
            "it may well be relevant; 0.05 is usual where several passages can answer"
        },
    )
    preference_side: Literal["document", "query"] | None = field(
        default=None,
        metadata={
            "help": "which side of the encoder embeds candidates; by default augmenter_side, as in use (the published "
            "code embeds them as queries)"
        },
    )
    preference_min_gain: float = field(
        default=0.0, metadata={"help": "margin, rank: how far the better one must be above the bare query"}
    )
    preference_min_gap: float = field(
        default=0.0, metadata={"help": "margin, rank: how far the worse one must be below the better one"}
    )
    preference_per_query: int = field(default=1, metadata={"help": "margin, rank: pairs a query, at most"})
    preference_length_penalty: float = field(
        default=0.0, metadata={"help": "margin, rank: taken off the signal for each token of an augmentation"}
    )
    preference_max_length_ratio: float | None = field(
        default=None,
        metadata={"help": "margin, rank: the longer one of a pair has at most so many times the tokens of the other"},
    )

    def __post_init__(self) -> None:
        least = {"candidates": 2, "batch_size": 1, "negatives": 1, "per_query": 1}
        for name, low in least.items():
            value = getattr(self, f"preference_{name}")
            if value < low:
                raise ConfigError(f"preference_{name} must be at least {low}, got {value}")
        for name in ("temperature", "threshold"):
            value = getattr(self, f"preference_{name}")
            if value <= 0.0:
                raise ConfigError(f"preference_{name} must be above 0, got {value}")
        if not 0.0 < self.preference_top_p <= 1.0:
            raise ConfigError(f"preference_top_p must be above 0 and at most 1, got {self.preference_top_p}")
        for name in ("min_gain", "min_gap", "length_penalty"):
            value = getattr(self, f"preference_{name}")
            if value < 0.0:
                raise ConfigError(f"preference_{name} must be at least 0, got {value}")
        margin = self.preference_false_negative_margin
        if margin is not None and not 0.0 <= margin <= 1.0:
            raise ConfigError(f"preference_false_negative_margin must lie in [0, 1], got {margin}")
        ratio = self.preference_max_length_ratio
        if ratio is not None and ratio < 1.0:
            raise ConfigError(f"preference_max_length_ratio must be at least 1, got {ratio}")
        if self.preference_signal == "published":
            neutral = {
                "min_gain": 0.0,
                "min_gap": 0.0,
                "length_penalty": 0.0,
                "max_length_ratio": None,
                "per_query": 1,
            }
            for name, default in neutral.items():
                if getattr(self, f"preference_{name}") != default:
                    raise ConfigError(
                        f"preference_{name} has no effect with preference_signal published: take margin or rank, or "
                        "leave it out"
                    )
