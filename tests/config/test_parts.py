"""Names become parts: with the real encoder, the real reader and the real data of rag_rl.tiny."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rl.config.arguments import (
    DataArguments,
    GeneratorArguments,
    JudgeArguments,
    QueryEncoderArguments,
    ReaderArguments,
    ReasonerArguments,
    RetrieverArguments,
    RewardArguments,
    StepRewardArguments,
)
from rag_rl.config.parts import (
    build_assembly,
    build_baselines,
    build_corpus,
    build_encoder,
    build_judge,
    build_probe,
    build_prompts,
    build_questions,
    build_reader,
    build_reader_model,
    build_reasoning,
    build_retriever,
    build_rewards,
    build_search,
    build_step_judges,
    build_step_scorer,
    build_step_setup,
    build_tokenizer,
    build_trained_questions,
    default_weights,
    describe_judge,
    expand,
    import_attribute,
    index_folder,
    index_settings,
    make_trainable,
)
from rag_rl.errors import ConfigError, DataError, IndexMismatchError
from rag_rl.evaluation import ReasoningAssembly
from rag_rl.judges import ScriptedJudge
from rag_rl.retrieval import IndexSettings
from rag_rl.tiny import FOLDER
from rag_rl.types import JudgeCase, Passage, Question

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


def beir_folder(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"q{i}", "text": f"Claim {i}."} for i in range(6)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, judged in (("train", (0, 1, 2)), ("test", (3, 4))):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in judged)
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}q5\td0\t0\n")
    return folder


@pytest.mark.parametrize("split", ["test", "{folder}/qrels/test.tsv"])
def test_questions_with_judgements_and_without_answers(tmp_path, split):
    folder = beir_folder(tmp_path / "beir")
    data = DataArguments(
        data_train=str(folder),
        data_train_qrels="train",
        data_eval=str(folder),
        data_eval_qrels=split.format(folder=folder),
    )
    train, held_out = build_questions(data, seed=0, require_answers=False)
    assert [(q.qid, q.gold_doc_ids) for q in train] == [("q0", ("d0",)), ("q1", ("d1",)), ("q2", ("d2",))]
    assert [(q.qid, q.gold_doc_ids) for q in held_out] == [("q3", ("d3",)), ("q4", ("d4",))]
    with pytest.raises(DataError, match="questions without answers serve retrieval only"):
        build_questions(data, seed=0)
    with pytest.raises(DataError, match="no split 'dev'; there is: test, train"):
        build_questions(dataclasses.replace(data, data_eval_qrels="dev"), seed=0, require_answers=False)
    both = dataclasses.replace(data, data_eval_qrels="train")
    with pytest.raises(DataError, match="3 held-out questions are also in"):
        build_questions(both, seed=0, require_answers=False)
    with pytest.raises(ConfigError, match="data_eval_qrels is set, but data_eval is not"):
        build_questions(dataclasses.replace(data, data_eval=None), seed=0, require_answers=False)


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
    # Another kind is another index, and so is what is built into it; what only a search reads is not.
    graph = dataclasses.replace(TINY, retriever_index="hnsw")
    others = [
        index_folder(graph, data, encoder),
        index_folder(dataclasses.replace(graph, retriever_index_hnsw_m=8), data, encoder),
        index_folder(dataclasses.replace(TINY, retriever_index="ivf_pq"), data, encoder),
        index_folder(TINY, data, encoder),
    ]
    assert len(set(others)) == 4
    assert others[0] == index_folder(dataclasses.replace(graph, retriever_index_ef_search=9), data, encoder)
    named = dataclasses.replace(TINY, retriever_index_path=str(tmp_path / "mine"))
    assert index_folder(named, data, encoder) == tmp_path / "mine"


def test_index_folder_is_the_same_for_every_spelling_of_a_path(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAG_RL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "there" / "corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_text('{"doc_id": "a", "text": "b"}\n')
    (tmp_path / "link").symlink_to(corpus.parent)

    def folder(source):
        return index_folder(TINY, DataArguments(data_corpus=source), encoder)

    spellings = [
        str(corpus),
        "there/corpus.jsonl",
        "./there/../there/corpus.jsonl",
        "link/corpus.jsonl",
        "${data}/there/corpus.jsonl",
    ]
    assert len({folder(spelling) for spelling in spellings}) == 1
    # As it has always been where nothing was to be resolved: what is in a cache is found.
    stamp = [("corpus.jsonl", corpus.stat().st_size, corpus.stat().st_mtime_ns)]
    key = repr((str(corpus), stamp, [], None, None, None, None, encoder.fingerprint, "faiss", None))
    assert folder(str(corpus)).name == hashlib.sha256(key.encode()).hexdigest()[:16]
    # A data set of the Hub is the same from everywhere, a folder in its form is as any other.
    hub = [folder("hub:me/wines:train"), folder("hub:me/wines:test"), folder("hub:there:train")]
    assert len(set(hub)) == 3
    monkeypatch.chdir("there")
    assert folder("hub:me/wines:train") == hub[0]
    assert folder("hub:../link:train") == hub[2]
    corpus.write_text('{"doc_id": "a", "text": "c"}\n{"doc_id": "d", "text": "e"}\n')
    assert folder("hub:../there:train") != hub[2]


def test_the_kind_of_index(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_CACHE", str(tmp_path / "cache"))
    graph = dataclasses.replace(TINY, retriever_index="hnsw", retriever_index_ef_search=40)
    assert index_settings(graph) == IndexSettings("hnsw", ef_search=40)
    first = build_retriever(graph, DATA)
    assert first.manifest.index["ef_search"] == 40
    again = build_retriever(dataclasses.replace(graph, retriever_index_ef_search=50), DATA)
    assert again.folder == first.folder
    assert again.manifest.index["ef_search"] == 50
    with pytest.raises(ConfigError, match="retriever_index_nprobe needs retriever_index ivf_pq, got hnsw"):
        build_retriever(dataclasses.replace(graph, retriever_index_nprobe=3), DATA)
    flat = dataclasses.replace(TINY, retriever_index_path=str(first.folder))
    with pytest.raises(IndexMismatchError, match="is hnsw, retriever_index is flat: set retriever_index hnsw"):
        build_retriever(flat, DATA)
    first.close()
    again.close()


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
    with pytest.raises(ConfigError, match="retriever_shuffled needs the dense retriever without"):
        build_retriever(dataclasses.replace(own, retriever_shuffled=True), DataArguments())


def test_reranked_retriever(retriever):
    """Any cross-encoder goes; an untrained one orders the candidates, whatever it makes of them."""
    args = dataclasses.replace(TINY, retriever_reranker="${tiny}/encoder", retriever_candidates=5)
    question = "Where does Ulradric live?"
    (found,) = build_retriever(args, DATA).search([question], top_k=3)
    (candidates,) = retriever.search([question], top_k=5)
    assert [hit.rank for hit in found] == [1, 2, 3]
    assert {hit.passage.doc_id for hit in found} < {hit.passage.doc_id for hit in candidates}
    with pytest.raises(ConfigError, match=r"retriever_candidates must be at least retriever_top_k \(3\), got 2"):
        dataclasses.replace(args, retriever_candidates=2)
    with pytest.raises(ConfigError, match="retriever_shuffled needs the dense retriever without a reranker"):
        build_retriever(dataclasses.replace(args, retriever_shuffled=True), DATA)


def test_unknown_retriever():
    expected = "retriever_name must be dense, http, none or package.module:attribute, got 'bm25'"
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


def test_how_a_model_is_loaded_reaches_the_trainer():
    from transformers import AutoTokenizer

    model = SimpleNamespace(
        model_name_or_path="${tiny}/reader", model_revision="main", dtype="bfloat16", attn_implementation="sdpa"
    )
    training = SimpleNamespace(model_init_kwargs=None)
    tokenizer, context = build_tokenizer(model, training)
    assert model.model_name_or_path == str(FOLDER / "reader")
    assert context == 2048
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(FOLDER / "reader").get_vocab()
    assert training.model_init_kwargs == {"dtype": "bfloat16", "attn_implementation": "sdpa"}
    training.model_init_kwargs = {"dtype": "float16"}
    build_tokenizer(model, training)
    assert training.model_init_kwargs == {"dtype": "float16", "attn_implementation": "sdpa"}, "what is set there wins"
    model.model_name_or_path = "${tiny}/nowhere"
    with pytest.raises(ConfigError, match=r"model_name_or_path .*nowhere' cannot be loaded"):
        build_tokenizer(model, training)


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


def test_form_weighs_little_where_nobody_says_otherwise():
    import asyncio

    assert default_weights(["f1", "format", "em"]) == [1.0, 0.2, 1.0]
    trl = training(max_completion_length=64)
    rewards = build_rewards(RewardArguments(), GENERATOR, trl)
    wrong, bare = "Answer: nobody", "Mira"
    columns = {**COLUMNS, "completions": [wrong, bare, "Answer: Mira"]}
    assert asyncio.run(rewards.combined(prompts=[""] * 3, **columns)) == [0.2, 1.0, 1.2]


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


# ---- training a retriever


SCRIPTED = ReaderArguments(reader_name="scripted", reader_max_hops=2)
TRAINED = QueryEncoderArguments()
TWO_HOPS = dataclasses.replace(
    DATA, data_train="${tiny}/data/demo_2hop.jsonl", data_eval="${tiny}/data/heldout_2hop.jsonl"
)


def test_readers_by_name(tmp_path, monkeypatch):
    from rag_rl.reasoning import DecompositionReader, ReActReader, SingleSearch

    served = {"reader_model": "m", "reader_base_url": "http://127.0.0.1:9/v1"}
    for name, kind in (("decomposition", DecompositionReader), ("react", ReActReader)):
        reader = build_reader(ReaderArguments(reader_name=name, reader_history=False, **served))
        assert type(reader) is kind
        assert reader.history is False
        with pytest.raises(ConfigError, match=f"reader_name {name} needs a model: set reader_model"):
            build_reader(ReaderArguments(reader_name=name))
    scripted = build_reader(dataclasses.replace(SCRIPTED, reader_follow_up=False))
    assert (type(scripted), scripted.follow_up, scripted.history) == (DecompositionReader, False, True)
    assert type(build_reader(ReaderArguments(reader_name="none"))) is SingleSearch
    (tmp_path / "own_reader.py").write_text("def make(args): return ('mine', args.reader_max_hops)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_reader(ReaderArguments(reader_name="own_reader:make", reader_max_hops=4)) == ("mine", 4)
    with pytest.raises(ConfigError, match=r"reader_name must be decomposition, .* got 'reac'"):
        build_reader(ReaderArguments(reader_name="reac"))
    with pytest.raises(ConfigError, match="'no-such'"):
        build_reader(ReaderArguments(reader_name="decomposition", reader_prompt="no-such", **served))
    with pytest.raises(ConfigError, match="reader_max_hops must be at least 1, got 0"):
        ReaderArguments(reader_max_hops=0)


def test_model_of_a_reader(tmp_path):
    from rag_rl.generation import CachedGenerator, OpenAIGenerator, TransformersGenerator

    local = build_reader_model(ReaderArguments(reader_model="${tiny}/reader", reader_batch_size=7))
    assert isinstance(local, CachedGenerator)
    assert isinstance(local.generator, TransformersGenerator)
    asked = [[{"role": "user", "content": "[1] Elmton\nElmton lies on the Mira.\nQuestion: Which river?"}]]
    replies = local.generate(asked * 2, max_new_tokens=4, temperature=0.0)
    assert replies[0] == replies[1]
    assert (local.hits, local.misses) == (1, 1), "a group asks the same again and again"
    served = build_reader_model(
        ReaderArguments(
            reader_model="m", reader_base_url="http://127.0.0.1:9/v1", reader_type="base", reader_api_key_env="MY_KEY"
        )
    )
    assert isinstance(served.generator, OpenAIGenerator)
    found = served.generator
    assert (found.model, found.base_url, found.api_key_env, found.generator_type) == (
        "m", "http://127.0.0.1:9/v1", "MY_KEY", "base",
    )  # fmt: skip
    with pytest.raises(DataError, match="cannot load the model"):
        build_reader_model(ReaderArguments(reader_model=str(tmp_path)))


def test_search():
    from rag_rl.reasoning import f1_reward
    from rag_rl.types import Query

    search = build_search(TINY, DATA, SCRIPTED, QueryEncoderArguments(retriever_state_tokens=64))
    assert (search.top_k, search.answers, search.environment.max_hops) == (3, True, 2)
    assert search.environment.reward is f1_reward
    assert (search.encoder.enabled, search.encoder.max_tokens) == (True, 64)
    # What is trained is not what the index was made with, and begins as it.
    own = search.retriever.encoder
    assert own is search.encoder
    before = own.encode_queries([Query("Who?")])
    index = build_retriever(TINY, DATA)
    assert before == pytest.approx(index.encode_queries(["Who?"]), abs=1e-6)
    assert all(p.requires_grad for p in search.encoder.encoder.model.parameters())


def test_a_trained_encoder_is_saved_with_its_prompts(tmp_path):
    from sentence_transformers import SentenceTransformer

    prompted = dataclasses.replace(TINY, retriever_query_prompt="query: ", retriever_document_prompt="passage: ")
    encoder = build_search(prompted, DATA, SCRIPTED, TRAINED).encoder.encoder
    encoder.model.save_pretrained(str(tmp_path), create_model_card=False)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert plain.encode_query(["Who?"]) == pytest.approx(encoder.encode_queries(["Who?"]), abs=1e-6)
    assert plain.encode_document(["A town."]) == pytest.approx(encoder.encode_documents(["A town."]), abs=1e-6)
    assert abs(plain.encode_query(["Who?"]) - plain.encode(["Who?"])).max() > 1e-3


def test_search_without_a_reader():
    one = build_search(TINY, DATA, ReaderArguments(reader_name="none", reader_reward="ndcg"), TRAINED)
    assert (one.answers, one.environment.max_hops) == (False, 1)
    train, _ = build_questions(DATA, seed=0)
    ((answered,), *_) = one.answer(train[:2])
    assert one.environment.reward(answered.trajectory) in (0.0, 1.0, pytest.approx(0.63, abs=0.01), 0.5)
    with pytest.raises(ConfigError, match="reader_name none answers nothing: set reader_reward to ndcg, recall"):
        build_search(TINY, DATA, ReaderArguments(reader_name="none"), TRAINED)


def test_rewards_of_a_search(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text("def half(trajectory): return 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, expected in (("constant", 1.0), ("own_reward:half", 0.5)):
        search = build_search(TINY, DATA, dataclasses.replace(SCRIPTED, reader_reward=name), TRAINED)
        assert search.environment.reward(None) == expected


@pytest.mark.parametrize(
    ("retriever", "reader", "expected"),
    [
        ({"retriever_name": "none"}, {}, "needs retriever_name dense, not shuffled"),
        ({"retriever_shuffled": True}, {}, "needs retriever_name dense, not shuffled"),
        ({}, {"reader_reward": "f2"}, r"reader_reward must be one of f1, ndcg, recall, .*, got 'f2'"),
        ({}, {"reader_reward": "no_such_module:x"}, "'no_such_module:x' cannot be imported"),
        ({}, {"reader_name": "reac"}, "reader_name must be"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_built(retriever, reader, expected):
    nothing_there = DataArguments(data_corpus="no/such/corpus")
    with pytest.raises(ConfigError, match=expected):
        build_search(
            dataclasses.replace(TINY, **retriever), nothing_there, dataclasses.replace(SCRIPTED, **reader), TRAINED
        )


@pytest.mark.parametrize("what", ["full", "lora", "head"])
def test_what_of_an_encoder_is_trained(what):
    encoder = build_encoder(TINY)
    start = encoder.encode_queries(["Where is the home?"])
    total = sum(p.numel() for p in encoder.model.parameters())
    make_trainable(encoder, QueryEncoderArguments(retriever_train=what, retriever_lora_r=3, retriever_lora_alpha=6))
    trained = {name: p for name, p in encoder.model.named_parameters() if p.requires_grad}
    match what:
        case "full":
            assert sum(p.numel() for p in trained.values()) == total
        case "lora":
            assert {".lora_A." in name or ".lora_B." in name for name in trained} == {True}
            assert {min(p.shape) for p in trained.values()} == {3}
        case "head":
            assert [tuple(p.shape) for p in trained.values()] == [(encoder.dimension, encoder.dimension)]
    assert encoder.encode_queries(["Where is the home?"]) == pytest.approx(start, abs=1e-6), "begins as it was"


def test_questions_that_the_corpus_cannot_answer_are_left_out_and_counted(caplog):
    search = build_search(TINY, TWO_HOPS, SCRIPTED, TRAINED)
    train, _ = build_questions(TWO_HOPS, seed=0)
    assert build_trained_questions(train, search, what="training") == train
    assert not caplog.messages
    strange = [dataclasses.replace(q, gold_doc_ids=(*q.gold_doc_ids, "nowhere")) for q in train[:4]]
    unnamed = [dataclasses.replace(q, gold_doc_ids=()) for q in train[4:6]]
    mixed = [*strange, *unnamed, *train[6:]]
    assert build_trained_questions(mixed, search, what="training") == mixed[4:]
    assert caplog.messages == [
        "4 of 30 training questions are left out: the corpus lacks their gold documents",
    ]
    with pytest.raises(DataError, match=r"none of the 4 questions has its gold documents in the corpus"):
        build_trained_questions(strange, search, what="training")
    # Without a reader a question is scored by its gold documents, so it must name some.
    caplog.clear()
    search.answers = False
    assert build_trained_questions(mixed, search, what="held-out") == train[6:]
    assert caplog.messages == [
        "6 of 30 held-out questions are left out: the corpus lacks their gold documents, or they name none"
    ]


# ---- judges


def verdicts_of(judge, *cases):
    import asyncio

    return [verdict.score for verdict in asyncio.run(judge.judge(cases))]


RIGHT = JudgeCase("What is the craft of Ulric?", "miller", gold=("miller",))
WRONG = JudgeCase("What is the craft of Ulric?", "smith", gold=("miller",))


def test_no_judge():
    assert build_judge(JudgeArguments()) is None
    assert build_judge(JudgeArguments(judge_name="")) is None


def test_oracle():
    args = JudgeArguments(judge_name="oracle")
    assert verdicts_of(build_judge(args), RIGHT, WRONG) == [1.0, 0.0]
    assert describe_judge(args) == ("oracle", 0.5)
    assert describe_judge(dataclasses.replace(args, judge_pass_mark=0.7)) == ("oracle", 0.7)


def test_local_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_CACHE", str(tmp_path / "cache"))
    args = JudgeArguments(
        judge_name="local", judge_model="${tiny}/reader", judge_rubric="tiny_judge", judge_max_tokens=48
    )
    judge = build_judge(args, tmp_path)
    first = verdicts_of(judge, RIGHT, WRONG, RIGHT)
    assert set(first) <= {0.0, 1.0, None}
    assert (judge.from_cache, judge.chat.max_new_tokens, judge.chat.batches) == (0, 48, 1)
    logged = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(row["answer"], row["score"], row["count"]) for row in logged] == [
        ("miller", first[0], 2),
        ("smith", first[1], 1),
    ]
    assert not (tmp_path / "judge_spent.sqlite").exists(), "nothing is limited"
    again = build_judge(args)
    assert verdicts_of(again, RIGHT, WRONG) == first[:2]
    assert again.from_cache == sum(score is not None for score in first[:2])
    # What is read from the cache was said by this very model.
    (tmp_path / "reader").mkdir()
    for path in (FOLDER / "reader").iterdir():
        (tmp_path / "reader" / path.name).write_bytes(path.read_bytes())
    moved = build_judge(dataclasses.replace(args, judge_model=str(tmp_path / "reader")))
    (tmp_path / "reader" / "README.md").write_text("trained on")
    changed = build_judge(dataclasses.replace(args, judge_model=str(tmp_path / "reader")))
    assert len({judge.name, moved.name, changed.name}) == 3
    assert judge.name == again.name
    assert describe_judge(args) == ("reader (rubric tiny_judge)", 0.5)


def test_judge_behind_an_endpoint(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    args = JudgeArguments(
        judge_name="openai",
        judge_model="m",
        judge_base_url="http://127.0.0.1:9/v1",
        judge_rubric="document_relevance",
        judge_scale=[0.0, 10.0],
        judge_graded=False,
        judge_temperature=None,
        judge_timeout_s=3.0,
        judge_max_retries=1,
        judge_concurrency=4,
        judge_max_calls=7,
        judge_cache=str(tmp_path / "verdicts"),
        judge_log=str(tmp_path / "log.jsonl"),
    )
    judge = build_judge(args, tmp_path / "run")
    assert (judge.chat.name, judge.name) == ("m at http://127.0.0.1:9/v1",) * 2
    assert (judge.chat.temperature, judge.chat.max_tokens, judge.chat.timeout_s, judge.chat.max_retries) == (
        None, 1024, 3.0, 1,
    )  # fmt: skip
    assert (judge.rubric.scale, judge.rubric.graded, judge.rubric.pass_mark) == ((0.0, 10.0), False, 0.6)
    assert (judge.concurrency, judge.budget.max_calls, judge.log.path) == (4, 7, tmp_path / "log.jsonl")
    assert (tmp_path / "verdicts" / "verdicts.sqlite").is_file()
    assert (tmp_path / "run" / "judge_spent.sqlite").is_file()
    assert describe_judge(args) == ("m (rubric document_relevance)", 0.6)
    own = build_judge(dataclasses.replace(args, judge_extra_body={"max_completion_tokens": 9}, judge_max_calls=None))
    assert (own.chat.max_tokens, own.chat.extra_body, own.budget) == (None, {"max_completion_tokens": 9}, None)
    assert build_judge(dataclasses.replace(args, judge_max_tokens=99)).chat.max_tokens == 99


def test_gemini_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", "-".join(["marked", "fake", "key"]))
    args = JudgeArguments(judge_name="gemini", judge_cache=str(tmp_path))
    judge = build_judge(args)
    assert (judge.chat.model, judge.chat.max_tokens) == ("gemini-2.5-flash", 8192)
    assert judge.chat.name.startswith("gemini-2.5-flash at https://generativelanguage.googleapis.com/")
    other = build_judge(dataclasses.replace(args, judge_model="m", judge_base_url="http://127.0.0.1:9/v1"))
    assert other.chat.name == "m at http://127.0.0.1:9/v1"
    with pytest.raises(ConfigError, match="set the environment variable MY_KEY"):
        build_judge(dataclasses.replace(args, judge_api_key_env="MY_KEY"))


def test_own_judge(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text(
        "from rag_rl.judges import ScriptedJudge\n"
        "def make(args): return ScriptedJudge({'miller': args.judge_pass_mark, 'smith': None})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = build_judge(JudgeArguments(judge_name="own_judge:make", judge_pass_mark=0.25))
    assert verdicts_of(judge, RIGHT, WRONG) == [0.25, None]
    sys.modules.pop("own_judge")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"judge_name": "gpt"}, "judge_name must be openai, gemini, local, reward_model, oracle or package.module"),
        ({"judge_name": "openai"}, "judge_name openai needs a model: set judge_model"),
        ({"judge_name": "reward_model"}, "judge_name reward_model needs a model: set judge_model"),
        ({"judge_name": "local", "judge_rubric": "no such thing"}, "'no such thing' is neither one of"),
        ({"judge_name": "oracle", "judge_rubric": "style"}, "the oracle knows the rubrics .*, not 'style'"),
        ({"judge_name": "openai", "judge_model": "m", "judge_concurrency": 0}, "judge_concurrency must be at least 1"),
        ({"judge_name": "openai", "judge_model": "m", "judge_max_usd": 1.0}, "judge_max_usd needs the prices"),
    ],
)
def test_judges_that_cannot_be(tmp_path, changed, expected):
    given = {"judge_base_url": "http://127.0.0.1:9/v1", "judge_cache": str(tmp_path), **changed}
    with pytest.raises(ConfigError, match=expected):
        build_judge(JudgeArguments(**given))


def test_judged_reward():
    judge = ScriptedJudge({"Mira": 1.0, "It is Mira": 0.5, "nobody": None})
    args = RewardArguments(reward_names=["judged", "format"], reward_required=["judged"])
    rewards = build_rewards(args, GENERATOR, training(), judge)
    assert rewards.score(**COLUMNS) == {"judged": [1.0, 0.5, None], "format": [1.0, 0.0, 1.0]}
    assert run(rewards.combined) == [1.2, 0.5, None]
    with pytest.raises(ConfigError, match="reward_names has judged, but judge_name is not set"):
        build_rewards(args, GENERATOR, training())


def run(reward):
    import asyncio

    return asyncio.run(reward(prompts=[""] * 3, **COLUMNS))


def test_a_judge_that_is_not_rewarded_is_reported():
    judge = ScriptedJudge({"Mira": 1.0, "It is Mira": 0.5, "nobody": None})
    rewards = build_rewards(RewardArguments(reward_names=["em"]), GENERATOR, training(), judge)
    assert run(rewards.combined) == [1.0, 0.0, 0.0]
    assert judge.cases == []
    assert rewards.score(**COLUMNS) == {"em": [1.0, 0.0, 0.0], "judged": [1.0, 0.5, None]}


def test_ranks_say_nothing_of_a_single_answer(tmp_path):
    args = JudgeArguments(
        judge_name="openai",
        judge_model="m",
        judge_base_url="http://127.0.0.1:9/v1",
        judge_rubric="comparison",
        judge_cache=str(tmp_path),
    )
    judge = build_judge(args)
    for names, expected in ((["judged"], {}), (["em"], {"em": [1.0, 0.0, 0.0]})):
        rewards = build_rewards(RewardArguments(reward_names=names), GENERATOR, training(), judge)
        assert rewards.score(**COLUMNS) == expected
    assert describe_judge(args) == ("m (rubric comparison)", 0.5)


def test_reward_model_reads_what_its_template_says(tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "reader")
    tokenizer.save_pretrained(tmp_path / "classifier")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=2,
        initializer_range=0.5,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    args = RewardArguments(
        reward_names=["reward_model"],
        reward_model=str(tmp_path / "classifier"),
        reward_model_template=["$passages\n$question $answer"],
        reward_model_label=1,
    )
    found = build_rewards(args, GENERATOR, training()).score(**COLUMNS)["reward_model"]
    assert len(set(found)) == 3
    assert all(0.0 < value < 1.0 for value in found)
    other = {**COLUMNS, "passages": [["Rain falls."]] * 3}
    assert build_rewards(args, GENERATOR, training()).score(**other)["reward_model"] != found
    zero = dataclasses.replace(args, reward_model_label=0)
    assert build_rewards(zero, GENERATOR, training()).score(**COLUMNS)["reward_model"] == pytest.approx(
        [1 - value for value in found], abs=1e-5
    )
    short = dataclasses.replace(args, reward_model_max_length=2)
    assert build_rewards(short, GENERATOR, training()).score(**COLUMNS)["reward_model"] != found


# ---- the reasoner


def test_step_setup(retriever):
    args = ReasonerArguments(reasoner_layout="chat", reasoner_max_steps=4, reasoner_max_step_tokens=48)
    setup = build_step_setup(args, TINY, DATA)
    assert (setup.layout, setup.max_steps, setup.max_step_tokens, setup.top_k) == ("chat", 4, 48, 3)
    question = "Where does Ulradric live?"
    assert setup.retriever.search([question], top_k=3) == retriever.search([question], top_k=3)
    with pytest.raises(ConfigError, match="a reasoner needs a retriever"):
        build_step_setup(args, RetrieverArguments(retriever_name="none"), DATA)


def test_step_scorer():
    oracle = JudgeArguments(judge_name="oracle")
    scorer = build_step_scorer(StepRewardArguments(step_reward="coherence"), oracle)
    assert set(scorer.judges) == {"document_relevance", "query_rationality", "reasoning_coherence"}
    assert {judge.rubric for judge in scorer.judges.values()} == set(scorer.judges)
    assert scorer.answer_judge.rubric == "answer_correctness"
    strict = build_step_scorer(StepRewardArguments(), dataclasses.replace(oracle, judge_pass_mark=0.9))
    assert (scorer.pass_mark, strict.pass_mark) == (0.5, 0.9)
    alone = build_step_scorer(StepRewardArguments(step_reward="gold_gain"), JudgeArguments())
    assert (alone.judges, alone.answer_judge) == ({}, None)
    with pytest.raises(ConfigError, match=r"needs verdicts on document_relevance: name a judge \(judge_name\)"):
        build_step_scorer(StepRewardArguments(), JudgeArguments())
    with pytest.raises(ConfigError, match="a step reward is one of paper"):
        build_step_scorer(StepRewardArguments(step_reward="papers"), oracle)


def test_step_judges_keep_to_their_own_rubric(tmp_path, monkeypatch):
    """A pass mark that was set for the answers' rubric says nothing about relevance."""
    monkeypatch.setenv("RAG_RL_CACHE", str(tmp_path))
    args = JudgeArguments(
        judge_name="openai", judge_model="m", judge_base_url="http://127.0.0.1:9/v1", judge_pass_mark=0.9
    )
    judges = build_step_judges(args, ["document_relevance", "reasoning_coherence"], tmp_path)
    assert [judge.rubric.name for judge in judges.values()] == ["document_relevance", "reasoning_coherence"]
    assert judges["document_relevance"].rubric.pass_mark == 0.6
    assert build_step_judges(JudgeArguments(), ["document_relevance"], tmp_path) == {}


