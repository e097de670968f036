"""Augmentations: one greedy, or several in a single pass."""

from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError
from rag_rl.generation import ScriptedGenerator, TransformersGenerator
from rag_rl.generation.augmenting import QueryAugmenter
from rag_rl.tiny import FOLDER
from rag_rl.types import Generation


class Replies:
    """A generator with replies of every kind, which notes its calls."""

    def __init__(self, *rows):
        self.rows, self.calls = rows, []

    def generate(self, prompts, **options):
        self.calls.append((list(prompts), options))
        return [list(self.rows[i % len(self.rows)]) for i in range(len(prompts))]


def test_what_is_asked():
    generator = ScriptedGenerator(["Mira rules Elmton. "])
    augmenter = QueryAugmenter(generator)
    found = augmenter.augment(["who rules Elmton?"], task_instruction="Find rulers.", answer_type="chronicle")
    assert found == ["Mira rules Elmton."]
    ((message,),) = generator.prompts
    assert message["role"] == "user"
    assert message["content"].startswith("Find rulers.\nWrite a brief chronicle for the following query")
    assert message["content"].endswith("Query: who rules Elmton?")


def test_candidates_are_one_call():
    generator = Replies([Generation("a"), Generation("b"), Generation("c")])
    found = QueryAugmenter(generator, max_new_tokens=20).candidates(["q", "r"], n=3, seed=7)
    assert found == [["a", "b", "c"], ["a", "b", "c"]]
    ((prompts, options),) = generator.calls
    assert len(prompts) == 2
    assert options == {"n": 3, "max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": 7}


def test_what_is_no_augmentation_is_none_and_counted():
    row = [
        Generation("timed out", finish_reason="error"),
        Generation("  "),
        Generation("<think>hm"),
        Generation("<think>hm</think> Mira "),
        Generation("Mira rul", finish_reason="length"),
    ]
    augmenter = QueryAugmenter(Replies(row))
    assert augmenter.candidates(["q"], n=6) == [[None, None, None, "Mira", "Mira rul", None]]
    assert (augmenter.failed, augmenter.cut) == (4, 1)


def test_no_query_asks_nobody():
    augmenter = QueryAugmenter(Replies([]))
    assert (augmenter.augment([]), augmenter.candidates([], n=2)) == ([], [])
    assert augmenter.generator.calls == []


def test_the_tiny_model_writes_pseudo_passages():
    generator = TransformersGenerator.from_pretrained(str(FOLDER / "reader"))
    augmenter = QueryAugmenter(generator, prompt="tiny_passage", max_new_tokens=64)
    queries = ["What does Kelsabert work as?", "Where does Jorobert live?"]
    found = augmenter.candidates(queries, n=12, seed=0)
    assert [len(row) for row in found] == [12, 12]
    assert len({text for row in found for text in row}) > 4
    assert found == augmenter.candidates(queries, n=12, seed=0)
    # The habit of writing about another subject is what training undoes; it is not all that the model does.
    assert any(
        name in (text or "") for name, row in zip(("Kelsabert", "Jorobert"), found, strict=True) for text in row
    )


def test_fingerprint_changes_with_what_is_asked(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Answer: $query")
    prints = {
        QueryAugmenter(Replies(), **options).fingerprint
        for options in ({}, {"max_new_tokens": 5}, {"prompt": str(path)}, {"name": "other"})
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [("Write.", r"no \$query"), ("$query $passage", r"asks for \$passage"), (None, "no such file")],
)
def test_prompts_that_do_not_fit(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        QueryAugmenter(Replies(), prompt=str(path))


@pytest.mark.parametrize("options", [{"n": 1}, {"n": 3, "temperature": 0.0}])
def test_candidates_must_differ(options):
    with pytest.raises(ConfigError, match="candidates must differ"):
        QueryAugmenter(Replies()).candidates(["q"], **options)
