from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from rag_rl.ask import Answerer, Reply, open_assembly, open_run, read_settings
from rag_rl.config.arguments import DataArguments, ReasonerArguments, RetrieverArguments
from rag_rl.errors import BackendError, ConfigError, DataError, IndexDamagedError, RunFolderError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.generation import ScriptedGenerator
from rag_rl.retrieval import StaticRetriever
from rag_rl.tiny import FOLDER
from rag_rl.types import Generation, Passage

QUESTIONS = [json.loads(line) for line in (FOLDER / "data" / "heldout_1hop.jsonl").read_text().splitlines()[:20]]


@pytest.fixture(scope="module")
def rag(finished_run) -> Answerer:
    return open_run(finished_run, device="cpu")


def test_a_run_answers(rag, finished_run):
    rows = [json.loads(line) for line in (finished_run / "after.jsonl").read_text().splitlines()]
    for row in rows[:5]:
        reply = rag.ask(row["question"])
        assert isinstance(reply, Reply)
        # Best first in the run's own order, which for the tiny config depends on the question's id.
        assert {hit.passage.doc_id for hit in reply.hits} == {passage["doc_id"] for passage in row["passages"]}
        assert len(reply.hits) == 3
        assert reply.scores == {}
        assert reply.answer is None or reply.answer in reply.text


def test_it_is_asked_as_it_was_trained(rag, finished_run):
    settings = read_settings(finished_run)
    assembly = rag.assembly
    assert assembly.top_k == settings["retriever_top_k"] == 3
    assert assembly.order == settings["generator_passage_order"] == "shuffled"
    assert assembly.max_new_tokens == settings["max_completion_length"]
    assert Path(assembly.prompt) == finished_run / "prompts" / "tiny_answer.txt"
    assert rag.weights == {"format": 0.1}, "em needs a gold answer"


def test_best_of_four(rag):
    reply = rag.ask(QUESTIONS[0]["question"], best_of=4, seed=3)
    assert set(reply.scores) == {"format", "agreement"}
    assert reply.scores["agreement"] in (0.25, 0.5, 0.75, 1.0)
    again = rag.ask(QUESTIONS[0]["question"], best_of=4, seed=3)
    assert (again.text, again.scores) == (reply.text, reply.scores)


def test_settings_can_be_changed_for_asking(finished_run):
    rag = open_run(finished_run, device="cpu", retriever_top_k=5, generator_max_prompt_tokens=60)
    assert rag.assembly.top_k == 5
    assert rag.assembly.max_prompt_tokens == 60
    reply = rag.ask(QUESTIONS[0]["question"])
    assert 0 < len(reply.hits) < 5, "what does not fit is not shown"


def test_unknown_setting(finished_run):
    with pytest.raises(ConfigError, match="no setting 'retreiver_top_k'"):
        open_run(finished_run, retreiver_top_k=5)


def scripted(replies: list[str], judge=None, weights=None) -> Answerer:
    passages = [Passage("d1", "The king of Elmton is Mira."), Passage("d2", "Rain falls.")]
    retriever = StaticRetriever({}, default=passages)
    assembly = Assembly(retriever=retriever, generator=ScriptedGenerator(replies), top_k=2)
    return Answerer(assembly, judge, weights or {})


def test_best_by_the_rewards():
    def judge(*, completions, question, passages, **_):
        assert question == ["Who?"] * 3
        assert passages == [["The king of Elmton is Mira.", "Rain falls."]] * 3
        return {"short": [1 / len(text) for text in completions], "silent": [None] * 3}

    rag = scripted(["Answer: nobody knows that", "Answer: Mira", "Answer: the Mira"], judge, {"short": 1.0})
    reply = rag.ask(" Who? ", best_of=3)
    assert reply.answer == "Mira"
    # "the Mira" is the same answer after normalisation.
    assert reply.scores == {"short": 1 / len("Answer: Mira"), "agreement": pytest.approx(2 / 3)}


def test_best_by_agreement_where_no_reward_decides():
    rag = scripted(["Answer: Otto", "Answer: Mira", "Answer: mira.", "nothing"])
    assert rag.ask("Who?", best_of=4).answer == "Mira"


