"""The assembly that searches hop by hop: rows by hand, and the same rows from an encoder that was saved."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from rag_rl.errors import BackendError, ConfigError
from rag_rl.evaluation import Answered, Asked, SearchAssembly, evaluate
from rag_rl.reasoning import (
    DecompositionReader,
    Environment,
    Failure,
    HopRecord,
    SingleSearch,
    Trajectory,
    retrieval_reward,
)
from rag_rl.retrieval import HistoryEncoder, SentenceEncoder, build_index, open_index
from rag_rl.tiny import FOLDER
from rag_rl.tiny.world import draw_world, questions
from rag_rl.types import Generation, Hit, Passage, Query, Question

ANSWER = {"em", "f1", "contains_em"}
OVER_HOPS = {"recall@3", "all_gold@3", "success@3"}
ONE_SEARCH = {"recall@3", "success@3", "mrr@10", "ndcg@10"}


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("faiss", reason="faiss is not installed")
    return draw_world(5, region="heldout", sizes={"person": 30, "town": 16, "guild": 10, "river": 10})


@pytest.fixture(scope="module")
def asked(world) -> list[Question]:
    return list(questions(world, hops=2, rng=random.Random(0)))[:40]


@pytest.fixture(scope="module")
def index(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "index"
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
    build_index(world.passages, encoder, folder, progress=False)
    return open_index(folder, encoder)


@pytest.fixture
def make(index):
    def assembly(reader=None, *, reward=None, encoder=None, answers=True, **more) -> SearchAssembly:
        environment = Environment(reader or DecompositionReader(), 2, *([reward] if reward else []))
        around = encoder or HistoryEncoder(SentenceEncoder(FOLDER / "encoder", devices="cpu"))
        return SearchAssembly(environment, index, around, **{"top_k": 3, **more}, answers=answers)

    return assembly


def nudge(assembly: SearchAssembly, seed: int = 0) -> None:
    """What training does: changes the weights in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in assembly.encoder.encoder.model.parameters():
            weight += 0.05 * torch.randn_like(weight)


def hop(*names: str, gold: tuple[str, ...], observation: str = "Elmton") -> HopRecord:
    hits = [Hit(Passage(name, f"Text of {name}."), 1.0 / rank, rank) for rank, name in enumerate(names, start=1)]
    return HopRecord(
        Query(f"for {gold}"), hits, observation, "found" if observation else "not_found", gold_doc_ids=gold
    )


def answered(trajectory: Trajectory) -> Answered:
    hits = tuple(hit for h in trajectory.hops for hit in h.hits)
    return Answered(Asked(trajectory.question, hits, hits, ""), Generation(""), trajectory.answer, trajectory)


QUESTION = Question("q", "Which river is the home of Falbert on?", ("the Mir", "Mirbrook"), ("d1", "d2"), 2)


# ---- rows by hand


def test_scores_over_hops_by_hand(make):
    hops = [hop("d1", "d3", gold=("d1",)), hop("d4", "d1", gold=("d2",))]
    row = make().row(answered(Trajectory(QUESTION, hops, "Mirbrook river")))
    assert row["scores"] == {
        "em": 0.0,
        "f1": pytest.approx(2 / 3),
        "contains_em": 1.0,
        "recall@3": 0.5,
        "all_gold@3": 0.0,
        "success@3": 0.5,
    }
    assert [p["doc_id"] for p in row["passages"]] == ["d1", "d3", "d4", "d1"]
    # What one hop missed another may have found: that counts for the documents, and not for the hop.
    hops[1] = hop("d4", "d3", gold=("d2",))
    hops.append(hop("d2", gold=("d1", "d2")))
    scores = make().row(answered(Trajectory(QUESTION, hops, "the mir")))["scores"]
    assert scores == {
        "em": 1.0,
        "f1": 1.0,
        "contains_em": 1.0,
        "recall@3": 1.0,
        "all_gold@3": 1.0,
        "success@3": pytest.approx(2 / 3),
    }


def test_an_answer_without_a_search_is_scored(make):
    scores = make().row(answered(Trajectory(QUESTION, answer="Mirbrook")))["scores"]
    assert scores == {**dict.fromkeys(ANSWER, 1.0), **dict.fromkeys(OVER_HOPS, 0.0)}


def test_no_answer_scores_zero(make):
    scores = make().row(answered(Trajectory(QUESTION, [hop("d1", gold=("d1",))])))["scores"]
    assert {name: scores[name] for name in ANSWER} == dict.fromkeys(ANSWER, 0.0)


def test_a_dropped_trajectory_has_no_scores(make):
    dropped = Trajectory(QUESTION, [hop("d1", gold=("d1",))], failure="timeout")
    row = make().row(answered(dropped))
    # Not even of what its first hop found: the second one never ran.
    assert row["scores"] == dict.fromkeys(ANSWER | OVER_HOPS)
    assert row["answer"] is None


def test_without_known_documents_only_the_answer_is_scored(make):
    question = Question("q", "Who?", ("Mira",))
    scores = make().row(answered(Trajectory(question, [hop("d1", gold=())], "Mira")))["scores"]
    assert scores == dict.fromkeys(ANSWER, 1.0)


def test_one_search_by_hand(make):
    assembly = make(SingleSearch(), reward=retrieval_reward("ndcg"), answers=False)
    trajectory = Trajectory(QUESTION, [hop("d3", "d2", "d1", gold=("d1", "d2"))], "")
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    assert assembly.row(answered(trajectory))["scores"] == {
        "recall@3": 1.0,
        "success@3": 1.0,
        "mrr@10": 0.5,
        "ndcg@10": pytest.approx((second + third) / (1 + second)),
    }


