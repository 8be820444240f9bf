"""The exact factored router: the k best of each factor, then the k best of their staircase (reference.py).

`factored_forward` picks the kernel: on NVIDIA GPUs lanes.py for few experts a token, frontier.py for many. The kernel
here runs wherever Triton does. It gives TILE_M tokens to a program, whose lanes share their rows. Packed keys (keys.py)
turn each selection into `tl.topk` of integers. Of a row only the maxima of its chunks of CHUNK columns are sorted, then
the columns of the best chunks: the k best columns lie in the k chunks with the largest maxima.
"""

import math

import torch
import triton
import triton.language as tl

from . import frontier, lanes, reference
from .configs import OPTIONS, device_of, interpreting, kernel_input, output_dtype
from .keys import LOWEST_KEY, index_bits, pack, unpack

MAX_EXPERTS_PER_TOKEN = 64
MAX_TILE = 256  # columns sorted at once; longer rows are streamed


@triton.jit
def _top_of_tile(row_ptrs, start, stride_n, num_columns, in_batch, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
                 CHUNK: tl.constexpr, KEY: tl.constexpr):  # fmt: skip
    """The keys (value, column) of the TILE_K best among TILE_N columns of each row, best first."""
    columns = (start + tl.arange(0, TILE_N))[None, :]
    mask = in_batch[:, None] & (columns < num_columns)
    values = tl.load(row_ptrs + columns.to(tl.int64) * stride_n, mask=mask, other=0.0).to(tl.float32)
    # Padding keeps its column, below every value's key, so that no two keys are equal.
    LOWEST: tl.constexpr = -(1 << 63) if KEY == tl.float32 else -(1 << 31)
    INDEX_MASK: tl.constexpr = (1 << index_bits(KEY)) - 1
    keys = pack(values, columns, KEY)
    keys = tl.where(columns < num_columns, keys, tl.full((1, 1), LOWEST, keys.dtype) | (INDEX_MASK - columns))
    if CHUNK > 1:
        _, column = unpack(tl.topk(_maxima_of_chunks(keys, CHUNK), TILE_K, dim=1), KEY)
        place = (column - start)[:, :, None] // CHUNK * CHUNK + tl.arange(0, CHUNK)[None, None, :]
        keys = tl.gather(keys, tl.reshape(place, (keys.shape[0], TILE_K * CHUNK)), 1)
    return tl.topk(keys, TILE_K, dim=1)


@triton.jit
def _top_of_rows(row_ptrs, stride_n, num_columns, in_batch, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
                 CHUNK: tl.constexpr, KEY: tl.constexpr, STREAMED: tl.constexpr):  # fmt: skip
    """The TILE_K best (value, column) of each row, best first."""
    best = _top_of_tile(row_ptrs, 0, stride_n, num_columns, in_batch, TILE_N, TILE_K, CHUNK, KEY)
    if STREAMED:
        for start in range(TILE_N, num_columns, TILE_N):
            more = _top_of_tile(row_ptrs, start, stride_n, num_columns, in_batch, TILE_N, TILE_K, CHUNK, KEY)
            best = tl.topk(tl.reshape(tl.join(best, more), (best.shape[0], 2 * TILE_K)), TILE_K, dim=1)
    return unpack(best, KEY)


