from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_rl.data import jsonl
from rag_rl.data.jsonl import is_json_array, read_json_array, read_jsonl, write_jsonl
from rag_rl.errors import DataError


def test_rows_with_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xe2\x80\xa8 \xc3\xa9"}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": "\u2028 é"})]


def test_bad_rows_are_all_counted_and_five_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n"x"\n{"a": "\xe9"}\nnull\n7\n{"b": 2}\n')
    rows = read_jsonl(path)
    assert next(rows) == (1, {"a": 1})
    assert next(rows) == (8, {"b": 2})
    with pytest.raises(DataError) as caught:
        next(rows)
    message = str(caught.value)
    assert message.startswith(f"{path}: 6 bad rows: line 2: is not JSON: Expecting value")
    assert "line 3: must be an object {...}, got a list" in message
    assert "line 4: must be an object {...}, got text 'x'" in message
    assert "line 5: is not UTF-8 (byte 0xe9 at position 8): save the file as UTF-8" in message
    assert "line 6: must be an object {...}, got null" in message
    assert "line 7" not in message
    assert message.endswith("and 1 more")


def test_deep_nesting_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": ' + "[" * 200_000 + "\n")
    with pytest.raises(DataError, match="line 1: is not JSON"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        ("{}".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "is gzip-compressed: unpack it"),
        (b"PK\x03\x04....", "is a zip archive"),
        (b"PAR1....", "is a Parquet file"),
    ],
)
def test_foreign_files_are_recognised(tmp_path, content, trouble):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=trouble):
        list(read_jsonl(path))


def test_missing_file_and_folder(tmp_path):
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(
        DataError, match=r"a.jsonl: no such file or folder \(beside it: other.jsonl\); give an existing"
    ):
        list(read_jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"is a folder; give a file, for example one of: other.jsonl"):
        list(read_jsonl(tmp_path))


@pytest.mark.parametrize("form", ["lines", "array"])
def test_reading_does_not_hold_the_file(tmp_path, form):
    path = tmp_path / "big.json"
    row = json.dumps({"text": "x" * 10_000})
    n = 3_000
    path.write_text("\n".join([row] * n) if form == "lines" else "[" + ",\n".join([row] * n) + "]")
    tracemalloc.start()
    count = sum(1 for _ in (read_jsonl(path) if form == "lines" else read_json_array(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == n
    assert path.stat().st_size > 30_000_000
    assert peak < 8_000_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_arrays_are_read_whatever_the_buffer(tmp_path_factory, rows, indent, ascii_only, chunk):
    path = tmp_path_factory.mktemp("arrays") / "a.json"
    path.write_text(
        " \n" + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8", newline=""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_CHUNK", chunk)
        # NaN aside, what JSON can hold compares equal.
        assert list(read_json_array(path)) == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        (b'[{"a": 1}, 7, {"b": 2}]', "item 2: must be an object {...}, got number 7"),
        (b'[{"a": 1}, {"b": }]', "item 2: is not JSON: Expecting value; nothing after it was read"),
        (b'[{"a": 1} {"b": 2}]', "item 2: is not JSON: ',' or ']' expected, got '{'"),
        (b'[{"a": 1}', "item 2: is not JSON: ',' or ']' expected, got 'the end of the file'"),
        (b'[{"a": 1}, {"b": "c', "item 2: is not JSON: Unterminated string"),
        (b'[{"a": 1}] [2]', "item 2: stands after the end of the array"),
        (b'[{"a": "\xe9"}]', "item 1: is not UTF-8"),
        (b'{"a": 1}', "item 1: is not a JSON array"),
    ],
)
def test_bad_arrays(tmp_path, content, trouble):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_json_array(path))
    assert f"{path}: 1 bad row: {trouble}" in str(caught.value)


def test_arrays_are_told_from_lines(tmp_path):
    path = tmp_path / "a.json"
    for content, expected in [("\n  [", True), ('{"a": []}', False), ("", False), ("\ufeff[]", True)]:
        path.write_text(content, encoding="utf-8")
        assert is_json_array(path) is expected


def test_write_and_read_back(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    rows = [{"a": "é\n\u2028"}, {"b": [1, None]}]
    assert write_jsonl(path, rows) == 2
    assert [row for _, row in read_jsonl(path)] == rows
    assert path.read_bytes().startswith('{"a": "é'.encode())
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")

    def rows():
        yield {"a": 1}
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_jsonl(path, rows())
    with pytest.raises(DataError, match="row 2 cannot be written as JSON"):
        write_jsonl(path, [{"a": 1}, {"a": object()}])
    with pytest.raises(DataError, match="row 1 cannot be written as JSON in UTF-8"):
        write_jsonl(path, [{"a": "\ud83d"}])
    with pytest.raises(DataError, match="cannot be written"):
        write_jsonl(path / "below_a_file.jsonl", [{"a": 1}])
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
