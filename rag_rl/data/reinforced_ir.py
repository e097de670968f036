"""The files of Reinforced-IR (arXiv 2502.11562) as its authors publish them, in and out.

===============================  ======================================================================================
``corpus.json``                  one JSON array of texts
``queries.json``                 array of ``{query, passage}``
generator ``answers.json``       one array a pass over the queries; item i of each is ``{query, passage, answer,
                                 new_query}`` of query i
generator ``train.jsonl``        ``{prompt, chosen, rejected, chosen_score, rejected_score}`` a line
``train_llamafactory.jsonl``     the same as ONE array, despite its name: ``{conversations, chosen, rejected, ...}``
``dataset_info.json``            what LLaMA-Factory has to know of it
retriever ``answers.json``       array of ``{query, passage, answer}``; the answer bears the prefix already
retriever ``train.jsonl``        ``{query, answer, pos, neg, neg_answer}`` a line; after distillation also
                                 ``pos_scores`` and ``neg_scores``, and pos and neg in the teacher's order
===============================  ======================================================================================

What is read and written again is equal, as JSON. Fields that are not named here are lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rag_rl.data.fields import BadRows, Fields, broken_character, describe
from rag_rl.data.jsonl import opened, read_json_array, read_jsonl, write_jsonl
from rag_rl.data.paths import resolve_data_path
from rag_rl.data.whole_files import whole_file
from rag_rl.errors import DataError
from rag_rl.types import Passage

AUGMENTATION_PREFIX = "Generate the topic about this passage: "
"""What the authors put before every augmentation when it is embedded, in training and in use."""

_T = TypeVar("_T")
_COLUMNS = {
    "messages": "conversations",
    "chosen": "chosen",
    "rejected": "rejected",
    "chosen_score": "chosen_score",
    "rejected_score": "rejected_score",
}


@dataclass(frozen=True, slots=True)
class SyntheticQuery:
    """A query and the passage that it was written for."""

    query: str
    passage: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One augmentation of a query, before the generator is trained.

    Attributes:
        query: the query.
        passage: that it was written for.
        answer: the augmentation, as the generator wrote it.
        new_query: what is embedded of it: prefix and augmentation.
    """

    query: str
    passage: str
    answer: str
    new_query: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two augmentations of a query, of which the retriever prefers one.

    Attributes:
        prompt: everything that the generator was asked.
        chosen: the better augmentation.
        rejected: the worse one.
        chosen_score: the better one's score over that of the bare query.
        rejected_score: the same of the worse one.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float


@dataclass(frozen=True, slots=True)
class AugmentedQuery:
    """A query with its one augmentation, as the retriever is trained with.

    Attributes:
        query: the query.
        passage: that it was written for.
        answer: the augmentation; in the published files it bears the prefix already.
    """

    query: str
    passage: str
    answer: str


