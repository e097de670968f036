"""Rewards for answers over retrieved context: factories of TRL reward functions, and the rule that combines them.

Each factory gives a function that takes keyword arguments only (``completions``, the dataset's columns as lists, and
whatever else the trainer passes) and returns one value, or None for "cannot be scored", a completion.

Factories whose plain name is that of their module or of a Python function end in ``_reward``.
"""

from __future__ import annotations

from rag_rl.rewards.answer import ABSTENTION, abstains, contains_em, em, f1
from rag_rl.rewards.citation import citation_reward
from rag_rl.rewards.combine import RewardPart, combine, score_parts, weighted_sum
from rag_rl.rewards.control import constant
from rag_rl.rewards.format import format_reward
from rag_rl.rewards.groundedness import groundedness_reward
from rag_rl.rewards.judged import judged_reward
from rag_rl.rewards.length import length_reward
from rag_rl.rewards.preference import preference_pairs, published_pairs, retrieval_signal
from rag_rl.rewards.reward_model import model_reward

__all__ = [
    "ABSTENTION",
    "RewardPart",
    "abstains",
    "citation_reward",
    "combine",
    "constant",
    "contains_em",
    "em",
    "f1",
    "format_reward",
    "groundedness_reward",
    "judged_reward",
    "length_reward",
    "model_reward",
    "preference_pairs",
    "published_pairs",
    "retrieval_signal",
    "score_parts",
    "weighted_sum",
]
