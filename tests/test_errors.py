"""The error tree is the one that its module draws, and bad rows are told in one line."""

from __future__ import annotations

import inspect
import re

import pytest

from rag_rl import errors
from rag_rl.errors import BackendError, DataError, RagRLError, UserError, bad_rows

CLASSES = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, RagRLError)
}


def drawn() -> dict[str, str]:
    """Class to parent, as the module's docstring draws them."""
    stack: list[tuple[int, str]] = []
    parents = {}
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"(?P<lead>[\s│├└─]*)(?P<name>[A-Z]\w+Error)\s{2,}", line)
        if not found:
            continue
        depth = len(found["lead"])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[found["name"]] = stack[-1][1] if stack else "Exception"
        stack.append((depth, found["name"]))
    return parents


def test_the_drawn_tree_is_the_real_one():
    assert drawn() == {name: value.__base__.__name__ for name, value in CLASSES.items()}


def test_whose_fault_decides_the_branch():
    assert not issubclass(BackendError, UserError)
    assert not issubclass(UserError, BackendError)
    for value in CLASSES.values():
        assert value in (RagRLError, BackendError) or issubclass(value, UserError)


def test_one_bad_row():
    error = bad_rows("q.jsonl", [(3, "field 'answers' is missing")])
    assert type(error) is DataError
    assert str(error) == "q.jsonl: 1 bad row: line 3: field 'answers' is missing"


@pytest.mark.parametrize(("count", "end"), [(5, "line 5: x"), (6, "line 5: x; and 1 more"), (9, "; and 4 more")])
def test_many_bad_rows_are_counted_and_five_spelt_out(count, end):
    message = str(bad_rows("q.jsonl", [(number, "x") for number in range(1, count + 1)]))
    assert message.startswith(f"q.jsonl: {count} bad rows: line 1: x; line 2: x")
    assert message.endswith(end)
    assert message.count("line ") == 5
    assert "\n" not in message


def test_rows_are_numbered_in_their_unit():
    message = str(bad_rows("a.json", [(1, "x"), (2, "y"), (7, "z")], shown=2, unit="item"))
    assert message == "a.json: 3 bad rows: item 1: x; item 2: y; and 1 more"
