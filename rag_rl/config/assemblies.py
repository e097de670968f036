"""From one YAML file to an assembly of finished parts: each by name or by run folder, missing ones simply absent.

A part from a run folder is asked as it was trained: its settings are the run's, unless the file or the command line
says otherwise. ``recipes/evaluate_rag.py`` and ``rag-rl ask --config`` read the same file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from rag_rl.config.arguments import (
    DataArguments,
    GeneratorArguments,
    JudgeArguments,
    ReasonerArguments,
    RetrieverArguments,
)
from rag_rl.config.assembly_arguments import AssemblyArguments, EvaluationArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments
from rag_rl.config.parsing import fill, read_arguments, resolved
from rag_rl.config.parts import (
    build_corpus,
    build_judge,
    build_retriever,
    describe_judge,
    expand,
    import_attribute,
)
from rag_rl.errors import ConfigError, DataError, RunFolderError
from rag_rl.types import Generator, Passage, Question, Retriever

if TYPE_CHECKING:
    from rag_rl.evaluation.assembly import Assembly
    from rag_rl.evaluation.reasoning import ReasoningAssembly
    from rag_rl.evaluation.scoring import Evaluable

logger = logging.getLogger(__name__)

ARGUMENTS = (
    EvaluationArguments,
    AssemblyArguments,
    DataArguments,
    RetrieverArguments,
    AugmenterArguments,
    AugmenterModelArguments,
    GeneratorArguments,
    ReasonerArguments,
    JudgeArguments,
)
"""What a file of an assembly may set."""

# What a retriever's run knows of its corpus.
_CORPUS = (
    "data_corpus",
    "data_text_columns",
    "data_title_column",
    "data_id_column",
    "data_chunk_tokens",
    "data_chunk_overlap",
)
# Where and on what a retriever ran, and what was put around it, is no part of it.
_NOT_OF_A_RETRIEVER = (
    "retriever_name",
    "retriever_index_path",
    "retriever_chroma_url",
    "retriever_devices",
    "retriever_url",
    "retriever_fingerprint",
    "retriever_token_env",
    "retriever_timeout_s",
    "retriever_wait_s",
    "retriever_top_k",
    "retriever_reranker",
    "retriever_candidates",
    "retriever_shuffled",
)
# A reasoner's run was measured against baselines; asking them here goes by other names.
_OF_BASELINES = {
    "reasoner_baseline_prompt": "evaluation_one_shot_prompt",
    "reasoner_baseline_closed_prompt": "evaluation_closed_prompt",
    "reasoner_baseline_marker": "evaluation_marker",
    "reasoner_baseline_top_k": "evaluation_one_shot_top_k",
}
# Read in one go while looking for gold documents: few calls, and little of a large corpus in memory.
_PASSAGES_AT_ONCE = 4096


class _Unset:
    """The value of a field that nobody set."""

    def __repr__(self) -> str:
        return "(unset)"


_UNSET = _Unset()


@dataclass(frozen=True, slots=True)
class AssemblyPlan:
    """What an assembly is built from.

    Attributes:
        evaluation: baselines, batches and the output folder.
        parts: which parts there are.
        data: corpus and questions.
        retriever: as the file says, over what the retriever's run had.
        augmenter: the same of the augmenter.
        augmenter_model: who augments.
        generator: the same of the generator.
        reasoner: the same of the reasoner.
        judge: of answers.
        searches: whether there is a retriever.
        given: names of the settings that the file or the command line set.
        runs: part to the settings of the run folder that it comes from.
    """

    evaluation: EvaluationArguments
    parts: AssemblyArguments
    data: DataArguments
    retriever: RetrieverArguments
    augmenter: AugmenterArguments
    augmenter_model: AugmenterModelArguments
    generator: GeneratorArguments
    reasoner: ReasonerArguments
    judge: JudgeArguments
    searches: bool
    given: frozenset[str]
    runs: Mapping[str, Mapping[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by name, without secrets, and a stamp of each model in a folder: its weights may change."""
        instances = (
            self.evaluation, self.parts, self.data, self.retriever, self.augmenter, self.augmenter_model,
            self.generator, self.reasoner, self.judge,
        )  # fmt: skip
        return {**resolved(instances), "weights": self._stamps()}

    @property
    def augments(self) -> bool:
        """Whether there is an augmenter."""
        named = "augmenter_name" in self.given and self.augmenter_model.augmenter_name not in ("none", "")
        return bool(self.augmenter_model.augmenter_model) or named

    @property
    def answers(self) -> bool:
        """Whether anybody answers: a generator or a reasoner."""
        return self.generates or self.reasons

    @property
    def generates(self) -> bool:
        """Whether there is a generator."""
        return bool(self.parts.generator_model) or ":" in self.parts.generator_name

    @property
    def reasons(self) -> bool:
        """Whether there is a reasoner."""
        return bool(self.parts.reasoner_model) or ":" in self.parts.reasoner_name

    def _stamps(self) -> dict[str, str]:
        named = {
            "retriever_run": self.parts.retriever_run,
            "retriever_encoder": self.retriever.retriever_encoder,
            "retriever_reranker": self.retriever.retriever_reranker,
            "augmenter_model": self.augmenter_model.augmenter_model,
            "generator_model": self.parts.generator_model,
            "reasoner_model": self.parts.reasoner_model,
        }
        return {part: stamp for part, name in named.items() if name and (stamp := _stamp(name))}


