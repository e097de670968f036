"""JSON rows in a file that grows while a long task runs, and that a kill may cut in its last line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rag_rl.data.fields import BadRows
from rag_rl.errors import BackendError, DataError


def append_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Appends rows; what a kill left of a last line is taken away first.

    Args:
        path: the file; made with its folder where it is missing.
        rows: objects.

    Returns:
        How many were written; they are on the disk when this returns.

    Raises:
        DataError: a row cannot be written as JSON.
        BackendError: the disk refuses.
    """
    target = Path(path)
    try:
        # A service can send half a character, which UTF-8 has no form for: JSON's own escape keeps it.
        lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"{target}: a row cannot be written as JSON: {error}") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a+b") as file:
            file.truncate(_whole_length(file.seek(0), file.read()))
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BackendError(f"{target}: cannot be written: {error.strerror or error}") from error
    return len(lines)


def read_appended(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads such a file; a last line without its end is passed over, and a missing file is empty.

    Args:
        path: the file.

    Returns:
        Line number from 1, and the object, of every whole line.

    Raises:
        DataError: a whole line is no JSON object; names the line.
        BackendError: the file cannot be read.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BackendError(f"{path}: cannot be read: {error.strerror or error}") from error
    bad, found = BadRows(path), []
    for number, line in enumerate(raw[: _whole_length(0, raw)].splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            bad.add(number, f"is not JSON: {error}")
            continue
        if isinstance(row, dict):
            found.append((number, row))
        else:
            bad.add(number, "must be an object {...}")
    bad.raise_if_any()
    return found


def _whole_length(start: int, raw: bytes) -> int:
    return start + raw.rfind(b"\n") + 1
