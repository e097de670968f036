"""What a Plackett-Luce log-probability costs, forward and backward: ratios, both sides timed in one run.

    taskset -c 1 python benchmarks/plackett_luce.py [--quick] [--pairs 15] [--threads 1] [--rows 384] [--device cpu]

Rows of the table: the median of ours over theirs, over interleaved pairs (ours, theirs, theirs, ours, ...), an
interval of that median (bootstrap over pairs, 95%) and the bound. A bound holds where the lower end of the interval is
within it. One side of a pair is as many calls as take it about 20 ms. One thread is timed by the processor's clock, so
that what else runs on the machine counts less; several threads and a GPU by the wall's.

- floor: one ``logsumexp`` over the same pool, which reads all scores and writes all gradients, and does no picks.
- loop: a ``logsumexp`` a pick, then the picked candidate is set to -inf; plain autograd.
- one-hot: all picks at once, over a (rows, k, K) tensor of what each pick had left; plain autograd.
- listwise: ``listwise_loss`` against a loop of cross-entropies, 128 queries against their 2,048 passages, 16 own each.

All sides are first checked to give the same values and gradients. The memory rows count the bytes that autograd keeps
between forward and backward, and are exact.
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

from rag_rl.trainers.plackett_luce import listwise_loss, log_prob

SHAPES = [(30, 3), (100, 10), (1000, 10)]
Form = Callable[[Tensor, Tensor], Tensor]


def floor(scores: Tensor, indices: Tensor) -> Tensor:
    """One logsumexp; the picks are not looked at."""
    return scores.logsumexp(-1)


def loop(scores: Tensor, indices: Tensor) -> Tensor:
    """One logsumexp a pick."""
    left, terms = scores, []
    for pick in indices.split(1, -1):
        terms.append(left.gather(-1, pick).squeeze(-1) - left.logsumexp(-1))
        left = left.scatter(-1, pick, -torch.inf)
    return torch.stack(terms).sum(0)


def one_hot(scores: Tensor, indices: Tensor) -> Tensor:
    """All picks at once."""
    chosen = functional.one_hot(indices, scores.shape[-1])  # (rows, k, K)
    gone = chosen.cumsum(-2) - chosen
    left = scores.unsqueeze(-2).masked_fill(gone.bool(), -torch.inf)
    return (scores.gather(-1, indices) - left.logsumexp(-1)).sum(-1)


def cross_entropies(scores: Tensor, order: Tensor) -> Tensor:
    """The listwise loss as a loop: a cross-entropy a place of the order, then that passage is masked."""
    left, terms = scores, []
    for pick in order.split(1, -1):
        terms.append(functional.cross_entropy(left, pick.squeeze(-1)))
        left = left.scatter(-1, pick, -torch.inf)
    return torch.stack(terms).mean()


def both_ways(form: Form, scores: Tensor, indices: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call of ``form`` and its backward pass, which gives values and gradients."""
    leaf = scores.clone().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        value = form(leaf, indices)
        return value.detach(), torch.autograd.grad(value, leaf, grad)[0]

    return call


def seconds(call: Callable[[], object], repeats: int, given: argparse.Namespace) -> float:
    """Time of that many calls."""
    clock = time.process_time if given.device == "cpu" and given.threads == 1 else time.perf_counter
    if given.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        call()
    if given.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def row(name: str, values: Sequence[float], bound: float | None) -> bool:
    """Prints one line of the table; whether the bound holds."""
    sample = np.random.default_rng(0).choice(np.asarray(values), size=(10_000, len(values)))
    low, high = np.quantile(np.median(sample, axis=1), [0.025, 0.975])
    held = bound is None or low <= bound
    verdict = "" if bound is None else f"<= {bound:.2f}  {'OK' if held else 'MISS'}"
    print(f"{name:<46} {np.median(values):7.4f}  [{low:.4f}, {high:.4f}]  n={len(values):<3} {verdict}", flush=True)
    return held


