"""Held-out queries whose candidates are ordered by the retriever, or by a cross-encoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rag_rl.data import PairRow
from rag_rl.data.pairs import ANSWERS, RETRIEVED, RETRIEVED_SCORES
from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.reranking import RerankingAssembly
from rag_rl.evaluation.scoring import evaluate
from rag_rl.reasoning import DecompositionReader, Environment, Failure, SingleSearch, retrieval_reward
from rag_rl.tiny import FOLDER
from rag_rl.trainers.reranker_grpo import Order
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


def test_the_retrievers_scores_are_kept_and_can_have_a_part_in_the_order():
    mined = PairRow(
        "one", (Passage("a", "a."),), (Passage("b", "b."),), meta={RETRIEVED: ["b", "a"], RETRIEVED_SCORES: [0.9, 0.2]}
    )
    table = Scores(a=3.0, b=1.0)
    for weight, order in ((0.0, ["a", "b"]), (0.4, ["a", "b"]), (0.6, ["b", "a"])):
        assembly = RerankingAssembly([mined], top_k=2, retriever_weight=weight)
        (row,) = evaluate(assembly, assembly.questions).rows
        assert [p["score"] for p in row["passages"]] == [0.9, 0.2]
        (row,) = evaluate(assembly.with_cross_encoder(table), assembly.questions).rows
        assert [p["doc_id"] for p in row["passages"]] == order


def test_the_start_of_a_reinforced_reranker_is_what_it_is_measured_against():
    assembly = RerankingAssembly(MINED, top_k=1)
    trainer = SimpleNamespace(model=Scores(a=9.0, x=9.0))
    start = evaluate(assembly.against_start().under_training(trainer, batch_size=1), assembly.questions)
    assert start.metrics["mrr@10"] == 1.0
    assert list(assembly.against_start().baselines()) == ["retriever"]
    found = evaluate(assembly.baselines()["retriever"].under_training(trainer, batch_size=1), assembly.questions)
    assert found.metrics["mrr@10"] == 0.5
    assert RerankingAssembly([row("one", "a", "b c")], top_k=2).baselines() == {}, "nobody knows a retriever's order"


ANSWERED = [
    PairRow(query, (Passage(gold, f"{gold}."),), (Passage("b", "b."),), meta={RETRIEVED: ["b", gold], ANSWERS: [gold]})
    for query, gold in (("one", "a"), ("two", "x"))
]


def test_what_is_ranked_first_is_read():
    environment = Environment(DecompositionReader(), max_hops=1)
    assembly = RerankingAssembly(ANSWERED, top_k=1, environment=environment)
    assert assembly.questions[0].answers == ("a",)
    by_retriever = evaluate(assembly, assembly.questions)
    assert (by_retriever.metrics["f1"], by_retriever.metrics["mrr@10"]) == (0.0, 0.5)
    found = evaluate(assembly.with_cross_encoder(Scores(a=1.0, x=-1.0)), assembly.questions)
    assert [one["scores"]["em"] for one in found.rows] == [1.0, 0.0]
    assert (found.rows[0]["answer"], found.rows[0]["reply"]) == ("a", "a")
    reward = assembly.reward()
    assert reward([Order(0, (1,)), Order(0, (0,)), Order(1, (1,))]) == [1.0, 0.0, 1.0]


def test_judgements_reward_an_order_that_nobody_reads():
    environment = Environment(SingleSearch(), max_hops=1, reward=retrieval_reward("ndcg"))
    assembly = RerankingAssembly(MINED, top_k=1, environment=environment)
    assert "em" not in evaluate(assembly, assembly.questions).metrics
    assert assembly.reward()([Order(1, (1,)), Order(1, (0,))]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="an order is rewarded by an environment, and there is none"):
        RerankingAssembly(MINED, top_k=1).reward()


class Silent(DecompositionReader):
    """Fails for the question "one"."""

    def observe(self, trajectories, searches, hits):
        told = super().observe(trajectories, searches, hits)
        return [
            Failure("down") if t.question.question == "one" else o for t, o in zip(trajectories, told, strict=True)
        ]


def test_a_reader_that_failed_is_no_score():
    assembly = RerankingAssembly(ANSWERED, top_k=1, environment=Environment(Silent(), max_hops=1))
    found = evaluate(assembly, assembly.questions)
    assert set(found.rows[0]["scores"].values()) == {None}
    assert found.metrics["f1"] == found.rows[1]["scores"]["f1"]
    assert assembly.reward()([Order(0, (1,)), Order(1, (1,))]) == [None, 1.0]


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
    with pytest.raises(DataError, match=r"2 of 3 rows have the retriever's order in their meta"):
        RerankingAssembly([*MINED, row("three", "a", "b")], top_k=1)
    with pytest.raises(DataError, match="reranker_retriever_weight needs the retriever's scores: mine the rows"):
        RerankingAssembly(MINED, top_k=1, retriever_weight=0.5)
    with pytest.raises(DataError, match=r"no row has accepted answers in its meta \('answers'\)"):
        RerankingAssembly(MINED, top_k=1, environment=Environment(DecompositionReader(), max_hops=1))
    short = PairRow("q", (Passage("a", "a."),), meta={RETRIEVED: ["a"], RETRIEVED_SCORES: []})
    with pytest.raises(DataError, match="query 'q': retrieved_scores has 0 values for 1 documents"):
        RerankingAssembly([short], top_k=1)
