"""What a training step of ``RetrieverGRPOTrainer`` costs beside its encoder: ratios, both sides timed in one run.

    taskset -c 1 python benchmarks/retriever_grpo.py [--quick] [--pairs 9] [--threads 1] [--only lookups,step]

Both steps are 128 trajectories of 16 questions with 3 hops, 30 candidates and 1024 dimensions, and go through the
trainer's own methods: ``_sample`` (with a scripted environment, so that no reader is in it), ``_prepare``,
``compute_loss`` and the backward pass. No optimiser step: both sides of a pair would have the same.

- look-ups: the step without an encoder (the query vectors stand in a table, all 384 states differ) against the same
  step with the document vectors from a store that answers one look-up a hop with lists of Python floats, which are
  turned into a tensor, as in the authors' code. The store is a dictionary in this process: its network, and the
  decoding of what comes over it, would come on top. Searching is given to both sides. At least 20 times, so the
  ratio ours / theirs is at most 0.05.
- step: the whole step with an encoder of 6 layers and 384 dimensions (BERT with random weights, and a projection to
  1024) over 10,000 documents in a flat index, against a forward and backward pass of the encoder alone over the same
  distinct texts, in the same batches. At most 1.15 times: the pass that samples is also that of the loss.

Rows: the median of ours / theirs over interleaved pairs (ours, theirs, theirs, ours, ...), an interval of that median
(bootstrap over pairs, 95%) and the bound, which holds where the lower end of the interval is within it. One thread is
timed by the processor's clock, so that what else runs on the machine counts less; several threads by the wall's.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, InputModule, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor
from transformers import BertConfig, BertModel

from rag_rl.reasoning import Environment, Failure, Finish, Observation, Search, Trajectory
from rag_rl.retrieval import HistoryEncoder, SentenceEncoder
from rag_rl.retrieval.flat import FlatBackend
from rag_rl.tiny.tokenizer import build_tokenizer
from rag_rl.trainers.retriever_grpo_config import RetrieverGRPOConfig
from rag_rl.trainers.retriever_grpo_trainer import RetrieverGRPOTrainer
from rag_rl.types import Hit, Passage, Question

QUESTIONS, GROUP, HOPS, CANDIDATES, TOP_K, WIDTH = 16, 8, 3, 30, 3, 1024
DOCUMENTS = 10_000
ENCODED_AT_ONCE = 64  # texts a batch without gradients, as the trainer's


class ScriptedReader:
    """Searches so many times and tells which document came first, so that trajectories go different ways."""

    def __init__(self, query: Callable[[int, Trajectory], str], *, history: bool) -> None:
        self.query, self.history = query, history

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """One more search each, or the end."""
        return [
            Finish(t.hops[-1].observation)
            if len(t.hops) == HOPS
            else Search(t.query(self.query(number, t), history=self.history))
            for number, t in enumerate(trajectories)
        ]

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Hit]]
    ) -> list[Observation | Failure]:
        """The title of the first document."""
        return [Observation(found[0].passage.title, "found") for found in hits]

    def answer(self, trajectories: Sequence[Trajectory]) -> list[str | Failure | None]:
        """Never asked for: ``decide`` gives the answer."""
        return [""] * len(trajectories)


class Passages:
    """Short texts by row."""

    def __init__(self, count: int) -> None:
        self.rows = [Passage(f"d{i}", f"Town {i} lies on the river {i}.", f"Town {i}") for i in range(count)]

    def take(self, rows: Sequence[int]) -> list[Passage]:
        """The passages of rows."""
        return [self.rows[row] for row in rows]


class GivenPools:
    """An index whose search costs nothing: the same pools in the same order at every step."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.matrix = rng.standard_normal((count, WIDTH), dtype=np.float32)
        self.matrix /= np.linalg.norm(self.matrix, axis=1, keepdims=True)
        self.passages = Passages(count)
        states = QUESTIONS * GROUP * HOPS
        self.pools = np.stack([rng.choice(count, CANDIDATES, replace=False) for _ in range(states)])
        self.given = 0

    def __len__(self) -> int:
        return len(self.matrix)

    def search_vectors(self, vectors: np.ndarray, *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The next pools."""
        start = self.given % len(self.pools)
        self.given += len(vectors)
        rows = self.pools[start : start + len(vectors)]
        return np.zeros(rows.shape, dtype=np.float32), rows

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """One gather, as ``DenseRetriever``."""
        return self.matrix[rows]


class LookUps(GivenPools):
    """The same from a store of Python floats, asked once a hop."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.store = {row: vector.tolist() for row, vector in enumerate(self.matrix)}
        self.known: dict[tuple[int, ...], Tensor] = {}

    def search_vectors(self, vectors: np.ndarray, *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The next pools; a new step looks everything up again."""
        if self.given % len(self.pools) == 0:
            self.known.clear()
        return super().search_vectors(vectors, top_k=top_k)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """A look-up a hop, and no second one in the same step."""
        hops = [tuple(hop) for hop in rows.tolist()]
        for hop in hops:
            if hop not in self.known:
                self.known[hop] = torch.tensor(self.look_up(hop))
        return torch.stack([self.known[hop] for hop in hops]).numpy()

    def look_up(self, rows: Sequence[int]) -> list[list[float]]:
        """What a vector store returns."""
        return [self.store[row] for row in rows]


class FlatIndex:
    """A flat index of random vectors, searched as ``DenseRetriever`` does."""

    def __init__(self, count: int) -> None:
        self.matrix = np.random.default_rng(0).standard_normal((count, WIDTH), dtype=np.float32)
        self.matrix /= np.linalg.norm(self.matrix, axis=1, keepdims=True)
        self.passages, self.backend = Passages(count), FlatBackend(self.matrix)

    def __len__(self) -> int:
        return len(self.matrix)

    def search_vectors(self, vectors: np.ndarray, *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products and rows."""
        return self.backend.search(np.ascontiguousarray(vectors), top_k)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """One gather."""
        return self.matrix[rows]


class Step:
    """A trainer, and the step that is timed."""

    def __init__(self, model: SentenceTransformer, index: Any, reader: ScriptedReader, folder: str) -> None:
        self.index = index
        rewards = np.random.default_rng(0).random(QUESTIONS * GROUP).tolist()
        self.rewards = iter(())

        def reward(trajectory: Trajectory) -> float:
            return next(self.rewards)

        self.given = rewards
        self.trainer = RetrieverGRPOTrainer(
            encoder=HistoryEncoder(SentenceEncoder(model, devices="cpu")),
            args=RetrieverGRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=QUESTIONS * GROUP,
                num_generations=GROUP,
                num_candidates=CANDIDATES,
                per_device_eval_batch_size=ENCODED_AT_ONCE // 8,
                use_cpu=True,
                bf16=False,
                report_to="none",
            ),
            index=index,
            environment=Environment(reader, max_hops=HOPS, reward=reward),
            questions=[Question(f"q{i}", question(i), ("x",)) for i in range(QUESTIONS)],
            top_k=TOP_K,
        )
        self.trainer.create_optimizer()

    def __call__(self) -> Tensor:
        """The loss of one step, after its backward pass."""
        trainer = self.trainer
        self.rewards = iter(self.given)
        trainer.model.zero_grad()
        trajectories, states = trainer._sample(trainer.questions, step=0)
        (batch,) = trainer._prepare(trajectories, states, 1)
        assert len(batch.state) == QUESTIONS * GROUP * HOPS
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        trainer._pending.clear()
        return loss.detach()

    def texts_by_hop(self) -> list[list[str]]:
        """What the encoder reads for the first time at each hop."""
        self.rewards = iter(self.given)
        trajectories, states = self.trainer._sample(self.trainer.questions, step=0)
        first = {}
        for trajectory in trajectories:
            for number, hop in enumerate(trajectory.hops):
                first.setdefault(states.texts[hop.action.state], number)
        return [[text for text, number in first.items() if number == hop] for hop in range(HOPS)]


def question(number: int) -> str:
    """A question of three hops."""
    return f"Which river is the home of house {number} on?"


def encoder(folder: str, seed: int = 0) -> SentenceTransformer:
    """Six layers of 384 dimensions with random weights, and a projection to 1024."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(folder)
    transformer.max_seq_length = 256
    projection = Dense(384, WIDTH, bias=False, activation_function=torch.nn.Identity())
    return SentenceTransformer(modules=[transformer, Pooling(384, "mean"), projection, Normalize()], device="cpu")


class Table(InputModule):
    """Looks the vector of a text up, which is its number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        vectors = np.random.default_rng(1).standard_normal((count, WIDTH), dtype=np.float32)
        self.vectors = torch.nn.Parameter(torch.from_numpy(vectors))

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Numbers for texts."""
        return {"numbers": torch.tensor([int(text) for text in inputs if text.isdigit()] or [0])}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Vectors for numbers."""
        return {**features, "sentence_embedding": self.vectors[features["numbers"]]}

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return WIDTH

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Nothing is saved."""


def table(count: int) -> SentenceTransformer:
    """An encoder that costs nothing."""
    return SentenceTransformer(modules=[Table(count), Normalize()], device="cpu")


class EncoderAlone:
    """What the encoder has to do for a step, by sentence-transformers alone: forward and backward, once a text."""

    def __init__(self, model: SentenceTransformer, by_hop: list[list[str]]) -> None:
        self.model = model
        self.batches = [
            ordered[start : start + ENCODED_AT_ONCE]
            for ordered in (sorted(hop, key=len) for hop in by_hop)
            for start in range(0, len(ordered), ENCODED_AT_ONCE)
        ]
        count = sum(map(len, self.batches))
        self.grad = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))

    def __call__(self) -> None:
        """Both passes."""
        model = self.model
        model.zero_grad()
        vectors = [model(model.preprocess(batch))["sentence_embedding"] for batch in self.batches]
        torch.cat(vectors).backward(self.grad)


def seconds(call: Callable[[], object], given: argparse.Namespace) -> float:
    """Time of one call."""
    clock = time.process_time if given.threads == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], given: argparse.Namespace
) -> tuple[list[float], float, float]:
    """Ratios of interleaved pairs after an unmeasured one, and the median seconds of both sides."""
    pairs = []
    for number in range(given.pairs + 1):
        # Every second pair the other way round: neither side always runs first.
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        timed = (seconds(first, given), seconds(second, given))
        pairs.append(timed if number % 2 else timed[::-1])
    kept = pairs[1:]
    mine, other = (float(np.median([pair[side] for pair in kept])) for side in (0, 1))
    return [ours_s / theirs_s for ours_s, theirs_s in kept], mine, other


def row(name: str, values: Sequence[float], bound: float | None) -> bool:
    """Prints one line of the table; whether the bound holds."""
    sample = np.random.default_rng(0).choice(np.asarray(values), size=(10_000, len(values)))
    low, high = np.quantile(np.median(sample, axis=1), [0.025, 0.975])
    held = bound is None or low <= bound
    verdict = "" if bound is None else f"<= {bound:.2f}  {'OK' if held else 'MISS'}"
    print(f"{name:<46} {np.median(values):7.4f}  [{low:.4f}, {high:.4f}]  n={len(values):<3} {verdict}", flush=True)
    return held


def look_ups(given: argparse.Namespace, folder: str) -> bool:
    """Everything but the encoder, against per-hop look-ups of Python floats."""
    states, count = QUESTIONS * GROUP * HOPS, 500 if given.quick else 4000
    # Every hop of every trajectory has a state of its own: nothing is saved by what a group shares.
    reader = ScriptedReader(lambda number, t: str(number * HOPS + len(t.hops)), history=False)
    ours = Step(table(states), GivenPools(count), reader, folder)
    theirs = Step(table(states), LookUps(count), reader, folder)
    torch.testing.assert_close(ours(), theirs())
    for one, other in zip(ours.trainer.model.parameters(), theirs.trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    values, mine, other_s = compare(ours, theirs, given)
    held = row("look-ups  ours / per-hop lists of floats", values, 0.05)
    print(f"  {1e3 * mine:.0f} ms against {1e3 * other_s:.0f} ms: {1 / np.median(values):.1f} times")
    return held


def step(given: argparse.Namespace, folder: str) -> bool:
    """The whole step against the encoder alone."""
    model = encoder(str(Path(folder) / "encoder"))
    reader = ScriptedReader(
        lambda number, t: ("Where is the home?", "Who leads it?", "Which river is it?")[len(t.hops)], history=True
    )
    ours = Step(model, FlatIndex(500 if given.quick else DOCUMENTS), reader, folder)
    by_hop = ours.texts_by_hop()
    texts = [text for hop in by_hop for text in hop]
    tokens = sum(int(mask.sum()) for mask in model.preprocess(texts)["attention_mask"])
    print(
        f"step: {' + '.join(str(len(hop)) for hop in by_hop)} distinct states, {tokens / len(texts):.0f} tokens each"
    )
    values, mine, other = compare(ours, EncoderAlone(model, by_hop), given)
    held = row("step  ours / encoder, forward and backward", values, 1.15)
    print(f"  {mine:.2f} s against {other:.2f} s")
    return held


def main() -> int:
    """Prints the table; 1 if a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few documents; shows that it runs, not how fast")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs, at least 7")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--only", default="lookups,step", help="rows to measure")
    given = parser.parse_args()
    if given.pairs < 7:
        parser.error(f"--pairs must be at least 7, got {given.pairs}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores" if hasattr(os, "sched_getaffinity") else ""
    print(f"threads: {torch.get_num_threads()}, {cores}, {platform.machine()}, torch {torch.__version__}")
    print(f"{'':<46} {'median':>7}  interval")
    held = []
    with tempfile.TemporaryDirectory() as folder:
        if "lookups" in given.only:
            held.append(look_ups(given, folder))
        if "step" in given.only:
            held.append(step(given, folder))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
