"""Chains in files: what is written is read, what is wrong is named, and what a killed run leaves is no obstacle."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_rl.errors import BackendError, DataError
from rag_rl.reasoning import (
    Step,
    StepPrompts,
    StepRecord,
    StepTrajectory,
    append_trajectories,
    dpo_pairs,
    parse_step,
    read_trajectories,
    render_chain,
    render_step,
    sft_examples,
    trajectory_of,
    trajectory_row,
    write_trajectories,
)
from rag_rl.types import Hit, Passage, Question

QUESTION = Question("q1", "Which river is the home of Falbert on?", ("Mirbrook", "the Mir"), ("d1",))
D = {
    "d1": Passage("d1", "Falbert lives in Elmton.", "Falbert"),
    "d2": Passage("d2", "Zwei Flüsse.", chunk=2),
    "d3": Passage("d3", "Nothing."),
}


def chain(*actions, state, question=QUESTION, attempt=None):
    """ "one?:d1 d2" is a query and what it found, "=x" an answer, "" an invalid step."""
    steps = []
    for number, action in enumerate(actions, start=1):
        text, _, found = action.partition(":")
        if not action:
            steps.append(StepRecord(number, "Hm.\nno step", None, "no 'The problem analysis:'"))
            continue
        part = {"answer": text[1:]} if text.startswith("=") else {"query": text}
        step = Step(number, f"analysis {number}", **part)
        hits = [Hit(D[name], 1.0 / rank, rank) for rank, name in enumerate(found.split(), start=1)]
        steps.append(StepRecord(number, render_step(step), step, hits=hits))
    return StepTrajectory(question, steps, state, attempt=attempt)


CHAINS = [
    chain("one?:d1 d2", "two?:", "=Mirbrook", state="correct", attempt=2),
    chain("=Kelsabeck", state="incorrect", attempt=1),
    chain("one?:d1", "two?:d3", state="fail"),
    chain("one?:d1", "", state="invalid"),
    chain("", state="invalid", question=Question("7", "Who?", ("Mira",))),
]
CHAINS[0].steps[0].scores = {"document_relevance": 0.25, "query_rationality": None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "chains.jsonl"


def test_what_is_written_is_read(path):
    assert write_trajectories(path, CHAINS) == 5
    assert read_trajectories(path) == CHAINS
    assert os.listdir(path.parent) == ["chains.jsonl"]
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == {
        "qid": "q1",
        "question": "Which river is the home of Falbert on?",
        "answers": ["Mirbrook", "the Mir"],
        "gold_doc_ids": ["d1"],
        "state": "correct",
        "attempt": 2,
        "steps": [
            {
                "analysis": "analysis 1",
                "query": "one?",
                "documents": [
                    {"doc_id": "d1", "title": "Falbert", "text": "Falbert lives in Elmton."},
                    {"doc_id": "d2", "text": "Zwei Flüsse.", "chunk": 2},
                ],
                "scores": {"document_relevance": 0.25, "query_rationality": None},
            },
            {"analysis": "analysis 2", "query": "two?", "documents": []},
            {"analysis": "analysis 3", "answer": "Mirbrook"},
        ],
    }


@given(st.text(), st.text(min_size=1))
@settings(max_examples=100, deadline=None)
def test_any_text_survives(written, problem):
    record = StepRecord(1, written, None, problem)
    row = json.loads(json.dumps(trajectory_row(StepTrajectory(QUESTION, [record], "invalid"))))
    assert trajectory_of(row).steps[0] == record


def test_half_a_character_of_a_service_is_kept(path):
    broken = chain("", state="invalid")
    broken.steps[0].text = "a\ud83d b"
    write_trajectories(path, [broken])
    assert read_trajectories(path) == [broken]


def test_an_unfinished_write_leaves_the_old_file(path):
    write_trajectories(path, CHAINS[:1])
    with pytest.raises(DataError, match="'q1' has no end state"):
        write_trajectories(path, [CHAINS[1], StepTrajectory(QUESTION)])
    with pytest.raises(DataError, match="'q1' was dropped"):
        append_trajectories(path, [StepTrajectory(QUESTION, failure="refused")])
    assert read_trajectories(path) == CHAINS[:1]


def test_appending_after_a_kill(path):
    assert read_trajectories(path, cut_end=True) == []
    append_trajectories(path, CHAINS[:2])
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines(keepends=True)[1]) - 1):
        path.write_bytes(whole[: len(whole) - cut])
        left = CHAINS[:2] if cut == 1 else CHAINS[:1]  # without its line break alone the row is whole
        assert read_trajectories(path, cut_end=True) == left
        assert append_trajectories(path, CHAINS[2:4]) == 2
        assert read_trajectories(path) == [*left, *CHAINS[2:4]]
    path.write_bytes(whole[:30])
    append_trajectories(path, [])
    assert path.read_bytes() == b""


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"file/x\.jsonl: cannot be written: "):
        write_trajectories(tmp_path / "file" / "x.jsonl", CHAINS)
    with pytest.raises(BackendError, match="cannot be written: Is a directory"):
        append_trajectories(tmp_path, CHAINS)


ROW = trajectory_row(CHAINS[0])


def changed(**fields):
    return {**{name: value for name, value in ROW.items() if name not in fields}, **fields}


def with_step(number, **fields):
    steps = [dict(step) for step in ROW["steps"]]
    steps[number - 1] = {name: value for name, value in {**steps[number - 1], **fields}.items() if value is not ...}
    return changed(steps=steps)


@pytest.mark.parametrize(
    ("row", "trouble"),
    [
        ([1], r"must be an object \{\.\.\.\}, got \[1\]"),
        ({}, "field 'qid' is missing"),
        (changed(question=3), "field 'question' must be text, got 3"),
        (changed(question=" "), "field 'question' is empty"),
        (changed(answers=[]), "field 'answers' is empty: an end state"),
        (changed(answers="Mirbrook"), "field 'answers' must be a list of texts, got \"Mirbrook\""),
        (changed(gold_doc_ids=[1]), "field 'gold_doc_ids' must be a list of texts"),
        (changed(state="right"), "field 'state' must be one of correct, incorrect, fail, invalid, got \"right\""),
        (changed(state=["correct"]), "field 'state' must be one of"),
        (changed(attempt=0), "field 'attempt' must be a whole number from 1, got 0"),
        (changed(steps=[]), r"field 'steps' must be a list of steps, got \[\]"),
        (changed(steps="one"), "field 'steps' must be a list of steps"),
        (changed(steps=["one"]), "step 1: must be an object"),
        (
            changed(steps=ROW["steps"][:2]),
            "step 2: the last step of a chain with state 'correct' must have the field 'a",
        ),
        (
            changed(steps=ROW["steps"][2:] * 2),
            "step 1: a step before the last .* 'query' and none of 'answer', 'text'",
        ),
        (changed(state="fail"), "step 3: the last step of a chain with state 'fail' must have the field 'query'"),
        (with_step(2, analysis=...), "step 2: field 'analysis' is missing"),
        (with_step(2, query=""), "step 2: field 'query' is empty"),
        (with_step(2, query="two? three?"), r"step 2: the query would be read as 'two\?', it is 'two\? three\?'"),
        (with_step(2, analysis="a\nb"), "step 2: the analysis would be read as 'a b'"),
        (with_step(2, answer="x"), "step 2: .* it has 'query', 'answer'"),
        (with_step(2, documents=...), "step 2: field 'documents' must be a list of documents, got null"),
        (with_step(1, documents=["d1"]), "step 1: document 1: must be an object"),
        (
            with_step(1, documents=[{"doc_id": "d", "text": "t"}, {"doc_id": "d"}]),
            "document 2: field 'text' is missing",
        ),
        (with_step(1, documents=[{"doc_id": "d", "text": "t", "chunk": -1}]), "'chunk' must be a whole number from 0"),
        (
            with_step(3, documents=[{"doc_id": "d", "text": "t"}]),
            "step 3: field 'documents' belongs to a step with a q",
        ),
        (with_step(1, scores={"x": 2}), r"step 1: score 'x' must be a number in \[0, 1\] or null, got 2"),
        (with_step(1, scores=[1]), "step 1: field 'scores' must be an object of numbers"),
    ],
)
def test_bad_rows_name_line_and_step(path, row, trouble):
    path.parent.mkdir()
    path.write_text(f"\n{json.dumps(ROW)}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"chains.jsonl: 1 bad row: line 3: .*{trouble}"):
        read_trajectories(path)


def test_the_first_bad_rows_are_spelt_out(path):
    path.parent.mkdir()
    lines = [b"{", b"\xff", b'{"qid": 1' + b"2" * 5000 + b"}", b"[" * 100_000, b"{}", b"3", b"4"]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(
        DataError, match=r"7 bad rows: line 1: is not JSON: .* at character 2; line 2: is not UTF-8 .*; "
    ):
        read_trajectories(path)
    with pytest.raises(DataError, match="and 2 more"):
        read_trajectories(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_trajectories(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_trajectories(tmp_path)


def test_numbers_are_ids_and_a_byte_order_mark_is_read_over(path):
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(changed(qid=7)).encode())
    assert read_trajectories(path)[0].question.qid == "7"


# -------------------------------------------------------------------------------------------------------- for training


def test_one_example_a_step():
    good, first = CHAINS[0], CHAINS[0].steps[0]
    examples = sft_examples(CHAINS)
    assert len(examples) == 3
    assert examples[1] == {
        "prompt": [{"role": "user", "content": render_chain(QUESTION.question, [first.step], [first.passages])}],
        "completion": [
            {"role": "assistant", "content": "Step 2:\nThe problem analysis: analysis 2\nThe retrieval query: two?"}
        ],
        "left_out": 0,
    }
    assert [parse_step(e["completion"][0]["content"]).step for e in examples] == [r.step for r in good.steps]
    assert len(sft_examples(CHAINS, states=("correct", "invalid"))) == 4, "an invalid step is nothing to learn"
    assert sft_examples([]) == []


def test_examples_for_a_base_model_within_a_budget():
    def words(prompts):
        return [prompt.split() for prompt in prompts]

    *_, last = sft_examples(CHAINS, prompts=StepPrompts(chat=False, encode=words, max_tokens=42))
    assert last["prompt"].endswith(
        "(left out)\nStep 2:\nThe problem analysis: analysis 2\nThe retrieval query: two?\n"
        "The retrieval documents: (none)\n"
    )
    assert last["completion"] == "Step 3:\nThe problem analysis: analysis 3\nThe final answer: Mirbrook"
    assert last["left_out"] == 2


def test_examples_as_a_conversation():
    first, second, third = sft_examples(CHAINS, prompts=StepPrompts(layout="chat"))
    for before, after in ((first, second), (second, third)):
        # Each prompt begins with the one before it and what was answered to that.
        told = [*before["prompt"], *before["completion"]]
        assert after["prompt"][:-1] == told
        assert after["prompt"][-1]["role"] == "user"
    assert [turn["role"] for turn in third["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
    assert third["prompt"][-1]["content"] == "The retrieval documents: (none)"


def test_pairs_are_taken_where_chains_part():
    good = CHAINS[0]
    failed = [
        CHAINS[1],  # at the first step
        chain("one?:d1 d2", "three?:d3", state="fail"),  # at the second
        chain("one?:d1 d2", "", state="invalid"),  # at the second, as written
        chain("one?:d1", "three?:d3", state="fail"),  # at the documents: the prompts differ
        chain("one?:d1 d2", "three?:", state="fail"),  # the same pair as another
        chain("=Mira", state="incorrect", question=Question("q9", "Who?", ("Mira",))),  # no correct chain
        StepTrajectory(QUESTION, failure="refused"),
    ]
    pairs = dpo_pairs([*failed, good])
    before = render_chain(QUESTION.question, [good.steps[0].step], [good.steps[0].passages])
    assert [(p["prompt"][0]["content"], p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [
        (f"The question: {QUESTION.question}", good.steps[0].text, failed[0].steps[0].text),
        (before, good.steps[1].text, failed[1].steps[1].text),
        (before, good.steps[1].text, "Hm.\nno step"),
    ]
    assert {p["chosen"][0]["role"] for p in pairs} == {"assistant"}
    plain = dpo_pairs([good, failed[0]], prompts=StepPrompts(chat=False))
    assert plain[0]["prompt"].endswith("on?\n")
    assert plain[0]["rejected"].startswith("Step 1:")
    assert dpo_pairs([good]) == []
