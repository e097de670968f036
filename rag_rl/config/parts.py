"""From names to parts: what the user typed becomes data, a retriever, an assembly, rewards.

Every name is resolved in one ``match``, with no registry: what is not listed there can be given as
``package.module:attribute``, which is called with the arguments of its part.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from rag_rl.config.arguments import (
    DataArguments,
    GeneratorArguments,
    JudgeArguments,
    QueryEncoderArguments,
    ReaderArguments,
    ReasonerArguments,
    RetrieverArguments,
    RewardArguments,
    StepRewardArguments,
)
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Judge, Passage, Prompt, Question, Retriever

if TYPE_CHECKING:
    from rag_rl.evaluation import ReasoningAssembly
    from rag_rl.evaluation.scoring import Part
    from rag_rl.reasoning import StepScorer, StepSetup
    from rag_rl.retrieval import IndexSettings

logger = logging.getLogger(__name__)

LLM_JUDGES = ("openai", "gemini", "local")
"""Judges that are asked by the prompt of a rubric."""
# Read in one go while looking for gold documents: few calls, and little of a large corpus in memory.
_PASSAGES_AT_ONCE = 4096


def expand(text: str) -> str:
    """Replaces a leading ``${tiny}`` or ``${data}`` by the folder that it stands for.

    Args:
        text: a path, a model name, or anything else, which is returned as it is.

    Returns:
        The text with the folder in it.
    """
    if text.startswith("${tiny}"):
        from rag_rl.tiny import FOLDER

        return str(FOLDER) + text[len("${tiny}") :]
    if text.startswith("${data}"):
        from rag_rl.data import resolve_data_path

        return str(resolve_data_path(text))
    return text


def import_attribute(name: str) -> Any:
    """Imports ``package.module:attribute``.

    Args:
        name: with one colon.

    Returns:
        The attribute.

    Raises:
        ConfigError: no such module or attribute.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}") from error


def build_questions(
    args: DataArguments, *, seed: int, require_answers: bool = True
) -> tuple[list[Question], list[Question]]:
    """Loads the questions to train on and the held-out ones.

    Args:
        args: where they are.
        seed: of the split and of the choice where there are more than asked for.
        require_answers: whether a question without answers is an error; it can be scored by what is retrieved for it.

    Returns:
        Questions to train on, and held-out questions; none is in both.

    Raises:
        ConfigError: no file is named.
        DataError: a file is missing or has bad rows, or a held-out question is also trained on.
    """
    from rag_rl.data import fold_questions, split_questions

    if not args.data_train:
        raise ConfigError("data_train is not set: name a file of questions (see docs/data_formats.md)")
    if args.data_eval_qrels and not args.data_eval:
        raise ConfigError("data_eval_qrels is set, but data_eval is not: name the questions that it judges")
    train = _judged_questions(args.data_train, args.data_train_qrels, require_answers)
    if args.data_eval and args.data_folds:
        raise ConfigError("data_eval and data_folds exclude each other: the folds are cut from data_train")
    if args.data_folds:  # the whole fold is held out, and the folds are the same for every seed
        return fold_questions(train, folds=args.data_folds, fold=args.data_fold, seed=0)
    if args.data_eval:
        held_out = _judged_questions(args.data_eval, args.data_eval_qrels, require_answers)
        texts = {q.question for q in train}
        leaked = [q.qid for q in held_out if q.question in texts]
        if leaked:
            raise DataError(
                f"{args.data_eval}: {len(leaked)} held-out questions are also in {args.data_train}: "
                f"{', '.join(leaked[:5])}"
            )
    else:
        train, held_out = split_questions(train, eval_size=args.data_eval_size, seed=seed)
    if len(held_out) > args.data_eval_size:
        # The same held-out questions for every seed: before and after, and runs among each other, are comparable.
        _, held_out = split_questions(held_out, eval_size=args.data_eval_size, seed=0)
    if args.data_train_size is not None and len(train) > args.data_train_size:
        _, train = split_questions(train, eval_size=args.data_train_size, seed=seed)
    return train, held_out


def _judged_questions(source: str, qrels: str | None, require_answers: bool) -> list[Question]:
    from rag_rl.data import load_questions

    source = expand(source)
    if qrels is None:
        return load_questions(source, require_answers=require_answers)
    if Path(source).is_dir() and not qrels.endswith(".tsv"):
        return load_questions(source, require_answers=require_answers, split=qrels)
    return load_questions(source, require_answers=require_answers, qrels=expand(qrels))


def build_probe(args: DataArguments) -> list[Question]:
    """Loads the questions that a new index is tried with.

    Args:
        args: ``data_train`` names them, ``data_train_size`` bounds them.

    Returns:
        The questions; none where no file is named.

    Raises:
        DataError: the file is missing or has bad rows.
    """
    from rag_rl.data import load_questions

    if not args.data_train:
        return []
    return load_questions(expand(args.data_train), require_answers=False)[: args.data_train_size]


