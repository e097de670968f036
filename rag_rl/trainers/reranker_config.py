"""Settings of ``RerankerTrainer``: sentence-transformers' training arguments, and how negatives are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments
from transformers import TrainingArguments

from rag_rl.errors import ConfigError


@dataclass
class RerankerConfig(CrossEncoderTrainingArguments):  # type: ignore[misc]
    """Arguments of the trainer. ``per_device_train_batch_size`` counts queries, each with all of its documents."""

    loss_type: Literal["margin", "ranknet", "listnet", "lambda"] = field(
        default="margin",
        metadata={
            "help": "margin: hinge over pairs of a positive and a negative; of sentence-transformers: ranknet (soft "
            "pairwise), listnet (listwise), lambda (LambdaLoss, weighted by nDCG)"
        },
    )
    margin: float = field(
        default=1.0, metadata={"help": "margin: by how much a positive should lead a negative, in logits"}
    )
    num_negatives: int = field(default=7, metadata={"help": "negatives drawn for a query, anew in every epoch"})
    num_positives: int | None = field(
        default=None, metadata={"help": "positives drawn for a query that has more; by default all"}
    )
    hard_share: float = field(
        default=0.5,
        metadata={"help": "share of hard negatives, the row's own; the others are random documents of other queries"},
    )
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "pairs a forward pass; by default all of a batch at once"}
    )

    # Not from the command line: types that no flag can hold, and that mean nothing for this trainer.
    prompts: Any = field(default=None, init=False)
    batch_sampler: Any = field(default="batch_sampler", init=False)
    multi_dataset_batch_sampler: Any = field(default="proportional", init=False)
    router_mapping: Any = field(default=None, init=False)
    learning_rate_mapping: Any = field(default=None, init=False)
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay off: the trainer reads its rows by their number"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            # A cross-encoder's forward gives a BatchEncoding, in which DistributedDataParallel finds no tensor: it
            # would take every parameter for an unused one, and stop when the first gradient comes.
            self.ddp_find_unused_parameters = False
        if self.margin <= 0:
            raise ConfigError(f"margin must be above 0, got {self.margin}")
        if self.num_negatives < 1:
            raise ConfigError(f"num_negatives must be at least 1, got {self.num_negatives}")
        if self.num_positives is not None and self.num_positives < 1:
            raise ConfigError(f"num_positives must be at least 1, got {self.num_positives}")
        if not 0.0 <= self.hard_share <= 1.0:
            raise ConfigError(f"hard_share must lie in [0, 1], got {self.hard_share}")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ConfigError(f"mini_batch_size must be at least 1, got {self.mini_batch_size}")
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns must stay off: the trainer reads its rows by their number")

    def to_dict(self) -> dict[str, Any]:
        """Every argument, for logs and model cards; without those that are not from the command line.

        Returns:
            Name to value.
        """
        return TrainingArguments.to_dict(self)  # type: ignore[no-any-return]
