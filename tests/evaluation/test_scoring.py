"""Scores of an evaluation, against numbers worked out by hand."""

from __future__ import annotations

import logging
import math

import pytest

from rag_rl import evaluation
from rag_rl.errors import BackendError, DataError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.scoring import (
    answer_differences,
    confidence_intervals,
    evaluate,
    mean_metrics,
    read_rows,
    reward_columns,
    write_rows,
)
from rag_rl.generation import ScriptedGenerator
from rag_rl.retrieval import StaticRetriever
from rag_rl.types import Generation, Passage, Question

PASSAGES = [Passage(f"d{i}", f"Text {i}.", title=f"Title {i}") for i in range(1, 5)]
D1, D2, D3, D4 = PASSAGES
QUESTIONS = [
    Question("q1", "one?", ("Mira", "the Mira River"), ("d2",)),
    Question("q2", "two?", ("Jean Paul Orl",), ("d1", "d4")),
    Question("q3", "three?", ("tin",)),
]
REPLIES = ["I think so.\nAnswer: the mira", "Answer: Paul Orl", "It is tin\nAnswer: copper, not tin\nThanks"]


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "ask.txt"
    path.write_text("$passages\n$question", encoding="utf-8")
    return str(path)


@pytest.fixture
def assembly(prompt):
    retriever = StaticRetriever({"one?": [D1, D2, D3], "two?": [D1, D2, D3], "three?": [D3, D4]})
    return Assembly(retriever=retriever, generator=ScriptedGenerator(REPLIES), prompt=prompt, top_k=3)


def rows_of(values, name="em"):
    return [{"qid": f"q{i}", "scores": {name: value}} for i, value in enumerate(values)]


def test_scores_by_hand(assembly):
    found = evaluate(assembly, QUESTIONS)
    first, second, third = (row["scores"] for row in found.rows)
    assert first == {
        "em": 1.0,
        "f1": 1.0,
        "contains_em": 1.0,
        "format": 1.0,
        "recall@3": 1.0,
        "success@3": 1.0,
        "mrr@10": 0.5,
        "ndcg@10": pytest.approx(1 / math.log2(3)),
    }
    # 2 of 2 predicted tokens are right, 2 of 3 gold ones found; 1 of 2 gold documents, at rank 1.
    assert second == {
        "em": 0.0,
        "f1": pytest.approx(0.8),
        "contains_em": 0.0,
        "format": 1.0,
        "recall@3": 0.5,
        "success@3": 1.0,
        "mrr@10": 1.0,
        "ndcg@10": pytest.approx(1 / (1 + 1 / math.log2(3))),
    }
    # Something follows the answer's line, and nobody knows the gold documents: no retrieval metric, which is not 0.
    assert third == {"em": 0.0, "f1": pytest.approx(0.5), "contains_em": 1.0, "format": 0.0}
    assert found.metrics["em"] == pytest.approx(1 / 3)
    assert found.metrics["f1"] == pytest.approx((1 + 0.8 + 0.5) / 3)
    assert found.metrics["recall@3"] == pytest.approx(0.75)
    assert found.metrics["mrr@10"] == pytest.approx(0.75)


def test_rows_say_what_was_asked_and_answered(assembly):
    row = evaluate(assembly, QUESTIONS).rows[0]
    assert (row["qid"], row["question"], row["answers"]) == ("q1", "one?", ["Mira", "the Mira River"])
    assert (row["reply"], row["answer"]) == (REPLIES[0], "the mira")
    assert [p["doc_id"] for p in row["passages"]] == ["d1", "d2", "d3"]
    assert row["passages"][1] == {"doc_id": "d2", "title": "Title 2", "text": "Text 2.", "score": 0.5}
    assert row["gold_doc_ids"] == ["d2"]


def test_no_answer_scores_zero(assembly):
    silent = assembly.with_generator(ScriptedGenerator(["<think>hm"]))
    (row,) = evaluate(silent, QUESTIONS[:1]).rows
    assert row["answer"] is None
    assert [row["scores"][name] for name in ("em", "f1", "contains_em", "format")] == [0.0] * 4
    assert row["scores"]["recall@3"] == 1.0


