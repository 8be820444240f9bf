"""The factored router with a thread to a token: every sort happens in a thread's own registers.

A thread finds the k best of each of its two rows, then the k best pairs among their staircase (reference.py), with
sorting networks on tuples of [TILE_M] tensors (networks.py). A row passes through shared memory (words.py) in tiles of
TILE_N columns; of each tile the thread first keeps one maximum a chunk of CHUNK columns and sorts those, since the k
best columns lie in the k chunks with the largest maxima, then sorts the columns of those k chunks alone.

Keys carry their own tie-break. A 16-bit logit leaves the low bits of its fp32 pattern free, so value and column share
one 32-bit integer; an fp32 logit takes 64 bits. A pair's key is the 64 bits (sum, row, rank of the column): within a
row of the staircase the rank orders exactly as the exact sums do, so every row of it is sorted even where rounding
makes different sums equal, and the merges never disagree with a full sort.
"""

import functools

import torch
import triton
import triton.language as tl

from .configs import device_of, interpreting, kernel_input, output_dtype
from .keys import INDEX_BITS, pack, pack_wide, unpack, unpack_wide
from .networks import best_of, merge, sort
from .words import allocate_rows, copy_rows, load_shared, load_value, store_row, unpack_word, wait_for_rows

MAX_EXPERTS_PER_TOKEN = 32  # more would not fit in a thread's registers
MAX_EXPERT_SQRT = 1 << 13  # row, rank and column of a pair share 31 bits
ROW_BYTES = 512  # what of a row is in shared memory at once
MIN_TILE = 64  # columns below which a tile is not worth staging


