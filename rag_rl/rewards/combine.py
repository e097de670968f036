"""The combination rule: several rewards as one, of which some are required.

TRL leaves a row out only where *every* reward function gives None. Where one of them decides whether a row can be
scored at all (a judge, a dropped unanswerable question), it must therefore come combined with the others in one
function.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rag_rl.errors import BackendError, ConfigError


@dataclass(frozen=True, slots=True)
class RewardPart:
    """One reward of a combination.

    Attributes:
        name: unique in its combination; its mean is logged as ``rewards/<name>``.
        function: a TRL reward, ``def`` or ``async def``.
        weight: of its value in the sum; may be negative (a penalty) or 0 (logged only).
        required: whether a row that it cannot score (None) has no reward at all.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    required: bool = False


def combine(parts: Sequence[RewardPart]) -> Callable[..., Coroutine[Any, Any, list[float | None]]]:
    """Makes one TRL reward out of several: their plain weighted sum.

    The sum is not divided by the weights: parts in [0, 1] with weights 1.0 and 0.2 give values in [0, 1.2]. It is an
    ``async def``, which TRL needs to find it by ``inspect.iscoroutinefunction``; asynchronous parts run concurrently.
    A part that raises ends the step with its exception: nothing broken becomes a score.

    Where the trainer passes ``log_metric``, each batch logs ``rewards/<name>`` (mean over the rows that the part
    scored; a batch without one repeats the last mean known), ``rewards/<name>/none`` (share of rows that it did not
    score) and ``rewards/none`` (share of rows without any reward). The names are the same for every batch, since TRL
    gathers metric by metric and a name that one rank lacks would stop the others.

    Args:
        parts: at least one, names unique.

    Returns:
        The reward, named ``reward``; see ``weighted_sum`` for its values.

    Raises:
        ConfigError: no parts, a name twice, or a weight that is not finite.
    """
    chosen = _checked(parts)
    last_means: dict[str, float] = {}

    async def reward(*, completions: list[Any], **columns: Any) -> list[float | None]:
        scores = await _score(chosen, {**columns, "completions": completions})
        total = weighted_sum(chosen, scores)
        log_metric = columns.get("log_metric")
        if log_metric is not None and completions:
            for name, values in scores.items():
                known = [value for value in values if value is not None]
                if known:
                    last_means[name] = sum(known) / len(known)
                log_metric(f"rewards/{name}", last_means.get(name, math.nan))
                log_metric(f"rewards/{name}/none", 1 - len(known) / len(values))
            log_metric("rewards/none", total.count(None) / len(total))
        return total

    return reward


def weighted_sum(parts: Sequence[RewardPart], scores: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """Applies the combination rule to the parts' values.

    Args:
        parts: with their weights.
        scores: the values of each part by name, one a row, as from ``score_parts``.

    Returns:
        A row's weighted sum. Parts that are None and not required are left out, and the sum is scaled up by the
        absolute weight that is missing. None where a required part is None, or nothing of any weight is left.

    Example:
        >>> parts = [RewardPart("em", print, 1.0, required=True), RewardPart("judge", print, 0.5)]
        >>> weighted_sum(parts, {"em": [1.0, 1.0, None], "judge": [0.0, None, 1.0]})
        [1.0, 1.5, None]
    """
    whole = sum(abs(part.weight) for part in parts)
    total: list[float | None] = []
    for row in zip(*(scores[part.name] for part in parts), strict=True):
        known = [(part.weight, value) for part, value in zip(parts, row, strict=True) if value is not None]
        scored = sum(abs(weight) for weight, _ in known)
        lost = any(part.required and value is None for part, value in zip(parts, row, strict=True))
        total.append(None if lost or scored == 0 else sum(w * value for w, value in known) * (whole / scored))
    return total


def score_parts(parts: Sequence[RewardPart], **columns: Any) -> dict[str, list[float | None]]:
    """Runs rewards outside a trainer: for reports, and to try a combination on a few answers.

    Args:
        parts: as in ``combine``.
        **columns: what the trainer would pass: ``completions`` and whatever the parts read, one value a row.
            ``prompts`` may be left out if no part reads them.

    Returns:
        The values of each part by name, one a row.

    Raises:
        ConfigError: as in ``combine``, or ``completions`` is missing.
        BackendError: a part returned the wrong number of values, or one that is not finite.
    """
    if "completions" not in columns:
        raise ConfigError("score_parts needs completions=[...], one completion a row")
    filled = {"prompts": [""] * len(columns["completions"]), **columns}
    # In a thread of its own: the caller may itself run in an event loop (a notebook), where asyncio.run is refused.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, _score(_checked(parts), filled)).result()


def _checked(parts: Sequence[RewardPart]) -> tuple[RewardPart, ...]:
    if not parts:
        raise ConfigError("a reward needs at least one part, got none")
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"reward part {name!r} is named twice: give each part a name of its own")
    for part in parts:
        if not math.isfinite(part.weight):
            raise ConfigError(f"reward part {part.name!r}: the weight must be finite, got {part.weight}")
    return tuple(parts)


async def _score(parts: Sequence[RewardPart], columns: dict[str, Any]) -> dict[str, list[float | None]]:
    # Asynchronous parts start first, so that their requests are under way while the others compute.
    tasks = {part.name: asyncio.ensure_future(part.function(**columns)) for part in parts if _is_async(part.function)}
    try:
        await asyncio.sleep(0)
        done = {part.name: part.function(**columns) for part in parts if part.name not in tasks}
        done.update(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
    finally:
        for task in tasks.values():
            task.cancel()  # of a finished one: nothing happens
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    rows = len(columns["completions"])
    return {part.name: _values(part.name, done[part.name], rows) for part in parts}


def _is_async(function: Callable[..., Any]) -> bool:
    # Wider than TRL's own test, which does not see an object with an asynchronous __call__.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _values(name: str, returned: Any, rows: int) -> list[float | None]:
    values = [None if value is None else float(value) for value in returned]
    if len(values) != rows:
        raise BackendError(f"reward part {name!r} returned {len(values)} values for {rows} completions")
    for row, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise BackendError(
                f"reward part {name!r} returned {value} for row {row}: expected a finite number, or None where the "
                "row cannot be scored"
            )
    return values