def test_nothing_retrieved_is_a_zero_and_no_retriever_is_none(prompt, tmp_path):
    def scores(**parts):
        assembly = Assembly(generator=ScriptedGenerator(["Answer: x"] * 2), **parts)
        return [row["scores"] for row in evaluate(assembly, [QUESTIONS[0], QUESTIONS[2]]).rows]

    retrieval = {"recall@3", "success@3", "mrr@10", "ndcg@10"}
    known, unknown = scores(retriever=StaticRetriever({}, default=[]), prompt=prompt, top_k=3)
    assert {name: known[name] for name in retrieval} == dict.fromkeys(retrieval, 0.0)
    assert not retrieval & set(unknown)  # nobody knows the gold documents of this question
    closed = tmp_path / "closed.txt"
    closed.write_text("$question", encoding="utf-8")
    for row in scores(retriever=None, prompt=str(closed), top_k=3):
        assert not retrieval & set(row)


def test_chunks_of_one_document_count_once(prompt):
    chunks = [Passage("d1", "a", chunk=0), Passage("d1", "b", chunk=1), Passage("d2", "c")]
    retriever = StaticRetriever({"one?": chunks})
    assembly = Assembly(retriever=retriever, generator=ScriptedGenerator(["Answer: x"]), prompt=prompt, top_k=3)
    (row,) = evaluate(assembly, QUESTIONS[:1]).rows
    assert row["scores"]["mrr@10"] == 0.5


@pytest.mark.parametrize("batch_size", [1, 256])
def test_retrieval_alone_by_hand(assembly, batch_size):
    found = evaluation.evaluate_retrieval(assembly.retriever, QUESTIONS[:2], top_k=3, batch_size=batch_size)
    second = 1 / math.log2(3)
    assert found == {
        "recall@3": 0.75,
        "success@3": 1.0,
        "mrr@10": 0.75,
        "ndcg@10": pytest.approx((second + 1 / (1 + second)) / 2),
    }
    with pytest.raises(DataError, match="no question"):
        evaluation.evaluate_retrieval(assembly.retriever, [], top_k=3)
    assert {"evaluate_retrieval", "retrieval_scores"} <= set(evaluation.__all__)


def test_batches_change_nothing(assembly):
    whole = evaluate(assembly, QUESTIONS)
    again = assembly.with_generator(ScriptedGenerator(REPLIES))
    assert evaluate(again, QUESTIONS, batch_size=1) == whole


def test_rewards_get_columns_and_keep_none(assembly):
    seen = {}

    def rewards(**columns):
        seen.update(columns)
        return {"length": [float(len(reply)) for reply in columns["completions"]], "judge": [None, 0.5, None]}

    found = evaluate(assembly, QUESTIONS, rewards=rewards)
    assert [row["rewards"]["judge"] for row in found.rows] == [None, 0.5, None]
    assert found.rows[0]["rewards"]["length"] == len(REPLIES[0])
    assert "length" not in found.metrics
    assert seen["passages"][0][0] == "Title 1\nText 1."
    assert seen["answers"][0] == ["Mira", "the Mira River"]
    assert len(seen["prompts"]) == len(seen["completion_ids"]) == 3


def test_verdicts_become_metrics(assembly):
    verdicts = [1.0, None, 0.0]
    found = evaluate(assembly, QUESTIONS, rewards=lambda **_: {"judged": verdicts, "format": [1.0] * 3})
    assert [row["scores"]["judge_accuracy"] for row in found.rows] == verdicts
    assert [row["scores"]["judge_readable"] for row in found.rows] == [1.0, 0.0, 1.0]
    assert found.metrics["judge_accuracy"] == 0.5, "a verdict that could not be read is not 0"
    assert found.metrics["judge_readable"] == pytest.approx(2 / 3)
    # Nobody was asked about an answer that is not there; it is wrong all the same.
    silent = assembly.with_generator(ScriptedGenerator([REPLIES[0], "<think>hm", REPLIES[2]]))
    found = evaluate(silent, QUESTIONS, rewards=lambda **_: {"judged": [1.0, 0.0, None]})
    assert [row["scores"]["judge_readable"] for row in found.rows] == [1.0, None, 0.0]
    assert (found.metrics["judge_accuracy"], found.metrics["judge_readable"]) == (0.5, 0.5)
    plain = assembly.with_generator(ScriptedGenerator(REPLIES))
    assert "judge_accuracy" not in evaluate(plain, QUESTIONS, rewards=lambda **_: {"f1": [1.0] * 3}).metrics


