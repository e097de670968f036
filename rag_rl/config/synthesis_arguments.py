"""The flags of query synthesis: who writes queries for which passages, and how they are checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rag_rl.errors import ConfigError


@dataclass
class SynthesisArguments:
    """Who writes queries for passages. Defaults of passages, temperature and characters are those of Reinforced-IR."""

    with_answers: bool = field(
        default=False,
        metadata={"help": "also write answers, which must stand in the passage: questions for the other recipes"},
    )
    synthesis_writer: str = field(
        default="local",
        metadata={
            "help": "local (a model in this process), openai (any endpoint of that protocol, see synthesis_base_url), "
            "sentences (a sentence of the passage, no model), or package.module:attribute"
        },
    )
    synthesis_model: str | None = field(
        default=None, metadata={"help": "local: Hub id or folder; openai: the endpoint's name of it"}
    )
    synthesis_base_url: str | None = field(
        default=None,
        metadata={"help": "openai: the endpoint, as http://host:port/v1; default OPENAI_BASE_URL or OpenAI's own"},
    )
    synthesis_api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "openai: environment variable with the key; none is needed on this machine"},
    )
    synthesis_type: Literal["base", "instruct"] = field(
        default="instruct", metadata={"help": "instruct gets chat turns, base plain text (completions)"}
    )
    synthesis_task: str = field(
        default="default",
        metadata={"help": "what queries and passages are: a set of BEIR or AIR-Bench, or an entry of synthesis_tasks"},
    )
    synthesis_tasks: str | None = field(
        default=None, metadata={"help": "YAML file with tasks of your own; rag_rl/prompts/tasks.yaml shows the form"}
    )
    synthesis_prompt: str | None = field(
        default=None,
        metadata={
            "help": "name of a packaged prompt, or a text file's path; default synthesize_query, with_answers "
            "synthesize_query_answer"
        },
    )
    synthesis_form: Literal["question", "keywords"] = field(
        default="question",
        metadata={
            "help": "question (as it was written) or keywords (what is kept loses its function words, as people type "
            "into a search box; English only)"
        },
    )
    synthesis_answer_marker: str = field(default="Answer:", metadata={"help": "what stands before an answer"})
    synthesis_passages: int | None = field(
        default=15_000, metadata={"help": "passages to write queries for, at most; null for all"}
    )
    synthesis_per_passage: int = field(default=1, metadata={"help": "queries a passage"})
    synthesis_attempts: int = field(default=2, metadata={"help": "drafts of a query until one passes"})
    synthesis_max_passage_chars: int = field(
        default=8000, metadata={"help": "passages are cut to so many characters in prompts"}
    )
    synthesis_temperature: float = field(default=0.5, metadata={"help": "of the drafts"})
    synthesis_top_p: float = field(default=1.0, metadata={"help": "share of the mass that drafts are sampled from"})
    synthesis_max_new_tokens: int = field(default=128, metadata={"help": "budget of a reply, in tokens"})
    synthesis_check: Literal["relevance", "answer", "none"] = field(
        default="relevance",
        metadata={
            "help": "relevance (the model says whether the passage serves the query), answer (the model, reading the "
            "passage, must give the written answer; needs with_answers) or none"
        },
    )
    synthesis_check_prompt: str | None = field(
        default=None,
        metadata={"help": "name of a packaged prompt, or a text file's path; default check_query; for answer: answer"},
    )
    synthesis_batch_size: int = field(
        default=64, metadata={"help": "queries at a time, and after each of them a place to go on from"}
    )
    synthesis_concurrency: int = field(default=16, metadata={"help": "openai: requests at a time"})
    synthesis_timeout_s: float = field(default=60.0, metadata={"help": "openai: patience for one request, in seconds"})
    synthesis_max_retries: int = field(
        default=4, metadata={"help": "openai: repeats of a request after 429, 5xx, a lost connection or a time-out"}
    )
    synthesis_extra_body: dict[str, Any] = field(
        default_factory=dict, metadata={"help": 'openai: more fields of each request, {"reasoning_effort": "low"}'}
    )

    def __post_init__(self) -> None:
        for name in ("passages", "per_passage", "attempts", "max_passage_chars", "max_new_tokens", "batch_size"):
            value = getattr(self, f"synthesis_{name}")
            if value is not None and value < 1:
                raise ConfigError(f"synthesis_{name} must be at least 1, got {value}")
        if self.synthesis_temperature < 0.0:
            raise ConfigError(f"synthesis_temperature must be at least 0, got {self.synthesis_temperature}")
        if not 0.0 < self.synthesis_top_p <= 1.0:
            raise ConfigError(f"synthesis_top_p must be above 0 and at most 1, got {self.synthesis_top_p}")
        if self.synthesis_check == "answer" and not self.with_answers:
            raise ConfigError("synthesis_check answer needs answers to check: set with_answers true")
        if self.synthesis_writer == "sentences" and self.with_answers:
            raise ConfigError("synthesis_writer sentences writes no answers: set with_answers false")
