"""GRPO over ranked lists: trains the query encoder of a dense retriever (HARR, arXiv 2602.03645).

The policy is a Plackett-Luce distribution over the K best passages of a state (equations 7 to 9), the action an
ordered list of k of them. A trajectory is a question answered over several hops; each of its hops gets the advantage
of the trajectory's reward within its group (equations 11 to 14), and a clipped ratio of its own.

How this differs from the authors' code: the pool is scored by the encoder under training itself, in one process, with
dropout off, so that the ratio is exactly 1 before the first update (theirs compares vectors of another server and
precision, section 4); a batch needs no call a hop for document vectors; trajectories that a broken reader left without
an answer are dropped and not rewarded with 0; groups without variance are dropped while training, not beforehand.

Expect a loss near 0: advantages have mean 0 in each group and the ratio starts at 1, so its value says nothing on
progress. Watch ``reward`` and ``success``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from rag_rl.errors import ConfigError, RagRLError
from rag_rl.reasoning.environment import Environment
from rag_rl.reasoning.multihop import Search, Trajectory
from rag_rl.trainers.plackett_luce import first_pick_entropy, first_pick_kl, log_prob, sample
from rag_rl.trainers.retriever_grpo_config import RetrieverGRPOConfig
from rag_rl.types import Array, Hit, IntArray, Passage, Query, Question

# Largest difference of log-probabilities that the same weights may give in two batches of another composition.
_MAX_DRIFT = {torch.float32: 2e-2, torch.float64: 1e-6}
_MAX_DRIFT_HALF = 0.5


class Index(Protocol):
    """What the trainer needs of an index (``rag_rl.retrieval.DenseRetriever``)."""

    @property
    def passages(self) -> PassageLookup:
        """The texts."""
        ...

    def __len__(self) -> int: ...

    def search_vectors(self, vectors: Array, *, top_k: int) -> tuple[Array, IntArray]:
        """Returns scores (B, K) and rows (B, K), best first."""
        ...

    def vectors(self, rows: IntArray) -> Array:
        """Returns (B, K, D) document vectors."""
        ...


class PassageLookup(Protocol):
    """Passages by row."""

    def take(self, rows: Sequence[int]) -> list[Passage]:
        """Returns the passages of the rows."""
        ...


class TrainableEncoder(Protocol):
    """The encoder under training (``rag_rl.retrieval.SentenceEncoder``)."""

    model: SentenceTransformer
    query_prompt: str
    normalize: bool


class StateEncoder(Protocol):
    """How a query with its history becomes the encoder's input (``rag_rl.retrieval.HistoryEncoder``)."""

    encoder: TrainableEncoder

    def states(self, queries: Sequence[str | Query]) -> list[str]:
        """Returns what the encoder reads of each query: with its history, or the query alone."""
        ...


@dataclass(slots=True)
class Choice:
    """What the policy did at one hop.

    Attributes:
        state: number of the state in the batch's ``States``.
        picks: k places in the pool, in the order shown to the reader.
        log_prob: of that list when it was sampled.
    """

    state: int
    picks: list[int]
    log_prob: float


@dataclass(slots=True)
class States:
    """The distinct states of a batch of trajectories; a group shares its first one.

    Attributes:
        texts: S texts for the encoder.
        rows: S lists of K rows, the pool of each. Its vectors are not kept: gathering them again costs less time than
            stacking kept ones, and no memory between sampling and loss.
        reference: S tensors (K,), scores of the encoder at the start; empty without a KL term.
        useful: tensors (K,) by state, for the replug baseline: what the reader makes of each candidate alone.
        vectors: S tensors (D,) that gradients flow through, where the pass that sampled is also that of the loss;
            else empty, and the loss encodes the texts again.
    """

    texts: list[str] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)
    useful: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class HopBatch:
    """Hops of a part of the batch, ready for the loss.

    Attributes:
        states: the batch's states.
        state: (H,) number of the state of each hop.
        picks: (H, k) places in the pool.
        advantage: (H,).
        weight: (H,) weight in the sum; the weights of a whole batch, over all processes, make the loss a mean.
        sampled: (H,) log-probability when it was sampled.
        old: (H,) log-probability under the weights that sampled, filled at the first visit.
    """

    states: States
    state: list[int]
    picks: Tensor
    advantage: Tensor
    weight: Tensor
    sampled: Tensor
    old: Tensor | None = None


