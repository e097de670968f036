"""The flags of a reranker: its data, the cross-encoder, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rag_rl.errors import ConfigError


@dataclass
class RerankerArguments:
    """What a reranker is trained on, and what of it. Without ``train_file`` its rows are mined with the retriever."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "rows of queries with positives and negatives (docs/data_formats.md); by default they are mined: "
            "the retriever searches data_corpus for the questions of data_train"
        },
    )
    valid_file: str | None = field(
        default=None,
        metadata={"help": "held-out rows of the same form; by default they are split off train_file, by valid_size"},
    )
    valid_size: float = field(
        default=0.1, metadata={"help": "rows split off train_file: a share below 1, or from 1 on their number"}
    )
    reranker_model: str = field(
        default="", metadata={"help": "cross-encoder, or an encoder that gets a new head: Hub id, or folder"}
    )
    reranker_max_length: int | None = field(
        default=None, metadata={"help": "override the limit of a pair, query and document together, in tokens"}
    )
    reranker_pooling: Literal["cls", "mean"] | None = field(
        default=None,
        metadata={
            "help": "override what a head reads: the first token, or the mean of all; for models whose config has "
            "classifier_pooling (ModernBERT). mean suits an encoder without a token of its own for it"
        },
    )
    reranker_dtype: str | None = field(default=None, metadata={"help": "weights of the cross-encoder, e.g. bfloat16"})
    reranker_train: Literal["full", "lora", "qlora"] = field(
        default="full",
        metadata={
            "help": "all weights; LoRA in all linear layers of the body; or the same over a body in 4 bits (NF4, "
            "double quantisation). The head is trained whole each time"
        },
    )
    reranker_lora_r: int = field(default=16, metadata={"help": "lora, qlora: rank"})
    reranker_lora_alpha: int = field(default=32, metadata={"help": "lora, qlora: scale, times 1 / rank"})
    reranker_lora_dropout: float = field(default=0.0, metadata={"help": "lora, qlora: dropout before the adapter"})
    reranker_candidates: int = field(
        default=20, metadata={"help": "N, documents that the retriever finds for a query and the reranker orders"}
    )
    reranker_retriever_weight: float = field(
        default=0.0,
        metadata={
            "help": "in evaluation and use: part of the retriever's own score in the order, in [0, 1]; both are "
            "standardised over the candidates of a query. Choose it on training queries"
        },
    )
    reranker_false_negative_margin: float | None = field(
        default=None,
        metadata={
            "help": "mining: what scores above (1 - margin) times the gold document's score is no negative, since it "
            "may well be relevant; 0.05 is usual where judgements are incomplete"
        },
    )
    reranker_batch_size: int = field(default=64, metadata={"help": "pairs a batch in evaluation"})

    def __post_init__(self) -> None:
        for name in ("reranker_candidates", "reranker_batch_size", "reranker_lora_r"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.valid_size <= 0:
            raise ConfigError(f"valid_size must be above 0, got {self.valid_size}")
        if not 0.0 <= self.reranker_retriever_weight <= 1.0:
            raise ConfigError(f"reranker_retriever_weight must lie in [0, 1], got {self.reranker_retriever_weight}")
        margin = self.reranker_false_negative_margin
        if margin is not None and not 0.0 <= margin <= 1.0:
            raise ConfigError(f"reranker_false_negative_margin must lie in [0, 1], got {margin}")
        if self.valid_file and not self.train_file:
            raise ConfigError("valid_file is set, but train_file is not: held-out questions for mining are data_eval")