@dataclass(frozen=True, slots=True)
class Search:
    """Where passages come from, and which there are.

    Attributes:
        retriever: with augmenter and reranker, where there are any.
        passages: of the corpus; None where the retriever does not tell.
        depth: passages that it is asked for.
    """

    retriever: Retriever
    passages: Sequence[Passage] | None
    depth: int


def read_plan(
    recipe_file: str | Path, arguments: Sequence[type[Any]] = ARGUMENTS, *, argv: Sequence[str] | None = None
) -> AssemblyPlan:
    """Reads config file and command line.

    Args:
        recipe_file: whose ``configs`` folder has the named configs.
        arguments: the dataclasses of an assembly.
        argv: arguments after the program's name; None: those of this process.

    Returns:
        The plan.

    Raises:
        SystemExit: with code 0, after ``--help``.
        ConfigError: a key, a type, a value or a file is wrong, or parts that exclude each other.
        RunFolderError: the folder of a part holds no finished run of such a part.
    """
    read_arguments(recipe_file, *arguments, argv=argv)  # the help, and the checks of all values with their defaults
    unset = [_without_defaults(kind) for kind in arguments]
    given = {
        field.name: value
        for instance in read_arguments(recipe_file, *unset, argv=argv)
        for field in dataclasses.fields(instance)
        if (value := getattr(instance, field.name)) is not _UNSET
    }
    return plan_assembly(given)


