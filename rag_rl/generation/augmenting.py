"""A generator as the augmenter of queries: a pseudo-answer a query, or several to choose from (arXiv 2502.11562)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from rag_rl.errors import ConfigError
from rag_rl.prompts import load_prompt, render, require_placeholders
from rag_rl.text import split_thinking
from rag_rl.types import Generation, Generator, Prompt


class QueryAugmenter:
    """Writes what a passage that serves a query might say, as HyDE does (Gao et al. 2022, arXiv 2212.10496).

    Sampling defaults are those of Reinforced-IR, whose repetition penalty of 1.1 is left out: a ``Generator`` has
    none, and the model that DPO compares has none either.

    Args:
        generator: any; one that is trained later is asked with the same prompt.
        prompt: name or path of a prompt with ``$query`` and, if it likes, ``$task``, ``$answer_type`` and
            ``$question`` (the query under the name that some prompts have for it).
        max_new_tokens: budget of an augmentation.
        name: tells this generator from others in the fingerprint: its name, and what changes with its weights.

    Attributes:
        failed: augmentations that were none, so far: the request failed alone, or the reply was empty.
        cut: augmentations that ran into the budget, so far; they are used as they are.

    Raises:
        ConfigError: no such prompt, or it has a place for something else or none for the query.
    """

    def __init__(
        self, generator: Generator, *, prompt: str = "augment_query", max_new_tokens: int = 300, name: str = ""
    ) -> None:
        try:
            if "$question" not in load_prompt(prompt):
                require_placeholders(prompt, ["query"])
            self.template = load_prompt(prompt)
            render(prompt, query="", question="", task="", answer_type="")
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(str(error)) from error
        self.generator, self.prompt, self.max_new_tokens, self.name = generator, prompt, max_new_tokens, name
        self.failed = self.cut = 0

    @property
    def fingerprint(self) -> str:
        """Changes with the name, the prompt and the budget; what the generator weighs is the name's affair."""
        return hashlib.sha256(json.dumps([self.name, self.template, self.max_new_tokens]).encode()).hexdigest()

    def prompts(
        self, queries: Sequence[str], *, task_instruction: str = "", answer_type: str = "passage"
    ) -> list[Prompt]:
        """What the generator is asked.

        Args:
            queries: B queries.
            task_instruction: what the search is for.
            answer_type: what is to be written.

        Returns:
            B prompts of one user turn each.
        """
        return [
            [
                {
                    "role": "user",
                    "content": render(
                        self.prompt, query=query, question=query, task=task_instruction, answer_type=answer_type
                    ).strip(),
                }
            ]
            for query in queries
        ]

    def augment(
        self, queries: Sequence[str], *, task_instruction: str = "", answer_type: str = "passage"
    ) -> list[str | None]:
        """One greedy augmentation a query.

        Args:
            queries: B queries.
            task_instruction: what the search is for.
            answer_type: what is to be written.

        Returns:
            B texts without the prefix; None where there is none.

        Raises:
            BackendError: as the generator raises it.
        """
        asked = self.prompts(queries, task_instruction=task_instruction, answer_type=answer_type)
        replies = self.generator.generate(asked, max_new_tokens=self.max_new_tokens, temperature=0.0) if asked else []
        return [self._text(row, 0) for row in replies]

    def candidates(
        self,
        queries: Sequence[str],
        *,
        n: int,
        task_instruction: str = "",
        answer_type: str = "passage",
        temperature: float = 0.9,
        top_p: float = 0.9,
        seed: int | None = None,
    ) -> list[list[str | None]]:
        """Several sampled augmentations a query, in one call of the generator, which reads each prompt once.

        Args:
            queries: B queries.
            n: augmentations a query, at least 2.
            task_instruction: what the search is for.
            answer_type: what is to be written.
            temperature: above 0.
            top_p: share of the probability mass that is sampled from.
            seed: of the sampling, where the generator heeds one.

        Returns:
            B lists of ``n`` texts without the prefix; None where there is none. Equal texts may repeat.

        Raises:
            ConfigError: ``n`` is below 2, or the temperature is 0: candidates must differ.
            BackendError: as the generator raises it.
        """
        if n < 2 or temperature <= 0.0:
            raise ConfigError(
                f"candidates must differ: n must be at least 2, the temperature above 0, got {n} and {temperature}"
            )
        asked = self.prompts(queries, task_instruction=task_instruction, answer_type=answer_type)
        if not asked:
            return []
        replies = self.generator.generate(
            asked, n=n, max_new_tokens=self.max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        return [[self._text(row, place) for place in range(n)] for row in replies]

    def _text(self, row: Sequence[Generation], place: int) -> str | None:
        said = None
        if place < len(row) and row[place].finish_reason != "error":
            said = (split_thinking(row[place].text)[1] or "").strip()
        if not said:
            self.failed += 1
            return None
        self.cut += row[place].finish_reason == "length"
        return said
