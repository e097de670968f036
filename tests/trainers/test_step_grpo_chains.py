from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoTokenizer

from rag_rl.errors import ConfigError
from rag_rl.reasoning import Step, StepEnvironment, render_chain, render_documents, render_step
from rag_rl.tiny import FOLDER
from rag_rl.trainers.step_grpo_chains import ChainWriter, ChatTurns, Continuation, repeated_ngrams
from rag_rl.types import Hit, Passage, Question

QUESTION = Question("q1", "Which river is the home of Falbert on?", ("Mirbrook",), ("d1", "d2"))
STEPS = [
    Step(1, "I need the home of Falbert.", query="Where does Falbert live?"),
    Step(2, "Falbert lives in Elmton.", query="Which river is Elmton on?"),
    Step(3, "Elmton lies on the Mirbrook.", answer="Mirbrook"),
]
FOUND = {
    "Where does Falbert live?": [Passage("d1", "Falbert lives in Elmton."), Passage("d3", "Nobody lives there.")],
    "Which river is Elmton on?": [Passage("d2", "It lies on the Mirbrook.", title="Elmton")],
}
# As Qwen2.5 has it: a system turn that nobody asked for.
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3 has it: something before everything, headers, and no line break behind a turn.
HEADERS = (
    "<|begin|>{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# As templates of thinking models have it: the last turn of the assistant shows a thinking part, earlier ones do not.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


class Shelf:
    """Finds what is planned for a query."""

    def search(self, queries, *, top_k, exclude=None):
        left_out = exclude or [()] * len(queries)
        return [
            [Hit(p, 1.0, rank) for rank, p in enumerate(FOUND[query.text], start=1) if p.doc_id not in gone][:top_k]
            for query, gone in zip(queries, left_out, strict=True)
        ]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "reader")


@pytest.fixture
def turns(tokenizer):
    return ChatTurns(tokenizer, end_ids={tokenizer.eos_token_id})


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def play(turns, written, *, max_tokens=10_000, max_step_tokens=64, max_steps=5, questions=(QUESTION,)):
    """Plays questions whose steps are given as token ids; each call writes the next step of every running chain."""
    steps = iter(written)
    asked = []

    def go_on(rows):
        asked.append([list(row) for row in rows])
        return [Continuation(next(steps)) for _ in rows]

    writer = ChainWriter(turns, go_on, max_step_tokens=max_step_tokens, max_tokens=max_tokens)
    environment = StepEnvironment(writer, Shelf(), top_k=3, max_steps=max_steps)
    trajectories = environment.rollout(questions)
    return trajectories, [writer.sequence(trajectory) for trajectory in trajectories], asked


def ids_of(tokenizer, step, *, end=True):
    return tokenizer(render_step(step))["input_ids"] + [tokenizer.eos_token_id] * end


@pytest.mark.parametrize("template", [None, SYSTEM_FIRST, HEADERS], ids=["packaged", "system", "headers"])
def test_a_chain_is_what_the_template_gives_for_the_conversation(tokenizer, template):
    if template is not None:
        tokenizer = with_template(tokenizer, template)
    turns = ChatTurns(tokenizer, end_ids={tokenizer.eos_token_id})
    ((trajectory,), (chain,), asked) = play(turns, [ids_of(tokenizer, step) for step in STEPS])
    assert trajectory.state == "correct"
    conversation = [{"role": "user", "content": render_chain(QUESTION.question, (), ())}]
    for step in STEPS:
        conversation.append({"role": "assistant", "content": render_step(step)})
        if step.query:
            conversation.append({"role": "user", "content": render_documents(FOUND[step.query])})
    whole = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    made = chain.prompt_ids + chain.completion_ids
    assert made == whole[: len(made)]
    assert tokenizer.decode(whole[len(made) :]).strip() == "", "nothing is missing but what follows the last turn"
    assert not turns.rewrites
    # Each call went on from everything before it.
    assert asked[0] == [chain.prompt_ids]
    assert asked[2][0] == made[: len(asked[2][0])]
    sampled = [ids_of(tokenizer, step) for step in STEPS]
    for number, ids in enumerate(sampled, start=1):
        assert [token for token, step in zip(chain.completion_ids, chain.steps, strict=True) if step == number] == ids
    injected = [token for token, step in zip(chain.completion_ids, chain.steps, strict=True) if step == 0]
    assert "The retrieval documents: [1] Falbert lives in Elmton. [2] Nobody lives there." in tokenizer.decode(
        injected
    )
    assert "The retrieval query" not in tokenizer.decode(injected)


def test_sampled_tokens_are_kept_as_they_were_sampled(tokenizer, turns):
    letters = [
        [i for letter in render_step(step) for i in tokenizer(letter)["input_ids"]] + [tokenizer.eos_token_id]
        for step in STEPS
    ]
    assert letters[0] != ids_of(tokenizer, STEPS[0]), "another way to write the same text"
    ((trajectory,), (chain,), _) = play(turns, letters)
    assert trajectory.state == "correct"
    for number, ids in enumerate(letters, start=1):
        assert [token for token, step in zip(chain.completion_ids, chain.steps, strict=True) if step == number] == ids


def test_a_turn_that_ran_into_its_budget_is_ended_for_the_model(tokenizer, turns):
    cut = ids_of(tokenizer, STEPS[0], end=False)
    ((trajectory,), (chain,), _) = play(turns, [cut, *(ids_of(tokenizer, step) for step in STEPS[1:])])
    assert (trajectory.steps[0].finish_reason, trajectory.steps[1].finish_reason) == ("length", "stop")
    assert chain.completion_ids[: len(cut) + 1] == [*cut, tokenizer.eos_token_id]
    assert chain.steps[: len(cut) + 1] == [1] * len(cut) + [0]


