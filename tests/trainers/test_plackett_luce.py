from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rag_rl.trainers import plackett_luce
from rag_rl.trainers.plackett_luce import (
    effective_pool_size,
    first_pick_entropy,
    first_pick_kl,
    listwise_loss,
    log_prob,
    sample,
)

INF = math.inf
# Rows on either side of the switch between the two forms of the running logsumexp.
ROWS = [3, plackett_luce._ROWS_THAT_PAY_FOR_A_LOOP]


def naive(scores: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pick after pick, one logsumexp over what is left each, in float64."""
    left = scores.double()
    if mask is not None:
        left = left.masked_fill(~mask, -INF)
    total = torch.zeros(scores.shape[:-1], dtype=torch.float64)
    for i in range(indices.shape[-1]):
        pick = indices[..., i : i + 1]
        total = total + left.gather(-1, pick).squeeze(-1) - left.logsumexp(-1)
        left = left.scatter(-1, pick, -INF)
    return total


def draw(rows: int, pool: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scores and lists picked uniformly."""
    source = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, pool, generator=source, dtype=dtype)
    return scores, torch.rand(rows, pool, generator=source).topk(k).indices


def gradient(scores: Tensor, indices: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    leaf = scores.clone().requires_grad_()
    result = log_prob(leaf, indices, mask=mask)
    (found,) = torch.autograd.grad(result, leaf, torch.ones_like(result) if weights is None else weights)
    return found


def naive_gradient(scores: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over the picks of one-hot minus softmax of what is left, in float64."""
    pool = scores.double() if mask is None else scores.double().masked_fill(~mask, -INF)
    found = torch.zeros_like(pool)
    for i in range(indices.shape[-1]):
        pick = indices[..., i : i + 1]
        found = found - pool.softmax(-1)
        found = found.scatter_add(-1, pick, torch.ones_like(pick, dtype=torch.float64))
        pool = pool.scatter(-1, pick, -INF)
    return found


# ---------------------------------------------------------------------------------------------------------- log_prob


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_probabilities_of_all_ordered_lists_sum_to_one(k: int) -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1], dtype=torch.float64)
    lists = torch.tensor(list(itertools.permutations(range(5), k)))
    total = log_prob(scores.expand(len(lists), 5), lists).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-12)


def test_by_hand() -> None:
    pool = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 2.0]]).log()
    found = log_prob(pool, torch.tensor([[0, 2], [2, 1]])).exp()
    torch.testing.assert_close(found, torch.tensor([3 / 6 * 1 / 3, 2 / 4 * 1 / 2]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("pool", "k"), [(1, 1), (2, 1), (30, 3), (30, 30), (100, 10)])
def test_closed_form_is_the_naive_loop(rows: int, pool: int, k: int) -> None:
    scores, indices = draw(rows, pool, k)
    found = log_prob(scores, indices)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive(scores, indices), rtol=1e-6, atol=1e-6 * k)
    torch.testing.assert_close(
        gradient(scores, indices).double(), naive_gradient(scores, indices), rtol=1e-5, atol=3e-6
    )


@pytest.mark.parametrize("rows", ROWS)
def test_float64_stays_float64(rows: int) -> None:
    scores, indices = draw(rows, 20, 5, dtype=torch.float64)
    found = log_prob(scores, indices)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive(scores, indices), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient(scores, indices), naive_gradient(scores, indices), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("pool", "k"), [(6, 3), (4, 4), (7, 1)])
def test_gradcheck(rows: int, masked: bool, pool: int, k: int) -> None:
    scores, indices = draw(rows, pool, k, dtype=torch.float64)
    mask = torch.ones(rows, pool + 2, dtype=torch.bool)
    mask[:, pool:] = False
    scores = torch.cat([scores, torch.randn(rows, 2, dtype=torch.float64)], -1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: log_prob(leaf, indices, mask=mask if masked else None), scores, fast_mode=rows > 10
    )


def test_a_second_derivative_is_refused() -> None:
    scores, indices = draw(3, 6, 2)
    leaf = scores.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(log_prob(leaf, indices).sum(), leaf, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores, indices = draw(4, 30, 3)
    low = scores.to(dtype)
    found = log_prob(low, indices)
    assert found.dtype == torch.float32
    assert torch.equal(found, log_prob(low.float(), indices))
    of_low = gradient(low, indices)
    assert of_low.dtype == dtype
    assert torch.equal(of_low, gradient(low.float(), indices).to(dtype))


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    scores, indices = draw(6, 8, 3)
    count = math.prod(leading)
    expected, slope = log_prob(scores, indices)[:count], gradient(scores, indices)[:count]
    shaped = scores[:count].view(*leading, 8), indices[:count].view(*leading, 3)
    found = log_prob(*shaped)
    assert found.shape == leading
    assert torch.equal(found, expected.view(leading))
    assert torch.equal(gradient(*shaped), slope.view(*leading, 8))
    mask = torch.arange(8) < 8  # broadcasts
    assert torch.equal(log_prob(*shaped, mask=mask), found)


def test_one_pool_shared_by_a_group() -> None:
    scores, _ = draw(2, 8, 3)
    _, indices = draw(10, 8, 3, seed=1)
    leaf = scores.requires_grad_()
    log_prob(leaf[:, None].expand(2, 5, 8), indices.view(2, 5, 3)).sum().backward()
    apart = naive_gradient(scores.detach().repeat_interleave(5, 0), indices).view(2, 5, 8).sum(1)
    torch.testing.assert_close(leaf.grad.double(), apart, rtol=0, atol=1e-5)


def test_scores_that_are_not_contiguous() -> None:
    scores, indices = draw(5, 8, 3)
    turned = scores.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(log_prob(turned, indices), log_prob(scores, indices))
    assert torch.equal(gradient(turned, indices), gradient(scores, indices))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("padding", [0.0, 1e30, INF, math.nan])
def test_padding_changes_nothing_and_gets_no_gradient(rows: int, padding: float) -> None:
    scores, indices = draw(rows, 9, 4)
    # Padded on the left, so that positions shift as well.
    padded = torch.cat([torch.full((rows, 3), padding), scores], -1)
    mask = torch.cat([torch.zeros(rows, 3, dtype=torch.bool), torch.ones(rows, 9, dtype=torch.bool)], -1)
    # A longer row is summed in another order: equal up to rounding.
    torch.testing.assert_close(log_prob(padded, indices + 3, mask=mask), log_prob(scores, indices), rtol=1e-6, atol=0)
    slope = gradient(padded, indices + 3, mask)
    assert torch.equal(slope[:, :3], torch.zeros(rows, 3))
    torch.testing.assert_close(slope[:, 3:], gradient(scores, indices), rtol=1e-5, atol=3e-6)


def test_pools_of_different_sizes_in_one_batch() -> None:
    scores, _ = draw(4, 9, 3)
    sizes = torch.tensor([3, 4, 6, 9])  # the first has nothing but the picks
    mask = torch.arange(9) < sizes[:, None]
    indices = torch.tensor([[2, 0, 1]] * 4)
    found, slope = log_prob(scores, indices, mask=mask), gradient(scores, indices, mask)
    for row, size in enumerate(sizes.tolist()):
        alone = scores[row, :size]
        torch.testing.assert_close(found[row], log_prob(alone, indices[row]))
        torch.testing.assert_close(slope[row, :size], gradient(alone, indices[row]))
    assert torch.equal(slope[~mask], torch.zeros(int((~mask).sum())))


def test_a_candidate_at_minus_infinity_is_out_of_the_pool() -> None:
    scores, indices = draw(3, 6, 2)
    out = torch.cat([scores, torch.full((3, 1), -INF)], -1)
    assert torch.equal(log_prob(out, indices), log_prob(scores, indices))
    assert torch.equal(gradient(out, indices)[:, -1], torch.zeros(3))


def test_advantages_weigh_the_gradient_and_equal_rewards_give_none() -> None:
    scores, indices = draw(8, 30, 3)
    advantages = torch.linspace(-1, 1, 8)
    torch.testing.assert_close(
        gradient(scores, indices, weights=advantages), gradient(scores, indices) * advantages[:, None]
    )
    rewards = torch.full((8,), 0.75)  # not 0.7, whose mean is another number in float32
    assert torch.equal(gradient(scores, indices, weights=rewards - rewards.mean()), torch.zeros(8, 30))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spread", [50.0, 200.0, 1e4, 1e30])
def test_picks_that_outweigh_the_rest_by_any_factor(rows: int, spread: float) -> None:
    # First the giants, then from a rest that is nothing beside them: what is left must not be lost in the total.
    rest = torch.tensor([0.5, 0.0, -0.5, 1.0])
    scores = torch.cat([torch.tensor([spread, spread / 2]), rest]).expand(rows, 6).contiguous()
    indices = torch.tensor([0, 1, 3, 2]).expand(rows, 4).contiguous()
    expected = log_prob(rest, torch.tensor([1, 0]))
    torch.testing.assert_close(log_prob(scores, indices), expected.expand(rows), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(scores, indices).double(), naive_gradient(scores, indices), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_picks_that_are_next_to_impossible(rows: int) -> None:
    scores = torch.tensor([1e4, 0.0, -1e4, 3.0, 1e4]).expand(rows, 5).contiguous()
    indices = torch.tensor([2, 1]).expand(rows, 2).contiguous()
    torch.testing.assert_close(log_prob(scores, indices).double(), naive(scores, indices), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(scores, indices).double(), naive_gradient(scores, indices), rtol=0, atol=1e-6)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_pool(data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([1, 2, *ROWS[1:]]))
    pool = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, pool))
    spread = data.draw(st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e5]))
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    scores = spread * torch.randn(rows, pool, generator=source)
    indices = torch.rand(rows, pool, generator=source).topk(k).indices
    mask = (torch.rand(rows, pool, generator=source) < 0.7).scatter(-1, indices, True)
    found, slope = log_prob(scores, indices, mask=mask), gradient(scores, indices, mask)
    assert (found <= 1e-6 * (1 + spread) * k).all()
    torch.testing.assert_close(found.double(), naive(scores, indices, mask), rtol=1e-6, atol=1e-6 * (1 + spread) * k)
    # Adding the same to all scores changes nothing, so that gradients of a row cancel.
    torch.testing.assert_close(slope.sum(-1), torch.zeros(rows), rtol=0, atol=1e-5 * k * (1 + spread / 10))
    assert torch.equal(slope[~mask], torch.zeros(int((~mask).sum())))
    exact = naive_gradient(scores, indices, mask)
    torch.testing.assert_close(slope.double(), exact, rtol=0, atol=2e-6 * k * (1 + spread / 10))


@pytest.mark.parametrize("rows", ROWS)
def test_a_common_offset_costs_no_precision(rows: int) -> None:
    scores, indices = draw(rows, 30, 5)
    scores = (scores * 64).round() / 64  # so that the sum with the offset is exact
    for offset in (1e5, -1e5):
        torch.testing.assert_close(log_prob(scores + offset, indices), log_prob(scores, indices), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient(scores + offset, indices), gradient(scores, indices), rtol=0, atol=1e-6)


def test_inputs_are_left_alone() -> None:
    scores, indices = draw(4, 9, 3)
    before = scores.clone(), indices.clone()
    leaf = scores.requires_grad_()
    result = log_prob(leaf, indices)
    result.sum().backward(retain_graph=True)
    once = leaf.grad.clone()
    leaf.grad = None
    result.sum().backward()
    assert torch.equal(leaf.grad, once)
    assert torch.equal(leaf.detach(), before[0])
    assert torch.equal(indices, before[1])


def saved_bytes(function: Any, scores: Tensor, indices: Tensor) -> int:
    """What autograd keeps for the backward pass of ``function``."""
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    leaf = scores.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(leaf, indices)
    return sum(kept)


@pytest.mark.parametrize("k", [2, 64, 1000])
def test_memory_is_one_pool_however_many_picks(k: int) -> None:
    assert saved_bytes(log_prob, *draw(384, 1000, k)) == 384 * 1000 * 4


def test_without_a_gradient_the_value_is_the_same() -> None:
    scores, indices = draw(20, 30, 3)
    with_graph = log_prob(scores.clone().requires_grad_(), indices)
    assert with_graph.requires_grad
    with torch.no_grad():
        assert torch.equal(log_prob(scores.clone().requires_grad_(), indices), with_graph)
    assert not log_prob(scores, indices).requires_grad


def test_threads_change_nothing() -> None:
    scores, indices = draw(384, 1000, 10)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((log_prob(scores, indices), gradient(scores, indices)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1])


def test_no_rows() -> None:
    leaf = torch.zeros(0, 5, requires_grad=True)
    result = log_prob(leaf, torch.zeros(0, 2, dtype=torch.long))
    assert result.shape == (0,)
    result.sum().backward()
    assert leaf.grad.shape == (0, 5)


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scores, indices = draw(384, 100, 10)
    mask = (torch.arange(100) < 90).expand(384, 100).scatter(-1, indices, True)
    there = [tensor.cuda() for tensor in (scores, indices, mask)]
    torch.testing.assert_close(log_prob(*there[:2], mask=there[2]).cpu(), log_prob(scores, indices, mask=mask))
    torch.testing.assert_close(gradient(*there).cpu(), gradient(scores, indices, mask))
    on_gpu = sample(there[0], 10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(on_gpu.cpu(), sample(scores, 10, generator=torch.Generator().manual_seed(3)))


def test_log_prob_refuses() -> None:
    scores, indices = draw(4, 6, 3)
    with pytest.raises(ValueError, match=r"indices \(4, 3\) and scores \(1, 6\)"):
        log_prob(scores[:1], indices)
    with pytest.raises(ValueError, match=r"1 <= k <= K, got indices \(4, 3\) and scores \(4, 2\)"):
        log_prob(scores[:, :2], indices)
    with pytest.raises(ValueError, match=r"indices \(4, 0\)"):
        log_prob(scores, indices[:, :0])
    for few in ((scores[0], indices[0, 0]), (scores[0, 0], indices[0])):
        with pytest.raises(ValueError, match="leading dimensions"):
            log_prob(*few)
    broken = scores.clone()
    broken[1, 2] = math.nan
    broken[3, 0] = INF
    with pytest.raises(ValueError, match=r"scores must be numbers below \+inf, got NaN or \+inf in row 1, row 3$"):
        log_prob(broken, indices)
    twice = indices.clone()
    twice[2, 2] = twice[2, 0]
    with pytest.raises(ValueError, match=r"a candidate is picked twice in row 2$"):
        log_prob(scores, twice)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, indices[0, 1]] = False
    with pytest.raises(ValueError, match=r"one masked or at -inf is picked in row 0$"):
        log_prob(scores, indices, mask=mask)
    with pytest.raises(ValueError, match=r"one masked or at -inf is picked in row 0$"):
        log_prob(scores.masked_fill(~mask, -INF), indices)
    with pytest.raises(ValueError, match=r"row \(0, 1\), row \(1, 1\)$"):
        log_prob(broken.view(2, 2, 6), indices.view(2, 2, 3))
    with pytest.raises(ValueError, match=r"in the only row$"):
        log_prob(broken[1], indices[1])
    with pytest.raises(ValueError, match=r"dtype bool.*int64"):
        log_prob(scores, indices, mask=mask.long())
    with pytest.raises(ValueError, match=r"mask \(4, 5\) and scores \(4, 6\)"):
        log_prob(scores, indices, mask=mask[:, :5])
    with pytest.raises(ValueError, match="too far apart"):
        log_prob(torch.tensor([3e38, -3e38, 0.0]), torch.tensor([1]))  # -6e38
    for outside in (6, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            log_prob(scores, torch.full((4, 1), outside))


# ------------------------------------------------------------------------------------------------------------ sample


def chi_square(picks: Tensor, scores: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """Statistic of the lists drawn from one pool against Plackett-Luce, and against the uniform distribution."""
    k, pool = picks.shape[-1], scores.shape[-1]
    valid = list(range(pool)) if mask is None else mask.nonzero().flatten().tolist()
    lists = torch.tensor(list(itertools.permutations(valid, k)))
    powers = pool ** torch.arange(k)
    observed = torch.bincount((picks * powers).sum(-1), minlength=pool**k)[(lists * powers).sum(-1)].double()
    assert observed.sum() == len(picks), "a list that cannot be drawn"
    expected = len(picks) * naive(scores.expand(len(lists), pool), lists, mask).exp()
    even = torch.full_like(expected, len(picks) / len(lists))
    return tuple(((observed - model) ** 2 / model).sum().item() for model in (expected, even))


@pytest.mark.parametrize(
    ("valid", "k", "critical"),
    # 0.999 quantiles of chi-square with 4, 11 and 23 degrees of freedom, for 5 and 12 lists and 24 permutations.
    [(None, 1, 18.47), ([1, 1, 0, 1, 1], 2, 31.26), ([1, 1, 0, 1, 1], 4, 49.73)],
)
def test_samples_follow_plackett_luce(valid: list[int] | None, k: int, critical: float) -> None:
    scores = torch.tensor([0.0, 0.8, 5.0, -0.5, 0.3] if valid else [0.0, 0.8, 1.0, -0.5, 0.3])
    mask = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    picks = sample(scores.expand(40_000, 5), k, mask=mask, generator=generator)
    statistic, against_uniform = chi_square(picks, scores, mask)
    assert statistic < critical
    assert against_uniform > 10 * critical


def test_samples_repeat_with_the_seed_and_are_different_without() -> None:
    scores, _ = draw(20, 30, 3)
    one, two = (sample(scores, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.dtype == torch.int64
    assert torch.equal(one, two)
    assert not torch.equal(one, sample(scores, 5, generator=torch.Generator().manual_seed(2)))
    torch.manual_seed(1)
    default = sample(scores, 5)
    torch.manual_seed(1)
    assert torch.equal(default, sample(scores, 5))


def test_samples_of_all_dimensions_are_lists_of_different_candidates() -> None:
    scores, _ = draw(6, 7, 3)
    generator = torch.Generator().manual_seed(0)
    for leading in ((), (6,), (2, 3)):
        pool = scores[: math.prod(leading)].view(*leading, 7).requires_grad_()
        picks = sample(pool, 7, generator=generator)
        assert picks.shape == (*leading, 7)
        assert torch.equal(picks.sort(-1).values, torch.arange(7).expand(*leading, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_samples_from_other_dtypes(dtype: torch.dtype) -> None:
    # In bfloat16 itself the noise would be too coarse: 5,000 even candidates would tie.
    picks = sample(torch.zeros(5_000, dtype=dtype), 2_500, generator=torch.Generator().manual_seed(0))
    assert picks.unique().numel() == 2_500
    assert abs(picks.double().mean().item() - 2_499.5) < 4 * 5_000 / math.sqrt(12 * 2_500)


def test_noise_of_the_callers_own() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    noise = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    assert sample(scores, 2, noise=noise).tolist() == [[2, 1], [0, 2]]
    mask = torch.tensor([True, True, False])
    assert sample(scores, 2, mask=mask, noise=noise.double()).tolist() == [[1, 0], [0, 1]]
    for wrong in ({"noise": noise[:1]}, {"noise": noise, "generator": torch.Generator()}):
        with pytest.raises(ValueError, match="noise stands in place of a generator"):
            sample(scores, 2, **wrong)


def test_sample_refuses() -> None:
    scores = torch.zeros(9, 4)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sample(scores, 0)
    mask = torch.ones(9, 4, dtype=torch.bool)
    mask[2, 1:] = mask[5] = False
    with pytest.raises(
        ValueError, match=r"k is 2, above the number of valid candidates in row 2 \(1\), row 5 \(0\): take a smaller k"
    ):
        sample(scores, 2, mask=mask)
    with pytest.raises(ValueError, match=r"row 0 \(4\), row 1 \(4\), .*row 4 \(4\) and 4 more"):
        sample(scores, 5)
    with pytest.raises(ValueError, match=r"the only row \(3\)"):
        sample(torch.tensor([0.0, 1.0, -INF, 2.0]), 4)
    for value in (math.nan, INF):
        broken = scores.clone()
        broken[7, 3] = value
        with pytest.raises(ValueError, match=r"NaN or \+inf in row 7$"):
            sample(broken, 2)
        mask = torch.ones(9, 4, dtype=torch.bool)
        mask[7, 3] = False
        assert sample(broken, 2, mask=mask).shape == (9, 2)
    with pytest.raises(ValueError, match=r"at least one candidate, got \(3, 0\)"):
        sample(torch.zeros(3, 0), 1)


# ------------------------------------------------------------------------------------------------- the first pick


def test_entropy_and_effective_pool_by_hand() -> None:
    pool = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(first_pick_entropy(pool), torch.tensor([4.0, 2.0, 1.0]).log())
    torch.testing.assert_close(effective_pool_size(pool), torch.tensor([4.0, 2.0, 1.0]))
    mask = torch.tensor([True, True, True, False])
    torch.testing.assert_close(effective_pool_size(torch.zeros(4), mask=mask).item(), 3.0)
    assert effective_pool_size(torch.zeros(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert first_pick_kl(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-6)
    # Neither a constant nor what stands under a mask counts.
    padded = [torch.cat([x.log() + shift, torch.tensor([math.nan])]) for x, shift in ((p, 3.0), (q, -7.0))]
    mask = torch.tensor([True, True, True, False])
    assert first_pick_kl(*padded, mask=mask).item() == pytest.approx(expected, rel=1e-5)
    assert first_pick_kl(p.log(), p.log()).item() == 0.0
    # What the reference rules out costs everything, what the policy rules out costs nothing.
    certain = torch.tensor([0.0, -INF])
    assert first_pick_kl(torch.zeros(2), certain).item() == INF
    assert first_pick_kl(certain, torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert first_pick_kl(certain, certain).item() == 0.0


def test_divergence_is_that_of_torch() -> None:
    scores, _ = draw(5, 30, 3)
    reference, _ = draw(5, 30, 3, seed=1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=scores), torch.distributions.Categorical(logits=reference)
    )
    torch.testing.assert_close(first_pick_kl(scores, reference), expected)
    torch.testing.assert_close(
        first_pick_entropy(scores), torch.distributions.Categorical(logits=scores).entropy(), rtol=1e-5, atol=1e-6
    )
    assert first_pick_kl(scores.view(5, 1, 30), reference.view(5, 1, 30)).shape == (5, 1)


def test_gradients_of_the_first_pick() -> None:
    scores, _ = draw(3, 6, 2, dtype=torch.float64)
    reference, _ = draw(3, 6, 2, seed=1, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, False])
    leaves = scores.requires_grad_(), reference.requires_grad_()
    for chosen in (None, mask):
        assert torch.autograd.gradcheck(lambda p, q, m=chosen: first_pick_kl(p, q, mask=m), leaves)
        assert torch.autograd.gradcheck(lambda p, m=chosen: first_pick_entropy(p, mask=m), leaves[0])
    slope = torch.autograd.grad(first_pick_kl(*leaves, mask=mask).sum(), leaves)
    assert all(torch.equal(part[:, ~mask], torch.zeros(3, 2, dtype=torch.float64)) for part in slope)


@given(seed=st.integers(0, 10_000), pool=st.integers(1, 20), spread=st.sampled_from([0.0, 1.0, 1e2, 1e4]))
@settings(max_examples=80, deadline=None)
def test_ranges_of_the_first_pick(seed: int, pool: int, spread: float) -> None:
    source = torch.Generator().manual_seed(seed)
    scores, reference = (spread * torch.randn(3, pool, generator=source) for _ in range(2))
    assert (first_pick_kl(scores, reference) >= -1e-6).all()
    size = effective_pool_size(scores)
    assert ((size >= 1 - 1e-5) & (size <= pool * (1 + 1e-5))).all()
    leaf = scores.requires_grad_()
    (first_pick_kl(leaf, reference).sum() + first_pick_entropy(leaf).sum()).backward()
    assert torch.isfinite(leaf.grad).all()


def test_the_first_pick_refuses() -> None:
    scores = torch.zeros(4, 3)
    broken = scores.clone()
    broken[2, 1] = math.nan
    empty = torch.ones(4, 3, dtype=torch.bool)
    empty[1] = False
    for function in (first_pick_entropy, effective_pool_size):
        with pytest.raises(ValueError, match=r"scores must be numbers .* in row 2$"):
            function(broken)
        with pytest.raises(ValueError, match=r"no valid candidate in row 1 of scores$"):
            function(scores, mask=empty)
    with pytest.raises(ValueError, match=r"scores must be numbers .* in row 2$"):
        first_pick_kl(broken, scores)
    with pytest.raises(ValueError, match=r"reference must be numbers .* in row 2$"):
        first_pick_kl(scores, broken)
    with pytest.raises(ValueError, match=r"no valid candidate in row 1 of scores$"):
        first_pick_kl(scores, scores, mask=empty)
    with pytest.raises(ValueError, match=r"no valid candidate in row 3 of reference$"):
        first_pick_kl(scores, scores.index_fill(0, torch.tensor(3), -INF))
    with pytest.raises(ValueError, match=r"one shape, got \(4, 3\) and \(3,\)"):
        first_pick_kl(scores, scores[0])


# ----------------------------------------------------------------------------------------------------- listwise_loss


def loop_over_picks(scores: Tensor, order: Tensor) -> Tensor:
    """Reinforced-IR's loss as methods describe it: a cross-entropy a place, then that passage is masked."""
    left, terms = scores.double(), []
    for i in range(order.shape[1]):
        terms.append(nn.functional.cross_entropy(left, order[:, i]))
        left = left.scatter(-1, order[:, i : i + 1], -INF)
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("queries", "own"), [(1, 4), (4, 1), (8, 16), (128, 4)])
def test_listwise_loss_is_the_loop_of_cross_entropies(queries: int, own: int) -> None:
    source = torch.Generator().manual_seed(0)
    vectors, passages = (
        nn.functional.normalize(torch.randn(n, 12, generator=source), dim=-1) for n in (queries, queries * own)
    )
    scores = vectors @ passages.T / 0.02
    order = torch.arange(queries * own).view(queries, own)
    found = listwise_loss(scores, order)
    assert found.shape == ()
    torch.testing.assert_close(found.double(), loop_over_picks(scores, order), rtol=1e-6, atol=1e-5)
    leaf = scores.clone().requires_grad_()
    listwise_loss(leaf, order).backward()
    torch.testing.assert_close(
        leaf.grad.double(), -naive_gradient(scores, order) / (queries * own), rtol=0, atol=2e-5 / queries
    )


def test_one_own_passage_makes_it_infonce() -> None:
    scores, _ = draw(6, 6, 1)
    expected = nn.functional.cross_entropy(scores, torch.arange(6))
    torch.testing.assert_close(listwise_loss(scores, torch.arange(6).view(6, 1)), expected)


def test_masked_passages_count_for_nothing_in_the_listwise_loss() -> None:
    scores, order = draw(3, 9, 4)
    extra = torch.cat([scores, torch.full((3, 2), math.nan)], -1)
    assert torch.equal(listwise_loss(extra, order, mask=torch.arange(11) < 9), listwise_loss(scores, order))


def test_the_listwise_loss_refuses() -> None:
    with pytest.raises(ValueError, match=r"no list to learn from: order is \(0, 4\)"):
        listwise_loss(torch.zeros(0, 9), torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="picked twice in row 0"):
        listwise_loss(torch.zeros(1, 3), torch.tensor([[1, 1]]))


class ScoreTable(nn.Module):
    """As much of a cross-encoder as the losses of sentence-transformers use: a score for each pair, out of a table."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores.clone())

    def preprocess(self, pairs: list[tuple[str, str]], **_: Any) -> dict[str, Tensor]:
        return {"cells": torch.tensor([[int(query), int(passage)] for query, passage in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, columns = features["cells"].T
        return {"scores": self.scores[rows, columns]}


@pytest.mark.parametrize("rows", ROWS)
def test_full_permutations_are_list_mle_of_sentence_transformers(rows: int) -> None:
    from sentence_transformers.cross_encoder.losses import ListMLELoss

    pool = 7
    scores, order = draw(rows, pool, pool)
    relevance = torch.zeros(rows, pool).scatter(-1, order, torch.arange(pool, 0.0, -1.0).expand(rows, pool))
    model = ScoreTable(scores)
    loss = ListMLELoss(model, respect_input_order=False)
    texts = [[str(row) for row in range(rows)], [[str(place) for place in range(pool)]] * rows]
    theirs = loss(texts, list(relevance))
    theirs.backward()
    leaf = scores.clone().requires_grad_()
    ours = -log_prob(leaf, order).mean()
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad, model.scores.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(listwise_loss(scores, order) * pool, theirs, rtol=1e-5, atol=1e-5)
