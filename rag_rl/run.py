"""The life of a run: its folder, its seed, where it resumes, before and after, and what it leaves behind.

A recipe calls ``start_run``, then ``Run.measure_before``, its trainer, and ``Run.finish``; one that trains nothing
calls ``start_data_run``. ``launch`` turns errors that are the user's into one line. The run folder is described in
``docs/data_formats.md``.
"""

from __future__ import annotations

import atexit
import errno
import inspect
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from rag_rl.config.arguments import JudgeArguments
from rag_rl.config.launching import check_sharding, check_vllm, is_shared_out, share_out_loaded_models
from rag_rl.config.parsing import (
    config_difference,
    config_source,
    one_line_errors,
    parse,
    resolved,
    without_secrets,
)
from rag_rl.config.trackers import check_trackers
from rag_rl.errors import BackendError, ConfigError, RagRLError, RunFolderError, UserError

if TYPE_CHECKING:
    from rag_rl.evaluation.scoring import Evaluable, Evaluation, Part, Row
    from rag_rl.types import Question

logger = logging.getLogger(__name__)
# Importing TRL imports bitsandbytes, which on some CPUs warns of a kernel that it could download; recipes therefore
# import this module first (recipes/ruff.toml).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# What may differ between a run and its continuation: where and how it runs, not what it learns.
RUNTIME_KEYS = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "report_to", "run_name", "logging_steps", "log_completions",
        "save_steps", "save_total_limit", "disable_tqdm", "dataloader_num_workers", "local_rank", "deepspeed",
        "use_cpu", "push_to_hub", "num_completions_to_print", "report_examples", "generator_eval_batch_size",
        "reasoner_eval_batch_size", "reranker_batch_size", "retriever_reranker_batch_size", "retriever_batch_size",
        "retriever_devices", "retriever_index_path", "project", "trackio_space_id", "hub_model_id",
        "trackio_bucket_id", "trackio_static_space_id",
        "judge_base_url", "judge_api_key_env", "judge_concurrency", "judge_timeout_s", "judge_max_retries",
        "judge_max_calls", "judge_max_usd", "judge_cache", "judge_log",
        "judge_usd_per_million_prompt_tokens", "judge_usd_per_million_completion_tokens", "synthesis_base_url",
        "synthesis_api_key_env", "synthesis_concurrency", "synthesis_timeout_s", "synthesis_max_retries",
        "rollout_batch_size", "local_rollout_forward_batch_size", "retriever_url", "retriever_token_env",
        "retriever_timeout_s", "retriever_wait_s", "preference_base_url", "preference_api_key_env",
        "augmenter_base_url", "augmenter_api_key_env", "augmenter_concurrency", "augmenter_timeout_s",
        "augmenter_max_retries", "augmenter_batch_size", "distill_batch_size", "vllm_server_base_url",
        "vllm_server_host", "vllm_server_port", "vllm_group_port", "vllm_server_timeout",
        "vllm_gpu_memory_utilization", "ddp_timeout", "reader_base_url", "reader_api_key_env",
    }
)  # fmt: skip
# What a full disk makes of a write: an OSError, or text in an error of safetensors (with errno's number) or torch.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_TEXTS = (
    *(f"(os error {number})" for number in _DISK_FULL), "PytorchStreamWriter failed", "inline_container.cc",
)  # fmt: skip
# The settings that name what training starts from; the first of them that a recipe has is the one it trains.
_BASES = ("model_name_or_path", "reranker_model", "retriever_encoder")
PACKAGES = ("rag-rl", "trl", "transformers", "peft", "accelerate", "torch", "sentence-transformers", "datasets")