def build_corpus(args: DataArguments, tokenizer: Any = None) -> Iterable[Passage]:
    """Opens the corpus, cut into chunks where asked for.

    Args:
        args: where it is.
        tokenizer: the encoder's own, for ``data_chunk_tokens``.

    Returns:
        Passages, streamed.

    Raises:
        ConfigError: no corpus is named.
        DataError: it is missing or has bad rows.
    """
    from rag_rl.data import chunk_passages, load_corpus

    if not args.data_corpus:
        raise ConfigError("data_corpus is not set: name a corpus (see docs/data_formats.md)")
    corpus = load_corpus(
        expand(args.data_corpus),
        text_columns=args.data_text_columns or None,
        title_column=args.data_title_column,
        id_column=args.data_id_column,
    )
    if args.data_chunk_tokens is None:
        return corpus
    return chunk_passages(
        corpus, tokenizer=tokenizer, max_tokens=args.data_chunk_tokens, overlap=args.data_chunk_overlap
    )


def build_encoder(args: RetrieverArguments) -> Any:
    """Loads the sentence encoder with its overrides.

    Args:
        args: which one.

    Returns:
        An encoder of ``rag_rl.retrieval``.

    Raises:
        ConfigError: no encoder is named, or it cannot be loaded.
    """
    from rag_rl.retrieval import SentenceEncoder

    name = args.retriever_encoder
    if not name:
        raise ConfigError("retriever_encoder is not set: name a sentence-transformers model")
    # A model that comes inside a Python package: python:package:function gives its folder.
    if name.startswith("python:"):
        name = str(import_attribute(name.removeprefix("python:"))())
    return SentenceEncoder(
        expand(name),
        pooling=args.retriever_pooling,
        normalize=args.retriever_normalize,
        query_prompt=args.retriever_query_prompt,
        document_prompt=args.retriever_document_prompt,
        max_length=args.retriever_max_length,
        batch_size=args.retriever_batch_size,
        dtype=args.retriever_dtype,
        devices=args.retriever_devices or None,
    )


def index_settings(args: RetrieverArguments) -> IndexSettings:
    """Gathers how vectors are to be searched.

    Args:
        args: ``retriever_index`` and what begins with it.

    Returns:
        Settings for ``build_index`` and ``open_index``.

    Raises:
        ConfigError: a value out of range, or of another kind of index.
    """
    from rag_rl.retrieval import IndexSettings

    names = [field.name for field in fields(IndexSettings) if field.name != "kind"]
    return IndexSettings(args.retriever_index, **{name: getattr(args, f"retriever_index_{name}") for name in names})


def index_folder(args: RetrieverArguments, data: DataArguments, encoder: Any) -> Path:
    """Where the index of this corpus and encoder lies.

    Args:
        args: ``retriever_index_path`` wins.
        data: the corpus and how it is cut. How its path is spelt makes no difference, nor does a link on the way.
        encoder: its fingerprint is part of the name.

    Returns:
        A folder, which may not exist yet.

    Raises:
        ConfigError: a setting of the index is out of range.
    """
    if args.retriever_index_path:
        return Path(expand(args.retriever_index_path))
    index = index_settings(args)
    # Nothing is added for a flat index, so that those in older caches are found.
    kind: tuple[Any, ...] = () if index.kind == "flat" else (index.kind, index.of_building())
    key = repr(
        (
            *_identity(expand(data.data_corpus)),
            data.data_text_columns,
            data.data_title_column,
            data.data_id_column,
            data.data_chunk_tokens,
            data.data_chunk_overlap if data.data_chunk_tokens else None,
            encoder.fingerprint,
            args.retriever_backend,
            args.retriever_chroma_url,
            *kind,
        )
    )
    return _cache_folder() / "indexes" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    return Path(os.environ.get("RAG_RL_CACHE") or Path.home() / ".cache" / "rag-rl")


