"""Scores an assembly on questions: one function for before and after, for recipes and for ``evaluate_rag``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rag_rl import metrics
from rag_rl.data.whole_files import whole_file
from rag_rl.errors import BackendError, DataError
from rag_rl.text import has_format
from rag_rl.types import Hit, Question, Retriever

if TYPE_CHECKING:
    from rag_rl.evaluation.assembly import Answered

logger = logging.getLogger(__name__)

ANSWER_METRICS = ("em", "f1", "contains_em")
"""What ``answer_scores`` gives."""

Row = dict[str, Any]
"""One evaluated question for JSON: ``qid question answers gold_doc_ids passages reply answer scores rewards``."""

Scorer = Callable[..., Mapping[str, Sequence[float | None]]]
"""Names and values of rewards for columns of completions, as ``rag_rl.rewards.score_parts`` bound to its parts."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out of an evaluation.

    Attributes:
        metrics: mean of each metric over the questions where it is defined, in [0, 1].
        rows: one a question, in the order of the questions.
    """

    metrics: dict[str, float]
    rows: list[Row]


class Evaluable(Protocol):
    """What can be evaluated: ``Assembly`` asks once, ``SearchAssembly`` and ``ReasoningAssembly`` in several turns."""

    def answer(self, questions: Sequence[Question]) -> list[list[Answered]]:
        """Returns one greedy answer a question, in a list of its own."""
        ...

    def row(self, answered: Answered) -> Row:
        """Returns the scored row of an answer."""
        ...


class Part(Protocol):
    """An assembly of which a run trains a part."""

    def under_training(self, trainer: Any, *, batch_size: int) -> Evaluable:
        """Returns the assembly around the part as it is now."""
        ...

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> Evaluable:
        """Returns the assembly around the part that was saved in a folder."""
        ...


def evaluate(
    assembly: Evaluable, questions: Sequence[Question], *, rewards: Scorer | None = None, batch_size: int = 256
) -> Evaluation:
    """Answers questions greedily and scores the answers and the retrieval behind them.

    A question for which alone a call failed has no scores (None, which is not 0) and is left out of the means; such
    questions are counted in the log.

    Args:
        assembly: with a generator.
        questions: with answers; gold document ids add the retrieval metrics.
        rewards: scores the rows also by the run's rewards, for the report; ``judged`` also gives metrics.
        batch_size: questions a batch.

    Returns:
        Metrics and rows.

    Raises:
        DataError: there is no question.
        BackendError: the backend is broken, or every question failed.
    """
    if not questions:
        raise DataError("there is no question to evaluate on")
    rows: list[Row] = []
    failures: list[str] = []
    for start in range(0, len(questions), batch_size):
        answered = [a for (a,) in assembly.answer(questions[start : start + batch_size])]
        batch = [assembly.row(a) for a in answered]
        failures += [a.failure for a in answered if a.failure is not None]
        sound = [(a, row) for a, row in zip(answered, batch, strict=True) if a.failure is None]
        if rewards is not None and sound:
            named = rewards(
                completions=[row["reply"] for _, row in sound],
                prompts=[a.asked.prompt for a, _ in sound],
                completion_ids=[list(a.generation.token_ids or ()) for a, _ in sound],
                **reward_columns([a.asked for a, _ in sound]),
            )
            for i, (_, row) in enumerate(sound):
                row["rewards"] = {name: values[i] for name, values in named.items()}
                if "judged" in row["rewards"]:
                    row["scores"] |= judge_scores(row["answer"], row["rewards"]["judged"])
        rows += batch
    if len(failures) == len(questions):
        raise BackendError(f"all {len(questions)} questions failed, the first: {failures[0]}")
    if failures:
        logger.warning(
            "%d of %d questions failed and have no scores, the first: %s", len(failures), len(questions), failures[0]
        )
    return Evaluation(mean_metrics(rows), rows)


def reward_columns(asked: Iterable[Any]) -> dict[str, list[Any]]:
    """The columns that rewards read, for prepared questions; also the columns of the training set.

    Args:
        asked: prepared questions.

    Returns:
        ``question answers passages passage_ids gold_doc_ids qid`` as equally long lists.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("question", "answers", "passages", "passage_ids", "gold_doc_ids", "qid")
    }
    for a in asked:
        columns["question"].append(a.question.question)
        columns["answers"].append(list(a.question.answers))
        columns["passages"].append([hit.passage.contents for hit in a.shown])
        columns["passage_ids"].append([hit.passage.doc_id for hit in a.shown])
        columns["gold_doc_ids"].append(list(a.question.gold_doc_ids))
        columns["qid"].append(a.question.qid)
    return columns