def plan_assembly(given: Mapping[str, Any]) -> AssemblyPlan:
    """Puts what was said over what the runs of the parts had.

    Args:
        given: settings by name, none of them a default.

    Returns:
        The plan.

    Raises:
        ConfigError: an unknown name, or parts that exclude each other.
        RunFolderError: the folder of a part holds no finished run of such a part.
    """
    known = {field.name for kind in ARGUMENTS for field in dataclasses.fields(kind)}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"an assembly has no setting {unknown[0]!r}: recipes/evaluate_rag.py --help lists them all")
    for name in ("reasoner_baselines", "reasoner_baseline_model", *_OF_BASELINES):
        if name in given:
            other = _OF_BASELINES.get(name, "evaluation_baselines")
            raise ConfigError(f"{name} is a setting of training: here it is {other}")
    runs: dict[str, Mapping[str, Any]] = {}
    inherited: dict[str, Any] = {}
    if given.get("retriever_run"):
        run = runs["retriever"] = _run_of(given["retriever_run"], "retriever_encoder", "a retriever", _RETRIEVERS)
        inherited |= {
            name: value
            for name, value in run.items()
            if name.startswith("retriever_") and name not in _NOT_OF_A_RETRIEVER
        }
        if "data_corpus" not in given:
            inherited |= {name: run[name] for name in _CORPUS if name in run}
        if run["recipe"] == "distill_retriever":
            inherited["retriever_encoder"] = given["retriever_run"]
        if run["recipe"] == "self_boost":
            inherited["retriever_encoder"] = _part_of(given["retriever_run"], "retriever")
        if given.get("retriever_encoder"):
            raise ConfigError("retriever_run brings its encoder along: leave retriever_encoder out")
    if model := given.get("augmenter_model"):
        inherited |= _inherited(model, "augmenter_prompt", "an augmenter", AugmenterArguments, runs, "augmenter")
        if runs.get("augmenter", {}).get("recipe") == "self_boost":
            given = {**given, "augmenter_model": _part_of(model, "augmenter")}
    if model := given.get("retriever_reranker"):
        _inherited(model, "reranker_model", "a reranker", RetrieverArguments, runs, "reranker")
        if "reranker" in runs:
            inherited["retriever_candidates"] = runs["reranker"].get("reranker_candidates", 20)
    if (model := given.get("generator_model")) and given.get("generator_name", "local") == "local":
        inherited |= _inherited(model, "generator_prompt", "a generator", GeneratorArguments, runs, "generator")
        if "generator" in runs:
            inherited["generator_max_new_tokens"] = int(runs["generator"]["max_completion_length"])
            inherited["retriever_top_k"] = runs["generator"]["retriever_top_k"]
            inherited["generator_prompt"] = _kept_prompt(model, inherited["generator_prompt"])
    if (model := given.get("reasoner_model")) and given.get("reasoner_name", "local") == "local":
        found = _inherited(model, "reasoner_layout", "a reasoner", ReasonerArguments, runs, "reasoner")
        for old, new in _OF_BASELINES.items():
            if old in found:
                value = found.pop(old)
                inherited[new] = _kept_prompt(model, value) if old.endswith("prompt") else value
        inherited |= {name: value for name, value in found.items() if not name.startswith("reasoner_baseline")}
        if "reasoner" in runs:
            inherited["retriever_top_k"] = runs["reasoner"]["retriever_top_k"]
    values = {**inherited, **given}
    if "retriever_top_k" in inherited and "retriever_candidates" in values:
        # A reranker that was trained on fewer candidates still has to give as many as the generator reads.
        values["retriever_candidates"] = max(values["retriever_candidates"], values["retriever_top_k"])
    searches = bool(
        given.get("retriever_run")
        or given.get("retriever_encoder")
        or given.get("retriever_index_path")
        or given.get("retriever_name", "none") != "none"
    )
    plan = AssemblyPlan(
        evaluation=fill(EvaluationArguments, values),
        parts=fill(AssemblyArguments, values),
        data=fill(DataArguments, values),
        retriever=fill(RetrieverArguments, values),
        augmenter=fill(AugmenterArguments, values),
        augmenter_model=fill(AugmenterModelArguments, values),
        generator=fill(GeneratorArguments, values),
        reasoner=fill(ReasonerArguments, values),
        judge=fill(JudgeArguments, values),
        searches=searches,
        given=frozenset(given),
        runs=runs,
    )
    _check(plan)
    return plan


