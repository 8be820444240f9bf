"""The factored router with a few lanes of a warp to a token: every sort happens in a lane's own registers.

LANES lanes share a token. The even ones read its row of x and the odd ones its row of y, each a segment of it, and find
the k best of what they read (rows.py). Lanes of the same row merge their lists (shuffles, no memory), then each even
lane trades with its odd neighbour and both search half of the staircase (pairs.py). Two lanes a token do the least work
in all; more lanes answer sooner, which is what few tokens need.

A row passes through shared memory (words.py) in tiles of TILE_N columns, which a warp copies together in whole cache
lines. Of logits that are stored transposed several warps do, since a line holds one column of many tokens.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .configs import (
    OPTIONS,
    compares_doubles,
    compile_all,
    device_of,
    interpreting,
    kernel_input,
    on_nvidia,
    output_dtype,
)
from .keys import bit_length, unpack
from .networks import merge, merge_best
from .pairs import fill_masked, first_pair, select_pairs
from .rows import (
    best_in_loops,
    best_of_groups,
    candidates_of_tile,
    chunks_listed,
    columns_are_vectors,
    exact_keys,
    lowest_keys,
    row_alignment,
    shift,
    top_of_strided_segment,
)
from .words import (
    allocate_rows,
    copy_columns,
    copy_rows,
    hide,
    partner,
    partners,
    store_row,
    store_shared,
    sync_warp,
    turn_columns,
    wait_for_rows,
)

MAX_EXPERTS_PER_TOKEN = 32  # more would not fit in a lane's registers
TILE_BYTES = 512  # what of a row a lane has at hand at once
LOOPED_TILE = 256  # columns of a tile that loops go over, where a multiprocessor has the shared memory for it
TRANSPOSED_TILE = 128  # columns of a tile that several warps copy together; a program has 48 KiB for it
MIN_TILE = 64  # columns below which a tile is not worth its merge
SUM_BITS = 9  # the fraction that nearly all sums of bf16 logits need
MANY_LANES = 16  # of a token, where there are few tokens
WARPS_OF_FEW_TOKENS = 3  # that a scheduler gets, at N = 256, before two lanes a token are faster
STAGED_BYTES = 128  # of a row a lane; fewer are read straight from global memory

_compiled = set()  # the problems whose kernels are, both


@triton.jit
def _copy_tile(buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column, wanted,
               TILE_N: tl.constexpr, VECTOR: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr,
               TRANSPOSED: tl.constexpr, PRIORITY: tl.constexpr):  # fmt: skip
    """Start copying the tile of every lane's segment that begins at a column of it, if wanted."""
    BYTES: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    wanted = wanted.to(tl.int32)
    if TRANSPOSED:
        copy_columns(
            buffer, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column, wanted, TILE_N, PITCH, PARTS,
            PRIORITY,
        )  # fmt: skip
    else:
        address = segment + (column * BYTES).to(tl.int64)
        copy_rows(buffer, address, wanted, TILE_N * BYTES, VECTOR, PITCH, PARTS, PRIORITY)