@triton.jit
def _larger_halves(a, b, DTYPE: tl.constexpr):
    """The two 16-bit maxima of two words, in one instruction; NaN wins."""
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _maximum(values):
    """The largest of a tuple; NaN wins."""
    if len(values) == 1:
        return values[0]
    else:
        first, second = _maximum(values[: len(values) // 2]), _maximum(values[len(values) // 2 :])
        return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _staged_maxima(row, DTYPE: tl.constexpr, TILE_N: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """The maxima of the TILE_N / CHUNK chunks of a row in shared memory."""
    PER_WORD: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    maxima = ()
    for start in tl.static_range(0, TILE_N * 4 // PER_WORD, VECTOR):
        words = load_shared(row, start, VECTOR // 4)
        for first in tl.static_range(0, len(words), CHUNK // PER_WORD):
            word = words[first]
            if PER_WORD == 2:
                for i in tl.static_range(1, CHUNK // 2):
                    word = _larger_halves(word, words[first + i], DTYPE)
                maxima = maxima + (_maximum(unpack_word(word, DTYPE)),)
            else:
                chunk = ()
                for i in tl.static_range(CHUNK):
                    chunk = chunk + unpack_word(words[first + i], DTYPE)
                maxima = maxima + (_maximum(chunk),)
    return maxima


@triton.jit
def _keys_of_word(word, reversed_columns):
    """The keys of the two bf16 logits in a word; both arguments hold two halves, the lower column in the lower.

    `pack` two at a time: the product turns -0.0 into 0.0 and every NaN into one, the first permutation spreads the
    signs, whose magnitude bits are then flipped, and the others put a column below each half.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 one, zero, value, sign;
        mov.b32 one, 0x3F803F80;
        mov.b32 zero, 0;
        fma.rn.bf16x2 value, $2, one, zero;
        prmt.b32 sign, value, value, 0xBB99;
        and.b32 sign, sign, 0x7FFF7FFF;
        xor.b32 value, value, sign;
        prmt.b32 $0, value, $3, 0x1054;
        prmt.b32 $1, value, $3, 0x3276;
        }""",
        "=&r,=&r,r,r", [word, reversed_columns], (tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _staged_keys(row, OFFSET: tl.constexpr, column, DTYPE: tl.constexpr, BYTES: tl.constexpr, INDEX_BITS: tl.constexpr,
                 FP64: tl.constexpr):  # fmt: skip
    """The keys of BYTES (4, 8 or 16) of logits in shared memory, whose first is in `column`."""
    words = load_shared(row, OFFSET, BYTES // 4)
    keys = ()
    if DTYPE == tl.bfloat16:
        reversed_columns = (0xFFFF - (tl.zeros_like(row) + column)) * 0x10001 - 0x10000
        for i in tl.static_range(len(words)):
            keys = keys + _keys_of_word(words[i], reversed_columns - 0x20002 * i)
    else:
        for i in tl.static_range(len(words)):
            values = unpack_word(words[i], DTYPE)
            keys = keys + _keys(values, column + i * len(values), INDEX_BITS, True, FP64)
    return keys


@triton.jit
def _best_of_groups(keys, K: tl.constexpr, GROUP: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr):
    """The K best of a tuple, descending, GROUP at a time."""
    best = ()
    for start in tl.static_range(0, len(keys), GROUP):
        best = merge(best, sort(keys[start : start + GROUP], NVIDIA, FP64), len(best), NVIDIA, FP64)[:K]
    return best


@triton.jit
def _keys(values, index, INDEX_BITS: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr):
    """The keys of a tuple of values whose indices count up from `index`."""
    keys = ()
    for i in tl.static_range(len(values)):
        keys = keys + (pack(values[i], index + i, INDEX_BITS, NVIDIA, FP64),)
    return keys


@triton.jit
def _candidates_of_tile(row, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                        CHUNK: tl.constexpr, VECTOR: tl.constexpr, INDEX_BITS: tl.constexpr,
                        FP64: tl.constexpr):  # fmt: skip
    """Keys (value, column) of a tile in shared memory among which its K best are: all of it, or its K best chunks."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    keys = ()
    if CHUNK == 1:
        for start in tl.static_range(0, TILE_N * BYTES, VECTOR):
            keys = keys + _staged_keys(row, start, start // BYTES, DTYPE, VECTOR, INDEX_BITS, FP64)
    else:
        maxima = _staged_maxima(row, DTYPE, TILE_N, CHUNK, VECTOR)
        maxima = _keys(maxima, 0, INDEX_BITS, True, FP64)
        LAST: tl.constexpr = (len(maxima) - 1) // GROUP * GROUP
        chunks = sort(maxima[LAST:], True, FP64)[:K]
        if LAST > 0:  # their order does not matter
            chunks = best_of(_best_of_groups(maxima[:LAST], K, GROUP, True, FP64), chunks, True, FP64)
        for i in tl.static_range(len(chunks)):
            start = unpack(chunks[i], INDEX_BITS, FP64)[1] * CHUNK
            keys = keys + _staged_keys(row + start * BYTES, 0, start, DTYPE, CHUNK * BYTES, INDEX_BITS, FP64)
    return keys


@triton.jit
def _lowest(like, K: tl.constexpr, INDEX_BITS: tl.constexpr, FP64: tl.constexpr):
    """K keys below all others."""
    keys = ()
    for _ in tl.static_range(K):
        if INDEX_BITS < 32:
            keys = keys + (tl.full(like.shape, -(1 << 31), tl.int32),)
        elif FP64:
            keys = keys + (tl.full(like.shape, -0x0010000100000000, tl.int64),)  # the least double that is finite
        else:
            keys = keys + (tl.full(like.shape, -(1 << 63), tl.int64),)
    return keys


@triton.jit
def _where(condition, a, b):
    chosen = ()
    for i in tl.static_range(len(a)):
        chosen = chosen + (tl.where(condition, a[i], b[i]),)
    return chosen


@triton.jit
def _shift(keys, column, FP64: tl.constexpr):
    """The keys of a tile's columns -> those of the row's, `column` further right."""
    shifted = ()
    for i in tl.static_range(len(keys)):
        if FP64 and keys[i].dtype == tl.int64:
            shifted = shifted + (tl.where(keys[i] < 0, keys[i] + column, keys[i] - column),)
        else:
            shifted = shifted + (keys[i] - column,)
    return shifted


@triton.jit
def _top_of_strided_row(row_ptrs, stride_n, NUM_COLUMNS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                        INDEX_BITS: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The keys (value, column) of the K best columns of each row, descending, read one by one from global memory."""
    FIRST: tl.constexpr = min(GROUP, NUM_COLUMNS)
    TAIL: tl.constexpr = (NUM_COLUMNS - FIRST) % GROUP
    best = _strided_group(row_ptrs, 0, stride_n, FIRST, INDEX_BITS, NVIDIA, FP64)[:K]
    for start in tl.range(GROUP, NUM_COLUMNS - TAIL, GROUP):
        more = _strided_group(row_ptrs, start, stride_n, GROUP, INDEX_BITS, NVIDIA, FP64)
        best = merge(best, more, K, NVIDIA, FP64)[:K]
    if TAIL > 0:
        tail = _strided_group(row_ptrs, NUM_COLUMNS - TAIL, stride_n, TAIL, INDEX_BITS, NVIDIA, FP64)
        best = merge(best, tail, K, NVIDIA, FP64)[:K]
    return best


@triton.jit
def _strided_group(
    row_ptrs, start, stride_n, COUNT: tl.constexpr, INDEX_BITS: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr
):
    """The sorted keys of COUNT columns from `start` on."""
    values = ()
    column = tl.full(row_ptrs.shape, 0, tl.int64) + start
    for i in tl.static_range(COUNT):
        values = values + (load_value(row_ptrs + (column + i) * stride_n, NVIDIA),)
    return sort(_keys(values, start, INDEX_BITS, NVIDIA, FP64), NVIDIA, FP64)


@triton.jit
def _staircase(sums_x, rows, sums_y, columns, FIRST: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr,
               NVIDIA: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The keys of the K best pairs among the staircase's rows FIRST to LAST - 1, descending."""
    if LAST - FIRST == 1:
        keys = ()
        for rank in tl.static_range(min(K // (FIRST + 1), len(columns))):
            keys = keys + (pack_wide(sums_x[FIRST] + sums_y[rank], rows[FIRST] | columns[rank], NVIDIA, FP64),)
        return keys
    else:
        # The rows shorten like K / rank, so halving their count where the ranks double keeps the merges even.
        MIDDLE: tl.constexpr = 2 * FIRST + 1 if 2 * FIRST + 1 < LAST else (FIRST + LAST) // 2
        first = _staircase(sums_x, rows, sums_y, columns, FIRST, MIDDLE, K, NVIDIA, FP64)
        rest = _staircase(sums_x, rows, sums_y, columns, MIDDLE, LAST, K, NVIDIA, FP64)
        return merge(first, rest, len(first), NVIDIA, FP64)[:K]


@triton.jit
def _fill_masked(x_ptrs, y_ptrs, out_ptrs, stride_xn, stride_yn, num_finite, fill,
                 NUM_EXPERT_SQRT: tl.constexpr, K: tl.constexpr, NVIDIA: tl.constexpr):  # fmt: skip
    """Replace the selected -inf pairs, best only by score, by those of lowest index.

    Among -inf pairs only the index counts, which the staircase does not know. Where one of them is selected, fewer than
    K others exist, so the -inf pairs among the first K experts are enough. (With NaN or +inf about, they may not be.)
    """
    slot = num_finite
    for i in range(K):
        expert = tl.zeros_like(slot) + i
        x = load_value(x_ptrs + (expert // NUM_EXPERT_SQRT).to(tl.int64) * stride_xn, NVIDIA)
        y = load_value(y_ptrs + (expert % NUM_EXPERT_SQRT).to(tl.int64) * stride_yn, NVIDIA)
        masked = fill & (x + y == float("-inf")) & (slot < K)
        store_row(out_ptrs + slot, (expert,), masked, NVIDIA)
        slot += masked.to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens"])
def row_per_thread_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    NUM_EXPERT_SQRT: tl.constexpr, K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
    INDEX_BITS: tl.constexpr, ROW_BITS: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = min(K, NUM_EXPERT_SQRT)
    tokens = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    read = tl.minimum(tokens, num_tokens - 1)  # threads past the end route the last token again, and store nothing
    x_ptrs, y_ptrs = x_ptr + read * stride_xm, y_ptr + read * stride_ym
    if TILE_N > 0:
        DTYPE: tl.constexpr = x_ptr.dtype.element_ty
        BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
        PITCH: tl.constexpr = (TILE_N * BYTES // VECTOR + 1 - TILE_N * BYTES // VECTOR % 2) * VECTOR
        thread = tl.arange(0, TILE_M)
        row = allocate_rows(thread, TILE_M * PITCH) + thread * PITCH
        buffer = row - thread % 32 * PITCH
        first_token = tokens - thread % 32
        TILES: tl.constexpr = NUM_EXPERT_SQRT // TILE_N
        copy_rows(buffer, x_ptr.to(tl.int64), first_token, num_tokens - 1, stride_xm, BYTES, TILE_N, VECTOR, PITCH)
        best_x, best_y = _lowest(thread, RANKS, INDEX_BITS, FP64), _lowest(thread, RANKS, INDEX_BITS, FP64)
        for step in tl.range(2 * TILES):
            column = step % TILES * TILE_N
            wait_for_rows(thread)
            keys = _candidates_of_tile(row, DTYPE, TILE_N, RANKS, GROUP, CHUNK, VECTOR, INDEX_BITS, FP64)
            if step + 1 < 2 * TILES:
                next_ptr = tl.where(step + 1 < TILES, x_ptr.to(tl.int64), y_ptr.to(tl.int64))
                next_ptr += (step + 1) % TILES * TILE_N * BYTES
                next_stride = tl.where(step + 1 < TILES, stride_xm, stride_ym)
                copy_rows(buffer, next_ptr, first_token, num_tokens - 1, next_stride, BYTES, TILE_N, VECTOR, PITCH)
            best = _best_of_groups(keys, RANKS, GROUP, NVIDIA, FP64)
            if TILES == 1:
                best_x, best_y = best_y, best
            else:
                # Each factor starts anew: what was best is the other factor's, and stays as best_x.
                starts = (thread * 0 + step) % TILES == 0
                best_x = _where(starts, best_y, best_x)
                best_y = _where(starts, _lowest(thread, RANKS, INDEX_BITS, FP64), best_y)
                best_y = merge(best_y, _shift(best, column, FP64), RANKS, NVIDIA, FP64)[:RANKS]
    else:
        best_x = _top_of_strided_row(x_ptrs, stride_xn, NUM_EXPERT_SQRT, RANKS, GROUP, INDEX_BITS, NVIDIA, FP64)
        best_y = _top_of_strided_row(y_ptrs, stride_yn, NUM_EXPERT_SQRT, RANKS, GROUP, INDEX_BITS, NVIDIA, FP64)

    # Where +inf may meet -inf, or NaN is there, all of the token's scores become NaN: every path agrees on that.
    first_x, last_x = unpack(best_x[0], INDEX_BITS, FP64)[0], unpack(best_x[RANKS - 1], INDEX_BITS, FP64)[0]
    first_y, last_y = unpack(best_y[0], INDEX_BITS, FP64)[0], unpack(best_y[RANKS - 1], INDEX_BITS, FP64)[0]
    poison = tl.where(
        (first_x + last_y == first_x + last_y) & (first_y + last_x == first_y + last_x), 0.0, float("nan")
    )
    values_x, values_y, rows, columns = (), (), (), ()
    ROW_MASK: tl.constexpr = (1 << ROW_BITS) - 1
    for rank in tl.static_range(RANKS):
        value_x, row = unpack(best_x[rank], INDEX_BITS, FP64)
        value_y, column = unpack(best_y[rank], INDEX_BITS, FP64)
        values_x, values_y = values_x + (value_x + poison,), values_y + (value_y,)
        rows = rows + ((ROW_MASK - row) << (31 - ROW_BITS),)
        columns = columns + (column | ((RANKS - 1 - rank) << ROW_BITS),)
    pairs = _staircase(values_x, rows, values_y, columns, 0, RANKS, K, NVIDIA, FP64)

    scores, rounded, indices = (), (), ()
    for slot in tl.static_range(K):
        score, low = unpack_wide(pairs[slot], FP64)
        scores = scores + (score,)
        rounded = rounded + (score.to(scores_ptr.dtype.element_ty),)
        indices = indices + ((ROW_MASK - (low >> (31 - ROW_BITS))) * NUM_EXPERT_SQRT + (low & ROW_MASK),)
    inside = tokens < num_tokens
    store_row(scores_ptr + tokens * K, rounded, inside, NVIDIA)
    store_row(indices_ptr + tokens * K, indices, inside, NVIDIA)

    ordinary = (first_x < float("inf")) & (first_y < float("inf"))
    fill = inside & ordinary & (scores[K - 1] == float("-inf"))
    if tl.max(fill.to(tl.int32), 0) != 0:
        num_finite = tl.zeros((TILE_M,), tl.int32)
        for slot in tl.static_range(K):
            num_finite += (scores[slot] > float("-inf")).to(tl.int32)
        _fill_masked(
            x_ptrs, y_ptrs, indices_ptr + tokens * K, stride_xn, stride_yn, num_finite, fill, NUM_EXPERT_SQRT, K, NVIDIA
        )


def row_per_thread_forward(router_logits_x, router_logits_y, num_experts_per_token):
    """Scores and indices of the k best experts; results as `reference.factored_router`, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on an NVIDIA GPU from Ampere on (or on
            the CPU under Triton's interpreter), at least one token, N at most MAX_EXPERT_SQRT. Any strides, but rows
            that are not contiguous, 4-byte aligned and a multiple of a tile long are read one logit at a time.
        num_experts_per_token: k, from 1 to MAX_EXPERTS_PER_TOKEN.

    Returns:
        scores (num_tokens, k) in the logits' dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, dtype, device = num_experts_per_token, router_logits_x.dtype, router_logits_x.device
    x, y = kernel_input(router_logits_x), kernel_input(router_logits_y)
    scores = torch.empty((num_tokens, k), dtype=output_dtype(dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    tile_n, chunk, vector = _tiling(x, y, k)
    with device_of(x):
        row_per_thread_kernel[(triton.cdiv(num_tokens, 32),)](
            x, y, scores, indices, *x.stride(), *y.stride(), num_tokens,
            NUM_EXPERT_SQRT=num_expert_sqrt, K=k, TILE_M=32, TILE_N=tile_n,
            GROUP=max(8, triton.next_power_of_2(min(k, num_expert_sqrt))), CHUNK=chunk, VECTOR=vector,
            INDEX_BITS=INDEX_BITS[x.dtype], ROW_BITS=MAX_EXPERT_SQRT.bit_length() - 1,
            NVIDIA=not interpreting(), FP64=_compares_doubles(device), num_warps=1,
        )  # fmt: skip
    return scores.to(dtype), indices


@functools.cache
def runs_on(device):
    """Whether this kernel runs on a device: NVIDIA GPUs from Ampere on, and in the interpreter, which needs no PTX."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return interpreting() or (nvidia and torch.cuda.get_device_capability(device) >= (8, 0))


@functools.cache
def _compares_doubles(device):
    """Whether this GPU compares doubles as fast as integers: those for data centers do. The interpreter never does."""
    return (
        not interpreting()
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))
    )


def _tiling(x, y, k):
    """Columns of a tile, columns of a chunk, bytes of a load; no columns where rows cannot be staged."""
    num_expert_sqrt, itemsize = x.shape[1], x.element_size()
    widest = ROW_BYTES // itemsize // (2 if k > 16 else 1)
    tile_n = next(n for n in range(min(num_expert_sqrt, widest), 0, -1) if num_expert_sqrt % n == 0)
    starts = [address for logits in (x, y) for address in (logits.data_ptr(), logits.stride(0) * itemsize)]
    vector = next((v for v in (16, 8, 4) if all(bytes % v == 0 for bytes in (tile_n * itemsize, *starts))), 0)
    contiguous = x.stride(1) == y.stride(1) == 1 or num_expert_sqrt == 1
    if interpreting() or not (contiguous and vector and tile_n >= min(num_expert_sqrt, MIN_TILE)):
        return 0, 1, 0
    chunks = (c for c in (4, 2) if 4 <= c * itemsize <= vector and tile_n % c == 0 and tile_n >= 2 * c * k)
    return tile_n, next(chunks, 1), vector
