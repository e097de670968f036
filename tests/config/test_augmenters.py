"""From names to the parts of query augmentation."""

from __future__ import annotations

import json
import logging
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments
from rag_rl.config.augmenters import (
    SourcedQuery,
    augmentation_task,
    build_augmented_encoder,
    build_augmented_retriever,
    build_augmenter,
    build_dense_index,
    build_queries,
    own_rows,
    wrap_generator,
)
from rag_rl.data.reinforced_ir import SyntheticQuery, write_queries
from rag_rl.errors import ConfigError, DataError
from rag_rl.generation import OpenAIGenerator, ScriptedGenerator
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage, Question

TINY = {
    "data_corpus": "${tiny}/data/corpus.jsonl",
    "data_train": "${tiny}/data/demo_1hop.jsonl",
    "data_eval": "${tiny}/data/heldout_1hop.jsonl",
    "data_train_size": 6,
    "data_eval_size": 4,
}
ASKED = AugmenterArguments(augmenter_prompt="tiny_passage", augmenter_task="tiny", augmenter_prefix="About: ")
PASSAGES = [
    Passage("a", "Alder lies on the Ash.", "Alder"),
    Passage("b", "Birch is known for tin."),
    Passage("c", "Cedar, first part.", chunk=0),
    Passage("c", "Cedar, second part.", chunk=1),
    Passage("d", "Birch is known for tin."),
]


@pytest.fixture(scope="module")
def index():
    encoder = RetrieverArguments(retriever_encoder="${tiny}/encoder", retriever_batch_size=256)
    return build_dense_index(encoder, DataArguments(**TINY))


def question_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(qid: str, text: str, *gold: str) -> dict:
    return {"qid": qid, "question": text, "answers": [], "gold_doc_ids": list(gold)}


# ---- the index


@pytest.mark.parametrize(
    "options",
    [{"retriever_name": "none"}, {"retriever_shuffled": True}, {"retriever_reranker": "x"}],
)
def test_an_index_without_vectors(options):
    with pytest.raises(ConfigError, match="retriever_name must be dense, without"):
        build_dense_index(RetrieverArguments(**options), DataArguments(**TINY))


# ---- queries


def test_questions_come_with_the_rows_of_their_documents(index):
    train, held_out = build_queries(DataArguments(**TINY), index.passages, seed=1)
    assert (len(train), len(held_out)) == (6, 4)
    for query in (*train, *held_out):
        assert [index.passages[row].doc_id for row in query.rows] == list(query.question.gold_doc_ids)
    assert {query.question.qid.split("-")[0] for query in held_out} == {"heldout"}
    again, _ = build_queries(DataArguments(**TINY), index.passages, seed=1)
    assert again == train


def test_a_document_in_chunks_has_several_rows(tmp_path):
    path = question_file(
        tmp_path / "q.jsonl", [asked("1", "Where is Cedar?", "c"), asked("2", "Tin or Ash?", "b", "a")]
    )
    train, held_out = build_queries(DataArguments(data_train=path, data_eval_size=1), PASSAGES, seed=1)
    assert sorted([*train, *held_out], key=lambda query: query.question.qid) == [
        SourcedQuery(Question("1", "Where is Cedar?", (), ("c",)), (2, 3)),
        SourcedQuery(Question("2", "Tin or Ash?", (), ("b", "a")), (1, 0)),
    ]


def test_published_queries_find_their_passage_by_its_text(tmp_path):
    pairs = [("One?", "Alder\nAlder lies on the Ash."), ("Two?", PASSAGES[1].text), ("Three?", PASSAGES[3].text)]
    path = tmp_path / "queries.json"
    write_queries(path, [SyntheticQuery(*pair) for pair in pairs])
    train, held_out = build_queries(DataArguments(data_train=str(path), data_eval_size=1), PASSAGES, seed=1)
    found = {query.text: query for query in (*train, *held_out)}
    assert (len(train), len(held_out)) == (2, 1)
    assert found["One?"].rows == (0,)
    # Of equal passages all are meant; of a document's chunks only the one that the query was written for.
    assert (found["Two?"].rows, found["Two?"].question.gold_doc_ids) == ((1, 4), ("b", "d"))
    assert (found["Three?"].rows, found["Three?"].question.gold_doc_ids) == ((3,), ("c",))
    only, _ = build_queries(DataArguments(data_train=str(path), data_eval_size=1, data_train_size=1), PASSAGES, seed=1)
    assert len(only) == 1


