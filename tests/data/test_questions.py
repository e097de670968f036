from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rag_rl.data.corpus import load_corpus
from rag_rl.data.questions import load_questions, write_questions
from rag_rl.errors import ConfigError, DataError
from rag_rl.reasoning.trajectories import read_trajectories
from rag_rl.types import Question

GOOD = {"qid": "a", "question": "Who?", "answers": ["x"]}


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {**GOOD, "answers": ["x", "y", "x"], "gold_doc_ids": ["d1", 2], "hops": 2, "type": "bridge", "n": [1]},
        {"qid": 7, "question": "What?", "answers": [1990], "gold_doc_ids": None},
    )
    assert load_questions(path) == [
        Question("a", "Who?", ("x", "y"), ("d1", "2"), 2, {"type": "bridge", "n": [1]}),
        Question("7", "What?", ("1990",)),
    ]


def test_json_array_and_other_names(tmp_path):
    path = tmp_path / "q.json"
    path.write_text(
        json.dumps(
            [{"id": 1, "query": "Who?", "target": "x", "gold": ["d"]}, {"id": 2, "query": "?", "target": ["y"]}]
        )
    )
    names = {"qid": "id", "question": "query", "answers": "target", "gold_doc_ids": "gold"}
    assert load_questions(path, columns=names) == [Question("1", "Who?", ("x",), ("d",)), Question("2", "?", ("y",))]
    with pytest.raises(ConfigError, match="columns: 'answer' is none of our fields: qid, question, answers"):
        load_questions(path, columns={"answer": "target"})


