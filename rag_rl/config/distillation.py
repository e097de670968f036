"""From queries to lists of passages in a teacher's order: augment, mine, rank, each of them resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_rl.config.arguments import DataArguments, QueryEncoderArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments
from rag_rl.config.augmenters import (
    SourcedQuery,
    augmentation_task,
    build_augmenter,
    build_dense_index,
    build_queries,
    own_rows,
)
from rag_rl.config.distillation_arguments import DistillationArguments
from rag_rl.config.parts import build_encoder, build_questions, expand, import_attribute, make_trainable
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.config.synthetic import ensure_queries
from rag_rl.errors import ConfigError
from rag_rl.run import main_process_only, write_whole
from rag_rl.types import Question

if TYPE_CHECKING:
    from rag_rl.data.reinforced_ir import RetrieverExample
    from rag_rl.generation import QueryAugmenter
    from rag_rl.generation.ranking import Ranking
    from rag_rl.retrieval import DenseRetriever, SentenceEncoder

logger = logging.getLogger(__name__)

FOLDER = "retriever"
"""Where in a run folder the published files of the retriever lie."""
QUERIES, ANSWERS, MINED, TRAIN, SUMMARY = "queries.json", "answers.json", "mined.jsonl", "train.jsonl", "summary.json"


@dataclass(frozen=True, slots=True)
class DistillationData:
    """What a retriever is distilled on, and evaluated on.

    Attributes:
        index: of the encoder that training starts from; its passages are the corpus.
        queries: to learn from; none where only files are learnt from.
        held_out: questions to evaluate on.
    """

    index: DenseRetriever
    queries: list[SourcedQuery]
    held_out: list[Question]


def build_distillation_data(
    args: DistillationArguments,
    data: DataArguments,
    synthesis: SynthesisArguments,
    retriever: RetrieverArguments,
    folder: Path,
    *,
    seed: int,
) -> DistillationData:
    """Opens the index, and loads the queries; where none are named, they are written for the corpus first.

    Args:
        args: with files of lists, queries are not needed.
        data: corpus, queries and held-out questions.
        synthesis: who writes queries.
        retriever: the encoder.
        folder: of the run.
        seed: of everything.

    Returns:
        Index and queries.

    Raises:
        ConfigError: a setting does not fit.
        DataError: a file is missing or has bad rows, the corpus is empty, or it lacks the passages of all queries.
        RetrievalIndexError: the index does not fit or is damaged.
        BackendError: an endpoint or the disk is broken.
    """
    alone = bool(args.distill_files) and not data.data_train
    if not alone:
        ensure_queries(data, synthesis, retriever, folder, seed=seed)
    index = build_dense_index(retriever, data)
    if not alone:
        queries, held_out = build_queries(data, index.passages, seed=seed)
        return DistillationData(index, queries, [query.question for query in held_out])
    if not data.data_eval:
        raise ConfigError("data_eval is not set: without data_train there is nothing to split held-out questions off")
    # Nothing is learnt from these: they are loaded as if they were, and only they.
    only = replace(
        data, data_train=data.data_eval, data_train_qrels=data.data_eval_qrels, data_train_size=None,
        data_eval=None, data_eval_qrels=None, data_eval_size=1, data_folds=None,
    )  # fmt: skip
    rest, one = build_questions(only, seed=0, require_answers=False)
    return DistillationData(index, [], [*rest, *one][: data.data_eval_size])


def build_lists(
    args: DistillationArguments,
    found: DistillationData,
    data: DataArguments,
    retriever: RetrieverArguments,
    augmenter: AugmenterArguments,
    model: AugmenterModelArguments,
    folder: Path,
    *,
    seed: int,
) -> dict[str, list[RetrieverExample]]:
    """Makes the lists that a retriever learns from, and reads those that are there already.

    What was written before a stop is kept: augmentations and rankings batch by batch, mined negatives as a whole. A
    step whose inputs have changed is made anew. Several processes share the queries among them.

    Args:
        args: negatives, teacher, files.
        found: index and queries.
        data: the corpus, for the index of another miner.
        retriever: the encoder, likewise.
        augmenter: how queries are augmented.
        model: by whom; also the teacher ``generator``.
        folder: of the run; the published files go to its ``retriever`` folder.
        seed: of what is drawn.

    Returns:
        Examples by corpus. Without a teacher, or before distillation, they are not in anybody's order.

    Raises:
        ConfigError: a setting does not fit, a model is missing, or no ranking at all could be read.
        DataError: a file is missing or has bad rows.
        BackendError: an endpoint or the disk is broken.
    """
    from rag_rl.data.reinforced_ir import read_examples

    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    needed = (found.queries and args.distill_augment) or args.distill_teacher == "generator"
    asked = build_augmenter(augmenter, model) if needed else None
    if asked is None and args.distill_teacher == "generator":
        raise ConfigError("distill_teacher generator is the augmenter's own model: augmenter_name must not be none")
    teacher = _build_teacher(args, augmenter, asked, seed=seed)
    _keep_prompts(folder, asked, teacher)
    corpora: dict[str, list[RetrieverExample]] = {}
    summary: dict[str, Any] = {}
    if found.queries:
        answers, summary = _augmented(args, found, augmenter, asked, target)
        mined, counts = _mined(args, found, data, retriever, answers, target, seed=seed)
        summary |= counts
        corpora[data.data_corpus], counts = _ranked(args, mined, teacher, target)
        summary |= counts
    held = {_folded(question.question) for question in found.held_out}
    for number, name in enumerate(args.distill_files):
        read = read_examples(expand(name))
        kept = [example for example in read if _folded(example.query) not in held]
        if len(kept) < len(read):
            logger.warning("%s: %d queries are left out: they are held out", name, len(read) - len(kept))
        if not all(example.is_distilled for example in kept):
            (target / f"file{number}").mkdir(exist_ok=True)
            kept, counts = _ranked(args, kept, teacher, target / f"file{number}")
            summary[name] = counts
        corpora[name] = kept
    with main_process_only() as main:
        if main:
            write_whole(target / SUMMARY, json.dumps(summary, indent=2) + "\n")
    for key, value in summary.items():
        logger.info("%s: %s", key, value)
    return corpora


def build_trained_encoder(retriever: RetrieverArguments, trained: QueryEncoderArguments) -> SentenceEncoder:
    """Loads the encoder that will be trained, beside the one that the index keeps.

    Args:
        retriever: which one.
        trained: what of it.

    Returns:
        An encoder that, saved, bears the prompts it was trained with.

    Raises:
        ConfigError: it cannot be loaded, or a setting does not fit.
    """
    if trained.retriever_state_tokens is not None:
        raise ConfigError("retriever_state_tokens is for queries with a history: leave it out")
    encoder: SentenceEncoder = build_encoder(retriever)
    make_trainable(encoder, trained)
    encoder.model.prompts.update(query=encoder.query_prompt, document=encoder.document_prompt)
    return encoder


class _Teacher:
    """Orders lists of passages, and counts what it did.

    Args:
        name: changes whenever the orders would; "" where nobody ranks.
        rank: queries and lists of texts in, orders out.
        template: of its prompt.
    """

    def __init__(
        self,
        name: str = "",
        rank: Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[Ranking]] | None = None,
        template: tuple[str, str] | None = None,
    ) -> None:
        self.name, self.rank, self.template = name, rank, template


def _build_teacher(
    args: DistillationArguments, augmenter: AugmenterArguments, asked: QueryAugmenter | None, *, seed: int
) -> _Teacher:
    from rag_rl.generation.ranking import LikelihoodRanker, ListwiseRanker, Ranking
    from rag_rl.prompts.tasks import load_task

    match args.distill_teacher:
        case "none":
            return _Teacher()
        case "random":

            def shuffled(queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[Ranking]:
                return [
                    Ranking(tuple(random.Random(f"{seed}/{query}").sample(range(len(shown)), len(shown))))
                    for query, shown in zip(queries, passages, strict=True)
                ]

            return _Teacher(f"random {seed}", shuffled)
        case "reranker":
            from rag_rl.trainers.reranker_trainer import score_lists

            where, scorer = _build_scorer(args.distill_reranker or "")

            def scored(queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[Ranking]:
                lists = list(zip(queries, passages, strict=True))
                scores = score_lists(scorer, lists, batch_size=args.distill_batch_size)
                return [Ranking(tuple(sorted(range(len(own)), key=lambda i, own=own: -own[i]))) for own in scores]  # type: ignore[misc]

            return _Teacher(f"reranker {where}", scored)
    assert asked is not None
    task = load_task(
        augmenter.augmenter_task, expand(augmenter.augmenter_tasks) if augmenter.augmenter_tasks else None
    )
    ranker: ListwiseRanker | LikelihoodRanker
    if args.distill_ranking == "listwise":
        ranker = ListwiseRanker(
            asked.generator,
            prompt=expand(args.distill_prompt or "rank_passages"),
            max_new_tokens=args.distill_max_new_tokens,
            max_passage_words=args.distill_passage_words,
        )
    else:
        ranker = LikelihoodRanker(
            asked.generator,
            prompt=expand(args.distill_prompt or "synthesize_query"),
            fields={"query_type": task.query_type, "passage_type": task.passage_type},
            max_passage_words=args.distill_passage_words,
        )
    name = f"{args.distill_ranking} {asked.name} {ranker.template} {args.distill_max_new_tokens}"
    return _Teacher(
        f"{name} {args.distill_passage_words} {task.instruction}",
        lambda queries, passages: ranker.rank(queries, passages, task_instruction=task.instruction),
        (ranker.prompt, ranker.template),
    )


def _build_scorer(name: str) -> tuple[str, Any]:
    from accelerate import PartialState

    from rag_rl.trainers.cross_encoder_adapters import load_cross_encoder

    # A model that comes inside a Python package: python:package:function gives its folder.
    if name.startswith("python:"):
        name = str(import_attribute(name.removeprefix("python:"))())
    where = expand(name)
    files = sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else []
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{where} {stamp}", load_cross_encoder(where, device=str(PartialState().device))


def _augmented(
    args: DistillationArguments,
    found: DistillationData,
    augmenter: AugmenterArguments,
    asked: QueryAugmenter | None,
    target: Path,
) -> tuple[list[str], dict[str, Any]]:
    """Augmentations with their prefix, "" where there is none; and counts."""
    from rag_rl.data.reinforced_ir import (
        AugmentedQuery,
        SyntheticQuery,
        read_augmented,
        write_augmented,
        write_queries,
    )
    from rag_rl.retrieval.history import token_counter

    encoder: Any = found.index.encoder
    sources = _sources(found)
    texts = [query.text for query in found.queries]
    counts: dict[str, Any] = {"queries": len(texts)}
    answers = [""] * len(texts)
    if args.distill_answers:
        there = {(one.query, one.passage): one.answer for one in read_augmented(expand(args.distill_answers))}
        answers = [there.get(pair, "") for pair in zip(texts, sources, strict=True)]
        counts["answers_read"] = sum(map(bool, answers))
    open_ = [number for number, answer in enumerate(answers) if not answer]
    if asked is not None and args.distill_augment and open_:
        instruction, answer_type = augmentation_task(augmenter)

        def write(numbers: Sequence[int]) -> list[dict[str, Any]]:
            failed, cut = asked.failed, asked.cut
            written = asked.augment(
                [texts[open_[n]] for n in numbers], task_instruction=instruction, answer_type=answer_type
            )
            rows: list[dict[str, Any]] = [
                {"number": n, "answer": text} for n, text in zip(numbers, written, strict=True)
            ]
            rows[0] |= {"failed": asked.failed - failed, "cut": asked.cut - cut}
            return rows

        key = _key(asked.fingerprint, instruction, answer_type, [texts[n] for n in open_])
        rows = _staged(target, "augmentations", key, len(open_), write, batch=args.distill_batch_size)
        for row in rows:
            if row["answer"]:
                answers[open_[row["number"]]] = augmenter.augmenter_prefix + row["answer"]
        counts |= {name: sum(row.get(name, 0) for row in rows) for name in ("failed", "cut")}
    written_ = [answer for answer in answers if answer]
    counts |= {"augmented": len(written_), "without_augmentation": len(answers) - len(written_)}
    if written_ and encoder.max_length is not None:
        lengths = token_counter(encoder.model.tokenizer, prompt=encoder.query_prompt)(written_)
        counts["longer_than_the_encoder_reads"] = sum(length > encoder.max_length for length in lengths)
    with main_process_only() as main:
        if main:
            pairs = list(zip(texts, sources, strict=True))
            write_queries(target / QUERIES, [SyntheticQuery(*pair) for pair in pairs])
            told = [AugmentedQuery(*pair, answer) for pair, answer in zip(pairs, answers, strict=True) if answer]
            write_augmented(target / ANSWERS, told)
    return answers, counts


def _sources(found: DistillationData) -> list[str]:
    """The passage of each query; of several, the one that the bare query is most similar to."""
    vectors = found.index.encode_queries([query.text for query in found.queries])
    rows = own_rows(found.queries, vectors, found.index)
    return [passage.contents for passage in found.index.passages.take(rows.tolist())]


def _mined(
    args: DistillationArguments,
    found: DistillationData,
    data: DataArguments,
    retriever: RetrieverArguments,
    answers: Sequence[str],
    target: Path,
    *,
    seed: int,
) -> tuple[list[RetrieverExample], dict[str, Any]]:
    """Examples before distillation; and counts."""
    from rag_rl.data.reinforced_ir import RetrieverExample, read_examples, write_examples
    from rag_rl.retrieval import mine_negatives, text_groups

    index = found.index
    if args.distill_miner:
        other = replace(
            retriever, retriever_encoder=args.distill_miner, retriever_pooling=None, retriever_normalize=None,
            retriever_query_prompt=args.distill_miner_query_prompt, retriever_document_prompt=None,
            retriever_max_length=None, retriever_index_path=None,
        )  # fmt: skip
        index = build_dense_index(other, data)
        if data.data_chunk_tokens is not None or len(index) != len(found.index):
            raise ConfigError("distill_miner would cut documents elsewhere: leave data_chunk_tokens out")
    settings = {name: value for name, value in asdict(args).items() if name in _MINING}
    texts = [query.text for query in found.queries]
    key = _key(index.fingerprint, settings, seed, texts, [query.rows for query in found.queries], list(answers))
    record = target / "mined.json"
    with main_process_only() as main:
        if main and not (_read(record).get("key") == key and (target / MINED).is_file()):
            vectors = index.encode_queries(texts)
            own = own_rows(found.queries, vectors, index)
            scores, rows = index.search_vectors(vectors, top_k=min(args.distill_depth, len(index)))
            found_ = mine_negatives(
                scores,
                rows,
                own,
                n=args.distill_negatives,
                rule=args.distill_rule,
                ratio=args.distill_ratio,
                margin=args.distill_margin,
                groups=text_groups(passage.contents for passage in _streamed(index)),
                corpus_size=len(index),
                seed=seed,
            )
            write_examples(
                target / MINED,
                (
                    RetrieverExample(
                        text,
                        answer,
                        (index.passages[int(row)].contents,),
                        tuple(one.contents for one in index.passages.take([n for n in taken if n >= 0])),
                    )
                    for text, answer, row, taken in zip(texts, answers, own, found_.rows.tolist(), strict=True)
                ),
            )
            counts = {
                "negatives_a_query": round(float(found_.counts.mean()), 2),
                "negatives_by_fallback": int(found_.fallback.sum()),
                "own_passage_not_found": found_.missing,
                "copies_of_the_own_passage": found_.copies,
                "repeated_passages": found_.repeated,
            }
            write_whole(record, json.dumps({"key": key, "counts": counts}) + "\n")
    return read_examples(target / MINED), _read(record)["counts"]


_MINING = frozenset(
    {"distill_negatives", "distill_rule", "distill_ratio", "distill_margin", "distill_depth", "distill_miner"}
)


def _ranked(
    args: DistillationArguments, mined: list[RetrieverExample], teacher: _Teacher, target: Path
) -> tuple[list[RetrieverExample], dict[str, Any]]:
    """Examples in the teacher's order, those of a teacher before let be; and counts."""
    from rag_rl.data.reinforced_ir import write_examples

    counts: dict[str, Any] = {}
    examples = list(mined)
    rank = teacher.rank
    open_ = [number for number, example in enumerate(mined) if not example.is_distilled and example.neg]
    if rank is not None and open_:
        lists = [(*mined[number].pos, *mined[number].neg) for number in open_]

        def order(numbers: Sequence[int]) -> list[dict[str, Any]]:
            # A model prefers what it reads first, and mined lists begin with the passage that the query is from.
            mixed = [_mixed(mined[open_[n]].query, len(lists[n])) for n in numbers]
            shown = [[lists[n][place] for place in places] for n, places in zip(numbers, mixed, strict=True)]
            rankings = rank([mined[open_[n]].query for n in numbers], shown)
            return [
                {
                    "number": n,
                    "order": None if one.order is None else [places[place] for place in one.order],
                    **{name: getattr(one, name) for name in _REPAIRS if getattr(one, name)},
                }
                for n, places, one in zip(numbers, mixed, rankings, strict=True)
            ]

        key = _key(teacher.name, [(mined[number].query, lists[n]) for n, number in enumerate(open_)])
        rows = _staged(target, "rankings", key, len(open_), order, batch=args.distill_batch_size)
        kept = 0
        for row in rows:
            example = mined[open_[row["number"]]]
            # An unreadable ranking leaves the source passage first, and the others as the search ranked them.
            places = row["order"] or list(range(len(lists[row["number"]])))
            kept += places[0] == 0
            examples[open_[row["number"]]] = example.reordered(places, keep_source=args.distill_keep_source)
        read = [row for row in rows if row["order"]]
        if not read:
            raise ConfigError(
                f"none of {len(rows)} rankings could be read: this model cannot rank by that prompt; take another "
                "one, distill_ranking likelihood, or another distill_teacher"
            )
        repairs = Counter({name: sum(row.get(name, 0) for row in read) for name in _REPAIRS})
        counts = {
            "rankings": len(rows),
            "rankings_unreadable": len(rows) - len(read),
            **{f"rankings_{name}_ids": repairs[name] for name in _REPAIRS},
            "source_first": round(kept / len(rows), 4),
        }
    with main_process_only() as main:
        if main:
            write_examples(target / TRAIN, examples)
    return examples, counts


