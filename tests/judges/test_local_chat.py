from __future__ import annotations

import asyncio
import json
import threading

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.generation import ScriptedGenerator
from rag_rl.judges import Chat, LLMJudge, LocalChat
from rag_rl.types import Generation, JudgeCase, Verdict


class Recorder:
    """A generator that notes its batches and takes as long as it is told."""

    model = "recorder"

    def __init__(self, wait=lambda: None):
        self.batches = []
        self.threads = set()
        self.settings = []
        self._wait = wait
        self.running = self.most_running = 0

    def generate(self, prompts, *, n=1, **settings):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.batches.append(list(prompts))
        self.threads.add(threading.current_thread().name)
        self.settings.append(settings)
        self._wait()
        self.running -= 1
        return [[Generation(f"re: {prompt}", token_ids=(1, 2), prompt_tokens=5)] for prompt in prompts]


def ask_all(chat, prompts):
    async def all_at_once():
        return [reply.text for reply in await asyncio.gather(*(chat.complete(prompt) for prompt in prompts))]

    return asyncio.run(all_at_once())


def test_what_is_asked_together_is_one_batch():
    generator = Recorder()
    chat = LocalChat(generator, max_new_tokens=9, temperature=0.5, stop=["\n"], seed=4)
    assert isinstance(chat, Chat)
    prompts = [f"p{i}" for i in range(50)]
    assert ask_all(chat, prompts) == [f"re: {prompt}" for prompt in prompts]
    assert generator.batches == [prompts]
    assert generator.settings == [{"max_new_tokens": 9, "temperature": 0.5, "stop": ("\n",), "seed": 4}]
    assert generator.threads == {"local-judge_0"}
    assert chat.batches == 1
    assert (chat.name, chat.model) == ("recorder in this process", "recorder")
    chat.close()


def test_a_batch_is_bounded():
    generator = Recorder()
    chat = LocalChat(generator, max_batch=20)
    ask_all(chat, [f"p{i}" for i in range(50)])
    assert [len(batch) for batch in generator.batches] == [20, 20, 10]
    assert generator.most_running == 1
    chat.close()


def test_what_is_asked_meanwhile_makes_up_the_next_batch():
    started, go_on = threading.Event(), threading.Event()

    def wait():
        started.set()
        assert go_on.wait(10.0)

    generator = Recorder(wait)
    chat = LocalChat(generator)

    async def one_by_one():
        first = asyncio.ensure_future(chat.complete("first"))
        await asyncio.to_thread(started.wait, 10.0)
        rest = []
        for i in range(5):
            rest.append(asyncio.ensure_future(chat.complete(f"p{i}")))
            await asyncio.sleep(0.01)
        go_on.set()
        return [reply.text for reply in await asyncio.gather(first, *rest)]

    assert asyncio.run(one_by_one()) == ["re: first", *(f"re: p{i}" for i in range(5))]
    assert generator.batches == [["first"], [f"p{i}" for i in range(5)]]
    chat.close()


def test_several_loops_take_turns():
    generator = Recorder()
    chat = LocalChat(generator)

    async def both():
        return await asyncio.gather(
            *(asyncio.to_thread(ask_all, chat, [f"{name}{i}" for i in range(9)]) for name in "ab")
        )

    assert asyncio.run(both()) == [[f"re: {name}{i}" for i in range(9)] for name in "ab"]
    assert generator.most_running == 1
    chat.close()


def test_tokens_and_the_end_are_passed_on():
    chat = LocalChat(Recorder())
    reply = asyncio.run(chat.complete("p"))
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == (5, 2, "stop")
    chat.close()


def test_one_caller_that_is_called_off_takes_nobody_along():
    go_on = threading.Event()
    generator = Recorder(lambda: go_on.wait(10.0))
    chat = LocalChat(generator)

    async def impatient():
        patient = asyncio.ensure_future(chat.complete("patient"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(chat.complete("impatient"), 0.05)
        go_on.set()
        return (await patient).text

    assert asyncio.run(impatient()) == "re: patient"
    chat.close()


def test_a_dead_model_fails_its_batch_and_is_no_score():
    class Dead:
        def generate(self, prompts, **settings):
            raise BackendError("the model in this process is out of memory")

    chat = LocalChat(Dead(), model="dead")

    class Rubric:
        name, version = "any", "1"

        def group(self, cases):
            return [[i] for i in range(len(cases))]

        def prompt(self, cases):
            return cases[0].answer

        def parse(self, reply, cases):
            raise AssertionError("there is no reply")

    judge = LLMJudge(chat, Rubric())
    with pytest.raises(BackendError, match="out of memory"):
        asyncio.run(judge.judge([JudgeCase("q", f"a{i}") for i in range(10)]))
    judge.close()
    chat.close()


def test_a_judge_fills_batches_up_to_its_concurrency():
    class Rubric:
        name, version = "echo", "1"

        def group(self, cases):
            return [[i] for i in range(len(cases))]

        def prompt(self, cases):
            return cases[0].answer

        def parse(self, reply, cases):
            return [Verdict(json.loads(reply)["score"])]

    generator = ScriptedGenerator(lambda text, number: json.dumps({"score": int(text) / 100}))
    chat = LocalChat(generator, model="script")
    judge = LLMJudge(chat, Rubric(), concurrency=16)
    verdicts = asyncio.run(judge.judge([JudgeCase("q", str(i)) for i in range(64)]))
    assert verdicts == [Verdict(i / 100) for i in range(64)]
    assert chat.batches == 4
    judge.close()
    chat.close()


def test_with_the_packaged_model():
    """A real model in this process: the reply is what it generates alone, up to the shape of its batch."""
    from rag_rl.generation import TransformersGenerator
    from rag_rl.tiny import FOLDER

    generator = TransformersGenerator.from_pretrained(str(FOLDER / "reader"), device="cpu")
    chat = LocalChat(generator, max_new_tokens=8)
    assert chat.model == str(FOLDER / "reader")
    prompts = [[{"role": "user", "content": f"Judge the answer. Given answer: {name}"}] for name in ("Mira", "Elm")]
    alone = generator.generate(prompts, max_new_tokens=8, temperature=0.0)
    assert ask_all(chat, prompts) == [row[0].text for row in alone]
    assert chat.batches == 1
    chat.close()


def test_models_and_settings_are_told_apart():
    assert LocalChat(ScriptedGenerator([])).model == "ScriptedGenerator"
    assert LocalChat(ScriptedGenerator([]), model="judge-7b").name == "judge-7b in this process"
    settings = [{}, {"max_new_tokens": 5}, {"temperature": 1.0}, {"stop": ["x"]}, {"seed": 1}]
    assert len({LocalChat(Recorder(), **some).fingerprint for some in settings}) == len(settings)


@pytest.mark.parametrize("change", [{"max_new_tokens": 0}, {"max_batch": 0}, {"temperature": -0.1}])
def test_settings_out_of_range(change):
    with pytest.raises(ConfigError, match=r"max_batch must be at least 1|judge_temperature must be 0 or more"):
        LocalChat(Recorder(), **change)
