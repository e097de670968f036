"""Held-out queries whose candidates are ordered by the retriever, or by a cross-encoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rag_rl.data import PairRow
from rag_rl.data.pairs import RETRIEVED
from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.reranking import RerankingAssembly
from rag_rl.evaluation.scoring import evaluate
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage


def row(query: str, positives: str, negatives: str, retrieved: str | None = None) -> PairRow:
    """Documents are words."""
    made = (tuple(Passage(word, f"{word}.") for word in words.split()) for words in (positives, negatives))
    return PairRow(query, *made, meta={} if retrieved is None else {RETRIEVED: retrieved.split(), "qid": "q"})


class Scores:
    """Scores a document by a table."""

    def __init__(self, **table: float) -> None:
        self.table = table

    def predict(self, inputs, *, batch_size, activation_fn, show_progress_bar):
        return activation_fn(torch.tensor([self.table.get(text.rstrip("."), 0.0) for _, text in inputs]))


MINED = [row("one", "a lost", "b c d", "b a c d"), row("two", "x", "y", "y x")]


def test_before_is_the_retrievers_own_order():
    assembly = RerankingAssembly(MINED, top_k=1)
    assert [q.gold_doc_ids for q in assembly.questions] == [("a", "lost"), ("x",)]
    found = evaluate(assembly.under_training(SimpleNamespace(model=Scores(a=9.0)), batch_size=1), assembly.questions)
    first = found.rows[0]["scores"]
    # Of two relevant documents one was retrieved, at rank 2.
    assert first["recall@all"] == 0.5
    assert first["mrr@10"] == 0.5
    assert first["ndcg@10"] == pytest.approx(0.6309297535714575 / (1 + 0.6309297535714575))
    assert first["pairwise_accuracy"] == pytest.approx(2 / 3)
    assert (first["recall@1"], first["success@1"]) == (0.0, 0.0)
    assert "mean_margin" not in first
    assert found.metrics["mrr@10"] == 0.5


def test_a_cross_encoder_orders_the_same_candidates():
    assembly = RerankingAssembly(MINED, top_k=1).with_cross_encoder(Scores(a=2.0, x=1.0, b=0.5, y=3.0))
    found = evaluate(assembly, assembly.questions)
    first, second = (one["scores"] for one in found.rows)
    assert (first["mrr@10"], second["mrr@10"]) == (1.0, 0.5)
    assert first["recall@all"] == 0.5, "no order finds more"
    assert first["mean_margin"] == pytest.approx((1.5 + 2 + 2) / 3)
    assert second["mean_margin"] == -2.0
    assert [p["doc_id"] for p in found.rows[0]["passages"]] == ["a"]


def test_without_an_order_the_start_model_is_what_it_is_measured_against():
    assembly = RerankingAssembly([row("one", "a", "b c")], top_k=2)
    found = evaluate(assembly.under_training(SimpleNamespace(model=Scores(b=1.0)), batch_size=1), assembly.questions)
    scores = found.rows[0]["scores"]
    assert (scores["pairwise_accuracy"], scores["mean_margin"]) == (0.25, -0.5)
    assert assembly.lists() == [("one", ["a.", "b.", "c."], [1.0, 0.0, 0.0])]


def test_lists_are_in_the_retrievers_order():
    assert RerankingAssembly(MINED, top_k=1).lists()[0] == (
        "one",
        ["b.", "a.", "c.", "d."],
        [0.0, 1.0, 0.0, 0.0],
    )


def test_candidates_of_one_kind_have_no_pairs():
    assembly = RerankingAssembly([row("one", "lost", "b", "b")], top_k=1)
    scores = evaluate(assembly, assembly.questions).rows[0]["scores"]
    assert scores["pairwise_accuracy"] is None
    assert (scores["recall@all"], scores["ndcg@10"]) == (0.0, 0.0)


def test_a_saved_model_is_reloaded(tmp_path):
    from sentence_transformers import CrossEncoder

    torch.manual_seed(0)
    model = CrossEncoder(str(FOLDER / "encoder"), num_labels=1, device="cpu")
    model.save_pretrained(str(tmp_path))
    assembly = RerankingAssembly(MINED, top_k=1)
    reloaded = assembly.reloaded(tmp_path, device="cpu", batch_size=1)
    ours = evaluate(assembly.with_cross_encoder(model), assembly.questions)
    assert evaluate(reloaded, assembly.questions).metrics == pytest.approx(ours.metrics, abs=1e-5)
    assert assembly.cross_encoder is None


def test_bad_input():
    with pytest.raises(ConfigError, match="retriever_top_k must be at least 1, got 0"):
        RerankingAssembly(MINED, top_k=0)
    with pytest.raises(DataError, match="there is no query to evaluate on"):
        RerankingAssembly([], top_k=1)
    with pytest.raises(DataError, match=r"2 of 3 held-out rows have the retriever's order in their meta"):
        RerankingAssembly([*MINED, row("three", "a", "b")], top_k=1)
