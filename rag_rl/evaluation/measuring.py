"""What an assembly costs beside what it scores, and assemblies that only search."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

from rag_rl import metrics
from rag_rl.errors import ConfigError
from rag_rl.evaluation.assembly import Answered, Asked, Assembly
from rag_rl.evaluation.scoring import ANSWER_METRICS, Evaluable, Row, make_row, retrieval_scores
from rag_rl.reasoning import StepTrajectory
from rag_rl.types import Generation, Judge, JudgeCase, Question, Retriever, Verdict


class SearchOnly:
    """A retriever without anybody who answers.

    Args:
        retriever: with its augmenter and its reranker, where it has them.
        top_k: passages a question: cut-off of ``recall@k``.
        depth: passages that are searched for where that is more, so that ``ndcg@10`` sees ten ranks.

    Raises:
        ConfigError: ``top_k`` below 1.
    """

    def __init__(self, retriever: Retriever, *, top_k: int, depth: int = 0) -> None:
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        self.retriever, self.top_k, self.depth = retriever, top_k, max(top_k, depth)

    def answer(self, questions: Sequence[Question]) -> list[list[Answered]]:
        """Searches for questions.

        Args:
            questions: B questions.

        Returns:
            B lists of one answer, which is none: its ``hits`` are what was found.

        Raises:
            BackendError: as the retriever raises it.
        """
        found = self.retriever.search([question.question for question in questions], top_k=self.depth)
        return [
            [Answered(Asked(one, tuple(hits), tuple(hits[: self.top_k]), one.question), Generation(""), None)]
            for one, hits in zip(questions, found, strict=True)
        ]

    def row(self, answered: Answered) -> Row:
        """Scores one search.

        Args:
            answered: of ``answer``.

        Returns:
            A row with ``recall@k success@k mrr@10 ndcg@10``; without scores where no gold document is known.
        """
        gold = answered.asked.question.gold_doc_ids
        return make_row(answered, retrieval_scores(answered.asked.hits, gold, top_k=self.top_k) if gold else {})


class Measured:
    """An assembly whose rows also say what each question cost.

    ``searches``; ``tokens`` that were written and ``prompt_tokens`` that were read, None where the backend does not
    tell; and ``seconds``: those of the batch, shared evenly, without the judge's. Where one search finds the passages,
    ``all_gold@k`` says whether all gold documents were shown. A question without accepted answers has no scores of its
    answer, which is not 0.

    Args:
        assembly: any.
    """

    def __init__(self, assembly: Evaluable) -> None:
        self._judging: list[_Timed] = []
        # A copy: the judges of the assembly itself stay as they are.
        self.assembly = copy.copy(assembly)
        for name in ("answer_judge", "coherence_judge"):
            judge = getattr(assembly, name, None)
            if judge is not None:
                self._judging.append(_Timed(judge))
                setattr(self.assembly, name, self._judging[-1])
        self._seconds = 0.0

    def answer(self, questions: Sequence[Question]) -> list[list[Answered]]:
        """Answers questions, and looks at the clock.

        Args:
            questions: B questions.

        Returns:
            B lists of one answer.

        Raises:
            BackendError: as the assembly raises it.
        """
        judged = sum(judge.seconds for judge in self._judging)
        started = time.perf_counter()
        answered = self.assembly.answer(questions)
        waited = sum(judge.seconds for judge in self._judging) - judged
        self._seconds = (time.perf_counter() - started - waited) / max(1, len(questions))
        return answered

    def row(self, answered: Answered) -> Row:
        """Scores one answer of the last batch.

        Args:
            answered: of ``answer``.

        Returns:
            A row.
        """
        row = self.assembly.row(answered)
        scores: dict[str, float | None] = row["scores"]
        question = answered.asked.question
        if not question.answers:
            scores |= dict.fromkeys(name for name in ANSWER_METRICS if name in scores)
        gold, top_k = question.gold_doc_ids, getattr(self.assembly, "top_k", 0)
        if gold and answered.trajectory is None and f"recall@{top_k}" in scores:
            shown = [hit.passage.doc_id for hit in answered.asked.hits[:top_k]]
            scores[f"all_gold@{top_k}"] = metrics.all_gold_at_k(shown, gold, k=top_k)
        if answered.failure is None:
            scores |= _costs(answered, searches=float(getattr(self.assembly, "retriever", None) is not None))
            scores["seconds"] = self._seconds
        else:
            row["failure"] = answered.failure
        return row


class _Timed:
    """A judge, and how long it took."""

    def __init__(self, judge: Judge) -> None:
        self.judge_itself, self.seconds = judge, 0.0

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Verdict]:
        started = time.perf_counter()
        try:
            return await self.judge_itself.judge(cases)
        finally:
            self.seconds += time.perf_counter() - started


def closed_book(assembly: Assembly, prompt: str) -> Assembly:
    """The same generator, asked without passages.

    Args:
        assembly: with a generator.
        prompt: name or path of a prompt with ``$question``.

    Returns:
        A new assembly.

    Raises:
        ConfigError: the prompt lacks its placeholder.
    """
    return Assembly(
        retriever=None,
        generator=assembly.generator,
        prompt=prompt,
        answer_marker=assembly.answer_marker,
        max_new_tokens=assembly.max_new_tokens,
        max_prompt_tokens=assembly.max_prompt_tokens,
        count_tokens=assembly.count_tokens,
        generator_type=assembly.generator_type,
        answer_judge=assembly.answer_judge,
        pass_mark=assembly.pass_mark,
    )


def _costs(answered: Answered, *, searches: float) -> dict[str, float | None]:
    chain = answered.trajectory
    if isinstance(chain, StepTrajectory):
        written = [record.completion_ids for record in chain.steps]
        read = [record.prompt_ids for record in chain.steps]
        return {
            "searches": float(len(chain.searches)),
            "tokens": _total(written),
            "prompt_tokens": _total(read),
        }
    if not answered.generation.text and not answered.generation.prompt_tokens:  # nobody was asked
        return {"searches": searches}
    ids = answered.generation.token_ids
    return {
        "searches": searches,
        "tokens": None if ids is None else float(len(ids)),
        "prompt_tokens": float(answered.generation.prompt_tokens) or None,
    }


def _total(pieces: Sequence[Sequence[int] | None]) -> float | None:
    """Length of all of them; None where one is not known."""
    known = [len(piece) for piece in pieces if piece is not None]
    return float(sum(known)) if len(known) == len(pieces) else None
