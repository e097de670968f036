from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError
from rag_rl.rewards.format import format_reward


def test_format_reward() -> None:
    reward = format_reward()
    assert reward.__name__ == "format"
    completions = [
        "Answer: Mira",
        "It lies there.\nAnswer: Mira",
        "<think>hm</think>Answer: Mira",
        [{"role": "assistant", "content": "Answer: Mira"}],
        "Mira",
        "Answer: Mira\nAnswer: Elm",
        "Answer:",
        "<think>Answer: Mira",
        "",
        "Answer: " + "mira " * 17,
    ]
    assert reward(prompts=[""] * 10, completions=completions) == [1.0] * 4 + [0.0] * 6


def test_cap_and_marker() -> None:
    long = "Answer: " + "mira " * 17
    assert format_reward(max_answer_words=None)(prompts=[""], completions=[long]) == [1.0]
    assert format_reward(max_answer_words=1)(prompts=[""] * 2, completions=["Answer: the Mira", long]) == [1.0, 0.0]
    assert format_reward(answer_marker="")(prompts=[""] * 2, completions=["Mira", "Mira\nElm"]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="max_answer_words"):
        format_reward(max_answer_words=0)
