"""A comparison as one HTML file that needs nothing else, in the style of a run's report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rag_rl.config.parsing import config_difference
from rag_rl.evaluation.comparison import Comparison, Difference, Side, counted, flips, metric_names, p_words
from rag_rl.evaluation.curves import Panel, curve_panels, nice_ticks, series_svg
from rag_rl.evaluation.report import (
    COUNTS,
    common_reach,
    example_card,
    excludes_zero,
    figure_cells,
    figure_heads,
    metric_head,
    metric_words,
    shown_change,
    shown_score,
    write_page,
)

_FATES = {"gained": "wrong by {one}, right by {other}", "lost": "right by {one}, wrong by {other}"}
# Lines are told apart by more than their colour.
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_COLOURS = 6


def write_comparison(
    path: Path, comparison: Comparison, *, title: str = "", n_examples: int = 20, command: str | None = None
) -> Path:
    """Writes the page, all or nothing.

    Args:
        path: HTML file to write; its folder must exist.
        comparison: what is shown.
        title: in words; by default the names of the sides.
        n_examples: questions that flipped, shown in full for each pair of sides; half of them each way where there are
            enough.
        command: how to make the page again.

    Returns:
        The file.

    Raises:
        DataError: the folder does not exist.
    """
    names = [side.name for side in comparison.sides]
    title = title or (" against ".join(reversed(names)) if len(names) < 3 else f"{len(names)} assemblies compared")
    body = "\n".join(
        [
            _headline(title, comparison),
            _means(comparison),
            _differences(comparison),
            _curves(comparison.sides),
            _flipped(comparison, n_examples),
            _settings(comparison),
            _again(comparison, command),
        ]
    )
    return write_page(path, title=title, body=body)


def difference_in_words(comparison: Comparison, found: Difference, metric: str) -> str:
    """One sentence about what sets two sides apart.

    Args:
        comparison: with both.
        found: the difference.
        metric: a metric that both have.

    Returns:
        Plain text: the change, its interval, p and whether 0 lies inside.
    """
    one, other = comparison.sides[found.reference], comparison.sides[found.other]
    change = found.metrics[metric]
    low, high = change["ci95"]
    verdict = "0 lies outside" if excludes_zero(low, high) else "0 lies inside, so this may be chance"
    if low == high == 0:
        return f"{other.name} and {one.name} have the same {metric_words(metric)} on every question."
    return (
        f"{other.name} has {metric_words(metric)} {shown_score(other.summary['metrics'][metric])}, {one.name} "
        f"{shown_score(one.summary['metrics'][metric])}: a difference of {shown_change(change['difference'])}, 95% "
        f"interval {shown_change(low)} to {shown_change(high)}, p {p_words(change['p'])}; {verdict}."
    )


def _headline(title: str, comparison: Comparison) -> str:
    main, figure = comparison.main, ""
    if len(comparison.sides) < 3:
        figures = " <span>to</span> ".join(shown_score(side.summary["metrics"][main]) for side in comparison.sides)
        small = f"<small>{escape(metric_words(main))}</small>"
        figure = f'<div class="headline"><div class="figure">{figures}{small}</div></div>'
    said = [
        escape(difference_in_words(comparison, found, main))
        for found in comparison.differences
        if main in found.metrics
    ]
    listed = "".join(f"<li>{one}</li>" for one in said)
    text = f"<p>{said[0]}</p>" if len(said) == 1 else f"<ul>{listed}</ul>" if said else ""
    return (
        f'<header><p class="kicker">Comparison · {escape(counted(comparison))}</p><h1>{escape(title)}</h1>'
        f"{figure}{text}</header>"
    )


def _means(comparison: Comparison) -> str:
    names = metric_names(comparison)
    low, high = _axis(comparison)
    heads = "".join(f'<th scope="col" class="n">{escape(name)}</th>' for name in names)
    rows = []
    for side in comparison.sides:
        cells = []
        for name in names:
            value, span = side.summary["metrics"].get(name), side.summary["mean_ci95"].get(name)
            small = f"<small>{shown_score(span[0])} to {shown_score(span[1])}</small>" if span else ""
            cells.append(f'<td class="n">{shown_score(value)}{small}</td>')
        mean, span = side.summary["metrics"][comparison.main], side.summary["mean_ci95"][comparison.main]
        picture = _mean_svg(mean, span, low, high)
        rows.append(f'<tr><th scope="row">{escape(side.name)}</th><td>{picture}</td>{"".join(cells)}</tr>')
    counts = [name for name in names if name in COUNTS]
    ratios = "All metrics lie between 0 and 1, and more is better"
    if counts:
        ratios = f"All metrics but {', '.join(counts)} lie between 0 and 1, and more of them is better"
    return (
        f"<section><h2>Means</h2><p>{ratios}. Below each mean is its 95% interval, a bootstrap over questions; it "
        "does not cover what another seed of training would change.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Means">'
        '<table class="matrix"><thead><tr><th scope="col">Assembly</th>'
        f'<th scope="col">{_axis_svg(low, high)}</th>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    reach = common_reach(
        change["ci95"]
        for found in comparison.differences
        for name, change in found.metrics.items()
        if name not in COUNTS
    )
    order = metric_names(comparison)
    bodies = []
    for found in comparison.differences:
        one, other = comparison.sides[found.reference], comparison.sides[found.other]
        rows, same = [], []
        for name in (name for name in order if name in found.metrics):
            change = found.metrics[name]
            if name != comparison.main and change["ci95"] == [0.0, 0.0]:
                same.append(name)
                continue
            cells = figure_cells(
                one.summary["metrics"][name],
                other.summary["metrics"][name],
                change["difference"],
                change["ci95"],
                reach,
                count=name in COUNTS,
            )
            main = " class=main" if name == comparison.main else ""
            rows.append(f'<tr{main}>{metric_head(name)}{cells}<td class="n">{p_words(change["p"])}</td></tr>')
        head = f"{escape(other.name)}<small> · against {escape(one.name)}</small>"
        if same:
            said = f"The same on every question: {', '.join(same)}"
            rows.append(f'<tr><td colspan="8" class="quiet">{escape(said)}</td></tr>')
        bodies.append(
            f'<tbody><tr><th scope="rowgroup" colspan="8" class="group">{head}</th></tr>{"".join(rows)}</tbody>'
        )
    return (
        "<section><h2>Differences</h2><p>Question by question: the interval is a paired bootstrap, p is of a two-"
        "sided paired permutation test. Both are of this one comparison: among twenty metrics, one p below 0.05 is "
        'what chance gives.</p><div class="scroll" tabindex="0" role="region" aria-label="Differences">'
        '<table class="wide"><thead><tr>'
        f'<th scope="col">Metric</th>{figure_heads("Reference", "Other", "Difference", reach)}'
        f'<th scope="col" class="n">p</th></tr></thead>{"".join(bodies)}</table></div></section>'
    )


def _curves(sides: Sequence[Side]) -> str:
    trained = [(side, curve_panels(side.log_history)) for side in sides if side.log_history]
    if not trained:
        return ""
    looks = [
        (f"var(--series-{i % _COLOURS + 1})", _DASHES[(i + i // _COLOURS) % len(_DASHES)]) for i in range(len(trained))
    ]
    by_key: dict[str, list[tuple[int, Panel]]] = {}
    for place, (_, panels) in enumerate(trained):
        for panel in panels:
            by_key.setdefault(panel.key, []).append((place, panel))
    # What only one of several trainings logged is in its own report.
    least = min(2, len(trained))
    pictures = [
        series_svg(
            [(trained[place][0].name, panel.points, *looks[place]) for place, panel in found],
            found[0][1].title,
            unit=found[0][1].unit,
            smooth=found[0][1].noisy,
        )
        for found in by_key.values()
        if len(found) >= least
    ]
    if not pictures:
        return ""
    legend = "".join(
        f'<li><svg viewBox="0 0 32 12" aria-hidden="true"><line x1="1" x2="31" y1="6" y2="6" stroke="{colour}" '
        f'stroke-width="2.5" stroke-dasharray="{dash}"/></svg>{escape(side.name)}</li>'
        for (side, _), (colour, dash) in zip(trained, looks, strict=True)
    )
    return (
        "<section><h2>Training</h2><p>The curves that at least "
        f"{'two of the trainings' if least > 1 else 'one training'} logged, as centred moving means.</p>"
        f'<ul class="legend">{legend}</ul><div class="curves">{"".join(pictures)}</div></section>'
    )


def _flipped(comparison: Comparison, n_examples: int) -> str:
    main = comparison.main
    rule = "" if main in ("em", "contains_em", "judge_accuracy") else " of at least 0.5"
    sections, number = [], 0
    for found in comparison.differences:
        one, other = comparison.sides[found.reference], comparison.sides[found.other]
        flipped = flips(comparison, found)
        cards = []
        for fate, places in chosen_flips(flipped, n_examples).items():
            words = _FATES[fate].format(one=one.name, other=other.name)
            for i in places:
                number += 1
                rows = [
                    side.rows[comparison.places[at][i]] for side, at in ((one, found.reference), (other, found.other))
                ]
                cards.append(example_card(number, words, rows[0], rows[1], main, (one.name, other.name)))
        gained, lost = len(flipped["gained"]), len(flipped["lost"])
        shown = f"; {len(cards)} of them below, drawn with a fixed seed" if gained + lost > len(cards) else ""
        sections.append(
            f"<h3>{escape(other.name)} against {escape(one.name)}</h3><p>{gained:,} questions became right, {lost:,} "
            f"wrong{shown}.</p>{''.join(cards)}"
        )
    if not sections:
        return ""
    return (
        f"<section><h2>Questions that flipped</h2><p>Right means {escape(main)} ({escape(metric_words(main))}){rule}."
        f"</p>{''.join(sections)}</section>"
    )


def chosen_flips(flipped: dict[str, list[int]], n: int, *, seed: int = 0) -> dict[str, list[int]]:
    """Chooses flipped questions to show: half of them each way; what one way cannot fill goes to the other.

    Args:
        flipped: ``gained`` and ``lost``, numbers of questions.
        n: how many to choose in all.
        seed: of the draw.

    Returns:
        The same, each ascending and cut down.

    Example:
        >>> chosen_flips({"gained": [1, 2, 3, 4], "lost": [9]}, 3)["lost"]
        [9]
    """
    gained, lost = len(flipped["gained"]), len(flipped["lost"])
    share = min(lost, max(n // 2, n - gained))
    wanted = {"gained": min(gained, n - share), "lost": share}
    rng = random.Random(seed)
    return {fate: sorted(rng.sample(flipped[fate], count)) for fate, count in wanted.items()}


def _settings(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    items = []
    for found in comparison.differences:
        one, other = comparison.sides[found.reference], comparison.sides[found.other]
        lines = config_difference(one.settings, other.settings, ignore=("made_with", "output_dir", "run_name"))
        if one.folder == other.folder:
            lines = ["the same run"]
        text = "\n".join(lines) or "none"
        items.append(
            f"<details><summary>{escape(other.name)} against {escape(one.name)}: {len(lines)} "
            f"line{'s' if len(lines) != 1 else ''}</summary><pre>{escape(text)}</pre></details>"
        )
    return f"<section><h2>Settings that differ</h2>{''.join(items)}</section>"


def _again(comparison: Comparison, command: str | None) -> str:
    folders = "".join(
        f"<li>{escape(side.name)}: <code>{escape(str(side.folder))}</code>, {escape(side.what)}</li>"
        for side in comparison.sides
    )
    made = f"<pre>{escape(command)}</pre>" if command else ""
    return f"<section><h2>How to make this page again</h2>{made}<ul>{folders}</ul></section>"


def _axis(comparison: Comparison) -> tuple[float, float]:
    """Ends of an axis on which the main metric of all sides has room."""
    spans = [side.summary["mean_ci95"][comparison.main] for side in comparison.sides]
    ticks = nice_ticks(min(low for low, _ in spans), max(high for _, high in spans), target=4)
    return ticks[0], ticks[-1]


def _axis_svg(low: float, high: float) -> str:
    return (
        '<svg class="interval" viewBox="0 0 152 22" role="img" aria-label="The first metric as a picture" '
        f'font-size="12" fill="currentColor"><text x="4" y="16">{low:.3g}</text>'
        f'<text x="148" y="16" text-anchor="end">{high:.3g}</text></svg>'
    )


def _mean_svg(mean: float, span: Sequence[float], low: float, high: float) -> str:
    """A mean as a dot with its interval, on the common axis."""

    def x(value: float) -> float:
        return 4 + 144 * (value - low) / (high - low)

    return (
        '<svg class="interval" viewBox="0 0 152 22" aria-hidden="true">'
        '<line x1="4" x2="148" y1="11" y2="11" stroke="var(--rule)"/>'
        f'<line x1="{x(span[0]):.1f}" x2="{x(span[1]):.1f}" y1="11" y2="11" stroke="var(--curve)" stroke-width="4"/>'
        f'<circle cx="{x(mean):.1f}" cy="11" r="5" fill="var(--curve)"/></svg>'
    )
