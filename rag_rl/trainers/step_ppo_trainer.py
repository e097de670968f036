"""PPO over the steps of multi-hop chains (R3-RAG, arXiv 2505.23794): one step is one episode.

Everything before a step (question, earlier steps, what they found) is its prompt, so that nothing retrieved is ever in
a completion and no mask is needed. In each round the current policy plays questions to their ends; every state that it
met is one that a step can be trained in. Then, update by update, the policy writes one step in each of a batch of
states, the step is carried out, and the chain is played on from there with the same weights, all chains together: how
it ends scales the step's reward. TRL makes the update (``step_ppo_loop``).

A step whose reward cannot be told (an unreadable verdict) takes no part in the update at all: TRL is shown an empty
completion, every token of which it masks, and the value model's own value as its reward. It is counted as ``dropped``.

Memory: over a policy with LoRA, reference and value model share its frozen weights; they cost one more adapter, its
optimiser state and a linear head. Without LoRA there are three whole models, two of them with gradients and optimiser
state. TRL keeps the logits of all completions of an update on a process: steps x tokens x vocabulary values.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import AutoModelForCausalLM

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.reasoning import (
    StepEnvironment,
    StepPrompt,
    StepScorer,
    StepSetup,
    StepTrajectory,
    has_step_format,
    step_statistics,
)
from rag_rl.trainers.step_ppo_config import StepPPOConfig
from rag_rl.trainers.step_ppo_loop import PPOLoop
from rag_rl.trainers.step_ppo_start import check_start
from rag_rl.types import Generator, Question

logger = logging.getLogger(__name__)

# Of the chains that a round's states come from: what they say of the policy as it is.
_OF_ROLLOUTS = ("correct", "fail", "invalid", "no_search", "searches", "steps", "format", "analysis_words")
# TRL's metrics that are logged as they are.
_OF_TRL = (
    "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "lr",
)  # fmt: skip


class StepPPOTrainer:
    """Trains a writer of steps with PPO.

    It has what the life of a run needs of a trainer of transformers: ``train``, ``save_model``, ``state``, ``args``,
    ``accelerator`` and so on; ``model`` is the policy alone.

    Args:
        model: a causal LM of transformers, or its name; without an adapter.
        args: settings.
        setup: how chains are played.
        scorer: what steps earn.
        questions: to train on.
        processing_class: the tokenizer; its padding token must not be its end token.
        generator_class: ``rag_rl.generation.PolicyGenerator``, or what takes its arguments.
        peft_config: of a LoRA adapter; None trains all weights.
        quantization_config: of the model, where it is given by its name.
        callbacks: of transformers.

    Raises:
        ConfigError: settings that do not go together.
        DataError: no questions, or questions without answers where the reward needs them.
    """

    def __init__(
        self,
        model: Any,
        args: StepPPOConfig,
        setup: StepSetup,
        scorer: StepScorer,
        questions: Sequence[Question],
        processing_class: Any,
        generator_class: Callable[..., Generator],
        peft_config: Any = None,
        quantization_config: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        _check_tokenizer(processing_class)
        _check_rule(scorer, args)
        self.questions = _checked(questions, scorer)
        self.args, self.setup, self.scorer, self.processing_class = args, setup, scorer, processing_class
        self._drawn = 0
        self._steps_a_chain = 1.0
        self._states: list[tuple[StepTrajectory, StepPrompt]] = []
        self._batch: list[tuple[StepTrajectory, StepPrompt]] = []
        self._round: dict[str, Any] = {}
        self._update: dict[str, Any] = {}
        self._logged: list[dict[str, float]] = []
        self._began = time.time()
        if isinstance(model, str):
            check_start(model)
            options: dict[str, Any] = dict(args.model_init_kwargs or {})
            if quantization_config is not None:
                options["quantization_config"] = quantization_config
            model = AutoModelForCausalLM.from_pretrained(model, **options)
        self.loop = PPOLoop(
            args=args,
            policy=model,
            tokenizer=processing_class,
            peft_config=peft_config,
            callbacks=list(callbacks or []),
            batches=_Lazily(self._batches),
            complete=self._complete,
            on_log=self._metrics,
            progress=lambda: {"drawn": self._drawn, "steps_a_chain": self._steps_a_chain},
        )
        self.generator: Any = generator_class(
            self, batch_size=args.rollout_batch_size, generator_type=setup.generator_type
        )
        self.environment: StepEnvironment = setup.environment(self.generator, temperature=args.temperature)

    # ---- what a trainer of transformers has

    @property
    def model(self) -> Any:
        """The policy, out of its wrappers."""
        return self.loop.policy

    @property
    def model_wrapped(self) -> Any:
        """The policy; generation needs no wrapper."""
        return self.loop.policy

    @property
    def accelerator(self) -> Any:
        """Of the loop."""
        return self.loop.accelerator

    @property
    def state(self) -> Any:
        """Where training stands, and its log."""
        return self.loop.state

    @property
    def control(self) -> Any:
        """What callbacks ask for."""
        return self.loop.control

    @property
    def callback_handler(self) -> Any:
        """Of the loop."""
        return self.loop.callback_handler

    def add_callback(self, callback: Any) -> None:
        """Adds a callback.

        Args:
            callback: of transformers.
        """
        self.loop.add_callback(callback)

    def save_model(self, output_dir: str | None = None) -> None:
        """Saves the policy, or its adapter; every process must call it.

        Args:
            output_dir: folder; by default ``args.output_dir``.
        """
        self.loop.save_model(output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        del model
        self.loop._save_checkpoint(self.loop.model, trial)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Trains to the last update.

        Args:
            resume_from_checkpoint: folder of a checkpoint of this trainer; finished updates are not done again.

        Raises:
            BackendError: the policy, the retriever or a judge failed, or too many steps had no reward.
            DataError: it is no such checkpoint, or a question does not fit into a prompt.
        """
        if resume_from_checkpoint is not None:
            progress = self.loop.load(resume_from_checkpoint)
            self._drawn, self._steps_a_chain = progress["drawn"], progress["steps_a_chain"]
        self._states, self._began = [], time.time()
        self.loop.train_from(resume_from_checkpoint)

    # ---- states, from the policy as it is

    def _batches(self) -> Iterator[Tensor]:
        """The prompts of each update; TRL asks for the next batch when the last one has been learnt from."""
        for update in range(self.loop.done, self.args.total_updates):
            place = update % self.args.updates_per_round
            if not self._states:
                later = min(self.args.updates_per_round - place, self.args.total_updates - update)
                self._begin_round(update // self.args.updates_per_round + 1, later * self.args.local_size)
            size = self.args.local_size
            self._batch, self._states = self._states[:size], self._states[size:]
            yield self._padded([prompt.ids or () for _, prompt in self._batch], left=True)

    def _begin_round(self, number: int, wanted: int) -> None:
        started = time.time()
        chains: list[StepTrajectory] = []
        states: list[StepTrajectory] = []
        while self._on_any(len(states) < wanted):
            missing = max(0, wanted - len(states))
            chains += self.environment.rollout(self._draw(math.ceil(missing / self._steps_a_chain)))
            states = [chain.before(record.number) for chain in chains for record in chain.steps]
            if not self._on_any(bool(states)):
                raise BackendError(f"all {len(chains)} chains of round {number} failed: no step can be trained")
        self._steps_a_chain = max(1.0, len(states) / max(1, len(chains)))
        chosen = random.sample(states, wanted)
        self._states = list(zip(chosen, self._prompts(chosen), strict=True))
        found = step_statistics(chains)
        self._round = {
            "round": float(number),
            **{f"rollout/{name}": found[name] for name in _OF_ROLLOUTS},
            "rollout/weights": self.weight_norm(),
            "rollout/seconds": time.time() - started,
        }

    def _draw(self, number: int) -> list[Question]:
        """This process's next questions: all of them in a new order, then again."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        most = max(gather_object([number])) if world > 1 else number
        drawn = []
        for place in range(self._drawn, self._drawn + most * world):
            epoch, within = divmod(place, len(self.questions))
            drawn.append(self.questions[self._order(epoch)[within]])
        self._drawn += most * world
        return drawn[rank::world]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.questions)))
        random.Random(f"{self.args.seed} {epoch}").shuffle(order)
        return order

    def _prompts(self, states: Sequence[StepTrajectory]) -> list[StepPrompt]:
        prompts: list[StepPrompt] = self.setup.prompts(self.generator).make([state.chain for state in states])
        return prompts

    def weight_norm(self) -> float:
        """Tells weights apart: rollouts are logged with that of the weights which they were made with.

        Returns:
            The Euclidean norm of all weights under training.
        """
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        return math.sqrt(sum(float(weight.detach().double().square().sum()) for weight in weights))

    # ---- steps, and what they earn

    def _complete(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a step in each state of the batch, plays it on and scores it; gives sequences and rewards."""
        started = time.time()
        batch, size = self._batch, len(self._batch)
        weights = self.weight_norm()
        rows = self.generator.generate(
            [prompt.prompt for _, prompt in batch],
            max_new_tokens=self.setup.max_step_tokens,
            temperature=self.args.temperature,
        )
        written = [row[0] for row in rows]
        taken = self.environment.take([state for state, _ in batch], [step.text for step in written])
        played = self.environment.roll_on(taken) if self.args.outcome_multiplier == "rollout" else taken
        rewards = self._rewards(played, [len(state.steps) for state, _ in batch])

        kept = [reward is not None for reward in rewards]
        self._refuse_if_too_few(kept)
        ids = [list(step.token_ids or ()) if keep else [] for step, keep in zip(written, kept, strict=True)]
        completions = self._padded(ids, left=False)
        shown = torch.tensor([reward if reward is not None else 0.0 for reward in rewards], device=queries.device)
        dropped = torch.tensor([not keep for keep in kept], device=queries.device)
        if dropped.any():
            shown[dropped] = self.loop.values(queries[dropped])[:, -1].float()

        known = [reward for reward in rewards if reward is not None]
        mean = sum(known) / len(known)
        numbers = [len(state.steps) + 1 for state, _ in batch]
        self._update = {
            "reward": mean,
            "reward_std": math.sqrt(sum((reward - mean) ** 2 for reward in known) / len(known)),
            "format": sum(map(has_step_format, (step.text for step in written), numbers)) / size,
            "searches": sum(chain.steps[n - 1].searches for chain, n in zip(played, numbers, strict=True)) / size,
            "dropped": float(size - len(known)),
            "left_out": sum(prompt.left_out > 0 for _, prompt in batch) / size,
            "completions/mean_length": sum(map(len, ids)) / max(1, len(known)),
            "completions/clipped_ratio": sum(step.finish_reason == "length" for step in written) / size,
            "weights": weights,
            "play_seconds": time.time() - started,
        }
        return torch.cat([queries, completions], dim=1), shown

    def _rewards(self, played: Sequence[StepTrajectory], places: Sequence[int]) -> list[float | None]:
        """The reward of one step of each chain.

        Args:
            played: chains with the step and, where it was played on, what came after it.
            places: of the step in its chain, from 0.

        Returns:
            None for a step whose reward cannot be told.
        """
        rule = self.scorer.rule
        if rule.discount is not None:
            scored = list(played)
        else:
            # The step alone is judged: what came before was judged for its own sake, if at all, and what comes after
            # counts only by how it ends.
            scored = [_up_to(chain, place, rule.needs) for chain, place in zip(played, places, strict=True)]
        self.scorer.score_answers(played)
        self.scorer.score_steps(scored)
        rewards: list[float | None] = []
        for chain, shown, place in zip(played, scored, places, strict=True):
            scores = [record.scores for record in shown.searches]
            if chain.failure is not None:
                rewards.append(None)
            elif chain.is_open and self.args.outcome_multiplier == "none":
                rewards.append(rule.process_score(scores[place]))
            else:
                rewards.append(rule.rewards(chain.state, scores)[place])
        return rewards

    def _refuse_if_too_few(self, kept: Sequence[bool]) -> None:
        everywhere = gather_object([sum(kept)]) if self.accelerator.num_processes > 1 else [sum(kept)]
        steps = len(kept) * len(everywhere)
        if 1 - sum(everywhere) / steps > self.args.max_dropped or not all(everywhere):
            raise BackendError(
                f"{steps - sum(everywhere)} of {steps} steps have no reward (no verdict that could be read), more "
                f"than max_dropped {self.args.max_dropped:g} allows: look at the judge"
            )

    # ---- logs

    def _metrics(self, of_trl: dict[str, float]) -> dict[str, Any] | None:
        """Metrics of an update, averaged over processes; their means are logged every ``logging_steps`` updates."""
        mine = {**self._round, **self._update, **{f"grad_norm/{k}": v for k, v in self.loop.grad_norms.items()}}
        found = _mean(gather_object([mine])) if self.accelerator.num_processes > 1 else mine
        tokens = (1 - found["dropped"] / self.args.local_size) * found["completions/mean_length"]
        found["kl"] = of_trl["objective/kl"] / max(tokens, 1e-9)
        found["entropy"] = of_trl["objective/entropy"] / max(tokens, 1e-9)
        found |= {name: of_trl[name] for name in _OF_TRL}
        self._logged.append({name: value for name, value in found.items() if _is_number(value)})
        state = self.state
        state.epoch = self._drawn / len(self.questions)
        if state.global_step % max(1, int(state.logging_steps)) and state.global_step < state.max_steps:
            return None
        averaged, self._logged = _mean(self._logged), []
        return {name: float(f"{value:.12g}") for name, value in averaged.items()}

    def _on_any(self, flag: bool) -> bool:
        """Whether a flag is set on any process; each makes the same calls then."""
        return any(gather_object([flag])) if self.accelerator.num_processes > 1 else flag

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool) -> Tensor:
        width = max(1, *map(len, rows))
        found = torch.full((len(rows), width), self.processing_class.pad_token_id, dtype=torch.long)
        for row, ids in zip(found, rows, strict=True):
            if ids:
                row[width - len(ids) if left else 0 :][: len(ids)] = torch.tensor(ids)
        return found.to(self.accelerator.device)


