"""Rung 5, chunk maxima: the k best of a row lie in the k chunks with the largest maxima.

If one of the k best were elsewhere, each of those k chunks would have a key above it: too many. So the rounds look at
the maxima first, then at what is in the k best chunks: 128 + 128 keys instead of 1024, for N = 1024 and k = 16.

What it should gain, by arithmetic: of N = 1024 a lane compares 4 + 4 keys a round instead of 32, but there are twice
as many rounds: 1800 warp instructions a token instead of 3300. Of N = 256 it is 2 + 2 instead of 8, and the second
rounds eat up what the first save: 1150 instead of 1200. Of fp32, with keys of 64 bits, it is 1740 instead of 2540.

Who owns what: a lane reads whole chunks, and finds their maxima in its own registers. What is in the best chunks it
reads again, from the cache. No NaN and no +inf; sums equal only by rounding are ordered as on rung 3.
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
def best_of_row(row, N: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
                SLOTS: tl.constexpr, FREE: tl.constexpr):  # fmt: skip
    columns = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    logits = tl.load(row + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
    maxima = tl.max(to_keys(logits, columns, FREE), 1)
    chunks = best_first(maxima, min(RANKS, tl.cdiv(N, CHUNK)), SLOTS, FREE) // CHUNK
    places = tl.arange(0, SLOTS * CHUNK)
    columns = tl.gather(chunks, places // CHUNK, 0) * CHUNK + places % CHUNK
    logits = tl.load(row + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
    return best_first(to_keys(logits, columns, FREE), RANKS, SLOTS, FREE)


@triton.jit
def chunks_kernel(
    x_ptr, y_ptr, scores_ptr, experts_ptr,
    N: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, PLACES: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + token * N, y_ptr + token * N
    rows = best_of_row(x_row, N, RANKS, CHUNKS, CHUNK, SLOTS, FREE)
    columns = best_of_row(y_row, N, RANKS, CHUNKS, CHUNK, SLOTS, FREE)

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
    chunk = triton.next_power_of_2(max(1, int((N / k) ** 0.5)))  # as many maxima as keys in the chunks, about
    chunks, slots, places = map(triton.next_power_of_2, (triton.cdiv(N, chunk), k, num_pairs))
    sizes = ranks, chunks, chunk, slots, places, FREE[x.dtype]
    chunks_kernel[(num_tokens,)](x, y, scores, experts, N, k, *sizes, num_warps=1)
    return scores.to(dtype), experts
