"""A synthesis in its folder: gone on with where it stopped, refused where it is another one."""

from __future__ import annotations

import json

import pytest
import yaml

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.synthesis import build_query_writer, build_synthesis_corpus, report_queries, synthesize_queries
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.data import load_questions
from rag_rl.data.reinforced_ir import SyntheticQuery, read_queries
from rag_rl.errors import BackendError, ConfigError, DataError, RunFolderError
from rag_rl.generation.synthesis import Draft, GeneratorWriter, RelevanceCheck, SentenceWriter
from rag_rl.prompts.tasks import load_task

calls: list[list[str]] = []
breaks_after = [99]
fails: set[str] = set()
same_query: list[bool] = []


class Writer:
    """A query is the text and its passage's seed; breaks and fails when told to."""

    def write(self, passages, wishes, *, seed):
        if len(calls) >= breaks_after[0]:
            raise BackendError("the endpoint is gone")
        calls.append([passage.doc_id for passage in passages])
        return [
            Draft("", problem="failed")
            if passage.doc_id in fails
            else Draft("the same" if same_query else f"{passage.text} {seed}", "river")
            for passage in passages
        ]


def make_writer(args):
    return Writer()


@pytest.fixture(autouse=True)
def _fresh():
    calls.clear()
    fails.clear()
    same_query.clear()
    breaks_after[0] = 99


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"doc_id": f"d{i}", "text": f"Town {i} lies on the river {i}."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataArguments(data_corpus=str(path))


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr("rag_rl.config.synthesis.import_attribute", lambda name: make_writer)
    return SynthesisArguments(synthesis_writer="mine:make_writer", synthesis_batch_size=6, synthesis_attempts=1)


def run(args, data, folder, seed=0):
    found = synthesize_queries(args, data, folder, seed=seed)
    return report_queries(found, args, data, RetrieverArguments(), folder)


def test_what_comes_out(args, data, tmp_path):
    summary = run(args, data, tmp_path / "out")
    assert {name: summary[name] for name in ("passages", "repeated_passages", "wanted", "kept", "failed")} == {
        "passages": 20, "repeated_passages": 0, "wanted": 20, "kept": 20, "failed": 0,
    }  # fmt: skip
    assert [len(call) for call in calls] == [6, 6, 6, 2]
    questions = load_questions(tmp_path / "out" / "questions.jsonl")
    assert {question.gold_doc_ids for question in questions} == {(f"d{i}",) for i in range(20)}
    assert questions[0].qid == f"synthetic/{questions[0].gold_doc_ids[0]}/0"
    assert questions[0].answers == ("river",)
    queries = read_queries(tmp_path / "out" / "queries.json")
    assert [one.query for one in queries] == [question.question for question in questions]
    assert queries[0].query.startswith(queries[0].passage)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def outputs(folder):
    return {name: (folder / name).read_bytes() for name in ("queries.json", "questions.jsonl", "summary.json")}


@pytest.mark.parametrize("cut", [0, 25])
def test_stopped_and_gone_on_with(args, data, tmp_path, cut):
    run(args, data, tmp_path / "whole")
    calls.clear()
    breaks_after[0] = 2
    with pytest.raises(BackendError, match="is gone"):
        run(args, data, tmp_path / "out")
    rows = tmp_path / "out" / "synthesis.jsonl"
    assert len(rows.read_text().splitlines()) == 12
    if cut:  # half a line: the batch that it belongs to is written again
        rows.write_bytes(rows.read_bytes()[:-cut])
    calls.clear()
    breaks_after[0] = 99
    run(args, data, tmp_path / "out")
    assert len(calls) == (3 if cut else 2)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_requests_that_failed_are_made_again(args, data, tmp_path):
    fails.update({"d3", "d4"})
    assert run(args, data, tmp_path / "out")["failed"] == 2
    fails.clear()
    summary = run(args, data, tmp_path / "out")
    assert (summary["failed"], summary["kept"]) == (0, 20)
    done = len(calls)
    run(args, data, tmp_path / "out")
    assert len(calls) == done


def test_a_query_of_two_passages_is_kept_once(args, data, tmp_path):
    same_query.append(True)
    summary = run(args, data, tmp_path / "out")
    assert summary["outcomes"] == {"duplicate": 19, "kept": 1}
    assert len(read_queries(tmp_path / "out" / "queries.json")) == 1


