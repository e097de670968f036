"""Files that grow: whole lines survive a kill, half a line does not."""

from __future__ import annotations

import pytest

from rag_rl.data.appending import append_jsonl, read_appended
from rag_rl.errors import BackendError, DataError


def test_rows_are_added(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert append_jsonl(path, [{"a": 1}, {"a": "größe"}]) == 2
    assert append_jsonl(path, [{"a": 3}]) == 1
    assert read_appended(path) == [(1, {"a": 1}), (2, {"a": "größe"}), (3, {"a": 3})]


@pytest.mark.parametrize("cut", ['{"a": 2', '{"a": 2}', "{"])
def test_half_a_line_is_passed_over_and_taken_away(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + cut)
    assert read_appended(path) == [(1, {"a": 1})]
    append_jsonl(path, [{"a": 3}])
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_half_a_character_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": chr(0xD83D)}])
    assert read_appended(path) == [(1, {"a": chr(0xD83D)})]


def test_a_missing_file_is_empty(tmp_path):
    assert read_appended(tmp_path / "rows.jsonl") == []


def test_whole_lines_that_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnothing\n[1]\n')
    with pytest.raises(DataError, match=r"2 bad rows: line 2: is not JSON: .*; line 3: must be an object"):
        read_appended(path)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="cannot be written as JSON"):
        append_jsonl(tmp_path / "rows.jsonl", [{"a": {1}}])
    assert not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(BackendError, match="cannot be written: Is a directory"):
        append_jsonl(tmp_path, [{"a": 1}])
    with pytest.raises(BackendError, match="cannot be read: Is a directory"):
        read_appended(tmp_path)
