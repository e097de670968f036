"""What rewards read from TRL's columns: the answer of each completion, and which shown passages hold a gold answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rag_rl.errors import DataError
from rag_rl.text import completion_text, extract_answer, normalize_answer, strip_citations

# Golds that are words of the question's form, not of its evidence: their presence in a passage tells nothing.
_VERDICT_WORDS = frozenset({"yes", "no"})


def column(name: str, columns: Mapping[str, Any], *, rows: int, reward: str) -> Sequence[Any]:
    """Takes one column that a reward cannot do without.

    Args:
        name: of the column.
        columns: everything that the trainer passed.
        rows: number of completions.
        reward: name of the reward that asks, for the message.

    Returns:
        One value a completion.

    Raises:
        DataError: the column is missing or has another length.
    """
    values = columns.get(name)
    if values is None:
        raise DataError(
            f"reward {reward!r} needs the column {name!r}: add it to the dataset, or leave this reward out"
        )
    if isinstance(values, str) or len(values) != rows:
        given = "one string" if isinstance(values, str) else f"{len(values)} values"
        raise DataError(f"reward {reward!r}: column {name!r} must have one value for each of {rows} rows, got {given}")
    return list(values)


def text_lists(name: str, columns: Mapping[str, Any], *, rows: int, reward: str) -> list[list[str]]:
    """Takes one column whose values are lists of texts.

    Args:
        name: of the column.
        columns: everything that the trainer passed.
        rows: number of completions.
        reward: name of the reward that asks, for the message.

    Returns:
        One list of texts a completion.

    Raises:
        DataError: the column is missing, has another length, or a value is not a list of texts.
    """
    values = column(name, columns, rows=rows, reward=reward)
    for row, value in enumerate(values):
        if isinstance(value, str) or not all(isinstance(text, str) for text in value or ()):
            raise DataError(
                f"reward {reward!r}: column {name!r} must hold lists of texts, row {row} holds {value!r:.80}"
            )
    return [list(value or ()) for value in values]


def final_answers(completions: Sequence[Any], *, marker: str, without_citations: bool = False) -> list[str | None]:
    """Finds the answer of each completion.

    Args:
        completions: as TRL passes them, texts or lists of messages.
        marker: what precedes the answer; see ``rag_rl.text.extract_answer``.
        without_citations: whether ``[i]`` marks are removed from the answers.

    Returns:
        One answer a completion, None where there is none.

    Example:
        >>> final_answers(["Answer: Mira [2]", "Answer:"], marker="Answer:", without_citations=True)
        ['Mira', None]
    """
    answers = [extract_answer(completion_text(completion), marker=marker) for completion in completions]
    if not without_citations:
        return answers
    return [None if answer is None else strip_citations(answer) or None for answer in answers]


@lru_cache(maxsize=8192)
def padded_tokens(text: str) -> str:
    """Normalises a text once for all completions of its group.

    Args:
        text: a passage or an answer.

    Returns:
        The normalised tokens, each between spaces: a run of tokens is then a substring.

    Example:
        >>> padded_tokens("on the Mira.")
        ' on mira '
    """
    return f" {normalize_answer(text)} "


def asks_yes_or_no(answers: Sequence[str]) -> bool:
    """Tells whether a question's accepted answers are all yes or no, which no passage states.

    Args:
        answers: accepted answers.

    Returns:
        True when there is at least one and all of them are verdicts.

    Example:
        >>> asks_yes_or_no(["Yes"]), asks_yes_or_no(["Mira"]), asks_yes_or_no([])
        (True, False, False)
    """
    return bool(answers) and all(normalize_answer(answer) in _VERDICT_WORDS for answer in answers)


def passages_with_answer(passages: Sequence[str], answers: Sequence[str]) -> set[int]:
    """Finds the passages that state an accepted answer.

    Args:
        passages: contents, in the order shown.
        answers: accepted answers.

    Returns:
        Numbers of the passages, from 1, that contain an answer as a contiguous run of normalised tokens.

    Example:
        >>> passages_with_answer(["Elmton lies on the Mira.", "Miraton"], ["Mira"])
        {1}
    """
    golds = [padded_tokens(answer) for answer in answers if normalize_answer(answer)]
    return {
        number
        for number, passage in enumerate(passages, start=1)
        if any(gold in padded_tokens(passage) for gold in golds)
    }


def answerable_rows(columns: Mapping[str, Any], *, rows: int, reward: str) -> list[bool | None]:
    """Tells for each row whether the passages shown hold what the answer needs.

    Where the row names gold documents and the documents shown (columns ``gold_doc_ids`` and ``passage_ids``), one gold
    document among them is enough; elsewhere an accepted answer must stand in a passage (columns ``answers`` and
    ``passages``).

    Args:
        columns: everything that the trainer passed.
        rows: number of completions.
        reward: name of the reward that asks, for messages.

    Returns:
        True or False; None where it cannot be known (no passages column, or a yes/no question without gold documents).

    Raises:
        DataError: a column that is there has another length or holds something else.
    """
    gold, shown = gold_and_shown(columns, rows=rows, reward=reward)
    texts = text_lists("passages", columns, rows=rows, reward=reward) if columns.get("passages") is not None else None
    answers = text_lists("answers", columns, rows=rows, reward=reward)
    found: list[bool | None] = []
    for row in range(rows):
        if gold[row] and shown is not None:
            found.append(not set(gold[row]).isdisjoint(shown[row]))
        elif texts is None or asks_yes_or_no(answers[row]):
            found.append(None)
        else:
            found.append(bool(passages_with_answer(texts[row], answers[row])))
    return found


def gold_and_shown(
    columns: Mapping[str, Any], *, rows: int, reward: str
) -> tuple[list[list[str]], list[list[str]] | None]:
    """Takes the gold documents and the documents shown, where the dataset has them.

    Args:
        columns: everything that the trainer passed.
        rows: number of completions.
        reward: name of the reward that asks, for messages.

    Returns:
        Gold document ids of each row (empty where unknown), and the document ids of the passages in the order shown,
        None where the dataset has no such column.

    Raises:
        DataError: a column that is there has another length or holds something else.
    """
    has_both = columns.get("gold_doc_ids") is not None and columns.get("passage_ids") is not None
    if not has_both:
        return [[] for _ in range(rows)], None
    return (
        text_lists("gold_doc_ids", columns, rows=rows, reward=reward),
        text_lists("passage_ids", columns, rows=rows, reward=reward),
    )
