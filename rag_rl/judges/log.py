"""The verdicts of a run, one JSON object a line."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_rl.errors import BackendError

logger = logging.getLogger(__name__)

# What a file system without locks says: Lustre mounted without -o flock, NFS whose lock service does not run.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


class VerdictLog:
    """Appends to a JSONL file; processes of one machine may write to the same one.

    A line is one write, made while the file is locked. A line that a full disk or a lost machine has cut short is
    ended, so that it spoils no other. On a file system without locks lines are written all the same, after a warning.

    Args:
        path: the file; made with its folder at the first line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made = False
        self._locks = True

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
                self._lock(file)
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

    def _lock(self, file: int) -> None:
        if not self._locks:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._locks = False
            # What is measured and rewarded does not come from this file, so a run need not stop for it.
            logger.warning(
                "%s: no lock on this file system (%s): lines that processes write at once may run into each other",
                self.path,
                error.strerror,
            )
