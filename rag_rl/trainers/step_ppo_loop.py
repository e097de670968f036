"""TRL's PPO loop, opened where it touches models. The only file that knows its inside (written for TRL 1.12).

TRL's ``PPOTrainer.train`` draws prompts, lets the policy complete them, asks a reward model, and makes an update.
While it runs, three functions of its module are replaced by ours:

* ``batch_generation``: completions come from our caller, who gets the whole batch at once and scores it, too;
* ``get_reward``: rewards are those that the caller has found, values are computed without padding;
* ``forward``: of policy and reference, without padding, and with logits for the completions only.

The prompts come from our iterable, which may play chains with the current policy whenever it is asked. KL penalty,
advantages, whitening and the clipped losses are TRL's. What it leaves out is added: a learning rate for the value
model, gradient clipping, mixed precision, a checkpoint that can be gone on from, and two processes with LoRA.
"""

from __future__ import annotations

import gc
import json
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # before TRL is imported

from transformers import PreTrainedModel, TrainerCallback
from trl.experimental.ppo import PPOTrainer, ppo_trainer

from rag_rl.errors import ConfigError, DataError
from rag_rl.trainers.quantized_layers import keep_trainable
from rag_rl.trainers.step_ppo_config import StepPPOConfig
from rag_rl.trainers.step_ppo_models import NoModel, ValueModel

VALUE_FILE = "value_model.safetensors"
PROGRESS_FILE = "step_ppo.json"
# Rows go together where the narrowest has at least this share of the widest's length.
_NARROWEST = 0.7


