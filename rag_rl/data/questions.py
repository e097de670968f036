"""Questions with their answers and gold documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rag_rl.data.beir import beir_qrels, beir_queries, load_qrels, relevant_ids
from rag_rl.data.fields import BadRows, Fields
from rag_rl.data.hub import is_hub_source, load_hub_rows
from rag_rl.data.jsonl import read_rows, write_jsonl
from rag_rl.data.multihop import detect_kind, read_multihop
from rag_rl.data.paths import resolve_data_path
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Question

QUESTION_FIELDS = ("qid", "question", "answers", "gold_doc_ids", "hops")
_SHOWN = 5
_NO_ANSWERS = "questions without answers serve retrieval only: require_answers=False takes them"


def load_questions(
    source: str | Path,
    *,
    require_answers: bool = True,
    split: str | None = None,
    qrels: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Question]:
    """Reads questions: docs/data_formats.md shows every form.

    Args:
        source: JSONL or a JSON array of ``{qid, question, answers, gold_doc_ids?, hops?, ...}`` (further fields go to
            ``meta``); native multi-hop rows; a BEIR folder; or ``hub:<data set id>[:<configuration>][:<split>]``.
        require_answers: whether a question without answers is an error; False for retrieval alone.
        split: of a BEIR folder: which judgements to take; None when there is only one file of them.
        qrels: file of relevance judgements that give the gold documents; questions without a relevant one are left
            out.
        columns: our field -> the field of the source, for other names, as in ``{"qid": "id", "answers": "answer"}``. A
            field named so may hold one answer as plain text.

    Returns:
        The questions in the source's order.

    Raises:
        DataError: nothing is there, it is empty, or has bad rows or repeated ids.
        ConfigError: an option does not fit the source.
        BackendError: the Hub cannot be reached.
    """
    columns = dict(columns or {})
    if unknown := [name for name in columns if name not in QUESTION_FIELDS]:
        raise ConfigError(f"columns: {unknown[0]!r} is none of our fields: {', '.join(QUESTION_FIELDS)}")
    path: str | Path = source
    if not is_hub_source(source):
        path = resolve_data_path(source)
        if path.is_dir():
            path = beir_queries(source)
            qrels = qrels if qrels is not None else beir_qrels(source, split)
        elif split is not None:
            raise ConfigError(f"split is for BEIR folders, got split={split!r} with the file {source}")
    elif split is not None:
        raise ConfigError(f"a split of the Hub is part of the source: {source}:{split}")
    bad = BadRows(path)
    if not columns and (first := next(_rows(path, BadRows(path)), None)) and detect_kind(first[1]):
        questions = read_multihop(path)[1]
    else:
        questions = list(_read(_rows(path, bad), columns, require_answers, bad))
        bad.raise_if_any()
    if not questions:
        raise DataError(f"{source}: there are no questions in it")
    return _with_gold(questions, qrels, source) if qrels is not None else questions


def write_questions(path: str | Path, questions: Iterable[Question]) -> int:
    """Writes questions as JSONL that ``load_questions`` reads; the file appears whole or not at all.

    Args:
        path: the file; an existing one is replaced at the very end.
        questions: what to write. ``meta`` is written as further fields.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written, or ``meta`` holds a field of our own or something that JSON cannot.
    """
    return write_jsonl(path, (_row_of(question) for question in questions))


def _row_of(question: Question) -> dict[str, Any]:
    row: dict[str, Any] = {"qid": question.qid, "question": question.question, "answers": list(question.answers)}
    if question.gold_doc_ids:
        row["gold_doc_ids"] = list(question.gold_doc_ids)
    if question.hops is not None:
        row["hops"] = question.hops
    if clash := [name for name in question.meta if name in QUESTION_FIELDS]:
        raise DataError(f"question {question.qid!r}: its meta holds {clash[0]!r}, which is a field of its own")
    return {**row, **question.meta}


def _rows(path: str | Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    if is_hub_source(path):
        bad.unit = "row"
        return iter(load_hub_rows(str(path)))
    return read_rows(path, bad)


def _read(
    rows: Iterable[tuple[int, dict[str, Any]]], columns: Mapping[str, str], require_answers: bool, bad: BadRows
) -> Iterator[Question]:
    first_at: dict[str, int] = {}
    name = {field: columns.get(field, field) for field in QUESTION_FIELDS}
    for number, row in rows:
        fields = Fields(row)
        # BEIR's own names, where ours are not there.
        qid_names = (name["qid"],) if "qid" in columns else ("qid", "_id")
        text_name = "text" if name["question"] == "question" not in row and "text" in row else name["question"]
        qid, text = fields.identifier(*qid_names), fields.text(text_name)
        if "answers" in columns and isinstance(row.get(name["answers"]), (str, int)):
            answers: tuple[str, ...] = (fields.identifier(name["answers"]),)
        else:
            optional = not require_answers
            answers = fields.texts(name["answers"], required=require_answers, may_be_empty=optional)
            if require_answers and not row.get(name["answers"]):
                bad.hint = _NO_ANSWERS
        gold = fields.texts(name["gold_doc_ids"], required=False, may_be_empty=True)
        hops = fields.integer(name["hops"], lowest=1)
        if qid and qid in first_at:
            fields.bad(qid_names[0], f"{qid!r} is already on {bad.unit} {first_at[qid]}")
        if fields.troubles:
            bad.add_fields(number, fields)
            continue
        first_at[qid] = number
        used = {*name.values(), *qid_names, text_name}
        yield Question(qid, text, answers, gold, hops, {key: value for key, value in row.items() if key not in used})


def _with_gold(questions: list[Question], qrels: str | Path, source: str | Path) -> list[Question]:
    judged = {qid: relevant_ids(gains) for qid, gains in load_qrels(qrels).items()}
    known = {question.qid for question in questions}
    if strange := [qid for qid in judged if qid not in known]:
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        shown = ", ".join(map(repr, strange[:_SHOWN]))
        raise DataError(f"{qrels}: judges questions that {source} does not have: {shown}{more}")
    kept = [replace(q, gold_doc_ids=judged[q.qid]) for q in questions if judged.get(q.qid)]
    if not kept:
        raise DataError(f"{qrels}: no question of {source} has a relevant document (score above 0) in it")
    return kept
