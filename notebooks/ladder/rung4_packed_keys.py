"""Rung 4, packed keys: one maximum finds value and place at once.

A float's bits, with those of a negative number's magnitude flipped, order as an integer exactly as floats do. With the
column below them, counted backwards, the key of a 16-bit logit is an integer of 32 bits: the largest key is the
largest logit, and of equal ones that of the lower column. No two keys are equal. So a round needs one reduction
instead of two, and no note of what has been taken: the next best is the largest key below the last one. Only -0.0
needs care, which equals 0.0 and has other bits. (The trick is radix sort's.)

What it should gain, by arithmetic: a round of rung 3 is 73 instructions, most of them for two reductions and for what
has been taken; here it is 26, to compare, select and reduce 8 keys. REDUX, one instruction, reduces 32-bit integers
over a warp. Sums have 32 bits and an expert 31, so keys of pairs have 64; those are reduced half by half. In all 1200
warp instructions a token instead of 2950: 85 us for 65536 tokens.

Who owns what: as on rung 3, a program is one warp and has one token, a lane 8 keys of a row and 2 of the 64 places for
pairs. Logits must not be NaN or +inf; sums equal only by rounding are ordered as on rung 3.
"""

import torch
import triton
import triton.language as tl

FREE = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 32}  # bits below a logit's own; the columns must fit


@triton.jit
def to_keys(values, ids, FREE: tl.constexpr):
    """Integers of the order of the values, then of falling ids. Of a value's bits the last FREE say nothing."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if FREE < 32:
        return (bits & -(1 << FREE)) | ((1 << FREE) - 1 - ids)
    else:
        return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - ids)


@triton.jit
def best_first(keys, COUNT: tl.constexpr, SLOTS: tl.constexpr, FREE: tl.constexpr):
    """The ids of the COUNT best keys, best first."""
    LOWEST: tl.constexpr = -(2 ** (keys.dtype.primitive_bitwidth - 1))
    MASK: tl.constexpr = 2 ** min(FREE, 31) - 1
    slots = tl.arange(0, SLOTS)
    best_keys = tl.full((SLOTS,), LOWEST, keys.dtype)
    last = tl.max(keys, 0)
    for slot in range(COUNT):
        best_keys = tl.where(slots == slot, last, best_keys)
        last = tl.max(tl.where(keys < last, keys, LOWEST), 0)
    return MASK - (best_keys & MASK).to(tl.int32)


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
def keys_kernel(
    x_ptr, y_ptr, scores_ptr, experts_ptr,
    N: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, SLOTS: tl.constexpr, PLACES: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + token * N, y_ptr + token * N
    ids = tl.arange(0, COLUMNS)
    # Columns past the last are -inf as well, but come after all others that are.
    x = tl.load(x_row + ids, mask=ids < N, other=float("-inf")).to(tl.float32)
    y = tl.load(y_row + ids, mask=ids < N, other=float("-inf")).to(tl.float32)
    rows = best_first(to_keys(x, ids, FREE), RANKS, SLOTS, FREE)
    columns = best_first(to_keys(y, ids, FREE), RANKS, SLOTS, FREE)

    a, b, is_pair = staircase(PLACES, K, RANKS)
    pairs = tl.gather(rows, a, 0) * N + tl.gather(columns, b, 0)
    sums = sums_of(x_row, y_row, pairs, is_pair, N)
    experts = best_first(to_keys(sums, pairs, 32), K, SLOTS, 32)

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
    free = FREE[x.dtype]
    keys_kernel[(num_tokens,)](x, y, scores, experts, N, k, ranks, columns, slots, places, free, num_warps=1)
    return scores.to(dtype), experts
