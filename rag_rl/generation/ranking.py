"""A generator as a teacher that ranks passages.

By what it says: a listwise prompt (RankGPT, arXiv 2304.09542), and its reply read. Or by what it expects: the passage
first for which it would most likely have written the query (UPR, arXiv 2204.07496), which needs a model in this
process, no reply to be parsed, and no model that can follow such a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.prompts import load_prompt, render, require_placeholders
from rag_rl.text import split_thinking
from rag_rl.types import Generation, Generator, Prompt

_BRACKETED = re.compile(r"\[\s*(\d{1,6})\s*\]")
_NUMBER = re.compile(r"(?<![\w.])\d{1,6}(?![\w]|\.\d)")


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order of passages as it was read from a reply, and what had to be repaired.

    Attributes:
        order: places of the passages from 0, best first, each once; None where the reply names no passage at all.
        duplicates: mentions of a passage that had been named before; they were dropped.
        missing: passages that were not named; they follow at the end, in the order in which they were shown.
        foreign: numbers that no passage has; they were dropped.
    """

    order: tuple[int, ...] | None
    duplicates: int = 0
    missing: int = 0
    foreign: int = 0

    @property
    def repaired(self) -> bool:
        """Whether the reply was anything but each number once."""
        return self.order is None or bool(self.duplicates or self.missing or self.foreign)


def parse_ranking(reply: str, count: int) -> Ranking:
    """Reads a ranking such as ``[2] > [1] > [3]``.

    Where the reply has numbers in brackets, they alone count, so that no other number in it does ("the 3 best:
    [2]..."). Without brackets it is the line with the most numbers ("2 > 1 > 3"), of several such lines the last. A
    number that no passage has is dropped, of a repeated one the first mention holds, passages that are not named
    follow in the order in which they were shown. Numbers start at 1; a reply that names 0 and not ``count`` is not
    shifted, since that cannot be told from a slip. Thinking is split off; where it never ends, there is no ranking.

    Args:
        reply: of the model.
        count: passages that were shown, at least 1.

    Returns:
        The order, and what was repaired.

    Raises:
        ValueError: ``count`` is below 1.

    Example:
        >>> parse_ranking("[3] > [1] > [3] > [9]", 4)
        Ranking(order=(2, 0, 1, 3), duplicates=1, missing=2, foreign=1)
    """
    if count < 1:
        raise ValueError(f"there must be at least 1 passage to rank, got {count}")
    _, said = split_thinking(reply)
    named = [int(number) for number in _BRACKETED.findall(said or "")]
    if not named and said:
        lines = [[int(number) for number in _NUMBER.findall(line)] for line in said.splitlines()]
        named = max(reversed(lines), key=len, default=[])
    known = [number - 1 for number in named if 1 <= number <= count]
    first = list(dict.fromkeys(known))
    foreign = len(named) - len(known)
    if not first:
        return Ranking(None, missing=count, foreign=foreign)
    rest = [place for place in range(count) if place not in set(first)]
    return Ranking((*first, *rest), len(known) - len(first), len(rest), foreign)


