"""Augmented queries: the mix by hand, its weight tuned, the published use with an API generator on loopback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.generation import OpenAIGenerator, ScriptedGenerator
from rag_rl.generation.augmenting import QueryAugmenter
from rag_rl.retrieval import SentenceEncoder, build_index, open_index
from rag_rl.retrieval.augmented import AUGMENTATION_PREFIX, AugmentedRetriever, mix_vectors, tune_weight
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage, Query
from tests.loopback import ChatServer

AXES = {"q": [1.0, 0.0], "r": [0.0, 2.0]}


class Plane:
    """An encoder of width 2 that notes which side read what."""

    dimension, fingerprint = 2, "plane"

    def __init__(self):
        self.read = []

    def _vectors(self, side, texts):
        self.read.append((side, list(texts)))
        return np.array([AXES.get(text, [0.0, 1.0]) for text in texts], dtype=np.float32)

    def encode_queries(self, queries):
        return self._vectors("query", [getattr(query, "text", query) for query in queries])

    def encode_documents(self, texts):
        return self._vectors("document", texts)


class Fixed:
    """An augmenter with fixed texts, which notes what it is asked."""

    fingerprint = "fixed"

    def __init__(self, *texts):
        self.texts, self.asked = texts, []

    def augment(self, queries, **options):
        self.asked.append((list(queries), options))
        return list(self.texts)


def test_the_mix_by_hand():
    encoder = Plane()
    retriever = AugmentedRetriever(encoder, Fixed("text", None))
    found = retriever.encode_queries(["q", Query("r", question="whole")])
    # 0.8 (1, 0) + 0.2 (0, 1); a query without an augmentation is not scaled.
    np.testing.assert_allclose(found, [[0.8, 0.2], [0.0, 2.0]], rtol=1e-6)
    assert found.dtype == np.float32
    assert encoder.read == [("query", ["q", "r"]), ("document", ["Generate the topic about this passage: text"])]
    assert (retriever.augmented, retriever.without) == (1, 1)


def test_side_and_length_one():
    encoder = Plane()
    retriever = AugmentedRetriever(encoder, Fixed("text"), side="query", weight=0.5, normalize=True, prefix="")
    np.testing.assert_allclose(retriever.encode_queries(["q"]), [[0.5**0.5, 0.5**0.5]], rtol=1e-6)
    assert encoder.read[1] == ("query", ["text"])


def test_at_weight_one_nobody_is_asked():
    augmenter = Fixed()
    np.testing.assert_array_equal(AugmentedRetriever(Plane(), augmenter, weight=1.0).encode_queries(["q"]), [[1, 0]])
    assert augmenter.asked == []


def test_task_of_the_call_and_of_the_retriever():
    augmenter = Fixed("text")
    retriever = AugmentedRetriever(Plane(), augmenter, task_instruction="Find.", answer_type="essay")
    retriever.encode_queries(["q"])
    retriever.encode_queries(task_instruction="Seek.", answer_type="poem", queries=["q"])
    assert [options for _, options in augmenter.asked] == [
        {"task_instruction": "Find.", "answer_type": "essay"},
        {"task_instruction": "Seek.", "answer_type": "poem"},
    ]


def test_mixed_vectors_keep_the_order_whatever_their_length():
    queries, texts = np.random.default_rng(0).normal(size=(2, 5, 8))
    plain, unit = (mix_vectors(queries, texts, weight=0.3, normalize=normalize) for normalize in (False, True))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(plain / np.linalg.norm(plain, axis=1, keepdims=True), unit, rtol=1e-5)


DOCUMENTS = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]], dtype=np.float32)


def test_tuning_by_hand():
    # The query points at document 0, its augmentation at document 1, and document 2 is meant. With weight w the
    # products are w, 1 - w and 0.6: it is best from 0.4 to 0.6, and second elsewhere.
    queries, texts = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    found = tune_weight(queries, texts, DOCUMENTS, np.array([2]), weights=[0.0, 0.3, 0.5, 0.9, 1.0], k=10)
    second = 1 / np.log2(3)
    assert found.weight == 0.5
    assert found.scores == pytest.approx({0.0: second, 0.3: second, 0.5: 1.0, 0.9: second, 1.0: second})
    assert tune_weight(queries, texts, DOCUMENTS, np.array([2]), weights=[0.3], k=1).scores == {0.3: 0.0}


def test_augmenting_that_does_not_help_is_tuned_away():
    queries = np.array([[1.0, 0.1], [0.1, 1.0]])
    found = tune_weight(queries, queries[::-1].copy(), DOCUMENTS[:2], np.array([0, 1]))
    assert found.weight == 1.0
    # Where all are equal, the query alone is trusted.
    assert tune_weight(queries, queries, DOCUMENTS[:2], np.array([0, 1])).weight == 1.0


def test_tuning_in_blocks_is_tuning_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    queries, texts, documents = rng.normal(size=(3, 40, 8))
    gold = rng.integers(0, 40, 40)
    at_once = tune_weight(queries, texts, documents, gold)
    monkeypatch.setattr("rag_rl.retrieval.augmented._SCORES_AT_ONCE", 7 * 40)
    assert tune_weight(queries, texts, documents, gold).scores == pytest.approx(at_once.scores)


def test_ties_are_counted_half():
    same = np.ones((3, 2))
    found = tune_weight(np.ones((1, 2)), np.ones((1, 2)), same, np.array([0]), weights=[0.5])
    assert found.scores == {0.5: pytest.approx(1 / np.log2(3))}  # rank 2, the middle of 1 to 3


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(FOLDER / "encoder")


TOWNS = ["Elmdaham lies on the Mira .", "Osgiton is known for wool ."]


class Passages(ChatServer):
    """Writes a passage for each query, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__()

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        self.asked.append(body["messages"][-1]["content"])
        return 200, TOWNS["Osgiton" in self.asked[-1].rpartition("Query: ")[2]]


