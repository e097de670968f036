"""The errors that rag-rl raises on purpose.

::

    RagRLError                    anything that rag-rl raises on purpose
    ├── UserError                 the input is wrong: one line, exit code 2, nothing was changed
    │   ├── ConfigError           a key, a type or a value of the configuration
    │   ├── DataError             a file: missing, unreadable, or with bad rows
    │   ├── RetrievalIndexError   an index that does not fit or is damaged
    │   │   ├── IndexMismatchError    made with another encoder, other texts or other settings
    │   │   └── IndexDamagedError     files missing, cut or changed
    │   ├── RunFolderError        an output folder that holds something else
    │   └── MissingPackageError   an optional package is not installed
    └── BackendError              a service or device failed in mid-run (index, judge, endpoint, disk): exit code 1

A broken backend is never a score: nothing in this project turns one of these into 0.0.
"""

from __future__ import annotations

from collections.abc import Sequence


class RagRLError(Exception):
    """Anything that rag-rl raises on purpose."""


class UserError(RagRLError):
    """The input is wrong; the message says what was given, what was expected and what to do."""


class ConfigError(UserError):
    """A key, a type or a value of the configuration."""


class DataError(UserError):
    """A file is missing, unreadable or has bad rows."""


class RetrievalIndexError(UserError):
    """An index cannot be used."""


class IndexMismatchError(RetrievalIndexError):
    """The index was made with another encoder, other texts or other settings."""


class IndexDamagedError(RetrievalIndexError):
    """Files of the index are missing, cut or changed."""


class RunFolderError(UserError):
    """The output folder holds something else."""


class MissingPackageError(UserError):
    """An optional package is not installed; the message names the extra to install."""


class BackendError(RagRLError):
    """A service or device failed in mid-run; the message names it."""


def bad_rows(path: str, rows: Sequence[tuple[int, str]], *, shown: int = 5, unit: str = "line") -> DataError:
    """Makes the error for a file with bad rows.

    Args:
        path: the file.
        rows: (number from 1, what is wrong with it) of every bad row.
        shown: how many are spelt out.
        unit: what rows are numbered by: lines, or items of an array, or rows of a table.

    Returns:
        An error whose message names file, place and trouble of the first rows and counts the others.

    Example:
        >>> print(bad_rows("q.jsonl", [(3, "field 'answers' is missing")]))
        q.jsonl: 1 bad row: line 3: field 'answers' is missing
    """
    listed = "; ".join(f"{unit} {number}: {trouble}" for number, trouble in rows[:shown])
    more = f"; and {len(rows) - shown} more" if len(rows) > shown else ""
    return DataError(f"{path}: {len(rows)} bad row{'s' if len(rows) != 1 else ''}: {listed}{more}")