def build_assembly_search(plan: AssemblyPlan) -> Search | None:
    """Opens the retriever, with what stands before and after it.

    Args:
        plan: of an assembly.

    Returns:
        Where passages come from; None without a retriever.

    Raises:
        ConfigError: parts that do not go together.
        DataError: the corpus or a model is missing or bad.
        RetrievalIndexError: the index does not fit or is damaged.
        MissingPackageError: BM25 is asked for and not installed.
        BackendError: the vector store does not answer.
    """
    if not plan.searches:
        return None
    args, seed = plan.retriever, plan.evaluation.seed
    wrapped = plan.augments or args.retriever_reranker is not None or "retriever" in plan.runs
    if args.retriever_shuffled and wrapped:
        raise ConfigError("retriever_shuffled is a control of the plain retriever: leave the other parts out")
    retriever: Any
    if args.retriever_name == "bm25":
        retriever = build_bm25(plan)
    else:
        retriever = build_retriever(replace(args, retriever_reranker=None), plan.data, seed=seed)
    passages = getattr(getattr(retriever, "retriever", retriever), "passages", None)
    if plan.runs.get("retriever", {}).get("recipe") == "grpo_retriever":
        retriever = _with_trained_queries(plan, retriever)
    if plan.augments:
        retriever = _augmented(plan, retriever)
    size = len(passages) if passages is not None else None
    return _reranked(plan, retriever, passages, size)


def build_bm25(plan: AssemblyPlan) -> Retriever:
    """BM25 over the corpus of an assembly.

    Args:
        plan: of an assembly.

    Returns:
        A retriever.

    Raises:
        ConfigError: no corpus is named.
        MissingPackageError: the package is not installed.
    """
    from rag_rl.retrieval.bm25 import BM25Retriever

    if plan.data.data_chunk_tokens is not None:
        # The same chunks as the retriever's: only its tokenizer knows them.
        from rag_rl.config.parts import build_encoder

        return BM25Retriever(build_corpus(plan.data, build_encoder(plan.retriever).model.tokenizer))
    return BM25Retriever(build_corpus(plan.data))


def build_evaluation_questions(plan: AssemblyPlan, search: Search | None) -> list[Question]:
    """Loads the questions to evaluate on.

    Where there are more than ``data_eval_size``, the same are chosen as by a training run with these held-out
    questions, so that the two can be compared.

    Args:
        plan: of an assembly.
        search: whose corpus must hold their gold documents.

    Returns:
        The questions.

    Raises:
        ConfigError: no file is named.
        DataError: the file is missing or has bad rows; gold documents are unknown; or nothing could be scored.
    """
    from rag_rl.data import load_questions, split_questions
    from rag_rl.evaluation.evaluating import check_gold

    data = plan.data
    if not data.data_eval:
        raise ConfigError("data_eval is not set: name the questions to evaluate on (see docs/data_formats.md)")
    source, qrels = expand(data.data_eval), data.data_eval_qrels
    options: dict[str, Any] = {}
    if qrels is not None:
        options = (
            {"split": qrels} if Path(source).is_dir() and not qrels.endswith(".tsv") else {"qrels": expand(qrels)}
        )
    questions = load_questions(source, require_answers=False, **options)
    if len(questions) > data.data_eval_size:
        logger.info("%d of %d questions are evaluated on (data_eval_size)", data.data_eval_size, len(questions))
        _, questions = split_questions(questions, eval_size=data.data_eval_size, seed=0)
    if search is not None:
        passages = search.passages
        if passages is not None and any(question.gold_doc_ids for question in questions):
            wanted = {doc_id for question in questions for doc_id in question.gold_doc_ids}
            known = {
                passage.doc_id
                for start in range(0, len(passages), _PASSAGES_AT_ONCE)
                for passage in passages[start : start + _PASSAGES_AT_ONCE]
                if passage.doc_id in wanted
            }
            unknown = plan.evaluation.evaluation_unknown_gold
            questions = check_gold(questions, known, source=data.data_eval, unknown=unknown)
    bare = [q for q in questions if not (q.answers and plan.answers) and not (q.gold_doc_ids and search is not None)]
    if len(bare) == len(questions):
        missing = "accepted answers nor gold documents" if plan.answers else "gold documents, and nobody answers"
        raise DataError(f"{data.data_eval}: no question has {missing}: there is nothing to score")
    if bare:
        logger.warning("%d of %d questions have nothing that could be scored", len(bare), len(questions))
    return questions


