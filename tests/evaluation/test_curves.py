"""Curves: what is read from a trainer's log, and what is drawn of it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from rag_rl.errors import DataError
from rag_rl.evaluation.curves import (
    curve_panels,
    draw_curves,
    nice_ticks,
    series_svg,
    smoothed,
    svg_curve,
    training_curves,
)

# Two steps of a GRPO run as TRL 1.12 logs it, and the totals that end every run.
LOG = [
    {
        "loss": -0.01,
        "grad_norm": 0.5,
        "learning_rate": 3e-4,
        "num_tokens": 900.0,
        "completions/mean_length": 12.5,
        "completions/max_length": 20.0,
        "completions/clipped_ratio": 0.0,
        "rewards/em/mean": 0.25,
        "rewards/em/std": 0.1,
        "rewards/format/mean": 0.75,
        "reward": 1.0,
        "reward_std": 0.3,
        "frac_reward_zero_std": 0.5,
        "entropy": 0.9,
        "clip_ratio/low_mean": 0.0,
        "judge_cost": 0.02,
        "step_time": 1.5,
        "epoch": 0.1,
        "step": 1,
    },
    {"loss": 0.02, "rewards/em/mean": 0.5, "rewards/format/mean": 1.0, "reward": 1.5, "entropy": 0.8, "step": 2},
    {"train_runtime": 12.0, "train_samples_per_second": 3.0, "total_flos": 0.0, "train_loss": 0.005, "step": 2},
]


def texts(svg):
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter("text")]


def test_curves_of_a_run():
    curves = training_curves(LOG)
    assert curves["reward"] == [(1, 1.0), (2, 1.5)]
    assert curves["entropy"] == [(1, 0.9), (2, 0.8)]
    assert curves["step_time"] == [(1, 1.5)]
    assert not curves.keys() & {
        "train_runtime",
        "train_loss",
        "total_flos",
        "train_samples_per_second",
        "epoch",
        "step",
    }


def test_curves_leave_out_what_is_no_number():
    log = [
        {"step": 1, "reward": None, "kl": math.nan, "loss": math.inf, "note": "x", "flag": True},
        {"step": 2, "reward": 1},
        {"reward": 3.0},
    ]
    assert training_curves(log) == {"reward": [(2, 1.0)]}


def test_a_step_logged_twice_counts_once():
    log = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}, {"step": 1, "reward": 0.3}]
    assert training_curves(log) == {"reward": [(1, 0.3), (2, 0.2)]}


def test_panels_reward_first_then_parts_then_the_rest():
    keys = [panel.key for panel in curve_panels(LOG)]
    assert keys == [
        "reward",
        "rewards/em/mean",
        "rewards/format/mean",
        "loss",
        "entropy",
        "frac_reward_zero_std",
        "reward_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "grad_norm",
        "learning_rate",
        "step_time",
        "judge_cost",
    ]


def test_parts_logged_under_their_plain_name():
    panels = curve_panels([{"step": 1, "reward": 1.0, "rewards/em": 0.5}])
    assert [(p.key, p.title) for p in panels] == [("reward", "Reward"), ("rewards/em", "Reward: em")]


def test_a_single_reward_is_shown_once():
    log = [{"step": s, "rewards/combined/mean": s / 10, "reward": s / 10} for s in range(1, 4)]
    assert [panel.key for panel in curve_panels(log)] == ["reward"]


def test_shares_without_a_score_are_shown_where_there_are_any():
    log = [
        {"step": 1, "reward": 0.5, "rewards/em": 0.0, "rewards/em/none": 0.0, "rewards/none": 0.0, "kl": 0.0},
        {"step": 2, "reward": 0.4, "rewards/em": 0.0, "rewards/em/none": 0.0, "rewards/none": 0.0, "kl": 0.0},
    ]
    # Only these names: a reward, or any other quantity, that stays at 0 is news.
    assert [panel.key for panel in curve_panels(log)] == ["reward", "rewards/em", "kl"]
    log[1]["rewards/none"] = 0.25
    assert [panel.key for panel in curve_panels(log)] == ["reward", "rewards/em", "rewards/none", "kl"]


def test_ppo_has_a_reward_too():
    log = [{"step": 1, "objective/kl": 0.1, "objective/scores": 0.4, "loss/policy_avg": 0.2, "val/ratio": 1.0}]
    assert [panel.key for panel in curve_panels(log)] == ["objective/scores", "loss/policy_avg", "objective/kl"]


def test_smoothing_keeps_steps_means_and_short_runs():
    short = [(i, float(i % 2)) for i in range(7)]
    assert smoothed(short) == short
    flat = [(i, 2.5) for i in range(50)]
    assert smoothed(flat) == flat
    zigzag = [(i, float(i % 2)) for i in range(100)]
    calm = smoothed(zigzag)
    assert [step for step, _ in calm] == [step for step, _ in zigzag]
    assert all(abs(value - 0.5) < 0.2 for _, value in calm)
    # Centred: a straight line stays where it is, away from the ends.
    line = [(i, float(i)) for i in range(100)]
    assert smoothed(line)[10:90] == line[10:90]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.13, 0.87), (-0.004, 0.009), (3e-7, 3e-4), (1234.0, 98765.0), (-5.0, -5.0), (0.0, 0.0), (7.0, 7.0)],
)
def test_ticks_enclose_the_values(low, high):
    ticks = nice_ticks(low, high, target=4)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert ticks[-1] >= high


def test_whole_ticks_are_whole():
    assert nice_ticks(1, 3, target=4, whole=True) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_svg_of_short_and_long_runs(n):
    points = [(i, 0.5 + 0.01 * i * (-1) ** i) for i in range(1, n + 1)]
    root = ET.fromstring(svg_curve(points, "Reward", unit="mean of a batch"))
    assert root.get("aria-label", "").startswith("Reward: 0.49 at step 1")
    lines = list(root.iter("polyline"))
    assert len(lines) == (0 if n == 1 else 1 if n < 8 else 2)
    assert all(len(line.get("points", "").split()) == n for line in lines)
    assert len(list(root.iter("circle"))) == (n if n <= 5 else 0)
    # Everything is inside the picture.
    for line in lines:
        for pair in line.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 340
            assert 0 <= y <= 190


def test_svg_rises_where_the_curve_rises():
    (line,) = ET.fromstring(svg_curve([(1, 0.1), (2, 0.9)], "Reward")).iter("polyline")
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in line.get("points", "").split())
    assert x2 > x1
    assert y2 < y1


def test_svg_labels_axes_and_unit():
    said = texts(svg_curve([(1, 0.1), (2, 0.9), (3, 0.4)], "Entropy", unit="nats a token"))
    assert said[0] == "Entropy nats a token"
    assert {"1", "2", "3", "step"} <= set(said)
    small = texts(svg_curve([(1, 0.0), (2, 3e-4)], "Learning rate"))
    assert {"0", "1e-4", "2e-4", "3e-4"} <= set(small)


def test_svg_takes_the_colours_of_its_page():
    svg = svg_curve([(1, 0.1), (2, 0.9)], "Reward")
    assert 'fill="currentColor"' in svg
    assert "var(--curve" in svg


def test_svg_escapes():
    root = ET.fromstring(svg_curve([(1, 0.5)], '<script>"&', unit="<b>"))
    assert '<script>"& <b>' in "".join(root.itertext())
    assert not list(root.iter("script"))


def test_svg_shortens_long_names_but_says_them_in_full():
    root = ET.fromstring(svg_curve([(1, 0.5)], "x" * 80, unit="share"))
    assert next(root.iter("text")).text == "x" * 39 + "…"
    assert "x" * 80 in root.get("aria-label", "")


def test_svg_of_nothing():
    with pytest.raises(DataError, match="has no points"):
        svg_curve([], "Reward")


def drawn_panels(path):
    """Size of a PNG, read by another program than the one that wrote it."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_png(tmp_path, n):
    log = [{"step": s, "reward": s / 10, "rewards/$x$_a": s / 20, "loss": -s / 1e4} for s in range(1, n + 1)]
    path = tmp_path / "curves.png"
    draw_curves(log, path)
    width, height = drawn_panels(path)
    assert width > height
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_png_grows_with_the_number_of_curves(tmp_path):
    draw_curves(LOG, tmp_path / "many.png")
    draw_curves([{"step": 1, "reward": 1.0}], tmp_path / "one.png")
    assert drawn_panels(tmp_path / "many.png")[1] > 3 * drawn_panels(tmp_path / "one.png")[1]


