"""The kernels around the router of candidates (../sharded.py): the lists that ranks sent become two matrices of logits,
and places in those become experts. PyTorch takes forty operators for that, and the host longer than the GPU.

keys: (num_ranks, num_tokens, 2 * k), as lists.py makes them: of each rank the k best columns of x, then of y.
"""

import torch
import triton
import triton.language as tl

from ..configs import OPTIONS, device_of, output_dtype
from .keys import unpack
from .plan import ELEMENTS
from .tile import store_behind

BLOCK = 1024  # candidates of a program
SLOTS = 512  # and experts


@triton.jit
def _candidate(keys_ptr, number, tokens, num_tokens, FACTOR: tl.constexpr, mask, K: tl.constexpr, KEY: tl.constexpr):
    """The logit and the column of a factor's candidate, 0 for x and 1 for y, of tokens."""
    source = (number // K * num_tokens + tokens) * (2 * K) + (number % K + FACTOR * K)
    return unpack(tl.load(keys_ptr + source, mask=mask, other=0), KEY)


@triton.jit(do_not_specialize=["num_tokens"])
def matrices_kernel(
    keys_ptr, x_ptr, y_ptr, num_tokens, RANKS: tl.constexpr, K: tl.constexpr, KEY: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    outputs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tokens, number = outputs // (RANKS * K), outputs % (RANKS * K)
    mask = tokens < num_tokens
    x, _ = _candidate(keys_ptr, number, tokens, num_tokens, 0, mask, K, KEY)
    y, _ = _candidate(keys_ptr, number, tokens, num_tokens, 1, mask, K, KEY)
    tl.store(x_ptr + outputs, x.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + outputs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def experts_kernel(
    keys_ptr, places_ptr, experts_ptr, num_expert_sqrt, num_tokens,
    RANKS: tl.constexpr, K: tl.constexpr, KEY: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    CANDIDATES: tl.constexpr = RANKS * K
    tokens = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    slots = tl.arange(0, TILE_K)[None, :]
    inside = tokens < num_tokens
    mask = inside[:, None] & (slots < K)
    outputs = tokens[:, None] * K + slots
    places = tl.load(places_ptr + outputs, mask=mask, other=0)
    x, row = _candidate(keys_ptr, places // CANDIDATES, tokens[:, None], num_tokens, 0, mask, K, KEY)
    y, column = _candidate(keys_ptr, places % CANDIDATES, tokens[:, None], num_tokens, 1, mask, K, KEY)
    is_masked = mask & (x + y == float("-inf"))
    num_finite = tl.zeros_like(tokens).to(tl.int32) + K
    if tl.max(tl.max(is_masked.to(tl.int32), 1), 0) != 0:
        # Of -inf pairs the lowest, as in sharded._experts: their row is 0, their columns the first K.
        first_row = tl.full((TILE_M,), float("-inf"), tl.float32)
        first_columns = tl.full((TILE_M, TILE_K), float("-inf"), tl.float32)
        ordinary = inside
        for number in tl.range(0, CANDIDATES):
            x_here, row_here = _candidate(keys_ptr, number, tokens, num_tokens, 0, inside, K, KEY)
            y_here, column_here = _candidate(keys_ptr, number, tokens, num_tokens, 1, inside, K, KEY)
            first_row = tl.where(row_here == 0, x_here, first_row)
            first_columns = tl.where(column_here[:, None] == slots, y_here[:, None], first_columns)
            ordinary = ordinary & (x_here < float("inf")) & (y_here < float("inf"))
        filled = mask & ordinary[:, None] & (first_row[:, None] + first_columns == float("-inf"))
        num_finite = tl.where(ordinary, K - tl.sum(is_masked.to(tl.int32), 1), K)
        store_behind(experts_ptr, tokens, tl.arange(0, TILE_K), num_finite, filled, K)
    tl.store(experts_ptr + outputs, row * num_expert_sqrt + column, mask=mask & (slots < num_finite[:, None]))


def matrices(keys, dtype):
    """The candidates' logits of x and of y, (num_tokens, num_ranks * k) each, in their dtype."""
    num_ranks, num_tokens, k = *keys.shape[:2], keys.shape[2] // 2
    shape = num_tokens, num_ranks * k
    x, y = (torch.empty(shape, dtype=output_dtype(dtype), device=keys.device) for _ in range(2))
    if x.numel():
        with device_of(keys):
            matrices_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                keys, x, y, num_tokens, RANKS=num_ranks, K=k, KEY=ELEMENTS[dtype], TILE=BLOCK, **OPTIONS
            )
    return x.to(dtype), y.to(dtype)


def experts(keys, places, dtype, num_expert_sqrt):
    """The experts at places of `matrices`, (num_tokens, k), int32; of those that score -inf the lowest."""
    (num_tokens, k), num_ranks = places.shape, len(keys)
    found = torch.empty_like(places)
    if found.numel():
        tile_k = triton.next_power_of_2(k)
        tile_m = max(1, SLOTS // tile_k)
        with device_of(keys):
            experts_kernel[(triton.cdiv(num_tokens, tile_m),)](
                keys, places, found, num_expert_sqrt, num_tokens,
                RANKS=num_ranks, K=k, KEY=ELEMENTS[dtype], TILE_M=tile_m, TILE_K=tile_k, **OPTIONS,
            )  # fmt: skip
    return found
