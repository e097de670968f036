"""Training data of a reranker: queries with documents that answer them and documents that do not.

One row a query, as docs/data_formats.md shows it. The rows come from a file (``load_pairs``) or are made from
questions with known documents and a retriever (``mine_pairs``). They are split so that neither a query nor a source
chunk is on both sides (``split_pairs``, ``check_leakage``), and every epoch draws other negatives (``PairSampler``).

A document is known by its text, up to case and spaces: ids may be counted from 1 in every row.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag_rl.data.fields import BadRows, Fields, describe
from rag_rl.data.jsonl import read_rows, write_jsonl
from rag_rl.data.splits import split_questions
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Hit, Passage, Question, Retriever

logger = logging.getLogger(__name__)

RETRIEVED = "retrieved"
"""Field of ``meta`` in which ``mine_pairs`` notes the ids of the documents in the retriever's order."""
RETRIEVED_SCORES = "retrieved_scores"
"""The same with the retriever's scores of these documents."""
ANSWERS = "answers"
"""The same with the accepted answers of a question that has some: what a reader's reward needs."""
_SHOWN = 5
# Random documents that are tried before all of them are looked through.
_TRIES = 20


@dataclass(frozen=True, slots=True)
class PairRow:
    """One query with its documents.

    Attributes:
        query: the text that is asked.
        positives: documents that answer it, at least one.
        negatives: documents that do not, hardest first where the order means something.
        source_chunk: what the query was written from; rows that share it stay on one side of a split.
        meta: anything else, carried through.
    """

    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    source_chunk: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def load_pairs(path: str | Path) -> list[PairRow]:
    """Reads JSONL rows ``{query_text, positives[], negatives[], source_chunk?, meta?}``, documents ``{doc_id, text}``.

    Args:
        path: the file, JSONL or a JSON array; ``${data}`` is resolved.

    Returns:
        The rows in the file's order.

    Raises:
        DataError: the file is missing, empty or has bad rows: an empty query, no positive, a document that is positive
            and negative (in one row, or for the same query in two), an id with two texts in a row, or a field that is
            not what it must be.
    """
    bad = BadRows(path)
    rows: list[PairRow] = []
    side_at: dict[tuple[str, str], tuple[str, int]] = {}
    for number, raw in read_rows(path, bad):
        fields = Fields(raw)
        query = fields.text("query_text")
        positives, negatives = _documents(fields, "positives"), _documents(fields, "negatives")
        if isinstance(raw.get("positives"), list) and not raw["positives"]:
            fields.bad("positives", "is empty: a query needs at least one document that answers it")
        _check_ids(fields, positives, negatives)
        source = fields.text("source_chunk", required=False) or None
        meta = raw.get("meta")
        if meta is not None and not isinstance(meta, dict):
            fields.bad("meta", f"must be an object, got {describe(meta)}")
        if not fields.troubles:
            _check_sides(fields, query, positives, negatives, side_at, f"{bad.unit} {{}}", number)
        if fields.troubles:
            bad.add_fields(number, fields)
        else:
            rows.append(PairRow(query, positives, negatives, source, meta or {}))
    bad.raise_if_any()
    if not rows:
        raise DataError(f"{path}: there are no queries in it")
    return rows


def write_pairs(path: str | Path, rows: Iterable[PairRow]) -> int:
    """Writes rows as JSONL that ``load_pairs`` reads; the file appears whole or not at all.

    Args:
        path: the file; an existing one is replaced at the very end.
        rows: what to write. A document's title becomes the first line of its text.

    Returns:
        How many were written.

    Raises:
        DataError: the file cannot be written, or ``meta`` holds something that JSON cannot.
    """
    return write_jsonl(path, (_row_of(row) for row in rows))