@dataclass(frozen=True, slots=True)
class RetrieverExample:
    """What the retriever learns of one query.

    Attributes:
        query: the query.
        answer: its augmentation, prefix included.
        pos: one passage.
        neg: mined passages, hardest first or in the teacher's order.
        neg_answer: passages mined with the augmentation in place of the query.
        pos_scores: [1.0] after distillation, else empty.
        neg_scores: 1/2, 1/3, ... after distillation, else empty; only their order counts.
    """

    query: str
    answer: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    neg_answer: tuple[str, ...] = ()
    pos_scores: tuple[float, ...] = ()
    neg_scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, scores, passages in (
            ("pos_scores", self.pos_scores, self.pos),
            ("neg_scores", self.neg_scores, self.neg),
        ):
            if scores and len(scores) != len(passages):
                raise ValueError(f"{name} has {len(scores)} numbers for {len(passages)} passages")

    @property
    def is_distilled(self) -> bool:
        """Whether the passages stand in a teacher's order."""
        return bool(self.pos_scores)

    def reordered(self, order: Sequence[int], *, keep_source: bool = False) -> RetrieverExample:
        """The example after a teacher has ranked its passages.

        Args:
            order: positions in ``(*pos, *neg)``, best first, each once.
            keep_source: the passage that the query was written for stays the positive wherever the teacher put it, and
                the others follow in the teacher's order. The published rule lets the teacher replace it.

        Returns:
            An example with scores: 1 for the positive, then 1/2, 1/3, ...

        Raises:
            ValueError: the order is no permutation of the passages.

        Example:
            >>> example = RetrieverExample("q", "a", ("source",), ("b", "c"))
            >>> example.reordered([2, 0, 1]).pos, example.reordered([2, 0, 1], keep_source=True).neg
            (('c',), ('c', 'b'))
        """
        passages = (*self.pos, *self.neg)
        if sorted(order) != list(range(len(passages))):
            raise ValueError(f"order must name each of {len(passages)} passages once, from 0, got {list(order)}")
        ranked = [0, *(place for place in order if place != 0)] if keep_source else list(order)
        first, *others = (passages[place] for place in ranked)
        scores = tuple(1.0 / rank for rank in range(2, len(others) + 2))
        return replace(self, pos=(first,), neg=tuple(others), pos_scores=(1.0,), neg_scores=scores)


def is_text_array(path: str | Path) -> bool:
    """Tells the plain ``corpus.json`` from a file of documents.

    Args:
        path: the file.

    Returns:
        Whether it is a JSON array whose first item is a text.

    Raises:
        DataError: it is missing or cannot be read.
    """
    with opened(path) as file:
        head = b""
        while len(head) < 2 and (chunk := file.read(256)):
            head = b"".join((head + chunk).split(maxsplit=2))
    return head[:2] == b'["'


def read_corpus_texts(path: str | Path) -> list[Passage]:
    """Reads the plain ``corpus.json``. It is one array, and is read whole.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Its texts as passages whose ids are their places, from 0; texts of nothing but spaces are left out.

    Raises:
        DataError: the file is missing, no array, or has items that are no texts; names item and trouble.
    """
    bad = BadRows(path, "item")
    passages = []
    for place, value in enumerate(_array(path)):
        trouble = broken_character(value) if isinstance(value, str) else f"must be text, got {describe(value)}"
        if trouble:
            bad.add(place + 1, trouble)
        elif value.strip():
            passages.append(Passage(str(place), value))
    bad.raise_if_any()
    return passages


def write_corpus_texts(path: str | Path, passages: Iterable[Passage]) -> int:
    """Writes the plain ``corpus.json``: title and text of each passage as one string.

    Args:
        path: the file; an existing one is replaced at the very end.
        passages: what to write.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written.
    """
    return _write_array(path, (passage.contents for passage in passages))


def read_queries(path: str | Path) -> list[SyntheticQuery]:
    """Reads ``queries.json``.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Queries with their passages.

    Raises:
        DataError: missing or with bad items (names item and field), such as a query without a passage.
    """
    return _read(path, read_json_array, lambda row: SyntheticQuery(row.text("query"), row.text("passage")))


def write_queries(path: str | Path, queries: Iterable[SyntheticQuery]) -> int:
    """Writes ``queries.json``.

    Args:
        path: the file; an existing one is replaced at the very end.
        queries: what to write.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written.
    """
    return _write_array(path, ({"query": one.query, "passage": one.passage} for one in queries))