# ---- playing


def test_hops_are_told_in_the_reply(make, asked):
    assembly = make()
    ((first,), *_) = assembly.answer(asked[:3])
    assert first.asked.question == asked[0]
    assert len(first.asked.hits) == 6
    steps = asked[0].meta["decomposition"]
    lines = first.generation.text.splitlines()
    assert lines[0] == f"{steps[0]['question']} -> {first.trajectory.hops[0].learnt}"
    assert lines[1].startswith(f"{steps[1]['follow_up']} -> ")
    row = assembly.row(first)
    assert (row["qid"], row["reply"]) == (asked[0].qid, first.generation.text)


def test_the_metrics_are_those_of_the_reader(make, asked):
    found = evaluate(make(), asked)
    assert set(found.metrics) == ANSWER | OVER_HOPS
    # The scripted reader knows the answer if, and only if, it was shown both documents, each at its own hop.
    for row in found.rows:
        assert row["scores"]["em"] == float(row["scores"]["success@3"] == 1.0)
    assert 0.0 < found.metrics["em"] < 1.0
    assert evaluate(make(), asked).rows == found.rows, "nothing is drawn at random"


def test_history_is_read(make, asked):
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
    with_history = evaluate(make(encoder=HistoryEncoder(encoder)), asked)
    switched_off = evaluate(make(encoder=HistoryEncoder(encoder, enabled=False)), asked)
    not_told = evaluate(make(DecompositionReader(history=False)), asked)
    assert [row["passages"] for row in switched_off.rows] != [row["passages"] for row in with_history.rows]
    assert switched_off.rows == not_told.rows


def test_a_single_search_reads_the_question_and_answers_nothing(make, asked, index):
    assembly = make(SingleSearch(), reward=retrieval_reward("ndcg"), answers=False)
    found = evaluate(assembly, asked)
    assert set(found.metrics) == ONE_SEARCH
    expected = index.search([question.question for question in asked], top_k=3)
    assert [[p["doc_id"] for p in row["passages"]] for row in found.rows] == [
        [hit.passage.doc_id for hit in hits] for hits in expected
    ]


def test_failures_are_counted_and_have_no_scores(make, asked, caplog):
    class Failing(DecompositionReader):
        def observe(self, trajectories, searches, hits):
            told = super().observe(trajectories, searches, hits)
            lost = {asked[1].qid, asked[3].qid}
            return [
                Failure("timeout") if t.question.qid in lost and t.hops else o
                for t, o in zip(trajectories, told, strict=True)
            ]

    sound, found = evaluate(make(), asked), evaluate(make(Failing()), asked)
    lost = [i for i, row in enumerate(found.rows) if row["scores"]["em"] is None]
    assert lost == [1, 3]
    assert found.rows[1]["scores"] == dict.fromkeys(ANSWER | OVER_HOPS)
    assert found.rows[1]["reply"].splitlines()[-1] == "failed: timeout"
    kept = [row for i, row in enumerate(sound.rows) if i not in lost]
    assert found.metrics["em"] == pytest.approx(sum(row["scores"]["em"] for row in kept) / len(kept))
    assert caplog.messages[-1] == "2 of 40 questions failed and have no scores, the first: timeout"
    with pytest.raises(BackendError, match="all 2 trajectories failed; the first: timeout"):
        evaluate(make(Failing()), [asked[1], asked[3]])


# ---- what is trained, and what was saved


def test_training_in_place_is_seen(make, asked):
    assembly = make()
    before = evaluate(assembly, asked)
    asking = assembly.under_training(trainer=None, batch_size=8)
    nudge(assembly)
    assert evaluate(asking, asked).rows != before.rows


@pytest.mark.parametrize("history", [True, False])
def test_an_encoder_that_was_saved_gives_the_same_rows(make, asked, tmp_path, history):
    encoder = SentenceEncoder(
        FOLDER / "encoder", devices="cpu", query_prompt="query: ", max_length=64, batch_size=7, normalize=True
    )
    # The index has no query prompt: what is trained is the query side alone.
    assembly = make(encoder=HistoryEncoder(encoder, history, max_tokens=40))
    start = evaluate(assembly, asked)
    nudge(assembly)
    trained = evaluate(assembly, asked)
    encoder.model.save_pretrained(str(tmp_path / "run"), create_model_card=False)
    again = assembly.reloaded(tmp_path / "run", device="cpu", batch_size=8)
    assert evaluate(again, asked).rows == trained.rows != start.rows
    loaded = again.encoder
    assert (loaded.enabled, loaded.max_tokens, loaded.template) == (history, 40, "state")
    assert (loaded.encoder.query_prompt, loaded.encoder.max_length, loaded.encoder.batch_size) == ("query: ", 64, 7)
    assert assembly.encoder is not loaded, "the assembly itself stays as it is"
    nudge(assembly, seed=1)
    assert evaluate(again, asked).rows == trained.rows


def test_bad_arguments(make, index, tmp_path):
    with pytest.raises(ConfigError, match="retriever_top_k must be at least 1, got 0"):
        make(top_k=0)
    plain = Answered(Asked(QUESTION, (), (), ""), Generation("Answer: Mira"), "Mira")
    with pytest.raises(ConfigError, match="comes from another assembly"):
        make().row(plain)

    class Other:
        dimension, fingerprint = index.dimension, "other"

    with pytest.raises(ConfigError, match="only a SentenceEncoder can be loaded from a folder, not Other"):
        make(encoder=HistoryEncoder(Other())).reloaded(Path(tmp_path), device="cpu", batch_size=8)