def score_row(answered: Answered, *, marker: str, top_k: int | None) -> Row:
    """Scores one answered question.

    The retrieval metrics are ``recall@k success@k mrr@10 ndcg@10``. All of them see what was retrieved, at most
    ``top_k`` passages: below 10, ``mrr@10`` and ``ndcg@10`` count a document of a later rank as not found.

    Args:
        answered: question, hits, reply and answer.
        marker: what stands before an answer; decides ``format``.
        top_k: passages asked of the retriever, and cut-off of ``recall@k``; None where there is no retriever.

    Returns:
        A row whose ``scores`` hold ``em f1 contains_em format`` and, with gold documents and a retriever, the
        retrieval metrics; they are 0 where nothing was retrieved. Where the generator's call failed, those of the
        answer are None.
    """
    question, hits = answered.asked.question, answered.asked.hits
    scores: dict[str, float | None] = dict.fromkeys((*ANSWER_METRICS, "format"))
    if answered.failure is None:
        scores = answer_scores(answered.answer, question.answers)
        scores["format"] = float(has_format(answered.generation.text, marker=marker))
    if question.gold_doc_ids and top_k is not None:
        scores |= retrieval_scores(hits, question.gold_doc_ids, top_k=top_k)
    return make_row(answered, scores)


def answer_scores(answer: str | None, accepted: Sequence[str]) -> dict[str, float | None]:
    """Scores an answer.

    Args:
        answer: what was answered, None for nothing.
        accepted: the right answers.

    Returns:
        ``em f1 contains_em``, each in [0, 1].
    """
    return {
        "em": metrics.exact_match(answer, accepted),
        "f1": metrics.token_f1(answer, accepted),
        "contains_em": metrics.contains_match(answer, accepted),
    }


def judge_scores(answer: str | None, score: float | None) -> dict[str, float | None]:
    """Scores an answer by the verdict on it.

    Args:
        answer: what was answered, None for nothing, which is 0 without asking.
        score: of the verdict; None where it could not be read.

    Returns:
        ``judge_accuracy``, in [0, 1] and None where the verdict could not be read; ``judge_readable``, 1 where it
        could and None where there was no answer to judge.

    Example:
        >>> judge_scores("Mira", None)
        {'judge_accuracy': None, 'judge_readable': 0.0}
    """
    return {"judge_accuracy": score, "judge_readable": None if answer is None else float(score is not None)}


def make_row(answered: Answered, scores: dict[str, float | None]) -> Row:
    """Writes down one answered question.

    Args:
        answered: question, hits, reply and answer.
        scores: by name.

    Returns:
        A row without rewards.
    """
    question = answered.asked.question
    return {
        "qid": question.qid,
        "question": question.question,
        "answers": list(question.answers),
        "gold_doc_ids": list(question.gold_doc_ids),
        "passages": [
            {"doc_id": h.passage.doc_id, "title": h.passage.title, "text": h.passage.text, "score": round(h.score, 6)}
            for h in answered.asked.shown
        ],
        "reply": answered.generation.text,
        "answer": answered.answer,
        "scores": scores,
        "rewards": {},
    }


def retrieval_scores(hits: Sequence[Hit], gold_doc_ids: Sequence[str], *, top_k: int) -> dict[str, float | None]:
    """Scores the documents that one search found; several chunks of a document count as one.

    Args:
        hits: best first.
        gold_doc_ids: documents that should be found, at least one.
        top_k: cut-off of recall and success, in passages: what a reader is shown.

    Returns:
        ``recall@k success@k mrr@10 ndcg@10``, each in [0, 1].
    """
    found = list(dict.fromkeys(hit.passage.doc_id for hit in hits))
    shown = [hit.passage.doc_id for hit in hits[:top_k]]
    return {
        f"recall@{top_k}": metrics.recall_at_k(shown, gold_doc_ids, k=top_k),
        f"success@{top_k}": metrics.success_at_k(shown, gold_doc_ids, k=top_k),
        "mrr@10": metrics.mrr_at_k(found, gold_doc_ids, k=10),
        "ndcg@10": metrics.ndcg_of_ids(found, dict.fromkeys(gold_doc_ids, 1.0), k=10),
    }


