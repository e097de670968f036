r"""The loss that teaches a retriever a teacher's order of passages (Reinforced-IR, arXiv 2502.11562).

.. math:: L = L_{rank} + \lambda_{ans} L_{ans} + \lambda_{norm} L_{norm}

- :math:`L_{rank}`: ``plackett_luce.listwise_loss`` of each query's own G passages in the teacher's order, with the
  passages of all other queries, of all processes, in every denominator. Where only the first of them is ranked, it is
  contrastive learning (InfoNCE) with hard negatives.
- :math:`L_{ans}`: a query against the augmentations of all queries, its own among them (InfoNCE).
- :math:`L_{norm}`: mean of :math:`(\lVert a \rVert_2 - 1)^2` over augmentations; 0 where the encoder normalises.

Several processes: vectors are gathered with their gradients, so that the mean of the processes' losses, and of their
gradients as DistributedDataParallel takes it, are those of one process with the whole batch. The authors gather
without gradients, and each process computes the whole loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from rag_rl.trainers.plackett_luce import listwise_loss


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """The loss and what it is made of, all scalars.

    Attributes:
        total: to go backward from.
        ranking: L_rank, in nats a pick.
        augmentation: L_ans, in nats; 0 without augmentations.
        norm: L_norm; 0 without augmentations.
    """

    total: Tensor
    ranking: Tensor
    augmentation: Tensor
    norm: Tensor


def distillation_loss(
    queries: Tensor,
    passages: Tensor,
    augmentations: Tensor | None = None,
    *,
    augmented: Tensor | None = None,
    ranked: Tensor | None = None,
    passage_ids: Tensor | None = None,
    temperature: float = 0.02,
    augmentation_temperature: float = 0.05,
    augmentation_weight: float = 1.0,
    norm_weight: float = 1.0,
) -> DistillationLoss:
    """Computes the loss of one batch, or of this process's share of it.

    Args:
        queries: (B, D) vectors.
        passages: (B, G, D) vectors of each query's own passages in the teacher's order, best first.
        augmentations: (B, D) vectors; None: the two other terms are 0.
        augmented: (B,) False where a query has no augmentation; what stands there is not looked at. None for all.
        ranked: (B,) int64, how many of a query's own passages stand in the teacher's order, from 1 to G; what follows
            is a negative of all of those. With 1 the ranking loss is InfoNCE with hard negatives. None for all G.
        passage_ids: (B, G) int64, equal for equal passages of the whole batch. What is a query's own passage and also
            one of another query's is then no negative of it. None: every passage of another query is one.
        temperature: of the ranking, above 0.
        augmentation_temperature: of the contrast, above 0.
        augmentation_weight: of L_ans.
        norm_weight: of L_norm.

    Returns:
        The loss and its parts; computed in at least float32.

    Raises:
        ValueError: shapes that do not fit, another batch size in another process, or a temperature that is not above
            0; vectors with NaN.

    Example:
        >>> queries, passages = torch.eye(2), torch.eye(2).repeat_interleave(2, dim=0).view(2, 2, 2)
        >>> round(distillation_loss(queries, passages).total.item(), 4)  # log(2) / 2: its own two are alike
        0.3466
    """
    _check(queries, passages, augmentations, augmented, ranked, passage_ids)
    if temperature <= 0.0 or augmentation_temperature <= 0.0:
        raise ValueError(f"temperatures must be above 0, got {temperature} and {augmentation_temperature}")
    rank, world = _place(queries)
    size, group = passages.shape[:2]
    own = torch.arange(size * group, device=queries.device).view(size, group) + rank * size * group
    everyone = _gathered(passages.flatten(0, 1))
    mask = None
    if passage_ids is not None:
        known = _gathered(passage_ids.flatten())
        mask = ~(passage_ids[:, :, None] == known).any(1)
        mask.scatter_(1, own, True)
    ranking = _ranking(_scores(queries, everyone, temperature), own, ranked, mask)
    contrast = norm = torch.zeros_like(ranking)
    if augmentations is not None:
        there = torch.ones(size, dtype=torch.bool, device=queries.device) if augmented is None else augmented
        # What is not there may be anything, NaN included, and must not reach a product.
        texts = augmentations.masked_fill(~there[:, None], 0.0)
        everywhere = _gathered(there)
        count = max(int(everywhere.sum()), 1) / world
        scores = _scores(queries, _gathered(texts), augmentation_temperature)
        scores = scores.masked_fill(~everywhere, torch.finfo(scores.dtype).min)
        target = torch.arange(size, device=queries.device) + rank * size
        losses = functional.cross_entropy(scores, target, reduction="none")
        contrast = losses.where(there, torch.zeros_like(losses)).sum() / count
        # The norm of a vector of zeros has no gradient, and one of ones is left out as well.
        lengths = texts.where(there[:, None], torch.ones_like(texts)).to(scores.dtype).norm(dim=-1)
        off = (lengths - 1.0) ** 2
        norm = off.where(there, torch.zeros_like(off)).sum() / count
    total = ranking + augmentation_weight * contrast + norm_weight * norm
    return DistillationLoss(total, ranking, contrast, norm)


def _ranking(scores: Tensor, own: Tensor, ranked: Tensor | None, mask: Tensor | None) -> Tensor:
    """The mean over queries of the loss a pick, where queries may have different numbers of picks."""
    if ranked is None:
        return listwise_loss(scores, own, mask=mask)
    lengths = ranked.unique().tolist()
    if len(lengths) == 1:
        return listwise_loss(scores, own[:, : lengths[0]], mask=mask)
    total = torch.zeros((), dtype=scores.dtype, device=scores.device)
    for length in lengths:
        rows = (ranked == length).nonzero().flatten()
        part = listwise_loss(scores[rows], own[rows, :length], mask=None if mask is None else mask[rows])
        total = total + part * (len(rows) / len(scores))
    return total


def _scores(queries: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Products over the temperature, in float32 at least: in half precision they overflow at 1 / 0.02 of a product."""
    scores = queries @ others.T
    return (scores if scores.dtype in (torch.float32, torch.float64) else scores.float()) / temperature


