"""What a step model is asked: the chain so far, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

from rag_rl.errors import ConfigError, DataError
from rag_rl.prompts import render, require_placeholders
from rag_rl.reasoning.steps import NO_DOCUMENTS, Step, render_chain, render_documents, render_step
from rag_rl.types import Message, Passage, Prompt

LEFT_OUT = "(left out)"
"""Stands for the documents of a step that had to give way; not the same as a search that found nothing."""

Encode: TypeAlias = Callable[[Sequence[Prompt]], Sequence[Sequence[int]]]
"""Token ids of prompts as the model gets them; ``TransformersGenerator.encode`` is one."""

Layout: TypeAlias = Literal["turn", "chat"]
"""How a chain is shown: in one user turn, as in the paper, or as a conversation in which documents are user turns."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain up to its next step.

    Attributes:
        question: of the user.
        steps: so far, oldest first; each searches.
        documents: the passages that each step was shown.
    """

    question: str
    steps: Sequence[Step] = ()
    documents: Sequence[Sequence[Passage]] = ()


@dataclass(frozen=True, slots=True)
class StepPrompt:
    """The prompt of one step.

    Attributes:
        text: what the model is shown.
        prompt: the text as a user turn, or as plain text for a base model.
        ids: its token ids; None where nobody can tell them.
        left_out: how many documents gave way to the budget.
    """

    text: str
    prompt: Prompt
    ids: tuple[int, ...] | None = None
    left_out: int = 0


class StepPrompts:
    """Makes the prompts of steps.

    The model under training sees the chain and nothing else: one user turn with the question, all earlier steps and
    their documents, no instructions (arXiv 2505.23794). A teacher sees it within a prompt file, one for the first step
    and one for every other.

    A prompt that is too long loses documents: those of the oldest step first, and of one step the lowest ranked first.
    Where that does not do, the oldest steps go. The question stays whole.

    As a conversation (``layout="chat"``) the question is the first user turn, each step a turn of the assistant, and
    its documents are the user turn that follows: a prompt is then the beginning of the next one, and a whole chain one
    sequence of tokens, which GRPO with an ``env_mask`` needs.

    Args:
        chat: whether the text is a user turn; otherwise plain text, which ends with a line break (base models).
        layout: how a chain is shown; "chat" only without prompt files and for chat models.
        first: name or path of a prompt with ``$question``; None for the bare chain.
        following: name or path of a prompt with ``$question`` and ``$steps``; None for the bare chain.
        encode: tells token ids; needed for ``max_tokens``.
        max_tokens: longest prompt, >= 1; None for no bound.

    Raises:
        ConfigError: a prompt is missing or lacks a placeholder, one of the two files is not given, a bound without
            ``encode``, or a layout that is unknown or does not fit.
    """

    def __init__(
        self,
        *,
        chat: bool = True,
        layout: Layout = "turn",
        first: str | None = None,
        following: str | None = None,
        encode: Encode | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if (first is None) != (following is None):
            raise ConfigError("a teacher needs two prompts: one for the first step and one for the following ones")
        if layout not in ("turn", "chat"):
            raise ConfigError(f"layout must be turn or chat, got {layout!r}")
        if layout == "chat" and (first is not None or not chat):
            raise ConfigError("layout chat is a conversation: it takes neither prompt files nor a base model")
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_prompt_tokens must be at least 1, got {max_tokens}")
        if max_tokens is not None and encode is None:
            raise ConfigError("max_prompt_tokens has no effect on a generator that does not tell token ids")
        for prompt, needed in ((first, ("question",)), (following, ("question", "steps"))):
            if prompt is None:
                continue
            try:
                require_placeholders(prompt, needed)
            except (ValueError, FileNotFoundError) as error:
                raise ConfigError(str(error)) from error
        self.chat, self.layout, self.first, self.following = chat, layout, first, following
        self.encode, self.max_tokens = encode, max_tokens

    def make(self, chains: Sequence[Chain]) -> list[StepPrompt]:
        """Makes the prompt of each chain's next step; all are encoded in one call, only those that are too long again.

        Args:
            chains: B chains.

        Returns:
            B prompts.

        Raises:
            DataError: a question alone is longer than the bound; the message counts them.
            ConfigError: a prompt file holds a placeholder that is not known.
        """
        made = self._encoded([self._prompt(chain, 0, 0) for chain in chains])
        limit = self.max_tokens
        if limit is None:
            return made
        hopeless = []
        for i, chain in enumerate(chains):
            if len(made[i].ids or ()) > limit:
                made[i] = self._shortened(chain, limit)
                if len(made[i].ids or ()) > limit:
                    hopeless.append(chain.question)
        if hopeless:
            raise DataError(
                f"{len(hopeless)} of {len(chains)} questions are longer than the {limit} tokens of a prompt even "
                f"without any steps, first {hopeless[0]!r:.80}: leave them out or allow longer prompts"
            )
        return made

    def _shortened(self, chain: Chain, limit: int) -> StepPrompt:
        """The longest prompt that fits; the question alone where none does."""
        every = sum(map(len, chain.documents))

        def at(documents: int, steps: int) -> StepPrompt:
            return self._encoded([self._prompt(chain, documents, steps)])[0]

        def fits(made: StepPrompt) -> bool:
            return len(made.ids or ()) <= limit

        def first_that_fits(most: int, leaving_out: Callable[[int], StepPrompt]) -> StepPrompt:
            low, high, found = 0, most, leaving_out(most)
            while fits(found) and high - low > 1:
                middle = (low + high) // 2
                if fits(tried := leaving_out(middle)):
                    high, found = middle, tried
                else:
                    low = middle
            return found

        found = first_that_fits(every, lambda documents: at(documents, 0))
        return found if fits(found) else first_that_fits(len(chain.steps), lambda steps: at(every, steps))

    def _prompt(self, chain: Chain, documents: int, steps: int) -> StepPrompt:
        """The prompt without so many of the oldest documents and steps."""
        left, shown = documents, []
        for passages in chain.documents:
            gone = min(left, len(passages))
            left -= gone
            shown.append(None if gone and gone == len(passages) else passages[: len(passages) - gone])
        turns = []
        for step, kept in list(zip(chain.steps, shown, strict=True))[steps:]:
            turns.append((True, render_step(step)))
            if step.query is not None:
                turns.append((False, render_documents(kept or (), empty=LEFT_OUT if kept is None else NO_DOCUMENTS)))
        text = self._text(chain.question, "\n".join(told for _, told in turns))
        if not self.chat:
            return StepPrompt(text, text, left_out=documents)
        messages = [cast("Message", {"role": "user", "content": text})]
        if self.layout == "chat":
            messages = [{"role": "user", "content": render_chain(chain.question, (), ())}]
            messages += [{"role": "assistant" if own else "user", "content": told} for own, told in turns]
        return StepPrompt(text, messages, left_out=documents)

    def _text(self, question: str, steps: str) -> str:
        if self.first is None or self.following is None:
            text = "\n".join(filter(None, [render_chain(question, (), ()), steps]))
            return text if self.chat else f"{text}\n"
        try:
            if not steps:
                return render(self.first, question=question)
            return render(self.following, question=question, steps=steps)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _encoded(self, made: Sequence[StepPrompt]) -> list[StepPrompt]:
        if self.encode is None or not made:
            return list(made)
        rows = self.encode([one.prompt for one in made])
        return [replace(one, ids=tuple(ids)) for one, ids in zip(made, rows, strict=True)]
