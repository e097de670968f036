"""Rows of an evaluation on disk: written while it runs, read one at a time, and their scores as columns."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from rag_rl.errors import BackendError, RunFolderError
from rag_rl.evaluation.scoring import Row

Key = tuple[str, bytes]
"""What tells a question from others: its id, and a digest of its text."""


class RowWriter:
    """Appends rows to a file; what a kill left of a last line is taken away first.

    Args:
        path: JSONL file; made with its folder where it is missing.

    Raises:
        BackendError: the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._file.truncate(_whole_length(self._file))
        except OSError as error:
            raise BackendError(f"{path}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, rows: Iterable[Row]) -> None:
        """Appends rows; they are on the disk when this returns.

        Args:
            rows: evaluated questions.

        Raises:
            BackendError: the disk refuses.
        """
        try:
            self._file.writelines(line_of(row) for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BackendError(f"{self.path}: cannot be written: {error.strerror or error}") from error


class RowFile(Sequence[Row]):
    """The rows of a file by place, decoded when they are asked for; a last line without its end is passed over.

    Args:
        path: JSONL file.

    Raises:
        RunFolderError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends = array("Q", [0])
        try:
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        self._ends.append(self._ends[-1] + len(line))
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        start, end = self.span(place)
        with self.path.open("rb") as file:
            file.seek(start)
            return self._decoded(file.read(end - start), place)

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for place in range(len(self)):
                yield self._decoded(file.readline(), place)

    def span(self, place: int) -> tuple[int, int]:
        """Where a row stands in the file.

        Args:
            place: from 0.

        Returns:
            First byte of its line, and the one after its newline.
        """
        return self._ends[place], self._ends[place + 1]

    def _decoded(self, line: bytes, place: int) -> Row:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunFolderError(f"{self.path}: line {place + 1} is damaged: {error}") from error
        if not (isinstance(row, dict) and isinstance(row.get("scores"), dict) and {"qid", "question"} <= row.keys()):
            raise RunFolderError(
                f"{self.path}: line {place + 1} is no row of an evaluation as this version writes them (qid, "
                "question, scores, ...)"
            )
        return row


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """The scores of an evaluation without its texts: what stays in memory of many rows.

    Attributes:
        keys: of the questions, in order.
        columns: metric to one value a question; NaN where it has none.
    """

    keys: list[Key]
    columns: dict[str, npt.NDArray[np.float64]]

    def means(self) -> dict[str, float]:
        """Mean of each metric over the questions that have it; a metric that none has is absent."""
        return {name: float(np.nanmean(values)) for name, values in self.columns.items() if not np.isnan(values).all()}

    def take(self, places: Sequence[int]) -> ScoreTable:
        """The table of some of its questions.

        Args:
            places: from 0, in their new order.

        Returns:
            A table.
        """
        chosen = np.asarray(places, dtype=np.int64)
        return ScoreTable([self.keys[i] for i in places], {name: one[chosen] for name, one in self.columns.items()})


def score_table(rows: Iterable[Row]) -> ScoreTable:
    """Collects the scores of rows, one pass.

    Args:
        rows: evaluated questions.

    Returns:
        Their table.
    """
    keys: list[Key] = []
    found: dict[str, array[float]] = {}
    for place, row in enumerate(rows):
        keys.append(key_of(row))
        for name, value in row["scores"].items():
            column = found.get(name)
            if column is None:
                column = found[name] = array("d")
            # Metrics that earlier questions did not have, or that this one has after some that had not.
            column.extend([float("nan")] * (place - len(column)))
            column.append(float("nan") if value is None else float(value))
    for column in found.values():
        column.extend([float("nan")] * (len(keys) - len(column)))
    return ScoreTable(keys, {name: np.array(column, dtype=np.float64) for name, column in found.items()})


def key_of(row: Row) -> Key:
    """What tells the question of a row from others.

    Args:
        row: evaluated question.

    Returns:
        Its id, and a digest of its text.
    """
    text = str(row["question"]).encode("utf-8", "surrogatepass")
    return str(row["qid"]), hashlib.blake2b(text, digest_size=8).digest()


def line_of(row: Row) -> bytes:
    """A row as a line of a file; half a character, which a byte-level model may write, is kept as its JSON escape.

    Args:
        row: evaluated question.

    Returns:
        UTF-8 JSON, ended by a newline.
    """
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _whole_length(file: Any) -> int:
    """The length of a file up to its last newline, found from its end."""
    end: int = file.seek(0, os.SEEK_END)
    place = end
    while place > 0:
        start = max(0, place - 65_536)
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        place = start
    return 0
