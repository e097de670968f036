from __future__ import annotations

import csv

import pytest

from rag_rl.data.fields import BadRows, Fields
from rag_rl.data.tables import Columns, CsvTable, choose_columns
from rag_rl.errors import DataError


def rows_of(path, content, wanted=("a",)):
    path.write_bytes(content)
    bad = BadRows(path)
    rows = list(CsvTable(path, wanted).rows(bad))
    bad.raise_if_any()
    return rows


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_newlines_bom_and_delimiters(tmp_path, newline, bom, mark):
    text = bom + newline.join(
        [mark.join("ab"), mark.join(['"x ""y"" 1,2"', '"two\n\nlines"']), "", mark.join("34"), ""]
    )
    rows = rows_of(tmp_path / "t.csv", text.encode())
    values = [row for _, _, row in rows]
    assert values == [{"a": 'x "y" 1,2', "b": "two\n\nlines"}, {"a": "3", "b": "4"}]
    assert [(line, number) for line, number, _ in rows] == [(2, 1), (6, 2)]


def test_huge_fields_whatever_the_process_had_set(tmp_path):
    before = csv.field_size_limit(100)
    try:
        [(_, _, row)] = rows_of(tmp_path / "t.csv", b"a\n" + b"x" * 1_000_000 + b"\n")
        assert len(row["a"]) == 1_000_000
    finally:
        csv.field_size_limit(before)


def test_wanted_columns_decide_the_delimiter(tmp_path):
    # More commas than semicolons in the header, and still a semicolon table.
    [(_, _, row)] = rows_of(tmp_path / "t.csv", b"a;b, c, d\n1;2\n", wanted=("a",))
    assert row == {"a": "1", "b, c, d": "2"}


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        (
            b"a,b\n1,2\n1\n1,2,3\n",
            "2 bad rows: line 3: has 1 values, but the header has 2 columns; line 4: has 3 values",
        ),
        (b'a,b\n1,2\n"never closed,2\n1,2\n', "1 bad row: line 3: is not CSV: unexpected end of data"),
        (b'a,b\n1,2\n"x"y,2\n', "1 bad row: line 3: is not CSV"),
        (b"", "the file is empty; expected a header line"),
    ],
)
def test_bad_tables(tmp_path, content, trouble):
    with pytest.raises(DataError, match=trouble):
        rows_of(tmp_path / "t.csv", content)


def test_utf16_is_recognised(tmp_path):
    with pytest.raises(DataError, match="is UTF-16: save it as UTF-8"):
        rows_of(tmp_path / "t.csv", "a,b\n1,2\n".encode("utf-16"))


def test_latin1_bytes_are_found_in_their_field(tmp_path):
    [(_, _, row)] = rows_of(tmp_path / "t.csv", b"a,b\ncaf\xe9,2\n")
    fields = Fields(row)
    Columns(text=("a",), title=None, doc_id=()).passage(1, fields)
    assert fields.troubles == ["field 'a' is not UTF-8 (byte 0xe9 at character 4): save the file as UTF-8"]


def choose(names, text=None, title=None, doc_id=None):
    return choose_columns("t.csv", names, text_columns=text, title_column=title, id_column=doc_id)


def test_defaults():
    assert choose(["text", "title", "doc_id"]) == Columns(("text",), "title", ("doc_id",), chunk=None)
    assert choose(["_id", "text"]) == Columns(("text",), None, ("_id",), chunk=None)
    assert choose(["a", "title"], text=["title", "a"]) == Columns(("title", "a"), None, (), chunk=None)
    assert choose(["a", "n"], text=["a"], title="n", doc_id="n") == Columns(("a",), "n", ("n",), chunk=None)


def test_bad_choices():
    with pytest.raises(
        DataError, match=r"t.csv: no column 'text', and text_columns is not set; its columns are: 'a', 'b'"
    ):
        choose(["a", "b"])
    with pytest.raises(DataError, match=r"no column 'c' \(text_columns\)"):
        choose(["a", "b"], text=["a", "c"])
    with pytest.raises(DataError, match=r"no column 'c' \(title_column\)"):
        choose(["a", "b"], text=["a"], title="c")
    with pytest.raises(DataError, match=r"no column 'c' \(id_column\)"):
        choose(["a", "b"], text=["a"], doc_id="c")
    with pytest.raises(DataError, match=r"the column 'a' \(text_columns\) stands there twice"):
        choose(["a", "b", "a"], text=["a"])
    with pytest.raises(DataError, match="text_columns is empty"):
        choose(["a"], text=[])


def test_several_columns_are_joined_without_the_empty_ones():
    columns = Columns(text=("country", "price", "note"), title=None, doc_id=())
    fields = Fields({"country": "Italy", "price": 15.0, "note": None})
    assert columns.passage(3, fields).text == "country: Italy\nprice: 15.0"
    assert columns.passage(3, fields).doc_id == "3"
    assert fields.troubles == []
