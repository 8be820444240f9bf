"""The factored router for more experts a token than lanes.py takes: pairs are taken one by one, and no lane holds them.

Two lanes share a token, the even one with its row of x, the odd one with its row of y. A lane sorts its row PIECE
columns at a time with a network in registers (networks.py). Another network merges each piece into the list of its k
best, if that fits in registers as well; if not, pieces go to local memory, and the largest of their heads is taken k
times.

The k best pairs are then taken one by one from the frontier of the staircase (reference.py): the even lane holds the
best pair left of each of its rows, row a being its rank a with the other factor's ranks from a on; the odd lane does
the same with the roles exchanged and the pairs of equal ranks left out. That is SIDE = ⌊√k⌋ pairs a lane; the better of
the two lanes' best is next, and its row moves on. (Selection in X + Y: Frederickson and Johnson 1982.)

Loops instead of networks of k keys keep the code short: at k = 64 a network of the whole staircase is more than the
instruction cache holds, and waits for its own instructions.

A pair's key is the 64 bits (sum, row, rank in y, rank in x). Rounding may turn pairs of one column around, hardly ever:
where two ranks of x lie so close that it could, all lanes take the token's pairs together, from rows of x alone.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .configs import OPTIONS, compares_doubles, device_of, interpreting, on_nvidia
from .keys import lowest, pack, pack_wide, unpack, unpack_wide
from .networks import is_less, merge_best, sort
from .pairs import fill_masked
from .rows import lowest_keys, row_alignment, sorted_group
from .words import (
    allocate_private,
    allocate_rows,
    hide,
    load_private,
    load_shared,
    partner,
    store_private,
    store_row,
    store_shared,
    sync_warp,
)

MAX_EXPERTS_PER_TOKEN = 256  # ranks take 8 bits of a pair's key; rows, of which there may be 46340, 16
SHARED_BYTES = 48 << 10  # what a program may declare
PIECE = 64  # columns sorted at once, in registers
PIECES = 4  # pieces merged at once, in memory
REGISTERS = 128  # of 32 bits, for the best keys of a row


@triton.constexpr_function
def _key_bytes(dtype):
    """The size of the keys of logits of a dtype."""
    return 8 if dtype == tl.float32 else 4


@triton.jit
def _merge_lists(heads, target, shared_target, RANKS: tl.constexpr, STEP: tl.constexpr, KEY: tl.constexpr,
                 FP64: tl.constexpr, writes):  # fmt: skip
    """Write the RANKS best keys of sorted lists, to private and to shared memory.

    heads: where each list starts in private memory; each ends with the lowest key.
    """
    WIDE: tl.constexpr = KEY == tl.float32
    BYTES: tl.constexpr = _key_bytes(KEY)
    keys = ()
    for i in tl.static_range(len(heads)):
        keys = keys + (load_private(heads[i], WIDE),)
    least = lowest(keys[0], FP64)
    for rank in tl.range(RANKS):
        best = sort(keys, 1, True, FP64)[0]
        store_private(target + rank * BYTES, best)
        store_shared(shared_target + rank * STEP, best, BYTES * 8, writes)
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


@triton.jit
def _sorted_piece(row_ptrs, stride_n, wanted, NUM_EXPERT_SQRT: tl.constexpr, PIECE: tl.constexpr,
                  VECTOR: tl.constexpr, RAGGED: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The keys of PIECE columns from `wanted` on, descending.

    If RAGGED, the last pieces begin early, so as to end with the row, and skip what others have read.
    """
    start = tl.minimum(wanted, NUM_EXPERT_SQRT - PIECE)
    return sorted_group(row_ptrs, stride_n, start, wanted - start, PIECE, PIECE, VECTOR, RAGGED, True, FP64)


@triton.jit
def _load_key(address, KEY: tl.constexpr):
    """A key in shared memory."""
    return load_shared(address, 8 * _key_bytes(KEY))


