"""The page of a comparison: complete, escaped, self-contained, and readable in a real browser at any width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import pytest

from rag_rl.errors import DataError
from rag_rl.evaluation.comparison import compare, open_sides
from rag_rl.evaluation.comparison_page import chosen_flips, difference_in_words, write_comparison
from tests.scripts import load

# Other test files of this folder, for what they make.
made, reports = (load(Path(__file__).with_name(f"{name}.py")) for name in ("test_comparison", "test_report"))
# Text and paper of what stands on the page, told with what the report's own probe tells.
COLOURS = (
    "colours: ['body', 'h1', '.n', 'article'].map(s => { const c = getComputedStyle(doc.querySelector(s)); "
    "return [c.color, c.backgroundColor]; })"
)
NASTY = "<script>alert('x')</script> & \"quotes\" $title ${body}"


@pytest.fixture
def comparison(tmp_path):
    run = made.training(tmp_path / "run")
    other = made.training(tmp_path / "other", after=made.RECALL, learning_rate=0.5)
    sides = [*open_sides(f"start={run}:before"), *open_sides(f"one={run}:after"), *open_sides(f"two={other}:after")]
    return compare(sides)


def page(folder, comparison, **options):
    path = write_comparison(folder / "comparison.html", comparison, **options)
    assert path == folder / "comparison.html"
    return path.read_text(encoding="utf-8")


def test_says_what_sets_them_apart(tmp_path, comparison):
    html = page(tmp_path, comparison, title="Three of a kind", command="rag-rl compare a b")
    said = reports.Reader(html).said
    assert "Three of a kind" in said
    assert "40 questions." in said
    first = comparison.differences[0]
    assert difference_in_words(comparison, first, "em") in said
    assert difference_in_words(comparison, first, "em").startswith(
        "one has exact match 0.725, start 0.500: a difference of +0.225, 95% interval +0.075 to +0.375, p 0.012; "
    )
    assert "rag-rl compare a b" in said
    assert "learning_rate: 0.001 -> 0.5" in said
    for side in comparison.sides:
        assert str(side.folder) in said


def test_questions_that_flipped_stand_side_by_side(tmp_path, comparison):
    html = page(tmp_path, comparison, n_examples=6)
    reader = reports.Reader(html)
    assert "10 questions became right, 1 wrong; 6 of them below, drawn with a fixed seed." in reader.said
    cards = re.findall(r"<article>.*?</article>", html, re.S)
    assert len(cards) == 12
    said = [reports.Reader(card).said for card in cards]
    assert sum("wrong by start, right by one" in one for one in said) == 5
    assert sum("right by start, wrong by one" in one for one in said) == 1
    lost = next(one for one in said if "right by start, wrong by one" in one)
    assert "start: right Mira" in lost
    assert "one: wrong Orl" in lost
    assert "1 passage shown, 1 of 1 gold document among them" in lost


def test_what_is_the_same_everywhere_takes_one_line(tmp_path):
    run = made.training(tmp_path / "run", after=[{**one, "rewards": {}} for one in made.BEFORE])
    html = page(tmp_path, compare(open_sides(str(run))))
    said = reports.Reader(html).said
    assert "run after and run before have the same exact match on every question." in said
    assert "The same on every question: f1, steps" in said


def test_curves_over_each_other(tmp_path, comparison):
    html = page(tmp_path, comparison)
    training = html.split("<h2>Training")[1].split("<h2>")[0]
    legend = training.split("</ul>")[0]
    assert [name in legend for name in ("start", "one", "two")] == [False, True, True]
    pictures = re.findall(r'<svg viewBox="0 0 340.*?</svg>', training, re.S)
    assert len(pictures) == 2
    for picture in pictures:
        colours = re.findall(r'<polyline .*?stroke="(.*?)"', picture)
        assert colours == ["var(--series-1)", "var(--series-2)"]
    assert "Reward, one: 0.02 at step 1, 0.6 at step 30" in pictures[0]
    alone = page(tmp_path, compare([replace(side, log_history=()) for side in comparison.sides]))
    assert "<h2>Training" not in alone


def test_one_side_alone(tmp_path):
    (side,) = open_sides(str(made.evaluation(tmp_path / "scored")))
    html = page(tmp_path, compare([side]))
    reader = reports.Reader(html)
    assert "scored" in reader.said
    assert "<h2>Differences" not in html
    assert reader.count("article") == 0


def test_nothing_of_the_data_is_taken_for_markup(tmp_path):
    rows = [{**one, "question": NASTY, "answer": NASTY, "reply": NASTY} for one in made.AFTER]
    start = [{**one, "question": NASTY} for one in made.BEFORE]
    run = made.training(tmp_path / "run", before=start, after=rows, note=NASTY)
    sides = [replace(side, name=f"{NASTY} {side.what}") for side in open_sides(str(run))]
    html = page(tmp_path, compare(sides), title=NASTY, command=NASTY)
    assert "<script" not in html
    assert NASTY in reports.Reader(html).said
    assert not re.search(r'(src|href)="(?!#)', html), "it needs nothing else"


def test_folder_that_is_not_there(tmp_path, comparison):
    with pytest.raises(DataError, match="its folder does not exist"):
        write_comparison(tmp_path / "none" / "comparison.html", comparison)


def test_choice_of_flips():
    flipped = {"gained": list(range(10)), "lost": list(range(20, 22))}
    assert {fate: len(places) for fate, places in chosen_flips(flipped, 6).items()} == {"gained": 4, "lost": 2}
    assert {fate: len(places) for fate, places in chosen_flips(flipped, 50).items()} == {"gained": 10, "lost": 2}
    assert chosen_flips({"gained": [], "lost": list(range(9))}, 4) == chosen_flips(
        {"gained": [], "lost": list(range(9))}, 4
    )
    assert len(chosen_flips({"gained": [], "lost": list(range(9))}, 4)["lost"]) == 4
    assert chosen_flips(flipped, 0) == {"gained": [], "lost": []}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_right_in_a_browser(tmp_path, scheme):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no chromium on the PATH: nobody looks at the layout")
    word = "x" * 300
    after = json.loads(json.dumps(made.AFTER))
    for one in after:
        one.update(question=f"{word}?", reply=word * 3, answer=word, answers=[word])
        one["passages"][0].update(text=word, title=word, doc_id=word)
    for one in after[::2]:
        one["steps"] = [{"analysis": word, "query": word, "doc_ids": [word]}, {"text": word, "problem": word}]
    before = [{**one, "question": f"{word}?"} for one in made.BEFORE]
    run = made.training(tmp_path / "run", before=before, after=after, note=word)
    sides = [replace(side, name=f"{side.what} {word[:60]}") for side in open_sides(str(run), baselines=True)[:2]]
    html = page(tmp_path, compare(sides), title=f"A title with {word[:90]}", command=word)
    if scheme == "dark":  # headless Chromium prefers light
        assert html.count("@media (prefers-color-scheme: dark)") == 1
        html = html.replace("@media (prefers-color-scheme: dark)", "@media all")
    widths = (390, 1200)
    frames = "".join(
        f'<iframe style="width:{w}px;height:900px;border:0" onload="look(this)" srcdoc="{escape(html)}"></iframe>'
        for w in widths
    )
    probe = tmp_path / "probe.html"
    template = reports.PROBE.replace("margin:", COLOURS + ", margin:", 1)
    probe.write_text(template.replace("{{", "{").replace("}}", "}").replace("{frames}", frames))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars "
        "--window-size=1400,1000 --virtual-time-budget=20000 --dump-dom"
    )
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S).group(1)))
    assert sorted(one["width"] for one in found) == list(widths)
    for one in found:
        assert one["scroll"] <= one["width"], one
        assert one["wide"] == []
        assert (one["cards"], one["scripts"], one["margin"]) == (11, 0, "0px")
        (text, paper), *_ = one["colours"]
        assert brightness(paper) > 200 > 80 > brightness(text) if scheme == "light" else brightness(paper) < 60
        assert abs(brightness(text) - brightness(paper)) > 150, "text stands out from its page"
    assert next(one for one in found if one["width"] == 390)["scrolls"], "wide tables scroll in their containers"


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