class PPOLoop(PPOTrainer):  # type: ignore[misc]
    """TRL's trainer around our prompts and completions.

    Args:
        args: settings; the counts that TRL computes are filled in.
        policy: a causal LM, without an adapter where ``peft_config`` is given.
        tokenizer: its tokenizer.
        peft_config: of the adapter on the policy; None for training in full.
        callbacks: of transformers.
        batches: gives (B, T) prompts, padded on the left, whenever TRL wants an update.
        complete: turns a batch of prompts into (B, T + S) prompts with completions, padded on the right, and the
            (B,) rewards of the completions.
        on_log: gets TRL's metrics of an update, gives those to log; None for nothing.
        progress: gives what a checkpoint shall keep of the caller's; values for JSON.

    Raises:
        ConfigError: a distributed setting that TRL's loop does not work under.
    """

    def __init__(
        self,
        *,
        args: StepPPOConfig,
        policy: Any,
        tokenizer: Any,
        peft_config: Any,
        callbacks: list[Any],
        batches: Iterable[Tensor],
        complete: Callable[[Tensor], tuple[Tensor, Tensor]],
        on_log: Callable[[dict[str, float]], dict[str, Any] | None],
        progress: Callable[[], dict[str, Any]],
    ) -> None:
        self.complete, self.on_log, self.progress = complete, on_log, progress
        self.grad_norms: dict[str, float] = {}
        self.done = 0
        self.control: Any = None  # TRL sets it
        self._rewards, self._keep = torch.zeros(0), 0
        args.total_episodes = args.total_updates * args.local_size * int(os.environ.get("WORLD_SIZE", "1"))
        _enable_checkpointing(policy, args)
        value_model = ValueModel(policy, peft_config)
        keep_trainable(value_model)
        with (
            _mixed_precision(args),
            _replaced(ppo_trainer, "PolicyAndValueWrapper", _PolicyAndValue),
        ):
            super().__init__(
                args=args,
                processing_class=tokenizer,
                model=policy,
                ref_model=None,
                reward_model=NoModel(),
                value_model=value_model,
                train_dataset=[{}],  # never read: see below
                data_collator=list,
                callbacks=[_GoOn(self), *callbacks],
                peft_config=peft_config,
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError("PPO runs on one process or under DDP (multi_gpu.yaml), not under DeepSpeed or FSDP")
        self.dataloader = _Prompts(self, batches)
        # At the end of a data loader accelerate steps the optimiser after every micro-batch. There is none here.
        self.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        # The constructor of transformers' trainer sets these, and TRL does not call it.
        self.is_distributed_loading_by_transformers = self.is_fsdp_xla_v1_enabled = False
        if not hasattr(self.model, "policy"):  # DDP hides what TRL reads
            object.__setattr__(self.model, "policy", self.model.module.policy)

    @property
    def policy(self) -> Any:
        """The model under training, out of its wrappers."""
        return self.accelerator.unwrap_model(self.model).policy

    def create_optimizer(self, model: Any = None) -> Any:
        """One optimiser in which the value model has a learning rate of its own, and gradients are clipped.

        Args:
            model: as in transformers.

        Returns:
            The optimiser.
        """
        optimizer = super().create_optimizer(model)
        own = {id(weight) for weight in self.value_model.parameters()}
        parts = [("value", self.args.value_learning_rate), ("policy", self.args.learning_rate)]
        optimizer.param_groups[:] = [
            {**group, "params": chosen, "lr": rate, "part": part}
            for group in optimizer.param_groups
            for part, rate in reversed(parts)
            if (chosen := [weight for weight in group["params"] if (id(weight) in own) == (part == "value")])
        ]
        optimizer.register_step_pre_hook(self._clip)
        return optimizer

    def _clip(self, optimizer: Any, *_: Any) -> None:
        """Clips the gradients of each model by itself: one norm over both would let one starve the other."""
        for part in ("policy", "value"):
            weights = [w for group in optimizer.param_groups if group["part"] == part for w in group["params"]]
            norm = nn.utils.clip_grad_norm_(weights, self.args.max_grad_norm or float("inf"))
            self.grad_norms[part] = float(norm)

    def train_from(self, checkpoint: str | None) -> None:
        """Trains to the end, or until a callback asks to stop.

        Args:
            checkpoint: folder that ``load`` has taken over; None for the beginning.
        """
        if checkpoint is None:
            _seed(self.local_seed)
        else:
            self._load_rng_state(checkpoint)
        self.args.num_total_batches = self.args.total_updates - self.done
        gc.freeze()  # TRL collects garbage several times an update: only what is made here shall be looked through
        try:
            with (
                warnings.catch_warnings(),
                _replaced(ppo_trainer, "batch_generation", self._generate),
                _replaced(ppo_trainer, "get_reward", self._reward),
                _replaced(ppo_trainer, "forward", self._forward),
            ):
                warnings.filterwarnings("ignore", message=r"var\(\): degrees of freedom")  # of a single number
                super().train()
        except _Stopped:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        finally:
            gc.unfreeze()

    def load(self, checkpoint: str) -> dict[str, Any]:
        """Takes over weights, optimiser, schedule and log of a checkpoint.

        Args:
            checkpoint: its folder.

        Returns:
            The ``progress`` that was saved in it.

        Raises:
            DataError: it is not one of this trainer.
        """
        folder = Path(checkpoint)
        missing = [name for name in (VALUE_FILE, PROGRESS_FILE) if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} is no checkpoint of PPO over steps: it has no {' and no '.join(missing)}")
        self._load_from_checkpoint(checkpoint, model=self.policy)
        self.value_model.load_trained_state(load_file(folder / VALUE_FILE))
        self._load_optimizer_and_scheduler(checkpoint)
        self._load_scaler(checkpoint)
        state = type(self.state).load_from_json(str(folder / "trainer_state.json"))
        self.done, self.state.log_history = state.global_step, state.log_history
        progress: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        return progress

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy; into a checkpoint the value model as well.

        Args:
            output_dir: folder.
            _internal_call: whether this is for a checkpoint.
        """
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and output_dir is not None:
            save_file(self.value_model.trained_state(), str(Path(output_dir) / VALUE_FILE))
            (Path(output_dir) / PROGRESS_FILE).write_text(json.dumps(self.progress()), encoding="utf-8")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Says nothing: a tied weight is saved once, and loaded with the one that it is tied to."""
        if load_result.unexpected_keys:
            raise DataError(f"the checkpoint holds weights of another model: {load_result.unexpected_keys[:3]}")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes none: the run writes the card, and TRL's reads what DDP hides."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what ``on_log`` makes of the metrics.

        Args:
            logs: of TRL, for each update.
            start_time: as in transformers.
        """
        chosen = self.on_log(logs)
        if chosen is not None:
            super().log(chosen, start_time)

    @torch.no_grad()
    def values(self, sequences: Tensor) -> Tensor:
        """What the value model gives.

        Args:
            sequences: (B, T) token ids, padded.

        Returns:
            (B, T) values after each token, 0 at the padding on the left.
        """
        mask = sequences != self.processing_class.pad_token_id
        values: Tensor = _by_width(self.value_model, sequences, mask)[..., 0]
        return values

    def _generate(self, model: Any, queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """In place of TRL's: completions, and the logits of their tokens exactly as in the update."""
        sequences, self._rewards = self.complete(queries)
        self._keep = sequences.shape[1] - queries.shape[1] + 1
        parts = [
            self._forward(model, rows, self.processing_class.pad_token_id).logits[:, :-1]
            for rows in sequences.split(self.args.local_rollout_forward_batch_size)
        ]
        return sequences, torch.cat(parts) / (self.args.temperature + 1e-7)

    def _reward(self, model: Any, sequences: Tensor, pad: int, context: int) -> tuple[Any, Any, None]:
        """In place of TRL's, which asks the value model, then the reward model, about parts of the batch in order."""
        if model is self.value_model:
            return self.values(sequences)[..., None], None, None
        found, self._rewards = self._rewards[: len(sequences)], self._rewards[len(sequences) :]
        return None, found.to(sequences.device), None

    def _forward(self, model: Any, sequences: Tensor, pad: int) -> Any:
        """In place of TRL's: of the policy, the reference, or policy and value model together."""
        mask = sequences != pad
        if isinstance(model, PreTrainedModel) or hasattr(model, "base_model"):
            with self.accelerator.autocast():
                return SimpleNamespace(logits=_Tail(self._upcast(_by_width(model, sequences, mask, self._keep))))
        logits, values = model(sequences=sequences, mask=mask, keep=self._keep)
        return SimpleNamespace(logits=_Tail(self._upcast(logits))), values

    def _upcast(self, logits: Tensor) -> Tensor:
        return logits.float() if self.accelerator.mixed_precision != "no" else logits


class _PolicyAndValue(ppo_trainer.PolicyAndValueWrapper):  # type: ignore[misc]
    """Both models in one module, which DDP wants; computes what is needed of each."""

    def forward(self, sequences: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Gives (B, S + 1, V) logits and (B, T, 1) values."""
        return _by_width(self.policy, sequences, mask, keep), _by_width(self.value_model, sequences, mask)


class _Tail:
    """The last logits of each row, in place of all of them: TRL only takes the completion's."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows, columns = place
        if rows != slice(None) or columns.stop != -1:
            raise RuntimeError(f"TRL takes the logits {place}, not those before each token of the completion")
        return self._logits[:, :-1]


def _by_width(model: Any, sequences: Tensor, mask: Tensor, keep: int | None = None) -> Tensor:
    """Runs a model over rows of different lengths without most of the padding on their left.

    The states of one batch are a question alone and whole chains: padded to one length, most of the tokens are none.

    Args:
        model: a causal LM, or a ``ValueModel``.
        sequences: (B, T) token ids.
        mask: (B, T), False at the padding.
        keep: how many of the last positions are wanted of a causal LM; None for the values at all T positions.

    Returns:
        (B, keep, V) logits, or (B, T, 1) values, 0 where nothing was computed.
    """
    total = sequences.shape[1]
    starts = mask.int().argmax(dim=1).tolist()
    order = sorted(range(len(starts)), key=starts.__getitem__)
    found, first = [], 0
    while first < len(order):
        start = starts[order[first]]
        least = total - (total - start) * _NARROWEST
        last = first
        while last < len(order) and starts[order[last]] <= least:
            last += 1
        rows = torch.tensor(order[first:last], device=sequences.device)
        part, shown = sequences[rows, start:], mask[rows, start:]
        inputs = {
            "input_ids": part.masked_fill(~shown, 0),
            "attention_mask": shown,
            "position_ids": shown.cumsum(1) - shown.long(),
            "use_cache": False,
        }
        if keep is not None:
            found.append(model(**inputs, logits_to_keep=keep).logits[:, -keep:])
        else:
            values = model.score(model.backbone(**inputs).last_hidden_state)
            found.append(nn.functional.pad(values, (0, 0, start, 0)))
        first = last
    back = torch.tensor(order, device=sequences.device).argsort()
    return torch.cat(found)[back]


class _Stopped(Exception):
    """A callback asked to stop, which TRL's loop does not hear."""


class _Prompts:
    """Stands in for TRL's data loader."""

    def __init__(self, loop: PPOLoop, batches: Iterable[Tensor]) -> None:
        self.loop, self.batches = loop, batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for prompts in self.batches:
            yield {"input_ids": prompts}
            if self.loop.control.should_training_stop:
                raise _Stopped


class _GoOn(TrainerCallback):  # type: ignore[misc]
    """Tells the state where the run stands, which TRL sets to the beginning; first of all callbacks."""

    def __init__(self, loop: PPOLoop) -> None:
        self.loop = loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.global_step, state.max_steps = self.loop.done, args.total_updates
        state.episode = self.loop.done * args.batch_size
        control.should_training_stop = False


def _enable_checkpointing(policy: Any, args: StepPPOConfig) -> None:
    """Trainers of transformers do this when training begins, TRL's PPO nowhere; the value model copies it."""
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _mixed_precision(args: StepPPOConfig) -> Iterator[None]:
    """Lets TRL's accelerator have the precision asked for: it is given none, and reads the environment."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    os.environ[name] = args.mixed_precision
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