def _identity(source: str) -> tuple[str, list[tuple[str, int, int]]]:
    """Which corpus a source names, in one spelling, and the state that its files are in."""
    from rag_rl.data.hub import is_hub_source, parse_hub_source

    if not is_hub_source(source):
        path = Path(source).resolve()
        return str(path), _stamp(path)
    name, configuration, split = parse_hub_source(source)
    local = Path(name).is_dir()  # a folder in the form of the Hub's
    path = Path(name).resolve()
    return repr((str(path) if local else name, configuration, split)), _stamp(path) if local else []


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """What changes when a file, or a file in a folder, does."""
    if not path.exists():
        return []
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def build_retriever(args: RetrieverArguments, data: DataArguments, *, seed: int = 0) -> Retriever | None:
    """Opens the retriever, building its index first where there is none.

    Args:
        args: which one.
        data: the corpus.
        seed: of the control experiment ``retriever_shuffled``.

    Returns:
        A retriever, or None for ``none``.

    Raises:
        ConfigError: an unknown name, or ``retriever_shuffled`` with a retriever that searches no vectors.
        DataError: the corpus is missing or has bad rows.
        RetrievalIndexError: the index does not fit or is damaged.
        BackendError: the vector store or the server does not answer.
    """
    from rag_rl.retrieval import ShuffledRetriever, build_index, open_index
    from rag_rl.retrieval.http import HTTPRetriever

    retriever: Any
    match args.retriever_name:
        case "none":
            return None
        case "dense":
            index = index_settings(args)
            encoder = build_encoder(args)
            folder = index_folder(args, data, encoder)
            with first_process():
                if not (folder / "manifest.json").is_file():
                    build_index(
                        build_corpus(data, encoder.model.tokenizer),
                        encoder,
                        folder,
                        backend=args.retriever_backend,
                        chroma_url=args.retriever_chroma_url,
                        index=index,
                    )
            retriever = open_index(folder, encoder, chroma_url=args.retriever_chroma_url, index=index)
        case "http":
            retriever = HTTPRetriever(
                args.retriever_url,
                fingerprints=args.retriever_fingerprint,
                token_env=args.retriever_token_env,
                timeout_s=args.retriever_timeout_s,
                wait_s=args.retriever_wait_s,
            )
            retriever.wait_until_ready()
        case name if ":" in name:
            retriever = import_attribute(name)(args, data)
        case name:
            raise ConfigError(f"retriever_name must be dense, http, none or package.module:attribute, got {name!r}")
    if args.retriever_reranker:
        from rag_rl.config.rerankers import build_reranked

        retriever = build_reranked(
            retriever,
            args.retriever_reranker,
            candidates=args.retriever_candidates,
            batch_size=args.retriever_reranker_batch_size,
        )
    if not args.retriever_shuffled:
        return cast("Retriever", retriever)
    if not hasattr(retriever, "search_hits"):
        raise ConfigError(
            f"retriever_shuffled needs the dense retriever without a reranker, not {type(retriever).__name__}"
        )
    return ShuffledRetriever(retriever, seed=seed)


def build_reader(args: ReaderArguments) -> Any:
    """Builds who asks, reads and answers.

    Args:
        args: who.

    Returns:
        A ``rag_rl.reasoning.Reader``.

    Raises:
        ConfigError: an unknown name, or a model is needed and none is named.
        DataError: the model cannot be loaded.
    """
    from rag_rl import reasoning

    shared: dict[str, Any] = {
        "history": args.reader_history,
        "answer_marker": args.reader_answer_marker,
        "max_new_tokens": args.reader_max_new_tokens,
        "generator_type": args.reader_type,
    }
    match args.reader_name:
        case "decomposition":
            return reasoning.DecompositionReader(
                build_reader_model(args), follow_up=args.reader_follow_up, prompt=args.reader_prompt, **shared
            )
        case "scripted":
            return reasoning.DecompositionReader(follow_up=args.reader_follow_up, history=args.reader_history)
        case "react":
            return reasoning.ReActReader(build_reader_model(args), **shared)
        case "none":
            return reasoning.SingleSearch()
        case name if ":" in name:
            return import_attribute(name)(args)
        case name:
            raise ConfigError(
                f"reader_name must be decomposition, scripted, react, none or package.module:attribute, got {name!r}"
            )


def build_reader_model(args: ReaderArguments) -> Any:
    """Loads the reader's model, or connects to its endpoint; greedy replies are remembered.

    Args:
        args: which one.

    Returns:
        A generator.

    Raises:
        ConfigError: no model is named.
        DataError: it cannot be loaded.
    """
    from rag_rl.generation import CachedGenerator, OpenAIGenerator, TransformersGenerator

    if not args.reader_model:
        raise ConfigError(f"reader_name {args.reader_name} needs a model: set reader_model")
    if args.reader_base_url:
        return CachedGenerator(
            OpenAIGenerator(
                args.reader_model,
                base_url=args.reader_base_url,
                api_key_env=args.reader_api_key_env,
                generator_type=args.reader_type,
            )
        )
    return CachedGenerator(
        TransformersGenerator.from_pretrained(
            expand(args.reader_model),
            batch_size=args.reader_batch_size,
            generator_type="base" if args.reader_type == "base" else "instruct",
        )
    )


def build_reader_reward(args: ReaderArguments) -> Callable[[Any], float | None]:
    """Finds what a finished trajectory of searches earns.

    Args:
        args: who reads, and what is rewarded.

    Returns:
        Trajectory to reward; None where it cannot be told.

    Raises:
        ConfigError: an unknown name, or a reward for answers where nobody reads.
    """
    from rag_rl.reasoning import f1_reward, retrieval_reward
    from rag_rl.reasoning.environment import RETRIEVAL_REWARDS

    if args.reader_name == "none" and args.reader_reward == "f1":
        raise ConfigError("reader_name none answers nothing: set reader_reward to ndcg, recall or reciprocal_rank")
    match args.reader_reward:
        case "f1":
            return f1_reward
        case "constant":
            return _constant_reward
        case name if name in RETRIEVAL_REWARDS:
            return retrieval_reward(name)
        case name if ":" in name:
            found: Callable[[Any], float | None] = import_attribute(name)
            return found
        case name:
            known = ", ".join(("f1", *RETRIEVAL_REWARDS, "constant"))
            raise ConfigError(f"reader_reward must be one of {known}, or package.module:attribute, got {name!r}")


