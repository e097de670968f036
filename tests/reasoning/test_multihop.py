from __future__ import annotations

import math
import re

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.generation import ScriptedGenerator
from rag_rl.reasoning import (
    Failure,
    Finish,
    HopRecord,
    Observation,
    Search,
    TopK,
    Trajectory,
    f1_reward,
    rollout,
    rollout_statistics,
)
from rag_rl.retrieval import StaticRetriever
from rag_rl.types import Hit, Passage, Query, Question

PASSAGES = [Passage("d1", "Falbert lives in Elmton."), Passage("d2", "Elmton lies on the Mirbrook.")]
RETRIEVER = StaticRetriever({}, default=PASSAGES)


def question(number, gold=("d1",)):
    return Question(f"q{number}", f"question {number}?", ("Mirbrook",), gold)


class PlannedReader:
    """Searches as often as its plan says for a question, then finishes; fails where the plan says so.

    The plan of a question: number of searches and what fails ("decide 1", "observe 0", "answer", or nothing).
    """

    def __init__(self, plan, answer="Mirbrook", answer_at_once=False):
        self.plan, self.text, self.answer_at_once = plan, answer, answer_at_once
        self.calls: list[tuple[str, list[str]]] = []

    def _log(self, name, trajectories):
        self.calls.append((name, [t.question.qid for t in trajectories]))

    def _fails(self, name, trajectory):
        return Failure(f"{name} failed") if self.plan[trajectory.question.qid][1] == name else None

    def decide(self, trajectories):
        self._log("decide", trajectories)
        return [self._fails(f"decide {len(t.hops)}", t) or self._next(t) for t in trajectories]

    def _next(self, trajectory):
        hop = len(trajectory.hops)
        if hop == self.plan[trajectory.question.qid][0]:
            return Finish(self.text if self.answer_at_once else None, note="enough")
        return Search(trajectory.query(f"hop {hop}"), note=f"thought {hop}")

    def observe(self, trajectories, searches, hits):
        self._log("observe", trajectories)
        assert [search.query.text for search in searches] == [f"hop {len(t.hops)}" for t in trajectories]
        return [
            self._fails(f"observe {len(t.hops)}", t) or Observation(found[0].passage.doc_id, "found")
            for t, found in zip(trajectories, hits, strict=True)
        ]

    def answer(self, trajectories):
        self._log("answer", trajectories)
        return [self._fails("answer", t) or self.text for t in trajectories]


class CountingPolicy:
    def __init__(self, empty=False):
        self.calls: list[int] = []
        self.empty = empty

    def retrieve(self, queries):
        self.calls.append(len(queries))
        hits = [] if self.empty else [Hit(p, 1.0, rank) for rank, p in enumerate(PASSAGES, start=1)]
        return [(hits, f"{query.text} of {query.question}") for query in queries]


def test_one_call_a_hop_over_all_that_go_on_in_input_order():
    reader, policy = PlannedReader({"q0": (1, ""), "q1": (3, ""), "q2": (0, ""), "q3": (2, "")}), CountingPolicy()
    asked = [question(i) for i in (0, 1, 1, 2, 3)]
    found = rollout(asked, reader=reader, policy=policy, max_hops=5)
    assert [t.question for t in found] == asked
    assert [len(t.hops) for t in found] == [1, 3, 3, 0, 2]
    assert policy.calls == [4, 3, 2]
    assert reader.calls == [
        ("decide", ["q0", "q1", "q1", "q2", "q3"]),
        ("observe", ["q0", "q1", "q1", "q3"]),
        ("decide", ["q0", "q1", "q1", "q3"]),
        ("observe", ["q1", "q1", "q3"]),
        ("decide", ["q1", "q1", "q3"]),
        ("observe", ["q1", "q1"]),
        ("decide", ["q1", "q1"]),
        ("answer", ["q2", "q0", "q3", "q1", "q1"]),
    ]
    assert {t.answer for t in found} == {"Mirbrook"}
    assert {t.note for t in found} == {"enough"}


def test_what_a_hop_records():
    (one,) = rollout([question(0)], reader=PlannedReader({"q0": (2, "")}), policy=CountingPolicy(), max_hops=5)
    first, second = one.hops
    assert first.query == Query("hop 0", "question 0?", ())
    assert second.query == Query("hop 1", "question 0?", (("hop 0", "d1"),))
    assert [hit.passage for hit in first.hits] == PASSAGES
    assert (first.observation, first.status, first.note) == ("d1", "found", "thought 0")
    assert (first.action, second.action) == ("hop 0 of question 0?", "hop 1 of question 0?")
    assert first.gold_doc_ids == ("d1",), "the question's, where the reader knows none of the hop"


def test_who_does_not_stop_is_asked_for_the_answer():
    reader = PlannedReader({"q0": (9, ""), "q1": (1, "")})
    found = rollout([question(0), question(1)], reader=reader, policy=CountingPolicy(), max_hops=2)
    assert [(len(t.hops), t.answer, t.note) for t in found] == [(2, "Mirbrook", None), (1, "Mirbrook", "enough")]
    assert [name for name, _ in reader.calls] == ["decide", "observe", "decide", "observe", "answer"]


