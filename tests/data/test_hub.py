"""Hub sources, tried on local folders: ``datasets`` treats a folder of JSON files like a data set of the Hub."""

from __future__ import annotations

import json

import pytest

from rag_rl.data.corpus import load_corpus
from rag_rl.data.hub import is_hub_source, load_hub_rows, parse_hub_source
from rag_rl.data.questions import load_questions
from rag_rl.errors import BackendError, DataError
from rag_rl.types import Passage, Question


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make(folder, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


WINES = [{"id": i, "winery": f"W{i}", "points": 80 + i, "note": "dry" if i else None} for i in range(3)]


def test_sources():
    assert is_hub_source("hub:a/b")
    assert not is_hub_source("a/b")
    assert parse_hub_source("hub:a/b") == ("a/b", None, None)
    assert parse_hub_source("hub:a/b:test[10:20]") == ("a/b", None, "test[10:20]")
    assert parse_hub_source("hub:a/b:c:test") == ("a/b", "c", "test")
    for bad in ("hub:", "hub:a:", "hub:a:b:c:d", "hub::train"):
        with pytest.raises(DataError, match=f"{bad}: expected hub:<data set id>"):
            parse_hub_source(bad)


def test_corpus_with_columns(tmp_path, cache):
    folder = make(tmp_path / "wines", train=WINES)
    corpus = load_corpus(f"hub:{folder}", text_columns=["points", "note"], title_column="winery", id_column="id")
    expected = [
        Passage("0", "points: 80", "W0"),
        Passage("1", "points: 81\nnote: dry", "W1"),
        Passage("2", "points: 82\nnote: dry", "W2"),
    ]
    assert list(corpus) == list(corpus) == expected
    sliced = load_corpus(f"hub:{folder}:train[1:]", text_columns=["note"])
    assert list(sliced) == [Passage("1", "dry"), Passage("2", "dry")]


def test_bad_rows_and_columns_are_named(tmp_path, cache):
    folder = make(tmp_path / "wines", train=WINES)
    with pytest.raises(DataError, match="wines: no column 'text', and text_columns is not set; its columns are: 'id'"):
        load_corpus(f"hub:{folder}")
    with pytest.raises(DataError, match="1 bad row: row 1: field 'note' must be text, got null"):
        load_corpus(f"hub:{folder}", text_columns=["note"])
    with pytest.raises(DataError, match="row 2: doc_id 'dry' is already on row 1"):
        load_corpus(f"hub:{folder}:train[1:]", text_columns=["winery"], id_column="note")


def test_splits(tmp_path, cache):
    folder = make(tmp_path / "wines", train=WINES, test=WINES[:1])
    with pytest.raises(DataError, match=r"name one of its splits: hub:.*:train, hub:.*:test"):
        load_hub_rows(f"hub:{folder}")
    assert [number for number, _ in load_hub_rows(f"hub:{folder}:test")] == [1]
    with pytest.raises(DataError, match=r"cannot be loaded: .*dev"):
        load_hub_rows(f"hub:{folder}:dev")


def test_questions_with_columns(tmp_path, cache):
    rows = [{"id": 1, "q": "Which?", "answer": "this", "level": "easy"}]
    folder = make(tmp_path / "qa", validation=rows)
    questions = load_questions(f"hub:{folder}", columns={"qid": "id", "question": "q", "answers": "answer"})
    assert questions == [Question("1", "Which?", ("this",), meta={"level": "easy"})]


def test_native_multi_hop_rows(tmp_path, cache):
    row = {
        "id": "q1", "question": "Which?", "answer": "this", "type": "bridge", "level": "hard",
        "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
        "supporting_facts": {"title": ["B"], "sent_id": [0]},
    }  # fmt: skip
    folder = make(tmp_path / "hotpot", train=[row])
    corpus = load_corpus(f"hub:{folder}:train")
    assert [(p.title, p.text) for p in corpus] == [("A", "One. Two."), ("B", "Three.")]
    [question] = load_questions(f"hub:{folder}:train")
    assert question.gold_doc_ids == (list(corpus)[1].doc_id,)


def test_what_is_not_there(tmp_path, cache):
    with pytest.raises(DataError, match="no such data set"):
        load_hub_rows(f"hub:{tmp_path}/gone")
    # Offline, as every test is: a data set of the Hub cannot be fetched, which is not the user's mistake.
    with pytest.raises(BackendError, match="hub:nobody/nothing: the Hub cannot be reached"):
        load_hub_rows("hub:nobody/nothing")
