"""Held-out questions, searched for in a corpus that is embedded anew for each evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rag_rl.data import load_corpus, load_questions
from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.retrieval import RetrievalAssembly, search_corpus
from rag_rl.evaluation.scoring import evaluate, evaluate_retrieval
from rag_rl.retrieval import SentenceEncoder
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage, Question

TABLE = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [0.0, 1.0], "d": [-1.0, 0.0]}
PASSAGES = [Passage(name, name) for name in TABLE]


class Known:
    """An encoder that knows four words."""

    dimension, fingerprint = 2, "known"

    def __init__(self) -> None:
        self.embedded: list[list[str]] = []

    def encode_queries(self, queries):
        return np.array([TABLE[query] for query in queries], dtype=np.float32)

    def encode_documents(self, texts):
        self.embedded.append(list(texts))
        return self.encode_queries(texts)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_a_corpus_is_searched_piece_by_piece(block):
    encoder = Known()
    scores, rows = search_corpus(encoder, PASSAGES, ["a", "c"], top_k=2, block=block)
    assert rows.tolist() == [[0, 1], [2, 1]]
    np.testing.assert_allclose(scores, [[1.0, 0.8], [1.0, 0.6]], rtol=1e-6)
    assert [text for texts in encoder.embedded for text in texts] == list("abcd"), "each once"


def test_more_passages_than_there_are():
    with pytest.raises(
        ConfigError, match="retriever_top_k must be between 1 and 4, the passages of the corpus, got 5"
    ):
        search_corpus(Known(), PASSAGES, ["a"], top_k=5)


def test_it_finds_what_an_index_finds(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    from rag_rl.retrieval import build_index, open_index

    passages = list(load_corpus(str(FOLDER / "data" / "corpus.jsonl")))[:300]
    questions = [
        question
        for question in load_questions(str(FOLDER / "data" / "demo_1hop.jsonl"))
        if question.gold_doc_ids[0] in {passage.doc_id for passage in passages}
    ][:40]
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu", batch_size=64)
    build_index(passages, encoder, tmp_path / "index", progress=False)
    index = open_index(tmp_path / "index", encoder)
    assembly = RetrievalAssembly(passages, questions, encoder, top_k=10)
    found = evaluate(assembly.under_training(None, batch_size=1), questions)
    assert found.metrics == pytest.approx(evaluate_retrieval(index, questions, top_k=10), abs=1e-9)
    hits = index.search([question.question for question in questions], top_k=10)
    for row, expected in zip(found.rows, hits, strict=True):
        assert [one["score"] for one in row["passages"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)
        assert json.loads(json.dumps(row)) == row


def test_a_saved_encoder_embeds_documents_anew(tmp_path):
    import torch

    questions = [Question("1", "Where does a live?", (), ("x",))]
    passages = [Passage("x", "a lives in b."), Passage("y", "c lives in d.")]
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
    assembly = RetrievalAssembly(passages, questions, encoder, top_k=2)
    before = assembly.under_training(None, batch_size=1).answer(questions)[0][0].asked.hits
    with torch.no_grad():
        for weight in encoder.model.parameters():
            weight.mul_(1.1)
    encoder.model.save_pretrained(str(tmp_path), create_model_card=False)
    after = assembly.reloaded(tmp_path, device="cpu", batch_size=1)
    scores = {hit.passage.doc_id: hit.score for hit in after.answer(questions)[0][0].asked.hits}
    vectors = encoder.encode_documents([passage.contents for passage in passages])
    expected = vectors @ encoder.encode_queries(["Where does a live?"])[0]
    assert [scores["x"], scores["y"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert {hit.passage.doc_id: hit.score for hit in before} != pytest.approx(scores, abs=1e-4)
    assert after.encoder is not encoder


def test_another_search_around_the_encoder():
    class Turned(Known):
        def encode_queries(self, queries):
            return super().encode_queries(queries)[:, ::-1]

        def encode_documents(self, texts):
            return Known.encode_queries(self, texts)

    questions = [Question("1", "a", (), ("c",))]
    assembly = RetrievalAssembly(PASSAGES, questions, Known(), top_k=1, wrap=lambda _: Turned())
    found = evaluate(assembly.under_training(None, batch_size=1), questions).metrics
    assert found == {"recall@1": 1.0, "success@1": 1.0, "mrr@10": 1.0, "ndcg@10": 1.0}
    plain = RetrievalAssembly(PASSAGES, questions, Known(), top_k=1)
    assert evaluate(plain.under_training(None, batch_size=1), questions).metrics["recall@1"] == 0.0


def test_bad_input():
    asked = [Question("1", "a", (), ("a",))]
    with pytest.raises(ConfigError, match="retriever_top_k must be between 1 and 4"):
        RetrievalAssembly(PASSAGES, asked, Known(), top_k=0)
    with pytest.raises(DataError, match="there is no question to evaluate on"):
        RetrievalAssembly(PASSAGES, [], Known(), top_k=1)
    with pytest.raises(DataError, match="1 of 2 questions name no gold document: 2"):
        RetrievalAssembly(PASSAGES, [*asked, Question("2", "b", ())], Known(), top_k=1)
    with pytest.raises(ConfigError, match="nothing has been searched for yet"):
        RetrievalAssembly(PASSAGES, asked, Known(), top_k=1).answer(asked)
