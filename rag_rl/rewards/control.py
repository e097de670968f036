"""A reward that teaches nothing, for control experiments."""

from __future__ import annotations

from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.types import Reward


def constant(value: float = 1.0) -> Reward:
    """Makes a reward that gives every completion the same value: all advantages are zero, so nothing may improve.

    Args:
        value: any finite number.

    Returns:
        The reward, never None.

    Raises:
        ConfigError: ``value`` is not finite.

    Example:
        >>> constant(0.5)(prompts=["q", "q"], completions=["a", ""])
        [0.5, 0.5]
    """
    if not abs(value) < float("inf"):
        raise ConfigError(f"constant reward: the value must be finite, got {value}")

    def reward(*, completions: list[Any], **_: Any) -> list[float | None]:
        return [float(value)] * len(completions)

    reward.__name__ = "constant"
    return reward
