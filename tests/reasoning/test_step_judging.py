"""Cases for the rubrics, one call for all steps, and rewards out of verdicts."""

from __future__ import annotations

import asyncio
import random

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.judges import ScriptedJudge
from rag_rl.reasoning import (
    STEP_RUBRICS,
    StepRecord,
    StepScorer,
    StepTrajectory,
    add_gold_gains,
    answer_case,
    chain_rewards,
    judge_answers,
    judge_steps,
    mean_score,
    parse_step,
    render_documents,
    render_step,
    step_cases,
    step_reward_rule,
)
from rag_rl.tiny.lessons import step_text
from rag_rl.tiny.oracle import OracleJudge
from rag_rl.tiny.world import RELATION, draw_world, questions
from rag_rl.types import Hit, JudgeCase, Passage, Question, Verdict

QUESTION = Question("q1", "Which river is the home of Falbert on?", ("Mirbrook", "the Mir"), ("d1", "d3"))
D = {name: Passage(name, f"Text of {name}.") for name in ("d1", "d2", "d3")}


def record(number, action, found=()):
    label = "The final answer" if action.startswith("=") else "The retrieval query"
    text = f"Step {number}:\nThe problem analysis: analysis {number}\n{label}: {action.lstrip('=')}"
    hits = [Hit(D[name], 1.0, rank) for rank, name in enumerate(found, start=1)]
    return StepRecord(number, text, parse_step(text).step, hits=hits)


def chain(*actions, state=None, **more):
    """ "one?:d1 d2" is a query and what it found, "=x" an answer, "" an invalid step."""
    steps = []
    for number, action in enumerate(actions, start=1):
        if not action:
            steps.append(StepRecord(number, "no step", None, "why"))
            continue
        text, _, found = action.partition(":")
        steps.append(record(number, text, found.split()))
    return StepTrajectory(QUESTION, steps, state, **more)


def judged(*args, **more):
    return asyncio.run(judge_steps(*args, **more))


def test_what_a_case_holds():
    trajectory = chain("one?:d1 d2", "two?:", "=Mirbrook", state="correct")
    first, second, last = trajectory.steps
    shown = f"{render_step(first.step)}\n{render_documents([D['d1'], D['d2']])}"
    assert step_cases([trajectory], "document_relevance") == [
        (
            first,
            JudgeCase(
                QUESTION.question,
                "one?",
                passages=("Text of d1.", "Text of d2."),
                meta={"analysis": "analysis 1", "query": "one?", "history": ""},
            ),
        ),
        (
            second,
            JudgeCase(QUESTION.question, "two?", meta={"analysis": "analysis 2", "query": "two?", "history": shown}),
        ),
    ]
    coherence = step_cases([trajectory], "reasoning_coherence")
    assert [case.answer for _, case in coherence] == ["analysis 1", "analysis 2", "analysis 3"]
    assert coherence[2][0] is last
    assert coherence[2][1].meta["query"] == ""
    assert coherence[2][1].meta["history"] == f"{shown}\n{render_step(second.step)}\n{render_documents([])}"


def test_nothing_is_asked_about_invalid_steps_and_dropped_chains():
    chains = [chain("one?:d1", "", state="invalid"), chain("one?:d1", failure="refused")]
    assert [len(step_cases(chains, rubric)) for rubric in STEP_RUBRICS] == [1, 1, 1]


