"""Pairs a second of ``RerankerTrainer`` against sentence-transformers' own ``CrossEncoderTrainer``, in one run.

Both sides train the tiny cross-encoder on the same documents of the same queries in the same order, all pairs of a
batch in one forward pass. Ours draws the documents of each query when it is used, and has the margin loss; theirs
reads the documents of the first epoch from a data set and has its own RankNetLoss. Short trainings of one epoch are
interleaved in pairs; the ratio is the median over the pairs, with a bootstrap interval. Bound: at least 0.97 of their
speed (holds where the interval's upper end reaches it).

    python benchmarks/reranker.py --pairs 7 --queries 128
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np

BOUND = 0.97


def build(queries: int, folder: str) -> tuple[Any, Any, int]:
    """Our trainer and theirs over the same pairs, and how many pairs an epoch has."""
    import torch
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer
    from sentence_transformers.cross_encoder.losses import RankNetLoss
    from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments

    from rag_rl.data import PairRow, PairSampler, load_corpus, load_questions
    from rag_rl.tiny import FOLDER
    from rag_rl.trainers.cross_encoder_adapters import load_cross_encoder
    from rag_rl.trainers.reranker_config import RerankerConfig
    from rag_rl.trainers.reranker_trainer import RerankerTrainer

    corpus = {passage.doc_id: passage for passage in load_corpus(str(FOLDER / "data" / "corpus.jsonl"))}
    others = list(corpus.values())[:20]
    asked = load_questions(str(FOLDER / "data" / "demo_1hop.jsonl"))[:queries]
    rows = []
    for question in asked:
        gold = corpus[question.gold_doc_ids[0]]
        rows.append(PairRow(question.question, (gold,), tuple(other for other in others if other is not gold)))
    sampler = PairSampler(rows, negatives=7, hard_share=0.5, seed=42)
    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10_000,
        "seed": 42,
    }
    if not torch.cuda.is_available():
        settings |= {"use_cpu": True, "bf16": False}
    name = str(FOLDER / "encoder")
    ours = RerankerTrainer(
        model=load_cross_encoder(name), args=RerankerConfig(output_dir=f"{folder}/ours", **settings), pairs=sampler
    )
    drawn = [sampler.draw(number, 0) for number in range(len(rows))]
    model = load_cross_encoder(name)
    theirs = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(output_dir=f"{folder}/theirs", **settings),
        train_dataset=Dataset.from_dict(
            {
                "query": [query for query, _, _ in drawn],
                "documents": [texts for _, texts, _ in drawn],
                "labels": [labels for _, _, labels in drawn],
            }
        ),
        loss=RankNetLoss(model, mini_batch_size=-1),
    )
    return ours, theirs, sum(len(texts) for _, texts, _ in drawn)


def timed(trainer: Any) -> float:
    """Seconds of one epoch."""
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="interleaved measurements of both sides")
    parser.add_argument("--queries", type=int, default=128, help="queries an epoch, at most 840")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, n_pairs = build(args.queries, folder)
        timed(ours), timed(theirs)  # warm up
        ratios = []
        for i in range(args.pairs):
            order = (ours, theirs) if i % 2 == 0 else (theirs, ours)
            seconds = {id(trainer): timed(trainer) for trainer in order}
            ratios.append(seconds[id(theirs)] / seconds[id(ours)])
            speed = n_pairs / seconds[id(ours)]
            print(f"pair {i + 1}: ours / theirs {ratios[-1]:.3f} ({speed:.0f} pairs a second)", file=sys.stderr)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    verdict = "OK" if high >= BOUND else "MISS"
    print(
        f"pairs a second, ours / CrossEncoderTrainer: {np.median(ratios):.3f} [{low:.3f}, {high:.3f}] "
        f"bound {BOUND} {verdict}"
    )


if __name__ == "__main__":
    main()