def test_an_answer_beats_none():
    reply = scripted(["<think>hm", "<think>hm", "Answer: Mira"]).ask("Who?", best_of=3)
    assert reply.answer == "Mira"


def test_best_of_n_by_an_oracle_is_pass_at_n(rag):
    """Chosen by who knows the answer, the best of n is right exactly where one of the n is (pass@n)."""
    from rag_rl.evaluation.sampling import pass_at_k
    from rag_rl.metrics import exact_match
    from rag_rl.text import extract_answer
    from rag_rl.types import Question

    gold = {row["question"]: row["answers"] for row in QUESTIONS}

    def oracle(*, completions, question, **_):
        answers = [extract_answer(text, marker=rag.assembly.answer_marker) for text in completions]
        return {"oracle": [exact_match(a, gold[q]) for a, q in zip(answers, question, strict=True)]}

    chooser = Answerer(rag.assembly, oracle, {"oracle": 1.0})
    shares = []
    for n in (2, 4):
        drawn = [
            rag.assembly.answer([Question("asked", row["question"], ("",))], temperature=1.0, n=n, seed=5)[0]
            for row in QUESTIONS
        ]
        correct = [
            [exact_match(one.answer, row["answers"]) == 1.0 for one in samples]
            for row, samples in zip(QUESTIONS, drawn, strict=True)
        ]
        chosen = [chooser.ask(row["question"], best_of=n, seed=5).answer for row in QUESTIONS]
        right = [exact_match(answer, row["answers"]) for answer, row in zip(chosen, QUESTIONS, strict=True)]
        assert sum(right) / len(right) == pass_at_k(correct)
        shares.append(pass_at_k(correct) - sum(samples[0] for samples in correct) / len(correct))
    assert max(shares) > 0, "there was something to choose"


# ---- an assembly of a file


def test_an_assembly_of_a_file(finished_run, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "data_corpus: ${tiny}/data/corpus.jsonl\nretriever_encoder: ${tiny}/encoder\nretriever_top_k: 5\n"
        f"generator_model: {finished_run}\n"
    )
    found = open_assembly(config)
    reply = found.ask(QUESTIONS[0]["question"])
    assert len(reply.hits) == 5
    assert open_assembly(config, argv=["--retriever_top_k", "2"]).assembly.top_k == 2
    assert set(found.ask(QUESTIONS[0]["question"], best_of=3).scores) == {"agreement"}
    with pytest.raises(ConfigError, match="no such file"):
        open_assembly(tmp_path / "none.yaml")


# ---- a reasoner


@pytest.fixture(scope="module")
def reasoner_run(tmp_path_factory) -> Path:
    """What a finished run of a reasoner leaves, with the packaged reader as what was trained."""
    folder = tmp_path_factory.mktemp("reasoner") / "run"
    shutil.copytree(FOLDER / "reader", folder)
    settings = {
        "recipe": "sft_reasoner",
        **dataclasses.asdict(ReasonerArguments(reasoner_max_steps=4, reasoner_max_step_tokens=48)),
        **dataclasses.asdict(RetrieverArguments(retriever_encoder="${tiny}/encoder", retriever_top_k=2)),
        **dataclasses.asdict(DataArguments(data_corpus="${tiny}/data/corpus.jsonl")),
    }
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.json").write_text("{}")
    return folder


def test_a_reasoner_answers_with_its_chain(reasoner_run):
    rag = open_run(reasoner_run, device="cpu")
    assert (rag.assembly.setup.max_steps, rag.assembly.setup.top_k) == (4, 2)
    rows = [json.loads(line) for line in (FOLDER / "data" / "heldout_2hop.jsonl").read_text().splitlines()[:12]]
    replies = [rag.ask(row["question"]) for row in rows]
    for reply in replies:
        assert reply.text.startswith("Step 1:\nThe problem analysis: ")
        assert reply.scores == {}
        assert len({hit.passage.doc_id for hit in reply.hits}) == len(reply.hits) <= 2 * 4
        assert reply.answer is None or reply.text.endswith(f"The final answer: {reply.answer}")
    searched = [reply for reply in replies if "The retrieval query:" in reply.text]
    assert searched
    assert all(reply.hits for reply in searched)
    assert rag.ask(rows[0]["question"]) == replies[0]