_REPAIRS = ("duplicates", "missing", "foreign")


def _staged(
    target: Path,
    name: str,
    key: str,
    total: int,
    work: Callable[[Sequence[int]], list[dict[str, Any]]],
    *,
    batch: int,
) -> list[dict[str, Any]]:
    """Does the numbers below ``total`` that no file of this step has yet, each process its share; all rows, in order.

    Every process has a file of its own, whose first row tells what the rows depend on.
    """
    from accelerate import PartialState
    from tqdm import tqdm  # type: ignore[import-untyped]

    from rag_rl.data.appending import append_jsonl

    state = PartialState()
    known = _rows_of(target, name, key)
    state.wait_for_everyone()  # nobody writes before all have read
    todo = [number for number in range(total) if number not in known][state.process_index :: state.num_processes]
    mine = target / f"{name}.{state.process_index}.jsonl"
    if not _belongs(mine, key):
        mine.unlink(missing_ok=True)
        append_jsonl(mine, [{"made_of": key}])
    if todo and known:
        logger.info("%s: %d of %d are there already", name, len(known), total)
    parts = [todo[start : start + batch] for start in range(0, len(todo), batch)]
    for part in tqdm(parts, desc=name, disable=None):
        append_jsonl(mine, work(part))
    state.wait_for_everyone()
    found = _rows_of(target, name, key)
    return [found[number] for number in range(total)]


def _rows_of(target: Path, name: str, key: str) -> dict[int, dict[str, Any]]:
    from rag_rl.data.appending import read_appended

    return {
        row["number"]: row
        for file in sorted(target.glob(f"{name}.*.jsonl"))
        if _belongs(file, key)
        for _, row in read_appended(file)
        if "number" in row
    }


def _belongs(file: Path, key: str) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        first = opened.readline()
    return first == json.dumps({"made_of": key}).encode() + b"\n"


def _mixed(query: str, count: int) -> list[int]:
    return random.Random(query).sample(range(count), count)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _streamed(index: DenseRetriever) -> Any:
    for start in range(0, len(index), 4096):
        yield from index.passages[start : start + 4096]


def _keep_prompts(folder: Path, asked: QueryAugmenter | None, teacher: _Teacher) -> None:
    """Copies what is asked into the run folder."""
    kept = [] if asked is None else [(asked.prompt, asked.template)]
    with main_process_only() as main:
        if main:
            for name, template in [*kept, *([teacher.template] if teacher.template else [])]:
                (folder / "prompts").mkdir(exist_ok=True)
                write_whole(folder / "prompts" / f"{Path(name).stem}.txt", template + "\n")
