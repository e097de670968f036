"""The flags of distilling a retriever: which negatives, which teacher, and files that are there already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rag_rl.errors import ConfigError


@dataclass
class DistillationArguments:
    """What a retriever learns of its queries. Defaults are Reinforced-IR's."""

    distill_teacher: Literal["generator", "reranker", "none", "random"] = field(
        default="generator",
        metadata={
            "help": "who ranks a query's passages: generator (the augmenter's own model), reranker "
            "(distill_reranker), none (nobody: contrastive learning on the same passages), or the control "
            "experiment random"
        },
    )
    distill_ranking: Literal["listwise", "likelihood"] = field(
        default="listwise",
        metadata={
            "help": "how the generator ranks: listwise (it is shown all passages and names their order) or likelihood "
            "(the passage first for which it would most likely write the query; needs a model in this process)"
        },
    )
    distill_prompt: str | None = field(
        default=None,
        metadata={
            "help": "name of a packaged prompt, or a text file's path; by default rank_passages, for likelihood "
            "synthesize_query (any prompt that asks for a query, with $passage)"
        },
    )
    distill_max_new_tokens: int = field(default=256, metadata={"help": "listwise: budget of a reply, in tokens"})
    distill_passage_words: int = field(
        default=300, metadata={"help": "passages are cut to so many words for the generator"}
    )
    distill_reranker: str | None = field(
        default=None, metadata={"help": "reranker: cross-encoder, Hub id, or a run folder of train_reranker"}
    )
    distill_batch_size: int = field(
        default=64, metadata={"help": "queries at a time, and after each of them a place to go on from"}
    )
    distill_keep_source: bool = field(
        default=False,
        metadata={
            "help": "the passage that a query was written for stays first wherever the teacher puts it; the published "
            "rule lets the teacher replace it"
        },
    )
    distill_negatives: int = field(default=15, metadata={"help": "negatives that are mined for a query, at most 50"})
    distill_rule: Literal["below_positive", "hard", "random"] = field(
        default="below_positive",
        metadata={
            "help": "which ones: below_positive (from the first rank on whose score is at most distill_ratio of the "
            "positive's), hard (of the ranks 30 to 199) or random (of the corpus)"
        },
    )
    distill_ratio: float = field(default=0.95, metadata={"help": "below_positive: that share"})
    distill_margin: float | None = field(
        default=None,
        metadata={"help": "below_positive: in place of the ratio, how much lower, for encoders with scores below 0"},
    )
    distill_depth: int = field(
        default=200, metadata={"help": "ranks that are searched for negatives (the published code: 2,000)"}
    )
    distill_miner: str | None = field(
        default=None,
        metadata={"help": "another encoder that finds the negatives; by default the one that training starts from"},
    )
    distill_miner_query_prompt: str | None = field(
        default=None, metadata={"help": "the text that it wants before queries, where its model does not say"}
    )
    distill_augment: bool = field(
        default=True, metadata={"help": "queries are augmented, for the contrast with their augmentations"}
    )
    distill_answers: str | None = field(
        default=None,
        metadata={
            "help": "augmentations of the queries that are there already: retriever/answers.json of a run of "
            "dpo_augmenter, or a published one; queries that it lacks are augmented"
        },
    )
    distill_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "published train.jsonl files, before or after distillation, one a corpus, to learn from beside "
            "the queries of data_train; without data_train they are all there is"
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "passage_words", "batch_size", "negatives", "depth"):
            if getattr(self, f"distill_{name}") < 1:
                raise ConfigError(f"distill_{name} must be at least 1, got {getattr(self, f'distill_{name}')}")
        if self.distill_negatives > 50:
            raise ConfigError(f"distill_negatives must be at most 50, got {self.distill_negatives}")
        if self.distill_ratio <= 0.0:
            raise ConfigError(f"distill_ratio must be above 0, got {self.distill_ratio}")
        if self.distill_margin is not None and self.distill_margin < 0.0:
            raise ConfigError(f"distill_margin must be at least 0, got {self.distill_margin}")
        if self.distill_teacher == "reranker" and not self.distill_reranker:
            raise ConfigError("distill_teacher reranker needs one: set distill_reranker")
