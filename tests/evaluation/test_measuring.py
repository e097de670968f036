from __future__ import annotations

import asyncio
import time

import ir_measures
import pytest

from rag_rl.errors import ConfigError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.measuring import Measured, SearchOnly, closed_book
from rag_rl.evaluation.reasoning import ReasoningAssembly
from rag_rl.generation import ScriptedGenerator
from rag_rl.metrics import exact_match, token_f1
from rag_rl.reasoning import StepSetup
from rag_rl.retrieval import StaticRetriever
from rag_rl.types import Generation, Passage, Question, Verdict

PASSAGES = [Passage(f"d{i}", f"text {i}") for i in range(12)]
RETRIEVER = StaticRetriever({}, default=PASSAGES)


class Counting:
    """Replies with token ids, as a local model does; sleeps so that time passes."""

    def __init__(self, reply="Answer: Mira", ids=(1, 2, 3), seconds=0.0):
        self.reply, self.ids, self.seconds = reply, ids, seconds

    def generate(self, prompts, *, n=1, **_):
        time.sleep(self.seconds)
        return [[Generation(self.reply, self.ids, prompt_tokens=7)] * n for _ in prompts]


class SlowJudge:
    async def judge(self, cases):
        await asyncio.sleep(0.2)
        return [Verdict(1.0)] * len(cases)


def one_row(assembly, question):
    measured = Measured(assembly)
    ((answered,),) = measured.answer([question])
    return measured.row(answered)


def test_costs_of_one_search():
    question = Question("q", "Where?", ("Mira",), ("d1", "d4"))
    row = one_row(Assembly(retriever=RETRIEVER, generator=Counting(), top_k=3), question)
    scores = row["scores"]
    assert (scores["searches"], scores["tokens"], scores["prompt_tokens"]) == (1.0, 3.0, 7.0)
    assert scores["seconds"] > 0
    assert (scores["em"], scores["recall@3"], scores["all_gold@3"]) == (1.0, 0.5, 0.0)
    closed = one_row(Assembly(retriever=None, generator=Counting(ids=None), prompt="answer_closed_book"), question)
    assert (closed["scores"]["searches"], closed["scores"]["tokens"]) == (0.0, None)
    assert "all_gold@5" not in closed["scores"]


def test_costs_of_a_chain():
    steps = [
        "Step 1:\nThe problem analysis: a\nThe retrieval query: b",
        "Step 2:\nThe problem analysis: c\nThe final answer: Mira",
    ]
    setup = StepSetup(RETRIEVER, top_k=2, max_steps=3)

    class Steps(ScriptedGenerator):
        def generate(self, prompts, **options):
            return [[Generation(g.text, tuple(range(len(g.text))))] for (g,) in super().generate(prompts, **options)]

        def encode(self, prompts):
            return [[0] * 11 for _ in prompts]

        def prompt_limit(self, max_new_tokens):
            return 100

    question = Question("q", "Where?", ("Mira",), ("d0", "d1"))
    scores = one_row(ReasoningAssembly(setup, generator=Steps(steps)), question)["scores"]
    assert (scores["searches"], scores["steps"], scores["tokens"]) == (1.0, 2.0, float(sum(map(len, steps))))
    assert (scores["prompt_tokens"], scores["all_gold@2"]) == (22.0, 1.0)
    untold = one_row(ReasoningAssembly(setup, generator=ScriptedGenerator(steps)), question)["scores"]
    assert (untold["tokens"], untold["prompt_tokens"], untold["searches"]) == (None, None, 1.0)


def test_time_is_the_assembly_s_and_not_the_judge_s():
    judge = SlowJudge()
    assembly = Assembly(retriever=RETRIEVER, generator=Counting("Answer: Orl", seconds=0.05), answer_judge=judge)
    measured = Measured(assembly)
    answered = measured.answer([Question(f"q{i}", "Where?", ("Mira",)) for i in range(2)])
    seconds = [measured.row(one)["scores"]["seconds"] for (one,) in answered]
    assert seconds[0] == seconds[1]
    assert 0.025 <= seconds[0] < 0.1, "half of 0.05, without the 0.2 of the judge"
    assert assembly.answer_judge is judge, "the assembly itself stays as it is"


