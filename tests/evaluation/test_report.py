"""The report: complete, escaped, self-contained, and readable in a real browser at any width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rag_rl.errors import DataError
from rag_rl.evaluation.report import (
    baseline_words,
    change_in_words,
    choose_examples,
    example_card,
    pick_main_metric,
    write_page,
    write_report,
)
from rag_rl.evaluation.scoring import confidence_intervals, mean_metrics

NASTY = "<script>alert('x')</script> & \"quotes\" $title ${body}"
VOID = {"meta", "br", "hr", "img", "input", "link", "line", "rect", "circle", "polyline"}


def row(i, right, *, reply=None, gold=("d2",)):
    answer = "Mira" if right else "Orl"
    return {
        "qid": f"q{i}",
        "question": f"Which river is number {i}?",
        "answers": ["Mira", "the Mira"],
        "gold_doc_ids": list(gold),
        "passages": [
            {"doc_id": "d1", "title": "Galton", "text": "Galton lies on the Orl.", "score": 0.9},
            {"doc_id": "d2", "title": "Elmton", "text": "Elmton lies on the Mira.", "score": 0.8},
        ],
        "reply": reply or f"It lies there.\nAnswer: {answer}",
        "answer": answer,
        "scores": {"em": float(right), "f1": float(right), "format": 1.0, "mrr@10": None},
        "rewards": {"em": float(right), "groundedness": None},
    }


# (before, after): 6 gained, 2 lost, 12 wrong, 20 right.
FATES = [(False, True)] * 6 + [(True, False)] * 2 + [(False, False)] * 12 + [(True, True)] * 20
BEFORE = [row(i, old) for i, (old, _) in enumerate(FATES)]
AFTER = [row(i, new) for i, (_, new) in enumerate(FATES)]
LOG = [{"step": s, "reward": s / 50, "rewards/em/mean": s / 60, "entropy": 1 / s} for s in range(1, 31)]
SUMMARY = {
    "recipe": "grpo_generator",
    "config": "tiny",
    "seed": 7,
    "status": "complete",
    "before": mean_metrics(BEFORE),
    "after": mean_metrics(AFTER),
    "n_eval": 40,
    "num_processes": 2,
    "ci95": {name: list(pair) for name, pair in confidence_intervals(BEFORE, AFTER).items()},
    "train_seconds": 3725.0,
    "eval_seconds": 9.26,
    "peak_memory_bytes": 3 * 2**30,
}


def report(folder, **changes):
    given = {
        "title": "Reader of the tiny world",
        "summary": SUMMARY,
        "before_rows": BEFORE,
        "after_rows": AFTER,
        "log_history": LOG,
        "config": {"learning_rate": 3e-4, "reward_names": ["em", "format"], "output_dir": Path("runs/x")},
    }
    path = write_report(folder, **{**given, **changes})
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects the visible text of a page and checks that every tag is closed where it belongs."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())

    def count(self, tag, **attrs):
        return sum(t == tag and all(a.get(k) == v for k, v in attrs.items()) for t, a in self.tags)


def test_says_what_happened(tmp_path):
    said = Reader(report(tmp_path)).said
    assert "Reader of the tiny world" in said
    assert "grpo_generator · tiny" in said
    assert "On 40 held-out questions, exact match rose from 0.550 to 0.650 (+0.100)." in said
    for fact in ("1 h 02 min", "9.3 s", "3.00 GiB"):
        assert fact in said
    assert "not complete" not in said


def test_table_has_change_interval_and_verdict(tmp_path):
    summary = {
        "status": "complete",
        "before": {"em": 0.5, "f1": 0.6, "format": 1.0, "mrr@10": 0.4, "mine": 0.1},
        "after": {"em": 0.75, "f1": 0.61, "format": 1.0, "mrr@10": 0.2, "mine": 0.2},
        "ci95": {"em": [0.2, 0.3], "f1": [-0.02, 0.04], "format": [0.0, 0.0], "mrr@10": [-0.25, -0.15]},
        "n_eval": 100,
    }
    html = report(tmp_path, summary=summary)
    rows = [re.sub(r"<[^>]+>", " ", r) for r in re.findall(r"<tr.*?</tr>", html.split("<h2>Training")[0], re.S)]
    said = {line.split()[0]: " ".join(unescape(line).split()) for line in rows}
    assert said["em"] == "em exact match 0.500 0.750 +0.250 +0.200 to +0.300 better , 0 excluded"
    assert said["f1"].endswith("0.600 0.610 +0.010 −0.020 to +0.040 0 inside: may be chance")
    assert said["format"].endswith("1.000 1.000 0.000 0.000 to 0.000 unchanged")
    assert said["mrr@10"].endswith("0.400 0.200 −0.200 −0.250 to −0.150 worse , 0 excluded")
    assert said["mine"] == "mine 0.100 0.200 +0.100 – no interval"


def test_interval_pictures_lie_on_the_right_side_of_zero(tmp_path):
    summary = {"before": {"em": 0.5, "f1": 0.5}, "after": {"em": 0.7, "f1": 0.3}}
    summary["ci95"] = {"em": [0.1, 0.3], "f1": [-0.3, -0.1]}
    html = report(tmp_path, summary=summary)
    up, down = ((float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="7" width="([\d.]+)"', html))
    assert up[0] > 76
    assert down[0] + down[1] < 76
    assert up[0] + up[1] <= 148
    assert down[0] >= 4


def test_shows_every_curve_without_an_image_file(tmp_path):
    html = report(tmp_path)
    read = Reader(html)
    assert "Reward: em" in read.said
    assert html.count("<polyline") == 6  # raw and smoothed of three curves
    assert read.count("img") == 0


def test_is_self_contained(tmp_path):
    read = Reader(report(tmp_path, notes=[NASTY]))
    assert not [tag for tag, _ in read.tags if tag in ("script", "link", "img", "iframe", "object", "base")]
    assert not [a for _, attrs in read.tags for a in attrs if a in ("src", "href", "srcset") or a.startswith("on")]
    css = (tmp_path / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css
    assert "prefers-color-scheme: dark" in css
    assert "@media print" in css


def test_everything_is_escaped(tmp_path):
    before, after = json.loads(json.dumps([BEFORE[:1], AFTER[:1]]))
    for one in (before[0], after[0]):
        one.update(qid=NASTY, question=NASTY, answers=[NASTY], answer=NASTY, reply=f"so: {NASTY}")
        one["passages"] = [{"doc_id": NASTY, "title": NASTY, "text": NASTY, "score": 1.0}]
        one["scores"][NASTY] = 1.0
        one["rewards"] = {NASTY: 0.5}
    summary = {**SUMMARY, "recipe": NASTY, "config": NASTY, "status": NASTY, "seed": NASTY}
    summary |= {"before": {"em": 0.0, NASTY: 0.1}, "after": {"em": 1.0, NASTY: 0.2}, "ci95": {NASTY: [0.0, 1.0]}}
    html = report(
        tmp_path,
        title=NASTY,
        summary=summary,
        before_rows=before,
        after_rows=after,
        log_history=[{"step": 1, NASTY: 1.0, f"rewards/{NASTY}": 0.5}],
        config={NASTY: NASTY},
        notes=[NASTY],
        command=f"run {NASTY}",
    )
    assert "<script" not in html
    assert html.count(escape(NASTY)) > 15
    assert Reader(html).count("script") == 0


def test_examples_are_fair_shares_and_say_so(tmp_path):
    chosen = choose_examples(BEFORE, AFTER, metric="em", n=20)
    assert {fate: len(rows) for fate, rows in chosen.items()} == {"gained": 6, "lost": 2, "wrong": 6, "right": 6}
    assert chosen == choose_examples(BEFORE, AFTER, metric="em", n=20)
    assert chosen != choose_examples(BEFORE, AFTER, metric="em", n=20, seed=1)
    for fate, indices in chosen.items():
        assert all(
            FATES[i] == {"gained": (0, 1), "lost": (1, 0), "wrong": (0, 0), "right": (1, 1)}[fate] for i in indices
        )
    html = report(tmp_path)
    assert html.count("<article>") == 20
    assert (
        "20 of 40 questions, drawn with a fixed seed in fair shares: 6 of 6 wrong before, right after; 2 of 2 right "
        "before, wrong after; 6 of 12 wrong before and after; 6 of 20 right before and after."
    ) in Reader(html).said


@pytest.mark.parametrize(("n", "shown"), [(0, 0), (3, 3), (40, 40), (1000, 40)])
def test_number_of_examples(tmp_path, n, shown):
    assert report(tmp_path, n_examples=n).count("<article>") == shown
    assert sum(map(len, choose_examples(BEFORE, AFTER, metric="em", n=n).values())) == shown


def test_undefined_metric_is_no_fate():
    assert not any(choose_examples(BEFORE, AFTER, metric="mrr@10", n=5).values())


def test_an_example_shows_everything(tmp_path):
    after = row(0, True, reply="Elmton, clearly.\nAnswer: Mira")
    html = report(tmp_path, before_rows=[row(0, False)], after_rows=[after])
    card = Reader(html.split("<article>")[1].split("</article>")[0])
    assert "1. wrong before, right after · q0" in card.said
    assert "Accepted: Mira | the Mira" in card.said
    assert "Before: wrong Orl" in card.said
    assert "After: right Mira" in card.said
    assert "Elmton, clearly. Answer: Mira" in card.said
    assert "2 passages shown, 1 of 1 gold document among them" in card.said
    assert card.count("li", **{"class": "gold"}) == 1
    assert card.said.index("[1] Galton") < card.said.index("[2] Elmton")
    assert "d2 · score 0.800 · gold" in card.said
    assert "em 0.000 1.000" in card.said
    assert "mrr@10 – –" in card.said
    assert "reward: em 0.000 1.000" in card.said
    assert "reward: groundedness – –" in card.said


def test_other_passages_after_training_are_both_shown(tmp_path):
    after = row(0, True)
    after["passages"] = after["passages"][1:]
    said = Reader(report(tmp_path, before_rows=[row(0, False)], after_rows=[after])).said
    assert "2 passages shown before, 1 of 1 gold document among them" in said
    assert "1 passage shown after, 1 of 1 gold document among them" in said


def test_missed_gold_and_unknown_gold(tmp_path):
    said = Reader(report(tmp_path, before_rows=[row(0, False, gold=("d9", "d2"))], after_rows=[row(0, False)])).said
    assert "1 of 1 gold document among them" in said
    said = Reader(report(tmp_path, before_rows=[row(0, False)], after_rows=[row(0, False, gold=())])).said
    assert "2 passages shown Galton" not in said
    assert "2 passages shown" in said


def test_no_answer_and_long_reply(tmp_path):
    after = row(0, False, reply="<think>" + "hm " * 500)
    after["answer"] = None
    said = Reader(report(tmp_path, before_rows=[row(0, False)], after_rows=[after])).said
    assert "After: wrong no answer" in said
    assert "Whole reply, 1,507 characters" in said


def test_other_questions_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError, match="not about the same questions"):
        report(tmp_path, after_rows=AFTER[::-1])
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        report(tmp_path / "missing")


def test_one_side_only(tmp_path):
    summary = {**SUMMARY, "status": "running", "after": {}, "ci95": {}}
    said = Reader(report(tmp_path, summary=summary, after_rows=[])).said
    assert "This run is not complete (status: running)" in said
    assert "exact match was 0.550 before training; there is no figure to compare it with" in said
    assert "After: " not in said


def test_nothing_measured_nothing_logged(tmp_path):
    said = Reader(report(tmp_path, summary={}, before_rows=[], after_rows=[], log_history=[], config={})).said
    assert "Nothing was measured." in said
    assert "The trainer logged nothing." in said
    assert "No rows were kept." in said
    assert "The command was not recorded." in said


def test_a_retriever_run_is_about_ranking(tmp_path):
    def ranked(i, gain):
        return {**row(i, False), "reply": "", "answer": None, "scores": {"ndcg@10": gain, "recall@10": gain}}

    before, after = [ranked(0, 0.2), ranked(1, 0.9)], [ranked(0, 0.8), ranked(1, 0.9)]
    summary = {"status": "complete", "before": mean_metrics(before), "after": mean_metrics(after), "n_eval": 2}
    said = Reader(report(tmp_path, summary=summary, before_rows=before, after_rows=after)).said
    assert "discounted gain of the ranking, first 10 rose from 0.550 to 0.850" in said
    assert "Right means ndcg@10 (discounted gain of the ranking, first 10) of at least 0.5." in said


# ---- chains


def chain(i, right, **more):
    """A row of a reasoner."""
    found = row(i, right)
    found["scores"] |= {"steps": 3.0, "searches": 2.0}
    found["steps"] = [
        {
            "analysis": "I need the home.",
            "query": "Where does he live?",
            "doc_ids": ["d1", "d2"],
            "scores": {"mine": 0.25},
        },
        {"analysis": "It is not there.", "query": "Where <else>?", "doc_ids": []},
        {"analysis": "He lives in Elmton.", "answer": found["answer"]},
    ]
    return {**found, **more}


CHAINS = [chain(i, old) for i, (old, _) in enumerate(FATES)], [chain(i, new) for i, (_, new) in enumerate(FATES)]


def test_chains_are_shown_step_by_step(tmp_path):
    html = report(tmp_path, before_rows=CHAINS[0], after_rows=CHAINS[1], n_examples=1)
    article = re.search(r"<article>.*?</article>", html, re.S).group()
    assert article.count('<ol class="chain">') == 2, "before and after"
    said = Reader(article).said
    step = "I need the home. · mine 0.250 Query Where does he live? 2 passages found, 1 of 1 gold document among them"
    assert said.count(step) == 2
    assert said.count("It is not there. Query Where <else>? No documents found. He lives in Elmton. Answer") == 2
    # Documents stand at the step that found them, and nowhere else.
    assert said.count("Galton lies on the Orl.") == 2
    assert "passages shown" not in said
    assert "It lies there. Answer:" not in said, "the reply as it was is in the rows"


def test_steps_that_could_not_be_read_and_chains_that_were_dropped(tmp_path):
    bad = chain(0, False, answer=None, failure="HTTP <400>")
    bad["steps"] = [*bad["steps"][:1], {"text": "Step 2: <b>hm", "problem": "no 'The problem analysis:'"}]
    html = report(tmp_path, before_rows=[bad], after_rows=[bad])
    said = Reader(html).said
    assert "Not a step: no 'The problem analysis:' Step 2: <b>hm Dropped: HTTP <400>" in said


def test_counts_are_neither_better_nor_worse(tmp_path):
    summary = {
        "status": "complete",
        "before": {"em": 0.5, "steps": 2.0, "searches": 1.0, "passages": 3.0},
        "after": {"em": 0.6, "steps": 3.0, "searches": 0.5, "passages": 3.0},
        "ci95": {"em": [0.05, 0.15], "steps": [0.8, 1.2], "searches": [-0.7, -0.3], "passages": [0.0, 0.0]},
    }
    html = report(tmp_path, summary=summary).split("<h2>Training")[0]
    rows = {r.split("<small>")[0].rsplit(">", 1)[-1]: r for r in re.findall(r"<tr.*?</tr>", html, re.S)}
    assert "All metrics but steps, searches and passages lie between 0 and 1" in html
    assert "steps a question" in rows["steps"]
    assert "<td></td><td>more, 0 excluded</td>" in rows["steps"]
    assert "<td></td><td>fewer, 0 excluded</td>" in rows["searches"]
    assert "<td></td><td>unchanged</td>" in rows["passages"]
    # The axis is that of the other metrics.
    assert "+0.15</text>" in html
    assert "better" in rows["em"]


def test_baselines(tmp_path):
    over = {"em": {"difference": 0.2, "ci95": [0.1, 0.3]}, "f1": {"difference": -0.01, "ci95": [-0.05, 0.03]}}
    summary = {
        **SUMMARY,
        "baselines": {"one_shot": {"em": 0.45, "f1": 0.66, "format": 1.0}, "mine<1>": {"em": 0.1, "f1": 0.2}},
        "over_baselines": {"one_shot": over, "mine<1>": {"em": {"difference": 0.55, "ci95": [0.4, 0.7]}}},
    }
    html = report(tmp_path, summary=summary)
    section = re.search(r"<section><h2>Against baselines.*?</section>", html, re.S).group()
    rows = [Reader(r).said for r in re.findall(r"<tr.*?</tr>", section, re.S)][1:]
    assert rows == [
        "one_shot · one search, all passages at once",
        "em exact match 0.450 0.650 +0.200 +0.100 to +0.300 better , 0 excluded",
        "f1 token F1 0.660 0.650 −0.010 −0.050 to +0.030 0 inside: may be chance",
        "mine<1>",
        "em exact match 0.100 0.650 +0.550 +0.400 to +0.700 better , 0 excluded",
    ]
    heads = re.findall(r"<h2>(.*?)</h2>", html)
    assert heads.index("Against baselines") == heads.index("Before and after") + 1
    assert "Against baselines" not in report(tmp_path)


def test_baselines_in_words():
    assert baseline_words("no_retrieval_other_model") == "no passages, the model alone, another model"
    assert baseline_words("mine") == "mine"


def test_main_metric():
    assert pick_main_metric({"before": {"f1": 1, "em": 1}, "after": {"f1": 1, "em": 1}}) == "em"
    assert pick_main_metric({"before": {"em": 1, "f1": 1}, "after": {"f1": 1}}) == "f1"
    assert pick_main_metric({"after": {"mine": 1}}) == "mine"
    assert pick_main_metric({}) is None


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.4, "is +0.100 to +0.400: 0 lies outside"),
        (-0.1, 0.4, "is −0.100 to +0.400: 0 lies inside"),
        (0.0, 0.4, "is 0.000 to +0.400: 0 lies inside"),
    ],
)
def test_interval_in_words(low, high, said):
    assert said in change_in_words({"before": {"em": 0.5}, "after": {"em": 0.75}, "ci95": {"em": [low, high]}}, "em")


def test_fall_and_standstill_in_words():
    assert "fell from 0.750 to 0.500 (−0.250)" in change_in_words({"before": {"em": 0.75}, "after": {"em": 0.5}}, "em")
    assert "stayed at 0.500" in change_in_words({"before": {"em": 0.5}, "after": {"em": 0.5}}, "em")


def test_configuration_and_command(tmp_path):
    said = Reader(report(tmp_path)).said
    assert "3 settings" in said
    assert "learning_rate: 0.0003" in said
    assert "output_dir: runs/x" in said
    assert (
        "accelerate launch recipes/grpo_generator.py --config recipes/configs/grpo_generator/tiny.yaml --seed 7"
        in said
    )
    assert "make demo" in Reader(report(tmp_path, command="make demo")).said


def test_replaces_the_old_report_and_leaves_no_half_file(tmp_path):
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    after = [{**AFTER[0], "reply": "broken \ud800 surrogate"}, *AFTER[1:]]
    assert "broken ? surrogate" in report(tmp_path, after_rows=after, n_examples=40)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# The page inside frames of a phone's and a desktop's width, everything folded open; what it measures stands in <pre>.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><body><pre id="out">[]</pre><script>
const found = [];
function look(frame) {{
  const doc = frame.contentDocument, root = doc.documentElement;
  doc.querySelectorAll("details").forEach(d => d.open = true);
  const wide = [...doc.querySelectorAll("main *")].filter(e => !e.closest(".scroll") &&
    e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + "." + e.className);
  found.push({{width: root.clientWidth, scroll: root.scrollWidth, wide: wide,
    cards: doc.querySelectorAll("article").length, scripts: doc.scripts.length,
    margin: getComputedStyle(doc.body).marginTop,
    scrolls: [...doc.querySelectorAll(".scroll")].some(e => e.scrollWidth > e.clientWidth)}});
  document.getElementById("out").textContent = JSON.stringify(found);
}}
</script>
{frames}
</body>"""


