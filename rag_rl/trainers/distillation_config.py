"""Settings of ``DistillationTrainer``: sentence-transformers' training arguments, and the listwise loss's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainingArguments

from rag_rl.errors import ConfigError


@dataclass
class DistillationConfig(SentenceTransformerTrainingArguments):  # type: ignore[misc]
    """Arguments of the trainer. ``per_device_train_batch_size`` counts queries, each with all of its passages."""

    group_size: int = field(
        default=16, metadata={"help": "G, passages of a query: the first of its list, and negatives drawn of the rest"}
    )
    num_ranked: int | None = field(
        default=None,
        metadata={
            "help": "how many of them are learnt in the teacher's order, the best first; what follows is a negative "
            "of each. 1 is contrastive learning; by default all of them"
        },
    )
    ranking_temperature: float = field(
        default=0.02, metadata={"help": "of the ranking loss: scores are divided by it"}
    )
    augmentation_temperature: float = field(
        default=0.05, metadata={"help": "of the contrast of queries and augmentations"}
    )
    augmentation_weight: float = field(
        default=1.0, metadata={"help": "of that contrast in the loss; 0 leaves augmentations out"}
    )
    norm_weight: float = field(
        default=1.0,
        metadata={"help": "of the term that brings augmentation vectors to length 1, where the encoder does not"},
    )
    augmentation_side: Literal["query", "document"] = field(
        default="query", metadata={"help": "which side of the encoder embeds augmentations in training"}
    )
    mask_known: bool = field(
        default=True,
        metadata={
            "help": "a query's own passage that another query of the batch has too is no negative of it there; the "
            "published code takes it for one"
        },
    )

    # Not from the command line: types that no flag can hold, and that mean nothing for this trainer.
    prompts: Any = field(default=None, init=False)
    batch_sampler: Any = field(default="batch_sampler", init=False)
    multi_dataset_batch_sampler: Any = field(default="proportional", init=False)
    router_mapping: Any = field(default=None, init=False)
    learning_rate_mapping: Any = field(default=None, init=False)
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay off: the trainer reads its queries by their number"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ConfigError(f"group_size must be at least 2, a passage and a negative, got {self.group_size}")
        if self.num_ranked is not None and not 1 <= self.num_ranked <= self.group_size:
            raise ConfigError(
                f"num_ranked must be between 1 and group_size ({self.group_size}), got {self.num_ranked}"
            )
        for name in ("ranking_temperature", "augmentation_temperature"):
            if getattr(self, name) <= 0.0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("augmentation_weight", "norm_weight"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns must stay off: the trainer reads its queries by their number")

    def to_dict(self) -> dict[str, Any]:
        """Every argument, for logs and model cards; without those that are not from the command line.

        Returns:
            Name to value.
        """
        return TrainingArguments.to_dict(self)  # type: ignore[no-any-return]
