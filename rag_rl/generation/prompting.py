"""What is done to a prompt before it reaches a model: flattening chat turns, and fitting passages into a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from rag_rl.errors import DataError
from rag_rl.types import Passage, Prompt

BuildPrompt: TypeAlias = Callable[[Sequence[Passage]], Prompt]
"""Makes the prompt of one question from the passages that it is given."""

CountTokens: TypeAlias = Callable[[Sequence[Prompt]], Sequence[int]]
"""Length of each prompt in tokens; ``TransformersGenerator.prompt_tokens`` is one."""


def prompt_text(prompt: Prompt) -> str:
    r"""Writes a prompt as plain text: what a base model is given in place of chat turns.

    Args:
        prompt: plain text, or chat turns.

    Returns:
        The text itself, or the contents of the turns, separated by an empty line, without their roles.

    Example:
        >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}])
        'Be brief.\n\nWho?'
    """
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """Cuts a text before the first stop string in it.

    Args:
        text: a continuation.
        stop: non-empty strings.

    Returns:
        What stands before the earliest stop string; None when there is none in the text.

    Example:
        >>> cut_at_stop("one two three", ["three", "two"])
        'one '
    """
    found = [position for position in (text.find(string) for string in stop) if position >= 0]
    return text[: min(found)] if found else None


class Fitted(NamedTuple):
    """A prompt that fits.

    Attributes:
        prompt: the prompt, built from ``kept``.
        kept: the passages in it, in their order; the last one may be shortened.
        truncated: how many of the given passages were dropped or shortened.
    """

    prompt: Prompt
    kept: list[Passage]
    truncated: int


def fit_passages(build: BuildPrompt, passages: Sequence[Passage], count_tokens: CountTokens, limit: int) -> Fitted:
    """Fits the passages of one question into a context; see ``fit_batch``, which is much faster for many questions.

    Args:
        build: makes the prompt from the passages that are left.
        passages: best first.
        count_tokens: length in tokens of each prompt of a list.
        limit: most tokens that the prompt may have, >= 1.

    Returns:
        The prompt, the passages in it, and how many were dropped or shortened.

    Raises:
        DataError: the question alone does not fit.

    Example:
        >>> two = [Passage("a", "one two"), Passage("b", "three four five")]
        >>> words = lambda prompts: [len(prompt.split()) for prompt in prompts]
        >>> fit_passages(lambda kept: " ".join(p.text for p in kept) + " ?", two, words, 4)[0]
        'one two three ?'
    """
    return fit_batch([build], [passages], count_tokens, limit)[0]


def fit_batch(
    builds: Sequence[BuildPrompt], passages: Sequence[Sequence[Passage]], count_tokens: CountTokens, limit: int
) -> list[Fitted]:
    """Fits the passages of B questions into a context.

    The question always stays whole; passages give way from the end, the lowest ranked first, and the last one kept is
    shortened by words. All prompts are counted in one call; only those that are too long cost more, about
    ``log2(passages) + log2(words of one passage)`` counts each.

    Args:
        builds: for each question, makes its prompt from the passages that are left.
        passages: for each question its passages, best first.
        count_tokens: length in tokens of each prompt of a list.
        limit: most tokens that a prompt may have, >= 1.

    Returns:
        One result a question, in their order.

    Raises:
        DataError: a question does not fit even without any passage; the message names all of them.
    """
    fitted = [Fitted(build(given), list(given), 0) for build, given in zip(builds, passages, strict=True)]
    if not fitted:
        return []
    counts = count_tokens([one.prompt for one in fitted])
    too_long = [i for i, count in enumerate(counts) if count > limit]
    if too_long:
        bare = count_tokens([builds[i](()) for i in too_long])
        hopeless = [(i, count) for i, count in zip(too_long, bare, strict=True) if count > limit]
        if hopeless:
            shown = ", ".join(f"number {i + 1} ({count} tokens)" for i, count in hopeless[:5])
            raise DataError(
                f"{len(hopeless)} of {len(builds)} questions do not fit into {limit} prompt tokens even without "
                f"passages: {shown}{', ...' if len(hopeless) > 5 else ''}; shorten them or allow longer prompts"
            )
    for i in too_long:
        fitted[i] = _shortened(builds[i], passages[i], count_tokens, limit)
    return fitted


def _shortened(build: BuildPrompt, passages: Sequence[Passage], count_tokens: CountTokens, limit: int) -> Fitted:
    def fits(kept: Sequence[Passage]) -> bool:
        return count_tokens([build(kept)])[0] <= limit

    # All passages are known not to fit, and none are known to.
    whole = _largest(len(passages) - 1, lambda number: fits(passages[:number]))
    kept = list(passages[:whole])
    words = passages[whole].text.split(" ")
    number = _largest(len(words) - 1, lambda n: fits([*kept, _first_words(passages[whole], words, n)]))
    if number:
        kept.append(_first_words(passages[whole], words, number))
    return Fitted(build(kept), kept, len(passages) - whole)


def _first_words(passage: Passage, words: Sequence[str], number: int) -> Passage:
    return replace(passage, text=" ".join(words[:number]))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Largest number in [0, most] that fits, by bisection; 0 is taken to fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
