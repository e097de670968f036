from __future__ import annotations

import logging
import socket

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.generation import OpenAIGenerator, ScriptedGenerator
from rag_rl.reasoning import Asker, Failure
from rag_rl.types import Generation


class Flaky:
    """Echoes; a call fails as a whole where a prompt in it is bad, or after ``die()`` always."""

    def __init__(self, bad=()):
        self.bad, self.dead = set(bad), False
        self.calls: list[list[str]] = []

    def generate(self, prompts, **settings):
        assert settings == {"max_new_tokens": 8, "temperature": settings["temperature"], "seed": settings["seed"]}
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        self.calls.append(texts)
        if self.dead or self.bad.intersection(texts):
            raise BackendError("http://reader is in trouble")
        return [[Generation(f"re: {text}")] for text in texts]


def asker(generator, **more):
    return Asker(generator, max_new_tokens=8, **more)


def said(replies):
    return [None if isinstance(reply, Failure) else reply.text for reply in replies]


def test_prompts_are_one_user_turn_or_plain_text():
    generator = ScriptedGenerator(lambda text, number: f"{text}{number}")
    assert said(asker(generator).ask(["a", "b"])) == ["a0", "b1"]
    assert said(asker(generator, chat=False).ask(["c"])) == ["c2"]
    assert generator.prompts == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], "c"]


def test_chats_are_sent_as_they_are():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    generator = ScriptedGenerator(lambda text, number: str(number))
    assert said(asker(generator).ask([talk, list(talk), "a"])) == ["0", "0", "1"]
    assert generator.prompts == [talk, [{"role": "user", "content": "a"}]]


def test_equal_prompts_are_asked_once_when_greedy():
    generator = ScriptedGenerator(lambda text, number: f"{text}{number}")
    assert said(asker(generator).ask(["a", "b", "a", "a"])) == ["a0", "b1", "a0", "a0"]
    assert said(asker(generator, temperature=1.0).ask(["a", "a"])) == ["a2", "a3"]


def test_no_prompts_are_one_empty_call():
    generator = Flaky()
    assert asker(generator).ask([]) == []
    assert generator.calls == [[]], "a collective call is made by every process"


@pytest.mark.parametrize("bad", [{0}, {1}, {63}, {64}, {127}, {5, 6}, {40, 41, 42, 43, 44, 45, 46, 47}, {0, 43, 127}])
def test_accidents_are_told_from_a_broken_backend(bad, caplog):
    texts = [f"p{i}" for i in range(128)]
    generator = Flaky(texts[i] for i in bad)
    replies = asker(generator).ask(texts)
    assert said(replies) == [None if i in bad else f"re: p{i}" for i in range(128)]
    assert {reply.reason for reply in replies if isinstance(reply, Failure)} == {"http://reader is in trouble"}
    assert f"{len(bad)} of 128 prompts failed, the first: http://reader is in trouble" in caplog.text
    alone = [call for call in generator.calls if len(call) == 1 and generator.bad.intersection(call)]
    assert len(alone) == len(bad), "what failed alone is not asked again"
    assert len(generator.calls) <= 12 + 12 * len(bad)


def test_a_dead_backend_is_given_up_after_a_few_calls():
    generator = Flaky()
    generator.dead = True
    with pytest.raises(BackendError, match="http://reader"):
        asker(generator).ask([f"p{i}" for i in range(128)])
    assert [len(call) for call in generator.calls] == [128, 1, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_failures_in_a_row_are_counted_over_calls(size):
    generator, texts = Flaky(), [f"p{i}" for i in range(size)]
    patient = asker(generator, give_up_after=5)
    generator.dead = True
    assert said(patient.ask(texts)) == [None] * size
    generator.dead = False
    assert said(patient.ask(texts)) == [f"re: {text}" for text in texts]
    generator.dead = True
    for _ in range((5 - 1) // size):
        assert said(patient.ask(texts)) == [None] * size, "the reply started the count anew"
    with pytest.raises(BackendError):
        patient.ask(texts)


def test_a_backend_that_dies_in_the_middle():
    generator = Flaky()
    patient = asker(generator)
    patient.ask(["a"])
    generator.dead = True
    with pytest.raises(BackendError):
        patient.ask(["a", "b", "c", "d"])


class Marking:
    """Gives what it is told to for each prompt."""

    def __init__(self, replies):
        self.replies = replies
        self.calls = 0

    def generate(self, prompts, **_):
        self.calls += 1
        return [self.replies[prompt[-1]["content"]] for prompt in prompts]


def test_what_the_generator_marks_has_failed_without_a_second_call(caplog):
    caplog.set_level(logging.WARNING)
    marked = {"a": [Generation("A")], "b": [Generation("HTTP 400", finish_reason="error")], "c": []}
    marked |= {"d": [Generation("", finish_reason="error")], "e": [Generation("")]}
    generator = Marking(marked)
    replies = asker(generator).ask(["b", "c", "d", "a", "e"])
    assert replies[0] == Failure("HTTP 400")
    assert replies[1] == Failure("the generator gave no reply")
    assert isinstance(replies[2], Failure)
    assert said(replies[3:]) == ["A", ""], "an empty text is a reply"
    assert generator.calls == 1
    assert "3 of 5 prompts failed, the first: HTTP 400" in caplog.text


def test_a_generator_that_marks_everything_is_broken():
    patient = asker(Marking({"a": [], "b": [], "c": []}))
    assert said(patient.ask(["a", "b"])) == [None, None]
    with pytest.raises(BackendError, match="Marking gave no reply to 3 prompts in a row"):
        patient.ask(["c"])


def test_an_empty_call_that_fails_raises():
    generator = Flaky()
    generator.dead = True
    with pytest.raises(BackendError):
        asker(generator).ask([])


def test_a_served_model_that_refuses_one_prompt(serve):
    url, asked = serve(lambda text: None if text == "p7" else f"re: {text}")
    generator = OpenAIGenerator("m", base_url=url, max_retries=0)
    texts = [f"p{i}" for i in range(32)]
    replies = asker(generator).ask(texts)
    assert said(replies) == [None if i == 7 else f"re: p{i}" for i in range(32)]
    assert isinstance(replies[7], Failure)
    assert "content filter" in replies[7].reason
    assert asked.count("p7") <= 5
    generator.close()


def test_a_dead_endpoint_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    generator = OpenAIGenerator("m", base_url=f"http://127.0.0.1:{port}/v1", max_retries=1, backoff_s=0.01)
    with pytest.raises(BackendError, match=rf"127\.0\.0\.1:{port}/v1: .*cannot connect"):
        asker(generator).ask([f"p{i}" for i in range(32)])
    generator.close()


def test_give_up_after_out_of_range():
    with pytest.raises(ConfigError, match="give_up_after must be at least 1, got 0"):
        asker(Flaky(), give_up_after=0)
