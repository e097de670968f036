"""The learning table of ``recipes/grpo_generator.py``: three seeds, a constant reward, and controls on the retrieval.

    python tools/learning_table.py --seeds 1 2 3

Runs the tiny config exactly as shipped, once a seed, then with a constant reward; then asks the first seed's trained
model again with a shuffled index and without any passage. Finished runs are not run again. Prints rows for a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "grpo_generator.py"
METRICS = ("em", "f1", "contains_em", "format")


def run(folder: Path, *flags: str) -> dict[str, Any]:
    """Runs the recipe, or finds it finished; returns its metrics."""
    command = [sys.executable, str(RECIPE), "--output_dir", str(folder), "--resume_from_checkpoint", "true", *flags]
    subprocess.run(command, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def row(name: str, summary: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [name]
    for metric in METRICS:
        low, high = summary["ci95"][metric]
        before, after = summary["before"][metric], summary["after"][metric]
        cells.append(f"{before:.3f} -> {after:.3f} [{low:+.3f}, {high:+.3f}]")
    return f"| {' | '.join(cells)} | {summary['n_eval']} | {summary['train_seconds']:.0f} |"


def controls(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics of a finished run's model on its held-out questions, with other passages and with none."""
    import yaml

    from rag_rl.ask import open_run
    from rag_rl.config.arguments import DataArguments
    from rag_rl.config.parts import build_questions
    from rag_rl.evaluation.scoring import evaluate

    settings = yaml.safe_load((folder / "resolved_config.yaml").read_text())
    names = {field.name for field in dataclasses.fields(DataArguments)}
    data = DataArguments(**{name: value for name, value in settings.items() if name in names})
    _, held_out = build_questions(data, seed=settings["seed"])
    changes: dict[str, dict[str, Any]] = {
        "as trained": {},
        "shuffled index": {"retriever_shuffled": True},
        "no retrieval": {"retriever_name": "none"},
    }
    found = {}
    for name, changed in changes.items():
        found[name] = evaluate(open_run(folder, **changed).assembly, held_out).metrics
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    args = parser.parse_args()
    lines = []
    for seed in args.seeds:
        lines.append(row(f"seed {seed}", run(args.out / f"grpo_generator-seed{seed}", "--seed", str(seed))))
    for seed in args.seeds:
        flags = ["--seed", str(seed), "--reward_names", "constant", "--reward_weights", "1.0", "--max_steps", "30"]
        lines.append(row(f"constant reward, seed {seed}", run(args.out / f"grpo_generator-constant{seed}", *flags)))
    print(f"| run | {' | '.join(METRICS)} | n | train s |\n|{'---|' * (len(METRICS) + 3)}")
    print("\n".join(lines))
    for name, metrics in controls(args.out / f"grpo_generator-seed{args.seeds[0]}").items():
        print(f"{name}: " + "  ".join(f"{metric} {metrics[metric]:.3f}" for metric in METRICS))


if __name__ == "__main__":
    main()
