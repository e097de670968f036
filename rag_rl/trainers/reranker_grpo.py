"""Reinforced reranking: GRPO over the orders that a cross-encoder gives the candidates of a query.

The policy is a Plackett-Luce distribution over the K candidates of a query, with the cross-encoder's scores over a
temperature (``plackett_luce``); the action is an ordered list of k of them. G lists a query are rewarded, by their
nDCG or by what a reader answers from them, and each gets its advantage within the group.

All lists of a query come from the scores of one forward pass, which also carries the gradient: what samples is what is
trained, exactly, and there is no ratio to clip. Expect a loss near 0; watch ``reward``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from rag_rl import metrics
from rag_rl.errors import ConfigError, DataError
from rag_rl.trainers.plackett_luce import first_pick_entropy, log_prob, sample
from rag_rl.trainers.reranker_config import RerankerConfig
from rag_rl.trainers.reranker_trainer import RankedList, RerankerTrainer
from rag_rl.trainers.retriever_grpo_trainer import advantages_of


@dataclass(frozen=True, slots=True)
class Order:
    """One sampled order of a query's candidates.

    Attributes:
        number: of the query, from 0.
        places: k different places in its list of candidates, best first.
    """

    number: int
    places: tuple[int, ...]


OrderReward = Callable[[Sequence[Order]], Sequence["float | None"]]
"""A reward for each order, higher is better; None where it could not be scored, which is not 0."""


@dataclass
class RerankerGRPOConfig(RerankerConfig):
    """Arguments of the trainer. ``per_device_train_batch_size`` counts queries, each with all of its candidates."""

    num_generations: int = field(default=16, metadata={"help": "G, orders sampled for a query; at least 2"})
    top_k: int = field(default=5, metadata={"help": "k, candidates that an order picks"})
    alpha: float = field(
        default=1.0, metadata={"help": "temperature of the Plackett-Luce policy: logits are divided by it"}
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group", metadata={"help": "advantages are divided by the standard deviation of their group or batch"}
    )
    advantage_baseline: Literal["mean", "leave_one_out"] = field(
        default="mean", metadata={"help": "what is subtracted from a reward: the group's mean, or that of the others"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ConfigError(f"num_generations must be at least 2, got {self.num_generations}: a group is compared")
        if self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
        if self.alpha <= 0:
            raise ConfigError(f"alpha must be above 0, got {self.alpha}")


class NDCGReward:
    """nDCG of the picked candidates among all relevant ones of the list.

    Args:
        lists: of the trainer.
        k: cut-off.

    Raises:
        ConfigError: ``k`` below 1.
    """

    def __init__(self, lists: Sequence[RankedList], *, k: int) -> None:
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        self.gains = [[max(0.0, label) for label in labels] for _, _, labels in lists]
        self.k = k

    def __call__(self, orders: Sequence[Order]) -> list[float | None]:
        """Scores orders.

        Args:
            orders: N sampled orders.

        Returns:
            N values in [0, 1]; None for a list without a relevant candidate.
        """
        return [
            metrics.ndcg_at_k([self.gains[o.number][place] for place in o.places], self.gains[o.number], k=self.k)
            for o in orders
        ]


class RerankerGRPOTrainer(RerankerTrainer):
    """Trains a cross-encoder from rewards of the orders that it samples.

    Args:
        model: with one output, supervised before; it is trained in place, with dropout off.
        args: settings.
        lists: queries with their candidates; labels are read by the reward alone, if at all.
        reward: scores orders.
        evaluator: of ``eval_strategy``; None where that is off.
        callbacks: of the trainer.

    Raises:
        ConfigError: a query with fewer candidates than ``top_k``, or fewer queries than a batch.
        DataError: there is no query.
    """

    training_args_class = RerankerGRPOConfig

    def __init__(
        self,
        *,
        model: CrossEncoder,
        args: RerankerGRPOConfig,
        lists: Sequence[RankedList],
        reward: OrderReward,
        evaluator: BaseEvaluator | None = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        if not lists:
            raise DataError("there is no query to train on")
        for query, texts, _ in lists:
            if len(texts) < args.top_k:
                raise ConfigError(f"top_k is {args.top_k}, above the {len(texts)} candidates of query {query!r}")
        self.reward = reward
        self._pending: dict[str, list[float]] = defaultdict(list)
        # The policy that samples must be the policy that is trained, and the one that is measured.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout_prob", "hidden_dropout_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        super().__init__(model=model, args=args, pairs=_Whole(lists), evaluator=evaluator, callbacks=callbacks)

    def _prepare_inputs(self, inputs: list[int]) -> dict[str, Any]:
        return {**super()._prepare_inputs(inputs), "number": inputs}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Samples orders, has them rewarded, and returns minus the mean of advantage times log-probability.

        The mean runs over the orders of groups whose rewards differ; the others teach nothing.

        Args:
            model: the cross-encoder, possibly wrapped.
            inputs: numbers, queries and candidates.
            return_outputs: not supported.
            num_items_in_batch: not used.

        Returns:
            A scalar.
        """
        del return_outputs, num_items_in_batch
        args = self.args
        numbers: list[int] = inputs["number"]
        scores, mask = self._scores(model, inputs["query"], inputs["documents"])  # (B, K) both
        scores = scores / args.alpha
        group = args.num_generations
        noise = torch.stack([self._gumbel(number, group, scores.shape[1]) for number in numbers])  # (B, G, K)
        pool = scores[:, None].expand(-1, group, -1)
        valid = mask[:, None].expand(-1, group, -1)
        picks = sample(pool, args.top_k, mask=valid, noise=noise.to(pool))
        orders = [
            Order(number, tuple(places))
            for number, lists in zip(numbers, picks.tolist(), strict=True)
            for places in lists
        ]
        found = self.reward(orders)
        if len(found) != len(orders):
            raise ConfigError(f"the reward gives {len(found)} values for {len(orders)} orders")
        table = torch.tensor([float("nan") if r is None else float(r) for r in found]).view(-1, group)
        advantages, varied = advantages_of(table, scale=args.scale_rewards, baseline=args.advantage_baseline)
        self._note(table, varied, first_pick_entropy(scores.detach(), mask=mask))
        used = (torch.isfinite(table) & varied[:, None]).to(scores.device)
        terms = log_prob(pool, picks, mask=valid) * advantages.to(scores)
        # Every process takes part in the backward pass, also one whose groups all taught nothing.
        return -torch.where(used, terms, 0.0).sum() / used.sum().clamp_min(1)

    def _scores(
        self, model: nn.Module, queries: Sequence[str], documents: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        pairs = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
        size = self.args.mini_batch_size or len(pairs)
        parts = []
        for start in range(0, len(pairs), size):
            features = self.model.preprocess(pairs[start : start + size])
            parts.append(model(batch_to_device(features, self.args.device))["scores"].view(-1))
        flat = torch.cat(parts).float()
        lengths = torch.tensor([len(texts) for texts in documents], device=flat.device)
        mask = torch.arange(int(lengths.max()), device=flat.device) < lengths[:, None]
        return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat), mask

    def _gumbel(self, number: int, group: int, size: int) -> Tensor:
        # Follows from what is asked, not from what was drawn before: a resumed run goes on as the whole one would.
        key = hashlib.blake2b(f"{self.args.seed}/{self.state.global_step}/{number}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        draws = torch.empty(group, size).exponential_(generator=generator)
        return -draws.clamp_min_(torch.finfo(draws.dtype).tiny).log_()

    def _note(self, table: Tensor, varied: Tensor, entropy: Tensor) -> None:
        scored = table[torch.isfinite(table)]
        if len(scored):
            self._pending["reward"].append(scored.mean().item())
        self._pending["frac_reward_zero_std"].append(1.0 - varied.float().mean().item())
        self._pending["unscored"].append(torch.isnan(table).float().mean().item())
        self._pending["entropy"].append(entropy.mean().item())
        self._pending["effective_pool"].append(entropy.exp().mean().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the trainer's own metrics, as means since the last log over all processes.

        Args:
            logs: of transformers.
            start_time: of training.
        """
        if "loss" in logs and self._pending:
            from accelerate.utils import gather_object

            own = [{name: (sum(values), len(values)) for name, values in self._pending.items()}]
            everyone: list[Mapping[str, tuple[float, int]]] = gather_object(own)
            self._pending.clear()
            for name in dict.fromkeys(name for one in everyone for name in one):
                sums = [one[name] for one in everyone if name in one]
                logs = {**logs, name: sum(s for s, _ in sums) / sum(n for _, n in sums)}
        super().log(logs, start_time)


class _Whole:
    """All candidates of a query in every epoch."""

    def __init__(self, lists: Sequence[RankedList]) -> None:
        self.lists = lists

    def __len__(self) -> int:
        return len(self.lists)

    def draw(self, number: int, epoch: int) -> RankedList:
        del epoch
        return self.lists[number]
