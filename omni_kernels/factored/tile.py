"""The kernel that runs wherever Triton does. It is plain Triton: tiles of tokens, whose rows a program's lanes share.

Packed keys (keys.py) turn each selection into `tl.topk` of integers. Of a row only the maxima of its chunks are sorted,
then the columns of the best chunks: the k best columns lie in the k chunks with the largest maxima.
"""

import dataclasses
import math

import triton
import triton.language as tl

from ..configs import interpreting
from .keys import LOWEST_KEY, index_bits, pack, unpack
from .plan import Plan, count
from .softmax import (
    LOG2E,
    add_exactly,
    as_integer,
    normalized,
    origin_of_row,
    ratio_of_pair,
    scales_of_scores,
    total_of_integers,
)

MAX_EXPERTS_PER_TOKEN = 64
MAX_TILE = 256  # columns sorted at once; longer rows are streamed


@dataclasses.dataclass(frozen=True)
class TilePlan(Plan):
    """How tile_kernel is launched."""

    tokens: int  # of a program
    tile_n: int  # columns of a row that are sorted at once
    tile_k: int  # experts of a token, padded
    chunk: int  # columns of which only the maximum is sorted at first
    num_candidates: int  # places for pairs, padded
    wide_keys: bool  # whether keys have 64 bits where 32 would do

    def why(self):
        return (
            f"tile_kernel, which runs wherever Triton does: {count(self.tokens, 'token')} and "
            f"{count(self.num_warps, 'warp')} a program; rows read in tiles of {self.tile_n} columns, of which the "
            f"maxima of chunks of {self.chunk} are sorted first."
        )

    @property
    def kernel(self):
        return tile_kernel

    @property
    def side(self):
        """The rows of the staircase that are written out, even of a short factor; its first columns have the rest."""
        return math.isqrt(self.k)

    @property
    def key(self):
        """What kind of keys (keys.py) logits have."""
        return tl.float32 if self.wide_keys else self.element_ty


@triton.jit
def _top_of_tile(row_ptrs, start, stride_n, num_columns, in_batch, PLAN):
    """The keys (value, column) of the tile_k best of a tile of each row, best first."""
    columns = (start + tl.arange(0, PLAN.tile_n))[None, :]
    mask = in_batch[:, None] & (columns < num_columns)
    values = tl.load(row_ptrs + columns.to(tl.int64) * stride_n, mask=mask, other=0.0).to(tl.float32)
    # Padding keeps its column, below every value's key, so that no two keys are equal.
    LOWEST: tl.constexpr = -(1 << 63) if PLAN.key == tl.float32 else -(1 << 31)
    INDEX_MASK: tl.constexpr = (1 << index_bits(PLAN.key)) - 1
    keys = pack(values, columns, PLAN.key)
    keys = tl.where(columns < num_columns, keys, tl.full((1, 1), LOWEST, keys.dtype) | (INDEX_MASK - columns))
    if PLAN.chunk > 1:
        _, column = unpack(tl.topk(_maxima_of_chunks(keys, PLAN.chunk), PLAN.tile_k, dim=1), PLAN.key)
        chunk = (column - start)[:, :, None] // PLAN.chunk
        place = chunk * PLAN.chunk + tl.arange(0, PLAN.chunk)[None, None, :]
        keys = tl.gather(keys, tl.reshape(place, (keys.shape[0], PLAN.tile_k * PLAN.chunk)), 1)
    return tl.topk(keys, PLAN.tile_k, dim=1)


@triton.jit
def top_of_rows(row_ptrs, stride_n, num_columns, in_batch, PLAN):
    """The keys (value, column) of the tile_k best of each row, best first."""
    best = _top_of_tile(row_ptrs, 0, stride_n, num_columns, in_batch, PLAN)
    if PLAN.num_expert_sqrt > PLAN.tile_n:
        for start in range(PLAN.tile_n, num_columns, PLAN.tile_n):
            more = _top_of_tile(row_ptrs, start, stride_n, num_columns, in_batch, PLAN)
            best = tl.topk(tl.reshape(tl.join(best, more), (best.shape[0], 2 * PLAN.tile_k)), PLAN.tile_k, dim=1)
    return best