@triton.jit
def _load(address, KEY: tl.constexpr, FP64: tl.constexpr):
    """The value and the index of a key in shared memory."""
    return unpack(_load_key(address, KEY), KEY, FP64)


@triton.jit
def _pair(fixed_list, moving_list, fixed, moving, odd, STEP: tl.constexpr, KEY: tl.constexpr, FP64: tl.constexpr):
    """The key of a pair. A rank is given as 255 - rank, as keys have it: that in x is `fixed`, or if odd `moving`."""
    fixed_key = _load_key(fixed_list + (255 - fixed) * STEP, KEY)
    moving_key = _load_key(moving_list + (255 - moving) * STEP, KEY)
    row = unpack(tl.where(odd, moving_key, fixed_key), KEY, FP64)[1]
    low = ((0xFFFF - row) << 16) | tl.where(odd, (fixed << 8) | moving, (moving << 8) | fixed)
    return pack_wide(unpack(fixed_key, KEY, FP64)[0] + unpack(moving_key, KEY, FP64)[0], low, True, FP64)


@triton.jit
def _taken(pair, x_list, y_list, STEP: tl.constexpr, KEY: tl.constexpr, FP64: tl.constexpr):
    """The sum, the row and the column of a pair that was taken, of which `pair` is where its ranks are."""
    ranks = 0xFFFF - load_shared(pair, 16)
    value_x, row = _load(x_list + (ranks & 255) * STEP, KEY, FP64)
    value_y, column = _load(y_list + (ranks >> 8) * STEP, KEY, FP64)
    return value_x + value_y, row, column


@triton.jit
def _replace_best(keys, key, FP64: tl.constexpr):
    """Put a key in the place of the first of a descending tuple, and the tuple in order again."""
    if len(keys) == 1:
        return (key,)
    else:
        above = ()
        for i in tl.static_range(1, len(keys)):
            above = above + (is_less(key, keys[i], FP64),)
        replaced = (tl.where(above[0], keys[1], key),)
        for i in tl.static_range(1, len(keys) - 1):
            replaced = replaced + (tl.where(above[i], keys[i + 1], tl.where(above[i - 1], key, keys[i])),)
        return replaced + (tl.where(above[len(keys) - 2], key, keys[len(keys) - 1]),)


@triton.jit
def _take_by_rows(pairs, x_list, K: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, KEY: tl.constexpr,
                  FP64: tl.constexpr):  # fmt: skip
    """The ranks of a token's K best pairs, taken by all lanes of the warp, each from every 32nd row of x."""
    y_list = x_list + _key_bytes(KEY)
    heads = ()
    for first in tl.static_range(0, RANKS, 32):
        rank = tl.minimum(first + tl.arange(0, 32), RANKS - 1)
        key = _pair(x_list, y_list, 255 - rank, rank * 0 + 255, rank < 0, STEP, KEY, FP64)
        heads = heads + (tl.where(first + tl.arange(0, 32) < RANKS, key, lowest(key, FP64)),)
    for slot in tl.range(K):
        best = sort(heads, 1, True, FP64)[0]
        for i in tl.static_range(5):
            best = sort((best, partner(best, 1 << i, True)), 1, True, FP64)[0]
        popped = unpack_wide(best, FP64)[1]
        store_shared(pairs + slot * 2, popped, 16, tl.arange(0, 32) == 0)
        rank_x, rank_y = 255 - (popped & 255), 256 - ((popped >> 8) & 255)  # of the pair that follows in its row
        key = _pair(x_list, y_list, 255 - rank_x, 255 - tl.minimum(rank_y, RANKS - 1), rank_x < 0, STEP, KEY, FP64)
        inside = ((rank_x + 1) * (rank_y + 1) <= K) & (rank_y < RANKS)
        following, next_heads = tl.where(inside, key, lowest(key, FP64)), ()
        for i in tl.static_range(len(heads)):
            next_heads = next_heads + (tl.where(heads[i] == best, following, heads[i]),)
        heads = next_heads


