"""What a retriever is trained in: rewards by hand, the single-hop mode, and what the reader makes of one candidate."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.generation import ScriptedGenerator
from rag_rl.reasoning import (
    DecompositionReader,
    Environment,
    Failure,
    HopRecord,
    Search,
    SingleSearch,
    TopK,
    Trajectory,
    known_gold,
    retrieval_reward,
)
from rag_rl.reasoning.environment import hop_answers
from rag_rl.retrieval import StaticRetriever
from rag_rl.types import Hit, Passage, Query, Question

D = {name: Passage(name, f"Text of {name}.") for name in ("d1", "d2", "d3", "d4")}
STEPS = (
    {"question": "Where does Falbert live?", "answer": "Elmton", "gold_doc_id": "d1"},
    {"question": "Which river does #1 lie on?", "answer": "Mirbrook", "gold_doc_id": "d2"},
)
TWO_HOPS = Question("q2", "Which river is the home of Falbert on?", ("Mirbrook", "the Mir"), ("d1", "d2"), 2)
KNOWN = Question(TWO_HOPS.qid, TWO_HOPS.question, TWO_HOPS.answers, TWO_HOPS.gold_doc_ids, 2, {"decomposition": STEPS})
CLAIM = Question("q1", "Falbert lives in Elmton.", ("SUPPORT",), ("d1", "d4"))


def hop(*names: str) -> HopRecord:
    return HopRecord(Query("what"), [Hit(D[name], 1.0, i) for i, name in enumerate(names, start=1)], "", "found")


def played(question: Question, *hops: HopRecord, **more) -> Trajectory:
    return Trajectory(question, list(hops), **more)


# ---- rewards


def test_retrieval_rewards_by_hand():
    seen = played(CLAIM, hop("d2", "d4", "d3"), hop("d1"))
    second = 1 / math.log2(3)
    assert retrieval_reward("ndcg")(seen) == pytest.approx(second / (1 + second))
    assert retrieval_reward("recall")(seen) == 0.5
    assert retrieval_reward("reciprocal_rank")(seen) == 0.5
    assert retrieval_reward("all_gold_recall")(seen) == 1.0, "the second hop found the other one"
    nothing = played(CLAIM, hop("d2", "d3"))
    assert [retrieval_reward(name)(nothing) for name in ("ndcg", "recall", "reciprocal_rank", "all_gold_recall")] == [
        0.0
    ] * 4


def test_the_cut_off_is_the_length_of_the_list():
    # One place, and the right document in it: nothing better was possible.
    assert retrieval_reward("ndcg")(played(CLAIM, hop("d4"))) == 1.0
    assert retrieval_reward("recall")(played(CLAIM, hop("d4"))) == 0.5


def test_chunks_of_one_document_count_once():
    twice = HopRecord(Query("x"), [Hit(Passage("d2", "a", chunk=i), 1.0, i + 1) for i in range(2)], "", "found")
    twice.hits.append(Hit(D["d1"], 0.5, 3))
    assert retrieval_reward("reciprocal_rank")(played(CLAIM, twice)) == 0.5


def test_a_trajectory_without_a_search_found_nothing():
    for name in ("ndcg", "recall", "reciprocal_rank", "all_gold_recall"):
        assert retrieval_reward(name)(played(CLAIM)) == 0.0


def test_without_judged_documents_there_is_no_reward():
    assert retrieval_reward("ndcg")(played(Question("q", "Who?", ("Mira",)), hop("d1"))) is None


def test_an_unknown_reward():
    with pytest.raises(ConfigError, match="is one of ndcg, recall, reciprocal_rank, all_gold_recall, got 'mrr'"):
        retrieval_reward("mrr")


def test_a_dropped_trajectory_has_no_reward():
    environment = Environment(SingleSearch(), 1, lambda trajectory: 1.0)
    found = environment.rewards([played(CLAIM, hop("d1")), played(CLAIM, failure="timeout"), played(CLAIM)])
    assert found == [1.0, None, 1.0]


def test_the_reward_is_f1_unless_told_otherwise():
    environment = Environment(SingleSearch(), 1)
    trajectories = [
        played(TWO_HOPS, answer="the Mirbrook river"),
        played(TWO_HOPS, answer=None),
        played(TWO_HOPS, failure="x"),
    ]
    assert environment.rewards(trajectories) == [pytest.approx(2 / 3), 0.0, None]


# ---- playing


def test_an_environment_plays_its_reader_for_its_hops():
    table = {"Where does Falbert live?": [D["d1"], D["d3"]], "Which river does Elmton lie on?": [D["d3"], D["d2"]]}
    policy = TopK(StaticRetriever(table), 2)
    (whole,) = Environment(DecompositionReader(), max_hops=2).rollout([KNOWN], policy)
    assert (whole.answer, [h.observation for h in whole.hops]) == ("Mirbrook", ["Elmton", "Mirbrook"])
    (short,) = Environment(DecompositionReader(), max_hops=1).rollout([KNOWN], policy)
    assert (short.answer, len(short.hops)) == ("", 1)
    assert Environment(DecompositionReader(), max_hops=2).rewards([whole, short]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="max_hops must be at least 1, got 0"):
        Environment(DecompositionReader(), max_hops=0).rollout([KNOWN], policy)


def test_single_search_searches_once_for_the_question_alone():
    asked = []

    class Noting(StaticRetriever):
        def search(self, queries, **more):
            asked.append(list(queries))
            return super().search(queries, **more)

    policy = TopK(Noting({CLAIM.question: [D["d4"], D["d2"]]}, default=[]), 2)
    environment = Environment(SingleSearch(), max_hops=1, reward=retrieval_reward("ndcg"))
    found = environment.rollout([CLAIM, TWO_HOPS], policy)
    assert asked == [[Query(CLAIM.question), Query(TWO_HOPS.question)]]
    assert [(t.answer, t.failure, len(t.hops)) for t in found] == [("", None, 1)] * 2
    assert [[hit.passage.doc_id for hit in t.hops[0].hits] for t in found] == [["d4", "d2"], []]
    assert [h.status for t in found for h in t.hops] == ["found", "not_found"]
    second = 1 / math.log2(3)
    assert environment.rewards(found) == [pytest.approx(1 / (1 + second)), 0.0]
    # More hops would be of no use to it.
    (again,) = Environment(SingleSearch(), max_hops=3).rollout([CLAIM], policy)
    assert len(again.hops) == 1


# ---- one candidate alone


def test_right_answers_of_a_hop():
    assert hop_answers(KNOWN, 0) == ("Elmton",)
    assert hop_answers(KNOWN, 1) == ("Mirbrook", "the Mir"), "the last hop's are those of the question, with aliases"
    assert hop_answers(TWO_HOPS, 0) == ("Mirbrook", "the Mir")
    assert hop_answers(Question("q", "Who?", ()), 0) == ("relevant",)


def test_usefulness_of_judged_documents():
    environment = Environment(SingleSearch(), 1, retrieval_reward("ndcg"))
    pools = [[D["d1"], D["d2"], D["d4"]], [D["d1"], D["d3"], D["d4"]]]
    unjudged = Question("q", "Who?", ())
    states = [Trajectory(CLAIM), Trajectory(unjudged)]
    found = environment.usefulness(states, [Search(Query("x"))] * 2, pools)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


def test_usefulness_is_what_the_reader_says_of_each_candidate_alone():
    replies = {"Where does Falbert live?": {"d1": "Answer: Elmton", "d2": "Answer: Elmton town", "d3": "Answer: no"}}
    prompts = []

    def reply(prompt: str, number: int) -> str:
        prompts.append(prompt)
        (question,) = [q for q in replies if q in prompt]
        (name,) = [n for n in replies[question] if f"Text of {n}." in prompt]
        return replies[question][name]

    environment = Environment(DecompositionReader(ScriptedGenerator(reply)), 2)
    search = Search(Query("Where does Falbert live?"))
    found = environment.usefulness([Trajectory(KNOWN)], [search], [[D["d1"], D["d2"], D["d3"]]])
    np.testing.assert_allclose(found, [[1.0, 2 / 3, 0.0]], rtol=1e-6)
    assert len(prompts) == 3, "one passage a prompt"


def test_a_candidate_that_could_not_be_read_stops():
    class Failing(SingleSearch):
        def observe(self, trajectories, searches, hits):
            return [Failure("timeout"), *super().observe(trajectories[1:], searches[1:], hits[1:])]

    with pytest.raises(BackendError, match="the reader could not read a candidate: timeout"):
        Environment(Failing(), 1).usefulness([Trajectory(CLAIM)], [Search(Query("x"))], [[D["d1"], D["d2"]]])


# ---- questions that can be answered from the corpus


def test_questions_whose_gold_documents_are_there():
    unnamed = Question("q", "Who?", ("Mira",))
    questions = [CLAIM, TWO_HOPS, unnamed]
    assert known_gold(questions, {"d1", "d2"}) == ([TWO_HOPS, unnamed], 1)
    assert known_gold(questions, {"d1", "d2"}, required=True) == ([TWO_HOPS], 2)
    assert known_gold(questions, {"d1", "d2", "d4"}) == (questions, 0)
    assert known_gold([], set()) == ([], 0)


def test_no_question_is_left():
    with pytest.raises(DataError, match=r"none of the 2 questions .* first 'q1' \(d1, d4\): is it the right corpus\?"):
        known_gold([CLAIM, TWO_HOPS], {"d3"})
    with pytest.raises(DataError, match=r"first 'q' \(none named\)"):
        known_gold([Question("q", "Who?", ("Mira",))], {"d3"}, required=True)
