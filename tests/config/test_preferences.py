"""Candidates, their scores and pairs: gone on with where they stopped, in the published form at the end."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from rag_rl.config import preferences
from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, PreferenceArguments
from rag_rl.config.augmenters import build_dense_index, build_queries, wrap_generator
from rag_rl.config.parts import build_tokenizer
from rag_rl.config.preferences import build_preference_dataset, build_preferences, write_augmentations
from rag_rl.data.reinforced_ir import (
    read_augmented,
    read_candidates,
    read_dataset_info,
    read_llamafactory,
    read_preferences,
    read_queries,
)
from rag_rl.errors import BackendError, ConfigError, DataError, RunFolderError
from rag_rl.evaluation.augmenting import AugmentingAssembly
from rag_rl.generation import QueryAugmenter, ScriptedGenerator
from rag_rl.retrieval.augmented import mix_vectors

DATA = DataArguments(
    data_corpus="${tiny}/data/corpus.jsonl",
    data_train="${tiny}/data/demo_1hop.jsonl",
    data_eval="${tiny}/data/heldout_1hop.jsonl",
    data_train_size=10,
    data_eval_size=4,
)
SEARCH = RetrieverArguments(retriever_encoder="${tiny}/encoder_young", retriever_batch_size=256)
ASKED = AugmenterArguments(
    augmenter_prompt="tiny_passage", augmenter_task="tiny", augmenter_prefix="About: ", augmenter_max_new_tokens=16,
    augmenter_weight=0.5,
)  # fmt: skip
SMALL = {"preference_candidates": 4, "preference_batch_size": 4, "preference_top_p": 1.0}
FILES = [
    "answers.json",
    "dataset_info.json",
    "queries.json",
    "summary.json",
    "train.jsonl",
    "train_llamafactory.jsonl",
]


@pytest.fixture(scope="module")
def index():
    return build_dense_index(SEARCH, DATA)


@pytest.fixture(scope="module")
def queries(index):
    return build_queries(DATA, index.passages, seed=1)[0]


@pytest.fixture(scope="module")
def start():
    """The model that training starts from, and TRL's config, as the recipe has them."""
    model = SimpleNamespace(model_name_or_path="${tiny}/reader", model_revision=None, dtype=None)
    training = SimpleNamespace(model_init_kwargs=None, max_length=256)
    tokenizer, _ = build_tokenizer(model, training)
    return {"model": model, "training": training, "tokenizer": tokenizer}


@pytest.fixture
def make(index, queries, start, tmp_path):
    """Makes preferences in a folder; keywords change the arguments."""

    def run(folder=tmp_path, *, seed=1, asked=ASKED, chosen=None, **changes):
        args = PreferenceArguments(**{**SMALL, **changes})
        return build_preferences(args, asked, chosen or queries, index, folder, seed=seed, settings=[DATA], **start)

    return run


def summary_of(folder):
    return json.loads((folder / "generator" / "summary.json").read_text())


# ---- what comes out


