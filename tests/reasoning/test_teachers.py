"""Teachers: an oracle that is never wrong, a model behind two prompts, and rejection sampling that survives a kill."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.generation import OpenAIGenerator
from rag_rl.judges import ScriptedJudge
from rag_rl.reasoning import (
    STEP_RUBRICS,
    Collected,
    GeneratorTeacher,
    OracleTeacher,
    StepEnvironment,
    collect_trajectories,
    dpo_pairs,
    has_step_format,
    judge_steps,
    mean_score,
    read_trajectories,
    sft_examples,
    step_statistics,
)
from rag_rl.retrieval import StaticRetriever
from rag_rl.tiny.oracle import OracleJudge
from rag_rl.tiny.world import RELATION, draw_world, questions, statement
from rag_rl.types import Generation, Passage, Question, Verdict

FALBERT = Passage("d1", "Falbert lives in Elmton. Falbert works as a miller.")
ELMTON = Passage("d2", "The mayor of Elmton is Mira. Elmton lies on the Mirbrook.")
OTHERS = [Passage(f"x{i}", f"Nothing {i}.") for i in range(4)]
RIVER = Question(
    "q1",
    "Which river is the home of Falbert on?",
    ("Mirbrook",),
    ("d1", "d2"),
    2,
    {
        "decomposition": [
            {"question": "Where does Falbert live?", "answer": "Elmton", "gold_doc_id": "d1"},
            {"question": "Which river does #1 lie on?", "answer": "Mirbrook", "gold_doc_id": "d2"},
        ]
    },
)
HOME_QUERY, RIVER_QUERY = "Where does Falbert live?", "Which river does Elmton lie on?"


def tiny_wording(question, hop):
    """The words of the tiny language model's lessons."""
    relation, (subject, value) = RELATION[question.meta["relations"][hop]], question.meta["chain"][hop : hop + 2]
    return statement(relation, subject, value), f"I need {relation.noun.format(s=subject)}."


def played(question, retriever, *, wording=None, top_k=2, max_steps=5):
    (found,) = StepEnvironment(OracleTeacher(wording).writer(1), retriever, top_k=top_k, max_steps=max_steps).rollout(
        [question]
    )
    return found


# ---------------------------------------------------------------------------------------------------------- the oracle


def test_the_oracle_searches_reads_and_answers():
    found = played(RIVER, StaticRetriever({HOME_QUERY: [FALBERT, OTHERS[0]], RIVER_QUERY: [ELMTON]}))
    assert [record.text for record in found.steps] == [
        "Step 1:\nThe problem analysis: I need to know: Where does Falbert live?\n"
        "The retrieval query: Where does Falbert live?",
        "Step 2:\nThe problem analysis: Falbert lives in Elmton. I need to know: Which river does Elmton lie on?\n"
        "The retrieval query: Which river does Elmton lie on?",
        "Step 3:\nThe problem analysis: Elmton lies on the Mirbrook.\nThe final answer: Mirbrook",
    ]
    assert found.state == "correct"


def test_the_oracle_asks_again_for_what_was_not_found():
    retriever = StaticRetriever({HOME_QUERY: [*OTHERS, FALBERT], RIVER_QUERY: [ELMTON]})
    found = played(RIVER, retriever, max_steps=6)
    assert [record.step.query for record in found.searches] == [HOME_QUERY] * 3 + [RIVER_QUERY]
    assert found.steps[2].step.analysis == "I need to know: Where does Falbert live?"
    assert found.state == "correct"
    assert played(RIVER, retriever, max_steps=3).state == "fail"


def test_the_oracle_reads_what_another_query_found():
    found = played(RIVER, StaticRetriever({HOME_QUERY: [ELMTON, FALBERT]}))
    assert [record.step.query for record in found.steps] == [HOME_QUERY, None]
    assert found.steps[1].step.analysis == "Falbert lives in Elmton. Elmton lies on the Mirbrook."
    found = played(RIVER, StaticRetriever({HOME_QUERY: [ELMTON], RIVER_QUERY: []}, default=[]), max_steps=2)
    assert [record.step.query for record in found.steps] == [HOME_QUERY] * 2