class _Lazily:
    """Begins a generator anew each time that somebody wants to go through it."""

    def __init__(self, begin: Callable[[], Iterator[Tensor]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Tensor]:
        return self._begin()


def _up_to(chain: StepTrajectory, place: int, judged: Sequence[str]) -> StepTrajectory:
    """A chain up to one of its steps, in which nothing before it is left to judge."""
    earlier = [replace(record, scores=dict.fromkeys(judged, 0.0)) for record in chain.steps[:place]]
    return StepTrajectory(chain.question, [*earlier, *chain.steps[place : place + 1]], chain.state, chain.failure)


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ConfigError(
            "PPO needs an end token and a padding token that is another one, or the end of a step is never learnt: "
            f"the tokenizer has {tokenizer.eos_token!r} and {tokenizer.pad_token!r}; set its pad_token"
        )


def _check_rule(scorer: StepScorer, args: StepPPOConfig) -> None:
    if args.outcome_multiplier == "rollout":
        return
    if scorer.rule.discount is not None or not scorer.rule.weights:
        raise ConfigError(
            "outcome_multiplier none gives each search its process score alone: take a step_reward that has one and "
            "does not look at later steps (paper, process_only, coherence, gold_gain)"
        )


def _checked(questions: Sequence[Question], scorer: StepScorer) -> list[Question]:
    if not questions:
        raise DataError("there are no questions to train on")
    without = [question.qid for question in questions if not question.answers]
    if without and scorer.rule.rewards(None, []) == [None]:
        raise DataError(
            f"{len(without)} of {len(questions)} questions have no answers, first {without[0]!r}: whether a chain "
            "ends well cannot be told"
        )
    return list(questions)


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means by name, over the rows that have a number there."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if _is_number(value):
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
