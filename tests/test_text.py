from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rl.text import (
    answer_tokens,
    cited_numbers,
    completion_text,
    extract_answer,
    has_format,
    normalize_answer,
    split_thinking,
    strip_citations,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Beatles", "beatles"),
        ("  a   river\tin\nElmton ", "river in elmton"),
        ("U.S.A.", "usa"),
        ("Mira-Brook", "mirabrook"),
        ("Theatre an Anthem", "theatre anthem"),
        ("Søren's café", "sørens café"),
        ("“Mira”", "“mira”"),  # only ASCII punctuation goes, as in the original evaluation
        ("the A an", ""),
        ("", ""),
    ],
)
def test_normalize_answer_follows_squad(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized
    assert answer_tokens(text) == normalized.split()


@given(st.text())
def test_normalized_text_has_single_spaces_and_no_ascii_punctuation(text: str) -> None:
    normalized = normalize_answer(text)
    assert normalized == " ".join(normalized.split())
    assert not set(normalized) & set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: Mira", ("", "Answer: Mira")),
        ("<think>a</think>b", ("a", "b")),
        ("a</think>b", ("a", "b")),
        ("<think>a", ("a", None)),
        ("Answer: Mira <think>a", ("a", None)),
        ("<think>a<think>b</think>c", ("a<think>b", "c")),
        ("x<think>a</think>y<think>b</think>z", ("a\nb", "xyz")),
        ("<think>a</think>b</think>c", ("a\nb", "c")),
        ("<think></think>", ("", "")),
        ("", ("", "")),
    ],
)
def test_split_thinking(text: str, expected: tuple[str, str | None]) -> None:
    assert split_thinking(text) == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: Mira", "Mira"),
        ("It lies on the Mira.\nAnswer:   Mira  \nDone.", "Mira"),
        ("Answer: Elm\nAnswer: Mira", "Mira"),
        ("Answer: Mira\r\nDone", "Mira"),
        ("Mira", "Mira"),
        ("  two\nlines ", "two\nlines"),
        ("Answer:", None),
        ("Answer:\nMira", None),
        ("Answer: Mira\nAnswer:", None),
        ("   ", None),
        ("<think>Answer: Mira", None),
        ("<think>Answer: Elm</think>Answer: Mira", "Mira"),
        ("<think>Answer: Elm</think>", None),
        ("Answer: Elm</think>Answer: Mira", "Mira"),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_extract_answer_with_other_markers() -> None:
    assert extract_answer("Answer: Mira\nmore", marker="") == "Answer: Mira\nmore"
    assert extract_answer("so #### 42", marker="####") == "42"


@pytest.mark.parametrize(
    ("text", "marker", "well_formed"),
    [
        ("Answer: Mira", "Answer:", True),
        ("It lies there.\nAnswer: Mira\n\n", "Answer:", True),
        ("<think>Answer: Elm\nhm</think>\nAnswer: Mira", "Answer:", True),
        ("Answer: Mira\nHope this helps", "Answer:", False),
        ("Answer: Elm Answer: Mira", "Answer:", False),
        ("Answer:", "Answer:", False),
        ("Answer:\nMira", "Answer:", False),
        ("Mira", "Answer:", False),
        ("<think>Answer: Mira", "Answer:", False),
        ("Mira", "", True),
        ("\nMira\n", "", True),
        ("Mira\nElm", "", False),
        (" ", "", False),
    ],
)
def test_has_format(text: str, marker: str, well_formed: bool) -> None:
    assert has_format(text, marker=marker) is well_formed


@given(st.text(alphabet="ab \n<>/think:Answer"))
def test_a_well_formed_completion_has_an_answer_on_one_line(text: str) -> None:
    if has_format(text):
        answer = extract_answer(text)
        assert answer is not None
        assert len(answer.splitlines()) == 1


def test_completion_text() -> None:
    assert completion_text("Answer: Mira") == "Answer: Mira"
    assert completion_text([{"role": "assistant", "content": "Answer: Mira"}]) == "Answer: Mira"
    turns = [
        {"role": "assistant", "content": "searching"},
        {"role": "tool", "content": "a passage"},
        {"role": "assistant", "content": [{"type": "text", "text": "Answer: "}, {"type": "text", "text": "Mira"}]},
        {"role": "user", "content": "thanks"},
    ]
    assert completion_text(turns) == "Answer: Mira"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""
    assert completion_text([{"role": "tool", "content": "a passage"}]) == ""
    assert completion_text([]) == ""


def test_citations() -> None:
    assert cited_numbers("a [1], b [2][3], c [4, 5; 6], not [x], [1-3] or 7") == {1, 2, 3, 4, 5, 6}
    assert strip_citations("Mira [1, 2]") == "Mira"
    assert strip_citations("[2]") == ""


def test_light_modules_load_no_torch() -> None:
    code = "import sys, rag_rl.text, rag_rl.metrics, rag_rl.rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
