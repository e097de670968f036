"""Prompts are found, filled and checked."""

from __future__ import annotations

import pytest

from rag_rl.prompts import load_prompt, placeholders, prompt_names, render, render_passages, require_placeholders
from rag_rl.types import Passage

NEEDED = {
    "answer": {"passages", "question"},
    "answer_cited": {"passages", "question"},
    "answer_closed_book": {"question"},
    "augment_query": {"task", "answer_type", "query"},
    "check_query": {"task", "query_type", "query", "passage_type", "passage"},
    "judge_accuracy": {"code", "question", "gold", "answer"},
    "judge_answer_correctness": {"code", "question", "gold", "answer"},
    "judge_comparison": {"code", "question", "gold", "answers"},
    "judge_consistency": {"code", "question", "passages", "answer"},
    "judge_document_relevance": {"code", "question", "analysis", "query", "passages", "pass_mark"},
    "judge_query_rationality": {"code", "question", "history", "analysis", "query", "pass_mark"},
    "judge_reasoning_coherence": {"code", "question", "history", "analysis", "pass_mark"},
    "judge_style": {"code", "question", "answer"},
    "rank_passages": {"count", "task", "query", "passages"},
    "react_answer": {"question", "history"},
    "react_observe": {"query", "passages"},
    "react_query": {"question", "history"},
    "r3_first_step": {"question"},
    "r3_next_step": {"question", "steps"},
    "state": {"question", "history", "query"},
    "synthesize_query": {"task", "query_type", "passage_type", "length", "style", "claim", "examples", "passage"},
    "synthesize_query_answer": {
        "task",
        "query_type",
        "passage_type",
        "length",
        "style",
        "claim",
        "examples",
        "passage",
    },
    "tiny_answer": {"passages", "question"},
    "tiny_closed_book": {"question"},
    "tiny_judge": {"question", "gold", "answer"},
    "tiny_passage": {"question"},
    "tiny_question": {"passage"},
}


@pytest.fixture
def prompt(tmp_path):
    def write(text: str, name: str = "mine.txt") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_packaged_prompts_are_listed():
    assert prompt_names() == sorted(prompt_names())
    assert set(NEEDED) == set(prompt_names())


@pytest.mark.parametrize("name", prompt_names())
def test_packaged_prompts_can_be_filled(name):
    assert set(placeholders(load_prompt(name))) == NEEDED[name]
    filled = render(name, **{field: f"<{field}>" for field in NEEDED[name]})
    for field in NEEDED[name]:
        assert f"<{field}>" in filled
    assert "$" not in filled
    assert filled == filled.rstrip("\n")


def test_without_passages_the_closed_book_prompt_is_the_same():
    shown = render("tiny_answer", passages=render_passages([]), question="Who rules Elmton?")
    assert render("tiny_closed_book", question="Who rules Elmton?") == shown


def test_a_path_replaces_a_name(prompt):
    path = prompt("Frage: $question\n\n")
    assert load_prompt(path) == "Frage: $question"
    assert render(path, question="Wer regiert Zürich?") == "Frage: Wer regiert Zürich?"


def test_a_packaged_name_wins_over_a_file_of_that_name(prompt, tmp_path, monkeypatch):
    prompt("mine", name="answer")
    monkeypatch.chdir(tmp_path)
    assert load_prompt("answer") != "mine"


def test_an_unknown_prompt_names_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"'no-such'.*not one of .*answer_cited"):
        load_prompt("no-such")


def test_braces_and_dollars(prompt):
    path = prompt('Reply {"score": 1}. It costs $$5: ${question}s {question}')
    assert render(path, question="dog") == 'Reply {"score": 1}. It costs $5: dogs {question}'


def test_what_is_filled_in_is_not_filled_again(prompt):
    assert render(prompt("$question"), question="Why $passages and $$5?", passages="no") == "Why $passages and $$5?"


def test_a_field_that_is_not_used_is_ignored(prompt):
    assert render(prompt("$question"), question="a", passages="b") == "a"


def test_a_placeholder_without_a_field(prompt):
    with pytest.raises(ValueError, match=r"asks for \$context, but there is only \$question, \$passages"):
        render(prompt("$context $question"), question="a", passages="b")


@pytest.mark.parametrize("text", ["costs 5$", "costs $5", "${}"])
def test_a_stray_dollar(prompt, text):
    with pytest.raises(ValueError, match=r"write \$\$ for a dollar sign"):
        render(prompt(text), question="a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nothing", []),
        ("$b and ${a}, then $b again", ["b", "a"]),
        ("$$a costs $5 {c} $", []),
        ("$_a1.$B", ["_a1", "B"]),
    ],
)
def test_placeholders_in_their_order(text, expected):
    assert placeholders(text) == expected


def test_missing_placeholders_are_all_named(prompt):
    require_placeholders(prompt("$question ${passages}"), ["question", "passages"])
    with pytest.raises(ValueError, match=r"has no \$question and no \$passages"):
        require_placeholders(prompt("$$question $other", name="other.txt"), ["question", "passages"])


def test_passages_are_numbered_in_the_given_order():
    passages = [Passage("d2", "Second."), Passage("d1", "It lies on the Mira.", title="Elmton")]
    assert render_passages(passages) == "[1] Second.\n[2] Elmton\nIt lies on the Mira."
    assert render_passages([]) == "(none)"