def build_evaluable(plan: AssemblyPlan, search: Search | None, folder: Path | None = None) -> Evaluable:
    """Puts the parts together.

    Args:
        plan: of an assembly.
        search: as from ``build_assembly_search``.
        folder: of the evaluation, for the log of verdicts; None keeps none.

    Returns:
        What answers questions, or only searches for them.

    Raises:
        ConfigError: a prompt or a judge does not fit.
        DataError: a model cannot be loaded.
    """
    from rag_rl.evaluation.measuring import SearchOnly

    top_k = plan.retriever.retriever_top_k
    if plan.reasons:
        return _reasoning(plan, cast("Search", search), folder)
    if not plan.generates:
        found = cast("Search", search)
        return SearchOnly(found.retriever, top_k=top_k, depth=found.depth)
    generator = _generator(plan, "generator")
    asking = plan.generator
    prompt = asking.generator_prompt
    if search is None and "generator_prompt" not in plan.given:
        prompt = plan.evaluation.evaluation_closed_prompt
    return _asked(plan, generator, search, prompt=prompt, folder=folder)


def build_evaluation_baselines(plan: AssemblyPlan, assembly: Evaluable, search: Search | None) -> dict[str, Evaluable]:
    """Other ways to answer the same questions, by the same model.

    Args:
        plan: of an assembly.
        assembly: as from ``build_evaluable``.
        search: of the assembly.

    Returns:
        Name to assembly.

    Raises:
        ConfigError: a baseline that this assembly cannot have.
        MissingPackageError: BM25 is asked for and not installed.
    """
    from rag_rl.evaluation.measuring import SearchOnly

    asked = plan.evaluation
    found: dict[str, Evaluable] = {}
    for name in dict.fromkeys(asked.evaluation_baselines):
        if name == "one_shot" and not plan.reasons:
            raise ConfigError("evaluation_baselines: one_shot is for a reasoner; any other assembly is one already")
        if name == "no_retrieval" and (search is None or not plan.answers):
            what = "searches nothing" if search is None else "only searches"
            raise ConfigError(f"evaluation_baselines: no_retrieval means nothing for an assembly that {what}")
        if name != "bm25":
            found[name] = _once(plan, assembly, search if name == "one_shot" else None)
            continue
        if search is None or plan.retriever.retriever_name == "bm25":
            raise ConfigError("evaluation_baselines: bm25 replaces another retriever, and this assembly has none")
        retriever = build_bm25(plan)
        depth = min(search.depth, len(retriever))  # type: ignore[arg-type]
        if isinstance(assembly, SearchOnly):
            found[name] = SearchOnly(retriever, top_k=assembly.top_k, depth=depth)
        else:
            found[name] = _with_retriever(assembly, retriever, depth)
    return found


def open_assembly(config: str | Path, *, recipe_file: str | Path | None = None, argv: Sequence[str] = ()) -> Evaluable:
    """Opens the assembly of a file, to be asked.

    Args:
        config: path of a YAML file, or the name of a config of ``evaluate_rag``.
        recipe_file: whose configs have names; by default that of ``evaluate_rag`` where a source checkout is found.
        argv: further flags, as on the command line.

    Returns:
        The assembly.

    Raises:
        ConfigError: as in ``read_plan``.
        RunFolderError: as in ``read_plan``.
    """
    plan = read_plan(recipe_file or _recipe_file(), argv=["--config", str(config), *argv])
    return build_evaluable(plan, build_assembly_search(plan))


_RETRIEVERS = ("grpo_retriever", "distill_retriever", "self_boost")


