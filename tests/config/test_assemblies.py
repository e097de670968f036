from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from rag_rl.config.arguments import DataArguments, GeneratorArguments, ReasonerArguments
from rag_rl.config.assemblies import (
    ARGUMENTS,
    build_assembly_search,
    build_evaluable,
    build_evaluation_baselines,
    build_evaluation_questions,
    open_assembly,
    plan_assembly,
    read_plan,
)
from rag_rl.errors import ConfigError, DataError, RunFolderError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.measuring import SearchOnly
from rag_rl.evaluation.reasoning import ReasoningAssembly
from rag_rl.generation import OpenAIGenerator, ScriptedGenerator
from rag_rl.retrieval import DenseRetriever, HistoryEncoder, RerankedRetriever, ShuffledRetriever
from rag_rl.retrieval.augmented import AugmentedRetriever
from rag_rl.retrieval.bm25 import BM25Retriever
from rag_rl.tiny import FOLDER

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate_rag.py"
RETRIEVER = {
    "data_corpus": "${tiny}/data/corpus.jsonl",
    "retriever_encoder": "${tiny}/encoder",
    "retriever_top_k": 3,
    "retriever_batch_size": 256,
}
READER = {"generator_model": "${tiny}/reader", "generator_prompt": "tiny_answer", "generator_max_new_tokens": 32}
SCRIPTED = {"generator_name": "a_users_module:scripted"}


def scripted(plan):
    return ScriptedGenerator(lambda text, number: "Answer: Mira")


@pytest.fixture(autouse=True)
def _findable(monkeypatch):
    """`package.module:attribute` must find this file."""
    monkeypatch.setitem(sys.modules, "a_users_module", sys.modules[__name__])


