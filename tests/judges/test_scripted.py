from __future__ import annotations

import asyncio

import pytest

from rag_rl.errors import DataError
from rag_rl.judges.scripted import ScriptedJudge
from rag_rl.types import Judge, JudgeCase, Verdict


def case(answer: str) -> JudgeCase:
    return JudgeCase("Which river?", answer)


def judge(scripted: ScriptedJudge, *answers: str) -> list[Verdict]:
    return asyncio.run(scripted.judge([case(answer) for answer in answers]))


def test_by_answer() -> None:
    scripted = ScriptedJudge({"Mira": 1.0, "Elm": Verdict(0.0, "another river"), "?": None})
    assert isinstance(scripted, Judge)
    assert judge(scripted, "Elm", "Mira", "?") == [
        Verdict(0.0, "another river"),
        Verdict(1.0, "scripted"),
        Verdict(None, "scripted"),
    ]
    assert [c.answer for c in scripted.cases] == ["Elm", "Mira", "?"]
    with pytest.raises(DataError, match="no verdict is scripted for the answer 'Falbert'"):
        judge(scripted, "Falbert")


def test_in_order_over_all_calls() -> None:
    scripted = ScriptedJudge([1.0, 0.0, 0.5])
    assert [v.score for v in judge(scripted, "a", "b")] == [1.0, 0.0]
    assert [v.score for v in judge(scripted, "a")] == [0.5]
    assert judge(scripted) == []
    with pytest.raises(DataError, match="all 3 scripted verdicts are used up; asked for another by 'c'"):
        judge(scripted, "c")


def test_by_a_function() -> None:
    scripted = ScriptedJudge(lambda asked: float(len(asked.answer) > 3))
    assert [v.score for v in judge(scripted, "Elm", "Mira")] == [0.0, 1.0]