@triton.jit
def _maxima_of_chunks(keys, CHUNK: tl.constexpr):
    """[rows, columns] -> [rows, columns / CHUNK], by halves: Triton 3.6 fails on some reductions of a reshaped tile."""
    if CHUNK == 1:
        return keys
    else:
        even, odd = tl.split(tl.reshape(keys, (keys.shape[0], keys.shape[1] // 2, 2)))
        return _maxima_of_chunks(tl.maximum(even, odd), CHUNK // 2)


@triton.jit
def _staircase(num_candidates: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr):
    """Rank pairs (a, b), from 0, with (a + 1)·(b + 1) <= K: SIDE rows, then what the first SIDE columns have left."""
    candidates = tl.arange(0, num_candidates)
    rank_x = tl.full((num_candidates,), 0, tl.int32)
    rank_y = tl.full((num_candidates,), 0, tl.int32)
    start = 0
    for side in tl.static_range(SIDE):
        inside = (candidates >= start) & (candidates < start + K // (side + 1))
        rank_x = tl.where(inside, side, rank_x)
        rank_y = tl.where(inside, candidates - start, rank_y)
        start = start + K // (side + 1)
    for side in tl.static_range(SIDE):
        inside = (candidates >= start) & (candidates < start + K // (side + 1) - SIDE)
        rank_x = tl.where(inside, candidates - start + SIDE, rank_x)
        rank_y = tl.where(inside, side, rank_y)
        start = start + K // (side + 1) - SIDE
    return rank_x, rank_y, candidates < start


@triton.jit(do_not_specialize=["num_tokens"])
def factored_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens, num_expert_sqrt,
    K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr,
    WIDE_KEYS: tl.constexpr, STREAMED: tl.constexpr, NUM_CANDIDATES: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    KEY: tl.constexpr = tl.float32 if WIDE_KEYS else x_ptr.dtype.element_ty
    tokens = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_batch = tokens < num_tokens
    x_rows, y_rows = x_ptr + (tokens * stride_xm)[:, None], y_ptr + (tokens * stride_ym)[:, None]
    best_x, rows = _top_of_rows(
        x_rows, stride_xn, num_expert_sqrt, in_batch, TILE_N, TILE_K, CHUNK, KEY, STREAMED
    )  # fmt: skip
    best_y, columns = _top_of_rows(
        y_rows, stride_yn, num_expert_sqrt, in_batch, TILE_N, TILE_K, CHUNK, KEY, STREAMED
    )  # fmt: skip

    rank_x, rank_y, is_candidate = _staircase(NUM_CANDIDATES, K, SIDE)
    is_candidate &= (rank_x < num_expert_sqrt) & (rank_y < num_expert_sqrt)
    at_x = tl.broadcast_to(rank_x[None, :], (TILE_M, NUM_CANDIDATES))
    at_y = tl.broadcast_to(rank_y[None, :], (TILE_M, NUM_CANDIDATES))
    # Where +inf may meet -inf, or NaN is there, all of the token's scores become NaN: every path agrees on that.
    slots = tl.arange(0, TILE_K)
    last = tl.full((TILE_M, TILE_K), 0, tl.int32) + tl.minimum(K, num_expert_sqrt) - 1
    opposites = (best_x + tl.gather(best_y, last, 1), best_y + tl.gather(best_x, last, 1))
    clash = (slots == 0)[None, :] & ((opposites[0] != opposites[0]) | (opposites[1] != opposites[1]))
    poison = tl.where(tl.sum(clash.to(tl.int32), 1) == 0, 0.0, float("nan"))
    sums = tl.gather(best_x, at_x, 1) + tl.gather(best_y, at_y, 1) + poison[:, None]
    rows_and_ranks = tl.gather(rows, at_x, 1) * TILE_K + at_y
    keys = tl.topk(tl.where(is_candidate[None, :], pack(sums, rows_and_ranks), LOWEST_KEY), TILE_K, dim=1)

    scores, rows_and_ranks = unpack(keys)
    is_slot = (slots < K)[None, :]
    rank = tl.where(is_slot, rows_and_ranks % TILE_K, 0)
    indices = rows_and_ranks // TILE_K * num_expert_sqrt + tl.gather(columns, rank, 1)
    outputs = tokens[:, None] * K + slots[None, :]
    mask = in_batch[:, None] & is_slot
    tl.store(scores_ptr + outputs, scores.to(scores_ptr.dtype.element_ty), mask=mask)

    # Among -inf pairs only the index counts, which the staircase does not know. Where one of them is selected, fewer
    # than K others exist, so the -inf pairs among the first K experts are enough. With NaN or +inf about, they may not.
    best_is_unsafe = (slots == 0)[None, :] & ~((best_x < float("inf")) & (best_y < float("inf")))
    fill = in_batch & (tl.sum(best_is_unsafe.to(tl.int32), 1) == 0)
    num_finite = tl.where(fill, tl.sum((is_slot & (scores > float("-inf"))).to(tl.int32), 1), K)
    tl.store(indices_ptr + outputs, indices, mask=mask & (slots[None, :] < num_finite[:, None]))
    if tl.min(num_finite, 0) < K:
        row, column = (slots // num_expert_sqrt).to(tl.int64)[None, :], (slots % num_expert_sqrt).to(tl.int64)[None, :]
        x = tl.load(x_rows + row * stride_xn, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows + column * stride_yn, mask=mask, other=0.0).to(tl.float32)
        masked = mask & (x + y == float("-inf"))
        slot = num_finite[:, None] + tl.cumsum(masked.to(tl.int32), 1) - 1
        experts = tl.broadcast_to(slots[None, :], (TILE_M, TILE_K))
        tl.store(indices_ptr + tokens[:, None] * K + slot, experts, mask=masked & (slot < K))


def factored_forward(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None):
    """Scores and indices of the k best experts, by the kernel that fits, or by `reference.factored_router` where none
    does; the same results, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's
            interpreter), any strides, at least one token.
        num_experts_per_token: k, from 1 to N². lanes.py and frontier.py take what their `runs_on` say, the kernel here
            up to MAX_EXPERTS_PER_TOKEN.
        scores_dtype: fp32, fp16 or bf16; the logits' unless given.

    Returns:
        scores (num_tokens, k) in scores_dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, device = num_experts_per_token, router_logits_x.device
    scores_dtype = scores_dtype or router_logits_x.dtype
    for kernel, route in ((lanes, lanes.lanes_forward), (frontier, frontier.frontier_forward)):
        if kernel.runs_on(device, num_expert_sqrt, k):
            return route(router_logits_x, router_logits_y, k, scores_dtype)
    if k > MAX_EXPERTS_PER_TOKEN:
        return reference.factored_router(router_logits_x, router_logits_y, k, scores_dtype)
    x, y = kernel_input(router_logits_x), kernel_input(router_logits_y)
    scores = torch.empty((num_tokens, k), dtype=output_dtype(scores_dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    constants = kernel_constants(num_tokens, num_expert_sqrt, k)
    with device_of(x):
        factored_kernel[(triton.cdiv(num_tokens, constants["TILE_M"]),)](
            x, y, scores, indices, *x.stride(), *y.stride(), num_tokens, num_expert_sqrt, **constants
        )
    return scores.to(scores_dtype), indices


def kernel_constants(num_tokens, num_expert_sqrt, k):
    """The kernel's constants. One token to a program, except in the interpreter, which runs them one by one."""
    tile_k = max(2, triton.next_power_of_2(k))  # Triton 3.6 has no tl.topk of one
    tile_n = min(MAX_TILE, max(tile_k, triton.next_power_of_2(num_expert_sqrt)))
    num_candidates = triton.next_power_of_2(sum(k // rank for rank in range(1, k + 1)))
    return {
        "K": k, "TILE_M": triton.next_power_of_2(num_tokens) if interpreting() else 1, "TILE_N": tile_n,
        "TILE_K": tile_k, "CHUNK": max(1, min(4, tile_n // tile_k // 4)),  # what is sorted again shall be little
        "WIDE_KEYS": False, "STREAMED": num_expert_sqrt > tile_n, "NUM_CANDIDATES": max(tile_k, num_candidates),
        "SIDE": math.isqrt(k), "num_warps": 1, **OPTIONS,
    }  # fmt: skip
