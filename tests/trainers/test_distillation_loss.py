"""The distillation loss against a plain loop and finite differences, and two processes against one."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rag_rl.trainers.distillation_loss import distillation_loss

TEMPERATURE, CONTRAST = 0.5, 0.7
OPTIONS = {"temperature": TEMPERATURE, "augmentation_temperature": CONTRAST}


def draw(batch: int = 4, group: int = 3, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = ((batch, width), (batch, group, width), (batch, width))
    queries, passages, texts = (torch.randn(*s, generator=source, dtype=torch.float64) for s in shapes)
    return queries, passages, texts


def plain_loop(queries: Tensor, passages: Tensor, texts: Tensor, there: list[bool]) -> tuple[float, float, float]:
    """The three terms, number by number."""
    batch, group, _ = passages.shape
    ranking = 0.0
    for q in range(batch):
        own = [float(queries[q] @ passages[q, i]) / TEMPERATURE for i in range(group)]
        others = [
            float(queries[q] @ passages[b, i]) / TEMPERATURE for b in range(batch) if b != q for i in range(group)
        ]
        for i in range(group):
            ranking -= own[i] - math.log(sum(math.exp(s) for s in own[i:] + others))
    contrast = norm = 0.0
    for q in (q for q in range(batch) if there[q]):
        scores = {b: float(queries[q] @ texts[b]) / CONTRAST for b in range(batch) if there[b]}
        contrast -= scores[q] - math.log(sum(math.exp(s) for s in scores.values()))
        norm += (math.sqrt(float((texts[q] ** 2).sum())) - 1.0) ** 2
    count = max(sum(there), 1)
    return ranking / (batch * group), contrast / count, norm / count


@pytest.mark.parametrize("there", [[True] * 4, [True, False, True, False], [False] * 4])
def test_it_is_the_plain_loop(there):
    queries, passages, texts = draw()
    expected = plain_loop(queries, passages, texts, there)
    found = distillation_loss(
        queries, passages, texts, augmented=torch.tensor(there), augmentation_weight=0.5, norm_weight=2.0, **OPTIONS
    )
    assert [found.ranking.item(), found.augmentation.item(), found.norm.item()] == pytest.approx(expected, rel=1e-12)
    assert found.total.item() == pytest.approx(expected[0] + 0.5 * expected[1] + 2.0 * expected[2], rel=1e-12)


@pytest.mark.parametrize("there", [[True] * 3, [True, False, True]])
def test_gradients_are_finite_differences(there):
    leaves = [leaf.requires_grad_() for leaf in draw(3, 2, 4)]
    mask = torch.tensor(there)
    assert torch.autograd.gradcheck(
        lambda q, p, a: distillation_loss(q, p, a, augmented=mask, **OPTIONS).total, leaves, eps=1e-6, atol=1e-6
    )


def test_a_missing_augmentation_is_not_looked_at():
    queries, passages, texts = draw()
    mask = torch.tensor([True, True, False, True])
    losses = []
    for value in (0.0, math.nan, math.inf):
        leaf = texts.clone()
        leaf[2] = value
        leaf.requires_grad_()
        loss = distillation_loss(queries, passages, leaf, augmented=mask, **OPTIONS).total
        loss.backward()
        losses.append(loss.item())
        assert torch.equal(leaf.grad[2], torch.zeros(5, dtype=torch.float64))
        assert torch.isfinite(leaf.grad).all()
    assert losses[0] == losses[1] == losses[2]


def test_without_augmentations_it_is_the_ranking_alone():
    queries, passages, texts = draw()
    found = distillation_loss(queries, passages, **OPTIONS)
    assert (found.augmentation.item(), found.norm.item()) == (0.0, 0.0)
    assert found.total.item() == distillation_loss(queries, passages, texts, **OPTIONS).ranking.item()


def test_another_order_is_another_loss():
    queries, passages, _ = draw(2, 3, 4)
    better = distillation_loss(queries, passages[:, [0, 1, 2]], **OPTIONS).ranking
    assert distillation_loss(queries, passages[:, [2, 1, 0]], **OPTIONS).ranking.item() != better.item()


def test_equal_passages_are_no_negatives():
    queries, passages, _ = draw(2, 2, 4)
    # The second query's first passage is the first query's second one.
    passages[1, 0] = passages[0, 1]
    found = distillation_loss(queries, passages, passage_ids=torch.tensor([[7, 8], [8, 9]]), **OPTIONS).ranking
    scores = queries @ passages.flatten(0, 1).T / TEMPERATURE
    first = scores[0, [0, 1, 3]]  # without the copy at 2
    second = scores[1, [2, 3, 0]]  # without the copy at 1
    expected = [
        first[0] - first.logsumexp(0),
        first[1] - first[[1, 2]].logsumexp(0),
        second[0] - second.logsumexp(0),
        second[1] - second[[1, 2]].logsumexp(0),
    ]
    assert found.item() == pytest.approx(-sum(one.item() for one in expected) / 4, rel=1e-12)


def test_with_one_ranked_it_is_contrastive():
    queries, passages, _ = draw()
    ones = torch.ones(4, dtype=torch.int64)
    found = distillation_loss(queries, passages, ranked=ones, **OPTIONS).ranking
    scores = queries @ passages.flatten(0, 1).T / TEMPERATURE
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(4) * 3)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_lists_of_different_lengths():
    queries, passages, _ = draw()
    lengths = torch.tensor([2, 1, 3, 2])
    found = distillation_loss(queries, passages, ranked=lengths, **OPTIONS).ranking
    scores = queries @ passages.flatten(0, 1).T / TEMPERATURE
    expected = []
    for q, length in enumerate(lengths.tolist()):
        left = dict(enumerate(scores[q].tolist()))
        picks = []
        for place in range(3 * q, 3 * q + length):
            picks.append(left[place] - math.log(sum(math.exp(s) for s in left.values())))
            del left[place]
        expected.append(-sum(picks) / length)
    assert found.item() == pytest.approx(sum(expected) / 4, rel=1e-12)
    whole = distillation_loss(queries, passages, ranked=torch.full((4,), 3), **OPTIONS).ranking
    assert whole.item() == distillation_loss(queries, passages, **OPTIONS).ranking.item()


def test_half_precision_is_computed_in_float32():
    # Unit vectors over 0.02: a bfloat16 product of 50 is exact to a quarter at best.
    queries, passages, texts = (torch.nn.functional.normalize(one, dim=-1).bfloat16() for one in draw(8, 4, 64))
    found = distillation_loss(queries, passages, texts)
    assert found.total.dtype == torch.float32
    exact = distillation_loss(queries.double(), passages.double(), texts.double())
    assert found.total.item() == pytest.approx(exact.total.item(), rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passages": torch.ones(3, 2, 5)}, r"passages \(B, G, D\), got \(4, 5\) and \(3, 2, 5\)"),
        ({"augmentations": torch.ones(4, 6)}, r"augmentations must be \(B, D\), got \(4, 6\)"),
        ({"augmented": torch.ones(4)}, r"augmented must be \(B,\) bool, got \(4,\) torch.float32"),
        ({"ranked": torch.tensor([1, 2, 3])}, r"ranked must be \(B,\) numbers from 1 to 3, got \[1, 2, 3\]"),
        ({"ranked": torch.tensor([1, 0, 3, 2])}, r"numbers from 1 to 3, got \[1, 0, 3, 2\]"),
        ({"passage_ids": torch.ones(4, 2)}, r"passage_ids must be \(B, G\), got \(4, 2\)"),
        ({"temperature": 0.0}, "temperatures must be above 0, got 0.0 and 0.05"),
    ],
)
def test_what_does_not_fit(change, message):
    queries, passages, texts = draw()
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{"queries": queries, "passages": passages, "augmentations": texts, **change})


SCRIPT = """
import sys