@triton.jit(do_not_specialize=["num_tokens"])
def lanes_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    NUM_EXPERT_SQRT: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr,
    LANES: tl.constexpr, SEGMENT: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, VECTOR: tl.constexpr, STAGED: tl.constexpr, TRANSPOSED: tl.constexpr, PRIORITY: tl.constexpr,
    LOOPED: tl.constexpr, HALVED: tl.constexpr, NARROW: tl.constexpr, ADDED: tl.constexpr, ROW_BITS: tl.constexpr,
    NVIDIA: tl.constexpr, FP64: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = min(K, NUM_EXPERT_SQRT)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    lane = tl.arange(0, TILE_M)
    odd = lane % 2 == 1
    one = lane * 0 + tl.minimum(num_tokens, 1).to(tl.int32) if ADDED else None  # as far as a compiler can know
    stride_n = tl.where(odd, stride_yn, stride_xn)
    # Where segments do not divide the row, the last ones begin early and skip what others have read.
    RAGGED: tl.constexpr = LANES // 2 * SEGMENT != NUM_EXPERT_SQRT
    first_column = tl.minimum(lane % LANES // 2 * SEGMENT, NUM_EXPERT_SQRT - SEGMENT)
    skip = lane % LANES // 2 * SEGMENT - first_column
    OWN: tl.constexpr = min(RANKS, SEGMENT)
    TILES: tl.constexpr = SEGMENT // max(TILE_N, 1)

    first_token = tl.program_id(0).to(tl.int64) * (TILE_M // LANES)
    tokens = first_token + lane // LANES
    inside = tokens < num_tokens
    read = tl.minimum(tokens, num_tokens - 1)  # lanes past the end route the last token again, and store nothing
    x_ptrs, y_ptrs = x_ptr + read * stride_xm, y_ptr + read * stride_ym
    row_ptrs = tl.where(odd, y_ptrs, x_ptrs)
    if TILE_N > 0:
        segment = row_ptrs.to(tl.int64) + first_column * BYTES
        if STAGED:
            # Rows an odd number of vectors apart meet every bank once.
            BEHIND: tl.constexpr = chunks_listed(OWN, GROUP, CHUNK) if LOOPED else 0
            VECTORS: tl.constexpr = (TILE_N * BYTES + BEHIND + VECTOR - 1) // VECTOR
            PITCH: tl.constexpr = (VECTORS + 1 - VECTORS % 2) * VECTOR
            buffer = allocate_rows(lane, TILE_M * PITCH)
            PARTS: tl.constexpr = TILE_N // (CHUNK * GROUP) if LOOPED else 1
            _copy_tile(
                buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, lane * 0, lane >= 0,
                TILE_N, VECTOR, PITCH, PARTS, TRANSPOSED, PRIORITY,
            )  # fmt: skip
        # Where 32-bit keys do for fp32 logits, nearly always, two more than K tell.
        SORT_KEY: tl.constexpr = bit_length(TILE_N - 1) if HALVED else DTYPE
        LISTED: tl.constexpr = min(OWN + 2, TILE_N) if HALVED else OWN
        best = lowest_keys(lane.to(tl.int64) if DTYPE == tl.float32 else lane, OWN, FP64)
        for step in tl.range(TILES):
            # Hidden, or LLVM would count the columns in 64 bits, and sort keys of 64 bits to subtract them from.
            column = hide(lane * 0 + step * TILE_N)
            row = segment + column * BYTES
            if STAGED:
                row = buffer + lane * PITCH
                if not LOOPED:
                    wait_for_rows(lane * 0, 1)
                    if TRANSPOSED:
                        turn_columns(buffer, 0, TILE_N, BYTES, PITCH)
            if LOOPED:
                more, doubt = best_in_loops(
                    row, buffer, DTYPE, TILE_N, OWN, LISTED, GROUP, CHUNK, VECTOR, PITCH, TRANSPOSED, SORT_KEY, FP64,
                    one,
                )  # fmt: skip
            else:
                keys, doubt = candidates_of_tile(
                    row, skip - column, DTYPE, TILE_N, OWN, GROUP, CHUNK, VECTOR, SORT_KEY, RAGGED, FP64, one
                )  # fmt: skip
            if HALVED:
                more = more if LOOPED else best_of_groups(keys, LISTED, GROUP, NVIDIA, FP64, one)
                more = exact_keys(more, row, doubt, DTYPE, TILE_N, OWN, GROUP, VECTOR, SORT_KEY, FP64)
            if STAGED and TILES > 1:  # where the tile is not read again
                _copy_tile(
                    buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column + TILE_N,
                    lane * 0 + step + 1 < TILES, TILE_N, VECTOR, PITCH, PARTS, TRANSPOSED, PRIORITY,
                )  # fmt: skip
            if not (LOOPED or HALVED):
                more = best_of_groups(keys, OWN, GROUP, NVIDIA, FP64, one)
            if TILES == 1:
                best = more
            else:
                best = merge(best + shift(more, column, FP64), OWN, OWN, NVIDIA, FP64, one)
        if LANES > 2:
            best = shift(best, first_column, FP64)
    else:
        best = top_of_strided_segment(
            row_ptrs, stride_n, first_column, skip, SEGMENT, OWN, GROUP, RAGGED, NVIDIA, FP64
        )  # fmt: skip
    if LANES > 4 and OWN == RANKS and RANKS > 8 and DTYPE == tl.float32:
        # A loop, since long networks of wide keys take longer to fetch than to execute; a compiler that knew how often
        # it runs would write it out.
        for level in tl.range(1, bit_length(LANES) - 2 + tl.minimum(num_tokens, 1).to(tl.int32)):
            more = partners(best, (lane * 0 + 1) << level, NVIDIA)
            best = merge_best(best + more, RANKS, RANKS, NVIDIA, FP64, one)
    else:
        for level in tl.static_range(1, bit_length(LANES) - 1):
            both = best + partners(best, 1 << level, NVIDIA)
            best = merge_best(both, len(best), min(RANKS, len(both)), NVIDIA, FP64, one)
    # Each lane looks at one of the two ways they may meet; its NaN reaches the other lane with its values.
    first, last = unpack(best[0], DTYPE, FP64)[0], unpack(best[RANKS - 1], DTYPE, FP64)[0]
    widest = first + partner(last, 1, NVIDIA)
    poison = tl.where(widest == widest, 0.0, float("nan"))
    # Where all pairs of a lane may be among the K best, and K is a power of two, its neighbour finishes half of them.
    SPLIT: tl.constexpr = K > 1 and K & (K - 1) == 0 and first_pair(SIDE, K, RANKS) >= K
    columns = lane
    if NARROW:
        columns = buffer + (lane | 1) * PITCH
        for rank in tl.static_range(RANKS):
            column = unpack(best[rank], DTYPE, FP64)[1]
            store_shared(buffer + lane * PITCH + rank * 4, column, 32, lane >= 0)
        sync_warp(lane)
    scores, indices, lost = select_pairs(
        best, poison, odd, columns, NUM_EXPERT_SQRT, RANKS, K, SIDE, SPLIT, DTYPE, ROW_BITS, NARROW, NVIDIA, FP64,
        one,
    )  # fmt: skip
    if NARROW:
        for _ in tl.range(tl.max(lost, 0)):
            again = ()
            for rank in tl.static_range(RANKS):
                again = again + (hide(best[rank]),)  # or what both ways have in common would stay in registers
            # Hidden, or LLVM, which does not know that lanes shuffle here, might give the odd ones a loop of their own.
            is_odd = hide(odd.to(tl.int32)) != 0
            scores, indices, lost = select_pairs(
                again, poison, is_odd, columns, NUM_EXPERT_SQRT, RANKS, K, SIDE, SPLIT, DTYPE, ROW_BITS, False, NVIDIA,
                FP64, None,
            )  # fmt: skip

    SLOTS: tl.constexpr = K // 2 if SPLIT else K
    writes = inside & (lane % LANES < (2 if SPLIT else 1))
    outputs = tokens * K + (lane % 2 * SLOTS if SPLIT else 0)
    rounded = ()
    for slot in tl.static_range(SLOTS):
        rounded = rounded + (scores[slot].to(scores_ptr.dtype.element_ty),)
    store_row(scores_ptr + outputs, rounded, writes, NVIDIA)
    store_row(indices_ptr + outputs, indices, writes, NVIDIA)

    ordinary = inside & (poison == 0.0) & (first < float("inf")) & (partner(first, 1, NVIDIA) < float("inf"))
    fill = ordinary & (scores[SLOTS - 1] == float("-inf"))
    if tl.max(fill.to(tl.int32), 0) != 0:
        num_finite = tl.zeros_like(lane)
        for slot in tl.static_range(SLOTS):
            num_finite += (scores[slot] > float("-inf")).to(tl.int32)
        if SPLIT:
            num_finite += partner(num_finite, 1, NVIDIA)
        tl.debug_barrier()  # after the neighbour's stores
        fill_masked(
            x_ptrs, y_ptrs, indices_ptr + tokens * K, stride_xn, stride_yn, num_finite,
            ordinary & (lane % LANES == 0), NUM_EXPERT_SQRT, K, NVIDIA,
        )  # fmt: skip


def lanes_forward(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype):
    """Scores and indices of the k best experts; results as `reference.factored_router`, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on an NVIDIA GPU from Ampere on (or on
            the CPU under Triton's interpreter), at least one token, N as far as `runs_on` says. Any strides, but
            logits are read one at a time unless rows are contiguous, 4-byte aligned and a multiple of a tile long, or
            `columns_are_vectors`, rows are a multiple of 128 bytes, and there are many tokens.
        num_experts_per_token: k, from 1 to MAX_EXPERTS_PER_TOKEN.
        scores_dtype: fp32, fp16 or bf16.

    Returns:
        scores (num_tokens, k) in scores_dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, device = num_experts_per_token, router_logits_x.device
    x, y = kernel_input(router_logits_x), kernel_input(router_logits_y)
    scores = torch.empty((num_tokens, k), dtype=output_dtype(scores_dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    problem = num_expert_sqrt, k, x.dtype, row_alignment(x, y), compares_doubles(device), columns_are_vectors(x, y)
    args = x, y, scores, indices, *x.stride(), *y.stride(), num_tokens
    lanes = lanes_per_token(num_tokens, num_expert_sqrt, x.element_size(), device)
    with device_of(x):
        constants = kernel_constants(*problem, lanes)
        if (device, scores_dtype, *problem) not in _compiled and not interpreting():
            _compiled.add((device, scores_dtype, *problem))
            # No later number of tokens shall have to wait for its kernel.
            kinds = {2, lanes_per_token(1, num_expert_sqrt, x.element_size(), device)}
            if len(kinds) > 1:
                compile_all(lanes_kernel, args, [kernel_constants(*problem, kind) for kind in kinds])
        lanes_kernel[(-(-num_tokens * lanes // constants["TILE_M"]),)](*args, **constants)
    return scores.to(scores_dtype), indices


@functools.cache
def kernel_constants(num_expert_sqrt, k, dtype, alignment, fp64, transposed, lanes):
    """The kernel's constants: among them how a lane reads its segment, in tiles, or logit by logit (TILE_N = 0).

    alignment: of the rows, in bytes; 0 where their logits do not lie side by side. transposed: `columns_are_vectors`.
    Short segments come straight from global memory, where a staged copy would only add its latency.
    """
    itemsize = dtype.itemsize
    row = num_expert_sqrt * itemsize
    transposed = transposed and lanes == 2 and row % 128 == 0
    vector = 16 if transposed else min(alignment, row & -row)  # bytes of a load
    ranks = min(k, num_expert_sqrt)
    group = min(32, max(8, 1 << (ranks - 1).bit_length()))
    reading = {"SEGMENT": -(-num_expert_sqrt // (lanes // 2)), "TILE_N": 0, "CHUNK": 1, "VECTOR": 0}
    staged = looped = halved = False
    if vector >= 4 and not interpreting():
        step = vector // itemsize
        segment = -(-num_expert_sqrt // (lanes // 2 * step)) * step
        ragged = lanes // 2 * segment != num_expert_sqrt
        staged, halved = segment * itemsize >= STAGED_BYTES, dtype == torch.float32 and not ragged

        def widest_tile(columns):
            columns, unit = (min(columns, TRANSPOSED_TILE), 128 // itemsize) if transposed else (columns, step)
            return next(n for n in range(min(segment, columns), 0, -1) if segment % n == 0 and n % unit == 0)

        tile_n, chunk = widest_tile(LOOPED_TILE if itemsize == 2 or fp64 else TILE_BYTES // 4), 4
        looped = staged and not ragged and vector >= 4 * itemsize and group >= 16 and (itemsize == 2 or k <= 16)
        looped = looped and tile_n >= 8 * k and tile_n % (4 * group) == 0
        if not looped:
            tile_n = widest_tile(TILE_BYTES // itemsize // (2 if k > 16 else 1))
            chunks = (c for c in (4, 2) if 4 <= c * itemsize <= vector and tile_n % c == 0 and tile_n >= 2 * c * k)
            chunk = 1 if ragged else next(chunks, 1)
        if tile_n >= min(segment, MIN_TILE):
            reading = {"SEGMENT": segment, "TILE_N": tile_n, "CHUNK": chunk, "VECTOR": vector}
        else:
            staged = looped = halved = False
    transposed = transposed and staged
    # A pair's sum may share 32 bits with row and rank where that leaves it the bits that sums of such logits have.
    sum_bits = 23 - (num_expert_sqrt - 1).bit_length() - (ranks - 1).bit_length()
    narrow = dtype == torch.bfloat16 and staged and k <= 16 and sum_bits >= SUM_BITS
    narrow = narrow and reading["TILE_N"] * itemsize >= 4 * ranks
    # Two warps a program run closer together and share more of the code they fetch, which long code gains from.
    warps = 2 if staged and itemsize == 2 and reading["TILE_N"] * itemsize == TILE_BYTES else 1
    warps = 8 // itemsize if transposed else warps  # whose tokens fill a cache line of a column
    return {
        "NUM_EXPERT_SQRT": num_expert_sqrt, "K": k, "SIDE": min(math.isqrt(k), num_expert_sqrt), "LANES": lanes,
        "GROUP": group, "TILE_M": 1024 if interpreting() else warps * 32, **reading,
        "STAGED": staged, "TRANSPOSED": transposed, "PRIORITY": "evict_first", "LOOPED": looped, "HALVED": halved,
        "NARROW": narrow, "ADDED": staged and lanes == 2 and k <= 16, "ROW_BITS": _row_bits(k),
        "NVIDIA": not interpreting(), "FP64": fp64, "num_warps": warps, **OPTIONS,
    }  # fmt: skip


def _row_bits(k):
    """Row, rank and column of a pair share 31 bits."""
    return (31 - (k - 1).bit_length()) // 2


def lanes_per_token(num_tokens, num_expert_sqrt, itemsize, device):
    """How many lanes share a token: many while that leaves a scheduler few warps, more of them where rows are long."""
    few_tokens = num_tokens * MANY_LANES <= _num_lanes(device) * WARPS_OF_FEW_TOKENS * (num_expert_sqrt / 256) ** 0.5
    longest = num_expert_sqrt * itemsize // 8  # 16 bytes of a row a lane, at least
    return max(2, min(MANY_LANES, 1 << longest.bit_length() >> 1)) if few_tokens else 2


@functools.cache
def _num_lanes(device):
    """The lanes of a GPU whose every scheduler, four in a multiprocessor, has one warp; in the interpreter, few."""
    return torch.cuda.get_device_properties(device).multi_processor_count * 4 * 32 if device.type == "cuda" else 64


def runs_on(device, num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, and the device: NVIDIA GPUs from Ampere on, or the interpreter."""
    fits = num_experts_per_token <= MAX_EXPERTS_PER_TOKEN and num_expert_sqrt <= 1 << _row_bits(num_experts_per_token)
    return fits and (interpreting() or on_nvidia(device))
