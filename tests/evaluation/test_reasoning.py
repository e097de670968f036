"""The assembly that reasons step by step: rows by hand, and chains of the tiny reader over a real index."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.evaluation import Answered, Asked, ReasoningAssembly, evaluate, sample_statistics
from rag_rl.generation import ScriptedGenerator, TransformersGenerator
from rag_rl.judges import ScriptedJudge
from rag_rl.reasoning import Step, StepSetup, Trajectory, parse_step, render_step
from rag_rl.retrieval import SentenceEncoder, StaticRetriever, build_index, open_index
from rag_rl.tiny import FOLDER
from rag_rl.tiny.oracle import OracleJudge
from rag_rl.tiny.world import draw_world, questions
from rag_rl.types import Generation, Passage, Question, Verdict

HOME = Passage("d1", "Falbert lives in Elmton.", "Falbert")
RIVER = Passage("d2", "Elmton lies on the Mirbrook.", "Elmton")
OTHER = Passage("d3", "Galton lies on the Orl.")
QUESTION = Question("q", "Which river is the home of Falbert on?", ("the Mirbrook", "Mir"), ("d1", "d2"), 2)
WHERE, WHICH = "Where does Falbert live?", "Which river is Elmton on?"
FOUND = {WHERE: [HOME, OTHER], WHICH: [RIVER, OTHER]}

FIRST = f"Step 1:\nThe problem analysis: I need the home of Falbert.\nThe retrieval query: {WHERE}"
SECOND = f"Step 2:\nThe problem analysis: He lives in Elmton.\nThe retrieval query: {WHICH}"
THIRD = "Step 3:\nThe problem analysis: Elmton lies on the Mirbrook.\nThe final answer: Mirbrook"
ANSWER = {"em", "f1", "contains_em"}
METRICS = ANSWER | {"format", "steps", "searches", "passages", "recall@2", "all_gold@2"}


def play(*texts: str, question: Question = QUESTION, max_steps: int = 5, **judges):
    """The row of a chain whose steps are given."""
    setup = StepSetup(StaticRetriever(FOUND), top_k=2, max_steps=max_steps)
    assembly = ReasoningAssembly(setup, generator=ScriptedGenerator(list(texts)), **judges)
    ((answered,),) = assembly.answer([question])
    return assembly.row(answered)


# ---- rows by hand


def test_a_whole_chain():
    row = play(FIRST, SECOND, THIRD)
    assert row["scores"] == {
        "em": 1.0,
        "f1": 1.0,
        "contains_em": 1.0,
        "format": 1.0,
        "steps": 3.0,
        "searches": 2.0,
        "passages": 3.0,  # d3 is not shown twice
        "recall@2": 1.0,
        "all_gold@2": 1.0,
    }
    assert row["answer"] == "Mirbrook"
    assert row["reply"] == "\n".join([FIRST, SECOND, THIRD])
    assert [p["doc_id"] for p in row["passages"]] == ["d1", "d3", "d2"]
    assert row["steps"] == [
        {"analysis": "I need the home of Falbert.", "query": WHERE, "doc_ids": ["d1", "d3"]},
        {"analysis": "He lives in Elmton.", "query": WHICH, "doc_ids": ["d2"]},
        {"analysis": "Elmton lies on the Mirbrook.", "answer": "Mirbrook"},
    ]
    assert "failure" not in row


def test_an_invalid_step_is_told_as_it_was_written():
    row = play(FIRST, "Step 2:\nHe lives in Elmton.")
    scores = row["scores"]
    assert {name: scores[name] for name in ANSWER} == dict.fromkeys(ANSWER, 0.0)
    assert (scores["format"], scores["steps"], scores["searches"]) == (0.5, 2.0, 1.0)
    assert (scores["recall@2"], scores["all_gold@2"]) == (0.5, 0.0)
    assert row["answer"] is None
    assert row["reply"] == f"{FIRST}\nStep 2:\nHe lives in Elmton."
    assert row["steps"][1] == {"text": "Step 2:\nHe lives in Elmton.", "problem": "no 'The problem analysis:'"}


def test_what_had_to_be_read_over_is_not_in_the_form():
    row = play("Sure!\n" + FIRST, "Step 2:\nThe problem analysis: a\nThe final answer: Mir")
    assert (row["scores"]["format"], row["scores"]["em"]) == (0.5, 1.0)
    assert row["reply"].startswith("Step 1:\n"), "the chain is what the next step was shown"


def test_a_chain_without_an_answer():
    row = play(FIRST, SECOND, max_steps=2)
    assert (row["answer"], row["scores"]["em"], row["scores"]["steps"], row["scores"]["searches"]) == (None, 0, 2, 2)
    assert row["scores"]["all_gold@2"] == 1.0


def test_an_answer_without_a_search():
    row = play("Step 1:\nThe problem analysis: I know.\nThe final answer: the Orl")
    assert (row["scores"]["em"], row["scores"]["searches"], row["scores"]["recall@2"]) == (0.0, 0.0, 0.0)
    assert row["passages"] == []


def test_without_known_documents_there_is_no_recall():
    row = play(FIRST, SECOND, THIRD, question=Question("q", QUESTION.question, ("Mirbrook",)))
    assert set(row["scores"]) == METRICS - {"recall@2", "all_gold@2"}


class Failing(ScriptedGenerator):
    """Its second reply has failed."""

    def generate(self, prompts, **settings):
        if len(self.prompts) == 1:
            self.prompts += prompts
            return [[Generation("timeout", finish_reason="error")] for _ in prompts]
        return super().generate(prompts, **settings)


@pytest.mark.parametrize("judged", [False, True])
def test_a_dropped_chain_has_no_scores(judged):
    judges = {"answer_judge": ScriptedJudge([]), "coherence_judge": ScriptedJudge([])} if judged else {}
    setup = StepSetup(StaticRetriever(FOUND), top_k=2)
    assembly = ReasoningAssembly(setup, generator=Failing([FIRST]), **judges)
    ((answered,),) = assembly.answer([QUESTION])
    row = assembly.row(answered)
    # Not even of what its first step found: the others never came.
    more = {"judge_accuracy", "judge_readable", "reasoning_accuracy"} if judged else set()
    assert row["scores"] == dict.fromkeys(METRICS | more)
    assert (answered.failure, row["failure"], row["answer"]) == ("timeout", "timeout", None)
    assert row["reply"] == f"{FIRST}\nfailed: timeout"
    with pytest.raises(BackendError, match="all 1 questions failed, the first: timeout"):
        evaluate(assembly.with_generator(Failing([FIRST])), [QUESTION])


# ---- judges


@pytest.mark.parametrize(
    ("answer", "verdict", "expected"),
    [
        ("the Mir", None, (1.0, 1.0)),  # an exact match is right without asking
        ("It is the Mir.", 1.0, (1.0, 1.0)),
        ("the Orl", 0.0, (0.0, 1.0)),
        ("the Orl", "unreadable", (None, 0.0)),
    ],
)
def test_the_answer_is_judged(answer, verdict, expected):
    verdicts = [] if verdict is None else [Verdict(None if verdict == "unreadable" else verdict, "")]
    judge = ScriptedJudge(verdicts)
    last = THIRD.replace("Mirbrook", answer)
    row = play(FIRST, SECOND, last, answer_judge=judge)
    assert (row["scores"]["judge_accuracy"], row["scores"]["judge_readable"]) == expected
    assert len(judge.cases) == len(verdicts)


def test_no_answer_is_wrong_without_asking():
    judge = ScriptedJudge([])
    for texts in ([FIRST], ["no step"]):
        scores = play(*texts, max_steps=1, answer_judge=judge)["scores"]
        assert (scores["judge_accuracy"], scores["judge_readable"]) == (0.0, None)


def test_reasoning_accuracy_is_the_mean_verdict_on_the_analyses():
    judge = ScriptedJudge([Verdict(1.0), Verdict(0.0), Verdict(None, "unreadable")])
    row = play(FIRST, SECOND, THIRD, coherence_judge=judge)
    assert row["scores"]["reasoning_accuracy"] == 0.5
    assert [step["scores"] for step in row["steps"]] == [{"reasoning_coherence": v} for v in (1.0, 0.0, None)]
    assert judge.cases[0].answer == "I need the home of Falbert."
    # A chain that could not be read has no analysis: that is no score, and not 0.
    assert play("no step", coherence_judge=ScriptedJudge([]))["scores"]["reasoning_accuracy"] is None


# ---- chains of the tiny reader


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("faiss", reason="faiss is not installed")
    return draw_world(5, region="heldout", sizes={"person": 30, "town": 16, "guild": 10, "river": 10})


@pytest.fixture(scope="module")
def asked(world) -> list[Question]:
    return list(questions(world, hops=2, rng=random.Random(0)))[:16]


@pytest.fixture(scope="module")
def index(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reasoning") / "index"
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
    build_index(world.passages, encoder, folder, progress=False)
    return open_index(folder, encoder)


@pytest.fixture(scope="module")
def assembly(index) -> ReasoningAssembly:
    setup = StepSetup(index, top_k=2, max_steps=4, max_step_tokens=48)
    judges = {"answer_judge": OracleJudge("answer_correctness"), "coherence_judge": OracleJudge("reasoning_coherence")}
    return ReasoningAssembly(setup, **judges)


@pytest.fixture(scope="module")
def read(assembly) -> ReasoningAssembly:
    return assembly.reloaded(FOLDER / "reader", device="cpu", batch_size=8)


@pytest.fixture(scope="module")
def found(read, asked):
    return evaluate(read, asked)


def test_the_metrics_of_the_tiny_reader(found, asked):
    assert set(found.metrics) == METRICS | {"judge_accuracy", "judge_readable", "reasoning_accuracy"}
    assert [row["qid"] for row in found.rows] == [question.qid for question in asked]
    assert 0.0 < found.metrics["searches"] < found.metrics["steps"] <= 4.0
    assert found.metrics["passages"] <= 2 * found.metrics["searches"]
    assert found.metrics["all_gold@2"] <= found.metrics["recall@2"]
    assert found.metrics["judge_accuracy"] >= found.metrics["em"]
    assert 0.0 < found.metrics["reasoning_accuracy"] < 1.0


def test_rows_are_of_one_piece(found):
    for row in found.rows:
        assert row["scores"]["steps"] == len(row["steps"])
        passages = [p["doc_id"] for p in row["passages"]]
        assert passages == [doc_id for step in row["steps"] for doc_id in step.get("doc_ids", ())]
        assert len(passages) == len(set(passages)), "nothing is shown twice"
        told = []
        for number, step in enumerate(row["steps"], start=1):
            action = {name: step[name] for name in ("query", "answer") if name in step}
            told.append(render_step(Step(number, step["analysis"], **action)) if action else step["text"])
            assert (parse_step(told[-1], number).step is None) == ("problem" in step)
        assert row["reply"] == "\n".join(told)
    json.dumps(found.rows)


def test_evaluation_is_greedy(read, asked, found):
    again = evaluate(read, asked[:6])
    assert [row["reply"] for row in again.rows] == [row["reply"] for row in found.rows[:6]]


def test_the_policy_under_training_is_asked_as_it_is_now(assembly, asked, found):
    import torch
    from accelerate import Accelerator

    model = TransformersGenerator.from_pretrained(str(FOLDER / "reader"), device="cpu")
    like = SimpleNamespace(
        accelerator=Accelerator(cpu=True), model_wrapped=model.model, processing_class=model.tokenizer, args=None
    )
    asking = assembly.under_training(like, batch_size=8)
    assert [row["reply"] for row in evaluate(asking, asked).rows] == [row["reply"] for row in found.rows]
    with torch.no_grad():
        model.model.get_input_embeddings().weight += 0.3
    assert [row["reply"] for row in evaluate(asking, asked[:6]).rows] != [row["reply"] for row in found.rows[:6]]


def test_chains_can_be_sampled(read, asked):
    drawn = read.answer(asked[:2], temperature=1.0, n=3, seed=1)
    assert [len(chains) for chains in drawn] == [3, 3]
    assert {one.asked.question.qid for one in drawn[1]} == {asked[1].qid}
    texts = [one.generation.text for chains in drawn for one in chains]
    assert len(set(texts)) > 2
    again = read.answer(asked[:2], temperature=1.0, n=3, seed=1)
    assert [one.generation.text for chains in again for one in chains] == texts
    assert set(sample_statistics(read, asked[:2], n=2)) == {"pass@2", "mean@2", "zero_variance_groups"}


def test_bad_arguments(assembly, asked):
    with pytest.raises(ConfigError, match="no generator: nobody writes the steps"):
        assembly.answer(asked[:1])
    plain = Answered(Asked(QUESTION, (), (), ""), Generation("Answer: Mira"), "Mira")
    hops = Answered(Asked(QUESTION, (), (), ""), Generation(""), "Mira", Trajectory(QUESTION, answer="Mira"))
    for other in (plain, hops):
        with pytest.raises(ConfigError, match="comes from another assembly"):
            assembly.row(other)


# ---- several processes

TWO_RANKS = """
import json, sys
from types import SimpleNamespace
from accelerate import Accelerator
from rag_rl.data import load_questions
from rag_rl.evaluation import ReasoningAssembly
from rag_rl.generation import PolicyGenerator, TransformersGenerator
from rag_rl.reasoning import StepSetup
from rag_rl.retrieval import StaticRetriever
from rag_rl.run import evaluate_sharded
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage

accelerator = Accelerator(cpu=True)
loaded = TransformersGenerator.from_pretrained(str(FOLDER / "reader"), device="cpu")
model = accelerator.prepare(loaded.model)
trainer = SimpleNamespace(
    accelerator=accelerator, model_wrapped=model, processing_class=loaded.tokenizer,
    args=SimpleNamespace(ds3_gather_for_generation=True),
)
setup = StepSetup(StaticRetriever({}, default=[Passage("d", "Elmton lies on the Mira.")]), max_step_tokens=40)
asking = ReasoningAssembly(setup).under_training(trainer, batch_size=2)
# Forced to go in step, as ZeRO-3 and FSDP do: a rank that made a call more than the other would wait for ever.
asking.generator._forward_is_collective = lambda: accelerator.num_processes > 1
found = evaluate_sharded(asking, load_questions(str(FOLDER / "data" / "heldout_2hop.jsonl"))[:5])
if accelerator.is_main_process:
    rows = [[row["qid"], row["answer"], row["scores"]["steps"]] for row in found.rows]
    print(json.dumps({"processes": accelerator.num_processes, "rows": rows}))
accelerator.wait_for_everyone()
from rag_rl.run import end_processes

end_processes(0)
"""


@pytest.mark.slow
def test_two_ranks_with_unequal_chains_stay_in_step(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(processes: int):
        launched = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script)]
        done = subprocess.run(
            [sys.executable, *launched], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))

    alone, both = run(1), run(2)
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert both["rows"] == alone["rows"]
    lengths = [steps for _, _, steps in both["rows"]]
    assert len(set(lengths)) > 1, "chains of different lengths, or nothing was tried"