def build_search(
    retriever: RetrieverArguments, data: DataArguments, reader: ReaderArguments, trained: QueryEncoderArguments
) -> Any:
    """Puts together what training a retriever needs: an index, a history-aware query encoder and an environment.

    Args:
        retriever: index and encoder.
        data: the corpus.
        reader: who asks, reads and answers, and what is rewarded.
        trained: what of the encoder is trained.

    Returns:
        A ``rag_rl.evaluation.SearchAssembly``.

    Raises:
        ConfigError: a name or a number that does not fit.
        DataError: corpus or model are missing or bad.
        RetrievalIndexError: the index does not fit or is damaged.
    """
    from rag_rl.evaluation import SearchAssembly
    from rag_rl.reasoning import Environment
    from rag_rl.retrieval import HistoryEncoder

    if retriever.retriever_name != "dense" or retriever.retriever_shuffled:
        raise ConfigError("training a retriever needs retriever_name dense, not shuffled")
    if retriever.retriever_reranker:
        raise ConfigError("a retriever is trained without a reranker: leave retriever_reranker out")
    reward = build_reader_reward(reader)
    one_hop = reader.reader_name == "none"
    # What is quickly refused comes before an index that may take hours to build.
    asking = build_reader(reader)
    index: Any = build_retriever(retriever, data)
    encoder = build_encoder(retriever)  # the index keeps the one that it was made with
    tokens, longest = trained.retriever_state_tokens, encoder.max_length
    if tokens is not None and (tokens < 1 or (longest is not None and tokens > longest)):
        raise ConfigError(
            f"retriever_state_tokens must be between 1 and {longest}, what the encoder takes, got {tokens}"
        )
    make_trainable(encoder, trained)
    # Saved with the model, so that it puts the same texts before queries and documents wherever it is loaded.
    encoder.model.prompts.update(query=encoder.query_prompt, document=encoder.document_prompt)
    return SearchAssembly(
        Environment(asking, max_hops=1 if one_hop else reader.reader_max_hops, reward=reward),
        index,
        HistoryEncoder(encoder, max_tokens=trained.retriever_state_tokens),
        top_k=retriever.retriever_top_k,
        answers=not one_hop,
    )


def _constant_reward(trajectory: Any) -> float:
    del trajectory
    return 1.0


def make_trainable(encoder: Any, args: QueryEncoderArguments) -> None:
    """Chooses what of an encoder is trained, in place.

    Args:
        encoder: a ``SentenceEncoder``.
        args: what.
    """
    model = encoder.model
    match args.retriever_train:
        case "full":
            model.requires_grad_(True)
        case "lora":
            from peft import LoraConfig, TaskType

            model.add_adapter(
                LoraConfig(
                    task_type=TaskType.FEATURE_EXTRACTION,
                    r=args.retriever_lora_r,
                    lora_alpha=args.retriever_lora_alpha,
                    lora_dropout=0.0,  # the policy that samples must be the policy that is trained
                    target_modules="all-linear",
                )
            )
        case "head":
            import torch
            from sentence_transformers.sentence_transformer.modules import Dense

            model.requires_grad_(False)
            head = Dense(encoder.dimension, encoder.dimension, bias=False, activation_function=torch.nn.Identity())
            torch.nn.init.eye_(head.linear.weight)  # begins as the encoder itself
            # Before the model's own normalisation, so that it ends in vectors of length 1 as before.
            place = next((i for i, module in enumerate(model) if type(module).__name__ == "Normalize"), len(model))
            model.insert(place, head.to(model.device))


def build_trained_questions(questions: Sequence[Question], search: Any, *, what: str) -> list[Question]:
    """Leaves out questions whose gold documents the corpus does not hold, and says how many.

    Args:
        questions: to train or evaluate on.
        search: with the index; where it does not answer, a question without gold documents could not be scored.
        what: what they are for, in the log.

    Returns:
        Those that can be found.

    Raises:
        DataError: none is left.
    """
    from rag_rl.reasoning import known_gold

    passages = search.retriever.passages
    wanted = {doc_id for question in questions for doc_id in question.gold_doc_ids}
    found = {
        passage.doc_id
        for start in range(0, len(passages), _PASSAGES_AT_ONCE)
        for passage in passages[start : start + _PASSAGES_AT_ONCE]
        if passage.doc_id in wanted
    }
    kept, lost = known_gold(questions, found, required=not search.answers)
    if lost:
        why = "the corpus lacks their gold documents" + ("" if search.answers else ", or they name none")
        logger.warning("%d of %d %s questions are left out: %s", lost, len(questions), what, why)
    return kept


def first_process() -> Any:
    """A context in which the main process goes first and the others wait; does nothing in a single process."""
    from accelerate import PartialState

    return PartialState().main_process_first()


