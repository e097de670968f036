from __future__ import annotations

import pytest

from rag_rl.data.beir import beir_qrels, beir_queries, load_qrels, relevant_ids
from rag_rl.errors import DataError

HEADER = "query-id\tcorpus-id\tscore\n"


def test_qrels(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_bytes(
        ("\ufeff" + HEADER + "q1\td1\t2\nq1\td2\t0\n\nq2\td 3\t-1\nq1\td1\t2\n").replace("\n", "\r\n").encode()
    )
    assert load_qrels(path) == {"q1": {"d1": 2.0, "d2": 0.0}, "q2": {"d 3": 0.0}}


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        ("q1\td1\t1\n", r"line 1: expected the header query-id<tab>corpus-id<tab>score, got 'q1\\td1\\t1'"),
        ("query-id,corpus-id,score\n", "line 1: expected the header"),
        (HEADER + "q1 d1 1\n", "line 2: expected 3 values with a tab between them, got 1"),
        (HEADER + "q1\td1\thigh\n", "line 2: field 'score' must be a number, got text 'high'"),
        (HEADER + "q1\td1\tnan\n", "line 2: field 'score' must be a number"),
        (HEADER + "q1\t\t1\n", "line 2: field 'corpus-id' is empty"),
        (HEADER + "q1\td1\t\n", "line 2: field 'score' is empty"),
        (HEADER + "q1\td1\t1\nq1\td1\t2\n", "line 3: query 'q1' and document 'd1' have another score on line 2"),
        (HEADER, "holds no judgements"),
        ("", "holds no judgements"),
        (HEADER + "q\td\n" * 7, "7 bad rows: line 2.*line 6.*and 2 more"),
    ],
)
def test_bad_qrels(tmp_path, content, trouble):
    path = tmp_path / "q.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=trouble):
        load_qrels(path)


def test_relevant_ids():
    assert relevant_ids({}) == ()
    assert relevant_ids({"a": 0.0, "b": 1.0, "c": 1.0, "d": 3.0}) == ("d", "b", "c")


def test_folder(tmp_path):
    with pytest.raises(DataError, match=r"expected queries.jsonl in this folder, found: nothing"):
        beir_queries(tmp_path)
    with pytest.raises(DataError, match=r"expected qrels/<split>.tsv in this folder, found none"):
        beir_qrels(tmp_path)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").touch()
    assert beir_qrels(tmp_path).name == "test.tsv"
    (tmp_path / "qrels" / "dev.tsv").touch()
    assert beir_qrels(tmp_path, "dev").name == "dev.tsv"
    with pytest.raises(DataError, match=r"several splits, name one of them .*: dev, test"):
        beir_qrels(tmp_path)
    with pytest.raises(DataError, match="no split 'train'; there is: dev, test"):
        beir_qrels(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "queries", "judgements"),
    [("scifact/qrels_train", 809, 919), ("cranfield/qrels_all", 225, 1612), ("hotpotqa/qrels_dev", 394, 788)],
)
def test_real_qrels(data_root, name, queries, judgements):
    qrels = load_qrels(data_root / f"{name}.tsv")
    assert len(qrels) == queries
    assert sum(len(gains) for gains in qrels.values()) == judgements
