"""Retrieval tasks: what the queries and passages of a data set are. The user's own extend the packaged ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from rag_rl.errors import ConfigError

_PACKAGED = Path(__file__).with_name("tasks.yaml")
_LENGTHS = MappingProxyType({"<5": 2.0, "5-10": 5.0, "10-15": 4.0, ">=15": 1.0})
_CLAIM_LENGTHS = MappingProxyType({"10-15": 5.0, ">=15": 2.0})
_STYLES = MappingProxyType({"plain": 4.0, "formal": 4.0, "casual": 2.0, "professional": 1.0})


@dataclass(frozen=True)
class RetrievalTask:
    """What a search is for. Weights of lengths and styles are those of Reinforced-IR (arXiv 2502.11562).

    Attributes:
        name: under which it is found.
        instruction: in a sentence.
        query_type: what a query is.
        passage_type: what a passage is.
        answer_type: what an augmentation is written as.
        lengths: bucket of words to weight; a bucket is ``"<5"``, ``"5-10"`` (10 excluded) or ``">=15"``.
        styles: style to weight.
        claims: whether queries are claims, which a passage supports or refutes.
        examples: of queries.
    """

    name: str
    instruction: str
    query_type: str = "question"
    passage_type: str = "passage"
    answer_type: str = "passage"
    lengths: Mapping[str, float] = field(default_factory=lambda: _LENGTHS)
    styles: Mapping[str, float] = field(default_factory=lambda: _STYLES)
    claims: bool = False
    examples: tuple[str, ...] = ()


def load_tasks(path: str | Path | None = None) -> dict[str, RetrievalTask]:
    """Reads the packaged tasks and, over them, the user's own.

    Args:
        path: a YAML file of ``{name: {instruction: ..., ...}}``. An entry under a packaged name changes the fields
            that it names; None for the packaged ones alone.

    Returns:
        Tasks by name.

    Raises:
        ConfigError: the file is missing, no YAML, or an entry is wrong; names file, entry and field.
    """
    found = _read(_PACKAGED)
    if path is not None:
        for name, entry in _read(Path(path)).items():
            found[name] = {**found.get(name, {}), **entry}
    return {name: _task(path or _PACKAGED, name, entry) for name, entry in found.items()}


def load_task(name: str, path: str | Path | None = None) -> RetrievalTask:
    """Finds one task.

    Args:
        name: as in the file.
        path: as in ``load_tasks``.

    Returns:
        The task.

    Raises:
        ConfigError: there is none of that name, or as in ``load_tasks``.

    Example:
        >>> load_task("scifact").query_type
        'scientific claim'
    """
    tasks = load_tasks(path)
    if name not in tasks:
        raise ConfigError(f"there is no task {name!r}; known are {', '.join(sorted(tasks))}: describe it in a file")
    return tasks[name]


def bucket_bounds(bucket: str) -> tuple[int, int | None]:
    """Reads a bucket of lengths.

    Args:
        bucket: ``"<5"``, ``"5-10"`` or ``">=15"``.

    Returns:
        Fewest words, and the first number that is too many; None for no bound.

    Raises:
        ValueError: it is none of the three forms.

    Example:
        >>> bucket_bounds("<5"), bucket_bounds("5-10"), bucket_bounds(">=15")
        ((1, 5), (5, 10), (15, None))
    """
    try:
        if bucket.startswith("<"):
            low, high = 1, int(bucket[1:])
        elif bucket.startswith(">="):
            return int(bucket[2:]), None
        else:
            low, high = map(int, bucket.split("-"))
    except ValueError as error:
        raise ValueError(f"a bucket is written <5, 5-10 or >=15, got {bucket!r}") from error
    if not 0 < low < high:
        raise ValueError(f"the bucket {bucket!r} holds no length")
    return low, high


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold entries of the form name: {{instruction: ...}}")
    for name, entry in content.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise ConfigError(f"{path}: entry {name!r} must be of the form name: {{instruction: ...}}")
    return content


def _task(path: str | Path, name: str, entry: Mapping[str, Any]) -> RetrievalTask:
    known = {one.name for one in fields(RetrievalTask)} - {"name"}
    if unknown := sorted(map(str, entry.keys() - known)):
        raise ConfigError(f"{path}: task {name}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    values = dict(entry)
    if not isinstance(values.get("claims", False), bool):
        raise ConfigError(f"{path}: task {name}: claims must be true or false, got {values['claims']!r}")
    for key in ("instruction", "query_type", "passage_type", "answer_type"):
        value = values.get(key, None if key == "instruction" else "-")
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{path}: task {name}: {key} must be a text, got {value!r}")
    examples = values.get("examples", [])
    if not isinstance(examples, list) or not all(isinstance(one, str) and one.strip() for one in examples):
        raise ConfigError(f"{path}: task {name}: examples must be a list of texts, got {examples!r}")
    values["examples"] = tuple(examples)
    for key in ("lengths", "styles"):
        if key in values:
            values[key] = _weights(f"{path}: task {name}: {key}", values[key])
    if values.get("claims"):
        values.setdefault("lengths", _CLAIM_LENGTHS)
    for bucket in values.get("lengths", {}):
        try:
            bucket_bounds(bucket)
        except ValueError as error:
            raise ConfigError(f"{path}: task {name}: {error}") from error
    return RetrievalTask(name, **values)


def _weights(what: str, value: object) -> Mapping[str, float]:
    fits = isinstance(value, dict) and all(
        isinstance(key, str)
        and isinstance(weight, (int, float))
        and not isinstance(weight, bool)
        and 0.0 <= weight < math.inf
        for key, weight in value.items()
    )
    if not isinstance(value, dict) or not fits or not sum(value.values()):
        raise ConfigError(f"{what} must be names with weights of at least 0, not all 0, got {value!r}")
    return {key: float(weight) for key, weight in value.items()}
