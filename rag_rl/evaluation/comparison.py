"""Runs against each other on the same questions: what ``rag-rl compare`` shows, in a terminal and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rag_rl.errors import ConfigError, DataError, RunFolderError
from rag_rl.evaluation.evaluating import differences, summarise
from rag_rl.evaluation.report import COUNTS, MAIN_METRICS
from rag_rl.evaluation.row_files import RowFile, ScoreTable, score_table
from rag_rl.evaluation.run_folders import read_run

ASSEMBLY = "assembly"
"""What the rows of ``evaluate_rag`` are called; those of a training run are ``before`` and ``after``."""

_FILES = {"before": "before.jsonl", "after": "after.jsonl", ASSEMBLY: "rows.jsonl"}


@dataclass(frozen=True, slots=True)
class Side:
    """One assembly in a comparison.

    Attributes:
        name: as it is shown.
        folder: of its run.
        what: ``before``, ``after``, ``assembly`` or ``baseline_<name>``.
        rows: its questions on disk.
        table: their scores.
        summary: ``metrics``, ``mean_ci95`` and ``n_eval`` over the compared questions.
        log_history: of the training behind it; empty where there was none.
        settings: of the run.
    """

    name: str
    folder: Path
    what: str
    rows: RowFile
    table: ScoreTable
    summary: dict[str, Any] = field(default_factory=dict)
    log_history: Sequence[dict[str, Any]] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two sides of a comparison.

    Attributes:
        reference: place of the side that is the measure.
        other: place of the one that is measured.
        metrics: as ``differences`` gives them.
    """

    reference: int
    other: int
    metrics: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sides that answered the same questions, each against its reference.

    Attributes:
        sides: in the order in which they are shown.
        places: of each side, the row of each compared question.
        differences: of every side but the first.
        main: the metric that right and wrong are told by.
        left_out: questions of each side that not all sides have, and that are not compared.
    """

    sides: list[Side]
    places: list[list[int]]
    differences: list[Difference]
    main: str
    left_out: list[int]

    @property
    def n_eval(self) -> int:
        """Questions compared."""
        return len(self.places[0])


def open_sides(run: str, *, baselines: bool = False) -> list[Side]:
    """Opens what a run has to compare.

    Args:
        run: a run folder, of a training or of ``evaluate_rag``. ``FOLDER:before`` (``:after``, ``:baseline_bm25``)
            takes one side of it, and ``NAME=`` in front names what is opened.
        baselines: whether its baselines are opened as well, where no side is named.

    Returns:
        Its sides: before and after of a training, the assembly of an evaluation.

    Raises:
        RunFolderError: it is no finished run, damaged, of another version, or has no such side.
    """
    name, folder, wanted = _split(run)
    summary, settings = read_run(folder)
    trained = settings.get("recipe") != "evaluate_rag"
    files = {what: file for what, file in _FILES.items() if (what == ASSEMBLY) != trained}
    files |= {f"baseline_{one}": f"baseline_{one}.jsonl" for one in summary.get("baselines") or {}}
    if wanted is not None and wanted not in files:
        raise RunFolderError(f"{folder} has no side {wanted!r}; it has {', '.join(files)}")
    chosen = [wanted] if wanted else [what for what in files if baselines or not what.startswith("baseline_")]
    history = _history(folder) if trained else []
    label = name or folder.resolve().name
    return [
        _side(
            label if len(chosen) == 1 and (name or what == ASSEMBLY) else f"{label} {what.removeprefix('baseline_')}",
            folder,
            what,
            folder / files[what],
            summary,
            log_history=history if what == "after" else [],
            settings=settings,
        )
        for what in chosen
    ]


def compare(
    sides: Sequence[Side],
    *,
    against: Literal["first", "previous"] = "first",
    common: bool = False,
    main: str | None = None,
) -> Comparison:
    """Compares sides question by question.

    Args:
        sides: at least one.
        against: what each is measured by: the first side, or the one before it.
        common: whether questions that not all sides have are left out; else they are an error.
        main: the metric that tells right from wrong; by default ``em`` or the closest to it that all sides have.

    Returns:
        The comparison.

    Raises:
        ConfigError: no side, or a ``main`` that not all of them have.
        DataError: the sides are about different questions, or, with ``common``, have none in common.
    """
    if not sides:
        raise ConfigError("there is nothing to compare: name at least one run folder")
    places, left_out = _same_questions(sides, common=common)
    tables = [
        side.table if rows == list(range(len(side.table.keys))) else side.table.take(rows)
        for side, rows in zip(sides, places, strict=True)
    ]
    shown = [
        replace(side, table=table, summary={**side.summary, **summarise(table)})
        for side, table in zip(sides, tables, strict=True)
    ]
    pairs = [(0 if against == "first" else i - 1, i) for i in range(1, len(shown))]
    found = [Difference(i, j, differences(tables[i], tables[j])) for i, j in pairs]
    return Comparison(shown, places, found, _main(shown, main), left_out)


def comparison_table(comparison: Comparison) -> str:
    """A comparison for the terminal: metric by metric, a line a side.

    Args:
        comparison: of at least one side.

    Returns:
        Lines of text of at most 100 columns, unless names are long.
    """
    sides = comparison.sides
    width = max(24, *(len(side.name) + 3 for side in sides))
    by_other = {found.other: found for found in comparison.differences}
    lines = [f"{'':{width}}{'mean':>9}  {'95% interval':16}{'change':>9}  {'95% interval':18}{'p':>8}"]
    for name in metric_names(comparison):
        lines.append(name)
        for place, side in enumerate(sides):
            if name not in side.summary["metrics"]:
                continue
            line = f"  {side.name:{width - 2}}{_plain(side.summary['metrics'][name]):>9}"
            span = side.summary["mean_ci95"].get(name)
            line += f"  {f'{_plain(span[0])} to {_plain(span[1])}' if span else '':16}"
            change = by_other[place].metrics.get(name) if place in by_other else None
            if change is not None:
                span = change["ci95"]
                said = f"[{span[0]:+.3f}, {span[1]:+.3f}]" if span else ""
                line += f"{change['difference']:+9.3f}  {said:18}{p_words(change['p']):>8}"
            lines.append(line.rstrip())
    lines.append(counted(comparison))
    for found in comparison.differences:
        flipped = flips(comparison, found)
        first, second = sides[found.reference].name, sides[found.other].name
        lines.append(
            f"{second} against {first}: {len(flipped['gained'])} questions became right by {comparison.main}, "
            f"{len(flipped['lost'])} wrong"
        )
    return "\n".join(lines)


def comparison_summary(comparison: Comparison) -> dict[str, Any]:
    """A comparison for JSON.

    Args:
        comparison: any.

    Returns:
        ``n_eval``, ``main``, ``left_out``, ``sides`` (``name folder what metrics mean_ci95``) and ``differences``
        (``reference``, ``other``, ``metrics``, ``gained`` and ``lost``: numbers of questions).
    """
    return {
        "n_eval": comparison.n_eval,
        "main": comparison.main,
        "left_out": comparison.left_out,
        "sides": [
            {
                "name": side.name,
                "folder": str(side.folder),
                "what": side.what,
                "metrics": side.summary["metrics"],
                "mean_ci95": side.summary["mean_ci95"],
            }
            for side in comparison.sides
        ],
        "differences": [
            {
                "reference": comparison.sides[found.reference].name,
                "other": comparison.sides[found.other].name,
                "metrics": found.metrics,
                **{fate: len(places) for fate, places in flips(comparison, found).items()},
            }
            for found in comparison.differences
        ],
    }


def metric_names(comparison: Comparison) -> list[str]:
    """The metrics of a comparison, the main one first, counts last.

    Args:
        comparison: any.

    Returns:
        Names that at least one side has.
    """
    have = dict.fromkeys(name for side in comparison.sides for name in side.summary["metrics"])
    ratios = [name for name in have if name not in COUNTS and name != comparison.main]
    return [comparison.main, *ratios, *(name for name in have if name in COUNTS)]


def flips(comparison: Comparison, found: Difference) -> dict[str, list[int]]:
    """The questions that one side has right and the other wrong, by the main metric.

    Args:
        comparison: any.
        found: one of its differences.

    Returns:
        ``gained`` (the other side has it right, the reference has not) and ``lost``, as numbers of compared questions.
    """
    one, other = (comparison.sides[i].table.columns.get(comparison.main) for i in (found.reference, found.other))
    if one is None or other is None:
        return {"gained": [], "lost": []}
    # Comparisons with NaN, a question without a score, are false on both sides.
    return {
        "gained": [int(i) for i in ((one < 0.5) & (other >= 0.5)).nonzero()[0]],
        "lost": [int(i) for i in ((one >= 0.5) & (other < 0.5)).nonzero()[0]],
    }


def counted(comparison: Comparison) -> str:
    """How many questions were compared, and how many were not, in a sentence.

    Args:
        comparison: any.

    Returns:
        Plain text.
    """
    said = f"{comparison.n_eval:,} questions."
    if any(comparison.left_out):
        each = ", ".join(
            f"{count:,} of {side.name}"
            for side, count in zip(comparison.sides, comparison.left_out, strict=True)
            if count
        )
        said = f"{comparison.n_eval:,} questions that all have in common; left out: {each}."
    return said


def p_words(p: float | None) -> str:
    """A p-value as it is shown: drawn permutations cannot tell values below 1 in 10,000 apart.

    Args:
        p: in (0, 1]; None where there was no test.

    Returns:
        Three digits.

    Example:
        >>> p_words(0.00009999), p_words(0.0312)
        ('<0.001', '0.031')
    """
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _split(run: str) -> tuple[str, Path, str | None]:
    """Name, folder and side of what the user typed; a folder that is there may have any name."""
    name = ""
    if not Path(run).exists() and "=" in run:
        name, _, run = run.partition("=")
    if not Path(run).exists() and ":" in run:
        run, _, what = run.rpartition(":")
        return name, Path(run), what
    return name, Path(run), None


def _side(name: str, folder: Path, what: str, path: Path, summary: dict[str, Any], **more: Any) -> Side:
    if not path.is_file():
        raise RunFolderError(f"{folder} is damaged: {path.name} is missing")
    rows = RowFile(path)
    expected = summary["n_eval"]
    if len(rows) != expected:
        raise RunFolderError(
            f"{folder} is damaged: {path.name} has {len(rows)} whole rows, metrics.json says {expected}"
        )
    return Side(name, folder, what, rows, score_table(rows), **more)


def _history(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder} is damaged: trainer_state.json cannot be read") from error
    return list(found)


def _same_questions(sides: Sequence[Side], *, common: bool) -> tuple[list[list[int]], list[int]]:
    """The places of the compared questions in each side, in the order of the first; and how many each has beside."""
    tables = [side.table for side in sides]
    if all(table.keys == tables[0].keys for table in tables):
        return [list(range(len(table.keys))) for table in tables], [0] * len(tables)
    by_key = [{key: i for i, key in enumerate(table.keys)} for table in tables]
    shared = [key for key in tables[0].keys if all(key in places for places in by_key)]
    if not shared:
        raise DataError(f"{' and '.join(side.name for side in sides)} have no question in common")
    if not (common or all(len(shared) == len(table.keys) for table in tables)):
        other = next(i for i, table in enumerate(tables) if set(table.keys) != set(tables[0].keys))
        raise DataError(
            f"{sides[0].name} and {sides[other].name} are about different questions ({len(tables[0].keys)} and "
            f"{len(tables[other].keys)}; all have {len(shared)} in common): --common compares on those"
        )
    return [[places[key] for key in shared] for places in by_key], [len(places) - len(shared) for places in by_key]


def _main(sides: Sequence[Side], wanted: str | None) -> str:
    shared = [name for name in sides[0].summary["metrics"] if all(name in s.summary["metrics"] for s in sides)]
    if wanted is not None:
        if wanted not in shared:
            raise ConfigError(f"--metric {wanted}: not all sides have it; all have {', '.join(shared) or 'none'}")
        return wanted
    ratios = [name for name in shared if name not in COUNTS]
    chosen = next((name for name in MAIN_METRICS if name in ratios), ratios[0] if ratios else None)
    if chosen is None:
        raise DataError(f"{', '.join(side.name for side in sides)} have no metric in common")
    return chosen


def _plain(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
