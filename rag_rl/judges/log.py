"""The verdicts of a run, one JSON object a line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_rl.errors import BackendError


class VerdictLog:
    """Appends to a JSONL file; processes of one machine may write to the same one.

    A line is one write, made while the file is locked. A line that a full disk or a lost machine has cut short is
    ended, so that it spoils no other.

    Args:
        path: the file; made with its folder at the first line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
            row: of values that JSON can hold.

        Raises:
            BackendError: the disk refuses.
        """
        line = (json.dumps(row) + "\n").encode()
        try:
            if not self._made:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._made = True
            # Opened anew each time (20 µs): nothing to close, and a lock that is neither shared nor inherited.
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = b"\n" + line
                written = os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            raise BackendError(f"the log of verdicts {self.path} cannot be written: {error.strerror}") from error
        if written < len(line):
            raise BackendError(f"the log of verdicts {self.path} cannot be written: the disk is full")