class Failing:
    """Marks the requests of the prompts that end so as failed."""

    def __init__(self, *ends):
        self.ends = ends

    def generate(self, prompts, *, n=1, **_):
        failed = Generation("http://x: HTTP 400", finish_reason="error")
        return [[failed if p[0]["content"].endswith(self.ends) else Generation("Answer: tin")] * n for p in prompts]


@pytest.mark.parametrize("batch_size", [1, 256])
def test_a_question_that_failed_alone_has_no_scores_and_is_counted(assembly, caplog, batch_size):
    asked = []

    def rewards(*, completions, prompts, qid, **_):
        asked.extend(qid)
        assert len(completions) == len(prompts) == len(qid)
        return {"length": [1.0] * len(completions)}

    with caplog.at_level(logging.WARNING):
        failing = assembly.with_generator(Failing("two?"))
        found = evaluate(failing, QUESTIONS, rewards=rewards, batch_size=batch_size)
    assert found.rows[1]["scores"] == {
        "em": None,
        "f1": None,
        "contains_em": None,
        "format": None,
        "recall@3": 0.5,
        "success@3": 1.0,
        "mrr@10": 1.0,
        "ndcg@10": pytest.approx(1 / (1 + 1 / math.log2(3))),
    }
    assert (found.rows[1]["answer"], found.rows[1]["reply"]) == (None, "http://x: HTTP 400")
    assert found.metrics["em"] == 0.5, "the mean of the two others"
    assert found.metrics["recall@3"] == 0.75
    assert asked == ["q1", "q3"], "nothing is there to be rewarded"
    assert [row["rewards"] for row in found.rows] == [{"length": 1.0}, {}, {"length": 1.0}]
    assert caplog.messages == ["1 of 3 questions failed and have no scores, the first: http://x: HTTP 400"]


@pytest.mark.parametrize("batch_size", [1, 256])
def test_if_every_question_failed_the_backend_is_broken(assembly, batch_size):
    failing = assembly.with_generator(Failing("?"))
    with pytest.raises(BackendError, match=r"all 3 questions failed, the first: http://x: HTTP 400"):
        evaluate(failing, QUESTIONS, rewards=lambda **_: {}, batch_size=batch_size)


def test_reward_columns_show_what_the_reader_saw(prompt):
    retriever = StaticRetriever({"one?": [D1, D2]})
    asked = Assembly(retriever=retriever, prompt=prompt, order="reversed").prepare(QUESTIONS[:1])
    assert reward_columns(asked) == {
        "question": ["one?"],
        "answers": [["Mira", "the Mira River"]],
        "passages": [["Title 2\nText 2.", "Title 1\nText 1."]],
        "passage_ids": [["d2", "d1"]],
        "gold_doc_ids": [["d2"]],
        "qid": ["q1"],
    }


def test_nothing_to_evaluate(assembly):
    with pytest.raises(DataError, match="no question"):
        evaluate(assembly, [])


def test_means_leave_out_what_is_undefined():
    rows = [
        {"qid": "a", "scores": {"em": 1.0, "mrr@10": None}},
        {"qid": "b", "scores": {"em": 0.0, "mrr@10": 0.25, "judge_accuracy": None}},
    ]
    assert mean_metrics(rows) == {"em": 0.5, "mrr@10": 0.25}


def test_intervals():
    better = confidence_intervals(rows_of([0.0] * 30), rows_of([1.0] * 30))
    assert better == {"em": (1.0, 1.0)}
    low, high = confidence_intervals(rows_of([0.0, 1.0] * 20), rows_of([1.0, 0.0] * 20))["em"]
    assert low < 0 < high


