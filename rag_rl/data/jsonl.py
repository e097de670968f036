"""JSON rows in and out: one object a line, or the array that some data sets are released as. Nothing is held whole."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rag_rl.data.fields import BadRows, describe
from rag_rl.data.paths import missing_path, resolve_data_path
from rag_rl.data.whole_files import whole_file
from rag_rl.errors import DataError

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
# What other programs write instead of plain UTF-8, by the first bytes.
_FOREIGN = {
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
    b"\x1f\x8b": "is gzip-compressed: unpack it with gunzip",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"PAR1": "is a Parquet file: load its folder as hub:<folder>",
}


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, past a byte order mark.

    Args:
        path: the file; ``${data}`` is resolved.

    Yields:
        The open file.

    Raises:
        DataError: it is missing, a folder, not readable, compressed or UTF-16.
    """
    file_path = resolve_data_path(path)
    try:
        file = file_path.open("rb")
    except FileNotFoundError as error:
        raise missing_path(file_path) from error
    except IsADirectoryError as error:
        raise DataError(f"{file_path}: is a folder; give a file{_files_in(file_path)}") from error
    except OSError as error:
        raise DataError(f"{file_path}: cannot be read: {error.strerror or error}") from error
    with file:
        start = file.read(4)
        for magic, trouble in _FOREIGN.items():
            if start.startswith(magic):
                raise DataError(f"{file_path}: {trouble}")
        file.seek(len(_BOM) if start.startswith(_BOM) else 0)
        yield file


def read_lines(path: str | Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    r"""Reads the lines of a UTF-8 file that are not blank.

    Args:
        path: the file.
        bad: takes the lines that are not UTF-8.

    Yields:
        Line number from 1, and the line without its ending (``\n`` or ``\r\n``).
    """
    with opened(path) as file:
        # Bytes are split at "\n" only; text would also be split at a lone "\r", which JSON allows between fields.
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
                bad.add(number, f"is not UTF-8 ({where}): save the file as UTF-8")
                continue
            if line.strip():
                yield number, line.rstrip("\r\n")


def read_jsonl(path: str | Path, *, bad: BadRows | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a file of one JSON object a line, without holding it in memory. Blank lines are passed over.

    Args:
        path: the file; ``${data}`` is resolved.
        bad: takes the bad rows, when the caller has more to say about them; None raises them at the end of the file.

    Yields:
        Line number from 1, and the object.

    Raises:
        DataError: the file is missing, or (at its end) had rows that are not JSON objects.
    """
    own = BadRows(path) if bad is None else bad
    for number, line in read_lines(path, own):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Not str(error): it counts lines too, always 1 here, which reads like a line of the file.
            where = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            own.add(number, f"is not JSON: {where}")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            own.add(number, f"must be an object {{...}}, got {describe(row)}")
    if bad is None:
        own.raise_if_any()


def is_json_array(path: str | Path) -> bool:
    """Tells a file that holds one JSON array from one with an object a line.

    Args:
        path: the file.

    Returns:
        Whether its first character that is not a space opens an array.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    with opened(path) as file:
        while chunk := file.read(1024):
            if chunk := chunk.lstrip():
                return chunk.startswith(b"[")
    return False


def read_json_array(path: str | Path, *, bad: BadRows | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a file that is one JSON array of objects, item by item, without holding it in memory.

    Args:
        path: the file; ``${data}`` is resolved.
        bad: takes the bad items; None raises them at the end of the file. Broken JSON ends the reading.

    Yields:
        Item number from 1, and the object.

    Raises:
        DataError: the file is missing, or (at its end) had items that are not JSON objects.
    """
    own = BadRows(path) if bad is None else bad
    own.unit = "item"
    number = 0
    try:
        for number, value in enumerate(_array_items(path), start=1):
            if isinstance(value, dict):
                yield number, value
            else:
                own.add(number, f"must be an object {{...}}, got {describe(value)}")
    except _BrokenArrayError as error:
        own.add(number + 1, str(error))
    if bad is None:
        own.raise_if_any()


def read_rows(path: str | Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads JSON objects from a JSONL file or from a JSON array, whichever the file is.

    Args:
        path: the file.
        bad: takes the bad rows, and learns what they are counted in.

    Yields:
        Line or item number from 1, and the object.
    """
    yield from read_json_array(path, bad=bad) if is_json_array(path) else read_jsonl(path, bad=bad)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object a line; the file appears whole or not at all.

    Args:
        path: the file; its folder is made. An existing file is replaced at the very end.
        rows: the objects, in order.

    Returns:
        How many rows were written.

    Raises:
        DataError: the disk refuses, or a row cannot be written as JSON.
    """
    target = resolve_data_path(path, must_exist=False)
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            for row in rows:
                count += 1
                file.write(_encode(row, f"{target}: row {count}"))
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    return count


def _encode(row: Mapping[str, Any], what: str) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} cannot be written as JSON in UTF-8: {error}") from error


class _BrokenArrayError(ValueError):
    """The JSON of an array cannot be read on."""


def _array_items(path: str | Path) -> Iterator[Any]:
    """Decodes the items of an array from a buffer that slides over the file."""
    decoder = json.JSONDecoder()
    with _text_of(path) as read:
        buffer, position = _to_next_sign("", 0, read)
        if buffer[position : position + 1] != "[":
            raise _BrokenArrayError("is not a JSON array: '[' expected")
        position, first = position + 1, True
        while True:
            buffer, position = _to_next_sign(buffer, position, read)
            sign = buffer[position : position + 1]
            if sign == "]":
                rest, start = _to_next_sign(buffer, position + 1, read)
                if rest[start:]:
                    raise _BrokenArrayError("stands after the end of the array: only one array is expected")
                return
            if not first:
                if sign != ",":
                    raise _BrokenArrayError(f"is not JSON: ',' or ']' expected, got {sign or 'the end of the file'!r}")
                buffer, position = _to_next_sign(buffer, position + 1, read)
            first = False
            while True:
                try:
                    value, position = decoder.raw_decode(buffer, position)
                    break
                except json.JSONDecodeError as error:
                    # Cut off by the end of the buffer, or wrong? A cut shows as an open string, or within the last
                    # few characters ("-Infinity" and "\\ud83d\\ude00" are the longest signs).
                    cut = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16
                    # As much again as there is: an item of any length costs linear time.
                    more = read(max(_CHUNK, len(buffer) - position)) if cut else ""
                    if not more:
                        raise _BrokenArrayError(f"is not JSON: {error.msg}; nothing after it was read") from error
                    buffer, position = buffer[position:] + more, 0
                except RecursionError as error:
                    raise _BrokenArrayError("is not JSON: nested too deeply; nothing after it was read") from error
            yield value


def _to_next_sign(buffer: str, position: int, read: Callable[[int], str]) -> tuple[str, int]:
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n":
            position += 1
        if position < len(buffer):
            return buffer, position
        if not (buffer := read(_CHUNK)):
            return "", 0
        position = 0


@contextmanager
def _text_of(path: str | Path) -> Iterator[Callable[[int], str]]:
    with opened(path) as file:
        reader = io.TextIOWrapper(file, encoding="utf-8", newline="")

        def read(characters: int) -> str:
            try:
                return reader.read(characters)
            except UnicodeDecodeError as error:
                raise _BrokenArrayError(f"is not UTF-8: {error.reason}; save the file as UTF-8") from error

        yield read


def _files_in(folder: Path, *, shown: int = 8) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    return f", for example one of: {', '.join(names[:shown])}" if names else ""
