from __future__ import annotations

import json
import logging
import tracemalloc

import pytest

from rag_rl.data.corpus import Corpus, load_corpus, write_corpus
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Passage

WINES = (
    ",country,description,points,title\n"
    '0,Italy,"Aromas include tropical fruit,\nbroom",87,Nicosia 2013\n'
    '1,Portugal,"This is ripe ""and"" fruity",,Quinta 2011\n'
)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "c.jsonl",
        {"doc_id": "a", "title": "A", "text": "one", "more": [1]},
        {"doc_id": 2, "text": "two"},
        {"_id": "b", "title": None, "text": "three"},
    )
    corpus = load_corpus(path)
    expected = [Passage("a", "one", "A"), Passage("2", "two"), Passage("b", "three")]
    assert list(corpus) == list(corpus) == expected
    assert len(corpus) == 3
    assert corpus.n_empty == 0
    assert repr(corpus) == f"Corpus({str(path)!r})"


def test_json_array_and_other_names(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"id": 1, "contents": "x", "name": "N"}, {"id": 2, "contents": "y", "name": None}]))
    corpus = load_corpus(path, text_columns=["contents"], title_column="name", id_column="id")
    assert list(corpus) == [Passage("1", "x", "N"), Passage("2", "y")]


def test_a_plain_array_of_texts(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(["Elmton lies on the Mira.", " ", "Falwyn lives in Elmton."]))
    expected = [Passage("0", "Elmton lies on the Mira."), Passage("2", "Falwyn lives in Elmton.")]
    assert list(load_corpus(path)) == expected
    with pytest.raises(ConfigError, match="text_columns is for documents with fields, and this is an array of texts"):
        load_corpus(path, text_columns=["text"])
    path.write_text('["Elmton lies on the Mira.", 7]')
    with pytest.raises(DataError, match="item 2: must be text, got number 7"):
        list(load_corpus(path))


def test_a_title_field_that_is_not_there_is_no_silent_loss(tmp_path):
    path = write(tmp_path / "c.jsonl", {"doc_id": "a", "text": "x", "name": "N"})
    with pytest.raises(DataError, match="line 1: field 'nam' is missing; line 1 has the fields: doc_id, text, name"):
        load_corpus(path, title_column="nam")


def test_beir_folder(tmp_path):
    write(tmp_path / "corpus.jsonl", {"_id": "4983", "title": "T", "text": "x", "metadata": {}})
    assert list(load_corpus(tmp_path)) == [Passage("4983", "x", "T")]


def test_text_folder_and_single_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("# Rivers\nThe Elmiro flows.")
    (tmp_path / "b.txt").write_text("plain")
    assert list(load_corpus(tmp_path)) == [
        Passage("b.txt", "plain", "b"),
        Passage("sub/a.md", "# Rivers\nThe Elmiro flows.", "Rivers"),
    ]
    assert list(load_corpus(tmp_path / "b.txt")) == [Passage("b.txt", "plain", "b")]
    with pytest.raises(ConfigError, match="text_columns is for tables and JSON rows"):
        load_corpus(tmp_path, text_columns=["a"])


def test_csv_with_named_columns(tmp_path):
    path = tmp_path / "wines.csv"
    path.write_text(WINES)
    corpus = load_corpus(path, text_columns=["country", "points", "description"], title_column="title")
    assert list(corpus) == [
        Passage("1", "country: Italy\npoints: 87\ndescription: Aromas include tropical fruit,\nbroom", "Nicosia 2013"),
        Passage("2", 'country: Portugal\ndescription: This is ripe "and" fruity', "Quinta 2011"),
    ]
    assert [p.doc_id for p in load_corpus(path, text_columns=["description"], id_column="")] == ["0", "1"]
    with pytest.raises(
        DataError, match="no column 'text', and text_columns is not set; its columns are: '', 'country'"
    ):
        load_corpus(path)
    with pytest.raises(ConfigError, match=r"text_columns must be a list.*write \[description\]"):
        load_corpus(path, text_columns="description")


def test_csv_errors_name_line_and_field(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'id,text\n1,"two\nlines"\n,x\n3,caf\xe9\n1,again\n')
    with pytest.raises(DataError) as caught:
        load_corpus(path, id_column="id")
    assert "2 bad rows: line 4: field 'id' is empty; line 5: field 'text' is not UTF-8 (byte 0xe9" in str(caught.value)
    path.write_text('id,text\n1,"two\nlines"\n1,x\n')
    with pytest.raises(DataError, match="line 4: doc_id '1' is already on line 2"):
        load_corpus(path, id_column="id")


@pytest.mark.parametrize(
    ("row", "trouble"),
    [
        ({"text": "x"}, "line 2: field 'doc_id' is missing; line 2 has the fields: text"),
        ({"doc_id": "b"}, "line 2: field 'text' is missing; line 2 has the fields: doc_id"),
        ({"doc_id": "", "text": "x"}, "line 2: field 'doc_id' is empty"),
        ({"doc_id": "b", "text": ["x"]}, "line 2: field 'text' must be text, got a list"),
        ({"doc_id": "b", "text": "x", "title": 3}, "line 2: field 'title' must be text, got number 3"),
        ({"doc_id": "b", "text": "x", "chunk": -1}, "line 2: field 'chunk' must be at least 0, got -1"),
        ({"doc_id": "b", "text": "\ud83d"}, r"line 2: field 'text' has half a character \(\\ud83d\)"),
    ],
)
def test_bad_rows(tmp_path, row, trouble):
    path = write(tmp_path / "c.jsonl", {"doc_id": "a", "text": "x"}, row)
    with pytest.raises(DataError, match=f"c.jsonl: 1 bad row: {trouble}$"):
        load_corpus(path)


