"""Names become parts: with the real encoder, the real reader and the real data of rag_rl.tiny."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rl.config.arguments import DataArguments, GeneratorArguments, RetrieverArguments, RewardArguments
from rag_rl.config.parts import (
    build_assembly,
    build_corpus,
    build_encoder,
    build_probe,
    build_prompts,
    build_questions,
    build_retriever,
    build_rewards,
    expand,
    import_attribute,
    index_folder,
)
from rag_rl.errors import ConfigError, DataError, IndexMismatchError
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage, Question

TINY = RetrieverArguments(retriever_encoder="${tiny}/encoder", retriever_top_k=3)
DATA = DataArguments(
    data_corpus="${tiny}/data/corpus.jsonl",
    data_train="${tiny}/data/demo_1hop.jsonl",
    data_eval="${tiny}/data/heldout_1hop.jsonl",
    data_eval_size=20,
    data_train_size=30,
)
GENERATOR = GeneratorArguments(generator_prompt="tiny_answer")


def model() -> SimpleNamespace:
    return SimpleNamespace(model_name_or_path="${tiny}/reader", model_revision="main")


def training(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"max_completion_length": 32, "reward_weights": None, **changes})


def write_questions(path: Path, ids: list[str]) -> str:
    rows = [{"qid": i, "question": f"Who is {i}?", "answers": [i]} for i in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(TINY)


@pytest.fixture(scope="module")
def retriever():
    return build_retriever(TINY, DATA)


# ---- names


def test_expand(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_RL_DATA", str(tmp_path))
    (tmp_path / "scifact").mkdir()
    assert expand("${tiny}/reader") == str(FOLDER / "reader")
    assert expand("${data}/scifact") == str(tmp_path / "scifact")
    assert expand("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"


def test_import_attribute():
    assert import_attribute("json:dumps") is json.dumps
    for name in ("no_such_module:x", "json:no_such_thing"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot be imported"):
            import_attribute(name)


# ---- questions and corpus


def test_questions():
    train, held_out = build_questions(DATA, seed=1)
    assert (len(train), len(held_out)) == (30, 20)
    assert not {q.question for q in train} & {q.question for q in held_out}
    # Another seed trains on other questions, and is measured on the same.
    other_train, other_held_out = build_questions(DATA, seed=2)
    assert other_held_out == held_out
    assert other_train != train


def test_questions_split_off(tmp_path):
    data = DataArguments(
        data_train=write_questions(tmp_path / "q.jsonl", [f"q{i}" for i in range(10)]), data_eval_size=3
    )
    train, held_out = build_questions(data, seed=0)
    assert (len(train), len(held_out)) == (7, 3)
    assert not {q.qid for q in train} & {q.qid for q in held_out}


def test_leaked_questions(tmp_path):
    train = write_questions(tmp_path / "train.jsonl", ["a", "b", "c"])
    held_out = write_questions(tmp_path / "eval.jsonl", ["c", "d", "a"])
    with pytest.raises(DataError, match=r"eval\.jsonl: 2 held-out questions are also in .*train\.jsonl: c, a"):
        build_questions(DataArguments(data_train=train, data_eval=held_out), seed=0)


def test_no_questions_named():
    with pytest.raises(ConfigError, match="data_train is not set"):
        build_questions(DataArguments(), seed=0)


def test_probe():
    assert build_probe(DataArguments()) == []
    assert len(build_probe(dataclasses.replace(DATA, data_train_size=7))) == 7
    assert len(build_probe(dataclasses.replace(DATA, data_train_size=None))) == 840


def test_corpus_and_chunks(encoder):
    whole = list(build_corpus(DATA))
    chunks = list(
        build_corpus(
            dataclasses.replace(DATA, data_chunk_tokens=12, data_chunk_overlap=2), tokenizer=encoder.model.tokenizer
        )
    )
    assert len(whole) == 560
    assert len(chunks) > len(whole)
    assert {p.doc_id for p in chunks} == {p.doc_id for p in whole}
    with pytest.raises(ConfigError, match="data_corpus is not set"):
        build_corpus(DataArguments())


# ---- encoder and retriever


def test_encoder(encoder):
    assert encoder.encode_queries(["Who?"]).shape == (1, encoder.dimension)
    with pytest.raises(ConfigError, match="retriever_encoder is not set"):
        build_encoder(RetrieverArguments())


def test_encoder_out_of_a_python_package(tmp_path, monkeypatch):
    (tmp_path / "packaged.py").write_text(f"def where(): return {str(FOLDER / 'encoder')!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = build_encoder(RetrieverArguments(retriever_encoder="python:packaged:where"))
    assert found.fingerprint == build_encoder(TINY).fingerprint
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_encoder(RetrieverArguments(retriever_encoder="python:nothing_there:where"))


def test_index_folder_follows_what_is_in_it(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_CACHE", str(tmp_path))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"doc_id": "a", "text": "b"}\n')
    data = DataArguments(data_corpus=str(corpus))
    other_encoder = build_encoder(dataclasses.replace(TINY, retriever_document_prompt="passage: "))
    first = index_folder(TINY, data, encoder)
    assert first == index_folder(TINY, data, encoder)
    assert first.parent == tmp_path / "indexes"
    # An overlap without chunks cuts nothing; how many passages are asked for changes nothing either.
    assert first == index_folder(TINY, dataclasses.replace(data, data_chunk_overlap=1), encoder)
    assert first == index_folder(dataclasses.replace(TINY, retriever_top_k=9), data, encoder)
    chunked = dataclasses.replace(data, data_chunk_tokens=64)
    others = [
        index_folder(TINY, chunked, encoder),
        index_folder(TINY, dataclasses.replace(chunked, data_chunk_overlap=1), encoder),
        index_folder(TINY, dataclasses.replace(data, data_title_column="title"), encoder),
        index_folder(TINY, data, other_encoder),
        index_folder(dataclasses.replace(TINY, retriever_backend="chroma"), data, encoder),
        index_folder(TINY, DATA, encoder),
    ]
    corpus.write_text('{"doc_id": "a", "text": "b"}\n{"doc_id": "c", "text": "d"}\n')
    others.append(index_folder(TINY, data, encoder))
    assert len({first, *others}) == 8
    named = dataclasses.replace(TINY, retriever_index_path=str(tmp_path / "mine"))
    assert index_folder(named, data, encoder) == tmp_path / "mine"


def test_dense_retriever_is_built_once(retriever):
    train, _ = build_questions(DATA, seed=0)
    found = retriever.search([q.question for q in train], top_k=3)
    hit = [set(q.gold_doc_ids) <= {h.passage.doc_id for h in hits} for q, hits in zip(train, found, strict=True)]
    assert sum(hit) / len(hit) > 0.5
    manifest = retriever.folder / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert build_retriever(TINY, DATA).fingerprint == retriever.fingerprint
    assert manifest.stat().st_mtime_ns == before


def test_no_retriever():
    assert build_retriever(RetrieverArguments(retriever_name="none"), DATA) is None


def test_shuffled_retriever_finds_the_wrong_passages(retriever):
    shuffled = build_retriever(dataclasses.replace(TINY, retriever_shuffled=True), DATA, seed=0)
    train, _ = build_questions(DATA, seed=0)
    asked = [q.question for q in train]
    right = [h[0].passage.doc_id for h in retriever.search(asked, top_k=1)]
    wrong = [h[0].passage.doc_id for h in shuffled.search(asked, top_k=1)]
    assert sum(a == b for a, b in zip(right, wrong, strict=True)) <= 2


def test_own_retriever(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from rag_rl.retrieval import StaticRetriever\n"
        "from rag_rl.types import Passage\n"
        "def make(args, data): return StaticRetriever({}, default=[Passage(data.data_corpus, 'text')])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = RetrieverArguments(retriever_name="own:make", retriever_top_k=1)
    found = build_retriever(own, DataArguments(data_corpus="mine"))
    assert found.search(["x"], top_k=1)[0][0].passage.doc_id == "mine"
    with pytest.raises(ConfigError, match="retriever_shuffled needs the dense retriever, not 'own:make'"):
        build_retriever(dataclasses.replace(own, retriever_shuffled=True), DataArguments())


def test_unknown_retriever():
    expected = "retriever_name must be dense, none or package.module:attribute, got 'bm25'"
    with pytest.raises(ConfigError, match=expected):
        build_retriever(RetrieverArguments(retriever_name="bm25"), DATA)


def test_index_of_another_encoder(retriever):
    other = dataclasses.replace(TINY, retriever_index_path=str(retriever.folder), retriever_max_length=16)
    with pytest.raises(IndexMismatchError, match="max_length 256 there, 16 here"):
        build_retriever(other, DATA)


# ---- assembly and prompts


def test_assembly(retriever):
    asked = model()
    assembly, tokenizer = build_assembly(GENERATOR, retriever, top_k=3, training=training(), model=asked)
    assert asked.model_name_or_path == str(FOLDER / "reader")
    assert tokenizer.pad_token is not None
    assert assembly.generator is None
    assert (assembly.top_k, assembly.max_new_tokens) == (3, 32)
    assert assembly.max_prompt_tokens == 2048 - 32


def test_prompt_budget(retriever):
    small = dataclasses.replace(GENERATOR, generator_max_prompt_tokens=100)
    assert build_assembly(small, None, top_k=1, training=training(), model=model())[0].max_prompt_tokens == 100
    large = dataclasses.replace(GENERATOR, generator_max_prompt_tokens=99_999)
    assert build_assembly(large, None, top_k=1, training=training(), model=model())[0].max_prompt_tokens == 2016
    with pytest.raises(ConfigError, match="max_completion_length 2048 leaves no room for a prompt"):
        build_assembly(GENERATOR, None, top_k=1, training=training(max_completion_length=2048), model=model())


@pytest.mark.parametrize("name", ["no/such/folder", "", "${tiny}/data"])
def test_model_that_cannot_be_loaded(name):
    missing = SimpleNamespace(model_name_or_path=name, model_revision="main")
    with pytest.raises(ConfigError, match="model_name_or_path"):
        build_assembly(GENERATOR, None, top_k=1, training=training(), model=missing)


def test_prompt_without_its_placeholders(tmp_path, retriever):
    (tmp_path / "p.txt").write_text("Answer $question")
    asked = GeneratorArguments(generator_prompt=str(tmp_path / "p.txt"))
    with pytest.raises(ConfigError, match="passages"):
        build_assembly(asked, retriever, top_k=1, training=training(), model=model())
    build_assembly(asked, None, top_k=1, training=training(), model=model())


def test_prompts(retriever, caplog):
    train, _ = build_questions(DATA, seed=0)
    assembly, _ = build_assembly(GENERATOR, retriever, top_k=3, training=training(), model=model())
    with caplog.at_level(logging.INFO):
        found = build_prompts(assembly, train)
    assert set(found.column_names) == {
        "prompt", "question", "answers", "passages", "passage_ids", "gold_doc_ids", "qid",
    }  # fmt: skip
    assert found["qid"] == [q.qid for q in train]
    row = found[0]
    assert row["prompt"][0]["role"] == "user"
    assert row["question"] in row["prompt"][0]["content"]
    assert len(row["passages"]) == 3
    assert "% of the training prompts show no gold passage" in caplog.text


def test_prompts_that_are_too_long(retriever, caplog):
    train, _ = build_questions(DATA, seed=0)
    small = dataclasses.replace(GENERATOR, generator_max_prompt_tokens=60)
    assembly, tokenizer = build_assembly(small, retriever, top_k=3, training=training(), model=model())
    with caplog.at_level(logging.WARNING):
        found = build_prompts(assembly, train)
    assert "prompts were longer than 60 tokens" in caplog.text
    encoded = tokenizer.apply_chat_template(list(found["prompt"]), add_generation_prompt=True)["input_ids"]
    assert max(map(len, encoded)) <= 60
    assert all(row["question"] in row["prompt"][0]["content"] for row in found), "the question is never cut"
    long = [Question("q", "who " * 3000, ("a",))]
    with pytest.raises(DataError, match="even without passages"):
        build_prompts(assembly, long)


# ---- rewards


COLUMNS = {
    "completions": ["Answer: Mira", "It is Mira", "Answer: nobody"],
    "completion_ids": [[1, 2, 3]] * 3,
    "question": ["Who?"] * 3,
    "answers": [["Mira"]] * 3,
    "passages": [["Mira rules Elmton."]] * 3,
}


def test_rewards_by_name():
    names = ["em", "f1", "contains_em", "format", "length", "groundedness", "citation", "constant"]
    rewards = build_rewards(RewardArguments(reward_names=names, reward_length_target=16), GENERATOR, training())
    found = rewards.score(**COLUMNS)
    assert list(found) == names
    assert found["em"] == [1.0, 0.0, 0.0]
    assert found["format"] == [1.0, 0.0, 1.0]
    assert len(set(found["constant"])) == 1


def test_weights_are_taken_over_from_trl():
    import asyncio

    trl = training(reward_weights=[1.0, 0.5])
    rewards = build_rewards(RewardArguments(reward_names=["em", "format"]), GENERATOR, trl)
    assert trl.reward_weights is None, "TRL sees one function"
    assert asyncio.run(rewards.combined(prompts=[""] * 3, **COLUMNS)) == [1.5, 0.0, 0.5]
    assert rewards.combined.__name__ == "reward"


def test_own_reward(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def short(*, completions, **_): return [1 / len(c) for c in completions]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = build_rewards(RewardArguments(reward_names=["mine:short"]), GENERATOR, training())
    assert rewards.score(**COLUMNS)["mine:short"] == [1 / len(text) for text in COLUMNS["completions"]]
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("args", "weights", "expected"),
    [
        (RewardArguments(reward_names=["em", "fromat"]), None, "'fromat' is not one of em, f1, contains_em, format"),
        (
            RewardArguments(reward_names=["em"]),
            [1.0, 2.0],
            r"reward_weights has 2 values for 1 reward_names: \['em'\]",
        ),
        (RewardArguments(reward_names=["em"], reward_required=["f1"]), None, r"reward_required names \['f1'\]"),
        (RewardArguments(reward_names=["reward_model"]), None, "reward_model is not set"),
        (RewardArguments(reward_names=["length"]), None, "reward_length_target must be .* below .* 32, got 64"),
        (RewardArguments(reward_names=["em", "em"]), None, "named twice"),
        (RewardArguments(reward_names=[]), None, "at least one part"),
    ],
)
def test_rewards_that_cannot_be(args, weights, expected):
    with pytest.raises(ConfigError, match=expected):
        build_rewards(args, GENERATOR, training(reward_weights=weights))


def test_a_passage_is_what_was_indexed(retriever):
    assert isinstance(retriever.passages[0], Passage)
