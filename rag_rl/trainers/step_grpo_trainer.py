"""GRPO over whole chains of a step model (R3-RAG, arXiv 2505.23794; GRPO: DeepSeekMath, arXiv 2402.03300).

The paper trains with PPO, where a step is an episode. Here a chain is one sequence: the steps that the model sampled,
and between them documents that the environment injected, which carry no gradient (``env_mask``). The chains of a
question are a group.

What a token is credited with is the ``step_credit`` of the config. ``trajectory``: the mean reward of the chain's
steps, normalised in its group; the mean and not the sum, which would pay for each further search. ``step`` and
``return_to_go``: the reward of the token's own step, or the sum of it and all later ones, normalised over the same
step of the group's other chains. A step that none of them took has nothing to be compared with, and advantage 0.

A chain that has no reward, since a verdict is missing, is neither trained on nor part of its group's mean; it is
counted as ``unscored``.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from rag_rl.errors import ConfigError, DataError, RagRLError
from rag_rl.reasoning import StepEnvironment, StepScorer, StepSetup, StepTrajectory, render_chain, step_statistics
from rag_rl.trainers.step_grpo_chains import ChainTokens, ChainWriter, ChatTurns, Continuation, repeated_ngrams
from rag_rl.trainers.step_grpo_config import StepGRPOConfig
from rag_rl.trainers.step_grpo_guard import CollapseGuard
from rag_rl.types import Question

logger = logging.getLogger(__name__)


class StepGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """Trains a step model on whole chains.

    Generation is TRL's own (transformers, vLLM), one call a step for all running chains of a process, and so is one
    batched search. Every process makes the same number of calls.

    Args:
        model: name or path of a chat model, or a model.
        args: settings; ``max_completion_length`` is the budget of a whole chain.
        setup: how chains are played; its layout must be "chat".
        scorer: scores finished chains and gives each step its reward.
        questions: to train on.
        processing_class: the model's tokenizer; None for the one beside it.
        callbacks: of the trainer.
        peft_config: of an adapter to train.
        quantization_config: of the model.

    Raises:
        ConfigError: a layout without whole sequences, or a budget that has no room for two steps.
        DataError: questions that leave no room for a chain in the model's context.
    """

    _buffered_inputs: Any  # of TRL

    def __init__(
        self,
        model: Any,
        *,
        args: StepGRPOConfig,
        setup: StepSetup,
        scorer: StepScorer,
        questions: Sequence[Question],
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        peft_config: Any = None,
        quantization_config: Any = None,
    ) -> None:
        if setup.layout != "chat" or setup.generator_type == "base":
            raise ConfigError("GRPO over whole chains needs a conversation: set reasoner_layout: chat, a chat model")
        if args.max_completion_length < setup.max_step_tokens * min(2, setup.max_steps):
            raise ConfigError(
                f"max_completion_length ({args.max_completion_length}) is the budget of a whole chain, and has no "
                f"room for two steps of reasoner_max_step_tokens ({setup.max_step_tokens}), not to speak of documents"
            )
        self.setup, self.scorer, self.questions = setup, scorer, list(questions)
        self._asked: list[Question] = []
        self._played: list[StepTrajectory] = []
        self._tokens: list[ChainTokens] = []
        self._rewards: list[list[float | None]] = []
        self._audited: list[Tensor] | None = None
        self._audit_counts = torch.zeros(2)
        self._audit_done = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'", category=UserWarning)
            super().__init__(
                model=model,
                reward_funcs=[self.chain_reward],
                args=args,
                # Rows are known by their number: two questions with the same words may have different answers.
                train_dataset=Dataset.from_dict(
                    {
                        "prompt": [render_chain(question.question, (), ()) for question in self.questions],
                        "number": list(range(len(self.questions))),
                    }
                ),
                processing_class=processing_class,
                callbacks=[*(callbacks or []), CollapseGuard(args)],
                peft_config=peft_config,
                quantization_config=quantization_config,
                rollout_func=self._rollout,
            )
        own = getattr(self.accelerator.unwrap_model(self.model).generation_config, "eos_token_id", None)
        ends = [self._tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
        self.turns = ChatTurns(
            self._tokenizer, end_ids={i for i in ends if i is not None}, options=self.chat_template_kwargs
        )
        if self.turns.rewrites:
            logger.warning(
                "the chat template shows earlier turns of the model otherwise than it generates them (without the "
                "thinking, for instance): chains in training differ from those in evaluation in that"
            )
        self._check_lengths()

    def _check_lengths(self) -> None:
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if not context or not self.questions:
            return
        lengths = [len(ids) for ids in self.turns.first([question.question for question in self.questions])]
        room = context - self.args.max_completion_length
        long = [question for question, length in zip(self.questions, lengths, strict=True) if length > room]
        if long:
            raise DataError(
                f"{len(long)} of {len(lengths)} questions have no room in the model's context of {context} tokens "
                f"beside a chain of {self.args.max_completion_length} (max_completion_length), first {long[0].qid!r}: "
                "leave them out or lower max_completion_length"
            )

    # ---- playing and scoring chains

    def _rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL's ``rollout_func``: plays the questions of this process, each as often as it is given."""
        writer = ChainWriter(
            self.turns,
            self._continue,
            max_step_tokens=self.setup.max_step_tokens,
            max_tokens=self.args.max_completion_length,
        )
        environment = StepEnvironment(
            writer,
            self.setup.retriever,
            top_k=self.setup.top_k,
            max_steps=self.setup.max_steps,
            synchronised=lambda flag: self._most(int(flag)) > 0,
        )
        self._played = environment.rollout(self._asked)
        self._tokens = [writer.sequence(trajectory) for trajectory in self._played]
        log_probs = [chain.log_probs for chain in self._tokens]
        return {
            "prompt_ids": [chain.prompt_ids for chain in self._tokens],
            "completion_ids": [chain.completion_ids for chain in self._tokens],
            # None where the engine tells none: TRL needs them to correct for vLLM only.
            "logprobs": log_probs if self.use_vllm else None,
            "env_mask": [[int(step > 0) for step in chain.steps] for chain in self._tokens],
        }

    async def chain_reward(self, **_: Any) -> list[float | None]:
        """Scores the chains that were just played; TRL's reward function, and a coroutine as those of judges are.

        Returns:
            The mean reward of each chain's steps; None where one of them has none.

        Raises:
            BackendError: a judge's backend is broken.
        """
        self.scorer.score(self._played)
        self._rewards = [self.scorer.rewards(trajectory) for trajectory in self._played]
        return [chain_return(rewards) for rewards in self._rewards]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._asked = [self.questions[row["number"]] for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # (B, T): which step sampled a token; shuffled and split with everything else, for the audit.
        steps = torch.zeros_like(output["completion_ids"])
        for row, chain in zip(steps, self._tokens, strict=True):
            row[: len(chain.steps)] = torch.tensor(chain.steps)
        output["step_numbers"] = steps
        if self.args.step_credit != "trajectory":
            output["advantages"] = self._step_advantages(steps)
        self._log_chains()
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        buffered = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is buffered:
            return inputs
        # Chains differ in length by far more than answers do: parts of neighbours in length, without their common
        # padding, take a third of the time. All parts must belong to one update, which is then the same.
        parts, size = self._buffered_inputs, len(inputs["completion_mask"])
        if 1 < len(parts) <= self.args.gradient_accumulation_steps:
            whole = {
                name: torch.cat([part[name] for part in parts]) if value.dim() else value
                for name, value in inputs.items()
            }
            order = whole["completion_mask"].sum(dim=1).argsort(stable=True).split(size)
            parts = [{name: value[rows] if value.dim() else value for name, value in whole.items()} for rows in order]
        self._buffered_inputs = [without_padding(part) for part in parts]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _step_advantages(self, steps: Tensor) -> Tensor:
        """(B, T): the advantage of each token's own step; 0 for injected ones."""
        table = torch.full((len(self._rewards), self.setup.max_steps + 1), math.nan, device=steps.device)
        for row, rewards in zip(table, self._rewards, strict=True):
            credited = returns_to_go(rewards) if self.args.step_credit == "return_to_go" else rewards
            for number, value in enumerate(credited, start=1):
                row[number] = math.nan if value is None else value
        group = self.num_generations if self.model.training else self.num_generations_eval
        everywhere = step_advantages(self.accelerator.gather(table), group=group, scale=self.args.scale_rewards)
        start = self.accelerator.process_index * len(table)
        return torch.gather(everywhere[start : start + len(table)], 1, steps)

    def _log_chains(self) -> None:
        found = step_statistics(self._played)
        texts = [record.completion_ids or () for trajectory in self._played for record in trajectory.steps]
        repeated = [share for ids in texts if (share := repeated_ngrams(ids)) is not None]
        found["repetition"] = sum(repeated) / len(repeated) if repeated else None
        found["unscored"] = sum(None in rewards for rewards in self._rewards) / len(self._rewards)
        every = [step for chain in self._tokens for step in chain.steps]
        found["injected"] = every.count(0) / len(every)
        values = torch.tensor([math.nan if v is None else v for v in found.values()], device=self.accelerator.device)
        means = self.accelerator.gather(values[None]).nanmean(dim=0).tolist()
        mode = "train" if self.model.training else "eval"
        for name, value in zip(found, means, strict=True):
            self._metrics[mode][name].append(value)

    # ---- generation

    def _continue(self, rows: Sequence[Sequence[int]]) -> list[Continuation]:
        """Samples a step after each row, with the engine and the settings of TRL; collective."""
        # A process that has nothing left to ask takes part with a filler. In vLLM's server mode each process gets back
        # a slice as long as its own rows, as if those of all processes were equally many.
        if not rows and self.accelerator.num_processes == 1:
            return []
        asked = [list(row) for row in rows]
        least = max(1, self._most(len(asked)) if self.use_vllm else 1)
        asked += [[self._tokenizer.eos_token_id]] * (least - len(asked))
        log_probs: Any = None
        with self._step_budget():
            if self.use_vllm:
                # One a row: with more, server mode would take every G-th row only.
                _, found, told, _ = self.vllm_generation.generate(prompts=asked, images=None, num_generations=1)
                log_probs = [[math.nan if one[0] is None else one[0] for one in row] for row in told]
            else:
                found, _ = self._generate_single_turn(asked, None, {})
        done = []
        for i, ids in enumerate(found[: len(rows)]):
            # Behind an end token that is not the tokenizer's own there is padding.
            end = next((place for place, token in enumerate(ids) if token in self.turns.end_ids), len(ids) - 1) + 1
            done.append(Continuation(list(ids[:end]), None if log_probs is None else log_probs[i][:end]))
        return done

    @contextmanager
    def _step_budget(self) -> Iterator[None]:
        """Makes TRL's engine end a generation after a step, not after a whole chain."""
        settings: Any = self.vllm_generation if self.use_vllm else self.generation_config
        values: dict[str, Any] = {
            "max_completion_length" if self.use_vllm else "max_new_tokens": self.setup.max_step_tokens
        }
        if not self.use_vllm:
            values["eos_token_id"] = sorted(self.turns.end_ids)
        before = {name: getattr(settings, name) for name in values}
        try:
            for name, value in values.items():
                setattr(settings, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(settings, name, value)

    def _most(self, number: int) -> int:
        """Largest value of a number over all processes; collective."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max().item())

    # ---- the audit of the mask

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._audited is not None:
            self._audited = [tensor for tensor in found[:2] if tensor is not None and tensor.requires_grad]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        auditing = not self._audit_done and self.model.training
        self._audited = [] if auditing else None
        loss: Tensor = super()._compute_loss(model, inputs)
        if auditing:
            self._audit(loss, inputs)
        return loss

    def _audit(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        """Proves on the loss itself that injected tokens carry no gradient; until a step has had some.

        The gradient of the loss in the log-probability (and entropy) of each token must be exactly 0 where the token
        was injected, by the record of the rollout and not by the mask that the loss uses; and it must not be 0 at all
        tokens that were sampled in chains with an advantage. ``RagRLError`` if it is otherwise.
        """
        real = inputs["completion_mask"].bool()
        injected = real & (inputs["step_numbers"] == 0)
        tensors, self._audited = self._audited or [], None
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        total = sum((g.abs() for g in gradients if g is not None), torch.zeros_like(tensors[0]))
        advantages = inputs["advantages"].reshape(len(real), -1).expand_as(real)
        moving = real & ~injected & (advantages != 0.0)
        counts = torch.stack(
            [injected.sum(), real.sum(), (total[injected] != 0.0).sum(), moving.sum(), (total[moving] != 0.0).sum()]
        ).float()
        n_injected, n_all, leaking, n_moving, moved = self.accelerator.reduce(counts, reduction="sum").tolist()
        if leaking:
            raise RagRLError(
                f"mask audit: {leaking:.0f} of {n_injected:.0f} injected tokens carry a gradient: documents would be "
                "trained on as if the model had written them. This is a defect, or a change of TRL; do not train"
            )
        if n_moving and not moved:
            raise RagRLError(
                f"mask audit: none of the {n_moving:.0f} sampled tokens that have an advantage carries a gradient: "
                "nothing would be learnt. This is a defect, or a change of TRL; do not train"
            )
        self._audit_counts += torch.tensor([n_injected, n_all])
        if self.accelerator.sync_gradients and self._audit_counts[0]:
            injected_tokens, all_tokens = self._audit_counts.tolist()
            logger.info("mask audit: %.0f injected tokens of %.0f, no gradient", injected_tokens, all_tokens)
            self._audit_done = True


def without_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cuts off the columns that are padding in every row.

    Args:
        batch: as TRL makes it: prompts (B, P) padded on the left, everything else (B, T) on the right; what has other
            shapes stays as it is.

    Returns:
        The same rows, in smaller tensors.

    Example:
        >>> mask = torch.tensor([[0, 1]]), torch.tensor([[1, 1, 0]])
        >>> cut = without_padding({"prompt_mask": mask[0], "completion_mask": mask[1]})
        >>> cut["prompt_mask"].tolist(), cut["completion_mask"].tolist()
        ([[1]], [[1, 1]])
    """
    longest = {name: max(1, int(batch[f"{name}_mask"].sum(dim=1).max())) for name in ("prompt", "completion")}
    width = batch["completion_mask"].shape[1]
    found = {}
    for name, value in batch.items():
        if name in ("prompt_ids", "prompt_mask"):
            value = value[:, -longest["prompt"] :]
        elif value.dim() == 2 and value.shape[1] == width:
            value = value[:, : longest["completion"]]
        found[name] = value
    return found


def chain_return(rewards: Sequence[float | None]) -> float | None:
    """The reward of a whole chain: the mean over its steps.

    Args:
        rewards: one a step.

    Returns:
        Their mean; None where one is missing, or for no steps.

    Example:
        >>> chain_return([1.0, 2.0]), chain_return([1.0, None])
        (1.5, None)
    """
    known = [reward for reward in rewards if reward is not None]
    return sum(known) / len(known) if known and len(known) == len(rewards) else None


def returns_to_go(rewards: Sequence[float | None]) -> list[float | None]:
    """Adds to the reward of each step those of all later ones.

    Args:
        rewards: one a step.

    Returns:
        One value a step; None where its own or a later one is missing.

    Example:
        >>> returns_to_go([1.0, 2.0, 4.0]), returns_to_go([1.0, None, 4.0])
        ([7.0, 6.0, 4.0], [None, None, 4.0])
    """
    found: list[float | None] = []
    later: float | None = 0.0
    for reward in reversed(rewards):
        later = None if reward is None or later is None else reward + later
        found.append(later)
    return found[::-1]


def step_advantages(values: Tensor, *, group: int, scale: str) -> Tensor:
    """Compares each step with the same step of the other chains in its group.

    Args:
        values: (B, S) by chain and step number, NaN where a chain has no such step or the step no reward; groups are
            neighbours.
        group: G, chains a question.
        scale: what differences are divided by, as TRL's ``scale_rewards``: standard deviation of the step in its
            "group", of everything in the "batch", or "none".

    Returns:
        (B, S); 0 where there is no value, or none to compare it with.

    Example:
        >>> step_advantages(torch.tensor([[1.0, 4.0], [3.0, math.nan]]), group=2, scale="none").tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """
    grouped = values.view(-1, group, values.shape[1])
    advantages = (grouped - grouped.nanmean(dim=1, keepdim=True)).view_as(values)
    if scale != "none":
        spread = nanstd(values) if scale == "batch" else nanstd(grouped, dim=1, keepdim=True)
        advantages = (advantages.view_as(grouped) / (spread + 1e-4)).view_as(values)
    return advantages.nan_to_num(nan=0.0)
