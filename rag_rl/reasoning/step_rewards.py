"""What each step of a chain earns (R3-RAG, arXiv 2505.23794): process scores, scaled by how the chain ended.

=========  ==================================  ==========================  ================
end state  meaning                             a step that searches        the last step
=========  ==================================  ==========================  ================
correct    the final answer is right           1.6 x its process score     2.0
incorrect  the final answer is wrong           0.8 x its process score     0.0
fail       no answer within the step budget    0.9 x its process score     (it searches)
invalid    a step could not be parsed          1.0 x its process score     -0.9
=========  ==================================  ==========================  ================

The outcome reaches earlier steps by these factors only. There is no positive reward for the form; the bad step alone
pays for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from rag_rl.errors import ConfigError

EndState: TypeAlias = Literal["correct", "incorrect", "fail", "invalid"]
"""How a chain ended."""

END_STATES: tuple[EndState, ...] = get_args(EndState)

GOLD_GAIN = "gold_gain"
"""Name of the process score that needs no judge: ``gold_gains``."""

StepScores: TypeAlias = Mapping[str, "float | None"]
"""Process scores of one step in [0, 1] by name: a rubric of ``rag_rl.judges``, or ``GOLD_GAIN``; None: no verdict."""

_EVERY = dict.fromkeys(END_STATES, 1.0)
# Products such as 1.6 * 0.8 are 1.2800000000000002 in binary; the table shall come out as it is written.
_DECIMALS = 9


@dataclass(frozen=True, slots=True)
class StepRewardRule:
    """How process scores and end state become a reward a step.

    A step that searches earns ``base[state] + scale[state] * s``, where s is the weighted sum of its scores; the step
    that answers, or could not be parsed, earns ``final[state]``.

    Attributes:
        weights: of the scores that make up s, by their names; empty where s is not used.
        scale: factor of s by end state.
        final: reward of the last step by end state; of no meaning for "fail".
        base: what a step that searches earns anyway, by end state; 0 where it is missing.
        discount: of each later step's reward in a sum that takes the place of the reward (return-to-go); None for
            the reward itself.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"document_relevance": 1.0})
    scale: Mapping[EndState, float] = field(
        default_factory=lambda: {"correct": 1.6, "incorrect": 0.8, "fail": 0.9, "invalid": 1.0}
    )
    final: Mapping[EndState, float] = field(
        default_factory=lambda: {"correct": 2.0, "incorrect": 0.0, "invalid": -0.9}
    )
    base: Mapping[EndState, float] = field(default_factory=dict)
    discount: float | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The scores that each step that searches must have."""
        return tuple(self.weights)

    def process_score(self, scores: StepScores) -> float | None:
        """Combines the scores of one step.

        Args:
            scores: of the step; those without a weight have no effect.

        Returns:
            Their weighted sum, 0.0 where the rule uses none; None where one of them is missing.
        """
        parts = [(weight, scores.get(name)) for name, weight in self.weights.items()]
        if any(score is None for _, score in parts):
            return None
        return round(sum(weight * score for weight, score in parts if score is not None), _DECIMALS)

    def rewards(self, state: EndState | None, scores: Sequence[StepScores]) -> list[float | None]:
        """Gives each step of a chain its reward.

        Args:
            state: how the chain ended; None where it ended with an answer that nobody could judge.
            scores: of each step that searches, in order.

        Returns:
            One value a step: as many as ``scores``, and one more for the step that answers or could not be parsed.
            None where a part that the rule needs has no verdict; with a discount, for every step before it as well.

        Example:
            >>> STEP_REWARD_RULES["paper"].rewards("correct", [{"document_relevance": 0.6}])
            [0.96, 2.0]
        """
        found: list[float | None] = [self._searching(state, self.process_score(given)) for given in scores]
        if state != "fail":
            found.append(self._for(state, self.final))
        if self.discount is None:
            return found
        for i in reversed(range(len(found) - 1)):
            own, later = found[i], found[i + 1]
            found[i] = None if own is None or later is None else round(own + self.discount * later, _DECIMALS)
        return found

    def _searching(self, state: EndState | None, score: float | None) -> float | None:
        base, scale = self._for(state, self.base), self._for(state, self.scale)
        if base is None or scale is None or score is None:
            return None
        return round(base + scale * score, _DECIMALS)

    @staticmethod
    def _for(state: EndState | None, table: Mapping[EndState, float]) -> float | None:
        if state is not None:
            return table.get(state, 0.0)
        # An answer without a verdict is right or wrong: known is what does not depend on it.
        right, wrong = table.get("correct", 0.0), table.get("incorrect", 0.0)
        return right if right == wrong else None


STEP_REWARD_RULES: Mapping[str, StepRewardRule] = {
    "paper": StepRewardRule(),
    "outcome_only": StepRewardRule(weights={}, scale={}, base={"correct": 2.0}),
    "process_only": StepRewardRule(scale=_EVERY, final={"invalid": -0.9}),
    "return_to_go": StepRewardRule(discount=1.0),
    "coherence": StepRewardRule(
        weights={"reasoning_coherence": 0.3, "query_rationality": 0.3, "document_relevance": 0.4}
    ),
    "gold_gain": StepRewardRule(weights={GOLD_GAIN: 1.0}),
    "constant": StepRewardRule(
        weights={},
        scale={},
        base={"correct": 1.0, "incorrect": 1.0, "fail": 1.0, "invalid": 1.0},
        final={"correct": 1.0, "incorrect": 1.0, "invalid": 1.0},
    ),
}
"""The rules that come with the package: the paper's, its two ablations, and ours.

``outcome_only``: every step of a correct chain earns 2.0. ``process_only``: the score itself, nothing for the answer.
``return_to_go``: each step earns its own reward of the paper and those of all later steps. ``coherence``: the score is
0.3 of the analysis' coherence, 0.3 of the query's rationality and 0.4 of the documents' relevance. ``gold_gain``: the
share of the gold documents that the step was the first to find, without a judge. ``constant``: 1.0 for every step,
however its chain ends: a control experiment, from which nothing can be learnt.
"""


def step_reward_rule(name: str) -> StepRewardRule:
    """Finds a rule.

    Args:
        name: one of ``STEP_REWARD_RULES``.

    Returns:
        The rule; ``dataclasses.replace`` changes parts of it.

    Raises:
        ConfigError: another name.
    """
    if name not in STEP_REWARD_RULES:
        raise ConfigError(f"a step reward is one of {', '.join(STEP_REWARD_RULES)}, got {name!r}")
    return STEP_REWARD_RULES[name]


def gold_gains(found: Sequence[Collection[str]], gold: Collection[str]) -> list[float | None]:
    """Scores searches by what they add to the recall of the gold documents.

    Args:
        found: document ids of each search, in order.
        gold: documents that hold the evidence.

    Returns:
        For each search the share of the gold documents that it was the first to find, in [0, 1]; None where no gold
        document is known.

    Example:
        >>> gold_gains([["d1", "d7"], ["d1"], ["d2"]], ["d1", "d2"])
        [0.5, 0.0, 0.5]
    """
    missing = set(gold)
    total = len(missing)
    gains: list[float | None] = []
    for doc_ids in found:
        new = missing.intersection(doc_ids)
        gains.append(len(new) / total if total else None)
        missing -= new
    return gains
