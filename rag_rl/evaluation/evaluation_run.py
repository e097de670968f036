"""The life of an evaluation: its folder, where it goes on, and what it leaves behind.

The folder is read by ``rag-rl compare`` and ``rag-rl show``; docs/data_formats.md describes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_rl.errors import RunFolderError
from rag_rl.evaluation.comparison import compare, comparison_table, open_sides
from rag_rl.evaluation.comparison_page import write_comparison
from rag_rl.evaluation.evaluating import differences, evaluate_to_file, summarise
from rag_rl.evaluation.measuring import Measured
from rag_rl.evaluation.row_files import ScoreTable
from rag_rl.evaluation.scoring import Evaluable
from rag_rl.run import (
    command_line,
    config_source,
    join_processes,
    keep_settings,
    leave_finished,
    main_process_only,
    peak_memory,
    versions,
    write_whole,
)
from rag_rl.types import Question

if TYPE_CHECKING:
    from rag_rl.config.assemblies import AssemblyPlan

logger = logging.getLogger(__name__)

# What may differ between an evaluation and its continuation, beside what may in every run.
_RUNTIME = (
    "config",
    "output_dir",
    "evaluation_batch_size",
    "evaluation_baselines",
    "evaluation_closed_prompt",
    "evaluation_one_shot_prompt",
    "evaluation_one_shot_top_k",
    "evaluation_marker",
)


@dataclass
class EvaluationRun:
    """One evaluation of an assembly.

    Attributes:
        folder: where everything goes.
        config: stem of the config's file.
        plan: what the assembly is built from.
    """

    folder: Path
    config: str
    plan: AssemblyPlan

    def evaluate(
        self, assembly: Evaluable, questions: Sequence[Question], *, baselines: Mapping[str, Evaluable] | None = None
    ) -> dict[str, Any]:
        """Has every question answered by the assembly and by each baseline, and writes ``metrics.json`` at the end.

        Args:
            assembly: what is evaluated.
            questions: to evaluate on.
            baselines: other ways to answer them, by name.

        Returns:
            The content of ``metrics.json``.

        Raises:
            BackendError: a service or the disk failed; the same command goes on from there.
            RunFolderError: the rows in the folder are about other questions.
        """
        size = self.plan.evaluation.evaluation_batch_size
        table = evaluate_to_file(Measured(assembly), questions, self.folder / "rows.jsonl", batch_size=size)
        others: dict[str, ScoreTable] = {}
        for name, baseline in (baselines or {}).items():
            path = self.folder / f"baseline_{name}.jsonl"
            others[name] = evaluate_to_file(Measured(baseline), questions, path, batch_size=size)
        summary = self._summary(table, others)
        with main_process_only() as main:
            if main:
                write_whole(self.folder / "metrics.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def report(self) -> None:
        """Writes ``report.html``, and prints the table and where the files are."""
        with main_process_only() as main:
            if not main:
                return
            plan = self.plan.evaluation
            sides = [
                replace(side, name=side.what.removeprefix("baseline_"))
                for side in open_sides(str(self.folder), baselines=True)
            ]
            comparison = compare(sides)
            write_comparison(
                self.folder / "report.html",
                comparison,
                title=f"evaluate_rag, {self.config}",
                n_examples=plan.report_examples,
                command=command_line(),
            )
            print(comparison_table(comparison))  # noqa: T201 - what the user waited for
            for label, file in (("report", "report.html"), ("rows", "rows.jsonl")):
                print(f"{label:8}{self.folder / file}")  # noqa: T201

    def _summary(self, table: ScoreTable, others: Mapping[str, ScoreTable]) -> dict[str, Any]:
        from accelerate import PartialState

        tables = [one for one in (table, *others.values()) if "seconds" in one.columns]
        return {
            "recipe": "evaluate_rag",
            "config": self.config,
            "seed": self.plan.evaluation.seed,
            "status": "complete",
            **summarise(table),
            "baselines": {name: one.means() for name, one in others.items()},
            "over_baselines": {name: differences(one, table) for name, one in others.items()},
            "num_processes": PartialState().num_processes,
            "eval_seconds": sum(float(np.nansum(one.columns["seconds"])) for one in tables),
            "peak_memory_bytes": peak_memory(),
        }


def start_evaluation(
    recipe_file: str, arguments: Sequence[type[Any]], *, argv: Sequence[str] | None = None
) -> EvaluationRun:
    """Parses the command line, reads the runs that parts come from, and opens the folder.

    The same settings go on where the evaluation was stopped; further baselines may be named at any time.

    Args:
        recipe_file: the recipe's ``__file__``.
        arguments: dataclasses to fill, those of ``rag_rl.config.assemblies.ARGUMENTS``.
        argv: command line; None for the process's own.

    Returns:
        The evaluation.

    Raises:
        SystemExit: code 0 where this very evaluation is already finished.
        ConfigError: as in ``read_plan``.
        RunFolderError: the folder holds something else, or a part's folder no finished run of it.
    """
    from accelerate.utils import wait_for_everyone

    from rag_rl.config.assemblies import read_plan

    plan = read_plan(recipe_file, arguments, argv=argv)
    join_processes()
    config = config_source(argv, recipe_file).stem
    folder = Path(plan.evaluation.output_dir or f"runs/evaluate_rag-{config}")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir {folder} is a file: give another --output_dir")
    recorded = folder / "resolved_config.yaml"
    if folder.is_dir() and not recorded.is_file() and any(not f.name.endswith(".part") for f in folder.iterdir()):
        raise RunFolderError(f"output_dir {folder} is not empty and holds no run: give another --output_dir")
    wait_for_everyone()  # all have looked before one writes
    settings = {"recipe": "evaluate_rag", "config": config, **plan.settings}
    done = folder / "metrics.json"
    with main_process_only() as main:
        if main:
            if not _begun(folder):  # stopped before anything was answered, for instance by bad data
                recorded.unlink(missing_ok=True)
            keep_settings(recorded, settings, holds="an evaluation", ignore=_RUNTIME)
    if done.is_file():
        known = json.loads(done.read_text(encoding="utf-8")).get("baselines") or {}
        if set(plan.evaluation.evaluation_baselines) <= set(known):
            leave_finished(folder)
    logger.info("run folder: %s (%s)", folder, ", ".join(f"{k} {v}" for k, v in list(versions().items())[:2]))
    return EvaluationRun(folder, config, plan)


def _begun(folder: Path) -> bool:
    """Whether any question has been answered."""
    written = [path for pattern in ("rows.jsonl", ".rows.*.part") for path in folder.glob(pattern)]
    return any(path.stat().st_size for path in written)
