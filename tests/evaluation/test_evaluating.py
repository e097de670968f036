from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rag_rl.errors import BackendError, DataError, RunFolderError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.evaluating import check_gold, differences, evaluate_to_file, summarise
from rag_rl.evaluation.measuring import Measured
from rag_rl.evaluation.row_files import RowFile, score_table
from rag_rl.evaluation.scoring import evaluate
from rag_rl.generation import ScriptedGenerator
from rag_rl.metrics import paired_bootstrap
from rag_rl.retrieval import StaticRetriever
from rag_rl.types import Generation, Passage, Question

PASSAGES = [Passage("d0", "Elmton lies on the Mira."), Passage("d1", "Galton lies on the Orl.")]


def reply_of(prompt, number=0):
    return "Answer: Mira" if int(prompt.split("town ")[1].split("?")[0]) % 3 == 0 else "Orl"


class Counted(ScriptedGenerator):
    """Right for every third question, and counts what it is asked."""

    def __init__(self, dies_after=None):
        super().__init__(reply_of)
        self.dies_after = dies_after

    def generate(self, prompts, **options):
        if self.dies_after is not None and len(self.prompts) + len(prompts) > self.dies_after:
            raise BackendError("the endpoint is gone")
        return super().generate(prompts, **options)


def assembly(generator=None):
    return Assembly(retriever=StaticRetriever({}, default=PASSAGES), generator=generator or Counted(), top_k=2)


def questions(count):
    return [Question(f"q{i}", f"Which river is town {i}?", ("Mira",), ("d0",)) for i in range(count)]


def test_is_what_evaluate_gives(tmp_path):
    asked = questions(30)
    table = evaluate_to_file(assembly(), asked, tmp_path / "rows.jsonl", batch_size=7)
    expected = evaluate(assembly(), asked)
    assert table.means() == pytest.approx(expected.metrics)
    assert list(RowFile(tmp_path / "rows.jsonl")) == expected.rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], "nothing is left of the parts"


def test_goes_on_where_it_was(tmp_path):
    asked, path = questions(50), tmp_path / "rows.jsonl"
    first = Counted(dies_after=25)
    with pytest.raises(BackendError, match="the endpoint is gone"):
        evaluate_to_file(assembly(first), asked, path, batch_size=10)
    assert len(first.prompts) == 20
    assert not path.exists()
    (part,) = tmp_path.iterdir()
    with part.open("ab") as file:
        file.write(b'{"qid": "q20", "quest')  # what a kill leaves
    second = Counted()
    table = evaluate_to_file(assembly(second), asked, path, batch_size=10)
    assert len(second.prompts) == 30, "none is asked twice"
    assert [qid for qid, _ in table.keys] == [q.qid for q in asked]
    assert table.means() == pytest.approx(evaluate(assembly(), asked).metrics)
    third = Counted()
    evaluate_to_file(assembly(third), asked, path)
    assert third.prompts == []


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_evaluating import Counted, assembly, questions
from rag_rl.evaluation.evaluating import evaluate_to_file

class Killed(Counted):
    def generate(self, prompts, **options):
        if len(self.prompts) >= 40:
            os._exit(9)
        return super().generate(prompts, **options)