def _check(plan: AssemblyPlan) -> None:
    if plan.generates and plan.reasons:
        raise ConfigError("generator_model and reasoner_model exclude each other: a reasoner answers by itself")
    if not plan.searches:
        for name, there in (
            ("augmenter_model", plan.augments),
            ("retriever_reranker", bool(plan.retriever.retriever_reranker)),
            ("reasoner_model", plan.reasons),
        ):
            if there:
                raise ConfigError(f"{name} needs a retriever: name retriever_run, retriever_encoder or retriever_name")
        if not plan.answers:
            raise ConfigError(
                "the assembly has no part: name at least a retriever (retriever_encoder, retriever_run or "
                "retriever_name), a generator_model or a reasoner_model"
            )


def _run_of(name: str, key: str, what: str, recipes: Sequence[str] = ()) -> Mapping[str, Any]:
    """The settings of the finished run in a folder, which must be of a part that has ``key`` among them."""
    from rag_rl.evaluation.run_folders import other_version, read_run

    folder = Path(expand(name))
    _, settings = read_run(folder)
    recipe = str(settings["recipe"])
    if recipes and recipe not in recipes:
        raise RunFolderError(f"{folder} is a run of {recipe}, which trains no part that is {what}")
    if key not in settings:
        if not recipes:
            raise RunFolderError(f"{folder} is a run of {recipe}, which trains no part that is {what}")
        raise RunFolderError(f"{folder} {other_version(settings)}: it has no setting {key!r}")
    return settings


_MAKERS = {
    "augmenter": ("dpo_augmenter", "self_boost"),
    "reranker": ("train_reranker", "grpo_reranker"),
    "generator": ("grpo_generator",),
    "reasoner": ("sft_reasoner", "ppo_reasoner", "grpo_reasoner"),
}
_NEEDED = {
    "generator": ("generator_prompt", "max_completion_length", "retriever_top_k"),
    "reasoner": ("reasoner_layout", "retriever_top_k"),
}


def _inherited(
    model: str, key: str, what: str, kind: type[Any], runs: dict[str, Mapping[str, Any]], part: str
) -> dict[str, Any]:
    """What a run says of its part; nothing where the model comes from elsewhere, such as the Hub or a checkpoint."""
    from rag_rl.evaluation.run_folders import other_version

    folder = Path(expand(model))
    if not (folder / "resolved_config.yaml").is_file():
        return {}
    run = _run_of(model, key, what)
    recipe = run["recipe"]
    # A recipe of the user's own is taken at its word: it has the settings.
    ours = {name for names in _MAKERS.values() for name in names} | set(_RETRIEVERS)
    if recipe in ours and recipe not in _MAKERS[part]:
        raise RunFolderError(f"{folder} is a run of {recipe}, which trains no part that is {what}")
    for name in _NEEDED.get(part, ()):
        if name not in run:
            raise RunFolderError(f"{folder} {other_version(run)}: it has no setting {name!r}")
    runs[part] = run
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: run[name] for name in names & run.keys() if name.startswith(f"{part}_")}


def _part_of(run: str, part: str) -> str:
    """The folder of a part in a run that trained two."""
    return str(Path(expand(run)) / part)


def _without_defaults(kind: type[Any]) -> type[Any]:
    """The same flags, unset unless somebody sets them."""
    hints = get_type_hints(kind)
    fields = [
        (field.name, hints[field.name], dataclasses.field(default=_UNSET, metadata=field.metadata))
        for field in dataclasses.fields(kind)
    ]
    return dataclasses.make_dataclass(kind.__name__, fields)


def _kept_prompt(model: str, name: str) -> str:
    """The prompt that a run asked by, as it was then."""
    kept = Path(expand(model)) / "prompts" / f"{Path(name).stem}.txt"
    return str(kept) if kept.is_file() else name