def compare(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    bound: float | None,
    given: argparse.Namespace,
) -> bool:
    """Times interleaved pairs and prints their row."""
    # The second call: the first pays for memory that later ones reuse.
    repeats = []
    for call in (ours, theirs):
        call()
        repeats.append(max(1, round(given.slice / seconds(call, 3, given) * 3)))
    values = []
    for number in range(given.pairs + 1):
        sides = [(ours, repeats[0]), (theirs, repeats[1])]
        # Every second pair the other way round: neither side always runs first.
        timed = [seconds(*side, given) / side[1] for side in (sides if number % 2 else sides[::-1])]
        mine, other = timed if number % 2 else timed[::-1]
        values.append(mine / other)
    return row(name, values[1:], bound)


def speed(pool: int, k: int, given: argparse.Namespace) -> bool:
    """Our log-probability against the three others at one shape."""
    source = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(given.rows, pool, generator=source)
    indices = torch.rand(given.rows, pool, generator=source).topk(k).indices
    grad = torch.randn(given.rows, generator=source)
    scores, indices, grad = (tensor.to(given.device) for tensor in (scores, indices, grad))
    ours = both_ways(log_prob, scores, indices, grad)
    held = []
    for form, bound in (
        (floor, 2.0 if pool >= 1000 else 3.0),
        (loop, 1.0),
        (one_hot, 0.1 if pool >= 1000 else 1.0),
    ):
        theirs = both_ways(form, scores, indices, grad)
        if form is not floor:
            torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
        held.append(compare(f"({pool}, {k})  ours / {form.__name__}", ours, theirs, bound, given))
    if given.device == "cuda":
        print(f"  ours: {1e3 * seconds(ours, 100, given) / 100:.3f} ms")
    return all(held)


def listwise(given: argparse.Namespace) -> bool:
    """Reinforced-IR's ranking loss against its loop."""
    queries, own = (32, 4) if given.quick else (128, 16)
    scores = 5 * torch.randn(queries, queries * own, generator=torch.Generator().manual_seed(0))
    order = torch.arange(queries * own).view(queries, own)
    ours, theirs = (
        both_ways(form, scores.to(given.device), order.to(given.device), torch.ones((), device=given.device))
        for form in (listwise_loss, cross_entropies)
    )
    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    return compare(f"listwise ({queries} x {queries * own}, {own})  ours / loop", ours, theirs, 1.0, given)


def kept_bytes(form: Form, rows: int, pool: int, k: int) -> int:
    """What autograd keeps for the backward pass, each storage once; the scores themselves are not counted."""
    scores = torch.randn(rows, pool, requires_grad=True)
    indices = torch.rand(rows, pool).topk(k).indices
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        form(scores, indices)
    kept.pop(scores.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def memory(given: argparse.Namespace) -> bool:
    """Bytes kept at two lengths of the list, in units of one float32 pool."""
    pool, held = 1000, True
    print(f"kept for the backward pass, in float32 tensors of ({given.rows}, {pool})")
    for form in (log_prob, loop, one_hot):
        few, many = (kept_bytes(form, given.rows, pool, k) / (given.rows * pool * 4) for k in (10, 40))
        told = ""
        if form is log_prob:
            # O(rows x K): one pool and a few numbers a pick, however long the list is.
            held = many <= 1.5
            told = f"<= 1.50  {'OK' if held else 'MISS'}"
        print(f"  {form.__name__:<44} k=10: {few:7.3f}   k=40: {many:7.3f}   {told}")
    return held


def main() -> int:
    """Prints the table; 1 if a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short slices; shows that it runs, not how fast")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs, at least 7")
    parser.add_argument("--rows", type=int, default=384, help="pools a call (128 trajectories of 3 hops)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    if given.pairs < 7:
        parser.error(f"--pairs must be at least 7, got {given.pairs}")
    given.slice = 0.002 if given.quick else 0.02
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"threads: {torch.get_num_threads()}, rows: {given.rows}, device: {given.device}, torch {torch.__version__}")
    print(f"{'(K, k)  ours / theirs':<46} {'median':>7}  interval")
    held = [speed(pool, k, given) for pool, k in SHAPES]
    held += [listwise(given), memory(given)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
