"""Training curves: read from a trainer's log, drawn into ``curves.png`` and as inline SVG for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from rag_rl.data.whole_files import whole_file
from rag_rl.errors import DataError

Points = list[tuple[int, float]]
"""(optimizer step, value), steps ascending."""

# transformers writes these once, at the end of a run or an evaluation: they are totals, not curves.
_TOTALS = ("train_loss", "total_flos", "epoch", "step")
_TOTAL_ENDINGS = ("_runtime", "_per_second", "_flos")

# What is drawn before everything else that was logged, in this order: key, title, unit. The first rows are the reward
# under the names of the different trainers (GRPO, PPO).
_REWARD_KEYS = ("reward", "objective/scores", "objective/rlhf_reward")
_KNOWN = {
    "reward": ("Reward", "mean of a batch"),
    "objective/scores": ("Reward", "mean of a batch"),
    "objective/rlhf_reward": ("Reward less KL penalty", "mean of a batch"),
    "loss": ("Loss", "no unit"),
    "eval_loss": ("Held-out loss", "no unit"),
    "loss/policy_avg": ("Policy loss", "no unit"),
    "loss/value_avg": ("Value loss", "no unit"),
    "rewards/accuracies": ("Preference accuracy", "share of pairs"),
    "rewards/margins": ("Reward margin, chosen over rejected", "nats x beta"),
    "entropy": ("Entropy of the policy", "nats a token"),
    "policy/entropy_avg": ("Entropy of the policy", "nats a token"),
    "frac_reward_zero_std": ("Groups without reward variance", "share of groups"),
    "reward_std": ("Spread of the reward", "standard deviation"),
    "kl": ("KL to the reference", "nats a token"),
    "objective/kl": ("KL to the reference", "nats a reply"),
    "completions/mean_length": ("Reply length", "tokens, mean"),
    "completions/clipped_ratio": ("Replies cut at the token budget", "share of replies"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", "no unit"),
    "lr": ("Learning rate", "no unit"),
    "step_time": ("Time a step", "seconds"),
}
# Logged, but of use only to someone who hunts a bug; trainer_state.json keeps them.
_HIDDEN = ("num_tokens", "num_input_tokens_seen", "eps", "episode", "entropy_coef")
_HIDDEN_STARTS = (
    "clip_ratio/",
    "completions/",
    "sampling/",
    "profiling/",
    "val/",
    "logps/",
    "logits/",
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One small picture.

    Attributes:
        key: name in the trainer's log.
        title: in words.
        unit: of the values, in words.
        points: at least one.
    """

    key: str
    title: str
    unit: str
    points: Points

    @property
    def noisy(self) -> bool:
        """Whether smoothing helps: a schedule is exact, and would only get round corners."""
        return self.key not in ("learning_rate", "lr")


def training_curves(log_history: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Turns a trainer's log into one series a quantity.

    Args:
        log_history: the entries of ``trainer_state.json``, each with ``step`` and what was logged there.

    Returns:
        Key to points by ascending step, keys in the order of their first appearance. Values that are no finite number
        (TRL logs None where no completion could be scored) are left out; of a step that was logged twice the later
        counts.

    Example:
        >>> training_curves([{"step": 1, "reward": 0.5}, {"step": 2, "reward": None, "loss": 0.25}])
        {'reward': [(1, 0.5)], 'loss': [(2, 0.25)]}
    """
    found: dict[str, dict[int, float]] = {}
    for entry in log_history:
        step = entry.get("step")
        if not isinstance(step, int):
            continue
        for key, value in entry.items():
            if key in _TOTALS or key.endswith(_TOTAL_ENDINGS):
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                found.setdefault(key, {})[step] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def curve_panels(log_history: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Chooses what is worth a picture, and in which order.

    Args:
        log_history: as in ``training_curves``.

    Returns:
        The reward, its parts, loss, entropy, zero-variance groups and the like, then whatever else the trainer logged.
        A share of answers without a score (``rewards/none``, ``rewards/<name>/none``) only where it rises above 0.
    """
    curves = {
        key: points
        for key, points in training_curves(log_history).items()
        if not key.endswith("/none") or any(value > 0 for _, value in points)
    }
    reward = next((key for key in _REWARD_KEYS if key in curves), None)
    parts = [
        key
        for key in curves
        if key.startswith(("rewards/", "reward/"))
        and not key.endswith("/std")
        and key not in _KNOWN
        # A single reward function is logged twice by TRL, under its own name and as the sum.
        and not (reward is not None and curves[key] == curves[reward])
    ]
    order = [
        *(key for key in _REWARD_KEYS if key in curves),
        *parts,
        *(key for key in _KNOWN if key in curves and key not in _REWARD_KEYS),
    ]
    placed = {*order, *(key for key in curves if key.startswith(("rewards/", "reward/")))}
    order += [k for k in curves if k not in placed and k not in _HIDDEN and not k.startswith(_HIDDEN_STARTS)]
    return [_panel(key, curves[key]) for key in order]


def _panel(key: str, points: Points) -> Panel:
    if key in _KNOWN:
        return Panel(key, *_KNOWN[key], points)
    if key.startswith(("rewards/", "reward/")):
        return Panel(key, f"Reward: {key.split('/', 1)[1].removesuffix('/mean')}", "mean of a batch", points)
    return Panel(key, key, "", points)


def smoothed(points: Sequence[tuple[int, float]]) -> Points:
    """A centred moving mean over about a tenth of the run, so that a trend shows and does not lag.

    Args:
        points: a curve.

    Returns:
        As many points, at the same steps; the curve itself where it has fewer than 8 points. At the ends the window is
        cut on one side only: cut on both, the last point would be raw, and noise would look like a late rise.

    Example:
        >>> smoothed([(1, 0.0), (2, 1.0)])
        [(1, 0.0), (2, 1.0)]
    """
    if len(points) < 8:
        return list(points)
    half = max(1, len(points) // 20)
    calm = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, i - half) : i + half + 1]]
        calm.append((step, sum(window) / len(window)))
    return calm


