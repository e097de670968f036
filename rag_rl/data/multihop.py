"""HotpotQA, 2WikiMultihopQA and MuSiQue rows as their authors released them: every row brings its own passages.

The passages of all rows together make the corpus. A passage's id is a hash of its title and text, so that the same
passage has the same id in the training and the development file, whichever is read first.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from rag_rl.data.fields import BadRows, Fields, broken_character, describe
from rag_rl.data.hub import is_hub_source, load_hub_rows
from rag_rl.data.jsonl import read_rows
from rag_rl.data.paths import resolve_data_path
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Passage, Question

Kind: TypeAlias = Literal["hotpotqa", "2wiki", "musique"]

_PREFIXES: dict[str, str] = {"hotpotqa": "hp", "2wiki": "tw", "musique": "mq"}
_log = logging.getLogger(__name__)


def detect_kind(row: Mapping[str, Any]) -> Kind | None:
    """Recognises a native multi-hop row by its fields.

    Args:
        row: the first row of a file.

    Returns:
        Which data set it has the form of; None for any other row.

    Example:
        >>> detect_kind({"id": "2hop__1_2", "question": "?", "paragraphs": []})
        'musique'
        >>> detect_kind({"doc_id": "1", "text": "..."}) is None
        True
    """
    if "question" not in row:
        return None
    if isinstance(row.get("paragraphs"), list):
        return "musique"
    context = row.get("context")
    pairs = isinstance(context, list) and all(isinstance(entry, (list, tuple)) for entry in context)
    columns = isinstance(context, Mapping) and {"title", "sentences"} <= context.keys()
    if pairs or columns:
        return "2wiki" if "evidences" in row else "hotpotqa"
    return None


def read_multihop(path: str | Path, kind: Kind | None = None) -> tuple[list[Passage], list[Question]]:
    """Reads native rows into a corpus and its questions.

    Yang et al. 2018 (HotpotQA), Ho et al. 2020 (2WikiMultihopQA), Trivedi et al. 2022 (MuSiQue). Departures: gold
    documents are whole passages, with the sentence-level facts kept in ``meta``; questions that MuSiQue marks as
    unanswerable give passages to the corpus, but are left out (their ids repeat those of answerable ones).

    Args:
        path: a JSON array or JSONL; ``${data}`` is resolved; or ``hub:<id>:<configuration>:<split>``.
        kind: whose rows they are; None looks at the first row.

    Returns:
        Passages without repetition, in order of appearance; and the questions. ``meta`` holds ``type``,
        ``level``, ``supporting_facts``, ``evidences``, ``decomposition`` (with ``gold_doc_id`` a hop) and
        ``context_doc_ids``, each where the data has it.

    Raises:
        DataError: the file is missing or empty, or has bad rows.
        ConfigError: ``kind`` is none of the three.
    """
    bad = BadRows(path)
    passages: dict[str, Passage] = {}
    questions: list[Question] = []
    first_at: dict[str, int] = {}
    left_out = incomplete = rows = 0
    for number, parsed in _parsed_rows(path, kind, bad):
        rows += 1
        for passage in parsed.passages:
            passages.setdefault(passage.doc_id, passage)
        if parsed.question is None:
            left_out += 1
            continue
        qid = parsed.question.qid
        if qid in first_at:
            bad.add(number, f"id {qid!r} is already on {bad.unit} {first_at[qid]}")
            continue
        first_at[qid] = number
        incomplete += "missing_gold_titles" in parsed.question.meta
        questions.append(parsed.question)
    bad.raise_if_any()
    if not rows:
        raise DataError(f"{path}: the file holds no rows")
    if left_out:
        _log.warning("%s: %d unanswerable questions are left out; their passages stay", path, left_out)
    if incomplete:
        _log.warning("%s: %d questions have a supporting title that is not in their context", path, incomplete)
    return list(passages.values()), questions


def read_multihop_passages(path: str | Path, bad: BadRows) -> Iterator[tuple[int, Passage]]:
    """Reads only the passages of native rows, each once; holds their ids, not their texts.

    Args:
        path: as in ``read_multihop``.
        bad: takes the bad rows.

    Yields:
        Number of the row in which a passage first stands, and the passage.
    """
    seen: set[str] = set()
    for number, parsed in _parsed_rows(path, None, bad):
        for passage in parsed.passages:
            if passage.doc_id not in seen:
                seen.add(passage.doc_id)
                yield number, passage


@dataclass
class _Parsed:
    passages: list[Passage] = field(default_factory=list)
    question: Question | None = None


def _parsed_rows(path: str | Path, kind: Kind | None, bad: BadRows) -> Iterator[tuple[int, _Parsed]]:
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    rows: Iterator[tuple[int, dict[str, Any]]]
    if is_hub_source(path):
        bad.unit = "row"
        rows = iter(load_hub_rows(str(path)))
    else:
        rows = read_rows(resolve_data_path(path), bad)
    for number, row in rows:
        fields = Fields(row)
        kind = kind or detect_kind(row)
        if kind is None:
            bad.add(number, "has neither 'context' (HotpotQA, 2Wiki) nor 'paragraphs' (MuSiQue) beside 'question'")
            continue
        parsed = _musique(fields) if kind == "musique" else _wiki(fields, kind)
        if fields.troubles:
            bad.add_fields(number, fields)
        else:
            yield number, parsed


def _passage(kind: Kind, title: str, text: str) -> Passage:
    digest = hashlib.blake2b(f"{title}\0{text}".encode(), digest_size=8).hexdigest()
    return Passage(doc_id=f"{_PREFIXES[kind]}-{digest}", text=text, title=title)


def _wiki(fields: Fields, kind: Kind) -> _Parsed:
    """HotpotQA and 2WikiMultihopQA: passages as lists of sentences, facts as (title, sentence)."""
    qid, question = fields.identifier("_id", "id"), fields.text("question")
    answers = _answers(fields)
    context = _pairs(fields, "context", "sentences")
    facts = _pairs(fields, "supporting_facts", "sent_id", required=False)
    passages: list[Passage] = []
    by_title: dict[str, tuple[Passage, list[str]]] = {}
    for title, sentences in context:
        if not isinstance(sentences, (list, tuple)) or not all(isinstance(s, str) for s in sentences):
            fields.bad(
                "context", f"must hold [title, [sentence, ...]] pairs, got {describe(sentences)} under {title!r}"
            )
            continue
        text = _join(sentences)
        if broken := broken_character(title + text):
            fields.bad("context", f"{broken}, under {title!r}")
            continue
        if text:
            passages.append(_passage(kind, title, text))
            by_title.setdefault(title, (passages[-1], list(sentences)))
    gold, missing, supporting = [], [], []
    for title, index in facts:
        if isinstance(index, bool) or not isinstance(index, int):
            fields.bad("supporting_facts", f"must hold [title, sentence number] pairs, got {describe(index)}")
        elif title in by_title:
            passage, sentences = by_title[title]
            gold.append(passage.doc_id)
            # A few facts of HotpotQA point behind the last sentence: the document is right all the same.
            sentence = sentences[index].strip() if 0 <= index < len(sentences) else None
            fact = {"doc_id": passage.doc_id, "title": title, "sent_idx": index, "sentence": sentence}
            supporting.append(fact)
        else:
            missing.append(title)
    if fields.troubles:
        return _Parsed()
    known = {name: fields.row[name] for name in ("type", "level", "evidences") if fields.row.get(name) is not None}
    meta = {**known, "context_doc_ids": _unique([passage.doc_id for passage in passages])}
    if supporting:
        meta["supporting_facts"] = supporting
    if missing:
        meta["missing_gold_titles"] = _unique(missing)
    gold_ids = _unique(gold)
    hops = len(gold_ids) + len(_unique(missing))
    return _Parsed(passages, Question(qid, question, answers, tuple(gold_ids), hops or None, meta))


def _musique(fields: Fields) -> _Parsed:
    """MuSiQue: passages as numbered paragraphs, and a sub-question for each hop."""
    qid, question = fields.identifier("id", "_id"), fields.text("question")
    answerable = fields.row.get("answerable") is not False
    answers = _answers(fields) if answerable else ()
    passages: list[Passage] = []
    gold: list[str] = []
    id_of: dict[Any, str] = {}
    for entry in _objects(fields, "paragraphs", required=True):
        title, text = entry.text("title", may_be_empty=True), entry.text("paragraph_text").strip()
        number = entry.integer("idx", lowest=0, required=True)
        if entry.troubles:
            fields.bad("paragraphs", f"holds a bad paragraph: {'; '.join(entry.troubles)}")
            continue
        passages.append(_passage("musique", title, text))
        id_of[number] = passages[-1].doc_id
        if entry.row.get("is_supporting"):
            gold.append(passages[-1].doc_id)
    decomposition: list[dict[str, Any]] = []
    for entry in _objects(fields, "question_decomposition", required=False):
        hop = {"question": entry.text("question"), "answer": entry.text("answer", required=False, may_be_empty=True)}
        support = entry.row.get("paragraph_support_idx")
        if answerable and support is not None and support not in id_of:
            entry.bad("paragraph_support_idx", f"names paragraph {support!r}, which is not among 'paragraphs'")
        if entry.troubles:
            fields.bad("question_decomposition", f"holds a bad step: {'; '.join(entry.troubles)}")
        decomposition.append({**hop, "gold_doc_id": id_of.get(support)})
    if fields.troubles:
        return _Parsed()
    if not answerable:
        return _Parsed(passages)
    meta: dict[str, Any] = {"context_doc_ids": _unique([passage.doc_id for passage in passages])}
    if "__" in qid:
        meta["type"] = qid.split("__", 1)[0]
    if decomposition:
        meta["decomposition"] = decomposition
    hops = len(decomposition) or len(gold) or None
    return _Parsed(passages, Question(qid, question, answers, tuple(_unique(gold)), hops, meta))


def _answers(fields: Fields) -> tuple[str, ...]:
    answer = fields.identifier("answer")
    aliases = fields.texts("answer_aliases", required=False, may_be_empty=True)
    return tuple(_unique([answer, *aliases]))


def _pairs(fields: Fields, name: str, second: str, *, required: bool = True) -> list[tuple[str, Any]]:
    """Reads [[title, x], ...], or the Hub's {"title": [...], second: [...]}."""
    value = fields.row.get(name)
    if name not in fields.row and required:
        fields.missing(name)
        return []
    if value is None and not required:
        return []
    if isinstance(value, Mapping):
        titles, others = value.get("title"), value.get(second)
        if not isinstance(titles, list) or not isinstance(others, list) or len(titles) != len(others):
            fields.bad(name, f"must hold 'title' and {second!r}, lists of the same length")
            return []
        value = list(zip(titles, others, strict=True))
    if not isinstance(value, list):
        fields.bad(name, f"must be a list of pairs, got {describe(value)}")
        return []
    pairs: list[tuple[str, Any]] = []
    for entry in value:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            fields.bad(name, f"must hold [title, ...] pairs, got {describe(entry)}")
            return []
        pairs.append((entry[0], entry[1]))
    if required and not pairs:
        fields.bad(name, "is empty")
    return pairs


def _objects(fields: Fields, name: str, *, required: bool) -> list[Fields]:
    value = fields.row.get(name)
    if value is None and not required:
        return []
    if name not in fields.row:
        fields.missing(name)
        return []
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        fields.bad(name, f"must be a list of objects, got {describe(value)}")
        return []
    if required and not value:
        fields.bad(name, "is empty")
    return [Fields(entry) for entry in value]


def _join(sentences: Sequence[str]) -> str:
    """HotpotQA's sentences bring their leading space, those of 2WikiMultihopQA do not."""
    text = ""
    for sentence in sentences:
        gap = " " if text and sentence and not text[-1].isspace() and not sentence[0].isspace() else ""
        text += gap + sentence
    return text.strip()


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))
