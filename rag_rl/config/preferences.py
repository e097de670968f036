"""What an augmenter learns from, as a task that can be stopped: candidates, their scores, pairs, the published files.

All of it goes into ``generator`` in the run folder. Queries are taken in batches; what the sampling draws for a batch
depends on the seed and on the batch alone, and a batch is on the disk before the next one begins. Of several processes
each has its share of the batches and a file of its own, and a run may go on with another number of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_rl.config.augmenter_arguments import AugmenterArguments, PreferenceArguments
from rag_rl.config.augmenters import SourcedQuery, augmentation_task, own_rows, wrap_generator
from rag_rl.config.parsing import resolved
from rag_rl.config.parts import expand
from rag_rl.data.reinforced_ir import PreferencePair
from rag_rl.errors import ConfigError, DataError
from rag_rl.run import keep_settings, main_process_only, write_whole
from rag_rl.types import Array, IntArray

if TYPE_CHECKING:
    from rag_rl.evaluation.augmenting import AugmentingAssembly
    from rag_rl.retrieval import DenseRetriever
    from rag_rl.rewards.preference import Preferences

logger = logging.getLogger(__name__)

GENERATOR, RETRIEVER = "generator", "retriever"
QUERIES, ANSWERS, PAIRS = "queries.json", "answers.json", "train.jsonl"
LLAMAFACTORY, DATASET_INFO = "train_llamafactory.jsonl", "dataset_info.json"
_SETTINGS, _SUMMARY = "preferences_config.yaml", "summary.json"
_CANDIDATES, _SCORES = "candidates", "scores"
_COUNTS = ("too_few", "no_gain", "too_alike", "too_long", "cut", "failed")
# What candidates and scores do not depend on; where it decides which queries are learnt from, their hash differs.
_MAY_CHANGE = frozenset(
    {
        "preference_base_url", "preference_api_key_env", "data_eval", "data_eval_size", "data_eval_qrels",
        "retriever_top_k",
    }
)  # fmt: skip
# More than are wanted: some of what is found may be the query's own passage, or a copy of it.
_SPARE = 8


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some queries, by their number from 0."""

    number: int
    start: int
    queries: Sequence[SourcedQuery]


def build_preferences(
    args: PreferenceArguments,
    augmenter: AugmenterArguments,
    queries: Sequence[SourcedQuery],
    index: DenseRetriever,
    folder: Path,
    *,
    model: Any,
    training: Any,
    tokenizer: Any,
    seed: int,
    settings: Sequence[Any] = (),
) -> list[PreferencePair]:
    """Samples candidates, lets the retriever score them, and makes pairs; or reads pairs that are there.

    What is in the folder already is kept and gone on with. The published files are written beside it.

    Args:
        args: how many candidates, and what makes one better than another.
        augmenter: how the model is asked, and how what it writes is mixed with the query.
        queries: to learn from.
        index: whose encoder judges.
        folder: of the run.
        model: TRL's ``ModelConfig``: the model that training starts from.
        training: TRL's config, with ``model_init_kwargs`` as ``build_tokenizer`` left it.
        tokenizer: of the model.
        seed: of the sampling.
        settings: other arguments that the candidates depend on, such as those of data and retriever.

    Returns:
        Pairs in the order of the queries.

    Raises:
        ConfigError: a setting does not fit.
        DataError: the model cannot be loaded, a file is bad, or there is no pair at all.
        RunFolderError: the folder holds preferences that came about otherwise.
        BackendError: the endpoint, the index or the disk is broken.
    """
    from rag_rl.data.reinforced_ir import read_preferences

    if augmenter.augmenter_weight == 1.0:
        raise ConfigError("augmenter_weight 1 leaves augmentations out of the search: there is nothing to learn")
    if args.preference_file:
        pairs = read_preferences(expand(args.preference_file))
        if not pairs:
            raise DataError(f"{args.preference_file}: holds no pair to learn from")
        return pairs
    place = folder / GENERATOR
    content = [(query.question.qid, query.text, list(query.rows)) for query in queries]
    noted = {
        "seed": seed,
        "model_name_or_path": _bare_name(model.model_name_or_path),
        "model_revision": model.model_revision,
        "queries_sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "index": index.fingerprint,
        **resolved([args, augmenter, *settings]),
    }
    with main_process_only() as main:
        if main:
            keep_settings(place / _SETTINGS, noted, holds="preferences", ignore=_MAY_CHANGE)
    batches = _batches(queries, args.preference_batch_size)
    _sample(args, augmenter, batches, place, model=model, training=training, tokenizer=tokenizer, seed=seed)
    _score(args, augmenter, batches, index, place, tokenizer=tokenizer, seed=seed)
    return _publish(args, augmenter, queries, batches, index, place)