def build_tokenizer(model: Any, training: Any, *, setting: str = "model_name_or_path") -> tuple[Any, int | None]:
    """Loads the tokenizer of the model that will be trained.

    A trainer that is given a name loads the model itself, by ``training.model_init_kwargs`` alone: how ``ModelConfig``
    wants it loaded (dtype, attention, revision) is put in there.

    Args:
        model: TRL's ``ModelConfig``; ``${tiny}`` in its path is expanded in place.
        training: TRL's config.
        setting: what named the model, for errors.

    Returns:
        The tokenizer, with a padding token; and the longest context of the model, None where its config sets none.

    Raises:
        ConfigError: the model cannot be found.
    """
    from transformers import AutoConfig, AutoTokenizer

    model.model_name_or_path = expand(model.model_name_or_path or "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
        config = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"{setting} {model.model_name_or_path!r} cannot be loaded: {first}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    wanted = {
        "dtype": getattr(model, "dtype", None),
        "attn_implementation": getattr(model, "attn_implementation", None),
        "revision": model.model_revision if model.model_revision != "main" else None,
    }
    named = {name: value for name, value in wanted.items() if value is not None}
    training.model_init_kwargs = {**named, **(getattr(training, "model_init_kwargs", None) or {})}
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def build_assembly(
    args: GeneratorArguments,
    retriever: Retriever | None,
    *,
    top_k: int,
    training: Any,
    model: Any,
    setting: str = "model_name_or_path",
) -> Any:
    """Puts retriever and prompt together; the generator is the model that will be trained.

    Args:
        args: how the generator is asked.
        retriever: where passages come from.
        top_k: passages a question.
        training: TRL's config; ``max_completion_length`` is the budget of an answer; as in ``build_tokenizer``, how
            the model shall be loaded is put into it.
        model: TRL's ``ModelConfig``, for tokenizer and context length; ``${tiny}`` in its path is expanded in place.
        setting: what named the model, for errors.

    Returns:
        (assembly without a generator, tokenizer).

    Raises:
        ConfigError: the model cannot be found, or the prompt lacks a placeholder.
    """
    from rag_rl.evaluation.assembly import Assembly
    from rag_rl.generation.transformers_generator import encode_prompts

    tokenizer, context = build_tokenizer(model, training, setting=setting)
    budget = args.generator_max_prompt_tokens
    if context is not None:
        room = context - training.max_completion_length
        if room < 1:
            raise ConfigError(
                f"max_completion_length {training.max_completion_length} leaves no room for a prompt: "
                f"{model.model_name_or_path} has a context of {context} tokens"
            )
        budget = min(budget or room, room)

    def count_tokens(prompts: Sequence[Prompt]) -> list[int]:
        return [len(ids) for ids in encode_prompts(tokenizer, prompts, generator_type=args.generator_type)]

    assembly = Assembly(
        retriever=retriever,
        prompt=args.generator_prompt,
        answer_marker=args.generator_answer_marker,
        top_k=top_k,
        order=args.generator_passage_order,
        max_new_tokens=training.max_completion_length,
        max_prompt_tokens=budget,
        count_tokens=count_tokens,
        generator_type=args.generator_type,
    )
    return assembly, tokenizer


