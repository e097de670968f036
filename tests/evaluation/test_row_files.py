from __future__ import annotations

import math

import numpy as np
import pytest

from rag_rl.errors import BackendError, RunFolderError
from rag_rl.evaluation.row_files import RowFile, RowWriter, key_of, score_table
from rag_rl.evaluation.scoring import read_rows, write_rows


def row(i, **scores):
    return {"qid": f"q{i}", "question": f"Wer? {i} ä", "scores": scores}


def test_rows_come_back_one_at_a_time(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [row(i, em=float(i % 2)) for i in range(5)]
    with RowWriter(path) as writer:
        writer.write(rows[:2])
        assert len(RowFile(path)) == 2, "on the disk as soon as it is written"
        writer.write(rows[2:])
    found = RowFile(path)
    assert list(found) == rows == read_rows(path)
    assert (found[3], found[-1], found[1:3]) == (rows[3], rows[4], rows[1:3])
    with pytest.raises(IndexError):
        found[5]
    write_rows(tmp_path / "other.jsonl", rows)
    assert (tmp_path / "other.jsonl").read_bytes() == path.read_bytes(), "the same form as the rows of a training"


def test_a_cut_last_line_is_passed_over_and_taken_away(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowWriter(path) as writer:
        writer.write([row(0), row(1)])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"qid": "q2", "question": "' + b"x" * 70_000)
    assert [one["qid"] for one in RowFile(path)] == ["q0", "q1"]
    with RowWriter(path) as writer:
        writer.write([row(3)])
    assert [one["qid"] for one in RowFile(path)] == ["q0", "q1", "q3"]
    path.write_bytes(b'{"qid": ')
    with RowWriter(path) as writer:
        writer.write([])
    assert path.read_bytes() == b""


def test_half_a_character_survives(tmp_path):
    path = tmp_path / "rows.jsonl"
    broken = {**row(0), "reply": "half \ud83d"}
    with RowWriter(path) as writer:
        writer.write([broken])
    assert RowFile(path)[0] == broken
    assert key_of({"qid": "q", "question": "half \ud83d"}) != key_of({"qid": "q", "question": "half"})


def test_scores_become_columns(tmp_path):
    table = score_table([row(0, em=1.0), row(1, em=None, f1=0.5), row(2, f1=None), row(3, late=2.0)])
    assert [qid for qid, _ in table.keys] == ["q0", "q1", "q2", "q3"]
    expected = {"em": [1.0, math.nan, math.nan, math.nan], "f1": [math.nan, 0.5, math.nan, math.nan]}
    for name, values in expected.items():
        np.testing.assert_array_equal(table.columns[name], values)
    assert table.means() == {"em": 1.0, "f1": 0.5, "late": 2.0}
    part = table.take([3, 0])
    assert [qid for qid, _ in part.keys] == ["q3", "q0"]
    np.testing.assert_array_equal(part.columns["late"], [2.0, math.nan])
    assert part.means() == {"em": 1.0, "late": 2.0}


def test_questions_of_one_id_and_other_texts_are_others():
    assert key_of(row(0)) == key_of(row(0, em=1.0))
    assert key_of(row(0)) != key_of({**row(0), "question": "another"})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RunFolderError, match=r"none\.jsonl: cannot be read: No such file"):
        RowFile(tmp_path / "none.jsonl")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"qid": "q0", "question": "", "scores": {}}\n{"qid": \n')
    with pytest.raises(RunFolderError, match=r"rows\.jsonl: line 2 is damaged"):
        list(RowFile(path))
    path.write_text('{"id": 3}\n')
    with pytest.raises(RunFolderError, match="line 1 is no row of an evaluation as this version writes them"):
        RowFile(path)[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="cannot be written"):
        RowWriter(tmp_path / "file" / "rows.jsonl")
