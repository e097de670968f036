"""Agreement of a judge with exact match, and with another judge: a confusion table, accuracy and Cohen's kappa."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from rag_rl.errors import DataError
from rag_rl.evaluation.scoring import Row
from rag_rl.types import Verdict

Agreement = dict[str, Any]
"""What ``judge_agreement`` gives, for JSON."""

_RESAMPLES = 10_000
_CELLS = ("both_pass", "judge_only", "other_only", "both_fail")


def judge_agreement(
    verdicts: Sequence[Verdict | float | None],
    other: Sequence[Verdict | float | None],
    *,
    pass_mark: float = 0.5,
    other_pass_mark: float = 0.5,
) -> Agreement:
    """Compares a judge's verdicts with those of somebody else on the same cases.

    Both are reduced to pass and fail. Kappa (Cohen 1960) is the agreement beyond what two judges would reach who pass
    at random, each as often as these two do: 1 is perfect, 0 is chance. Where nearly all cases pass, or nearly none,
    accuracy is high whatever the judge does, and kappa is not.

    Args:
        verdicts: of the judge, one a case; None, or a verdict without a score, is unreadable.
        other: of exact match, an oracle or another judge, on the same cases in the same order.
        pass_mark: score in [0, 1] from which on the judge passes a case.
        other_pass_mark: the same of the other.

    Returns:
        ``cases`` (all), ``readable`` and ``other_readable`` (shares of them, None without cases), ``compared`` (cases
        that both scored), ``table`` (of these: ``both_pass judge_only other_only both_fail``), ``accuracy`` (None
        where nothing was compared), ``kappa`` (None where it is undefined: nothing compared, or both passed all or
        both failed all), and ``kappa_ci95`` (percentile bootstrap over cases, [low, high]; None where kappa is).

    Raises:
        DataError: not one verdict of each for every case.

    Example:
        >>> found = judge_agreement([1.0, 1.0, 0.0, 0.0, None], [1.0, 0.0, 0.0, 0.0, 1.0])
        >>> found["table"], found["accuracy"], found["kappa"], found["readable"]
        ({'both_pass': 1, 'judge_only': 1, 'other_only': 0, 'both_fail': 2}, 0.75, 0.5, 0.8)
    """
    if len(verdicts) != len(other):
        raise DataError(
            f"agreement needs two verdicts a case, got {len(verdicts)} of one and {len(other)} of the other"
        )
    ours, theirs = [_score(v) for v in verdicts], [_score(v) for v in other]
    cases = len(ours)
    pairs = [
        (a >= pass_mark, b >= other_pass_mark)
        for a, b in zip(ours, theirs, strict=True)
        if a is not None and b is not None
    ]
    counts = [pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
    kappa = cohen_kappa(*counts)
    return {
        "cases": cases,
        "readable": 1 - ours.count(None) / cases if cases else None,
        "other_readable": 1 - theirs.count(None) / cases if cases else None,
        "compared": len(pairs),
        "table": dict(zip(_CELLS, counts, strict=True)),
        "accuracy": (counts[0] + counts[3]) / len(pairs) if pairs else None,
        "kappa": kappa,
        "kappa_ci95": None if kappa is None else _kappa_interval(counts),
    }


def agreement_with_em(rows: Mapping[str, Sequence[Row]], *, pass_mark: float = 0.5) -> dict[str, Agreement]:
    """Compares a run's judge with exact match, on the answers of its evaluations.

    Args:
        rows: evaluated questions by what is said of them ("before training").
        pass_mark: as in ``judge_agreement``.

    Returns:
        For ``agreement_section``: one entry an evaluation. Rows without an answer do not count, since nobody was asked
        about them; an evaluation without judged answers has no entry.
    """
    found = {}
    for when, evaluated in rows.items():
        judged = [
            (row["rewards"]["judged"], row["scores"].get("em"))
            for row in evaluated
            if "judged" in row["rewards"] and row["answer"] is not None
        ]
        if judged:
            verdicts, em = zip(*judged, strict=True)
            found[f"exact match, {when}"] = judge_agreement(verdicts, em, pass_mark=pass_mark)
    return found


def cohen_kappa(both_pass: int, judge_only: int, other_only: int, both_fail: int) -> float | None:
    """Cohen's kappa of two judges who pass or fail (Cohen 1960).

    Args:
        both_pass: cases that both passed.
        judge_only: cases that the first passed and the second failed.
        other_only: cases that the second passed and the first failed.
        both_fail: cases that both failed.

    Returns:
        A value in [-1, 1]; None where it is undefined: no cases, or both judges gave all of them one same verdict.

    Example:
        >>> cohen_kappa(45, 15, 25, 15)
        0.13043478260869565
        >>> cohen_kappa(10, 0, 0, 0) is None
        True
    """
    kappa = float(_kappas(np.array([[both_pass, judge_only, other_only, both_fail]]))[0])
    return None if math.isnan(kappa) else kappa


def agreement_section(judge: str, compared: Mapping[str, Agreement], *, note: str = "") -> str:
    """Writes the part of a run's report on how far its judge can be trusted.

    Args:
        judge: name of the judge; escaped here, like everything else.
        compared: whom it was compared with (such as "exact match") and what ``judge_agreement`` gave, at least one.
        note: a sentence for the reader, such as which answers were judged.

    Returns:
        One ``<section>`` in the style of the report.

    Raises:
        DataError: there is nothing to show.
    """
    if not compared:
        raise DataError(f"judge {judge!r} was compared with nobody: there is no agreement to report")
    rows = "".join(_row(name, found) for name, found in compared.items())
    heads = "".join(
        f'<th scope="col" class="n">{head}</th>'
        for head in (
            "Readable",
            "Compared",
            "Both pass",
            "Judge alone passes",
            "Other alone passes",
            "Both fail",
            "Accuracy",
            "Kappa",
            "95% interval",
        )
    )
    return (
        f"<section><h2>Agreement of the judge</h2><p>How often {escape(judge)} decides as others do on the same "
        f"answers.{' ' + escape(note) if note else ''} Accuracy is the share of equal verdicts. Kappa takes off what "
        "chance would give: 1 is perfect agreement, 0 is chance. A judge that alone passes many answers is too "
        "lenient, or was talked round. Verdicts without a score are left out, and counted under Readable.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Agreement of the judge">'
        f'<table class="wide"><thead><tr><th scope="col">Compared with</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _row(name: str, found: Agreement) -> str:
    interval = found["kappa_ci95"]
    cells = [
        _share(found["readable"]),
        f"{found['compared']:,} of {found['cases']:,}",
        *(f"{found['table'][cell]:,}" for cell in _CELLS),
        _figure(found["accuracy"]),
        _figure(found["kappa"]),
        f"{_figure(interval[0])} to {_figure(interval[1])}" if interval else "–",
    ]
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td class=n>{cell}</td>" for cell in cells)}</tr>'


def _kappas(counts: Any) -> Any:
    """Kappa of each row of (N, 4) counts, NaN where it is undefined."""
    both, ours, theirs, neither = np.asarray(counts, dtype=np.float64).T
    n = both + ours + theirs + neither
    chance = (both + ours) * (both + theirs) + (neither + ours) * (neither + theirs)
    with np.errstate(invalid="ignore"):
        # Times n squared above and below: counts stay whole, so that 0 / 0, and nothing near it, is what is undefined.
        return (n * (both + neither) - chance) / (n * n - chance)


def _kappa_interval(counts: Sequence[int]) -> list[float]:
    n = sum(counts)
    drawn = np.random.default_rng(0).multinomial(n, np.array(counts) / n, size=_RESAMPLES)
    # A draw in which both say the same of all cases has no kappa: it is left out.
    low, high = np.nanquantile(_kappas(drawn), [0.025, 0.975])
    return [float(low), float(high)]


def _score(value: Verdict | float | None) -> float | None:
    return value.score if isinstance(value, Verdict) else value


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"
