"""What two hot loops of Reinforced-IR cost: ratios, both sides timed in one run.

    taskset -c 1 python benchmarks/reinforced_ir.py [--quick] [--pairs 9] [--scanned 60]

Rows of the table: the median of theirs over ours, over interleaved pairs (ours, theirs, theirs, ours, ...), an
interval of that median (bootstrap over pairs, 95%) and the bound. A bound holds where the upper end of the interval
reaches it. One thread, timed by the processor's clock, so that what else runs on the machine counts less.

- negatives: ``mine_negatives`` for 15,000 queries with their top 2,000 passages against a scan of each query in plain
  Python. The first turns the row of ids into a list whenever it looks a passage up, as the published code does; the
  second does it once and has no bound. A scan of all takes minutes, and each query is the same work, so a pair times
  some of them (others in every pair) and takes that times 15,000 / some. All are first checked to give the same.
- listwise: ``listwise_loss``, forward and backward, 128 queries against their 2,048 passages, 16 own each, against G
  cross-entropies with a full-size mask that is added to the scores after each. Both are first checked to give the same
  value and gradient.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rag_rl.retrieval.negatives import mine_negatives
from rag_rl.trainers.plackett_luce import listwise_loss

CORPUS, WINDOW, KEPT, LIMIT = 200_000, 50, 15, np.float32(0.95)


def scan(scores: np.ndarray, rows: np.ndarray, positive: int) -> list[int]:
    """The 95% rule for one query in plain Python, each passage looked up anew; fallbacks draw from ranks 30 to 199."""
    taken: list[int] = []
    if positive in list(rows):
        own = scores[list(rows).index(positive)]
        start = next((i for i in range(list(rows).index(positive) + 1, len(rows)) if scores[i] <= LIMIT * own), None)
        taken = [] if start is None else list(rows)[start : start + WINDOW]
    if not taken:
        drawn = np.random.default_rng(0).choice(np.arange(30, 200), WINDOW, replace=False)
        taken = [list(rows)[i] for i in sorted(drawn)]
    kept: dict[int, float] = {}
    for passage in taken:
        if passage != positive and passage not in kept:
            kept[int(passage)] = float(scores[list(rows).index(passage)])
    return list(kept)[:KEPT]


def scan_once(scores: np.ndarray, rows: np.ndarray, positive: int) -> list[int]:
    """The same with one pass over the row: what a careful reader of the published code would write in Python."""
    ids, values = rows.tolist(), scores.tolist()
    taken: list[int] = []
    if positive in ids:
        place = ids.index(positive)
        limit = float(LIMIT * scores[place])
        start = next((i for i in range(place + 1, len(ids)) if values[i] <= limit), len(ids))
        taken = ids[start : start + WINDOW]
    if not taken:
        drawn = np.random.default_rng(0).choice(np.arange(30, 200), WINDOW, replace=False)
        taken = [ids[i] for i in sorted(drawn)]
    kept = list(dict.fromkeys(row for row in taken if row != positive))
    return kept[:KEPT]


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Time of one call, the mean of that many."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def row(name: str, values: Sequence[float], bound: float | None) -> bool:
    """Prints one line of the table; whether the bound holds."""
    sample = np.random.default_rng(0).choice(np.asarray(values), size=(10_000, len(values)))
    low, high = np.quantile(np.median(sample, axis=1), [0.025, 0.975])
    held = bound is None or high >= bound
    verdict = "" if bound is None else f">= {bound:.0f}  {'OK' if held else 'MISS'}"
    print(f"{name:<52} {np.median(values):8.1f}  [{low:.1f}, {high:.1f}]  n={len(values):<3} {verdict}", flush=True)
    return held


def ranked(queries: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, rows and positives as a search gives them; one positive in twenty is not found."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.random((queries, width), dtype=np.float32), axis=1)
    start = rng.integers(0, CORPUS, (queries, 1))
    rows = (start + np.arange(width) * 97) % CORPUS  # all different, since 97 and the size share no factor
    place = np.minimum(rng.geometric(0.05, queries), width) - 1
    positives = np.where(rng.random(queries) < 0.95, rows[np.arange(queries), place], CORPUS)
    return scores, rows, positives


def negatives(given: argparse.Namespace) -> bool:
    """Mining for all queries against scans."""
    queries, width = (500, 400) if given.quick else (15_000, 2_000)
    scores, rows, positives = ranked(queries, width)

    def ours() -> object:
        return mine_negatives(scores, rows, positives, n=KEPT)

    found = mine_negatives(scores, rows, positives, n=KEPT)
    for i in np.flatnonzero(~found.fallback)[:20]:
        for form in (scan, scan_once):
            expected = form(scores[i], rows[i], int(positives[i]))
            assert found.rows[i, : found.counts[i]].tolist() == expected
    held = []
    for name, form, bound, count in (
        ("scan with a look-up each", scan, 100.0, given.scanned),
        ("one pass in Python", scan_once, None, 20 * given.scanned),
    ):
        values = []
        for number in range(given.pairs + 1):
            chosen = np.random.default_rng(number).choice(queries, min(count, queries), replace=False)

            def theirs(form=form, chosen=chosen) -> None:
                for i in chosen:
                    form(scores[i], rows[i], int(positives[i]))

            first, second = (ours, theirs) if number % 2 else (theirs, ours)
            timed = [seconds(first), seconds(second)]
            mine, other = timed if number % 2 else timed[::-1]
            values.append(other / len(chosen) * queries / mine)
        held.append(row(f"negatives {queries} x {width}: {name} / ours", values[1:], bound))
    print(f"  ours: {seconds(ours, 3):.3f} s")
    return all(held)


def masked_loop(scores: Tensor, own: Tensor) -> Tensor:
    """A cross-entropy a place of the order, then the least number of the dtype is added to that passage's scores."""
    loss = scores.new_zeros(())
    for i in range(own.shape[1]):
        loss = loss + functional.cross_entropy(scores, own[:, i])
        mask = torch.zeros_like(scores).scatter(1, own[:, i : i + 1], torch.finfo(scores.dtype).min)
        scores = scores + mask
    return loss / own.shape[1]