def test_no_horizontal_overflow_in_a_browser(tmp_path):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no chromium on the PATH: nobody looks at the layout")
    word = "x" * 400
    after = json.loads(json.dumps(AFTER))
    for one in after:
        one.update(question=f"{word}?", reply=word * 3, answer=word, answers=[word])
        one["passages"][0].update(text=word, title=word, doc_id=word)
        one["rewards"][word[:80]] = 0.5
    for one in after[::2]:
        one["steps"] = [{"analysis": word, "query": word, "doc_ids": ["d1"]}, {"text": word, "problem": word}]
    html = report(
        tmp_path,
        title=f"A title with {word[:90]}",
        after_rows=after,
        log_history=[*LOG, {"step": 31, f"my_own_{word[:60]}": 1.0}],
        config={"model_name_or_path": word},
        command=word,
        notes=[word],
    )
    widths = (360, 390, 768, 1200)
    frames = "".join(
        f'<iframe style="width:{w}px;height:900px;border:0" onload="look(this)" srcdoc="{escape(html)}"></iframe>'
        for w in widths
    )
    page = tmp_path / "probe.html"
    page.write_text(PROBE.format(frames=frames), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars "
        "--window-size=1400,1000 --virtual-time-budget=20000 --dump-dom"
    )
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
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
        assert one["cards"] == 20
        assert one["scripts"] == 0
        assert one["margin"] == "0px"  # its own style sheet passes its own content policy
    # On a phone the wide table scrolls inside its container.
    assert next(one for one in found if one["width"] == 390)["scrolls"]


