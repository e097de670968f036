"""An assembly that reasons step by step: what training a reasoner is evaluated with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.evaluation.assembly import Answered, Asked
from rag_rl.evaluation.scoring import Row, answer_scores, judge_scores, make_row
from rag_rl.reasoning import (
    StepRecord,
    StepSetup,
    StepTrajectory,
    format_adherence,
    judge_answers,
    judge_steps,
    mean_score,
    render_step,
    run_judging,
)
from rag_rl.types import Generation, Generator, Judge, Question

COHERENCE = "reasoning_coherence"
"""The rubric behind ``reasoning_accuracy``."""


class ReasoningAssembly:
    """A step model, and how its chains are played. Evaluation is deterministic: greedy steps, the best k documents.

    Args:
        setup: retriever, budgets and layout of the chains.
        generator: who writes the steps; None for the one that ``under_training`` or ``reloaded`` bring.
        answer_judge: of final answers, beside exact match; None for exact match alone.
        pass_mark: of the answer judge: the score from which on an answer is right.
        coherence_judge: of the rubric ``reasoning_coherence``, asked about every analysis; None for no such metric.
    """

    def __init__(
        self,
        setup: StepSetup,
        *,
        generator: Generator | None = None,
        answer_judge: Judge | None = None,
        pass_mark: float = 0.5,
        coherence_judge: Judge | None = None,
    ) -> None:
        self.setup, self.generator = setup, generator
        self.answer_judge, self.pass_mark, self.coherence_judge = answer_judge, pass_mark, coherence_judge

    def with_generator(self, generator: Generator) -> ReasoningAssembly:
        """The same assembly around another generator.

        Args:
            generator: who writes the steps.

        Returns:
            A new assembly that shares retriever and judges.
        """
        twin = copy.copy(self)
        twin.generator = generator
        return twin

    def under_training(self, trainer: Any, *, batch_size: int) -> ReasoningAssembly:
        """The same assembly around the policy of a trainer.

        Under several processes each of them must then answer the same number of batches, as ``evaluate_sharded`` lets
        them do; how long the chains get may differ.

        Args:
            trainer: of TRL, or anything that ``PolicyGenerator`` takes.
            batch_size: steps a batch.

        Returns:
            A new assembly.
        """
        from rag_rl.generation import PolicyGenerator

        return self.with_generator(
            PolicyGenerator(trainer, batch_size=batch_size, generator_type=self.setup.generator_type)  # type: ignore[arg-type]
        )

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> ReasoningAssembly:
        """The same assembly around a model that was saved.

        Args:
            folder: a run folder.
            device: where the model goes.
            batch_size: steps a batch.

        Returns:
            A new assembly.
        """
        from rag_rl.generation import TransformersGenerator

        return self.with_generator(
            TransformersGenerator.from_pretrained(
                str(folder),
                device=device,
                batch_size=batch_size,
                generator_type=self.setup.generator_type,  # type: ignore[arg-type]
            )
        )

    def answer(
        self, questions: Sequence[Question], *, temperature: float = 0.0, n: int = 1, seed: int | None = None
    ) -> list[list[Answered]]:
        """Plays questions and lets the judges judge.

        Args:
            questions: B questions.
            temperature: 0 is greedy.
            n: chains a question.
            seed: of the sampling.

        Returns:
            B lists of ``n`` chains; the ``generation`` of each is the chain as text, without the documents.

        Raises:
            ConfigError: the assembly has no generator.
            DataError: a question alone does not fit into a prompt.
            BackendError: the backend of the generator, the retriever or a judge is broken.
        """
        if self.generator is None:
            raise ConfigError("this assembly has no generator: nobody writes the steps")
        environment = self.setup.environment(self.generator, temperature=temperature, seed=seed)
        played = environment.rollout([question for question in questions for _ in range(n)])
        if self.answer_judge is not None:
            run_judging(judge_answers(played, self.answer_judge, pass_mark=self.pass_mark))
        if self.coherence_judge is not None:
            run_judging(judge_steps(played, {COHERENCE: self.coherence_judge}))
        return [[_answered(chain) for chain in played[start : start + n]] for start in range(0, len(played), n)]

    def row(self, answered: Answered) -> Row:
        """Scores one chain.

        ``em f1 contains_em``; ``format``, the share of its steps that are exactly a step and bear the right number;
        the counts ``steps``, ``searches`` and ``passages`` (documents shown); with gold documents ``recall@k`` (share
        of them that any search found, at k documents a search) and ``all_gold@k`` (whether every one was found); with
        an answer judge ``judge_accuracy`` and ``judge_readable`` (None where there was no answer to judge); with a
        coherence judge ``reasoning_accuracy``, the mean verdict over the chain's analyses. All of them are None for a
        dropped chain: it has no score, which is not 0.

        Args:
            answered: of ``answer``.

        Returns:
            A row for JSON; ``steps`` holds the chain step by step.
        """
        chain = answered.trajectory
        if not isinstance(chain, StepTrajectory):
            raise ConfigError("this answer comes from another assembly: it has no steps to be scored")
        question, top_k = chain.question, self.setup.top_k
        scores = answer_scores(chain.answer, question.answers)
        scores["format"] = format_adherence([record.text for record in chain.steps])
        counts = (len(chain.steps), len(chain.searches), len(answered.asked.shown))
        scores |= dict(zip(("steps", "searches", "passages"), map(float, counts), strict=True))
        if gold := set(question.gold_doc_ids):
            found = {hit.passage.doc_id for hit in answered.asked.shown}
            scores[f"recall@{top_k}"] = len(found & gold) / len(gold)
            scores[f"all_gold@{top_k}"] = float(gold <= found)
        if self.answer_judge is not None:
            # Of a chain that ended with an answer, no state means that the verdict could not be read.
            verdict = None if chain.state is None else float(chain.state == "correct")
            scores |= judge_scores(chain.answer, verdict)
        if self.coherence_judge is not None:
            scores["reasoning_accuracy"] = mean_score([chain], COHERENCE)
        row = make_row(answered, scores if chain.failure is None else dict.fromkeys(scores))
        row["steps"] = [_step(record) for record in chain.steps]
        if chain.failure is not None:
            row["failure"] = chain.failure
        return row


def _answered(chain: StepTrajectory) -> Answered:
    hits = tuple(hit for record in chain.steps for hit in record.hits)
    lines = [record.text if record.step is None else render_step(record.step) for record in chain.steps]
    if chain.failure is not None:
        lines.append(f"failed: {chain.failure}")
    prompt = chain.steps[0].prompt if chain.steps else None
    asked = Asked(chain.question, hits, hits, prompt or chain.question.question)
    return Answered(asked, Generation("\n".join(lines)), chain.answer, chain)


def _step(record: StepRecord) -> dict[str, Any]:
    """One step for JSON, as the report shows it."""
    step = record.step
    told: dict[str, Any] = {"text": record.text, "problem": record.problem}
    if step is not None:
        told = {
            "analysis": step.analysis,
            **({"answer": step.answer} if step.query is None else {"query": step.query}),
        }
    if record.searches:
        told["doc_ids"] = [hit.passage.doc_id for hit in record.hits]
    return {**told, **({"scores": dict(record.scores)} if record.scores else {})}