def draw_curves(log_history: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draws all curves of a run into one PNG, small multiples; written under another name first, then moved.

    Args:
        log_history: as in ``training_curves``.
        path: PNG file to write.

    Raises:
        DataError: the folder of ``path`` does not exist.
    """
    # A Figure of its own, without pyplot: no global state, no display, whatever backend the user has set.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not path.parent.is_dir():
        raise DataError(f"{path}: its folder does not exist")
    panels = curve_panels(log_history)
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    if not panels:
        grid[0, 0].text(0.5, 0.5, "nothing was logged", ha="center", va="center", color="#555555")
    for axes, panel in zip(grid.flat, panels, strict=False):
        steps, values = zip(*panel.points, strict=True)
        calm = smoothed(panel.points) if panel.noisy else panel.points
        if len(calm) == 1:
            axes.plot(steps, values, "o", color="#1f5fbf", markersize=5, clip_on=False, zorder=3)
        else:
            if calm != panel.points:
                axes.plot(steps, values, color="#1f5fbf", alpha=0.28, linewidth=0.9)
            dots = "o" if len(calm) <= 5 else None
            # Above the axis: a quantity that stays at 0 would lie under it.
            style = {"linewidth": 1.7, "marker": dots, "markersize": 4, "clip_on": False, "zorder": 3}
            axes.plot(*zip(*calm, strict=True), color="#1f5fbf", **style)
        # A reward's name is the user's: "$" in it is no formula.
        axes.set_title(
            _short(f"{panel.title} ({panel.unit})" if panel.unit else panel.title, 52),
            fontsize=9.5,
            loc="left",
            parse_math=False,
        )
        axes.set_xlabel("step", fontsize=8.5)
        axes.set_ylabel(_short(panel.key, 32), fontsize=8.5, parse_math=False)
        ticks = nice_ticks(min(values), max(values), target=4)
        axes.set_yticks(ticks, labels=[_tick(t, ticks) for t in ticks])
        axes.set_ylim(ticks[0], ticks[-1])
        axes.set_xticks(_step_ticks(steps))
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", facecolor="white")


def svg_curve(
    points: Sequence[tuple[int, float]],
    title: str,
    *,
    unit: str = "",
    width: int = 340,
    height: int = 190,
    smooth: bool = True,
) -> str:
    """Draws one curve as inline SVG, in the colours of the page around it.

    Colours come from ``currentColor`` and the CSS variables ``--curve`` and ``--rule``, so that light and dark pages
    need no second picture.

    Args:
        points: at least one, steps ascending.
        title: in words; escaped here.
        unit: of the values; escaped here.
        width: in user units; the picture scales with its container.
        height: in user units.
        smooth: adds a moving mean, and makes the points themselves faint.

    Returns:
        One ``<svg>`` element with a text alternative.

    Raises:
        DataError: there is no point.
    """
    if not points:
        raise DataError(f"curve {title!r} has no points")
    return _drawn([("", points, "var(--curve, #1f5fbf)", "")], title, unit, width, height, smooth=smooth, faint=True)


def series_svg(
    series: Sequence[tuple[str, Sequence[tuple[int, float]], str, str]],
    title: str,
    *,
    unit: str = "",
    width: int = 340,
    height: int = 190,
    smooth: bool = True,
) -> str:
    """Draws the curves of several runs over each other, as ``svg_curve`` draws one.

    Args:
        series: name, points (at least one, steps ascending), colour and dash pattern ("" for a whole line) of each.
        title: in words; escaped here.
        unit: of the values; escaped here.
        width: in user units; the picture scales with its container.
        height: in user units.
        smooth: draws moving means in place of the points.

    Returns:
        One ``<svg>`` element with a text alternative; the legend is the caller's.

    Raises:
        DataError: there is no curve, or one has no points.
    """
    if not series:
        raise DataError(f"picture {title!r} has no curves")
    for name, points, _, _ in series:
        if not points:
            raise DataError(f"curve {title!r} of {name!r} has no points")
    return _drawn(series, title, unit, width, height, smooth=smooth, faint=False)


def _drawn(
    series: Sequence[tuple[str, Sequence[tuple[int, float]], str, str]],
    title: str,
    unit: str,
    width: int,
    height: int,
    *,
    smooth: bool,
    faint: bool,
) -> str:
    """One picture; ``faint`` shows the points themselves behind their moving mean."""
    calm = [smoothed(points) if smooth else list(points) for _, points, _, _ in series]
    drawn = [points for _, points, _, _ in series] if faint else calm
    values = [value for points in drawn for _, value in points]
    steps = sorted({step for points in drawn for step, _ in points})
    y_ticks = nice_ticks(min(values), max(values), target=4)
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    left = 12 + 6.4 * max(len(_tick(t, y_ticks)) for t in y_ticks)
    right, top, bottom = width - 12, 34, height - 34
    first, last = steps[0], steps[-1]

    def x(step: float) -> float:
        return (left + right) / 2 if last == first else left + (step - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    def line(curve: Sequence[tuple[int, float]], colour: str, style: str) -> str:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>'

    head = escape(_short(title, 40))
    tail = (
        f'<tspan fill-opacity="0.68" font-weight="400"> {escape(unit)}</tspan>'
        if unit and len(title) + len(unit) < 50
        else ""
    )
    said = "; ".join(_said(title if faint else f"{title}, {name}", points) for name, points, _, _ in series)
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}" '
        'font-family="inherit" font-size="11" fill="currentColor">',
        f'<text x="2" y="14" font-size="12.5" font-weight="600">{head}{tail}</text>',
    ]
    for t in y_ticks:
        out.append(
            f'<line x1="{left:.1f}" x2="{right}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="var(--rule, #ddd)"/>'
            f'<text x="{left - 6:.1f}" y="{y(t) + 3.8:.1f}" text-anchor="end" fill-opacity="0.75">'
            f"{_tick(t, y_ticks)}</text>"
        )
    for t in _step_ticks(steps):
        out.append(f'<text x="{x(t):.1f}" y="{bottom + 15}" text-anchor="middle" fill-opacity="0.75">{t:,}</text>')
    out.append(
        f'<text x="{(left + right) / 2:.1f}" y="{height - 5}" text-anchor="middle" fill-opacity="0.75">step</text>'
    )
    for (_, points, colour, dash), mean in zip(series, calm, strict=True):
        if len(points) > 1:
            if faint and mean != list(points):
                out.append(line(points, colour, 'stroke-width="1" stroke-opacity="0.32" stroke-linejoin="round"'))
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            out.append(line(mean, colour, f'stroke-width="2" stroke-linejoin="round" stroke-linecap="round"{dashes}'))
        if len(points) <= 5:
            out += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for s, v in points]
    return "".join([*out, "</svg>"])


def _said(title: str, points: Sequence[tuple[int, float]]) -> str:
    steps, values = [step for step, _ in points], [value for _, value in points]
    said = f"{title}: {_number(values[0])} at step {steps[0]}"
    if len(points) > 1:
        said += (
            f", {_number(values[-1])} at step {steps[-1]}, between {_number(min(values))} and {_number(max(values))}"
        )
    return said


def nice_ticks(low: float, high: float, *, target: int, whole: bool = False) -> list[float]:
    """Round numbers that enclose a range.

    Args:
        low: smallest value.
        high: largest value, at least ``low``.
        target: about how many steps between ticks.
        whole: only whole numbers.

    Returns:
        At least two ascending ticks; the first is at most ``low``, the last at least ``high``.

    Example:
        >>> nice_ticks(0.13, 0.87, target=4)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        # A flat line in the middle; at 0 on the floor, for what stays at 0 here (shares, lengths) cannot be negative.
        low, high = (0.0, 1.0) if low == 0 else (min(0.0, 2 * low), max(0.0, 2 * low))
    rough = (high - low) / target
    unit = 10.0 ** math.floor(math.log10(rough))
    # 0.75 of the wish is near enough: better a tick more than a jump of five.
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= 0.75 * rough)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(i * step, digits) + 0.0 for i in range(first, max(last, first + 1) + 1)]


def _step_ticks(steps: Sequence[int]) -> list[int]:
    """Every step of a short run, round ones of a long one."""
    if len(steps) <= 5:
        return list(steps)
    return [int(t) for t in nice_ticks(steps[0], steps[-1], target=5, whole=True) if steps[0] <= t <= steps[-1]]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """Writes a tick with as many digits as its neighbours need."""
    step = min(b - a for a, b in pairwise(ticks))
    largest = max(abs(ticks[0]), abs(ticks[-1]))
    if largest < 1e-3 or largest >= 1e5:
        return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace(".0e", "e")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _short(text: str, most: int) -> str:
    """What a small picture has room for; names of the user's own metrics can be long."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _number(value: float) -> str:
    return f"{value:.3g}"