def test_intervals_pair_only_what_both_define():
    before, after = rows_of([0.0, None, 1.0]), rows_of([1.0, 1.0, None])
    assert confidence_intervals(before, after) == {"em": (1.0, 1.0)}
    assert confidence_intervals(rows_of([0.0]), rows_of([1.0], "f1")) == {}


@pytest.mark.parametrize("after", [[0.0, 1.0, 1.0], [0.0]])
def test_intervals_refuse_other_questions(after):
    with pytest.raises(DataError, match="not about the same questions"):
        confidence_intervals(rows_of([0.0, 1.0]), rows_of(after))


def test_intervals_refuse_another_order():
    rows = rows_of([0.0, 1.0])
    with pytest.raises(DataError, match="not about the same questions"):
        confidence_intervals(rows, rows[::-1])


def test_differences_are_about_answers_and_questions_that_both_scored():
    def rows(em, f1, judged, **more):
        return [
            {"qid": f"q{i}", "scores": {"em": e, "f1": f, "judge_accuracy": j, "format": 1.0, **more}}
            for i, (e, f, j) in enumerate(zip(em, f1, judged, strict=True))
        ]

    baseline = rows([0.0, 0.0, None, 1.0], [0.5] * 4, [None] * 4, **{"recall@5": 1.0})
    trained = rows([1.0, 0.0, 1.0, 1.0], [0.75] * 4, [1.0] * 4, **{"recall@3": 1.0})
    found = answer_differences(baseline, trained)
    assert set(found) == {"em", "f1"}, "neither the form, which is another one, nor what only one side has"
    assert found["em"]["difference"] == pytest.approx(1 / 3)
    assert found["em"]["ci95"] == list(confidence_intervals(baseline, trained)["em"])
    assert found["f1"] == {"difference": 0.25, "ci95": [0.25, 0.25]}
    with pytest.raises(DataError, match="not about the same questions"):
        answer_differences(baseline, trained[1:])


def test_where_nobody_answers_what_was_found_is_compared():
    bare = [{"qid": str(i), "scores": {"ndcg@10": value}} for i, value in enumerate([0.0, 0.5])]
    trained = [{"qid": str(i), "scores": {"ndcg@10": value, "words": 3.0}} for i, value in enumerate([0.5, 1.0])]
    found = answer_differences(bare, trained)
    assert found == {"ndcg@10": {"difference": 0.5, "ci95": [0.5, 0.5]}}


def test_rows_survive_their_file(tmp_path, assembly):
    rows = evaluate(assembly, QUESTIONS).rows
    rows[0]["reply"] = "Zürich\u2028\n„Mira“"
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".txt"] == ["rows.jsonl"]


def test_half_a_character_survives_its_file(tmp_path):
    rows = [{"qid": "a", "reply": "caf\udce9 \\ \ud83d", "answer": "\u00e9\udfff"}]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert "é" in path.read_text(encoding="utf-8")  # what can be written is written as it is


def test_a_failed_write_leaves_the_old_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows_of([1.0]))
    with pytest.raises(TypeError):
        write_rows(path, [*rows_of([0.0]), {"qid": object()}])
    assert read_rows(path) == rows_of([1.0])


def test_recall_is_of_what_is_shown_and_gain_of_what_is_found():
    from rag_rl.evaluation.scoring import retrieval_scores
    from rag_rl.types import Hit

    chunks = [Passage("d1", "one"), Passage("d1", "two", chunk=1), Passage("d2", "three"), Passage("d3", "four")]
    hits = [Hit(passage, 1.0 / rank, rank) for rank, passage in enumerate(chunks, start=1)]
    found = retrieval_scores(hits, ["d2", "d3"], top_k=2)
    assert (found["recall@2"], found["success@2"]) == (0.0, 0.0), "two chunks of one document are shown"
    assert found["mrr@10"] == 0.5, "in a ranking of documents the second one is the first that is gold"
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))