def test_published_queries_to_learn_from_and_questions_to_evaluate_on(tmp_path):
    path = tmp_path / "queries.json"
    write_queries(path, [SyntheticQuery("One?", PASSAGES[1].text)])
    judged = question_file(
        tmp_path / "q.jsonl", [asked("7", "Seven?", "a"), asked("8", "Eight?", "b"), asked("9", "Nine?", "c")]
    )
    train, held_out = build_queries(
        DataArguments(data_train=str(path), data_eval=judged, data_eval_size=2), PASSAGES, seed=1
    )
    assert [query.text for query in train] == ["One?"]
    assert len(held_out) == 2


@pytest.mark.parametrize("file", ["questions.jsonl", "queries.json"])
def test_a_folder_of_synthesize_queries(tmp_path, file):
    if file == "queries.json":
        write_queries(tmp_path / file, [SyntheticQuery(f"{i}?", PASSAGES[1].text) for i in range(3)])
    else:
        question_file(tmp_path / file, [asked(str(i), f"{i}?", "b") for i in range(3)])
    train, held_out = build_queries(DataArguments(data_train=str(tmp_path), data_eval_size=1), PASSAGES, seed=1)
    assert {query.text for query in (*train, *held_out)} == {"0?", "1?", "2?"}


def test_queries_without_a_passage_are_counted(tmp_path, caplog):
    path = tmp_path / "queries.json"
    texts = [PASSAGES[0].contents, "Nobody wrote this.", PASSAGES[1].text, "Nor this.", PASSAGES[1].text]
    write_queries(path, [SyntheticQuery(f"{i}?", text) for i, text in enumerate(texts)])
    rows = [asked("1", "One?", "b"), asked("2", "Two?")]
    data = DataArguments(data_train=str(path), data_eval=question_file(tmp_path / "q.jsonl", rows))
    with caplog.at_level(logging.WARNING):
        train, held_out = build_queries(data, PASSAGES, seed=1)
    assert (len(train), len(held_out)) == (3, 1)
    assert caplog.messages == [
        f"{path}: 2 of 5 queries are left out: the corpus lacks their passage",
        f"{tmp_path / 'q.jsonl'}: 1 of 2 queries are left out: the corpus lacks their passage",
    ]


def test_no_query_has_a_passage(tmp_path):
    path = tmp_path / "queries.json"
    write_queries(path, [SyntheticQuery(f"{i}?", "Nobody wrote this.") for i in range(3)])
    with pytest.raises(DataError, match=r"queries.json: the corpus holds no passage of any of its 2 queries"):
        build_queries(DataArguments(data_train=str(path), data_eval_size=1), PASSAGES, seed=1)


def test_queries_that_are_worded_as_held_out_ones_are_left_out(tmp_path, caplog):
    path = tmp_path / "queries.json"
    write_queries(path, [SyntheticQuery("What is  one?", PASSAGES[1].text), SyntheticQuery("Two?", PASSAGES[1].text)])
    judged = question_file(tmp_path / "q.jsonl", [asked("7", "what is One?", "a")])
    with caplog.at_level(logging.WARNING):
        train, held_out = build_queries(DataArguments(data_train=str(path), data_eval=judged), PASSAGES, seed=1)
    assert ([query.text for query in train], [query.text for query in held_out]) == (["Two?"], ["what is One?"])
    assert caplog.messages == ["1 of 2 queries to learn from are left out: held-out ones are worded alike"]


def test_every_query_is_held_out(tmp_path):
    rows = [asked(str(i), "One?", "a") for i in range(3)]
    path = question_file(tmp_path / "q.jsonl", rows)
    with pytest.raises(DataError, match=r"q.jsonl: every query to learn from is also held out"):
        build_queries(DataArguments(data_train=path, data_eval=path), PASSAGES, seed=1)


def test_folds_and_qrels(tmp_path):
    path = question_file(tmp_path / "q.jsonl", [asked(str(i), f"{i}?", "b") for i in range(6)])
    train, held_out = build_queries(DataArguments(data_train=path, data_folds=3, data_fold=1), PASSAGES, seed=1)
    assert (len(train), len(held_out)) == (4, 2)
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{i}\ta\t1\n" for i in range(6)))
    data = DataArguments(data_train=path, data_train_qrels=str(tmp_path / "qrels.tsv"), data_eval_size=2)
    train, _ = build_queries(data, PASSAGES, seed=1)
    assert {query.rows for query in train} == {(0,)}


def test_nothing_is_named_or_too_much(tmp_path):
    with pytest.raises(ConfigError, match="data_train is not set: name questions with gold documents"):
        build_queries(DataArguments(), PASSAGES, seed=1)
    path = tmp_path / "queries.json"
    write_queries(path, [SyntheticQuery("One?", PASSAGES[1].text)])
    with pytest.raises(ConfigError, match="data_folds is for files of questions"):
        build_queries(DataArguments(data_train=str(path), data_folds=3), PASSAGES, seed=1)


