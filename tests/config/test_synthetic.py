"""Queries for a run that has none."""

from __future__ import annotations

import json

import pytest

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.config.synthetic import ensure_queries, queries_written

SENTENCES = SynthesisArguments(synthesis_writer="sentences", synthesis_check="none", synthesis_passages=None)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"doc_id": f"d{i}", "text": f"Number {i} lives in house {i}."} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_named_queries_are_left_alone(corpus, tmp_path):
    data = DataArguments(data_corpus=corpus, data_train="mine.jsonl")
    ensure_queries(data, SENTENCES, RetrieverArguments(), tmp_path / "run", seed=1)
    assert data.data_train == "mine.jsonl"
    assert not (tmp_path / "run").exists()


def test_queries_are_written_once(corpus, tmp_path, monkeypatch):
    data = DataArguments(data_corpus=corpus)
    assert not queries_written(tmp_path / "run")
    ensure_queries(data, SENTENCES, RetrieverArguments(), tmp_path / "run", seed=1)
    assert queries_written(tmp_path / "run")
    assert data.data_train == str(tmp_path / "run" / "synthetic")
    written = (tmp_path / "run" / "synthetic" / "queries.json").read_bytes()
    assert len(json.loads(written)) == 5
    again = DataArguments(data_corpus=corpus)
    ensure_queries(again, SENTENCES, RetrieverArguments(), tmp_path / "run", seed=1)
    assert again.data_train == data.data_train
    assert (tmp_path / "run" / "synthetic" / "queries.json").read_bytes() == written


def test_a_plain_corpus_becomes_documents(tmp_path, monkeypatch):
    plain = tmp_path / "corpus.json"
    plain.write_text(json.dumps(["Number one lives in house one.", "Number two lives in house two."]))
    data = DataArguments(data_corpus=str(plain))
    ensure_queries(data, SENTENCES, RetrieverArguments(), tmp_path / "run", seed=1)
    assert data.data_corpus == str(tmp_path / "run" / "synthetic" / "corpus.jsonl")
    again = DataArguments(data_corpus=str(plain))
    ensure_queries(again, SENTENCES, RetrieverArguments(), tmp_path / "run", seed=1)
    assert again.data_corpus == data.data_corpus