def _place(tensor: Tensor) -> tuple[int, int]:
    """Number of this process and of all, once they are known to have batches of one size."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0, 1
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    found = [int(size) for size in sizes]
    if len(set(found)) > 1:
        raise ValueError(f"all processes must have as many queries, got {found}: drop the last incomplete batch")
    return dist.get_rank(), len(found)


def _gathered(tensor: Tensor) -> Tensor:
    """The tensors of all processes one after the other, with their gradients."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    if not tensor.requires_grad:
        pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces)
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass adds up what all processes want of a tensor."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        pieces = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        # Not a reduce-scatter, which gloo does not have: twice the bytes of it, on vectors of one batch.
        whole = grad.contiguous().clone()
        dist.all_reduce(whole)
        return whole.chunk(dist.get_world_size())[dist.get_rank()]


def _check(
    queries: Tensor,
    passages: Tensor,
    augmentations: Tensor | None,
    augmented: Tensor | None,
    ranked: Tensor | None,
    passage_ids: Tensor | None,
) -> None:
    if queries.ndim != 2 or passages.ndim != 3 or (len(passages), passages.shape[-1]) != tuple(queries.shape):
        shapes = tuple(queries.shape), tuple(passages.shape)
        raise ValueError(f"queries must be (B, D) and passages (B, G, D), got {shapes[0]} and {shapes[1]}")
    if augmentations is not None and augmentations.shape != queries.shape:
        raise ValueError(f"augmentations must be (B, D), got {tuple(augmentations.shape)}")
    if augmented is not None and (augmented.shape != queries.shape[:1] or augmented.dtype != torch.bool):
        raise ValueError(f"augmented must be (B,) bool, got {tuple(augmented.shape)} {augmented.dtype}")
    if ranked is not None and (
        ranked.shape != queries.shape[:1] or not bool(((ranked >= 1) & (ranked <= passages.shape[1])).all())
    ):
        raise ValueError(f"ranked must be (B,) numbers from 1 to {passages.shape[1]}, got {ranked.tolist()}")
    if passage_ids is not None and passage_ids.shape != passages.shape[:2]:
        raise ValueError(f"passage_ids must be (B, G), got {tuple(passage_ids.shape)}")
