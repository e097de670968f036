"""A reward model as a judge: anything that is a reward, such as a sequence-classification model, behind ``Judge``."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rag_rl.errors import BackendError
from rag_rl.types import JudgeCase, Reward, Verdict


class RewardModelJudge:
    """Verdicts out of a reward function.

    The model itself, its checks and its batches are those of the reward that is given, so that a reward model scores
    the same here and there::

        judge = RewardModelJudge(model_reward("path/or/hub-id", answer_marker=""))

    The reward gets the answers as completions and, as columns, what else the cases hold: ``question``, ``answers``
    (the accepted ones), ``passages``, and every field of ``meta`` that all cases have. It runs in a thread, one call
    at a time, so that judges which wait for a server go on meanwhile.

    Args:
        reward: with values in [0, 1]; it must take the whole completion for the answer (``answer_marker=""``).
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._name = getattr(reward, "__name__", type(reward).__name__)
        self._one_at_a_time = threading.Lock()

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Scores cases.

        Args:
            cases: B cases.

        Returns:
            B verdicts; without a score where the reward gave None.

        Raises:
            BackendError: the reward gave a value outside [0, 1] or the wrong number of values.
        """
        if not cases:
            return []
        values = await asyncio.to_thread(self._score, list(cases))
        if len(values) != len(cases):
            raise BackendError(f"reward {self._name!r} gave {len(values)} values for {len(cases)} cases")
        return [self._verdict(value, case) for value, case in zip(values, cases, strict=True)]

    def _score(self, cases: list[JudgeCase]) -> list[float | None]:
        columns: dict[str, Any] = {
            "question": [case.question for case in cases],
            "answers": [list(case.gold) for case in cases],
            "passages": [list(case.passages) for case in cases],
        }
        for name in _common_keys([case.meta for case in cases]) - columns.keys():
            columns[name] = [case.meta[name] for case in cases]
        with self._one_at_a_time:
            return list(
                self._reward(
                    prompts=[case.question for case in cases], completions=[case.answer for case in cases], **columns
                )
            )

    def _verdict(self, value: float | None, case: JudgeCase) -> Verdict:
        if value is None:
            return Verdict(None, f"{self._name} cannot score this")
        if not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise BackendError(
                f"reward {self._name!r} gave {value} for the answer {case.answer!r:.80}: a judge's score lies in "
                "[0, 1] (of a reward model: set sigmoid to true)"
            )
        return Verdict(float(value), self._name)


def _common_keys(metas: Sequence[Mapping[str, Any]]) -> set[str]:
    # Names that the call itself uses cannot be columns as well.
    return set.intersection(*(set(meta) for meta in metas)) - {"prompts", "completions"}
