"""The flags of self-boosting: rounds, the gate, and what of the retriever's training differs from the augmenter's."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Optional

from rag_rl.errors import ConfigError
from rag_rl.trainers.distillation_config import DistillationConfig

RETRIEVER_PREFIX = "distill_"
"""Before the name of a setting of the retriever's training."""

# Those of the run and of its steps, which nobody sets for one part alone.
_OF_THE_RUN = frozenset({"output_dir", "resume_from_checkpoint", "seed", "remove_unused_columns", "use_cpu"})


@dataclass
class BoostArguments:
    """How often the two teach each other, and what is kept of it."""

    boost_rounds: int = field(
        default=2, metadata={"help": "rounds; each writes queries, then trains the augmenter, then the retriever"}
    )
    gate: bool = field(
        default=True,
        metadata={
            "help": "a step that finds no more on held-out synthetic queries is not kept: the next one goes on from "
            "what was there before"
        },
    )
    gate_share: float = field(
        default=0.2,
        metadata={"help": "of the synthetic queries: held out for the gate, and never learnt from in any round"},
    )
    gate_min_gain: float = field(
        default=0.0, metadata={"help": "a step is kept if its nDCG@10 there rises by more than this"}
    )
    boost_queries: list[str] = field(
        default_factory=list,
        metadata={
            "help": "queries that are there already, one source a round: a folder of synthesize_queries, or a "
            "queries.json; by default they are written"
        },
    )
    report_examples: int = field(default=20, metadata={"help": "questions shown in report.html, with what was found"})

    def __post_init__(self) -> None:
        if self.boost_rounds < 1:
            raise ConfigError(f"boost_rounds must be at least 1, got {self.boost_rounds}")
        if not 0.0 < self.gate_share < 1.0:
            raise ConfigError(f"gate_share must lie between 0 and 1, got {self.gate_share}")
        if self.boost_queries and len(self.boost_queries) != self.boost_rounds:
            raise ConfigError(
                f"boost_queries names one source a round: {self.boost_rounds} are needed, got "
                f"{len(self.boost_queries)}"
            )


def _prefixed() -> type[Any]:
    """The retriever's training under names that the augmenter's training has not taken, all of them unset."""
    hints = typing.get_type_hints(DistillationConfig)
    found = [
        (
            f"{RETRIEVER_PREFIX}{one.name}",
            Optional[hints[one.name]],  # noqa: UP045 - a hint of the library's, not one that is written here
            field(default=None, metadata=dict(one.metadata)),
        )
        for one in dataclasses.fields(DistillationConfig)
        if one.init and one.name not in _OF_THE_RUN
    ]
    made = dataclasses.make_dataclass("RetrieverTrainingArguments", found, namespace={"trains_encoder": True})
    made.__module__ = __name__
    return made


RetrieverTrainingArguments: Any = _prefixed()
RetrieverTrainingArguments.__doc__ = (
    "The retriever's training. What is unset is as without the prefix, or, where the augmenter's training knows no "
    "such setting, the default of distill_retriever."
)


def retriever_training(own: Any, training: Any) -> DistillationConfig:
    """Puts the settings of the retriever's training together.

    Args:
        own: ``RetrieverTrainingArguments``.
        training: of the augmenter, with the folder, the seed and the resume point of the run.

    Returns:
        Settings of the trainer.

    Raises:
        ConfigError: they do not go together.
    """
    values: dict[str, Any] = {}
    for one in dataclasses.fields(DistillationConfig):
        if not one.init or one.name == "remove_unused_columns":
            continue
        said = getattr(own, f"{RETRIEVER_PREFIX}{one.name}", None)
        if said is not None:
            values[one.name] = said
        elif hasattr(training, one.name):
            values[one.name] = getattr(training, one.name)
    try:
        return DistillationConfig(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{RETRIEVER_PREFIX}...: {error}") from error
