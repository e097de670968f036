"""Columns that become documents: which ones, and how several become one text. CSV files as rows."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rag_rl.data.fields import BadRows, Fields
from rag_rl.data.jsonl import opened
from rag_rl.errors import DataError
from rag_rl.types import Passage

ID_NAMES = ("doc_id", "_id")
_DELIMITERS = (",", ";", "\t")
# csv's own limit of 131,072 characters is shorter than many articles. A C long on Windows has 32 bits.
_LONGEST_FIELD = min(sys.maxsize, 2**31 - 1)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table, or fields of a JSON row, make a document.

    Attributes:
        text: one column is taken as it is; several are joined as "column: value" lines, without the empty ones.
        title: None for no title.
        doc_id: the names under which the id may stand; empty: the row's number is the id.
        title_needed: whether a row without the title's column is bad; null is never.
        chunk: where the number of a chunk stands; None where rows are whole documents.
    """

    text: tuple[str, ...] = ("text",)
    title: str | None = "title"
    doc_id: tuple[str, ...] = ID_NAMES
    title_needed: bool = False
    chunk: str | None = "chunk"

    def passage(self, number: int, fields: Fields) -> Passage:
        """Makes the document of one row; what is wrong with it is noted in ``fields``.

        Args:
            number: of the row, from 1.
            fields: the row.

        Returns:
            The document; its text may be empty.
        """
        doc_id = fields.identifier(*self.doc_id) if self.doc_id else str(number)
        title = fields.text(self.title, required=False, may_be_empty=True) if self.title is not None else ""
        if self.title is not None and self.title_needed and self.title not in fields.row:
            fields.missing(self.title)
        if len(self.text) == 1:
            text = fields.text(self.text[0], may_be_empty=True)
        else:
            values = [(name, fields.printable(name)) for name in self.text]
            text = "\n".join(f"{name}: {value}" for name, value in values if value.strip())
        chunk = fields.integer(self.chunk, lowest=0) if self.chunk else None
        return Passage(doc_id=doc_id, text=text, title=title, chunk=chunk or 0)


def choose_columns(
    source: object,
    names: Sequence[str],
    *,
    text_columns: Sequence[str] | None,
    title_column: str | None,
    id_column: str | None,
) -> Columns:
    """Chooses the columns of a table whose header is known.

    Args:
        source: the table, as it shall stand in errors.
        names: its columns.
        text_columns: what the user named; None for "text".
        title_column: what the user named; None for "title" where there is one that is no text column.
        id_column: what the user named; None for "doc_id" or "_id" where there is one, else the row's number.

    Returns:
        The columns.

    Raises:
        DataError: a column is not there, or stands there twice.
    """
    text = tuple(text_columns) if text_columns is not None else ("text",)
    named = {"title_column": title_column, "id_column": id_column}
    asked = dict.fromkeys(text, "text_columns") | {name: option for option, name in named.items() if name is not None}
    there = ", ".join(repr(name) for name in names)
    if not text:
        raise DataError(f"{source}: text_columns is empty; name at least one of its columns: {there}")
    for name, option in asked.items():
        if name not in names:
            default = option == "text_columns" and text_columns is None
            what = "no column 'text', and text_columns is not set" if default else f"no column {name!r} ({option})"
            raise DataError(f"{source}: {what}; its columns are: {there}")
        if list(names).count(name) > 1:
            raise DataError(f"{source}: the column {name!r} ({option}) stands there twice; rename one")
    # Not "or": the first column of many tables has the empty name.
    if title_column is None and "title" in names and "title" not in text:
        title_column = "title"
    if id_column is None:
        id_column = next((name for name in ID_NAMES if name in names), None)
    return Columns(text=text, title=title_column, doc_id=() if id_column is None else (id_column,), chunk=None)


class CsvTable:
    """A CSV file with a header. Commas, semicolons or tabs: whichever makes the wanted columns appear in the header.

    Attributes:
        path: the file.
        names: the header.
    """

    def __init__(self, path: Path, wanted: Sequence[str] = ()) -> None:
        """Reads the header.

        Args:
            path: the file.
            wanted: columns that the user named.

        Raises:
            DataError: the file is missing or empty.
        """
        self.path = path
        headers = {delimiter: self._header(delimiter) for delimiter in _DELIMITERS}
        # More columns found wins; then more columns at all (a header without the wanted ones is shown in the error).
        self._delimiter = max(
            _DELIMITERS, key=lambda mark: (sum(name in headers[mark] for name in wanted), len(headers[mark]))
        )
        self.names = headers[self._delimiter]
        if not any(name.strip() for name in self.names):
            raise DataError(f"{path}: the file is empty; expected a header line with the names of the columns")

    def rows(self, bad: BadRows) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Reads the rows; blank lines are passed over.

        Args:
            bad: takes the rows with too few or too many values. A broken quotation ends the reading.

        Yields:
            Line on which the row starts, number of the row (from 1, without the header), and the row.
        """
        with opened(self.path) as file:
            reader = self._reader(file, self._delimiter)
            end = number = 0
            try:
                next(reader)
                end = reader.line_num
                for values in reader:
                    start, end = end + 1, reader.line_num
                    if not values:
                        continue
                    number += 1
                    if len(values) == len(self.names):
                        yield start, number, dict(zip(self.names, values, strict=True))
                    else:
                        bad.add(start, f"has {len(values)} values, but the header has {len(self.names)} columns")
            except csv.Error as error:
                bad.add(
                    end + 1, f"is not CSV: {error} (a quotation mark that is never closed?); nothing after it was read"
                )

    def _header(self, delimiter: str) -> list[str]:
        with opened(self.path) as file:
            try:
                return next(self._reader(file, delimiter), [])
            except csv.Error as error:
                raise DataError(f"{self.path}: line 1: is not CSV: {error}") from error

    @staticmethod
    def _reader(file: Any, delimiter: str) -> Any:
        # The limit belongs to the whole process: it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
        # newline="" lets csv see "\r\n" within quotes; bytes that are no UTF-8 are found, with their field, by Fields.
        text = TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        # Strict, since a quotation mark that is never closed would otherwise swallow the rest of the file.
        return csv.reader(text, delimiter=delimiter, strict=True)