def build_preference_dataset(pairs: Sequence[PreferencePair], *, training: Any, tokenizer: Any) -> Any:
    """Makes TRL's training set of pairs.

    Args:
        pairs: to learn from.
        training: TRL's config; what is longer than its ``max_length`` is cut, and counted in the log.
        tokenizer: of the model.

    Returns:
        A ``datasets.Dataset`` with ``prompt``, ``chosen`` and ``rejected`` as chat turns.
    """
    from datasets import Dataset

    rows = {
        "prompt": [[{"role": "user", "content": pair.prompt}] for pair in pairs],
        "chosen": [[{"role": "assistant", "content": pair.chosen}] for pair in pairs],
        "rejected": [[{"role": "assistant", "content": pair.rejected}] for pair in pairs],
    }
    if training.max_length is not None:
        texts = [
            turns + reply
            for name in ("chosen", "rejected")
            for turns, reply in zip(rows["prompt"], rows[name], strict=True)
        ]
        lengths = [len(ids) for ids in tokenizer.apply_chat_template(texts, tokenize=True, return_dict=False)]
        if over := sum(length > training.max_length for length in lengths):
            logger.warning(
                "%d of %d texts are longer than max_length %d (the longest has %d tokens): their ends are cut off",
                over,
                len(lengths),
                training.max_length,
                max(lengths),
            )
    return Dataset.from_dict(rows)


