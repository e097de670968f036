"""The cold start: teachers by name, chains in a folder, and examples that TRL neither cuts nor drops."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rag_rl.config.arguments import DataArguments, JudgeArguments, RetrieverArguments
from rag_rl.config.teacher_arguments import ColdStartArguments, TeacherArguments
from rag_rl.config.teachers import (
    build_chains,
    build_examples,
    build_teacher,
    collect_chains,
    report_trajectories,
)
from rag_rl.errors import ConfigError, DataError, RunFolderError
from rag_rl.reasoning import (
    GeneratorTeacher,
    OracleTeacher,
    StepSetup,
    read_trajectories,
    trajectory_of,
    write_trajectories,
)
from rag_rl.retrieval import StaticRetriever
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage, Question

READER = "${tiny}/reader"
FALBERT = Passage("d1", "Falbert lives in Elmton.")
ELMTON = Passage("d2", "Elmton lies on the Mirbrook.")
QUESTIONS = [
    Question(
        f"q{i}",
        f"Which river is the home of Falbert on ({i})?",
        ("Mirbrook",),
        ("d1", "d2"),
        meta={
            "decomposition": [
                {"question": f"Where does Falbert live ({i})?", "answer": "Elmton", "gold_doc_id": "d1"},
                {"question": "Which river does #1 lie on?", "answer": "Mirbrook", "gold_doc_id": "d2"},
            ]
        },
    )
    for i in range(4)
]
# The last question's first document is not to be found.
RETRIEVER = StaticRetriever(
    {f"Where does Falbert live ({i})?": [FALBERT] if i < 3 else [] for i in range(4)}, default=[ELMTON]
)
SEARCH, DATA = RetrieverArguments(retriever_encoder="any"), DataArguments(data_corpus="any")


def collected(folder, *, questions=QUESTIONS, teacher=None, judge=None, search=SEARCH, retriever=RETRIEVER):
    parts = {"teacher": teacher or TeacherArguments(), "judge": judge or JudgeArguments()}
    return collect_chains(questions, folder, retriever, search=search, data=DATA, **parts)


# ---- the teacher


def test_the_oracle_speaks_as_its_world_does():
    oracle = build_teacher(TeacherArguments())
    assert isinstance(oracle, OracleTeacher)
    row = json.loads((FOLDER / "data" / "demo_2hop.jsonl").read_text().splitlines()[0])
    tiny = Question(row["qid"], row["question"], tuple(row["answers"]), tuple(row["gold_doc_ids"]), 2, row)
    subject, value, _ = row["chain"]
    assert oracle.wording(tiny, 0) == (f"{subject} lives in {value}.", f"I need the home of {subject}.")
    assert oracle.wording(QUESTIONS[0], 0) is None


def test_a_model_in_this_process_teaches():
    teacher = build_teacher(
        TeacherArguments(teacher_name="local", teacher_model=READER, teacher_temperature=0.5, teacher_seed=3)
    )
    assert isinstance(teacher, GeneratorTeacher)
    assert (teacher.temperatures, teacher.seed) == ((0.0, 0.5), 3)
    assert teacher.writer(1).tries == 1, "greedy steps are not repeated"
    assert teacher.writer(2).tries == 2


def test_an_endpoint_teaches():
    args = TeacherArguments(
        teacher_name="openai",
        teacher_model="deepseek-chat",
        teacher_base_url="http://127.0.0.1:1/v1",
        teacher_concurrency=3,
        teacher_timeout_s=7.0,
        teacher_extra_body={"top_k": 1},
    )
    generator = build_teacher(args)._generator
    assert (generator.model, generator.base_url) == ("deepseek-chat", "http://127.0.0.1:1/v1")
    assert (generator.max_concurrency, generator.timeout_s, generator.max_retries) == (3, 7.0, 4)
    assert generator.extra_body == {"top_k": 1}


def my_teacher(args):
    return SimpleNamespace(args=args)


def test_ones_own_teacher():
    args = TeacherArguments(teacher_name=f"{__name__}:my_teacher")
    assert build_teacher(args).args is args


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_name": "oracel"}, "teacher_name must be oracle, local, openai or package.module:attribute"),
        ({"teacher_name": "openai"}, "teacher_name openai needs a model: set teacher_model"),
        ({"teacher_name": "local"}, "teacher_name local needs a model: set teacher_model"),
        ({"teacher_name": "no_such_module:teacher"}, "cannot be imported"),
        (
            {"teacher_name": "openai", "teacher_model": "m", "teacher_first_prompt": "nowhere.txt"},
            "nowhere.txt",
        ),
    ],
)
def test_teachers_that_there_are_not(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_teacher(TeacherArguments(**changes))


def test_a_prompt_without_its_placeholder(tmp_path):
    (tmp_path / "mine.txt").write_text("Write a step about $question.")
    args = TeacherArguments(teacher_name="openai", teacher_model="m", teacher_next_prompt=str(tmp_path / "mine.txt"))
    with pytest.raises(ConfigError, match=r"mine\.txt' has no \$steps"):
        build_teacher(args)


# ---- the folder


def test_a_folder_of_chains(tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO):
        found = collected(tmp_path / "new")
    assert (found.solved, found.given_up, found.chains) == (3, 1, 4)
    assert "3 of 4 questions have a right chain, 1 have none after all attempts" in caplog.messages
    assert sorted(os.listdir(tmp_path / "new")) == ["trajectories.jsonl", "trajectories_config.yaml"]
    summary = report_trajectories(tmp_path / "new", QUESTIONS, found)
    assert summary == json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary == {
        "questions": 4,
        "solved": 3,
        "given_up": 1,
        "unfinished": 0,
        "chains": 4,
        "states": {"correct": 3, "incorrect": 0, "fail": 1, "invalid": 0},
        "attempts": {"1": 3},
        "steps": {"3": 3},
        "dpo_pairs": 0,
    }
    told = capsys.readouterr().out
    assert f"chains in     {tmp_path / 'new' / 'trajectories.jsonl'}\n" in told
    assert "states        correct: 3, incorrect: 0, fail: 1, invalid: 0\n" in told


def test_a_folder_is_gone_on_with_by_the_same_settings_only(tmp_path):
    assert collected(tmp_path, questions=QUESTIONS[:2]).chains == 2
    lines = (tmp_path / "trajectories.jsonl").read_bytes()
    # More questions and more attempts are no other settings.
    more = TeacherArguments(teacher_max_attempts=3, teacher_base_url="http://127.0.0.1:1/v1")
    assert collected(tmp_path, teacher=more).solved == 3
    assert (tmp_path / "trajectories.jsonl").read_bytes().startswith(lines)
    for changes in (
        {"teacher": TeacherArguments(teacher_max_steps=5)},
        {"search": replace(SEARCH, retriever_top_k=2)},
        {"judge": JudgeArguments(judge_name="oracle")},
    ):
        with pytest.raises(RunFolderError, match=r"holds chains that came about otherwise .* -> .*: give another"):
            collected(tmp_path, **changes)
    # A flag that there was not yet when the chains were written had its default.
    written = (tmp_path / "trajectories_config.yaml").read_text()
    (tmp_path / "trajectories_config.yaml").write_text(written.replace("retriever_shuffled: false\n", ""))
    assert collected(tmp_path).chains == 4
    with pytest.raises(RunFolderError, match="retriever_shuffled: false -> true"):
        collected(tmp_path, search=replace(SEARCH, retriever_shuffled=True))
    (tmp_path / "trajectories_config.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"holds trajectories\.jsonl, and nothing tells how it was made"):
        collected(tmp_path)


def test_nothing_is_begun_without_a_retriever(tmp_path):
    with pytest.raises(ConfigError, match="retriever_name must not be none"):
        collected(tmp_path / "new", retriever=None)
    assert not (tmp_path / "new").exists()


def test_what_a_model_was_asked_is_kept(tmp_path):
    teacher = TeacherArguments(teacher_name="local", teacher_model=READER, teacher_max_steps=1, teacher_max_attempts=1)
    collected(tmp_path, questions=QUESTIONS[:1], teacher=teacher)
    assert sorted(os.listdir(tmp_path / "prompts")) == ["r3_first_step.txt", "r3_next_step.txt"]
    assert "$steps" in (tmp_path / "prompts" / "r3_next_step.txt").read_text()


def test_pairs_in_either_layout_and_of_any_text(tmp_path):
    step = {"analysis": "So.", "answer": "Mirbrook"}
    head = {"qid": "q0", "question": QUESTIONS[0].question, "answers": ["Mirbrook"]}
    queries = [{"analysis": "First.", "query": "one?", "documents": [{"doc_id": "d1", "text": "x"}]}]
    chains = [
        {**head, "state": "invalid", "steps": [*queries, {"text": "half a \ud83d character", "problem": "no step"}]},
        {**head, "state": "correct", "attempt": 2, "steps": [*queries, step]},
    ]
    write_trajectories(tmp_path / "trajectories.jsonl", [trajectory_of(chain) for chain in chains])
    found = SimpleNamespace(solved=1, given_up=0, unfinished=0, chains=2)
    for layout, turns in (("turn", 1), ("chat", 3)):
        summary = report_trajectories(tmp_path, QUESTIONS[:1], found, layout=layout)
        assert (summary["dpo_pairs"], summary["attempts"]) == (1, {"2": 1})
        (pair,) = [json.loads(line) for line in (tmp_path / "dpo.jsonl").read_text().splitlines()]
        assert len(pair["prompt"]) == turns
        assert pair["rejected"] == [{"role": "assistant", "content": "half a \ud83d character"}]
    summary = report_trajectories(tmp_path, [], found)
    assert summary["states"]["correct"] == 0, "only of the questions that were played"


# ---- the examples


@pytest.fixture
def chains(tmp_path):
    collected(tmp_path / "chains")
    return read_trajectories(tmp_path / "chains" / "trajectories.jsonl")


def examples(chains, *, cold=None, held_out=(), max_length=1024, path=READER, **setup):
    training = SimpleNamespace(seed=1, max_length=max_length, model_init_kwargs=None)
    model = SimpleNamespace(model_name_or_path=path, model_revision="main", dtype="float32", attn_implementation=None)
    chosen = StepSetup(RETRIEVER, **{"max_step_tokens": 64, **setup})
    return build_examples(cold or ColdStartArguments(), chains, held_out, chosen, training, model)


def test_a_file_is_read_and_else_the_teacher_writes_one(tmp_path, chains):
    parts = {"teacher": TeacherArguments(), "judge": JudgeArguments(), "search": SEARCH, "data": DATA}
    named = ColdStartArguments(coldstart_path=str(tmp_path / "chains" / "trajectories.jsonl"))
    assert build_chains(named, [], tmp_path / "run", None, **parts) == chains
    assert not (tmp_path / "run").exists()
    assert build_chains(ColdStartArguments(), QUESTIONS, tmp_path / "run", RETRIEVER, **parts) == chains
    assert (tmp_path / "run" / "trajectories.jsonl").is_file()


@pytest.mark.parametrize("layout", ["turn", "chat"])
def test_an_example_is_what_the_model_will_be_asked(chains, layout):
    train, validation, tokenizer = examples(chains, layout=layout)
    assert validation is None
    assert (len(train), set(train.column_names)) == (9, {"prompt", "completion"})
    assert len(train[2]["prompt"]) == (1 if layout == "turn" else 5)
    assert train[2]["completion"][0]["content"].endswith("The final answer: Mirbrook")
    # What TRL takes for the prompt is what a generator is given: the whole begins with it.
    for row in train:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        assert whole[: len(prompt)] == prompt


def test_examples_for_a_base_model(chains):
    train, _, _ = examples(chains, generator_type="base")
    assert train[0]["prompt"] == f"The question: {QUESTIONS[0].question}\n"
    assert train[0]["completion"].startswith("Step 1:\n")


def test_which_chains_are_learnt_from(chains):
    cold = ColdStartArguments(coldstart_states=["fail"])
    assert len(examples(chains, cold=cold)[0]) == 7
    assert len(examples(chains, cold=ColdStartArguments(coldstart_size=2))[0]) == 6
    train, validation, _ = examples(chains, cold=ColdStartArguments(coldstart_validation=0.34))
    assert (len(train), len(validation)) == (6, 3)
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in validation}
    with pytest.raises(DataError, match=r"none of 4 chains ended in incorrect \(there are 3 correct, 1 fail\)"):
        examples(chains, cold=ColdStartArguments(coldstart_states=["incorrect"]))
    with pytest.raises(DataError, match="there are none at all"):
        examples([])
    with pytest.raises(DataError, match="1 held-out questions have chains to learn from: q1"):
        examples(chains, held_out=[replace(QUESTIONS[1], qid="another")])


def lengths_of(train, tokenizer):
    wholes = [row["prompt"] + row["completion"] for row in train]
    return [len(ids) for ids in tokenizer.apply_chat_template(wholes, return_dict=False)]


def test_the_oldest_documents_give_way_to_max_length(chains, caplog):
    whole, _, tokenizer = examples(chains)
    asked = tokenizer.apply_chat_template(list(whole["prompt"]), add_generation_prompt=True, return_dict=False)
    most = max(map(len, asked)) - 1
    caplog.clear()
    train, _, _ = examples(chains, max_length=most + 64)
    assert len(train) == 9
    assert max(lengths_of(train, tokenizer)) < max(lengths_of(whole, tokenizer))
    assert caplog.messages == ["3 of 9 prompts have no room for all documents: the oldest go"]
    last = train[2]["prompt"][0]["content"]
    assert "The retrieval documents: (left out)\nStep 2:" in last
    assert last.startswith(f"The question: {QUESTIONS[0].question}\n")
    assert last.endswith("The retrieval documents: [1] Elmton lies on the Mirbrook.")
    # The same where reasoner_max_prompt_tokens says so; and nothing goes where nothing does.
    same, _, _ = examples(chains, max_prompt_tokens=most, max_length=None)
    assert list(same["prompt"]) == list(train["prompt"])
    caplog.clear()
    examples(chains, max_length=None)
    assert caplog.messages == []


def test_steps_that_do_not_fit_are_counted_and_left_out(chains, caplog):
    whole, _, tokenizer = examples(chains)
    most = min(lengths_of(whole, tokenizer))
    # A first step is as long as that. Before the others no more than the question is left, and the second, which says
    # two things, does not even fit behind that.
    train, _, _ = examples(chains, max_length=most, max_step_tokens=1)
    assert [row["completion"][0]["content"][:7] for row in train] == ["Step 1:", "Step 3:"] * 3
    told = f"3 of 9 examples are left out: with their steps they are longer than max_length {most} (the longest has "
    assert told in caplog.text
    question = len(tokenizer.apply_chat_template(train[0]["prompt"], add_generation_prompt=True, return_dict=False))
    with pytest.raises(DataError, match="no example is left to train on: with their steps all are longer than max_l"):
        examples(chains, max_length=question + 1, max_step_tokens=1)


def test_no_room_for_a_prompt(chains):
    with pytest.raises(ConfigError, match="reasoner_max_step_tokens 64 leaves no room for a prompt: max_length is 64"):
        examples(chains, max_length=64)
    with pytest.raises(ConfigError, match="the model's context is 2048"):
        examples(chains, max_step_tokens=2048, max_length=None)