@dataclass
class Run:
    """One run of a recipe.

    Attributes:
        folder: where everything goes.
        recipe: stem of the recipe's file.
        config: stem of the config's file.
        seed: of everything.
        checkpoint: where training goes on, None for the beginning.
        settings: every setting, without secrets.
        arguments: the parsed dataclasses, in the recipe's order.
    """

    folder: Path
    recipe: str
    config: str
    seed: int
    checkpoint: str | None
    settings: dict[str, Any]
    arguments: tuple[Any, ...]

    @property
    def finished(self) -> bool:
        """Whether everything is done and written."""
        return is_finished(self.folder)

    @property
    def callbacks(self) -> list[Any]:
        """Trainer callbacks that ``train`` needs; they also add up its time and keep checkpoints movable.

        They are asked for as the trainer is made, and the model that it then loads is the one to be shared out under
        ZeRO-3. Until now, and from ``measure_before`` on, whatever is loaded stays whole.
        """
        share_out_loaded_models(self._training, True)
        return [_clock(self.folder / "train_seconds.json"), _relative_bases(self.folder)]

    def keep_settings(self) -> None:
        """Writes ``resolved_config.yaml`` and the prompts into the folder; by one process only.

        Raises:
            ConfigError: there is no such prompt or rubric.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"recipe": self.recipe, "config": self.config, "made_with": versions(), **self.settings}
        write_whole(self.folder / "resolved_config.yaml", yaml.safe_dump(record, sort_keys=False))
        keep_prompts(self.folder, self.settings)

    def measure_before(
        self,
        trainer: Any,
        assembly: Part,
        questions: Sequence[Question],
        *,
        rewards: Callable[..., Any] | None = None,
        headroom_samples: int = 0,
        batch_size: int = 64,
        baselines: Mapping[str, Part] | None = None,
    ) -> None:
        """Evaluates the model that training starts from, once; a resumed run keeps what was measured first.

        Args:
            trainer: whose model is the trained part of the assembly.
            assembly: how questions are asked.
            questions: held out.
            rewards: scores the rows by the run's rewards too, for the report.
            headroom_samples: answers sampled to each of 200 questions, for pass@n and zero-variance groups; 0: none.
            batch_size: answers a batch.
            baselines: other ways to answer the same questions, by name, each evaluated once: around the model that
                training starts from, or around another (``OtherModel``). What training gained over each of them
                stands in ``metrics.json`` and in the report.
        """
        from rag_rl.evaluation.assembly import Assembly
        from rag_rl.evaluation.reasoning import ReasoningAssembly
        from rag_rl.evaluation.sampling import sample_statistics
        from rag_rl.trainers.quantized_layers import keep_trainable

        share_out_loaded_models(self._training, False)
        keep_trainable(trainer.model)
        if not (self.folder / "before.json").is_file():
            asking = assembly.under_training(trainer, batch_size=batch_size)
            started = time.time()
            found = evaluate_sharded(asking, questions, rewards=rewards)
            extra: dict[str, float] = {}
            if headroom_samples and isinstance(asking, (Assembly, ReasoningAssembly)):
                extra = sample_statistics(asking, questions[:200], n=headroom_samples, seed=self.seed)
            seconds = time.time() - started
            with main_process_only() as main:
                if main:
                    self._store("before", found, seconds, extra)
        self._measure_baselines(trainer, baselines or {}, questions, batch_size=batch_size)

    def measure(self, when: str, assembly: Callable[[], Evaluable], questions: Sequence[Question], *, of: str) -> None:
        """Evaluates what is finished, unless the same has been evaluated: for runs whose steps have the trainers.

        Args:
            when: ``before``, ``after``, or the name of a baseline.
            assembly: opens what is evaluated.
            questions: held out.
            of: changes whenever what is evaluated does, or the questions.
        """
        from rag_rl.evaluation.scoring import write_rows

        known = _read_baselines(self.folder)
        plain = when in ("before", "after")
        path = self.folder / f"{when}.json"
        there = json.loads(path.read_text()) if plain and path.is_file() else known.get(when, {})
        if there.get("of") == of:
            return
        opened, started = assembly(), time.time()
        with _can_go_on():
            found = evaluate_sharded(opened, questions)
        seconds = time.time() - started
        with main_process_only() as main:
            if main and plain:
                self._store(when, found, seconds, {}, of=of)
            elif main:
                known[when] = {"metrics": found.metrics, "seconds": seconds, "of": of}
                write_rows(self.folder / f"baseline_{when}.jsonl", found.rows)
                write_whole(self.folder / "baselines.json", json.dumps(known, indent=2) + "\n")

    def train(self, trainer: Any) -> None:
        """Trains, from where the run stopped; a run that stopped after its last step is only loaded.

        After an error of ours (a judge that is gone, a budget that is used up) the last finished step is kept as a
        checkpoint. The run that goes on from there draws what this one drew, so that verdicts which were paid for are
        found in the judge's cache.

        Args:
            trainer: made with this run's ``callbacks``.

        Raises:
            BackendError: a service or the disk failed.
            UserError: the trainer met bad input, or a limit that the user had set.
        """
        last_step = _last_step()
        trainer.add_callback(last_step)
        met_by_all = _fail_together(trainer)
        share_out_loaded_models(self._training, True)  # what generates while it trains asks for it, too
        with _can_go_on():
            try:
                trainer.train(resume_from_checkpoint=self.checkpoint)
            except _AllStepsDone:
                logger.info("all %d steps are done", trainer.state.global_step)
            except RagRLError:
                if met_by_all():  # saving is collective, too
                    last_step.keep(trainer)
                raise
            finally:
                share_out_loaded_models(self._training, False)

    def finish(
        self,
        trainer: Any,
        assembly: Part,
        questions: Sequence[Question],
        *,
        rewards: Callable[..., Any] | None = None,
        save_merged: bool = False,
        batch_size: int = 64,
        examples: int = 20,
    ) -> None:
        """Saves the trained part, evaluates it as reloaded from the run folder, and writes everything there is to see.

        Args:
            trainer: after training.
            assembly: how questions are asked.
            questions: the same as in ``measure_before``.
            rewards: as in ``measure_before``.
            save_merged: whether LoRA weights are merged into the base.
            batch_size: answers a batch.
            examples: questions shown in the report.

        Raises:
            BackendError: a service or the disk failed.
        """
        save_trained(trainer, self.folder, merged=save_merged)
        asking = assembly.reloaded(self.folder, device=trainer.accelerator.device, batch_size=batch_size)
        started = time.time()
        with _can_go_on():
            found = evaluate_sharded(asking, questions, rewards=rewards)
        seconds = time.time() - started
        with main_process_only() as main:
            if main:
                trainer.state.save_to_json(str(self.folder / "trainer_state.json"))
                self._store("after", found, seconds, {})
                self.write_results(trainer.state.log_history, examples=examples)

    def write_results(
        self,
        log_history: list[dict[str, Any]],
        *,
        examples: int = 20,
        sections: Sequence[str] = (),
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes ``curves.png``, ``report.html``, the model card and, last, ``metrics.json``.

        Args:
            log_history: of the trainer.
            examples: questions shown in the report.
            sections: more of the report, as HTML that is already escaped.
            more: of ``metrics.json``.

        Returns:
            The content of ``metrics.json``.
        """
        from accelerate import PartialState

        from rag_rl.evaluation.curves import draw_curves
        from rag_rl.evaluation.model_card import model_card
        from rag_rl.evaluation.report import write_report
        from rag_rl.evaluation.scoring import answer_differences, confidence_intervals, read_rows

        before, after = (json.loads((self.folder / f"{when}.json").read_text()) for when in ("before", "after"))
        old, new = (read_rows(self.folder / f"{when}.jsonl") for when in ("before", "after"))
        baselines = _read_baselines(self.folder)
        summary: dict[str, Any] = {
            "recipe": self.recipe,
            "config": self.config,
            "seed": self.seed,
            "status": "complete",
            "before": before["metrics"],
            "after": after["metrics"],
            "n_eval": len(new),
            "num_processes": PartialState().num_processes,
            "ci95": {name: list(interval) for name, interval in confidence_intervals(old, new).items()},
            "train_seconds": _read_seconds(self.folder / "train_seconds.json"),
            "eval_seconds": sum(found["seconds"] for found in (before, after, *baselines.values())),
            "peak_memory_bytes": peak_memory(),
            **({"headroom": before["headroom"]} if before["headroom"] else {}),
            **(more or {}),
        }
        if baselines:
            summary["baselines"] = {name: found["metrics"] for name, found in baselines.items()}
            summary["over_baselines"] = {
                name: answer_differences(read_rows(self.folder / f"baseline_{name}.jsonl"), new) for name in baselines
            }
        title = f"{self.recipe}, {self.config}, seed {self.seed}"
        draw_curves(log_history, self.folder / "curves.png")
        write_report(
            self.folder,
            title=title,
            summary=summary,
            before_rows=old,
            after_rows=new,
            log_history=log_history,
            config=self.settings,
            sections=[*sections, *self._agreement(old, new)],
            command=command_line(),
            n_examples=examples,
        )
        card = model_card(
            summary,
            base_model=next(filter(None, map(self.settings.get, _BASES)), None),
            library_name="transformers" if "model_name_or_path" in self.settings else "sentence-transformers",
            recipe=self.recipe,
            config_name=self.config,
            title=title,
        )
        write_whole(self.folder / "README.md", card)
        write_whole(self.folder / "metrics.json", json.dumps(summary, indent=2) + "\n")
        print(results_table(summary, self.folder))  # noqa: T201 - what the user waited for
        return summary

    @property
    def _training(self) -> Any:
        return next((one for one in self.arguments if hasattr(one, "per_device_train_batch_size")), None)

    def _agreement(self, before: Sequence[Row], after: Sequence[Row]) -> list[str]:
        """The report's section on the judge; none in a run without one."""
        from rag_rl.config.parts import describe_judge
        from rag_rl.evaluation.agreement import agreement_section, agreement_with_em

        judge = next((args for args in self.arguments if isinstance(args, JudgeArguments) and args.judge_name), None)
        if judge is None:
            return []
        name, pass_mark = describe_judge(judge)
        compared = agreement_with_em({"before training": before, "after training": after}, pass_mark=pass_mark)
        note = "These are the answers to the held-out questions; where none was given, nobody was asked."
        return [agreement_section(f"the judge {name}", compared, note=note)] if compared else []

    def _measure_baselines(
        self, trainer: Any, baselines: Mapping[str, Part], questions: Sequence[Question], *, batch_size: int
    ) -> None:
        from rag_rl.evaluation.scoring import write_rows

        known = _read_baselines(self.folder)
        for name, baseline in baselines.items():
            if name in known:
                continue
            started = time.time()
            found = evaluate_sharded(baseline.under_training(trainer, batch_size=batch_size), questions)
            known[name] = {"metrics": found.metrics, "seconds": time.time() - started}
            with main_process_only() as main:
                if main:
                    write_rows(self.folder / f"baseline_{name}.jsonl", found.rows)
                    write_whole(self.folder / "baselines.json", json.dumps(known, indent=2) + "\n")

    def _store(
        self, when: str, found: Evaluation, seconds: float, headroom: dict[str, float], *, of: str | None = None
    ) -> None:
        from rag_rl.evaluation.scoring import write_rows

        write_rows(self.folder / f"{when}.jsonl", found.rows)
        content: dict[str, Any] = {"metrics": found.metrics, "seconds": seconds, "headroom": headroom}
        if of is not None:
            content["of"] = of
        write_whole(self.folder / f"{when}.json", json.dumps(content, indent=2) + "\n")