def run_of(folder: Path, recipe: str, model: Path | None = None, **settings) -> Path:
    """What a finished run leaves, as far as an assembly looks at it."""
    if model is not None:
        shutil.copytree(model, folder)
    folder.mkdir(exist_ok=True)
    (folder / "resolved_config.yaml").write_text(
        yaml.safe_dump({"recipe": recipe, "config": "tiny", "made_with": {"rag-rl": "0.0.9"}, **settings})
    )
    summary = {"status": "complete", "before": {}, "after": {"em": 1.0}, "n_eval": 3}
    (folder / "metrics.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def generator_run(tmp_path_factory) -> Path:
    folder = run_of(
        tmp_path_factory.mktemp("runs") / "generator",
        "grpo_generator",
        FOLDER / "reader",
        **dataclasses.asdict(GeneratorArguments(generator_prompt="tiny_answer", generator_passage_order="shuffled")),
        retriever_top_k=4,
        retriever_encoder="elsewhere",
        max_completion_length=19,
    )
    (folder / "prompts").mkdir()
    (folder / "prompts" / "tiny_answer.txt").write_text("$passages\nAs it was then: $question\n")
    return folder


def built(**given):
    plan = plan_assembly(given)
    search = build_assembly_search(plan)
    return plan, search, build_evaluable(plan, search)


# ---- which parts there are


def test_a_retriever_alone():
    _, search, found = built(**RETRIEVER)
    assert isinstance(found, SearchOnly)
    assert isinstance(found.retriever, DenseRetriever)
    assert (found.top_k, found.depth, search.depth, len(search.passages)) == (3, 10, 10, len(found.retriever))


def test_retriever_and_generator():
    _, _, found = built(**RETRIEVER, **READER, evaluation_depth=1)
    assert isinstance(found, Assembly)
    assert (found.prompt, found.top_k, found.depth, found.max_new_tokens) == ("tiny_answer", 3, 3, 32)
    assert found.max_prompt_tokens == found.generator.prompt_limit(32)


def test_a_generator_alone_is_asked_without_passages():
    _, search, found = built(generator_model="${tiny}/reader", evaluation_closed_prompt="tiny_closed_book")
    assert search is None
    assert (found.retriever, found.prompt) == (None, "tiny_closed_book")


def test_a_part_of_the_user_s_own_and_an_endpoint():
    _, _, found = built(**RETRIEVER, **SCRIPTED)
    assert isinstance(found.generator, ScriptedGenerator)
    assert found.max_prompt_tokens is None
    _, _, served = built(
        **RETRIEVER, generator_name="openai", generator_model="m", generator_base_url="http://127.0.0.1:9/v1"
    )
    assert isinstance(served.generator, OpenAIGenerator)
    assert (served.generator.model, served.generator.base_url) == ("m", "http://127.0.0.1:9/v1")


def test_a_reasoner():
    given = {"reasoner_model": "${tiny}/reader", "reasoner_max_steps": 4, "reasoner_max_step_tokens": 48}
    _, _, found = built(**RETRIEVER, **given)
    assert isinstance(found, ReasoningAssembly)
    assert (found.setup.max_steps, found.setup.max_step_tokens, found.setup.top_k) == (4, 48, 3)


def test_bm25_in_place_of_a_retriever():
    _, search, found = built(data_corpus="${tiny}/data/corpus.jsonl", retriever_name="bm25", retriever_top_k=2)
    assert isinstance(found.retriever, BM25Retriever)
    ((answered,),) = found.answer([build_evaluation_questions(plan_assembly({**RETRIEVER, **QUESTIONS}), search)[0]])
    assert answered.asked.hits[0].passage.doc_id in answered.asked.question.gold_doc_ids


def test_augmenter_and_reranker_around_the_retriever():
    _, search, found = built(
        **RETRIEVER,
        augmenter_model="${tiny}/reader",
        augmenter_prompt="tiny_passage",
        augmenter_task="tiny",
        augmenter_prefix="",
        augmenter_weight=0.4,
        augmenter_max_new_tokens=8,
        retriever_reranker="${tiny}/encoder",
        retriever_candidates=6,
    )
    assert isinstance(found.retriever, RerankedRetriever)
    assert found.depth == search.depth == 6, "more would be more candidates, and another order"
    inner = found.retriever.retriever
    assert isinstance(inner, AugmentedRetriever)
    assert (inner.weight, inner.augmenter.max_new_tokens) == (0.4, 8)
    (hits,) = found.retriever.search(["What is the guild of Falledric?"], top_k=3)
    assert len(hits) == 3
    assert inner.augmented == 1


def test_the_control_of_a_shuffled_index():
    _, _, found = built(**RETRIEVER, retriever_shuffled=True)
    assert isinstance(found.retriever, ShuffledRetriever)
    with pytest.raises(ConfigError, match="retriever_shuffled is a control of the plain retriever"):
        built(**RETRIEVER, retriever_shuffled=True, retriever_reranker="${tiny}/encoder")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the assembly has no part"),
        ({"generator_model": "a", "reasoner_model": "b", **RETRIEVER}, "exclude each other"),
        ({"reasoner_model": "b"}, "reasoner_model needs a retriever"),
        ({"generator_model": "b", "retriever_reranker": "c"}, "retriever_reranker needs a retriever"),
        ({"generator_model": "b", "augmenter_model": "c"}, "augmenter_model needs a retriever"),
        ({"generator": "b"}, "an assembly has no setting 'generator'"),
        ({"reasoner_baselines": []}, "reasoner_baselines is a setting of training: here it is evaluation_baselines"),
        ({"reasoner_baseline_prompt": "x"}, "here it is evaluation_one_shot_prompt"),
    ],
)
def test_parts_that_do_not_go_together(given, message):
    with pytest.raises(ConfigError, match=message):
        plan_assembly(given)


def test_names_that_mean_nothing():
    with pytest.raises(ConfigError, match=r"generator_name must be local, openai or package\.module:attribute"):
        built(**RETRIEVER, generator_name="gpt", generator_model="m")
    with pytest.raises(ConfigError, match="an augmenter mixes query vectors: retriever_name must be dense"):
        built(data_corpus=RETRIEVER["data_corpus"], retriever_name="bm25", augmenter_model="${tiny}/reader")


