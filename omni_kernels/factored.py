"""The exact factored router in one kernel: the k best of each factor, then the k best of their staircase.

A program holds whole rows of TILE_M tokens. Packed keys (keys.py) turn both selections into `tl.topk` of integers; the
staircase (reference.py) keeps the second one at about k·ln k candidates, where the k × k square would have k².
"""

import math

import torch
import triton
import triton.language as tl

from .configs import device_of, output_dtype
from .keys import LOWEST_KEY, pack, unpack

MAX_EXPERTS_PER_TOKEN = 64
MAX_EXPERT_SQRT = 4096  # a row must fit in one tile


@triton.jit
def _top_of_rows(logits_ptr, row_offsets, stride_n, in_batch, num_expert_sqrt, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
    """The TILE_K best (value, column) of each row, best first."""
    columns = tl.arange(0, TILE_N)
    mask = in_batch[:, None] & (columns < num_expert_sqrt)[None, :]
    offsets = row_offsets[:, None] + columns[None, :].to(tl.int64) * stride_n
    values = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    keys = tl.where((columns < num_expert_sqrt)[None, :], pack(values, columns[None, :]), LOWEST_KEY)
    return unpack(tl.topk(keys, TILE_K, dim=1))


@triton.jit
def _staircase(num_candidates: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr):
    """Rank pairs (a, b), from 0, with (a + 1)·(b + 1) <= K: SIDE rows of it, then what the first SIDE columns have left."""
    candidates = tl.arange(0, num_candidates)
    rank_x = tl.full((num_candidates,), 0, tl.int32)
    rank_y = tl.full((num_candidates,), 0, tl.int32)
    start: tl.constexpr = 0
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
    K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_batch = tokens < num_tokens
    best_x, rows = _top_of_rows(x_ptr, tokens * stride_xm, stride_xn, in_batch, num_expert_sqrt, TILE_N, TILE_K)
    best_y, columns = _top_of_rows(y_ptr, tokens * stride_ym, stride_yn, in_batch, num_expert_sqrt, TILE_N, TILE_K)

    rank_x, rank_y, is_candidate = _staircase(NUM_CANDIDATES, K, SIDE)
    is_candidate &= (rank_x < num_expert_sqrt) & (rank_y < num_expert_sqrt)
    at_x = tl.broadcast_to(rank_x[None, :], (TILE_M, NUM_CANDIDATES))
    at_y = tl.broadcast_to(rank_y[None, :], (TILE_M, NUM_CANDIDATES))
    sums = tl.gather(best_x, at_x, 1) + tl.gather(best_y, at_y, 1)
    experts = tl.gather(rows, at_x, 1) * num_expert_sqrt + tl.gather(columns, at_y, 1)
    keys = tl.topk(tl.where(is_candidate[None, :], pack(sums, experts), LOWEST_KEY), TILE_K, dim=1)

    slots = tl.arange(0, TILE_K)
    scores, indices = unpack(keys)
    outputs = tokens[:, None] * K + slots[None, :]
    mask = in_batch[:, None] & (slots < K)[None, :]
    tl.store(scores_ptr + outputs, scores.to(scores_ptr.dtype.element_ty), mask=mask)

    # Among -inf pairs only the index counts, which the staircase does not know. Fewer than K pairs are finite when one
    # of them is selected, so the -inf pairs among the first K experts fill up. A NaN or +inf makes counting unsafe.
    ordinary = (tl.max(best_x, 1) < float("inf")) & (tl.max(best_y, 1) < float("inf"))
    num_finite = tl.where(ordinary, tl.sum((scores > float("-inf")).to(tl.int32), 1), K)
    tl.store(indices_ptr + outputs, indices, mask=mask & (slots[None, :] < num_finite[:, None]))
    if tl.min(tl.where(in_batch, num_finite, K), 0) < K:
        x = tl.load(x_ptr + (tokens * stride_xm)[:, None] + (slots // num_expert_sqrt).to(tl.int64)[None, :] * stride_xn, mask=mask, other=0.0)
        y = tl.load(y_ptr + (tokens * stride_ym)[:, None] + (slots % num_expert_sqrt).to(tl.int64)[None, :] * stride_yn, mask=mask, other=0.0)
        masked = mask & (x.to(tl.float32) + y.to(tl.float32) == float("-inf"))
        slot = num_finite[:, None] + tl.cumsum(masked.to(tl.int32), 1) - 1
        outputs = tokens[:, None] * K + slot
        tl.store(indices_ptr + outputs, tl.broadcast_to(slots[None, :], (TILE_M, TILE_K)), mask=masked & (slot < K))


def factored_forward(router_logits_x, router_logits_y, num_experts_per_token):
    """Scores and indices of the k best experts; results as `reference.factored_router`, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's
            interpreter), any strides, at least one token; N at most MAX_EXPERT_SQRT.
        num_experts_per_token: k, from 1 to MAX_EXPERTS_PER_TOKEN.

    Returns:
        scores (num_tokens, k) in the logits' dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, dtype, device = num_experts_per_token, router_logits_x.dtype, router_logits_x.device
    scores = torch.empty((num_tokens, k), dtype=output_dtype(dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    tile_k = triton.next_power_of_2(k)
    tile_n = max(tile_k, triton.next_power_of_2(num_expert_sqrt))
    num_candidates = sum(k // rank for rank in range(1, k + 1))
    tile_m = max(1, 4096 // max(tile_n, triton.next_power_of_2(num_candidates)))
    with device_of(router_logits_x):
        factored_kernel[(triton.cdiv(num_tokens, tile_m),)](
            router_logits_x, router_logits_y, scores, indices,
            *router_logits_x.stride(), *router_logits_y.stride(), num_tokens, num_expert_sqrt,
            K=k, TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k,
            NUM_CANDIDATES=max(tile_k, triton.next_power_of_2(num_candidates)), SIDE=math.isqrt(k),
        )  # fmt: skip
    return scores.to(dtype), indices