def test_of_rows_that_are_there_keywords_are_made(args, data, tmp_path):
    run(args, data, tmp_path / "out", seed=1)
    before = (tmp_path / "out" / "synthesis.jsonl").read_bytes()
    args.synthesis_form = "keywords"
    assert run(args, data, tmp_path / "out", seed=1)["kept"] == 20
    found = {one.query for one in read_queries(tmp_path / "out" / "queries.json")}
    assert all(query.startswith("Town ") and " lies river " in query for query in found), "without on and the"
    assert (tmp_path / "out" / "synthesis.jsonl").read_bytes() == before, "the rows are as they were written"


def test_another_synthesis_is_refused(args, data, tmp_path):
    run(args, data, tmp_path / "out")
    with pytest.raises(RunFolderError, match=r"came about otherwise \(.*seed.*give another --output_dir"):
        run(args, data, tmp_path / "out", seed=1)
    args.synthesis_concurrency = 3  # how fast is not what
    run(args, data, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(args, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(RunFolderError, match="is not empty and holds no synthesis"):
        run(args, data, tmp_path / "out")
    with pytest.raises(RunFolderError, match="is a file"):
        run(args, data, tmp_path / "out" / "thesis.txt")


def test_a_plain_corpus_becomes_documents(args, tmp_path):
    plain = tmp_path / "corpus.json"
    plain.write_text(json.dumps(["Elmton lies on the Mira.", "", "Elmton lies on the Mira.", "Osgiton is large."]))
    data = DataArguments(data_corpus=str(plain))
    summary = run(args, data, tmp_path / "out")
    assert (summary["kept"], summary["repeated_passages"]) == (2, 1)
    assert data.data_corpus == str(tmp_path / "out" / "corpus.jsonl")
    assert {q.gold_doc_ids for q in load_questions(tmp_path / "out" / "questions.jsonl")} == {("0",), ("3",)}
    assert len(list(build_synthesis_corpus(DataArguments(data_corpus=str(plain)), tmp_path / "out"))) == 3
    assert SyntheticQuery in {type(one) for one in read_queries(tmp_path / "out" / "queries.json")}


def test_an_empty_corpus(args, tmp_path):
    (tmp_path / "corpus.json").write_text("[]")
    with pytest.raises(DataError):
        run(args, DataArguments(data_corpus=str(tmp_path / "corpus.json")), tmp_path / "out")


def test_settings_and_prompts_are_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rag_rl.config.synthesis.build_query_writer", lambda args, task: (SentenceWriter(), [])
    )  # the prompts are those of a model, which is not loaded here
    args = SynthesisArguments(synthesis_model="m", synthesis_task="nq", with_answers=True)
    run(args, data, tmp_path / "out", seed=5)
    settings = yaml.safe_load((tmp_path / "out" / "synthesis_config.yaml").read_text())
    assert (settings["seed"], settings["synthesis_task"]) == (5, "nq")
    assert "python" in settings["made_with"]
    kept = sorted(path.name for path in (tmp_path / "out" / "prompts").iterdir())
    assert kept == ["check_query.txt", "synthesize_query_answer.txt"]


def test_writers_by_name(monkeypatch):
    task = load_task("default")
    writer, checks = build_query_writer(
        SynthesisArguments(synthesis_writer="openai", synthesis_model="m", synthesis_base_url="http://127.0.0.1:1/v1"),
        task,
    )
    assert isinstance(writer, GeneratorWriter)
    assert writer.prompt == "synthesize_query"
    assert [type(check) for check in checks] == [RelevanceCheck]
    assert isinstance(build_query_writer(SynthesisArguments(synthesis_writer="sentences"), task)[0], SentenceWriter)
    for values, message in (
        ({"synthesis_writer": "gpt"}, "must be local, openai, sentences or package.module:attribute, got 'gpt'"),
        ({"synthesis_writer": "openai"}, "openai needs a model: set synthesis_model"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_query_writer(SynthesisArguments(**values), task)


def test_what_several_processes_left_is_gone_on_with_by_one(args, data, tmp_path):
    run(args, data, tmp_path / "whole")
    whole = (tmp_path / "whole" / "synthesis.jsonl").read_text().splitlines(keepends=True)
    calls.clear()
    breaks_after[0] = 2
    with pytest.raises(BackendError, match="is gone"):
        run(args, data, tmp_path / "out")
    # As if a second process had written the last of the four batches, when both were killed.
    (tmp_path / "out" / "synthesis-1.jsonl").write_text("".join(whole[18:]) + whole[12][:9])
    calls.clear()
    breaks_after[0] = 99
    run(args, data, tmp_path / "out")
    assert [len(call) for call in calls] == [6], "the third alone"
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert (tmp_path / "out" / "synthesis.jsonl").read_text() == "".join(whole)
    assert not list((tmp_path / "out").glob("synthesis-*"))
