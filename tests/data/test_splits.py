from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rag_rl.data.questions import load_questions
from rag_rl.data.splits import fold_questions, split_questions
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Question


def make(n, text="Question {}?"):
    return [Question(f"q{i}", text.format(i), ("yes",), (f"d{i % 3}",)) for i in range(n)]


def ids(questions):
    return [question.qid for question in questions]


def texts_in_groups(questions):
    return Counter(" ".join(q.question.lower().split()) for q in questions).values()


def test_sizes_and_order():
    questions = make(50)
    for size, expected in [(5, 5), (0.1, 5), (49, 49), (0.5, 25)]:
        train, held_out = split_questions(questions, eval_size=size, seed=0)
        assert len(held_out) == expected
        assert sorted(ids(train) + ids(held_out)) == sorted(ids(questions))
        assert train == [q for q in questions if q in train]


def test_the_same_everywhere():
    # Written down: another machine, order or Python version must give the same questions.
    _, held_out = split_questions(make(20), eval_size=4, seed=0)
    shuffled = make(20)
    random.Random(1).shuffle(shuffled)
    assert set(ids(split_questions(shuffled, eval_size=4, seed=0)[1])) == set(ids(held_out))
    assert ids(held_out) == ["q8", "q10", "q16", "q17"]
    assert ids(split_questions(make(20), eval_size=4, seed=1)[1]) != ids(held_out)


@given(
    st.lists(
        st.sampled_from(["Who?", "who? ", "WHO?", "What?", "Where is\tit?", "where is it?", "When?"]),
        min_size=8,
        max_size=20,
    )
)
def test_equal_texts_stay_on_one_side(texts):
    questions = [Question(f"q{i}", text, ("x",)) for i, text in enumerate(texts)]

    def plain(side):
        return {" ".join(q.question.lower().split()) for q in side}

    assume(min(texts_in_groups(questions)) <= len(questions) // 2)
    train, held_out = split_questions(questions, eval_size=len(questions) // 2, seed=0)
    assert train
    assert held_out
    assert not plain(train) & plain(held_out)


def test_groups_by_key_are_transitive():
    questions = make(30)
    train, held_out = split_questions(questions, eval_size=10, seed=0, by=lambda q: q.gold_doc_ids[0])
    assert len(held_out) == 10
    assert not {q.gold_doc_ids for q in train} & {q.gold_doc_ids for q in held_out}
    # q0 and q1 share a text, q1 and q2 a key: all three stay together.
    chain = [
        Question("q0", "A", ("x",), ("d0",)),
        Question("q1", "a", ("x",), ("d1",)),
        Question("q2", "B", ("x",), ("d1",)),
    ]
    others = [Question("q3", "C", ("x",), ("d3",))]
    train, held_out = split_questions([*chain, *others], eval_size=1, seed=0, by=lambda q: q.gold_doc_ids[0])
    assert ids(held_out) == ["q3"]


@pytest.mark.parametrize(
    ("size", "trouble"),
    [
        (0, "eval_size 0 leaves no evaluation question: there are 10 in all"),
        (10, "eval_size 10 leaves no training question: there are 10 in all"),
        (500, "eval_size 500 leaves no training question"),
        (-1, "eval_size -1 leaves no evaluation question"),
        (0.01, "eval_size 0.01 leaves no evaluation question"),
        (0.99, "eval_size 0.99 leaves no training question"),
        (1.0, r"eval_size as a share must lie in \(0, 1\), got 1.0; a number of questions is an int"),
        (float("nan"), r"must lie in \(0, 1\), got nan"),
        (True, "eval_size must be a whole number or a share"),
        ("5", "eval_size must be a whole number or a share in .*, got '5'"),
    ],
)
def test_sizes_without_meaning(size, trouble):
    with pytest.raises(ConfigError, match=trouble):
        split_questions(make(10), eval_size=size, seed=0)


def test_what_cannot_be_split():
    with pytest.raises(ConfigError, match="leaves no evaluation question: 4 questions are in 1 groups"):
        split_questions(make(4, text="The same"), eval_size=2, seed=0)
    with pytest.raises(ConfigError, match="there are 0 in all"):
        split_questions([], eval_size=2, seed=0)
    with pytest.raises(DataError, match="must have ids of their own"):
        split_questions(make(3) + make(1), eval_size=1, seed=0)


def test_real_questions(data_root):
    questions = load_questions(data_root / "scifact" / "queries_train.jsonl")
    train, held_out = split_questions(questions, eval_size=0.2, seed=0)
    assert len(train) + len(held_out) == 809
    assert len(held_out) == 162


# ---------------------------------------------------------------------------------------------------------- folds


def test_every_question_is_held_out_once_and_texts_stay_together():
    many = [Question(f"q{i}", f"Question {i % 40}?", ("yes",)) for i in range(60)]
    folds = [fold_questions(many, folds=4, fold=fold, seed=1) for fold in range(4)]
    assert sorted(q.qid for _, held_out in folds for q in held_out) == sorted(q.qid for q in many)
    for train, held_out in folds:
        assert len(train) + len(held_out) == 60
        assert not {q.question for q in train} & {q.question for q in held_out}
        assert 10 <= len(held_out) <= 20
    again = fold_questions(list(reversed(many)), folds=4, fold=2, seed=1)
    assert {q.qid for q in again[1]} == {q.qid for q in folds[2][1]}
    assert {q.qid for q in fold_questions(many, folds=4, fold=2, seed=2)[1]} != {q.qid for q in folds[2][1]}


def test_folds_that_there_are_not():
    many = [Question(f"q{i}", f"Question {i}?", ("yes",)) for i in range(3)]
    for folds, fold in ((1, 0), (3, 3), (3, -1)):
        with pytest.raises(ConfigError, match="data_fold must be between 0 and data_folds - 1"):
            fold_questions(many, folds=folds, fold=fold, seed=0)
    with pytest.raises(ConfigError, match="3 different questions cannot be split into 4 folds"):
        fold_questions(many, folds=4, fold=0, seed=0)
    with pytest.raises(DataError, match="some id stands there twice"):
        fold_questions([many[0], many[0]], folds=2, fold=0, seed=0)
