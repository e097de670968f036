"""What each step of a round starts from, and what is kept of it; training is in tests/recipes/test_self_boost.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trl import DPOConfig, ModelConfig

from rag_rl.config.arguments import DataArguments, QueryEncoderArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, PreferenceArguments
from rag_rl.config.distillation_arguments import DistillationArguments
from rag_rl.config.self_boosting import Boosting
from rag_rl.config.self_boosting_arguments import BoostArguments, RetrieverTrainingArguments
from rag_rl.config.steps import read_manifest
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.data.reinforced_ir import SyntheticQuery, write_queries
from rag_rl.errors import ConfigError, DataError
from rag_rl.run import Run
from rag_rl.tiny import FOLDER

CRAFTS = ("painter", "weaver", "sailor", "miller", "baker", "smith", "tanner", "cooper", "mason", "potter")
TEXTS = [f"Person{number} works as a {CRAFTS[number % 10]}." for number in range(40)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"doc_id": f"d{number}", "text": text} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def queries(tmp_path) -> list[str]:
    """Queries of two rounds; those about the first 20 passages are worded alike in both."""
    for number, words in enumerate(("craft of Person{}", "Person{} work"), start=1):
        rows = [
            SyntheticQuery((words if place >= 20 else "craft of Person{}").format(place), text)
            for place, text in enumerate(TEXTS)
        ]
        write_queries(tmp_path / f"queries{number}.json", rows)
    return [str(tmp_path / f"queries{number}.json") for number in (1, 2)]


@pytest.fixture
def make(tmp_path, corpus, queries):
    def build(*, data: dict | None = None, augmenter: dict | None = None, **boost: object) -> Boosting:
        run = Run(tmp_path / "run", "self_boost", "tiny", 42, None, {}, ())
        run.folder.mkdir(exist_ok=True)
        return Boosting(
            run,
            BoostArguments(**{"boost_queries": queries, "gate_share": 0.3, **boost}),
            DataArguments(**{"data_corpus": str(corpus), **(data or {})}),
            SynthesisArguments(),
            RetrieverArguments(retriever_encoder="${tiny}/encoder_young", retriever_top_k=10),
            AugmenterArguments(
                **{"augmenter_prompt": "tiny_passage", "augmenter_max_new_tokens": 8, **(augmenter or {})}
            ),
            ModelConfig(model_name_or_path="${tiny}/reader", dtype="float32"),
        )

    return build


@pytest.fixture
def training(tmp_path) -> DPOConfig:
    return DPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none"
    )


def texts(found) -> tuple[set[str], set[str]]:
    return {query.text for query in found.queries}, {question.question for question in found.held_out}


# ---- queries


def test_what_is_held_out_in_one_round_is_learnt_from_in_no_other(make):
    boost = make()
    (learnt1, gate1), (learnt2, gate2) = (texts(boost.write_queries(number)) for number in boost.rounds)
    assert len(learnt1) + len(gate1) == len(learnt2) + len(gate2) == 40
    assert 5 <= len(gate1) <= 20, "about three in ten"
    assert not gate1 & (learnt1 | learnt2)
    assert not gate2 & (learnt1 | learnt2)
    assert gate1 & gate2, "some are worded alike"
    assert texts(make().write_queries(2)) == (learnt2, gate2)


def test_questions_of_people_are_left_out_and_evaluated_on(make, tmp_path):
    rows = [
        {"qid": f"p{n}", "question": f"Craft of person{n}", "answers": [], "gold_doc_ids": [f"d{n}"]} for n in (1, 2)
    ]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    boost = make(data={"data_eval": str(tmp_path / "people.jsonl")})
    boost.measure_before()
    assert [question.qid for question in boost.questions] == ["p1", "p2"]
    learnt, gate = texts(boost.write_queries(1))
    assert len(learnt | gate) == 38
    assert not {"craft of Person1", "craft of Person2"} & (learnt | gate)


def test_without_people_the_first_gate_is_evaluated_on(make):
    boost = make()
    boost.measure_before()
    assert {question.question for question in boost.questions} == texts(boost.write_queries(1))[1]
    before = boost.run.folder / "before.json"
    noted = before.stat().st_mtime_ns
    make().measure_before()
    assert before.stat().st_mtime_ns == noted, "once"
    make(augmenter={"augmenter_weight": 0.3}).measure_before()
    assert before.stat().st_mtime_ns > noted, "but not of another pair"


def test_as_many_as_asked_for(make):
    found = make(data={"data_train_size": 5}).write_queries(1)
    assert (len(found.queries), len(found.held_out)) == (5, len(make().write_queries(1).held_out))


def test_a_plain_corpus_becomes_documents(make, tmp_path, queries):
    (tmp_path / "corpus.json").write_text(json.dumps(TEXTS))
    data = {"data_corpus": str(tmp_path / "corpus.json")}
    boost = make(data=data)
    assert len(boost.index.passages) == 40
    assert sum(map(len, texts(boost.write_queries(1)))) == 40
    (tmp_path / "corpus.json").write_text(json.dumps(TEXTS[:30]))
    assert len(make(data=data).index.passages) == 30, "the documents of another corpus are not taken for its own"


# ---- steps and the gate


def test_steps_name_what_they_are_made_of(make, training):
    boost = make()
    found = boost.write_queries(1)
    step, own, model, _ = boost.augmenter_step(1, found, PreferenceArguments(), training)
    assert (own.output_dir, own.seed, model.model_name_or_path) == (str(step.folder), step.seed, "${tiny}/reader")
    told = read_manifest(step.folder)
    assert set(told["inputs"]) == {
        "corpus", "retriever", "queries", "held out", "model_name_or_path", "augmenter_prompt",
    }  # fmt: skip
    assert str(FOLDER) not in json.dumps(told), "weights count, not where they lie"
    assert {"beta", "preference_signal", "augmenter_weight", "lora_r"} <= set(told["settings"])
    distilled, _, writer = boost.retriever_step(
        1, found, DistillationArguments(), QueryEncoderArguments(), RetrieverTrainingArguments(), training
    )
    assert writer.augmenter_model == "${tiny}/reader"
    assert distilled.seed != step.seed
    assert "augmenter_model" in read_manifest(distilled.folder)["inputs"]
    assert {"distill_teacher", "group_size", "retriever_train"} <= set(read_manifest(distilled.folder)["settings"])


def finished(boost: Boosting, training: DPOConfig, *, before: float, after: float) -> Run:
    """The augmenter's step of round 1 as if it had come out like that."""
    step, *_ = boost.augmenter_step(1, boost.write_queries(1), PreferenceArguments(), training)
    summary = {
        "status": "complete", "before": {"ndcg@10": before}, "after": {"ndcg@10": after}, "n_eval": 12,
        "ci95": {"ndcg@10": [0.0, 0.1]}, "train_seconds": 1.0,
    }  # fmt: skip
    (step.folder / "metrics.json").write_text(json.dumps(summary))
    return step


