"""Rung 6, a row a lane: each thread sorts rows of its own, in its own registers.

A lane holds the k best keys of its token's row so far in k registers, sorted. It sorts the next k by a network, puts
them behind, worst first, and a bitonic merge keeps the best half, sorted. A network needs no branch and no shuffle.

What it should gain, by arithmetic: 16 more keys of a row are 400 instructions, for N = 256 32 times, and the 50 pairs
3900: 16700, but for 32 tokens, so 520 warp instructions a token instead of 1150: 37 us for 65536 tokens. Few tokens
lose: 1024 are 32 warps on 528 schedulers. k = 32 compiles for half a minute, k = 64 for more than four.

Who owns what: a program is one warp, lane t has token t. A key is a tensor of 32 numbers, one register in each lane,
and a tuple of them a list. No NaN and no +inf; sums equal only by rounding are ordered as on rung 3.
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
def from_key(key, FREE: tl.constexpr):
    MASK: tl.constexpr = 2 ** min(FREE, 31) - 1
    high = key if FREE < 32 else (key >> 32).to(tl.int32)
    bits = (high ^ ((high >> 31) & 0x7FFFFFFF)) & -(1 << FREE % 32)
    return bits.to(tl.float32, bitcast=True), MASK - (key & MASK).to(tl.int32)


@triton.jit
def bitonic(keys):
    """Sorted, best first, what falls and then rises: halved, no upper key is below a lower one, and so on."""
    HALF: tl.constexpr = len(keys) // 2
    if HALF == 0:
        return keys
    else:
        upper, lower = (), ()
        for i in tl.static_range(HALF):
            upper += (tl.maximum(keys[i], keys[i + HALF]),)
            lower += (tl.minimum(keys[i], keys[i + HALF]),)
        return bitonic(upper) + bitonic(lower)


@triton.jit
def sort(keys):
    if len(keys) == 1:
        return keys
    else:
        return bitonic(sort(keys[: len(keys) // 2]) + sort(keys[len(keys) // 2 :])[::-1])


@triton.jit
def best_of_row(row, N: tl.constexpr, SLOTS: tl.constexpr, VECTOR: tl.constexpr, FREE: tl.constexpr):
    places, LOWEST = tl.arange(0, VECTOR)[None, :], -(1 << 31) if FREE < 32 else -(1 << 63)
    best = (tl.full(row.shape, LOWEST, tl.int32 if FREE < 32 else tl.int64),) * SLOTS
    for start in range(0, N, SLOTS):
        more = ()
        for first in tl.static_range(0, SLOTS, VECTOR):
            columns = start + first + places
            logits = tl.load(row[:, None] + columns, mask=columns < N, other=float("-inf"))
            keys = to_keys(logits.to(tl.float32), columns, FREE)
            for i in tl.static_range(VECTOR):  # the columns are registers of a lane: this costs nothing
                more += (tl.max(tl.where(places == i, keys, LOWEST), 1),)
        best = bitonic(best + sort(more)[::-1])[:SLOTS]  # what is not needed for the best half is never computed
    return best


@triton.jit
def rows_kernel(x_ptr, y_ptr, scores_ptr, experts_ptr, num_tokens, N: tl.constexpr, K: tl.constexpr,
                SLOTS: tl.constexpr, VECTOR: tl.constexpr, FREE: tl.constexpr):  # fmt: skip
    tokens = tl.minimum(tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32), num_tokens - 1)
    best_x = best_of_row(x_ptr + tokens * N, N, SLOTS, VECTOR, FREE)
    best_y = best_of_row(y_ptr + tokens * N, N, SLOTS, VECTOR, FREE)
    pairs = ()
    for a in tl.static_range(min(K, N)):
        for b in tl.static_range(min(K // (a + 1), N)):
            value_x, row = from_key(best_x[a], FREE)
            value_y, column = from_key(best_y[b], FREE)
            pairs += (to_keys(value_x + value_y, row * N + column, 32),)
    best = (tl.full(tokens.shape, -(1 << 63), tl.int64),) * SLOTS
    pairs += best[: -len(pairs) % SLOTS]
    for start in tl.static_range(0, len(pairs), SLOTS):
        best = bitonic(best + sort(pairs[start : start + SLOTS])[::-1])[:SLOTS]
    slots = tl.arange(0, SLOTS)[None, :]
    scores, experts = tl.full((32, SLOTS), float("-inf"), tl.float32), tl.zeros((32, SLOTS), tl.int32)
    for slot in tl.static_range(K):
        score, expert = from_key(best[slot], 32)
        scores = tl.where(slots == slot, score[:, None], scores)
        experts = tl.where(slots == slot, expert[:, None], experts)
    finite, outputs = scores > float("-inf"), tokens[:, None] * K + slots
    tl.store(scores_ptr + outputs, scores, mask=slots < K)
    tl.store(experts_ptr + outputs, experts, mask=finite)
    if tl.sum(finite.to(tl.int32)) < 32 * K:  # equals of -inf, whose order ranks do not know; the first K have enough
        first_x = tl.load(x_ptr + tokens[:, None] * N + slots // N, mask=slots < K, other=0.0).to(tl.float32)
        first_y = tl.load(y_ptr + tokens[:, None] * N + slots % N, mask=slots < K, other=0.0).to(tl.float32)
        masked = (first_x + first_y == float("-inf")) & (slots < K)
        places = tl.sum(finite.to(tl.int32), 1)[:, None] + tl.cumsum(masked.to(tl.int32), 1) - 1
        tl.store(experts_ptr + tokens[:, None] * K + places, slots, mask=masked & (places < K))


def route(x, y, k):
    """The k best of the N * N sums x[t, i] + y[t, j]: scores (T, k), best first, and experts i * N + j, int32."""
    dtype, (num_tokens, N) = x.dtype, x.shape
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:  # the interpreter does not round to it
        x, y = x.float(), y.float()
    x, y = x.contiguous(), y.contiguous()
    scores, experts = (torch.empty((num_tokens, k), dtype=kind, device=x.device) for kind in (x.dtype, torch.int32))
    sizes = triton.next_power_of_2(k), min(16 // x.element_size(), triton.next_power_of_2(k)), FREE[x.dtype]
    rows_kernel[(triton.cdiv(num_tokens, 32),)](x, y, scores, experts, num_tokens, N, k, *sizes, num_warps=1)
    return scores.to(dtype), experts