@triton.jit
def _spread(values_list, STEP: tl.constexpr, RANKS: tl.constexpr, KEY: tl.constexpr, FP64: tl.constexpr):
    """The largest magnitude in a descending list that is not infinite; and how much more the other factor's must not
    be, or two sums of one column might round to the same.

    That takes neighbours x > x' of the list with x - x' at most 2**-23 of a sum, which is at most |x| + |y|. (The
    factor here leaves some room.)
    """
    previous, _ = _load(values_list, KEY, FP64)
    largest, limit = tl.zeros_like(previous), tl.full(previous.shape, float("inf"), tl.float32)
    for rank in tl.range(RANKS):
        value, _ = _load(values_list + rank * STEP, KEY, FP64)
        largest = tl.where(tl.abs(value) < float("inf"), tl.maximum(largest, tl.abs(value)), largest)
        margin = (previous - value) * (0.75 * 2.0**23) - tl.abs(previous)
        limit = tl.where(previous > value, tl.minimum(limit, margin), limit)
        previous = value
    return largest, limit


@triton.jit(do_not_specialize=["num_tokens"])
def frontier_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    NUM_EXPERT_SQRT: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr,
    TOKENS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, IN_REGISTERS: tl.constexpr, VECTOR: tl.constexpr,
    FP64: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = min(K, NUM_EXPERT_SQRT)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # Where the lists of 16 tokens would not fit, a warp routes fewer, and its other lanes do as the first ones do.
    lane = tl.arange(0, 32) % (2 * TOKENS)
    writes = tl.arange(0, 32) < 2 * TOKENS
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    tokens = first_token + lane // 2
    odd = lane % 2 == 1
    read = tl.minimum(tokens, num_tokens - 1)  # lanes past the end route the last token again, and store nothing
    x_ptrs, y_ptrs = x_ptr + read * stride_xm, y_ptr + read * stride_ym
    row_ptrs, stride_n = tl.where(odd, y_ptrs, x_ptrs), tl.where(odd, stride_yn, stride_xn)

    KEY_BYTES: tl.constexpr = _key_bytes(DTYPE)
    # Rank r of a lane's list is at r * STEP of shared memory, so that every lane has a bank to itself.
    STEP: tl.constexpr = 2 * TOKENS * KEY_BYTES
    OUT_PITCH: tl.constexpr = ((K + 1) // 2 | 1) * 4  # of ranks, 16 bits a pair
    out = allocate_rows(lane, TOKENS * OUT_PITCH + (RANKS + 1) * STEP)
    lists = out + TOKENS * OUT_PITCH
    own_list, other_list = lists + lane * KEY_BYTES, lists + (lane ^ 1) * KEY_BYTES
    # Past the end of a list everything is -inf.
    end = pack(tl.full((32,), float("-inf"), tl.float32), lane * 0, DTYPE, True, FP64)
    store_shared(own_list + RANKS * STEP, end, KEY_BYTES * 8, writes)

    least = lowest(lane.to(tl.int64) if DTYPE == tl.float32 else lane, FP64)
    if IN_REGISTERS:
        top = lowest_keys(least, RANKS, FP64)
        for piece in tl.range((NUM_EXPERT_SQRT + PIECE - 1) // PIECE):
            wanted = hide(lane * 0 + piece * PIECE)
            piece_keys = _sorted_piece(
                row_ptrs, stride_n, wanted, NUM_EXPERT_SQRT, PIECE, VECTOR, NUM_EXPERT_SQRT % PIECE != 0, FP64
            )  # fmt: skip
            top = merge_best(top + piece_keys[:RANKS], RANKS, RANKS, True, FP64)
        for rank in tl.static_range(RANKS):
            store_shared(own_list + rank * STEP, top[rank], KEY_BYTES * 8, writes)
    else:
        # Pieces, and between tiles the best so far, are a lane's own business.
        PITCH: tl.constexpr = (PIECE + 1) * KEY_BYTES
        LIST: tl.constexpr = (RANKS + 1) * KEY_BYTES
        TILES: tl.constexpr = (NUM_EXPERT_SQRT + PIECE * PIECES - 1) // (PIECE * PIECES)
        RAGGED: tl.constexpr = NUM_EXPERT_SQRT % (PIECE * PIECES) != 0
        private = allocate_private(lane, PIECES * PITCH + 2 * LIST)
        source, target = private + PIECES * PITCH, private + PIECES * PITCH + LIST
        for piece in tl.static_range(PIECES):
            store_private(private + piece * PITCH + PIECE * KEY_BYTES, least)
        store_private(source, least)  # nothing is best yet
        store_private(source + RANKS * KEY_BYTES, least)
        store_private(target + RANKS * KEY_BYTES, least)
        for tile in tl.range(TILES):
            for part in tl.range(PIECES):
                wanted = lane * 0 + (tile * PIECES + part) * PIECE
                piece_keys = _sorted_piece(
                    row_ptrs, stride_n, wanted, NUM_EXPERT_SQRT, PIECE, VECTOR, RAGGED, FP64
                )  # fmt: skip
                for i in tl.static_range(PIECE):
                    store_private(private + part * PITCH + i * KEY_BYTES, piece_keys[i])
            heads = (source,) if TILES > 1 else ()
            for piece in tl.static_range(PIECES):
                heads = heads + (private + piece * PITCH,)
            _merge_lists(heads, target, own_list, RANKS, STEP, DTYPE, FP64, writes)
            source, target = target, source
    sync_warp(lane)

    x_list, y_list = lists + (lane & -2) * KEY_BYTES, lists + (lane | 1) * KEY_BYTES
    END: tl.constexpr = (RANKS - 1) * STEP
    first_x, last_x = _load(x_list, DTYPE, FP64)[0], _load(x_list + END, DTYPE, FP64)[0]
    first_y, last_y = _load(y_list, DTYPE, FP64)[0], _load(y_list + END, DTYPE, FP64)[0]
    # Where +inf may meet -inf, or NaN is there, all of the token's scores become NaN: every path agrees on that.
    poisoned = (first_x + last_y != first_x + last_y) | (first_y + last_x != first_y + last_x)
    if tl.max(poisoned.to(tl.int32), 0) != 0:
        for place in tl.range(RANKS):
            value, index = _load(own_list + place * STEP, DTYPE, FP64)
            nan_key = pack(value + float("nan"), index, DTYPE, True, FP64)
            sync_warp(lane)  # after the others' loads
            store_shared(own_list + place * STEP, nan_key, KEY_BYTES * 8, writes & poisoned)
        sync_warp(lane)
    # Sums of one column tie where they round to the same, or are infinite. (Of -inf ones, `fill_masked` takes care.)
    largest, limit = _spread(own_list, STEP, RANKS, DTYPE, FP64)
    exact = tl.where(odd, largest < partner(limit, 1, True), partner(largest, 1, True) < limit)
    by_rows = (~(exact & (first_x + first_y < float("inf")))).to(tl.int32)

    pairs = out + lane // 2 * OUT_PITCH
    LAST: tl.constexpr = 255 - min(RANKS, 255)  # where a row ends, in the form of a key's ranks
    heads = ()
    for a in tl.static_range(SIDE):
        heads = heads + (
            _pair(own_list, other_list, lane * 0 + (255 - a), tl.where(odd, 254 - a, 255 - a), odd, STEP, DTYPE, FP64),
        )  # fmt: skip
    heads = sort(heads, SIDE, True, FP64)
    for slot in tl.range(K):
        rival = partner(heads[0], 1, True)
        wins = is_less(rival, heads[0], FP64)
        popped = unpack_wide(tl.where(wins, heads[0], rival), FP64)[1]
        store_shared(pairs + slot * 2, popped, 16, writes & ~odd)
        ranks = unpack_wide(heads[0], FP64)[1]
        fixed, moving = (ranks >> tl.where(odd, 8, 0)) & 255, (ranks >> tl.where(odd, 0, 8)) & 255
        following = _pair(own_list, other_list, fixed, tl.maximum(moving - 1, LAST), odd, STEP, DTYPE, FP64)
        heads = _replace_best(heads, tl.where(wins, following, heads[0]), FP64)
    sync_warp(lane)
    for token in tl.range(TOKENS * tl.max(by_rows, 0)):
        if tl.max(tl.where(lane // 2 == token, by_rows, 0), 0) != 0:
            _take_by_rows(
                out + token * OUT_PITCH, lists + token * 2 * KEY_BYTES, K, RANKS, STEP, DTYPE, FP64
            )  # fmt: skip
    sync_warp(lane)

    for token in tl.range(TOKENS):
        for start in tl.static_range(0, K, 32):
            slots = start + tl.arange(0, 32)
            token_list = lists + token * 2 * KEY_BYTES
            score, row, column = _taken(
                out + token * OUT_PITCH + tl.minimum(slots, K - 1) * 2, token_list, token_list + KEY_BYTES, STEP, DTYPE,
                FP64,
            )  # fmt: skip
            outputs = (first_token + token) * K + slots
            valid = (slots < K) & (first_token + token < num_tokens)
            store_row(scores_ptr + outputs, (score.to(scores_ptr.dtype.element_ty),), valid, True)
            store_row(indices_ptr + outputs, (row * NUM_EXPERT_SQRT + column,), valid, True)

    worst = _taken(pairs + (K - 1) * 2, x_list, y_list, STEP, DTYPE, FP64)[0]
    fill = (tokens < num_tokens) & (first_x < float("inf")) & (first_y < float("inf")) & (worst == float("-inf"))
    if tl.max(fill.to(tl.int32), 0) != 0:
        num_finite = tl.zeros_like(lane)
        for slot in tl.range(K):
            score = _taken(pairs + slot * 2, x_list, y_list, STEP, DTYPE, FP64)[0]
            num_finite += (score > float("-inf")).to(tl.int32)
        sync_warp(lane)  # after the others' stores
        fill_masked(
            x_ptrs, y_ptrs, indices_ptr + tokens * K, stride_xn, stride_yn, num_finite, fill & writes & ~odd,
            NUM_EXPERT_SQRT, K, True,
        )  # fmt: skip


def frontier_forward(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype):
    """Scores and indices of the k best experts; results as `reference.factored_router`, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on an NVIDIA GPU from Ampere on, any
            strides, at least one token.
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
    ranks, words = min(k, num_expert_sqrt), 2 if dtype == torch.float32 else 1  # of a key
    in_registers = ranks * words <= REGISTERS
    piece = min(PIECE // words if in_registers else PIECE, num_expert_sqrt)
    vector = min(alignment, row & -row, piece * dtype.itemsize & -(piece * dtype.itemsize))
    token_bytes = ((k + 1) // 2 | 1) * 4 + (ranks + 1) * 8 * words
    return {
        "NUM_EXPERT_SQRT": num_expert_sqrt, "K": k, "SIDE": min(math.isqrt(k), num_expert_sqrt),
        "TOKENS": next(tokens for tokens in (16, 8, 4) if tokens * token_bytes <= SHARED_BYTES),
        "PIECE": piece,
        "PIECES": min(PIECES, -(-num_expert_sqrt // piece)), "IN_REGISTERS": in_registers,
        "VECTOR": vector if vector >= 4 else 0, "FP64": fp64, "num_warps": 1, **OPTIONS,
    }  # fmt: skip


def runs_on(device, _num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, and the device: NVIDIA GPUs from Ampere on."""
    return num_experts_per_token <= MAX_EXPERTS_PER_TOKEN and not interpreting() and on_nvidia(device)
