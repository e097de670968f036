"""Answer text: normalisation, thinking parts, answer lines, citations. Pure string functions, no torch.

Everything that scores an answer (rewards and metrics) goes through these, so that training and evaluation cannot
disagree about what the answer was.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

ANSWER_MARKER = "Answer:"

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_THINK_TAG = re.compile(r"<(/?)think>")
_CITATION = re.compile(r"\[\s*\d+(?:\s*[,;]\s*\d+)*\s*\]")
_NUMBER = re.compile(r"\d+")


def normalize_answer(text: str) -> str:
    """Normalises an answer as the SQuAD v1.1 evaluation does (Rajpurkar et al. 2016).

    In this order: lower case, ASCII punctuation removed (not replaced by a space), the words a, an, the removed,
    white space collapsed.

    Args:
        text: any text.

    Returns:
        The normalised text; empty when nothing but articles and punctuation was given.

    Example:
        >>> normalize_answer("The  Mira-Brook, (a river)!")
        'mirabrook river'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_tokens(text: str) -> list[str]:
    """Splits an answer into its normalised tokens.

    Args:
        text: any text.

    Returns:
        White-space tokens of ``normalize_answer(text)``.

    Example:
        >>> answer_tokens("The Mira Brook.")
        ['mira', 'brook']
    """
    return normalize_answer(text).split()


def split_thinking(text: str) -> tuple[str, str | None]:
    """Splits the ``<think>...</think>`` parts off a completion.

    A closing tag without an opening one ends a thinking part that began in the prompt: all text before it is thinking.
    An opening tag inside a thinking part is part of the thought.

    Args:
        text: a whole completion.

    Returns:
        The thinking (several parts joined by a newline, "" for none) and everything else; the second is None when a
        thinking part was never closed, for then there is no answer.

    Example:
        >>> split_thinking("<think>rivers...</think>Answer: Mira")
        ('rivers...', 'Answer: Mira')
        >>> split_thinking("<think>rivers...")
        ('rivers...', None)
    """
    thoughts: list[str] = []
    said: list[str] = []
    start, thinking = 0, False
    for tag in _THINK_TAG.finditer(text):
        piece = text[start : tag.start()]
        if tag.group(1):
            thoughts.append(piece if thinking else "".join([*said, piece]))
            if not thinking:
                said.clear()
            start, thinking = tag.end(), False
        elif not thinking:
            said.append(piece)
            start, thinking = tag.end(), True
    if thinking:
        return "\n".join([*thoughts, text[start:]]), None
    return "\n".join(thoughts), "".join([*said, text[start:]])


def extract_answer(text: str, *, marker: str = ANSWER_MARKER) -> str | None:
    r"""Finds the answer in a completion.

    Args:
        text: a whole completion; its thinking parts are split off first.
        marker: what precedes the answer, matched exactly; "" when the whole completion is the answer.

    Returns:
        The text after the last marker up to the end of its line, stripped. Without the marker (or with marker "") all
        of the text, stripped. None when there is no answer: thinking never closed, or nothing there.

    Example:
        >>> extract_answer("It lies on the Mira. Answer: Mira\nI hope this helps.")
        'Mira'
        >>> extract_answer("Answer:") is None
        True
    """
    _, rest = split_thinking(text)
    if rest is None:
        return None
    if marker and marker in rest:
        lines = rest.rpartition(marker)[2].splitlines()
        rest = lines[0] if lines else ""
    return rest.strip() or None


def has_format(text: str, *, marker: str = ANSWER_MARKER) -> bool:
    r"""Tells whether a completion has the asked form.

    Args:
        text: a whole completion; its thinking parts are split off first.
        marker: as in ``extract_answer``.

    Returns:
        True for exactly one marker, an answer on the marker's own line, and nothing after that line. Text before the
        marker is allowed. With marker "": a single line that is not empty.

    Example:
        >>> has_format("It lies on the Mira.\nAnswer: Mira\n")
        True
        >>> has_format("Answer: Mira\nAnswer: Elm")
        False
    """
    _, rest = split_thinking(text)
    if rest is None or (marker and rest.count(marker) != 1):
        return False
    answer = rest.rpartition(marker)[2] if marker else rest.strip()
    lines = answer.rstrip().splitlines()
    return len(lines) == 1 and bool(lines[0].strip())


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Gives the text of a completion as TRL hands it to rewards.

    Args:
        completion: a string, or the messages that followed a conversational prompt. A message's content may be a
            string, a list of ``{"type": "text", "text": ...}`` blocks, or None (a message of tool calls only).

    Returns:
        The string itself, or the content of the last assistant message ("" when there is none).

    Example:
        >>> completion_text([{"role": "assistant", "content": "Answer: Mira"}])
        'Answer: Mira'
    """
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            content = message.get("content")
            if content is None or isinstance(content, str):
                return content or ""
            return "".join(block.get("text", "") for block in content if block.get("type") == "text")
    return ""


def cited_numbers(text: str) -> set[int]:
    """Collects the passages that a text cites.

    Args:
        text: any text; ``[2]``, ``[1][3]`` and ``[1, 3]`` are citations.

    Returns:
        The cited numbers, as written (from 1); numbers of passages that do not exist included.

    Example:
        >>> sorted(cited_numbers("Mira [2], see also [1, 3] and [2]."))
        [1, 2, 3]
    """
    return {int(number) for mark in _CITATION.findall(text) for number in _NUMBER.findall(mark)}


def strip_citations(text: str) -> str:
    """Removes the citations from a text.

    Args:
        text: as in ``cited_numbers``.

    Returns:
        The text without its ``[i]`` marks, stripped.

    Example:
        >>> strip_citations("Mira [2]")
        'Mira'
    """
    return _CITATION.sub("", text).strip()
