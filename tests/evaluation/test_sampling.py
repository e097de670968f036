"""Headroom at the start of a run."""

from __future__ import annotations

import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.sampling import pass_at_k, sample_statistics
from rag_rl.generation import ScriptedGenerator
from rag_rl.types import Generation, Question

QUESTIONS = [Question(f"q{i}", f"{i}?", ("Mira",)) for i in range(4)]


@pytest.fixture
def assembly(tmp_path):
    path = tmp_path / "ask.txt"
    path.write_text("$question", encoding="utf-8")

    def build(*replies):
        return Assembly(retriever=None, generator=ScriptedGenerator(replies), prompt=str(path))

    return build


def test_pass_at_k_by_hand():
    assert pass_at_k([[True, False], [False, False], [True, True], [False, True]]) == 0.75
    assert pass_at_k([[False]]) == 0.0


@pytest.mark.parametrize("samples", [[], [[True], []]])
def test_pass_at_k_of_nothing(samples):
    with pytest.raises(DataError, match="at least one"):
        pass_at_k(samples)


def test_statistics_by_hand(assembly):
    right, wrong = "Answer: the Mira!", "Answer: Orl"
    some = assembly(right, wrong, right, right, wrong, wrong, wrong, "<think>")
    assert sample_statistics(some, QUESTIONS, n=2) == {"pass@2": 0.5, "mean@2": 3 / 8, "zero_variance_groups": 0.75}


def test_all_right_is_no_headroom(assembly):
    stats = sample_statistics(assembly(*["Answer: Mira"] * 32), QUESTIONS)
    assert stats == {"pass@8": 1.0, "mean@8": 1.0, "zero_variance_groups": 1.0}


def test_the_generator_is_told_how_to_sample(assembly):
    class Asking(ScriptedGenerator):
        def generate(self, prompts, **options):
            self.options = options
            return super().generate(prompts, **options)

    generator = Asking(["Answer: Mira"] * 12)
    sample_statistics(assembly().with_generator(generator), QUESTIONS, n=3, temperature=0.7, seed=5)
    assert {key: generator.options[key] for key in ("n", "temperature", "seed")} == {
        "n": 3,
        "temperature": 0.7,
        "seed": 5,
    }


class Failing:
    """Of the samples of some questions, the last one fails."""

    def __init__(self, *questions):
        self.questions = questions

    def generate(self, prompts, *, n, **_):
        good, failed = Generation("Answer: Mira"), Generation("HTTP 400", finish_reason="error")
        return [[good] * (n - 1) + [failed if p[0]["content"] in self.questions else good] for p in prompts]


def test_a_question_with_a_failed_sample_is_left_out(assembly):
    found = sample_statistics(assembly().with_generator(Failing("0?", "2?")), QUESTIONS, n=3)
    assert found == {"pass@3": 1.0, "mean@3": 1.0, "zero_variance_groups": 1.0}
    with pytest.raises(BackendError, match="a sample of each of the 4 questions failed, the first: HTTP 400"):
        sample_statistics(assembly().with_generator(Failing("0?", "1?", "2?", "3?")), QUESTIONS, n=3)


def test_bad_arguments(assembly):
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        sample_statistics(assembly(), QUESTIONS, n=0)
    with pytest.raises(ConfigError, match="above 0"):
        sample_statistics(assembly(), QUESTIONS, temperature=0.0)
    with pytest.raises(DataError, match="no question"):
        sample_statistics(assembly(), [])