REASONER = ReasonerArguments(
    reasoner_max_step_tokens=16,
    reasoner_baseline_prompt="tiny_answer",
    reasoner_baseline_closed_prompt="tiny_closed_book",
)


def test_reasoning_assembly():
    setup = build_step_setup(REASONER, TINY, DATA)
    oracle = JudgeArguments(judge_name="oracle")
    bare = build_reasoning(setup, StepRewardArguments(), JudgeArguments())
    assert (bare.setup, bare.generator, bare.answer_judge, bare.coherence_judge) == (setup, None, None, None)
    judged = build_reasoning(setup, StepRewardArguments(), oracle)
    assert (judged.answer_judge.rubric, judged.coherence_judge) == ("answer_correctness", None)
    strict = build_reasoning(setup, StepRewardArguments(), dataclasses.replace(oracle, judge_pass_mark=0.9))
    assert (judged.pass_mark, strict.pass_mark) == (0.5, 0.9)
    judged = build_reasoning(setup, StepRewardArguments(step_coherence=True), oracle)
    assert judged.coherence_judge.rubric == "reasoning_coherence"
    with pytest.raises(ConfigError, match="step_coherence is set, but judge_name is not"):
        build_reasoning(setup, StepRewardArguments(step_coherence=True), JudgeArguments())