@pytest.fixture(scope="module")
def made(index, queries, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    args = PreferenceArguments(**SMALL, preference_signal="margin")
    pairs = build_preferences(args, ASKED, queries, index, folder, seed=1, settings=[DATA], **start)
    return folder, pairs


def test_published_files(made, queries, index):
    folder, pairs = made
    place = folder / "generator"
    assert sorted(path.name for path in place.iterdir() if path.name in FILES) == FILES
    assert [one.query for one in read_queries(place / "queries.json")] == [query.text for query in queries]
    candidates = read_candidates(place / "answers.json")
    assert [len(listed) for listed in candidates] == [4] * 10
    for query, listed in zip(queries, candidates, strict=True):
        assert {one.passage for one in listed} == {index.passages[query.rows[0]].contents}
        assert all(one.new_query == "About: " + one.answer for one in listed)
    assert read_preferences(place / "train.jsonl") == read_llamafactory(place / "train_llamafactory.jsonl") == pairs
    info = read_dataset_info(place / "dataset_info.json")
    assert info["rag_rl_preferences"]["file_name"] == "train_llamafactory.jsonl"
    by_prompt = {
        f"Write a passage that answers this question.\n{query.text}": {one.answer for one in listed}
        for query, listed in zip(queries, candidates, strict=True)
    }
    for pair in pairs:
        assert {pair.chosen, pair.rejected} <= by_prompt[pair.prompt]
        assert pair.chosen != pair.rejected
        assert pair.chosen_score > pair.rejected_score


def test_counts(made):
    folder, pairs = made
    found = summary_of(folder)
    assert (found["queries"], found["candidates"], found["pairs"]) == (10, 40, len(pairs))
    assert found["too_few"] + found["no_gain"] + found["too_alike"] + len({pair.prompt for pair in pairs}) == 10
    assert found["signal"]["mean"] <= found["signal"]["best"]
    assert (found["failed"], found["too_long"]) == (0, 0)
    texts = [text for row in rows_of(folder, "candidates") for listed in row["texts"] for text in listed]
    assert len(texts) == 40


def rows_of(folder, what):
    path = folder / "generator" / f"{what}-0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_margins_are_those_of_the_mixed_query(made, queries, index):
    """By the whole matrix: the passage's product less the best one of the 15 passages that the query finds first."""
    folder, pairs = made
    candidates = read_candidates(folder / "generator" / "answers.json")
    seen = 0
    for query, listed in zip(queries, candidates, strict=True):
        mine = [pair for pair in pairs if pair.prompt.endswith(f"\n{query.text}")]
        if not mine:
            continue
        (pair,) = mine
        bare = index.encode_queries([query.text])
        order = [row for row in np.argsort(-(index.matrix @ bare[0])).tolist() if row != query.rows[0]][:15]
        added = index.encoder.encode_documents([one.new_query for one in listed])
        mixed = mix_vectors(np.repeat(bare, 4, 0), added, weight=0.5)
        margins = mixed @ index.matrix[query.rows[0]] - (mixed @ index.matrix[order].T).max(1)
        assert pair.chosen_score == pytest.approx(margins.max(), abs=1e-4)
        assert pair.rejected_score == pytest.approx(margins.min(), abs=1e-4)
        seen += 1
    assert seen > 2


def test_the_published_rule(make, tmp_path, queries, index):
    pairs = make(preference_signal="published")
    candidates = {
        f"Write a passage that answers this question.\n{query.text}": (query, listed)
        for query, listed in zip(queries, read_candidates(tmp_path / "generator" / "answers.json"), strict=True)
    }
    assert pairs
    for pair in pairs:
        query, listed = candidates[pair.prompt]
        bare, own = index.encode_queries([query.text])[0], index.matrix[query.rows[0]]
        products = index.encoder.encode_documents([one.new_query for one in listed]) @ own
        by_text = dict(zip((one.answer for one in listed), products, strict=True))
        raw = float(bare @ own)
        assert by_text[pair.chosen] == pytest.approx(products.max(), abs=1e-5)
        assert pair.chosen_score == pytest.approx((0.5 * raw + 0.5 * products.max()) / raw, abs=1e-4)
        assert products.max() > raw
        assert products.min() <= 0.95 * products.max()


def test_ranks_and_length(make, tmp_path):
    pairs = make(tmp_path / "a", preference_signal="rank", preference_per_query=2)
    assert all(1 / 16 <= pair.rejected_score < pair.chosen_score <= 1 for pair in pairs)
    some = make(tmp_path / "b", preference_signal="rank", preference_per_query=2, preference_max_length_ratio=1.0)
    assert 0 < len(some) < len(pairs)


def test_controls(make, tmp_path):
    with pytest.raises(DataError, match=r"none of 10 queries has a pair to learn from \(0 with .*, 10 where none hel"):
        make(tmp_path / "constant", preference_signal="constant")
    pairs = make(tmp_path / "random", preference_signal="random")
    assert len(pairs) == 10
    assert make(tmp_path / "again", preference_signal="random") == pairs


def test_copies_and_doubtful_passages_are_no_negatives(index, queries):
    passages = list(index.passages[0 : len(index)])
    query = queries[0]
    vectors = index.encode_queries([query.text])
    own = index.vectors(np.array(query.rows[:1]))
    order = np.argsort(-(index.matrix @ vectors[0])).tolist()
    copy = next(row for row in order if row != query.rows[0])
    passages[copy] = passages[query.rows[0]]

    class Copied:
        search_vectors, vectors = staticmethod(index.search_vectors), staticmethod(index.vectors)

        def __init__(self):
            self.passages = passages

        def __len__(self):
            return len(passages)

    copied = Copied()
    args = PreferenceArguments(preference_negatives=3)
    rows = np.array(query.rows[:1])
    found, there = preferences._negatives(args, [query], vectors, rows, own, copied)
    assert there.all()
    assert found[0].tolist() == [row for row in order if row not in (copy, query.rows[0])][:3]
    doubtful = PreferenceArguments(preference_negatives=3, preference_false_negative_margin=0.3)
    limit = 0.7 * float(vectors[0] @ own[0])
    kept, there = preferences._negatives(doubtful, [query], vectors, rows, own, copied)
    assert (index.matrix[kept[0][there[0]]] @ vectors[0] <= limit).all()


# ---- stopped and gone on with


@pytest.mark.parametrize("stage", ["candidates", "scores"])
def test_stopped_in_the_middle_it_comes_out_the_same(make, made, tmp_path, monkeypatch, stage):
    folder, pairs = made
    name = "wrap_generator" if stage == "candidates" else "_scored"
    real, calls = getattr(preferences, name), []

    def breaking(*args, **named):
        if stage == "scores":
            calls.append(1)
            if len(calls) == 2:
                raise BackendError("the disk is gone")
            return real(*args, **named)
        augmenter = real(*args, **named)
        candidates = augmenter.candidates

        def broken(*args, **named):
            calls.append(1)
            if len(calls) == 2:
                raise BackendError("the endpoint is gone")
            return candidates(*args, **named)

        augmenter.candidates = broken
        return augmenter

    monkeypatch.setattr(preferences, name, breaking)
    with pytest.raises(BackendError, match="is gone"):
        make(preference_signal="margin")
    monkeypatch.setattr(preferences, name, real)
    path = tmp_path / "generator" / f"{stage}-0.jsonl"
    left = path.read_bytes()
    assert len(left.splitlines()) == 1
    path.write_bytes(left + b'{"batch": 1, "te')  # a kill in the middle of a line
    assert make(preference_signal="margin") == pairs
    assert path.read_bytes().startswith(left)
    for file in FILES:
        assert (tmp_path / "generator" / file).read_bytes() == (folder / "generator" / file).read_bytes()


def test_finished_it_asks_nobody(make, made, monkeypatch, caplog):
    folder, pairs = made
    monkeypatch.setattr(preferences, "_generator", None)
    monkeypatch.setattr(preferences, "_scored", None)
    with caplog.at_level(logging.INFO):
        assert make(folder, preference_signal="margin") == pairs
    assert "3 of 3 batches of candidates are there already" in caplog.messages


def test_preferences_that_came_about_otherwise(make, made, queries):
    folder, _ = made
    with pytest.raises(RunFolderError, match=r"holds preferences that came about otherwise \(preference_signal: marg"):
        make(folder, preference_signal="rank")
    with pytest.raises(RunFolderError, match="augmenter_weight"):
        make(folder, preference_signal="margin", asked=AugmenterArguments(**{**vars(ASKED), "augmenter_weight": 0.8}))
    with pytest.raises(RunFolderError, match="queries_sha256"):
        make(folder, preference_signal="margin", chosen=queries[:5])


def test_another_number_of_processes_goes_on(make, made, tmp_path):
    """What two processes have written is read by one."""
    folder, pairs = made
    place = tmp_path / "generator"
    place.mkdir()
    lines = (folder / "generator" / "candidates-0.jsonl").read_text().splitlines(keepends=True)
    (place / "candidates-0.jsonl").write_text(lines[0])
    (place / "candidates-1.jsonl").write_text(lines[1])
    assert make(preference_signal="margin") == pairs
    assert len((place / "candidates-0.jsonl").read_text().splitlines()) == 2


# ---- candidates that fail, and pairs that are there


def test_what_nobody_wrote_is_counted(make, tmp_path, monkeypatch):
    replies = ScriptedGenerator(lambda prompt, number: "" if number % 4 else f"Passage {number}.")
    monkeypatch.setattr(preferences, "_generator", lambda *args: replies)
    with pytest.raises(DataError, match=r"none of 10 queries has a pair to learn from \(10 with too few candidates"):
        make(preference_signal="margin")
    assert (summary_of(tmp_path)["failed"], summary_of(tmp_path)["too_few"]) == (30, 10)


def test_what_the_encoder_cuts_is_counted(make, tmp_path, monkeypatch):
    long = "tin " * 300
    replies = ScriptedGenerator(lambda prompt, number: long if number % 2 else f"Falton is known for tin {number}.")
    monkeypatch.setattr(preferences, "_generator", lambda *args: replies)
    make(preference_signal="random")
    assert summary_of(tmp_path)["too_long"] == 20


def test_an_endpoint_samples_candidates(start):
    args = PreferenceArguments(preference_base_url="http://127.0.0.1:9/v1")
    generator = preferences._generator(args, ASKED, start["model"], start["training"])
    assert type(generator).__name__ == "OpenAIGenerator"


def test_pairs_that_are_there_are_read(make, made, tmp_path):
    folder, pairs = made
    assert make(preference_file=str(folder / "generator" / "train.jsonl")) == pairs
    assert not (tmp_path / "generator").exists()
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty.jsonl: holds no pair to learn from"):
        make(preference_file=str(tmp_path / "empty.jsonl"))


def test_a_mix_without_augmentations(make):
    with pytest.raises(ConfigError, match="augmenter_weight 1 leaves augmentations out"):
        make(asked=AugmenterArguments(**{**vars(ASKED), "augmenter_weight": 1.0}))


# ---- what the trainer and the retriever are given


def test_the_training_set(made, start, caplog):
    _, pairs = made
    with caplog.at_level(logging.WARNING):
        rows = build_preference_dataset(pairs, training=start["training"], tokenizer=start["tokenizer"])
    assert rows[0] == {
        "prompt": [{"role": "user", "content": pairs[0].prompt}],
        "chosen": [{"role": "assistant", "content": pairs[0].chosen}],
        "rejected": [{"role": "assistant", "content": pairs[0].rejected}],
    }
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        build_preference_dataset(pairs, training=SimpleNamespace(max_length=20), tokenizer=start["tokenizer"])
    assert f"of {2 * len(pairs)} texts are longer than max_length 20" in caplog.messages[0]


def test_what_a_retriever_learns_from(index, queries, tmp_path):
    def wrap(generator):
        return QueryAugmenter(generator, prompt="tiny_passage")

    def mix(augmenter):
        from rag_rl.retrieval.augmented import AugmentedRetriever

        return AugmentedRetriever(index.encoder, augmenter, index=index)

    assembly = AugmentingAssembly(index, wrap, mix, top_k=5)
    said = ScriptedGenerator(lambda prompt, number: "" if number == 3 else f"Passage {number}.")
    write_augmentations(assembly.with_generator(said), queries, index, tmp_path, prefix="About: ")
    found = read_augmented(tmp_path / "retriever" / "answers.json")
    assert [one.answer for one in found[:4]] == [f"About: Passage {number}." for number in (0, 1, 2, 4)]
    assert [one.query for one in found] == [query.text for query in (*queries[:3], *queries[4:])], (
        "the silent one is out"
    )
    assert found[0].passage == index.passages[queries[0].rows[0]].contents
    written = read_queries(tmp_path / "retriever" / "queries.json")
    assert [one.query for one in written] == [query.text for query in queries]
    assert [one.passage for one in (*written[:3], *written[4:])] == [one.passage for one in found]


def test_the_model_is_asked_as_in_use(queries):
    (prompt,) = preferences._prompts(ASKED, [queries[0].text])
    (turns,) = wrap_generator(ASKED, ScriptedGenerator([])).prompts([queries[0].text])
    assert turns == [{"role": "user", "content": prompt}]
