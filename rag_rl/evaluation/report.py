"""The report of a run: one HTML file that needs nothing else, neither network nor scripts nor images."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from rag_rl.data.whole_files import whole_file
from rag_rl.errors import DataError
from rag_rl.evaluation.curves import curve_panels, svg_curve
from rag_rl.evaluation.scoring import Row

METRIC_WORDS = {
    "em": "exact match",
    "f1": "token F1",
    "contains_em": "answer contained in the reply",
    "format": "asked form kept",
    "reasoning_accuracy": "reasoning judged right",
    "judge_accuracy": "answer judged right",
    "judge_readable": "verdict of the judge could be read",
    "ndcg": "discounted gain of the ranking",
    "recall": "share of gold documents found",
    "success": "a gold document found",
    "mrr": "reciprocal rank of the first gold document",
    "all_gold": "all gold documents found",
    "steps": "steps a question",
    "searches": "searches a question",
    "passages": "documents shown a question",
    "tokens": "tokens written a question",
    "prompt_tokens": "tokens read a question",
    "seconds": "seconds a question, of its batch",
}
"""Metric, without its cut-off, to words."""

BASELINE_WORDS = {
    "one_shot": "one search, all passages at once",
    "no_retrieval": "no passages, the model alone",
    "bm25": "passages by BM25",
}
"""Baseline, without the name of its model, to words."""

# Figures without a best value: they have no verdict, and lie on no common axis with what lies between 0 and 1.
COUNTS = frozenset({"steps", "searches", "passages", "tokens", "prompt_tokens", "seconds"})
"""Metrics without a best value."""

# What a run is about where nobody says so, the first that it has.
MAIN_METRICS = ("em", "reasoning_accuracy", "judge_accuracy", "ndcg@10", "f1")
"""What a headline is about, the first that there is."""

_FATES = {
    "gained": "wrong before, right after",
    "lost": "right before, wrong after",
    "wrong": "wrong before and after",
    "right": "right before and after",
}
_LONG_REPLY = 600  # characters; a longer one is folded away


def write_report(
    folder: Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    before_rows: Sequence[Row],
    after_rows: Sequence[Row],
    log_history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    notes: Sequence[str] = (),
    sections: Sequence[str] = (),
    n_examples: int = 20,
    main_metric: str | None = None,
    command: str | None = None,
) -> Path:
    """Writes ``report.html`` into a run folder, all or nothing.

    Args:
        folder: the run folder; must exist.
        title: what was trained, in words.
        summary: the content of ``metrics.json``.
        before_rows: rows before training; may be empty.
        after_rows: rows after training, of the same questions in the same order; may be empty.
        log_history: of ``trainer_state.json``.
        config: the resolved configuration, without secrets.
        notes: paragraphs for the reader, plain text.
        sections: more of the report after the curves, as HTML that is already escaped.
        n_examples: how many questions are shown in full.
        main_metric: what the headline is about; by default ``em`` or the closest to it that the run has.
        command: how to make the run again; by default built from the names of recipe and configuration.

    Returns:
        The file.

    Raises:
        DataError: the folder does not exist, or the rows before and after are not about the same questions.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: this run folder does not exist")
    main = main_metric or pick_main_metric(summary)
    body = "\n".join(
        [
            _headline(title, summary, main),
            *(f"<p>{escape(note)}</p>" for note in notes),
            _table(summary, main),
            _baselines(summary),
            _curves(log_history),
            *sections,
            _examples(before_rows, after_rows, main, n_examples),
            _configuration(config),
            _reproduce(summary, command),
        ]
    )
    return write_page(folder / "report.html", title=title, body=body)


