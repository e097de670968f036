"""What a run in rounds shows: a table of its steps, and the curves of all of them one behind the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

# Of each step's log: what shows whether it learnt.
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins")


def rounds_section(rounds: Sequence[Mapping[str, Any]], *, metric: str) -> str:
    """The report's table of all steps, with what the gate saw of each.

    Args:
        rounds: each with its number, ``queries`` (``usable``, ``learnt``, ``held_out``) and, for ``augmenter`` and
            ``retriever``, whether it was ``kept`` and what the ``gate`` measured.
        metric: that decided.

    Returns:
        HTML, escaped.
    """
    rows = []
    decides = True
    for one in rounds:
        for part in ("augmenter", "retriever"):
            told, gate = one[part], one[part]["gate"]
            decides = gate["decides"]
            low, high = gate["ci95"]
            folder = f"round_{one['round']}/{part}"
            rows.append(
                f'<tr><th scope="row"><a href="{escape(folder)}/report.html">{escape(folder)}</a></th>'
                f"<td>{one['queries']['learnt']:,}</td><td>{gate['queries']:,}</td>"
                f"<td>{gate['before']:.3f}</td><td>{gate['after']:.3f}</td>"
                f"<td>{gate['after'] - gate['before']:+.3f} [{low:+.3f}, {high:+.3f}]</td>"
                f"<td>{'yes' if told['kept'] else 'no'}</td></tr>"
            )
    rule = (
        "A step that finds no more on them is not kept, and the next one goes on from what was there before."
        if decides
        else "The gate is off: every step is kept."
    )
    names = ("Step", "Learnt from", "Held out", "Before", "After", "Change, 95% interval", "Kept")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f"<section><h2>Rounds</h2><p>{escape(metric)} of the pair on synthetic queries of each round that nothing was "
        f"learnt from, before the step and after it. {rule}</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Rounds">'
        f'<table class="wide"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def joined_history(steps: Iterable[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """The logs of trainings that followed each other as one, with steps counted through.

    Args:
        steps: name of the trained part, and its log, in order.

    Returns:
        Entries with ``step`` and, under the part's name, what shows whether it learnt.

    Example:
        >>> joined_history([("a", [{"step": 2, "loss": 0.5}]), ("b", [{"step": 1, "loss": 0.25, "lr": 1.0}])])
        [{'step': 2, 'a/loss': 0.5}, {'step': 3, 'b/loss': 0.25}]
    """
    joined: list[dict[str, Any]] = []
    offset = 0
    for part, log in steps:
        for entry in log:
            shown = {f"{part}/{name}": entry[name] for name in _SHOWN if name in entry}
            if shown:
                joined.append({"step": offset + entry["step"], **shown})
        offset += max((entry["step"] for entry in log if "step" in entry), default=0)
    return joined