def test_an_answer_that_comes_with_the_decision_is_not_asked_for():
    reader = PlannedReader({"q0": (1, "")}, answer_at_once=True)
    (one,) = rollout([question(0)], reader=reader, policy=CountingPolicy(), max_hops=3)
    assert (one.answer, one.note) == ("Mirbrook", "enough")
    assert [name for name, _ in reader.calls] == ["decide", "observe", "decide"]


def test_without_a_search_there_is_no_action():
    policy = CountingPolicy()
    reader = PlannedReader({"q0": (0, ""), "q1": (1, "")})
    none, one = rollout([question(0), question(1)], reader=reader, policy=policy, max_hops=3)
    assert (none.searched, none.hops, none.answer) == (False, [], "Mirbrook")
    assert one.searched
    assert policy.calls == [1]
    rollout([question(0)], reader=reader, policy=policy, max_hops=3)
    assert policy.calls == [1], "nobody searches: the policy is not asked"


@pytest.mark.parametrize(("stage", "hops"), [("decide 0", 0), ("decide 1", 1), ("observe 1", 1), ("answer", 2)])
def test_a_failed_call_drops_its_trajectory_only(stage, hops):
    reader = PlannedReader({"q0": (2, ""), "q1": (2, stage)})
    sound, dropped = rollout([question(0), question(1)], reader=reader, policy=CountingPolicy(), max_hops=3)
    assert (sound.failure, f1_reward(sound)) == (None, 1.0)
    assert (dropped.failure, f1_reward(dropped)) == (f"{stage} failed", None)
    assert (len(dropped.hops), dropped.answer) == (hops, None)
    assert rollout_statistics([sound, dropped])["failed"] == 0.5


def test_if_all_fail_the_backend_is_broken():
    plan = {f"q{i}": (2, "observe 0") for i in range(3)}
    with pytest.raises(BackendError, match="all 3 trajectories failed; the first: observe 0 failed"):
        rollout([question(i) for i in range(3)], reader=PlannedReader(plan), policy=CountingPolicy(), max_hops=2)
    # One question may be at fault itself.
    group = rollout([question(0)] * 4, reader=PlannedReader(plan), policy=CountingPolicy(), max_hops=2)
    assert [f1_reward(t) for t in group] == [None] * 4


def test_errors_of_the_policy_come_through():
    class Down:
        def retrieve(self, queries):
            raise BackendError("the index is down")

    with pytest.raises(BackendError, match="the index is down"):
        rollout([question(0)], reader=PlannedReader({"q0": (1, "")}), policy=Down(), max_hops=1)


def test_processes_in_step_make_the_same_calls():
    """With nothing in them where a process has finished; the flags of the other process are played back."""
    reader, policy = PlannedReader({"q0": (1, ""), "q1": (3, "")}), CountingPolicy()
    for asked, others in (([question(1)], [True, False, False]), ([question(0)], [True, True, True])):
        reader.calls.clear()
        policy.calls.clear()
        elsewhere = iter([*others, False, True])

        def on_any(flag, elsewhere=elsewhere):
            return next(elsewhere) or flag

        found = rollout(asked, reader=reader, policy=policy, max_hops=5, synchronised=on_any)
        assert [t.answer for t in found] == ["Mirbrook"]
        names = [name for name, _ in reader.calls]
        assert names == ["decide", "observe"] * 3 + ["decide", "answer"]
        assert len(policy.calls) == 3
    assert policy.calls == [1, 0, 0]


def test_no_questions():
    assert rollout([], reader=PlannedReader({}), policy=CountingPolicy(), max_hops=1) == []


def test_max_hops_out_of_range():
    with pytest.raises(ConfigError, match="max_hops must be at least 1, got 0"):
        rollout([], reader=PlannedReader({}), policy=CountingPolicy(), max_hops=0)


def test_top_k_is_the_retrievers_order_without_an_action():
    policy = TopK(RETRIEVER, 1)
    assert policy.retrieve([Query("a"), Query("b")]) == [([Hit(PASSAGES[0], 1.0, 1)], None)] * 2
    with pytest.raises(ConfigError, match="retriever_top_k must be at least 1, got 0"):
        TopK(RETRIEVER, 0)


@pytest.mark.parametrize(
    ("answer", "failure", "score"),
    [
        ("the Mirbrook.", None, 1.0),
        ("the river Mirbrook", None, 2 / 3),
        ("Elm", None, 1.0),
        ("", None, 0.0),
        (None, None, 0.0),
        ("Mirbrook", "timeout", None),
    ],
)
def test_reward(answer, failure, score):
    one = Trajectory(Question("q", "?", ("Mirbrook", "Elm")), answer=answer, failure=failure)
    assert f1_reward(one) == (score if score is None else pytest.approx(score))


def test_queries_carry_what_was_learnt_in_words():
    one = Trajectory(question(0))
    told = [("Elmton", "found"), ("", "not_found"), ("Falton", "ambiguous"), ("", "ambiguous")]
    one.hops = [HopRecord(Query(f"s{i}"), [], text, status) for i, (text, status) in enumerate(told)]
    assert one.query("next").history == (("s0", "Elmton"), ("s1", "not found"), ("s2", "Falton"), ("s3", "unclear"))
    assert one.query("next").question == "question 0?"
    assert one.query("next", history=False) == Query("next")


