"""The learning table of a recipe: three seeds of its tiny config, a constant reward, and what else its claims need.

    python tools/learning_table.py grpo_generator --seeds 1 2 3
    python tools/learning_table.py grpo_retriever --seeds 1 2 3
    python tools/learning_table.py sft_reasoner --seeds 1 2 3
    python tools/learning_table.py ppo_reasoner --seeds 1 2 3     (after grpo_generator and sft_reasoner)
    python tools/learning_table.py grpo_reasoner --seeds 1 2 3    (the same)
    python tools/learning_table.py train_reranker --seeds 1 2 3   (grpo_reranker, dpo_augmenter, distill_retriever,
                                                                   self_boost: the same)

Runs the tiny config exactly as shipped, once a seed, then with a constant reward where there is one. For the
generator the first seed's trained model is asked again with a shuffled index and without any passage; for the
retriever the config without history and the REPLUG baseline are run as well, for distillation contrastive training on
the same queries, for the supervised reranker training on labels that were drawn by lot; the reasoner is also trained
from the cold start of the same seed, and measured against a trained generator. Finished runs are not run again. Prints
rows for a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rag_rl.data import PairRow

ROOT = Path(__file__).resolve().parents[1]
METRICS: dict[str, tuple[str, ...]] = {
    "grpo_generator": ("em", "f1", "contains_em", "format"),
    "grpo_retriever": ("f1", "em", "success@3", "all_gold@3"),
    "sft_reasoner": ("em", "f1", "format", "searches"),
    "ppo_reasoner": ("em", "f1", "format", "searches"),
    "grpo_reasoner": ("em", "f1", "format", "searches"),
    **dict.fromkeys(("train_reranker", "grpo_reranker"), ("ndcg@10", "mrr@10", "pairwise_accuracy")),
    **dict.fromkeys(("dpo_augmenter", "distill_retriever", "self_boost"), ("ndcg@10", "mrr@10", "recall@10")),
}
SHORT = ("--max_steps", "30")
# One question, asked once, of a generator that was trained to answer so: a chain has to beat it as well.
ONE_SHOT = ("--reasoner_baseline_model", "{out}/grpo_generator-seed{seed}")
THREE = ("--reasoner_baseline_top_k", "3")
# What is run once a seed, after the tiny config itself: name and flags.
FURTHER: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo_generator": {"constant reward": ("--reward_names", "constant", "--reward_weights", "1.0", *SHORT)},
    "grpo_retriever": {
        "no history": ("--config", "tiny_no_history"),
        # Each candidate of each state is read alone, so a step of it costs many times one of GRPO: fewer questions.
        "REPLUG": ("--objective", "replug", "--num_generations", "2", "--per_device_train_batch_size", "16", *SHORT),
        "constant reward": ("--reader_reward", "constant", *SHORT),
    },
    # A chain of grpo_reasoner is one conversation, and so is its cold start.
    "sft_reasoner": {"as a conversation": ("--reasoner_layout", "chat")},
    "ppo_reasoner": {
        "from SFT": (*ONE_SHOT, "--model_name_or_path", "{out}/sft_reasoner-seed{seed}"),
        # The tiny reader was taught on three passages: its best chance, though a chain sees more.
        "constant reward": ("--step_reward", "constant", "--max_steps", "8", *ONE_SHOT, *THREE),
    },
    "grpo_reasoner": {
        "from SFT": (*ONE_SHOT, "--model_name_or_path", "{out}/sft_reasoner-as_a_conversation{seed}"),
        "constant reward": ("--step_reward", "constant", "--max_steps", "8", *ONE_SHOT, *THREE),
    },
    "distill_retriever": {"contrastive": ("--distill_teacher", "none")},
    "train_reranker": {
        "drawn labels": ("--train_file", "{out}/drawn/train.jsonl", "--valid_file", "{out}/drawn/valid.jsonl")
    },
}


def draw_labels(rows: Iterable[PairRow]) -> list[PairRow]:
    """The same lists of documents, with one of each, drawn by lot, as its only positive."""
    lots, drawn = random.Random(0), []
    for row in rows:
        listed = [*row.positives, *row.negatives]
        chosen = listed.pop(lots.randrange(len(listed)))
        drawn.append(dataclasses.replace(row, positives=(chosen,), negatives=tuple(listed)))
    return drawn


def write_drawn(folder: Path, target: Path) -> None:
    """Mines the rows of a finished run of train_reranker again, and writes them with drawn labels to learn from."""
    from rag_rl.ask import read_settings
    from rag_rl.config import fill
    from rag_rl.config.arguments import DataArguments, RetrieverArguments
    from rag_rl.config.reranker_arguments import RerankerArguments
    from rag_rl.config.rerankers import build_pairs
    from rag_rl.data import write_pairs

    settings = read_settings(folder)
    rows, held_out = build_pairs(
        fill(RerankerArguments, settings),
        fill(DataArguments, settings),
        fill(RetrieverArguments, settings),
        seed=settings["seed"],
    )
    target.mkdir(parents=True, exist_ok=True)
    write_pairs(target / "train.jsonl", draw_labels(rows))
    write_pairs(target / "valid.jsonl", held_out)


def run(recipe: str, folder: Path, *flags: str) -> dict[str, Any]:
    """Runs the recipe, or finds it finished; returns its metrics."""
    script = ROOT / "recipes" / f"{recipe}.py"
    command = [sys.executable, str(script), "--output_dir", str(folder), "--resume_from_checkpoint", "true", *flags]
    subprocess.run(command, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def row(name: str, summary: dict[str, Any], metrics: Sequence[str]) -> str:
    """One line of the table."""
    cells = [name]
    for metric in metrics:
        low, high = summary["ci95"][metric]
        before, after = summary["before"][metric], summary["after"][metric]
        cells.append(f"{before:.3f} -> {after:.3f} [{low:+.3f}, {high:+.3f}]")
    return f"| {' | '.join(cells)} | {summary['n_eval']} | {summary['train_seconds']:.0f} |"


def controls(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics of a finished run's model on its held-out questions, with other passages and with none."""
    from rag_rl.ask import open_run, read_settings
    from rag_rl.config import fill
    from rag_rl.config.arguments import DataArguments
    from rag_rl.config.parts import build_questions
    from rag_rl.evaluation.scoring import evaluate

    settings = read_settings(folder)
    _, held_out = build_questions(fill(DataArguments, settings), seed=settings["seed"])
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
    parser.add_argument("recipe", choices=METRICS, nargs="?", default="grpo_generator")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    parser.add_argument(
        "--only",
        choices=["seed", *{kind: None for kinds in FURTHER.values() for kind in kinds}],
        nargs="+",
        help="kinds of runs",
    )
    args = parser.parse_args()
    metrics = METRICS[args.recipe]
    kinds: dict[str, tuple[str, ...]] = {"seed": (), **FURTHER.get(args.recipe, {})}
    lines, baselines = [], []
    first = args.out / f"{args.recipe}-seed{args.seeds[0]}"
    for kind, flags in kinds.items():
        if args.only and kind not in args.only:
            continue
        if kind == "drawn labels":
            write_drawn(first, args.out / "drawn")
        for seed in args.seeds:
            folder = args.out / f"{args.recipe}-{kind.replace(' ', '_').lower()}{seed}"
            filled = [flag.format(out=args.out, seed=seed) for flag in flags]
            summary = run(args.recipe, folder, "--seed", str(seed), *filled)
            lines.append(row(f"{kind} {seed}", summary, metrics))
            baselines += [
                f"{kind} {seed}, {name}: " + "  ".join(f"{m} {found[m]:.3f}" for m in metrics if m in found)
                for name, found in summary.get("baselines", {}).items()
            ]
    print(f"| run | {' | '.join(metrics)} | n | train s |\n|{'---|' * (len(metrics) + 3)}")
    print("\n".join(lines + baselines))
    if args.recipe == "grpo_generator":
        for name, found in controls(first).items():
            print(f"{name}: " + "  ".join(f"{metric} {found[metric]:.3f}" for metric in metrics))


if __name__ == "__main__":
    main()
