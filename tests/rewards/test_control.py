from __future__ import annotations

import math

import pytest

from rag_rl.errors import ConfigError
from rag_rl.rewards.control import constant


def test_constant() -> None:
    assert constant().__name__ == "constant"
    assert constant()(prompts=[""] * 2, completions=["Answer: Mira", ""], answers=[[], []]) == [1.0, 1.0]
    assert constant(-0.5)(prompts=[""], completions=[""]) == [-0.5]
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite"):
            constant(value)