def launch(main: Callable[[], None]) -> None:
    """Runs a recipe's ``main``: an error of the user ends in one line and exit code 2, a dead backend in exit code 1.

    Args:
        main: the recipe.

    Raises:
        SystemExit: after such an error.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2", "chromadb", "sentence_transformers", "faiss", "transformers_modules"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # TRL's own defaults use the old name (transformers 5.23 renames it).
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    program = Path(sys.argv[0]).name
    try:
        with one_line_errors(program):
            _stop_in_one_line(main, program)
    except SystemExit as stopped:
        end_processes(stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None))
        raise
    except Exception:
        if _is_one_of_several():
            traceback.print_exc()  # in the other case the interpreter prints it
        end_processes(1)
        raise
    end_processes(0)


def _stop_in_one_line(main: Callable[[], None], program: str) -> None:
    try:
        main()
    except UserError:
        raise
    except BackendError as error:
        print(f"{program}: stopped: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1) from error
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        print(  # noqa: T201
            f"{program}: stopped: {trouble}; make room and go on with --resume_from_checkpoint true",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


def end_processes(code: int) -> None:
    """Ends one of several processes, when what it had to do is done or failed; where there is only one, does nothing.

    gloo's threads outlive even the process group, and an interpreter that is taken down under them now and then
    aborts: with everything written, or instead of the exit code that says what was wrong. So it is not taken down:
    what is registered for the exit is done, and the process ends.

    Args:
        code: exit code. After a good end, 0, the process group is destroyed; after an error it is not, because the
            others may be waiting in it, and it is for the launcher to stop them.
    """
    if not _is_one_of_several():
        return
    if code == 0:
        sys.modules["torch"].distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_one_of_several() -> bool:
    loaded = sys.modules.get("torch")
    return bool(loaded and loaded.distributed.is_available() and loaded.distributed.is_initialized())


def disk_trouble(error: Exception) -> str | None:
    """Says in a few words that a write failed for want of room.

    Args:
        error: of Python, safetensors or torch.

    Returns:
        What failed, or None for any other error.

    Example:
        >>> disk_trouble(OSError(errno.ENOSPC, "No space left on device", "runs/a/model.safetensors"))
        'runs/a/model.safetensors: No space left on device'
        >>> disk_trouble(ValueError("no space left for doubt"))
    """
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return f"{error.filename or 'the output folder'}: {error.strerror}"
    if any(text in str(error) for text in _DISK_FULL_TEXTS):
        first = str(error).strip().split("\n")[0]
        return f"the output folder cannot be written to, most likely for want of room ({first})"
    return None


def start_run(
    recipe_file: str,
    arguments: Sequence[type[Any]],
    argv: Sequence[str] | None = None,
    *,
    in_steps: bool = False,
) -> Run:
    """Parses the command line, opens the run folder, sets the seed and finds the resume point.

    Args:
        recipe_file: the recipe's ``__file__``.
        arguments: dataclasses to fill; one of them is a ``transformers.TrainingArguments``.
        argv: command line; None for the process's own.
        in_steps: the run consists of steps that are runs of their own (``rag_rl.config.steps``): it may go on with
            other settings, and the steps that depend on them are done anew.

    Returns:
        The run; its ``arguments`` are the filled dataclasses.

    Raises:
        SystemExit: code 2 after bad input; code 0 where this very run is already finished.
        RunFolderError: the folder holds another run or an unfinished one.
        MissingPackageError: a tracker of ``report_to`` is not installed.
    """
    instances = parse(recipe_file, *arguments, argv=argv)
    config = config_source(argv, recipe_file).stem
    from accelerate.utils import wait_for_everyone
    from transformers import TrainingArguments, set_seed
    from transformers.utils import logging as hf_logging

    training = next(instance for instance in instances if isinstance(instance, TrainingArguments))
    check_vllm(training)
    check_sharding(training, encoder=any(getattr(one, "trains_encoder", False) for one in instances))
    check_trackers(training.report_to)
    share_out_loaded_models(training, False)
    recipe = Path(recipe_file).stem
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = f"runs/{recipe}-{config}-seed{training.seed}"
    folder = Path(training.output_dir)
    settings = resolved(instances)
    resume = _truth(training.resume_from_checkpoint)
    checkpoint = open_folder(
        folder, {"recipe": recipe, **settings}, resume=resume, defaults=_defaults(arguments), in_steps=in_steps
    )
    wait_for_everyone()  # all have looked before one writes
    training.resume_from_checkpoint = checkpoint
    run = Run(folder, recipe, config, training.seed, checkpoint, settings, instances)
    with main_process_only() as main:
        if main:
            (folder / "metrics.json").unlink(missing_ok=True)  # of other settings, where there is one
            run.keep_settings()
    set_seed(training.seed)
    hf_logging.set_verbosity_warning()
    logger.info("run folder: %s", folder)
    if checkpoint:
        logger.info("going on from %s", checkpoint)
    return run


def leave_finished(folder: Path) -> NoReturn:
    """Says that a run is finished, and ends.

    Args:
        folder: of the run.

    Raises:
        SystemExit: code 0.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{folder} is already finished: see {folder / 'report.html'}")  # noqa: T201
    raise SystemExit(0)


