"""How chains are played, whoever writes them: what training and evaluation of a reasoner share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rag_rl.errors import ConfigError
from rag_rl.reasoning.step_environment import StepEnvironment, StepWriter
from rag_rl.reasoning.step_prompts import Layout, StepPrompts
from rag_rl.types import Generator, Retriever


@dataclass(frozen=True, slots=True)
class StepSetup:
    """Retriever, budgets and layout of chains.

    Args:
        retriever: finds documents.
        top_k: documents a search, >= 1.
        max_steps: steps of a chain, >= 1.
        max_step_tokens: budget of one step in tokens, >= 1.
        max_prompt_tokens: longest prompt of a step; None for what the model's context leaves.
        layout: how a chain is shown to the model, as in ``StepPrompts``.
        generator_type: "instruct" and "api" get chat turns, "base" plain text.

    Raises:
        ConfigError: a value out of range.
    """

    retriever: Retriever
    top_k: int = 3
    max_steps: int = 5
    max_step_tokens: int = 512
    max_prompt_tokens: int | None = None
    layout: Layout = "turn"
    generator_type: Literal["api", "base", "instruct"] = "instruct"

    def __post_init__(self) -> None:
        for name in ("top_k", "max_steps", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def writer(self, generator: Generator, *, temperature: float, seed: int | None = None) -> StepWriter:
        """Makes a generator write steps.

        Args:
            generator: any; a local one tells token ids, so that prompts are fitted.
            temperature: 0 for greedy.
            seed: as in ``StepWriter``.

        Returns:
            A writer.
        """
        return StepWriter(
            generator,
            max_new_tokens=self.max_step_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            temperature=temperature,
            seed=seed,
            generator_type=self.generator_type,
            layout=self.layout,
            synchronised=getattr(generator, "synchronised", bool),
        )

    def prompts(self, generator: Generator) -> StepPrompts:
        """The prompts of a generator's steps.

        Args:
            generator: as in ``writer``.

        Returns:
            What makes them, within the budget.
        """
        return self.writer(generator, temperature=0.0).prompts

    def environment(
        self,
        generator: Generator,
        *,
        temperature: float,
        seed: int | None = None,
        synchronised: Callable[[bool], bool] | None = None,
    ) -> StepEnvironment:
        """An environment in which a generator plays.

        Args:
            generator: as in ``writer``.
            temperature: 0 for greedy.
            seed: as in ``StepWriter``.
            synchronised: as in ``rollout``; by default the generator's own, where it has one.

        Returns:
            An environment.
        """
        if synchronised is None:
            synchronised = getattr(generator, "synchronised", bool)
        return StepEnvironment(
            self.writer(generator, temperature=temperature, seed=seed),
            self.retriever,
            top_k=self.top_k,
            max_steps=self.max_steps,
            synchronised=synchronised,
        )
