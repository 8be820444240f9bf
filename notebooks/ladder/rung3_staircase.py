"""Rung 3, the staircase: sort what is short, and add only pairs that can win.

Let both factors be sorted, best first. The pair of ranks (a, b), counted from 1, is beaten by all pairs of better
ranks, a * b - 1 of them. So it can be among the k best only if a * b <= k: row a of the pairs of ranks ends at k / a,
and what is left looks like a staircase. For k = 16 it has 50 pairs, for k = 64 it has 280: about k ln k. And only the
k best of each factor are needed for it.

What it should gain, by arithmetic: a round now looks at N = 256 logits or at 50 sums, where it looked at 65536. In
warp instructions a token: 2 * 16 rounds of 73, 16 of 28, and some to make the pairs, in all 2950 instead of half a
million. At 927 a nanosecond (rung 2) that is 209 us for 65536 tokens: 180 times less.

Who owns what: a program is one warp and has one token; no barrier is needed. A lane has 8 logits of the row it looks
at, then 2 of the 64 places for pairs. A round is two reductions over the warp: the largest value left, by 5 shuffles,
and the first place that has it. Logits must not be NaN or +inf. Sums that only rounding makes equal are ordered by
expert too, as far as they are among the pairs.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def best_first(values, ids, left, COUNT: tl.constexpr, SLOTS: tl.constexpr):
    """The ids of the COUNT best of the values left, best first; of equal values the lower id first."""
    slots = tl.arange(0, SLOTS)
    best_ids = tl.full((SLOTS,), 0x7FFFFFFF, tl.int32)
    for slot in range(COUNT):
        best = tl.max(tl.where(left, values, float("-inf")), 0)
        first = tl.min(tl.where(left & (values == best), ids, 0x7FFFFFFF), 0)
        best_ids = tl.where(slots == slot, first, best_ids)
        left = left & (ids != first)
    return best_ids


@triton.jit
def staircase(PLACES: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr):
    """The ranks of the pairs, counted from 0, row after row, and which places have one."""
    places = tl.arange(0, PLACES)
    a, b, count = tl.zeros_like(places), places, 0
    for rank in range(RANKS):
        a = tl.where(places >= count, rank, a)
        b = tl.where(places >= count, places - count, b)
        count += tl.minimum(K // (rank + 1), RANKS)
    return a, tl.minimum(b, RANKS - 1), places < count


@triton.jit
def sums_of(x_row, y_row, experts, mask, N: tl.constexpr):
    x = tl.load(x_row + experts // N, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_row + experts % N, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x + y, float("-inf"))


@triton.jit
def staircase_kernel(
    x_ptr, y_ptr, scores_ptr, experts_ptr,
    N: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, SLOTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + token * N, y_ptr + token * N
    ids = tl.arange(0, COLUMNS)
    x = tl.load(x_row + ids, mask=ids < N, other=0.0).to(tl.float32)
    y = tl.load(y_row + ids, mask=ids < N, other=0.0).to(tl.float32)
    rows = best_first(x, ids, ids < N, RANKS, SLOTS)
    columns = best_first(y, ids, ids < N, RANKS, SLOTS)

    a, b, is_pair = staircase(PLACES, K, RANKS)
    pairs = tl.gather(rows, a, 0) * N + tl.gather(columns, b, 0)
    experts = best_first(sums_of(x_row, y_row, pairs, is_pair, N), pairs, is_pair, K, SLOTS)

    slots = tl.arange(0, SLOTS)
    scores = sums_of(x_row, y_row, experts, (slots < K) & (experts < N * N), N)
    finite = scores > float("-inf")
    tl.store(scores_ptr + token * K + slots, scores, mask=slots < K)
    tl.store(experts_ptr + token * K + slots, experts, mask=finite)
    num_finite = tl.sum(finite.to(tl.int32), 0)
    if num_finite < K:  # equals of -inf, whose order ranks do not know; the first K experts have enough of them
        masked = (sums_of(x_row, y_row, slots, slots < K, N) == float("-inf")) & (slots < K)
        places = num_finite + tl.cumsum(masked.to(tl.int32), 0) - 1
        tl.store(experts_ptr + token * K + places, slots, mask=masked & (places < K))


def route(x, y, k):
    """The k best of the N * N sums x[t, i] + y[t, j]: scores (T, k), best first, and experts i * N + j, int32."""
    dtype, (num_tokens, N) = x.dtype, x.shape
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:  # the interpreter does not round to it
        x, y = x.float(), y.float()
    x, y = x.contiguous(), y.contiguous()
    scores, experts = (torch.empty((num_tokens, k), dtype=kind, device=x.device) for kind in (x.dtype, torch.int32))
    ranks = min(k, N)
    num_pairs = sum(min(k // a, ranks) for a in range(1, ranks + 1))
    columns, slots, places = map(triton.next_power_of_2, (N, k, num_pairs))
    staircase_kernel[(num_tokens,)](x, y, scores, experts, N, k, ranks, columns, slots, places, num_warps=1)
    return scores.to(dtype), experts
