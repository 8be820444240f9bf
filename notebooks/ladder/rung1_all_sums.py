"""Rung 1, all sums: write the N * N sums of a token to memory, then read them k times.

The definition, taken at its word. One kernel adds x[i] and y[j] for all pairs and stores the sums. Another looks for
the largest of them, k times; what it has found it overwrites with NaN, which wins no comparison. The order of the
search is the order of the experts, so of equal sums the lower expert is found first.

What it costs, by arithmetic: N = 256 makes 65536 sums of 4 bytes a token, written once and read k = 16 times, 4.5 MB a
token. For 65536 tokens that is 292 GB, at 3 TB/s about 97 ms. The logits and the results are 73 MB, 24 us.

Who owns what: a program has one token, and each of its threads every 1024th sum. Between two rounds nothing stays in
registers: everything comes from memory again. Logits must not be NaN.
"""

import torch
import triton
import triton.language as tl

SUMS_AT_ONCE = 1 << 30  # 4 GiB; more tokens are taken in turn


@triton.jit
def sums_kernel(x_ptr, y_ptr, sums_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, N * N, BLOCK):
        experts = start + tl.arange(0, BLOCK)
        mask = experts < N * N
        x = tl.load(x_ptr + token * N + experts // N, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + token * N + experts % N, mask=mask, other=0.0).to(tl.float32)
        tl.store(sums_ptr + token * N * N + experts, x + y, mask=mask)


@triton.jit
def round_kernel(sums_ptr, scores_ptr, experts_ptr, slot, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    sums_ptr += token * N * N
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), N * N, tl.int32)  # N * N: none so far
    for start in range(0, N * N, BLOCK):
        experts = start + tl.arange(0, BLOCK)
        sums = tl.load(sums_ptr + experts, mask=experts < N * N, other=float("nan"))
        better = (sums > best) | ((sums == best) & (place == N * N))  # the second for a first sum of -inf
        best = tl.where(better, sums, best)
        place = tl.where(better, experts, place)
    score = tl.max(best, 0)
    expert = tl.min(tl.where(best == score, place, N * N), 0)
    tl.store(scores_ptr + token * K + slot, score)
    tl.store(experts_ptr + token * K + slot, expert)
    tl.store(sums_ptr + expert, float("nan"))


def route(x, y, k):
    """The k best of the N * N sums x[t, i] + y[t, j]: scores (T, k), best first, and experts i * N + j, int32."""
    dtype, (num_tokens, N) = x.dtype, x.shape
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:  # the interpreter does not round to it
        x, y = x.float(), y.float()
    x, y = x.contiguous(), y.contiguous()
    scores, experts = (torch.empty((num_tokens, k), dtype=kind, device=x.device) for kind in (x.dtype, torch.int32))
    at_once = max(1, SUMS_AT_ONCE // N**2)
    sums = torch.empty((min(at_once, num_tokens), N * N), dtype=torch.float32, device=x.device)
    for start in range(0, num_tokens, at_once):
        part = slice(start, start + at_once)
        grid = (len(x[part]),)
        sums_kernel[grid](x[part], y[part], sums, N, BLOCK=1024)
        for slot in range(k):
            round_kernel[grid](sums, scores[part], experts[part], slot, N, k, BLOCK=1024)
    return scores.to(dtype), experts