def test_further_sections_stand_between_curves_and_examples(tmp_path):
    page = report(tmp_path, sections=["<section><h2>Agreement &amp; more</h2></section>"])
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads.index("Training") + 1 == heads.index("Agreement &amp; more") == heads.index("Examples") - 1


def test_a_card_of_two_other_sides():
    other = [{"doc_id": "d7", "title": "", "text": "Borton.", "score": 0.1}]
    one, two = row(0, False), {**row(0, True), "passages": other}
    said = Reader(example_card(3, "wrong by a<b, right by c", one, two, "em", ("a<b", "c"))).said
    assert "3. wrong by a<b, right by c · q0" in said
    assert "a<b: wrong Orl" in said
    assert "2 passages shown by a<b, 1 of 1 gold document among them" in said
    assert "1 passage shown by c, 0 of 1 gold document among them" in said
    assert said.index("shown by a<b") < said.index("c: right"), "each under its own answer"


def test_a_card_of_a_chain_and_a_single_answer():
    steps = [{"analysis": "a", "query": "b", "doc_ids": ["d1", "d2"]}, {"analysis": "c", "answer": "Mira"}]
    chain = {**row(0, True), "steps": steps}
    said = Reader(example_card(1, "gained", row(0, False), chain, "em", ("once", "chain"))).said
    assert "2 passages shown by once" in said
    assert "2 passages found, 1 of 1 gold document among them" in said


def test_where_nobody_answers_no_answer_is_missed():
    searched = {**row(0, False), "answer": None, "reply": "", "scores": {"ndcg@10": 0.4}}
    assert "no answer" not in Reader(example_card(1, "wrong", None, searched, "ndcg@10")).said
    silent = {**row(0, False), "answer": None, "reply": ""}
    assert "no answer" in Reader(example_card(1, "wrong", None, silent, "em")).said


def test_page_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="its folder does not exist"):
        write_page(tmp_path / "none" / "page.html", title="t", body="")
