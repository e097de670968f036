"""A small sqlite file that several processes write to, and that a kill leaves whole."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rag_rl.errors import BackendError

_PATIENCE_S = 60.0


class Database:
    """An sqlite file in WAL mode; every statement is a transaction of its own.

    A killed process leaves the transactions that it had committed. A machine that loses power may lose the last of
    them and keeps the file whole. Not for network file systems, where WAL mode does not work.

    Args:
        path: the file; made with its folder if it is not there. None keeps everything in memory.
        schema: one ``CREATE TABLE IF NOT EXISTS``, or several separated by semicolons.
        what: what the file is to the user, for messages: "the verdict cache".
        loss: what deleting the file loses, for messages.

    Raises:
        BackendError: the file cannot be opened or is no sqlite file.
    """

    def __init__(self, path: str | Path | None, schema: str, *, what: str, loss: str) -> None:
        self.path = None if path is None else Path(path)
        self._schema, self._what, self._loss = schema, what, loss
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._close_when_lost: weakref.finalize[[], Database] | None = None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BackendError(f"cannot make the folder of {what} {self.path}: {error.strerror}") from error
        with self._opened():
            pass

    def read(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Runs one SELECT.

        Args:
            statement: with ``?`` for each value.
            values: in order.

        Returns:
            All rows.

        Raises:
            BackendError: the file fails; the message names it.
        """
        with self._opened() as connection:
            return connection.execute(statement, values).fetchall()

    def write(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Runs one statement that changes something, as a transaction.

        Args:
            statement: with ``?`` for each value.
            values: in order.

        Returns:
            How many rows were changed.

        Raises:
            BackendError: the file fails; the message names it.
        """
        with self._opened() as connection:
            return connection.execute(statement, values).rowcount

    def close(self) -> None:
        """Closes the connection; the next use opens it again (an in-memory one starts empty)."""
        with self._lock:
            if self._close_when_lost is not None:
                self._close_when_lost()
            self._connection = None

    def broken(self, error: Exception) -> BackendError:
        """Makes the error that names the file.

        Args:
            error: of sqlite, or of reading what the file holds.

        Returns:
            An error to raise.
        """
        return BackendError(
            f"{self._what} {self.path or '(in memory)'} fails ({error}); deleting it loses {self._loss}"
        )

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                # sqlite connections do not survive a fork.
                if self._connection is None or self._process != os.getpid():
                    self._connection, self._process = self._connect(), os.getpid()
                    self._close_when_lost = weakref.finalize(self, self._connection.close)
                yield self._connection
        except sqlite3.Error as error:
            raise self.broken(error) from error

    def _connect(self) -> sqlite3.Connection:
        # The lock guards it, so other threads may use it too.
        connection = sqlite3.connect(
            self.path or ":memory:", timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
        )
        try:
            if self.path is not None:
                _switch_to_wal(connection)
                # Without a sync at each commit: that protects against a loss of power only, and costs milliseconds.
                connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(self._schema)
        except sqlite3.Error:
            connection.close()
            raise
        return connection


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    # Switching needs the file alone, and sqlite does not wait for that: processes that start together would fail.
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)