@pytest.mark.parametrize(
    ("options", "after", "kept"),
    [
        ({}, 0.5, True),
        ({}, 0.4, False),
        ({}, 0.3, False),
        ({"gate_min_gain": 0.2}, 0.5, False),
        ({"gate": False}, 0.3, True),
    ],
)
def test_the_gate(make, training, options, after, kept):
    boost = make(**options)
    step = finished(boost, training, before=0.4, after=after)
    boost.keep(step)
    told = read_manifest(step.folder)
    assert told["kept"] is kept
    assert (told["gate"]["before"], told["gate"]["after"], told["gate"]["queries"]) == (0.4, after, 12)
    assert boost.model.model_name_or_path == (str(step.folder) if kept else "${tiny}/reader")
    assert boost.retriever.retriever_encoder == "${tiny}/encoder_young"


# ---- bad input


def test_queries_have_a_place_of_their_own(make):
    with pytest.raises(ConfigError, match="data_train is written here, round by round"):
        make(data={"data_train": "queries.json"})


def test_a_weight_that_leaves_augmentations_out(make):
    with pytest.raises(ConfigError, match="augmenter_weight 1 leaves augmentations out"):
        make(augmenter={"augmenter_weight": 1.0})


def test_too_few_queries_for_a_gate(make, tmp_path):
    write_queries(tmp_path / "two.json", [SyntheticQuery(f"craft of {n}", TEXTS[n]) for n in (0, 1)])
    boost = make(boost_queries=[str(tmp_path / "two.json")], boost_rounds=1, gate_share=0.001)
    with pytest.raises(DataError, match=r"round 1: of 2 queries gate_share 0\.001 holds out 0, and 2 are left"):
        boost.write_queries(1)


def test_a_corpus_that_is_missing(make, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        make(data={"data_corpus": str(tmp_path / "nowhere.jsonl")}).write_queries(1)