class ListwiseRanker:
    """Asks a generator for an order of passages.

    Args:
        generator: any.
        prompt: name or path of a prompt with ``$query`` and ``$passages`` and, if it likes, ``$task`` and ``$count``.
        max_new_tokens: budget of a reply.
        max_passage_words: each passage is cut to so many words, so that all fit.

    Attributes:
        unreadable: replies without any ranking, so far.
        duplicates: as in ``Ranking``, so far.
        missing: as there, replies without any ranking left out.
        foreign: as there.

    Raises:
        ConfigError: no such prompt, or it lacks a place; a number below 1.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        prompt: str = "rank_passages",
        max_new_tokens: int = 256,
        max_passage_words: int = 300,
    ) -> None:
        try:
            require_placeholders(prompt, ["query", "passages"])
            render(prompt, query="", passages="", task="", count="")
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(str(error)) from error
        if max_passage_words < 1:
            raise ConfigError(f"max_passage_words must be at least 1, got {max_passage_words}")
        self.generator, self.prompt, self.template = generator, prompt, load_prompt(prompt)
        self.max_new_tokens, self.max_passage_words = max_new_tokens, max_passage_words
        self.unreadable = self.duplicates = self.missing = self.foreign = 0

    def rank(
        self, queries: Sequence[str], passages: Sequence[Sequence[str]], *, task_instruction: str = ""
    ) -> list[Ranking]:
        """Ranks the passages of each query.

        Args:
            queries: B queries.
            passages: B lists of texts, in the order in which they are shown; a model prefers what it reads first, so
                do not always begin with the right one.
            task_instruction: what the search is for.

        Returns:
            B rankings; ``order`` is None where there is no reply or it cannot be read.

        Raises:
            BackendError: as the generator raises it.
        """
        prompts: list[Prompt] = [
            [{"role": "user", "content": self._prompt(query, shown, task_instruction)}]
            for query, shown in zip(queries, passages, strict=True)
        ]
        replies = (
            self.generator.generate(prompts, max_new_tokens=self.max_new_tokens, temperature=0.0) if prompts else []
        )
        return [self._read(row, len(shown)) for row, shown in zip(replies, passages, strict=True)]

    def _prompt(self, query: str, passages: Sequence[str], task: str) -> str:
        shown = (" ".join(text.split()[: self.max_passage_words]) for text in passages)
        listed = "\n".join(f"[{number}] {text}" for number, text in enumerate(shown, start=1))
        return render(self.prompt, query=query, passages=listed, task=task, count=str(len(passages)))

    def _read(self, row: Sequence[Generation], count: int) -> Ranking:
        usable = bool(row) and row[0].finish_reason != "error"
        found = parse_ranking(row[0].text, count) if usable else Ranking(None, missing=count)
        self.duplicates += found.duplicates
        self.foreign += found.foreign
        if found.order is None:
            self.unreadable += 1
        else:
            self.missing += found.missing
        return found


class LikelihoodRanker:
    """Orders passages by how likely the generator finds the query, asked to write one for each of them.

    Sachan et al. 2022, "Improving passage retrieval with zero-shot question generation" (UPR, arXiv 2204.07496); the
    mean over tokens and the sum give one order, since the query is the same.

    Args:
        generator: a ``TransformersGenerator``.
        prompt: name or path of a prompt that asks for a query, with ``$passage`` and, if it likes, ``$task``,
            ``$length`` (words of the query) and the fields below.
        fields: further fields of the prompt, by name.
        max_passage_words: each passage is cut to so many words.

    Attributes:
        unreadable: 0, as long as there is a likelihood.

    Raises:
        ConfigError: no such prompt, or it lacks a place or asks for something else; a number below 1; a generator
            whose probabilities cannot be seen.
    """

    def __init__(
        self,
        generator: Any,
        *,
        prompt: str = "synthesize_query",
        fields: Mapping[str, str] | None = None,
        max_passage_words: int = 300,
    ) -> None:
        self.fields = {
            "query_type": "query", "passage_type": "passage", "style": "plain", "claim": "", "examples": "",
            **(fields or {}),
        }  # fmt: skip
        try:
            require_placeholders(prompt, ["passage"])
            render(prompt, passage="", task="", length="", **self.fields)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(str(error)) from error
        if max_passage_words < 1:
            raise ConfigError(f"max_passage_words must be at least 1, got {max_passage_words}")
        if not all(hasattr(generator, name) for name in ("model", "tokenizer", "encode", "batch_size")):
            raise ConfigError(
                f"the likelihood of a query needs a model in this process, not {type(generator).__name__}: rank "
                "listwise, or load the model"
            )
        self.generator, self.prompt, self.template = generator, prompt, load_prompt(prompt)
        self.max_passage_words = max_passage_words
        self.unreadable = self.duplicates = self.missing = self.foreign = 0

    def rank(
        self, queries: Sequence[str], passages: Sequence[Sequence[str]], *, task_instruction: str = ""
    ) -> list[Ranking]:
        """Ranks the passages of each query; of equally likely ones the first goes first.

        Args:
            queries: B queries.
            passages: B lists of texts.
            task_instruction: what the search is for.

        Returns:
            B rankings.

        Raises:
            DataError: a passage with its prompt is longer than the model's context.
        """
        asked = [
            (self._prompt(query, text, task_instruction), query)
            for query, shown in zip(queries, passages, strict=True)
            for text in shown
        ]
        scores = iter(self._log_probs(asked))
        found = []
        for shown in passages:
            own = [next(scores) for _ in shown]
            found.append(Ranking(tuple(sorted(range(len(own)), key=lambda place, own=own: -own[place]))))  # type: ignore[misc]
        return found

    def _prompt(self, query: str, passage: str, task: str) -> str:
        shown = " ".join(passage.split()[: self.max_passage_words])
        return render(self.prompt, passage=shown, task=task, length=str(len(query.split())), **self.fields)

    def _log_probs(self, asked: Sequence[tuple[str, str]]) -> list[float]:
        """Log-probability of each query after its prompt."""
        from rag_rl.generation.transformers_generator import check_lengths

        prompts: list[Prompt] = [[{"role": "user", "content": content}] for content, _ in asked]
        starts = self.generator.encode(prompts)
        tokenizer, model = self.generator.tokenizer, self.generator.model
        replies = tokenizer([query for _, query in asked], add_special_tokens=False)["input_ids"] if asked else []
        wholes = [[*start, *reply] for start, reply in zip(starts, replies, strict=True)]
        check_lengths(wholes, self.generator.prompt_limit(1))
        order = sorted(range(len(wholes)), key=lambda i: len(wholes[i]), reverse=True)
        scores = [0.0] * len(wholes)
        for first in range(0, len(order), self.generator.batch_size):
            rows = order[first : first + self.generator.batch_size]
            found = _sums(model, [wholes[i] for i in rows], [len(replies[i]) for i in rows])
            for i, score in zip(rows, found, strict=True):
                scores[i] = score
        return scores


def _sums(model: Any, wholes: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[float]:
    """Log-probability of the last tokens of each sequence, as many as its length says, in one forward pass."""
    import torch

    width, most = max(map(len, wholes)), max(lengths)
    # Padded on the left, so that the tokens that count stand at the end and no other logits need be computed.
    ids = torch.zeros(len(wholes), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, whole in enumerate(wholes):
        ids[row, width - len(whole) :] = torch.tensor(whole)
        mask[row, width - len(whole) :] = 1
    with torch.inference_mode():
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
            use_cache=False,
            logits_to_keep=most + 1,
        ).logits[:, :-1]
        targets = ids[:, -most:].to(logits.device)
        told = logits.float().log_softmax(-1).gather(-1, targets[:, :, None]).squeeze(-1).cpu()
    counted = torch.arange(most) >= most - torch.tensor(lengths)[:, None]
    return [float(score) for score in told.where(counted, torch.zeros(())).sum(1)]