def test_png_of_an_empty_log(tmp_path):
    draw_curves([], tmp_path / "curves.png")
    assert drawn_panels(tmp_path / "curves.png")[0] > 0


def test_png_replaces_an_old_one(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    draw_curves(LOG, path)
    drawn_panels(path)


def test_png_into_no_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        draw_curves(LOG, tmp_path / "missing" / "curves.png")


def test_curves_of_several_runs():
    long = [(step, step / 40) for step in range(1, 41)]
    series = [("one & <two>", long, "var(--series-1)", ""), ("short", [(5, 2.0)], "var(--series-2)", "7 3")]
    root = ET.fromstring(series_svg(series, "Reward", unit="mean of a batch"))
    lines = [element for element in root.iter() if element.tag == "polyline"]
    assert [line.get("stroke") for line in lines] == ["var(--series-1)"], "one point makes no line"
    assert len(lines[0].get("points").split()) == 40
    dots = [element for element in root.iter() if element.tag == "circle"]
    assert [dot.get("fill") for dot in dots] == ["var(--series-2)"]
    said = root.get("aria-label")
    assert "Reward, one & <two>: 0.025 at step 1, 1 at step 40" in said
    assert "Reward, short: 2 at step 5" in said
    dashed = ET.fromstring(series_svg([("a", long, "red", "7 3")], "Reward"))
    assert [e.get("stroke-dasharray") for e in dashed.iter() if e.tag == "polyline"] == ["7 3"]


def test_all_curves_of_a_picture_have_room():
    series = [("low", [(1, -3.0), (2, -2.0)], "red", ""), ("high", [(50, 7.0), (60, 9.0)], "blue", "")]
    root = ET.fromstring(series_svg(series, "Reward"))
    width, height = (float(x) for x in root.get("viewBox").split()[2:])
    for line in (element for element in root.iter() if element.tag == "polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_no_curves_and_curves_without_points():
    with pytest.raises(DataError, match="picture 'Reward' has no curves"):
        series_svg([], "Reward")
    with pytest.raises(DataError, match="curve 'Reward' of 'b' has no points"):
        series_svg([("a", [(1, 1.0)], "red", ""), ("b", [], "red", "")], "Reward")
