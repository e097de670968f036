"""Verdicts that outlive the process: no case is paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rag_rl.errors import ConfigError
from rag_rl.judges.database import Database
from rag_rl.types import JudgeCase, Verdict

# Below sqlite's oldest limit on the parameters of one statement.
_KEYS_PER_STATEMENT = 500


class VerdictCache:
    """Readable verdicts by case; several processes of one machine may share the file, also while one is killed.

    It is safe to delete, and worth keeping: the key says who judged what by which rubric, so nothing in it goes stale.

    Args:
        path: an sqlite file (not on a network file system), made if it is not there; None: for this process only.

    Raises:
        BackendError: the file cannot be opened.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._database = Database(
            path,
            "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdicts TEXT NOT NULL) WITHOUT ROWID",
            what="the verdict cache",
            loss="the verdicts in it and nothing else",
        )

    def load(self, keys: Sequence[bytes]) -> dict[bytes, list[Verdict]]:
        """Looks verdicts up.

        Args:
            keys: as ``cases_key`` makes them.

        Returns:
            The verdicts of each key that is known.

        Raises:
            BackendError: the file fails.
        """
        known: dict[bytes, list[Verdict]] = {}
        for start in range(0, len(keys), _KEYS_PER_STATEMENT):
            some = keys[start : start + _KEYS_PER_STATEMENT]
            marks = ",".join("?" * len(some))
            rows = self._database.read(f"SELECT key, verdicts FROM verdicts WHERE key IN ({marks})", some)
            try:
                known.update(
                    {bytes(key): [Verdict(score, reason) for score, reason in json.loads(text)] for key, text in rows}
                )
            except (ValueError, TypeError) as error:
                raise self._database.broken(error) from error
        return known

    def store(self, key: bytes, verdicts: Sequence[Verdict]) -> None:
        """Keeps the verdicts of one asking; the first that were stored for a key stay.

        Args:
            key: as ``cases_key`` makes it.
            verdicts: one a case, each with a score.

        Raises:
            ValueError: a verdict without a score, which must be asked again instead.
            BackendError: the file fails.
        """
        if any(verdict.score is None for verdict in verdicts):
            raise ValueError("a verdict without a score is not cached")
        text = json.dumps([[verdict.score, verdict.reason] for verdict in verdicts])
        self._database.write("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Closes the file; the next use opens it again."""
        self._database.close()

    def __len__(self) -> int:
        return int(self._database.read("SELECT count(*) FROM verdicts")[0][0])


def cases_key(judge: str, model: str, rubric: str, version: str, cases: Sequence[JudgeCase]) -> bytes:
    """Makes the key under which verdicts are kept.

    Args:
        judge: who judges, with whatever settings shape its replies.
        model: the model behind it.
        rubric: name of the rubric.
        version: of the rubric.
        cases: all that are asked together, in order.

    Returns:
        32 bytes.

    Raises:
        ConfigError: a case's ``meta`` cannot be written as JSON.
    """
    parts = [judge, model, rubric, version, *(_content(case) for case in cases)]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def case_hash(case: JudgeCase) -> str:
    """Names a case by its content, for logs.

    Args:
        case: any.

    Returns:
        16 hexadecimal digits.

    Raises:
        ConfigError: the case's ``meta`` cannot be written as JSON.

    Example:
        >>> case_hash(JudgeCase("Who rules Elmton?", "Mira"))
        '6149daa3cf5fdd90'
    """
    return hashlib.sha256(json.dumps(_content(case)).encode()).hexdigest()[:16]


def _content(case: JudgeCase) -> list[object]:
    try:
        # Through text, so that what the key does not tell apart (a list and a tuple) is the same here as well.
        meta = json.dumps(dict(case.meta), sort_keys=True)
    except (TypeError, ValueError) as error:
        # Anything else has no lasting text: repr() shows addresses and shortens arrays, so two cases could share
        # a key.
        raise ConfigError(
            f"JudgeCase.meta must hold what JSON can hold (texts, numbers, lists, mappings by text), "
            f"got {sorted((str(name), type(value).__name__) for name, value in case.meta.items())}: {error}"
        ) from error
    return [case.question, case.answer, list(case.gold), list(case.passages), meta]