def start_data_run(
    recipe_file: str, arguments: Sequence[type[Any]], *, parent: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """What ``start_run`` is to a recipe that trains: parses the command line and names the output.

    Args:
        recipe_file: the recipe's ``__file__``.
        arguments: dataclasses to fill; one of them has a field ``output_dir``.
        parent: what is made goes to ``<parent>/<config>`` unless the user says where.
        argv: command line; None for the process's own.

    Returns:
        The filled dataclasses.

    Raises:
        SystemExit: code 2 after bad input.
    """
    instances = parse(recipe_file, *arguments, argv=argv)
    output = next(instance for instance in instances if hasattr(instance, "output_dir"))
    output.output_dir = output.output_dir or str(Path(parent) / config_source(argv, recipe_file).stem)
    join_processes()
    return instances


def join_processes() -> None:
    """Lets the processes that a launcher has started find one another, where no trainer's settings do so.

    Without an accelerator each of them takes itself for the only one, unless it is told that the CPU is meant.
    They may wait a day for one another: while one builds an index, or has more to do than the others.
    """
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    if state.num_processes > 1:
        logger.info("process %d of %d", state.process_index + 1, state.num_processes)


def report_index(retriever: Any, questions: Sequence[Question], *, top_k: int, seconds: float) -> dict[str, Any]:
    """Prints what an index holds and, where questions with gold documents are given, what a search in it finds.

    Args:
        retriever: as from ``open_index``.
        questions: may be empty; those without gold documents are left out.
        top_k: passages a question.
        seconds: that building took.

    Returns:
        What is printed, by name.
    """
    from rag_rl.evaluation.scoring import evaluate_retrieval

    known = [question for question in questions if question.gold_doc_ids]
    found: dict[str, Any] = {
        "index": str(retriever.folder),
        "passages": len(retriever),
        "dimension": retriever.dimension,
        "fingerprint": retriever.fingerprint,
        "seconds": round(seconds, 1),
    }
    if known:
        found |= {"questions": len(known), **evaluate_retrieval(retriever, known, top_k=top_k)}
    with main_process_only() as main:
        if main:
            for name, value in found.items():
                shown = f"{value:.3f}" if isinstance(value, float) and name != "seconds" else value
                print(f"{name:14}{shown}")  # noqa: T201
    return found


def _defaults(arguments: Iterable[type[Any]]) -> dict[str, Any]:
    """Default of every setting that has one."""
    found: dict[str, Any] = {}
    for field in (field for kind in arguments for field in fields(kind)):
        if field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


def keep_prompts(folder: Path, settings: dict[str, Any]) -> None:
    """Copies the prompts of a run into its folder: a later change of the package does not change what the run asks.

    Args:
        folder: the run folder.
        settings: of the run; generator, augmenter, the baselines of a reasoner and the judge have prompts.

    Raises:
        ConfigError: there is no such prompt or rubric.
    """
    from rag_rl.config.parts import LLM_JUDGES, build_rubric
    from rag_rl.prompts import load_prompt

    kept = {}
    asked = {
        "generator_prompt": True,
        "augmenter_prompt": True,
        "reasoner_baseline_prompt": "one_shot" in settings.get("reasoner_baselines", ()),
        "reasoner_baseline_closed_prompt": "no_retrieval" in settings.get("reasoner_baselines", ()),
    }
    for key in (key for key, used in asked.items() if used and settings.get(key)):
        try:
            kept[Path(settings[key]).stem] = load_prompt(settings[key])
        except FileNotFoundError as error:
            raise ConfigError(f"{key}: {error}") from error
    if settings.get("judge_name") in LLM_JUDGES:
        for name in (settings["judge_rubric"], *_step_rubrics(settings)):
            rubric = build_rubric(JudgeArguments(judge_rubric=name))
            kept[f"rubric_{rubric.name}"] = rubric.text
    for stem, text in kept.items():
        (folder / "prompts").mkdir(exist_ok=True)
        write_whole(folder / "prompts" / f"{stem}.txt", text + "\n")


def _step_rubrics(settings: dict[str, Any]) -> list[str]:
    """The rubrics by which a reasoner's steps are judged."""
    from rag_rl.reasoning import STEP_RUBRICS, step_reward_rule

    asked = set(step_reward_rule(settings["step_reward"]).needs) if settings.get("step_reward") else set()
    if settings.get("step_coherence"):
        asked.add("reasoning_coherence")
    return [rubric for rubric in STEP_RUBRICS if rubric in asked]


def keep_settings(
    path: Path,
    settings: dict[str, Any],
    *,
    holds: str,
    ignore: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Notes how the data in a folder come about; refuses a folder whose data came about otherwise.

    For recipes that make data which can be gone on with, and are no run.

    Args:
        path: file of the settings, in the folder; made with it where it is missing.
        settings: as they are now.
        holds: what the folder holds, for the error.
        ignore: settings that may change, beside those of every run.
        defaults: what a setting was that the file does not name yet, since it came with a later version.

    Raises:
        RunFolderError: a setting that matters is another one.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, yaml.safe_dump({"made_with": versions(), **settings}, sort_keys=False))
        return
    before = {**(defaults or {}), **yaml.safe_load(path.read_text(encoding="utf-8"))}
    changed = config_difference(before, settings, ignore=RUNTIME_KEYS | {"made_with", *ignore})
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise RunFolderError(
            f"{path.parent} holds {holds} that came about otherwise ({'; '.join(changed[:3])}{more}): give another "
            "--output_dir"
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, all or nothing; half a character, which a service can send, as JSON escapes it.

    Args:
        path: the file; an existing one is replaced at the very end.
        text: its content.
    """
    half = path.with_name(f".{path.name}.part")
    try:
        half.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def open_folder(
    folder: Path,
    settings: dict[str, Any],
    *,
    resume: bool,
    defaults: Mapping[str, Any] | None = None,
    in_steps: bool = False,
) -> str | None:
    """Decides what may be done with an output folder.

    Args:
        folder: the run folder, which may not exist.
        settings: recipe and settings of this run.
        resume: whether an unfinished run shall go on.
        defaults: what a setting was that the folder does not name yet, since it came with a later version.
        in_steps: whether a run of this recipe may go on with other settings.

    Returns:
        Path of the checkpoint to go on from, or None for the beginning.

    Raises:
        SystemExit: code 0: this very run is already finished.
        RunFolderError: the folder holds something else, another run, or an unfinished run and ``resume`` is off.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise RunFolderError(f"output_dir {folder} is a file: give another --output_dir")
    if all(path.name.endswith(".part") for path in folder.iterdir()):  # what a kill leaves of the very first file
        return None
    recorded = folder / "resolved_config.yaml"
    if not recorded.is_file():
        raise RunFolderError(f"output_dir {folder} is not empty and holds no run: give another --output_dir")
    if not (folder / "before.json").is_file() and not list(folder.glob("checkpoint-*")):
        return None  # stopped before anything was measured, for instance by bad data: nothing would be lost
    before = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    before = {key: value for key, value in before.items() if key not in ("config", "made_with")}
    new = {key: value for key, value in (defaults or {}).items() if key in settings and key not in before}
    changed = config_difference({**before, **new}, settings, ignore=RUNTIME_KEYS)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        told = f"({'; '.join(changed[:3])}{more})"
        if not in_steps or before.get("recipe") != settings.get("recipe"):
            raise RunFolderError(f"output_dir {folder} holds another run {told}: give another --output_dir")
        if not resume:
            raise RunFolderError(
                f"output_dir {folder} holds this run with other settings {told}: go on with the new ones by "
                "--resume_from_checkpoint true, which does the steps anew that depend on them, or give another "
                "--output_dir"
            )
        return None
    if is_finished(folder):
        leave_finished(folder)
    if not resume:
        raise RunFolderError(
            f"output_dir {folder} holds this run, unfinished: go on with --resume_from_checkpoint true, or give "
            "another --output_dir"
        )
    return last_checkpoint(folder)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder is finished.

    Args:
        folder: the run folder.

    Returns:
        True where its ``metrics.json`` says so.
    """
    done = folder / "metrics.json"
    return done.is_file() and json.loads(done.read_text(encoding="utf-8")).get("status") == "complete"


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a run.

    A kill or a full disk leaves half a checkpoint; ``trainer_state.json`` is what transformers writes last.

    Args:
        folder: the run folder.

    Returns:
        Its path, None where there is none.
    """
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), str(state.parent)))
        except (ValueError, KeyError):
            continue
    return max(whole)[1] if whole else None


