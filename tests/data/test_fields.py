from __future__ import annotations

import math

import pytest

from rag_rl.data.fields import BadRows, Fields, broken_character, describe
from rag_rl.errors import DataError


def test_error_spells_out_five_rows_and_counts_the_rest():
    bad = BadRows("q.jsonl")
    for line in range(1, 1001):
        bad.add(line, "field 'x' is empty")
    message = str(bad.error())
    assert message.startswith("q.jsonl: 1000 bad rows: line 1: field 'x' is empty; line 2: ")
    assert "line 5: " in message
    assert "line 6: " not in message
    assert message.endswith("; and 995 more")
    assert len(bad) == 1000


def test_error_counts_in_the_unit_of_the_file():
    bad = BadRows("q.json", unit="item")
    bad.add(3, "is bad")
    assert str(bad.error()) == "q.json: 1 bad row: item 3: is bad"
    for number in range(4, 11):
        bad.add(number, "is bad")
    assert str(bad.error()).endswith("item 7: is bad; and 3 more")


def test_hint_is_said_once_at_the_end():
    bad = BadRows("q.jsonl")
    bad.hint = "do this"
    for line in (1, 2):
        fields = Fields({"a": 1, "b": 2})
        fields.text("text")
        bad.add_fields(line, fields)
    assert str(bad.error()) == (
        "q.jsonl: 2 bad rows: line 1: field 'text' is missing; line 2: field 'text' is missing; "
        "line 1 has the fields: a, b; do this"
    )


def test_nothing_bad_raises_nothing():
    bad = BadRows("q.jsonl")
    bad.raise_if_any()
    bad.add(1, "is bad")
    with pytest.raises(DataError, match="line 1: is bad"):
        bad.raise_if_any()


@pytest.mark.parametrize(
    ("row", "read", "trouble"),
    [
        ({}, lambda f: f.text("t"), "field 't' is missing"),
        ({"t": None}, lambda f: f.text("t"), "field 't' must be text, got null"),
        ({"t": 3}, lambda f: f.text("t"), "field 't' must be text, got number 3"),
        ({"t": {}}, lambda f: f.text("t"), "field 't' must be text, got an object"),
        ({"t": " \n"}, lambda f: f.text("t"), "field 't' is empty"),
        ({"t": "a\ud83d"}, lambda f: f.text("t"), "field 't' has half a character (\\ud83d)"),
        ({}, lambda f: f.identifier("i", "j"), "field 'i' is missing"),
        ({"j": 1.5}, lambda f: f.identifier("i", "j"), "field 'j' must be text, got number 1.5"),
        ({"i": True}, lambda f: f.identifier("i"), "field 'i' must be text, got true"),
        ({"i": ""}, lambda f: f.identifier("i"), "field 'i' is empty"),
        ({}, lambda f: f.texts("a"), "field 'a' is missing"),
        ({"a": "x"}, lambda f: f.texts("a"), "field 'a' must be a list of texts, got text 'x'"),
        ({"a": None}, lambda f: f.texts("a"), "field 'a' must be a list of texts, got null"),
        ({"a": []}, lambda f: f.texts("a"), "field 'a' is empty"),
        ({"a": ["x", " "]}, lambda f: f.texts("a"), "field 'a' holds an empty text at place 2"),
        ({"a": [None]}, lambda f: f.texts("a"), "field 'a' must be a list of texts, got null at place 1"),
        ({"n": "2"}, lambda f: f.integer("n", lowest=1), "field 'n' must be a whole number, got text '2'"),
        ({"n": True}, lambda f: f.integer("n", lowest=1), "field 'n' must be a whole number, got true"),
        ({"n": 0}, lambda f: f.integer("n", lowest=1), "field 'n' must be at least 1, got 0"),
        ({}, lambda f: f.integer("n", lowest=1, required=True), "field 'n' is missing"),
        ({"p": []}, lambda f: f.printable("p"), "field 'p' must be text, got a list"),
        ({}, lambda f: f.printable("p"), "field 'p' is missing"),
    ],
)
def test_bad_fields(row, read, trouble):
    fields = Fields(row)
    read(fields)
    assert fields.troubles == [trouble]
    assert fields.lacks_one == ("missing" in trouble)


def test_good_fields():
    fields = Fields({"t": "x", "i": 7, "a": ["b", "b", 3], "n": 2, "p": 1.5, "nan": math.nan, "null": None})
    assert fields.text("t") == "x"
    assert fields.text("absent", required=False) == ""
    assert fields.text("null", required=False) == ""
    assert fields.identifier("i") == "7"
    assert fields.texts("a") == ("b", "3")
    assert fields.texts("absent", required=False) == ()
    assert fields.integer("n", lowest=1) == 2
    assert fields.integer("absent", lowest=1) is None
    assert fields.printable("p") == "1.5"
    assert fields.printable("nan") == fields.printable("null") == ""
    assert fields.troubles == []
    assert not fields.lacks_one


def test_long_values_are_cut_in_messages():
    assert len(describe("x" * 1000)) < 60
    assert describe([1, 2]) == "a list"


def test_undecodable_bytes_are_named():
    text = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    assert broken_character(text) == "is not UTF-8 (byte 0xe9 at character 4): save the file as UTF-8"
    assert broken_character("café 😀") is None
