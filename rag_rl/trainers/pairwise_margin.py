"""The pairwise margin loss of a cross-encoder, which sentence-transformers lacks, and its relatives that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import LambdaLoss, ListNetLoss, RankNetLoss
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from rag_rl.errors import ConfigError

RankingLoss = Literal["margin", "ranknet", "listnet", "lambda"]


def pairwise_margin(scores: Tensor, labels: Tensor, queries: Tensor, *, margin: float) -> Tensor:
    """Hinge loss over all pairs of a positive and a negative of one query, ``max(0, margin - (s_pos - s_neg))``.

    The hinge over pairs is that of Herbrich et al. 1999, "Large margin rank boundaries for ordinal regression"; the
    mean runs over the pairs of the whole batch. One positive is never another's negative.

    Args:
        scores: (N,) scores of N query-document pairs.
        labels: (N,) above 0 for a positive.
        queries: (N,) number of the query that a pair belongs to.
        margin: by how much a positive should lead, above 0, in units of the score.

    Returns:
        A scalar in the dtype of the scores, at least float32; 0, with a gradient of 0, where there is no pair at all.

    Example:
        >>> scores, queries = torch.tensor([2.0, 0.5, 1.5, 9.0]), torch.tensor([0, 0, 0, 1])
        >>> pairwise_margin(scores, torch.tensor([1, 1, 0, 0]), queries, margin=1.0)  # (0.5 + 2.0) / 2
        tensor(1.2500)
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    positive = labels > 0
    pairs = (queries[:, None] == queries[None, :]) & positive[:, None] & ~positive[None, :]  # (N, N)
    lacking = torch.relu(margin - (scores[:, None] - scores[None, :]))
    return torch.where(pairs, lacking, 0.0).sum() / pairs.sum().clamp_min(1)


class PairwiseMarginLoss(nn.Module):
    """``pairwise_margin`` for sentence-transformers' ``CrossEncoderTrainer``; a query may have several positives.

    Columns are those of its listwise losses: a query, a list of documents, a list of labels, of any length.

    Args:
        model: with one output.
        margin: by how much a positive should lead, in logits; no sigmoid is applied.
        mini_batch_size: pairs a forward pass; None takes all pairs of the batch at once.

    Raises:
        ConfigError: a model with several outputs, or a number below its range.
    """

    def __init__(self, model: CrossEncoder, *, margin: float = 1.0, mini_batch_size: int | None = None) -> None:
        super().__init__()
        if model.num_labels != 1:
            raise ConfigError(f"a reranker has one output, this model has {model.num_labels}")
        if margin <= 0:
            raise ConfigError(f"margin must be above 0, got {margin}")
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ConfigError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
        self.model, self.margin, self.mini_batch_size = model, margin, mini_batch_size

    def forward(
        self,
        inputs: Sequence[Sequence[Any]],
        labels: Sequence[Tensor],
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """Scores all pairs of a batch and compares them.

        Args:
            inputs: B queries and B lists of documents.
            labels: B tensors with a label for each document.
            prompt: passed to the model's ``preprocess``.
            task: passed to the model's ``preprocess``.

        Returns:
            A scalar.

        Raises:
            ValueError: a query with another number of labels than documents.
        """
        queries, documents = inputs
        for query, listed, given in zip(queries, documents, labels, strict=True):
            if len(listed) != len(given):
                raise ValueError(f"query {query!r} has {len(listed)} documents and {len(given)} labels")
        pairs = [(query, text) for query, listed in zip(queries, documents, strict=True) for text in listed]
        numbers = torch.repeat_interleave(torch.tensor([len(listed) for listed in documents]))
        scores = self._score(pairs, prompt, task)
        flat = torch.cat([label.to(scores.device) for label in labels])
        return pairwise_margin(scores, flat, numbers.to(scores.device), margin=self.margin)

    def _score(self, pairs: Sequence[tuple[str, str]], prompt: str | None, task: str | None) -> Tensor:
        size = self.mini_batch_size or len(pairs)
        # In order of length a mini-batch needs little padding; a single one gains nothing from it.
        order = list(range(len(pairs)))
        if size < len(pairs):
            order.sort(key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        parts = []
        for start in range(0, len(order), size):
            features = self.model.preprocess([pairs[i] for i in order[start : start + size]], prompt=prompt, task=task)
            parts.append(self.model(batch_to_device(features, self.model.device))["scores"].view(-1))
        scores = torch.cat(parts)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return scores[back.to(scores.device)]

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card.

        Returns:
            Name to value.
        """
        return {"margin": self.margin, "mini_batch_size": self.mini_batch_size}


def ranking_loss(
    name: RankingLoss, model: CrossEncoder, *, margin: float = 1.0, mini_batch_size: int | None = None
) -> nn.Module:
    """Builds a loss over the documents of a query.

    Args:
        name: ``margin`` (this module's), or sentence-transformers' ``ranknet`` (the soft pairwise loss of Burges et
            al. 2005, in bits), ``listnet`` (Cao et al. 2007) or ``lambda`` (LambdaLoss with NDCGLoss2++, Wang et al.
            2018).
        model: with one output.
        margin: of ``margin`` alone.
        mini_batch_size: pairs a forward pass; None takes all of the batch at once.

    Returns:
        The loss.

    Raises:
        ConfigError: no such loss, or settings or a model that do not fit.
    """
    if name == "margin":
        return PairwiseMarginLoss(model, margin=margin, mini_batch_size=mini_batch_size)
    losses: dict[str, Any] = {"ranknet": RankNetLoss, "listnet": ListNetLoss, "lambda": LambdaLoss}
    if name not in losses:
        raise ConfigError(f"loss must be margin, {' or '.join(losses)}, got {name!r}")
    if model.num_labels != 1:
        raise ConfigError(f"a reranker has one output, this model has {model.num_labels}")
    # Theirs: None is as many pairs as there are queries, -1 is all of them.
    built: nn.Module = losses[name](model, mini_batch_size=mini_batch_size or -1)
    return built
