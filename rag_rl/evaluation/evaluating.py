"""An evaluation that writes as it goes: rows to disk batch by batch, an interruption costs one batch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rag_rl.errors import BackendError, DataError, RunFolderError
from rag_rl.evaluation.row_files import RowFile, RowWriter, ScoreTable, score_table
from rag_rl.evaluation.scoring import Evaluable
from rag_rl.evaluation.significance import mean_interval, permutation_test
from rag_rl.metrics import paired_bootstrap
from rag_rl.types import Question

logger = logging.getLogger(__name__)

# Shared evenly by the questions of a batch: they are no sample of anything.
_WITHOUT_INTERVAL = frozenset({"seconds"})
# Files of processes that have not come to their end: ``.rows.0.part``.
_PART = ".{stem}.{rank}.part"


def evaluate_to_file(
    assembly: Evaluable, questions: Sequence[Question], path: Path, *, batch_size: int = 256
) -> ScoreTable:
    """Answers questions greedily, scores them and writes a row each; goes on where an earlier call was stopped.

    Only the scores are kept in memory. With several processes each takes its share of what is left, however many there
    were before; all of them get the whole result. A question whose call failed alone has no scores and is not asked
    again.

    Args:
        assembly: any.
        questions: with ids of their own.
        path: JSONL file to write, in the order of the questions; appears when it is whole. Where it is there already,
            nothing is asked.
        batch_size: questions a batch; at most so many answers are lost to a kill.

    Returns:
        The scores of all questions, in their order.

    Raises:
        DataError: there is no question.
        BackendError: the backend or the disk failed, or every question did.
        RunFolderError: the file there has other questions.
    """
    from accelerate import PartialState

    if not questions:
        raise DataError("there is no question to evaluate on")
    if path.is_file():
        found = score_table(RowFile(path))
        if [qid for qid, _ in found.keys] != [question.qid for question in questions]:
            raise RunFolderError(f"{path} is about other questions: give another --output_dir")
        return found
    state = PartialState()
    parts = _parts(path)
    known = {qid for part in parts for qid in _qids(part)}
    state.wait_for_everyone()  # nobody writes while another still reads
    left = [question for question in questions if question.qid not in known]
    if known:
        logger.info("%s: %d of %d questions are answered already", path.stem, len(known), len(questions))
    own = left[state.process_index :: state.num_processes]
    part = path.with_name(_PART.format(stem=path.stem, rank=state.process_index))
    step = max(1, len(own) // batch_size // 10) * batch_size
    with RowWriter(part) as writer:
        for start in range(0, len(own), batch_size):
            answered = [one for (one,) in assembly.answer(own[start : start + batch_size])]
            failures = [one.failure for one in answered if one.failure is not None]
            if len(failures) == len(answered) > 1:
                raise BackendError(f"all {len(failures)} questions of a batch failed, the first: {failures[0]}")
            if failures:
                logger.warning("%d questions failed and have no scores, the first: %s", len(failures), failures[0])
            writer.write(assembly.row(one) for one in answered)
            if start and start % step == 0:
                logger.info("%s: %d of %d questions", path.stem, start, len(own))
    state.wait_for_everyone()
    if state.is_main_process:
        _join(_parts(path), path, questions)
    state.wait_for_everyone()
    return score_table(RowFile(path))


def summarise(table: ScoreTable) -> dict[str, Any]:
    """Means of an evaluation, with their intervals.

    Args:
        table: its scores.

    Returns:
        ``metrics``, ``mean_ci95`` (percentile bootstrap over questions) and ``n_eval``.
    """
    found = table.means()
    spans = {name: list(mean_interval(_known(table.columns[name]))) for name in found if name not in _WITHOUT_INTERVAL}
    return {"metrics": found, "mean_ci95": spans, "n_eval": len(table.keys)}


def differences(one: ScoreTable, other: ScoreTable) -> dict[str, dict[str, Any]]:
    """Compares two assemblies on the same questions, metric by metric.

    Args:
        one: scores of the one that is the measure.
        other: scores of the other, of the same questions in the same order.

    Returns:
        For each metric that both have: ``difference``, the mean of the other less that of the one over the questions
        where both have a score; ``ci95``, its paired bootstrap interval; ``p`` of a paired permutation test; and
        ``n``, how many questions these are. ``seconds`` have neither interval nor p.

    Raises:
        DataError: the two are not about the same questions.
    """
    if one.keys != other.keys:
        raise DataError("the two are not about the same questions: they cannot be compared")
    found: dict[str, dict[str, Any]] = {}
    for name in one.columns:
        if name not in other.columns:
            continue
        both = ~(np.isnan(one.columns[name]) | np.isnan(other.columns[name]))
        if not both.any():
            continue
        old, new = one.columns[name][both], other.columns[name][both]
        if name in _WITHOUT_INTERVAL:
            change = float(new.mean() - old.mean())
            found[name] = {"difference": change, "ci95": None, "p": None, "n": int(both.sum())}
            continue
        found[name] = {
            "difference": float(new.mean() - old.mean()),
            "ci95": list(paired_bootstrap(old, new)),  # type: ignore[arg-type]
            "p": permutation_test(old, new),  # type: ignore[arg-type]
            "n": int(both.sum()),
        }
    return found


def check_gold(
    questions: Sequence[Question], known: Collection[str], *, source: str, unknown: str = "error"
) -> list[Question]:
    """Looks for gold documents that the corpus does not hold: no retriever could find them.

    Args:
        questions: to evaluate on.
        known: the gold documents that the corpus holds.
        source: what the questions came from, for the message.
        unknown: ``"error"``; ``"drop"`` leaves such questions out; ``"missed"`` keeps them, the document as not found.

    Returns:
        The questions to evaluate on.

    Raises:
        DataError: some gold documents are unknown and that is an error, or no question is left.
    """
    lost = {q.qid: [doc for doc in q.gold_doc_ids if doc not in known] for q in questions}
    bad = {qid: docs for qid, docs in lost.items() if docs}
    if not bad:
        return list(questions)
    shown = "; ".join(f"{qid}: {', '.join(docs[:3])}" for qid, docs in list(bad.items())[:3])
    if unknown == "error":
        raise DataError(
            f"{source}: {len(bad)} of {len(questions)} questions have gold documents that the corpus does not hold "
            f"({shown}): take the corpus that they were made for, or set evaluation_unknown_gold to drop or missed"
        )
    logger.warning("%d of %d questions have gold documents that the corpus does not hold", len(bad), len(questions))
    kept = [question for question in questions if unknown == "missed" or question.qid not in bad]
    if not kept:
        raise DataError(f"{source}: the corpus holds the gold documents of no question ({shown})")
    return kept


def _known(column: np.ndarray) -> Any:
    return column[~np.isnan(column)]


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(_PART.format(stem=path.stem, rank="*")))


def _qids(part: Path) -> list[str]:
    return [str(row["qid"]) for row in RowFile(part)]


def _join(parts: Sequence[Path], path: Path, questions: Sequence[Question]) -> None:
    """Writes the rows of all parts in the order of the questions, and removes the parts."""
    files = [RowFile(part) for part in parts]
    places = {str(row["qid"]): (number, i) for number, file in enumerate(files) for i, row in enumerate(file)}
    half = path.with_name(f".{path.name}.half")
    try:
        with ExitStack() as stack:
            target = stack.enter_context(half.open("wb"))
            sources = [stack.enter_context(part.open("rb")) for part in parts]
            for question in questions:
                number, i = places[question.qid]
                start, end = files[number].span(i)
                sources[number].seek(start)
                target.write(sources[number].read(end - start))
        half.replace(path)
    except OSError as error:
        raise BackendError(f"{path}: cannot be written: {error.strerror or error}") from error
    for part in parts:
        part.unlink()