# ---- parts from run folders


def test_a_generator_is_asked_as_it_was_trained(generator_run):
    given = {name: value for name, value in RETRIEVER.items() if name != "retriever_top_k"}
    plan, _, found = built(**given, generator_model=str(generator_run))
    assert plan.runs["generator"]["recipe"] == "grpo_generator"
    assert (found.max_new_tokens, found.top_k, found.order) == (19, 4, "shuffled")
    assert found.prompt == str(generator_run / "prompts" / "tiny_answer.txt")
    assert plan.retriever.retriever_encoder == "${tiny}/encoder", "only its own settings"


def test_what_is_said_wins_over_what_the_run_had(generator_run):
    _, _, found = built(
        **{**RETRIEVER, "retriever_top_k": 5},
        generator_model=str(generator_run),
        generator_passage_order="ranked",
        generator_max_new_tokens=256,
    )
    # 5, ranked and 256 are defaults, too: what counts is that they were said.
    assert (found.max_new_tokens, found.top_k, found.order) == (256, 5, "ranked")


def test_a_reasoner_with_its_layout_and_baselines(tmp_path):
    arguments = ReasonerArguments(
        reasoner_layout="chat",
        reasoner_max_steps=3,
        reasoner_max_step_tokens=40,
        reasoner_baseline_prompt="tiny_answer",
        reasoner_baseline_closed_prompt="tiny_closed_book",
        reasoner_baseline_top_k=6,
    )
    run = run_of(tmp_path / "r", "ppo_reasoner", FOLDER / "reader", **dataclasses.asdict(arguments), retriever_top_k=2)
    given = {name: value for name, value in RETRIEVER.items() if name != "retriever_top_k"}
    baselines = ["one_shot", "no_retrieval", "bm25"]
    plan, search, found = built(**given, reasoner_model=str(run), evaluation_baselines=baselines)
    assert (found.setup.layout, found.setup.max_steps, found.setup.top_k) == ("chat", 3, 2)
    others = build_evaluation_baselines(plan, found, search)
    assert list(others) == baselines
    assert (others["one_shot"].prompt, others["one_shot"].top_k) == ("tiny_answer", 6)
    assert (others["no_retrieval"].prompt, others["no_retrieval"].retriever) == ("tiny_closed_book", None)
    assert isinstance(others["bm25"].setup.retriever, BM25Retriever)
    assert all(one.generator is found.generator for one in others.values()), "the model is loaded once"


@pytest.mark.parametrize("history", [True, False])
def test_a_trained_query_encoder_over_the_index_of_its_training(tmp_path, history):
    run = run_of(
        tmp_path / "r",
        "grpo_retriever",
        FOLDER / "encoder_young",
        retriever_encoder="${tiny}/encoder",
        retriever_top_k=10,
        retriever_reranker=None,
        retriever_batch_size=128,
        data_corpus="${tiny}/data/corpus.jsonl",
        data_chunk_tokens=None,
        reader_history=history,
        retriever_state_tokens=64,
    )
    plan, _, found = built(retriever_run=str(run))
    encoder = found.retriever.encoder
    assert isinstance(encoder, HistoryEncoder)
    assert (encoder.enabled, encoder.max_tokens) == (history, 64)
    assert (plan.retriever.retriever_top_k, plan.retriever.retriever_batch_size) == (5, 128)
    assert plan.data.data_corpus == "${tiny}/data/corpus.jsonl"
    _, _, plain = built(**RETRIEVER)
    assert found.retriever.folder == plain.retriever.folder, "the index of the encoder that training started from"
    query = ["Where does Falledric live?"]
    assert abs(found.retriever.encode_queries(query) - plain.retriever.encode_queries(query)).max() > 0.01
    with pytest.raises(ConfigError, match="retriever_run brings its encoder along"):
        plan_assembly({**RETRIEVER, "retriever_run": str(run)})


