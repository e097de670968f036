"""What a step model is asked, and what gives way when it is too much."""

from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.reasoning import Chain, Step, StepPrompt, StepPrompts, render_chain
from rag_rl.types import Passage

STEPS = [Step(1, "first analysis", query="one?"), Step(2, "second analysis", query="two?")]
DOCUMENTS = [[Passage("d1", "aa bb cc"), Passage("d2", "dd ee")], [Passage("d3", "ff gg hh ii")]]
CHAIN = Chain("Which river is it?", STEPS, DOCUMENTS)
WHOLE = render_chain(CHAIN.question, STEPS, DOCUMENTS)


class Words:
    """One token a word; counts its calls and the prompts in them."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts):
        self.calls.append(len(prompts))
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return [list(range(len(text.split()))) for text in texts]


def made(limit, chain=CHAIN, **more):
    return StepPrompts(encode=Words(), max_tokens=limit, **more).make([chain])[0]


def test_the_bare_chain_is_the_user_turn():
    (prompt,) = StepPrompts().make([CHAIN])
    assert prompt == StepPrompt(WHOLE, [{"role": "user", "content": WHOLE}])
    (first,) = StepPrompts().make([Chain("Which river is it?")])
    assert first.text == "The question: Which river is it?"


def test_a_base_model_gets_plain_text_that_its_step_follows_on():
    assert StepPrompts(chat=False).make([CHAIN])[0] == StepPrompt(f"{WHOLE}\n", f"{WHOLE}\n")


def test_a_conversation_begins_as_the_one_before():
    """So that a chain is one sequence of tokens, of which each prompt is a beginning."""
    first, second, third = StepPrompts(layout="chat").make(
        [Chain(CHAIN.question, STEPS[:n], DOCUMENTS[:n]) for n in range(3)]
    )
    assert first.prompt == [{"role": "user", "content": "The question: Which river is it?"}]
    assert second.prompt[:1] == first.prompt
    assert third.prompt[:3] == second.prompt
    assert third.prompt[3:] == [
        {"role": "assistant", "content": "Step 2:\nThe problem analysis: second analysis\nThe retrieval query: two?"},
        {"role": "user", "content": "The retrieval documents: [1] ff gg hh ii"},
    ]
    assert "\n".join(turn["content"] for turn in third.prompt) == third.text == WHOLE


def test_documents_of_a_conversation_give_way_oldest_first():
    def encode(prompts):
        return [list(range(sum(len(turn["content"].split()) for turn in prompt))) for prompt in prompts]

    (whole,) = StepPrompts(layout="chat", encode=encode).make([CHAIN])
    (cut,) = StepPrompts(layout="chat", encode=encode, max_tokens=len(whole.ids) - 1).make([CHAIN])
    assert cut.left_out == 1
    assert [turn["role"] for turn in cut.prompt] == [turn["role"] for turn in whole.prompt]
    assert cut.prompt[2]["content"] == "The retrieval documents: [1] aa bb cc"
    assert cut.prompt[4] == whole.prompt[4]


def test_layouts_that_do_not_fit():
    with pytest.raises(ConfigError, match="turn or chat, got 'turns'"):
        StepPrompts(layout="turns")
    with pytest.raises(ConfigError, match="neither prompt files nor a base model"):
        StepPrompts(layout="chat", chat=False)
    with pytest.raises(ConfigError, match="neither prompt files nor a base model"):
        StepPrompts(layout="chat", first="r3_first_step", following="r3_next_step")


def test_teachers_get_their_prompts(tmp_path):
    first, following = tmp_path / "first.txt", tmp_path / "next.txt"
    first.write_text("Begin: $question")
    following.write_text("Go on: $question / $steps")
    prompts = StepPrompts(first=str(first), following=str(following))
    one, two = prompts.make([Chain("Which $river?"), CHAIN])
    assert one.text == "Begin: Which $river?"
    assert two.text == f"Go on: Which river is it? / {WHOLE.partition(chr(10))[2]}"

    following.write_text("$question")
    with pytest.raises(ConfigError, match="needs two prompts"):
        StepPrompts(first=str(first))
    with pytest.raises(ConfigError, match="no such file"):
        StepPrompts(first="no-such", following=str(following))


@pytest.mark.parametrize(
    ("first", "following", "lacking"),
    [
        ("Begin.", "$question $steps", r"\$question"),
        ("$question", "$question", r"\$steps"),
        ("$question", "$steps", "q"),
    ],
)
def test_a_missing_placeholder_is_an_error(tmp_path, first, following, lacking):
    paths = [tmp_path / "first.txt", tmp_path / "next.txt"]
    for path, text in zip(paths, (first, following), strict=True):
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"has no \$?{lacking}"):
        StepPrompts(first=str(paths[0]), following=str(paths[1]))


def test_an_unknown_placeholder_is_an_error(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("$question $steps $context")
    with pytest.raises(ConfigError, match=r"asks for \$context"):
        StepPrompts(first=str(path), following=str(path)).make([CHAIN])


def test_all_prompts_are_encoded_once_in_one_call():
    words = Words()
    prompts = StepPrompts(encode=words, max_tokens=100).make([CHAIN, Chain("Who?")] * 3)
    assert words.calls == [6]
    assert [len(prompt.ids) for prompt in prompts] == [len(WHOLE.split()), 3] * 3
    StepPrompts(encode=words).make([])
    assert words.calls == [6]


def test_the_oldest_documents_go_first_and_the_question_never():
    full = len(WHOLE.split())
    assert made(full) == StepPrompt(WHOLE, [{"role": "user", "content": WHOLE}], tuple(range(full)))
    seen = []
    for limit in range(full - 1, 3, -1):
        try:
            prompt = made(limit)
        except DataError:
            break
        assert len(prompt.ids) <= limit
        assert prompt.text.startswith("The question: Which river is it?")
        shown = tuple(d for d in ("aa bb cc", "dd ee", "ff gg hh ii", "one?", "two?") if d in prompt.text)
        if not seen or seen[-1] != shown:
            seen.append(shown)
    assert seen == [
        ("aa bb cc", "ff gg hh ii", "one?", "two?"),
        ("ff gg hh ii", "one?", "two?"),
        ("one?", "two?"),
        ("two?",),
        (),
    ]
    assert limit == len("The question: Which river is it?".split()) - 1, "the question alone is the last that fits"


def test_what_was_left_out_is_not_what_was_not_found():
    empty = Chain("Which river is it?", STEPS, [DOCUMENTS[0], []])
    text = render_chain(empty.question, STEPS, empty.documents)
    prompt = made(len(text.split()) - 5, empty)
    assert prompt.left_out == 2
    assert "The retrieval documents: (left out)\nStep 2:" in prompt.text
    assert prompt.text.endswith("The retrieval documents: (none)")


def test_a_question_that_is_too_long():
    with pytest.raises(
        DataError, match=r"1 of 2 questions are longer than the 6 tokens .* first 'Which river is it, "
    ):
        StepPrompts(encode=Words(), max_tokens=6).make([Chain("Who?"), Chain("Which river is it, please tell me?")])


def test_settings():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        StepPrompts(encode=Words(), max_tokens=0)
    with pytest.raises(ConfigError, match="does not tell token ids"):
        StepPrompts(max_tokens=10)