def evaluate_sharded(
    assembly: Evaluable, questions: Sequence[Question], *, rewards: Callable[..., Any] | None = None
) -> Evaluation:
    """Evaluates on all processes, each on its share; every process gets the whole result.

    Shares are padded to the same length, so that collective generators make the same number of calls everywhere.

    Args:
        assembly: with a generator.
        questions: all of them, the same on every process.
        rewards: as in ``evaluate``.

    Returns:
        Metrics and rows of all questions, in their order.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from rag_rl.evaluation.scoring import Evaluation, evaluate, mean_metrics

    state = PartialState()
    world, rank = state.num_processes, state.process_index
    if world == 1:
        return evaluate(assembly, questions, rewards=rewards)
    share = [questions[i % len(questions)] for i in range(rank, -(-len(questions) // world) * world, world)]
    gathered: list[Row] = gather_object(evaluate(assembly, share, rewards=rewards).rows)
    by_id = {row["qid"]: row for row in gathered}
    rows = [by_id[question.qid] for question in questions]
    return Evaluation(mean_metrics(rows), rows)


def save_trained(trainer: Any, folder: Path, *, merged: bool) -> None:
    """Saves what was trained in its own ecosystem's format, with its tokenizer: whole weights, or the LoRA adapter.

    Of a sentence encoder the adapter is saved alone only where its base is on the Hub: ``SentenceTransformer(folder)``
    looks for a base in a folder as seen from where it runs, and would find it nowhere else.

    Args:
        trainer: of TRL, or of sentence-transformers.
        folder: where to.
        merged: merge a LoRA adapter into its base first.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "transformers_model"):  # of sentence-transformers: it saves its own tokenizer
        with main_process_only() as main:
            if main:
                if getattr(model.transformers_model, "_hf_peft_config_loaded", False):
                    bases = [c.base_model_name_or_path or "" for c in model.transformers_model.peft_config.values()]
                    if not merged and any(Path(base).is_dir() for base in bases):
                        merged = True
                        logger.info("the base of the adapter is the folder %s: merged weights are saved", bases[0])
                    if merged:
                        from rag_rl.trainers.cross_encoder_adapters import merge_adapter

                        merge_adapter(model)
                model.save_pretrained(str(folder), create_model_card=False)
        return
    trainer.processing_class.save_pretrained(folder)
    if not (merged and hasattr(model, "merge_and_unload")):
        trainer.save_model(str(folder))
        with main_process_only() as main:
            if main:
                make_base_relative(folder)
        return
    if is_shared_out(trainer) or any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        # No process holds the base whole, or not with the weights that it has on the disk: merging into one of 4 bits
        # would round adapter and base together to 4 bits. The adapter is saved, and merged into what lies on the disk.
        trainer.save_model(str(folder))
        with main_process_only() as main:
            if main:
                loaded = getattr(trainer.args, "model_init_kwargs", None) or {}
                merge_saved_adapter(folder, dtype=model.dtype, revision=loaded.get("revision"))
                (folder / "training_args.bin").unlink(missing_ok=True)  # of save_model; merging in memory leaves none
        return
    with main_process_only() as main:
        if main:
            model.merge_and_unload().save_pretrained(folder)