def read_candidates(path: str | Path) -> list[list[Candidate]]:
    """Reads the generator's ``answers.json``.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        For each query its candidates: the file's passes, turned round.

    Raises:
        DataError: missing, passes of different lengths, passes that name different queries in one place, or bad items.
    """
    bad = BadRows(path, "item")
    passes: list[list[Candidate]] = []
    for number, one in enumerate(_array(path), start=1):
        if not isinstance(one, list):
            bad.add(number, f"must be a list of answers, got {describe(one)}")
            continue
        found = []
        for place, value in enumerate(one, start=1):
            if not isinstance(value, Mapping):
                bad.add(number, f"answer {place}: must be an object {{...}}, got {describe(value)}")
                continue
            row = Fields(value)
            texts = [row.text(name) for name in ("query", "passage")]
            # A generator may have written nothing; the new query then is the prefix.
            texts += [row.text(name, may_be_empty=True) for name in ("answer", "new_query")]
            found.append(Candidate(*texts))
            if row.troubles:
                bad.add(number, f"answer {place}: {'; '.join(row.troubles)}")
        passes.append(found)
        if len(found) != len(passes[0]):
            bad.add(number, f"has {len(found)} answers, the first item has {len(passes[0])}")
            continue
        for place, (here, first) in enumerate(zip(found, passes[0], strict=True), start=1):
            if here.query != first.query:
                bad.add(number, f"answer {place}: its query is not the one in that place of the first item")
                break
    bad.raise_if_any()
    return [list(candidates) for candidates in zip(*passes, strict=True)]


def write_candidates(path: str | Path, candidates: Sequence[Sequence[Candidate]]) -> int:
    """Writes the generator's ``answers.json``.

    Args:
        path: the file; an existing one is replaced at the very end.
        candidates: for each query its candidates, the same number for all.

    Returns:
        How many queries were written.

    Raises:
        DataError: the file cannot be written, or queries have different numbers of candidates.
    """
    counts = {len(one) for one in candidates}
    if len(counts) > 1:
        raise DataError(f"{path}: all queries must have as many candidates, got {min(counts)} to {max(counts)}")
    _write_array(
        path,
        (
            [_fields(one, "query passage answer new_query") for one in a_pass]
            for a_pass in zip(*candidates, strict=True)
        ),
    )
    return len(candidates)


def read_preferences(path: str | Path) -> list[PreferencePair]:
    """Reads the generator's ``train.jsonl``.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Preference pairs.

    Raises:
        DataError: missing or with bad rows; names line and field.
    """

    def pair(row: Fields) -> PreferencePair:
        texts = row.text("prompt"), row.text("chosen"), row.text("rejected", may_be_empty=True)
        return PreferencePair(*texts, _number(row, "chosen_score"), _number(row, "rejected_score"))

    return _read(path, read_jsonl, pair)


def write_preferences(path: str | Path, pairs: Iterable[PreferencePair]) -> int:
    """Writes the generator's ``train.jsonl``, which TRL's DPOTrainer reads as it is.

    Args:
        path: the file; an existing one is replaced at the very end.
        pairs: what to write.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written.
    """
    return write_jsonl(path, (_fields(pair, "prompt chosen rejected chosen_score rejected_score") for pair in pairs))


def read_llamafactory(path: str | Path) -> list[PreferencePair]:
    """Reads ``train_llamafactory.jsonl``.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Preference pairs.

    Raises:
        DataError: missing or with bad items; names item and field.
    """

    def pair(row: Fields) -> PreferencePair:
        turns = row.row.get("conversations")
        prompt = ""
        if not isinstance(turns, list) or len(turns) != 1:
            row.bad("conversations", f"must be a list of one turn, got {describe(turns)}")
        else:
            prompt = _turn(row, "conversations", turns[0], "human")
        replies = [_turn(row, name, row.row.get(name), "gpt") for name in ("chosen", "rejected")]
        return PreferencePair(
            prompt, replies[0], replies[1], _number(row, "chosen_score"), _number(row, "rejected_score")
        )

    return _read(path, read_json_array, pair)


def write_llamafactory(path: str | Path, pairs: Iterable[PreferencePair]) -> int:
    """Writes ``train_llamafactory.jsonl``: one JSON array, as LLaMA-Factory reads it.

    Args:
        path: the file; an existing one is replaced at the very end.
        pairs: what to write.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written.
    """
    return _write_array(
        path,
        (
            {
                "conversations": [{"from": "human", "value": pair.prompt}],
                "chosen": {"from": "gpt", "value": pair.chosen},
                "rejected": {"from": "gpt", "value": pair.rejected},
                "chosen_score": pair.chosen_score,
                "rejected_score": pair.rejected_score,
            }
            for pair in pairs
        ),
    )


