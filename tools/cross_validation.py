"""Cross-validation of a retriever's or a reranker's config: every question is held out once, rankings are pooled.

    python tools/cross_validation.py grpo_retriever --config minilm_scifact --folds 3 --seed 1 --baseline mnrl
    python tools/cross_validation.py train_reranker --config minilm_scifact --folds 3 --only 0 1

Runs the recipe once a fold, through its command line, into <out>/<config>/fold<i>. Finished folds are not run again,
an interrupted one goes on. Flags that are not listed here go to the recipe.

The baseline fine-tunes the same encoder with sentence-transformers' MultipleNegativesRankingLoss on (question, gold
passage) pairs of the same folds. That trains both sides, so it embeds the corpus anew; then the same code scores it.
It is for configs of grpo_retriever that search once (reader_name none). What a reranker stands against is the order of
its retriever.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rag_rl.config.arguments import DataArguments, QueryEncoderArguments, ReaderArguments, RetrieverArguments
from rag_rl.evaluation.scoring import Row, confidence_intervals, evaluate, mean_metrics, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
BASELINE_EPOCHS, BASELINE_BATCH, BASELINE_RATE = 2, 32, 2e-5
# What a recipe trains, in the first column of the table.
TRAINED = {"grpo_retriever": "GRPO", "train_reranker": "cross-encoder", "grpo_reranker": "reinforced cross-encoder"}
T = TypeVar("T")


def run_fold(recipe: str, folder: Path, *flags: str) -> None:
    """Runs the recipe on one fold, or finds it finished."""
    script = ROOT / "recipes" / f"{recipe}.py"
    command = [sys.executable, str(script), "--output_dir", str(folder), "--resume_from_checkpoint", "true", *flags]
    subprocess.run(command, check=True, cwd=ROOT)


def run_baseline(fold: Path, seed: int, *, bf16: bool) -> None:
    """Fine-tunes, embeds the corpus and searches, from the settings of a finished fold; or finds it finished."""
    folder = fold / "mnrl"
    if (folder / "seconds.json").is_file():
        return
    import torch

    from rag_rl.config.parts import build_questions, build_search, build_trained_questions

    settings = yaml.safe_load((fold / "resolved_config.yaml").read_text())
    data, retriever = chosen(DataArguments, settings), chosen(RetrieverArguments, settings)
    reader = chosen(ReaderArguments, settings)
    if reader.reader_name != "none":
        raise SystemExit(f"--baseline mnrl needs a config with reader_name none, not {reader.reader_name}")
    frozen = build_search(retriever, data, reader, QueryEncoderArguments())
    train, held_out = build_questions(data, seed=settings["seed"], require_answers=False)
    train = build_trained_questions(train, frozen, what="training")
    held_out = build_trained_questions(held_out, frozen, what="held-out")
    texts = gold_texts(frozen.retriever.passages, {doc_id for q in train for doc_id in q.gold_doc_ids})
    encoder = frozen.encoder.encoder
    pairs = [
        (encoder.query_prompt + q.question, encoder.document_prompt + texts[doc_id])
        for q in train
        for doc_id in q.gold_doc_ids
    ]
    started = time.perf_counter()
    fine_tune(encoder.model, pairs, folder / "training", seed, bf16=bf16)
    seconds = {"train": time.perf_counter() - started}
    encoder.model.save_pretrained(str(folder / "model"))
    tuned = dataclasses.replace(
        retriever, retriever_encoder=str(folder / "model"), retriever_index_path=str(folder / "index")
    )
    started = time.perf_counter()
    with torch.autocast(encoder.model.device.type, torch.bfloat16, enabled=bf16):
        search = build_search(tuned, data, reader, QueryEncoderArguments())
        seconds["index"] = time.perf_counter() - started
        write_rows(folder / "after.jsonl", evaluate(search, held_out).rows)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def fine_tune(model: Any, pairs: Sequence[tuple[str, str]], folder: Path, seed: int, *, bf16: bool) -> None:
    """Trains a model in place on (question, passage) pairs."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    questions, passages = zip(*pairs, strict=True)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=BASELINE_EPOCHS,
        per_device_train_batch_size=BASELINE_BATCH,
        learning_rate=BASELINE_RATE,
        warmup_steps=0.1,
        # Two questions with the same gold passage in one batch would be each other's negatives.
        batch_sampler="no_duplicates",
        seed=seed,
        bf16=bf16,
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        report_to="none",
    )
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"anchor": list(questions), "positive": list(passages)}),
        loss=MultipleNegativesRankingLoss(model),
    ).train()
    model.eval()


