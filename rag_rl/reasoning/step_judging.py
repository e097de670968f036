"""Judging the steps of chains: cases for the rubrics of ``rag_rl.judges``, one call for all steps of all chains."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from rag_rl.errors import ConfigError
from rag_rl.reasoning.step_environment import StepRecord, StepTrajectory, judged_by_match
from rag_rl.reasoning.step_rewards import GOLD_GAIN, StepRewardRule, gold_gains
from rag_rl.reasoning.steps import render_steps
from rag_rl.types import Judge, JudgeCase

STEP_RUBRICS = ("document_relevance", "query_rationality", "reasoning_coherence")
"""Rubrics about one step. The first two are about steps that search, the third is about every analysis."""

StepCase: TypeAlias = tuple[StepRecord, JudgeCase]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StepScorer:
    """Scores finished chains, and gives each step its reward.

    Args:
        rule: how scores and end state become rewards.
        judges: a judge for each rubric that the rule needs, by name; ``GOLD_GAIN`` needs none.
        answer_judge: of final answers; None: exact match with an accepted answer.
        pass_mark: of that judge: the score from which on an answer is right, in [0, 1].

    Raises:
        ConfigError: the rule needs a score that neither a judge nor ``GOLD_GAIN`` gives.
    """

    rule: StepRewardRule
    judges: Mapping[str, Judge] = field(default_factory=dict)
    answer_judge: Judge | None = None
    pass_mark: float = 0.5

    def __post_init__(self) -> None:
        missing = [name for name in self.rule.needs if name not in self.judges and name != GOLD_GAIN]
        if missing:
            raise ConfigError(
                f"this step reward needs verdicts on {', '.join(missing)}: name a judge (judge_name), or take a rule "
                "that needs none (gold_gain, outcome_only)"
            )

    def score(self, trajectories: Sequence[StepTrajectory]) -> None:
        """Judges answers and steps; what was judged before is not judged again.

        Args:
            trajectories: B finished chains; end states and scores are set in place.

        Raises:
            BackendError: a judge's backend is broken.
        """
        self.score_answers(trajectories)
        self.score_steps(trajectories)

    def score_answers(self, trajectories: Sequence[StepTrajectory]) -> None:
        """Judges final answers only, which settles how each chain ended.

        Args:
            trajectories: B finished chains.

        Raises:
            BackendError: the judge's backend is broken.
        """
        if self.answer_judge is not None:
            run_judging(judge_answers(trajectories, self.answer_judge, pass_mark=self.pass_mark))

    def score_steps(self, trajectories: Sequence[StepTrajectory]) -> None:
        """Judges steps only.

        Args:
            trajectories: B chains.

        Raises:
            BackendError: a judge's backend is broken.
        """
        if self.judges:
            run_judging(judge_steps(trajectories, self.judges))
        if GOLD_GAIN in self.rule.needs:
            add_gold_gains(trajectories)

    def rewards(self, trajectory: StepTrajectory) -> list[float | None]:
        """Gives each step of a scored chain its reward.

        Args:
            trajectory: after ``score``.

        Returns:
            One value a step; None where a verdict is missing that the rule needs: such a step is dropped and counted.

        Raises:
            ConfigError: the chain is still open.
        """
        return chain_rewards(trajectory, self.rule)


def run_judging(judging: Coroutine[Any, Any, _T]) -> _T:
    """Waits for a coroutine, whether or not the caller itself runs in an event loop (as in a notebook).

    Args:
        judging: ``judge_answers(...)`` or ``judge_steps(...)``.

    Returns:
        Its result.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, judging).result()


def step_cases(trajectories: Sequence[StepTrajectory], rubric: str) -> list[StepCase]:
    """Turns the steps of chains into cases of a rubric.

    A case has the fields of every step rubric, so that one is enough for a rubric of the user's own: ``question``,
    ``passages`` (what the step's own query found), and in ``meta`` ``analysis``, ``query`` ("" in a step that answers)
    and ``history``, the earlier steps with their documents in the R3 grammar ("" before the first).

    Args:
        trajectories: any; dropped ones have no cases.
        rubric: one of ``STEP_RUBRICS``; any other name is taken to be about steps that search.

    Returns:
        Each valid step that the rubric is about, with its case, in order.
    """
    cases: list[StepCase] = []
    for trajectory in trajectories:
        if trajectory.failure is not None:
            continue
        earlier: list[StepRecord] = []
        for record in trajectory.steps:
            if record.step is not None and (record.searches or rubric == "reasoning_coherence"):
                steps = [past.step for past in earlier if past.step is not None]
                history = render_steps(steps, [past.passages for past in earlier])
                query, analysis = record.step.query or "", record.step.analysis
                case = JudgeCase(
                    trajectory.question.question,
                    analysis if rubric == "reasoning_coherence" else query,
                    passages=tuple(passage.contents for passage in record.passages),
                    meta={"analysis": analysis, "query": query, "history": history},
                )
                cases.append((record, case))
            earlier.append(record)
    return cases