@pytest.fixture
def endpoint(monkeypatch):
    """A chat server on loopback with a passage for each query; gives its address and what it was asked."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Passages() as server:
        yield server.url, server.asked


def test_published_use_ranks_the_diagonal_first_and_loads_each_model_once(endpoint, monkeypatch):
    import sentence_transformers

    url, asked = endpoint
    loads = []
    load = sentence_transformers.SentenceTransformer.__init__

    def counted(self, *args, **options):
        loads.append(1)
        load(self, *args, **options)

    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "__init__", counted)
    generator = OpenAIGenerator("m", base_url=url)
    retriever = AugmentedRetriever(SentenceEncoder(FOLDER / "encoder"), QueryAugmenter(generator))
    assert len(loads) == 1
    documents = retriever.encode_corpus(TOWNS)
    for _ in range(100):
        queries = retriever.encode_queries(
            task_instruction="Given a question about a town, retrieve the passage that answers it.",
            answer_type="passage",
            queries=["Which river does Elmdaham lie on?", "What is Osgiton known for?"],
        )
        assert (queries @ documents.T).argmax(1).tolist() == [0, 1]
    assert len(loads) == 1
    assert len(asked) == generator.requests == 200
    assert asked[0].startswith("Given a question about a town")


def test_searching_an_index(encoder, tmp_path):
    passages = [Passage(f"d{i}", text) for i, text in enumerate([*TOWNS, "Kelsabert works as a miller ."])]
    build_index(passages, encoder, tmp_path / "index")
    index = open_index(tmp_path / "index", encoder)
    plain = index.search(["Which town?"], top_k=3)[0]
    augmenter = QueryAugmenter(ScriptedGenerator(lambda text, number: "Kelsabert works as a miller ."))
    retriever = AugmentedRetriever(encoder, augmenter, index=index, weight=0.0, prefix="")
    assert retriever.search(["Which town?"], top_k=3)[0][0].passage.doc_id == "d2"
    assert retriever.search(["Which town?"], top_k=1, exclude=[["d2"]])[0][0].passage.doc_id != "d2"
    # The index itself is searched as before; and a cache tells the two apart.
    assert index.search(["Which town?"], top_k=3)[0] == plain
    assert retriever.query_fingerprint != encoder.fingerprint
    assert index.with_query_encoder(retriever).fingerprint != index.fingerprint


def test_fingerprint_changes_with_every_setting():
    settings = [{}, {"weight": 0.7}, {"prefix": ""}, {"side": "query"}, {"normalize": True}, {"answer_type": "poem"}]
    prints = {AugmentedRetriever(Plane(), Fixed(), **one).query_fingerprint for one in settings}
    assert len(prints) == len(settings)


def test_texts_beyond_the_encoder_are_counted(encoder):
    long = "Elmdaham lies on the Mira . " * 200
    retriever = AugmentedRetriever(encoder, Fixed(long, "Elmdaham lies on the Mira ."))
    retriever.encode_queries(["a", "b"])
    assert retriever.too_long == 1


def test_settings_and_prompt_are_kept_with_the_model(tmp_path):
    augmenter = QueryAugmenter(ScriptedGenerator([]), prompt="tiny_passage")
    first = AugmentedRetriever(Plane(), augmenter, weight=0.6, side="query", task_instruction="Find.")
    first.save(tmp_path / "model")
    assert (tmp_path / "model" / "augmentation_prompt.txt").read_text().endswith("$question\n")
    kept = QueryAugmenter(ScriptedGenerator([]), prompt=str(tmp_path / "model" / "augmentation_prompt.txt"))
    again = AugmentedRetriever.load(tmp_path / "model", Plane(), kept)
    assert again.query_fingerprint == first.query_fingerprint
    with pytest.raises(ConfigError, match="asks by another prompt than the one that was kept"):
        AugmentedRetriever.load(tmp_path / "model", Plane(), QueryAugmenter(ScriptedGenerator([])))
    (tmp_path / "model" / "augmentation.json").write_text('{"wait": 1}')
    with pytest.raises(ConfigError, match="wait"):
        AugmentedRetriever.load(tmp_path / "model", Plane(), kept)
    with pytest.raises(DataError, match="cannot be read"):
        AugmentedRetriever.load(tmp_path, Plane(), kept)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AugmentedRetriever(Plane(), Fixed(), weight=1.2), r"must lie in \[0, 1\], got 1.2"),
        (lambda: AugmentedRetriever(Plane(), Fixed(), side="both"), "side must be document or query, got 'both'"),
        (lambda: AugmentedRetriever(Plane(), Fixed()).search(["q"], top_k=1), "has no index to search"),
        (lambda: mix_vectors(np.ones((1, 2)), np.ones((2, 2))), r"must be \(B, D\), got \(1, 2\), \(2, 2\)"),
        (lambda: tune_weight(np.ones((0, 2)), np.ones((0, 2)), DOCUMENTS, np.ones(0, int)), "at least one query"),
        (lambda: tune_weight(DOCUMENTS, DOCUMENTS, DOCUMENTS, np.arange(3), weights=[2.0]), "got 2.0"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_augmenter_that_loses_texts():
    with pytest.raises(DataError, match="gave 1 texts for 2 queries"):
        AugmentedRetriever(Plane(), Fixed("one")).encode_queries(["q", "r"])


def test_no_query():
    assert AugmentedRetriever(Plane(), Fixed()).encode_queries([]).shape[0] == 0


def test_the_prefix_is_the_published_one():
    from rag_rl.data import reinforced_ir

    assert reinforced_ir.AUGMENTATION_PREFIX == AUGMENTATION_PREFIX
