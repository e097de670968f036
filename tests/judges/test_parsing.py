"""JSON is read however it is written, and never guessed."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rl.judges.parsing import json_objects, to_number

KEYS = st.text(alphabet="abcdefgh _-'", min_size=1, max_size=8).map(lambda key: f"k{key.strip()}k")
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4)


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 1, "reason": "it\'s right"}',
        '```json\n{"score": 1, "reason": "it\'s right"}\n```',
        'Let me see.\n\n**Verdict:** {"score": 1.0, "reason": "it\'s right"}. That is all.',
        '{\n  "score": 1,\n  "reason": "it\'s right",\n}',
        "{'score': 1, 'reason': 'it\\'s right'}",
        "{'score': +1, 'reason': \"it's right\"}",
        '{ "Score" : 1e0 , " reason ": "it\\u0027s right" }',
        'The set {a, b} and f(x) = {x}: {"score": 1, "reason": "it\'s right"}',
    ],
)
def test_ways_to_write_one_object(text: str) -> None:
    assert json_objects(text) == [{"score": 1.0, "reason": "it's right"}]


def test_constants_arrays_and_escapes() -> None:
    (found,) = json_objects(
        "{'a': True, 'b': false, 'c': None, 'd': [1, 'x', [],], 'e': {}, 'f': -.5, 'g': 'a\\nb\\(c\\\\', 'h': \"\n\"}"
    )
    assert found == {
        "a": True,
        "b": False,
        "c": None,
        "d": [1.0, "x", []],
        "e": {},
        "f": -0.5,
        "g": "a\nb\\(c\\",
        "h": "\n",
    }
    (odd,) = json_objects('{"a": NaN, "b": -Infinity, "c": 1e999}')
    assert math.isnan(odd["a"])
    assert (odd["b"], odd["c"]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "score: 1",
        '"score": 1',
        '{"score": 8/10}',
        '{"score": 80%}',
        '{"score": 0,8}',
        '{"score": high}',
        '{"score": yes}',
        '{"score" 1}',
        "{score: 1}",
        '{"score": 1',
        '{"score": 1,,}',
        '{"score": }',
        '{"score: 1}',
        '[{"score": 1]',
        '{"a":' * 30 + "1" + "}" * 30,
        '{"a": ' + "[" * 40 + "]" * 40 + "}",
    ],
)
def test_what_is_no_object(text: str) -> None:
    assert json_objects(text) == []


def test_only_the_top_level_counts() -> None:
    inner = '{"score": 1}'
    assert json_objects(f'{{"draft": {inner}, "score": 0}} {inner}') == [
        {"draft": {"score": 1.0}, "score": 0.0},
        {"score": 1.0},
    ]
    assert json_objects(json.dumps({"reason": f"it says {inner}", "score": 0})) == [
        {"reason": f"it says {inner}", "score": 0.0}
    ]


def test_what_stands_inside_an_unreadable_object_goes_with_it() -> None:
    inner = '{"score": 1}'
    assert json_objects(f'{{"draft": {inner}, "score": 0') == []  # cut off
    assert json_objects(f'{{"reason": "he says "{inner}" in it", "score": 0}}') == []  # quotes not escaped
    # ... and what comes after its end does not.
    assert json_objects(f'{{"reason": "he says "{inner}" in it", "score": 0}} {{"score": 0.5}}') == [{"score": 0.5}]
    # A brace in prose opens nothing.
    assert json_objects('It begins with "{" and {braces: {"score": 0.5}') == [{"score": 0.5}]


def test_a_key_with_two_values_has_none() -> None:
    assert json_objects('{"score": 0, "Score": 1, "a": 2, "a": 2.0}') == [{"score": None, "a": 2.0}]


@given(OBJECTS, st.text(alphabet=st.characters(exclude_characters="{}"), max_size=30))
def test_json_comes_back_as_it_was(value: dict[str, Any], around: str) -> None:
    assert json_objects(around + json.dumps(value) + around) == [value]
    assert json_objects(around + json.dumps(value, ensure_ascii=False, indent=1) + around) == [value]


@given(st.text(alphabet="{}[]\"':,\\ \nab1-.eNTrueu0", max_size=80))
def test_nothing_raises(text: str) -> None:
    for found in json_objects(text):
        assert isinstance(found, dict)


@pytest.mark.parametrize(
    "piece", ["{", "}", '{"', "{'", '{"a":', '{"a":[', '{"a":"', "{'a':\"", '{"a":[1,', '{"a":1,', '{"\\', '"a":{']
)
def test_hostile_replies_take_no_long_time(piece: str) -> None:
    text = piece * (60_000 // len(piece))
    start = time.perf_counter()
    assert json_objects(text) == []
    assert time.perf_counter() - start < 5.0  # quadratic would take minutes


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (0.85, 0.85), ("1", 1.0), (" 0.80 ", 0.8), (".5", 0.5), (True, 1.0), (False, 0.0), ("-0.0", 0.0)],
)
def test_numbers(value: Any, number: float) -> None:
    assert to_number(value) == number
    assert math.copysign(1.0, to_number(value)) == 1.0


@pytest.mark.parametrize(
    "value",
    [None, "", "one", "80%", "8/10", "0,8", "1_0", "nan", "inf", "1e999", math.nan, math.inf, -math.inf, [1], {}, "٣"],
)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        to_number(value)