def split_pairs(rows: Sequence[PairRow], *, eval_size: int | float, seed: int) -> tuple[list[PairRow], list[PairRow]]:
    """Splits rows into those to train on and those to evaluate on, by query and by source chunk.

    Rows that share a query or a source chunk, directly or through other rows, stay on one side. The side follows from
    a hash of the rows and the seed: the order of the file does not matter.

    Args:
        rows: at least two.
        eval_size: an int is the number of evaluation rows; a float in (0, 1) is their share. Where groups do not fit,
            the number falls short.
        seed: another seed is another split.

    Returns:
        Training rows and evaluation rows, each in their given order.

    Raises:
        ConfigError: ``eval_size`` has no meaning, or leaves one side empty.
    """
    counted: dict[str, int] = {}
    by_id: dict[str, PairRow] = {}
    for row in rows:
        content = repr((row.query, [(p.doc_id, p.contents) for p in (*row.positives, *row.negatives)]))
        key = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        counted[key] = counted.get(key, 0) + 1
        by_id[f"{key}/{counted[key]}"] = row
    questions = [Question(key, row.query, ()) for key, row in by_id.items()]
    chunks = {key: f"chunk {row.source_chunk}" if row.source_chunk else f"row {key}" for key, row in by_id.items()}
    sides = split_questions(questions, eval_size=eval_size, seed=seed, by=lambda question: chunks[question.qid])
    train, held_out = ([by_id[question.qid] for question in side] for side in sides)
    return train, held_out


def check_leakage(train: Sequence[PairRow], held_out: Sequence[PairRow], *, names: tuple[str, str]) -> None:
    """Makes sure that no query and no source chunk is on both sides.

    Args:
        train: rows to train on.
        held_out: rows to evaluate on.
        names: of the two files, for the error.

    Raises:
        DataError: something is on both sides; the first five are named.
    """
    queries = {_key(row.query) for row in train}
    chunks = {row.source_chunk for row in train if row.source_chunk}
    leaks = [f"query {row.query!r}" for row in held_out if _key(row.query) in queries]
    leaked = (row.source_chunk for row in held_out if row.source_chunk in chunks)
    leaks += [f"source_chunk {chunk!r}" for chunk in dict.fromkeys(leaked)]
    if leaks:
        more = f"; and {len(leaks) - _SHOWN} more" if len(leaks) > _SHOWN else ""
        raise DataError(
            f"{names[1]}: {len(leaks)} of its queries and source chunks are also in {names[0]}: "
            f"{'; '.join(leaks[:_SHOWN])}{more}; take them out of one of the two files"
        )


class PairSampler:
    """Draws the documents that a query is trained on, anew in every epoch.

    What is drawn follows from the seed, the epoch and the row alone: a resumed run draws what the uninterrupted one
    would have. Hard negatives are the row's own; random ones are documents of other queries. A query never meets one
    of its positives as a negative, whatever row it stands in; where one kind runs short, the other fills up.

    Args:
        rows: to train on.
        negatives: drawn for a query; fewer where there are no more.
        hard_share: in [0, 1], share of hard ones among them; 0.5 of 3 is once one and once two.
        seed: another seed draws others.
        positives: of a query with more, so many are drawn as well; None takes all.

    Raises:
        ConfigError: a number out of its range.
        DataError: there is no row, or no negative for one of them.
    """

    def __init__(
        self,
        rows: Sequence[PairRow],
        *,
        negatives: int,
        hard_share: float,
        seed: int,
        positives: int | None = None,
    ) -> None:
        if negatives < 1 or (positives is not None and positives < 1):
            raise ConfigError(f"a query needs at least 1 positive and 1 negative, got {positives} and {negatives}")
        if not 0.0 <= hard_share <= 1.0:
            raise ConfigError(f"the share of hard negatives must lie in [0, 1], got {hard_share}")
        if not rows:
            raise DataError("there is no query to train on")
        self.rows, self.seed = list(rows), seed
        self.n_negatives, self.n_positives, self.hard_share = negatives, positives, hard_share
        self._answers: dict[str, set[str]] = {}
        texts: dict[str, None] = {}
        for row in self.rows:
            self._answers.setdefault(_key(row.query), set()).update(_key(p.contents) for p in row.positives)
            texts.update(dict.fromkeys(p.contents for p in (*row.positives, *row.negatives)))
        self._pool = list(texts)
        self._pool_keys = [_key(text) for text in self._pool]
        distinct = set(self._pool_keys)
        self._hard: list[list[str]] = []
        for row in self.rows:
            taken = set(self._answers[_key(row.query)])
            if not distinct - taken:
                raise DataError(f"query {row.query!r} has no negative: no document is anything but its positive")
            self._hard.append([p.contents for p in row.negatives if not _seen(p.contents, taken)])

    def __len__(self) -> int:
        """Counts the rows.

        Returns:
            How many there are.
        """
        return len(self.rows)

    def draw(self, number: int, epoch: int) -> tuple[str, list[str], list[float]]:
        """Draws the documents of a query.

        Args:
            number: of the row, from 0.
            epoch: from 0.

        Returns:
            The query, its documents, positives first, and as many labels: 1 for a positive, 0 for a negative.
        """
        row = self.rows[number]
        # The number keeps two rows of the same query apart.
        seed = hashlib.blake2b(f"{self.seed}/{epoch}/{number}/{row.query}".encode(), digest_size=16).digest()
        rng = random.Random(int.from_bytes(seed, "little"))
        positives = [passage.contents for passage in row.positives]
        if self.n_positives is not None and len(positives) > self.n_positives:
            positives = rng.sample(positives, self.n_positives)
        hard, exact = self._hard[number], self.hard_share * self.n_negatives
        wanted = int(exact) + (rng.random() < exact - int(exact))
        negatives = rng.sample(hard, min(wanted, len(hard)))
        # Those that were not drawn may still come as random documents of the collection.
        taken = self._answers[_key(row.query)] | {_key(text) for text in negatives}
        negatives += self._random(self.n_negatives - len(negatives), taken, rng)
        return row.query, positives + negatives, [1.0] * len(positives) + [0.0] * len(negatives)

    def _random(self, count: int, taken: set[str], rng: random.Random) -> list[str]:
        found: list[str] = []
        for _ in range(_TRIES * count):
            if len(found) == count:
                return found
            place = rng.randrange(len(self._pool))
            if self._pool_keys[place] not in taken:
                taken.add(self._pool_keys[place])
                found.append(self._pool[place])
        left = [place for place, key in enumerate(self._pool_keys) if key not in taken]
        rng.shuffle(left)
        for place in left:
            if len(found) < count and not _seen(self._pool[place], taken):
                found.append(self._pool[place])
        return found