def test_best_of_several_chains(reasoner_run):
    rag = open_run(reasoner_run, device="cpu", retriever_top_k=3)
    reply = rag.ask("Where does Ulradric live?", best_of=4, seed=2)
    assert set(reply.scores) == {"agreement"}, "no reward is known that needs no gold answer"
    assert reply.scores["agreement"] in (0.25, 0.5, 0.75, 1.0)
    assert rag.ask("Where does Ulradric live?", best_of=4, seed=2) == reply


def test_a_reasoner_from_the_command_line(reasoner_run, capsys):
    from rag_rl.cli import main

    main(["ask", "--run", str(reasoner_run), "What is the emblem of the guild of Falledric?"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("answer:  ")
    assert lines[1] == "reply:   Step 1:"
    assert lines[2].startswith("The problem analysis: ")


class Failing:
    """Every second sample fails, or all do."""

    def __init__(self, every=2):
        self.every = every

    def generate(self, prompts, *, n=1, **_):
        failed, good = Generation("http://x: HTTP 400", finish_reason="error"), Generation("Answer: Mira")
        return [[failed if i % self.every == 0 else good for i in range(n)] for _ in prompts]


def test_rewards_that_can_score_a_new_question():
    from rag_rl.ask import _gold_free_rewards
    from rag_rl.config.arguments import GeneratorArguments

    settings = {"reward_names": ["f1", "judged", "format", "groundedness"], "max_completion_length": 32}
    judge, weights = _gold_free_rewards(settings, GeneratorArguments())
    assert weights == {"format": 0.2, "groundedness": 1.0}, "a judge would have to be asked, and paid"
    assert set(judge(completions=["Answer: Mira"], passages=[["Mira."]], answers=[[""]])) == set(weights)


def test_what_failed_is_no_candidate():
    rag = scripted([])
    rag.assembly = rag.assembly.with_generator(Failing())
    reply = rag.ask("Who?", best_of=4)
    assert (reply.answer, reply.scores) == ("Mira", {"agreement": 1.0})
    for best_of, every in ((1, 2), (3, 1)):
        rag.assembly = rag.assembly.with_generator(Failing(every))
        with pytest.raises(BackendError, match="http://x: HTTP 400"):
            rag.ask("Who?", best_of=best_of)


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_empty_question(rag, question):
    with pytest.raises(ConfigError, match="the question is empty"):
        rag.ask(question)


def test_best_of_below_one(rag):
    with pytest.raises(ConfigError, match="best_of must be at least 1, got 0"):
        rag.ask("Who?", best_of=0)


def test_question_longer_than_the_context(rag):
    with pytest.raises(DataError, match=r"fit into .* prompt tokens"):
        rag.ask("who " * 3000)


def test_no_run(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no run \(there is no resolved_config.yaml"):
        open_run(tmp_path)
    with pytest.raises(RunFolderError, match="holds no run"):
        open_run(tmp_path / "nowhere")


def test_unfinished_run(finished_run, tmp_path):
    shutil.copy(finished_run / "resolved_config.yaml", tmp_path)
    with pytest.raises(RunFolderError, match="unfinished run: go on with --resume_from_checkpoint true"):
        open_run(tmp_path)


def test_run_of_another_kind(tmp_path):
    (tmp_path / "resolved_config.yaml").write_text("recipe: grpo_retriever\n")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(RunFolderError, match="is a run of grpo_retriever, which trains no generator"):
        open_run(tmp_path)


def test_model_that_is_gone(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    with pytest.raises(DataError, match="cannot load the model"):
        open_run(tmp_path / "run")


def test_index_that_is_damaged(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_CACHE", str(tmp_path))
    open_run(finished_run, device="cpu")  # a missing one is built again
    (index,) = (tmp_path / "indexes").iterdir()
    (index / "passages.jsonl").write_text("")
    with pytest.raises(IndexDamagedError, match=r"passages\.jsonl has 0 bytes"):
        open_run(finished_run, device="cpu")
