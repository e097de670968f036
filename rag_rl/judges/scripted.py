"""A judge that decides as it was told to: for tests, docs and dry runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from rag_rl.errors import DataError
from rag_rl.types import JudgeCase, Verdict

Scripted: TypeAlias = "float | Verdict | None"
"""A verdict, or its score alone."""


class ScriptedJudge:
    """Verdicts from a script, in place of a model.

    Args:
        script: one of

            - a mapping from the answer to the verdict;
            - a sequence of verdicts, used up in order over all calls;
            - a function of the case.

    Attributes:
        cases: every case that was judged so far, in order.

    Example:
        >>> import asyncio
        >>> judge = ScriptedJudge({"Mira": 1.0})
        >>> asyncio.run(judge.judge([JudgeCase("Which river?", "Mira")]))
        [Verdict(score=1.0, reason='scripted')]
    """

    def __init__(self, script: Mapping[str, Scripted] | Sequence[Scripted] | Callable[[JudgeCase], Scripted]) -> None:
        self._script = script
        self.cases: list[JudgeCase] = []

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Looks the verdicts up.

        Args:
            cases: B cases.

        Returns:
            B verdicts.

        Raises:
            DataError: the script has no verdict for a case, or none left.
        """
        verdicts = []
        for case in cases:
            scripted = self._next(case)
            self.cases.append(case)
            verdicts.append(scripted if isinstance(scripted, Verdict) else Verdict(scripted, "scripted"))
        return verdicts

    def _next(self, case: JudgeCase) -> Scripted:
        if callable(self._script):
            return self._script(case)
        if isinstance(self._script, Mapping):
            if case.answer in self._script:
                return self._script[case.answer]
            raise DataError(f"no verdict is scripted for the answer {case.answer[:80]!r}")
        if len(self.cases) >= len(self._script):
            raise DataError(
                f"all {len(self._script)} scripted verdicts are used up; asked for another by {case.answer[:80]!r}"
            )
        return self._script[len(self.cases)]
