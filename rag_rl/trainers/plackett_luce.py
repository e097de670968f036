r"""The Plackett-Luce distribution over ordered lists: sampling, log-probability, and what is read off its first pick.

k different candidates are picked one after the other from a pool C of K, each by a softmax over what is left (Plackett
1975, "The analysis of permutations"). With scores :math:`l_j` an ordered list :math:`a = (a_1, ..., a_k)` has

.. math:: \log p(a) = \sum_{i=1}^{k} \Big[ l_{a_i} - \log \sum_{j \in C \setminus \{a_1..a_{i-1}\}} e^{l_j} \Big]

It is the policy of HARR (arXiv 2602.03645, eq. 7-9 and 13-14). On a teacher's order, with the batch's other passages
in every denominator, it is the listwise loss of Reinforced-IR (arXiv 2502.11562); on full permutations it is ListMLE
(Xia et al. 2008, "Listwise approach to learning to rank: theory and algorithm").

The same for every function here:

- **Temperature is the caller's.** Scores come already divided by it: HARR's policy is that of ``similarity / alpha``.
- Any leading dimensions; a "row" is one pool. A mask is True where a candidate is valid and broadcasts to the scores;
  what stands under False, NaN included, is never looked at and gets a gradient of exactly zero. A score of -inf is a
  candidate of probability zero and is treated the same.
- bfloat16 and float16 scores are computed in at least float32 and give float32; float64 stays float64. Gradients come
  back in the dtype of the scores.
- NaN and +inf scores are a ``ValueError`` that names the rows. The check waits for the device once or twice a call.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# On a CPU torch.logcumsumexp spends some 25 ns on each element, one by one. From about this many rows on, a vectorised
# logaddexp for each pick is faster, however many picks there are (384 rows, 10 picks, 1 thread: 21 us against 107).
_ROWS_THAT_PAY_FOR_A_LOOP = 64
_ROWS_NAMED = 5


def sample(
    scores: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draws an ordered list of k different candidates from each pool.

    Gumbel top-k: the k largest of ``scores + Gumbel(0, 1)`` noise, in descending order, are distributed exactly as k
    picks without replacement (Kool et al. 2019, "Stochastic beams and where to find them", arXiv 1903.06059).

    Args:
        scores: (..., K) scores, already divided by the temperature; no gradient flows.
        k: length of the lists, at least 1.
        mask: broadcasts to (..., K), True for valid candidates; None for all.
        generator: source of the noise, which is drawn on the generator's own device: with a generator of the CPU the
            same seed gives the same lists on every device. None for torch's default.
        noise: (..., K) standard Gumbel noise of the caller's own, in place of the generator's: for lists that shall
            not depend on what else is in the batch, or that share their noise.

    Returns:
        (..., k) int64 positions in the pool, in the order of the picks.

    Raises:
        ValueError: ``k`` below 1 or above the number of valid candidates of a row; NaN or +inf scores; both a
            generator and noise, or noise of another shape. Rows are named.

    Example:
        >>> sample(torch.tensor([[0.0, -1e9, 9e9], [0.0, 1e9, 0.0]]), 2, mask=torch.tensor([True, True, False]))
        tensor([[0, 1],
                [1, 0]])
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if noise is not None and (generator is not None or noise.shape != scores.shape):
        raise ValueError(
            f"noise stands in place of a generator and has the shape of the scores, {tuple(scores.shape)}: got noise "
            f"{tuple(noise.shape)} and {'no' if generator is None else 'a'} generator"
        )
    pool = _pool(scores.detach(), mask)
    valid = (pool > -math.inf).sum(-1)
    if bool((valid < k).any()):
        raise ValueError(
            f"k is {k}, above the number of valid candidates in {_named(valid < k, valid)}: take a smaller k, or a "
            "larger pool"
        )
    if noise is None:
        device = pool.device if generator is None else generator.device
        draws = torch.empty(pool.shape, dtype=pool.dtype, device=device).exponential_(generator=generator)
        # -log of a standard exponential is a standard Gumbel; a draw of 0 would win for certain and tie with another.
        noise = draws.clamp_min_(torch.finfo(pool.dtype).tiny).log_().neg_()
    return (pool + noise.to(pool)).topk(k, dim=-1).indices


def log_prob(scores: Tensor, indices: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Log-probability of ordered lists of picks, in closed form, with an analytic gradient.

    With :math:`s_i = l_{a_i}`, the last denominator :math:`d_k` is a logsumexp over what the other picks left, and the
    ones before it follow from :math:`d_i = \log(e^{s_i} + e^{d_{i+1}})`. Then

    .. math:: \log p = \sum_i (s_i - d_i), \qquad
              \frac{\partial \log p}{\partial l_{a_t}} = 1 - \sum_{i \le t} e^{s_t - d_i}, \qquad
              \frac{\partial \log p}{\partial l_j} = - \sum_{i \le k} e^{l_j - d_i} \quad (j \notin a)

    O(K + k) time and memory a row, where the one-hot form needs O(K k) of both. Nothing is subtracted from a total, so
    what is left of a pool keeps its precision when the picks outweigh it by any factor; every exponent is at most 0.
    Differentiable once (a backward pass with ``create_graph`` is a RuntimeError), and in ``scores`` only.

    Args:
        scores: (..., K) scores, already divided by the temperature.
        indices: (..., k) int64 positions in the pool in the order of the picks, all different, none of them masked,
            1 <= k <= K; leading dimensions as in ``scores``. k = K makes it ListMLE.
        mask: broadcasts to (..., K), True for valid candidates; None for all.

    Returns:
        (...) log-probabilities, at most 0 up to rounding.

    Raises:
        ValueError: shapes that do not fit; NaN or +inf scores; a list that names a candidate twice or one that is
            masked or of score -inf. Rows are named.
        RuntimeError: an index outside the pool (raised by torch).

    Example:
        >>> pool = torch.tensor([3.0, 2.0, 1.0]).log()
        >>> log_prob(pool, torch.tensor([0, 2])).exp()  # 3/6, then 1/3
        tensor(0.1667)
    """
    if (
        min(indices.ndim, scores.ndim) == 0
        or indices.shape[:-1] != scores.shape[:-1]
        or not 1 <= indices.shape[-1] <= scores.shape[-1]
    ):
        raise ValueError(
            f"indices must be (..., k) with the leading dimensions of scores and 1 <= k <= K, got indices "
            f"{tuple(indices.shape)} and scores {tuple(scores.shape)}"
        )
    scores, mask = _raised(scores), _checked_mask(mask, scores)
    if scores.requires_grad and torch.is_grad_enabled():
        return _LogProb.apply(scores, indices, mask)
    return _log_prob(scores, indices, mask, derivative=False)[0]