def test_a_distilled_encoder_embeds_documents_as_well(tmp_path):
    run = run_of(
        tmp_path / "r",
        "distill_retriever",
        FOLDER / "encoder_young",
        retriever_encoder="${tiny}/encoder",
        data_corpus="${tiny}/data/corpus.jsonl",
    )
    _, _, found = built(retriever_run=str(run))
    _, _, young = built(**{**RETRIEVER, "retriever_encoder": "${tiny}/encoder_young"})
    query = ["Where does Falledric live?"]
    told = [[h.passage.doc_id for h in one.retriever.search(query, top_k=5)[0]] for one in (found, young)]
    assert told[0] == told[1]


def test_both_parts_of_a_pair_that_taught_each_other(tmp_path):
    run = run_of(
        tmp_path / "r",
        "self_boost",
        None,
        retriever_encoder="${tiny}/encoder",
        data_corpus="${tiny}/data/corpus.jsonl",
        augmenter_prompt="tiny_passage",
        augmenter_task="tiny",
        augmenter_prefix="",
        augmenter_weight=0.3,
        augmenter_max_new_tokens=9,
    )
    for part, model in (("retriever", "encoder_young"), ("augmenter", "reader")):
        shutil.copytree(FOLDER / model, run / part)
    plan, _, found = built(retriever_run=str(run), augmenter_model=str(run))
    assert (plan.augmenter.augmenter_weight, plan.augmenter.augmenter_max_new_tokens) == (0.3, 9)
    _, _, apart = built(
        **{**RETRIEVER, "retriever_encoder": "${tiny}/encoder_young", "retriever_top_k": 5},
        augmenter_model="${tiny}/reader",
        augmenter_prompt="tiny_passage",
        augmenter_task="tiny",
        augmenter_prefix="",
        augmenter_weight=0.3,
        augmenter_max_new_tokens=9,
    )
    query = ["Where does Falledric live?"]
    told = [[h.passage.doc_id for h in one.retriever.search(query, top_k=5)[0]] for one in (found, apart)]
    assert told[0] == told[1]


def test_a_reranker_keeps_its_number_of_candidates(tmp_path):
    run = run_of(tmp_path / "r", "train_reranker", FOLDER / "encoder", reranker_model="x", reranker_candidates=7)
    _, search, found = built(**RETRIEVER, retriever_reranker=str(run))
    assert (found.retriever.candidates, search.depth) == (7, 7)


def test_an_augmenter_is_used_as_it_was_trained(tmp_path):
    run = run_of(
        tmp_path / "r",
        "dpo_augmenter",
        FOLDER / "reader",
        augmenter_prompt="tiny_passage",
        augmenter_task="tiny",
        augmenter_prefix="",
        augmenter_weight=0.3,
        augmenter_max_new_tokens=9,
    )
    plan = plan_assembly({**RETRIEVER, "augmenter_model": str(run)})
    assert (plan.augmenter.augmenter_weight, plan.augmenter.augmenter_max_new_tokens) == (0.3, 9)
    assert plan_assembly({**RETRIEVER, "augmenter_model": str(run), "augmenter_weight": 0.8}).augmenter == (
        dataclasses.replace(plan.augmenter, augmenter_weight=0.8)
    )


