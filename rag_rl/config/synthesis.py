"""Query synthesis as a task that can be stopped: who writes, where the rows are kept, and what comes out of them.

Of several processes each writes its share of the batches, into a file of its own; the first then makes one of all.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.parsing import resolved
from rag_rl.config.parts import build_corpus, build_retriever, expand, import_attribute
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.errors import ConfigError, RunFolderError
from rag_rl.run import keep_settings, main_process_only, write_whole
from rag_rl.types import Passage, Question

if TYPE_CHECKING:
    from rag_rl.generation.synthesis import QueryCheck, QueryWriter, Synthetic
    from rag_rl.prompts.tasks import RetrievalTask

logger = logging.getLogger(__name__)

ROWS, QUERIES, QUESTIONS, CORPUS = "synthesis.jsonl", "queries.json", "questions.jsonl", "corpus.jsonl"
_ROWS_OF, _SETTINGS, _SUMMARY = "synthesis-{}.jsonl", "synthesis_config.yaml", "summary.json"
# What may change while the rows grow: where the model is asked and how patiently, what is made of the rows, and how
# queries are tried out.
_MAY_CHANGE = frozenset(
    {
        "synthesis_base_url", "synthesis_api_key_env", "synthesis_concurrency", "synthesis_timeout_s",
        "synthesis_max_retries", "synthesis_form", "data_train", "data_train_size", "data_eval", "data_eval_size",
    }
)  # fmt: skip
_PROBE_K = 10


@dataclass(frozen=True, slots=True)
class Synthesized:
    """What a synthesis has come to.

    Attributes:
        rows: one a query, in the order in which they were to be written.
        passages: of which queries were to be written.
        repeated: passages of the corpus that were left out, since their text came before.
        wanted: queries that were to be written.
    """

    rows: list[dict[str, Any]]
    passages: list[Passage]
    repeated: int
    wanted: int


def build_synthesis_corpus(data: DataArguments, folder: Path) -> Iterable[Passage]:
    """Opens the corpus; a plain ``corpus.json`` of texts becomes documents in the folder first.

    Args:
        data: where it is; for a plain one ``data_corpus`` is set to the documents, whose ids questions will name.
        folder: of the output.

    Returns:
        Passages.

    Raises:
        ConfigError: no corpus is named.
        DataError: it is missing or has bad rows.
    """
    from rag_rl.data import write_corpus
    from rag_rl.data.reinforced_ir import is_text_array, read_corpus_texts

    source = expand(data.data_corpus)
    if source.endswith(".json") and Path(source).is_file() and is_text_array(source):
        documents = folder / CORPUS
        if not documents.is_file():
            write_corpus(documents, read_corpus_texts(source))
        data.data_corpus = str(documents)
    return build_corpus(data)


def build_query_writer(args: SynthesisArguments, task: RetrievalTask) -> tuple[QueryWriter, list[QueryCheck]]:
    """Builds who writes queries, and the checks.

    Args:
        args: who.
        task: what queries are.

    Returns:
        The writer; and the checks, none for a writer without a model.

    Raises:
        ConfigError: an unknown name, a model or a prompt is missing, or a prompt does not fit.
        DataError: a local model cannot be loaded.
    """
    from rag_rl.generation import OpenAIGenerator, TransformersGenerator
    from rag_rl.generation.synthesis import AnswerCheck, GeneratorWriter, RelevanceCheck, SentenceWriter

    generator: Any
    match args.synthesis_writer:
        case "sentences":
            return SentenceWriter(), []
        case "local":
            generator = TransformersGenerator.from_pretrained(
                _model(args), batch_size=args.synthesis_batch_size, generator_type=args.synthesis_type
            )
        case "openai":
            generator = OpenAIGenerator(
                _model(args),
                base_url=args.synthesis_base_url,
                api_key_env=args.synthesis_api_key_env,
                generator_type=args.synthesis_type,
                max_concurrency=args.synthesis_concurrency,
                timeout_s=args.synthesis_timeout_s,
                max_retries=args.synthesis_max_retries,
                extra_body=args.synthesis_extra_body,
            )
        case name if ":" in name:
            return cast("QueryWriter", import_attribute(name)(args)), []
        case name:
            raise ConfigError(
                f"synthesis_writer must be local, openai, sentences or package.module:attribute, got {name!r}"
            )
    limits = {"max_passage_chars": args.synthesis_max_passage_chars}
    writer = GeneratorWriter(
        generator,
        task,
        prompt=_prompt(args),
        with_answers=args.with_answers,
        answer_marker=args.synthesis_answer_marker,
        temperature=args.synthesis_temperature,
        top_p=args.synthesis_top_p,
        max_new_tokens=args.synthesis_max_new_tokens,
        **limits,
    )
    checks: dict[str, list[QueryCheck]] = {"none": []}
    if args.synthesis_check == "relevance":
        checks["relevance"] = [RelevanceCheck(generator, task, prompt=_check_prompt(args), **limits)]
    elif args.synthesis_check == "answer":
        marker = args.synthesis_answer_marker
        checks["answer"] = [AnswerCheck(generator, prompt=_check_prompt(args), answer_marker=marker)]
    return writer, checks[args.synthesis_check]


def synthesize_queries(args: SynthesisArguments, data: DataArguments, folder: Path, *, seed: int) -> Synthesized:
    """Writes queries for passages of a corpus; what is in the folder already is kept and gone on with.

    Each batch is on the disk before the next one begins, and depends on nothing but the seed: stopped at any moment,
    the whole comes out the same. (An endpoint need not heed seeds.) A batch with requests that failed for themselves
    alone is finished when the task is started again.

    Args:
        args: who writes, and for how many passages.
        data: the corpus.
        folder: of the output.
        seed: of everything.

    Returns:
        All rows.

    Raises:
        ConfigError: a setting does not fit.
        DataError: the corpus is missing, empty or has bad rows.
        RunFolderError: the folder holds something else.
        BackendError: the endpoint or the disk is broken.
    """
    from rag_rl.generation.synthesis import Unit, choose_passages
    from rag_rl.prompts.tasks import load_task

    settings = {"seed": seed, **resolved([args, data])}
    # What is quickly refused comes first, and before anything is written.
    task = load_task(args.synthesis_task, expand(args.synthesis_tasks) if args.synthesis_tasks else None)
    writer, checks = build_query_writer(args, task)
    with main_process_only() as main:
        if main:
            _keep_settings(folder, settings)
            _keep_prompts(folder, args)
            build_synthesis_corpus(data, folder)
    passages, repeated = choose_passages(build_synthesis_corpus(data, folder), args.synthesis_passages, seed=seed)
    units = [Unit(passage, number) for passage in passages for number in range(args.synthesis_per_passage)]
    rows = _write(units, writer, checks, task, folder, args, seed)
    failed = len(units) - len(rows)
    with main_process_only() as main:
        if main and repeated:
            logger.warning("%d passages of the corpus are left out: their text came before", repeated)
        if main and failed:
            logger.warning("%d of %d requests failed: start again to make up for it", failed, len(units))
    return Synthesized(rows, passages, repeated, len(units))


def report_queries(
    found: Synthesized,
    args: SynthesisArguments,
    data: DataArguments,
    retriever: RetrieverArguments,
    folder: Path,
) -> dict[str, Any]:
    """Writes the queries that passed, as ``queries.json`` and as questions, and says what came of the others.

    Args:
        found: as from ``synthesize_queries``.
        args: as there.
        data: as there.
        retriever: with an encoder, it is tried how many queries find their document among 10; without, nothing is.
        folder: as there.

    Returns:
        The summary: counts of ``passages``, ``repeated_passages``, ``wanted``, ``kept`` and ``failed``; queries by
        ``outcomes``; kept ones by ``lengths`` and ``styles``; the share ``in_bucket``, as long as they were asked to
        be, and ``first_attempt``; and perhaps ``success@10``.

    Raises:
        DataError: the disk refuses.
        RetrievalIndexError: the index does not fit or is damaged.
    """
    from rag_rl.data import write_questions
    from rag_rl.data.reinforced_ir import SyntheticQuery, write_queries
    from rag_rl.generation.synthesis import KEPT, content_words, in_bucket

    rows, first = [], set()
    for row in found.rows:
        if args.synthesis_form == "keywords":
            row = {**row, "query": content_words(row["query"])}
        text = " ".join(row["query"].lower().split())
        if row["outcome"] == KEPT:
            row = {**row, "outcome": "duplicate" if text in first else KEPT}
            first.add(text)
        rows.append(row)
    kept = [row for row in rows if row["outcome"] == KEPT]
    texts = {(passage.doc_id, passage.chunk): passage.contents for passage in found.passages}
    queries = [SyntheticQuery(row["query"], texts[row["doc_id"], row["chunk"]]) for row in kept]
    questions = [_question(row) for row in kept]
    outcomes = Counter(row["outcome"] for row in rows)
    summary: dict[str, Any] = {
        "passages": len(found.passages),
        "repeated_passages": found.repeated,
        "wanted": found.wanted,
        "kept": len(kept),
        "failed": found.wanted - len(rows),
        "outcomes": dict(sorted(outcomes.items())),
        "lengths": dict(sorted(Counter(row["length"] for row in kept).items())),
        "styles": dict(sorted(Counter(row["style"] for row in kept).items())),
    }
    if kept:
        summary["in_bucket"] = round(sum(in_bucket(row["query"], row["length"]) for row in kept) / len(kept), 4)
        summary["first_attempt"] = round(sum(row["attempts"] == 1 for row in kept) / len(kept), 4)
    if kept and retriever.retriever_encoder:
        from rag_rl.evaluation.scoring import evaluate_retrieval

        index: Any = build_retriever(retriever, data)
        scores = evaluate_retrieval(index, questions, top_k=min(_PROBE_K, len(index)))
        summary |= {name: round(value, 4) for name, value in scores.items()}
    with main_process_only() as main:
        if main:
            write_queries(folder / QUERIES, queries)
            write_questions(folder / QUESTIONS, questions)
            write_whole(folder / _SUMMARY, json.dumps(summary, indent=2) + "\n")
            _print(summary, folder)
    return summary


def _print(summary: dict[str, Any], folder: Path) -> None:
    """What the user waited for."""
    for name, value in summary.items():
        shown = ", ".join(f"{key}: {n}" for key, n in value.items()) if isinstance(value, dict) else value
        print(f"{name:19}{shown}")  # noqa: T201
    for label, name in (("queries", QUERIES), ("questions", QUESTIONS), ("all drafts", ROWS)):
        print(f"{label + ' in':19}{folder / name}")  # noqa: T201


def _write(
    units: Sequence[Any],
    writer: QueryWriter,
    checks: list[QueryCheck],
    task: RetrievalTask,
    folder: Path,
    args: SynthesisArguments,
    seed: int,
) -> list[dict[str, Any]]:
    from accelerate import PartialState
    from tqdm import tqdm  # type: ignore[import-untyped]

    from rag_rl.data.appending import append_jsonl
    from rag_rl.generation.synthesis import synthesize

    state = PartialState()
    known = _rows_of(folder)
    state.wait_for_everyone()  # nobody writes before all have read
    batches = [
        units[start : start + args.synthesis_batch_size] for start in range(0, len(units), args.synthesis_batch_size)
    ]
    started = sum(unit.key in known for unit in units)
    if started and state.is_main_process:
        logger.info("%d of %d queries are there already", started, len(units))
    left = [batch for batch in batches if not all(unit.key in known for unit in batch)]
    mine = folder / (_ROWS_OF.format(state.process_index) if state.process_index else ROWS)
    for batch in tqdm(
        left[state.process_index :: state.num_processes],
        desc="queries",
        disable=None if state.is_main_process else True,
    ):
        # The whole batch, as it was: its sampling depends on all that is in it.
        results = synthesize(batch, writer, checks, task, attempts=args.synthesis_attempts, seed=seed)
        append_jsonl(mine, [_row(one) for one in results if one.unit.key not in known and one.outcome != "failed"])
    state.wait_for_everyone()
    known = _rows_of(folder)
    rows = [known[unit.key] for unit in units if unit.key in known]
    state.wait_for_everyone()  # nothing is taken away before all have read
    with main_process_only() as main:
        others = sorted(folder.glob(_ROWS_OF.format("*"))) if main else []
        if others:
            write_whole(folder / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for path in others:
            path.unlink()
    return rows


def _rows_of(folder: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """What all processes have written so far, by unit."""
    from rag_rl.data.appending import read_appended

    paths = [folder / ROWS, *sorted(folder.glob(_ROWS_OF.format("*")))]
    return {(row["doc_id"], row["chunk"], row["number"]): row for path in paths for _, row in read_appended(path)}


def _row(one: Synthetic) -> dict[str, Any]:
    doc_id, chunk, number = one.unit.key
    row: dict[str, Any] = {"doc_id": doc_id, "chunk": chunk, "number": number, "query": one.draft.query}
    if one.draft.answer is not None:
        row["answer"] = one.draft.answer
    row |= {"outcome": one.outcome, "attempts": one.attempts, "length": one.wish.length, "style": one.wish.style}
    return row if one.wish.supported is None else {**row, "supported": one.wish.supported}


def _question(row: dict[str, Any]) -> Question:
    qid = "/".join(
        ["synthetic", row["doc_id"], *([f"chunk{row['chunk']}"] if row["chunk"] else []), str(row["number"])]
    )
    answers = (row["answer"],) if row.get("answer") else ()
    return Question(qid, row["query"], answers, (row["doc_id"],))


def _prompt(args: SynthesisArguments) -> str:
    default = "synthesize_query_answer" if args.with_answers else "synthesize_query"
    return expand(args.synthesis_prompt or default)


def _check_prompt(args: SynthesisArguments) -> str:
    return expand(args.synthesis_check_prompt or ("answer" if args.synthesis_check == "answer" else "check_query"))


def _model(args: SynthesisArguments) -> str:
    if not args.synthesis_model:
        raise ConfigError(f"synthesis_writer {args.synthesis_writer} needs a model: set synthesis_model")
    return expand(args.synthesis_model)


def _keep_prompts(folder: Path, args: SynthesisArguments) -> None:
    """Copies what is asked beside the queries."""
    from rag_rl.prompts import load_prompt

    if args.synthesis_writer not in ("local", "openai"):
        return
    (folder / "prompts").mkdir(exist_ok=True)
    for name in [_prompt(args), *([_check_prompt(args)] if args.synthesis_check != "none" else [])]:
        write_whole(folder / "prompts" / f"{Path(name).stem}.txt", load_prompt(name) + "\n")


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder whose queries came about otherwise; notes how they come about in a new one."""
    if folder.is_file():
        raise RunFolderError(f"output_dir {folder} is a file: give another --output_dir")
    path = folder / _SETTINGS
    if not path.is_file() and folder.is_dir() and any(not one.name.endswith(".part") for one in folder.iterdir()):
        raise RunFolderError(f"output_dir {folder} is not empty and holds no synthesis: give another --output_dir")
    keep_settings(path, settings, holds="queries", ignore=_MAY_CHANGE)
