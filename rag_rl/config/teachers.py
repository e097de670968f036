"""A reasoner's cold start: who writes its chains, where they are kept, and what is learnt from them."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rag_rl.config.arguments import DataArguments, JudgeArguments, RetrieverArguments
from rag_rl.config.parsing import resolved
from rag_rl.config.parts import build_judge, build_tokenizer, describe_judge, expand, first_process, import_attribute
from rag_rl.config.teacher_arguments import ColdStartArguments, TeacherArguments
from rag_rl.errors import ConfigError, DataError, RunFolderError
from rag_rl.prompts import load_prompt
from rag_rl.run import keep_settings, write_whole
from rag_rl.types import Prompt, Question, Retriever

if TYPE_CHECKING:
    from rag_rl.reasoning import Collected, StepPrompts, StepSetup, StepTrajectory, Teacher
    from rag_rl.reasoning.step_prompts import Layout

logger = logging.getLogger(__name__)

TRAJECTORIES = "trajectories.jsonl"
_SETTINGS, _PAIRS, _SUMMARY = "trajectories_config.yaml", "dpo.jsonl", "summary.json"
# What may change while a file of chains grows: where and how fast they come about, how many attempts, and which
# questions. Those are known by their ids.
_MAY_CHANGE = frozenset(
    {
        "teacher_base_url", "teacher_api_key_env", "teacher_batch_size", "teacher_concurrency", "teacher_timeout_s",
        "teacher_max_retries", "teacher_max_attempts", "data_train", "data_train_size", "data_train_qrels",
        "data_eval", "data_eval_size", "data_eval_qrels", "data_folds", "data_fold",
    }
)  # fmt: skip


def build_teacher(args: TeacherArguments) -> Teacher:
    """Builds the teacher by name.

    Args:
        args: who, and what a language model is asked.

    Returns:
        A teacher.

    Raises:
        ConfigError: an unknown name, a model or a prompt is missing, or a prompt lacks a placeholder.
        DataError: a local model cannot be loaded.
    """
    from rag_rl.reasoning import GeneratorTeacher, OracleTeacher

    generator: Any
    match args.teacher_name:
        case "oracle":
            return OracleTeacher(_tiny_words)
        case "local":
            from rag_rl.generation import TransformersGenerator

            generator = TransformersGenerator.from_pretrained(
                _model(args), batch_size=args.teacher_batch_size, generator_type=args.teacher_type
            )
        case "openai":
            from rag_rl.generation import OpenAIGenerator

            generator = OpenAIGenerator(
                _model(args),
                base_url=args.teacher_base_url,
                api_key_env=args.teacher_api_key_env,
                generator_type=args.teacher_type,
                max_concurrency=args.teacher_concurrency,
                timeout_s=args.teacher_timeout_s,
                max_retries=args.teacher_max_retries,
                extra_body=args.teacher_extra_body,
            )
        case name if ":" in name:
            return cast("Teacher", import_attribute(name)(args))
        case name:
            raise ConfigError(f"teacher_name must be oracle, local, openai or package.module:attribute, got {name!r}")
    return GeneratorTeacher(
        generator,
        first_prompt=expand(args.teacher_first_prompt),
        next_prompt=expand(args.teacher_next_prompt),
        temperatures=(0.0, args.teacher_temperature),
        tries=args.teacher_tries,
        max_new_tokens=args.teacher_max_new_tokens,
        seed=args.teacher_seed,
        generator_type=args.teacher_type,
    )


def collect_chains(
    questions: Sequence[Question],
    folder: Path,
    retriever: Retriever | None,
    *,
    teacher: TeacherArguments,
    judge: JudgeArguments,
    search: RetrieverArguments,
    data: DataArguments,
) -> Collected:
    """Lets the teacher play questions until a chain is right, and keeps all chains in a folder.

    What is there already is kept and gone on with, if it came about with the same settings. Of several processes the
    main one plays, the others wait.

    Args:
        questions: with accepted answers.
        folder: of the run; ``trajectories.jsonl`` is where the chains go.
        retriever: finds documents.
        teacher: who writes the chains.
        judge: of answers that match no accepted one; without a name they are wrong.
        search: how many documents a search.
        data: the corpus, which is one of the settings.

    Returns:
        Counts over these questions; empty ones in a process that waited.

    Raises:
        ConfigError: a setting does not fit.
        DataError: questions that the teacher cannot play, or bad rows in the file.
        RunFolderError: the folder holds chains that came about otherwise.
        BackendError: teacher, retriever, judge or disk are broken.
    """
    from accelerate import PartialState

    from rag_rl.reasoning import Collected, collect_trajectories

    with first_process():
        if not PartialState().is_main_process:
            return Collected()
        # What is quickly refused comes first, and before anything is written.
        if retriever is None:
            raise ConfigError("a chain needs a retriever: retriever_name must not be none")
        writer, answers = build_teacher(teacher), build_judge(judge, folder)
        _keep_settings(folder, [teacher, judge, search, data])
        if teacher.teacher_name in ("local", "openai"):  # a later change of the package does not change what was asked
            for name in (teacher.teacher_first_prompt, teacher.teacher_next_prompt):
                (folder / "prompts").mkdir(exist_ok=True)
                write_whole(folder / "prompts" / f"{Path(name).stem}.txt", load_prompt(expand(name)) + "\n")
        found = collect_trajectories(
            questions,
            teacher=writer,
            retriever=retriever,
            path=folder / TRAJECTORIES,
            top_k=search.retriever_top_k,
            attempts=teacher.teacher_max_attempts,
            max_steps=teacher.teacher_max_steps,
            judge=answers,
            pass_mark=describe_judge(judge)[1] if answers is not None else 0.5,
            batch_size=teacher.teacher_batch_size,
            progress=True,
        )
    logger.info(
        "%d of %d questions have a right chain, %d have none after all attempts%s",
        found.solved,
        len(questions),
        found.given_up,
        f", of {found.unfinished} an attempt is missing: start again to make up for it" if found.unfinished else "",
    )
    return found


def report_trajectories(
    folder: Path, questions: Sequence[Question], found: Collected, *, layout: Layout = "turn"
) -> dict[str, Any]:
    """Writes preference pairs and a summary beside the chains, and says where all of it lies.

    Args:
        folder: with the chains.
        questions: that were played.
        found: what ``collect_chains`` returned.
        layout: of the prompts in the pairs.

    Returns:
        The summary: counts of ``questions``, ``solved``, ``given_up``, ``unfinished`` and ``chains``; chains by
        ``states``; right chains by ``attempts`` and by ``steps``; and ``dpo_pairs``.

    Raises:
        OSError: the disk refuses.
    """
    from accelerate import PartialState

    from rag_rl.reasoning import END_STATES, StepPrompts, dpo_pairs, read_trajectories

    if not PartialState().is_main_process:
        return {}
    asked = {question.qid for question in questions}
    chains = [chain for chain in read_trajectories(folder / TRAJECTORIES) if chain.question.qid in asked]
    right = [chain for chain in chains if chain.state == "correct"]
    states = Counter(chain.state for chain in chains)
    pairs = dpo_pairs(chains, prompts=StepPrompts(layout=layout))
    write_whole(folder / _PAIRS, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    summary = {
        "questions": len(questions),
        "solved": found.solved,
        "given_up": found.given_up,
        "unfinished": found.unfinished,
        "chains": found.chains,
        "states": {state: states[state] for state in END_STATES},
        "attempts": {str(n): count for n, count in sorted(Counter(chain.attempt or 0 for chain in right).items())},
        "steps": {str(n): count for n, count in sorted(Counter(len(chain.steps) for chain in right).items())},
        "dpo_pairs": len(pairs),
    }
    write_whole(folder / _SUMMARY, json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        shown = ", ".join(f"{key}: {n}" for key, n in value.items()) if isinstance(value, dict) else value
        print(f"{name:14}{shown}")  # noqa: T201 - what the user waited for
    for label, name in (("chains", TRAJECTORIES), ("pairs", _PAIRS), ("summary", _SUMMARY)):
        print(f"{label + ' in':14}{folder / name}")  # noqa: T201
    return summary


def build_chains(
    args: ColdStartArguments,
    questions: Sequence[Question],
    folder: Path,
    retriever: Retriever,
    *,
    teacher: TeacherArguments,
    judge: JudgeArguments,
    search: RetrieverArguments,
    data: DataArguments,
) -> list[StepTrajectory]:
    """Reads the chains of a cold start; where no file is named, the teacher writes them first.

    Args:
        args: which file.
        questions: to write chains about, where no file is named.
        folder: of the run.
        retriever: as in ``collect_chains``, like everything that follows.
        teacher: as there.
        judge: as there.
        search: as there.
        data: as there.

    Returns:
        All chains, right and failed.

    Raises:
        ConfigError: as in ``collect_chains``.
        DataError: the file is missing or has bad rows (names file, line and step), or as there.
        RunFolderError: as there.
        BackendError: as there.
    """
    from rag_rl.reasoning import read_trajectories

    if args.coldstart_path:
        return read_trajectories(expand(args.coldstart_path))
    collect_chains(questions, folder, retriever, teacher=teacher, judge=judge, search=search, data=data)
    return read_trajectories(folder / TRAJECTORIES)


def build_examples(
    args: ColdStartArguments,
    trajectories: Sequence[StepTrajectory],
    held_out: Sequence[Question],
    setup: StepSetup,
    training: Any,
    model: Any,
) -> tuple[Any, Any, Any]:
    """Turns chains into TRL's training set: one example a step, whose prompt is what the model will be asked later.

    A prompt that is too long loses its oldest documents, so that prompt and step fit into ``max_length`` and TRL has
    nothing to cut. Where the step itself is so long that they do not, the example is left out. Both are counted in
    the log.

    Args:
        args: which chains.
        trajectories: as from ``build_chains``.
        held_out: questions that nothing may be learnt from.
        setup: layout and budgets of the prompts.
        training: TRL's config; ``max_length`` is the most tokens of an example.
        model: TRL's ``ModelConfig``; as in ``build_tokenizer``.

    Returns:
        The training set; the validation set, None where nothing is kept for one; and the tokenizer.

    Raises:
        ConfigError: the model cannot be found, has no chat template, or there is no room for a prompt.
        DataError: no chain is left, a chain is about a held-out question, or every example is too long.
    """
    from datasets import Dataset

    from rag_rl.generation.transformers_generator import encode_prompts
    from rag_rl.reasoning import StepPrompts

    held = {question.question for question in held_out}
    leaked = sorted({chain.question.qid for chain in trajectories if chain.question.question in held})
    if leaked:
        raise DataError(f"{len(leaked)} held-out questions have chains to learn from: {', '.join(leaked[:5])}")
    chosen = [chain for chain in trajectories if chain.state in args.coldstart_states]
    if not chosen:
        states = Counter(str(chain.state) for chain in trajectories)
        raise DataError(
            f"none of {len(trajectories)} chains ended in {' or '.join(args.coldstart_states)} (there are "
            f"{', '.join(f'{count} {state}' for state, count in states.items()) or 'none at all'})"
        )
    draw = random.Random(training.seed)
    if args.coldstart_size is not None and args.coldstart_size < len(chosen):
        chosen = draw.sample(chosen, args.coldstart_size)
    tokenizer, context = build_tokenizer(model, training)
    kind: Literal["base", "instruct"] = "base" if setup.generator_type == "base" else "instruct"

    def encode(prompts: Sequence[Prompt]) -> list[list[int]]:
        return encode_prompts(tokenizer, prompts, generator_type=kind)

    prompts = StepPrompts(
        chat=kind != "base", layout=setup.layout, encode=encode, max_tokens=_prompt_budget(setup, context, training)
    )
    asked = sorted({chain.question.qid for chain in chosen})
    validation = set(draw.sample(asked, round(args.coldstart_validation * len(asked))))
    parts = ([chain for chain in chosen if (chain.question.qid in validation) == part] for part in (False, True))
    learnt, kept = (_fitting(part, prompts, tokenizer, training.max_length) for part in parts)
    if not learnt:
        raise DataError(
            f"no example is left to train on: with their steps all are longer than max_length {training.max_length}"
        )
    logger.info("%d examples of %d chains about %d questions", len(learnt) + len(kept), len(chosen), len(asked))
    return Dataset.from_list(learnt), Dataset.from_list(kept) if kept else None, tokenizer


def _fitting(
    chains: Sequence[StepTrajectory], prompts: StepPrompts, tokenizer: Any, most: int | None
) -> list[dict[str, Any]]:
    """The examples that TRL will neither cut nor drop."""
    from rag_rl.generation.transformers_generator import expect_long_texts
    from rag_rl.reasoning import END_STATES, sft_examples

    rows = sft_examples(chains, prompts=prompts, states=END_STATES)
    shortened = sum(row.pop("left_out") > 0 for row in rows)
    if shortened:
        logger.warning("%d of %d prompts have no room for all documents: the oldest go", shortened, len(rows))
    if most is None or not rows:
        return rows
    wholes = [row["prompt"] + row["completion"] for row in rows]
    expect_long_texts(tokenizer)
    if prompts.chat:
        encoded = tokenizer.apply_chat_template(wholes, tokenize=True, return_dict=False)
    else:
        encoded = tokenizer([whole + (tokenizer.eos_token or "") for whole in wholes])["input_ids"]
    kept = [row for row, ids in zip(rows, encoded, strict=True) if len(ids) <= most]
    if len(kept) < len(rows):
        logger.warning(
            "%d of %d examples are left out: with their steps they are longer than max_length %d (the longest has %d "
            "tokens)",
            len(rows) - len(kept),
            len(rows),
            most,
            max(map(len, encoded)),
        )
    return kept


def _prompt_budget(setup: StepSetup, context: int | None, training: Any) -> int | None:
    """The longest prompt: what was set, and what context and ``max_length`` leave beside a step."""
    bounds = [] if setup.max_prompt_tokens is None else [setup.max_prompt_tokens]
    for name, whole in (("the model's context", context), ("max_length", training.max_length)):
        if whole is None:
            continue
        if whole <= setup.max_step_tokens:
            raise ConfigError(
                f"reasoner_max_step_tokens {setup.max_step_tokens} leaves no room for a prompt: {name} is {whole}"
            )
        bounds.append(whole - setup.max_step_tokens)
    return min(bounds, default=None)


def _keep_settings(folder: Path, instances: Sequence[Any]) -> None:
    """Refuses a folder of chains that came about otherwise; notes how they come about in a new one."""
    path = folder / _SETTINGS
    strange = [name for name in (TRAJECTORIES, _PAIRS, _SUMMARY) if (folder / name).exists()]
    if strange and not path.is_file():
        raise RunFolderError(
            f"{folder} holds {strange[0]}, and nothing tells how it was made: give another --output_dir"
        )
    # Chains can be dear, and last longer than a version: a flag that there was not yet had its default.
    defaults = resolved([type(instance)() for instance in instances])
    keep_settings(path, resolved(instances), holds="chains", ignore=_MAY_CHANGE, defaults=defaults)


def _tiny_words(question: Question, hop: int) -> tuple[str, str] | None:
    """What the tiny world's language model was taught to say; nothing about questions of other worlds."""
    if "relations" not in question.meta or "chain" not in question.meta:
        return None
    from rag_rl.tiny.lessons import reasoning_words

    return reasoning_words(question, hop)


def _model(args: TeacherArguments) -> str:
    if not args.teacher_model:
        raise ConfigError(f"teacher_name {args.teacher_name} needs a model: set teacher_model")
    return expand(args.teacher_model)