@pytest.mark.parametrize(
    ("recipe", "settings", "given", "message"),
    [
        (
            "grpo_retriever",
            {},
            "generator_model",
            "is a run of grpo_retriever, which trains no part that is a generator",
        ),
        ("grpo_generator", {"generator_prompt": "x"}, "reasoner_model", "no part that is a reasoner"),
        ("sft_reasoner", {"reasoner_layout": "turn"}, "generator_model", "no part that is a generator"),
        ("train_reranker", {"retriever_encoder": "x"}, "retriever_run", "no part that is a retriever"),
        ("grpo_generator", {"generator_prompt": "x"}, "retriever_reranker", "no part that is a reranker"),
        ("grpo_generator", {"generator_prompt": "x"}, "augmenter_model", "no part that is an augmenter"),
        (
            "dpo_augmenter",
            {"augmenter_prompt": "x", "generator_prompt": "y"},
            "generator_model",
            "is a run of dpo_augmenter, which trains no part that is a generator",
        ),
        ("grpo_retriever", {}, "retriever_run", "made by rag-rl 0.0.9, .*: it has no setting 'retriever_encoder'"),
        (
            "grpo_generator",
            {"generator_prompt": "x", "retriever_top_k": 3},
            "generator_model",
            "made by rag-rl 0.0.9, .*: it has no setting 'max_completion_length'",
        ),
    ],
)
def test_runs_of_another_part_or_another_version(tmp_path, recipe, settings, given, message):
    run = run_of(tmp_path / "run", recipe, **settings)
    asked = {"retriever_run": str(run)} if given == "retriever_run" else {**RETRIEVER, given: str(run)}
    with pytest.raises(RunFolderError, match=message):
        plan_assembly(asked)