@triton.jit
def _total_of_rows(row_ptrs, stride_n, num_columns, best, in_batch, PLAN):
    """The sum of exp(logit - best) over each row."""
    origin = origin_of_row(best)[:, None]
    total, rest = tl.zeros_like(best), tl.zeros_like(best)
    for start in range(0, num_columns, PLAN.tile_n):
        columns = (start + tl.arange(0, PLAN.tile_n))[None, :]
        mask = in_batch[:, None] & (columns < num_columns)
        values = tl.load(row_ptrs + columns.to(tl.int64) * stride_n, mask=mask, other=0.0).to(tl.float32)
        powers = tl.where(mask, tl.exp2((values - origin) * LOG2E), 0.0)
        total, rest = add_exactly(total, rest, tl.sum(powers, 1))
    return total


@triton.jit
def _maxima_of_chunks(keys, CHUNK):
    """[rows, columns] -> [rows, columns / CHUNK], by halves: Triton 3.6 fails on some reductions of a reshaped tile."""
    if CHUNK == 1:
        return keys
    else:
        even, odd = tl.split(tl.reshape(keys, (keys.shape[0], keys.shape[1] // 2, 2)))
        return _maxima_of_chunks(tl.maximum(even, odd), CHUNK // 2)


@triton.jit
def _staircase(PLAN):
    """Rank pairs (a, b), from 0, with (a + 1)·(b + 1) <= k: the first rows, then what the first columns have left."""
    K: tl.constexpr = PLAN.k
    SIDE: tl.constexpr = PLAN.side
    candidates = tl.arange(0, PLAN.num_candidates)
    rank_x = tl.full((PLAN.num_candidates,), 0, tl.int32)
    rank_y = tl.full((PLAN.num_candidates,), 0, tl.int32)
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


@triton.jit
def store_behind(indices_ptr, tokens, slots, num_finite, masked, K):
    """Store the experts of 0 to K - 1 that are `masked`, [tokens, slots], in the slots behind the first num_finite."""
    slot = num_finite[:, None] + tl.cumsum(masked.to(tl.int32), 1) - 1
    experts = tl.broadcast_to(slots[None, :], masked.shape)
    tl.store(indices_ptr + tokens[:, None] * K + slot, experts, mask=masked & (slot < K))


@triton.jit
def _first(values, slots):
    """The value in a row's first slot."""
    return tl.sum(tl.where((slots == 0)[None, :], values, 0.0), 1)


@triton.jit(do_not_specialize=["num_tokens"])
def tile_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr, saved_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    TILE_K: tl.constexpr = PLAN.tile_k
    num_expert_sqrt = PLAN.num_expert_sqrt
    tokens = tl.program_id(0).to(tl.int64) * PLAN.tokens + tl.arange(0, PLAN.tokens)
    in_batch = tokens < num_tokens
    x_rows, y_rows = x_ptr + (tokens * stride_xm)[:, None], y_ptr + (tokens * stride_ym)[:, None]
    best_x, rows = unpack(top_of_rows(x_rows, stride_xn, num_expert_sqrt, in_batch, PLAN), PLAN.key)
    best_y, columns = unpack(top_of_rows(y_rows, stride_yn, num_expert_sqrt, in_batch, PLAN), PLAN.key)

    rank_x, rank_y, is_candidate = _staircase(PLAN)
    is_candidate &= (rank_x < num_expert_sqrt) & (rank_y < num_expert_sqrt)
    at_x = tl.broadcast_to(rank_x[None, :], (PLAN.tokens, PLAN.num_candidates))
    at_y = tl.broadcast_to(rank_y[None, :], (PLAN.tokens, PLAN.num_candidates))
    # Where +inf may meet -inf, or NaN is there, all of the token's scores become NaN: every path agrees on that.
    slots = tl.arange(0, TILE_K)
    last = tl.full((PLAN.tokens, TILE_K), 0, tl.int32) + tl.minimum(PLAN.k, num_expert_sqrt) - 1
    opposites = (best_x + tl.gather(best_y, last, 1), best_y + tl.gather(best_x, last, 1))
    clash = (slots == 0)[None, :] & ((opposites[0] != opposites[0]) | (opposites[1] != opposites[1]))
    poison = tl.where(tl.sum(clash.to(tl.int32), 1) == 0, 0.0, float("nan"))
    sums = tl.gather(best_x, at_x, 1) + tl.gather(best_y, at_y, 1) + poison[:, None]
    rows_and_ranks = tl.gather(rows, at_x, 1) * TILE_K + at_y
    keys = tl.topk(tl.where(is_candidate[None, :], pack(sums, rows_and_ranks), LOWEST_KEY), TILE_K, dim=1)

    scores, rows_and_ranks = unpack(keys)
    is_slot = (slots < PLAN.k)[None, :]
    rank = tl.where(is_slot, rows_and_ranks % TILE_K, 0)
    indices = rows_and_ranks // TILE_K * num_expert_sqrt + tl.gather(columns, rank, 1)
    outputs = tokens[:, None] * PLAN.k + slots[None, :]
    mask = in_batch[:, None] & is_slot
    results = scores
    if PLAN.normalize is not None:
        first_x, first_y = _first(best_x, slots), _first(best_y, slots)
        row = (rows_and_ranks // TILE_K).to(tl.int64)
        x = tl.load(x_rows + row * stride_xn, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows + tl.gather(columns, rank, 1).to(tl.int64) * stride_yn, mask=mask, other=0.0).to(tl.float32)
        high, low = ratio_of_pair(x, y, first_x[:, None], first_y[:, None])
        total_x, total_y = first_x, first_y
        if PLAN.sums_rows:
            total_x = _total_of_rows(x_rows, stride_xn, num_expert_sqrt, first_x, in_batch, PLAN)
            total_y = _total_of_rows(y_rows, stride_yn, num_expert_sqrt, first_y, in_batch, PLAN)
            total = total_x * total_y
        else:
            total = total_of_integers(tl.sum(tl.where(is_slot, as_integer(high, low), 0), 1))
        best = first_x + first_y
        scales = scales_of_scores(total[:, None], best[:, None], first_x[:, None], first_y[:, None], PLAN)
        results = normalized(high, low, scales, PLAN)
        if saved_ptr is not None:
            tl.store(saved_ptr + tokens * 4, first_x, mask=in_batch)
            tl.store(saved_ptr + tokens * 4 + 1, total_x, mask=in_batch)
            tl.store(saved_ptr + tokens * 4 + 2, first_y, mask=in_batch)
            tl.store(saved_ptr + tokens * 4 + 3, total_y, mask=in_batch)
            if PLAN.has_weights:
                tl.store(saved_ptr + num_tokens.to(tl.int64) * 4 + outputs, results, mask=mask)
    tl.store(scores_ptr + outputs, results.to(scores_ptr.dtype.element_ty), mask=mask)

    # Among -inf pairs only the index counts, which the staircase does not know. Where one of them is selected, fewer
    # than k others exist, so the -inf pairs among the first k experts are enough. With NaN or +inf about, they may not.
    best_is_unsafe = (slots == 0)[None, :] & ~((best_x < float("inf")) & (best_y < float("inf")))
    fill = in_batch & (tl.sum(best_is_unsafe.to(tl.int32), 1) == 0)
    num_finite = tl.where(fill, tl.sum((is_slot & (scores > float("-inf"))).to(tl.int32), 1), PLAN.k)
    tl.store(indices_ptr + outputs, indices, mask=mask & (slots[None, :] < num_finite[:, None]))
    if tl.min(num_finite, 0) < PLAN.k:
        row, column = (slots // num_expert_sqrt).to(tl.int64)[None, :], (slots % num_expert_sqrt).to(tl.int64)[None, :]
        x = tl.load(x_rows + row * stride_xn, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows + column * stride_yn, mask=mask, other=0.0).to(tl.float32)
        masked = mask & (x + y == float("-inf"))
        store_behind(indices_ptr, tokens, slots, num_finite, masked, PLAN.k)


def plan_for(x, _, k, scores_dtype, normalize=None):
    """The plan for these logits. One token to a program, except in the interpreter, which runs them one by one."""
    num_tokens, num_expert_sqrt = x.shape
    tile_k = max(2, triton.next_power_of_2(k))  # Triton 3.6 has no tl.topk of one
    tile_n = min(MAX_TILE, max(tile_k, triton.next_power_of_2(num_expert_sqrt)))
    num_candidates = triton.next_power_of_2(sum(k // rank for rank in range(1, k + 1)))
    return TilePlan(
        num_expert_sqrt, k, x.dtype, scores_dtype, 1,
        tokens=triton.next_power_of_2(num_tokens) if interpreting() else 1, tile_n=tile_n, tile_k=tile_k,
        chunk=max(1, min(4, tile_n // tile_k // 4)),  # what is sorted again shall be little
        num_candidates=max(tile_k, num_candidates), wide_keys=False, normalize=normalize,
    )  # fmt: skip


def runs_on(_device, _num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, on any device that Triton has."""
    return num_experts_per_token <= MAX_EXPERTS_PER_TOKEN