def test_chains_of_different_lengths_share_their_calls(tokenizer, turns):
    answer = Step(1, "I know it.", answer="Mirbrook")
    invalid = tokenizer("Hm.")["input_ids"] + [tokenizer.eos_token_id]
    first = [ids_of(tokenizer, answer), ids_of(tokenizer, STEPS[0]), invalid]
    later = [ids_of(tokenizer, step) for step in STEPS[1:]]
    trajectories, chains, asked = play(turns, first + later, questions=(QUESTION,) * 3)
    assert [t.state for t in trajectories] == ["correct", "correct", "invalid"]
    assert [len(rows) for rows in asked] == [3, 1, 1]
    assert [max(chain.steps) for chain in chains] == [1, 3, 1]
    assert chains[2].completion_ids == invalid
    assert chains[2].steps == [1] * len(invalid)


def room_for(tokenizer, turns, documents):
    """Tokens of a chain with one searching step of STEPS and these documents."""
    text = render_documents(documents, **({} if documents else {"empty": "(left out)"}))
    (injected,) = turns.between([text])
    return len(ids_of(tokenizer, STEPS[0])) + len(injected)


def test_the_lowest_ranked_documents_give_way(tokenizer, turns):
    both = FOUND[STEPS[0].query]
    for kept in (2, 1, 0):
        limit = room_for(tokenizer, turns, both[:kept]) + 64
        ((trajectory,), (chain,), _) = play(
            turns, [ids_of(tokenizer, STEPS[0]), ids_of(tokenizer, Step(2, "So.", answer="no"))], max_tokens=limit
        )
        injected = [token for token, step in zip(chain.completion_ids, chain.steps, strict=True) if step == 0]
        text = render_documents(both[:kept]) if kept else "The retrieval documents: (left out)"
        assert text + "<|im_end|>" in tokenizer.decode(injected)
        assert trajectory.steps[1].left_out == 2 - kept
        assert trajectory.steps[0].hits == [
            hit for (found,) in [Shelf().search([query_of(STEPS[0])], top_k=3)] for hit in found
        ]
        assert len(chain.completion_ids) <= limit


def query_of(step):
    from rag_rl.types import Query

    return Query(step.query)


def test_no_room_for_another_step_is_a_failed_chain(tokenizer, turns):
    limit = room_for(tokenizer, turns, []) + 64 - 1
    ((trajectory,), (chain,), asked) = play(turns, [ids_of(tokenizer, STEPS[0])], max_tokens=limit)
    assert trajectory.state == "fail"
    assert asked[-1] == [], "processes go on together: the call is made, with nothing in it"
    assert chain.completion_ids == ids_of(tokenizer, STEPS[0])


def test_no_answer_within_the_steps_is_a_failed_chain(tokenizer, turns):
    ((trajectory,), (chain,), _) = play(turns, [ids_of(tokenizer, step) for step in STEPS[:2]], max_steps=2)
    assert trajectory.state == "fail"
    assert chain.completion_ids[-1] == tokenizer.eos_token_id
    assert chain.steps[-1] == 2


def test_a_chain_without_steps_is_not_empty(tokenizer, turns):
    from rag_rl.reasoning import StepTrajectory

    writer = ChainWriter(turns, lambda rows: [], max_step_tokens=8, max_tokens=64)
    chain = writer.sequence(StepTrajectory(QUESTION, failure="lost"))
    assert (chain.completion_ids, chain.steps) == ([tokenizer.eos_token_id], [0])
    assert chain.prompt_ids == turns.first([QUESTION.question])[0]


def test_log_probs_stand_beside_what_was_sampled(tokenizer, turns):
    rows = iter([ids_of(tokenizer, step) for step in STEPS])

    def go_on(asked):
        found = [next(rows) for _ in asked]
        return [Continuation(ids, [-float(i) for i in range(len(ids))]) for ids in found]

    writer = ChainWriter(turns, go_on, max_step_tokens=64, max_tokens=10_000)
    chain = writer.sequence(StepEnvironment(writer, Shelf()).rollout([QUESTION])[0])
    assert len(chain.log_probs) == len(chain.completion_ids)
    for number, step in enumerate(STEPS, start=1):
        own = [value for value, of in zip(chain.log_probs, chain.steps, strict=True) if of == number]
        assert own == [-float(i) for i in range(len(ids_of(tokenizer, step)))]
    assert {value for value, of in zip(chain.log_probs, chain.steps, strict=True) if of == 0} == {0.0}


def test_a_template_that_rewrites_what_was_said(tokenizer):
    turns = ChatTurns(with_template(tokenizer, THINKING), end_ids={tokenizer.eos_token_id})
    assert turns.rewrites
    assert (
        tokenizer.decode(turns.between(["D"])[0])
        == "\n<|im_start|>user\nD<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "does not end the model's turns"),
    ],
)
def test_templates_that_make_no_sequence(tokenizer, template, message):
    with pytest.raises(ConfigError, match=message):
        ChatTurns(with_template(tokenizer, template), end_ids={tokenizer.eos_token_id})


def test_nothing_to_render(turns):
    assert turns.between([]) == turns.first([]) == []


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [([1, 2, 3, 4, 5], 4, 0.0), ([7] * 8, 4, 0.8), ([1, 2, 1, 2, 1, 2], 2, 0.6), ([1, 2, 3], 4, None), ([], 1, None)],
)
def test_repeated_ngrams(ids, n, share):
    assert repeated_ngrams(ids, n) == (None if share is None else pytest.approx(share))