def test_of_several_rows_the_one_that_is_most_similar():
    matrix = np.array([[1, 0], [0, 1], [0.5, 0.5]], dtype=np.float32)
    index = SimpleNamespace(vectors=lambda rows: matrix[rows])
    queries = [SourcedQuery(Question(str(i), "?", ()), rows) for i, rows in enumerate([(0, 1, 2), (0, 2), (1,)])]
    vectors = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    assert own_rows(queries, vectors, index).tolist() == [1, 2, 1]


# ---- the augmenter


def test_a_local_model_is_asked_as_told():
    model = AugmenterModelArguments(augmenter_model="${tiny}/reader")
    augmenter = build_augmenter(
        AugmenterArguments(augmenter_prompt="tiny_passage", augmenter_max_new_tokens=12), model
    )
    (said,) = augmenter.augment(["Where does Gilpabert live?"])
    assert said
    assert 0 < len(said.split()) <= 12
    assert str(FOLDER / "reader") in augmenter.name
    with pytest.raises(DataError, match="cannot load the model"):
        build_augmenter(ASKED, AugmenterModelArguments(augmenter_model="no/such-model"))


def test_the_name_changes_with_the_weights(tmp_path):
    shutil.copytree(FOLDER / "reader", tmp_path / "reader")
    model = AugmenterModelArguments(augmenter_model=str(tmp_path / "reader"))
    first = build_augmenter(ASKED, model).fingerprint
    assert build_augmenter(ASKED, model).fingerprint == first
    os.utime(tmp_path / "reader" / "model.safetensors", (1, 1))
    assert build_augmenter(ASKED, model).fingerprint != first


def test_an_endpoint_an_own_one_and_none(monkeypatch):
    model = AugmenterModelArguments(
        augmenter_name="openai", augmenter_model="m", augmenter_base_url="http://127.0.0.1:9/v1"
    )
    augmenter = build_augmenter(ASKED, model)
    assert isinstance(augmenter.generator, OpenAIGenerator)
    assert augmenter.name == "http://127.0.0.1:9/v1 m"
    assert build_augmenter(ASKED, AugmenterModelArguments(augmenter_name="none")) is None
    own = SimpleNamespace(make=lambda args, model: (args, model))
    monkeypatch.setitem(__import__("sys").modules, "own_augmenter", own)
    mine = AugmenterModelArguments(augmenter_name="own_augmenter:make")
    assert build_augmenter(ASKED, mine) == (ASKED, mine)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"augmenter_name": "hyde"}, "augmenter_name must be local, openai, none or package.module:attribute, got 'h"),
        ({}, "augmenter_name local needs a model: set augmenter_model"),
        ({"augmenter_name": "openai"}, "augmenter_name openai needs a model: set augmenter_model"),
    ],
)
def test_augmenters_that_mean_nothing(options, expected):
    with pytest.raises(ConfigError, match=expected):
        build_augmenter(ASKED, AugmenterModelArguments(**options))


def test_prompts_and_tasks():
    assert augmentation_task(ASKED) == (
        "Given a question about a person, a town, a river or a guild, retrieve the passage that answers it.",
        "passage about the subject",
    )
    assert augmentation_task(AugmenterArguments(augmenter_answer_type="song"))[1] == "song"
    with pytest.raises(ConfigError, match="there is no task 'x'"):
        augmentation_task(AugmenterArguments(augmenter_task="x"))
    with pytest.raises(ConfigError, match="no_such_prompt"):
        wrap_generator(AugmenterArguments(augmenter_prompt="no_such_prompt"), ScriptedGenerator([]))


# ---- both together


def test_a_retriever_that_asks_the_augmenter(index):
    text = index.passages[7].text
    generator = ScriptedGenerator(lambda prompt, number: text)
    args = AugmenterArguments(
        augmenter_prompt="augment_query", augmenter_task="tiny", augmenter_prefix="", augmenter_weight=0.1
    )
    retriever = build_augmented_retriever(args, index, wrap_generator(args, generator))
    ((hit,),) = retriever.search(["Where does nobody live?"], top_k=1)
    assert hit.passage == index.passages[7]
    (turns,) = generator.prompts
    assert "Write a brief passage about the subject" in turns[0]["content"]
    assert turns[0]["content"].startswith("Given a question about a person")
    assert (retriever.weight, retriever.prefix, retriever.side) == (0.1, "", "document")
    # The same vectors from another encoder of these weights, without an index to search.
    alone = build_augmented_encoder(args, index.encoder, wrap_generator(args, generator))
    query = ["Where does nobody live?"]
    assert (alone.encode_queries(query) == retriever.encode_queries(query)).all()
    with pytest.raises(ConfigError, match="has no index to search"):
        alone.search(query, top_k=1)
