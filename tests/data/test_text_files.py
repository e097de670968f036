from __future__ import annotations

from pathlib import Path

import pytest

from rag_rl.data.fields import BadRows
from rag_rl.data.text_files import read_text_file, read_text_folder, title_of
from rag_rl.errors import DataError


def test_folder_is_read_in_order_with_relative_ids(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "b/two.md": "intro\n\n# Two things\nx", "a.txt": "\ufeffone\r\nline", "b/.hidden.txt": "no", ".git/x.md": "no",
        "c.pdf": "no", "Z.MD": "no heading",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(text.encode())
    bad = BadRows(tmp_path)
    found = [(number, p.doc_id, p.title, p.text) for number, p in read_text_folder(tmp_path, bad)]
    assert found == [
        (1, "Z.MD", "Z", "no heading"),
        (2, "a.txt", "a", "one\nline"),
        (3, "b/two.md", "Two things", "intro\n\n# Two things\nx"),
    ]
    assert len(bad) == 0


def test_a_link_to_a_folder_above_does_not_loop(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [p.doc_id for _, p in read_text_folder(tmp_path, BadRows(tmp_path))] == ["a.txt"]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("### Third level ###\n# First", "Third level"),
        ("```sh\n# a comment\n```\n# Real", "Real"),
        ("~~~\n```\n# no\n~~~\n## Yes", "Yes"),
        ("#hashtag\n#\n    # code", "notes"),
        ("# C# and F#", "C# and F#"),
        ("", "notes"),
    ],
)
def test_titles_of_markdown(text, title):
    assert title_of(Path("x/notes.md"), text) == title


def test_files_that_are_not_utf8_are_all_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\ncaf\xe9")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("good")
    bad = BadRows(tmp_path)
    assert [p.doc_id for _, p in read_text_folder(tmp_path, bad)] == ["c.txt"]
    with pytest.raises(
        DataError, match=r"2 bad rows: file 1: a.txt: line 2: is not UTF-8 \(byte 0xe9\).*file 2: b.txt"
    ):
        bad.raise_if_any()


def test_single_file(tmp_path):
    (tmp_path / "a.md").write_text("# T\ntext")
    [(number, passage)] = read_text_file(tmp_path / "a.md", BadRows(tmp_path))
    assert (number, passage.doc_id, passage.title) == (1, "a.md", "T")