def test_one_call_a_rubric_over_all_steps_of_all_chains():
    class Counting(ScriptedJudge):
        calls = 0

        async def judge(self, cases):
            self.calls += 1
            return await super().judge(cases)

    chains = [chain("one?:d1", "two?:d2", "=x", state="incorrect"), chain("two?:d3", state="fail")]
    judges = {
        "document_relevance": Counting([0.25, None, 0.75]),
        "query_rationality": Counting({"one?": 1.0, "two?": 0.0}),
        "reasoning_coherence": Counting(lambda case: 0.5),
    }
    assert judged(chains, judges) == 1
    assert [judge.calls for judge in judges.values()] == [1, 1, 1]
    assert [r.scores for r in chains[0].steps] == [
        {"document_relevance": 0.25, "query_rationality": 1.0, "reasoning_coherence": 0.5},
        {"document_relevance": None, "query_rationality": 0.0, "reasoning_coherence": 0.5},
        {"reasoning_coherence": 0.5},
    ]
    assert mean_score(chains, "document_relevance") == 0.5
    assert mean_score(chains, "gold_gain") is None
    assert chain_rewards(chains[0], step_reward_rule("paper")) == [0.2, None, 0.0]
    assert chain_rewards(chains[0], step_reward_rule("coherence")) == [0.44, None, 0.0]
    assert chain_rewards(chains[1], step_reward_rule("coherence")) == [0.405]


def test_an_empty_search_is_zero_without_asking():
    judge = ScriptedJudge([])
    trajectory = chain("one?:", state="fail")
    assert judged([trajectory], {"document_relevance": judge}) == 0
    assert trajectory.steps[0].scores == {"document_relevance": 0.0}
    assert judge.cases == []


def test_a_shared_step_is_judged_once():
    whole = chain("one?:d1", "two?:d2", state="fail")
    twins = [StepTrajectory(QUESTION, whole.steps[:1], "fail"), whole]
    judge = ScriptedJudge([0.5, 0.6])
    judged(twins, {"document_relevance": judge})
    assert [r.scores["document_relevance"] for r in whole.steps] == [0.5, 0.6]
    judged(twins, {"document_relevance": judge})
    assert len(judge.cases) == 2


def test_a_broken_judge_is_no_score():
    class Down:
        async def judge(self, cases):
            raise BackendError("judge at http://127.0.0.1:1 is down")

    trajectory = chain("one?:d1", state="fail")
    with pytest.raises(BackendError, match="is down"):
        judged([trajectory], {"document_relevance": Down()})
    assert trajectory.steps[0].scores == {}
    with pytest.raises(BackendError, match="is down"):
        asyncio.run(judge_answers([chain("=x", state="incorrect")], Down()))


def test_answers_are_compared_first_and_asked_about_then():
    said = ["=the Mir", "=on the Mir, it is", "=Kelsabeck", "=who knows"]
    chains = [chain(answer, state="incorrect") for answer in said]
    chains += [chain("", state="invalid"), chain("one?:d1", state="fail"), chain("=x", failure="refused")]
    judge = ScriptedJudge([Verdict(0.5), Verdict(0.49), Verdict(None, "unreadable")])
    assert asyncio.run(judge_answers(chains, judge)) == 1
    assert [c.state for c in chains] == ["correct", "correct", "incorrect", None, "invalid", "fail", None]
    assert [case.answer for case in judge.cases] == [answer[1:] for answer in said[1:]]
    assert chain_rewards(chains[3], step_reward_rule("paper")) == [None]
    without = StepTrajectory(Question("q", "Who?", ()), chain("=x").steps)
    assert asyncio.run(judge_answers([without], ScriptedJudge([]))) == 0
    assert without.state is None


def test_the_case_of_an_answer():
    trajectory = chain("one?:d1 d2", "two?:d2 d3", "=Mir", state="incorrect")
    passages = ("Text of d1.", "Text of d2.", "Text of d3.")
    assert answer_case(trajectory) == JudgeCase(QUESTION.question, "Mir", ("Mirbrook", "the Mir"), passages)
    assert answer_case(chain("", state="invalid")).answer == ""


def test_gold_gains_need_no_judge():
    trajectory = chain("one?:d1 d2", "two?:d1", "three?:d3", "=Mirbrook", state="correct")
    add_gold_gains([trajectory])
    assert chain_rewards(trajectory, step_reward_rule("gold_gain")) == [0.8, 0.0, 0.8, 2.0]


