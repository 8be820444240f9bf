"""The factored router for many experts a token, which no lane's registers hold: lists live in memory.

Two lanes share a token, the even one with its row of x, the odd one with its row of y. A lane sorts its row PIECE
columns at a time with a network in registers (networks.py), and merges the pieces into the list of its k best by taking
the largest of their heads, k times.

The k best pairs are then taken one by one from the frontier of the staircase (reference.py): the even lane holds the
best pair left of each of its rows, row a being its rank a with the other factor's ranks from a on; the odd lane does
the same with the roles exchanged and the pairs of equal ranks left out. That is SIDE = ⌊√k⌋ pairs a lane; the better of
the two lanes' best is next, and its row moves on. (Selection in X + Y: Frederickson and Johnson 1982.)

Loops instead of networks of k keys keep the code short: at k = 64 a network of the whole staircase is more than the
instruction cache holds, and waits for its own instructions.

A pair's key is the 64 bits (sum, row, rank in y, rank in x). Rounding may turn pairs of one column around, hardly ever:
where two ranks of x lie so close that it could, all of the warp's pairs are taken from rows of x alone.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .configs import compares_doubles, device_of, interpreting, on_nvidia
from .keys import lowest, pack_wide, unpack, unpack_wide
from .networks import exchange, is_less, sort
from .pairs import fill_masked
from .rows import keys_of_bytes, keys_of_strided, row_alignment, skip_first
from .words import (
    allocate_private,
    allocate_rows,
    load_private,
    load_shared,
    load_shared_byte,
    partner,
    store_private,
    store_row,
    store_shared,
    sync_warp,
)

MAX_EXPERTS_PER_TOKEN = 256  # ranks take 8 bits of a pair's key
MAX_EXPERT_SQRT = 1 << 15  # and rows what is left of 31
SHARED_BYTES = 48 << 10  # what a program may declare
PIECE = 64  # columns sorted at once, in registers
PIECES = 4  # pieces merged at once


@triton.jit
def _best(keys, FP64: tl.constexpr):
    """The largest of a tuple."""
    if len(keys) == 1:
        return keys[0]
    else:
        HALF: tl.constexpr = len(keys) // 2
        return exchange(_best(keys[:HALF], FP64), _best(keys[HALF:], FP64), True, FP64)[0]


@triton.jit
def _merge_lists(heads, target, shared_target, RANKS: tl.constexpr, STEP: tl.constexpr, KEY: tl.constexpr,
                 FP64: tl.constexpr, writes):  # fmt: skip
    """Write the RANKS best keys of sorted lists, to private and to shared memory.

    heads: where each list starts in private memory; each ends with the lowest key. Returns the smallest step between
    unequal neighbours of the merged list, and the largest magnitude in it that is not infinite.
    """
    WIDE: tl.constexpr = KEY == tl.float32
    BYTES: tl.constexpr = 8 if WIDE else 4
    keys = ()
    for i in tl.static_range(len(heads)):
        keys = keys + (load_private(heads[i], WIDE),)
    least = lowest(keys[0], FP64)
    previous = tl.full(shared_target.shape, float("inf"), tl.float32)
    smallest_step, largest = previous, tl.zeros_like(previous)
    for rank in tl.range(RANKS):
        best = _best(keys, FP64)
        store_private(target + rank * BYTES, best)
        store_shared(shared_target + rank * STEP, best, BYTES * 8, writes)
        value = unpack(best, KEY, FP64)[0]
        smallest_step = tl.where(previous > value, tl.minimum(smallest_step, previous - value), smallest_step)
        largest = tl.where(tl.abs(value) < float("inf"), tl.maximum(largest, tl.abs(value)), largest)
        previous = value
        taken, moves = heads[0], ()
        for i in tl.static_range(len(heads)):
            moves = moves + ((keys[i] == best) & is_less(least, best, FP64),)
            taken = tl.where(moves[i], heads[i], taken)
        following = load_private(taken + BYTES, WIDE)
        next_keys, next_heads = (), ()
        for i in tl.static_range(len(heads)):
            next_keys = next_keys + (tl.where(moves[i], following, keys[i]),)
            next_heads = next_heads + (tl.where(moves[i], heads[i] + BYTES, heads[i]),)
        keys, heads = next_keys, next_heads
    return smallest_step, largest


@triton.jit
def _pair(x_list, y_list, rank_x, rank_y, poison, K: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr,
          KEY: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The key of a pair of ranks, or the lowest key outside the staircase."""
    inside = ((rank_x + 1) * (rank_y + 1) <= K) & (rank_x < RANKS) & (rank_y < RANKS)
    value_x, row = unpack(load_shared(x_list + tl.minimum(rank_x, RANKS - 1) * STEP, KEY == tl.float32), KEY, FP64)
    value_y = _value(y_list + tl.minimum(rank_y, RANKS - 1) * STEP, KEY, FP64)
    low = ((0x7FFF - row) << 16) | ((255 - rank_y) << 8) | (255 - rank_x)
    key = pack_wide(value_x + value_y + poison, low, True, FP64)
    return tl.where(inside, key, lowest(key, FP64))