def mine_pairs(
    questions: Sequence[Question],
    retriever: Retriever,
    *,
    passages: Iterable[Passage],
    top_k: int,
    margin: float | None = None,
    meta: bool = True,
) -> list[PairRow]:
    """Makes rows from questions with known documents: what a retriever finds and should not is a hard negative.

    A document that answers the question without anybody having judged it so would be a false negative. Passages of a
    gold document are never negatives, nor is one of the same text. With ``margin``, neither is what the retriever
    scores above ``(1 - margin)`` times the gold's score, as near-duplicates of the gold are (NV-Retriever, arXiv
    2407.15831, section 3, "TopK-PercPos" with 1 - margin = 0.95). The price is that true rivals which the
    retriever prefers are lost as well; where every relevant document is known, leave it out.

    Args:
        questions: with gold document ids; all are searched for at once.
        retriever: finds the negatives.
        passages: the corpus that the gold documents' texts are read from, once; of a document in chunks every chunk is
            a positive.
        top_k: passages searched for a question.
        margin: in [0, 1]; None for none.
        meta: whether ``meta`` notes the question's id and answers, and the documents that the retriever found, in its
            order and with its scores.

    Returns:
        A row for each question of which a gold document is in the corpus, in their order; the others are counted in
        the log.

    Raises:
        ConfigError: ``margin`` out of range.
        DataError: no question is left.
    """
    if margin is not None and not 0.0 <= margin <= 1.0:
        raise ConfigError(f"the margin of false negatives must lie in [0, 1], got {margin}")
    wanted = {doc_id for question in questions for doc_id in question.gold_doc_ids}
    gold: dict[str, list[Passage]] = {}
    for passage in passages:
        if passage.doc_id in wanted:
            gold.setdefault(passage.doc_id, []).append(passage)
    known = [question for question in questions if any(doc_id in gold for doc_id in question.gold_doc_ids)]
    if len(known) < len(questions):
        logger.warning(
            "%d of %d questions are left out: the corpus lacks their gold documents, or they name none",
            len(questions) - len(known),
            len(questions),
        )
    if not known:
        raise DataError(f"none of the {len(questions)} questions has a gold document in the corpus")
    rows = []
    guarded = 0
    found = retriever.search([question.question for question in known], top_k=top_k)
    for question, hits in zip(known, found, strict=True):
        positives = [p for doc_id in question.gold_doc_ids for p in gold.get(doc_id, ())]
        negatives = list(_negatives(question, hits, positives, margin=None))
        if margin is not None:
            allowed = list(_negatives(question, hits, positives, margin=margin))
            guarded += len(negatives) - len(allowed)
            negatives = allowed
        noted: dict[str, Any] = {}
        if meta:
            noted = {"qid": question.qid, RETRIEVED: [_id(hit.passage) for hit in hits]}
            noted[RETRIEVED_SCORES] = [float(hit.score) for hit in hits]
            noted |= {ANSWERS: list(question.answers)} if question.answers else {}
        source = question.meta.get("source_chunk")
        rows.append(
            PairRow(
                question.question,
                tuple(_plain(passage) for passage in positives),
                tuple(_plain(passage) for passage in negatives),
                source if isinstance(source, str) else None,
                noted,
            )
        )
    if guarded:
        logger.info(
            "%d documents score within %.0f%% of a gold one and are no negatives", guarded, 100 * (margin or 0)
        )
    return rows