def test_rewards_of_dropped_and_open_chains():
    rule = step_reward_rule("outcome_only")
    assert chain_rewards(chain("one?:d1", failure="refused"), rule) == [None]
    assert chain_rewards(chain("one?:d1", "", state="invalid"), rule) == [0.0, -0.9]
    with pytest.raises(ConfigError, match="'q1' is still open"):
        chain_rewards(chain("one?:d1"), rule)


def test_the_oracle_of_the_tiny_world_reads_these_cases():
    world = draw_world(5, region="demo", sizes={"person": 12, "town": 8, "guild": 6, "river": 6})
    passages = {passage.doc_id: passage for passage in world.passages}
    chains = []
    for question in list(questions(world, hops=2, rng=random.Random(0)))[:20]:
        relations, names = [RELATION[name] for name in question.meta["relations"]], question.meta["chain"]
        records = []
        for hop in range(3):
            text = step_text(hop, relations, names)
            hits = [Hit(passages[world.doc_id(names[hop])], 1.0, 1)] if hop < 2 else []
            records.append(StepRecord(hop + 1, text, parse_step(text, hop + 1).step, hits=hits))
        chains.append(StepTrajectory(question, records, "incorrect"))
    assert judged(chains, {rubric: OracleJudge(rubric) for rubric in STEP_RUBRICS}) == 0
    assert [mean_score(chains, rubric) for rubric in STEP_RUBRICS] == [1.0, 1.0, 1.0]
    asyncio.run(judge_answers(chains, OracleJudge()))
    assert all(chain_rewards(c, step_reward_rule("coherence")) == [1.6, 1.6, 2.0] for c in chains)

    for c in chains:  # the second query without what the first one has found
        c.steps[0].hits, c.steps[1].scores = [], {}
    judged(chains, {rubric: OracleJudge(rubric) for rubric in STEP_RUBRICS})
    assert {c.steps[1].scores["query_rationality"] for c in chains} == {0.0}
    assert {c.steps[1].scores["reasoning_coherence"] for c in chains} == {0.0}


# -------------------------------------------------------------------------------------------------------- the scorer


def test_a_scorer_judges_and_rewards():
    played = [chain("one?:d1", "two?:d2", "=Abe", state="incorrect"), chain("one?:d1", state="fail")]
    judge = ScriptedJudge([0.6, 0.8, 0.5])
    scorer = StepScorer(
        step_reward_rule("paper"), {"document_relevance": judge}, answer_judge=ScriptedJudge({"Abe": 1.0})
    )
    for _ in range(2):  # scored again, nobody is asked again about a step
        scorer.score(played)
    assert [scorer.rewards(one) for one in played] == [[0.96, 1.28, 2.0], [0.45]]
    assert len(judge.cases) == 3

    async def in_a_notebook():
        scorer.score(played)

    asyncio.run(in_a_notebook())


@pytest.mark.parametrize(("pass_mark", "state"), [(0.5, "correct"), (0.7, "correct"), (0.8, "incorrect")])
def test_the_mark_from_which_on_an_answer_is_right(pass_mark, state):
    played = chain("one?:d1", "=Abe", state="incorrect")
    rule = step_reward_rule("outcome_only")
    StepScorer(rule, answer_judge=ScriptedJudge({"Abe": 0.7}), pass_mark=pass_mark).score([played])
    assert played.state == state


def test_a_scorer_without_a_judge_gains_gold():
    played = chain("one?:d1", "=Mir", state="correct")
    scorer = StepScorer(step_reward_rule("gold_gain"))
    scorer.score([played])
    assert scorer.rewards(played) == [0.8, 2.0]
    with pytest.raises(ConfigError, match="needs verdicts on document_relevance: name a judge"):
        StepScorer(step_reward_rule("paper"))


@pytest.mark.parametrize("state", ["correct", "incorrect", "invalid"])
def test_the_control_rewards_everything_alike(state):
    played = chain("one?:d1", "" if state == "invalid" else "=Mir", state=state)
    assert StepScorer(step_reward_rule("constant")).rewards(played) == [1.0, 1.0]
