"""What is served: with the real encoder and index of the tiny world."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.parts import build_corpus, build_encoder, build_retriever
from rag_rl.errors import ConfigError, IndexDamagedError, IndexMismatchError
from rag_rl.retrieval import HistoryEncoder, IndexSettings, SentenceEncoder, build_index
from rag_rl.server import open_folder, open_settings, read_config
from rag_rl.tiny import FOLDER
from rag_rl.types import Query

SETTINGS = {
    "retriever_encoder": "${tiny}/encoder",
    "data_corpus": "${tiny}/data/corpus.jsonl",
    "retriever_top_k": 3,
    "learning_rate": 1e-4,
    "seed": 0,
}
WORDS = ["Who rules Elmton?", "silk"]


def ids(retriever, queries=WORDS):
    return [[hit.passage.doc_id for hit in hits] for hits in retriever.search(queries, top_k=5)]


@pytest.fixture(scope="module")
def direct():
    """The retriever that a recipe would open."""
    args = RetrieverArguments(retriever_encoder="${tiny}/encoder")
    retriever = build_retriever(args, DataArguments(data_corpus="${tiny}/data/corpus.jsonl"))
    yield retriever
    retriever.close()


# ---- an index folder


def test_the_manifest_names_the_encoder(direct):
    served = open_folder(direct.folder)
    assert served.fingerprint == direct.fingerprint
    assert ids(served) == ids(direct)
    served.close()


def test_the_manifest_names_the_settings_of_the_encoder(tmp_path):
    changed = RetrieverArguments(
        retriever_encoder="${tiny}/encoder",
        retriever_pooling="mean",
        retriever_normalize=False,
        retriever_query_prompt="query: ",
        retriever_document_prompt="passage: ",
        retriever_max_length=32,
    )
    encoder = build_encoder(changed)
    corpus = build_corpus(DataArguments(data_corpus="${tiny}/data/corpus.jsonl"))
    build_index(list(corpus)[:20], encoder, tmp_path / "index", progress=False)
    served = open_folder(tmp_path / "index")
    assert served.encoder.settings == encoder.settings
    served.close()


def test_an_encoder_that_has_moved(direct, tmp_path):
    folder = Path(shutil.copytree(FOLDER / "encoder", tmp_path / "moved"))
    served = open_folder(direct.folder, encoder=str(folder))
    assert ids(served) == ids(direct)
    served.close()
    with pytest.raises(
        ConfigError, match=r"the encoder of the index .*: .*cannot load .*; --encoder says where it lies"
    ):
        open_folder(direct.folder, encoder=str(tmp_path / "nowhere"))


def test_another_encoder(direct, tmp_path):
    other = build_encoder(RetrieverArguments(retriever_encoder="${tiny}/encoder"))
    next(iter(other.model.parameters())).data.add_(1.0)
    other.model.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(IndexMismatchError, match=r"was made with another encoder \(.*\): weights changed"):
        open_folder(direct.folder, encoder=str(tmp_path / "other"))


def test_folders_that_are_no_index(tmp_path, direct):
    with pytest.raises(IndexDamagedError, match="is no index; build one with build_index"):
        open_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"the index .* has backend faiss"):
        open_folder(direct.folder, chroma_url="http://127.0.0.1:1")


def test_a_folder_is_served_as_it_was_built(direct, tmp_path):
    passages = list(direct.passages)
    index = IndexSettings("hnsw", ef_search=33)
    build_index(passages, direct.encoder, tmp_path / "index", index=index, progress=False)
    served = open_folder(tmp_path / "index")
    assert served.manifest.index == index.resolved(len(passages), direct.dimension)
    assert served.fingerprint != direct.fingerprint
    assert ids(served) == ids(direct)
    served.close()


def test_an_encoder_of_ones_own(tmp_path, stub_encoder):
    build_index(
        list(build_corpus(DataArguments(data_corpus="${tiny}/data/corpus.jsonl")))[:5],
        stub_encoder,
        tmp_path / "index",
        progress=False,
    )
    with pytest.raises(ConfigError, match="was made with OnesEncoder, which is no model of sentence-transformers"):
        open_folder(tmp_path / "index")


@pytest.fixture
def stub_encoder():
    import numpy as np

    class OnesEncoder:
        dimension, fingerprint = 2, "ones"

        def encode_queries(self, queries):
            return np.ones((len(queries), 2), dtype=np.float32)

        encode_documents = encode_queries

    return OnesEncoder()


# ---- settings


def test_settings_of_a_recipe(direct):
    served = open_settings(SETTINGS, devices=["cpu"])
    assert served.fingerprint == direct.fingerprint
    assert ids(served) == ids(direct)
    served.close()


def test_settings_name_the_kind_of_index(direct, tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_CACHE", str(tmp_path))
    served = open_settings({**SETTINGS, "retriever_index": "hnsw", "retriever_index_hnsw_m": 8})
    assert served.manifest.index["hnsw_m"] == 8
    assert ids(served) == ids(direct)
    served.close()


def test_nothing_to_serve():
    with pytest.raises(ConfigError, match="retriever_name is none: there is nothing to serve"):
        open_settings({**SETTINGS, "retriever_name": "none"})


def test_a_run_that_trained_a_query_encoder_is_served_with_it(direct, tmp_path):
    import torch

    trained = build_encoder(RetrieverArguments(retriever_encoder="${tiny}/encoder"))
    with torch.no_grad():
        for weight in trained.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    trained.model.save_pretrained(str(tmp_path / "run"))
    settings = {**SETTINGS, "retriever_train": "full", "retriever_state_tokens": 40}
    served = open_settings(settings, run=tmp_path / "run")
    encoder = HistoryEncoder(SentenceEncoder(tmp_path / "run"), max_tokens=40)
    expected = direct.with_query_encoder(encoder)
    asked = [*WORDS, Query("silk", "Who rules Elmton?", (("Which town?", "Elmton"),))]
    assert ids(served, asked) == ids(expected, asked) != ids(direct, asked)
    assert served.fingerprint not in (direct.fingerprint, direct.manifest.fingerprint)
    served.close()
    plain = open_settings(SETTINGS, run=tmp_path / "run")
    assert ids(plain) == ids(direct)
    plain.close()


def test_reading_a_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("retriever_encoder: x\nretriever_top_k: 7\ndata_corpus: y\nlearning_rate: 1e-4\nseed: 3\n")
    assert read_config(path) == {"retriever_encoder": "x", "retriever_top_k": 7, "data_corpus": "y"}
    path.write_text("retriever_encoder: x\nretriever_top_k: many\n")
    with pytest.raises(ConfigError, match=r"c.yaml:2: retriever_top_k: expected an integer, got 'many'"):
        read_config(path)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_config(tmp_path / "none.yaml")


def test_every_config_with_a_retriever_can_be_read():
    paths = sorted((Path(__file__).parents[2] / "recipes" / "configs" / "grpo_generator").glob("*.yaml"))
    assert paths
    for path in paths:
        assert "data_corpus" in read_config(path)