def write_augmentations(
    assembly: AugmentingAssembly,
    queries: Sequence[SourcedQuery],
    index: DenseRetriever,
    folder: Path,
    *,
    prefix: str,
) -> None:
    """Writes what the trained augmenter says to the queries, greedily, and how it is asked and mixed.

    Args:
        assembly: around the trained augmenter.
        queries: that it shall augment.
        index: with their passages.
        folder: of the run; ``retriever/queries.json`` and ``retriever/answers.json`` are written, the published files
            that a retriever learns from; and what ``AugmentedRetriever.load`` reads.
        prefix: put before each augmentation, as published.

    Raises:
        BackendError: the generator failed.
        DataError: the disk refuses.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from rag_rl.data.reinforced_ir import AugmentedQuery, SyntheticQuery, write_augmented, write_queries

    state = PartialState()
    world, rank = state.num_processes, state.process_index
    # As long a share everywhere: a generator that is collective must make the same number of calls on every process.
    share = [i % len(queries) for i in range(rank, -(-len(queries) // world) * world, world)]
    said = list(zip(share, assembly.texts([queries[i].text for i in share]), strict=True))
    by_place = dict(gather_object(said) if world > 1 else said)
    with main_process_only() as main:
        if not main:
            return
        rows = own_rows(queries, index.encode_queries([query.text for query in queries]), index)
        texts = [(query, index.passages[row].contents) for query, row in zip(queries, map(int, rows), strict=True)]
        place = folder / RETRIEVER
        if assembly.augmented is not None:
            assembly.augmented.save(folder)
        write_queries(place / QUERIES, [SyntheticQuery(query.text, text) for query, text in texts])
        written = [(query.text, text, by_place[i]) for i, (query, text) in enumerate(texts)]
        # A query to which nothing was written has no row: whoever reads the file searches for it as it is.
        told = [AugmentedQuery(query, text, prefix + answer) for query, text, answer in written if answer]
        write_augmented(place / ANSWERS, told)


def _bare_name(model: str) -> str:
    """Of a model in a folder its name alone: run folders can be moved, and name no path of a machine."""
    return Path(model).name if Path(model).is_dir() else model


def _batches(queries: Sequence[SourcedQuery], size: int) -> list[_Batch]:
    return [
        _Batch(number, start, queries[start : start + size])
        for number, start in enumerate(range(0, len(queries), size))
    ]


def _rows_of(place: Path, what: str) -> dict[int, dict[str, Any]]:
    """What all processes have written so far, by batch."""
    from rag_rl.data.appending import read_appended

    return {row["batch"]: row for path in sorted(place.glob(f"{what}-*.jsonl")) for _, row in read_appended(path)}


def _mine(batches: Sequence[_Batch], place: Path, what: str) -> tuple[list[_Batch], Path]:
    """The batches that are left for this process, and its file."""
    from accelerate import PartialState

    state = PartialState()
    done = _rows_of(place, what)
    state.wait_for_everyone()  # all have looked before any writes, so that shares do not overlap
    left = [batch for batch in batches if batch.number not in done]
    if done:
        logger.info("%d of %d batches of %s are there already", len(batches) - len(left), len(batches), what)
    return left[state.process_index :: state.num_processes], place / f"{what}-{state.process_index}.jsonl"


def _progress(batches: Sequence[_Batch], what: str) -> Iterator[_Batch]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    yield from tqdm(batches, desc=what, disable=None)


def _sample(
    args: PreferenceArguments,
    augmenter: AugmenterArguments,
    batches: Sequence[_Batch],
    place: Path,
    *,
    model: Any,
    training: Any,
    tokenizer: Any,
    seed: int,
) -> None:
    """Lets the untrained model write n candidates to each query, all of a batch in one call."""
    from accelerate import PartialState

    from rag_rl.data.appending import append_jsonl

    mine, path = _mine(batches, place, _CANDIDATES)
    if mine:
        asking = wrap_generator(augmenter, _generator(args, augmenter, model, training))
        instruction, answer_type = augmentation_task(augmenter)
        for batch in _progress(mine, _CANDIDATES):
            cut, failed = asking.cut, asking.failed
            texts = asking.candidates(
                [query.text for query in batch.queries],
                n=args.preference_candidates,
                task_instruction=instruction,
                answer_type=answer_type,
                temperature=args.preference_temperature,
                top_p=args.preference_top_p,
                seed=_seed(seed, batch.number),
            )
            counted = {"cut": asking.cut - cut, "failed": asking.failed - failed}
            append_jsonl(path, [{"batch": batch.number, "texts": texts, **counted}])
    PartialState().wait_for_everyone()


def _generator(args: PreferenceArguments, augmenter: AugmenterArguments, model: Any, training: Any) -> Any:
    from accelerate import PartialState

    from rag_rl.generation import OpenAIGenerator, TransformersGenerator

    if args.preference_base_url:
        return OpenAIGenerator(
            model.model_name_or_path,
            base_url=args.preference_base_url,
            api_key_env=args.preference_api_key_env,
            generator_type="instruct",
        )
    return TransformersGenerator.from_pretrained(
        model.model_name_or_path,
        # What TRL loads a model in where nothing is said.
        dtype=(training.model_init_kwargs or {}).get("dtype") or "float32",
        device=PartialState().device,
        revision=model.model_revision,
        batch_size=augmenter.augmenter_batch_size,
    )


def _score(
    args: PreferenceArguments,
    augmenter: AugmenterArguments,
    batches: Sequence[_Batch],
    index: DenseRetriever,
    place: Path,
    *,
    tokenizer: Any,
    seed: int,
) -> None:
    """Lets the retriever score the candidates of each query, and pairs them."""
    from accelerate import PartialState

    from rag_rl.data.appending import append_jsonl

    mine, path = _mine(batches, place, _SCORES)
    written = _rows_of(place, _CANDIDATES) if mine else {}
    for batch in _progress(mine, _SCORES):
        texts: list[list[str | None]] = written[batch.number]["texts"]
        append_jsonl(path, [{"batch": batch.number, **_scored(args, augmenter, batch, texts, index, tokenizer, seed)}])
    PartialState().wait_for_everyone()


def _scored(
    args: PreferenceArguments,
    augmenter: AugmenterArguments,
    batch: _Batch,
    texts: Sequence[Sequence[str | None]],
    index: DenseRetriever,
    tokenizer: Any,
    seed: int,
) -> dict[str, Any]:
    """Pairs of a batch, with places of queries in all of them; and what became of the others."""
    from rag_rl.rewards import preference_pairs, published_pairs, retrieval_signal

    vectors = index.encode_queries([query.text for query in batch.queries])
    rows = own_rows(batch.queries, vectors, index)
    own = index.vectors(rows)
    written, valid, too_long = _embedded(texts, index, augmenter, args)
    weight = augmenter.augmenter_weight
    signal: np.ndarray
    found: Preferences
    if args.preference_signal == "published":
        found = published_pairs(vectors, own, written, weight=weight, threshold=args.preference_threshold, valid=valid)
        signal, bare = np.einsum("bnd,bd->bn", written, own), np.einsum("bd,bd->b", vectors, own)
    else:
        if args.preference_signal in ("margin", "rank"):
            negatives, there = _negatives(args, batch.queries, vectors, rows, own, index)
            signal, bare = retrieval_signal(
                vectors,
                own,
                written,
                index.vectors(negatives),
                kind="margin" if args.preference_signal == "margin" else "reciprocal_rank",
                weight=weight,
                negatives_valid=there,
            )
        else:
            signal, bare = np.zeros(valid.shape), np.zeros(len(valid))
            if args.preference_signal == "random":
                signal = np.random.default_rng(_seed(seed, batch.number)).random(valid.shape)
        lengths = None
        if args.preference_length_penalty or args.preference_max_length_ratio is not None:
            flat = [text or "" for listed in texts for text in listed]
            counted = [len(ids) for ids in tokenizer(flat, add_special_tokens=False)["input_ids"]]
            lengths = np.array(counted).reshape(valid.shape)
        found = preference_pairs(
            signal,
            bare,
            min_gain=args.preference_min_gain,
            min_gap=args.preference_min_gap,
            per_query=args.preference_per_query,
            lengths=lengths,
            length_penalty=args.preference_length_penalty,
            max_length_ratio=args.preference_max_length_ratio,
            valid=valid,
        )
    some = valid.any(1)
    spread = np.where(valid, signal, np.nan)[some]
    # Equal texts can differ in their signal by chance.
    pairs = [pair for pair in found.pairs if texts[pair.query][pair.chosen] != texts[pair.query][pair.rejected]]
    lost = {pair.query for pair in found.pairs} - {pair.query for pair in pairs}
    return {
        "pairs": [
            [batch.start + pair.query, pair.chosen, pair.rejected, pair.chosen_score, pair.rejected_score]
            for pair in pairs
        ],
        "rows": rows.tolist(),
        "too_few": found.too_few,
        "no_gain": found.no_gain,
        "too_alike": found.too_alike + len(lost),
        "too_long": too_long,
        "scored": int(some.sum()),
        "bare": float(bare[some].sum()),
        "mean": float(np.nanmean(spread, axis=1).sum()) if len(spread) else 0.0,
        "best": float(np.nanmax(spread, axis=1).sum()) if len(spread) else 0.0,
    }


def _embedded(
    texts: Sequence[Sequence[str | None]],
    index: DenseRetriever,
    augmenter: AugmenterArguments,
    args: PreferenceArguments,
) -> tuple[Array, np.ndarray, int]:
    """(B, N, D) of the candidates, (B, N) whether there is one, and how many the encoder cut."""
    from rag_rl.retrieval.history import token_counter

    encoder: Any = index.encoder
    side = args.preference_side or augmenter.augmenter_side
    valid = np.array([[text is not None for text in listed] for listed in texts], dtype=bool)
    said = [augmenter.augmenter_prefix + text for listed in texts for text in listed if text is not None]
    vectors = np.zeros((*valid.shape, index.dimension), dtype=np.float32)
    if said:
        # A tiny model, or a low temperature, says the same thing more than once.
        once = list(dict.fromkeys(said))
        found = encoder.encode_documents(once) if side == "document" else encoder.encode_queries(once)
        at = {text: i for i, text in enumerate(once)}
        vectors[valid] = found[[at[text] for text in said]]
    too_long = 0
    limit = getattr(encoder, "max_length", None)
    if said and limit is not None:
        count = token_counter(encoder.model.tokenizer, prompt=getattr(encoder, f"{side}_prompt", ""))
        too_long = sum(length > limit for length in count(said))
    return vectors, valid, too_long


def _negatives(
    args: PreferenceArguments,
    queries: Sequence[SourcedQuery],
    vectors: Array,
    rows: IntArray,
    own: Array,
    index: DenseRetriever,
) -> tuple[IntArray, np.ndarray]:
    """(B, K) rows of other passages that the bare queries find first, and whether there are so many.

    Those above the query's own passage are among them: they are what an augmentation has to overcome, which the rule
    for the retriever's negatives leaves out.
    """
    k = args.preference_negatives
    gold = max(len(query.rows) for query in queries)
    scores, found = index.search_vectors(vectors, top_k=min(k + gold + _SPARE, len(index)))
    good = np.ones(found.shape, dtype=bool)
    for i, query in enumerate(queries):
        text = index.passages[int(rows[i])].contents
        good[i] = [row not in query.rows and index.passages[row].contents != text for row in map(int, found[i])]
    if args.preference_false_negative_margin is not None:
        reference = np.einsum("bd,bd->b", vectors, own)[:, None]
        good &= scores <= reference - args.preference_false_negative_margin * np.abs(reference)
    first = np.argsort(~good, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, first, 1), np.take_along_axis(good, first, 1)


def _publish(
    args: PreferenceArguments,
    augmenter: AugmenterArguments,
    queries: Sequence[SourcedQuery],
    batches: Sequence[_Batch],
    index: DenseRetriever,
    place: Path,
) -> list[PreferencePair]:
    """Puts all batches together, and writes them in the published forms."""
    from rag_rl.data import reinforced_ir

    written, scored = _rows_of(place, _CANDIDATES), _rows_of(place, _SCORES)
    texts = [listed for batch in batches for listed in written[batch.number]["texts"]]
    asked = _prompts(augmenter, [query.text for query in queries])
    pairs = [
        PreferencePair(asked[i], texts[i][chosen], texts[i][rejected], better, worse)
        for batch in batches
        for i, chosen, rejected, better, worse in scored[batch.number]["pairs"]
    ]
    summary = _summary(args, queries, batches, written, scored, pairs)
    with main_process_only() as main:
        if main:
            rows = [row for batch in batches for row in scored[batch.number]["rows"]]
            passages = [index.passages[row].contents for row in rows]
            synthetic = [reinforced_ir.SyntheticQuery(q.text, text) for q, text in zip(queries, passages, strict=True)]
            prefix = augmenter.augmenter_prefix
            reinforced_ir.write_queries(place / QUERIES, synthetic)
            reinforced_ir.write_candidates(
                place / ANSWERS,
                [
                    [reinforced_ir.Candidate(q.query, q.passage, text or "", prefix + (text or "")) for text in listed]
                    for q, listed in zip(synthetic, texts, strict=True)
                ],
            )
            reinforced_ir.write_preferences(place / PAIRS, pairs)
            reinforced_ir.write_llamafactory(place / LLAMAFACTORY, pairs)
            entry = reinforced_ir.llamafactory_entry(LLAMAFACTORY)
            reinforced_ir.write_dataset_info(place / DATASET_INFO, {"rag_rl_preferences": entry})
            write_whole(place / _SUMMARY, json.dumps(summary, indent=2) + "\n")
            logger.info(
                "%d pairs of %d queries; without one: %d too few candidates, %d where none helps, %d where all are "
                "alike; the encoder cut %d candidates, the budget %d",
                *(len(pairs), len(queries), *(summary[name] for name in ("too_few", "no_gain", "too_alike"))),
                *(summary[name] for name in ("too_long", "cut")),
            )
    if not pairs:
        raise DataError(
            f"none of {len(queries)} queries has a pair to learn from ({summary['too_few']} with too few candidates, "
            f"{summary['no_gain']} where none helps, {summary['too_alike']} where all are alike): sample more, at a "
            "higher temperature, or ask for less"
        )
    return pairs


def _summary(
    args: PreferenceArguments,
    queries: Sequence[SourcedQuery],
    batches: Sequence[_Batch],
    written: Mapping[int, Mapping[str, Any]],
    scored: Mapping[int, Mapping[str, Any]],
    pairs: Sequence[PreferencePair],
) -> dict[str, Any]:
    both = [{**written[batch.number], **scored[batch.number]} for batch in batches]
    total = sum(row["scored"] for row in both)
    found: dict[str, Any] = {
        "queries": len(queries),
        "candidates": len(queries) * args.preference_candidates,
        "pairs": len(pairs),
        **{name: sum(row[name] for row in both) for name in _COUNTS},
    }
    if total:
        found["signal"] = {name: sum(row[name] for row in both) / total for name in ("bare", "mean", "best")}
    return found


def _prompts(augmenter: AugmenterArguments, queries: Sequence[str]) -> list[str]:
    """What the model is asked, as plain text."""
    instruction, answer_type = augmentation_task(augmenter)
    asking = wrap_generator(augmenter, _Nobody())
    prompts = asking.prompts(queries, task_instruction=instruction, answer_type=answer_type)
    return [turns[0]["content"] for turns in prompts if not isinstance(turns, str)]


class _Nobody:
    """A generator that is never asked: prompts are made without one."""

    def generate(self, prompts: Any, **_: Any) -> Any:
        raise NotImplementedError


def _seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seed, batch)).encode(), digest_size=4).digest(), "big") % 2**31