def gold_texts(passages: Sequence[Any], wanted: set[str]) -> dict[str, str]:
    """Contents of the wanted documents; of one that was cut into chunks, the first chunk."""
    found: dict[str, str] = {}
    for number in range(len(passages)):
        passage = passages[number]
        if passage.doc_id in wanted:
            found.setdefault(passage.doc_id, passage.contents)
    return found


def chosen(kind: type[T], settings: dict[str, Any]) -> T:
    """One group of arguments out of a run's settings."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in settings.items() if name in names})


def new_documents(folds: Sequence[Sequence[Row]]) -> set[str]:
    """Ids of the questions none of whose gold documents is one of a question of another fold.

    What a model learns of a document helps with every question about it: on these questions it cannot.
    """
    found = set()
    for number, rows in enumerate(folds):
        elsewhere = {
            d for other, fold in enumerate(folds) if other != number for row in fold for d in row["gold_doc_ids"]
        }
        found |= {row["qid"] for row in rows if not elsewhere & set(row["gold_doc_ids"])}
    return found


def table(before: Sequence[Row], after: Sequence[Row], name: str, seconds: str) -> list[str]:
    """Lines of the table, one a metric."""
    old, new, intervals = mean_metrics(before), mean_metrics(after), confidence_intervals(before, after)
    return [
        f"| {name} | {metric} | {old[metric]:.3f} | {new[metric]:.3f} | {new[metric] - old[metric]:+.3f} "
        f"[{low:+.3f}, {high:+.3f}] | {len(before)} | {seconds} |"
        for metric, (low, high) in intervals.items()
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", choices=TRAINED)
    parser.add_argument("--config", required=True)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument(
        "--only", type=int, nargs="+", help="only these folds, from 0; every question of them is held out"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--baseline", choices=["mnrl"])
    parser.add_argument("--baseline-folds", type=int, help="only so many folds of the baseline, the first ones")
    parser.add_argument("--baseline-bf16", action="store_true", help="train and embed the baseline in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/folds"))
    args, flags = parser.parse_known_args()
    if args.baseline and args.recipe != "grpo_retriever":
        parser.error("--baseline mnrl fine-tunes a retriever: it goes with grpo_retriever")
    numbers = args.only or range(args.folds)
    # Two recipes may have a config of one name.
    kind = Path(args.config).stem if args.recipe == "grpo_retriever" else f"{args.recipe}-{Path(args.config).stem}"
    folders = [args.out.resolve() / kind / f"fold{number}" for number in numbers]
    for number, folder in zip(numbers, folders, strict=True):
        fold = ("--data_folds", str(args.folds), "--data_fold", str(number), "--seed", str(args.seed))
        run_fold(args.recipe, folder, "--config", args.config, *fold, *flags)
    before, after = ([read_rows(folder / f"{when}.jsonl") for folder in folders] for when in ("before", "after"))
    seconds = [json.loads((folder / "metrics.json").read_text())["train_seconds"] for folder in folders]
    sides = [(TRAINED[args.recipe], before, after, f"{min(seconds):.0f} to {max(seconds):.0f}")]
    if args.baseline:
        compared = folders[: args.baseline_folds]
        for folder in compared:
            run_baseline(folder, args.seed, bf16=args.baseline_bf16)
        times = [json.loads((folder / "mnrl" / "seconds.json").read_text()) for folder in compared]
        shown = " + ".join(f"{sum(t[part] for t in times) / len(times):.0f} ({part})" for part in ("train", "index"))
        rows = [read_rows(folder / "mnrl" / "after.jsonl") for folder in compared]
        sides.append(("MNRL", before[: len(compared)], rows, shown))
    # With some folds only, nobody here knows what the others, which were trained on, name.
    new = new_documents(before) if len(set(numbers)) == args.folds else set()
    print("| | metric | before | trained | difference | n | seconds a fold |\n|---|---|---|---|---|---|---|")
    for name, old_folds, new_folds, spent in sides:
        old, trained = ([row for fold in folds for row in fold] for folds in (old_folds, new_folds))
        print("\n".join(table(old, trained, name, spent)))
        old, trained = ([row for row in rows if row["qid"] in new] for rows in (old, trained))
        if old:
            print("\n".join(table(old, trained, f"{name}, documents of no training question", spent)))


if __name__ == "__main__":
    main()
