from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from rag_rl.config.assemblies import ARGUMENTS
from rag_rl.errors import BackendError, RunFolderError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.evaluation_run import start_evaluation
from rag_rl.generation import ScriptedGenerator
from rag_rl.retrieval import StaticRetriever
from rag_rl.types import Passage, Question

RECIPE = str(Path(__file__).parents[2] / "recipes" / "evaluate_rag.py")
QUESTIONS = [Question(f"q{i}", f"Which river is town {i}?", ("Mira",), ("d0",)) for i in range(12)]


def scripted(plan):
    return ScriptedGenerator({})


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_users_module", sys.modules[__name__])
    config = tmp_path / "mine.yaml"
    config.write_text("generator_name: a_users_module:scripted\ndata_eval: q.jsonl\n")

    def run(*flags, folder=tmp_path / "run"):
        argv = ["--config", str(config), "--output_dir", str(folder), *flags]
        monkeypatch.setattr(sys, "argv", [RECIPE, *argv])
        return start_evaluation(RECIPE, ARGUMENTS, argv=argv)

    return run


def assembly(right=lambda number: number % 2 == 0, dies_after=None):
    def reply(text, number):
        if dies_after is not None and number >= dies_after:
            raise BackendError("the endpoint is gone")
        return "Answer: Mira" if right(int(text.split("town ")[1].split("?")[0])) else "Answer: Orl"

    retriever = StaticRetriever({}, default=[Passage("d0", "Elmton lies on the Mira."), Passage("d1", "Rain.")])
    return Assembly(retriever=retriever, generator=ScriptedGenerator(reply), top_k=2)


def test_leaves_a_folder_that_says_all(start, tmp_path, capsys):
    run = start()
    assert (run.folder, run.config) == (tmp_path / "run", "mine")
    found = run.evaluate(assembly(), QUESTIONS, baselines={"no_retrieval": assembly(lambda number: number == 0)})
    run.report()
    files = {path.name for path in run.folder.iterdir()}
    assert files == {
        "resolved_config.yaml",
        "rows.jsonl",
        "baseline_no_retrieval.jsonl",
        "metrics.json",
        "report.html",
    }
    told = json.loads((run.folder / "metrics.json").read_text())
    assert told == json.loads(json.dumps(found))
    assert (told["recipe"], told["config"], told["status"], told["n_eval"]) == ("evaluate_rag", "mine", "complete", 12)
    assert told["metrics"]["em"] == 0.5
    low, high = told["mean_ci95"]["em"]
    assert low < 0.5 < high
    assert told["baselines"]["no_retrieval"]["em"] == pytest.approx(1 / 12)
    over = told["over_baselines"]["no_retrieval"]["em"]
    assert over["difference"] == pytest.approx(5 / 12), "the assembly less its baseline"
    assert over["p"] == 2 / 2**5
    assert told["eval_seconds"] > 0
    assert told["peak_memory_bytes"] > 2**20
    settings = yaml.safe_load((run.folder / "resolved_config.yaml").read_text())
    assert settings["recipe"] == "evaluate_rag"
    assert settings["made_with"]["rag-rl"]
    out = capsys.readouterr().out
    assert "  assembly                  0.500" in out
    assert "no_retrieval against assembly: 0 questions became right by em, 5 wrong" in out
    assert str(run.folder / "report.html") in out


def test_an_interrupted_evaluation_goes_on(start):
    with pytest.raises(BackendError):
        start("--evaluation_batch_size", "4").evaluate(assembly(dies_after=6), QUESTIONS)
    again = start("--evaluation_batch_size", "3")  # how many at a time changes nothing
    rest = assembly()
    found = again.evaluate(rest, QUESTIONS)
    assert len(rest.generator.prompts) == 8
    assert found["metrics"]["em"] == 0.5


def test_a_finished_one_is_left_alone_unless_a_baseline_is_missing(start):
    run = start()
    run.evaluate(assembly(), QUESTIONS)
    run.report()
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 0
    more = start("--evaluation_baselines", "no_retrieval")
    untouched, other = assembly(), assembly()
    found = more.evaluate(untouched, QUESTIONS, baselines={"no_retrieval": other})
    assert (len(untouched.generator.prompts), len(other.generator.prompts)) == (0, 12)
    assert set(found["baselines"]) == {"no_retrieval"}


def test_folders_that_hold_something_else(start, tmp_path):
    start().evaluate(assembly(), QUESTIONS)
    with pytest.raises(
        RunFolderError, match=r"holds an evaluation that came about otherwise \(generator_max_new_tokens"
    ):
        start("--generator_max_new_tokens", "9")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("irreplaceable")
    with pytest.raises(RunFolderError, match="is not empty and holds no run: give another --output_dir"):
        start(folder=thesis)
    with pytest.raises(RunFolderError, match="is a file: give another --output_dir"):
        start(folder=thesis / "chapter1.tex")
    assert [path.name for path in thesis.iterdir()] == ["chapter1.tex"]


def test_a_mistake_does_not_block_the_folder(start):
    run = start("--generator_max_new_tokens", "9")
    with pytest.raises(BackendError):
        run.evaluate(assembly(dies_after=0), QUESTIONS)  # nothing was answered
    again = start("--generator_max_new_tokens", "10")
    assert again.evaluate(assembly(), QUESTIONS)["n_eval"] == 12
    settings = yaml.safe_load((again.folder / "resolved_config.yaml").read_text())
    assert settings["generator_max_new_tokens"] == 10


def test_its_folder_is_named_after_its_config(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", str(tmp_path / "mine.yaml")]
    assert start_evaluation(RECIPE, ARGUMENTS, argv=argv).folder == Path("runs/evaluate_rag-mine")
