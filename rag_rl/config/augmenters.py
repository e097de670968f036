"""From names to the parts of query augmentation: an index, queries whose passages are known, an augmenter, the two."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments
from rag_rl.config.parts import build_questions, build_retriever, expand, import_attribute
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Array, Generator, IntArray, Passage, Question

if TYPE_CHECKING:
    from rag_rl.generation import QueryAugmenter
    from rag_rl.retrieval import DenseRetriever, Encoder
    from rag_rl.retrieval.augmented import AugmentedRetriever, Augmenter

logger = logging.getLogger(__name__)

# Read in one go from an index: few calls, and little of a large corpus in memory.
_PASSAGES_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class SourcedQuery:
    """A query whose passages are known.

    Attributes:
        question: the query; its ``gold_doc_ids`` name the documents of its passages.
        rows: of these passages in the index, at least one; several where a document has chunks or there are several
            documents.
    """

    question: Question
    rows: tuple[int, ...]

    @property
    def text(self) -> str:
        """The query itself."""
        return self.question.question


def build_dense_index(retriever: RetrieverArguments, data: DataArguments) -> DenseRetriever:
    """Opens the index that an augmenter or a retriever learns with, building it first where there is none.

    Args:
        retriever: the encoder.
        data: the corpus.

    Returns:
        A retriever that gives vectors.

    Raises:
        ConfigError: the retriever is none that gives vectors, is shuffled or has a reranker.
        DataError: the corpus is missing, empty or has bad rows.
        RetrievalIndexError: the index does not fit or is damaged.
    """
    if retriever.retriever_name != "dense" or retriever.retriever_shuffled or retriever.retriever_reranker:
        raise ConfigError(
            "query vectors are mixed here: retriever_name must be dense, without retriever_shuffled and "
            "retriever_reranker"
        )
    return cast("DenseRetriever", build_retriever(retriever, data))


def build_queries(
    data: DataArguments, passages: Sequence[Passage], *, seed: int
) -> tuple[list[SourcedQuery], list[SourcedQuery]]:
    """Loads queries to learn from and held-out ones, each with its passages.

    ``data_train`` and ``data_eval`` are questions with gold documents, a ``queries.json`` of Reinforced-IR, or a
    folder that ``synthesize_queries`` wrote. Left out, and counted in the log, are queries whose passage the corpus
    lacks, and queries to learn from that are worded as a held-out one is: who writes queries for a corpus may well
    hit upon one of them.

    Args:
        data: where they are.
        passages: of the index, by row.
        seed: of the split, and of the choice where there are more than asked for.

    Returns:
        Queries to learn from, and held-out ones; none of the ones is worded as one of the others.

    Raises:
        ConfigError: no file is named, or settings exclude each other.
        DataError: a file is missing or has bad rows, no query to learn from is left, or the corpus holds no passage
            of any query.
    """
    if not data.data_train:
        raise ConfigError(
            "data_train is not set: name questions with gold documents, a queries.json, or a folder of "
            "synthesize_queries"
        )
    sources: dict[str, Any] = {
        name: _source(getattr(data, name)) for name in ("data_train", "data_eval") if getattr(data, name)
    }
    published = {name: _published(source) for name, source in sources.items()}
    known: dict[str, tuple[int, ...]] = {}
    if data.data_folds:
        if any(found is not None for found in published.values()):
            raise ConfigError("data_folds is for files of questions: with a queries.json name data_eval, or neither")
        train, held_out = build_questions(replace(data, **sources), seed=seed, require_answers=False)
    else:
        by_text = _rows_by_text(passages, [text for found in published.values() for _, text in found or ()])
        sides = {name: _load(replace(data, **sources), name, published[name], by_text, known) for name in sources}
        train, held_out = _split(data, sides["data_train"], sides.get("data_eval"), seed=seed)
    of_document = _rows_by_document(passages, (doc for q in (*train, *held_out) for doc in q.gold_doc_ids))
    return (
        _sourced(train, known, of_document, source=data.data_train),
        _sourced(held_out, known, of_document, source=data.data_eval or data.data_train),
    )


def own_rows(queries: Sequence[SourcedQuery], vectors: Array, index: DenseRetriever) -> IntArray:
    """The one passage that each query is trained with: of several, the one that the bare query is most similar to.

    Args:
        queries: B queries.
        vectors: (B, D) of the bare queries.
        index: with the passages.

    Returns:
        (B,) int64 rows.
    """
    chosen = []
    for query, vector in zip(queries, vectors, strict=True):
        rows = np.array(query.rows, dtype=np.int64)
        chosen.append(rows[0] if len(rows) == 1 else rows[int((index.vectors(rows) @ vector).argmax())])
    return np.array(chosen, dtype=np.int64)


def build_augmenter(args: AugmenterArguments, model: AugmenterModelArguments) -> QueryAugmenter | None:
    """Builds the augmenter by name.

    Args:
        args: how it is asked.
        model: who it is.

    Returns:
        An augmenter; None for ``none``. For ``package.module:attribute`` whatever that returns for both arguments.

    Raises:
        ConfigError: an unknown name, a model or a prompt is missing, or the prompt does not fit.
        DataError: a local model cannot be loaded.
    """
    from rag_rl.generation import OpenAIGenerator, TransformersGenerator

    generator: Any
    match model.augmenter_name:
        case "none":
            return None
        case "local":
            from accelerate import PartialState

            where = _model(model)
            generator = TransformersGenerator.from_pretrained(
                where,
                dtype=model.augmenter_dtype,
                device=PartialState().device,
                adapter=expand(model.augmenter_adapter) if model.augmenter_adapter else None,
                batch_size=args.augmenter_batch_size,
            )
            return wrap_generator(args, generator, name=f"{where} {_stamp(where, model.augmenter_adapter)}")
        case "openai":
            generator = OpenAIGenerator(
                _model(model),
                base_url=model.augmenter_base_url,
                api_key_env=model.augmenter_api_key_env,
                generator_type="instruct",
                max_concurrency=model.augmenter_concurrency,
                timeout_s=model.augmenter_timeout_s,
                max_retries=model.augmenter_max_retries,
                extra_body=model.augmenter_extra_body,
            )
            return wrap_generator(args, generator, name=f"{model.augmenter_base_url or ''} {model.augmenter_model}")
        case name if ":" in name:
            return cast("QueryAugmenter", import_attribute(name)(args, model))
        case name:
            raise ConfigError(f"augmenter_name must be local, openai, none or package.module:attribute, got {name!r}")


def wrap_generator(args: AugmenterArguments, generator: Generator, *, name: str = "") -> QueryAugmenter:
    """Makes an augmenter of a generator.

    Args:
        args: how it is asked.
        generator: any.
        name: tells its weights from others.

    Returns:
        An augmenter.

    Raises:
        ConfigError: no such prompt, or it does not fit.
    """
    from rag_rl.generation import QueryAugmenter

    return QueryAugmenter(
        generator, prompt=expand(args.augmenter_prompt), max_new_tokens=args.augmenter_max_new_tokens, name=name
    )


def augmentation_task(args: AugmenterArguments) -> tuple[str, str]:
    """What the augmenter is told of the search.

    Args:
        args: which task.

    Returns:
        The task's instruction, and what is to be written.

    Raises:
        ConfigError: no such task, or the file of tasks is wrong.
    """
    from rag_rl.prompts.tasks import load_task

    task = load_task(args.augmenter_task, expand(args.augmenter_tasks) if args.augmenter_tasks else None)
    return task.instruction, args.augmenter_answer_type or task.answer_type


def build_augmented_retriever(
    args: AugmenterArguments, index: DenseRetriever, augmenter: Augmenter
) -> AugmentedRetriever:
    """Puts an augmenter before an index.

    Args:
        args: how the two are mixed.
        index: where is searched, and whose encoder makes all vectors.
        augmenter: writes the texts.

    Returns:
        A retriever.

    Raises:
        ConfigError: no such task, or as in ``AugmentedRetriever``.
    """
    return _augmented(args, index.encoder, augmenter, index)


def build_augmented_encoder(args: AugmenterArguments, encoder: Encoder, augmenter: Augmenter) -> AugmentedRetriever:
    """Puts an augmenter before an encoder; there is no index.

    Args:
        args: how the two are mixed.
        encoder: makes all vectors.
        augmenter: writes the texts.

    Returns:
        An encoder; it cannot ``search``.

    Raises:
        ConfigError: no such task, or as in ``AugmentedRetriever``.
    """
    return _augmented(args, encoder, augmenter, None)


def _augmented(
    args: AugmenterArguments, encoder: Encoder, augmenter: Augmenter, index: DenseRetriever | None
) -> AugmentedRetriever:
    from rag_rl.retrieval.augmented import AugmentedRetriever

    instruction, answer_type = augmentation_task(args)
    return AugmentedRetriever(
        encoder,
        augmenter,
        index=index,
        weight=args.augmenter_weight,
        prefix=args.augmenter_prefix,
        side=args.augmenter_side,
        task_instruction=instruction,
        answer_type=answer_type,
    )


def _source(name: str) -> str:
    """The file of a folder that ``synthesize_queries`` wrote; anything else as it is."""
    from rag_rl.config.synthesis import QUERIES, QUESTIONS

    folder = Path(expand(name))
    for file in (QUESTIONS, QUERIES):
        # Other folders, such as BEIR's, have a file of queries by another name.
        if folder.is_dir() and (folder / file).is_file() and not (folder / "queries.jsonl").is_file():
            return str(folder / file)
    return name


def _published(source: str) -> list[tuple[str, str]] | None:
    """(query, passage) of a ``queries.json``; None for anything else."""
    from rag_rl.data.fields import BadRows
    from rag_rl.data.jsonl import read_json_array
    from rag_rl.data.reinforced_ir import read_queries

    path = Path(expand(source))
    if path.suffix != ".json" or not path.is_file():
        return None
    first = next(iter(read_json_array(path, bad=BadRows(path))), None)
    if first is None or "query" not in first[1] or "passage" not in first[1]:
        return None
    return [(one.query, one.passage) for one in read_queries(path)]


def _load(
    data: DataArguments,
    name: str,
    published: list[tuple[str, str]] | None,
    by_text: dict[str, list[tuple[int, str]]],
    known: dict[str, tuple[int, ...]],
) -> list[Question]:
    """The queries of one source; of a ``queries.json`` the rows of its passages go into ``known``."""
    from rag_rl.data import load_questions

    if published is None:
        source, qrels = expand(getattr(data, name)), getattr(data, f"{name}_qrels")
        if qrels is None:
            return load_questions(source, require_answers=False)
        if Path(source).is_dir() and not qrels.endswith(".tsv"):
            return load_questions(source, require_answers=False, split=qrels)
        return load_questions(source, require_answers=False, qrels=expand(qrels))
    found = []
    for place, (query, text) in enumerate(published):
        qid = f"{name.removeprefix('data_')} query {place}"
        known[qid] = tuple(row for row, _ in by_text[text])
        found.append(Question(qid, query, (), tuple(dict.fromkeys(doc_id for _, doc_id in by_text[text]))))
    return found


def _split(
    data: DataArguments, train: list[Question], held_out: list[Question] | None, *, seed: int
) -> tuple[list[Question], list[Question]]:
    """Queries to learn from and held-out ones, as many as asked for, none worded alike."""
    from rag_rl.data import split_questions

    if held_out is None:
        train, held_out = split_questions(train, eval_size=data.data_eval_size, seed=seed)
    texts = {_folded(question.question) for question in held_out}
    fresh = [question for question in train if _folded(question.question) not in texts]
    if lost := len(train) - len(fresh):
        logger.warning("%d of %d queries to learn from are left out: held-out ones are worded alike", lost, len(train))
    if not fresh:
        raise DataError(f"{data.data_train}: every query to learn from is also held out")
    if len(held_out) > data.data_eval_size:
        # The same held-out queries for every seed: before and after, and runs among each other, are comparable.
        _, held_out = split_questions(held_out, eval_size=data.data_eval_size, seed=0)
    if data.data_train_size is not None and len(fresh) > data.data_train_size:
        _, fresh = split_questions(fresh, eval_size=data.data_train_size, seed=seed)
    return fresh, held_out


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _by_row(passages: Sequence[Passage]) -> Iterator[tuple[int, Passage]]:
    for start in range(0, len(passages), _PASSAGES_AT_ONCE):
        yield from enumerate(passages[start : start + _PASSAGES_AT_ONCE], start=start)


def _rows_by_text(passages: Sequence[Passage], texts: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """Rows and documents of the texts that are asked for; of equal passages all are meant."""
    wanted: dict[str, list[tuple[int, str]]] = {text: [] for text in texts}
    for row, passage in _by_row(passages):
        if passage.contents in wanted:
            wanted[passage.contents].append((row, passage.doc_id))
    return wanted


def _rows_by_document(passages: Sequence[Passage], documents: Iterable[str]) -> dict[str, list[int]]:
    wanted: dict[str, list[int]] = {document: [] for document in documents}
    for row, passage in _by_row(passages):
        if passage.doc_id in wanted:
            wanted[passage.doc_id].append(row)
    return wanted


def _sourced(
    questions: Sequence[Question],
    known: dict[str, tuple[int, ...]],
    of_document: dict[str, list[int]],
    *,
    source: str,
) -> list[SourcedQuery]:
    """Queries with the rows of their passages; without those that have none."""
    found = []
    for question in questions:
        of_its_documents = tuple(row for doc_id in question.gold_doc_ids for row in of_document[doc_id])
        if rows := known.get(question.qid, of_its_documents):
            found.append(SourcedQuery(question, rows))
    if not found:
        raise DataError(f"{source}: the corpus holds no passage of any of its {len(questions)} queries")
    if lost := len(questions) - len(found):
        logger.warning(
            "%s: %d of %d queries are left out: the corpus lacks their passage", source, lost, len(questions)
        )
    return found


def _model(args: AugmenterModelArguments) -> str:
    if not args.augmenter_model:
        raise ConfigError(f"augmenter_name {args.augmenter_name} needs a model: set augmenter_model")
    return expand(args.augmenter_model)


def _stamp(*folders: str | None) -> str:
    """What changes when the weights in a folder do; another model may come to lie in the same place."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for folder in folders
        if folder and Path(expand(folder)).is_dir()
        for file in sorted(Path(expand(folder)).glob("*.safetensors"))
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:8]