def _with_trained_queries(plan: AssemblyPlan, index: Any) -> Retriever:
    """The index that a query encoder was trained over, searched with it, as ``SearchAssembly`` reloads it."""
    from accelerate import PartialState

    from rag_rl.retrieval import HistoryEncoder

    run = plan.runs["retriever"]
    folder = Path(expand(cast("str", plan.parts.retriever_run)))
    saved = index.encoder.trained(folder, devices=plan.retriever.retriever_devices or str(PartialState().device))
    history = HistoryEncoder(saved, run.get("reader_history", True), max_tokens=run.get("retriever_state_tokens"))
    return cast("Retriever", index.with_query_encoder(history))


def _augmented(plan: AssemblyPlan, index: Any) -> Retriever:
    from rag_rl.config.augmenters import build_augmented_retriever, build_augmenter

    if not hasattr(index, "with_query_encoder"):
        raise ConfigError("an augmenter mixes query vectors: retriever_name must be dense")
    augmenter = build_augmenter(plan.augmenter, plan.augmenter_model)
    if augmenter is None:
        return cast("Retriever", index)
    return build_augmented_retriever(plan.augmenter, index, augmenter)


def _reranked(plan: AssemblyPlan, retriever: Any, passages: Any, size: int | None) -> Search:
    args = plan.retriever
    depth = max(args.retriever_top_k, plan.evaluation.evaluation_depth)
    if args.retriever_reranker:
        from rag_rl.config.rerankers import build_reranked

        candidates = args.retriever_candidates if size is None else min(args.retriever_candidates, size)
        retriever = build_reranked(
            retriever,
            args.retriever_reranker,
            candidates=candidates,
            batch_size=args.retriever_reranker_batch_size,
        )
        depth = min(depth, candidates)  # more would be more candidates, and another order
    if size is not None:
        depth = min(depth, size)
    return Search(retriever, passages, max(depth, args.retriever_top_k))


def _generator(plan: AssemblyPlan, part: str) -> Generator:
    """The model behind a generator or a reasoner."""
    from rag_rl.generation import OpenAIGenerator, TransformersGenerator

    name, model = getattr(plan.parts, f"{part}_name"), getattr(plan.parts, f"{part}_model")
    kind = getattr(getattr(plan, part), f"{part}_type")
    match name:
        case "local":
            from accelerate import PartialState

            return TransformersGenerator.from_pretrained(
                expand(model),
                dtype=getattr(plan.parts, f"{part}_dtype"),
                device=PartialState().device,
                batch_size=getattr(getattr(plan, part), f"{part}_eval_batch_size"),
                generator_type=kind,
            )
        case "openai":
            return OpenAIGenerator(
                model,
                base_url=getattr(plan.parts, f"{part}_base_url"),
                api_key_env=getattr(plan.parts, f"{part}_api_key_env"),
                generator_type=kind,
            )
        case _ if ":" in name:
            return cast("Generator", import_attribute(name)(plan))
    raise ConfigError(f"{part}_name must be local, openai or package.module:attribute, got {name!r}")


def _asked(
    plan: AssemblyPlan, generator: Generator, search: Search | None, *, prompt: str, folder: Path | None
) -> Assembly:
    from rag_rl.evaluation.assembly import Assembly

    asking, budget = plan.generator, plan.parts.generator_max_new_tokens
    counts = getattr(generator, "prompt_tokens", None)
    room = generator.prompt_limit(budget) if hasattr(generator, "prompt_limit") else None
    limits = [limit for limit in (asking.generator_max_prompt_tokens, room) if limit is not None]
    return Assembly(
        retriever=None if search is None else search.retriever,
        generator=generator,
        prompt=expand(prompt),
        answer_marker=asking.generator_answer_marker,
        top_k=plan.retriever.retriever_top_k,
        depth=0 if search is None else search.depth,
        order=asking.generator_passage_order,
        max_new_tokens=budget,
        max_prompt_tokens=min(limits) if limits and counts is not None else None,
        count_tokens=counts,
        generator_type=asking.generator_type,
        answer_judge=build_judge(plan.judge, folder),
        pass_mark=describe_judge(plan.judge)[1] if plan.judge.judge_name else 0.5,
    )


