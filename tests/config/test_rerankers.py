"""From names to the parts of a reranker."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from rag_rl.config.arguments import DataArguments, ReaderArguments, RetrieverArguments
from rag_rl.config.reranker_arguments import RerankerArguments
from rag_rl.config.rerankers import (
    build_cross_encoder,
    build_pairs,
    build_ranking_environment,
    build_reranked,
    settle_adapter,
)
from rag_rl.data import load_questions
from rag_rl.data.pairs import RETRIEVED
from rag_rl.errors import ConfigError, DataError
from rag_rl.reasoning import HopRecord, SingleSearch, Trajectory
from rag_rl.retrieval import StaticRetriever
from rag_rl.tiny import FOLDER
from rag_rl.types import Hit, Passage, Query, Question

TINY = {
    "data_corpus": "${tiny}/data/corpus.jsonl",
    "data_train": "${tiny}/data/demo_1hop.jsonl",
    "data_eval": "${tiny}/data/heldout_1hop.jsonl",
    "data_eval_size": 20,
    "data_train_size": 30,
}
ENCODER = RetrieverArguments(retriever_encoder="${tiny}/encoder", retriever_batch_size=256)
START = RerankerArguments(reranker_model="${tiny}/encoder")


def pair_rows(path, count: int, first: int = 0):
    rows = [
        {
            "query_text": f"Query {i}?",
            "positives": [{"doc_id": "p", "text": f"Text {i}."}],
            "negatives": [{"doc_id": "n", "text": f"Other {i}."}],
            "source_chunk": f"c{i // 2}",
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- rows


def test_rows_are_mined_with_the_retriever():
    train, held_out = build_pairs(RerankerArguments(reranker_candidates=6), DataArguments(**TINY), ENCODER, seed=1)
    assert (len(train), len(held_out)) == (30, 20)
    gold = {q.question: q.gold_doc_ids for q in load_questions(str(FOLDER / "data" / "heldout_1hop.jsonl"))}
    for row in held_out:
        assert tuple(p.doc_id for p in row.positives) == gold[row.query]
        assert len(row.meta[RETRIEVED]) == 6
        found = {p.doc_id for p in (*row.positives, *row.negatives)}
        assert found >= set(row.meta[RETRIEVED])


def test_the_margin_is_for_training_rows_alone():
    args = RerankerArguments(reranker_candidates=6, reranker_false_negative_margin=0.2)
    guarded, held_out = build_pairs(args, DataArguments(**TINY), ENCODER, seed=1)
    plain, same = build_pairs(RerankerArguments(reranker_candidates=6), DataArguments(**TINY), ENCODER, seed=1)
    assert held_out == same
    assert sum(len(row.negatives) for row in guarded) < sum(len(row.negatives) for row in plain)


class Listed:
    """A retriever without an index: the corpus is read for the gold documents."""

    def __init__(self, args, data) -> None:
        self.found = [Passage("d", "Nothing of interest.")]

    def search(self, queries, *, top_k, exclude=None):
        return [[Hit(p, 1.0, 1) for p in self.found] for _ in queries]


def test_a_retriever_of_the_users_own(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "listed", SimpleNamespace(Listed=Listed))
    train, _ = build_pairs(
        RerankerArguments(), DataArguments(**TINY), RetrieverArguments(retriever_name="listed:Listed"), seed=1
    )
    assert {p.doc_id for row in train for p in row.negatives} == {"d"}
    assert all(row.positives[0].text for row in train)


def test_rows_from_one_file_are_split(tmp_path):
    path = pair_rows(tmp_path / "a.jsonl", 20)
    args = RerankerArguments(train_file=path, valid_size=0.2)
    train, held_out = build_pairs(args, DataArguments(), RetrieverArguments(), seed=1)
    assert (len(train), len(held_out)) == (16, 4)
    assert not {row.source_chunk for row in train} & {row.source_chunk for row in held_out}
    counted = build_pairs(
        RerankerArguments(train_file=path, valid_size=6), DataArguments(), RetrieverArguments(), seed=1
    )
    assert len(counted[1]) == 6


def test_rows_from_two_files_are_checked(tmp_path):
    train, valid = pair_rows(tmp_path / "a.jsonl", 6), pair_rows(tmp_path / "b.jsonl", 4, first=6)
    args = RerankerArguments(train_file=train, valid_file=valid)
    sides = build_pairs(args, DataArguments(), RetrieverArguments(), seed=1)
    assert [len(side) for side in sides] == [6, 4]
    leaking = RerankerArguments(train_file=train, valid_file=pair_rows(tmp_path / "c.jsonl", 4, first=5))
    with pytest.raises(DataError, match=r"c.jsonl: 2 of its queries and source chunks are also in .*a.jsonl"):
        build_pairs(leaking, DataArguments(), RetrieverArguments(), seed=1)


def test_nothing_to_read_and_nothing_to_search_with():
    with pytest.raises(ConfigError, match="name a train_file of rows, or data_train and data_corpus"):
        build_pairs(RerankerArguments(), DataArguments(), ENCODER, seed=1)
    with pytest.raises(ConfigError, match="mining needs a retriever"):
        build_pairs(RerankerArguments(), DataArguments(**TINY), RetrieverArguments(retriever_name="none"), seed=1)


# ---- the model


def test_what_is_trained():
    whole = build_cross_encoder(START, use_cpu=True)
    assert all(p.requires_grad for p in whole.parameters())
    args = RerankerArguments(reranker_model="${tiny}/encoder", reranker_train="lora")
    lora = build_cross_encoder(args, use_cpu=True)
    assert 0 < sum(p.requires_grad for p in lora.parameters()) < len(list(lora.parameters()))
    assert lora.transformers_model.peft_config["default"].r == 16
    with pytest.raises(ConfigError, match="reranker_model is not set"):
        build_cross_encoder(RerankerArguments(), use_cpu=True)


def test_a_model_inside_a_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "packaged", SimpleNamespace(where=lambda: str(FOLDER / "encoder")))
    assert build_cross_encoder(RerankerArguments(reranker_model="python:packaged:where"), use_cpu=True).num_labels == 1


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_over_a_folder_is_merged_and_one_over_the_hub_kept(merged):
    model = build_cross_encoder(
        RerankerArguments(reranker_model="${tiny}/encoder", reranker_train="lora"), use_cpu=True
    )
    model.transformers_model.peft_config["default"].base_model_name_or_path = "somebody/on-the-hub"
    settle_adapter(model, merged=merged)
    assert model.transformers_model._hf_peft_config_loaded is not merged
    if not merged:
        model.transformers_model.peft_config["default"].base_model_name_or_path = str(FOLDER)
        settle_adapter(model, merged=False)
        assert not model.transformers_model._hf_peft_config_loaded
    settle_adapter(model, merged=True)  # without an adapter there is nothing to do


def test_pooling_is_chosen_where_the_model_has_a_choice():
    pooled = {
        pooling: build_cross_encoder(
            RerankerArguments(reranker_model="${tiny}/encoder", reranker_pooling=pooling), use_cpu=True
        ).transformers_model.config.classifier_pooling
        for pooling in ("cls", "mean", None)
    }
    assert pooled == {"cls": "cls", "mean": "mean", None: "cls"}


# ---- what rewards an order


def reader(**changes) -> ReaderArguments:
    return ReaderArguments(**{"reader_name": "scripted", **changes})


def test_environments():
    asked = Question("q", "Query?", ("Elm",), ("g",), meta={"decomposition": [{"question": "Query?"}]})
    hop = HopRecord(Query("Query?"), [Hit(Passage("g", "Elm."), 1.0, 1)], "Elm", "found")
    trajectory = Trajectory(asked, [hop], answer="the Elm tree")
    values = {
        name: build_ranking_environment(reader(reader_reward=name)).reward(trajectory)
        for name in ("f1", "ndcg", "recall", "constant", "rag_rl.reasoning:f1_reward")
    }
    assert values == {
        "f1": pytest.approx(2 / 3),
        "ndcg": 1.0,
        "recall": 1.0,
        "constant": 1.0,
        "rag_rl.reasoning:f1_reward": pytest.approx(2 / 3),
    }
    assert build_ranking_environment(reader()).max_hops == 1
    alone = build_ranking_environment(reader(reader_name="none", reader_reward="ndcg"))
    assert isinstance(alone.reader, SingleSearch)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"reader_reward": "bleu"},
            "reader_reward must be one of f1, ndcg, .*, or package.module:attribute, got 'bleu'",
        ),
        ({"reader_name": "none"}, "reader_name none answers nothing: set reader_reward to ndcg"),
        ({"reader_name": "react"}, "reader_name react words its own searches"),
        ({"reader_name": "decomposition"}, "set reader_model"),
    ],
)
def test_environments_that_mean_nothing(changes, expected):
    with pytest.raises(ConfigError, match=expected):
        build_ranking_environment(reader(**changes))


# ---- a reranker in use


def test_a_run_folder_brings_its_weight_along(tmp_path):
    build_cross_encoder(START, use_cpu=True).save_pretrained(str(tmp_path))
    inner = StaticRetriever({})
    assert build_reranked(inner, str(tmp_path), candidates=3).retriever_weight == 0.0
    (tmp_path / "resolved_config.yaml").write_text("seed: 1\n")
    assert build_reranked(inner, str(tmp_path), candidates=3).retriever_weight == 0.0
    (tmp_path / "resolved_config.yaml").write_text("reranker_retriever_weight: 0.3\n")
    assert build_reranked(inner, str(tmp_path), candidates=3).retriever_weight == 0.3


def test_a_trained_reranker_on_top_of_a_retriever(tmp_path):
    model = build_cross_encoder(START, use_cpu=True)
    model.save_pretrained(str(tmp_path))
    passages = [Passage(name, f"Text {name}.") for name in "abc"]
    inner = StaticRetriever({"Where?": passages})
    (hits,) = build_reranked(inner, str(tmp_path), candidates=3).search(["Where?"], top_k=2)
    scores = model.predict([("Where?", p.text) for p in passages], activation_fn=lambda x: x).tolist()
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True)[:2], abs=1e-5)