def merge_saved_adapter(folder: Path, *, dtype: Any = None, revision: str | None = None) -> None:
    """Makes whole weights of a saved LoRA adapter and its base, in main memory.

    Args:
        folder: with the adapter, which the merged model replaces.
        dtype: of the weights; None for that of the base.
        revision: of a base on the Hub; None for its main one.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(
        content["base_model_name_or_path"], dtype=dtype, revision=revision or "main"
    )
    merged: Any = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()


def make_base_relative(folder: Path) -> None:
    """Names the base of a saved adapter relative to its folder, where it is a local one: the two can move together.

    Args:
        folder: with or without an ``adapter_config.json``.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    base = content.get("base_model_name_or_path") or ""
    if not Path(base).is_absolute():
        return
    # From where the folder really lies: a run folder may be reached through a link to another disk.
    content["base_model_name_or_path"] = Path(os.path.relpath(base, folder.resolve())).as_posix()
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def main_process_only() -> Iterator[bool]:
    """Gives True to one process, and lets all wait for it at the end."""
    from accelerate import PartialState

    state = PartialState()
    yield state.is_main_process
    state.wait_for_everyone()


def results_table(summary: dict[str, Any], folder: Path) -> str:
    """The before/after table of a finished run, for the terminal.

    Args:
        summary: content of ``metrics.json``.
        folder: the run folder.

    Returns:
        Lines of text.
    """
    width = max([13, *map(len, summary["after"])]) + 1
    lines = [f"{'':{width}}{'before':>8}{'after':>8}{'change':>9}   95% interval"]
    for name, after in summary["after"].items():
        before = summary["before"].get(name)
        if before is None:
            continue
        interval = summary["ci95"].get(name)
        shown = f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
        lines.append(f"{name:{width}}{before:8.3f}{after:8.3f}{after - before:+9.3f}   {shown}")
    for baseline, differences in summary.get("over_baselines", {}).items():
        lines.append(f"over {baseline}")
        for name, found in differences.items():
            old, new, (low, high) = summary["baselines"][baseline][name], summary["after"][name], found["ci95"]
            lines.append(f"{name:{width}}{old:8.3f}{new:8.3f}{found['difference']:+9.3f}   [{low:+.3f}, {high:+.3f}]")
    lines.append(
        f"{summary['n_eval']} held-out questions; trained {summary['train_seconds']:.0f} s on "
        f"{summary['num_processes']} process{'es' if summary['num_processes'] > 1 else ''}"
    )
    lines += [f"{label:8}{folder / name}" for label, name in (("report", "report.html"), ("curves", "curves.png"))]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of what a run depends on, and the commit of a source checkout.

    Returns:
        Name to version; ``commit`` only in a git checkout.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    return found


