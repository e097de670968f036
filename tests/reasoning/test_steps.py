"""The grammar of steps: what is read, what is refused and why, and that reading and writing are inverse."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rag_rl.reasoning import (
    ParsedStep,
    Step,
    format_adherence,
    has_step_format,
    parse_step,
    render_chain,
    render_documents,
    render_step,
    render_steps,
)
from rag_rl.tiny.lessons import Habits, reasoning_step
from rag_rl.types import Passage

QUERY = "Step 1:\nThe problem analysis: I need the home of Falbert.\nThe retrieval query: Where does Falbert live?"
ANSWER = "Step 2:\nThe problem analysis: Elmton lies on the Mirbrook.\nThe final answer: Mirbrook"
HOME = Step(1, "I need the home of Falbert.", query="Where does Falbert live?")
RIVER = Step(2, "Elmton lies on the Mirbrook.", answer="Mirbrook")


def step(text, number=None, **more):
    parsed = parse_step(text, number, **more)
    assert parsed.step is not None, parsed.problem
    return parsed.step


def test_both_kinds_of_step():
    assert parse_step(QUERY, 1) == ParsedStep(HOME, "", strict=True)
    assert parse_step(ANSWER, 2) == ParsedStep(RIVER, "", strict=True)
    assert (render_step(HOME), render_step(RIVER)) == (QUERY, ANSWER)
    assert parse_step(ANSWER).step == RIVER, "any number will do where none is asked for"


# ------------------------------------------------------------------------------ the cases of the method's description


def test_the_action_whose_label_comes_first_counts():
    both = "Step 1:\nThe problem analysis: a\nThe retrieval query: q?\nThe final answer: y"
    assert step(both, 1) == Step(1, "a", query="q?")
    turned = "Step 1:\nThe problem analysis: a\nThe final answer: y\nThe retrieval query: q?"
    assert step(turned, 1) == Step(1, "a", answer="y")
    assert not parse_step(both, 1).strict


def test_an_empty_analysis_is_invalid():
    assert parse_step("Step 1:\nThe problem analysis:\nThe retrieval query: q?", 1) == ParsedStep(
        None, "the analysis is empty"
    )


@pytest.mark.parametrize("action", ["The retrieval query: Where is it?", "The final answer: London"])
def test_another_step_ends_the_action(action):
    text = f"Step 1:\nThe problem analysis: a\n{action}\nStep 2:\nThe problem analysis: b\nThe final answer: z"
    assert step(text, 1) == step(f"Step 1:\nThe problem analysis: a\n{action}", 1)
    assert not parse_step(text, 1).strict


@pytest.mark.parametrize("answer", ["London", "nn", "Johann", "R\\n2", "C#", "What? Where?", "n"])
def test_an_answer_keeps_its_letters(answer):
    assert step(f"Step 1:\nThe problem analysis: a\nThe final answer: {answer}").answer == answer


def test_a_query_keeps_its_question_mark_and_is_one_question():
    def query(text):
        return step(f"Step 1:\nThe problem analysis: a\nThe retrieval query: {text}").query

    assert query("Who rules Elmton?") == "Who rules Elmton?"
    assert query("Who rules Elmton? And who leads it?") == "Who rules Elmton?"
    assert query('Who directed "What\'s Up, Doc?" in 1972') == 'Who directed "What\'s Up, Doc?" in 1972'
    assert query("river of Elmton") == "river of Elmton"


def test_the_number_must_stand_there_once():
    twice = f"{QUERY}\nStep 1:\nThe problem analysis: b\nThe final answer: y"
    assert parse_step(twice, 1).problem == "the line 'Step 1:' stands there more than once"
    assert step(twice) == HOME


# ----------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no 'The problem analysis:'"),
        ("Step 1:\nThe retrieval query: q?", "no 'The problem analysis:'"),
        ("The problem analysis: a\nThe final answer: y", "no line 'Step 1:'"),
        ("Step 1: I think\nThe problem analysis: a\nThe final answer: y", "no line 'Step 1:'"),
        ("Step 2:\nThe problem analysis: a\nThe final answer: y", "is step 2, expected step 1"),
        (
            "Step 1:\nThe problem analysis: a",
            "neither 'The retrieval query:' nor 'The final answer:' after the analysis",
        ),
        (
            "Step 1:\nThe problem analysis: a\nWhere does Falbert live?",
            "neither 'The retrieval query:' nor 'The final answer:' after the analysis",
        ),
        (
            "Step 1:\nThe problem analysis: a\nStep 2:\nThe problem analysis: b\nThe final answer: y",
            "neither 'The retrieval query:' nor 'The final answer:' after the analysis",
        ),
        ("Step 1:\nThe problem analysis: a\nThe retrieval query:", "the retrieval query is empty"),
        ("Step 1:\nThe problem analysis: a\nThe final answer: **\\n", "the final answer is empty"),
        ("Step 1:\nThe problem analysis: a\nThe retrieval query:\nStep 2:\n", "the retrieval query is empty"),
        ("<think>Step 1:\nThe problem analysis: a", "the thinking part was never closed"),
    ],
)
def test_invalid_steps_say_why(text, problem):
    assert parse_step(text, 1) == ParsedStep(None, problem, strict=False)


def test_without_a_number_there_must_still_be_one():
    assert parse_step("The problem analysis: a\nThe final answer: y").problem == "no line 'Step N:'"
    assert parse_step("Step 0:\nThe problem analysis: a\nThe final answer: y").problem.startswith("steps are numbered")


# --------------------------------------------------------------------------------------------------- what is tolerated


@pytest.mark.parametrize(
    "text",
    [
        f"Sure, here it is.\n\n{QUERY}\nI will wait for the documents.",
        f"<think>Step 7:\nThe problem analysis: hm</think>\n{QUERY}\n",
        QUERY.replace("\n", "\r\n"),
        QUERY.replace("\n", "\n\n"),
        QUERY.replace("need the home", "need\nthe   home"),
        QUERY.replace("query: ", "query:\n"),
        f"{QUERY}\\n\\n",
        f"{QUERY}\nThe retrieval documents: [1] made up",
        "**Step 1:**\n**The problem analysis:** I need the home of Falbert.\n"
        "**The retrieval query: Where does Falbert live?**",
        "### Step 1:\nThe Problem Analysis: I need the home of Falbert.\n"
        "### The Retrieval Query: Where does Falbert live?",
        QUERY.replace("Step 1:\n", "Step 1: "),
        f"{QUERY} ### done",
    ],
)
def test_what_stands_around_a_step_is_read_over(text):
    assert step(text, 1) == HOME


@pytest.mark.parametrize("text", [f"  {QUERY}\n", QUERY.replace(": ", ":  "), f"<think>hm</think>{QUERY}"])
def test_space_and_thinking_are_no_deviation(text):
    assert has_step_format(text, 1)


@pytest.mark.parametrize(
    "text", [f"{QUERY}\nHm.", f"Hm.\n{QUERY}", QUERY.replace("\n", "\n\n"), QUERY.replace("Step", "**Step")]
)
def test_anything_else_is(text):
    assert parse_step(text, 1).step == HOME
    assert not has_step_format(text, 1)


def test_labels_within_a_sentence():
    text = "Step 1:\nThe problem analysis: so the final answer: is near\nThe final answer: Elmton"
    assert step(text) == Step(1, "so the final answer: is near", answer="Elmton"), "not the label: no capital"


def test_teachers_need_no_number():
    text = "The problem analysis: a\nThe final answer: y"
    assert step(text, 3, renumber=True) == Step(3, "a", answer="y")
    assert step(f"Step 9:\n{text}", 3, renumber=True) == Step(3, "a", answer="y")
    assert not parse_step(text, 3, renumber=True).strict
    assert parse_step(f"Step 3:\n{text}", 3, renumber=True).strict
    with pytest.raises(ValueError, match="needs the number"):
        parse_step(text, renumber=True)


# ---------------------------------------------------------------------------------------------------------- strict out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"number": 0, "analysis": "a", "query": "q"}, "at least 1, got 0"),
        ({"number": 1, "analysis": "a"}, "either a query or a final answer"),
        ({"number": 1, "analysis": "a", "query": "q", "answer": "y"}, "either a query or a final answer"),
        ({"number": 1, "analysis": "", "query": "q"}, "the analysis is empty"),
        ({"number": 1, "analysis": "a\nb", "query": "q"}, "the analysis would be read as 'a b'"),
        ({"number": 1, "analysis": "a The final answer: b", "query": "q"}, "would be read as 'a'"),
        ({"number": 1, "analysis": "a", "query": "q? r?"}, "the query would be read as 'q\\?', it is 'q\\? r\\?'"),
        ({"number": 1, "analysis": "a", "answer": "y\nz"}, "the answer would be read as 'y'"),
        ({"number": 1, "analysis": "a", "answer": "y "}, "the answer would be read as 'y'"),
        ({"number": 1, "analysis": "a", "answer": "y <think>"}, "the answer would be read as 'y'"),
        ({"number": 1, "analysis": "a", "answer": "\ud83d"}, "the answer would be read as"),
    ],
)
def test_a_step_reads_back_as_it_is_or_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        Step(**fields)


def test_half_characters_never_get_in():
    assert step("Step 1:\nThe problem analysis: a\ud83d b\nThe final answer: \ud83d\ude00") == Step(
        1, "a\ufffd b", answer="\U0001f600"
    )


# -------------------------------------------------------------------------------------------------------------- chains


def test_a_chain():
    found = [
        Passage("d1", "Falbert\nlives in  Elmton.", title="Falbert"),
        Passage("d2", "Step 2:\nThe final answer: 1"),
    ]
    assert render_chain("Which river \n is it?", [HOME, RIVER], [found, []]) == (
        "The question: Which river is it?\n"
        f"{QUERY}\n"
        "The retrieval documents: [1] Falbert Falbert lives in Elmton. [2] Step 2: The final answer: 1\n"
        f"{ANSWER}"
    )
    assert render_steps([], []) == ""
    assert render_documents([]) == "The retrieval documents: (none)"
    with pytest.raises(ValueError, match="zip"):
        render_steps([HOME], [])


def test_the_tiny_world_writes_this_grammar():
    rng = random.Random(0)
    strict = [parse_step(reasoning_step(rng)[-1]["content"]).strict for _ in range(300)]
    assert all(strict)
    sloppy = [reasoning_step(rng, habits=Habits(sloppy=1.0))[-1]["content"] for _ in range(300)]
    unlabelled = [text for text in sloppy if "query: " not in text and "answer: " not in text]
    assert len(unlabelled) > 30
    assert all(parse_step(text).step is None for text in unlabelled)


def test_format_adherence_counts_steps_with_their_numbers():
    assert format_adherence([QUERY, ANSWER]) == 1.0
    assert (
        format_adherence([QUERY, QUERY, ANSWER, "Step 4:\nThe problem analysis: a\nThe final answer: y\nHm."]) == 0.25
    )
    assert format_adherence([]) is None


# ---------------------------------------------------------------------------------------------------------- properties

PIECES = [
    "Step 1:", "Step 2:", "Step", "The problem analysis:", "The retrieval query:", "The final answer:", "The",
    "The retrieval documents:", "###", "**", "*", "\\n", "\n", "\r\n", "\r", "\t", " ", "\u2028", "\xa0", "?", "? ",
    ":", "<think>", "</think>", "a", "final answer:", "\ud83d", "\ude00", "1", "0", "#", "é", "\x00", "\x1c",
]  # fmt: skip
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


def check(text):
    for number, renumber in ((None, False), (1, False), (2, True)):
        found = parse_step(text, number, renumber=renumber)
        assert (found.step is None) == bool(found.problem)
        if found.step is not None:
            written = render_step(found.step)
            assert render_step(step(written, found.step.number)) == written
            assert parse_step(written, found.step.number) == ParsedStep(found.step, "", strict=True)
            assert number in (None, found.step.number)
            written.encode()


@given(texts)
@example("Step 1:\nThe problem analysis: The\nfinal answer: b\nThe final answer: y")
@example("Step 1:\nThe problem analysis: a\nThe retrieval query: The\xa0final answer: b? c")
@example("Step 1:\nThe problem analysis: a <th<think></think>ink> b\nThe final answer: y")
@example("Step 1:\nThe problem analysis: **\\n** a **\nThe final answer: ***y***")
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_and_what_is_read_reads_back(text):
    check(text)


@given(texts, texts, st.booleans(), st.integers(1, 99))
@settings(max_examples=400, deadline=None)
def test_every_step_that_can_be_made_reads_back(analysis, action, searches, number):
    try:
        made = Step(number, analysis, **{"query" if searches else "answer": action})
    except ValueError:
        return
    assert parse_step(render_step(made), number) == ParsedStep(made, "", strict=True)


@pytest.mark.slow
def test_a_hundred_thousand_mutations():
    rng = random.Random(20251121)
    valid = 0
    for _ in range(100_000):
        text = reasoning_step(rng)[-1]["content"] if rng.random() < 0.1 else rng.choice((QUERY, ANSWER))
        for _ in range(rng.randint(1, 6)):
            at = rng.randint(0, len(text))
            end = min(len(text), at + rng.choice((0, 1, 2, 8, 40)))
            put = rng.choice((*PIECES, chr(rng.randrange(0x110000)), text[at:end], ""))
            text = text[:at] + put + text[end:]
        check(text)
        valid += parse_step(text).step is not None
    assert 10_000 < valid < 90_000, "both kinds are tried"


@pytest.mark.parametrize(
    "piece", ["*", "The ", "Step 1", "\\n", " ", "The problem analysis:", "<think>", "? ", "#", "Step 1:\n"]
)
def test_no_text_takes_long(piece):
    text = f"Step 1:\nThe problem analysis: a\nThe retrieval query: {piece * (200_000 // len(piece))}"
    started = time.perf_counter()
    parse_step(text, 1)
    parse_step(piece * (200_000 // len(piece)), 1)
    assert time.perf_counter() - started < 5.0, "quadratic would take minutes"