def build_prompts(assembly: Any, questions: Sequence[Question]) -> Any:
    """Retrieves for all questions in one batched search and makes TRL's training set.

    Args:
        assembly: as from ``build_assembly``.
        questions: to train on.

    Returns:
        A ``datasets.Dataset`` with ``prompt`` and the columns that rewards read.
    """
    from datasets import Dataset

    from rag_rl.evaluation.scoring import reward_columns

    asked = assembly.prepare(questions)
    gold = [a for a in asked if a.question.gold_doc_ids]
    missed = sum(not {h.passage.doc_id for h in a.shown} & set(a.question.gold_doc_ids) for a in gold)
    if gold:
        logger.info("%.1f%% of the training prompts show no gold passage", 100 * missed / len(gold))
    return Dataset.from_dict({"prompt": [a.prompt for a in asked], **reward_columns(asked)})


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards of a run.

    Attributes:
        combined: one TRL reward function.
        score: named values of every part for given columns, for reports.
    """

    combined: Callable[..., Any]
    score: Callable[..., dict[str, list[float | None]]]


def build_rewards(
    args: RewardArguments, generator: GeneratorArguments, training: Any, judge: Judge | None = None
) -> Rewards:
    """Builds the rewards by name and combines them into one function.

    TRL's ``reward_weights`` holds one weight a name; it is taken over here (and cleared): TRL sees one function. What
    a judge says of the held-out answers is reported whether or not it is rewarded; a judge that ranks the answers of a
    group has nothing to say of a single one.

    Args:
        args: which rewards.
        generator: how an answer is found in a completion.
        training: TRL's config.
        judge: of the reward ``judged``.

    Returns:
        The combined reward and its parts.

    Raises:
        ConfigError: an unknown name, weights that do not match the names, or ``judged`` without a judge.
    """
    from rag_rl.rewards import RewardPart, combine, judged_reward, score_parts

    weights = training.reward_weights or default_weights(args.reward_names)
    if len(weights) != len(args.reward_names):
        raise ConfigError(
            f"reward_weights has {len(weights)} values for {len(args.reward_names)} reward_names: {args.reward_names}"
        )
    unknown = [name for name in args.reward_required if name not in args.reward_names]
    if unknown:
        raise ConfigError(f"reward_required names {unknown}, which are not among reward_names {args.reward_names}")
    training.reward_weights = None
    parts = [
        RewardPart(
            name=name,
            function=_reward(name, args, generator, training, judge),
            weight=weight,
            required=name in args.reward_required,
        )
        for name, weight in zip(args.reward_names, weights, strict=True)
    ]
    combined = combine(parts)
    if _ranks(judge):
        parts = [part for part in parts if part.name != "judged"]
    elif judge is not None and "judged" not in args.reward_names:
        parts.append(RewardPart("judged", judged_reward(judge, answer_marker=generator.generator_answer_marker)))

    def score(**columns: Any) -> dict[str, list[float | None]]:
        return score_parts(parts, **columns) if parts else {}

    return Rewards(combined, score)


def default_weights(names: Sequence[str]) -> list[float]:
    """What rewards weigh where the user does not say.

    Args:
        names: of the rewards.

    Returns:
        One weight a name. The form weighs little: a wrong answer in good form must not come near a right one in bad.

    Example:
        >>> default_weights(["f1", "format"])
        [1.0, 0.2]
    """
    return [0.2 if name == "format" else 1.0 for name in names]


def build_judge(args: JudgeArguments, folder: Path | None = None) -> Judge | None:
    """Builds the judge by name.

    Args:
        args: which one, what it is asked, and what it may cost.
        folder: of the run, for the log of verdicts and the account of what was spent; None keeps neither.

    Returns:
        A judge, or None where none is named.

    Raises:
        ConfigError: an unknown name, a model, a rubric or a key that is missing, or a value out of range.
        DataError: a local model cannot be loaded.
        BackendError: the cache cannot be opened.
    """
    from rag_rl.judges import LLMJudge, RewardModelJudge, VerdictCache, VerdictLog

    match args.judge_name:
        case None | "":
            return None
        case "oracle":
            from rag_rl.tiny.oracle import OracleJudge

            return OracleJudge(args.judge_rubric)
        case "reward_model":
            from rag_rl.rewards import model_reward

            return RewardModelJudge(model_reward(_judge_model(args), answer_marker=""))
        case name if name in LLM_JUDGES:
            log = args.judge_log or (folder / "verdicts.jsonl" if folder else None)
            cache = Path(expand(args.judge_cache)) if args.judge_cache else _cache_folder() / "judges"
            rubric = build_rubric(args)
            chat, name = _build_chat(args)
            return LLMJudge(
                chat,
                rubric,
                name=name,
                concurrency=args.judge_concurrency,
                cache=VerdictCache(cache / "verdicts.sqlite"),
                budget=_build_budget(args, folder),
                log=None if log is None else VerdictLog(log),
            )
        case name if ":" in name:
            return cast("Judge", import_attribute(name)(args))
        case name:
            raise ConfigError(
                "judge_name must be openai, gemini, local, reward_model, oracle or package.module:attribute, "
                f"got {name!r}"
            )


def build_step_judges(args: JudgeArguments, rubrics: Iterable[str], folder: Path | None = None) -> dict[str, Judge]:
    """Builds the same judge once for each rubric.

    Args:
        args: which judge; its rubric is replaced.
        rubrics: names of rubrics.
        folder: as in ``build_judge``.

    Returns:
        A judge by rubric; none where no judge is named.

    Raises:
        ConfigError: as in ``build_judge``.
    """
    judges = {}
    for rubric in rubrics:
        # A scale and a pass mark belong to the rubric that they were set for.
        own = replace(args, judge_rubric=rubric, judge_scale=[], judge_graded=None, judge_pass_mark=None)
        judge = build_judge(own, folder)
        if judge is not None:
            judges[rubric] = judge
    return judges


def build_step_scorer(args: StepRewardArguments, judge: JudgeArguments, folder: Path | None = None) -> StepScorer:
    """Builds what scores the chains of a reasoner.

    Args:
        args: the rule.
        judge: of answers (its own rubric) and of steps (the rule's rubrics).
        folder: as in ``build_judge``.

    Returns:
        A scorer.

    Raises:
        ConfigError: an unknown rule, or one that needs a judge where none is named.
    """
    from rag_rl.reasoning import GOLD_GAIN, StepScorer, step_reward_rule

    rule = step_reward_rule(args.step_reward)
    judges = build_step_judges(judge, [name for name in rule.needs if name != GOLD_GAIN], folder)
    return StepScorer(rule, judges, build_judge(judge, folder), pass_mark=describe_judge(judge)[1])


def build_step_setup(
    args: ReasonerArguments, retriever: RetrieverArguments, data: DataArguments, *, seed: int = 0
) -> StepSetup:
    """Builds what chains are played with.

    Args:
        args: layout and budgets.
        retriever: where documents come from, and how many a search.
        data: the corpus.
        seed: as in ``build_retriever``.

    Returns:
        A setup.

    Raises:
        ConfigError: no retriever, or as in ``build_retriever``.
    """
    from rag_rl.reasoning import StepSetup

    found = build_retriever(retriever, data, seed=seed)
    if found is None:
        raise ConfigError("a reasoner needs a retriever: retriever_name must not be none")
    return StepSetup(
        found,
        top_k=retriever.retriever_top_k,
        max_steps=args.reasoner_max_steps,
        max_step_tokens=args.reasoner_max_step_tokens,
        max_prompt_tokens=args.reasoner_max_prompt_tokens,
        layout=args.reasoner_layout,
        generator_type=args.reasoner_type,
    )


def build_rubric(args: JudgeArguments) -> Any:
    """Loads what the judge is asked.

    Args:
        args: which rubric, and what of it is changed.

    Returns:
        A rubric of ``rag_rl.judges``.

    Raises:
        ConfigError: neither a name nor a file, or settings that do not fit.
    """
    from rag_rl.judges import load_rubric

    return load_rubric(
        expand(args.judge_rubric),
        scale=(args.judge_scale[0], args.judge_scale[1]) if args.judge_scale else None,
        graded=args.judge_graded,
        pass_mark=args.judge_pass_mark,
    )


def describe_judge(args: JudgeArguments) -> tuple[str, float]:
    """Says who judged, for a report.

    Args:
        args: of a run with a judge.

    Returns:
        Its name without a path of this machine, and the score from which on it passes an answer.
    """
    name = args.judge_model or args.judge_name or ""
    name = Path(name).name if name.startswith(("/", "${")) else name
    if args.judge_name in LLM_JUDGES:
        rubric = build_rubric(args)
        return f"{name} (rubric {rubric.name})", getattr(rubric, "pass_mark", 0.5)
    return name, 0.5 if args.judge_pass_mark is None else args.judge_pass_mark


def _ranks(judge: Judge | None) -> bool:
    from rag_rl.judges import ComparisonRubric

    return isinstance(getattr(judge, "rubric", None), ComparisonRubric)


def _judge_model(args: JudgeArguments) -> str:
    if not args.judge_model:
        raise ConfigError(f"judge_name {args.judge_name} needs a model: set judge_model")
    return expand(args.judge_model)


def _build_chat(args: JudgeArguments) -> tuple[Any, str | None]:
    """Where replies come from, and the judge's name in the cache where the chat's own does not tell enough."""
    from rag_rl.judges import LocalChat, OpenAIChat

    if args.judge_name == "local":
        from accelerate import PartialState

        from rag_rl.generation import TransformersGenerator

        model = _judge_model(args)
        generator = TransformersGenerator.from_pretrained(
            model, device=PartialState().device, batch_size=args.judge_concurrency
        )
        chat = LocalChat(
            generator,
            model=model,
            max_new_tokens=256 if args.judge_max_tokens is None else args.judge_max_tokens,
            temperature=args.judge_temperature or 0.0,
            max_batch=args.judge_concurrency,
        )
        # Another model may come to lie in the same folder.
        return chat, f"{chat.name} {hashlib.sha256(repr(_stamp(Path(model))).encode()).hexdigest()[:8]}"
    options: dict[str, Any] = {
        "timeout_s": args.judge_timeout_s,
        "max_retries": args.judge_max_retries,
        "temperature": args.judge_temperature,
        "extra_body": args.judge_extra_body,
    }
    if args.judge_base_url:
        options["base_url"] = args.judge_base_url
    if args.judge_api_key_env is not None:
        options["api_key_env"] = args.judge_api_key_env
    if "max_completion_tokens" in args.judge_extra_body:  # models that know this name refuse the other
        options["max_tokens"] = None
    elif args.judge_max_tokens is not None:
        options["max_tokens"] = args.judge_max_tokens
    if args.judge_name == "gemini":
        return OpenAIChat.gemini(*([args.judge_model] if args.judge_model else []), **options), None
    return OpenAIChat(_judge_model(args), **options), None


def _build_budget(args: JudgeArguments, folder: Path | None) -> Any:
    from rag_rl.judges import Budget

    if args.judge_max_calls is None and args.judge_max_usd is None:
        return None
    return Budget(
        max_calls=args.judge_max_calls,
        max_usd=args.judge_max_usd,
        usd_per_million_prompt_tokens=args.judge_usd_per_million_prompt_tokens,
        usd_per_million_completion_tokens=args.judge_usd_per_million_completion_tokens,
        path=folder / "judge_spent.sqlite" if folder else None,
    )


def _reward(
    name: str, args: RewardArguments, generator: GeneratorArguments, training: Any, judge: Judge | None
) -> Any:
    from rag_rl import rewards

    marker: dict[str, Any] = {"answer_marker": generator.generator_answer_marker}
    answer: dict[str, Any] = {**marker, "unanswerable": args.reward_unanswerable}
    match name:
        case "em":
            return rewards.em(**answer)
        case "f1":
            return rewards.f1(**answer)
        case "contains_em":
            return rewards.contains_em(**answer)
        case "format":
            return rewards.format_reward(**marker)
        case "length":
            if not 1 <= args.reward_length_target < training.max_completion_length:
                raise ConfigError(
                    f"reward_length_target must be at least 1 and below max_completion_length "
                    f"{training.max_completion_length}, got {args.reward_length_target}"
                )
            return rewards.length_reward(
                target=args.reward_length_target, limit=training.max_completion_length, **marker
            )
        case "groundedness":
            return rewards.groundedness_reward(**marker)
        case "citation":
            return rewards.citation_reward(**marker)
        case "reward_model":
            if args.reward_model is None:
                raise ConfigError("reward_names has reward_model, but reward_model is not set")
            first, *second = args.reward_model_template
            return rewards.model_reward(
                expand(args.reward_model),
                pair_template=(first, second[0] if second else None),
                label=args.reward_model_label,
                max_length=args.reward_model_max_length,
                **marker,
            )
        case "judged":
            if judge is None:
                raise ConfigError("reward_names has judged, but judge_name is not set")
            return rewards.judged_reward(judge, **marker)
        case "constant":
            return rewards.constant()
        case _ if ":" in name:
            return import_attribute(name)
    raise ConfigError(
        f"reward_names: {name!r} is not one of em, f1, contains_em, format, length, groundedness, citation, judged, "
        "reward_model, constant, and not package.module:attribute"
    )


def build_reasoning(
    setup: StepSetup, args: StepRewardArguments, judge: JudgeArguments, folder: Path | None = None
) -> ReasoningAssembly:
    """Puts together what a reasoner is evaluated with.

    Args:
        setup: how chains are played.
        args: whether analyses are judged.
        judge: of answers (its own rubric) and of analyses.
        folder: as in ``build_judge``.

    Returns:
        An assembly without a generator.

    Raises:
        ConfigError: ``step_coherence`` without a judge, or as in ``build_judge``.
    """
    from rag_rl.evaluation.reasoning import COHERENCE, ReasoningAssembly

    coherence = build_step_judges(judge, [COHERENCE], folder).get(COHERENCE) if args.step_coherence else None
    if args.step_coherence and coherence is None:
        raise ConfigError("step_coherence is set, but judge_name is not: nobody can judge an analysis")
    return ReasoningAssembly(
        setup,
        answer_judge=build_judge(judge, folder),
        pass_mark=describe_judge(judge)[1],
        coherence_judge=coherence,
    )


def build_baselines(reasoning: ReasoningAssembly, args: ReasonerArguments, model: Any) -> dict[str, Part]:
    """Builds what a reasoner has to beat: the same questions, asked once.

    ``one_shot`` is shown at once as many passages as a chain sees at most when it still answers, unless
    ``reasoner_baseline_top_k`` says otherwise, and ``no_retrieval`` none. Both are asked of the model that training
    starts from and, as ``..._other_model``, of ``reasoner_baseline_model``, which is loaded when it is measured.

    Args:
        reasoning: what they are compared with: retriever, budgets and the judge of answers are the same.
        args: which baselines, and how they are asked.
        model: TRL's ``ModelConfig``, as in ``build_assembly``.

    Returns:
        Name to assembly, for ``Run.measure_before``.

    Raises:
        ConfigError: a model or a prompt cannot be found.
    """
    from rag_rl.evaluation.assembly import OtherModel

    setup = reasoning.setup
    top_k = args.reasoner_baseline_top_k or setup.top_k * max(1, setup.max_steps - 1)
    shown = {
        "one_shot": (args.reasoner_baseline_prompt, setup.retriever),
        "no_retrieval": (args.reasoner_baseline_closed_prompt, None),
    }
    models = [("", model)]
    if args.reasoner_baseline_model:
        other = SimpleNamespace(model_name_or_path=args.reasoner_baseline_model, model_revision=None)
        models.append(("_other_model", other))
    found: dict[str, Part] = {}
    for suffix, source in models:
        for name in args.reasoner_baselines:
            prompt, retriever = shown[name]
            asking = GeneratorArguments(
                generator_prompt=prompt,
                generator_answer_marker=args.reasoner_baseline_marker,
                generator_type=args.reasoner_type,
                generator_max_prompt_tokens=setup.max_prompt_tokens,
            )
            budget = SimpleNamespace(max_completion_length=setup.max_step_tokens)
            setting = "reasoner_baseline_model" if suffix else "model_name_or_path"
            assembly, _ = build_assembly(
                asking, retriever, top_k=top_k, training=budget, model=source, setting=setting
            )
            assembly.answer_judge, assembly.pass_mark = reasoning.answer_judge, reasoning.pass_mark
            found[name + suffix] = OtherModel(assembly, source.model_name_or_path) if suffix else assembly
    return found