def command_line() -> str:
    """The command that started this process, without secrets, the recipe's path relative to the current folder."""
    program = Path(sys.argv[0])
    if program.is_absolute():
        program = Path(os.path.relpath(program))
    return shlex.join(["accelerate", "launch", str(program), *without_secrets(sys.argv[1:])])


def peak_memory() -> int:
    """Most memory in use so far: of the accelerator where there is one, else of the process.

    Returns:
        Bytes.
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _truth(value: str | bool | None) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ConfigError(f"resume_from_checkpoint must be true or false (the run folder is output_dir), got {value!r}")


def _read_baselines(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "baselines.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _read_seconds(path: Path) -> float:
    return float(json.loads(path.read_text())["train_seconds"]) if path.is_file() else 0.0


class _AllStepsDone(Exception):
    """A checkpoint of the last step was loaded: transformers 5.23 counts after a step only, and would do one more."""


def _clock(path: Path) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Adds up the seconds of training over interruptions, and ends a training that has nothing left to do."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if 0 < state.max_steps <= state.global_step:
                raise _AllStepsDone
            self.earlier, self.start = (_read_seconds(path) if state.global_step else 0.0), time.time()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                write_whole(path, json.dumps({"train_seconds": self.earlier + time.time() - self.start}))

        on_train_end = on_save

    return Clock()


@contextmanager
def _can_go_on() -> Iterator[None]:
    """Adds to the error of a failed service how the run goes on."""
    try:
        yield
    except BackendError as error:
        raise BackendError(f"{error}; go on with --resume_from_checkpoint true") from error


def _last_step() -> Any:
    import random

    import numpy as np
    import torch
    from transformers import TrainerCallback

    class LastStep(TrainerCallback):  # type: ignore[misc]
        """Remembers the random states after each step, and writes the checkpoint of the last one when asked to."""

        step = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.step = state.global_step
            self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
            self.gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

        def keep(self, trainer: Any) -> None:
            checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{self.step}"
            if not self.step or (checkpoint / "trainer_state.json").is_file():
                return
            random.setstate(self.python)
            np.random.set_state(self.numpy)
            torch.set_rng_state(self.torch)
            if self.gpus:
                torch.cuda.set_rng_state_all(self.gpus)
            trainer._save_checkpoint(trainer.model, None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
            logger.info("step %d is kept", self.step)

    return LastStep()


def _fail_together(trainer: Any) -> Callable[[], bool]:
    """Makes a reward that fails in one process fail in all: the others would wait for it until they are killed.

    Args:
        trainer: of TRL; one without asynchronous rewards is left as it is.

    Returns:
        Tells whether an error was met by all processes.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    met: list[bool] = [True] if state.num_processes == 1 else []

    def together(reward: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapped(**columns: Any) -> Any:
            found, error = None, None
            try:
                found = await reward(**columns)
            except RagRLError as caught:
                error = caught
            if state.device.type == "cuda":  # this is a thread of TRL's, in which the first GPU is the current one
                torch.cuda.set_device(state.device)
            told = gather_object([None if error is None else (isinstance(error, UserError), str(error))])
            first = next((one for one in told if one is not None), None)
            if first is None:
                return found
            met.append(True)
            raise error or (UserError if first[0] else BackendError)(first[1])

        return wrapped

    if not met:
        for i, reward in enumerate(getattr(trainer, "reward_funcs", ())):
            if inspect.iscoroutinefunction(reward):
                trainer.reward_funcs[i] = together(reward)
    return lambda: bool(met)


def _relative_bases(folder: Path) -> Any:
    from transformers import TrainerCallback

    class RelativeBases(TrainerCallback):  # type: ignore[misc]
        """Names the base of a checkpoint's adapter relative to it; resuming reads the adapter's weights only."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                # All of them: a kill may have come between the saving of the last one and this.
                for checkpoint in folder.glob("checkpoint-*"):
                    make_base_relative(checkpoint)

    return RelativeBases()
