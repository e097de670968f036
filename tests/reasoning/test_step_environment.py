"""Chains: one call a step over all that go on, what is shown to whom, how chains end, and going on from the middle."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.generation import ScriptedGenerator
from rag_rl.reasoning import (
    Environment,
    Step,
    StepEnvironment,
    StepRecord,
    StepTrajectory,
    StepWriter,
    TopK,
    parse_step,
    render_chain,
    step_statistics,
)
from rag_rl.retrieval import StaticRetriever
from rag_rl.tiny import FOLDER
from rag_rl.types import Generation, Hit, Passage, Question

D = {name: Passage(name, f"Text of {name}.") for name in ("d1", "d2", "d3", "d4", "d5", "d6")}
RETRIEVER = StaticRetriever({"nothing?": []}, default=list(D.values()))
HOME = Question("q1", "Which river is the home of Falbert on?", ("Mirbrook", "the Mir"), ("d1", "d3"))
OTHER = Question("q2", "Who rules Elmton?", ("Mira",), ("d2",))


def query(number, text="one?"):
    return f"Step {number}:\nThe problem analysis: analysis {number}\nThe retrieval query: {text}"


def answer(number, text="Mirbrook"):
    return f"Step {number}:\nThe problem analysis: analysis {number}\nThe final answer: {text}"


class Plan:
    """Writes what a plan says for a question, step by step; refuses prompts on schedule."""

    def __init__(self, plan):
        self.plan, self.calls, self.prompts = plan, [], []

    def generate(self, prompts, *, n=1, max_new_tokens, temperature, top_p=1.0, stop=(), seed=None):
        self.calls.append((len(prompts), temperature, seed))
        rows = []
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            self.prompts.append(text)
            asked = text.splitlines()[0].removeprefix("The question: ")
            said = self.plan[asked].pop(0)
            rows.append([Generation("refused", finish_reason="error")] if said is None else [Generation(said)])
        return rows


def environment(plan, *, top_k=2, max_steps=5, **more):
    generator = Plan({question.question: list(said) for question, said in plan})
    settings = {name: more.pop(name) for name in ("judged",) if name in more}
    return StepEnvironment(StepWriter(generator, **more), RETRIEVER, top_k=top_k, max_steps=max_steps, **settings)


def shown(trajectory):
    return [[hit.passage.doc_id for hit in record.hits] for record in trajectory.steps]


def test_a_chain_from_the_question_to_the_answer():
    world = environment([(HOME, [query(1), query(2, "two?"), answer(3, "the Mirbrook.")])])
    (found,) = world.rollout([HOME])
    assert (found.state, found.answer, found.failure) == ("correct", "the Mirbrook.", None)
    assert [record.step for record in found.steps] == [
        Step(1, "analysis 1", query="one?"),
        Step(2, "analysis 2", query="two?"),
        Step(3, "analysis 3", answer="the Mirbrook."),
    ]
    assert shown(found) == [["d1", "d2"], ["d3", "d4"], []], "what was shown is not found again"
    generator = world.writer._asker.generator
    assert generator.prompts == [
        "The question: Which river is the home of Falbert on?",
        render_chain(HOME.question, [found.steps[0].step], [[D["d1"], D["d2"]]]),
        render_chain(HOME.question, [r.step for r in found.steps[:2]], [[D["d1"], D["d2"]], [D["d3"], D["d4"]]]),
    ]
    assert [record.prompt[-1]["content"] for record in found.steps] == generator.prompts
    assert not found.is_open


def test_one_call_a_step_and_one_search_over_all_that_go_on():
    calls = []

    class Counting(StaticRetriever):
        def search(self, queries, *, top_k, exclude=None):
            calls.append((len(queries), exclude))
            return super().search(queries, top_k=top_k, exclude=exclude)

    generator = Plan({HOME.question: [query(1), answer(2)], OTHER.question: [answer(1, "Mira")]})
    retriever = Counting({}, default=list(D.values()))
    first, second = StepEnvironment(StepWriter(generator), retriever, top_k=1).rollout([HOME, OTHER])
    assert (first.state, second.state) == ("correct", "correct")
    assert [size for size, _, _ in generator.calls] == [2, 1]
    assert calls == [(1, None)], "nothing to leave out: a retriever that knows no exclude will do"


def test_only_what_was_parsed_goes_on():
    said = f"<think>hm</think>Well.\n{query(1)}\nJunk."
    world = environment([(HOME, [said, answer(2)])])
    (found,) = world.rollout([HOME])
    assert found.steps[0].text == said
    assert "Junk" not in found.steps[1].prompt[-1]["content"]


@pytest.mark.parametrize(
    ("said", "state", "searches"),
    [
        ([query(1), answer(2, "Kelsabeck")], "incorrect", 1),
        ([answer(1, "the Mir")], "correct", 0),
        ([query(n) for n in range(1, 4)], "fail", 3),
        ([query(1), "no step"], "invalid", 1),
        ([query(2)], "invalid", 0),
        (["<think>" + query(1)], "invalid", 0),
    ],
)
def test_end_states(said, state, searches):
    (found,) = environment([(HOME, said)], max_steps=3).rollout([HOME])
    assert (found.state, len(found.searches)) == (state, searches)
    assert len(found.steps) == len(said)
    assert (found.steps[-1].step is None) == (state == "invalid") == bool(found.steps[-1].problem)
    assert (found.answer is None) == (state in ("fail", "invalid"))
    assert all(record.hits for record in found.searches), "the last query is searched for as well"


def test_answers_that_nobody_can_judge_have_no_state():
    bare = replace(HOME, answers=())
    (found,) = environment([(bare, [answer(1)])]).rollout([bare])
    assert (found.state, found.answer, found.is_open) == (None, "Mirbrook", False)
    lenient = environment([(HOME, [answer(1, "x")])], judged=lambda trajectory: trajectory.answer == "x")
    assert lenient.rollout([HOME])[0].state == "correct"


def test_a_refused_call_drops_its_chain_only():
    first, second = environment([(HOME, [query(1), None]), (OTHER, [query(1), answer(2, "Mira")])]).rollout(
        [HOME, OTHER]
    )
    assert (first.state, first.failure, len(first.steps), first.is_open) == (None, "refused", 1, False)
    assert second.state == "correct"
    with pytest.raises(BackendError, match="gave no reply"):
        environment([(HOME, [None] * 9), (OTHER, [None] * 9)], give_up_after=2).rollout([HOME, OTHER])


def test_an_invalid_step_is_written_anew():
    world = environment([(HOME, ["no", "neither", query(1), answer(2)]), (OTHER, [answer(1)])], tries=3, seed=7)
    first, second = world.rollout([HOME, OTHER])
    assert (first.state, second.state) == ("correct", "incorrect")
    assert (first.steps[0].rejected, first.steps[1].rejected) == (("no", "neither"), ())
    assert world.writer._asker.generator.calls == [(2, 1.0, 7), (1, 1.0, 8), (1, 1.0, 9), (1, 1.0, 10)]
    (given_up,) = environment([(HOME, ["a", "b"])], tries=2).rollout([HOME])
    assert (given_up.state, given_up.steps[0].text, given_up.steps[0].rejected) == ("invalid", "b", ("a",))
    (greedy,) = environment([(HOME, ["a", query(1)])], tries=2, temperature=0.0).rollout([HOME])
    assert greedy.state == "invalid", "it would only be written again"


def test_every_rank_makes_the_same_calls():
    told = []

    def on_any(flag):
        told.append(flag)
        return flag or len(told) < 3

    generator = Plan({HOME.question: [query(1), answer(2)]})
    StepEnvironment(StepWriter(generator, tries=3, synchronised=on_any), RETRIEVER).rollout([HOME])
    assert [size for size, _, _ in generator.calls] == [1, 0, 0, 1]


def test_going_on_from_the_middle_leaves_the_beginning_as_it_was():
    (whole,) = environment([(HOME, [query(1), query(2), query(3)])], max_steps=3).rollout([HOME])
    assert whole.state == "fail"
    world = environment([(HOME, [answer(2), answer(3, "Elm")]), (OTHER, [query(1), answer(2, "Mira")])], max_steps=3)
    states = [whole.before(2), StepTrajectory(OTHER), whole.before(3), whole]
    two, one, three, same = world.roll_on(states)
    assert same is whole
    assert [len(t.steps) for t in states] == [1, 0, 2, 3]
    assert (two.state, [r.number for r in two.steps], two.steps[0]) == ("correct", [1, 2], whole.steps[0])
    assert (one.state, three.state, three.answer) == ("correct", "incorrect", "Elm")
    assert shown(three) == [["d1", "d2"], ["d3", "d4"], []]
    assert [size for size, _, _ in world.writer._asker.generator.calls] == [3, 1]
    exhausted = environment([(HOME, [])], max_steps=1)
    (ended,) = exhausted.roll_on([whole.before(2)])
    assert (ended.state, len(ended.steps)) == ("fail", 1), "its steps count"


def test_steps_that_were_written_elsewhere():
    world = environment([(HOME, [answer(3)])], max_steps=3)
    begun = StepTrajectory(HOME)
    taken = world.take([begun] * 4, [query(1), answer(1, "Elm"), "no", query(1, "nothing?")])
    assert [t.state for t in taken] == [None, "incorrect", "invalid", None]
    assert [t.is_open for t in taken] == [True, False, False, True]
    assert [shown(t) for t in taken] == [[["d1", "d2"]], [[]], [[]], [[]]]
    assert (taken[0].steps[0].prompt, begun.steps) == (None, [])
    (second,) = world.take(taken[:1], [query(2)])
    assert shown(second) == [["d1", "d2"], ["d3", "d4"]]
    assert world.roll_on([second])[0].state == "correct"
    (last,) = world.take([second], [query(3)])
    assert (last.state, shown(last)[2]) == ("fail", ["d5", "d6"])
    assert world.take([], []) == []
    with pytest.raises(ConfigError, match="has ended"):
        world.take([last], [query(4)])


def test_a_base_model_and_a_bounded_prompt():
    class Tokens(Plan):
        def encode(self, prompts):
            return [list(range(len(prompt.split()))) for prompt in prompts]

        def prompt_limit(self, max_new_tokens):
            return 40 - max_new_tokens

    generator = Tokens({HOME.question: [query(1), query(2), answer(3)]})
    writer = StepWriter(generator, generator_type="base", max_new_tokens=8, max_prompt_tokens=35)
    (found,) = StepEnvironment(writer, RETRIEVER, top_k=2).rollout([HOME])
    assert writer.prompts.max_tokens == 32
    assert [record.left_out for record in found.steps] == [0, 0, 4]
    assert all(record.prompt_ids == tuple(range(len(record.prompt.split()))) for record in found.steps)
    assert generator.prompts[2].startswith(f"The question: {HOME.question}\nStep 2:\n")
    assert generator.prompts[2].endswith("\nThe retrieval documents: (left out)\n")
    with pytest.raises(DataError, match="even without any steps"):
        StepEnvironment(StepWriter(generator, generator_type="base", max_new_tokens=34), RETRIEVER).rollout([HOME])


def test_the_writer_is_a_reader_of_the_other_environment():
    generator = ScriptedGenerator([query(1), answer(2)])
    (played,) = Environment(StepWriter(generator), max_hops=3).rollout([HOME], TopK(RETRIEVER, 2))
    assert (played.answer, len(played.hops), played.hops[0].query.text) == ("Mirbrook", 1, "one?")


def test_settings():
    with pytest.raises(ConfigError, match="tries must be at least 1, got 0"):
        StepWriter(ScriptedGenerator([]), tries=0)
    with pytest.raises(ConfigError, match="max_steps must be at least 1, got 0"):
        StepEnvironment(StepWriter(ScriptedGenerator([])), RETRIEVER, max_steps=0)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        StepEnvironment(StepWriter(ScriptedGenerator([])), RETRIEVER, top_k=0)


def test_statistics():
    hit = Hit(D["d1"], 1.0, 1)
    steps = [
        StepRecord(1, query(1), parse_step(query(1)).step, hits=[hit]),
        StepRecord(2, f"Well.\n{answer(2)}", parse_step(answer(2)).step, rejected=("no",), left_out=1),
    ]
    bad = [StepRecord(1, "no", None, "why")]
    chains = [
        StepTrajectory(HOME, steps, "correct"),
        StepTrajectory(HOME, bad, "invalid"),
        StepTrajectory(HOME, [], failure="refused"),
    ]
    assert step_statistics(chains) == {
        "dropped": pytest.approx(1 / 3),
        "correct": 0.5,
        "incorrect": 0.0,
        "fail": 0.0,
        "invalid": 0.5,
        "steps": 1.5,
        "searches": 0.5,
        "no_search": 0.5,
        "format": 0.25,
        "invalid_steps": 0.5,
        "analysis_words": 2.0,
        "left_out": pytest.approx(1 / 3),
    }
    assert set(step_statistics([]).values()) == {None}


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from rag_rl.generation import TransformersGenerator

    return TransformersGenerator.from_pretrained(str(FOLDER / "reader"), device="cpu", batch_size=64)


def test_the_packaged_model_plays_and_nothing_has_to_be_tokenised_again(tiny, reader):
    asked = tiny.questions[:32]
    greedy = StepEnvironment(StepWriter(reader, max_new_tokens=64, temperature=0.0), tiny.retriever, max_steps=4)
    assert any(t.state == "correct" and t.searches for t in greedy.rollout(asked))
    writer = StepWriter(reader, max_new_tokens=64, seed=1)
    found = StepEnvironment(writer, tiny.retriever, top_k=3, max_steps=3).rollout(asked)
    assert [t.question for t in found] == asked
    assert {t.state for t in found} <= {"correct", "incorrect", "fail", "invalid"}
    records = [record for t in found for record in t.steps]
    assert any(record.number > 1 for record in records)
    for record in records:
        assert list(record.prompt_ids) == reader.encode([record.prompt])[0]
        written = reader.tokenizer.decode(record.completion_ids, skip_special_tokens=True)
        assert written == record.text
        assert record.completion_ids[-1] == reader.tokenizer.eos_token_id or record.finish_reason == "length"
    for trajectory in found:
        ids = [doc_id for listed in shown(trajectory) for doc_id in listed]
        assert len(ids) == len(set(ids))
    again = StepEnvironment(StepWriter(reader, max_new_tokens=64, seed=1), tiny.retriever, max_steps=3).rollout(asked)
    assert [[r.text for r in t.steps] for t in again] == [[r.text for r in t.steps] for t in found]
    statistics = step_statistics(found)
    assert 0.2 < statistics["format"] < 0.95, "it has habits to lose"