def test_baselines_see_as_much_as_a_chain():
    setup = build_step_setup(REASONER, TINY, DATA)
    judge = ScriptedJudge([])
    reasoning = ReasoningAssembly(setup, answer_judge=judge, pass_mark=0.8)
    model = SimpleNamespace(model_name_or_path="${tiny}/reader", model_revision=None)
    found = build_baselines(reasoning, REASONER, model)
    assert list(found) == ["one_shot", "no_retrieval"]
    one, none = found.values()
    assert (one.retriever, one.top_k, one.prompt) == (setup.retriever, 3 * 4, "tiny_answer")
    assert (none.retriever, none.prompt) == (None, "tiny_closed_book")
    for assembly in (one, none):
        assert (assembly.max_new_tokens, assembly.answer_marker) == (16, "Answer:")
        assert (assembly.answer_judge, assembly.pass_mark) == (judge, 0.8)
        assert (assembly.generator, assembly.max_prompt_tokens) == (None, 2048 - 16)
        assert assembly.count_tokens([[{"role": "user", "content": "Who?"}]])[0] > 1
    fewer = dataclasses.replace(REASONER, reasoner_baseline_top_k=6, reasoner_baselines=["one_shot"])
    (six,) = build_baselines(ReasoningAssembly(setup), fewer, model).values()
    assert (six.top_k, six.answer_judge) == (6, None)
    # A chain of one step sees nothing; a search of it is still what can be compared.
    (three,) = build_baselines(
        ReasoningAssembly(dataclasses.replace(setup, max_steps=1)),
        dataclasses.replace(REASONER, reasoner_baselines=["one_shot"]),
        model,
    ).values()
    assert three.top_k == 3
    assert build_baselines(reasoning, dataclasses.replace(REASONER, reasoner_baselines=[]), model) == {}


def test_baselines_of_another_model():
    reasoning = ReasoningAssembly(build_step_setup(REASONER, TINY, DATA))
    model = SimpleNamespace(model_name_or_path=str(FOLDER / "reader"), model_revision=None)
    args = dataclasses.replace(REASONER, reasoner_baseline_model="${tiny}/reader")
    found = build_baselines(reasoning, args, model)
    assert list(found) == ["one_shot", "no_retrieval", "one_shot_other_model", "no_retrieval_other_model"]
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"))
    asking = found["one_shot_other_model"].under_training(trainer, batch_size=2)
    ((answered,),) = asking.answer([Question("q", "Where does Ulradric live?", ("x",))])
    assert len(answered.asked.shown) == 12
    with pytest.raises(ConfigError, match="reasoner_baseline_model 'no/such/model' cannot be loaded"):
        build_baselines(reasoning, dataclasses.replace(args, reasoner_baseline_model="no/such/model"), model)
    with pytest.raises(ConfigError, match="no_such_prompt"):
        build_baselines(reasoning, dataclasses.replace(args, reasoner_baseline_prompt="no_such_prompt"), model)