def _reasoning(plan: AssemblyPlan, search: Search, folder: Path | None) -> ReasoningAssembly:
    from rag_rl.evaluation.reasoning import ReasoningAssembly
    from rag_rl.reasoning import StepSetup

    args = plan.reasoner
    setup = StepSetup(
        search.retriever,
        top_k=plan.retriever.retriever_top_k,
        max_steps=args.reasoner_max_steps,
        max_step_tokens=args.reasoner_max_step_tokens,
        max_prompt_tokens=args.reasoner_max_prompt_tokens,
        layout=args.reasoner_layout,
        generator_type=args.reasoner_type,
    )
    return ReasoningAssembly(
        setup,
        generator=_generator(plan, "reasoner"),
        answer_judge=build_judge(plan.judge, folder),
        pass_mark=describe_judge(plan.judge)[1] if plan.judge.judge_name else 0.5,
    )


def _once(plan: AssemblyPlan, assembly: Evaluable, search: Search | None) -> Evaluable:
    """The model of an assembly, asked once: with the passages of one search, or without any."""
    from rag_rl.evaluation.assembly import Assembly
    from rag_rl.evaluation.measuring import closed_book
    from rag_rl.evaluation.reasoning import ReasoningAssembly

    asked = plan.evaluation
    if isinstance(assembly, Assembly):
        return closed_book(assembly, expand(asked.evaluation_closed_prompt))
    if not isinstance(assembly, ReasoningAssembly):
        raise ConfigError(f"a {type(assembly).__name__} cannot be asked once")
    setup, generator = assembly.setup, cast("Generator", assembly.generator)
    room = generator.prompt_limit(setup.max_step_tokens) if hasattr(generator, "prompt_limit") else None
    limits = [limit for limit in (setup.max_prompt_tokens, room) if limit is not None]
    counts = getattr(generator, "prompt_tokens", None)
    prompt = asked.evaluation_closed_prompt if search is None else asked.evaluation_one_shot_prompt
    most = asked.evaluation_one_shot_top_k or setup.top_k * max(1, setup.max_steps - 1)
    return Assembly(
        retriever=None if search is None else search.retriever,
        generator=generator,
        prompt=expand(prompt),
        answer_marker=asked.evaluation_marker,
        top_k=most if search is None or search.passages is None else min(most, len(search.passages)),
        max_new_tokens=setup.max_step_tokens,
        max_prompt_tokens=min(limits) if limits and counts is not None else None,
        count_tokens=counts,
        generator_type=setup.generator_type,
        answer_judge=assembly.answer_judge,
        pass_mark=assembly.pass_mark,
    )


def _with_retriever(assembly: Any, retriever: Retriever, depth: int) -> Any:
    """The same assembly with other passages."""
    import copy

    twin = copy.copy(assembly)
    if hasattr(twin, "setup"):
        twin.setup = replace(twin.setup, retriever=retriever)
    else:
        twin.retriever, twin.depth = retriever, depth
    return twin


def _recipe_file() -> Path:
    """``evaluate_rag`` where there is a source checkout; else this file, which has no named configs."""
    for root in (Path("recipes"), Path(__file__).resolve().parents[2] / "recipes"):
        if (root / "evaluate_rag.py").is_file():
            return root / "evaluate_rag.py"
    return Path(__file__)


def _stamp(name: str) -> str:
    """What changes when the weights in a folder do; nothing for what is no folder."""
    folder = Path(expand(name)) if not name.startswith("python:") else Path(name)
    files = [
        (file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns)
        for pattern in ("*.safetensors", "*/*.safetensors")
        for file in sorted(folder.glob(pattern))
        if not file.parent.name.startswith("checkpoint-")
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16] if files else ""
