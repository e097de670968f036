"""One setup plays the chains of training, evaluation and baselines."""

from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError
from rag_rl.reasoning import StepSetup
from rag_rl.types import Generation, Question

STEPS = [
    "Step 1:\nThe problem analysis: I need the home.\nThe retrieval query: Where does Abe live?",
    "Step 2:\nThe problem analysis: Abe lives in Elmton.\nThe final answer: Elmton",
]


class Writes:
    """Writes given steps, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, **settings):
        self.asked.append((list(prompts), settings))
        return [[Generation(STEPS[len(self.asked) - 1])] for _ in prompts]


@pytest.mark.parametrize(("layout", "roles"), [("turn", ["user"]), ("chat", ["user", "assistant", "user"])])
def test_a_chain_is_played_as_set_up(tiny, layout, roles):
    generator = Writes()
    setup = StepSetup(tiny.retriever, top_k=2, max_steps=3, max_step_tokens=40, layout=layout)
    (chain,) = setup.environment(generator, temperature=0.5, seed=7).rollout(
        [Question("q1", "Where does Abe live?", ("Elmton",))]
    )
    assert chain.state == "correct"
    assert [len(step.hits) for step in chain.steps] == [2, 0]
    (_, settings), (prompts, _) = generator.asked
    assert (settings["max_new_tokens"], settings["temperature"]) == (40, 0.5)
    assert [turn["role"] for turn in prompts[0]] == roles
    assert prompts[0] == setup.prompts(generator).make([chain.before(2).chain])[0].prompt


@pytest.mark.parametrize("name", ["top_k", "max_steps", "max_step_tokens"])
def test_values_out_of_range(tiny, name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        StepSetup(tiny.retriever, **{name: 0})
