"""Documents cut into chunks that an encoder takes whole, measured with the encoder's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rag_rl.errors import ConfigError
from rag_rl.types import IntArray, Passage

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000


class OffsetTokenizer(Protocol):
    """What chunking needs of a tokenizer: a fast tokenizer of transformers has it."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Returns "offset_mapping": for each text the (start, end) characters of its tokens."""
        ...


def chunk_passages(
    passages: Iterable[Passage],
    *,
    tokenizer: OffsetTokenizer,
    max_tokens: int,
    overlap: int = 0,
    min_tokens: int | None = None,
) -> Iterator[Passage]:
    """Cuts documents into windows of tokens; each chunk is a piece of the text as it stands, character by character.

    Nothing but spaces is lost between chunks. A cut falls between two tokens; tokens that share a character (the bytes
    of an emoji) stay together, even where that makes a window longer than ``max_tokens``, or an overlap longer.
    A document that fits is passed on as it is.

    Args:
        passages: whole documents; read one batch at a time.
        tokenizer: the encoder's own, a fast one.
        max_tokens: longest chunk, in tokens of the text. The title and the encoder's special tokens come on top: leave
            room for them.
        overlap: tokens that two neighbours share, in [0, max_tokens).
        min_tokens: a shorter last chunk starts earlier instead, so that it has this many; in [0, max_tokens]. None is
            an eighth of ``max_tokens``.

    Yields:
        Chunks with the document's ``doc_id`` and ``title``; ``chunk`` counts from 0.

    Raises:
        ConfigError: the lengths do not fit together, the tokenizer gives no offsets, or a passage is a chunk already.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= overlap < max_tokens:
        raise ConfigError(f"overlap must be at least 0 and less than max_tokens ({max_tokens}), got {overlap}")
    shortest = max_tokens // 8 if min_tokens is None else min_tokens
    if not 0 <= shortest <= max_tokens:
        raise ConfigError(f"min_tokens must be at least 0 and at most max_tokens ({max_tokens}), got {min_tokens}")
    if not getattr(tokenizer, "is_fast", True):
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets; load its fast version"
        )
    for batch in _batches(passages):
        encoded = tokenizer(
            [passage.text for passage in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        for passage, offsets in zip(batch, encoded["offset_mapping"], strict=True):
            if len(offsets) <= max_tokens:
                yield passage
                continue
            number = 0
            for start, end in _spans(passage.text, offsets, max_tokens, overlap, shortest):
                if piece := passage.text[start:end].strip():
                    yield Passage(passage.doc_id, piece, passage.title, number)
                    number += 1


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    characters = 0
    for passage in passages:
        if passage.chunk:
            raise ConfigError(f"document {passage.doc_id!r} comes as chunk {passage.chunk}; give whole documents")
        batch.append(passage)
        characters += len(passage.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _spans(
    text: str, offsets: Sequence[tuple[int, int]], max_tokens: int, overlap: int, shortest: int
) -> Iterator[tuple[int, int]]:
    """Yields (first character, character after the last) of each window."""
    starts, ends = np.asarray(offsets, dtype=np.int64).T
    total = len(starts)
    cuts = _cuts(starts, ends)
    begin = 0
    while True:
        end = _cut_before(cuts, begin + max_tokens, after=begin)
        # Up to the next token's start rather than to the last token's end: what the tokenizer drops (control
        # characters, accents of some scripts) has no token, and still belongs to the text.
        yield (0 if begin == 0 else int(starts[begin])), (len(text) if end == total else int(starts[end]))
        if end == total:
            return
        following = _cut_before(cuts, end - overlap, after=begin)
        if total - following < shortest:
            following = _cut_before(cuts, total - shortest, after=begin)
        begin = following


def _cuts(starts: IntArray, ends: IntArray) -> IntArray:
    """Token numbers before which a cut splits no character; the number after the last token is one of them."""
    reached = np.maximum.accumulate(ends)
    clean = np.flatnonzero(starts[1:] >= reached[:-1]) + 1
    return np.concatenate([clean, [len(starts)]])


def _cut_before(cuts: IntArray, wanted: int, *, after: int) -> int:
    """Finds the last cut up to ``wanted``, or, where that is not behind ``after``, the first one that is."""
    position = int(np.searchsorted(cuts, wanted, side="right")) - 1
    lowest = int(np.searchsorted(cuts, after, side="right"))
    return int(cuts[max(position, lowest)])
