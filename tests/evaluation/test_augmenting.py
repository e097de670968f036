"""Held-out queries, searched with what an augmenter writes to them and without."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments
from rag_rl.config.augmenters import build_augmented_retriever, build_dense_index, build_queries, wrap_generator
from rag_rl.errors import ConfigError
from rag_rl.evaluation.augmenting import AugmentingAssembly
from rag_rl.evaluation.scoring import evaluate
from rag_rl.generation import ScriptedGenerator, TransformersGenerator
from rag_rl.tiny import FOLDER

DATA = DataArguments(
    data_corpus="${tiny}/data/corpus.jsonl", data_train="${tiny}/data/demo_1hop.jsonl", data_eval_size=6
)
ASKED = AugmenterArguments(
    augmenter_prompt="tiny_passage", augmenter_prefix="", augmenter_weight=0.2, augmenter_max_new_tokens=8
)


@pytest.fixture(scope="module")
def index():
    return build_dense_index(RetrieverArguments(retriever_encoder="${tiny}/encoder", retriever_batch_size=256), DATA)


@pytest.fixture(scope="module")
def held_out(index):
    return build_queries(DATA, index.passages, seed=1)[1]


@pytest.fixture
def assembly(index):
    return AugmentingAssembly(
        index, partial(wrap_generator, ASKED), partial(build_augmented_retriever, ASKED, index), top_k=10
    )


def test_the_augmentation_decides_what_is_found(assembly, index, held_out):
    questions = [query.question for query in held_out]
    texts = {query.text: index.passages[query.rows[0]].text for query in held_out}
    other = index.passages[held_out[0].rows[0] - 1].text

    def reply(right):
        return lambda prompt, number: next(texts[text] for text in texts if text in prompt) if right else other

    right = evaluate(assembly.with_generator(ScriptedGenerator(reply(True))), questions)
    assert right.metrics["mrr@10"] == right.metrics["ndcg@10"] == 1.0
    assert [row["reply"] for row in right.rows] == [texts[q.question] for q in questions]
    words = [float(len(text.split())) for text in texts.values()]
    assert right.metrics["augmentation_words"] == pytest.approx(sum(words) / len(words))
    wrong = evaluate(assembly.with_generator(ScriptedGenerator(reply(False))), questions)
    assert wrong.metrics["mrr@10"] < 0.9
    assert set(wrong.metrics) == {"recall@10", "success@10", "mrr@10", "ndcg@10", "augmentation_words"}


def test_without_augmentation_nobody_is_asked(assembly, index, held_out):
    questions = [query.question for query in held_out]
    generator = ScriptedGenerator([])
    bare = assembly.without_augmentation().with_generator(generator)
    found = evaluate(bare, questions)
    assert generator.prompts == []
    plain = index.search([q.question for q in questions], top_k=10)
    shown = [[passage["doc_id"] for passage in row["passages"]] for row in found.rows]
    assert shown == [[hit.passage.doc_id for hit in hits] for hits in plain]
    assert set(found.metrics) == {"recall@10", "success@10", "mrr@10", "ndcg@10"}
    assert bare.reloaded(FOLDER / "nowhere", device="cpu", batch_size=1) is bare


def test_a_query_without_an_augmentation_is_searched_as_it_is(assembly, held_out):
    questions = [query.question for query in held_out]
    empty = evaluate(assembly.with_generator(ScriptedGenerator(lambda prompt, number: " ")), questions)
    bare = evaluate(assembly.without_augmentation(), questions)
    assert [row["passages"] for row in empty.rows] == [row["passages"] for row in bare.rows]
    assert empty.metrics["augmentation_words"] == 0.0


def test_under_training_and_reloaded_say_the_same(assembly, held_out):
    questions = [query.question for query in held_out]
    reader = TransformersGenerator.from_pretrained(str(FOLDER / "reader"), device="cpu")
    accelerator = SimpleNamespace(
        unwrap_model=lambda model, **_: model, num_processes=1, process_index=0, device=torch.device("cpu"), state=None
    )
    trainer = SimpleNamespace(
        model_wrapped=reader.model, accelerator=accelerator, args=SimpleNamespace(), processing_class=reader.tokenizer
    )
    accelerator.state = SimpleNamespace(deepspeed_plugin=None)
    policy = assembly.under_training(trainer, batch_size=4)
    saved = assembly.reloaded(FOLDER / "reader", device="cpu", batch_size=64)
    assert evaluate(policy, questions).rows == evaluate(saved, questions).rows
    texts = [question.question for question in questions]
    assert saved.texts(texts) == [row["reply"] for row in evaluate(saved, questions).rows]


def test_what_means_nothing(assembly, index, held_out):
    with pytest.raises(ConfigError, match="retriever_top_k must be at least 1, got 0"):
        AugmentingAssembly(index, assembly.augment, assembly.mix, top_k=0)
    with pytest.raises(ConfigError, match="nobody writes augmentations"):
        assembly.answer([held_out[0].question])
    with pytest.raises(ConfigError, match="nobody writes augmentations"):
        assembly.texts(["Where?"])