def _negatives(
    question: Question, hits: Sequence[Hit], positives: Sequence[Passage], *, margin: float | None
) -> Iterator[Passage]:
    gold, taken = set(question.gold_doc_ids), {_key(passage.contents) for passage in positives}
    limit = float("inf")
    if margin is not None:
        # The lowest gold that was found; what was not found scores below everything that was.
        scores = [hit.score for hit in hits if hit.passage.doc_id in gold]
        limit = min(scores) - margin * abs(min(scores)) if scores else float("-inf")
    for hit in hits:
        if hit.passage.doc_id not in gold and hit.score <= limit and not _seen(hit.passage.contents, taken):
            yield hit.passage


def _documents(fields: Fields, name: str) -> tuple[Passage, ...]:
    listed = fields.row.get(name)
    if name not in fields.row:
        fields.missing(name)
        return ()
    if not isinstance(listed, list):
        fields.bad(name, f"must be a list of objects with doc_id and text, got {describe(listed)}")
        return ()
    documents = []
    for place, entry in enumerate(listed):
        if not isinstance(entry, dict):
            fields.bad(f"{name}[{place}]", f"must be an object with doc_id and text, got {describe(entry)}")
            continue
        inner = Fields({f"{name}[{place}].{key}": value for key, value in entry.items()})
        doc_id, text = inner.text(f"{name}[{place}].doc_id"), inner.text(f"{name}[{place}].text")
        fields.troubles += inner.troubles
        if not inner.troubles:
            documents.append(Passage(doc_id, text))
    return tuple(documents)


def _check_ids(fields: Fields, positives: Sequence[Passage], negatives: Sequence[Passage]) -> None:
    texts: dict[str, str] = {}
    for name, documents in (("positives", positives), ("negatives", negatives)):
        for passage in documents:
            if texts.setdefault(passage.doc_id, passage.text) != passage.text:
                fields.bad(name, f"has the id {passage.doc_id!r} with another text than before in this row")


def _check_sides(
    fields: Fields,
    query: str,
    positives: Sequence[Passage],
    negatives: Sequence[Passage],
    side_at: dict[tuple[str, str], tuple[str, int]],
    where: str,
    number: int,
) -> None:
    """Notes the side of each document of a query, over all of its rows, and that none is on both."""
    for name, documents in (("positives", positives), ("negatives", negatives)):
        for passage in documents:
            side, first = side_at.setdefault((_key(query), _key(passage.text)), (name, number))
            if side != name:
                place = "" if first == number else f" on {where.format(first)}, for the same query"
                fields.bad(name, f"has the document {passage.doc_id!r}, which is also among the {side}{place}")


def _row_of(row: PairRow) -> dict[str, Any]:
    written: dict[str, Any] = {"query_text": row.query}
    for name, documents in (("positives", row.positives), ("negatives", row.negatives)):
        written[name] = [{"doc_id": passage.doc_id, "text": passage.contents} for passage in documents]
    if row.source_chunk is not None:
        written["source_chunk"] = row.source_chunk
    return {**written, "meta": dict(row.meta)} if row.meta else written


def _plain(passage: Passage) -> Passage:
    """A document as a reranker reads it: its title in its text, and a chunk under an id of its own."""
    return Passage(_id(passage), passage.contents)


def _id(passage: Passage) -> str:
    return f"{passage.doc_id}#{passage.chunk}" if passage.chunk else passage.doc_id


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _seen(text: str, taken: set[str]) -> bool:
    """Whether a text is in a set already; it is afterwards."""
    key = _key(text)
    if key in taken:
        return True
    taken.add(key)
    return False