def first_pick_kl(scores: Tensor, reference: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Exact divergence of the first pick's distribution from a reference's, over the same pool.

    ``KL(p || q) = sum_j p_j (log p_j - log q_j)`` with p and q the softmax of the scores and of the reference: a K-way
    categorical, so there is nothing to estimate. It anchors a policy to the encoder that it started from.

    Args:
        scores: (..., K) scores of the policy, already divided by the temperature.
        reference: (..., K) scores of the reference, divided by the same; detach it unless a gradient is meant.
        mask: broadcasts to (..., K), True for valid candidates; None for all.

    Returns:
        (...) divergences in nats, at least 0 up to rounding; infinite where the reference rules a candidate out (-inf)
        that the policy does not.

    Raises:
        ValueError: different shapes; NaN or +inf scores; a row without a valid candidate. Rows are named.

    Example:
        >>> first_pick_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])).item()
        0.0
    """
    if scores.shape != reference.shape:
        raise ValueError(
            f"scores and reference must have one shape, got {tuple(scores.shape)} and {tuple(reference.shape)}"
        )
    log_p = _first_pick(scores, mask)
    log_q = _first_pick(reference, mask, name="reference")
    p = log_p.exp()
    # 0 (-inf + inf) is NaN; what has no probability adds nothing.
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def first_pick_entropy(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Entropy of the first pick's distribution, the softmax of the scores.

    Args:
        scores: (..., K) scores, already divided by the temperature.
        mask: broadcasts to (..., K), True for valid candidates; None for all.

    Returns:
        (...) entropies in nats, in [0, log K].

    Raises:
        ValueError: NaN or +inf scores; a row without a valid candidate. Rows are named.

    Example:
        >>> round(first_pick_entropy(torch.tensor([1.0, 1.0, 1.0, 1.0])).item(), 4)  # log 4
        1.3863
    """
    log_p = _first_pick(scores, mask)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


