"""Trains a cross-encoder on pairs whose negatives are drawn anew in every epoch, and evaluates it on whole lists.

What sentence-transformers' ``CrossEncoderTrainer`` does is left to it. Added are: batches whose documents follow from
the epoch, the same after a resume; losses over lists of any length; a type error inside a loss that is seen (theirs
takes it for a loss without prompts and calls it again); and the resume of LoRA adapters, also over a quantised base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.cross_encoder.trainer import CrossEncoderTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rag_rl import metrics
from rag_rl.errors import ConfigError, RagRLError
from rag_rl.trainers.pairwise_margin import ranking_loss
from rag_rl.trainers.reranker_config import RerankerConfig

RankedList = tuple[str, Sequence[str], Sequence[float]]
"""A query, its documents, and a label for each: above 0 for one that answers it."""


class PairSource(Protocol):
    """What draws the documents of a query, such as ``rag_rl.data.PairSampler``."""

    def __len__(self) -> int:
        """Counts the queries."""
        ...

    def draw(self, number: int, epoch: int) -> RankedList:
        """Returns query, documents and labels of one row in one epoch."""
        ...


def ranking_scores(scores: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Scores one ranked list against its labels.

    Among equal scores negatives come first, so that a model that tells nothing apart earns nothing.

    Args:
        scores: one a document, higher is better.
        labels: above 0 for a positive.

    Returns:
        ``pairwise_accuracy`` (share of the pairs of a positive and a negative in the right order, equal scores
        counting half), ``mean_margin`` (mean lead of a positive over a negative, in units of the score), ``mrr@10``
        and ``ndcg@10``; empty where the list has no positive or no negative.

    Example:
        >>> found = ranking_scores([0.5, 2.0, 1.0], [1, 0, 0])
        >>> found["pairwise_accuracy"], found["mean_margin"], found["mrr@10"], found["ndcg@10"]
        (0.0, -1.0, 0.3333333333333333, 0.5)
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64) > 0
    if positive.all() or not positive.any():
        return {}
    leads = values[positive][:, None] - values[~positive][None, :]
    order = np.lexsort((positive, -values))
    ids = [str(i) for i in order]
    gold = [str(i) for i in np.flatnonzero(positive)]
    # Neither is None: something is relevant.
    mrr, ndcg = metrics.mrr_at_k(ids, gold, k=10), metrics.ndcg_of_ids(ids, dict.fromkeys(gold, 1.0), k=10)
    return {
        "pairwise_accuracy": float((leads > 0).mean() + (leads == 0).mean() / 2),
        "mean_margin": float(leads.mean()),
        "mrr@10": mrr or 0.0,
        "ndcg@10": ndcg or 0.0,
    }


class ListEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Ranks fixed lists whole, never a sample of them: the same in every epoch and after a resume.

    Args:
        lists: each with a positive and a negative; others say nothing and are left out.
        batch_size: pairs a forward pass.

    Raises:
        ConfigError: no list has both.
    """

    def __init__(self, lists: Sequence[RankedList], *, batch_size: int = 64) -> None:
        super().__init__()
        self.lists = [
            one for one in lists if any(label > 0 for label in one[2]) and any(label <= 0 for label in one[2])
        ]
        if not self.lists:
            raise ConfigError("no held-out query has both a positive and a negative: there is nothing to rank")
        self.batch_size = batch_size
        self.primary_metric = "ndcg@10"

    def __call__(
        self, model: CrossEncoder, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluates a model.

        Args:
            model: scores the pairs.
            output_path: not used.
            epoch: not used.
            steps: not used.

        Returns:
            Mean of each score of ``ranking_scores`` over the lists.
        """
        del output_path, epoch, steps
        found = score_lists(model, [(query, texts) for query, texts, _ in self.lists], batch_size=self.batch_size)
        rows = [ranking_scores(scores, labels) for scores, (_, _, labels) in zip(found, self.lists, strict=True)]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def score_lists(
    model: CrossEncoder, lists: Sequence[tuple[str, Sequence[str]]], *, batch_size: int
) -> list[list[float]]:
    """Scores the documents of many queries in one go.

    Args:
        model: scores the pairs.
        lists: B queries with their documents.
        batch_size: pairs a forward pass.

    Returns:
        B lists of logits: a sigmoid would make equal what is far above 0.

    Raises:
        RagRLError: a score is not a number.
    """
    pairs = [(query, text) for query, texts in lists for text in texts]
    if not pairs:
        return [[] for _ in lists]
    scores = model.predict(pairs, batch_size=batch_size, activation_fn=nn.Identity(), show_progress_bar=False)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise RagRLError(
            f"the reranker gives scores that are not numbers for {len(bad)} of {len(pairs)} pairs, first for "
            f"{pairs[bad[0]][0]!r}: training has diverged (lower learning_rate), or the model is damaged"
        )
    ends = np.cumsum([len(texts) for _, texts in lists])
    return [part.tolist() for part in np.split(np.asarray(scores, dtype=np.float64), ends[:-1])]


class RerankerTrainer(CrossEncoderTrainer):  # type: ignore[misc]
    """Trains a cross-encoder on queries whose documents are drawn for each epoch.

    Args:
        model: with one output; it is trained in place (whole, or an adapter that was added to it).
        args: settings.
        pairs: draws the documents of a query.
        evaluator: of ``eval_strategy``; None where that is off.
        callbacks: of the trainer.

    Raises:
        ConfigError: a model with several outputs, or fewer queries than a batch.
    """

    training_args_class = RerankerConfig

    def __init__(
        self,
        *,
        model: CrossEncoder,
        args: RerankerConfig,
        pairs: PairSource,
        evaluator: BaseEvaluator | None = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.pairs = pairs
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"number": list(range(len(pairs)))}),
            loss=ranking_loss(args.loss_type, model, margin=args.margin, mini_batch_size=args.mini_batch_size),
            evaluator=evaluator,
            data_collator=_Numbers(),
            callbacks=list(callbacks or []),
        )
        wanted = args.train_batch_size * self.accelerator.num_processes
        if len(pairs) < wanted:
            raise ConfigError(f"a batch takes {wanted} queries, there are {len(pairs)} to train on")

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of row numbers; their documents are drawn when they are used."""
        loader = super().get_train_dataloader()
        self._steps_per_epoch = max(1, math.ceil(len(loader) / self.args.gradient_accumulation_steps))
        return loader

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, counted from finished steps: a resume changes nothing."""
        return int(self.state.global_step // self._steps_per_epoch)

    def _prepare_inputs(self, inputs: list[int]) -> dict[str, Any]:
        drawn = [self.pairs.draw(number, self.epoch) for number in inputs]
        return {
            "query": [query for query, _, _ in drawn],
            "documents": [list(texts) for _, texts, _ in drawn],
            "label": [torch.tensor(labels) for _, _, labels in drawn],
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            model: the cross-encoder, possibly wrapped.
            inputs: queries, documents and labels.
            return_outputs: not supported.
            num_items_in_batch: not used; the loss is a mean.

        Returns:
            A scalar.
        """
        del return_outputs, num_items_in_batch
        loss = self.loss
        if model is self.model_wrapped and loss.model is not model:
            loss = self.override_model_in_loss(loss, model)
        found: Tensor = loss([inputs["query"], inputs["documents"]], inputs["label"], prompt=None, task=None)
        return found

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        backbone = self.model.transformers_model
        if not getattr(backbone, "_hf_peft_config_loaded", False):
            super()._load_from_checkpoint(checkpoint_path)
            return
        # Theirs loads the base once more, unquantised, from wherever the checkpoint says that it lies.
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        weights = load_file(str(Path(checkpoint_path) / "adapter_model.safetensors"))
        # Files name weights as seen from a PeftModel, which this one is not: the adapter was put into its layers.
        inner = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
        found = set_peft_model_state_dict(backbone, inner)
        if found.unexpected_keys:
            raise RagRLError(
                f"{checkpoint_path}: its adapter does not fit the model, first at {found.unexpected_keys[0]}"
            )


class _Numbers:
    """Collates rows to their numbers; sentence-transformers asks a collator which columns are labels."""

    valid_label_columns: tuple[str, ...] = ()
    prompts = router_mapping = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        return [int(row["number"]) for row in rows]