@triton.jit
def _value(address, KEY: tl.constexpr, FP64: tl.constexpr):
    """The value of the key at an address of shared memory."""
    return unpack(load_shared(address, KEY == tl.float32), KEY, FP64)[0]


@triton.jit
def _ranks(key, FP64: tl.constexpr):
    """The ranks in x and in y of a pair's key."""
    _, low = unpack_wide(key, FP64)
    return 255 - (low & 255), 255 - ((low >> 8) & 255)


@triton.jit(do_not_specialize=["num_tokens"])
def frontier_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    NUM_EXPERT_SQRT: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr,
    TOKENS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, VECTOR: tl.constexpr,
    FP64: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = min(K, NUM_EXPERT_SQRT)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    # Where the lists of 16 tokens would not fit, a warp routes fewer, and its other lanes do as the first ones do.
    lane = tl.arange(0, 32) % (2 * TOKENS)
    writes = tl.arange(0, 32) < 2 * TOKENS
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    tokens = first_token + lane // 2
    odd = lane % 2 == 1
    read = tl.minimum(tokens, num_tokens - 1)  # lanes past the end route the last token again, and store nothing
    x_ptrs, y_ptrs = x_ptr + read * stride_xm, y_ptr + read * stride_ym
    row_ptrs, stride_n = tl.where(odd, y_ptrs, x_ptrs), tl.where(odd, stride_yn, stride_xn)

    # Pieces, and between tiles the best so far, are a lane's own business.
    KEY_BYTES: tl.constexpr = 8 if DTYPE == tl.float32 else 4
    PITCH: tl.constexpr = (PIECE + 1) * KEY_BYTES
    LIST: tl.constexpr = (RANKS + 1) * KEY_BYTES
    TILES: tl.constexpr = (NUM_EXPERT_SQRT + PIECE * PIECES - 1) // (PIECE * PIECES)
    private = allocate_private(lane, PIECES * PITCH + 2 * LIST)
    source, target = private + PIECES * PITCH, private + PIECES * PITCH + LIST
    least = lowest(tl.zeros_like(lane).to(tl.int64 if DTYPE == tl.float32 else tl.int32), FP64)
    for piece in tl.static_range(PIECES):
        store_private(private + piece * PITCH + PIECE * KEY_BYTES, least)
    store_private(source, least)  # nothing is best yet
    store_private(source + RANKS * KEY_BYTES, least)
    store_private(target + RANKS * KEY_BYTES, least)
    # Rank r of a lane's list is at r * STEP of shared memory, so that every lane has a bank to itself.
    STEP: tl.constexpr = 2 * TOKENS * KEY_BYTES
    OUT_PITCH: tl.constexpr = (K + 1) * 8
    out = allocate_rows(lane, TOKENS * OUT_PITCH + RANKS * STEP + RANKS * 32)
    lists = out + TOKENS * OUT_PITCH
    counters = lists + RANKS * STEP + tl.arange(0, 32)

    smallest_step = tl.full((32,), 0.0, tl.float32)
    largest = smallest_step
    for tile in tl.range(TILES):
        for piece in tl.range(PIECES):
            # The last pieces begin early where they would not fit, and skip what others have read.
            wanted = lane * 0 + (tile * PIECES + piece) * PIECE
            start = tl.minimum(wanted, NUM_EXPERT_SQRT - PIECE)
            if VECTOR > 0:
                keys = ()
                for offset in tl.static_range(0, PIECE * BYTES, VECTOR):
                    keys = keys + keys_of_bytes(
                        row_ptrs.to(tl.int64) + start * BYTES, offset, start + offset // BYTES, DTYPE, VECTOR,
                        DTYPE, FP64,
                    )  # fmt: skip
            else:
                keys = keys_of_strided(row_ptrs, stride_n, start, PIECE, DTYPE, True, FP64)
            if NUM_EXPERT_SQRT % (PIECE * PIECES) != 0:
                keys = skip_first(keys, wanted - start, FP64)
            keys = sort(keys, True, FP64)
            for i in tl.static_range(PIECE):
                store_private(private + piece * PITCH + i * KEY_BYTES, keys[i])
        heads = (source,) if TILES > 1 else ()
        for piece in tl.static_range(PIECES):
            heads = heads + (private + piece * PITCH,)
        smallest_step, largest = _merge_lists(
            heads, target, lists + lane * KEY_BYTES, RANKS, STEP, DTYPE, FP64, writes
        )  # fmt: skip
        source, target = target, source
    sync_warp(lane)

    x_list, y_list = lists + (lane & -2) * KEY_BYTES, lists + (lane | 1) * KEY_BYTES
    END: tl.constexpr = (RANKS - 1) * STEP
    first_x, last_x = _value(x_list, DTYPE, FP64), _value(x_list + END, DTYPE, FP64)
    first_y, last_y = _value(y_list, DTYPE, FP64), _value(y_list + END, DTYPE, FP64)
    # Where +inf may meet -inf, or NaN is there, all of the token's scores become NaN: every path agrees on that.
    poison = tl.where(
        (first_x + last_y == first_x + last_y) & (first_y + last_x == first_y + last_x), 0.0, float("nan")
    )
    # Two sums of one column can only round to the same if the step between their rows is below the sums' last bit, or
    # if they are infinite. (Which -inf pairs are selected, `fill_masked` decides.)
    step_x = tl.where(odd, partner(smallest_step, 1, True), smallest_step)
    exact = step_x > (largest + partner(largest, 1, True)) * 2.0**-22
    exact &= (poison == 0.0) & (first_x < float("inf")) & (first_y < float("inf"))
    by_rows = tl.max(tl.where(exact, 0, 1), 0)

    pairs = out + lane // 2 * OUT_PITCH
    num_finite = tl.zeros_like(lane)
    keys = ()
    for a in tl.static_range(SIDE):
        own, other = tl.zeros_like(lane) + a, tl.where(odd, a + 1, a)
        keys = keys + (
            _pair(
                x_list, y_list, tl.where(odd, other, own), tl.where(odd, own, other), poison, K, RANKS, STEP,
                DTYPE, FP64,
            ),
        )  # fmt: skip
    for slot in tl.range(K * (1 - by_rows)):
        best = _best(keys, FP64)
        rival = partner(best, 1, True)
        wins = is_less(rival, best, FP64)
        popped = tl.where(wins, best, rival)
        store_shared(pairs + slot * 8, popped, 64, writes & ~odd)
        num_finite += (unpack_wide(popped, FP64)[0] > float("-inf")).to(tl.int32)
        rank_x, rank_y = _ranks(best, FP64)
        row = tl.where(odd, rank_y, rank_x)
        key = _pair(
            x_list, y_list, tl.where(odd, rank_x + 1, rank_x), tl.where(odd, rank_y, rank_y + 1), poison, K, RANKS,
            STEP, DTYPE, FP64,
        )  # fmt: skip
        next_keys = ()
        for a in tl.static_range(SIDE):
            next_keys = next_keys + (tl.where(wins & (row == a), key, keys[a]),)
        keys = next_keys

    # By rows of x alone, of which `counters` counts the pairs taken.
    for rank in tl.range(RANKS * by_rows):
        store_shared(counters + rank * 32, tl.zeros_like(lane), 8, lane >= 0)
    for slot in tl.range(K * by_rows):
        best = lowest(lane.to(tl.int64), FP64)
        for rank in tl.range(RANKS):
            taken = load_shared_byte(counters + rank * 32)
            key = _pair(x_list, y_list, lane * 0 + rank, taken, poison, K, RANKS, STEP, DTYPE, FP64)
            best = exchange(best, key, True, FP64)[0]
        store_shared(pairs + slot * 8, best, 64, writes & ~odd)
        num_finite += (unpack_wide(best, FP64)[0] > float("-inf")).to(tl.int32)
        rank_x, rank_y = _ranks(best, FP64)
        store_shared(counters + rank_x * 32, rank_y + 1, 8, lane >= 0)
    sync_warp(lane)

    for start in tl.range(0, TOKENS * K, 32):
        output = start + tl.arange(0, 32)
        token = tl.minimum(output // K, TOKENS - 1)
        score, low = unpack_wide(load_shared(out + token * OUT_PITCH + output % K * 8, True), FP64)
        rank_y = 255 - ((low >> 8) & 255)
        y_key = load_shared(lists + rank_y * STEP + (token * 2 + 1) * KEY_BYTES, DTYPE == tl.float32)
        index = (0x7FFF - (low >> 16)) * NUM_EXPERT_SQRT + unpack(y_key, DTYPE, FP64)[1]
        valid = (output < TOKENS * K) & (first_token + token < num_tokens)
        store_row(scores_ptr + first_token * K + output, (score.to(scores_ptr.dtype.element_ty),), valid, True)
        store_row(indices_ptr + first_token * K + output, (index,), valid, True)

    ordinary = (tokens < num_tokens) & (first_x < float("inf")) & (first_y < float("inf")) & (num_finite < K)
    if tl.max(ordinary.to(tl.int32), 0) != 0:
        sync_warp(lane)  # after the others' stores
        fill_masked(
            x_ptrs, y_ptrs, indices_ptr + tokens * K, stride_xn, stride_yn, num_finite, ordinary & writes & ~odd,
            NUM_EXPERT_SQRT, K, True,
        )  # fmt: skip


def frontier_forward(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype):
    """Scores and indices of the k best experts; results as `reference.factored_router`, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on an NVIDIA GPU from Ampere on, any
            strides, at least one token, N at most MAX_EXPERT_SQRT.
        num_experts_per_token: k, from 1 to MAX_EXPERTS_PER_TOKEN.
        scores_dtype: fp32, fp16 or bf16.

    Returns:
        scores (num_tokens, k) in scores_dtype and indices (num_tokens, k), int32.
    """
    x, y, k = router_logits_x, router_logits_y, num_experts_per_token
    num_tokens, num_expert_sqrt = x.shape
    scores = torch.empty((num_tokens, k), dtype=scores_dtype, device=x.device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=x.device)
    with device_of(x):
        constants = kernel_constants(num_expert_sqrt, k, x.dtype, row_alignment(x, y), compares_doubles(x.device))
        frontier_kernel[(-(-num_tokens // constants["TOKENS"]),)](
            x, y, scores, indices, *x.stride(), *y.stride(), num_tokens, **constants
        )
    return scores, indices


@functools.cache
def kernel_constants(num_expert_sqrt, k, dtype, alignment, fp64):
    """The kernel's constants. alignment: of the rows, in bytes; 0 where their logits do not lie side by side."""
    row = num_expert_sqrt * dtype.itemsize
    piece = min(PIECE, num_expert_sqrt)
    vector = min(alignment, row & -row, piece * dtype.itemsize & -(piece * dtype.itemsize))
    ranks = min(k, num_expert_sqrt)
    token_bytes = (k + 1) * 8 + ranks * (16 if dtype == torch.float32 else 8)
    return {
        "NUM_EXPERT_SQRT": num_expert_sqrt, "K": k, "SIDE": min(math.isqrt(k), num_expert_sqrt),
        "TOKENS": next(tokens for tokens in (16, 8, 4) if tokens * token_bytes + ranks * 32 <= SHARED_BYTES),
        "PIECE": piece,
        "PIECES": min(PIECES, -(-num_expert_sqrt // piece)), "VECTOR": vector if vector >= 4 else 0,
        "FP64": fp64, "num_warps": 1,
    }  # fmt: skip


def runs_on(device, num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, and the device: NVIDIA GPUs from Ampere on."""
    fits = num_experts_per_token <= MAX_EXPERTS_PER_TOKEN and num_expert_sqrt <= MAX_EXPERT_SQRT
    return fits and not interpreting() and on_nvidia(device)