def effective_pool_size(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Number of equally likely candidates that would have the first pick's entropy (its perplexity).

    Args:
        scores: (..., K) scores, already divided by the temperature.
        mask: broadcasts to (..., K), True for valid candidates; None for all.

    Returns:
        (...) sizes in [1, K]: near 1 the policy explores nothing, near K it ranks nothing.

    Raises:
        ValueError: NaN or +inf scores; a row without a valid candidate. Rows are named.

    Example:
        >>> round(effective_pool_size(torch.tensor([7.0, 7.0, -1e9])).item(), 4)
        2.0
    """
    return first_pick_entropy(scores, mask=mask).exp()


def listwise_loss(scores: Tensor, order: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Negative log-likelihood of a teacher's order, with extra candidates in every denominator.

    The ranking loss of Reinforced-IR (arXiv 2502.11562): each of B queries is scored against all passages of the batch
    (of all processes, where they are gathered), G of them its own, ranked by the generator; an own passage leaves the
    denominator once it was picked, the other queries' passages stay in it throughout:

    .. math:: L = -\frac{1}{B G} \sum_q \sum_{i=1}^{G} \Big[ S_{q,(i)}
              - \log \Big( \sum_{t \ge i} e^{S_{q,(t)}} + \sum_{j \notin own(q)} e^{S_{qj}} \Big) \Big]

    Only the teacher's order counts, its scores do not. Without extra candidates (K = G) it is ListMLE (Xia et al.
    2008) over the list's length; a row's loss is ``-log_prob / G``. To leave known positives of a query out of its
    denominators, mask them.

    Args:
        scores: (..., K) similarities, already divided by the temperature: (B, B' G) for B queries of this process
            against the passages of B' queries.
        order: (..., G) int64 positions of a query's own passages among the K, best first. Where passages stand query
            by query, each in the teacher's order: ``torch.arange(B * G).view(B, G)``, plus the offset of this process.
        mask: broadcasts to (..., K), True for valid candidates; None for all.

    Returns:
        Scalar mean over rows and picks, in nats a pick, at least 0 up to rounding.

    Raises:
        ValueError: no rows; else as in ``log_prob``.
        RuntimeError: an index outside the pool (raised by torch).

    Example:
        >>> queries, passages = torch.eye(2), torch.eye(2).repeat_interleave(2, dim=0)  # 2 queries, 2 passages each
        >>> round(listwise_loss(queries @ passages.T / 0.02, torch.arange(4).view(2, 2)).item(), 4)  # log(2) / 2
        0.3466
    """
    likelihood = log_prob(scores, order, mask=mask)
    if likelihood.numel() == 0:
        raise ValueError(f"there is no list to learn from: order is {tuple(order.shape)}")
    return -likelihood.mean() / order.shape[-1]


class _LogProb(torch.autograd.Function):
    """``log_prob`` of float32 or float64 scores. What it keeps is its derivative, one tensor of the scores' shape."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        result, derivative = _log_prob(scores, indices, mask, derivative=True)
        ctx.save_for_backward(derivative)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # torch's once_differentiable lets a second derivative pass as a constant where ``grad`` itself has no graph.
        if torch.is_grad_enabled():
            raise RuntimeError("plackett_luce.log_prob is differentiable once: create_graph=True is not supported")
        (derivative,) = ctx.saved_tensors
        return derivative * grad.unsqueeze(-1), None, None


def _log_prob(
    scores: Tensor, indices: Tensor, mask: Tensor | None, *, derivative: bool
) -> tuple[Tensor, Tensor | None]:
    """The log-probability (...), and its derivative by the scores (..., K) if asked for."""
    k = indices.shape[-1]
    left = torch.empty_like(scores, memory_format=torch.contiguous_format)
    # A candidate named twice does not give the number of its first pick back.
    numbers = torch.arange(k, dtype=left.dtype, device=left.device).expand(indices.shape)
    left.scatter_(-1, indices, numbers)
    if not torch.equal(left.gather(-1, indices), numbers):
        raise _refusal(scores, indices, mask)
    left.copy_(scores)
    if mask is not None:
        left.masked_fill_(~mask, -math.inf)
    picked = left.gather(-1, indices)  # (..., k)
    # What is left for the last pick, itself included. All is relative to the best of it from here on: that keeps the
    # digits which a common offset, or far better picks before it, would take.
    earlier = indices[..., :-1]
    left.scatter_(-1, earlier, torch.full_like(earlier, -math.inf, dtype=left.dtype))  # twice as fast as with a scalar
    # On a CPU amax reads fewer than 32 numbers one by one, in twice the time of max.
    best = left.amax(-1, keepdim=True) if left.shape[-1] >= 32 else left.max(-1, keepdim=True).values
    left.sub_(best).exp_()
    mass = left.sum(-1).view(-1)  # at least 1
    values = (picked - best).view(-1, k).t().contiguous()  # (k, rows): a step of the scan is one contiguous operation
    terms = values - _running_logsumexp(values, mass.log())
    result = terms.sum(0)
    if not math.isfinite(result.sum().item()) and not bool(torch.isfinite(result).all()):
        raise _refusal(scores, indices, mask)
    result = result.view(scores.shape[:-1])
    if not derivative:
        return result, None
    # sums_t = sum_{i <= t} exp(d_t - d_i), which lies in [1, t], by sums_{t+1} = 1 + sums_t exp(d_{t+1} - d_t), where
    # the last factor is the probability 1 - p_t of not taking the pick.
    taken = terms.exp_()
    sums = torch.ones_like(taken)
    for (before, here), factor in zip(pairwise(sums.unbind(0)), torch.rsub(taken, 1).unbind(0), strict=False):
        here.addcmul_(before, factor)
    of_rest = sums[-1].div(mass).neg_()
    of_picks = torch.rsub(taken.mul_(sums), 1)
    left.mul_(of_rest.view(best.shape)).scatter_(-1, indices, of_picks.t().view(indices.shape))
    return result, left


def _running_logsumexp(values: Tensor, last: Tensor) -> Tensor:
    """The logsumexp of all from each place on, along dimension 0 of (n, rows), with ``last`` in the last place."""
    result = values.clone()
    result[-1] = last
    if values.device.type == "cpu" and values.shape[1] >= _ROWS_THAT_PAY_FOR_A_LOOP:
        for after, here in pairwise(reversed(result.unbind(0))):
            torch.logaddexp(here, after, out=here)
        return result
    return result.flip(0).logcumsumexp(0).flip(0)


def _raised(scores: Tensor) -> Tensor:
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def _checked_mask(mask: Tensor | None, scores: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be of dtype bool, True for valid candidates, got {mask.dtype}")
    try:
        return mask.expand(scores.shape)
    except RuntimeError as error:
        raise ValueError(
            f"mask must broadcast to the scores, got mask {tuple(mask.shape)} and scores {tuple(scores.shape)}"
        ) from error


def _pool(scores: Tensor, mask: Tensor | None, *, name: str = "scores") -> Tensor:
    """Scores in at least float32, -inf where masked."""
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"{name} must be (..., K) with at least one candidate, got {tuple(scores.shape)}")
    mask = _checked_mask(mask, scores)
    pool = _raised(scores)
    if mask is not None:
        pool = pool.masked_fill(~mask, -math.inf)
    if bool((bad := ~(pool < math.inf)).any()):
        raise ValueError(f"{name} must be numbers below +inf, got NaN or +inf in {_named(bad.any(-1))}")
    return pool


def _first_pick(scores: Tensor, mask: Tensor | None, *, name: str = "scores") -> Tensor:
    """Log-probabilities (..., K) of the first pick."""
    pool = _pool(scores, mask, name=name)
    if bool((empty := pool.amax(-1) == -math.inf).any()):
        raise ValueError(f"the pool has no valid candidate in {_named(empty)} of {name}")
    return pool.log_softmax(-1)


def _refusal(scores: Tensor, indices: Tensor, mask: Tensor | None) -> ValueError:
    """What is wrong with the arguments of a log-probability that cannot be computed."""
    try:
        picked = _pool(scores.detach(), mask).gather(-1, indices)
    except ValueError as error:
        return error
    ordered = indices.sort(-1).values
    if bool((twice := (ordered[..., 1:] == ordered[..., :-1]).any(-1)).any()):
        return ValueError(f"indices of a list must differ: a candidate is picked twice in {_named(twice)}")
    if bool((masked := (picked == -math.inf).any(-1)).any()):
        return ValueError(f"indices must name valid candidates: one masked or at -inf is picked in {_named(masked)}")
    return ValueError(f"scores lie too far apart: a log-probability is below the least number of {picked.dtype}")


def _named(bad: Tensor, counts: Tensor | None = None) -> str:
    """Names the first rows of a (...) bool tensor, with their counts: ``row 3 (2), row 7 (0) and 2 more``."""
    if bad.ndim == 0:
        return "the only row" if counts is None else f"the only row ({counts.item()})"
    places = bad.nonzero()
    told = []
    for place in places[:_ROWS_NAMED].tolist():
        row = f"row {place[0] if len(place) == 1 else tuple(place)}"
        told.append(row if counts is None else f"{row} ({int(counts[tuple(place)])})")
    more = f" and {len(places) - _ROWS_NAMED} more" if len(places) > _ROWS_NAMED else ""
    return ", ".join(told) + more
