"""The judged reward: verdicts become rewards, and nothing else does."""

from __future__ import annotations

import asyncio
import inspect
import math
from typing import Any

import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.judges.llm import LLMJudge, Reply
from rag_rl.judges.rubrics import load_rubric
from rag_rl.judges.scripted import ScriptedJudge
from rag_rl.rewards.answer import em
from rag_rl.rewards.combine import RewardPart, combine
from rag_rl.rewards.judged import judged_reward
from rag_rl.tiny.oracle import OracleJudge
from rag_rl.types import JudgeCase, Prompt, Verdict

QUESTION = "Which river?"
COMPLETIONS: list[Any] = ["Answer: Mira [2]", [{"role": "assistant", "content": "so\nAnswer: Elm"}], "Answer:", "?"]


def run(reward: Any, completions: list[Any] = COMPLETIONS, **columns: Any) -> list[float | None]:
    filled = {"question": [QUESTION] * len(completions), "prompts": [""] * len(completions), **columns}
    return asyncio.run(reward(completions=completions, **filled))


def test_it_is_what_trl_runs_concurrently() -> None:
    reward = judged_reward(ScriptedJudge([]), name="style")
    assert inspect.iscoroutinefunction(reward)
    assert reward.__name__ == "style"


def test_verdicts_in_order_and_none_where_there_is_none() -> None:
    judge = ScriptedJudge({"Mira": 0.75, "Elm": None, "?": 0.0})
    reward = judged_reward(judge, without_citations=True)
    # No answer: 0.0, and the judge is not asked.
    assert run(reward) == [0.75, None, 0.0, 0.0]
    assert judge.cases == [JudgeCase(QUESTION, "Mira"), JudgeCase(QUESTION, "Elm"), JudgeCase(QUESTION, "?")]
    assert run(reward, ["Answer:", "<think>Mira"]) == [0.0, 0.0]
    assert len(judge.cases) == 3


def test_columns_go_where_the_rubrics_look() -> None:
    judge = ScriptedJudge([1.0, 1.0])
    columns = {"answers": [["Mira"], ["Elm", "the Elm"]], "passages": [["p1", "p2"], []], "analysis": ["a", "b"]}
    assert run(judged_reward(judge, answer_marker="", meta_columns=["analysis"]), ["x\ny", "z"], **columns) == [
        1.0,
        1.0,
    ]
    assert judge.cases == [
        JudgeCase(QUESTION, "x\ny", ("Mira",), ("p1", "p2"), {"analysis": "a"}),
        JudgeCase(QUESTION, "z", ("Elm", "the Elm"), (), {"analysis": "b"}),
    ]
    with pytest.raises(DataError, match="needs the column 'analysis'"):
        run(judged_reward(judge, meta_columns=["analysis"]))
    with pytest.raises(DataError, match="reward 'judged' needs the column 'question'"):
        asyncio.run(judged_reward(judge)(completions=["x"]))
    with pytest.raises(DataError, match="'answers' must hold lists of texts"):
        run(judged_reward(judge), answers=["Mira"] * 4)
    with pytest.raises(ConfigError, match="answers, question stands in every case already"):
        judged_reward(judge, meta_columns=["answers", "query", "question"])


def test_what_is_logged() -> None:
    logged: list[tuple[str, float]] = []

    def log_metric(name: str, value: float) -> None:
        logged.append((name, value))

    reward = judged_reward(ScriptedJudge({"a": 1.0, "b": 0.5, "?": None}), answer_marker="")
    for completions in (["?"], ["a", "b", "?", "a"], ["?", "?"], [""]):
        run(reward, completions, log_metric=log_metric)
    run(reward, [], log_metric=log_metric)
    assert [name for name, _ in logged] == ["judge/judged/readable", "judge/judged/mean"] * 4
    assert [value for name, value in logged if name.endswith("readable")] == [0.0, 0.75, 0.0, 1.0]
    means = [value for name, value in logged if name.endswith("mean")]
    assert math.isnan(means[0])
    assert means[1:] == [pytest.approx(2.5 / 3)] * 3  # the last known, where there is none


@pytest.mark.parametrize("score", [1.5, -0.5, math.nan])
def test_a_judge_that_breaks_its_word_is_no_score(score: float) -> None:
    with pytest.raises(BackendError, match=r"judge 'judged' returned the score .*: expected \[0, 1\], or None"):
        run(judged_reward(ScriptedJudge(lambda _: score)))


def test_a_judge_that_loses_cases_is_no_score() -> None:
    class Short:
        async def judge(self, cases: Any) -> list[Verdict]:
            return [Verdict(1.0)]

    with pytest.raises(BackendError, match="returned 1 verdicts for 3 cases"):
        run(judged_reward(Short()))


def test_a_dead_judge_stops_the_run() -> None:
    class Dead:
        async def judge(self, cases: Any) -> list[Verdict]:
            raise BackendError("the endpoint is gone")

    parts = [RewardPart("judged", judged_reward(Dead()), 1.0), RewardPart("em", em(), 1.0)]
    with pytest.raises(BackendError, match="the endpoint is gone"):
        run(combine(parts), answers=[["Mira"]] * 4)


def test_beside_exact_rewards() -> None:
    judge = ScriptedJudge({"Mira": 1.0, "Elm": None, "?": 0.5})
    answers = [["Mira"]] * 4
    optional = combine([RewardPart("em", em(without_citations=True)), RewardPart("judge", judged_reward(judge), 0.5)])
    with pytest.raises(DataError, match="no verdict is scripted for the answer 'Mira \\[2\\]'"):
        run(optional, answers=answers)
    part = judged_reward(judge, without_citations=True)
    parts = [RewardPart("em", em(without_citations=True)), RewardPart("judge", part, 0.5)]
    assert run(combine(parts), answers=answers) == [1.5, 0.0, 0.0, 0.25]
    parts[1] = RewardPart("judge", part, 0.5, required=True)
    assert run(combine(parts), answers=answers) == [1.5, None, 0.0, 0.25]


def test_with_the_oracle() -> None:
    completions = ["Answer: It is tin, I am sure.", "Answer: wool", "Answer: wool or tin"]
    reward = judged_reward(OracleJudge())
    assert run(reward, completions, answers=[["tin"]] * 3) == [1.0, 0.0, 0.0]


class Chat:
    """Says what it is told, with the prompt's code."""

    name = model = "told"

    def __init__(self, score: str) -> None:
        self.score = score

    async def complete(self, prompt: Prompt) -> Reply:
        content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        code = content.partition("bear the code ")[2][:8]
        return Reply(f'{{"code": "{code}", "score": {self.score}}}')


def test_with_a_language_model_judge() -> None:
    for written, score in (("1", 1.0), ("0.5", None), ("NaN", None)):
        judge = LLMJudge(Chat(written), load_rubric("answer_correctness"))
        try:
            assert run(judged_reward(judge), answers=[["Mira"]] * 4) == [score, score, 0.0, score]
        finally:
            judge.close()
