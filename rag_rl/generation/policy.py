"""The policy under training as a generator, bound to a TRL trainer.

This is the only place that reaches into the generation internals of TRL (written for 1.12).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.models import unwrap_model_for_generation

from rag_rl.generation.transformers_generator import (
    GeneratorType,
    TransformersGenerator,
    check_lengths,
    check_sampling,
    check_settings,
    finish,
    sample,
)
from rag_rl.types import Generation, Prompt


class PolicyGenerator:
    """The model that a trainer is training, as a ``rag_rl.types.Generator``.

    **Every rank must make the same number of calls**: under ZeRO-3 and FSDP opening the model is collective, and with
    vLLM the generation itself is. A loop that may end at different turns on different ranks asks ``synchronised``
    whether to go on, and a rank that has nothing left to ask calls ``generate`` with an empty list. How many prompts a
    call carries may differ between ranks.

    Gradients are off (``torch.no_grad`` and not inference mode: a sharded parameter that is gathered in inference mode
    could not be trained any more), the model is in evaluation mode during the call, and its token ids are kept, so
    that nothing has to be tokenised again for the loss.

    Args:
        trainer: a TRL ``GRPOTrainer``, or anything with its ``model_wrapped``, ``accelerator``, ``args`` and
            ``processing_class``. With ``use_vllm`` the trainer's vLLM engine generates; there ``seed`` has no effect.
        batch_size: sequences in one pass of the local model, >= 1; has no effect with vLLM.
        max_prompt_tokens: longest prompt that is let through; None for what the model's context leaves.
        generator_type: as in ``TransformersGenerator``.

    Raises:
        ConfigError: ``batch_size`` below 1, or an unknown ``generator_type``.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        batch_size: int = 32,
        max_prompt_tokens: int | None = None,
        generator_type: GeneratorType = "instruct",
    ) -> None:
        check_settings(batch_size=batch_size, generator_type=generator_type)
        self.trainer = trainer
        self.batch_size = batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.generator_type: GeneratorType = generator_type
        # A multimodal processor wraps the tokenizer.
        self.tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)

    # A prompt costs here what it costs outside training: the same methods, over this policy's model and tokenizer.
    encode = TransformersGenerator.encode
    prompt_tokens = TransformersGenerator.prompt_tokens
    prompt_limit = TransformersGenerator.prompt_limit

    @property
    def model(self) -> Any:
        """The model out of its wrappers; under ZeRO-3 and FSDP its parameters are still sharded."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)

    def synchronised(self, flag: bool) -> bool:
        """Tells whether a flag is set on any rank; collective.

        Args:
            flag: this rank's own, such as "some of my episodes go on".

        Returns:
            True on every rank if it is True on one.
        """
        return self._most(int(flag)) > 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[list[Generation]]:
        """Continues prompts with the weights as they are now; every rank must call it.

        Args:
            prompts: B prompts of this rank; may be none.
            n: continuations a prompt, >= 1.
            max_new_tokens: budget of one continuation in tokens, >= 1.
            temperature: 0 for greedy, else > 0.
            top_p: share of the probability mass that is sampled from, in (0, 1].
            stop: strings that end a continuation; the text is cut before them.
            seed: makes sampling repeatable; each rank draws differently from the same seed, since ranks can hold the
                same prompt. None samples from torch's global random state.

        Returns:
            B lists of ``n`` generations with token ids, as ``TransformersGenerator.generate``.

        Raises:
            ConfigError: a value out of range, or chat turns for a tokenizer without a chat template.
            DataError: prompts that are empty or too long.
        """
        check_sampling(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop)
        encoded = self.encode(prompts)
        check_lengths(encoded, self.prompt_limit(max_new_tokens))
        if getattr(self.trainer, "use_vllm", False):
            return self._generate_with_vllm(
                encoded, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop
            )
        accelerator = self.trainer.accelerator
        copies = 1 if temperature == 0.0 else n
        passes = -(-len(encoded) // max(1, self.batch_size // copies))
        collective = self._forward_is_collective()
        with self._open_model() as model:
            return sample(
                model,
                self.tokenizer,
                encoded,
                n=n,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=stop,
                seed=None if seed is None else seed * accelerator.num_processes + accelerator.process_index,
                batch_size=self.batch_size,
                passes=self._most(passes) if collective else 0,
                synced=collective,
            )

    @contextmanager
    def _open_model(self) -> Iterator[Any]:
        """The policy itself: out of its wrappers, gathered under ZeRO-3, without activation checkpointing."""
        # The trainer's own helper for FSDP version 1, which keeps the root's parameters flat; nothing elsewhere.
        distributed = getattr(self.trainer, "_dist", None)
        with (
            unwrap_model_for_generation(
                self.trainer.model_wrapped,
                self.trainer.accelerator,
                gather_deepspeed3_params=getattr(self.trainer.args, "ds3_gather_for_generation", True),
            ) as model,
            torch.no_grad(),
        ):
            if distributed is None:
                yield model
                return
            with distributed.summon_full_params(self.trainer.model_wrapped, recurse=False):
                yield model

    def _forward_is_collective(self) -> bool:
        """Whether ranks must forward in step, since each forward pass gathers parameters from all of them."""
        from accelerate.utils import DistributedType
        from transformers.integrations import is_deepspeed_zero3_enabled

        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return False
        # The rule of transformers' own ``generate``, which does not know FSDP 2 modules.
        return bool(is_deepspeed_zero3_enabled() or accelerator.distributed_type == DistributedType.FSDP)

    def _most(self, number: int) -> int:
        """Largest value of a number over all ranks; collective."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return number
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max().item())

    def _generate_with_vllm(
        self,
        encoded: Sequence[Sequence[int]],
        *,
        n: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
    ) -> list[list[Generation]]:
        trainer, engine = self.trainer, self.trainer.vllm_generation
        # Weights go to vLLM once a training step; the trainer keeps the account.
        if trainer.state.global_step != trainer._last_loaded_step:
            engine.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step
        rows = [list(ids) for ids in encoded for _ in range(n)]
        # In server mode each rank gets back a slice as long as what it sent, cut out of all ranks' rows as if those
        # were equally long: fill up, or rows would be answered with other rows' continuations.
        filler = [self.tokenizer.eos_token_id]
        padded = rows + [filler] * (max(1, self._most(len(rows))) - len(rows))
        settings: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "max_completion_length": max_new_tokens,
            "generation_kwargs": {**engine.generation_kwargs, **({"stop": list(stop)} if stop else {})},
        }
        before = {name: getattr(engine, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(engine, name, value)
            # Always 1: with more, server mode would take every G-th row and drop the others.
            _, completions, _, _ = engine.generate(prompts=padded, images=None, num_generations=1)
        finally:
            for name, value in before.items():
                setattr(engine, name, value)
        model = self.model
        done = [
            finish(self.tokenizer, model, ids, stop, prompt_tokens=len(row))
            for row, ids in zip(rows, completions[: len(rows)], strict=True)
        ]
        return [done[start : start + n] for start in range(0, len(done), n)]