def test_a_question_over_one_hop_needs_no_decomposition():
    one = Question("q", "Who rules Elmton?", ("Mira",), ("d2",))
    found = played(one, StaticRetriever({"Who rules Elmton?": [ELMTON]}))
    assert found.steps[1].step.analysis == "The mayor of Elmton is Mira."
    assert (found.state, found.answer) == ("correct", "Mira")


@pytest.mark.parametrize(
    "question",
    [
        Question("bare", "Who?", ("Mira",), ("d1", "d2")),
        replace(RIVER, qid="bare", meta={"decomposition": [{"question": "Who?", "answer": "Mira"}]}),
        replace(RIVER, qid="bare", meta={"decomposition": "Who?"}),
        replace(RIVER, qid="bare", meta={"decomposition": []}),
        replace(RIVER, qid="bare", meta={"evidences": [["Falbert", "home", "Elmton"]]}),
        replace(RIVER, qid="bare", meta={"evidences": [["Falbert", "home"], ["Elmton", "river"]]}),
    ],
)
def test_questions_without_a_decomposition_are_named(question):
    with pytest.raises(DataError, match=r"1 of 2 questions have no decomposition .* first 'bare'"):
        StepEnvironment(OracleTeacher().writer(1), StaticRetriever({}, default=[])).rollout([RIVER, question])


TRIPLES = [["Falbert", "home", "Elmton"], ["Elmton", "river", "Mirbrook"], ["Elmton", "river", "Mir"]]


@pytest.mark.parametrize(
    "meta",
    [
        {"evidences": TRIPLES},
        {"decomposition": [dict(zip(("subject", "relation", "object"), t, strict=True)) for t in TRIPLES]},
    ],
)
def test_evidence_triples_are_a_decomposition(meta):
    queries = {"What is the home of Falbert?": [FALBERT], "What is the river of Elmton?": [ELMTON]}
    found = played(replace(RIVER, meta=meta), StaticRetriever(queries))
    assert [record.step.query for record in found.searches] == list(queries)
    assert (found.state, found.answer) == ("correct", "Mirbrook")


def test_a_comparison_restates_the_facts_and_gives_the_answer_of_the_question():
    meta = {"evidences": [["Falbert", "craft", "miller"], ["Elmton", "mayor", "Mira"]]}
    question = Question("q", "Is the mayor of Elmton a miller?", ("no",), ("d1", "d2"), meta=meta)
    queries = {"What is the craft of Falbert?": [FALBERT], "What is the mayor of Elmton?": [ELMTON]}
    found = played(question, StaticRetriever(queries))
    assert found.steps[-1].text == (
        "Step 3:\nThe problem analysis: Falbert works as a miller. The mayor of Elmton is Mira.\nThe final answer: no"
    )
    assert found.state == "correct"


def test_where_a_wording_has_no_words_the_document_has():
    retriever = StaticRetriever({HOME_QUERY: [FALBERT], RIVER_QUERY: [ELMTON]})
    found = played(RIVER, retriever, wording=lambda question, hop: ("Told.", "Wanted.") if hop else None)
    assert [record.step.analysis for record in found.steps] == [
        "I need to know: Where does Falbert live?",
        "Falbert lives in Elmton. Wanted.",
        "Told.",
    ]


