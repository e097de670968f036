"""BEIR folders (Thakur et al. 2021): ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rag_rl.data.fields import BadRows
from rag_rl.data.jsonl import read_lines
from rag_rl.data.paths import resolve_data_path
from rag_rl.errors import DataError

QRELS_HEADER = ("query-id", "corpus-id", "score")


def load_qrels(path: str | Path) -> dict[str, dict[str, float]]:
    r"""Reads relevance judgements: tab-separated, with BEIR's header ``query-id  corpus-id  score``.

    Args:
        path: the file; ``${data}`` is resolved.

    Returns:
        Gain of each judged document for each query, >= 0. A negative judgement (TREC's "junk") counts as 0.

    Raises:
        DataError: the file is missing or empty, has another header, or has bad rows.
    """
    bad = BadRows(path)
    qrels: dict[str, dict[str, float]] = {}
    first_at: dict[tuple[str, str], int] = {}
    header_seen = False
    for number, line in read_lines(path, bad):
        values = [value.strip() for value in line.split("\t")]
        if not header_seen:
            header_seen = True
            if tuple(values) != QRELS_HEADER:
                wanted = "<tab>".join(QRELS_HEADER)
                raise DataError(f"{path}: line {number}: expected the header {wanted}, got {line[:80]!r}")
            continue
        if len(values) != len(QRELS_HEADER):
            bad.add(number, f"expected {len(QRELS_HEADER)} values with a tab between them, got {len(values)}")
            continue
        qid, doc_id, score = values
        trouble = [f"field {name!r} is empty" for name, value in zip(QRELS_HEADER, values, strict=True) if not value]
        gain = _number(score)
        if gain is None and score:
            trouble.append(f"field 'score' must be a number, got text {score[:40]!r}")
        known = qrels.get(qid, {}).get(doc_id)
        if known is not None and gain is not None and known != max(gain, 0.0):
            trouble.append(f"query {qid!r} and document {doc_id!r} have another score on line {first_at[qid, doc_id]}")
        if trouble:
            bad.add(number, "; ".join(trouble))
        elif gain is not None and known is None:
            qrels.setdefault(qid, {})[doc_id] = max(gain, 0.0)
            first_at[qid, doc_id] = number
    bad.raise_if_any()
    if not qrels:
        raise DataError(f"{path}: the file holds no judgements")
    return qrels


def relevant_ids(gains: Mapping[str, float]) -> tuple[str, ...]:
    """Picks the documents that count as right.

    Args:
        gains: judged gain of each document.

    Returns:
        Ids of those with a gain above 0, best first; equal ones keep their order.

    Example:
        >>> relevant_ids({"a": 1.0, "b": 0.0, "c": 2.0})
        ('c', 'a')
    """
    return tuple(doc_id for doc_id, gain in sorted(gains.items(), key=lambda item: -item[1]) if gain > 0)


def beir_queries(folder: str | Path) -> Path:
    """Finds the queries of a BEIR folder.

    Args:
        folder: the folder; ``${data}`` is resolved.

    Returns:
        Its ``queries.jsonl``.

    Raises:
        DataError: it has none.
    """
    path = resolve_data_path(folder)
    if not (path / "queries.jsonl").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{folder}: expected queries.jsonl in this folder, found: {found}; give a BEIR folder or one file of it"
        )
    return path / "queries.jsonl"


def beir_qrels(folder: str | Path, split: str | None = None) -> Path:
    """Finds the judgements of a BEIR folder.

    Args:
        folder: the folder; ``${data}`` is resolved.
        split: which file of ``qrels``, without its ending; None when there is only one.

    Returns:
        The file.

    Raises:
        DataError: there is no such split, or several and none was named.
    """
    splits = sorted(path.stem for path in (resolve_data_path(folder) / "qrels").glob("*.tsv"))
    if not splits:
        raise DataError(f"{folder}: expected qrels/<split>.tsv in this folder, found none")
    if split is None and len(splits) > 1:
        raise DataError(f"{folder}: there are several splits, name one of them (split=...): {', '.join(splits)}")
    if split is not None and split not in splits:
        raise DataError(f"{folder}: no split {split!r}; there is: {', '.join(splits)}")
    return resolve_data_path(folder) / "qrels" / f"{split or splits[0]}.tsv"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
