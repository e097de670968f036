"""The flags of an assembly of finished parts, and of its evaluation; ``rag-rl ask`` reads the same file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rag_rl.errors import ConfigError

BASELINES = ("no_retrieval", "one_shot", "bm25")


@dataclass
class EvaluationArguments:
    """What is evaluated beside the assembly, and where it goes."""

    output_dir: str = field(
        default="",
        metadata={"help": "folder, new or of this very evaluation; by default runs/evaluate_rag-<config>"},
    )
    evaluation_baselines: list[str] = field(
        default_factory=list,
        metadata={
            "help": "other ways to answer the same questions: no_retrieval (the model alone), one_shot (of a "
            "reasoner: one search, one answer), bm25 (in place of augmenter, retriever and reranker)"
        },
    )
    evaluation_batch_size: int = field(
        default=256, metadata={"help": "questions a batch; at most so many answers are lost to a kill"}
    )
    evaluation_depth: int = field(
        default=10,
        metadata={
            "help": "passages searched for where that is more than retriever_top_k, so that ndcg@10 and mrr@10 see "
            "ten ranks; the generator is shown retriever_top_k"
        },
    )
    evaluation_unknown_gold: Literal["error", "drop", "missed"] = field(
        default="error",
        metadata={
            "help": "questions with gold documents that the corpus does not hold: an error, left out (drop), or the "
            "document counts as not found (missed)"
        },
    )
    evaluation_closed_prompt: str = field(
        default="answer_closed_book",
        metadata={"help": "no_retrieval: name of a packaged prompt, or a text file's path; with $question"},
    )
    evaluation_one_shot_prompt: str = field(
        default="answer", metadata={"help": "one_shot: the same with $question and $passages"}
    )
    evaluation_one_shot_top_k: int | None = field(
        default=None,
        metadata={"help": "one_shot: passages; default what the longest chain with an answer sees"},
    )
    evaluation_marker: str = field(
        default="Answer:", metadata={"help": "baselines of a reasoner: what stands before the answer in a reply"}
    )
    report_examples: int = field(
        default=20, metadata={"help": "questions shown in report.html: of the assembly, and of each baseline"}
    )
    seed: int = field(default=42, metadata={"help": "of retriever_shuffled; everything else is deterministic"})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.evaluation_baselines) - set(BASELINES))
        if unknown:
            raise ConfigError(f"evaluation_baselines are {', '.join(BASELINES)}, got {', '.join(unknown)}")
        for name in ("evaluation_batch_size", "evaluation_one_shot_top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class AssemblyArguments:
    """Which parts there are; those that are not named are absent. A part of a run folder keeps the run's settings."""

    retriever_run: str | None = field(
        default=None,
        metadata={
            "help": "run folder of grpo_retriever (its query encoder, over the index of its training) or "
            "distill_retriever (its encoder, of queries and documents)"
        },
    )
    generator_name: str = field(
        default="local",
        metadata={
            "help": "who answers: local (a model in this process), openai (any endpoint of that protocol, see "
            "generator_base_url), or package.module:attribute"
        },
    )
    generator_model: str | None = field(
        default=None,
        metadata={"help": "local: run folder of grpo_generator, folder or Hub id; openai: the endpoint's name of it"},
    )
    generator_base_url: str | None = field(
        default=None, metadata={"help": "openai: the endpoint, as http://host:port/v1; default OPENAI_BASE_URL"}
    )
    generator_api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "openai: environment variable that holds the key"}
    )
    generator_dtype: str | None = field(default=None, metadata={"help": "local: of the weights, e.g. bfloat16"})
    generator_max_new_tokens: int = field(
        default=256, metadata={"help": "budget of an answer, in tokens; of a run its max_completion_length"}
    )
    reasoner_name: str = field(default="local", metadata={"help": "who writes the steps: as generator_name"})
    reasoner_model: str | None = field(
        default=None,
        metadata={
            "help": "a reasoner in place of a generator: run folder of sft_reasoner, ppo_reasoner or grpo_reasoner, "
            "folder or Hub id; openai: the endpoint's name of it"
        },
    )
    reasoner_base_url: str | None = field(default=None, metadata={"help": "as generator_base_url"})
    reasoner_api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "as generator_api_key_env"})
    reasoner_dtype: str | None = field(default=None, metadata={"help": "as generator_dtype"})

    def __post_init__(self) -> None:
        if self.generator_max_new_tokens < 1:
            raise ConfigError(f"generator_max_new_tokens must be at least 1, got {self.generator_max_new_tokens}")
