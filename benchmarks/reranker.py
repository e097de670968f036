"""Pairs a second of ``RerankerTrainer`` against sentence-transformers' own ``CrossEncoderTrainer``, in one run.

Both sides train the tiny cross-encoder on the same documents of the same queries in the same order, all pairs of a
batch in one forward pass. Ours draws the documents of each query when it is used, and has the margin loss; theirs
reads them from a data set and has its own RankNetLoss.

Both trainings run at once, each in a thread of its own, and hand the machine over after every few steps: whole
training loops are compared, in blocks so short that other work on the machine meets both alike. Nothing but the block
of one side runs while it is timed. The ratio is the median over the pairs of blocks, with a bootstrap interval. Bound:
at least 0.97 of their speed (holds where the interval's upper end reaches it).

    python benchmarks/reranker.py --blocks 60 --steps 4
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

BOUND = 0.97
BATCH = 16
WARM_UP = 2


class Turns:
    """Lets two threads take turns, and times each turn by the clock on the wall and by that of the processor."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.turn = 0
        self.finished = [False, False]
        self.seconds: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        self.started = (0.0, 0.0)

    def wait_for(self, side: int) -> None:
        """Returns when it is this side's turn."""
        with self.condition:
            self.condition.wait_for(lambda: self.turn == side or self.finished[1 - side])
        self.started = (time.perf_counter(), time.process_time())

    def hand_over(self, side: int, *, last: bool = False) -> None:
        """Notes how long the turn took, and passes it on."""
        spent = (time.perf_counter() - self.started[0], time.process_time() - self.started[1])
        with self.condition:
            if not last:
                self.seconds[side].append(spent)
            self.finished[side] = last
            self.turn = 1 - side
            self.condition.notify_all()


def taking_turns(turns: Turns, side: int, steps: int) -> Any:
    """A trainer's callback that hands over after every few steps."""
    import torch
    from transformers import TrainerCallback

    class TakingTurns(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait_for(side)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                turns.hand_over(side)
                turns.wait_for(side)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            turns.hand_over(side, last=True)

    return TakingTurns()


def build(blocks: int, steps: int, turns: Turns, folder: str) -> tuple[Any, Any, int]:
    """Our trainer and theirs over the same pairs, and how many pairs a block has."""
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
    asked = load_questions(str(FOLDER / "data" / "demo_1hop.jsonl"))[: 40 * BATCH]
    rows = []
    for question in asked:
        gold = corpus[question.gold_doc_ids[0]]
        rows.append(PairRow(question.question, (gold,), tuple(other for other in others if other is not gold)))
    sampler = PairSampler(rows, negatives=7, hard_share=0.5, seed=42)

    class FirstEpoch:
        """Draws in every epoch what the first one has: theirs has it in a data set."""

        def __len__(self) -> int:
            return len(sampler)

        def draw(self, number: int, epoch: int) -> Any:
            del epoch
            return sampler.draw(number, 0)

    settings: dict[str, Any] = {
        "max_steps": (blocks + WARM_UP) * steps,
        "per_device_train_batch_size": BATCH,
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
        model=load_cross_encoder(name),
        args=RerankerConfig(output_dir=f"{folder}/ours", **settings),
        pairs=FirstEpoch(),
        callbacks=[taking_turns(turns, 0, steps)],
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
        callbacks=[taking_turns(turns, 1, steps)],
    )
    return ours, theirs, 8 * BATCH * steps


def shown(ratios: Any) -> tuple[str, float]:
    """Median with its bootstrap interval, and the upper end of that."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]", float(high)


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=60, help="timed blocks of each side")
    parser.add_argument("--steps", type=int, default=4, help="steps a block")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, n_pairs = build(args.blocks, args.steps, turns, folder)
        failures: list[BaseException] = []

        def train(trainer: Any, side: int) -> None:
            try:
                trainer.train()
            except BaseException as error:  # the other thread would wait for ever
                failures.append(error)
                turns.hand_over(side, last=True)

        threads = [threading.Thread(target=train, args=(trainer, side)) for side, trainer in enumerate((ours, theirs))]
        # A collection of garbage walks through all that both have built, and would be paid by whoever is there.
        gc.collect()
        gc.freeze()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
    mine, other = (np.array(seconds[WARM_UP:]) for seconds in turns.seconds)  # (blocks, 2)
    # Each of their blocks against the two of ours around it, so that a drift of the machine's speed cancels.
    mine, other = (mine[:-1] + mine[1:]) / 2, other[: len(mine) - 1]
    ratios = other / mine
    print(f"{n_pairs / np.median(mine[:, 0]):.0f} pairs a second, of ours", file=sys.stderr)
    print(f"by processor time: {shown(ratios[:, 1])[0]}", file=sys.stderr)
    text, high = shown(ratios[:, 0])
    verdict = "OK" if high >= BOUND else "MISS"
    print(f"pairs a second, ours / CrossEncoderTrainer: {text} bound {BOUND} {verdict}")


if __name__ == "__main__":
    main()
