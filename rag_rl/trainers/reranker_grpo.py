"""Reinforced reranking: GRPO over the orders that a cross-encoder gives the candidates of a query.

The policy is a Plackett-Luce distribution over the K candidates of a query, with the cross-encoder's scores over a
temperature (``plackett_luce``); the action is an ordered list of k of them. G lists a query are rewarded, by their
nDCG or by what a reader answers from them, and each gets its advantage within the group.

All lists of a query come from the scores of one forward pass, which also carries the gradient: what samples is what is
trained, exactly, and there is no ratio to clip. Expect a loss near 0; watch ``reward``.

A policy that ranks at random finds no reward to compare: ``supervised_start`` teaches the cross-encoder first, where
it is not one that was trained before.
"""

from __future__ import annotations

import hashlib
import logging
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
from rag_rl.reasoning.environment import Environment
from rag_rl.trainers.plackett_luce import first_pick_entropy, log_prob, sample
from rag_rl.trainers.reranker_config import RerankerConfig
from rag_rl.trainers.reranker_trainer import PairSource, RankedList, RerankerTrainer
from rag_rl.trainers.retriever_grpo_trainer import shared_advantages
from rag_rl.types import Hit, Passage, Query, Question

logger = logging.getLogger(__name__)


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
    alpha: float = field(
        default=1.0, metadata={"help": "temperature of the Plackett-Luce policy: logits are divided by it"}
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={
            "help": "advantages are divided by the standard deviation of their group, or of the batch (what one "
            "forward pass of all processes holds)"
        },
    )
    advantage_baseline: Literal["mean", "leave_one_out"] = field(
        default="mean", metadata={"help": "what is subtracted from a reward: the group's mean, or that of the others"}
    )
    start_steps: int = field(
        default=0,
        metadata={
            "help": "supervised steps on the same rows before the reinforcement, with loss_type, num_negatives and "
            "hard_share; 0 for a cross-encoder that is trained already"
        },
    )
    start_learning_rate: float = field(
        default=5e-5, metadata={"help": "start_steps: their learning rate, falling to 0"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ConfigError(f"num_generations must be at least 2, got {self.num_generations}: a group is compared")
        if self.alpha <= 0:
            raise ConfigError(f"alpha must be above 0, got {self.alpha}")
        if self.start_steps < 0:
            raise ConfigError(f"start_steps must be at least 0, got {self.start_steps}")


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


class GivenHits:
    """A retrieval policy that searches nothing: every search gets the list that was made for it.

    Args:
        lists: B lists of passages in reading order, for a rollout of B questions that each search once.
    """

    def __init__(self, lists: Sequence[Sequence[Passage]]) -> None:
        self.lists = lists

    def retrieve(self, queries: Sequence[Query]) -> list[tuple[list[Hit], Any]]:
        """Gives the lists.

        Args:
            queries: B queries, in the order of the lists.

        Returns:
            B pairs of hits and None.

        Raises:
            ConfigError: there are other searches than lists.
        """
        if len(queries) != len(self.lists):
            raise ConfigError(
                f"reranking needs a reader that searches once for each question: it made {len(queries)} searches for "
                f"{len(self.lists)} questions"
            )
        return [
            ([Hit(passage, 1.0 / rank, rank) for rank, passage in enumerate(listed, start=1)], None)
            for listed in self.lists
        ]


class PlayedReward:
    """What an environment gives for an order: what a reader answers from the picked passages, or what they hold.

    Args:
        environment: of one search a question; it rewards what came out.
        questions: of the trainer's lists, in their order.
        candidates: the passages of each list.
    """

    def __init__(
        self, environment: Environment, questions: Sequence[Question], candidates: Sequence[Sequence[Passage]]
    ) -> None:
        self.environment, self.questions, self.candidates = environment, questions, candidates

    def __call__(self, orders: Sequence[Order]) -> list[float | None]:
        """Plays the question of each order with its passages.

        Args:
            orders: N sampled orders.

        Returns:
            N rewards; None where the reader failed for one of them alone.

        Raises:
            BackendError: the reader's backend is broken.
        """
        # Groups repeat themselves the more, the surer the policy is.
        distinct = list(dict.fromkeys(orders))
        shown = [[self.candidates[order.number][place] for place in order.places] for order in distinct]
        questions = [self.questions[order.number] for order in distinct]
        found = self.environment.rewards(self.environment.rollout(questions, GivenHits(shown)))
        rewards = dict(zip(distinct, found, strict=True))
        return [rewards[order] for order in orders]


class RerankerGRPOTrainer(RerankerTrainer):
    """Trains a cross-encoder from rewards of the orders that it samples.

    Args:
        model: with one output, supervised before; it is trained in place, with dropout off.
        args: settings.
        lists: queries with their candidates; labels are read by the reward alone, if at all.
        reward: scores orders.
        top_k: k, candidates that an order picks.
        evaluator: of ``eval_strategy``; None where that is off.
        callbacks: of the trainer.

    Raises:
        ConfigError: ``top_k`` below 1, a query with fewer candidates than that, or fewer queries than a batch.
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
        top_k: int,
        evaluator: BaseEvaluator | None = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        if not lists:
            raise DataError("there is no query to train on")
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        for query, texts, _ in lists:
            if len(texts) < top_k:
                raise ConfigError(f"retriever_top_k is {top_k}, above the {len(texts)} candidates of query {query!r}")
        self.reward, self.top_k = reward, top_k
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

        The mean runs over the orders of groups whose rewards differ, of all processes; the others teach nothing.

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
        picks = sample(pool, self.top_k, mask=valid, noise=noise.to(pool))
        orders = [
            Order(number, tuple(places))
            for number, lists in zip(numbers, picks.tolist(), strict=True)
            for places in lists
        ]
        found = self.reward(orders)
        if len(found) != len(orders):
            raise ConfigError(f"the reward gives {len(found)} values for {len(orders)} orders")
        table = torch.tensor([float("nan") if r is None else float(r) for r in found]).view(-1, group)
        advantages, varied = shared_advantages(
            table, self.accelerator, scale=args.scale_rewards, baseline=args.advantage_baseline
        )
        self._note(table, varied, first_pick_entropy(scores.detach(), mask=mask))
        used = (torch.isfinite(table) & varied[:, None]).to(scores.device)
        terms = log_prob(pool, picks, mask=valid) * advantages.to(scores)
        # Processes average their gradients, so that each one's share of the sum is counted as often as there are any.
        count = self.accelerator.reduce(used.sum(), reduction="sum").clamp_min(1)
        # Every process takes part in the backward pass, also one whose groups all taught nothing.
        return -torch.where(used, terms, 0.0).sum() * self.accelerator.num_processes / count

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


def supervised_start(
    model: CrossEncoder, pairs: PairSource, args: RerankerGRPOConfig, *, resumed: bool = False
) -> None:
    """Teaches a cross-encoder from labels before it is reinforced, in place; does nothing without ``start_steps``.

    Args:
        model: with one output.
        pairs: draws the documents of a query.
        args: of the reinforcement; ``start_steps``, ``start_learning_rate``, loss and batches are read.
        resumed: whether the reinforcement goes on from a checkpoint, which holds what was learnt here.

    Raises:
        ConfigError: fewer queries than a batch.
    """
    if resumed or not args.start_steps:
        return
    logger.info("%d supervised steps before the reinforcement", args.start_steps)
    taught = RerankerConfig(
        output_dir=args.output_dir,
        max_steps=args.start_steps,
        learning_rate=args.start_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(20, args.start_steps // 10),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        max_grad_norm=args.max_grad_norm,
        weight_decay=args.weight_decay,
        loss_type=args.loss_type,
        margin=args.margin,
        num_negatives=args.num_negatives,
        num_positives=args.num_positives,
        hard_share=args.hard_share,
        mini_batch_size=args.mini_batch_size,
        seed=args.seed,
        bf16=args.bf16,
        fp16=args.fp16,
        use_cpu=args.use_cpu,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=args.disable_tqdm,
    )
    RerankerTrainer(model=model, args=taught, pairs=pairs).train()


class _Whole:
    """All candidates of a query in every epoch."""

    def __init__(self, lists: Sequence[RankedList]) -> None:
        self.lists = lists

    def __len__(self) -> int:
        return len(self.lists)

    def draw(self, number: int, epoch: int) -> RankedList:
        del epoch
        return self.lists[number]