class SampledLists:
    """The policy while training: samples an ordered list of k out of the K best passages of each state.

    The noise of a list depends on the seed, the step, the state and how often the same state came before in this step
    and process, and on nothing else: one process or two, one batch or eight, the same lists are drawn, as long as a
    state names its question. (Without history, equal sub-queries of different questions are one state, which each
    process counts for itself.) The same after a resume from a checkpoint between two batches: with ``num_iterations``
    above 1, one whose step is a multiple of it.

    Args:
        trainer: whose encoder scores.
        step: of the batch, part of the seed.
        top_k: k, passages shown to the reader.
    """

    def __init__(self, trainer: RetrieverGRPOTrainer, *, step: int, top_k: int) -> None:
        self.trainer, self.step, self.top_k = trainer, step, top_k
        self.states = States()
        self.entropies: list[Tensor] = []
        self._seen: dict[str, int] = defaultdict(int)
        self._known: dict[str, int] = {}
        self._scores: list[Tensor] = []

    def retrieve(self, queries: Sequence[Query]) -> list[tuple[list[Hit], Any]]:
        """Samples one list a query.

        Args:
            queries: B queries with their histories.

        Returns:
            B pairs of the list's hits, in sampled order, and the ``Choice`` behind it.

        Raises:
            RagRLError: the encoder gives vectors that are not numbers.
        """
        if not queries:  # this process has finished, and another one still searches
            return []
        texts = self.trainer.encoder.states(queries)
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._score(new)
        states = [self._known[text] for text in texts]
        scores = torch.stack([self._scores[state] for state in states])  # (B, K)
        noise = torch.from_numpy(np.stack([self._gumbel(text, scores.shape[1]) for text in texts])).to(scores)
        picks = sample(scores, self.top_k, noise=noise)
        log_probs = log_prob(scores, picks).tolist()
        chosen = picks.tolist()
        rows = [self.states.rows[state] for state in states]
        shown = [[pool[place] for place in places] for pool, places in zip(rows, chosen, strict=True)]
        passages = iter(self.trainer.index.passages.take([row for rows_ in shown for row in rows_]))
        values = torch.gather(scores, -1, picks).mul(self.trainer.args.alpha).tolist()
        return [
            (
                [Hit(next(passages), score, rank) for rank, score in enumerate(kept, start=1)],
                Choice(state, places, value),
            )
            for state, places, value, kept in zip(states, chosen, log_probs, values, strict=True)
        ]

    def _score(self, texts: list[str]) -> None:
        trainer = self.trainer
        vectors = trainer.encode_to_sample(texts)  # (S, D)
        if vectors.requires_grad:
            self.states.vectors += list(vectors)
            vectors = vectors.detach()
        bad = torch.nonzero(~torch.isfinite(vectors).all(dim=-1)).flatten().tolist()
        if bad:  # faiss would find nothing, and not say why
            raise RagRLError(
                f"the encoder gives vectors that are not numbers for {len(bad)} of {len(texts)} states, first "
                f"{texts[bad[0]]!r}: training has diverged (lower learning_rate), or the model is damaged"
            )
        _, rows = trainer.index.search_vectors(vectors.float().cpu().numpy(), top_k=trainer.pool_size)
        pools = trainer.pools(rows)
        scores = trainer.scores(vectors, pools)
        self.entropies.append(first_pick_entropy(scores))
        start = len(self.states.texts)
        self._known |= {text: start + i for i, text in enumerate(texts)}
        self._scores += list(scores)
        self.states.texts += texts
        self.states.rows += rows.tolist()
        if trainer.args.beta:
            self.states.reference += list(trainer.scores(trainer.encode_reference(texts), pools))

    def _gumbel(self, text: str, size: int) -> Array:
        number = self._seen[text]
        self._seen[text] += 1
        key = hashlib.sha256(f"{self.trainer.args.seed}/{self.step}/{number}/{text}".encode()).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        return draw.gumbel(size=size).astype(np.float32)


class RetrieverGRPOTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Trains a query encoder from the outcome of the whole pipeline, over a frozen document index.

    Args:
        encoder: the query encoder; its model is trained in place (whole, or an adapter that was added to it).
        args: settings.
        index: over document vectors of the encoder as it was before training.
        environment: plays a question and scores what came out.
        questions: to train on.
        top_k: k, passages that the reader is shown.
        callbacks: of the trainer.

    Raises:
        ConfigError: k above K, K above the number of passages, an empty index, or too few questions for a batch.
    """

    training_args_class = RetrieverGRPOConfig

    def __init__(
        self,
        *,
        encoder: StateEncoder,
        args: RetrieverGRPOConfig,
        index: Index,
        environment: Environment,
        questions: Sequence[Question],
        top_k: int,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.encoder, self.index, self.environment = encoder, index, environment
        self.questions, self.top_k = list(questions), top_k
        self.pool_size = check_pool(len(index), args.num_candidates, top_k)
        # The policy that samples must be the policy that is trained.
        for module in encoder.encoder.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        _zero_dropout(encoder.encoder.model)
        self.reference = _reference(encoder.encoder.model) if args.beta else None
        self._buffer: list[HopBatch] = []
        self._buffered: int | None = None
        self._micro = 0
        self._pending: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=encoder.encoder.model,
            args=args,
            train_dataset=Dataset.from_dict({"number": list(range(len(self.questions)))}),
            loss=_NoLoss(encoder.encoder.model),
            data_collator=_numbers,
            callbacks=list(callbacks or []),
        )
        # trl's unwrapping, made for language models, asks for it.
        self.model.is_gradient_checkpointing = False
        # As in TRL: keeps transformers from dividing the loss, whose normaliser spans the whole batch already.
        self.compute_loss_func = "set, so that the loss is not scaled"
        wanted = self._questions_per_process * self.accelerator.num_processes
        if len(self.questions) < wanted:
            raise ConfigError(f"a step asks {wanted} questions, data_train has {len(self.questions)}")

    @property
    def _questions_per_process(self) -> int:
        return self.args.trajectories_per_device // self.args.num_generations

    # ---- batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of question numbers: each one is drawn once and used for every part and iteration of its step."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._questions_per_process,
            sampler_fn=self._repeated,
            is_training=True,
        )

    def _repeated(self, dataset: Any) -> Sampler[int]:
        return RepeatSampler(
            data_source=dataset,
            mini_repeat_count=1,
            batch_size=self._questions_per_process * self.accelerator.num_processes,
            repeat_count=self.args.gradient_accumulation_steps * self.args.num_iterations,
            seed=self.args.seed,
        )

    def _prepare_inputs(self, inputs: list[int]) -> HopBatch:
        parts = self.args.gradient_accumulation_steps
        batch = self.state.global_step // self.args.num_iterations
        if self._buffered != batch:
            trajectories, states = self._sample([self.questions[number] for number in inputs], step=batch)
            self._buffer, self._buffered, self._micro = self._prepare(trajectories, states, parts), batch, 0
        part = self._buffer[self._micro % parts]
        self._micro += 1
        return part

    def _sample(self, questions: Sequence[Question], *, step: int) -> tuple[list[Trajectory], States]:
        policy = SampledLists(self, step=step, top_k=self.top_k)
        repeated = [question for question in questions for _ in range(self.args.num_generations)]
        with self._unwrapped():
            trajectories = self.environment.rollout(repeated, policy)
        if policy.entropies:
            entropy = torch.cat(policy.entropies)
            self._note("entropy", entropy.mean().item())
            self._note("effective_pool", entropy.exp().mean().item())
        return trajectories, policy.states

    def _prepare(self, trajectories: list[Trajectory], states: States, parts: int) -> list[HopBatch]:
        """Turns trajectories into hops with advantages and weights, cut into the parts of a step."""
        args, group = self.args, self.args.num_generations
        rewards = self.environment.rewards(trajectories)
        table = torch.tensor([float("nan") if r is None else r for r in rewards]).view(-1, group)
        advantages, varied = shared_advantages(
            table, self.accelerator, scale=args.scale_rewards, baseline=args.advantage_baseline
        )
        used = torch.isfinite(table)
        if args.objective == "replug":
            self._read_candidates(trajectories, states)
        elif args.drop_zero_variance:
            used &= varied[:, None]
        used, flat = used.flatten(), advantages.flatten()
        choices = [[hop.action for hop in t.hops if isinstance(hop.action, Choice)] for t in trajectories]
        # A trajectory that never searched took no action: it counts in its group's mean, and trains nothing.
        taking = [bool(used[i]) and bool(taken) for i, taken in enumerate(choices)]
        lengths = [len(taken) if use else 0 for use, taken in zip(taking, choices, strict=True)]
        counts = self.accelerator.gather(
            torch.tensor(
                [[float(sum(taking)), float(sum(lengths)), float(len(trajectories))]], device=self.args.device
            )
        ).sum(dim=0)
        n_trajectories, n_hops, n_all = counts.tolist()
        # Gradients are averaged over processes, so each one's share is scaled up by their number.
        world = float(self.accelerator.num_processes)
        weight_of: dict[str, Callable[[int], float]] = {
            "grpo": lambda length: world / (length * n_trajectories),
            "dapo": lambda length: world / n_hops,
            "dr_grpo": lambda length: world / (n_all * self.environment.max_hops),
        }
        self._note_batch(trajectories, table, varied, choices)
        if args.log_completions:
            self._write_trajectories(trajectories, rewards, flat.tolist())
        per_part = len(trajectories) // parts
        batches = []
        for start in range(0, len(trajectories), per_part):
            hops = [
                (choice, flat[i].item(), weight_of[args.loss_type](lengths[i]))
                for i in range(start, start + per_part)
                if taking[i]
                for choice in choices[i]
            ]
            batches.append(
                HopBatch(
                    states=states,
                    state=[choice.state for choice, _, _ in hops],
                    picks=torch.tensor([choice.picks for choice, _, _ in hops], dtype=torch.long).view(-1, self.top_k),
                    advantage=torch.tensor([advantage for _, advantage, _ in hops]),
                    weight=torch.tensor([weight for _, _, weight in hops]),
                    sampled=torch.tensor([choice.log_prob for choice, _, _ in hops]),
                )
            )
        return batches

    # ---- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: HopBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The clipped objective of equation 12 over the hops of one part, and the KL term.

        Args:
            model: the encoder, possibly wrapped.
            inputs: hops.
            return_outputs: not supported.
            num_items_in_batch: not used; the weights of the hops normalise.

        Returns:
            A scalar whose sum over the parts of a step is the loss.

        Raises:
            RagRLError: the encoder scores a list otherwise than when it was sampled, before any update.
        """
        if not inputs.state:
            inputs.states.vectors = []
            # Every process must take part in the backward pass, also one whose groups were all dropped.
            return self.encode(model, [inputs.states.texts[0] if inputs.states.texts else ""]).sum() * 0.0
        args, device = self.args, self.args.device
        distinct = sorted(set(inputs.state))
        place = torch.tensor([distinct.index(state) for state in inputs.state], device=device)
        # Taken, not read: a graph can be walked once, and what hangs on dropped states should go now.
        sampled, inputs.states.vectors = inputs.states.vectors, []
        if sampled:
            vectors = torch.stack([sampled[state] for state in distinct])
        else:
            vectors = self.encode(model, [inputs.states.texts[state] for state in distinct])
        pools = self.pools(np.array([inputs.states.rows[state] for state in distinct]))
        scores = self.scores(vectors, pools)  # (S, K)
        if args.objective == "replug":
            target = torch.stack([inputs.states.useful[state] for state in distinct]).to(scores)
            divergence = first_pick_kl(target / args.replug_temperature, scores)
            return (divergence[place] * inputs.weight.to(device)).sum()
        picks, advantage, weight = (t.to(device) for t in (inputs.picks, inputs.advantage, inputs.weight))
        log_probs = log_prob(scores[place], picks)  # (H,)
        if inputs.old is None:
            inputs.old = log_probs.detach()
            self._check_drift(inputs.old, inputs.sampled.to(device), vectors.dtype)
        ratio = torch.exp(log_probs - inputs.old)
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        clipped = ratio.clamp(1 - args.epsilon, 1 + high)
        loss = -(torch.minimum(ratio * advantage, clipped * advantage) * weight).sum()
        self._note("clip_ratio", (ratio != clipped).float().mean().item())
        if args.beta:
            reference = torch.stack([inputs.states.reference[state] for state in distinct])
            kl = first_pick_kl(scores, reference)[place]
            loss = loss + args.beta * (kl * weight).sum()
            self._note("kl", kl.mean().item())
        return loss

    def _read_candidates(self, trajectories: Sequence[Trajectory], states: States) -> None:
        """Lets the reader read every candidate of every state alone (the replug baseline)."""
        first: dict[int, tuple[Trajectory, Search]] = {}
        for trajectory in trajectories:
            for number, hop in enumerate(trajectory.hops):
                if isinstance(hop.action, Choice) and hop.action.state not in first:
                    before = Trajectory(trajectory.question, trajectory.hops[:number])
                    first[hop.action.state] = before, Search(hop.query, hop.gold_doc_ids, hop.note)
        if first:
            useful = self.environment.usefulness(
                [trajectory for trajectory, _ in first.values()],
                [search for _, search in first.values()],
                [self.index.passages.take(states.rows[state]) for state in first],
            )
            states.useful = dict(zip(first, torch.from_numpy(useful), strict=True))

    def encode(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Query vectors that gradients flow through.

        Args:
            model: the encoder, possibly wrapped.
            texts: S states.

        Returns:
            (S, D), normalised as the index was built.
        """
        encoder = self.encoder.encoder
        features = encoder.model.preprocess(list(texts), prompt=encoder.query_prompt or None)
        features = {k: v.to(self.args.device) if isinstance(v, Tensor) else v for k, v in features.items()}
        vectors = model(features)["sentence_embedding"]
        return nn.functional.normalize(vectors, dim=-1) if encoder.normalize else vectors

    @property
    def one_pass(self) -> bool:
        """Whether the pass that samples is also that of the loss, which spares the encoder one of two.

        It is where the loss takes all states at once, with the weights that sampled: one part, one iteration. Several
        processes search a different number of times, so there the wrapped model has to be asked once more.
        """
        args = self.args
        alone = self.accelerator.distributed_type == DistributedType.NO
        return alone and args.gradient_accumulation_steps == 1 and args.num_iterations == 1

    def encode_to_sample(self, texts: Sequence[str]) -> Tensor:
        """Query vectors of the current weights, in batches of texts of similar length, of the evaluation's size.

        Args:
            texts: S states.

        Returns:
            (S, D); gradients flow through them where the loss will use them (``one_pass``).
        """
        size = self.args.per_device_eval_batch_size * 8
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        with torch.set_grad_enabled(self.one_pass), self.compute_loss_context_manager():
            for start in range(0, len(order), size):
                parts.append(self.encode(self._active, [texts[i] for i in order[start : start + size]]))
            vectors = torch.cat(parts)
            back = torch.empty(len(order), dtype=torch.long)
            back[torch.tensor(order)] = torch.arange(len(order))
            return vectors[back.to(vectors.device)]

    def encode_reference(self, texts: Sequence[str]) -> Tensor:
        """Query vectors of the encoder at the start.

        Args:
            texts: S states.

        Returns:
            (S, D).
        """
        if self.reference is None:
            raise ConfigError("beta is 0: there is no reference encoder")
        with self.reference as frozen, torch.no_grad(), self.compute_loss_context_manager():
            return self.encode(frozen, texts)

    def pools(self, rows: IntArray) -> Tensor:
        """Document vectors of pools, in one gather.

        Args:
            rows: (S, K).

        Returns:
            (S, K, D) on the trainer's device.
        """
        return torch.from_numpy(self.index.vectors(rows)).to(self.args.device)

    def scores(self, vectors: Tensor, pools: Tensor) -> Tensor:
        """Scores of the policy: inner products over alpha.

        Args:
            vectors: (S, D) query vectors.
            pools: (S, K, D) document vectors.

        Returns:
            (S, K) float32.
        """
        # On a CPU, (1, D) x (D, K) takes a sixth of the time of (K, D) x (D, 1), forward and backward.
        return torch.bmm(vectors.float().unsqueeze(1), pools.float().mT).squeeze(1) / self.args.alpha

    def _check_drift(self, now: Tensor, sampled: Tensor, dtype: torch.dtype) -> None:
        drift = (now - sampled).abs().max().item()
        self._note("sampling_drift", drift)
        allowed = _MAX_DRIFT.get(dtype, _MAX_DRIFT_HALF)
        if not drift <= allowed:
            raise RagRLError(
                f"a list has another log-probability in the loss than when it was sampled, by {drift:.3g} (at most "
                f"{allowed:g}), although nothing was updated: the encoder is not deterministic"
            )

    # ---- the model while sampling

    @property
    def _active(self) -> nn.Module:
        return self._unwrapped_model if getattr(self, "_unwrapped_model", None) is not None else self.model

    @contextmanager
    def _unwrapped(self) -> Iterator[None]:
        # Under ZeRO-3 the weights are gathered once: processes may search a different number of times.
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            self._unwrapped_model = model
            try:
                yield
            finally:
                self._unwrapped_model = None

    # ---- logs

    def _note(self, name: str, value: float) -> None:
        self._pending[name].append(value)

    def _note_batch(
        self,
        trajectories: Sequence[Trajectory],
        table: Tensor,
        varied: Tensor,
        choices: Sequence[Sequence[Choice]],
    ) -> None:
        scored = table[torch.isfinite(table)]
        if len(scored):
            self._note("reward", scored.mean().item())
            self._note("reward_std", scored.std(correction=0).item())
        self._note("frac_reward_zero_std", 1.0 - varied.float().mean().item())
        self._note("unscored", 1.0 - len(scored) / max(1, table.numel()))
        self._note("hops", sum(map(len, choices)) / max(1, len(trajectories)))
        known = [found for t in trajectories for hop in t.hops if (found := hop.success) is not None]
        if known:
            self._note("success", sum(known) / len(known))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the trainer's own metrics, as means since the last log over all processes.

        Args:
            logs: of transformers.
            start_time: of training.
        """
        if "loss" in logs or not self._pending:
            logs = {**logs, **self._means()}
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        from accelerate.utils import gather_object

        own = [{name: (sum(values), len(values)) for name, values in self._pending.items()}]
        everyone: list[Mapping[str, tuple[float, int]]] = gather_object(own)
        self._pending.clear()
        names = dict.fromkeys(name for one in everyone for name in one)
        totals = {name: [one[name] for one in everyone if name in one] for name in names}
        return {name: sum(s for s, _ in pairs) / sum(n for _, n in pairs) for name, pairs in totals.items()}

    def _write_trajectories(
        self, trajectories: Sequence[Trajectory], rewards: Sequence[float | None], advantages: Sequence[float]
    ) -> None:
        folder = Path(self.args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{self.state.global_step:05d}_process_{self.accelerator.process_index}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for trajectory, reward, advantage in zip(trajectories, rewards, advantages, strict=True):
                row = {
                    "qid": trajectory.question.qid,
                    "question": trajectory.question.question,
                    "answer": trajectory.answer,
                    "failure": trajectory.failure,
                    "reward": reward,
                    "advantage": None if advantage != advantage else advantage,
                    "hops": [
                        {
                            "query": hop.query.text,
                            "doc_ids": [hit.passage.doc_id for hit in hop.hits],
                            "observation": hop.observation,
                        }
                        for hop in trajectory.hops
                    ],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def advantages_of(
    rewards: Tensor, *, scale: str = "group", baseline: str = "mean", epsilon: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Advantages within groups (GRPO, arXiv 2402.03300, section 4.1.2; leave-one-out: arXiv 2402.14740).

    Args:
        rewards: (B, G), NaN where there is no reward.
        scale: ``"group"`` or ``"batch"`` divides by that standard deviation (unbiased), ``"none"`` does not (Dr. GRPO,
            arXiv 2503.20783).
        baseline: ``"mean"`` of the group, or ``"leave_one_out"``, the mean of the others.
        epsilon: added to the standard deviation.

    Returns:
        Advantages (B, G), 0 where there is no reward, and (B,) whether the rewards of a group differ.

    Example:
        >>> advantages_of(torch.tensor([[0.0, 1.0]]), scale="none")[0].tolist()
        [[-0.5, 0.5]]
    """
    scored = torch.isfinite(rewards)
    values = rewards.nan_to_num(0.0)
    counts = scored.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / counts.clamp(min=1)
    centred = torch.where(scored, values - mean, 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / (counts - 1).clamp(min=1)
    lowest = torch.where(scored, rewards, float("inf")).amin(dim=1)
    highest = torch.where(scored, rewards, float("-inf")).amax(dim=1)
    varied = highest > lowest
    if baseline == "leave_one_out":
        centred = centred * counts / (counts - 1).clamp(min=1)
    if scale == "group":
        centred = centred / (variance.sqrt() + epsilon)
    elif scale == "batch" and int(scored.sum()) > 1:
        centred = centred / (rewards[scored].std() + epsilon)
    # Rounding leaves a trace where all rewards are alike; a group without variance teaches nothing, exactly.
    return torch.where(varied[:, None], centred, 0.0), varied


def shared_advantages(
    rewards: Tensor, accelerator: Accelerator, *, scale: str = "group", baseline: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Advantages of one process's groups, where the standard deviation of a batch is that of all processes.

    Args:
        rewards: (B, G) on the CPU, of this process; as many on each of the others.
        accelerator: of the trainer.
        scale: as in ``advantages_of``.
        baseline: as there.

    Returns:
        As there, for this process's groups.
    """
    if scale != "batch" or accelerator.num_processes == 1:
        return advantages_of(rewards, scale=scale, baseline=baseline)
    everyone = accelerator.gather(rewards.to(accelerator.device)).cpu()
    advantages, varied = advantages_of(everyone, scale=scale, baseline=baseline)
    own = slice(accelerator.process_index * len(rewards), (accelerator.process_index + 1) * len(rewards))
    return advantages[own], varied[own]


def check_pool(passages: int, candidates: int, top_k: int) -> int:
    """Checks the sizes of index, pool and list against each other.

    Args:
        passages: in the index.
        candidates: K.
        top_k: k.

    Returns:
        K.

    Raises:
        ConfigError: they do not fit.
    """
    if not passages:
        raise ConfigError("the index holds no passage: there is nothing to choose from")
    if candidates > passages:
        raise ConfigError(f"num_candidates must be at most {passages}, the passages of the index, got {candidates}")
    if not 1 <= top_k <= candidates:
        raise ConfigError(f"retriever_top_k must be between 1 and num_candidates ({candidates}), got {top_k}")
    return candidates


class _NoLoss(nn.Module):
    """Stands where sentence-transformers wants a loss; it takes the optimiser's parameters from there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class _Adapterless:
    """A model whose adapter is off inside the context."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        self.model.disable_adapters()
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.enable_adapters()


class _Frozen:
    """A copy that never changes."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: object) -> None:
        return None


def _reference(model: SentenceTransformer) -> _Adapterless | _Frozen:
    return _Adapterless(model) if getattr(model, "_hf_peft_config_loaded", False) else _Frozen(model)


def _zero_dropout(model: nn.Module) -> None:
    # ModernBERT and others keep the rate of attention dropout as a plain attribute.
    for module in model.modules():
        for name in ("attention_dropout", "dropout_prob", "hidden_dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(row["number"]) for row in rows]