import torch
import torch.distributed as dist

from rag_rl.run import launch
from rag_rl.trainers.distillation_loss import distillation_loss


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{sys.argv[4]}", rank=rank, world_size=world)
    torch.manual_seed(0)
    data = [torch.randn(*shape, dtype=torch.float64) for shape in ((8, 6), (8, 3, 6), (8, 6))]
    ids = torch.randint(0, 20, (8, 3))
    there = torch.tensor([True, True, True, True, False, True, False, False])  # 4 of one process, 1 of the other
    if sys.argv[4] == "uneven":
        data, there = [one[: 4 + rank] for one in data], there[: 4 + rank]
        ids = None
    else:
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        data, ids, there = [one[mine] for one in data], ids[mine], there[mine]
    weights = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6).requires_grad_()
    lengths = torch.tensor([1, 3, 2, 3, 1, 1, 2, 3])[mine] if ids is not None else None
    found = distillation_loss(
        data[0] @ weights, data[1] @ weights, data[2] @ weights, augmented=there, ranked=lengths, passage_ids=ids,
        temperature=0.5,
    )
    found.total.backward()
    result = torch.cat([torch.stack([found.total, found.ranking, found.augmentation, found.norm]).detach(),
                        weights.grad.flatten()])
    dist.all_reduce(result)  # what DistributedDataParallel makes of gradients: their mean
    if rank == 0:
        torch.save(result / world, f"{folder}/result{world}.pt")


launch(main)
"""


def run(folder: Path, world: int, name: str) -> list[subprocess.CompletedProcess]:
    script = folder / "share.py"
    script.write_text(SCRIPT)
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(folder), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    return [(process.communicate(timeout=120), process.returncode) for process in started]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    for world in (1, 2):
        for (_, errors), code in run(tmp_path, world, f"even{world}"):
            assert code == 0, errors
    one, two = (torch.load(tmp_path / f"result{world}.pt", weights_only=True) for world in (1, 2))
    assert one[1].item() > 0
    assert one[2].item() > 0
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_batches_of_different_sizes_are_refused(tmp_path):
    for (_, errors), code in run(tmp_path, 2, "uneven"):
        assert code == 1
        assert "all processes must have as many queries, got [4, 5]" in errors