def read_dataset_info(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads ``dataset_info.json``.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Name of a data set to its entry, as it stands there. The published one maps a column ``reject_score`` that its
        data do not have; that is let pass.

    Raises:
        DataError: the file is missing, is no object of entries, or an entry names no file; names the entry.
    """
    content = _json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be an object of entries {{name: {{...}}}}, got {describe(content)}")
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {name!r}: must be an object {{...}}, got {describe(entry)}")
        row = Fields(entry)
        if not any(key in entry for key in ("file_name", "hf_hub_url", "ms_hub_url", "script_url")):
            row.missing("file_name")
        elif "file_name" in entry:
            row.text("file_name")
        if not isinstance(entry.get("columns", {}), dict):
            row.bad("columns", f"must be an object, got {describe(entry['columns'])}")
        if row.troubles:
            raise DataError(f"{path}: entry {name!r}: {'; '.join(row.troubles)}")
    return content


def write_dataset_info(path: str | Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes ``dataset_info.json``.

    Args:
        path: the file; an existing one is replaced.
        entries: as from ``read_dataset_info`` and ``llamafactory_entry``.

    Raises:
        DataError: the file cannot be written.
    """
    _write_whole(path, [json.dumps(entries, ensure_ascii=False, indent=2), "\n"])


def llamafactory_entry(file_name: str) -> dict[str, Any]:
    """Makes the entry of preference pairs in ``dataset_info.json``, whose columns are those that the data have.

    Args:
        file_name: of the pairs, relative to the folder of ``dataset_info.json``.

    Returns:
        An entry for ``write_dataset_info``.

    Example:
        >>> llamafactory_entry("train_llamafactory.jsonl")["columns"]["rejected_score"]
        'rejected_score'
    """
    return {"file_name": file_name, "ranking": True, "formatting": "sharegpt", "columns": dict(_COLUMNS)}


def read_augmented(path: str | Path) -> list[AugmentedQuery]:
    """Reads the retriever's ``answers.json``.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Queries with their passages and augmentations; the published ones bear the prefix.

    Raises:
        DataError: missing or with bad items; names item and field.
    """
    return _read(
        path,
        read_json_array,
        lambda row: AugmentedQuery(row.text("query"), row.text("passage"), row.text("answer")),
    )


def write_augmented(path: str | Path, queries: Iterable[AugmentedQuery]) -> int:
    """Writes the retriever's ``answers.json``.

    Args:
        path: the file; an existing one is replaced at the very end.
        queries: what to write, augmentations with their prefix.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written.
    """
    return _write_array(path, (_fields(query, "query passage answer") for query in queries))


def read_examples(path: str | Path) -> list[RetrieverExample]:
    """Reads the retriever's ``train.jsonl``, before or after distillation.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Examples; see ``RetrieverExample.is_distilled``.

    Raises:
        DataError: missing or with bad rows; names line and field.
    """

    def example(row: Fields) -> RetrieverExample | None:
        query, answer = row.text("query"), row.text("answer", required=False, may_be_empty=True)
        pos, neg = _texts(row, "pos"), _texts(row, "neg")
        neg_answer = _texts(row, "neg_answer") if "neg_answer" in row.row else ()
        if not pos and isinstance(row.row.get("pos"), list):
            row.bad("pos", "is empty: an example needs a passage to find")
        scores = [_numbers(row, name, len(passages)) for name, passages in (("pos_scores", pos), ("neg_scores", neg))]
        if ("pos_scores" in row.row) != ("neg_scores" in row.row):
            row.missing("neg_scores" if "pos_scores" in row.row else "pos_scores")
        return None if row.troubles else RetrieverExample(query, answer, pos, neg, neg_answer, *scores)

    return _read(path, read_jsonl, example)


def write_examples(path: str | Path, examples: Iterable[RetrieverExample]) -> int:
    """Writes the retriever's ``train.jsonl``.

    Args:
        path: the file; an existing one is replaced at the very end.
        examples: what to write; scores only where there are some.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written.
    """

    def row(example: RetrieverExample) -> dict[str, Any]:
        scores = "pos_scores neg_scores" if example.is_distilled else ""
        return _fields(example, f"query answer pos neg neg_answer {scores}")

    return write_jsonl(path, map(row, examples))


def _fields(value: object, names: str) -> dict[str, Any]:
    found = {name: getattr(value, name) for name in names.split()}
    return {name: list(item) if isinstance(item, tuple) else item for name, item in found.items()}


def _read(
    path: str | Path,
    rows: Callable[..., Iterator[tuple[int, dict[str, Any]]]],
    make: Callable[[Fields], _T | None],
) -> list[_T]:
    bad = BadRows(path)
    found: list[_T] = []
    for number, row in rows(path, bad=bad):
        fields = Fields(row)
        value = make(fields)
        if fields.troubles:
            bad.add_fields(number, fields)
        elif value is not None:
            found.append(value)
    bad.raise_if_any()
    return found


def _turn(row: Fields, name: str, value: Any, speaker: str) -> str:
    if name not in row.row:
        row.missing(name)
        return ""
    if not isinstance(value, Mapping) or value.get("from") != speaker or not isinstance(value.get("value"), str):
        row.bad(name, f"must be a turn {{from: {speaker}, value: ...}}, got {describe(value)}")
        return ""
    return str(value["value"])


def _texts(row: Fields, name: str) -> tuple[str, ...]:
    """All texts of a list, repeated ones included: ``neg_scores`` counts them."""
    value = row.row.get(name)
    if name not in row.row:
        row.missing(name)
    elif not isinstance(value, list):
        row.bad(name, f"must be a list of texts, got {describe(value)}")
    else:
        for place, text in enumerate(value, start=1):
            if not isinstance(text, str):
                row.bad(name, f"must be a list of texts, got {describe(text)} at place {place}")
            elif broken := broken_character(text):
                row.bad(name, broken)
        return tuple(text for text in value if isinstance(text, str))
    return ()


def _number(row: Fields, name: str) -> float:
    value = row.row.get(name)
    if name not in row.row:
        row.missing(name)
    elif not _is_number(value):
        row.bad(name, f"must be a number, got {describe(value)}")
    else:
        return value  # type: ignore[return-value] # an int stays one, so that what was read is written again
    return 0.0


def _numbers(row: Fields, name: str, count: int) -> tuple[float, ...]:
    value = row.row.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(map(_is_number, value)):
        row.bad(name, f"must be a list of numbers, got {describe(value)}")
    elif len(value) != count:
        row.bad(name, f"has {len(value)} numbers for {count} passages")
    else:
        return tuple(value)
    return ()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _json(path: str | Path) -> Any:
    with opened(path) as file:
        try:
            return json.loads(file.read().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start + 1})") from error
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, character {error.colno}"
            raise DataError(f"{path}: is not JSON: {error.msg} at {where}") from error
        except RecursionError as error:
            raise DataError(f"{path}: is not JSON: nested too deeply") from error


def _array(path: str | Path) -> list[Any]:
    content = _json(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: must be one JSON array [...], got {describe(content)}")
    return content


def _write_array(path: str | Path, items: Iterable[Any]) -> int:
    count = 0

    def pieces() -> Iterator[str]:
        nonlocal count
        for item in items:
            yield ("[\n" if not count else ",\n") + json.dumps(item, ensure_ascii=False)
            count += 1
        yield "\n]\n" if count else "[]\n"

    _write_whole(path, pieces())
    return count


def _write_whole(path: str | Path, pieces: Iterable[str]) -> None:
    """Writes a file that appears whole or not at all."""
    target = resolve_data_path(path, must_exist=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            file.writelines(piece.encode("utf-8") for piece in pieces)
    except UnicodeEncodeError as error:
        raise DataError(f"{target} cannot be written in UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