def test_without_accepted_answers_an_answer_has_no_score():
    row = one_row(Assembly(retriever=RETRIEVER, generator=Counting(), top_k=3), Question("q", "Where?", (), ("d1",)))
    assert [row["scores"][name] for name in ("em", "f1", "contains_em")] == [None] * 3
    assert (row["scores"]["format"], row["scores"]["recall@3"]) == (1.0, 1.0)


def test_a_failed_question_has_no_scores_and_says_why():
    class Broken:
        def generate(self, prompts, **_):
            return [[Generation("HTTP 400", finish_reason="error")] for _ in prompts]

    row = one_row(Assembly(retriever=RETRIEVER, generator=Broken(), top_k=3), Question("q", "Where?", ("x",), ("d1",)))
    assert row["failure"] == "HTTP 400"
    assert row["scores"]["em"] is None
    assert "tokens" not in row["scores"]


def test_search_only():
    search = SearchOnly(RETRIEVER, top_k=3, depth=10)
    row = one_row(search, Question("q", "Where?", (), ("d5",)))
    assert (row["scores"]["recall@3"], row["scores"]["mrr@10"], row["scores"]["searches"]) == (0.0, 1 / 6, 1.0)
    assert len(row["passages"]) == 3
    assert "tokens" not in row["scores"]
    assert one_row(search, Question("q", "Where?", ()))["scores"].keys() == {"searches", "seconds"}
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        SearchOnly(RETRIEVER, top_k=0)


def test_closed_book_asks_the_same_model_without_passages():
    generator = ScriptedGenerator(["Answer: Mira"])
    assembly = closed_book(Assembly(retriever=RETRIEVER, generator=generator, max_new_tokens=9), "answer_closed_book")
    ((answered,),) = assembly.answer([Question("q", "Where is it?", ("Mira",))])
    assert (answered.answer, answered.asked.hits) == ("Mira", ())
    assert "Where is it?" in generator.prompts[0][0]["content"]
    assert assembly.max_new_tokens == 9


@pytest.mark.parametrize("depth", [3, 10])
def test_figures_of_rows_agree_with_ir_measures(depth):
    golds = [("d0",), ("d3", "d9"), ("d11", "d2", "d1"), ("d7",), ("d10", "d11")]
    questions = [Question(f"q{i}", f"Where {i}?", (), gold) for i, gold in enumerate(golds)]
    measured = Measured(SearchOnly(RETRIEVER, top_k=3, depth=depth))
    rows = {a.asked.question.qid: measured.row(a)["scores"] for (a,) in measured.answer(questions)}
    qrels = {q.qid: dict.fromkeys(q.gold_doc_ids, 1) for q in questions}
    run = {q.qid: {p.doc_id: -float(i) for i, p in enumerate(PASSAGES[:depth])} for q in questions}
    ours = {ir_measures.nDCG @ 10: "ndcg@10", ir_measures.RR @ 10: "mrr@10", ir_measures.R @ 3: "recall@3"}
    found = list(ir_measures.iter_calc(list(ours), qrels, run))
    assert len(found) == 3 * len(questions)
    for theirs in found:
        assert rows[theirs.query_id][ours[theirs.measure]] == pytest.approx(theirs.value, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        # By the rules of SQuAD v1.1: lower case, no punctuation, no a/an/the, single spaces; the best of all answers.
        ("The  Mira!", ["mira"], 1, 1),
        ("U.S.A.", ["USA"], 1, 1),
        ("well-known", ["wellknown"], 1, 1),
        ("an apple a day", ["apple day"], 1, 1),
        ("theatre", ["tre"], 0, 0),
        ("Denver Broncos", ["Broncos", "The Denver Broncos"], 1, 1),
        ("the Denver Broncos of Denver", ["Denver Broncos"], 0, 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),
        ("1,000", ["1000"], 1, 1),
        ("yes", ["no"], 0, 0),
        ("October 1, 1958", ["1958", "in 1958"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("a a b", ["b b"], 0, 2 * (1 / 1) * (1 / 2) / (1 / 1 + 1 / 2)),
    ],
)
def test_squad_rules(prediction, answers, em, f1):
    assert exact_match(prediction, answers) == em
    assert token_f1(prediction, answers) == pytest.approx(f1)