def write_page(path: Path, *, title: str, body: str) -> Path:
    """Writes a page in the report's style, all or nothing.

    Args:
        path: the file; its folder must exist.
        title: plain text.
        body: HTML that is already escaped.

    Returns:
        The file.

    Raises:
        DataError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise DataError(f"{path}: its folder does not exist")
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    with whole_file(path) as file:
        # A lone surrogate in a model's reply is no reason to lose the report.
        file.write(template.substitute(title=escape(title), body=body).encode("utf-8", "replace"))
    return path


def pick_main_metric(summary: Mapping[str, Any]) -> str | None:
    """Chooses the metric that a run is about.

    Args:
        summary: with ``before`` and ``after``, metric to mean.

    Returns:
        ``em`` where the run has it, else the closest to it, else its first metric; None where nothing was measured.

    Example:
        >>> pick_main_metric({"before": {"mrr@10": 0.2, "ndcg@10": 0.3}, "after": {"mrr@10": 0.4, "ndcg@10": 0.5}})
        'ndcg@10'
    """
    before, after = summary.get("before") or {}, summary.get("after") or {}
    have = [m for m in before if m in after] or list(after) or list(before)
    return next((m for m in MAIN_METRICS if m in have), have[0] if have else None)


def metric_words(name: str) -> str:
    """Says a metric in words.

    Args:
        name: as in ``metrics.json``.

    Returns:
        The words; the name itself where it is not one of ours.

    Example:
        >>> metric_words("recall@5")
        'share of gold documents found, first 5'
    """
    stem, _, cut = name.partition("@")
    if stem not in METRIC_WORDS:
        return name
    return METRIC_WORDS[stem] + (f", first {cut}" if cut else "")


def baseline_words(name: str) -> str:
    """Says a baseline in words.

    Args:
        name: as in ``metrics.json``.

    Returns:
        The words; the name itself where it is not one of ours.

    Example:
        >>> baseline_words("one_shot_other_model")
        'one search, all passages at once, another model'
    """
    stem = name.removesuffix("_other_model")
    if stem not in BASELINE_WORDS:
        return name
    return BASELINE_WORDS[stem] + (", another model" if name != stem else "")


def change_in_words(summary: Mapping[str, Any], metric: str) -> str:
    """One or two sentences about what training did to a metric.

    Args:
        summary: the content of ``metrics.json``.
        metric: one of its metrics.

    Returns:
        Plain text: the change, its interval and whether 0 lies in it.

    Example:
        >>> change_in_words({"before": {"em": 0.5}, "after": {"em": 0.75}, "n_eval": 8}, "em")
        'On 8 held-out questions, exact match rose from 0.500 to 0.750 (+0.250).'
    """
    before, after = (summary.get("before") or {}).get(metric), (summary.get("after") or {}).get(metric)
    name, n = metric_words(metric), summary.get("n_eval")
    where = f"On {n:,} held-out questions, " if n else "On held-out questions, "
    if before is None or after is None:
        value, when = (after, "after") if before is None else (before, "before")
        return f"{where}{name} was {shown_score(value)} {when} training; there is no figure to compare it with."
    change = after - before
    verb = "rose" if change > 0 else "fell" if change < 0 else "stayed"
    said = f"{where}{name} {verb} from {shown_score(before)} to {shown_score(after)} ({shown_change(change)})."
    if change == 0:
        said = f"{where}{name} stayed at {shown_score(after)}."
    interval = (summary.get("ci95") or {}).get(metric)
    if interval:
        low, high = interval
        span = f"{shown_change(low)} to {shown_change(high)}"
        said += f" The 95% interval of the change, over resampled questions, is {span}"
        said += (
            ": 0 lies outside, so luck with the questions does not explain it."
            if excludes_zero(low, high)
            else ": 0 lies inside, so this may be chance."
        )
    return said


def choose_examples(
    before: Sequence[Row], after: Sequence[Row], *, metric: str, n: int, seed: int = 0
) -> dict[str, list[int]]:
    """Chooses questions to show: fair shares of what training changed and what it did not.

    Args:
        before: rows before training.
        after: rows after training, of the same questions.
        metric: a question is right where this is at least 0.5.
        n: how many to choose in all.
        seed: of the draw within each share.

    Returns:
        ``gained``, ``lost``, ``wrong``, ``right`` (before and after) to row numbers, ascending. Each gets a quarter of
        ``n``; what one cannot fill goes to the others in that order. Questions where the metric is undefined are left
        out.
    """
    fates: dict[str, list[int]] = {fate: [] for fate in _FATES}
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        fate = fate_of(b, a, metric)
        if fate is not None:
            fates[fate].append(i)
    shares = dict.fromkeys(fates, 0)
    left = min(n, sum(map(len, fates.values())))
    while left:
        for fate, rows in fates.items():
            if left and shares[fate] < len(rows):
                shares[fate] += 1
                left -= 1
    rng = random.Random(seed)
    return {fate: sorted(rng.sample(rows, shares[fate])) for fate, rows in fates.items()}


def fate_of(before: Row, after: Row, metric: str) -> str | None:
    """``gained``, ``lost``, ``wrong`` or ``right``; None where either side has no score."""
    old, new = before["scores"].get(metric), after["scores"].get(metric)
    if old is None or new is None:
        return None
    return {(False, True): "gained", (True, False): "lost", (False, False): "wrong", (True, True): "right"}[
        (old >= 0.5, new >= 0.5)
    ]


def _headline(title: str, summary: Mapping[str, Any], main: str | None) -> str:
    names = [summary.get("recipe"), summary.get("config")]
    kicker = " · ".join(escape(str(name)) for name in names if name)
    out = [f'<header><p class="kicker">{kicker}</p>' if kicker else "<header>", f"<h1>{escape(title)}</h1>"]
    status = summary.get("status")
    if status != "complete":
        out.append(f'<p class="notice">This run is not complete (status: {escape(str(status))}).</p>')
    if main is None:
        out.append("<p>Nothing was measured.</p>")
    else:
        before, after = (summary.get("before") or {}).get(main), (summary.get("after") or {}).get(main)
        figure = " <span>to</span> ".join(shown_score(v) for v in (before, after) if v is not None)
        out.append(
            f'<div class="headline"><div class="figure">{figure}<small>{escape(metric_words(main))}</small></div>'
            f"<p>{escape(change_in_words(summary, main))}</p></div>"
        )
    peak = summary.get("peak_memory_bytes")
    facts = [
        ("Held-out questions", f"{summary['n_eval']:,}" if summary.get("n_eval") else None),
        ("Training", shown_duration(summary.get("train_seconds"))),
        ("Evaluation", shown_duration(summary.get("eval_seconds"))),
        ("Peak memory", f"{peak / 2**30:.2f} GiB" if peak else None),
        ("Processes", summary.get("num_processes")),
        ("Seed", summary.get("seed")),
    ]
    shown = "".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts if v is not None)
    return "\n".join([*out, f'<dl class="facts">{shown}</dl></header>'])


def _table(summary: Mapping[str, Any], main: str | None) -> str:
    before, after = summary.get("before") or {}, summary.get("after") or {}
    ci = summary.get("ci95") or {}
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        return ""
    reach = common_reach(ci[name] for name in names if name in ci and name not in COUNTS)
    rows = []
    for name in names:
        old, new, interval = before.get(name), after.get(name), ci.get(name)
        change = new - old if old is not None and new is not None else None
        figures = figure_cells(old, new, change, interval, reach, count=name in COUNTS)
        rows.append(f"<tr{' class=main' if name == main else ''}>{metric_head(name)}{figures}</tr>")
    ratios = "All metrics lie between 0 and 1, and more is better."
    if counts := [name for name in names if name in COUNTS]:
        listed = " and ".join(filter(None, [", ".join(counts[:-1]), counts[-1]]))
        ratios = f"All metrics but {listed} lie between 0 and 1, and more of them is better."
    return (
        f"<section><h2>Before and after</h2><p>{ratios} Both columns come from the same questions, which "
        "training never saw. The interval is a paired bootstrap over these questions; it does not cover what another "
        "seed would change.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Metrics before and after">'
        '<table class="wide"><thead><tr>'
        f'<th scope="col">Metric</th>{figure_heads("Before", "After", "Change", reach)}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _baselines(summary: Mapping[str, Any]) -> str:
    """What was trained against other ways to answer the same questions; nothing in a run without any."""
    baselines, over = summary.get("baselines") or {}, summary.get("over_baselines") or {}
    if not any(over.values()):
        return ""
    reach = common_reach(found["ci95"] for differences in over.values() for found in differences.values())
    bodies = []
    for baseline, differences in over.items():
        words = baseline_words(baseline)
        small = f" · {escape(words)}" if words != baseline else ""
        rows = [
            f"<tr>{metric_head(name)}"
            + figure_cells(
                baselines[baseline].get(name), summary["after"].get(name), found["difference"], found["ci95"], reach
            )
            + "</tr>"
            for name, found in differences.items()
        ]
        head = f'<tr><th scope="rowgroup" colspan="7" class="group">{escape(baseline)}<small>{small}</small></th></tr>'
        bodies.append(f"<tbody>{head}{''.join(rows)}</tbody>")
    return (
        "<section><h2>Against baselines</h2><p>Other ways to answer the same questions, measured before training. The "
        "difference is what the trained model is better by; its interval is a paired bootstrap.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Metrics against baselines">'
        '<table class="wide"><thead><tr>'
        f'<th scope="col">Metric</th>{figure_heads("Baseline", "Trained", "Difference", reach)}'
        f"</tr></thead>{''.join(bodies)}</table></div></section>"
    )


def metric_head(name: str) -> str:
    """The cell that names a metric, with its meaning in words."""
    words = metric_words(name)
    small = f"<small>{escape(words)}</small>" if words != name else ""
    return f'<th scope="row">{escape(name)}{small}</th>'


def figure_heads(old: str, new: str, change: str, reach: float) -> str:
    """Heads of the columns of ``figure_cells``."""
    heads = "".join(f'<th scope="col" class="n">{head}</th>' for head in (old, new, change, "95% interval"))
    return f'{heads}<th scope="col">{_interval_axis(reach)}</th><th scope="col">Verdict</th>'


def figure_cells(
    old: float | None,
    new: float | None,
    change: float | None,
    interval: Sequence[float] | None,
    reach: float,
    *,
    count: bool = False,
) -> str:
    """Cells of one comparison: two figures, their difference, its interval in figures and as a picture, a verdict."""
    span, picture, verdict = "–", "", "no interval"
    if interval:
        low, high = interval
        span = f"{shown_change(low)} to {shown_change(high)}"
        picture = "" if count else _interval_svg(low, high, reach)
        verdict = "0 inside: may be chance"
        if low == high == 0:
            verdict = "unchanged"
        elif excludes_zero(low, high):
            tone, word = ("good", "better") if low > 0 else ("bad", "worse")
            verdict = f'<span class="{tone}">{word}</span>, 0 excluded'
            if count:
                verdict = f"{'more' if low > 0 else 'fewer'}, 0 excluded"
    return (
        f'<td class="n">{shown_score(old)}</td><td class="n">{shown_score(new)}</td>'
        f'<td class="n">{"–" if change is None else shown_change(change)}</td>'
        f'<td class="n">{span}</td><td>{picture}</td><td>{verdict}</td>'
    )


def common_reach(intervals: Iterable[Sequence[float]]) -> float:
    """The end of an axis on which all intervals have room."""
    return max((abs(value) for interval in intervals for value in interval), default=0.0) or 1.0


def _interval_axis(reach: float) -> str:
    """The axis of the intervals below it: -reach, 0, +reach."""
    labels = ((4, "start", shown_change(-reach, 2)), (76, "middle", "0"), (148, "end", shown_change(reach, 2)))
    marks = "".join(f'<text x="{x}" y="16" text-anchor="{anchor}">{text}</text>' for x, anchor, text in labels)
    return (
        '<svg class="interval" viewBox="0 0 152 22" role="img" aria-label="The 95% interval as a picture" '
        f'font-size="12" fill="currentColor">{marks}</svg>'
    )


def _interval_svg(low: float, high: float, reach: float) -> str:
    """A bar from low to high on an axis of +-reach, whose middle is 0."""

    def x(value: float) -> float:
        return 76 + 72 * value / reach

    colour = "var(--quiet)"
    if excludes_zero(low, high):
        colour = "var(--good)" if low > 0 else "var(--bad)"
    width = max(x(high) - x(low), 3.0)
    return (
        '<svg class="interval" viewBox="0 0 152 22" aria-hidden="true">'
        '<line x1="4" x2="148" y1="11" y2="11" stroke="var(--rule)"/>'
        '<line x1="76" x2="76" y1="2" y2="20" stroke="currentColor" stroke-opacity="0.6"/>'
        f'<rect x="{x(low):.1f}" y="7" width="{width:.1f}" height="8" rx="2" fill="{colour}"/></svg>'
    )


def _curves(log_history: Sequence[Mapping[str, Any]]) -> str:
    panels = curve_panels(log_history)
    if not panels:
        return "<section><h2>Training</h2><p>The trainer logged nothing.</p></section>"
    pictures = "".join(svg_curve(p.points, p.title, unit=p.unit, smooth=p.noisy) for p in panels)
    longest = max(len(p.points) for p in panels)
    how = " The strong line is a centred moving mean, the faint one what was logged." if longest >= 8 else ""
    return (
        f"<section><h2>Training</h2><p>{longest} logged step{'s' if longest != 1 else ''}.{how} "
        f'Each picture has its own scale.</p><div class="curves">{pictures}</div></section>'
    )


def _examples(before: Sequence[Row], after: Sequence[Row], main: str | None, n: int) -> str:
    if not before and not after:
        return "<section><h2>Examples</h2><p>No rows were kept.</p></section>"
    single = not before or not after
    # With only one side there is no change to choose by: both sides are the same rows, and one column is shown.
    old, new = before or after, after or before
    if [row["qid"] for row in old] != [row["qid"] for row in new]:
        raise DataError("the rows before and after are not about the same questions: they cannot be compared")
    scored = [name for name in new[0]["scores"] if name in old[0]["scores"]]
    if main not in scored:
        main = next((m for m in MAIN_METRICS if m in scored), scored[0] if scored else None)
    if main is None:
        return "<section><h2>Examples</h2><p>The rows hold no scores.</p></section>"
    chosen = choose_examples(old, new, metric=main, n=n)
    counts = dict.fromkeys(_FATES, 0)
    for b, a in zip(old, new, strict=True):
        fate = fate_of(b, a, main)
        if fate is not None:
            counts[fate] += 1
    words = {"wrong": "wrong", "right": "right"} if single else _FATES
    shares = "; ".join(f"{len(chosen[f])} of {counts[f]:,} {words[f]}" for f in words)
    cards = [
        example_card(
            number,
            words[fate],
            None if single else old[i],
            new[i],
            main,
            ("Before", "After" if after else "Before"),
        )
        for number, (fate, i) in enumerate(((f, i) for f in words for i in chosen[f]), start=1)
    ]
    rule = "" if main in ("em", "contains_em", "judge_accuracy") else " of at least 0.5"
    return (
        f"<section><h2>Examples</h2><p>{len(cards)} of {len(new):,} questions, drawn with a fixed seed in fair "
        f"shares: {shares}. Right means {escape(main)} ({escape(metric_words(main))}){rule}.</p>"
        f"{''.join(cards)}</section>"
    )


def example_card(
    number: int, fate: str, before: Row | None, after: Row, main: str, names: tuple[str, str] = ("Before", "After")
) -> str:
    """A question with what one or two sides answered, side by side, and what each of them was shown.

    Args:
        number: of the card, from 1.
        fate: what became of the question, in words.
        before: row of the one side; None shows the other alone.
        after: row of the other.
        main: the metric that tells right from wrong.
        names: of the two sides; plain text.

    Returns:
        An ``<article>``.
    """
    sides = [(names[0], before), (names[1], after)] if before is not None else [(names[1], after)]
    out = [
        f'<article><p class="kicker">{number}. {escape(fate)} · {escape(str(after["qid"]))}</p>',
        f"<h3>{escape(after['question'])}</h3>",
        f"<p>Accepted: {escape(' | '.join(after['answers'])) or 'unknown'}</p>",
        '<div class="answers">',
    ]
    plain = [row for _, row in sides if "steps" not in row]  # each step of a chain shows its own passages
    apart = len(plain) < len(sides) or any(_shown(row) != _shown(plain[0]) for row in plain)
    for label, row in sides:
        score = row["scores"].get(main)
        state = "" if score is None else "right" if score >= 0.5 else "wrong"
        given = '<p class="given none">no answer</p>'
        if row["answer"]:
            given = f'<p class="given">{escape(row["answer"])}</p>'
        elif "em" not in row["scores"] and not row["reply"]:
            given = ""  # nobody was asked for one
        head = escape(f"{label}: {state}" if state else label)
        told = _chain(row) if "steps" in row else _reply(row)
        if apart and "steps" not in row:
            told += _passages(row, {"Before": "before", "After": "after"}.get(label, f"by {label}"))
        out.append(f'<div class="{state}"><p class="label">{head}</p>{given}{told}</div>')
    out.append("</div>")
    if not apart:
        out.append(_passages(plain[-1], ""))
    out.append(_scores(sides))
    return "".join([*out, "</article>"])


def _reply(row: Row) -> str:
    reply = row["reply"]
    if reply.strip() == (row["answer"] or ""):
        return ""
    if len(reply) > _LONG_REPLY:
        size = f"{len(reply):,} characters"
        return f"<details><summary>Whole reply, {size}</summary><pre>{escape(reply)}</pre></details>"
    return f"<pre>{escape(reply)}</pre>"


def _shown(row: Row) -> list[tuple[str, str]]:
    return [(p["doc_id"], p["text"]) for p in row["passages"]]


def _chain(row: Row) -> str:
    """The steps of a chain, each with its documents folded away."""
    items, documents = [], iter(row["passages"])
    for step in row["steps"]:
        if "analysis" not in step:
            items.append(
                f'<p class="action bad">Not a step: {escape(step["problem"])}</p><pre>{escape(step["text"])}</pre>'
            )
            continue
        judged = "".join(
            f" · {escape(name)} {shown_score(score)}" for name, score in (step.get("scores") or {}).items()
        )
        small = f'<small class="quiet">{judged}</small>' if judged else ""
        label, action = ("Query", step["query"]) if "query" in step else ("Answer", step["answer"])
        found = [next(documents) for _ in step.get("doc_ids", ())]
        folded = _passage_list(found, row["gold_doc_ids"], "found") if found else ""
        if not found and "query" in step:
            folded = '<p class="quiet">No documents found.</p>'
        items.append(
            f'<p class="analysis">{escape(step["analysis"])}{small}</p>'
            f'<p class="action"><span class="source">{label}</span> {escape(action)}</p>{folded}'
        )
    failure = f'<p class="quiet">Dropped: {escape(row["failure"])}</p>' if row.get("failure") else ""
    return f'<ol class="chain">{"".join(f"<li>{item}</li>" for item in items)}</ol>{failure}'


def _passages(row: Row, when: str) -> str:
    if not row["passages"]:
        return f'<p class="quiet">No passages{escape(" " + when) if when else ""}.</p>'
    return _passage_list(row["passages"], row["gold_doc_ids"], escape(f"shown{' ' + when if when else ''}"))


def _passage_list(passages: Sequence[Mapping[str, Any]], gold_doc_ids: Sequence[str], how: str) -> str:
    items, gold = [], set(gold_doc_ids)
    for i, p in enumerate(passages, start=1):
        is_gold = p["doc_id"] in gold
        title = f"<b>{escape(p['title'])}</b> · " if p.get("title") else ""
        mark = ' · <b class="goldmark">gold</b>' if is_gold else ""
        score = f" · score {p['score']:.3f}" if isinstance(p.get("score"), (int, float)) else ""
        items.append(
            f'<li{" class=gold" if is_gold else ""}><span class="source">[{i}] {title}{escape(str(p["doc_id"]))}'
            f'{score}{mark}</span><span class="passage">{escape(p["text"])}</span></li>'
        )
    found = len(gold & {p["doc_id"] for p in passages})
    known = f", {found} of {len(gold)} gold document{'s' if len(gold) != 1 else ''} among them" if gold else ""
    label = f"{len(passages)} passage{'s' if len(passages) != 1 else ''} {how}{known}"
    return f'<details><summary>{label}</summary><ol class="passages">{"".join(items)}</ol></details>'


def _scores(sides: Sequence[tuple[str, Row]]) -> str:
    lines = []
    for group, word in (("scores", ""), ("rewards", "reward: ")):
        for name in dict.fromkeys(name for _, row in sides for name in row.get(group) or {}):
            values = "".join(f'<td class="n">{shown_score((row.get(group) or {}).get(name))}</td>' for _, row in sides)
            lines.append(f'<tr><th scope="row">{word}{escape(name)}</th>{values}</tr>')
    heads = "".join(f'<th scope="col" class="n">{escape(label)}</th>' for label, _ in sides)
    return (
        "<details><summary>Scores and rewards</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Scores and rewards">'
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _configuration(config: Mapping[str, Any]) -> str:
    # Through JSON first: whatever the values are (paths, tuples), YAML then sees plain ones.
    plain = json.loads(json.dumps(dict(config), default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=False) if plain else "(empty)"
    return (
        "<section><h2>Configuration</h2><details><summary>"
        f"{len(plain)} setting{'s' if len(plain) != 1 else ''}, after defaults, file and command line</summary>"
        f"<pre>{escape(text)}</pre></details></section>"
    )


def _reproduce(summary: Mapping[str, Any], command: str | None) -> str:
    out = ["<section><h2>How to make this run again</h2>"]
    if command is None and summary.get("recipe") and summary.get("config"):
        recipe, config = summary["recipe"], summary["config"]
        command = f"accelerate launch recipes/{recipe}.py --config recipes/configs/{recipe}/{config}.yaml"
        if summary.get("seed") is not None:
            command += f" --seed {summary['seed']}"
        out.append("<p>With the settings above; what differs from the file goes on the command line.</p>")
    if command is None:
        out.append("<p>The command was not recorded.</p>")
    else:
        out.append(f"<pre>{escape(command)}</pre>")
    out.append("<p>Next to this file: <code>metrics.json</code>, <code>resolved_config.yaml</code>, ")
    out.append("<code>trainer_state.json</code> and <code>curves.png</code>.</p></section>")
    return "".join(out)


def excludes_zero(low: float, high: float) -> bool:
    """Whether an interval lies on one side of 0."""
    return low > 0 or high < 0


def shown_score(value: float | None) -> str:
    """A figure as it stands in a page."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def shown_change(value: float, digits: int = 3) -> str:
    """A difference as it stands in a page, with its sign."""
    said = f"{value:+.{digits}f}"
    return said[1:] if float(said) == 0 else said.replace("-", "−")


def shown_duration(seconds: float | None) -> str | None:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