def test_runs_that_are_not_finished(tmp_path, generator_run):
    half = tmp_path / "half"
    shutil.copytree(generator_run, half)
    (half / "metrics.json").unlink()
    with pytest.raises(RunFolderError, match="holds an unfinished run"):
        plan_assembly({**RETRIEVER, "generator_model": str(half)})
    with pytest.raises(RunFolderError, match="holds no run"):
        plan_assembly({"retriever_run": str(tmp_path / "none")})
    shutil.copy(generator_run / "metrics.json", half)
    (half / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot load the model"):
        built(**RETRIEVER, generator_model=str(half))


def test_weights_are_stamped(generator_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(generator_run, copy)
    before = plan_assembly({**RETRIEVER, "generator_model": str(copy)}).settings["weights"]
    assert set(before) == {"retriever_encoder", "generator_model"}
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    after = plan_assembly({**RETRIEVER, "generator_model": str(copy)}).settings["weights"]
    assert before["generator_model"] != after["generator_model"]
    assert before["retriever_encoder"] == after["retriever_encoder"]


# ---- questions


QUESTIONS = {"data_eval": "${tiny}/data/heldout_1hop.jsonl", "data_eval_size": 20}


def test_the_questions_are_those_of_a_training_run(caplog):
    from rag_rl.config.parts import build_questions

    plan, search, _ = built(**RETRIEVER, **QUESTIONS)
    with caplog.at_level(logging.INFO):
        found = build_evaluation_questions(plan, search)
    data = DataArguments(data_train="${tiny}/data/demo_1hop.jsonl", **QUESTIONS)
    assert found == build_questions(data, seed=7)[1]
    assert "20 of 840 questions are evaluated on (data_eval_size)" in caplog.text


def questions_in(path: Path, *rows: dict) -> str:
    path.write_text(
        "".join(json.dumps({"qid": str(i), "question": "Who?", **row}) + "\n" for i, row in enumerate(rows))
    )
    return str(path)


def test_gold_documents_that_the_corpus_does_not_hold(tmp_path):
    good = json.loads((FOLDER / "data" / "heldout_1hop.jsonl").read_text().splitlines()[0])["gold_doc_ids"]
    source = questions_in(
        tmp_path / "q.jsonl", {"gold_doc_ids": good}, {"gold_doc_ids": ["nowhere"], "answers": ["x"]}
    )
    plan, search, _ = built(**RETRIEVER, data_eval=source)
    with pytest.raises(DataError, match=r"q\.jsonl: 1 of 2 questions have gold .* \(1: nowhere\)"):
        build_evaluation_questions(plan, search)
    for how, count in (("drop", 1), ("missed", 2)):
        plan = plan_assembly({**RETRIEVER, "data_eval": source, "evaluation_unknown_gold": how})
        assert len(build_evaluation_questions(plan, search)) == count


def test_questions_that_cannot_be_scored(tmp_path, caplog):
    plan, search, _ = built(**RETRIEVER, data_eval=questions_in(tmp_path / "q.jsonl", {"answers": ["x"]}))
    with pytest.raises(
        DataError, match="no question has gold documents, and nobody answers: there is nothing to score"
    ):
        build_evaluation_questions(plan, search)
    bare = questions_in(tmp_path / "bare.jsonl", {})
    with pytest.raises(DataError, match="no question has accepted answers nor gold documents"):
        build_evaluation_questions(plan_assembly({**RETRIEVER, **SCRIPTED, "data_eval": bare}), search)
    mixed = questions_in(tmp_path / "mixed.jsonl", {"answers": ["x"]}, {})
    assert len(build_evaluation_questions(plan_assembly({**RETRIEVER, **SCRIPTED, "data_eval": mixed}), search)) == 2
    assert "1 of 2 questions have nothing that could be scored" in caplog.text
    with pytest.raises(ConfigError, match="data_eval is not set"):
        build_evaluation_questions(plan_assembly(RETRIEVER), search)


# ---- baselines


def test_baselines_of_a_generator_and_of_a_search():
    plan, search, found = built(**RETRIEVER, **SCRIPTED, evaluation_baselines=["bm25", "no_retrieval"])
    others = build_evaluation_baselines(plan, found, search)
    assert isinstance(others["bm25"].retriever, BM25Retriever)
    assert others["bm25"].prompt == found.prompt
    assert others["no_retrieval"].retriever is None
    assert not isinstance(found.retriever, BM25Retriever), "the assembly itself stays as it is"
    plan, search, found = built(**RETRIEVER, evaluation_baselines=["bm25"])
    others = build_evaluation_baselines(plan, found, search)
    assert isinstance(others["bm25"], SearchOnly)
    assert (others["bm25"].top_k, others["bm25"].depth) == (3, 10)


@pytest.mark.parametrize(
    ("given", "baseline", "message"),
    [
        ({**RETRIEVER, **SCRIPTED}, "one_shot", "one_shot is for a reasoner"),
        (RETRIEVER, "no_retrieval", "an assembly that only searches"),
        (SCRIPTED, "no_retrieval", "an assembly that searches nothing"),
        (SCRIPTED, "bm25", "bm25 replaces another retriever"),
    ],
)
def test_baselines_that_mean_nothing(given, baseline, message):
    plan, search, found = built(**given, evaluation_baselines=[baseline])
    with pytest.raises(ConfigError, match=message):
        build_evaluation_baselines(plan, found, search)


# ---- files


def test_only_what_is_said_counts_as_said(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("retriever_encoder: ${tiny}/encoder\nretriever_top_k: 5\n")
    plan = read_plan(RECIPE, argv=["--config", str(config), "--seed", "3"])
    assert plan.given == {"retriever_encoder", "retriever_top_k", "seed"}
    assert (plan.retriever.retriever_top_k, plan.evaluation.seed, plan.generator.generator_prompt) == (5, 3, "answer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retriver_top_k: 3\n", "unknown key retriver_top_k; the closest valid one is retriever_top_k"),
        ("retriever_top_k: many\n", "retriever_top_k: expected an integer, got 'many'"),
        ("retriever_top_k: 0\n", "retriever_top_k must be at least 1, got 0"),
    ],
)
def test_bad_files(tmp_path, text, message):
    config = tmp_path / "a.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_plan(RECIPE, argv=["--config", str(config)])


def test_open_assembly(tmp_path):
    found = open_assembly("tiny", argv=["--retriever_top_k", "2"])
    assert (found.top_k, found.prompt) == (2, "tiny_answer")
    with pytest.raises(ConfigError, match="no such file"):
        open_assembly(tmp_path / "none.yaml")


def test_no_name_means_two_things():
    names = [field.name for kind in ARGUMENTS for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))
