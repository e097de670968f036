"""An assembly of parts that answers questions: retrieve, build the prompt, generate, read the answer.

Training, evaluation and ``rag-rl ask`` all go through this one class, so that a model is asked at test time exactly as
it was asked in training.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.scoring import Evaluable, Part, Row, judge_scores, score_row
from rag_rl.generation.prompting import fit_batch
from rag_rl.metrics import exact_match
from rag_rl.prompts import render, render_passages, require_placeholders
from rag_rl.reasoning import StepTrajectory, Trajectory, run_judging
from rag_rl.text import extract_answer
from rag_rl.types import Generation, Generator, Hit, Judge, JudgeCase, Passage, Prompt, Question, Retriever, Verdict

logger = logging.getLogger(__name__)
PassageOrder = Literal["ranked", "reversed", "shuffled"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question made ready for the generator.

    Attributes:
        question: the question.
        hits: everything that was retrieved, best first.
        shown: the hits that stand in the prompt, in the order in which they are read.
        prompt: what the generator is given.
        cut: how many retrieved passages did not fit into the prompt, or only in part.
    """

    question: Question
    hits: tuple[Hit, ...]
    shown: tuple[Hit, ...]
    prompt: Prompt
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with what came out.

    Attributes:
        asked: the question, its hits and its prompt.
        generation: the raw continuation.
        answer: the answer in it, None where it holds none.
        trajectory: how it was found, where it took several hops or steps.
        verdict: on the answer, where a judge was asked.
    """

    asked: Asked
    generation: Generation
    answer: str | None
    trajectory: Trajectory | StepTrajectory | None = None
    verdict: Verdict | None = None

    @property
    def failure(self) -> str | None:
        """Why there is nothing to score: a call failed for this question alone; None where all is well."""
        if self.trajectory is not None:
            return self.trajectory.failure
        return self.generation.text or "no reason given" if self.generation.finish_reason == "error" else None


class Assembly:
    """Retriever and generator, and how the one's passages are shown to the other.

    Args:
        retriever: where passages come from; None asks without any.
        generator: who answers; None for an assembly that only prepares prompts.
        prompt: name or path of a prompt with ``$question`` and, where there is a retriever, ``$passages``.
        answer_marker: what stands before the answer in a reply; "" where the whole reply is the answer.
        top_k: passages a question.
        depth: passages that are searched for where that is more, so that ``ndcg@10`` and ``mrr@10`` see ten ranks; the
            generator is shown ``top_k`` of them.
        order: how the passages are laid out: best first, best last, or at random (seeded by the question's id).
        max_new_tokens: budget of a reply, in tokens.
        max_prompt_tokens: budget of a prompt, in tokens; passages that do not fit are cut, lowest rank first.
        count_tokens: length of a prompt in tokens; needed with ``max_prompt_tokens``.
        generator_type: ``"instruct"`` and ``"api"`` get chat turns, ``"base"`` plain text.
        answer_judge: of answers that match no accepted one exactly, for ``judge_accuracy``; None for no such metric.
        pass_mark: of that judge: the score from which on an answer is right, in [0, 1].

    Raises:
        ConfigError: ``top_k`` below 1, or a prompt without its placeholders.
    """

    def __init__(
        self,
        *,
        retriever: Retriever | None,
        generator: Generator | None = None,
        prompt: str = "answer",
        answer_marker: str = "Answer:",
        top_k: int = 5,
        depth: int = 0,
        order: PassageOrder = "ranked",
        max_new_tokens: int = 256,
        max_prompt_tokens: int | None = None,
        count_tokens: Callable[[Sequence[Prompt]], list[int]] | None = None,
        generator_type: Literal["api", "base", "instruct"] = "instruct",
        answer_judge: Judge | None = None,
        pass_mark: float = 0.5,
    ) -> None:
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        try:
            require_placeholders(prompt, ["question"] if retriever is None else ["question", "passages"])
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error
        self.retriever = retriever
        self.generator = generator
        self.prompt = prompt
        self.answer_marker = answer_marker
        self.top_k, self.depth = top_k, max(top_k, depth)
        self.order = order
        self.max_new_tokens = max_new_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.count_tokens = count_tokens
        self.generator_type = generator_type
        self.answer_judge, self.pass_mark = answer_judge, pass_mark

    def with_generator(self, generator: Generator) -> Assembly:
        """The same assembly around another generator.

        Args:
            generator: who answers.

        Returns:
            A new assembly that shares the retriever.
        """
        twin = Assembly.__new__(Assembly)
        twin.__dict__.update(self.__dict__, generator=generator)
        return twin

    def under_training(self, trainer: Any, *, batch_size: int) -> Assembly:
        """The same assembly around the policy of a trainer.

        Args:
            trainer: of TRL.
            batch_size: answers a batch.

        Returns:
            A new assembly that shares the retriever.
        """
        from rag_rl.generation import PolicyGenerator

        return self.with_generator(
            PolicyGenerator(trainer, batch_size=batch_size, generator_type=self.generator_type)  # type: ignore[arg-type]
        )

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> Assembly:
        """The same assembly around a model that was saved.

        Args:
            folder: a run folder.
            device: where the model goes.
            batch_size: answers a batch.

        Returns:
            A new assembly that shares the retriever.
        """
        from rag_rl.generation import TransformersGenerator

        return self.with_generator(
            TransformersGenerator.from_pretrained(
                str(folder),
                device=device,
                batch_size=batch_size,
                generator_type=self.generator_type,  # type: ignore[arg-type]
            )
        )

    def row(self, answered: Answered) -> Row:
        """Scores one answer; see ``score_row``. An answer judge adds ``judge_accuracy`` and ``judge_readable``.

        Args:
            answered: of this assembly.

        Returns:
            A row for JSON.
        """
        row = score_row(answered, marker=self.answer_marker, top_k=None if self.retriever is None else self.top_k)
        if self.answer_judge is not None:
            score = answered.verdict.score if answered.verdict is not None else None
            # Right or wrong as ``judge_answers`` has it, so that chains and single answers can be compared.
            scores = judge_scores(answered.answer, None if score is None else float(score >= self.pass_mark))
            row["scores"] |= scores if answered.failure is None else dict.fromkeys(scores)
        return row

    def prepare(self, questions: Sequence[Question]) -> list[Asked]:
        """Retrieves for all questions in one batched search and builds their prompts.

        Args:
            questions: B questions.

        Returns:
            B prepared questions.

        Raises:
            DataError: a question alone is longer than the prompt's budget.
        """
        found: Sequence[Sequence[Hit]] = [()] * len(questions)
        if self.retriever is not None:
            found = self.retriever.search([q.question for q in questions], top_k=self.depth)
        asked = [self._ask(q, tuple(hits)) for q, hits in zip(questions, found, strict=True)]
        if self.max_prompt_tokens is not None:
            asked = self._fit(asked, self.max_prompt_tokens)
        return asked

    def answer(
        self, questions: Sequence[Question], *, temperature: float = 0.0, n: int = 1, seed: int | None = None
    ) -> list[list[Answered]]:
        """Answers questions.

        Args:
            questions: B questions.
            temperature: 0 is greedy.
            n: answers a question.
            seed: of the sampling.

        Returns:
            B lists of ``n`` answers; one whose request failed alone has no answer, and a ``failure``.

        Raises:
            ConfigError: the assembly has no generator.
            DataError: a question is longer than the prompt's budget.
            BackendError: the backend of the generator or the judge is broken.
        """
        if self.generator is None:
            raise ConfigError("this assembly has no generator: it can only prepare prompts")
        asked = self.prepare(questions)
        replies = self.generator.generate(
            [a.prompt for a in asked], n=n, max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed
        )
        answered = [
            [Answered(a, g, self._answer_in(g)) for g in generations]
            for a, generations in zip(asked, replies, strict=True)
        ]
        return answered if self.answer_judge is None else _judged(answered, self.answer_judge)

    def _answer_in(self, generation: Generation) -> str | None:
        if generation.finish_reason == "error":  # its text is the reason
            return None
        return extract_answer(generation.text, marker=self.answer_marker)

    def _ask(self, question: Question, hits: tuple[Hit, ...]) -> Asked:
        shown = self._laid_out(question, list(hits[: self.top_k]))
        return Asked(question, hits, tuple(shown), self._build(question, [hit.passage for hit in shown]))

    def _laid_out(self, question: Question, hits: list[Hit]) -> list[Hit]:
        if self.order == "reversed":
            hits.reverse()
        elif self.order == "shuffled":
            random.Random(question.qid).shuffle(hits)
        return hits

    def _build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        text = render(self.prompt, question=question.question, passages=render_passages(passages))
        return text if self.generator_type == "base" else [{"role": "user", "content": text}]

    def _fit(self, asked: list[Asked], budget: int) -> list[Asked]:
        """Shortens prompts that are too long: passages give way, lowest rank first, the question never."""
        if self.count_tokens is None:
            raise ConfigError("max_prompt_tokens needs count_tokens")
        count_tokens = self.count_tokens

        def builder(a: Asked) -> Callable[[Sequence[Passage]], Prompt]:
            def build(kept: Sequence[Passage]) -> Prompt:
                hits = [replace(hit, passage=p) for hit, p in zip(a.hits, kept, strict=False)]
                return self._build(a.question, [hit.passage for hit in self._laid_out(a.question, hits)])

            return build

        passages = [[hit.passage for hit in a.hits[: self.top_k]] for a in asked]
        try:
            fitted = fit_batch([builder(a) for a in asked], passages, count_tokens, budget)
        except DataError as error:  # it knows the questions by their places in the batch only
            bare = count_tokens([self._build(a.question, ()) for a in asked])
            long = [f"{a.question.qid} ({n} tokens)" for a, n in zip(asked, bare, strict=True) if n > budget]
            more = f" and {len(long) - 5} more" if len(long) > 5 else ""
            raise DataError(
                f"{len(long)} of {len(asked)} questions do not fit into {budget} prompt tokens even without passages: "
                f"{', '.join(long[:5])}{more}; shorten them or allow longer prompts"
            ) from error
        done, over, cut = [], 0, 0
        for a, fit in zip(asked, fitted, strict=True):
            if not fit.truncated:
                done.append(a)
                continue
            over, cut = over + 1, cut + fit.truncated
            hits = [replace(hit, passage=p) for hit, p in zip(a.hits, fit.kept, strict=False)]
            shown = tuple(self._laid_out(a.question, hits))
            done.append(replace(a, shown=shown, prompt=fit.prompt, cut=fit.truncated))
        if over:
            logger.warning(
                "%d of %d prompts were longer than %d tokens: %d passages dropped or shortened, lowest rank first",
                over,
                len(asked),
                budget,
                cut,
            )
        return done


class OtherModel:
    """An assembly around a model that the run does not train: a baseline that is loaded where it is measured.

    Args:
        part: the assembly.
        model: folder or Hub id of the model.
    """

    def __init__(self, part: Part, model: str) -> None:
        self.part, self.model = part, model

    def under_training(self, trainer: Any, *, batch_size: int) -> Evaluable:
        """The assembly around the model.

        Args:
            trainer: tells the device.
            batch_size: answers a batch.

        Returns:
            Something to evaluate.
        """
        return self.reloaded(Path(self.model), device=trainer.accelerator.device, batch_size=batch_size)

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> Evaluable:
        """The assembly around the model, whatever was trained.

        Args:
            folder: not used.
            device: where the model goes.
            batch_size: answers a batch.

        Returns:
            Something to evaluate.
        """
        del folder
        return self.part.reloaded(Path(self.model), device=device, batch_size=batch_size)


def _judged(answered: list[list[Answered]], judge: Judge) -> list[list[Answered]]:
    """Adds verdicts by the rule of ``judge_answers``: an exact match is right, and no answer wrong, without asking."""
    flat = [a for listed in answered for a in listed]
    verdicts: dict[int, Verdict] = {}
    asked: list[int] = []
    for i, a in enumerate(flat):
        accepted = a.asked.question.answers
        if a.failure is not None or not accepted:
            continue
        if a.answer is None:
            verdicts[i] = Verdict(0.0, "no answer")
        elif exact_match(a.answer, accepted) == 1.0:
            verdicts[i] = Verdict(1.0, "exact match")
        else:
            asked.append(i)
    cases = [
        JudgeCase(
            flat[i].asked.question.question,
            flat[i].answer or "",
            flat[i].asked.question.answers,
            tuple(hit.passage.contents for hit in flat[i].asked.shown),
        )
        for i in asked
    ]
    verdicts |= dict(zip(asked, run_judging(judge.judge(cases)), strict=True)) if cases else {}
    told = iter([replace(a, verdict=verdicts.get(i)) for i, a in enumerate(flat)])
    return [[next(told) for _ in listed] for listed in answered]