evaluate_to_file(assembly(Killed()), questions(100), Path({path!r}), batch_size=10)
"""


def test_killed_and_gone_on_with(tmp_path):
    path = tmp_path / "rows.jsonl"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    rest = Counted()
    table = evaluate_to_file(assembly(rest), questions(100), path, batch_size=10)
    assert (len(rest.prompts), len(table.keys)) == (60, 100)


def test_shares_of_several_processes_are_joined_in_order(tmp_path):
    asked, path = questions(9), tmp_path / "rows.jsonl"
    evaluate_to_file(assembly(), asked[1::2], tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").rename(tmp_path / ".rows.1.part")
    own = Counted()
    table = evaluate_to_file(assembly(own), asked, path)
    assert len(own.prompts) == 5
    assert [qid for qid, _ in table.keys] == [f"q{i}" for i in range(9)]


def test_questions_that_fail_alone(tmp_path, caplog):
    class Sometimes(Counted):
        def generate(self, prompts, **options):
            found = super().generate(prompts, **options)
            return [[Generation("HTTP 400", finish_reason="error")], *found[1:]]

    table = evaluate_to_file(assembly(Sometimes()), questions(6), tmp_path / "rows.jsonl", batch_size=3)
    assert np.isnan(table.columns["em"]).tolist() == [True, False, False, True, False, False]
    assert table.means()["em"] == 0.0, "left out of the mean, not counted as wrong"
    assert "1 questions failed and have no scores, the first: HTTP 400" in caplog.text

    class Never(Counted):
        def generate(self, prompts, **options):
            return [[Generation("HTTP 500", finish_reason="error")] for _ in prompts]

    with pytest.raises(BackendError, match="all 3 questions of a batch failed, the first: HTTP 500"):
        evaluate_to_file(assembly(Never()), questions(6), tmp_path / "other.jsonl", batch_size=3)


def test_no_question_and_other_questions(tmp_path):
    with pytest.raises(DataError, match="no question to evaluate on"):
        evaluate_to_file(assembly(), [], tmp_path / "rows.jsonl")
    evaluate_to_file(assembly(), questions(3), tmp_path / "rows.jsonl")
    with pytest.raises(RunFolderError, match="is about other questions"):
        evaluate_to_file(assembly(), questions(4), tmp_path / "rows.jsonl")


def test_summary():
    rows = [{"qid": str(i), "question": "", "scores": {"em": float(i % 2), "seconds": 0.5}} for i in range(100)]
    found = summarise(score_table(rows))
    assert found["metrics"] == {"em": 0.5, "seconds": 0.5}
    assert found["n_eval"] == 100
    assert set(found["mean_ci95"]) == {"em"}, "the seconds of a batch are no sample of anything"
    assert found["mean_ci95"]["em"] == pytest.approx([0.4, 0.6], abs=0.011)


def test_differences():
    one = [{"qid": str(i), "question": "", "scores": {"em": float(i % 2), "f1": 0.5, "x": None}} for i in range(40)]
    scores = [{"em": float(i % 4 > 0), "f1": None, "seconds": 1.0} for i in range(40)]
    other = [{"qid": str(i), "question": "", "scores": one} for i, one in enumerate(scores)]
    found = differences(score_table(one), score_table(other))
    assert set(found) == {"em"}
    em = found["em"]
    old, new = [r["scores"]["em"] for r in one], [r["scores"]["em"] for r in other]
    assert (em["difference"], em["n"]) == (0.25, 40)
    assert em["ci95"] == list(paired_bootstrap(old, new)), "the interval that metrics.json has"
    assert em["p"] == 2 / 2**10
    with pytest.raises(DataError, match="not about the same questions"):
        differences(score_table(one), score_table(other[1:]))


def test_unknown_gold_documents(caplog):
    asked = [Question("a", "?", (), ("d0",)), Question("b", "?", (), ("d0", "x1", "x2")), Question("c", "?", ("y",))]
    known = {"d0"}
    assert check_gold(asked[:1], known, source="q.jsonl") == asked[:1]
    with pytest.raises(DataError) as caught:
        check_gold(asked, known, source="q.jsonl")
    assert str(caught.value) == (
        "q.jsonl: 1 of 3 questions have gold documents that the corpus does not hold (b: x1, x2): take the corpus "
        "that they were made for, or set evaluation_unknown_gold to drop or missed"
    )
    assert check_gold(asked, known, source="q.jsonl", unknown="drop") == [asked[0], asked[2]]
    assert "1 of 3 questions have gold documents" in caplog.text
    assert check_gold(asked, known, source="q.jsonl", unknown="missed") == asked
    with pytest.raises(DataError, match="the corpus holds the gold documents of no question"):
        check_gold(asked[1:2], known, source="q.jsonl", unknown="drop")


def test_memory_does_not_grow_with_what_is_written(tmp_path):
    long = [Passage("d0", "word " * 400)]

    class Forgets:
        def generate(self, prompts, **options):
            return [[Generation(reply_of(prompt[0]["content"]))] for prompt in prompts]

    def peak(count):
        rich = Assembly(retriever=StaticRetriever({}, default=long), generator=Forgets(), top_k=1)
        asked = questions(count)
        tracemalloc.start()
        evaluate_to_file(Measured(rich), asked, tmp_path / f"{count}.jsonl", batch_size=20)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(20)
    grown = peak(420) - peak(120)
    written = (tmp_path / "420.jsonl").stat().st_size - (tmp_path / "120.jsonl").stat().st_size
    assert written > 600_000
    assert grown < 300 * 1024
    assert json.loads((tmp_path / "120.jsonl").read_text().splitlines()[0])["qid"] == "q0"