def test_repeated_ids_are_named_with_their_lines(tmp_path):
    rows = [{"doc_id": f"d{i % 7}", "text": "x"} for i in range(14)]
    path = write(tmp_path / "c.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        load_corpus(path)
    assert "7 bad rows: line 8: doc_id 'd0' is already on line 1; " in str(caught.value)
    assert "line 12: doc_id 'd4' is already on line 5; and 2 more" in str(caught.value)


def test_equal_hashes_are_not_taken_for_equal_ids():
    # hash(-1) == hash(-2) in CPython, and ids enter as tuples: force a collision of the whole key.
    class Same(str):
        __slots__ = ()

        def __hash__(self):
            return 1

    passages = [Passage(Same("a"), "x"), Passage(Same("b"), "y")]
    assert len(Corpus("memory", lambda bad: enumerate(passages, start=1))) == 2


def test_documents_without_text(tmp_path, caplog):
    path = write(
        tmp_path / "c.jsonl",
        {"doc_id": "a", "text": "x"},
        {"doc_id": "b", "text": " \n", "title": "T"},
        {"doc_id": "c", "text": ""},
    )
    with caplog.at_level(logging.WARNING, logger="rag_rl"):
        corpus = load_corpus(path)
    assert caplog.messages == [f"{path}: 2 documents without text left out ('b', 'c')"]
    assert (len(corpus), corpus.n_empty, [p.doc_id for p in corpus]) == (1, 2, ["a"])
    assert len(load_corpus(path, on_empty="keep")) == 3
    with pytest.raises(DataError, match=r"2 bad rows: line 2: document 'b' has no text .*; line 3: document 'c'"):
        load_corpus(path, on_empty="error")
    with pytest.raises(ConfigError, match="on_empty must be skip, error or keep, got 'drop'"):
        load_corpus(path, on_empty="drop")


def test_empty_corpora(tmp_path):
    path = write(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match=r"c.jsonl: the corpus is empty$"):
        load_corpus(path)
    write(path, {"doc_id": "a", "text": ""})
    with pytest.raises(DataError, match="the corpus is empty: none of its 1 documents has a text"):
        load_corpus(path)
    (tmp_path / "t.csv").write_text("text\n")
    with pytest.raises(DataError, match="the corpus is empty"):
        load_corpus(tmp_path / "t.csv")
    (tmp_path / "array.json").write_text("[]")
    with pytest.raises(DataError, match="the corpus is empty"):
        load_corpus(tmp_path / "array.json")


def test_unknown_sources(tmp_path):
    (tmp_path / "c.pdf").touch()
    with pytest.raises(DataError, match=r"c.pdf: unknown form '.pdf'; expected .jsonl"):
        load_corpus(tmp_path / "c.pdf")
    with pytest.raises(DataError, match=r"expected corpus.jsonl or .txt and .md files in this folder, found: c.pdf"):
        load_corpus(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        load_corpus(tmp_path / "gone.jsonl")


def test_without_check_trouble_shows_at_the_end(tmp_path):
    path = write(tmp_path / "c.jsonl", {"doc_id": "a", "text": "x"}, {"doc_id": "b"}, {"doc_id": "c", "text": ""})
    corpus = load_corpus(path, check=False)
    documents = iter(corpus)
    assert next(documents).doc_id == "a"
    with pytest.raises(DataError, match="line 2: field 'text' is missing"):
        next(documents)
    with pytest.raises(DataError, match="line 2: field 'text' is missing"):
        len(corpus)


def test_streaming_holds_neither_documents_nor_ids(tmp_path):
    path = tmp_path / "big.jsonl"
    n = 20_000
    with path.open("w") as file:
        for i in range(n):
            file.write(json.dumps({"doc_id": f"document-{i}", "text": "x" * 1_500}) + "\n")
    tracemalloc.start()
    corpus = load_corpus(path)
    assert sum(len(p.text) for p in corpus) == n * 1_500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(corpus) == n
    # The ids alone would be 1.2 MB, the texts 30 MB.
    assert peak < 1_200_000


def test_write_and_read_back(tmp_path):
    passages = [Passage("a", "one", "A"), Passage("a", "two", "A", 1), Passage("b", "é")]
    assert write_corpus(tmp_path / "c.jsonl", iter(passages)) == 3
    assert list(load_corpus(tmp_path / "c.jsonl")) == passages


@pytest.mark.parametrize(
    ("name", "documents", "empty"),
    [
        ("hotpotqa", 4_867, 0),
        ("twowiki", 4_209, 0),
        ("twowiki/corpus_distractors.jsonl", 5_407, 0),
        ("musique", 5_008, 0),
        ("scifact", 5_183, 0),
        ("cranfield", 1_398, 2),
        ("squad_xquad_en", 240, 0),
    ],
)
def test_real_corpora(data_root, monkeypatch, caplog, name, documents, empty):
    monkeypatch.setenv("RAG_RL_DATA", str(data_root))
    corpus = load_corpus(f"${{data}}/{name}")
    assert len(corpus) == len({p.doc_id for p in corpus}) == documents
    assert corpus.n_empty == empty
    if empty:
        assert caplog.messages == [f"${{data}}/{name}: 2 documents without text left out ('471', '995')"]


def test_empty_documents_of_cranfield_as_errors(data_root):
    with pytest.raises(
        DataError, match=r"2 bad rows: line 471: document '471' has no text .*line 995: document '995'"
    ):
        load_corpus(data_root / "cranfield", on_empty="error")
