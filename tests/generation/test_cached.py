from __future__ import annotations

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.generation import ScriptedGenerator
from rag_rl.generation.cached import CachedGenerator
from rag_rl.types import Generation, Generator


def texts(generator, prompts, **more):
    rows = generator.generate(prompts, **{"max_new_tokens": 4, "temperature": 0.0, **more})
    return [[one.text for one in row] for row in rows]


def numbered(**more):
    """Every reply that is really asked for has a number of its own."""
    inner = ScriptedGenerator(lambda text, number: f"{text}{number}")
    return inner, CachedGenerator(inner, **more)


def test_a_prompt_is_asked_once_in_a_call_and_over_calls():
    inner, cached = numbered()
    assert isinstance(cached, Generator)
    assert texts(cached, ["a", "b", "a"]) == [["a0"], ["b1"], ["a0"]]
    assert texts(cached, ["c", "b", "a"]) == [["c2"], ["b1"], ["a0"]]
    assert inner.prompts == ["a", "b", "c"]
    assert (cached.hits, cached.misses) == (3, 3)
    assert texts(cached, []) == []


def test_greedy_copies_are_asked_for_once():
    inner, cached = numbered()
    assert texts(cached, ["a"], n=3) == [["a0"] * 3]
    assert texts(cached, ["a"], n=2) == [["a0"] * 2]
    assert inner.prompts == ["a"]


def test_what_a_reply_depends_on_is_in_the_key():
    _, cached = numbered()
    chat = [{"role": "user", "content": "a"}]
    calls = [(["a"], {}), (["a"], {"max_new_tokens": 5}), (["a"], {"stop": ["."]}), ([chat], {})]
    assert [texts(cached, prompts, **more) for prompts, more in calls] == [[["a0"]], [["a1"]], [["a2"]], [["a3"]]]
    # Greedy replies do not depend on these.
    assert texts(cached, ["a"], seed=7, top_p=0.5) == [["a0"]]


def test_sampled_replies_are_never_remembered():
    inner, cached = numbered()
    assert texts(cached, ["a", "a"], n=2, temperature=1.0) == [["a0", "a1"], ["a2", "a3"]]
    assert texts(cached, ["a"], temperature=1.0) == [["a4"]]
    assert texts(cached, ["a"]) == [["a5"]]
    assert (cached.hits, cached.misses) == (0, 1)
    assert len(inner.prompts) == 4


def test_the_least_used_replies_are_forgotten():
    inner, cached = numbered(max_in_memory=2)
    texts(cached, ["a", "b"])
    texts(cached, ["a"])
    texts(cached, ["c"])
    assert texts(cached, ["a", "c"]) == [["a0"], ["c2"]]
    assert texts(cached, ["b"]) == [["b3"]]
    # A call larger than the memory is answered whole.
    assert texts(cached, ["v", "w", "x", "y"]) == [["v4"], ["w5"], ["x6"], ["y7"]]
    assert inner.prompts == ["a", "b", "c", "b", "v", "w", "x", "y"]


class Troubled:
    """Fails, marks or leaves out what it is told to; else says "fine"."""

    def __init__(self):
        self.trouble: str | None = None
        self.asked = 0

    def generate(self, prompts, **_):
        self.asked += len(prompts)
        if self.trouble == "raise":
            raise BackendError("http://nowhere is down")
        replies = {None: [Generation("fine")], "mark": [Generation("", finish_reason="error")], "nothing": []}
        return [replies[self.trouble] if prompt == "b" else [Generation("fine")] for prompt in prompts]


@pytest.mark.parametrize("trouble", ["raise", "mark", "nothing"])
def test_a_failure_is_not_remembered(trouble):
    inner = Troubled()
    cached = CachedGenerator(inner)
    inner.trouble = trouble
    if trouble == "raise":
        with pytest.raises(BackendError, match="http://nowhere"):
            texts(cached, ["a", "b"])
    else:
        assert texts(cached, ["a", "b"]) == [["fine"], [""] if trouble == "mark" else []]
    inner.trouble = None
    assert texts(cached, ["a", "b"]) == [["fine"], ["fine"]]
    assert inner.asked == (4 if trouble == "raise" else 3)


def test_a_real_model_gives_the_same_replies(model, tokenizer):
    from rag_rl.generation import TransformersGenerator

    plain = TransformersGenerator(model, tokenizer)
    prompts = ["Who rules Elmton?", "Where?", "Who rules Elmton?"]
    cached = CachedGenerator(plain)
    rows = cached.generate(prompts, max_new_tokens=6, temperature=0.0)
    assert rows == plain.generate(prompts, max_new_tokens=6, temperature=0.0)
    assert cached.generate(prompts, max_new_tokens=6, temperature=0.0) == rows
    assert (cached.hits, cached.misses) == (4, 2)


def test_values_out_of_range():
    with pytest.raises(ConfigError, match="max_in_memory must be at least 1, got 0"):
        numbered(max_in_memory=0)
    with pytest.raises(ConfigError, match="n must be at least 1, got 0"):
        texts(numbered()[1], ["a"], n=0)