def test_on_the_tiny_world_the_oracle_is_right_in_its_words(tiny):
    world = draw_world(5, region="demo", sizes={"person": 12, "town": 8, "guild": 6, "river": 6})
    asked = [q for hops in (1, 2) for q in list(questions(world, hops=hops, rng=random.Random(hops)))[:20]]
    by_name = {passage.doc_id: passage for passage in world.passages}
    steps = [step for q in asked for step in q.meta["decomposition"]]
    table = {
        step["question"].replace("#1", q.meta["chain"][1]): [by_name[step["gold_doc_id"]]]
        for q in asked
        for step in q.meta["decomposition"]
    }
    assert len(steps) == 60
    found = StepEnvironment(OracleTeacher(tiny_wording).writer(1), StaticRetriever(table)).rollout(asked)
    statistics = step_statistics(found)
    assert (statistics["correct"], statistics["format"]) == (1.0, 1.0)
    asyncio.run(judge_steps(found, {rubric: OracleJudge(rubric) for rubric in STEP_RUBRICS}))
    assert [mean_score(found, rubric) for rubric in STEP_RUBRICS] == [1.0] * 3

    chains = StepEnvironment(OracleTeacher(tiny_wording).writer(1), tiny.retriever, max_steps=7).rollout(
        tiny.questions[:60]
    )
    statistics = step_statistics(chains)
    assert statistics["correct"] > 0.8
    assert statistics["correct"] + statistics["fail"] == 1.0
    asyncio.run(judge_steps(chains, {"reasoning_coherence": OracleJudge("reasoning_coherence")}))
    assert mean_score(chains, "reasoning_coherence") == 1.0


# --------------------------------------------------------------------------------------------------------- models


class Errs:
    """A teacher behind the two packaged prompts that is right at the attempts of its plan; notes what it was asked."""

    def __init__(self, right_at, *, refuse=(), down_after=None):
        self.right_at, self.refuse, self.down_after = right_at, refuse, down_after
        self.asked = []
        self._at = {}

    def generate(self, prompts, *, n=1, max_new_tokens, temperature, top_p=1.0, stop=(), seed=None):
        rows = []
        for prompt in prompts:
            text = prompt[-1]["content"].rpartition("The question: ")[2]
            question, steps = text.splitlines()[0], text.count("Step ")
            if not steps:
                self._at[question] = self._at.get(question, 0) + 1
            attempt = self._at[question]
            self.asked.append((question, attempt, steps, temperature, seed, max_new_tokens))
            if self.down_after is not None and len(self.asked) > self.down_after:
                raise BackendError("teacher at http://127.0.0.1:1 is down")
            rows.append([self._reply(question, attempt, steps)])
        return rows

    def _reply(self, question, attempt, steps):
        if (question, attempt) in self.refuse:
            return Generation("the content filter says no", finish_reason="error")
        if not steps:
            return Generation("The problem analysis: I need the home.\nThe retrieval query: Where is it? Who knows?")
        answer = "Mirbrook" if attempt == self.right_at[question] else f"Wrong {attempt}"
        return Generation(f"Step {steps + 1}:\nThe problem analysis: So it is.\nThe final answer: {answer}")


ASKED = [Question(f"q{i}", f"question {i}?", ("Mirbrook",), ("d1",)) for i in range(3)]
RETRIEVER = StaticRetriever({}, default=[FALBERT, ELMTON, *OTHERS])


def collect(path, generator, asked=ASKED, **more):
    settings = {"attempts": 3, "seed": 5, **more}
    teacher = GeneratorTeacher(generator, seed=settings.pop("seed"), **settings.pop("teacher", {}))
    return collect_trajectories(asked, teacher=teacher, retriever=RETRIEVER, path=path, **settings)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chains.jsonl"