def evaluate_retrieval(
    retriever: Retriever, questions: Sequence[Question], *, top_k: int, batch_size: int = 256
) -> dict[str, float]:
    """Searches for questions and scores what is found, without a generator.

    Args:
        retriever: what is scored.
        questions: each with gold documents.
        top_k: passages a question.
        batch_size: questions a search.

    Returns:
        Mean of each metric of ``retrieval_scores``.

    Raises:
        DataError: there is no question.
    """
    if not questions:
        raise DataError("there is no question to evaluate on")
    rows: list[Row] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        found = retriever.search([question.question for question in batch], top_k=top_k)
        rows += [
            {"scores": retrieval_scores(hits, question.gold_doc_ids, top_k=top_k)}
            for question, hits in zip(batch, found, strict=True)
        ]
    return mean_metrics(rows)


def mean_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of every metric over the rows where it is defined.

    Args:
        rows: evaluated questions.

    Returns:
        Name to mean; a metric that is defined nowhere is absent.
    """
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    means = {}
    for name in names:
        values = [row["scores"][name] for row in rows if row["scores"].get(name) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


def confidence_intervals(before: Sequence[Row], after: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Paired bootstrap intervals of after - before, for every metric that both have.

    Args:
        before: rows before training.
        after: rows after training, of the same questions.

    Returns:
        Metric to (low, high) at the 95% level.

    Raises:
        DataError: the two are not about the same questions.
    """
    return {name: metrics.paired_bootstrap(old, new) for name, (old, new) in _pairs(before, after).items()}


def answer_differences(baseline: Sequence[Row], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Compares the answers of two assemblies to the same questions; they may have nothing else in common.

    Args:
        baseline: rows of the one.
        rows: rows of the other.

    Returns:
        For each metric of answers that both have (where nobody answers: for each metric), ``difference``, the mean of
        the other less that of the one over the questions where both have a score, and ``ci95``, its paired bootstrap
        interval as [low, high].

    Raises:
        DataError: the two are not about the same questions.
    """
    found = {}
    pairs = _pairs(baseline, rows)
    # Beside answers, what was retrieved is shown, and not compared: the two may have asked for different numbers.
    compared = {*ANSWER_METRICS, "judge_accuracy"} & pairs.keys() or pairs.keys()
    for name, (one, other) in pairs.items():
        if name in compared:
            difference = sum(other) / len(other) - sum(one) / len(one)
            found[name] = {"difference": difference, "ci95": list(metrics.paired_bootstrap(one, other))}
    return found


def _pairs(before: Sequence[Row], after: Sequence[Row]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """The scores of the questions where both sides have one, by metric."""
    if [row["qid"] for row in before] != [row["qid"] for row in after]:
        raise DataError("before and after are not about the same questions: they cannot be compared")
    found: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for name in mean_metrics(before):
        pairs = [
            (b["scores"][name], a["scores"].get(name))
            for b, a in zip(before, after, strict=True)
            if b["scores"].get(name) is not None and a["scores"].get(name) is not None
        ]
        if pairs:
            old, new = zip(*pairs, strict=True)
            found[name] = (old, new)
    return found


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as JSONL, all or nothing.

    Half a character, which a byte-level model may write, is kept as its JSON escape.

    Args:
        path: file to write.
        rows: evaluated questions.
    """
    with whole_file(path) as file:
        # What UTF-8 cannot hold can only stand inside a JSON string, where Python's escape of it is JSON's too.
        file.writelines(
            json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for row in rows
        )


def read_rows(path: Path) -> list[Row]:
    """Reads rows that ``write_rows`` wrote.

    Args:
        path: file to read.

    Returns:
        Evaluated questions.
    """
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
