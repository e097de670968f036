"""What an evaluation costs beside generator and retriever, and whether its memory grows with the questions.

Stubs answer at once: a generator that says the same to every prompt, and a retriever that gives every question the
same ten passages. What is left is ours: prompts, reading answers, scores, rows on the disk, the joined file, means and
their intervals. Bound: at most 0.3 ms a question at 10,000 questions, as the median of several runs (holds where the
lower end of its interval is within), and at most 1 kB of memory a question beside the questions themselves.
The bound is on the clock, disk included; what the processor worked is printed beside it, and is all that can be told
on a machine with other work.

    python benchmarks/evaluation.py --runs 7 --questions 10000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BOUND_MS = 0.3
BOUND_BYTES = 1024


class Says:
    """A generator of one sentence."""

    def generate(self, prompts: Sequence[Any], **_: Any) -> list[list[Any]]:
        """The same reply to every prompt."""
        from rag_rl.types import Generation

        reply = Generation("The river of Elmton is the Mira.\nAnswer: Mira", tuple(range(12)), prompt_tokens=300)
        return [[reply] for _ in prompts]


def build(count: int) -> tuple[Any, list[Any]]:
    """An assembly of stubs, and questions."""
    from rag_rl.evaluation.assembly import Assembly
    from rag_rl.retrieval import StaticRetriever
    from rag_rl.types import Passage, Question

    text = "The town lies on a river that is known for its mills, its bridges and a market on every Sunday. " * 3
    passages = [Passage(f"d{i}", text, f"Town {i}") for i in range(10)]
    retriever = StaticRetriever({}, default=passages)
    assembly = Assembly(retriever=retriever, generator=Says(), top_k=5, depth=10)
    questions = [
        Question(f"q{i}", f"Which river is town {i} on?", ("Mira", "the Mira") if i % 2 else ("Orl",), (f"d{i % 20}",))
        for i in range(count)
    ]
    return assembly, questions


def evaluated(count: int, folder: Path) -> tuple[float, float]:
    """Milliseconds a question of one evaluation with its summary: of the clock, and of the processor."""
    from rag_rl.evaluation.evaluating import evaluate_to_file, summarise
    from rag_rl.evaluation.measuring import Measured

    assembly, questions = build(count)
    started, worked = time.perf_counter(), time.process_time()
    found = summarise(evaluate_to_file(Measured(assembly), questions, folder / f"{time.time_ns()}.jsonl"))
    clock, processor = time.perf_counter() - started, time.process_time() - worked
    assert found["n_eval"] == count
    return 1000 * clock / count, 1000 * processor / count


def memory(count: int, folder: Path) -> int:
    """Most bytes that Python held during an evaluation, beyond the questions."""
    from rag_rl.evaluation.evaluating import evaluate_to_file
    from rag_rl.evaluation.measuring import Measured

    assembly, questions = build(count)
    tracemalloc.start()
    evaluate_to_file(Measured(assembly), questions, folder / f"{time.time_ns()}.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Prints both figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="evaluations that are timed")
    parser.add_argument("--questions", type=int, default=10_000, help="questions of each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        evaluated(500, folder)  # warm up
        times = []
        for i in range(args.runs):
            times.append(evaluated(args.questions, folder))
            print(f"run {i + 1}: {times[-1][0]:.3f} ms a question, processor {times[-1][1]:.3f} ms", file=sys.stderr)
        small, large = memory(args.questions // 10, folder), memory(args.questions, folder)
    rng = np.random.default_rng(0)
    for place, what in enumerate(("our own part", "of which processor")):
        one = [both[place] for both in times]
        low, high = np.quantile(np.median(rng.choice(one, size=(10_000, len(one))), axis=1), [0.025, 0.975])
        verdict = "OK" if low <= BOUND_MS else "MISS"
        print(f"{what}: {np.median(one):.3f} [{low:.3f}, {high:.3f}] ms a question, bound {BOUND_MS} {verdict}")
    slope = (large - small) / (args.questions - args.questions // 10)
    print(
        f"memory: {small / 2**20:.1f} MiB with {args.questions // 10} questions, {large / 2**20:.1f} MiB with "
        f"{args.questions}: {slope:.0f} bytes a question more, bound {BOUND_BYTES} "
        f"{'OK' if slope <= BOUND_BYTES else 'MISS'}"
    )


if __name__ == "__main__":
    main()