def test_statistics():
    def hop(status, shown, gold=("d1",)):
        return HopRecord(Query("?"), [Hit(p, 1.0, 1) for p in shown], "x", status, gold_doc_ids=gold)

    trajectories = [
        Trajectory(question(0), [hop("found", PASSAGES), hop("not_found", PASSAGES[1:])]),
        Trajectory(question(1), [hop("found", PASSAGES, gold=())]),
        Trajectory(question(2)),
        Trajectory(question(3), [hop("found", PASSAGES)], failure="timeout"),
    ]
    assert rollout_statistics(trajectories) == {
        "failed": 0.25,
        "no_search": pytest.approx(1 / 3),
        "hops": 1.0,
        "success": 0.5,
        "found": pytest.approx(2 / 3),
    }
    assert all(math.isnan(value) for value in rollout_statistics([]).values())


def test_a_model_that_writes_steps_can_drive_the_loop():
    """The other user of the loop: here the reader is trained, and what it wrote is kept for that."""

    class StepReader:
        def __init__(self, generator):
            self.generator = generator

        def _prompt(self, trajectory):
            lines = [trajectory.question.question]
            for hop in trajectory.hops:
                lines += [hop.note[1], *(hit.passage.text for hit in hop.hits)]
            return "\n".join(lines)

        def decide(self, trajectories):
            prompts = [self._prompt(t) for t in trajectories]
            rows = self.generator.generate(prompts, max_new_tokens=64, temperature=1.0)
            return [self._step(t, p, row[0].text) for t, p, row in zip(trajectories, prompts, rows, strict=True)]

        def _step(self, trajectory, prompt, text):
            step = re.fullmatch(rf"Step {len(trajectory.hops) + 1}: .*\n(query|answer): (.+)", text)
            if step is None:
                return Finish(note=(prompt, text))
            if step[1] == "query":
                return Search(trajectory.query(step[2]), note=(prompt, text))
            return Finish(step[2], note=(prompt, text))

        def observe(self, trajectories, searches, hits):
            return [Observation("", "found")] * len(trajectories)

        def answer(self, trajectories):
            return [None] * len(trajectories)

    replies = ["Step 1: I need the home.\nquery: home?", "no step", "Step 2: it is there.\nanswer: Mirbrook"]
    replies += ["Step 1: a\nquery: b"]
    generator = ScriptedGenerator([*replies[:3], replies[3], replies[3].replace("1", "2")])
    right, wrong = rollout(
        [question(0), question(1)], reader=StepReader(generator), policy=TopK(RETRIEVER, 1), max_hops=4
    )
    assert (right.answer, f1_reward(right)) == ("Mirbrook", 1.0)
    assert right.note[0] == f"question 0?\n{replies[0]}\nFalbert lives in Elmton."
    assert (wrong.answer, wrong.failure, wrong.note, wrong.hops) == (None, None, ("question 1?", "no step"), [])
    (endless,) = rollout([question(2)], reader=StepReader(generator), policy=TopK(RETRIEVER, 1), max_hops=2)
    assert (len(endless.hops), endless.answer, f1_reward(endless)) == (2, None, 0.0)


def test_what_a_reader_excludes_is_not_found_again():
    class Shown(PlannedReader):
        def _next(self, trajectory):
            decision = super()._next(trajectory)
            if isinstance(decision, Search):
                seen = {hit.passage.doc_id for hop in trajectory.hops for hit in hop.hits}
                return Search(decision.query, exclude=seen)
            return decision

        def observe(self, trajectories, searches, hits):
            return [Observation("", "not_found")] * len(trajectories)

    (one,) = rollout([question(0)], reader=Shown({"q0": (3, "")}), policy=TopK(RETRIEVER, 1), max_hops=3)
    assert [[hit.passage.doc_id for hit in hop.hits] for hop in one.hops] == [["d1"], ["d2"], []]
    with pytest.raises(TypeError, match="exclude"):
        rollout([question(0)], reader=Shown({"q0": (2, "")}), policy=CountingPolicy(), max_hops=2)


def test_going_on_from_trajectories_that_were_begun():
    def begun(number, hops):
        return Trajectory(question(number), [HopRecord(Query(f"hop {i}"), [], "d1", "found") for i in range(hops)])

    reader, policy = PlannedReader({"q0": (3, ""), "q1": (3, ""), "q2": (9, "")}), CountingPolicy()
    given = [begun(0, 2), begun(1, 0), begun(2, 3)]
    found = rollout([t.question for t in given], reader=reader, policy=policy, max_hops=3, begun=given)
    assert all(one is other for one, other in zip(found, given, strict=True))
    assert [len(t.hops) for t in found] == [3, 3, 3], "hops that were made count"
    assert [t.answer for t in found] == ["Mirbrook"] * 3
    assert policy.calls == [2, 1, 1]
    assert [names for call, names in reader.calls if call == "decide"] == [["q0", "q1"], ["q1"], ["q1"]]
