"""Corpora of every form behind one iterable that streams: a million documents are never held at once."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rag_rl.data.fields import BadRows, Fields
from rag_rl.data.hub import is_hub_source, load_hub_rows
from rag_rl.data.jsonl import read_rows, write_jsonl
from rag_rl.data.multihop import detect_kind, read_multihop_passages
from rag_rl.data.paths import resolve_data_path
from rag_rl.data.reinforced_ir import is_text_array, read_corpus_texts
from rag_rl.data.tables import Columns, CsvTable, choose_columns
from rag_rl.data.text_files import TEXT_ENDINGS, read_text_file, read_text_folder, text_files_in
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Passage

_log = logging.getLogger(__name__)
_SHOWN = 5


class Corpus:
    """Documents that are read anew at every iteration.

    Attributes:
        source: what the user gave.
        n_empty: documents without text that are left out; None before the corpus was checked.
    """

    def __init__(
        self,
        source: object,
        read: Callable[[BadRows], Iterator[tuple[int, Passage]]],
        *,
        on_empty: Literal["skip", "error", "keep"] = "skip",
    ) -> None:
        """Reads nothing yet.

        Args:
            source: as it shall stand in errors.
            read: opens the source anew and yields (number of the row, document); bad rows go to its argument.
            on_empty: what becomes of documents without text: left out, an error, or kept (for title-only corpora).

        Raises:
            ConfigError: ``on_empty`` is none of the three.
        """
        if on_empty not in ("skip", "error", "keep"):
            raise ConfigError(f"on_empty must be skip, error or keep, got {on_empty!r}")
        self.source = str(source)
        self.n_empty: int | None = None
        self._read = read
        self._on_empty = on_empty
        self._length: int | None = None

    def __repr__(self) -> str:
        """Says where the documents come from."""
        return f"Corpus({self.source!r})"

    def __iter__(self) -> Iterator[Passage]:
        """Reads the documents.

        Yields:
            One document after the other, in the source's order.

        Raises:
            DataError: at the end, when there were bad rows.
        """
        bad = BadRows(self.source)
        for number, passage in self._read(bad):
            if not passage.text.strip():
                if self._on_empty == "error":
                    bad.add(number, f'document {passage.doc_id!r} has no text (on_empty="skip" leaves it out)')
                if self._on_empty != "keep":
                    continue
            yield passage
        bad.raise_if_any()

    def __len__(self) -> int:
        """Counts the documents; the first time, that reads them all.

        Returns:
            How many an iteration yields.
        """
        if self._length is None:
            self.check()
        assert self._length is not None
        return self._length

    def check(self) -> None:
        """Reads everything once, so that trouble shows now and not after hours of work. Holds 8 bytes a document.

        Raises:
            DataError: bad rows, repeated ids, or no document at all.
        """
        bad = BadRows(self.source)
        count = empty = 0
        first_empty: list[str] = []
        keys = array("q")
        for number, passage in self._read(bad):
            keys.append(hash((passage.doc_id, passage.chunk)))
            if passage.text.strip() or self._on_empty == "keep":
                count += 1
                continue
            empty += 1
            if self._on_empty == "error":
                bad.add(number, f'document {passage.doc_id!r} has no text (on_empty="skip" leaves it out)')
            elif len(first_empty) < _SHOWN:
                first_empty.append(repr(passage.doc_id))
        bad.raise_if_any()
        self._refuse_repeated(keys)
        if not count:
            why = f": none of its {empty} documents has a text" if empty else ""
            raise DataError(f"{self.source}: the corpus is empty{why}")
        if empty:
            more = ", ..." if empty > len(first_empty) else ""
            _log.warning(
                "%s: %d document%s without text left out (%s%s)",
                self.source, empty, "" if empty == 1 else "s", ", ".join(first_empty), more,
            )  # fmt: skip
        self.n_empty, self._length = empty, count

    def _refuse_repeated(self, keys: array[int]) -> None:
        import numpy as np

        hashes, counts = np.unique(np.frombuffer(keys, dtype=np.int64), return_counts=True)
        suspects = set(hashes[counts > 1].tolist())
        if not suspects:
            return
        # Equal hashes are only a suspicion: a second reading compares the ids themselves.
        bad = BadRows(self.source)
        first: dict[tuple[str, int], int] = {}
        for number, passage in self._read(bad):
            key = (passage.doc_id, passage.chunk)
            if hash(key) not in suspects:
                continue
            if key in first:
                what = f" (chunk {passage.chunk})" if passage.chunk else ""
                bad.add(number, f"doc_id {passage.doc_id!r}{what} is already on {bad.unit} {first[key]}")
            else:
                first[key] = number
        bad.raise_if_any()


def load_corpus(
    source: str | Path,
    *,
    text_columns: Sequence[str] | None = None,
    title_column: str | None = None,
    id_column: str | None = None,
    on_empty: Literal["skip", "error", "keep"] = "skip",
    check: bool = True,
) -> Corpus:
    """Opens a corpus: docs/data_formats.md shows every form.

    Args:
        source: ``.jsonl`` or ``.json`` with ``{doc_id, title?, text}`` (BEIR: ``_id``) or native multi-hop rows; a
            folder with ``corpus.jsonl`` or with ``.txt`` and ``.md`` files; one such file; a ``.csv`` or ``.tsv``; or
            ``hub:<data set id>[:<configuration>][:<split>]``. ``${data}`` is resolved.
        text_columns: columns of a table, or fields of JSON rows, that make the text; None for "text". Several are
            joined as "column: value" lines.
        title_column: None for "title" where there is one.
        id_column: None for "doc_id" or "_id"; a table without one numbers its rows from 1.
        on_empty: what becomes of documents without text: "skip" leaves them out and counts them in a warning, "error"
            refuses them, "keep" keeps them.
        check: read everything once before returning. False is for corpora that were checked before: bad rows then show
            at the end of an iteration, and repeated ids not at all.

    Returns:
        The documents, to be iterated as often as wanted; ``len()`` counts them.

    Raises:
        DataError: nothing is there, its form is unknown, or it is empty, has bad rows or repeated ids.
        ConfigError: an option does not fit the source.
        BackendError: the Hub cannot be reached.
    """
    mapping = {"text_columns": text_columns, "title_column": title_column, "id_column": id_column}
    if isinstance(text_columns, str):
        raise ConfigError(
            f"text_columns must be a list of column names, got the text {text_columns!r}: write [{text_columns}]"
        )
    corpus = Corpus(source, _reader_of(source, mapping), on_empty=on_empty)
    if check:
        corpus.check()
    return corpus


def write_corpus(path: str | Path, passages: Iterable[Passage]) -> int:
    """Writes documents or chunks as JSONL that ``load_corpus`` reads; the file appears whole or not at all.

    Args:
        path: the file; an existing one is replaced at the very end.
        passages: what to write; may be a generator.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written.
    """
    return write_jsonl(path, (_row_of(passage) for passage in passages))


def _row_of(passage: Passage) -> dict[str, Any]:
    row: dict[str, Any] = {"doc_id": passage.doc_id, "title": passage.title, "text": passage.text}
    if passage.chunk:
        row["chunk"] = passage.chunk
    return row


def _reader_of(source: str | Path, mapping: dict[str, Any]) -> Callable[[BadRows], Iterator[tuple[int, Passage]]]:
    if is_hub_source(source):
        return _hub_reader(str(source), mapping)
    path = resolve_data_path(source)
    if path.is_dir() and (path / "corpus.jsonl").is_file():
        path = path / "corpus.jsonl"
    ending = path.suffix.lower()
    if path.is_dir() or ending in TEXT_ENDINGS:
        if named := [name for name, value in mapping.items() if value is not None]:
            raise ConfigError(f"{source}: {named[0]} is for tables and JSON rows; text files have no columns")
        if not path.is_dir():
            return lambda bad: read_text_file(path, bad)
        if next(text_files_in(path), None) is None:
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise DataError(f"{source}: expected corpus.jsonl or .txt and .md files in this folder, found: {found}")
        return lambda bad: read_text_folder(path, bad)
    if ending in (".csv", ".tsv"):
        return _csv_reader(path, mapping)
    if ending in (".jsonl", ".json"):
        return _json_reader(path, mapping)
    raise DataError(
        f"{source}: unknown form {ending!r}; expected .jsonl, .json, .csv, .tsv, .txt, .md, "
        "a folder, or hub:<data set id>"
    )


def _json_reader(path: Path, mapping: dict[str, Any]) -> Callable[[BadRows], Iterator[tuple[int, Passage]]]:
    if path.suffix.lower() == ".json" and is_text_array(path):
        if unfit := [name for name, value in mapping.items() if value is not None]:
            raise ConfigError(f"{path}: {unfit[0]} is for documents with fields, and this is an array of texts")
        return lambda bad: ((int(passage.doc_id) + 1, passage) for passage in read_corpus_texts(path))
    if not any(value is not None for value in mapping.values()):
        first = next(read_rows(path, BadRows(path)), None)
        if first is not None and detect_kind(first[1]):
            return lambda bad: read_multihop_passages(path, bad)
    named = {"text": mapping["text_columns"] and tuple(mapping["text_columns"]), "title": mapping["title_column"],
             "doc_id": mapping["id_column"] and (mapping["id_column"],)}  # fmt: skip
    columns = Columns(**{name: value for name, value in named.items() if value}, title_needed=bool(named["title"]))
    if columns.title in columns.text and not named["title"]:
        columns = replace(columns, title=None)
    return lambda bad: _passages(((number, number, row) for number, row in read_rows(path, bad)), columns, bad)


def _csv_reader(path: Path, mapping: dict[str, Any]) -> Callable[[BadRows], Iterator[tuple[int, Passage]]]:
    wanted = [*(mapping["text_columns"] or ["text"]), mapping["title_column"], mapping["id_column"]]
    table = CsvTable(path, [name for name in wanted if name is not None])
    columns = choose_columns(path, table.names, **mapping)
    return lambda bad: _passages(table.rows(bad), columns, bad)


def _hub_reader(source: str, mapping: dict[str, Any]) -> Callable[[BadRows], Iterator[tuple[int, Passage]]]:
    rows = load_hub_rows(source)
    if not any(value is not None for value in mapping.values()):
        first = next(iter(rows), None)
        if first is not None and detect_kind(first[1]):
            return lambda bad: read_multihop_passages(source, bad)
    columns = choose_columns(source, rows.names, **mapping)

    def read(bad: BadRows) -> Iterator[tuple[int, Passage]]:
        bad.unit = "row"
        return _passages(((number, number, row) for number, row in rows), columns, bad)

    return read


def _passages(
    rows: Iterable[tuple[int, int, dict[str, Any]]], columns: Columns, bad: BadRows
) -> Iterator[tuple[int, Passage]]:
    for place, number, row in rows:
        fields = Fields(row)
        passage = columns.passage(number, fields)
        if fields.troubles:
            bad.add_fields(place, fields)
        else:
            yield place, passage