def test_attempts_end_with_the_first_right_chain(path):
    teacher = Errs({"question 0?": 1, "question 1?": 3, "question 2?": 9})
    assert collect(path, teacher) == Collected(solved=2, given_up=1, unfinished=0, chains=7)
    chains = read_trajectories(path)
    assert [(c.question.qid, c.attempt, c.state) for c in chains] == [
        ("q0", 1, "correct"),
        ("q1", 1, "incorrect"),
        ("q2", 1, "incorrect"),
        ("q1", 2, "incorrect"),
        ("q2", 2, "incorrect"),
        ("q1", 3, "correct"),
        ("q2", 3, "incorrect"),
    ]
    assert [(attempt, temperature) for _, attempt, steps, temperature, *_ in teacher.asked if not steps] == [
        *[(1, 0.0)] * 3,
        *[(2, 0.9)] * 2,
        *[(3, 0.9)] * 2,
    ]
    seeds = [seed for *_, seed, _ in teacher.asked]
    assert len(set(seeds)) == 6, "another seed for each call"
    assert {budget for *_, budget in teacher.asked} == {256}
    first = chains[0].steps[0]
    assert first.step.query == "Where is it?", "numbered and cut to one question"
    assert [hit.passage.doc_id for hit in first.hits] == ["d1", "d2", "x0"]
    assert len(sft_examples(chains)) == 4
    assert all(
        has_step_format(e["completion"][0]["content"], n)
        for e, n in zip(sft_examples(chains), (1, 2) * 2, strict=True)
    )
    pairs = dpo_pairs(chains)
    assert [p["rejected"][0]["content"].rpartition(" ")[2] for p in pairs] == ["1", "2"]


def test_what_a_teacher_is_asked(path):
    teacher = Errs({"question 0?": 1})
    prompts = []
    generate = teacher.generate

    def noting(asked, **more):
        prompts.extend(prompt[-1]["content"] for prompt in asked)
        return generate(asked, **more)

    teacher.generate = noting
    collect(path, teacher, ASKED[:1])
    assert len(prompts) == 2
    assert prompts[0].endswith("\n\nThe question: question 0?")
    assert "This is the first step." in prompts[0]
    assert prompts[1].endswith(
        "The question: question 0?\n"
        "Step 1:\nThe problem analysis: I need the home.\nThe retrieval query: Where is it?\n"
        f"The retrieval documents: [1] {FALBERT.text} [2] {ELMTON.text} [3] Nothing 0."
    )


def test_a_killed_run_goes_on(path):
    plan = {"question 0?": 1, "question 1?": 2, "question 2?": 3}
    whole = path.with_name("whole.jsonl")
    collect(whole, Errs(plan), batch_size=1)
    with pytest.raises(BackendError, match="is down"):
        collect(path, Errs(plan, down_after=5), batch_size=1, teacher={"give_up_after": 1})
    left = read_trajectories(path)
    assert [(c.question.qid, c.attempt) for c in left] == [("q0", 1), ("q1", 1)]
    with path.open("ab") as file:
        file.write(b'{"qid": "q1", "quest')  # killed while it wrote
    teacher = Errs(plan)
    teacher._at = {"question 1?": 1}
    assert collect(path, teacher, batch_size=1) == Collected(solved=3, chains=6)
    assert [(question, attempt) for question, attempt, steps, *_ in teacher.asked if not steps] == [
        ("question 1?", 2),
        *[("question 2?", attempt) for attempt in (1, 2, 3)],
    ]
    assert read_trajectories(path) == read_trajectories(whole)
    idle = Errs(plan)
    assert collect(path, idle) == Collected(solved=3, chains=6)
    assert idle.asked == []


def test_a_refused_attempt_is_made_up_for_by_the_next_run(path):
    teacher = Errs({"question 0?": 9, "question 1?": 1}, refuse={("question 0?", 2)})
    assert collect(path, teacher, ASKED[:2]) == Collected(solved=1, unfinished=1, chains=3)
    assert [(c.question.qid, c.attempt) for c in read_trajectories(path)] == [("q0", 1), ("q1", 1), ("q0", 3)]
    assert collect(path, Errs({"question 0?": 9}), ASKED[:2]) == Collected(solved=1, given_up=1, chains=4)
    assert read_trajectories(path)[-1].attempt == 2


def test_a_judge_decides_on_what_does_not_match(path):
    judge = ScriptedJudge({"Wrong 1": 0.0, "Wrong 2": 1.0})
    assert collect(path, Errs({"question 0?": 9}), ASKED[:1], judge=judge) == Collected(solved=1, chains=2)
    unread = ScriptedJudge(lambda case: Verdict(None, "unreadable"))
    found = collect(path.with_name("other.jsonl"), Errs({"question 0?": 9}), ASKED[:1], judge=unread)
    assert found == Collected(unfinished=1), "not known to be wrong"

    async def within_a_loop():
        return collect(path.with_name("third.jsonl"), Errs({"question 0?": 1}), ASKED[:1], judge=unread)

    assert asyncio.run(within_a_loop()).solved == 1


