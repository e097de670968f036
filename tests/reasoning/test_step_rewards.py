"""The reward table, the presets on top of it, and what is None where a verdict is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rag_rl.errors import ConfigError
from rag_rl.reasoning import END_STATES, STEP_REWARD_RULES, gold_gains, step_reward_rule

PAPER = STEP_REWARD_RULES["paper"]


def relevance(*scores):
    return [{"document_relevance": score} for score in scores]


@pytest.mark.parametrize(
    ("state", "scores", "expected"),
    [
        ("correct", [0.60, 0.80], [0.96, 1.28, 2.0]),
        ("incorrect", [0.60, 0.80], [0.48, 0.64, 0.0]),
        ("fail", [0.5] * 5, [0.45] * 5),
        ("invalid", [0.70], [0.70, -0.9]),
        ("invalid", [], [-0.9]),
    ],
)
def test_the_table_of_the_paper(state, scores, expected):
    assert PAPER.rewards(state, relevance(*scores)) == expected


def test_outcome_only():
    rule = step_reward_rule("outcome_only")
    assert rule.rewards("correct", [{}, {}]) == [2.0, 2.0, 2.0]
    assert rule.rewards("incorrect", [{}, {}]) == [0.0, 0.0, 0.0]
    assert rule.rewards("fail", [{}, {}]) == [0.0, 0.0]
    assert rule.rewards("invalid", [{}, {}]) == [0.0, 0.0, -0.9]
    assert rule.needs == ()


def test_process_only():
    rule = step_reward_rule("process_only")
    for state in ("correct", "incorrect"):
        assert rule.rewards(state, relevance(0.6, 0.8)) == [0.6, 0.8, 0.0]
    assert rule.rewards("fail", relevance(0.6)) == [0.6]
    assert rule.rewards("invalid", relevance(0.6)) == [0.6, -0.9]


def test_return_to_go():
    rule = step_reward_rule("return_to_go")
    assert rule.rewards("correct", relevance(0.6, 0.8)) == [4.24, 3.28, 2.0]
    assert replace(rule, discount=0.5).rewards("correct", relevance(0.6, 0.8)) == [2.1, 2.28, 2.0]
    assert rule.rewards("fail", relevance(0.5, 0.5)) == [0.9, 0.45]
    assert rule.rewards("invalid", []) == [-0.9]


def test_coherence_weighs_three_verdicts():
    rule = step_reward_rule("coherence")
    scores = {"reasoning_coherence": 1.0, "query_rationality": 0.5, "document_relevance": 0.25}
    assert rule.needs == ("reasoning_coherence", "query_rationality", "document_relevance")
    assert rule.process_score(scores) == 0.55
    assert rule.rewards("correct", [scores]) == [0.88, 2.0]
    assert rule.rewards("incorrect", [scores]) == [0.44, 0.0]


def test_gold_gain_needs_no_judge():
    rule = step_reward_rule("gold_gain")
    assert rule.needs == ("gold_gain",)
    assert rule.rewards("correct", [{"gold_gain": 0.5}, {"gold_gain": 0.0}]) == [0.8, 0.0, 2.0]


def test_what_a_search_added():
    assert gold_gains([["d1", "d7"], ["d1"], ["d2", "d2"]], ("d1", "d2")) == [0.5, 0.0, 0.5]
    assert gold_gains([["d1", "d2"], []], ("d1", "d1", "d2")) == [1.0, 0.0]
    assert gold_gains([["d1"], []], ()) == [None, None]
    assert gold_gains([], ("d1",)) == []


def test_a_missing_verdict_is_none_and_never_zero():
    assert PAPER.rewards("correct", relevance(0.6, None)) == [0.96, None, 2.0]
    assert PAPER.rewards("correct", [{}, *relevance(0.5)]) == [None, 0.8, 2.0]
    part = {"reasoning_coherence": 1.0, "query_rationality": None, "document_relevance": 0.25}
    assert step_reward_rule("coherence").rewards("fail", [part]) == [None]
    assert step_reward_rule("process_only").rewards("invalid", relevance(None)) == [None, -0.9]
    assert step_reward_rule("outcome_only").rewards("correct", relevance(None)) == [2.0, 2.0]
    later = step_reward_rule("return_to_go").rewards("correct", relevance(0.6, None, 0.5))
    assert later == [None, None, 2.8, 2.0], "a sum over what comes later is unknown where part of it is"


def test_an_answer_without_a_verdict():
    assert PAPER.rewards(None, relevance(0.6)) == [None, None]
    assert step_reward_rule("outcome_only").rewards(None, [{}]) == [None, None]
    assert step_reward_rule("return_to_go").rewards(None, relevance(0.6)) == [None, None]
    assert step_reward_rule("process_only").rewards(None, relevance(0.6)) == [0.6, 0.0], "it does not depend on it"


def test_every_rule_gives_a_value_a_step():
    scores = {name: 0.5 for rule in STEP_REWARD_RULES.values() for name in rule.needs}
    for rule in STEP_REWARD_RULES.values():
        for state in END_STATES:
            found = rule.rewards(state, [scores] * 3)
            assert len(found) == (3 if state == "fail" else 4)
            assert None not in found


def test_an_unknown_rule():
    with pytest.raises(ConfigError, match=r"one of paper, outcome_only, .*, got 'papers'"):
        step_reward_rule("papers")
