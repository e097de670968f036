"""Tasks: the packaged ones are whole, and a user's file extends them."""

from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError
from rag_rl.prompts.tasks import bucket_bounds, load_task, load_tasks

BEIR = """msmarco trec-covid nfcorpus nq hotpotqa fiqa arguana webis-touche2020 cqadupstack quora dbpedia-entity
scidocs fever climate-fever scifact""".split()
AIR_BENCH = ["air-arxiv", "air-news", "air-finance", "air-healthcare", "air-law"]


@pytest.fixture
def tasks(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "tasks.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_packaged_sets_are_there():
    found = load_tasks()
    assert set(found) == {*BEIR, *AIR_BENCH, "default", "tiny", "cranfield"}
    assert all(task.instruction.endswith(".") for task in found.values())
    assert {name for name, task in found.items() if task.claims} == {"fever", "climate-fever", "scifact"}


def test_defaults_are_the_published_weights():
    task = load_task("default")
    assert dict(task.lengths) == {"<5": 2, "5-10": 5, "10-15": 4, ">=15": 1}
    assert dict(task.styles) == {"plain": 4, "formal": 4, "casual": 2, "professional": 1}
    assert dict(load_task("fever").lengths) == {"10-15": 5, ">=15": 2}


def test_a_users_file_adds_and_changes(tasks):
    path = tasks("mine: {instruction: Find it., examples: ['what is it?']}\nnq: {query_type: riddle}\n")
    assert load_task("mine", path).examples == ("what is it?",)
    changed = load_task("nq", path)
    assert (changed.query_type, changed.instruction) == ("riddle", load_task("nq").instruction)


def test_unknown_task():
    with pytest.raises(ConfigError, match=r"no task 'nqq'; known are air-arxiv, .*, webis-touche2020: describe it"):
        load_task("nqq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: {query_type: x}", "task mine: instruction must be a text, got None"),
        ("mine: {instruction: ''}", "instruction must be a text, got ''"),
        ("mine: {instruction: x, qury_type: y}", "unknown field 'qury_type'; known are answer_type, claims"),
        ("mine: {instruction: x, claims: 1}", "claims must be true or false, got 1"),
        ("mine: {instruction: x, examples: one}", "examples must be a list of texts, got 'one'"),
        ("mine: {instruction: x, lengths: {'5 to 10': 1}}", "a bucket is written <5, 5-10 or >=15, got '5 to 10'"),
        ("mine: {instruction: x, lengths: {'10-5': 1}}", "the bucket '10-5' holds no length"),
        ("mine: {instruction: x, styles: {plain: 0}}", "weights of at least 0, not all 0"),
        ("mine: {instruction: x, styles: [plain]}", "must be names with weights"),
        ("mine: {instruction: x, styles: {plain: .inf}}", "must be names with weights"),
        ("mine: x", "entry 'mine' must be of the form"),
        ("- mine", "must hold entries"),
        ("mine: {", "is not YAML"),
    ],
)
def test_bad_entries_are_named(tasks, text, message):
    path = tasks(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tasks(path)
    assert str(caught.value).startswith(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_tasks(tmp_path / "tasks.yaml")


@pytest.mark.parametrize("bucket", ["5", "<0", "a-b", ">=", "5-10-15"])
def test_no_bucket(bucket):
    with pytest.raises(ValueError, match="bucket"):
        bucket_bounds(bucket)