def test_an_oracle_can_be_collected_from(path):
    retriever = StaticRetriever({HOME_QUERY: [FALBERT], RIVER_QUERY: [ELMTON]})
    found = collect_trajectories([RIVER], teacher=OracleTeacher(), retriever=retriever, path=path)
    assert found == Collected(solved=1, chains=1)
    assert len(sft_examples(read_trajectories(path))) == 3


def test_who_always_writes_the_same_has_one_attempt(path, capsys):
    retriever = StaticRetriever({}, default=[])
    found = collect_trajectories([RIVER], teacher=OracleTeacher(), retriever=retriever, path=path, progress=True)
    assert found == Collected(given_up=1, chains=1)
    assert read_trajectories(path)[0].state == "fail"
    assert "chains: 100%" in capsys.readouterr().err


def test_bad_input(path):
    teacher = OracleTeacher()
    bare = Question("q9", "Who?", ())
    with pytest.raises(DataError, match="1 of 2 questions have no answers, first 'q9'"):
        collect_trajectories([RIVER, bare], teacher=teacher, retriever=RETRIEVER, path=path)
    for name in ("attempts", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            collect_trajectories([RIVER], teacher=teacher, retriever=RETRIEVER, path=path, **{name: 0})
    collect(path, Errs({"question 0?": 1}), ASKED[:1])
    with pytest.raises(DataError, match=r"has chains about 'question 0\?', but question 'q0' is now 'Who\?'"):
        collect(path, Errs({}), [replace(ASKED[0], question="Who?")])
    assert collect(path, Errs({"question 1?": 1}), ASKED[1:2]) == Collected(solved=1, chains=1), (
        "others are not counted"
    )


@pytest.mark.parametrize(("name", "text"), [("first_prompt", "Begin."), ("next_prompt", "$question")])
def test_a_prompt_without_a_placeholder_is_refused_at_once(tmp_path, name, text):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.txt' has no \$"):
        GeneratorTeacher(Errs({}), **{name: str(tmp_path / "mine.txt")})
    with pytest.raises(ConfigError, match=r"one or more numbers from 0, got \[\]"):
        GeneratorTeacher(Errs({}), temperatures=())


@pytest.mark.server
def test_a_served_teacher_that_errs_on_schedule(path, serve):
    scheduled = {"question 0?": ["nonsense", "right"], "question 1?": ["wrong", "refuse", "right"]}

    def reply(text):
        asked = text.rpartition("The question: ")[2]
        plan = scheduled[asked.splitlines()[0]]
        if "Step 1:" not in asked:
            if plan[0] == "refuse":
                plan.pop(0)
                return None
            if plan[0] == "nonsense":
                plan.pop(0)
                return "I do not like this question."
            return "**Step 1:**\n**The problem analysis:** I need it.\n**The retrieval query:** Where is it?"
        return f"The problem analysis: So.\nThe final answer: {'Mirbrook' if plan.pop(0) == 'right' else 'Elm'}"

    url, _ = serve(reply)
    generator = OpenAIGenerator("m", base_url=url, max_retries=0)
    teacher = GeneratorTeacher(generator, tries=1, generator_type="api")
    settings = {"teacher": teacher, "retriever": RETRIEVER, "path": path, "attempts": 3}
    assert collect_trajectories(ASKED[:2], **settings) == Collected(solved=2, chains=4)
    assert [(c.question.qid, c.attempt, c.state) for c in read_trajectories(path)] == [
        ("q0", 1, "invalid"),
        ("q1", 1, "incorrect"),
        ("q0", 2, "correct"),
        ("q1", 3, "correct"),
    ]
    assert len(dpo_pairs(read_trajectories(path))) == 2
