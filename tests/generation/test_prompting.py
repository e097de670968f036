from __future__ import annotations

import pytest

from rag_rl.errors import DataError
from rag_rl.generation.prompting import cut_at_stop, fit_batch, fit_passages, prompt_text
from rag_rl.prompts import render_passages
from rag_rl.types import Passage


class Words:
    """Counts words as tokens, and how often each way of counting was used."""

    def __init__(self):
        self.calls = 0
        self.prompts = 0

    def __call__(self, prompts):
        self.calls += 1
        self.prompts += len(prompts)
        return [len(prompt_text(prompt).split()) for prompt in prompts]


def build(kept):
    return [{"role": "user", "content": f"{render_passages(kept)}\nWho rules Elmton ?"}]


PASSAGES = [Passage(f"d{i}", " ".join(f"w{i}{j}" for j in range(10))) for i in range(5)]


def test_what_fits_is_left_alone():
    count = Words()
    fitted = fit_passages(build, PASSAGES, count, 59)
    assert fitted == (build(PASSAGES), PASSAGES, 0)
    assert (count.calls, count.prompts) == (1, 1)


@pytest.mark.parametrize("limit", range(5, 60))
def test_the_longest_prompt_that_fits_is_found(limit):
    count = Words()
    fitted = fit_passages(build, PASSAGES, count, limit)
    length = count([fitted.prompt])[0]
    assert length <= limit
    # A further passage costs its number and at least one word; "(none)" one word.
    assert limit - length <= (2 if limit < 59 else 0)
    assert "Who rules Elmton ?" in prompt_text(fitted.prompt)
    assert [p.doc_id for p in fitted.kept] == [f"d{i}" for i in range(len(fitted.kept))]
    assert all(kept == given for kept, given in zip(fitted.kept[:-1], PASSAGES, strict=False))
    assert fitted.truncated == sum(kept not in fitted.kept for kept in PASSAGES)
    assert fitted.prompt == build(fitted.kept)


def test_the_question_is_never_cut():
    with pytest.raises(DataError, match=r"1 of 2 questions do not fit into 4 prompt tokens.*number 2 \(5 tokens\)"):
        fit_batch([lambda kept: "a b", build], [[], PASSAGES], Words(), 4)


def test_no_passages_and_no_questions():
    assert fit_passages(build, [], Words(), 10).truncated == 0
    assert fit_batch([], [], Words(), 10) == []


def test_ten_thousand_questions_are_counted_once_each():
    count = Words()
    passages = [PASSAGES] * 10_000
    fitted = fit_batch([build] * 10_000, passages, count, 60)
    assert len(fitted) == 10_000
    assert (count.calls, count.prompts) == (1, 10_000)


def test_only_what_is_too_long_costs_more():
    count = Words()
    long = [*PASSAGES, Passage("long", "w " * 500)]
    fitted = fit_batch([build] * 1000, [*[PASSAGES] * 999, long], count, 80)
    assert [one.truncated for one in fitted] == [0] * 999 + [1]
    assert count.prompts < 1000 + 20


def test_with_a_real_tokenizer(model, tokenizer):
    from rag_rl.generation import TransformersGenerator

    generator = TransformersGenerator(model, tokenizer)
    limit = generator.prompt_limit(8)
    passages = [Passage(f"d{i}", "The king took the old road to the river. " * 8) for i in range(6)]
    fitted = fit_passages(build, passages, generator.prompt_tokens, limit)
    assert 0 < fitted.truncated < 6
    assert limit - 5 <= generator.prompt_tokens([fitted.prompt])[0] <= limit
    assert len(generator.generate([fitted.prompt], max_new_tokens=8, temperature=0.0)) == 1


def test_stop_strings_cut_at_the_earliest():
    assert cut_at_stop("a b c", ["c", "b"]) == "a "
    assert cut_at_stop("a b c", ["d"]) is None
    assert cut_at_stop("a b c", []) is None
