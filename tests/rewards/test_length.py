from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.rewards.length import length_reward


def test_length_falls_linearly_between_target_and_limit() -> None:
    reward = length_reward(target=10, limit=20)
    assert reward.__name__ == "length"
    lengths = [1, 10, 15, 20, 30]
    scores = reward(
        prompts=[""] * 5, completions=["Answer: Mira"] * 5, completion_ids=[list(range(n)) for n in lengths]
    )
    assert scores == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_no_answer_is_not_a_short_answer() -> None:
    completions = ["", "Answer:", "<think>Answer: Mira", "  "]
    scores = length_reward(target=10, limit=20)(prompts=[""] * 4, completions=completions, completion_ids=[[1]] * 4)
    assert scores == [0.0] * 4


def test_refusals() -> None:
    for target, limit in ((0, 5), (5, 5), (6, 5)):
        with pytest.raises(ConfigError, match="1 <= target < limit"):
            length_reward(target=target, limit=limit)
    with pytest.raises(DataError, match="completion_ids"):
        length_reward(target=1, limit=2)(prompts=[""], completions=["Answer: Mira"])