@pytest.mark.parametrize(
    ("row", "trouble"),
    [
        ({"question": "Who?", "answers": ["x"]}, "field 'qid' is missing; line 2 has the fields: question, answers"),
        ({"qid": "b", "answers": ["x"]}, "field 'question' is missing; line 2 has the fields: qid, answers"),
        ({"qid": "b", "question": "Who?"}, "field 'answers' is missing; line 2 has the fields: qid, question; "
         "questions without answers serve retrieval only: require_answers=False takes them"),
        ({"qid": "b", "question": "Who?", "answers": []}, "field 'answers' is empty; questions without answers serve"),
        ({**GOOD, "qid": "b", "answers": "x"}, "field 'answers' must be a list of texts, got text 'x'"),
        ({**GOOD, "qid": "b", "answers": [""]}, "field 'answers' holds an empty text at place 1"),
        ({**GOOD, "qid": "b", "question": " "}, "field 'question' is empty"),
        ({**GOOD, "qid": "b", "gold_doc_ids": "d"}, "field 'gold_doc_ids' must be a list of texts, got text 'd'"),
        ({**GOOD, "qid": "b", "hops": 0}, "field 'hops' must be at least 1, got 0"),
        (GOOD, "field 'qid' 'a' is already on line 1"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path, row, trouble):
    path = write(tmp_path / "q.jsonl", GOOD, row)
    with pytest.raises(DataError) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}: 1 bad row: line 2: {trouble}")


def test_all_bad_rows_are_counted(tmp_path):
    path = write(tmp_path / "q.jsonl", *[{"qid": str(i), "question": "", "answers": []} for i in range(8)])
    with pytest.raises(DataError, match="8 bad rows: line 1: field 'question' is empty; field 'answers' is empty; "):
        load_questions(path)


def test_queries_without_answers(tmp_path):
    path = write(tmp_path / "q.jsonl", {"qid": "a", "question": "Who?"}, {"_id": "b", "text": "What?", "answers": []})
    assert load_questions(path, require_answers=False) == [Question("a", "Who?", ()), Question("b", "What?", ())]
    # What is there must be right all the same.
    write(path, {"qid": "a", "question": "Who?", "answers": "x"})
    with pytest.raises(DataError, match="field 'answers' must be a list of texts"):
        load_questions(path, require_answers=False)


def test_empty_and_missing(tmp_path):
    with pytest.raises(DataError, match=r"q.jsonl: there are no questions in it"):
        load_questions(write(tmp_path / "q.jsonl"))
    with pytest.raises(DataError, match="no such file or folder"):
        load_questions(tmp_path / "gone.jsonl")


@pytest.fixture
def beir(tmp_path):
    write(tmp_path / "queries.jsonl", *[{"_id": str(i), "text": f"query {i}", "metadata": {"n": i}} for i in range(4)])
    header = "query-id\tcorpus-id\tscore\n"
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(f"{header}2\td1\t1\n2\td2\t2\n0\td3\t1\n3\td1\t0\n")
    (tmp_path / "qrels" / "dev.tsv").write_text(f"{header}1\td1\t1\n")
    return tmp_path


def test_beir_folder(beir):
    assert load_questions(beir, require_answers=False, split="test") == [
        Question("0", "query 0", (), ("d3",), None, {"metadata": {"n": 0}}),
        Question("2", "query 2", (), ("d2", "d1"), None, {"metadata": {"n": 2}}),
    ]
    with pytest.raises(DataError, match="several splits"):
        load_questions(beir, require_answers=False)
    with pytest.raises(DataError, match=r"queries.jsonl: 4 bad rows: line 1: field 'answers' is missing"):
        load_questions(beir, split="test")


def test_qrels_beside_a_file(beir):
    queries = beir / "queries.jsonl"
    [question] = load_questions(queries, require_answers=False, qrels=beir / "qrels" / "dev.tsv")
    assert (question.qid, question.gold_doc_ids) == ("1", ("d1",))
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n9\td1\t1\n")
    with pytest.raises(DataError, match=r"dev.tsv: judges questions that .*queries.jsonl does not have: '9'"):
        load_questions(queries, require_answers=False, qrels=beir / "qrels" / "dev.tsv")
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n1\td1\t0\n")
    with pytest.raises(DataError, match="has a relevant document"):
        load_questions(queries, require_answers=False, qrels=beir / "qrels" / "dev.tsv")
    with pytest.raises(ConfigError, match="split is for BEIR folders"):
        load_questions(queries, require_answers=False, split="test")


def test_write_and_read_back(tmp_path):
    questions = [Question("a", "Wér?", ("x", "y"), ("d",), 2, {"type": "t"}), Question("b", "Q", ("z",))]
    assert write_questions(tmp_path / "q.jsonl", questions) == 2
    assert load_questions(tmp_path / "q.jsonl") == questions
    with pytest.raises(DataError, match="question 'c': its meta holds 'hops'"):
        write_questions(tmp_path / "q.jsonl", [Question("c", "Q", ("z",), meta={"hops": 3})])
    assert load_questions(tmp_path / "q.jsonl") == questions


@pytest.mark.parametrize(
    ("name", "count", "answers"),
    [
        ("hotpotqa/train", 100, True),
        ("hotpotqa/dev", 394, True),
        ("twowiki/train", 500, True),
        ("twowiki/dev", 164, True),
        ("musique/train", 100, True),
        ("scifact/queries_train", 809, True),
        ("cranfield/queries_all", 225, False),
        ("squad_xquad_en/questions", 1_190, True),
    ],
)
def test_real_questions(data_root, name, count, answers):
    questions = load_questions(data_root / f"{name}.jsonl", require_answers=answers)
    assert len(questions) == count
    assert all(question.gold_doc_ids for question in questions)
    assert all(question.answers for question in questions) == answers


def test_real_qrels_give_the_gold_of_the_file(data_root):
    for folder, split in [("scifact", "queries_train"), ("hotpotqa", "dev")]:
        path = data_root / folder / f"{split}.jsonl"
        judged = load_questions(path, qrels=data_root / folder / f"qrels_{split.removeprefix('queries_')}.tsv")
        assert {q.qid: set(q.gold_doc_ids) for q in judged} == {
            q.qid: set(q.gold_doc_ids) for q in load_questions(path)
        }


def test_examples_of_the_documentation_load(tmp_path):
    """Every JSON block of docs/data_formats.md is read by the loader that its rows are for."""
    page = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.json"
        path.write_text(block, encoding="utf-8")
        if '"steps"' in block:
            assert read_trajectories(path)
            continue
        native = '"context"' in block or '"paragraphs"' in block
        asks = '"question"' in block or '"metadata"' in block
        if asks:
            assert load_questions(path, require_answers='"answer' in block)
        if native or not asks:
            assert len(load_corpus(path)) >= 1
    assert len(blocks) == 10
