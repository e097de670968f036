"""From names to the parts of a reranker: its rows, the cross-encoder under training, a retriever with one on top."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rag_rl.config.arguments import DataArguments, ReaderArguments, RetrieverArguments
from rag_rl.config.parts import (
    build_corpus,
    build_questions,
    build_reader,
    build_reader_reward,
    build_retriever,
    expand,
    import_attribute,
)
from rag_rl.config.reranker_arguments import RerankerArguments
from rag_rl.data import PairRow, check_leakage, load_pairs, mine_pairs, split_pairs
from rag_rl.errors import ConfigError
from rag_rl.types import Passage, Retriever

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

    from rag_rl.reasoning import Environment

# Read in one go from an index: few calls, and little of a large corpus in memory.
_PASSAGES_AT_ONCE = 4096


def build_pairs(
    args: RerankerArguments, data: DataArguments, retriever: RetrieverArguments, *, seed: int
) -> tuple[list[PairRow], list[PairRow]]:
    """Loads the rows of a reranker, or mines them.

    Held-out rows are mined without a margin: all of the retriever's candidates are ranked.

    Args:
        args: files, or how to mine.
        data: where rows are mined, corpus and questions.
        retriever: finds the negatives.
        seed: of the split.

    Returns:
        Rows to train on, and held-out rows; no query and no source chunk is in both.

    Raises:
        ConfigError: nothing to read or to mine is named, or the split leaves one side empty.
        DataError: a file is missing or has bad rows, or a held-out row is also trained on.
    """
    if args.train_file:
        rows = load_pairs(expand(args.train_file))
        if args.valid_file:
            held_out = load_pairs(expand(args.valid_file))
            check_leakage(rows, held_out, names=(args.train_file, args.valid_file))
            return rows, held_out
        size = int(args.valid_size) if args.valid_size >= 1 else args.valid_size
        return split_pairs(rows, eval_size=size, seed=seed)
    if not data.data_train:
        raise ConfigError("name a train_file of rows, or data_train and data_corpus to mine them from")
    questions, asked = build_questions(data, seed=seed, require_answers=False)
    search = build_retriever(retriever, data, seed=seed)
    if search is None:
        raise ConfigError("mining needs a retriever: set retriever_name, or name a train_file of rows")
    margin, top_k = args.reranker_false_negative_margin, args.reranker_candidates
    train = mine_pairs(questions, search, passages=_passages(search, data), top_k=top_k, margin=margin)
    held_out = mine_pairs(asked, search, passages=_passages(search, data), top_k=top_k)
    check_leakage(train, held_out, names=(data.data_train, data.data_eval or data.data_train))
    return train, held_out


def build_cross_encoder(args: RerankerArguments, *, use_cpu: bool = False) -> CrossEncoder:
    """Loads the cross-encoder and chooses what of it is trained.

    Args:
        args: which one, and what.
        use_cpu: whether it stays on the CPU where there is a GPU.

    Returns:
        The model.

    Raises:
        ConfigError: none is named, or settings that do not fit.
        DataError: it cannot be loaded.
    """
    from accelerate import PartialState

    from rag_rl.trainers.cross_encoder_adapters import add_lora, load_cross_encoder

    if not args.reranker_model:
        raise ConfigError("reranker_model is not set: name a cross-encoder, or an encoder that gets a new head")
    model = load_cross_encoder(
        _model_name(args.reranker_model),
        quantized=args.reranker_train == "qlora",
        max_length=args.reranker_max_length,
        pooling=args.reranker_pooling,
        dtype=args.reranker_dtype,
        device="cpu" if use_cpu else str(PartialState().device),
    )
    if args.reranker_train != "full":
        add_lora(
            model,
            r=args.reranker_lora_r,
            alpha=args.reranker_lora_alpha,
            dropout=args.reranker_lora_dropout,
        )
    return model


def settle_adapter(model: Any, *, merged: bool) -> None:
    """Merges the adapter of a trained cross-encoder where that was asked for, or where it could not be found alone.

    An adapter is kept where its base is on the Hub: ``CrossEncoder(folder)`` looks for a base in a local folder as
    seen from where it runs, and would find it nowhere else.

    Args:
        model: after training, with an adapter or without.
        merged: whether merging was asked for.
    """
    from rag_rl.trainers.cross_encoder_adapters import merge_adapter

    backbone = model.transformers_model
    if not getattr(backbone, "_hf_peft_config_loaded", False):
        return
    bases = [config.base_model_name_or_path or "" for config in backbone.peft_config.values()]
    if merged or any(Path(base).is_dir() for base in bases):
        merge_adapter(model)


def build_ranking_environment(args: ReaderArguments) -> Environment:
    """Builds what rewards the order of candidates: a reader that is shown the first of them, or their judgements.

    Args:
        args: who reads, and what is rewarded.

    Returns:
        An environment of one search a question.

    Raises:
        ConfigError: an unknown name, a reader that searches for itself, or one that answers nothing where answers are
            rewarded.
        DataError: the reader's model cannot be loaded.
    """
    from rag_rl.reasoning import Environment

    reward = build_reader_reward(args)
    if args.reader_name == "react":
        raise ConfigError(
            "reader_name react words its own searches: an order of candidates is read by decomposition, scripted or "
            "none, or by package.module:attribute"
        )
    return Environment(build_reader(args), max_hops=1, reward=reward)


def build_reranked(retriever: Retriever, model: str, *, candidates: int, batch_size: int = 64) -> Retriever:
    """Puts a trained reranker on top of a retriever. A run folder brings its ``reranker_retriever_weight`` along.

    Args:
        retriever: finds the candidates.
        model: cross-encoder: Hub id, or a run folder.
        candidates: N, how many it orders.
        batch_size: pairs a forward pass.

    Returns:
        A retriever.

    Raises:
        ConfigError: a number below 1.
        DataError: the model cannot be loaded.
    """
    from accelerate import PartialState

    from rag_rl.retrieval import RerankedRetriever
    from rag_rl.trainers.cross_encoder_adapters import load_cross_encoder

    name = _model_name(model)
    scorer = load_cross_encoder(name, device=str(PartialState().device))
    return RerankedRetriever(
        retriever, scorer, candidates=candidates, batch_size=batch_size, retriever_weight=_kept_weight(Path(name))
    )


def _kept_weight(folder: Path) -> float:
    settings = folder / "resolved_config.yaml"
    if not settings.is_file():
        return 0.0
    return float(yaml.safe_load(settings.read_text(encoding="utf-8")).get("reranker_retriever_weight") or 0.0)


def _model_name(name: str) -> str:
    # A model that comes inside a Python package: python:package:function gives its folder.
    if name.startswith("python:"):
        name = str(import_attribute(name.removeprefix("python:"))())
    return expand(name)


def _passages(search: Any, data: DataArguments) -> Iterable[Passage]:
    stored: Sequence[Passage] | None = getattr(search, "passages", None)
    return build_corpus(data) if stored is None else _by_blocks(stored)


def _by_blocks(passages: Sequence[Passage]) -> Iterator[Passage]:
    for start in range(0, len(passages), _PASSAGES_AT_ONCE):
        yield from passages[start : start + _PASSAGES_AT_ONCE]
