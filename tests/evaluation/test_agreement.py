"""Agreement: figures worked by hand, an independent kappa, and a section that shows them."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser

import pytest

from rag_rl.errors import DataError
from rag_rl.evaluation.agreement import agreement_section, agreement_with_em, cohen_kappa, judge_agreement
from rag_rl.types import Verdict


def test_by_hand() -> None:
    # 3 agree on pass, 1 only the judge, 2 only the other, 4 agree on fail; chance = .4 * .5 + .6 * .5 = .5
    judge = [1.0] * 3 + [1.0] + [0.0] * 2 + [0.0] * 4
    other = [1.0] * 3 + [0.0] + [1.0] * 2 + [0.0] * 4
    found = judge_agreement(judge, other)
    low, high = found.pop("kappa_ci95")
    assert found == {
        "cases": 10,
        "readable": 1.0,
        "other_readable": 1.0,
        "compared": 10,
        "table": {"both_pass": 3, "judge_only": 1, "other_only": 2, "both_fail": 4},
        "accuracy": 0.7,
        "kappa": pytest.approx(0.4),
    }
    assert -0.3 < low < 0.4 < high <= 1.0
    json.dumps(found)


def test_verdicts_without_a_score_are_counted_and_left_out() -> None:
    verdicts = [Verdict(0.61), Verdict(0.59), Verdict(None, "no JSON"), Verdict(0.9)]
    found = judge_agreement(verdicts, [1.0, 0.0, 1.0, None], pass_mark=0.6)
    assert found["table"] == {"both_pass": 1, "judge_only": 0, "other_only": 0, "both_fail": 1}
    assert (found["cases"], found["compared"], found["readable"], found["other_readable"]) == (4, 2, 0.75, 0.75)
    assert (found["accuracy"], found["kappa"]) == (1.0, 1.0)
    assert judge_agreement([0.5], [0.4], other_pass_mark=0.4)["table"]["both_pass"] == 1  # the mark itself passes


def test_kappa_is_that_of_an_independent_library() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = random.Random(0)
    for _ in range(50):
        pairs = [(rng.random() < 0.7, rng.random() < 0.4) for _ in range(rng.randint(5, 60))]
        counts = [pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
        if counts[0] in (0, len(pairs)) or counts[3] in (0, len(pairs)):
            continue
        assert cohen_kappa(*counts) == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [((5, 0, 0, 5), 1.0), ((0, 5, 5, 0), -1.0), ((9, 1, 0, 0), 0.0), ((25, 25, 25, 25), 0.0), ((0, 7, 0, 0), 0.0)],
)
def test_limits_of_kappa(counts: tuple[int, int, int, int], kappa: float) -> None:
    assert cohen_kappa(*counts) == kappa


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (7, 0, 0, 0), (0, 0, 0, 7)])
def test_where_kappa_is_undefined(counts: tuple[int, int, int, int]) -> None:
    assert cohen_kappa(*counts) is None


def test_the_interval_covers_and_shrinks() -> None:
    widths = []
    for times in (1, 16):
        found = judge_agreement([1.0, 1.0, 0.0, 0.0, 0.0] * 4 * times, [1.0, 0.0, 0.0, 0.0, 1.0] * 4 * times)
        low, high = found["kappa_ci95"]
        assert low < found["kappa"] < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.1)
    again = judge_agreement([1.0, 1.0, 0.0, 0.0, 0.0] * 4 * 16, [1.0, 0.0, 0.0, 0.0, 1.0] * 4 * 16)
    assert again["kappa_ci95"] == [low, high]
    # Draws without a kappa (of two cases every other one has none) are left out.
    assert judge_agreement([1.0, 0.0], [1.0, 0.0])["kappa_ci95"] == [1.0, 1.0]


def test_nothing_to_compare() -> None:
    empty = judge_agreement([], [])
    assert (empty["readable"], empty["accuracy"], empty["kappa"], empty["kappa_ci95"]) == (None, None, None, None)
    unread = judge_agreement([None, None], [1.0, 0.0])
    assert (unread["readable"], unread["compared"], unread["accuracy"], unread["kappa"]) == (0.0, 0, None, None)
    with pytest.raises(DataError, match="got 1 of one and 2 of the other"):
        judge_agreement([1.0], [1.0, 0.0])


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.said = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_section_shows_the_figures_and_escapes_the_names() -> None:
    found = judge_agreement([1.0] * 600 + [0.0] * 700 + [None] * 100, ([1.0] * 500 + [0.0] * 100) + [0.0] * 800)
    section = agreement_section(
        "<b>judge</b> & co",
        {
            "exact match": found,
            "<i>oracle</i>": judge_agreement([None], [1.0]),
            "worse": judge_agreement([1.0, 0.0], [0.0, 1.0]),
        },
        note="Judged were the answers after <training>.",
    )
    page = Cells()
    page.feed(section)
    assert page.open == []
    head, exact, oracle, worse = page.rows
    assert head[:3] == ["Compared with", "Readable", "Compared"]
    assert exact[:9] == ["exact match", "92.9%", "1,300 of 1,400", "500", "100", "0", "700", "0.923", "0.843"]
    low, _, high = exact[9].partition(" to ")
    assert float(low) < 0.8434 < float(high)
    assert oracle == ["<i>oracle</i>", "0.0%", "0 of 1", "0", "0", "0", "0", "–", "–", "–"]
    assert worse[7:] == ["0.000", "−1.000", "−1.000 to 0.000"]
    assert "<b>judge</b> & co decides" in page.said
    assert "Judged were the answers after <training>." in page.said
    with pytest.raises(DataError, match="compared with nobody"):
        agreement_section("judge", {})


def test_a_runs_judge_against_exact_match() -> None:
    def row(judged: float | None, em: float | None, answer: str | None = "Mira") -> dict[str, object]:
        return {"answer": answer, "scores": {"em": em}, "rewards": {"judged": judged, "format": 1.0}}

    before = [row(0.7, 1.0), row(0.4, 1.0), row(None, 0.0), row(0.0, 0.0, answer=None)]
    after = [row(0.7, 1.0), row(0.4, 0.0)]
    found = agreement_with_em({"before": before, "after": after}, pass_mark=0.5)
    assert list(found) == ["exact match, before", "exact match, after"]
    assert found["exact match, before"] == judge_agreement([0.7, 0.4, None], [1.0, 1.0, 0.0])
    assert (found["exact match, before"]["cases"], found["exact match, after"]["kappa"]) == (3, 1.0)
    assert agreement_with_em({"after": after}, pass_mark=0.3)["exact match, after"]["table"]["judge_only"] == 1
    # Runs without a judge, and questions that failed and have no rewards.
    assert agreement_with_em({"before": [{"answer": "x", "scores": {"em": 1.0}, "rewards": {}}], "after": []}) == {}