async def judge_steps(trajectories: Sequence[StepTrajectory], judges: Mapping[str, Judge]) -> int:
    """Judges all steps of all chains: one call a rubric, the rubrics at the same time.

    The scores go to ``StepRecord.scores`` under the rubric's name; a step that has one already is not judged again,
    which steps shared by several chains rely on. A search that found nothing has a relevance of 0 without being asked
    about.

    Args:
        trajectories: B chains.
        judges: a judge for each rubric, by its name.

    Returns:
        How many verdicts could not be read: their scores are None, which is not 0.

    Raises:
        BackendError: a judge's backend is broken.
    """

    async def one(rubric: str, judge: Judge) -> int:
        asked: dict[int, StepCase] = {}
        for record, case in step_cases(trajectories, rubric):
            if record.scores.get(rubric) is not None:
                continue
            if rubric == "document_relevance" and not record.hits:
                record.scores[rubric] = 0.0
            else:
                asked.setdefault(id(record), (record, case))
        verdicts = await judge.judge([case for _, case in asked.values()]) if asked else []
        for (record, _), verdict in zip(asked.values(), verdicts, strict=True):
            record.scores[rubric] = verdict.score
        return sum(verdict.score is None for verdict in verdicts)

    return sum(await asyncio.gather(*(one(rubric, judge) for rubric, judge in judges.items())))


async def judge_answers(trajectories: Sequence[StepTrajectory], judge: Judge, *, pass_mark: float = 0.5) -> int:
    """Judges the final answers of chains and sets their end states; one call.

    An exact match with an accepted answer is right without being asked about, as in the authors' code; unlike there,
    all accepted answers are compared.

    Args:
        trajectories: B chains; those without an answer, or about a question without accepted ones, stay as they are.
        judge: of the rubric ``answer_correctness`` or one like it.
        pass_mark: score from which on an answer is right, in [0, 1].

    Returns:
        How many verdicts could not be read: these chains have no end state.

    Raises:
        BackendError: the judge's backend is broken.
    """
    asked = []
    for trajectory in trajectories:
        if trajectory.failure is not None or trajectory.answer is None or not trajectory.question.answers:
            continue
        if judged_by_match(trajectory):
            trajectory.state = "correct"
        else:
            asked.append(trajectory)
    verdicts = await judge.judge([answer_case(trajectory) for trajectory in asked]) if asked else []
    for trajectory, verdict in zip(asked, verdicts, strict=True):
        right = verdict.score is not None and verdict.score >= pass_mark
        trajectory.state = None if verdict.score is None else "correct" if right else "incorrect"
    return sum(verdict.score is None for verdict in verdicts)


def answer_case(trajectory: StepTrajectory) -> JudgeCase:
    """Turns the final answer of a chain into a case of ``answer_correctness``.

    Args:
        trajectory: a chain.

    Returns:
        Question, answer ("" for none), accepted answers, and all documents that the chain has shown.
    """
    shown = [passage.contents for record in trajectory.steps for passage in record.passages]
    return JudgeCase(
        trajectory.question.question, trajectory.answer or "", trajectory.question.answers, tuple(dict.fromkeys(shown))
    )


def add_gold_gains(trajectories: Sequence[StepTrajectory]) -> None:
    """Scores the searches of chains by the gold documents that they were the first to find; needs no judge.

    Args:
        trajectories: B chains; the scores go to ``StepRecord.scores`` as "gold_gain", None where no gold document is
            known.
    """
    for trajectory in trajectories:
        searches = trajectory.searches
        found = [[hit.passage.doc_id for hit in record.hits] for record in searches]
        gains = gold_gains(found, trajectory.question.gold_doc_ids)
        for record, gain in zip(searches, gains, strict=True):
            record.scores[GOLD_GAIN] = gain


def chain_rewards(trajectory: StepTrajectory, rule: StepRewardRule) -> list[float | None]:
    """Gives each step of a finished, scored chain its reward.

    Args:
        trajectory: a chain; what ``rule.needs`` stands in the scores of its steps.
        rule: how scores and end state become rewards.

    Returns:
        One value a step; None where a part that the rule needs has no verdict. All None for a dropped chain.

    Raises:
        ConfigError: the chain is still open.
    """
    if trajectory.failure is not None:
        return [None] * len(trajectory.steps)
    if trajectory.is_open:
        raise ConfigError(f"the chain about {trajectory.question.qid!r} is still open: play it to its end first")
    return rule.rewards(trajectory.state, [record.scores for record in trajectory.searches])


def mean_score(trajectories: Sequence[StepTrajectory], rubric: str) -> float | None:
    """Averages a score over all steps that have one; of ``reasoning_coherence`` it is the ``reasoning_accuracy``.

    Args:
        trajectories: judged chains.
        rubric: name of the score.

    Returns:
        The mean in [0, 1], steps without a verdict left out; None for no verdicts.
    """
    records = [record for trajectory in trajectories if trajectory.failure is None for record in trajectory.steps]
    scores = [score for record in records if (score := record.scores.get(rubric)) is not None]
    return sum(scores) / len(scores) if scores else None