def listwise(given: argparse.Namespace) -> bool:
    """The loss, forward and backward."""
    queries, group = (32, 4) if given.quick else (128, 16)
    leaf = (5 * torch.randn(queries, queries * group, generator=torch.Generator().manual_seed(0))).requires_grad_()
    own = torch.arange(queries * group).view(queries, group)

    def both_ways(form: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            value = form(leaf, own)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return call

    ours, theirs = both_ways(listwise_loss), both_ways(masked_loop)
    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    repeats = [max(1, round(0.1 / seconds(call, 3))) for call in (ours, theirs)]
    values = []
    for number in range(given.pairs + 1):
        sides = [(ours, repeats[0]), (theirs, repeats[1])]
        timed = [seconds(*side) for side in (sides if number % 2 else sides[::-1])]
        mine, other = timed if number % 2 else timed[::-1]
        values.append(other / mine)
    held = row(f"listwise {queries} x {queries * group}, G={group}: masked loop / ours", values[1:], 15.0)
    print(f"  ours: {1e3 * seconds(ours, 20):.2f} ms")
    return held


def main() -> int:
    """Prints the table; 1 if a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; shows that it runs, not how fast")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs, at least 7")
    parser.add_argument(
        "--scanned", type=int, default=60, help="queries that a pair scans; 20 times as many in one pass"
    )
    parser.add_argument("--only", choices=["listwise", "negatives"], help="one of the two tables")
    given = parser.parse_args()
    if given.pairs < 7:
        parser.error(f"--pairs must be at least 7, got {given.pairs}")
    torch.set_num_threads(1)
    print(f"1 thread, torch {torch.__version__}, numpy {np.__version__}")
    print(f"{'theirs / ours':<52} {'median':>8}  interval")
    held = [part(given) for part in (listwise, negatives) if given.only in (None, part.__name__)]
    return 0 if all(held) or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
